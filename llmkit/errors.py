"""The error that a user sees: what happened, where, what was found, and how to fix it.

User mistakes raise `UserError`. Any other exception that escapes is a bug of llmkit (exit code 70).
"""

from collections.abc import Iterable

USAGE, DATA, MODEL, ENVIRONMENT, DIVERGED, LOCKED, BUG = 2, 3, 4, 5, 6, 7, 70
INTERRUPTED = {2: 130, 15: 143}  # signal number -> the shell's exit code for it


class UserError(Exception):
    """A problem, and `others` that the same check found.

    >>> print(UserError("train.max_step is not a key", at="my.yaml:14", got="max_step", fix="did you mean max_steps?"))
    error: train.max_step is not a key
      at:  my.yaml:14
      got: max_step
      fix: did you mean max_steps?
    """

    code = USAGE  # the exit code of the process

    def __init__(
        self,
        what: str,
        *,
        at: object = None,
        got: object = None,
        expected: object = None,
        fix: str | None = None,
        code: int | None = None,
        others: Iterable["UserError"] = (),
    ):
        super().__init__(what)
        self.what, self.at, self.got, self.expected, self.fix = what, at, got, expected, fix
        self.code = type(self).code if code is None else code
        self.others = list(others)

    def __str__(self) -> str:
        rows = {"at": self.at, "got": self.got, "expected": self.expected, "fix": self.fix}
        width = max((len(name) + 1 for name, value in rows.items() if value is not None), default=0)
        lines = [f"error: {self.what}"]
        lines += [f"  {name + ':':<{width}} {value}" for name, value in rows.items() if value is not None]
        return "\n\n".join(["\n".join(lines), *map(str, self.others)])


class DataError(UserError):
    """A problem of texts, records, or data that was built from them."""

    code = DATA


class ModelError(UserError):
    """A problem of a model's folder, its tokenizer, a checkpoint or an adapter."""

    code = MODEL


class MachineError(UserError):
    """A problem of the machine: it lacks a package, a compiler, memory, disk space, a port."""

    code = ENVIRONMENT


def raise_all(errors: list[UserError]) -> None:
    """Raise all errors as one, or return if there are none."""
    if errors:
        first, *rest = errors
        first.others += rest
        raise first


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """Return a suggestion for a misspelt word, or None if no known word is close."""
    from difflib import get_close_matches

    close = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else None
