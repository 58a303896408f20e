"""Try a micro-batch, which is also timed, and an evaluation before the first step."""

import itertools
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from llmkit.data.batches import Batches
from llmkit.objectives.objective import Step
from llmkit.parallel.compile import compile_obstacle
from llmkit.parallel.device import autocast, synchronize, to_device
from llmkit.screen import format_duration
from llmkit.training.fit import rows_in_step
from llmkit.training.optim import make_state
from llmkit.training.prepare import PreparedRun
from llmkit.types import Batch

# What compiling takes, for training and evaluation, and the share of a step that it saves. Measured on two CPU cores,
# for training alone: 27 s and 27 % (Llama 4 x 256), 29 s and 27 % (6 x 384), 39 s and 16 % (GPT-2 124M), 38 s and 16 %
# (LoRA on a 110M Llama), all in bf16; 25 s and 9 % in fp32 (4 x 256). Not measured on a GPU yet.
COMPILE_SECONDS, COMPILE_GAIN = 45.0, 0.15


def prepare_batch(
    run: PreparedRun, model: nn.Module, batches: Batches, step: int, folder: Path | None
) -> tuple[Batch, dict[str, float]]:
    """Return this rank's batch of a step as its objective wants it, and the figures about it; see `Objective`.

    folder  of the run; None: keep nothing
    """
    batch = batches.batch_at(step // run.objective.updates)
    if run.objective.prepare is None:
        return batch, {}
    about = Step(step, run.seed_at(step), run.world, run.micro_batch_size, folder)
    with autocast(run.world.device, run.precision), torch.compiler.set_stance("force_eager"):
        return run.objective.prepare(model, batch, about)


def time_micro_batch(run: PreparedRun, model: nn.Module, batches: Batches, most: int = 1) -> float:
    """Return the seconds of forward and backward of the run's first micro-batches, up to `most`.

    No weight is changed, and no gradient is left.
    """
    batch, _ = prepare_batch(run, model, batches, 0, None)
    synchronize(run.world.device)
    start = time.perf_counter()
    for micro in itertools.islice(batch.split(run.micro_batch_size), most):
        with autocast(run.world.device, run.precision):
            loss: Tensor = run.objective.loss(model, to_device(micro, run.world.device))[0]
        loss.backward()
    model.zero_grad(set_to_none=True)
    synchronize(run.world.device)
    return time.perf_counter() - start


def rehearse(run: PreparedRun, model: nn.Module, batches: Batches, optimizers: list[torch.optim.Optimizer]) -> float:
    """Take a step that changes nothing, and evaluate a batch; return the seconds of the step's micro-batches.

    What a step would lack hours later is lacking now, before anything is trained: the state of the optimizers is there
    first, and the second micro-batch finds the gradients of the first.
    """
    if not any(optimizer.state for optimizer in optimizers):
        make_state(model, optimizers)
    seconds = time_micro_batch(run, model, batches, most=2)
    if run.config.eval.every:
        size = run.micro_batch_size
        first = itertools.islice(run.batches("val", size).in_order(size), 1)
        with autocast(run.world.device, run.precision):
            options = {"device": run.world.device, "micro_batch_size": size}
            run.objective.evaluate(model, first, token_bytes=run.token_bytes, **options)
    return seconds


def choose_compile(run: PreparedRun, model: nn.Module, batches: Batches, done: int) -> tuple[bool, str]:
    """Resolve train.compile: auto by the time that the steps after the first `done` would take without it.

    Return the choice, the same on all ranks, and the reason for the header.
    """
    if run.config.train.compile != "auto":
        return run.config.train.compile, "as when the run began" if done else "as the config says"
    if run.head or run.objective.prepare is not None:
        return False, "rows differ in length"
    if obstacle := compile_obstacle(model, run.world.device, run.precision):
        return False, obstacle
    time_micro_batch(run, model, batches)  # the first one allocates memory
    accumulation = rows_in_step(run.config, run.options, run.world.size) // run.micro_batch_size
    seconds = run.world.sum(time_micro_batch(run, model, batches)) / run.world.size * accumulation
    eager = seconds * (run.max_steps - done)
    gain = COMPILE_GAIN * eager
    cost, saved, all_steps = map(format_duration, (COMPILE_SECONDS, gain, eager))
    return gain > COMPILE_SECONDS, f"takes about {cost}, saves about {saved} of the steps' {all_steps}"
