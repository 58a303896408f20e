"""GPT-2: pre-norm blocks of multi-head attention with learned positions, and a GELU MLP (Radford et al. 2019).

Module names are Hugging Face's weight names. Its linears are stored transposed on disk (Conv1D); here they are Linear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.models.layers import ChunkLoss, KVCache, attend, attention_mask, head

RESIDUAL = ("c_proj",)
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


@dataclass(kw_only=True)
class Config:
    vocab_size: int | None = None  # None: the tokenizer's
    hidden_size: int = 768
    intermediate_size: int | None = None  # None: 4 * hidden_size
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 1024
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True
    embd_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    resid_pdrop: float = 0.0
    initializer_range: float = 0.02
    init: Literal["normal", "xavier", "he"] = "normal"

    def __post_init__(self):
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size

    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.attn_pdrop, self.resid_pdrop = config.attn_pdrop, config.resid_pdrop
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
            for part in self.c_attn(x).chunk(3, dim=-1)
        )
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        x = self.c_proj(attend(q, k, v, mask, self.attn_pdrop if self.training else 0.0))
        return F.dropout(x, self.resid_pdrop, self.training)


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.resid_pdrop = config.resid_pdrop
        self.c_fc = nn.Linear(config.hidden_size, config.intermediate_size)
        self.c_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return F.dropout(x, self.resid_pdrop, self.training)


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.embd_pdrop = config.embd_pdrop
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.h = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    def forward(
        self, input_ids: Tensor, positions: Tensor | None, segments: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        length, past = input_ids.shape[1], cache.length if cache else 0
        if positions is None:
            positions = torch.arange(past, past + length, device=input_ids.device)
        mask = attention_mask(segments, length, past, input_ids.device)
        x = self.wte(input_ids) + self.wpe(positions)  # (B, T, hidden)
        x = F.dropout(x, self.embd_pdrop, self.training)
        for block in self.h:
            x = block(x, mask, cache)
        if cache is not None:
            cache.length += length
        return self.ln_f(x)


class Model(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.chunk_loss = ChunkLoss()
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer.h

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
        hidden = self.transformer(input_ids, positions, segments, cache)
        weight = self.transformer.wte.weight if self.lm_head is None else self.lm_head.weight
        return head(hidden, weight, labels, reduction, self.chunk_loss)


# ---- Hugging Face's config.json -------------------------------------------------------------------------------------

NAMES = {  # ours -> Hugging Face's
    "hidden_size": "n_embd", "intermediate_size": "n_inner", "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head", "max_position_embeddings": "n_positions",
}  # fmt: skip
FIXED = {  # fields that change the mathematics, and the only value that is built here
    "activation_function": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False, "add_cross_attention": False,
}  # fmt: skip


def from_hf(hf: dict) -> dict:
    """Our options from a config.json."""
    ours = {theirs: name for name, theirs in NAMES.items()}
    return {ours.get(key, key): value for key, value in hf.items()}


def to_hf(options: dict) -> dict:
    """A config.json for transformers."""
    renamed = {NAMES.get(key, key): value for key, value in options.items()}
    return renamed | FIXED | {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
