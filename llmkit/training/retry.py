"""Go on when memory runs out: halve the micro-batch and do the step again. Global batch and order stay the same."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from llmkit.errors import MachineError, is_out_of_memory
from llmkit.parallel.memory import free_memory
from llmkit.storage.run import RunDirectory
from llmkit.training.fit import (
    MEMORY_SHARE,
    cheapest_change,
    largest_part,
    rows_in_step,
    smaller_micro_batches,
    with_train,
)
from llmkit.training.prepare import PreparedRun

Result = TypeVar("Result")


def retry_smaller(
    run: PreparedRun,
    model: nn.Module,
    directory: RunDirectory | None,
    say: Callable[[str], None],
    attempt: Callable[[], Result],
) -> Result:
    """Return attempt(). After each out-of-memory error, halve the run's micro-batch and call it again.

    The attempt must change nothing but gradients, which are dropped. With several ranks the error ends the run, because
    the others are in the midst of a sum. Raises MachineError if a single row is too much.
    """
    while True:
        try:
            return attempt()
        except Exception as error:
            if run.world.size > 1 or not is_out_of_memory(error):
                raise
        halve_micro_batch(run, model, directory, say)  # outside of `except`, which would keep the attempt's tensors


def halve_micro_batch(
    run: PreparedRun, model: nn.Module, directory: RunDirectory | None, say: Callable[[str], None]
) -> None:
    """Halve the micro-batch of a run, in its config too, and free what the failed attempt has left."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    if run.world.device.type == "cuda":
        torch.cuda.empty_cache()
    rows, before = rows_in_step(run.config, run.options, 1), run.micro_batch_size
    if before == 1:
        raise no_memory_error(run)
    run.micro_batch_size = smaller_micro_batches(rows, before // 2)[0]
    run.config = with_train(run.config, micro_batch_size=run.micro_batch_size)
    say(f"out of memory with {before} rows in a micro-batch: again, with {run.micro_batch_size}")
    if directory:
        directory.config["train"]["micro_batch_size"] = run.micro_batch_size
        directory.write_config()


def no_memory_error(run: PreparedRun) -> MachineError:
    """Return the error for a run of which not a single row fits: the largest part, and the cheapest change."""
    room = MEMORY_SHARE * min(run.plan.peak_memory, free_memory(run.world.device))  # the plan may have been too low
    planned = (run.model_config, run.world.device.type, run.precision, len(run.new_tokens))
    fix = cheapest_change(run.config, run.options, run.world.size, room, *planned)
    return MachineError("out of memory with one row in a micro-batch", got=largest_part(run.plan), fix=fix)
