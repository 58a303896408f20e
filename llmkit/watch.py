"""What a loop needs besides steps: a clock that knows which time was training's, the way of events to file and screen,
and signals that wait for a step's end."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from llmkit.job import Job
from llmkit.parallel import peak_flops, peak_memory
from llmkit.run import Run, printable, progress_line


@dataclass
class Watch:
    """The clock of the steps, without evaluations and checkpoints, and the way from events to file and screen."""

    job: Job
    run: Run | None
    peak: float
    first_step: int
    say: Callable[[str], None]
    bar: tqdm | None = None
    writer: Any = None
    pending: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self.begin = self.mark = time.perf_counter()
        self.marked_step = self.first_step
        if self.run and sys.stderr.isatty():
            self.bar = tqdm(total=self.job.max_steps, initial=self.first_step, unit="step", leave=False)
        if self.run and self.job.config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(self.run.folder / "tensorboard")

    @property
    def elapsed(self) -> float:
        """Seconds since the loop began, all that it did counted."""
        return time.perf_counter() - self.begin

    @contextlib.contextmanager
    def pause(self):
        """Time that is not training's: it is taken out of tokens per second."""
        start = time.perf_counter()
        yield
        self.mark += time.perf_counter() - start

    def speed(self, step: int) -> dict[str, float]:
        """Tokens a second, MFU and ETA since the last call."""
        now = time.perf_counter()
        seconds_a_step = (now - self.mark) / max(1, step - self.marked_step)
        self.mark, self.marked_step = now, step
        rate = self.job.tokens_per_step / seconds_a_step
        achieved = rate * self.job.plan.flops_per_token / self.job.world.size
        if achieved > self.peak:  # the machine was busy when its peak was measured
            with self.pause():
                self.peak = max(achieved, peak_flops(self.job.world.device, self.job.precision)[0])
        return {
            "tokens_per_second": rate,
            "mfu": achieved / self.peak,
            "memory_gb": peak_memory(self.job.world.device) / 2**30,
            "eta_seconds": (self.job.max_steps - step) * seconds_a_step,
        }

    def log(self, **values: Any) -> None:
        self.pending |= values

    def flush(self, step: int) -> None:
        """Write the events of a step as one line, and show them."""
        record, self.pending = self.pending, {}
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
        if self.run is None or not record:
            return
        self.run.append(record)
        with tqdm.external_write_mode():  # lines stand above the bar
            self.say(progress_line(record, self.job.max_steps))
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


class Signals:
    """SIGINT and SIGTERM, noted for the next step boundary; a second one ends the process at once."""

    def __init__(self):
        self.signal: int | None = None
        self.at = 0.0
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(self, number: int, frame: Any) -> None:
        if self.signal is not None and time.monotonic() - self.at > 2:  # a launcher passes on what the terminal sent
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if self.signal is None:
            self.signal, self.at = number, time.monotonic()

    def release(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
