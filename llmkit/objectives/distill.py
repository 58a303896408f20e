"""Learn the probabilities of a larger model with the same tokens (Hinton et al. 2015, arXiv:1503.02531)."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmkit.data.labelled import pad_batch
from llmkit.generation.answers import write_tokens
from llmkit.generation.sampling import Sampling
from llmkit.models.layers import token_tables
from llmkit.models.loss import rows_in_chunk
from llmkit.objectives.frozen import frozen_model
from llmkit.objectives.lm import perplexity
from llmkit.objectives.objective import Objective, Step
from llmkit.tokenizer.tokenizer import Tokenizer
from llmkit.types import IGNORE_INDEX, Batch

Loss = Literal["forward_kl", "reverse_kl", "jsd"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


# ---- the divergence -------------------------------------------------------------------------------------------------


def divergence(ours: Tensor, theirs: Tensor, loss: Loss, temperature: float) -> Tensor:
    """Return the divergence (N,) of the probabilities of logits (N, V), divided by the temperature before.

    forward_kl  KL(teacher || student): the student covers what the teacher may say
    reverse_kl  KL(student || teacher): it says what the teacher is likely to (Gu et al. 2024, arXiv:2306.08543)
    jsd         half the sum of the KLs of both from their average (Agarwal et al. 2024, GKD, arXiv:2306.13649)
    """
    p, q = (F.log_softmax(logits.float() / temperature, dim=-1) for logits in (theirs, ours))
    if loss == "jsd":
        middle = torch.logaddexp(p, q) - np.log(2)
        return (kl(p, middle) + kl(q, middle)) / 2
    return kl(p, q) if loss == "forward_kl" else kl(q, p)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q) (N,) of log-probabilities (N, V)."""
    return (p.exp() * (p - q)).sum(-1)


def sum_of_losses(
    model: nn.Module,
    batch: dict[str, Tensor],
    *,
    teacher: Callable[[torch.device], nn.Module],
    loss: Loss,
    temperature: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum of divergences at the targets of a batch.

    Logits are computed for a chunk of targets at a time, and once more in the backward pass.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    chosen = batch["labels"] != IGNORE_INDEX
    ours, weight = model.encode(**inputs)[chosen], token_tables(model)[-1].rows()
    other = teacher(ours.device)
    with torch.no_grad():
        theirs, other_weight = other.encode(**inputs)[chosen], token_tables(other)[-1].rows()

    def chunk_loss(mine: Tensor, their: Tensor) -> Tensor:
        logits = F.linear(mine, weight.to(mine.dtype)), F.linear(their, other_weight.to(their.dtype))
        return divergence(*logits, loss, temperature).sum()

    size = rows_in_chunk(max(1, len(ours)), len(weight), ours.device)
    parts = zip(ours.split(size), theirs.split(size), strict=True)
    total = sum((checkpoint(chunk_loss, *part, use_reentrant=False) for part in parts), ours.sum() * 0.0)
    return total, {}


# ---- answers of the student's own -----------------------------------------------------------------------------------


def split_prompts(batch: Batch) -> list[tuple[list[int], int]]:
    """Return the tokens before the first target of each example of a batch, and the number of its targets."""
    found = []
    for row, (ids, labels) in enumerate(zip(batch.input_ids, batch.labels, strict=True)):
        segments = batch.segments[row] if batch.segments is not None else np.zeros(len(ids), np.int64)
        for segment in np.unique(segments[labels != IGNORE_INDEX]):
            places = np.flatnonzero((labels != IGNORE_INDEX) & (segments == segment))
            own = np.flatnonzero(segments == segment)
            found.append((ids[own[own <= places[0]]].tolist(), len(places)))
    return found


def answer_prompts(
    model: nn.Module,
    batch: Batch,
    step: Step,
    *,
    tokenizer: Tokenizer,
    share: float,
    max_new_tokens: int,
    temperature: float,
) -> tuple[Batch, dict[str, float]]:
    """Return a batch, in a share of the steps with answers that the student writes in the place of its own.

    All ranks decide alike.
    """
    drawn = np.random.default_rng([step.number, 0x5EED]).random()
    if drawn >= share:
        return batch, {"on_policy": 0.0}
    prompts = [prompt for prompt, _ in split_prompts(batch)]
    sampling = Sampling(temperature=temperature, top_k=None)
    stop = frozenset(tokenizer.stop_ids)
    answers = write_tokens(model, prompts, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, seed=step.seed)
    rows = [np.array([*prompt, *answer]) for prompt, answer in zip(prompts, answers, strict=True)]
    full = pad_batch(
        [row[:-1] for row in rows], np.zeros(len(rows)), tokenizer.eos_id, types=False, most=max(map(len, rows))
    )
    labels = np.full(full.input_ids.shape, IGNORE_INDEX, np.int64)
    for row, prompt, answer in zip(labels, prompts, answers, strict=True):
        row[len(prompt) - 1 : len(prompt) - 1 + len(answer)] = answer
    return Batch(full.input_ids, labels), {"on_policy": 1.0}


# ---- objectives: see `ObjectiveType.build` ---------------------------------------------------------------------------


def distill(
    tokenizer: Tokenizer,
    seed: int,
    start_id: None,
    *,
    teacher: str,
    loss: Loss = "forward_kl",
    temperature: Positive = 1.0,
    on_policy: Annotated[float, Field(ge=0, le=1)] = 0.0,
    max_new_tokens: Annotated[int, Field(ge=1, le=10**6)] = 128,
) -> Objective:
    """Match the probabilities of a teacher at the targets of the data. The val loss is that of the data's tokens.

    teacher         a model with the same tokens: a run, a checkpoint or a Hugging Face folder
    loss            see `divergence`
    temperature     divides the logits of both
    on_policy       share of the steps whose answers the student writes itself, at temperature 1
    max_new_tokens  of such an answer
    """
    options = {"share": on_policy, "max_new_tokens": max_new_tokens, "temperature": 1.0}
    prepare = partial(answer_prompts, tokenizer=tokenizer, **options) if on_policy else None
    return Objective(
        partial(sum_of_losses, teacher=frozen_model(Path(teacher)), loss=loss, temperature=temperature),
        perplexity,
        prepare=prepare,
    )
