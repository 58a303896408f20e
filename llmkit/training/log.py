"""Log metrics: to the run directory, the screen and TensorBoard."""

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from llmkit.parallel.device import peak_flops, peak_memory
from llmkit.screen import clock, count, printable
from llmkit.storage.run import RunDirectory
from llmkit.training.prepare import PreparedRun


@dataclass
class MetricsLogger:
    """Collect the events of a step, and write them to metrics.jsonl, the screen and TensorBoard.

    directory   None on all ranks but the first, which alone writes
    peak        FLOP/s that MFU is a share of
    first_step  the step at which this process began
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
        self.begin = self.mark = time.perf_counter()
        self.marked_step = self.first_step
        if self.directory and sys.stderr.isatty():
            self.bar = tqdm(total=self.run.max_steps, initial=self.first_step, unit="step", leave=False)
        if self.directory and self.run.config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(self.directory.folder / "tensorboard")

    @property
    def elapsed(self) -> float:
        """Seconds since the loop began, evaluations and checkpoints included."""
        return time.perf_counter() - self.begin

    @contextlib.contextmanager
    def pause(self):
        """Leave the time inside out of tokens per second."""
        start = time.perf_counter()
        yield
        self.mark += time.perf_counter() - start

    def speed(self, step: int) -> dict[str, float]:
        """Return tokens a second, MFU, memory and ETA since the last call."""
        now = time.perf_counter()
        seconds_a_step = (now - self.mark) / max(1, step - self.marked_step)
        self.mark, self.marked_step = now, step
        rate = self.run.tokens_per_step / seconds_a_step
        achieved = rate * self.run.plan.flops_per_token / self.run.world.size
        if achieved > self.peak:  # the machine was busy when its peak was measured
            with self.pause():
                self.peak = max(achieved, peak_flops(self.run.world.device, self.run.precision)[0])
        return {
            "tokens_per_second": rate,
            "mfu": achieved / self.peak,
            "memory_gb": peak_memory(self.run.world.device) / 2**30,
            "eta_seconds": (self.run.max_steps - step) * seconds_a_step,
        }

    def log(self, **values: Any) -> None:
        """Add values to the events of this step."""
        self.pending |= values

    def flush(self, step: int) -> None:
        """Write the events of a step as one line, and show them."""
        record, self.pending = self.pending, {}
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
        if self.directory is None or not record:
            return
        self.directory.append(record)
        with tqdm.external_write_mode():  # lines stand above the bar
            self.say(progress_line(record, self.run.max_steps))
            if "sample" in record:
                self.say(f"--- sample\n{printable(record['sample'])}\n---")
        if self.writer is not None:
            for key, value in record.items():
                if isinstance(value, int | float) and key not in ("step", "tokens"):
                    self.writer.add_scalar(key, value, record["step"])

    def close(self) -> None:
        for thing in (self.bar, self.writer):
            if thing is not None:
                thing.close()


def progress_line(record: dict[str, Any], total: int) -> str:
    """Return a step on one line: step 1200/5000 | loss 2.913 | val 2.88 ppl 17.8 | lr 2.7e-4 | ..."""
    parts = [f"step {record['step']}/{total}"]
    if "loss" in record:
        parts.append(f"loss {record['loss']:.3f}")
    if "val_loss" in record:
        parts.append(f"val {record['val_loss']:.3f} ppl {record['val_perplexity']:.2f}")
    if "lr" in record:
        parts.append(f"lr {record['lr']:.1e}")
        parts.append(f"gnorm {record['grad_norm']:.2f}")
        parts.append(f"{count(record['tokens_per_second'])} tok/s")
        parts.append(f"mfu {record['mfu']:.0%}")
        parts.append(f"mem {record['memory_gb']:.1f}G")
        parts.append(f"ETA {clock(record['eta_seconds'])}")
    return " | ".join(parts)
