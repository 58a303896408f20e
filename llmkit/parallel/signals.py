"""Record SIGINT and SIGTERM until the end of a step."""

import signal
import time
from typing import Any


class Signals:
    """Record SIGINT and SIGTERM, which the training loop reads after a step; a second one ends the process at once."""

    def __init__(self):
        self.signal: int | None = None
        self.time = 0.0
        self.old_handlers = {number: signal.signal(number, self.record) for number in (signal.SIGINT, signal.SIGTERM)}

    def record(self, number: int, frame: Any) -> None:
        """Handle a signal."""
        if self.signal is not None and time.monotonic() - self.time > 2:  # sooner, it is a launcher's copy of the first
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if self.signal is None:
            self.signal, self.time = number, time.monotonic()

    def release(self) -> None:
        """Restore the old handlers."""
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
