"""Learn from single answers that are good or bad: KTO (Ethayarajh et al. 2024, arXiv:2402.01306).

Rows are trees with one answer each, see `data/preferences.py`. A reward is beta times the log of an answer's
probability over that under the model that training started from. Losses compare it with a baseline: an estimate of the
KL between the two models, from the prompts of a step with answers to other prompts.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from llmkit.data.labelled import pad_batch
from llmkit.objectives.objective import Objective, Step
from llmkit.objectives.preference import Positive, answer_log_probs, reference_log_probs
from llmkit.parallel.device import to_device
from llmkit.parallel.world import World
from llmkit.tokenizer.tokenizer import Tokenizer
from llmkit.types import IGNORE_INDEX, Batch

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
SCORES = ("val_accuracy", "val_chosen_reward", "val_rejected_reward", "val_margin")


# ---- the baseline ---------------------------------------------------------------------------------------------------


def split_answers(batch: Batch) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the tokens of the prompt and of the answer of each tree of a batch."""
    found = []
    for ids, labels, answers, segments in zip(
        batch.input_ids, batch.labels, batch.answers, batch.segments, strict=True
    ):
        for answer in np.unique(answers[answers >= 0]):
            places = np.flatnonzero(answers == answer)
            own = np.flatnonzero(segments == segments[places[0]])
            found.append((ids[own[own <= places[0]]], labels[places]))
    return found


def mismatched(trees: list[tuple[np.ndarray, np.ndarray]], pad_id: int, longest: int) -> Batch | None:
    """Return prompts, each with the answer to the nearest other prompt before it, in rows of their own; None if there
    is no other prompt.

    trees    prompts with their answers; the last is before the first
    longest  tokens of a row at the most: the end of an answer is left out
    """
    pairs = []
    for i, (prompt, _) in enumerate(trees):
        before = (trees[i - j] for j in range(1, len(trees)))
        other = next((answer for asked, answer in before if not np.array_equal(asked, prompt)), None)
        pairs += [] if other is None else [(prompt, other)]
    if not pairs:
        return None
    rows = [np.concatenate([prompt, answer])[: longest + 1] for prompt, answer in pairs]
    full = pad_batch([row[:-1] for row in rows], np.zeros(len(rows)), pad_id, types=False, most=longest)
    labels, answers = (np.full(full.input_ids.shape, value, np.int64) for value in (IGNORE_INDEX, -1))
    for i, (row, (prompt, _)) in enumerate(zip(rows, pairs, strict=True)):
        labels[i, len(prompt) - 1 : len(row) - 1] = row[len(prompt) :]
        answers[i, len(prompt) - 1 : len(row) - 1] = 0
    return Batch(full.input_ids, labels, answers=answers, reference=np.full((len(rows), 2), np.nan, np.float32))


@torch.no_grad()
def sum_of_ratios(
    model: nn.Module, batch: Batch | None, device: torch.device, micro_batch_size: int
) -> tuple[float, int]:
    """Return the sum of log-ratios of the answers of a batch of `mismatched` ones, and their number."""
    if batch is None:
        return 0.0, 0
    training, total = model.training, 0.0
    model.eval()
    for micro in batch.split(micro_batch_size):
        tensors = to_device(micro, device)
        ours, _, _ = answer_log_probs(model, tensors)
        total += float((ours - reference_log_probs(model, tensors))[:, 0].double().sum())
    model.train(training)
    return total, len(batch.input_ids)


def add_baseline(model: nn.Module, batch: Batch, step: Step, *, pad_id: int) -> tuple[Batch, dict[str, float]]:
    """Return a batch with its baseline, an estimate of the KL over the step's answers of all ranks, never below 0."""
    others = mismatched(split_answers(batch), pad_id, model.config.max_position_embeddings)
    total, number = sum_of_ratios(model, others, step.world.device, step.micro_batch_size)
    baseline = max(0.0, step.world.sum(total) / max(1, step.world.sum(number)))
    return replace(batch, baseline=np.full(len(batch.input_ids), baseline, np.float32)), {"kl": baseline}


# ---- the loss -------------------------------------------------------------------------------------------------------


