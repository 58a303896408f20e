"""The one error a user sees: what happened, where, what was found, and how to mend it.

Everything that a user can get wrong raises `UserError`; anything else that escapes is a bug of ours (exit code 70).
"""

from collections.abc import Iterable

USAGE, DATA, MODEL, ENVIRONMENT, DIVERGED, LOCKED, BUG = 2, 3, 4, 5, 6, 7, 70
INTERRUPTED = {2: 130, 15: 143}  # signal number -> the shell's exit code for it


class UserError(Exception):
    """One problem, or several (`others`) found in the same check.

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
    """Something is wrong with texts, records, or data that was built from them."""

    code = DATA


class ModelError(UserError):
    """Something is wrong with a model's folder, its tokenizer, a checkpoint or an adapter."""

    code = MODEL


class MachineError(UserError):
    """The machine lacks something: a package, a compiler, memory, disk space, a port."""

    code = ENVIRONMENT


def raise_all(errors: list[UserError]) -> None:
    """Raise everything that was found as one error, or return when nothing was."""
    if errors:
        first, *rest = errors
        first.others += rest
        raise first


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """A suggestion for a misspelt word, or None when nothing is close."""
    from difflib import get_close_matches

    close = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else None
