"""Tokenizers: load, encode, train, and render chat templates."""
