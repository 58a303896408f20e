"""Declare the defaults for tokenizer training, shared by the YAML file and the command line. Nothing here imports pydantic."""

VOCAB_SIZE = 32_000
PATTERN = "gpt2"  # how text is split before merging; a name in tokenizer.PATTERNS
