"""GPT-2: pre-norm blocks of multi-head attention with learned positions, and a GELU MLP (Radford et al. 2019).

Module names are Hugging Face's weight names. Files store the matrices of linears transposed (Conv1D).
"""

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.models.attention import attend
from llmkit.models.causal import CausalLM, Context
from llmkit.models.family import Family, Gguf, rename
from llmkit.models.layers import MultiHeadSizes, TokenEmbedding


@dataclass(kw_only=True)
class Config(MultiHeadSizes):
    model_type: ClassVar[str] = "gpt2"
    kind: ClassVar[str] = "causal"

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
    init: Literal["normal", "zero", "xavier", "he"] = "normal"


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.head_dim = config.head_dim
        self.attn_pdrop, self.resid_pdrop = config.attn_pdrop, config.resid_pdrop
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
            for part in self.c_attn(x).chunk(3, dim=-1)
        )
        if context.cache is not None:
            k, v = context.cache.update(k, v)
        x = self.c_proj(attend(q, k, v, context.masks[None], self.attn_pdrop if self.training else 0.0))
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
    def __init__(self, config: Config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.attn(self.ln_1(x), context)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.wte = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
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
        return self.transformer.wte

    def embed(self, input_ids: Tensor, positions: Tensor) -> tuple[Tensor, None]:
        x = self.transformer.wte(input_ids) + self.transformer.wpe(positions)
        return F.dropout(x, self.config.embd_pdrop, self.training), None


# ---- the family -----------------------------------------------------------------------------------------------------

HF_NAMES = {  # our option -> Hugging Face's
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
UNSUPPORTED = ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention")


def from_hf(hf: dict) -> dict:
    """Return our options from a config.json. The width of the MLP is n_inner, and nothing else."""
    hf = {key: value for key, value in hf.items() if key != "intermediate_size"}
    return rename(hf, {theirs: name for name, theirs in HF_NAMES.items()})


def to_hf(options: dict) -> dict:
    """Return the fields of a config.json for transformers."""
    return {HF_NAMES.get(key, key): value for key, value in options.items()}


FAMILY = Family(
    config=Config,
    build=Model,
    keys_values=("c_attn",),
    writers=("c_proj",),
    architecture="GPT2LMHeadModel",
    residual=("c_proj",),
    from_hf=from_hf,
    to_hf=to_hf,
    fixed_values={"activation_function": "gelu_new", "scale_attn_weights": True} | dict.fromkeys(UNSUPPORTED, False),
    hf_defaults={"embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1},
    ignored_weights=re.compile(r"(.*\.)?attn\.(masked_)?bias"),  # constants in old files
    transposed=("c_attn.weight", "c_proj.weight", "c_fc.weight"),
    prefix="transformer.",
    tag_head=("classifier", True),
    gguf=Gguf("gpt2", rms_norm=False, rope=False),
)
