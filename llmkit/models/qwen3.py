"""Qwen3: Qwen2 without biases, but with norms on queries and keys (Yang et al. 2025, arXiv:2505.09388)."""

from dataclasses import dataclass
from typing import ClassVar

from llmkit.models import llama, qwen2
from llmkit.models.family import Family, Gguf


@dataclass(kw_only=True)
class Config(qwen2.BaseConfig):
    model_type: ClassVar[str] = "qwen3"

    attention_bias: bool = False


def build(config: Config) -> llama.Model:
    """Build a Qwen3."""
    bias = config.attention_bias
    return llama.Model(config, llama.Variant(qk_norm=True, qkv_bias=bias, output_bias=bias))


QWEN3 = qwen2.QWEN | {
    "hf_defaults": qwen2.HF_DEFAULTS | {"head_dim": 128},
    "gguf": Gguf("qwen3", "silu", unsupported=lambda config: {"biases of attention": config.attention_bias}),
}
FAMILY = Family(**QWEN3, config=Config, build=build, architecture="Qwen3ForCausalLM")
