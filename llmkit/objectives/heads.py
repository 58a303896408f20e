"""Predict labels with a head: classes of a text, a number, or a tag of each token."""

from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from llmkit import scores
from llmkit.data.labelled import MULTIPLE
from llmkit.models.heads import POOLINGS, HeadConfig, Pooling, label_losses
from llmkit.objectives.objective import Objective
from llmkit.parallel.device import to_device
from llmkit.parallel.world import World
from llmkit.tokenizer.tokenizer import Tokenizer
from llmkit.types import Batch

LEAST_FILLED, PART_TOKENS = 0.75, 256  # see `by_length`
Dropout = Annotated[float, Field(ge=0, lt=1)]


def make_head(
    kind: str, options: dict[str, Any], model_kind: str, labels: Iterable[str] | None, multi_label: bool | None
) -> HeadConfig:
    """Return the head of an objective.

    options  of the objective
    labels   None: they are not known yet, and as many as of a yes or no
    """
    if kind == "regress":
        labels, multi_label = ("LABEL_0",), False  # transformers' name of a single output
    pooling = options.get("pooling") or POOLINGS[model_kind][0]
    names = ("no", "yes") if labels is None else tuple(labels)
    return HeadConfig(kind, names, None if kind == "tag" else pooling, bool(multi_label), options["dropout"])


