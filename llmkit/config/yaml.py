"""Read YAML with the file and line of every key, and apply overrides from the command line."""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from llmkit.errors import UserError, raise_all

MAX_NODES = 20_000  # more than any real config has; an alias bomb expands to billions
LENGTHS = ("max_steps", "max_tokens", "epochs")  # of a training run: one of them replaces the others


class Loader(yaml.SafeLoader):
    """A YAML loader that reads 1e-5 as a number, and only decimal numbers, true, false and null as something else.

    YAML 1.1 also reads 010 as 8, 1:30 as 90, yes as true and 2024-01-01 as a date: `TRAPS` refuses these.
    """


class FastLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """A loader for PLAIN text, with the rules of `Loader`. Its parser is written in C, and breaks on deep nesting."""


# What `dump_yaml` writes, but for texts that need other quotes or several lines: a key or an item in each line. The two
# parsers read it alike, and no line nests deeper than it is indented.
PLAIN = re.compile(
    r"(?: *(?:- (?:[A-Za-z_][\w.]*:)?|[A-Za-z_][\w.]*:)"  # an item, perhaps with a key; or a key
    r"(?: ?(?:[\w./+][\w./+-]*(?: [\w./+-]+)*|-[\w.][\w./+-]*|'[^'\n]*'|\[\]|\{\}))?\n)+",  # perhaps a value
    re.ASCII,
)
MAX_PLAIN = 100_000  # characters

DECIMAL = r"[-+]?(?:0|[1-9][\d_]*)"
FLOAT = r"[-+]?(?:\d[\d_]*\.[\d_]*(?:e[-+]?\d+)?|\.\d+(?:e[-+]?\d+)?|\d+e[-+]?\d+|\.inf|\.nan)"
Loader.yaml_implicit_resolvers = FastLoader.yaml_implicit_resolvers = {}
for kind, pattern, letters in (
    ("bool", "true|false", "tTfF"),
    ("null", "|~|null", ["", *"~nN"]),
    ("int", DECIMAL, "-+0123456789"),
    ("float", FLOAT, "-+.0123456789"),
):
    regex = re.compile(rf"^(?:{pattern})$", re.IGNORECASE | re.ASCII)
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", regex, list(letters))

# Words without quotes that YAML 1.1 reads as something else -> what to write instead.
TRAPS = {
    re.compile(trap, re.IGNORECASE | re.ASCII): fix
    for trap, fix in {
        r"yes|no|on|off": "write true or false, or put it in quotes if it is a word",
        r"[-+]?0[\d_]+": "write the number without leading zeros (YAML reads them as octal), or put it in quotes",
        r"[-+]?0[xob][\da-f_]+": "write the number in decimal, or put it in quotes if it is a word",
        r"[-+]?\d[\d_]*(?::[0-5]?\d)+(?:\.\d*)?": "put it in quotes (YAML reads it as a number to base 60)",
        r"\d{4}-\d\d?-\d\d?(?:[t ].*)?": "put it in quotes (YAML reads it as a date)",
    }.items()
}
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")  # also halves of characters, as in "\ud800"


class Dumper(yaml.SafeDumper):
    """A YAML dumper that puts every text in quotes that `Loader` or YAML 1.1 reads as something else."""


for first, rules in Loader.yaml_implicit_resolvers.items():
    for tag, regex in rules:
        Dumper.add_implicit_resolver(tag, regex, [first])
for trap in TRAPS:
    Dumper.add_implicit_resolver("tag:yaml.org,2002:trap", re.compile(rf"^(?:{trap.pattern})$", trap.flags), None)


def dump_yaml(values: dict) -> str:
    """Return values as YAML, which `parse_yaml` reads as the same values.

    >>> dump_yaml({"name": "1e5", "lr": 1e-5})
    "name: '1e5'\\nlr: 1.0e-05\\n"
    """
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True)


Tags = dict[str, Callable[[str, str], Any]]  # tag -> what makes a value of its text and its "file:line"


