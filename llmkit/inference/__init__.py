"""Generate text: sampling and decoding, a writer for the commands, and an OpenAI-compatible server."""