def sum_of_losses(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum of losses over the batch's targets, see `heads.label_losses`.

    On a CPU, rows of similar lengths are read together, with less padding: texts of a batch differ in length, and their
    order stays as it is. A GPU would wait for the lengths.
    """
    if batch["input_ids"].device.type != "cpu":
        return model(**batch, reduction="sum"), {}
    parts = [model(**part, reduction="sum") for part in by_length(batch, tags=model.head.kind == "tag")]
    return torch.stack(parts).sum(), {}


def by_length(batch: dict[str, Tensor], *, tags: bool) -> Iterator[dict[str, Tensor]]:
    """Yield the rows of a batch in parts of similar lengths, each without the columns that are padding in all of it.

    A part ends where a row is shorter than LEAST_FILLED of its longest one, if it has PART_TOKENS by then.

    tags  whether there is a label for each token
    """
    in_columns = [name for name in ("input_ids", "token_type_ids", *(["labels"] if tags else [])) if name in batch]
    lengths, width = batch["lengths"], batch["input_ids"].shape[1]
    order = lengths.argsort(descending=True, stable=True)
    longest, start = lengths[order].tolist(), 0
    for stop in range(1, len(order) + 1):
        is_full = (stop - start) * longest[start] >= PART_TOKENS
        if stop < len(order) and not (is_full and longest[stop] < LEAST_FILLED * longest[start]):
            continue
        rows, columns = order[start:stop], min(width, -(-longest[start] // MULTIPLE) * MULTIPLE)
        part = {name: values[rows] for name, values in batch.items()}
        yield part | {name: part[name][:, :columns] for name in in_columns}
        start = stop


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    micro_batch_size: int = 8,
    world: World | None = None,
    token_bytes: None = None,
    keep: Callable[[np.ndarray, np.ndarray], None] = lambda losses, rows: None,
) -> dict[str, Any]:
    """Measure a model with a head on batches, in the autocast context of the caller.

    world  shares the predictions of all ranks
    keep   gets the loss of each target, and the rows that `score` takes
    Returns val_loss, val_examples (of tag: of tokens) and what `score` returns, with val_ before its names.
    """
    training = model.training
    model.eval()
    losses, rows = [np.empty(0)], [np.empty((0, row_width(model.head)))]
    for batch in batches:
        for micro in batch.split(micro_batch_size):
            tensors = to_device(micro, device)
            labels = tensors.pop("labels")
            outputs = model(**tensors)
            found = label_losses(model.head, outputs, labels)
            losses.append(found[micro.is_target].double().cpu().numpy())
            rows.append(pair_up(model.head, micro, outputs.cpu().numpy()))
    model.train(training)
    share = world.concatenate if world else np.asarray
    losses, rows = share(np.concatenate(losses)), share(np.concatenate(rows))
    keep(losses, rows)
    loss = float(losses.mean()) if len(losses) else float("nan")
    named = score(model.head, rows) if len(rows) else {}
    return {"val_loss": loss, **{f"val_{name}": value for name, value in named.items()}, "val_examples": len(rows)}


def row_width(head: HeadConfig) -> int:
    """Return the columns of the rows of `pair_up`."""
    return 2 * len(head.labels) if head.multi_label else 3 if head.kind == "tag" else 2


def predict(head: HeadConfig, outputs: np.ndarray) -> np.ndarray:
    """Return the predictions of outputs (..., L): the likeliest label, whether each is likelier than not, a number."""
    if head.kind == "regress":
        return outputs[..., 0]
    return (outputs > 0).astype(np.int64) if head.multi_label else outputs.argmax(-1)


def pair_up(head: HeadConfig, batch: Batch, outputs: np.ndarray) -> np.ndarray:
    """Return rows (target, prediction) of a batch; of several labels (L targets, L predictions); of tags (target,
    prediction, whether the sentence ends).
    """
    found, labels = predict(head, outputs), batch.labels
    if head.kind == "tag":
        parts = []
        for targets, tags, is_target in zip(labels, found, batch.is_target, strict=True):
            ends = np.zeros(int(is_target.sum()))
            ends[-1:] = 1
            parts.append(np.stack([targets[is_target], tags[is_target], ends], axis=1))
        return np.concatenate(parts)
    there = batch.is_target.reshape(len(labels), -1).all(1)
    return np.concatenate([one.reshape(len(labels), -1)[there] for one in (labels, found)], axis=1).astype(np.float64)


def score(head: HeadConfig, rows: np.ndarray) -> dict[str, float]:
    """Return the scores of rows of `pair_up`.

    classify     accuracy, f1 (of two labels that of the second, else macro), f1_macro, f1_micro, matthews
    multi_label  accuracy (all labels right), f1_macro, f1_micro
    regress      pearson, spearman, mse
    tag          accuracy, and f1: of entities if the labels mark them (B-PER), else f1_macro
    """
    if head.kind == "regress":
        targets, found = rows.T
        mse = float(((targets - found) ** 2).mean())
        return {"pearson": scores.pearson(targets, found), "spearman": scores.spearman(targets, found), "mse": mse}
    rows = rows.astype(np.int64)
    if head.multi_label:
        targets, found = np.split(rows, 2, axis=1)
        each = [scores.f1_of(targets[:, i] == 1, found[:, i] == 1) for i in range(targets.shape[1])]
        micro = scores.f1_of(targets == 1, found == 1)
        return {"accuracy": scores.accuracy(targets, found), "f1_macro": float(np.mean(each)), "f1_micro": micro}
    targets, found = rows[:, 0], rows[:, 1]
    accuracy = scores.accuracy(targets, found)
    if head.kind == "tag":
        if not scores.marks_entities(head.labels):
            return {"accuracy": accuracy, "f1_macro": scores.macro_f1(targets, found)}
        sentences = np.split(rows[:, :2], np.flatnonzero(rows[:, 2])[:-1] + 1)
        named = [[[head.labels[i] for i in one[:, side]] for one in sentences] for side in (0, 1)]
        return {"accuracy": accuracy, "f1": scores.entity_f1(*named)}
    return {
        "accuracy": accuracy,
        "f1": scores.f1(targets, found),
        "f1_macro": scores.macro_f1(targets, found),
        "f1_micro": accuracy,  # of one label a text, both are the share of right ones
        "matthews": scores.matthews(targets, found),
    }


def score_names(head: HeadConfig) -> list[str]:
    """Return the names of the scores that `evaluate` returns."""
    return [f"val_{name}" for name in score(head, np.zeros((2, row_width(head))))]


# ---- objectives: see `ObjectiveType.build` ---------------------------------------------------------------------------


def classify(
    tokenizer: Tokenizer, seed: int, start_id: None, *, pooling: Pooling | None = None, dropout: Dropout = 0.1
) -> Objective:
    """Predict the label of a text, or its labels.

    dropout  on the state that is classified
    """
    return Objective(sum_of_losses, evaluate)


def regress(
    tokenizer: Tokenizer, seed: int, start_id: None, *, pooling: Pooling | None = None, dropout: Dropout = 0.1
) -> Objective:
    """Predict a number for a text, as how similar two sentences are.

    dropout  on the state that is classified
    """
    return Objective(sum_of_losses, evaluate)


def tag(tokenizer: Tokenizer, seed: int, start_id: None, *, dropout: Dropout = 0.1) -> Objective:
    """Predict a label for each word, as whether it names a person.

    dropout  on the state that is classified
    """
    return Objective(sum_of_losses, evaluate)