def read_yaml(path: Path, tags: Tags | None = None) -> tuple[dict, dict[tuple, str]]:
    """Read a YAML mapping. Return (values, origins), where origins maps each key path to its "file:line".

    tags  those that are allowed
    """
    path = path / "config.yaml" if (path / "config.yaml").is_file() else path  # of a run
    if not path.exists():
        raise UserError(f"no such config file: {path}", fix="`llmkit init pretrain` writes a commented example")
    if not path.is_file():
        raise UserError(f"the config is not a file: {path}", fix="name a YAML file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        return parse_yaml(text, str(path), tags)
    except UnicodeDecodeError as error:
        raise UserError("the config is not UTF-8 text", at=f"{path}, byte {error.start}") from None
    except OSError as error:
        raise UserError(f"the config can't be read: {error.strerror}", at=path) from None


def compose(text: str) -> tuple[Loader | FastLoader, yaml.Node | None]:
    """Return the node of a YAML document, and the loader that makes values of it."""
    if len(text) <= MAX_PLAIN and PLAIN.fullmatch(text):
        with suppress(yaml.YAMLError):  # the other one says what is wrong
            loader = FastLoader(text)
            return loader, loader.get_single_node()
    loader = Loader(text)
    return loader, loader.get_single_node()


def parse_yaml(text: str, name: str, tags: Tags | None = None) -> tuple[dict, dict[tuple, str]]:
    """Parse one mapping; refuse duplicate keys, other tags and alias bombs. See `read_yaml`."""
    try:
        loader, root = compose(text)
    except RecursionError:
        raise UserError("the YAML is nested too deeply", at=name) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        fix = "indent with spaces, never tabs" if "\\t" in problem else None
        at = f"{name}:{mark.line + 1}" if mark else name
        raise UserError(f"the YAML can't be parsed: {problem}", at=at, fix=fix) from None
    if root is None:
        raise UserError("the config is empty", at=name, fix="`llmkit init pretrain` prints a commented example")
    if not isinstance(root, yaml.MappingNode):
        raise UserError("the config is not a mapping", at=name, expected="sections such as `model:` and `data:`")

    origins: dict[tuple, str] = {(): name}
    budget = MAX_NODES
    errors: list[UserError] = []

    def build(node: yaml.Node, path: tuple) -> Any:
        nonlocal budget
        budget -= 1
        if budget < 0:
            raise UserError("the YAML expands to too many values (aliases within aliases?)", at=name)
        where = f"{name}:{node.start_mark.line + 1}"
        plain = isinstance(node, yaml.ScalarNode) and not node.style
        if tags and node.tag in tags and isinstance(node, yaml.ScalarNode):
            return tags[node.tag](node.value, where)
        if node.tag != loader.resolve(type(node), node.value, (plain, not plain)):
            raise UserError(f"the YAML tag {node.tag} is not allowed", at=where, fix="write a plain value")
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                origins[(*path, i)] = f"{name}:{item.start_mark.line + 1}"
            return [build(item, (*path, i)) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            result: dict = {}
            for key_node, value_node in node.value:
                key, line = key_node.value, key_node.start_mark.line + 1
                if not isinstance(key, str):
                    raise UserError("a YAML key must be a word", at=f"{name}:{line}")
                if key == "<<":
                    raise UserError("the YAML merge key << is not supported", at=f"{name}:{line}", fix="copy the keys")
                if CONTROL.search(key):
                    raise UserError("a YAML key has control characters", at=f"{name}:{line}", got=ascii(key))
                if key in result:
                    first = origins[(*path, key)]
                    raise UserError(f"the key `{key}` appears twice", at=f"{first} and {name}:{line}", fix="delete one")
                origins[(*path, key)] = f"{name}:{line}"
                result[key] = build(value_node, (*path, key))
            return result
        key = ".".join(map(str, path))
        if CONTROL.search(node.value):
            what, fix = f"{key} has control characters", "delete them; in double quotes, write a backslash twice"
            errors.append(UserError(what, at=where, got=ascii(node.value), fix=fix))
            return node.value
        for trap, fix in TRAPS.items():
            if plain and trap.fullmatch(node.value):
                errors.append(UserError(f"{key} has two meanings in YAML", at=where, got=node.value, fix=fix))
                return node.value
        try:
            return loader.construct_object(node)
        except ValueError:  # Python reads no number of over 4300 digits
            raise UserError(f"{key} is too large a number", at=where, got=node.value) from None

    try:
        values = build(root, ())
    except RecursionError:
        raise UserError("the YAML is nested too deeply, or contains itself", at=name) from None
    raise_all(errors)
    return values, origins


def set_override(values: dict, origins: dict[tuple, str], override: str) -> dict:
    """Apply one `section.key=value` to a parsed config and return the result. The value is read as YAML.

    origins  updated in place: the key now comes from the command line

    >>> set_override({"train": {"epochs": 1}}, {}, "train.max_steps=5")
    {'train': {'max_steps': 5}}
    """
    key, equals, text = override.partition("=")
    at = f"-o {override}"
    if not equals or not key or "\n" in text:
        raise UserError("an override must have the form section.key=value", at=at)
    parts = key_path(key.strip())
    try:
        (value,) = parse_yaml(f"{quote(key.strip())}: {text}", at)[0].values()
    except UserError as error:
        for one in (error, *error.others):
            one.at = at  # there are no lines
        raise
    parent: Any = values
    for depth, part in enumerate(parts[:-1]):
        if isinstance(part, int) != isinstance(parent, list) or (isinstance(part, int) and part >= len(parent)):
            raise UserError(f"{'.'.join(map(str, parts[:depth])) or 'the config'} has no {part}", at=at)
        parent = parent[part] if isinstance(part, int) else (parent.get(part) or {})
        if not isinstance(parent, dict | list):
            raise UserError(f"{'.'.join(map(str, parts[: depth + 1]))} is not a section", at=at)
    if isinstance(parent, list) and not (isinstance(parts[-1], int) and parts[-1] < len(parent)):
        raise UserError(f"{'.'.join(map(str, parts[:-1]))} has no {parts[-1]}", at=at)
    for depth in range(1, len(parts)):
        origins.setdefault(parts[:depth], at)
    for path in [path for path in origins if path[: len(parts)] == parts]:
        del origins[path]  # the old value's keys
    origins[parts] = at
    return replace_at(values, parts, value)


def replace_at(values: Any, parts: tuple, value: Any) -> Any:
    """Return `values` with the value at a key path replaced; missing sections are created."""
    if not parts:
        return value
    first, *rest = parts
    if isinstance(values, list):
        return [replace_at(v, tuple(rest), value) if i == first else v for i, v in enumerate(values)]
    return merge(values or {}, {first: replace_at((values or {}).get(first), tuple(rest), value)}, deep=False)


def merge(base: dict, over: dict, *, deep: bool = True) -> dict:
    """Merge `over` into `base`, section by section.

    A section in `over` with another `name` or `kind` replaces the old one, instead of inheriting its options.
    A training length in `over` (see LENGTHS) removes the other lengths.
    """
    dropped = set(LENGTHS) - over.keys() if any(over.get(key) is not None for key in LENGTHS) else set()
    result = {key: value for key, value in base.items() if key not in dropped}
    for key, value in over.items():
        old = result.get(key)
        both_sections = deep and isinstance(old, dict) and isinstance(value, dict)
        chooses_other = both_sections and any(tag in value and value[tag] != old.get(tag) for tag in ("name", "kind"))
        result[key] = merge(old, value) if both_sections and not chooses_other else value
    return result


def quote(text: str) -> str:
    """Return a text in double quotes, which YAML reads as it is.

    >>> quote("1:30")
    '"1:30"'
    """
    return json.dumps(text, ensure_ascii=False)


def key_path(key: str) -> tuple[str | int, ...]:
    """Return the parts of a dotted key, with numbers for the items of a list.

    >>> key_path("data.sources.0.path")
    ('data', 'sources', 0, 'path')
    """
    return tuple(int(part) if re.fullmatch("[0-9]{1,9}", part) else part for part in key.split("."))


def find_origin(origins: dict[tuple, str], path: tuple) -> str:
    """Return the "file:line" of a key path, or of the innermost section around it that was written."""
    while path and path not in origins:
        path = path[:-1]
    return origins.get(path, origins.get((), "the config"))
