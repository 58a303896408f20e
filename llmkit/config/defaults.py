"""Declare the defaults that the YAML file and the command line share. Nothing here imports pydantic."""

VOCAB_SIZE = 32_000
PATTERN = "gpt2"  # how text is split before merging; a name in tokenizer.PATTERNS
