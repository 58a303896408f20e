"""Count what is read and what is lost, and decide whether too much is lost."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from llmkit.errors import DataError


@dataclass(frozen=True)
class BadRecord:
    """A record that can't be used. Lines (or rows) count from 1, the offset is in unpacked bytes.

    In a file that is read in spans, lines count from the start of the span. `count_lines_before` gives the difference.

    size  bytes of the file that are lost with it, unpacked: one bad quote of a CSV file may swallow many lines
    rows  records that are lost with it, if their number is known: the rest of a damaged Parquet file
    """

    path: str
    line: int
    offset: int | None
    reason: str
    size: int = 0
    rows: int = 1

    @property
    def place(self) -> str:
        return f"{self.path}:{self.line}"


Record = tuple[int, dict[str, Any] | BadRecord, int]  # (line or row, record, bytes of the file that hold it, unpacked)


@dataclass
class Tally:
    """Count the records and bytes of some files, and how many of them are lost, by reason.

    >>> tally = Tally()
    >>> tally.add(90)
    >>> tally.add(10, BadRecord("a.jsonl", 2, 90, "bad JSON: x", size=10))
    >>> print(tally.describe())
    left out 1 of 2 records and 10.0 % of the bytes: 1 bad JSON; the first is a.jsonl:2 (bad JSON: x)
    """

    rows: int = 0  # bad ones included
    bad: int = 0
    bytes: int = 0  # lost ones included
    lost: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    first: str | None = None  # place and reason of the first bad record

    def add(self, size: int, bad: BadRecord | None = None) -> None:
        """Count a good record of `size` bytes, or a bad one, which knows its own size."""
        if bad is None:
            self.rows, self.bytes = self.rows + 1, self.bytes + size
            return
        self.rows, self.bad = self.rows + bad.rows, self.bad + bad.rows
        self.bytes, self.lost = self.bytes + bad.size, self.lost + bad.size
        self.reasons[bad.reason.partition(":")[0][:60]] += bad.rows
        self.first = self.first or f"{bad.place} ({bad.reason[:200]})"

    def merge(self, other: "Tally") -> None:
        """Add the counts of files that were read later."""
        for name in ("rows", "bad", "bytes", "lost"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.reasons.update(other.reasons)
        self.first = self.first or other.first

    def counts(self) -> dict[str, Any]:
        """Return the fields as a JSON object. Tally(**counts) restores them."""
        return vars(self) | {"reasons": dict(self.reasons)}

    def fractions(self) -> tuple[float, float]:
        """Return the lost fractions of the records and of the bytes."""
        return self.bad / max(1, self.rows), self.lost / max(1, self.bytes)

    def summary(self) -> str:
        """Return the losses with their reasons: "1 of 2 records and 10.0 % of the bytes: 1 bad JSON"."""
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in Counter(self.reasons).most_common(8))
        return f"{self.bad:,} of {self.rows:,} records and {100 * self.fractions()[1]:.1f} % of the bytes: {reasons}"

    def describe(self, listed_in: object = None) -> str:
        """Return one line about the bad records; "" if there are none.

        listed_in  the file that lists all of them
        """
        listed = f"; all are in {listed_in}" if listed_in else ""
        return f"left out {self.summary()}; the first is {self.first}{listed}" if self.bad else ""

    def check(self, max_fraction: float, *, fix: str, listed_in: object = None) -> None:
        """Raise a DataError if a larger fraction of the records, or of the bytes, is lost."""
        if self.bad and max(self.fractions()) > max_fraction:
            at = f"{self.first}; all are in {listed_in}" if listed_in else self.first
            what = f"{'too many' if max_fraction else 'some'} records can't be used"
            expected = f"at most {100 * max_fraction:g} % of either" if max_fraction else None
            raise DataError(what, at=at, got=self.summary(), expected=expected, fix=fix)