def losses_of(
    rewards: Tensor, baseline: Tensor | float, is_good: Tensor, desirable_weight: float, undesirable_weight: float
) -> Tensor:
    """Return the losses of answers from their rewards, those of the baseline, and whether they are good."""
    good = desirable_weight * (1 - torch.sigmoid(rewards - baseline))
    bad = undesirable_weight * (1 - torch.sigmoid(baseline - rewards))
    return torch.where(is_good, good, bad)


def sum_of_losses(
    model: nn.Module, batch: dict[str, Tensor], *, beta: float, **weights: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum of losses over the answers of a batch, and sums of metrics over them."""
    batch = dict(batch)
    baseline = beta * batch.pop("baseline")[:, None]
    ours, tokens, added = answer_log_probs(model, batch)
    there = tokens > 0
    ratios = torch.where(there, ours - reference_log_probs(model, batch), 0.0)
    is_good = (torch.arange(ratios.shape[1], device=ratios.device) % 2 == 0).expand(ratios.shape)
    rewards = beta * ratios
    losses = torch.where(there, losses_of(rewards, baseline, is_good, **weights), 0.0)
    added = there.sum() * added
    right = ((rewards > baseline) == is_good) & there
    return losses.sum() + added, {"accuracy": right.sum().float(), "added": torch.as_tensor(added).detach()}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    beta: float,
    pad_id: int,
    micro_batch_size: int = 8,
    world: World | None = None,
    token_bytes: None = None,
    **weights: float,
) -> dict[str, Any]:
    """Measure a model on answers, in the autocast context of the caller, with one baseline for all of them.

    Returns val_loss, val_kl, val_accuracy, the averages val_chosen_reward and val_rejected_reward, their difference
    val_margin, and val_examples.
    """
    training = model.training
    model.eval()
    rows, trees = [np.empty((0, 2))], []
    for batch in batches:
        trees += split_answers(batch)
        for micro in batch.split(micro_batch_size):
            tensors = to_device(micro, device)
            ours, tokens, _ = answer_log_probs(model, tensors)
            ratios = (ours - reference_log_probs(model, tensors)).double()
            for side in (0, 1):
                there = tokens[:, side::2] > 0
                values = ratios[:, side::2][there].cpu().numpy()
                rows.append(np.stack([values, np.full(len(values), side)], axis=1))
    others = mismatched(trees, pad_id, model.config.max_position_embeddings)
    total, number = sum_of_ratios(model, others, device, micro_batch_size)
    model.train(training)
    ratios, sides = (world.concatenate if world else np.asarray)(np.concatenate(rows)).T
    baseline = beta * max(0.0, (world.sum(total) if world else total) / max(1, world.sum(number) if world else number))
    rewards, is_good = torch.tensor(beta * ratios), torch.tensor(sides == 0)
    losses = losses_of(rewards, baseline, is_good, **weights)
    chosen, rejected = (float(rewards[which].mean()) for which in (is_good, ~is_good))
    figures = {"loss": float(losses.mean()), "kl": baseline / beta}
    figures |= {"accuracy": float(((rewards > baseline) == is_good).double().mean())}
    figures |= {"chosen_reward": chosen, "rejected_reward": rejected, "margin": chosen - rejected}
    return {f"val_{name}": value for name, value in figures.items()} | {"val_examples": len(losses)}


# ---- objectives: see `ObjectiveType.build` ---------------------------------------------------------------------------


def kto(
    tokenizer: Tokenizer,
    seed: int,
    start_id: None,
    *,
    beta: Positive = 0.1,
    desirable_weight: Weight = 1.0,
    undesirable_weight: Weight = 1.0,
) -> Objective:
    """Make good answers likelier and bad ones less likely, from verdicts about single answers, or pairs taken apart.

    beta  how much a change against the model that training started from counts
    desirable_weight, undesirable_weight  of good and bad answers: where one kind is rarer, its weight times its number
                                          should be 1 to 4/3 of the other's (the paper's section 4.2)
    """
    options = {"beta": beta, "desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    return Objective(
        partial(sum_of_losses, **options),
        partial(evaluate, pad_id=tokenizer.eos_id, **options),
        prepare=partial(add_baseline, pad_id=tokenizer.eos_id),
        scores=SCORES,
    )
