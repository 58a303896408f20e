"""Define the commands `runs`, `init` and `doctor`."""

from pathlib import Path
from typing import Annotated

import typer

from llmkit.commands.show import AsJson, show


def runs(
    names: Annotated[list[Path], typer.Argument(help="Run directories; default: all under ./runs.")] = [],
    plot: Annotated[Path | None, typer.Option(help="Plot their losses to this PNG file.")] = None,
    as_json: AsJson = False,
) -> None:
    """List and compare runs."""
    from llmkit.errors import UserError
    from llmkit.screen import format_table
    from llmkit.storage.plot import plot_runs
    from llmkit.storage.report import list_runs, summarize
    from llmkit.storage.run import CONFIG

    folders = names or list_runs(Path("runs"))
    missing = [str(folder) for folder in folders if not (folder / CONFIG).is_file()]
    if missing or not folders:
        raise UserError("there is no run", at=", ".join(missing) or "./runs", fix="llmkit pretrain CONFIG makes one")
    rows = [summarize(folder) for folder in folders]
    show({"runs": rows}, as_json) if as_json else print(format_table(rows))
    if plot:
        plot_runs(folders, plot)


def init(
    kind: Annotated[
        str, typer.Argument(help="pretrain, finetune, corpus, tiny-llama, gpt2-124m ...; a wrong name lists all.")
    ],
    out: Annotated[Path | None, typer.Option(help="Write it to this file instead of printing it.")] = None,
) -> None:
    """Print a commented example config."""
    from llmkit.training.presets import example

    text = example(kind)
    if out is None:
        print(text, end="")
    else:
        from llmkit.errors import UserError

        if out.exists():
            raise UserError("the file exists already", at=out, fix="choose another name")
        out.write_text(text, encoding="utf-8")
        print(f"written: {out}")


def doctor(as_json: AsJson = False) -> None:
    """Show what this machine can do, and what is missing."""
    from llmkit.parallel.doctor import examine

    show(examine(), as_json)
