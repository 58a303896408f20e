"""Define the command `eval`."""

from pathlib import Path
from typing import Annotated

import typer

from llmkit.commands.show import (
    MOST,
    AsJson,
    Columns,
    MaxBadFraction,
    Precision,
    parse_columns,
    progress_printer,
    show,
    to_stderr,
)
from llmkit.config.defaults import MAX_BAD_FRACTION


def evaluate(
    model: Annotated[str | None, typer.Argument(help="A run, checkpoint, adapter or folder.")] = None,
    perplexity: Annotated[
        bool, typer.Option("--perplexity", help="Loss, perplexity, bits per byte: the default.")
    ] = False,
    data: Annotated[str | None, typer.Option(help="Texts, records or a data.dir; default: the val split.")] = None,
    each: Annotated[bool, typer.Option("--each", help="Score each text on its own, after a begin token.")] = False,
    columns: Columns = None,
    window: Annotated[int | None, typer.Option(min=1, max=MOST, help="Tokens in a sliding window.")] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Tokens between windows; default: the window.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=MOST)] = 8,
    precision: Precision = "auto",
    max_bad_fraction: MaxBadFraction = MAX_BAD_FRACTION,
    as_json: AsJson = False,
) -> None:
    """Measure a model: its loss, perplexity and bits per byte."""
    from llmkit.errors import UserError

    given = {"--max-bad-fraction": max_bad_fraction != MAX_BAD_FRACTION, "--each": each, "--columns": columns}
    if data is None and (unused := [name for name, value in given.items() if value]):
        raise UserError(f"{unused[0]} has no effect without --data", fix="leave it out")
    from llmkit.evals.perplexity import measure
    from llmkit.storage.locate import locate

    located = locate(model or find_default_run(progress_printer(as_json)))
    to_stderr(located.choice)
    options = {"window": window, "stride": stride, "batch_size": batch_size, "precision": precision}
    options |= {"each": each, "columns": parse_columns(columns)}
    show(measure(located, data=data, max_bad_fraction=max_bad_fraction, **options), as_json)


def find_default_run(say) -> Path:
    """Return the run of ./llmkit.yaml, or else the newest run, to evaluate when no model is named."""
    from llmkit.config.load import load_config
    from llmkit.errors import UserError
    from llmkit.storage.manifest import list_checkpoints
    from llmkit.storage.report import list_runs
    from llmkit.training.presets import LOCAL

    if LOCAL.is_file() and list_checkpoints(run := Path(load_config(LOCAL, for_training=False).run_dir)):
        say(f"config: {LOCAL}")
        return run
    found = [run for run in list_runs(Path("runs")) if list_checkpoints(run)]
    if not found:
        fix = "llmkit eval MODEL --perplexity --data FILE"
        raise UserError("no model is named, and there is no run under ./runs", fix=fix)
    say(f"newest run: {found[-1]}")
    return found[-1]
