"""Text from a model: generation, a writer for commands, and an OpenAI-compatible server."""
