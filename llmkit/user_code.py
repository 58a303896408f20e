"""Load functions of the user's own Python files, which are named as my.py:function."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from llmkit.errors import UserError, did_you_mean


def load_function(file: Path, name: str, at: str) -> Callable:
    """Return a function of a Python file, which may import its neighbours.

    at  where it is named, for errors. Raise UserError if the file is not there, fails, or lacks the function
    """
    if not file.is_file():
        raise UserError("there is no such Python file", at=at, got=file)
    spec = importlib.util.spec_from_file_location(f"llmkit_user_{file.stem}", file)
    loaded = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(loaded)
    except Exception as error:
        raise UserError(f"the code fails: {type(error).__name__}: {error}", at=file) from error
    finally:
        sys.path.remove(str(file.parent))
    if not callable(found := getattr(loaded, name, None)):
        raise UserError(f"{file} has no function {name}", at=at, fix=did_you_mean(name, vars(loaded)))
    return found


def load_named(name: str, at: str) -> Callable:
    """Return the function that a name such as my.py:function means."""
    file, colon, function = name.rpartition(":")
    if not colon or not file.endswith(".py"):
        raise UserError("a function of your own is named as my.py:function", at=at, got=name)
    return load_function(Path(file).expanduser(), function, at)
