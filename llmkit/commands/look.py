"""Define the commands `runs`, `init`, `keys`, `schema` and `doctor`."""

from pathlib import Path
from typing import Annotated

import typer

from llmkit.commands.show import AsJson, show, terminal_text


def runs(
    names: Annotated[list[Path], typer.Argument(help="Run directories, or names under ./runs; default: all.")] = [],
    plot: Annotated[Path | None, typer.Option(help="Plot their losses to this PNG file.")] = None,
    as_json: AsJson = False,
) -> None:
    """List and compare runs."""
    from llmkit.errors import UserError
    from llmkit.screen import format_table
    from llmkit.storage.plot import plot_runs
    from llmkit.storage.report import list_runs, summarize, summary_table
    from llmkit.storage.run import is_run

    folders = [name if is_run(name) else Path("runs") / name for name in names] or list_runs(Path("runs"))
    missing = [str(name) for name, folder in zip(names or folders, folders, strict=True) if not is_run(folder)]
    if missing or not folders:
        raise UserError("there is no run", at=", ".join(missing) or "./runs", fix="llmkit pretrain CONFIG makes one")
    if plot and plot.suffix != ".png":
        raise UserError("--plot writes a PNG", got=plot, fix="name a file that ends in .png")
    if plot and plot.is_file() and plot.read_bytes()[:4] not in (b"", b"\x89PNG"):
        raise UserError("the output exists already, and is no picture", at=plot, fix="choose another path")
    rows = [summarize(folder) for folder in folders]
    show({"runs": rows}, as_json) if as_json else print(terminal_text(format_table(summary_table(rows))))
    if plot:
        plot_runs(folders, plot)
        if not as_json:
            print(f"\nwritten: {plot}")


def init(
    kind: Annotated[
        str,
        typer.Argument(
            help="pretrain, finetune, corpus, laptop, lora, tiny-llama, gpt2-124m ...; a wrong name lists all."
        ),
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
        from llmkit.files import write_atomically

        if out.exists() or out.is_symlink():
            raise UserError("the file exists already", at=out, fix="choose another name")
        write_atomically(out, text)
        print(f"written: {out}")


def keys(
    section: Annotated[str | None, typer.Argument(help="A section, such as train or data.tokenizer.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the keys of a config with their types, defaults and meanings."""
    from llmkit.config.keys import list_keys
    from llmkit.screen import format_keys
    from llmkit.training.resolve import TABLES

    rows = list(list_keys(section, TABLES))
    show({"keys": rows}, as_json) if as_json else print(format_keys(rows))


def schema() -> None:
    """Print a JSON schema of the config, for editors."""
    import json

    from llmkit.config.keys import json_schema
    from llmkit.training.resolve import TABLES

    print(json.dumps(json_schema(TABLES), indent=2))


def doctor(as_json: AsJson = False) -> None:
    """Show what this machine can do, and what is missing."""
    from llmkit.parallel.doctor import examine

    show(examine(), as_json)
