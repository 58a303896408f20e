"""Loss, perplexity and bits per byte, weighted by tokens: the same number for every batch size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from llmkit.parallel import to_device
from llmkit.types import IGNORE_INDEX, Batch


@torch.no_grad()
def perplexity(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    token_bytes: np.ndarray | None = None,
    micro_batch_size: int = 8,
    total: Callable[[float], float] = lambda value: value,
) -> dict[str, Any]:
    """Measure a model on batches, in the autocast context of the caller.

    token_bytes  bytes of text a token stands for (V,): bits per byte needs it
    total        adds a number up over ranks
    Returns val_loss (nats a token), val_perplexity = exp(val_loss), bits_per_byte, and the targets counted.
    """
    training = model.training
    model.eval()
    losses = torch.zeros((), dtype=torch.float64, device=device)
    targets = text_bytes = 0
    for batch in batches:
        for micro in batch.split(micro_batch_size):
            full = fill_up(micro, micro_batch_size)
            losses += model(**to_device(full, device), reduction="none").double().sum()
            scored = micro.labels[micro.labels != IGNORE_INDEX]
            targets += len(scored)
            text_bytes += int(token_bytes[scored].sum()) if token_bytes is not None else 0
    model.train(training)
    nats, targets, text_bytes = total(losses.item()), int(total(targets)), int(total(text_bytes))
    loss = nats / targets if targets else math.nan
    result: dict[str, Any] = {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700)), "val_tokens": targets}
    if text_bytes:
        result["bits_per_byte"] = nats / math.log(2) / text_bytes
    return result


def fill_up(batch: Batch, rows: int) -> Batch:
    """Repeat the last row, without labels, up to `rows`: one shape for compiled blocks, and the same sums."""
    missing = rows - len(batch.input_ids)
    padded = {name: np.concatenate([a, a[-1:].repeat(missing, axis=0)]) for name, a in batch.arrays().items()}
    padded["labels"][rows - missing :] = IGNORE_INDEX
    return Batch(**padded)


def windows(tokens: np.ndarray, window: int, stride: int, batch_size: int) -> Iterator[Batch]:
    """A text of N tokens as batches of windows in which every token but the first is a target exactly once.

    window  tokens of input, so of context at the most
    stride  how far the next window moves on: stride == window reads every token once, a smaller one gives the later
            targets at least window - stride tokens of context, at window / stride times the work

    >>> [batch.labels.tolist() for batch in windows(np.arange(6), window=3, stride=2, batch_size=1)]
    [[[1, 2, 3]], [[-100, 4, 5]]]
    """
    scored, rows = 0, []  # targets 1..scored are done
    for start in range(0, max(1, len(tokens) - 1), stride):
        inputs, labels = tokens[start : start + window], tokens[start + 1 : start + window + 1].astype(np.int64)
        inputs = inputs[: len(labels)].astype(np.int64)
        labels[: max(0, scored - start)] = IGNORE_INDEX
        rows.append((inputs, labels))
        scored = start + len(labels)
        last = scored >= len(tokens) - 1
        ragged = last and len(rows) > 1 and len(labels) < len(rows[0][1])
        if ragged:  # a shorter last window goes alone: padding it would only cost time
            yield stack(rows[:-1])
            yield stack(rows[-1:])
        elif last or len(rows) == batch_size:
            yield stack(rows)
        if last:
            return
        if len(rows) == batch_size:
            rows = []


def stack(rows: list[tuple[np.ndarray, np.ndarray]]) -> Batch:
    return Batch(np.stack([inputs for inputs, _ in rows]), np.stack([labels for _, labels in rows]))
