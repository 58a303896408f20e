"""Mistral: Llama whose queries see a sliding window of keys (Jiang et al. 2023, arXiv:2310.06825)."""

from dataclasses import dataclass
from typing import ClassVar

from llmkit.models import llama
from llmkit.models.attention import Window
from llmkit.models.family import Family


@dataclass(kw_only=True)
class Config(llama.BaseConfig):
    model_type: ClassVar[str] = "mistral"

    sliding_window: int | None = 4096  # keys that a query sees, its own the last; None: all

    @property
    def windows(self) -> list[Window]:
        return [self.sliding_window] * self.num_hidden_layers


HF_DEFAULTS = {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131_072}
MISTRAL = llama.LLAMA | {"hf_defaults": llama.HF_DEFAULTS | HF_DEFAULTS}
FAMILY = Family(**MISTRAL, config=Config, build=llama.Model, architecture="MistralForCausalLM")
