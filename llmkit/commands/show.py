"""What all commands share: their arguments' words, and how results come on the screen."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

ConfigArg = Annotated[Path, typer.Argument(help="A YAML file.")]
Override = Annotated[list[str], typer.Option("-o", help="Override a key: section.key=value. May be repeated.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")]


def progress_printer(as_json: bool):
    """Where lines about progress go: standard output belongs to the JSON object when one is asked for."""
    return lambda line: print(line, file=sys.stderr if as_json else sys.stdout, flush=True)


def terminal_text(text: str) -> str:
    """Text of a model or a stranger as a terminal may have it; a file or a pipe gets it as it is."""
    from llmkit.screen import printable

    return printable(text) if sys.stdout.isatty() else text


def show(figures: dict[str, Any], as_json: bool) -> None:
    """A result: JSON as it is, or rows in which underscores are spaces."""
    if as_json:
        import json

        print(json.dumps(figures))
        return
    width = max(map(len, figures), default=0)
    for key, value in figures.items():
        value = f"{value:.4f}" if isinstance(value, float) and abs(value) < 1e4 else value
        print(f"{key.replace('_', ' '):>{width}}  {value}")
