"""T5: an encoder and a decoder with relative position biases (Raffel et al. 2019, arXiv:1910.10683).

Version 1.1's gated MLP and untied head are options. Module names are Hugging Face's weight names.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.models.attention import KVCache, LayerCache, attend, attention_mask, visible
from llmkit.models.family import Family, Problem, rename, unite
from llmkit.models.layers import ACTIVATIONS, Head, RMSNorm, TokenEmbedding, token_tables
from llmkit.models.loss import ChunkLoss, Logits, linear_cross_entropy


@dataclass(kw_only=True)
class Config:
    model_type: ClassVar[str] = "t5"
    kind: ClassVar[str] = "seq2seq"
    initializer_range: ClassVar[float] = 0.02  # of weights that `init_stds` does not name

    vocab_size: int | None = None  # None: the tokenizer's
    hidden_size: int = 512
    intermediate_size: int | None = None  # None: 4 * hidden_size
    num_hidden_layers: int = 6  # of the encoder
    num_decoder_layers: int | None = None  # None: as many as the encoder
    num_attention_heads: int = 8
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    feed_forward_proj: Literal["relu", "gated-gelu", "gated-silu"] = "gated-gelu"
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    max_position_embeddings: int = 512  # the longest text to read or write; no weight depends on it
    layer_norm_epsilon: float = 1e-6
    tie_word_embeddings: bool = True
    dropout_rate: float = 0.0
    decoder_start_token_id: int = 0  # also the padding token
    init: Literal["normal", "zero", "xavier", "he"] = "normal"

    def __post_init__(self):
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.num_decoder_layers is None:
            self.num_decoder_layers = self.num_hidden_layers
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(1, self.num_attention_heads)

    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads

    @property
    def windows(self) -> list[None]:
        """Return the windows of the decoder's layers."""
        return [None] * self.num_decoder_layers


def is_gated(config: Config) -> bool:
    """Return whether the MLPs have a gate."""
    return config.feed_forward_proj.startswith("gated-")


def init_stds(config: Config) -> dict[str, float]:
    """Return T5's standard deviations, by name: input width^-0.5, smaller for queries, as scores are not scaled.

    They are those of Raffel et al.'s code and of transformers, except that an untied head is like other matrices.
    """
    std = config.hidden_size**-0.5
    return dict.fromkeys(("k", "v", "relative_attention_bias", "wi", "wi_0", "wi_1", "lm_head"), std) | {
        "shared": 1.0,
        "q": std * config.head_dim**-0.5,
        "o": (config.num_attention_heads * config.head_dim) ** -0.5,
        "wo": config.intermediate_size**-0.5,
    }


class Context(NamedTuple):
    """Arguments of a block besides the hidden states."""

    bias: Tensor  # (1 or B, H, T, S) added to the scores of self-attention; -inf where a key is masked
    encoded: Tensor | None = None  # (B, S, hidden), for the decoder
    seen: Tensor | None = None  # (B, 1, 1, S), False for padding; None: no padding
    cache: LayerCache | None = None  # of this layer


class Attention(nn.Module):
    def __init__(self, config: Config, has_bias: bool = False):
        super().__init__()
        self.head_dim, self.dropout = config.head_dim, config.dropout_rate
        width = config.num_attention_heads * config.head_dim
        self.q = nn.Linear(config.hidden_size, width, bias=False)
        self.k = nn.Linear(config.hidden_size, width, bias=False)
        self.v = nn.Linear(config.hidden_size, width, bias=False)
        self.o = nn.Linear(width, config.hidden_size, bias=False)
        if has_bias:
            buckets = config.relative_attention_num_buckets
            self.relative_attention_bias = nn.Embedding(buckets, config.num_attention_heads)

    def split_heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        mask = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
        return self.o(attend(q, k, v, mask, self.dropout if self.training else 0.0, causal=False, scale=1.0))


class SelfLayer(nn.Module):
    def __init__(self, config: Config, has_bias: bool):
        super().__init__()
        self.SelfAttention = Attention(config, has_bias)
        self.layer_norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        attention, x = self.SelfAttention, self.layer_norm(x)
        q, k, v = (attention.split_heads(project(x)) for project in (attention.q, attention.k, attention.v))
        if context.cache is not None:
            k, v = context.cache.update(k, v)
        return attention(q, k, v, context.bias)


