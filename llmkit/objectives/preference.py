"""Learn from pairs of answers which one is preferred: DPO and its relatives. Rows are trees, see `data/preferences.py`.

A = answers of a row at the most: those of its pairs, the better one of each first.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from llmkit.errors import UserError
from llmkit.models import family_of
from llmkit.objectives.frozen import reference_of
from llmkit.objectives.objective import Objective
from llmkit.parallel.device import to_device
from llmkit.parallel.world import World
from llmkit.tokenizer.tokenizer import Tokenizer
from llmkit.types import Batch

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Smoothing = Annotated[float, Field(ge=0, lt=0.5)]
Margin = Annotated[float, Field(ge=0, allow_inf_nan=False)]
FIGURES = (  # of `measure_pairs`, in the order of its columns; without a reference there is no kl_estimate
    *("loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logprob", "rejected_logprob"),
    "kl_estimate",
)


# ---- log-probabilities ----------------------------------------------------------------------------------------------


def answer_log_probs(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | float]:
    """Return the log-probabilities (B, A) of the answers of trees and their numbers of tokens, and the model's
    auxiliary loss for a pair, see `Family.aux_loss`.
    """
    family, answers, shape = family_of(model.config), batch["answers"], batch["reference"].shape
    inputs = {name: value for name, value in batch.items() if name not in ("answers", "reference", "counts")}
    weight, added = family.aux_loss_weight(model.config), 0.0
    losses = model(**inputs, reduction="none", with_balance=bool(weight))
    if weight:
        losses, balances = losses
        added = weight * family.aux_loss(balances)
    place, is_target = answers.clamp(min=0), (answers >= 0).float()
    sums = losses.new_zeros(shape).scatter_add(1, place, -losses * is_target)
    lengths = losses.new_zeros(shape).scatter_add(1, place, is_target)
    return sums, lengths, added


@torch.no_grad()
def reference_log_probs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the log-probabilities (B, A) of the answers under the model that training started from.

    They are in the batch where they were computed before the first step.
    """
    with reference_of(model) as reference:
        return batch["reference"] if reference is None else answer_log_probs(reference, batch)[0]


# ---- losses: of (ours, reference, tokens), each (pairs, 2), the better answer first --------------------------------


def sigmoid(scores: Tensor, *, label_smoothing: float, **_: Any) -> Tensor:
    """Return -log(sigmoid) of the difference of two rewards (Rafailov et al. 2023, arXiv:2305.18290).

    label_smoothing  the share of labels that may be wrong (Mitchell 2023, "cDPO")
    """
    margin = scores[:, 0] - scores[:, 1]
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def hinge(scores: Tensor, **_: Any) -> Tensor:
    """Return how much the difference of two rewards lacks to 1 (Zhao et al. 2023, SLiC, arXiv:2305.10425)."""
    return torch.relu(1 - (scores[:, 0] - scores[:, 1]))


def ipo(scores: Tensor, *, beta: float, **_: Any) -> Tensor:
    """Return the squared distance of the difference of log-ratios from 1 / (2 beta) (Azar et al. 2023,
    arXiv:2310.12036), which are averages over tokens, as its authors have computed them.
    """
    return ((scores[:, 0] - scores[:, 1]) / beta - 1 / (2 * beta)).square()


def simpo(scores: Tensor, *, label_smoothing: float, gamma: float, **_: Any) -> Tensor:
    """Return -log(sigmoid) of a difference of rewards that should be over gamma (Meng et al. 2024, arXiv:2405.14734).

    A reward is beta times the log-probability of a token on average. There is no reference.
    """
    shifted = torch.stack([scores[:, 0] - gamma, scores[:, 1]], dim=1)
    return sigmoid(shifted, label_smoothing=label_smoothing)


def orpo(scores: Tensor, *, beta: float, **_: Any) -> Tensor:
    """Return the loss of the better answer, and beta times -log(sigmoid) of the log of the ratio of the answers' odds
    (Hong et al. 2024, arXiv:2403.07691). A probability is that of a token on average. There is no reference.
    """
    log_probs = scores / beta
    odds = log_probs - torch.log1p(-log_probs.exp().clamp(max=1 - 1e-6))
    return -log_probs[:, 0] - beta * F.logsigmoid(odds[:, 0] - odds[:, 1])


LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "simpo": simpo,
    "orpo": orpo,
}
PER_TOKEN = ("ipo", "simpo", "orpo")  # take averages over tokens
GAMMA = 0.5  # trl's
WITHOUT_REFERENCE = ("simpo", "orpo")
Loss = Literal["sigmoid", "hinge", "ipo", "simpo", "orpo"]


