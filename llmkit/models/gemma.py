"""Gemma: Llama with a gated GELU, wide heads, scaled embeddings and norms around 1 (arXiv:2403.08295)."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from llmkit.models import llama
from llmkit.models.family import Family, Gguf, rename
from llmkit.models.layers import RMSNorm


class Norm(RMSNorm):
    """Compute x / rms(x) * (1 + weight) in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        normed = x.float()
        normed = normed * torch.rsqrt(normed.square().mean(-1, keepdim=True) + self.eps)
        return (normed * (1.0 + self.weight.float())).to(x.dtype)


@dataclass(kw_only=True)
class Config(llama.BaseConfig):
    model_type: ClassVar[str] = "gemma"

    hidden_act: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    tie_word_embeddings: bool = True
    attention_bias: bool = False


def build(config: Config) -> llama.Model:
    """Build a Gemma, whose embeddings are scaled by the square root of the width."""
    bias, scale = config.attention_bias, math.sqrt(config.hidden_size)
    return llama.Model(config, llama.Variant(norm=Norm, qkv_bias=bias, output_bias=bias, embed_scale=scale))


ACTS = ("hidden_act", "hidden_activation")  # two spellings of one field


def from_hf(hf: dict) -> dict:
    """Return our options from a config.json; in Gemma's first files, `gelu` means its tanh approximation."""
    acts = {key: "gelu_pytorch_tanh" if hf[key] == "gelu" else hf[key] for key in ACTS if hf.get(key) is not None}
    return rename(llama.from_hf(hf | acts), dict.fromkeys(ACTS, "hidden_act"))


GEMMA = llama.LLAMA | {
    "norm_init": 0.0,
    "from_hf": from_hf,
    "hf_defaults": {
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
    },
    "gguf": Gguf(
        "gemma",
        "gelu_pytorch_tanh",
        unsupported=lambda config: {
            "biases of attention": config.attention_bias,
            "an untied head": not config.tie_word_embeddings,
        },
        layout=lambda config, name, tensor: {name: tensor + 1 if name.endswith("norm.weight") else tensor},
    ),
}
FAMILY = Family(
    **GEMMA,
    config=Config,
    build=build,
    architecture="GemmaForCausalLM",
    fixed_values={"use_bidirectional_attention": None},
)
