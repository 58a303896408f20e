"""Llama: pre-norm blocks of grouped-query attention with rotary positions, and a gated MLP.

Touvron et al. 2023 (arXiv:2302.13971, arXiv:2307.09288), Llama 3 (arXiv:2407.21783). Mistral, Qwen, Gemma and Mixtral
change a few fields in their own files. Module names are Hugging Face's weight names.
"""

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from llmkit.models.attention import Window, attend
from llmkit.models.causal import CausalLM, Context
from llmkit.models.family import Family, Gguf, unite
from llmkit.models.layers import ACTIVATIONS, RMSNorm, TokenEmbedding, rope_problems, rope_table, rotate

ACTIVATION_NAMES = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh"}  # in config.json -> ours


@dataclass(kw_only=True)
class BaseConfig:
    """Options that Llama and its variants share."""

    kind: ClassVar[str] = "causal"

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
        """Return the number of keys that a query sees in each layer; None: all."""
        return [None] * self.num_hidden_layers


@dataclass(kw_only=True)
class Config(BaseConfig):
    model_type: ClassVar[str] = "llama"

    attention_bias: bool = False  # of the output projection, and of queries, keys and values
    mlp_bias: bool = False


@dataclass(frozen=True)
class Variant:
    """Differences of a variant of Llama that are not options of its Config."""

    norm: type[nn.Module] = RMSNorm
    qk_norm: bool = False  # norms of queries and keys, per head
    qkv_bias: bool = False
    output_bias: bool = False  # of attention's output projection
    mlp_bias: bool = False
    embed_scale: float = 1.0


class Attention(nn.Module):
    def __init__(self, config: BaseConfig, variant: Variant, layer: int):
        super().__init__()
        self.head_dim, self.dropout = config.head_dim, config.attention_dropout
        self.window = config.windows[layer]
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=variant.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=variant.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=variant.qkv_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=variant.output_bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if variant.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if variant.qk_norm else nn.Identity()

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(self.q_norm(q), *context.rope), rotate(self.k_norm(k), *context.rope)
        if context.cache is not None:
            k, v = context.cache.update(k, v)
        return self.o_proj(
            attend(q, k, v, context.masks[self.window], self.dropout if self.training else 0.0, window=self.window)
        )


class MLP(nn.Module):
    def __init__(self, config: BaseConfig, variant: Variant):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=variant.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=variant.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=variant.mlp_bias)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: BaseConfig, variant: Variant, layer: int):
        super().__init__()
        self.input_layernorm = variant.norm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, variant, layer)
        self.post_attention_layernorm = variant.norm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, variant)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: BaseConfig, variant: Variant, block: type[nn.Module]):
        super().__init__()
        self.embed_tokens = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(block(config, variant, i) for i in range(config.num_hidden_layers))
        self.norm = variant.norm(config.hidden_size, config.rms_norm_eps)


class Model(CausalLM):
    def __init__(self, config: BaseConfig, variant: Variant = Variant(), block: type[nn.Module] = Block):
        super().__init__(config)
        self.embed_scale = variant.embed_scale
        self.model = Decoder(config, variant, block)

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
        scale = torch.tensor(self.embed_scale, dtype=x.dtype)  # rounded as in transformers
        return x if self.embed_scale == 1.0 else x * scale, rope


# ---- the family -----------------------------------------------------------------------------------------------------

HF_DEFAULTS = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
}


def build(config: Config) -> Model:
    """Build a Llama, whose biases are options."""
    bias = config.attention_bias
    return Model(config, Variant(qkv_bias=bias, output_bias=bias, mlp_bias=config.mlp_bias))


def from_hf(hf: dict) -> dict:
    """Return our options from a config.json. transformers 5 has rotary base and scaling in `rope_parameters`."""
    hf, spelt = dict(hf), []
    if isinstance(hf.get("hidden_act"), str):
        hf["hidden_act"] = ACTIVATION_NAMES.get(hf["hidden_act"], hf["hidden_act"])
    if "rope_theta" in hf:
        spelt.append(("rope_theta", "rope_theta", hf.pop("rope_theta")))
    for field in ("rope_scaling", "rope_parameters"):
        section = hf.pop(field, None)
        if section and not isinstance(section, dict):
            return hf | {"rope_scaling": section}  # `read_config` refuses it
        names = {"type": "rope_type"}
        spelt += [(f"{field}.{key}", names.get(key, key), value) for key, value in (section or {}).items()]
    rope = unite(spelt)
    kind = rope.pop("rope_type", "default")
    if "rope_theta" in rope:
        hf["rope_theta"] = rope.pop("rope_theta")
    rope.pop("finetuned", None)  # in the configs of YaRN's authors; it changes nothing
    if kind in ("llama3", "yarn"):  # as in transformers, a length beside the section comes before the one in it
        length = "original_max_position_embeddings"
        given = (hf.pop(length, None), rope.get(length), hf.get("max_position_embeddings"))
        rope[length] = next((value for value in given if value is not None), None)
    if kind != "default" or rope:
        hf["rope_scaling"] = {"rope_type": kind, **rope}
    return hf


def to_hf(options: dict) -> dict:
    """Return a config.json that transformers 4 and 5 read."""
    rope = {"rope_type": "default", **(options["rope_scaling"] or {}), "rope_theta": options["rope_theta"]}
    return options | {"rope_parameters": rope}


def gguf_layout(config: BaseConfig, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Reorder the rows of queries and keys: llama.cpp rotates a channel together with its neighbour."""
    if not re.search(r"\.[qk]_proj\.", name):
        return {name: tensor}
    return {name: tensor.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)}


LLAMA = {  # fields that all variants share
    "problems": rope_problems,
    "residual": ("o_proj", "down_proj"),
    "from_hf": from_hf,
    "to_hf": to_hf,
    "hf_defaults": HF_DEFAULTS,
    "ignored_weights": re.compile(r".*rotary_emb\.inv_freq"),  # constants in old files
    "prefix": "model.",
    "gated": lambda config: True,
    "gguf": Gguf("llama", "silu", llama3_rope=True, layout=gguf_layout),
}
FAMILY = Family(
    **LLAMA,
    config=Config,
    build=build,
    architecture="LlamaForCausalLM",
    fixed_values={"pretraining_tp": 1, "rope_interleaved": False},
)
