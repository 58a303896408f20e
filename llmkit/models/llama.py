"""Llama: pre-norm blocks of grouped-query attention with rotary positions, and a SwiGLU MLP.

Touvron et al. 2023 (arXiv:2302.13971, arXiv:2307.09288). Module names are Hugging Face's weight names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.models.layers import ChunkLoss, KVCache, RMSNorm, attend, attention_mask, head, rope_table, rotate

RESIDUAL = ("o_proj", "down_proj")


@dataclass(kw_only=True)
class Config:
    vocab_size: int | None = None  # None: the tokenizer's
    hidden_size: int = 768
    intermediate_size: int | None = None  # None: 8/3 of the width, rounded up to a multiple of 64
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    init: Literal["normal", "xavier", "he"] = "normal"

    def __post_init__(self):
        if self.intermediate_size is None:
            self.intermediate_size = -(-8 * self.hidden_size // 3 // 64) * 64
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(1, self.num_attention_heads)


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer, self.head_dim, self.dropout = layer, config.head_dim, config.attention_dropout
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        return self.o_proj(attend(q, k, v, mask, self.dropout if self.training else 0.0))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, input_ids: Tensor, positions: Tensor | None, segments: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        length, past = input_ids.shape[1], cache.length if cache else 0
        if positions is None:
            positions = torch.arange(past, past + length, device=input_ids.device)
        cos, sin = rope_table(positions, self.config.head_dim, self.config.rope_theta)
        if positions.dim() == 2:
            cos, sin = cos[:, None], sin[:, None]  # (B, 1, T, D)
        mask = attention_mask(segments, length, past, input_ids.device)
        x = self.embed_tokens(input_ids)  # (B, T, hidden)
        for block in self.layers:
            x = block(x, cos, sin, mask, cache)
        if cache is not None:
            cache.length += length
        return self.norm(x)


class Model(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.chunk_loss = ChunkLoss()
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.layers

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        reduction: str = "sum",
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits (B, T, V) of input_ids (B, T); with aligned labels (B, T), their losses: see `linear_cross_entropy`.

        positions, segments  (B, T), for packed rows; cache: continue after the tokens it holds
        """
        hidden = self.model(input_ids, positions, segments, cache)
        weight = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return head(hidden, weight, labels, reduction, self.chunk_loss)


# ---- Hugging Face's config.json -------------------------------------------------------------------------------------

FIXED = {  # fields that change the mathematics, and the only value that is built here
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_scaling": None, "pretraining_tp": 1,
    "rope_interleaved": False,
}  # fmt: skip


def from_hf(hf: dict) -> dict:
    """Our options from a config.json: only the rotary base moved, in transformers 5, into `rope_parameters`."""
    hf = {"rms_norm_eps": 1e-6, "num_attention_heads": 32} | hf  # transformers' defaults, where ours differ unseen
    rope = hf.pop("rope_parameters", None) or {}
    plain = isinstance(rope, dict) and rope.get("rope_type", rope.get("type", "default")) == "default"
    if not plain or rope.keys() - {"rope_type", "type", "rope_theta"}:
        hf["rope_scaling"] = rope
    elif "rope_theta" in rope:
        hf["rope_theta"] = rope["rope_theta"]
    return hf


def to_hf(options: dict) -> dict:
    """A config.json that transformers 4 and 5 read alike."""
    rope = {"rope_type": "default", "rope_theta": options["rope_theta"]}
    return options | FIXED | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_parameters": rope}
