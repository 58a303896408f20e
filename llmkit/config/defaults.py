"""Declare the defaults that the YAML file and the command line share. Nothing here imports pydantic."""

VOCAB_SIZE = 32_000
PATTERN = "gpt2"  # how text is split before merging; a name in tokenizer.PATTERNS
MAX_BAD_FRACTION = 0.01  # of the records, and of the bytes, that may be bad and left out
