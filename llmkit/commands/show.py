"""Declare the options that several commands share, and print results."""

import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

MOST = 10**9  # of what an option counts
ConfigArg = Annotated[Path, typer.Argument(help="A YAML file.")]
ModelArg = Annotated[str, typer.Argument(help="A run, checkpoint, adapter or Hugging Face folder.")]
Precision = Annotated[str, typer.Option(help="auto, bf16, fp16 or fp32.")]
Override = Annotated[list[str], typer.Option("-o", help="Override a key: section.key=value. May be repeated.")]
MaxBadFraction = Annotated[
    float, typer.Option(min=0, max=1, help="Stop if more of the records, or of the bytes, can't be used.")
]
Columns = Annotated[
    str | None, typer.Option(help="Fields of records: question=Frage,answer=Antwort; default: the config's.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")]


class Command(TyperCommand):
    """A command that refuses a repeated option and an empty value. By itself, typer takes the last one, or a default.

    Options that may be repeated are declared as lists.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        from llmkit.errors import UserError

        given, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for parameter in order:
            name, value = parameter.get_error_hint(), given[parameter.name]
            if order.count(parameter) > 1 and not parameter.multiple:
                raise UserError(f"{name} is given twice", at=ctx.command_path, fix="give it once")
            if value == "" or (isinstance(value, list | tuple) and "" in value):
                raise UserError(f"{name} is empty", at=ctx.command_path, fix="give a value, or leave it out")
        return super().parse_args(ctx, args)


def progress_printer(as_json: bool):
    """Return a function that prints progress lines, to standard error if standard output is to hold only JSON."""
    from llmkit.screen import for_stream, hide_secrets

    stream = sys.stderr if as_json else sys.stdout
    return lambda line: print(for_stream(hide_secrets(line), stream), file=stream, flush=True)


def to_stderr(line: str) -> None:
    """Print a line about a command, whose result goes to standard output; nothing if it is empty."""
    if line:
        progress_printer(as_json=True)(line)


def parse_columns(columns: str | None) -> dict[str, str] | None:
    """Return {our name of a field: the records' name} of --columns."""
    from llmkit.errors import UserError

    if columns is None:
        return None
    pairs = [pair.partition("=")[::2] for pair in columns.split(",")]
    named = {ours.strip(): theirs.strip() for ours, theirs in pairs}
    if not all((*named, *named.values())):
        raise UserError("--columns names fields as question=Frage,answer=Antwort", got=columns)
    return named


def terminal_text(text: str) -> str:
    """Replace the control characters of an untrusted text if it goes to a terminal, not if it goes to a file."""
    from llmkit.screen import for_stream

    return for_stream(text, sys.stdout)


def check_is_new(out: Path) -> None:
    """Raise UserError if the output exists already and is not an empty folder, or can't be replaced by one."""
    from llmkit.errors import UserError
    from llmkit.files import delete_leftovers

    if out.resolve() == Path.cwd():
        raise UserError("the output is the working directory", at=out, fix="name a folder in it")
    if out.is_dir():
        delete_leftovers(out)
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError("the output exists already and is not empty", at=out, fix="choose another path")


def without_nan(value: Any) -> Any:
    """Return JSON values with null for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(figures: dict[str, Any], as_json: bool) -> None:
    """Print a result as JSON, or as a table of names (underscores become spaces) and values."""
    if as_json:
        import json

        print(json.dumps(without_nan(figures), allow_nan=False))
        return
    width = max(map(len, figures), default=0)
    for key, value in figures.items():
        is_interval = isinstance(value, list) and all(isinstance(one, float) for one in value)
        value = " to ".join(map(format_float, value)) if is_interval else value
        value = format_float(value) if isinstance(value, float) else value
        print(terminal_text(f"{key.replace('_', ' '):>{width}}  {value}"))


def format_float(value: float) -> str:
    """Return a number as results show it."""
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.6g}"
