"""Compute how likely a model finds given tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmkit.tokenizer.tokenizer import Tokenizer

LOGIT_BYTES = 2**28  # most bytes of fp32 logits at a time; a window is read again for more
CONTEXT = 8  # tokens before one that may decide whether its text begins with a space
MOST_PARTS = 4  # tokens of a character, of at most four bytes


@dataclass(frozen=True)
class TokenLogprob:
    """Hold how likely a token is, given all before it.

    log_prob  in nats, without temperature and the like
    rank      1: no token is likelier
    top       the likeliest tokens with their log-probabilities
    """

    id: int
    log_prob: float
    rank: int
    top: list[tuple[int, float]]


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def score_ids(model: nn.Module, ids: list[int], first: int, top: int) -> list[TokenLogprob]:
    """Return how likely a decoder finds the tokens from `first` (at least 1) on.

    Where they are more than the model's positions, they are read in windows that overlap by half: each token but those
    of the first window has at least half of the positions before it.
    """
    device, longest = next(model.parameters()).device, model.config.max_position_embeddings
    model.eval()
    found, start, rows = [], 0, max(1, LOGIT_BYTES // (4 * model.config.vocab_size))
    while (done := first + len(found)) < len(ids):
        if done - start >= longest:  # its prediction is no column of this window
            start += longest - longest // 2
            continue
        window = ids[start : start + longest]
        last = min(len(window), len(ids) - 1 - start, done - 1 - start + rows)
        columns = torch.arange(done - 1 - start, last, device=device)
        logits = model(torch.tensor([window], device=device), logits_to_keep=columns)[0].float()
        found += score_rows(logits, ids[done : done + len(columns)], top)
    return found


def score_rows(logits: Tensor, ids: list[int], top: int) -> list[TokenLogprob]:
    """Return the scores of tokens, given the logits (n, V) before each."""
    log_probs = logits.log_softmax(-1)
    own = log_probs.gather(1, torch.tensor(ids, device=logits.device)[:, None])
    ranks = (log_probs > own).sum(-1) + 1
    best, tokens = log_probs.topk(min(top, logits.shape[-1]), dim=-1)
    rows = zip(ids, own[:, 0].tolist(), ranks.tolist(), tokens.tolist(), best.tolist(), strict=True)
    return [
        TokenLogprob(i, log_prob, rank, list(zip(others, values, strict=True)))
        for i, log_prob, rank, others, values in rows
    ]


def token_texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Return the text that each token adds. A character of several tokens is in the last one; the others are U+FFFD."""
    texts, before, pending = [], [], []
    for i in ids:
        pending.append(i)
        known, text = tokenizer.decode(before), tokenizer.decode(before + pending)
        is_part = text.endswith("\ufffd") and len(pending) < MOST_PARTS
        texts.append("\ufffd" if is_part else text[len(known) :])
        if not is_part:
            before, pending = (before + pending)[-CONTEXT:], []
    return texts
