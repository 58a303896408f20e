"""The contract of an objective: what a step minimises, and how a model is measured by it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llmkit.data.corrupt import Corrupt
from llmkit.parallel.world import World
from llmkit.types import Batch


@dataclass(frozen=True)
class Step:
    """Hold what `Objective.prepare` may need to know about a step.

    number  of the step
    seed    of what is drawn in it on this rank
    folder  of the run, for what a resumed run reads again; None: keep nothing
    """

    number: int
    seed: int
    world: World
    micro_batch_size: int
    folder: Path | None


@dataclass(frozen=True)
class Objective:
    """Define what a step minimises and how a model is evaluated.

    loss      (model, micro-batch on the device) -> sum of losses over the targets, and sums of metrics by name
    evaluate  (model, batches, options as `lm.perplexity` has) -> figures with a "val_loss", of which the lowest is best
    corrupt   changes a batch before the model sees it; None: nothing is changed
    needs_reference  whether batches have the `reference` of the model that training starts from, if that is not at hand
    prepare   (model, this rank's batch, Step) -> the batch to train on, and figures about it, which are logged: what
              needs a whole batch, or what the model writes. None: batches are as the data has them
    updates   steps in a row that take the same batch of the data
    scores    names of the figures of `evaluate`, besides val_loss, that eval.best may name
    """

    loss: Callable[[nn.Module, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]
    evaluate: Callable[..., dict[str, Any]]
    corrupt: Corrupt | None = None
    needs_reference: bool = False
    prepare: Callable[[nn.Module, Batch, Step], tuple[Batch, dict[str, float]]] | None = None
    updates: int = 1
    scores: tuple[str, ...] = ()


@dataclass(frozen=True)
class ObjectiveType:
    """An objective that a config can choose.

    build    (tokenizer, seed, the decoder's first token or None, **options) -> Objective
    fits     pairs of a model's kind and a data.kind
    lengths  (seq_len, **options) -> tokens of a row that are read, and that a decoder beside an encoder writes
    rows     (**options) -> rows that are trained on for each row of the data
    """

    build: Callable[..., Objective]
    fits: tuple[tuple[str, str], ...]
    lengths: Callable[..., tuple[int, int]] = lambda seq_len, **options: (seq_len, 0)
    rows: Callable[..., int] = lambda **options: 1
