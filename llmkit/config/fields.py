"""Declare what the sections of the YAML file are made of: ranges of numbers, paths, and the two kinds of section."""

import re
from datetime import date
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

Count = Annotated[int, Field(ge=1, le=10**9)]
Fewer = Annotated[int, Field(ge=1, le=1000)]
Tokens = Annotated[int, Field(ge=1, le=10**15)]
SeqLen = Annotated[int, Field(ge=2, le=10**9)]  # of one token, nothing would be predicted
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what every random generator accepts
Fraction = Annotated[float, Field(ge=0, le=1)]
NonBlank = Annotated[str, Field(pattern=r"\S")]  # "" as a path would mean the working folder


def expand_home(path: str) -> str:
    """Replace a leading ~ by the home folder."""
    if not path.strip():
        raise PydanticCustomError("path", "Input should be a path, not empty")
    return f"{Path.home()}{path[1:]}" if path == "~" or path.startswith("~/") else path


PathStr = Annotated[str, AfterValidator(expand_home)]


def check_date(day: str) -> str:
    """Refuse a text that is not a day of the calendar."""
    try:
        return date.fromisoformat(day).isoformat()
    except ValueError:
        raise PydanticCustomError("date", "Input should be a day, as 2026-01-31") from None


Date = Annotated[str, AfterValidator(check_date)]


def check_regex(pattern: str) -> str:
    """Refuse a text that is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise PydanticCustomError("regex", "Input should be a regular expression: {why}", {"why": str(error)}) from None
    return pattern


Regex = Annotated[str, AfterValidator(check_regex)]


class Section(BaseModel):
    """A section with fixed keys. Unknown keys are errors; `true`, `10.5` and `"three"` are not integers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Choice(BaseModel):
    """A "choose one" section: a name from a dict in the code, and the options of the function it names."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)
    name: str
    """Which one."""

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})