class CrossLayer(nn.Module):
    """Attend from the decoder to the encoder's states, whose keys and values are computed once and cached."""

    def __init__(self, config: Config):
        super().__init__()
        self.EncDecAttention = Attention(config)
        self.layer_norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        attention = self.EncDecAttention
        q = attention.split_heads(attention.q(self.layer_norm(x)))
        if context.cache is not None and context.cache.cross is not None:
            k, v = context.cache.cross
        else:
            k, v = (attention.split_heads(project(context.encoded)) for project in (attention.k, attention.v))
            if context.cache is not None:
                context.cache.cross = k, v
        return attention(q, k, v, context.seen)


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gated, self.dropout = is_gated(config), config.dropout_rate
        act = config.feed_forward_proj.removeprefix("gated-")
        self.act = ACTIVATIONS["gelu_pytorch_tanh" if act == "gelu" else act]
        if self.gated:
            self.wi_0 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
            self.wi_1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        else:
            self.wi = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.wo = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.wi_0(x)) * self.wi_1(x) if self.gated else self.act(self.wi(x))
        return self.wo(F.dropout(x, self.dropout, self.training))


class MLPLayer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.DenseReluDense = MLP(config)
        self.layer_norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.DenseReluDense(self.layer_norm(x))


class Block(nn.Module):
    def __init__(self, config: Config, first: bool, decodes: bool):
        super().__init__()
        self.dropout = config.dropout_rate
        cross = [CrossLayer(config)] if decodes else []
        self.layer = nn.ModuleList([SelfLayer(config, first), *cross, MLPLayer(config)])

    def forward(self, x: Tensor, context: Context) -> Tensor:
        for layer in self.layer:
            x = x + F.dropout(layer(x, context), self.dropout, self.training)
        return x