def measure_pairs(
    model: nn.Module,
    batch: dict[str, Tensor],
    *,
    loss: Loss,
    beta: float,
    label_smoothing: float,
    gamma: float,
    length_normalize: bool,
) -> tuple[Tensor, Tensor, Tensor | float]:
    """Return the FIGURES (P, 8 or 7) of the pairs that rows have place for, which of them are there (P,), and the
    model's auxiliary loss for a pair.

    kl_estimate is the log-ratio of an answer's probabilities, averaged over both answers. That estimates the distance
    from the reference with the data's answers, not with the model's own: where both become less likely, it is negative.
    """
    ours, tokens, added = answer_log_probs(model, batch)
    theirs = torch.zeros_like(ours) if loss in WITHOUT_REFERENCE else reference_log_probs(model, batch)
    is_pair = (tokens.view(-1, 2) > 0).all(1)
    ours, theirs, tokens = (torch.where(is_pair[:, None], x.view(-1, 2), 1.0) for x in (ours, theirs, tokens))
    ratios = ours - theirs
    rewards = beta * (ratios / tokens if length_normalize or loss in PER_TOKEN else ratios)
    losses = LOSSES[loss](rewards, beta=beta, label_smoothing=label_smoothing, gamma=gamma)
    margin = rewards[:, 0] - rewards[:, 1]
    columns = [losses, (margin > 0).float(), margin, *rewards.T, *ours.T, ratios.mean(1)]
    return torch.stack(columns[: len(figures_of(loss))], dim=1), is_pair, added


def figures_of(loss: Loss) -> tuple[str, ...]:
    """Return the FIGURES of a loss."""
    return FIGURES[:-1] if loss in WITHOUT_REFERENCE else FIGURES


def sum_of_losses(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum of losses over the pairs of a batch, and sums of the other FIGURES."""
    figures, is_pair, added = measure_pairs(model, batch, **options)
    sums, added = torch.where(is_pair[:, None], figures, 0.0).sum(0), is_pair.sum() * added
    names = figures_of(options["loss"])[1:]
    return sums[0] + added, dict(zip(names, sums[1:].detach(), strict=True)) | {"added": added.detach()}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    micro_batch_size: int = 8,
    world: World | None = None,
    token_bytes: None = None,
    **options: Any,
) -> dict[str, Any]:
    """Measure a model on pairs, in the autocast context of the caller.

    world    shares the figures of all ranks
    options  of `measure_pairs`
    Returns the FIGURES as averages over the pairs, with val_ before their names, and val_examples.
    """
    training = model.training
    model.eval()
    names = figures_of(options["loss"])
    rows = [np.empty((0, len(names)))]
    for batch in batches:
        for micro in batch.split(micro_batch_size):
            figures, is_pair, _ = measure_pairs(model, to_device(micro, device), **options)
            rows.append(figures[is_pair].double().cpu().numpy())
    model.train(training)
    found = (world.concatenate if world else np.asarray)(np.concatenate(rows))
    means = found.mean(0) if len(found) else np.full(len(names), np.nan)
    return {f"val_{name}": float(mean) for name, mean in zip(names, means, strict=True)} | {"val_examples": len(found)}


# ---- objectives: see `ObjectiveType.build` ---------------------------------------------------------------------------


def dpo(
    tokenizer: Tokenizer,
    seed: int,
    start_id: None,
    *,
    loss: Loss = "sigmoid",
    beta: Positive = 0.1,
    label_smoothing: Smoothing = 0.0,
    gamma: Margin = GAMMA,
    length_normalize: bool = False,
) -> Objective:
    """Prefer the better one of two answers, without a model of rewards.

    loss              see LOSSES
    beta              how much a change against the reference counts; of simpo a factor, of orpo the weight of the odds
    label_smoothing   of sigmoid and simpo: the share of pairs that may be the wrong way round
    gamma             of simpo: the difference of rewards that is asked for
    length_normalize  rewards are averages over tokens, as they always are in ipo, simpo and orpo
    """
    unused = {"label_smoothing": label_smoothing and loss not in ("sigmoid", "simpo")}
    unused |= {"gamma": gamma != GAMMA and loss != "simpo", "length_normalize": length_normalize and loss in PER_TOKEN}
    for name in [name for name, is_unused in unused.items() if is_unused]:
        raise UserError(f"objective.{name} has no effect on this loss", got=loss, fix="delete it")
    options = {"loss": loss, "beta": beta, "label_smoothing": label_smoothing, "gamma": gamma}
    options["length_normalize"] = length_normalize
    needs = loss not in WITHOUT_REFERENCE
    steps, measured = partial(sum_of_losses, **options), partial(evaluate, **options)
    return Objective(steps, measured, needs_reference=needs, scores=tuple(f"val_{name}" for name in FIGURES[1:-1]))
