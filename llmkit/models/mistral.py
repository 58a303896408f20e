"""Mistral: Llama whose queries see a sliding window of keys (Jiang et al. 2023, arXiv:2310.06825)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmkit.models import llama
from llmkit.models.attention import Window
from llmkit.models.llama import RESIDUAL, UNUSED, Model, from_hf, to_hf

__all__ = ["DEFAULTS", "FIXED", "RESIDUAL", "UNUSED", "Config", "Model", "from_hf", "to_hf"]


@dataclass(kw_only=True)
class Config(llama.Shape):
    model_type: ClassVar[str] = "mistral"
    architecture: ClassVar[str] = "MistralForCausalLM"

    sliding_window: int | None = 4096  # keys that a query sees, its own the last; None: all

    @property
    def windows(self) -> list[Window]:
        return [self.sliding_window] * self.num_hidden_layers


FIXED: dict = {}
DEFAULTS = llama.DEFAULTS | {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131_072}
