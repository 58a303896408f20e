"""Falcon-7B: parallel attention and MLP under one norm, multi-query attention (arXiv:2311.16867)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.models import llama
from llmkit.models.attention import attend
from llmkit.models.causal import CausalLM, Context
from llmkit.models.family import Family, Gguf, rename
from llmkit.models.layers import MultiHeadSizes, TokenEmbedding, rope_problems, rope_table, rotate


@dataclass(kw_only=True)
class Config(MultiHeadSizes):
    model_type: ClassVar[str] = "falcon"
    kind: ClassVar[str] = "causal"

    vocab_size: int | None = None  # None: the tokenizer's
    hidden_size: int = 768
    intermediate_size: int | None = None  # None: 4 * hidden_size
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None
    layer_norm_epsilon: float = 1e-5
    bias: bool = False
    tie_word_embeddings: bool = True
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    initializer_range: float = 0.02
    init: Literal["normal", "zero", "xavier", "he"] = "normal"

    @property
    def num_key_value_heads(self) -> int:
        return 1


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.head_dim, self.dropout = config.head_dim, config.attention_dropout
        self.query_key_value = nn.Linear(config.hidden_size, config.hidden_size + 2 * self.head_dim, bias=config.bias)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        heads = self.query_key_value(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H + 2, T, D)
        q, k, v = heads[:, :-2], heads[:, -2:-1], heads[:, -1:]
        q, k = rotate(q, *context.rope), rotate(k, *context.rope)
        if context.cache is not None:
            k, v = context.cache.update(k, v)
        return self.dense(attend(q, k, v, context.masks[None], self.dropout if self.training else 0.0))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.bias)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x)))


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.dropout = config.hidden_dropout
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.self_attention = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        normed = self.input_layernorm(x)
        update = self.self_attention(normed, context) + self.mlp(normed)
        return x + F.dropout(update, self.dropout, self.training)


class Transformer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.word_embeddings = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)


class Model(CausalLM):
    def __init__(self, config: Config):
        super().__init__(config)
        self.transformer = Transformer(config)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer.h

    @property
    def norm(self) -> nn.Module:
        return self.transformer.ln_f

    @property
    def wte(self) -> nn.Embedding:
        return self.transformer.word_embeddings

    def embed(self, input_ids: Tensor, positions: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        config = self.config
        return self.wte(input_ids), rope_table(positions, config.head_dim, config.rope_theta, config.rope_scaling)


# ---- the family -----------------------------------------------------------------------------------------------------


def from_hf(hf: dict) -> dict:
    """Return our options from a config.json without its number of key heads, which multi-query attention ignores."""
    options = rename(llama.from_hf(hf), {"ffn_hidden_size": "intermediate_size", "n_embed": "hidden_size"})
    options.pop("num_kv_heads", None)
    return options


def to_hf(options: dict) -> dict:
    """Return the fields of a config.json for transformers."""
    options = llama.to_hf(options)
    return options | {"ffn_hidden_size": options.pop("intermediate_size"), "num_kv_heads": 1}


FALCON = llama.LLAMA | {
    "problems": rope_problems,
    "keys_values": ("query_key_value",),
    "writers": ("dense", "dense_4h_to_h"),
    "residual": ("dense", "dense_4h_to_h"),
    "from_hf": from_hf,
    "to_hf": to_hf,
    "hf_defaults": {"hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71},
    "prefix": "transformer.",
    "tag_head": ("classifier", True),
    "gated": lambda config: False,
    "gguf": Gguf("falcon", rms_norm=False, unsupported=lambda config: {"biases": config.bias}),
}
FAMILY = Family(
    **FALCON,
    config=Config,
    build=Model,
    architecture="FalconForCausalLM",
    fixed_values={
        "activation": "gelu",
        "alibi": False,
        "multi_query": True,
        "parallel_attn": True,
        "new_decoder_architecture": False,
        "num_ln_in_parallel_attn": None,
        "apply_residual_connection_post_layernorm": False,
    },
)
