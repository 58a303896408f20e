"""Methods that train a few parameters of a built model: each a file with `apply`, `merge`, and an adapter's layout."""

from collections.abc import Callable

from llmkit.peft import lora

METHODS: dict[str, Callable] = {"lora": lora.apply}
