"""Llama: pre-norm blocks of grouped-query attention with rotary positions, and a gated MLP.

Touvron et al. 2023 (arXiv:2302.13971, arXiv:2307.09288), Llama 3 (arXiv:2407.21783). Mistral, Qwen, Gemma and Mixtral
are this with a few fields changed: each has a file of its own. Module names are Hugging Face's weight names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from llmkit.models.attention import Window, attend
from llmkit.models.causal import CausalLM, Context
from llmkit.models.layers import ACTIVATIONS, RMSNorm, rope_table, rotate

RESIDUAL = ("o_proj", "down_proj")


@dataclass(kw_only=True)
class Shape:
    """What Llama and its kin share; what sets one apart is a field or a constant of its own Config."""

    kind: ClassVar[str] = "causal"
    gated: ClassVar[bool] = True
    norm: ClassVar[type[nn.Module]] = RMSNorm
    qk_norm: ClassVar[bool] = False  # queries and keys are normed, head by head
    qkv_bias: ClassVar[bool] = False
    attention_bias: ClassVar[bool] = False  # of the output projection, and of queries, keys and values
    mlp_bias: ClassVar[bool] = False
    embed_scale: ClassVar[float] = 1.0

    vocab_size: int | None = None  # None: the tokenizer's
    hidden_size: int = 768
    intermediate_size: int | None = None  # None: 8/3 of the width, rounded up to a multiple of 64
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    hidden_act: Literal["silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2"] = "silu"
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0
    rope_scaling: dict[str, Any] | None = None  # {rope_type: linear, llama3 or yarn, factor: 8.0, ...}
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    init: Literal["normal", "zero", "xavier", "he"] = "normal"

    def __post_init__(self):
        if self.intermediate_size is None:
            self.intermediate_size = -(-8 * self.hidden_size // 3 // 64) * 64
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(1, self.num_attention_heads)

    @property
    def windows(self) -> list[Window]:
        """How many keys a query sees in each layer; None: all."""
        return [None] * self.num_hidden_layers


@dataclass(kw_only=True)
class Config(Shape):
    model_type: ClassVar[str] = "llama"
    architecture: ClassVar[str] = "LlamaForCausalLM"

    attention_bias: bool = False
    mlp_bias: bool = False


class Attention(nn.Module):
    def __init__(self, config: Shape, layer: int):
        super().__init__()
        self.head_dim, self.dropout = config.head_dim, config.attention_dropout
        self.window = config.windows[layer]
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        bias = config.qkv_bias or config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.attention_bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(self.q_norm(q), *context.rope), rotate(self.k_norm(k), *context.rope)
        if context.cache is not None:
            k, v = context.cache.update(k, v)
        return self.o_proj(attend(q, k, v, context.masks[self.window], self.dropout if self.training else 0.0))


class MLP(nn.Module):
    def __init__(self, config: Shape):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: Shape, layer: int):
        super().__init__()
        self.input_layernorm = config.norm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = config.norm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: Shape, block: type[nn.Module]):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(block(config, i) for i in range(config.num_hidden_layers))
        self.norm = config.norm(config.hidden_size, config.rms_norm_eps)


class Model(CausalLM):
    def __init__(self, config: Shape, block: type[nn.Module] = Block):
        super().__init__(config)
        self.model = Decoder(config, block)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.layers

    @property
    def norm(self) -> nn.Module:
        return self.model.norm

    @property
    def wte(self) -> nn.Embedding:
        return self.model.embed_tokens

    def embed(self, input_ids: Tensor, positions: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        config = self.config
        rope = rope_table(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        x = self.wte(input_ids)
        scale = torch.tensor(config.embed_scale, dtype=x.dtype)  # rounded as transformers rounds it
        return x if config.embed_scale == 1.0 else x * scale, rope


# ---- Hugging Face's config.json -------------------------------------------------------------------------------------

FIXED = {"pretraining_tp": 1, "rope_interleaved": False}  # what changes the mathematics; only these values are built
DEFAULTS = {  # transformers', where ours differ and a config.json may be silent
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
}
UNUSED = re.compile(r".*rotary_emb\.inv_freq")  # constants that old files store


def from_hf(hf: dict) -> dict:
    """Our options from a config.json: transformers 5 moved the rotary base and its scaling into `rope_parameters`."""
    hf = dict(hf)
    scaling, rope = hf.pop("rope_scaling", None), hf.pop("rope_parameters", None)
    odd = [part for part in (scaling, rope) if part and not isinstance(part, dict)]
    if odd or not (scaling or rope):
        return hf | ({"rope_scaling": odd[0]} if odd else {})  # what it should not be is refused with the rest
    rope = dict(scaling or rope)  # of both the older one counts, as in transformers
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    if "rope_theta" in rope:
        hf["rope_theta"] = rope.pop("rope_theta")
    if kind != "default" or rope:
        hf["rope_scaling"] = {"rope_type": kind, **rope}
        if kind == "yarn":  # the trained length, unless it says so
            hf["rope_scaling"].setdefault("original_max_position_embeddings", hf.get("max_position_embeddings"))
    return hf


def to_hf(options: dict) -> dict:
    """A config.json that transformers 4 and 5 read alike."""
    rope = {"rope_type": "default", **(options["rope_scaling"] or {}), "rope_theta": options["rope_theta"]}
    return options | {"rope_parameters": rope}
