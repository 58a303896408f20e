"""Parameter-efficient methods, by their name in the YAML. A new one is a file that fills `Method`, and a line here."""

from llmkit.peft import bitfit, lora
from llmkit.peft.method import Method

METHODS: dict[str, Method] = {"lora": lora.METHOD, "bitfit": bitfit.METHOD}