class Stack(nn.Module):
    def __init__(self, config: Config, depth: int, decodes: bool):
        super().__init__()
        self.config, self.decodes, self.dropout = config, decodes, config.dropout_rate
        self.block = nn.ModuleList(Block(config, i == 0, decodes) for i in range(depth))
        self.final_layer_norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)

    def bias(self, queries: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
        """Return the biases of the scores, (1 or B, H, T, S), for columns of queries (T,) and keys (S,)."""
        buckets, longest = self.config.relative_attention_num_buckets, self.config.relative_attention_max_distance
        table = self.block[0].layer[0].SelfAttention.relative_attention_bias
        distance = keys - queries[:, None]  # (T, S)
        bias = table(bucket(distance, buckets, longest, bidirectional=not self.decodes)).float().permute(2, 0, 1)[None]
        return bias if mask is None else bias.masked_fill(~mask, -torch.inf)

    def forward(self, x: Tensor, contexts: list[Context]) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        for block, context in zip(self.block, contexts, strict=True):
            x = block(x, context)
        return F.dropout(self.final_layer_norm(x), self.dropout, self.training)


def bucket(distance: Tensor, buckets: int, longest: int, bidirectional: bool) -> Tensor:
    """Return the bucket of a distance (key column - query column): exact when near, logarithmic when far.

    bidirectional  half of the buckets for each direction; False: all buckets for keys before the query

    >>> bucket(torch.tensor([0, -1, -7, -8, -127, -9999, 3]), 16, 128, bidirectional=False).tolist()
    [0, 1, 7, 8, 15, 15, 0]
    """
    offset = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = (distance > 0).long() * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    log = torch.log(distance.float() / exact) / math.log(longest / exact) * (buckets - exact)
    far = (exact + log.clamp(min=0).long()).clamp(max=buckets - 1)
    return offset + torch.where(distance < exact, distance, far)


class Model(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.chunk_loss, self.to_logits = ChunkLoss(), Logits()
        self.shared = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.encoder = Stack(config, config.num_hidden_layers, decodes=False)
        self.decoder = Stack(config, config.num_decoder_layers, decodes=True)
        self.lm_head = None if config.tie_word_embeddings else Head(config.hidden_size, config.vocab_size)

    @property
    def blocks(self) -> nn.ModuleList:
        return nn.ModuleList([*self.encoder.block, *self.decoder.block])

    @property
    def norm(self) -> nn.Module:
        return self.decoder.final_layer_norm

    @property
    def wte(self) -> nn.Embedding:
        return self.shared

    def encode(self, input_ids: Tensor, segments: Tensor | None = None) -> Tensor:
        """Return the encoder's states (B, S, hidden); segments (B, S) is negative for padding."""
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        mask = attention_mask(segments, len(columns), None, input_ids.device, causal=False)
        context = Context(self.encoder.bias(columns, columns, mask))
        return self.encoder(self.shared(input_ids), [context] * len(self.encoder.block))

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        decoder_input_ids: Tensor | None = None,
        reduction: str = "sum",
        segments: Tensor | None = None,
        cache: KVCache | None = None,
        logits_to_keep: int = 0,
    ) -> Tensor:
        """Return logits (B, T, V) after each of decoder_input_ids (B, T), or with labels (B, T) the losses.

        input_ids  (B, S), of the encoder
        segments   (B, S), negative for padding
        cache      continue after its tokens; it holds the encoder's states, so input_ids are the decoder's next tokens
        """
        if cache is None:
            encoded, decoder_ids = self.encode(input_ids, segments), decoder_input_ids
            encoded_mask = None if segments is None else (segments >= 0)[:, None, None]  # (B, 1, 1, S)
            columns = torch.arange(decoder_ids.shape[1], device=decoder_ids.device)
            bias = self.decoder.bias(columns, columns, visible(columns[:, None], columns, None))
            contexts = [Context(bias, encoded, encoded_mask)] * len(self.decoder.block)
        else:
            decoder_ids, length = input_ids, input_ids.shape[1]
            columns, _ = cache.begin(length)
            keys = cache.layers[0].columns(length)
            bias = self.decoder.bias(columns, keys, visible(columns[:, None], keys, None))
            contexts = [Context(bias, cache.encoded, cache.encoded_mask, layer) for layer in cache.layers]
            cache.length += length
        hidden = self.decoder(self.shared(decoder_ids), contexts)[:, -logits_to_keep:]
        if self.lm_head is None:
            hidden = hidden * self.config.hidden_size**-0.5  # version 1.0, with a tied head, scales
        weight = token_tables(self)[-1].rows()
        if labels is None:
            return self.to_logits(hidden, weight)
        return linear_cross_entropy(hidden, weight, labels, reduction, chunk_loss=self.chunk_loss)


# ---- the family -----------------------------------------------------------------------------------------------------

HF_NAMES = {  # our option -> Hugging Face's
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "head_dim": "d_kv",
    "max_position_embeddings": "n_positions",
}
CROSS_KEYS_AND_VALUES = ("EncDecAttention.k.weight", "EncDecAttention.v.weight")


def problems(config: Config) -> Iterator[Problem]:
    """Yield the problems of the buckets of distances and the start token."""
    buckets, longest = config.relative_attention_num_buckets, config.relative_attention_max_distance
    if buckets < 4:
        yield "relative_attention_num_buckets", f"is {buckets}, but must be at least 4"
    elif longest <= buckets // 2:
        yield "relative_attention_max_distance", f"is {longest}, but must be over half of {buckets} buckets"
    if config.vocab_size is not None and config.decoder_start_token_id >= config.vocab_size:
        yield "decoder_start_token_id", f"is {config.decoder_start_token_id}, but there are {config.vocab_size} tokens"


def from_hf(hf: dict) -> dict:
    """Return our options from a config.json; transformers 5 ties every T5, and `scale_decoder_outputs` decides."""
    options = rename(hf, {theirs: name for name, theirs in HF_NAMES.items()})
    options.pop("initializer_factor", None)
    kind = str(options.get("feed_forward_proj", "relu"))
    derived = [("dense_act_fn", "act", options.pop("dense_act_fn", None))]
    derived += [("is_gated_act", "gated", options.pop("is_gated_act", None))]
    act = "gelu_new" if kind == "gated-gelu" else kind.removeprefix("gated-")
    unite([("feed_forward_proj", "act", act), ("feed_forward_proj", "gated", kind.startswith("gated-")), *derived])
    tied = options.pop("scale_decoder_outputs", options.get("tie_word_embeddings", True))
    return options | {"tie_word_embeddings": tied}


def to_hf(options: dict) -> dict:
    """Return the fields of a config.json for transformers."""
    return {HF_NAMES.get(key, key): value for key, value in options.items()} | {
        "pad_token_id": options["decoder_start_token_id"],
        "scale_decoder_outputs": options["tie_word_embeddings"],
    }


FAMILY = Family(
    config=Config,
    build=Model,
    keys_values=("k", "v"),
    writers=("o", "wo"),
    architecture="T5ForConditionalGeneration",
    problems=problems,
    residual=("o", "wo"),
    init_stds=init_stds,
    from_hf=from_hf,
    to_hf=to_hf,
    fixed_values={"is_encoder_decoder": True},
    hf_defaults={"dropout_rate": 0.1, "feed_forward_proj": "relu", "head_dim": 64, "intermediate_size": 2048},
    ignored_weights=re.compile(
        r"(en|de)coder\.embed_tokens\.weight"
        r"|decoder\.block\.\d+\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
    ),
    missing_copies={"lm_head.weight": "shared.weight"},
    gated=is_gated,
    decoder_layers=lambda config: config.num_decoder_layers,
    reads_source=lambda name: name.startswith("encoder.") or name.endswith(CROSS_KEYS_AND_VALUES),
    start_token_id=lambda config: config.decoder_start_token_id,
    may_be_zero=("decoder_start_token_id",),
)
