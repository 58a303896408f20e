"""Gemma: Llama with a gated GELU, wide heads, scaled embeddings and norms around 1 (arXiv:2403.08295)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from llmkit.models import llama
from llmkit.models.layers import RMSNorm
from llmkit.models.llama import RESIDUAL, UNUSED, Model, to_hf

__all__ = ["DEFAULTS", "FIXED", "RESIDUAL", "UNUSED", "Config", "Model", "from_hf", "to_hf"]


class Norm(RMSNorm):
    """x / rms(x) * (1 + weight), all of it in fp32."""

    neutral = 0.0  # what its weight begins as

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.float())).to(x.dtype)


@dataclass(kw_only=True)
class Config(llama.Shape):
    model_type: ClassVar[str] = "gemma"
    architecture: ClassVar[str] = "GemmaForCausalLM"
    norm: ClassVar[type[nn.Module]] = Norm

    hidden_act: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    tie_word_embeddings: bool = True
    attention_bias: bool = False

    @property
    def embed_scale(self) -> float:
        return math.sqrt(self.hidden_size)


FIXED = {"use_bidirectional_attention": None}
DEFAULTS = {
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
}


def from_hf(hf: dict) -> dict:
    """Our options from a config.json; Gemma's first files say `gelu` and mean its approximation by tanh."""
    options = llama.from_hf(hf)
    named = options.pop("hidden_activation", None) or options.get("hidden_act", "gelu_pytorch_tanh")
    return options | {"hidden_act": "gelu_pytorch_tanh" if named == "gelu" else named}
