"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values (Yang et al. 2024, arXiv:2407.10671)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmkit.models import llama
from llmkit.models.attention import Window
from llmkit.models.llama import RESIDUAL, UNUSED, Model, to_hf

__all__ = ["DEFAULTS", "FIXED", "RESIDUAL", "UNUSED", "Config", "Model", "from_hf", "to_hf"]


@dataclass(kw_only=True)
class Shape(llama.Shape):
    """What Qwen2 and Qwen3 share: the upper layers may have a sliding window."""

    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28  # layers from the bottom that see all keys all the same

    @property
    def windows(self) -> list[Window]:
        window = self.sliding_window if self.use_sliding_window else None
        return [window if layer >= self.max_window_layers else None for layer in range(self.num_hidden_layers)]


@dataclass(kw_only=True)
class Config(Shape):
    model_type: ClassVar[str] = "qwen2"
    architecture: ClassVar[str] = "Qwen2ForCausalLM"
    qkv_bias: ClassVar[bool] = True


FIXED: dict = {}
DEFAULTS = {"rms_norm_eps": 1e-6, "num_attention_heads": 32, "num_key_value_heads": 32}


def from_hf(hf: dict) -> dict:
    """Our options from a config.json; `layer_types` says again what the window's other fields say."""
    options = llama.from_hf(hf)
    kinds = options.pop("layer_types", None)
    if isinstance(kinds, list) and "sliding_attention" in kinds:
        first = kinds.index("sliding_attention")
        plain = ["full_attention"] * first + ["sliding_attention"] * (len(kinds) - first)
        options |= (
            {"max_window_layers": first, "use_sliding_window": True} if kinds == plain else {"layer_types": kinds}
        )
    elif isinstance(kinds, list) and set(kinds) == {"full_attention"}:
        options["use_sliding_window"] = False
    elif kinds:
        options["layer_types"] = kinds
    return options
