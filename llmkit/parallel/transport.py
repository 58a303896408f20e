"""Carry an error from one process to another as JSON values."""

import traceback
from typing import Any

from llmkit.errors import DataError, MachineError, ModelError, UserError, explain_machine


class LostRankError(MachineError):
    """Another rank has ended, or does not answer: a consequence, so the launcher looks for its cause."""


KINDS = {kind.__name__: kind for kind in (UserError, DataError, ModelError, MachineError, LostRankError)}


def pack(error: Exception) -> dict[str, Any]:
    """Return an error as JSON values, which `unpack` reads. `at`, `got` and the rest become text."""
    if not isinstance(error, OSError):
        error = explain_machine(error) or error
    if isinstance(error, UserError):
        fields = {key: getattr(error, key) for key in ("what", "at", "got", "expected", "fix")}
        fields = {key: None if value is None else str(value) for key, value in fields.items()}
        return {"kind": type(error).__name__, **fields, "code": error.code, "others": [*map(pack, error.others)]}
    if isinstance(error, OSError) and error.errno:
        filename = None if error.filename is None else str(error.filename)
        return {"kind": "OSError", "args": [error.errno, error.strerror, filename]}
    return {
        "kind": "bug",
        "text": f"{type(error).__name__}: {error}",
        "traceback": "".join(traceback.format_exception(error)),
    }


def unpack(packed: dict[str, Any]) -> Exception:
    """Return the error that `pack` described; a bug becomes a RuntimeError, with its traceback as a note."""
    fields = dict(packed)
    kind = fields.pop("kind")
    if kind == "OSError":
        return OSError(*fields["args"])
    if kind == "bug":
        error = RuntimeError(fields["text"])
        error.add_note(fields["traceback"])
        return error
    return KINDS.get(kind, UserError)(**fields | {"others": [unpack(other) for other in fields["others"]]})
