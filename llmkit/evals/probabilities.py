"""Look at what a model finds likely: the probability of each token of a text, and what it would have written."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmkit.errors import DataError, ModelError, UserError
from llmkit.inference.logprobs import score_ids, token_texts
from llmkit.tokenizer.tokenizer import Tokenizer

MOST_ATTRIBUTED = 512  # tokens


@dataclass(frozen=True)
class TokenScore:
    """Hold a token of a text, and how likely a model finds it after all before it.

    surprise      -log of its probability, in nats
    rank          1: no token is likelier
    alternatives  the likeliest tokens with their probabilities
    """

    text: str
    id: int
    surprise: float
    rank: int
    alternatives: list[tuple[str, float]]


@dataclass(frozen=True)
class ScoredText:
    """Hold the score of each token of a text."""

    tokens: list[TokenScore]

    @property
    def log_prob(self) -> float:
        """Return the log-probability of the text, in nats."""
        return -sum(token.surprise for token in self.tokens)

    def to_json(self) -> dict[str, Any]:
        count = len(self.tokens)
        per_token = -self.log_prob / count
        return {"log_prob": self.log_prob, "loss": per_token, "tokens": [asdict(token) for token in self.tokens]}


def score_text(model: nn.Module, tokenizer: Tokenizer, text: str, *, top: int = 5) -> ScoredText:
    """Return how likely a model finds each token of a text, the first one after a begin token.

    top  number of alternatives; see also `score_ids`
    """
    if model.config.kind != "causal":
        raise ModelError(f"{model.config.model_type} does not predict the next token")
    ids = tokenizer.encode(text)
    if not ids:
        raise DataError("the text is empty")
    begin = tokenizer.prefix or [tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id]
    texts, scores = token_texts(tokenizer, ids), score_ids(model, begin + ids, len(begin), top)
    return ScoredText(
        [
            TokenScore(
                text, one.id, -one.log_prob, one.rank, [(tokenizer.decode([t]), math.exp(p)) for t, p in one.top]
            )
            for text, one in zip(texts, scores, strict=True)
        ]
    )


def check_same_tokens(ours: Tokenizer, theirs: Tokenizer) -> None:
    """Raise UserError if two models read a text as other tokens, so that these can't be compared one by one."""
    if ours.sha256 != theirs.sha256:
        what = "the models have other tokenizers: their tokens can't be compared one by one"
        raise UserError(what, fix="compare bits per byte: llmkit eval --perplexity --data FILE")


# ---- why ------------------------------------------------------------------------------------------------------------


def attribute(model: nn.Module, tokenizer: Tokenizer, text: str) -> tuple[str, list[float], list[Tensor]]:
    """Return the likeliest next token after a text, how much each token of the text speaks for it, and the attention.

    How much a token speaks for the next one is the gradient of that one's logit times the token's embedding (Denil et
    al. 2014, arXiv:1412.6815). The attention is one tensor (heads, T, T) for each layer; none where a sliding window
    is shorter than the text, which is computed in another way.
    """
    ids = tokenizer.encode_prompt(text)
    if len(ids) > (most := min(MOST_ATTRIBUTED, model.config.max_position_embeddings)):
        what = "the text is too long for --attribute, which keeps all weights of attention"
        raise DataError(what, got=f"{len(ids)} tokens", expected=f"at most {most}")
    embedded: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hook = model.wte.register_forward_hook(keep)
    attention = AttentionWeights()
    try:
        with torch.enable_grad(), attention:
            logits = model(torch.tensor([ids], device=next(model.parameters()).device), logits_to_keep=1)[0, -1].float()
            token = int(logits.argmax())
            logits[token].backward()
    finally:
        hook.remove()
        model.zero_grad(set_to_none=True)
    speaks = (embedded[0].grad * embedded[0]).sum(-1)[0].tolist()
    own = len(tokenizer.encode(text))
    return tokenizer.decode([token]), speaks[len(speaks) - own :], [one[:, -own:, -own:] for one in attention.layers]


class AttentionWeights(torch.overrides.TorchFunctionMode):
    """Keep the weights of each call of scaled_dot_product_attention, (heads, T, S), which it does not return."""

    def __init__(self):
        super().__init__()
        self.layers: list[Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.nn.functional.scaled_dot_product_attention:
            self.layers.append(attention_weights(*args[:2], *args[3:], **kwargs))
        return function(*args, **kwargs)


def attention_weights(
    q: Tensor,
    k: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return the softmax of the scores of q (1, H, T, D) and k (1, kv heads, S, D), as SDPA computes it: (H, T, S)."""
    q, k = q.detach().float(), k.detach().float()
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=bool).triu(1).to(q.device), -torch.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1)[0]
