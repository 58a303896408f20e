"""BERT: a bidirectional encoder of post-norm blocks, and a head that predicts masked tokens (arXiv:1810.04805).

Module names are Hugging Face's weight names. The pooler and the next-sentence head in files are ignored.
"""

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.models.attention import attend, attention_mask
from llmkit.models.family import Family
from llmkit.models.layers import ACTIVATIONS, MultiHeadSizes, TokenEmbedding
from llmkit.models.loss import ChunkLoss, Logits, linear_cross_entropy


@dataclass(kw_only=True)
class Config(MultiHeadSizes):
    model_type: ClassVar[str] = "bert"
    kind: ClassVar[str] = "masked"

    vocab_size: int | None = None  # None: the tokenizer's
    hidden_size: int = 768
    intermediate_size: int | None = None  # None: 4 * hidden_size
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: Literal["gelu", "gelu_pytorch_tanh", "relu", "relu2", "silu"] = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    init: Literal["normal", "xavier", "he"] = "normal"

    @property
    def tie_word_embeddings(self) -> bool:
        return True


class Embeddings(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.dropout = config.hidden_dropout_prob
        self.word_embeddings = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids: Tensor, positions: Tensor, token_type_ids: Tensor | None) -> Tensor:
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        x = self.word_embeddings(input_ids) + self.position_embeddings(positions) + self.token_type_embeddings(types)
        return F.dropout(self.LayerNorm(x).to(x.dtype), self.dropout, self.training)


class SelfAttention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.head_dim, self.dropout = config.head_dim, config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
            for project in (self.query, self.key, self.value)
        )
        return attend(q, k, v, mask, self.dropout if self.training else 0.0, causal=False)


class Output(nn.Module):
    """Project, add to the residual stream, and normalise the sum."""

    def __init__(self, config: Config, width: int):
        super().__init__()
        self.dropout = config.hidden_dropout_prob
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, stream: Tensor) -> Tensor:
        x = stream + F.dropout(self.dense(x), self.dropout, self.training)
        return self.LayerNorm(x).to(x.dtype)  # autocast on CUDA makes norms fp32


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.attention = nn.ModuleDict({"self": SelfAttention(config), "output": Output(config, config.hidden_size)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.intermediate_size)})
        self.output = Output(config, config.intermediate_size)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, mask), x)
        return self.output(self.act(self.intermediate["dense"](x)), x)


class Transform(nn.Module):
    """Transform hidden states before the head multiplies them by the embeddings."""

    def __init__(self, config: Config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(self.act(self.dense(x)))


class Predictions(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.transform = Transform(config)
        self.bias = nn.Parameter(torch.empty(config.vocab_size))


class Model(nn.Module):
    block_masks = False  # see `CausalLM`

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.chunk_loss, self.to_logits, self.lm_head = ChunkLoss(), Logits(), None
        blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.bert = nn.ModuleDict({"embeddings": Embeddings(config), "encoder": nn.ModuleDict({"layer": blocks})})
        self.cls = nn.ModuleDict({"predictions": Predictions(config)})

    @property
    def blocks(self) -> nn.ModuleList:
        return self.bert["encoder"]["layer"]

    @property
    def wte(self) -> nn.Embedding:
        return self.bert["embeddings"].word_embeddings

    def encode(
        self,
        input_ids: Tensor,
        *,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden states (B, T, hidden) of the last block."""
        length = input_ids.shape[1]
        if positions is None:
            positions = torch.arange(length, device=input_ids.device)
        options = {"causal": False, "in_blocks": self.block_masks}
        mask = attention_mask(segments, length, None, input_ids.device, **options)
        x = self.bert["embeddings"](input_ids, positions, token_type_ids)
        for block in self.blocks:
            x = block(x, mask)
        return x

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        reduction: str = "sum",
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Return logits (B, T, V) of each token, or with labels (B, T) the losses, see `linear_cross_entropy`.

        segments  (B, T), for packed rows and padding: a token sees only tokens with the same number
        """
        hidden = self.encode(input_ids, positions=positions, segments=segments, token_type_ids=token_type_ids)
        head = self.cls["predictions"]
        hidden, weight = head.transform(hidden), self.wte.rows()
        if labels is None:
            return self.to_logits(hidden, weight, head.bias)
        return linear_cross_entropy(hidden, weight, labels, reduction, chunk_loss=self.chunk_loss, bias=head.bias)


# ---- the family -----------------------------------------------------------------------------------------------------

OLD_NAMES = ((".gamma", ".weight"), (".beta", ".bias"))  # of norms in Google's files


def from_disk_name(name: str) -> str:
    """Return our name of a weight: old files name norms differently."""
    for old, new in OLD_NAMES:
        name = name.removesuffix(old) + new if name.endswith(old) else name
    return name


FAMILY = Family(  # no residual matrix is scaled: every sum is normalised, so the variance does not grow
    config=Config,
    build=Model,
    keys_values=("key", "value"),
    writers=("output.dense",),
    architecture="BertForMaskedLM",
    fixed_values={
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    hf_defaults={
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "vocab_size": 30522,
        "intermediate_size": 3072,
    },
    ignored_weights=re.compile(
        r"bert\.pooler\..*|cls\.seq_relationship\..*|cls\.predictions\.decoder\..*|bert\.embeddings\.position_ids"
    ),
    may_be_missing=re.compile(r"cls\..*"),  # files of a bare encoder have no head
    from_disk_name=from_disk_name,
    prefix="bert.",
    text_head=("classifier", True),
    tag_head=("classifier", True),
    pooler="bert.pooler.dense",
    token_heads=("cls",),
    token_biases=lambda model: [(model.cls["predictions"], "bias")],
)
