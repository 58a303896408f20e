"""Learn a number for an answer, higher for the better one of two: a reward model (Bradley and Terry 1952).

Rows are pairs of sequences, see `data/preferences.open_pairs`.
"""

from collections.abc import Iterable
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from llmkit.models.heads import Pooling
from llmkit.objectives.heads import Dropout
from llmkit.objectives.objective import Objective
from llmkit.parallel.device import to_device
from llmkit.parallel.world import World
from llmkit.tokenizer.tokenizer import Tokenizer
from llmkit.types import Batch

FIGURES = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward")


def measure_pairs(model: nn.Module, batch: dict[str, Tensor], *, center: float) -> Tensor:
    """Return the FIGURES (B, 5) of pairs: -log(sigmoid) of the difference of their rewards is the loss."""
    ids, lengths = batch["input_ids"].flatten(0, 1), batch["lengths"].flatten()
    rewards = model(ids, lengths=lengths).view(-1, 2)
    margin = rewards[:, 0] - rewards[:, 1]
    losses = -F.logsigmoid(margin) + center * rewards.sum(1).square()
    return torch.stack([losses, (margin > 0).float(), margin, *rewards.T], dim=1)


def sum_of_losses(model: nn.Module, batch: dict[str, Tensor], *, center: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum of losses over the pairs of a batch, and sums of the other FIGURES."""
    sums = measure_pairs(model, batch, center=center).sum(0)
    return sums[0], dict(zip(FIGURES[1:], sums[1:].detach(), strict=True))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    center: float = 0.0,
    micro_batch_size: int = 8,
    world: World | None = None,
    token_bytes: None = None,
) -> dict[str, Any]:
    """Measure a reward model on pairs, in the autocast context of the caller.

    Returns the FIGURES as averages over the pairs of all ranks, with val_ before their names, and val_examples.
    """
    training = model.training
    model.eval()
    rows = [np.empty((0, len(FIGURES)))]
    for batch in batches:
        for micro in batch.split(micro_batch_size):
            rows.append(measure_pairs(model, to_device(micro, device), center=center).double().cpu().numpy())
    model.train(training)
    found = (world.concatenate if world else np.asarray)(np.concatenate(rows))
    means = found.mean(0) if len(found) else np.full(len(FIGURES), np.nan)
    named = {f"val_{name}": float(mean) for name, mean in zip(FIGURES, means, strict=True)}
    return named | {"val_examples": len(found)}


# ---- objectives: see `ObjectiveType.build` ---------------------------------------------------------------------------


def reward(
    tokenizer: Tokenizer,
    seed: int,
    start_id: None,
    *,
    pooling: Pooling | None = None,
    dropout: Dropout = 0.0,
    center: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0,
) -> Objective:
    """Give the better one of two answers a higher number, as a judge of others.

    pooling  the state that becomes the number: of the last token, or the mean of all
    dropout  on that state
    center   weight of the squared sum of a pair's rewards, which keeps them around 0 (Eisenstein et al. 2023,
             arXiv:2312.09244)
    """
    scores = tuple(f"val_{name}" for name in FIGURES[1:])
    return Objective(partial(sum_of_losses, center=center), partial(evaluate, center=center), scores=scores)
