"""Define the errors that users see: what happened, where, what was found, and how to fix it.

User mistakes raise `UserError`. Any other uncaught exception is a bug in llmkit (exit code 70).
"""

import errno
from collections.abc import Iterable

USAGE, DATA, MODEL, ENVIRONMENT, DIVERGED, LOCKED, BUG = 2, 3, 4, 5, 6, 7, 70
MAX_LINES = 14  # of a printed error; more errors are counted in its last line
MAX_VALUE, MAX_FIX = 400, 8  # characters of a value in it, lines of a fix
MAX_SHORT_FIX = 60  # characters of a fix in a line
INTERRUPTED = {2: 130, 15: 143}  # signal number -> the shell's exit code for it


class UserError(Exception):
    """An error that the user can fix. `others` holds further errors that the same check found.

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
        blocks = [one.block() for one in (self, *self.others)]
        if sum(map(len, blocks)) + len(self.others) <= MAX_LINES:
            return "\n\n".join("\n".join(lines) for lines in blocks)
        lines = blocks[0]
        room = MAX_LINES - len(lines)
        shown = self.others[: room if len(self.others) <= room else room - 1]
        lines += [one.line() for one in shown]
        if hidden := len(self.others) - len(shown):
            lines.append(f"... and {hidden:,} more errors")
        return "\n".join(lines)

    def line(self) -> str:
        """Return this error as one of many, in one line, with its fix if that is short."""
        fix = f" ({self.fix})" if self.fix and len(self.fix) <= MAX_SHORT_FIX and "\n" not in self.fix else ""
        return shorten(f"also: {self.what}" + (f", at {self.at}" if self.at else "") + fix)

    def block(self) -> list[str]:
        """Return the lines of this error without `others`. Only `fix` may have several lines."""
        rows = {"at": self.at, "got": self.got, "expected": self.expected, "fix": self.fix}
        rows = {name: value for name, value in rows.items() if value is not None}
        width = max((len(name) + 1 for name in rows), default=0)
        lines = [f"error: {shorten(self.what)}"]
        for name, value in rows.items():
            parts = map(shorten, value.splitlines()[:MAX_FIX]) if name == "fix" else [shorten(value)]
            lines += [f"  {'' if i else f'{name}:':<{width}} {part}" for i, part in enumerate(parts)]
        return lines


class DataError(UserError):
    """A problem with texts, records, or data built from them."""

    code = DATA


class ModelError(UserError):
    """A problem with a model's folder, a tokenizer, a checkpoint or an adapter."""

    code = MODEL


class MachineError(UserError):
    """A problem with the machine: a missing package or compiler, or a lack of memory, disk space or ports."""

    code = ENVIRONMENT


NO_MEMORY = (  # torch on a CPU, and oneDNN
    "can't allocate memory",
    "not enough memory",
    "could not create a memory",
    "could not create a primitive",
    "bad_alloc",
)
FILE_FIXES = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "free some space, or write to another disk",
    errno.EFBIG: "raise the limit on the size of files: ulimit -f unlimited",
    errno.EMFILE: "raise the limit on open files: ulimit -n 4096",
    errno.EACCES: "check who owns it, and its permissions",
    errno.EPERM: "check who owns it, and its permissions",
    errno.EROFS: "write to another folder: this one is read-only",
}


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the machine or a device has no memory left: Python's, CUDA's or torch's."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def explain_machine(error: Exception) -> MachineError | None:
    """Return what to tell about an error of the machine: memory, files, a loop of links; None for any other error."""
    if isinstance(error, OSError):
        return MachineError(error.strerror or str(error), at=error.filename, fix=FILE_FIXES.get(error.errno))
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # of Path.resolve before Python 3.13
        return MachineError("a symbolic link leads back to itself", at=str(error).partition("'")[2].rstrip("'"))
    if not is_out_of_memory(error):
        return None
    what = "the device" if type(error).__name__ == "OutOfMemoryError" else "the machine"
    fix = "lower train.micro_batch_size (--batch-size), or set train.gradient_checkpointing: full"
    return MachineError(f"{what} is out of memory", fix=fix)


def raise_all(errors: list[UserError]) -> None:
    """Raise the first error with the rest in its `others`. Do nothing if there are no errors."""
    if errors:
        first, *rest = errors
        first.others += [one for error in rest for one in (error, *error.others)]
        raise first


def shorten(value: object) -> str:
    """Return a value on one line of at most MAX_VALUE characters, cut in the middle.

    >>> shorten("a" * 1000)[297:305], shorten("two\\nlines")
    ('aaa ... ', 'two lines')
    """
    text = " ".join(str(value).splitlines())
    return text if len(text) <= MAX_VALUE else f"{text[:300]} ... {text[-(MAX_VALUE - 305) :]}"


# Well-known names of methods, objectives and formats that are not built yet.
NOT_YET = set(
    "vera loha lokr oft boft galore ppo rlhf awq gptq int4 fp8 onnx mlx exl2 lion sophia shampoo soap adafactor".split()
)


def suggest(word: str, known: Iterable[str]) -> str:
    """Return what to write instead of an unknown name: a similar one, or all that exist.

    >>> suggest("lorra", ["lora", "bitfit"]), suggest("oft", ["lora", "bitfit"])
    ('did you mean lora?', 'oft is not there yet; there is lora, bitfit')
    """
    known = list(known)
    if word.lower().replace("-", "_") in NOT_YET:
        return f"{word} is not there yet; there is {', '.join(known)}"
    return did_you_mean(word, known) or f"one of: {', '.join(known)}"


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """Return "did you mean ...?" for a misspelt word, or None if no known word is similar."""
    from difflib import get_close_matches

    close = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else None
