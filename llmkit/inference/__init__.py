"""Serve text: a writer for the commands, and an OpenAI-compatible server."""
