"""Declare the defaults that the YAML file and the command line share. Nothing here imports pydantic."""

from pathlib import Path

HERE = Path(__file__).parents[1]
EXAMPLES = HERE / "configs" if (HERE / "configs").is_dir() else HERE.parent / "configs"  # installed, or a checkout
VOCAB_SIZE = 32_000
PATTERN = "gpt2"  # how text is split before merging; a name in tokenizer.PATTERNS
MAX_BAD_FRACTION = 0.01  # of the records, and of the bytes, that may be bad and left out
TASKS = EXAMPLES / "tasks"  # task files that come with llmkit
