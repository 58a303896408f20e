"""Qwen3: Qwen2 without biases, but with norms on queries and keys (Yang et al. 2025, arXiv:2505.09388)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmkit.models import qwen2
from llmkit.models.llama import RESIDUAL, UNUSED, Model, to_hf
from llmkit.models.qwen2 import FIXED, from_hf

__all__ = ["DEFAULTS", "FIXED", "RESIDUAL", "UNUSED", "Config", "Model", "from_hf", "to_hf"]


@dataclass(kw_only=True)
class Config(qwen2.Shape):
    model_type: ClassVar[str] = "qwen3"
    architecture: ClassVar[str] = "Qwen3ForCausalLM"
    qk_norm: ClassVar[bool] = True

    attention_bias: bool = False


DEFAULTS = qwen2.DEFAULTS | {"head_dim": 128}
