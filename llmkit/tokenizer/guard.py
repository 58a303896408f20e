"""Turn what the tokenizers library raises into a user's error. It is written in Rust, and may panic."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from llmkit.errors import ModelError, UserError


@contextlib.contextmanager
def library_errors(what: str, kind: type[UserError] = ModelError, **rows: Any) -> Iterator[None]:
    """Raise a UserError of a kind for the library's errors: a bare Exception, or a panic, which is no Exception.

    A panic is, for example, a regex that needs too many steps on a text.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        reason = str(error).partition("\n")[0]
        raise kind(f"{what}: {reason}", **rows) from None


@contextlib.contextmanager
def hide_panics() -> Iterator[None]:
    """Hold back what is written to standard error; if a UserError ends the block, drop what Rust printed of a panic.

    Python can't prevent that Rust prints it. For long calls of one thread.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        stderr = os.dup(2)
        os.dup2(held.fileno(), 2)
        panicked = False
        try:
            yield
        except UserError:
            panicked = True
            raise
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            text = held.read()
            os.write(2, text.partition(b"\nthread '")[0] if panicked else text)
