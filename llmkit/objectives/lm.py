"""Language modelling: the objectives differ in the tokens that the model sees and in the labels."""

import math
from collections.abc import Iterable
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from llmkit.data.corrupt import masking, span_corruption, span_lengths
from llmkit.errors import UserError
from llmkit.models import family_of
from llmkit.objectives.objective import Objective
from llmkit.parallel.device import to_device
from llmkit.parallel.world import World
from llmkit.tokenizer.tokenizer import Tokenizer
from llmkit.types import IGNORE_INDEX, Batch

Fraction = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]


def sum_of_losses(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum of losses (nats) over the batch's targets; the loop divides by the step's target count.

    A family's auxiliary loss is added, multiplied by its weight and the number of targets. The metric `added` is that
    part: the loop leaves it out of the logged loss. Like the loss, metrics are sums over the targets.
    """
    family = family_of(model.config)
    if not (weight := family.aux_loss_weight(model.config)):
        return model(**batch, reduction="sum"), {}
    losses, balances = model(**batch, reduction="sum", with_balance=True)
    balance = family.aux_loss(balances)
    targets = (batch["labels"] != IGNORE_INDEX).sum()
    added = weight * targets * balance
    return losses + added, {"balance": (targets * balance).detach(), "added": added.detach()}


@torch.no_grad()
def perplexity(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    token_bytes: np.ndarray | None = None,
    micro_batch_size: int = 8,
    world: World | None = None,
    losses: list[np.ndarray] | None = None,
) -> dict[str, Any]:
    """Measure a model on batches, in the autocast context of the caller.

    token_bytes  bytes of text a token stands for (V,): bits per byte needs it
    world        adds numbers up over its ranks
    losses       gets the losses of each micro-batch, fp32 (B, T), 0 where there is no target
    Returns val_loss (nats a token), val_perplexity = exp(val_loss), bits_per_byte, and the targets counted.
    """
    training = model.training
    model.eval()
    summed = torch.zeros((), dtype=torch.float64, device=device)
    targets, text_bytes = 0, 0.0
    for batch in batches:
        for micro in batch.split(micro_batch_size):
            full = pad_rows(micro, micro_batch_size)
            found = model(**to_device(full, device), reduction="none")
            summed += found.double().sum()
            if losses is not None:
                losses.append(found[: len(micro.labels)].float().cpu().numpy())
            scored = micro.labels[micro.labels != IGNORE_INDEX]
            targets += len(scored)
            text_bytes += float(token_bytes[scored].sum()) if token_bytes is not None else 0
    model.train(training)
    total = world.sum if world else float
    nats, targets, text_bytes = total(summed.item()), int(total(targets)), total(text_bytes)
    loss = nats / targets if targets else math.nan
    result: dict[str, Any] = {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700)), "val_tokens": targets}
    if text_bytes > 0:  # NaN if a target's bytes are not known
        result["bits_per_byte"] = nats / math.log(2) / text_bytes
    return result


def pad_rows(batch: Batch, rows: int) -> Batch:
    """Repeat the last row, without labels, up to `rows`: one shape for compiled blocks, and the same sums."""
    missing = rows - len(batch.input_ids)
    padded = {name: np.concatenate([a, a[-1:].repeat(missing, axis=0)]) for name, a in batch.arrays().items()}
    padded["labels"][rows - missing :] = IGNORE_INDEX
    return Batch(**padded)


# ---- objectives: see `ObjectiveType.build` ---------------------------------------------------------------------------


def lm(tokenizer: Tokenizer, seed: int, start_id: None) -> Objective:
    """Predict the next token: pretraining and supervised fine-tuning of decoders."""
    return Objective(sum_of_losses, perplexity)


def seq2seq(tokenizer: Tokenizer, seed: int, start_id: int) -> Objective:
    """Predict the answer to a text that the encoder reads: fine-tuning of T5."""
    return Objective(sum_of_losses, perplexity)


def mlm(
    tokenizer: Tokenizer,
    seed: int,
    start_id: None,
    *,
    mask_fraction: Fraction = 0.15,
    random_fraction: Share = 0.1,
    keep_fraction: Share = 0.1,
) -> Objective:
    """Predict masked tokens, BERT's pretraining: see `corrupt.masking`."""
    if random_fraction + keep_fraction > 1:
        raise UserError("objective.random_fraction and keep_fraction are over 1 together")
    options = {"mask_fraction": mask_fraction, "random_fraction": random_fraction, "keep_fraction": keep_fraction}
    return Objective(sum_of_losses, perplexity, masking(tokenizer, seed, **options))


def spans(
    tokenizer: Tokenizer,
    seed: int,
    start_id: int,
    *,
    noise_fraction: Fraction = 0.15,
    mean_span: Annotated[float, Field(ge=1)] = 3.0,
) -> Objective:
    """Predict the spans that are cut out, T5's pretraining: see `corrupt.span_corruption`."""
    options = {"noise_fraction": noise_fraction, "mean_span": mean_span, "start_id": start_id}
    return Objective(sum_of_losses, perplexity, span_corruption(tokenizer, seed, **options))


def corrupted_lengths(seq_len: int, *, noise_fraction: float, mean_span: float) -> tuple[int, int]:
    """Return the tokens that the encoder reads and the decoder writes of a row whose spans are cut out."""
    noise, number = span_lengths(seq_len, noise_fraction, mean_span)
    return seq_len - noise + number + 1, noise + number + 1
