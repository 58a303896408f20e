"""Language modelling in all its forms: they differ in which tokens the model sees, and which are labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from llmkit.data.corrupt import Corrupt, masking, span_corruption
from llmkit.errors import UserError
from llmkit.models.mixtral import balance_loss
from llmkit.tokenizer.tokenizer import Tokenizer
from llmkit.types import IGNORE_INDEX

Fraction = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Objective:
    """What a step minimises.

    loss     (model, micro-batch on the device) -> sum of losses over the targets, and metrics
    corrupt  what is done to a batch first; None: nothing
    """

    loss: Callable[[nn.Module, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]
    corrupt: Corrupt | None = None


def sum_of_losses(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of losses (nats) over the batch's targets; `train` divides by the step's target count.

    With experts, how unevenly they are used in this micro-batch is added, as much as it would be beside a mean over
    the targets; `added` is that part, which is no loss of a target.
    """
    if not (weight := getattr(model.config, "router_aux_loss_coef", 0.0)):
        return model(**batch, reduction="sum"), {}
    losses, balances = model(**batch, reduction="sum", with_balance=True)
    balance = balance_loss(balances)
    targets = (batch["labels"] != IGNORE_INDEX).sum()
    added = weight * targets * balance
    return losses + added, {"balance": balance.detach(), "added": added.detach()}


# ---- objectives: (tokenizer, seed, the model's first decoder token), options -> Objective ----------------------------


def lm(tokenizer: Tokenizer, seed: int, start_id: int) -> Objective:
    """The next token: pretraining and supervised fine-tuning of decoders."""
    return Objective(sum_of_losses)


def seq2seq(tokenizer: Tokenizer, seed: int, start_id: int) -> Objective:
    """The answer, by a decoder, to a text that an encoder reads: fine-tuning of T5."""
    return Objective(sum_of_losses)


def mlm(
    tokenizer: Tokenizer,
    seed: int,
    start_id: int,
    *,
    mask_fraction: Fraction = 0.15,
    random_fraction: Share = 0.1,
    keep_fraction: Share = 0.1,
) -> Objective:
    """Masked language modelling, BERT's pretraining: see `corrupt.masking`."""
    if random_fraction + keep_fraction > 1:
        raise UserError("objective.random_fraction and keep_fraction are over 1 together")
    options = {"mask_fraction": mask_fraction, "random_fraction": random_fraction, "keep_fraction": keep_fraction}
    return Objective(sum_of_losses, masking(tokenizer, seed, **options))


def spans(
    tokenizer: Tokenizer,
    seed: int,
    start_id: int,
    *,
    noise_fraction: Fraction = 0.15,
    mean_span: Annotated[float, Field(ge=1)] = 3.0,
) -> Objective:
    """Span corruption, T5's pretraining: see `corrupt.span_corruption`."""
    options = {"noise_fraction": noise_fraction, "mean_span": mean_span, "start_id": start_id}
    return Objective(sum_of_losses, span_corruption(tokenizer, seed, **options))
