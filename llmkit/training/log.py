"""Log metrics to the run directory, the screen and TensorBoard."""

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from tqdm import tqdm

from llmkit.parallel.device import peak_flops, synchronize
from llmkit.parallel.memory import peak_memory
from llmkit.parallel.world import World
from llmkit.screen import format_count, format_duration, printable
from llmkit.storage.report import is_score
from llmkit.storage.run import RunDirectory
from llmkit.training.prepare import PreparedRun

HEAD_SCORES = 2  # scores of a head for labels in a line: accuracy and F1, or two correlations


@dataclass
class Interval:
    """The loss and the metrics of the steps since the last log: sums over targets, on the device.

    A step never waits for them.
    """

    targets: float = 0  # of all ranks
    sums: dict[str, Tensor] = field(default_factory=dict)  # of this rank

    def add(self, **sums: Tensor) -> None:
        """Add the sums of a micro-batch, or of a step."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().double()

    def take_averages(self, world: World) -> dict[str, float]:
        """Return the averages over the targets of all ranks, and begin the next interval."""
        averages = {name: world.sum(total.item()) / self.targets for name, total in self.sums.items()}
        self.targets, self.sums = 0, {}
        return averages


@dataclass
class MetricsLogger:
    """Collect the metrics of a step, and write them to metrics.jsonl, the screen and TensorBoard.

    directory   None on all ranks but rank 0: only it writes
    peak        FLOP/s that MFU refers to
    first_step  step at which this process began
    """

    run: PreparedRun
    directory: RunDirectory | None
    peak: float
    first_step: int
    say: Callable[[str], None]
    bar: tqdm | None = None
    writer: Any = None
    pending: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self.start_time = self.last_time = time.perf_counter()
        self.last_step = self.first_step
        if self.directory and sys.stderr.isatty():
            self.bar = tqdm(total=self.run.max_steps, initial=self.first_step, unit="step", leave=False)
        if self.directory and self.run.config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(self.directory.folder / "tensorboard")

    @property
    def elapsed(self) -> float:
        """Return the seconds since the loop began, including evaluations and checkpoints."""
        return time.perf_counter() - self.start_time

    @contextlib.contextmanager
    def pause(self):
        """Exclude the time inside a `with` block from tokens per second."""
        synchronize(self.run.world.device)  # steps that a GPU has yet to do are no part of the pause
        start = time.perf_counter()
        yield
        self.last_time += time.perf_counter() - start

    def speed(self, step: int) -> dict[str, float]:
        """Return tokens per second and MFU since the last call, peak memory and ETA.

        The tokens of answers that the model writes are counted as if all were as long as they may be: there is no MFU.
        """
        now = time.perf_counter()
        seconds_per_step = (now - self.last_time) / max(1, step - self.last_step)
        self.last_time, self.last_step = now, step
        rate = self.run.tokens_per_step / seconds_per_step
        achieved = rate * self.run.plan.flops_per_token / self.run.world.size
        is_known = self.run.config.data.kind != "prompts"
        if is_known and achieved > self.peak:  # the machine was busy when its peak was measured
            with self.pause():
                self.peak = max(achieved, peak_flops(self.run.world.device, self.run.precision)[0])
        return {
            "tokens_per_second": rate,
            **({"mfu": achieved / self.peak} if is_known else {}),
            "memory_gb": peak_memory(self.run.world.device) / 2**30,
            "eta_seconds": (self.run.max_steps - step) * seconds_per_step,
        }

    def log(self, **values: Any) -> None:
        """Add values to the metrics of this step."""
        self.pending |= values

    def flush(self, step: int) -> None:
        """Write the metrics of a step as one line, and show them."""
        record, self.pending = self.pending, {}
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
        if self.directory is None or not record:
            return
        self.directory.append(record)
        with tqdm.external_write_mode():  # print lines above the bar
            self.say(progress_line(record, self.run.max_steps))
            if "sample" in record:
                self.say(f"--- sample\n{printable(record['sample'])}\n---")
        if self.writer is not None:
            for key, value in record.items():
                if isinstance(value, int | float) and key not in ("step", "tokens"):
                    self.writer.add_scalar(key, value, record["step"])

    def close(self) -> None:
        for output in (self.bar, self.writer):
            if output is not None:
                output.close()


def progress_line(record: dict[str, Any], total: int) -> str:
    """Format a step as one line: step 1200/5000 | loss 2.913 | val 2.88 ppl 17.8 | lr 2.7e-4 | ..."""
    parts = [f"step {record['step']}/{total}"]
    if "loss" in record:
        parts.append(f"loss {record['loss']:.3f}")
    if "reward" in record:  # of the answers that a step has written
        parts.append(f"reward {record['reward']:.3f}, {record['answer_tokens']:.0f} tokens an answer")
    if "val_loss" in record:
        perplexity = f" ppl {record['val_perplexity']:.2f}" if "val_perplexity" in record else ""
        parts.append(f"val {record['val_loss']:.3f}{perplexity}")
    scores = [key for key in record if is_score(key)]
    of_head = [key for key in scores if "/" not in key]
    shown = [key for key in scores if key not in of_head[HEAD_SCORES:]]
    parts += [f"{key.removesuffix('/val_loss').removeprefix('val_')} {record[key]:.3f}" for key in shown]
    if "lr" in record:
        parts += [f"lr {record['lr']:.1e}", f"gnorm {record['grad_norm']:.2f}"]
        parts += [f"{format_count(record['tokens_per_second'])} tok/s"]
        parts += [f"mfu {record['mfu']:.0%}"] if "mfu" in record else []
        parts += [f"mem {record['memory_gb']:.1f}G", f"ETA {format_duration(record['eta_seconds'])}"]
    return " | ".join(parts)
