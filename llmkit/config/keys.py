"""List the keys of a config with type, default and meaning, and write its JSON schema for editors."""

import inspect
import re
import typing
from collections.abc import Callable, Iterator
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, TypeAdapter
from pydantic_core import PydanticUndefined

from llmkit.config.schema import Choice, Config
from llmkit.errors import UserError, suggest

YAML_WORDS = {None: "null", True: "true", False: "false"}
Tables = dict[str, dict[str, Callable]]  # "choose one" section -> name -> function or dataclass with the options


def list_keys(section: str | None, tables: Tables) -> Iterator[dict[str, str]]:
    """Yield key, type, default and meaning of all keys, or of those below a dotted section.

    >>> next(list_keys("checkpoint.every", {}))
    {'key': 'checkpoint.every', 'type': 'number', 'default': '500', 'meaning': 'Steps between checkpoints.'}
    """
    rows = list(walk(Config, "", tables))
    found = [row for row in rows if not section or row["key"] == section or row["key"].startswith(f"{section}.")]
    if not found:
        sections = {row["key"].rpartition(".")[0] or row["key"] for row in rows} | {row["key"] for row in rows}
        raise UserError("there is no such section", got=section, fix=suggest(section, sorted(sections)))
    yield from found


def walk(model: type[BaseModel], prefix: str, tables: Tables) -> Iterator[dict[str, str]]:
    """Yield the rows of a section and of the sections in it."""
    for name, field in model.model_fields.items():
        key, inner = f"{prefix}{name}", [one for one in leaves(field.annotation) if inspect.isclass(one)]
        sections = [one for one in inner if issubclass(one, BaseModel)]
        yield make_row(key, field.annotation, field.default, field.description)
        for section in sections:
            if section is Choice:
                yield from choices(key, tables.get(key, {}))
            else:
                item = ".0" if get_origin(field.annotation) is list else ""
                yield from walk(section, f"{key}{item}.", tables)


def choices(section: str, table: dict[str, Callable]) -> Iterator[dict[str, str]]:
    """Yield the rows of the options of a "choose one" section, for each name it may have."""
    for name, chosen in table.items():
        text = inspect.getdoc(chosen) or ""
        yield {"key": f"{section}.name", "type": name, "default": "", "meaning": text.partition("\n\n")[0]}
        hints = typing.get_type_hints(chosen, include_extras=True)
        for parameter in inspect.signature(chosen).parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY:
                meaning = re.search(rf"^{parameter.name}  +(\S.*(?:\n {{4,}}.*)*)", text, re.MULTILINE)
                default = PydanticUndefined if parameter.default is parameter.empty else parameter.default
                row = make_row(f"{section}.{parameter.name}", hints[parameter.name], default, meaning and meaning[1])
                yield row | {"key": f"{section}.{parameter.name} ({name})"}


def make_row(key: str, annotation: Any, default: Any, meaning: str | None) -> dict[str, str]:
    """Return the row of one key, its default as it is written in YAML."""
    if isinstance(default, BaseModel):
        shown = getattr(default, "name", "")
    elif default is PydanticUndefined:
        shown = "required"
    else:
        shown = YAML_WORDS.get(default, str(default)) if isinstance(default, bool | None) else str(default)
    return {"key": key, "type": describe(annotation), "default": shown, "meaning": " ".join((meaning or "").split())}


def leaves(annotation: Any) -> list[Any]:
    """Return the types inside unions, lists and `Annotated`."""
    if get_origin(annotation) is Literal:
        return [annotation]
    if get_origin(annotation) is Annotated:
        return leaves(get_args(annotation)[0])
    inner = [leaf for one in get_args(annotation) for leaf in leaves(one)]
    return inner or [annotation]


def describe(annotation: Any) -> str:
    """Return a type in words.

    >>> describe(int | Literal["auto"] | None), describe(list[str])
    ('number, auto', 'list of text')
    """
    if get_origin(annotation) is Annotated:
        return describe(get_args(annotation)[0])
    if get_origin(annotation) is list:
        return f"list of {describe(get_args(annotation)[0])}"
    if get_origin(annotation) is Literal:
        return ", ".join(
            str(value).lower() if isinstance(value, bool) else str(value) for value in get_args(annotation)
        )
    names = {int: "number", float: "number", str: "text", bool: "true, false"}
    if annotation in names:
        return names[annotation]
    if get_origin(annotation) is dict or inspect.isclass(annotation):
        return "section"
    return ", ".join(dict.fromkeys(describe(one) for one in get_args(annotation) if one is not NoneType))


def json_schema(tables: Tables) -> dict[str, Any]:
    """Return a JSON schema of a config, for editors. Names of "choose one" sections are enumerated."""
    schema = TypeAdapter(Config).json_schema()
    schema["required"] = ["data"]
    for section, table in tables.items():
        named = schema["properties"][section]
        named["anyOf"] = [{"type": "object", "properties": {"name": {"enum": list(table)}}}, {"type": "null"}]
        named.pop("$ref", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "llmkit"} | schema
