"""Note SIGINT and SIGTERM for the end of a step."""

import signal
import time
from typing import Any


class Signals:
    """Note SIGINT and SIGTERM for the end of the step; a second one ends the process at once."""

    def __init__(self):
        self.signal: int | None = None
        self.at = 0.0
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(self, number: int, frame: Any) -> None:
        """Handle a signal."""
        if self.signal is not None and time.monotonic() - self.at > 2:  # a launcher passes on what the terminal sent
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if self.signal is None:
            self.signal, self.at = number, time.monotonic()

    def release(self) -> None:
        """Put the earlier handlers back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
