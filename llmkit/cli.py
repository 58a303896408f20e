"""The commands: one thin function each, which prints results and decides nothing. Imports wait until a command runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from llmkit.commands import talk
from llmkit.commands.data import data_app, tokenizer_app
from llmkit.commands.show import AsJson, ConfigArg, Override, progress_to, show

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
)  # fmt: skip


@app.callback()
def common(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """From raw text to a trained, fine-tuned, evaluated and exported language model."""


app.add_typer(data_app, name="data")
app.add_typer(tokenizer_app, name="tokenizer")
app.command()(talk.generate)
app.command()(talk.chat)
app.command()(talk.serve)

DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the header, and stop.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Delete what an earlier run left in the run directory.")]
Nproc = Annotated[int, typer.Option("--nproc", min=1, help="Processes on this machine, one a device.")]


# ---- training -------------------------------------------------------------------------------------------------------


@app.command()
def pretrain(
    config: ConfigArg, o: Override = [], dry_run: DryRun = False, fresh: Fresh = False, nproc: Nproc = 1,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Train a model as CONFIG says. The same line again resumes; data that is not built yet is built first."""
    from llmkit.config import load_config

    run_training(load_config(config, o), dry_run=dry_run, fresh=fresh, nproc=nproc, as_json=as_json)


@app.command()
def finetune(
    config: Annotated[Path | None, typer.Argument(help="A YAML file; default: ./llmkit.yaml.")] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Train a LoRA adapter.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Train all weights.")] = False,
    method: Annotated[str | None, typer.Option(help="Another PEFT method, by name.")] = None,
    from_: Annotated[str | None, typer.Option("--from", help="The model to start from.")] = None,
    data: Annotated[Path | None, typer.Option(help="Prompts and answers: JSONL, JSON, CSV or Parquet.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of the adapter.")] = None,
    o: Override = [],
    dry_run: DryRun = False,
    fresh: Fresh = False,
    nproc: Nproc = 1,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model on prompts and answers, with --lora or --full."""
    from llmkit.presets import finetune_config

    chosen = [name for name, given in (("lora", lora), ("full", full), (method, method is not None)) if given]
    made = finetune_config(config, chosen, model=from_, data=data, rank=rank, overrides=o, say=progress_to(as_json))
    run_training(made, dry_run=dry_run, fresh=fresh, nproc=nproc, as_json=as_json)


def run_training(config: Any, *, dry_run: bool, fresh: bool, nproc: int, as_json: bool) -> None:
    """Train here, or in `nproc` processes, and print the summary."""
    if nproc > 1:
        from llmkit.parallel import launch

        summary = launch(train_rank, nproc, config, as_json=as_json, fresh=fresh, dry_run=dry_run)
    else:
        from llmkit.train import train

        summary = train(config, fresh=fresh, dry_run=dry_run, say=progress_to(as_json))
    if as_json:
        show(summary, as_json)
    elif not dry_run:
        commands = summary.pop("next")
        show(summary, as_json)
        print("\nnext: " + "\n      ".join(commands))


def train_rank(config: Any, *, as_json: bool, **options: Any) -> dict[str, Any]:
    """What every process of `--nproc` runs."""
    from llmkit.train import train

    return train(config, say=progress_to(as_json), **options)


# ---- evaluating and using -------------------------------------------------------------------------------------------


@app.command(name="eval")
def evaluate(
    model: Annotated[str | None, typer.Argument(help="A run, checkpoint, adapter or folder.")] = None,
    perplexity: Annotated[bool, typer.Option("--perplexity", help="Loss, perplexity and bits per byte.")] = False,
    data: Annotated[Path | None, typer.Option(help="Texts or records; default: the val split.")] = None,
    window: Annotated[int | None, typer.Option(min=1, help="Tokens of context at the most.")] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="Tokens between windows; default: the window.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    precision: Annotated[str, typer.Option(help="auto, bf16, fp16 or fp32.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure a model."""
    from llmkit.errors import UserError

    if not perplexity:
        raise UserError("nothing to measure is named", fix="llmkit eval MODEL --perplexity")
    from llmkit.checkpoint import locate
    from llmkit.evals.perplexity import measure

    located = locate(model or unnamed_run(progress_to(as_json)))
    show(measure(located, data=data, window=window, stride=stride, batch_size=batch_size, precision=precision), as_json)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A run, checkpoint, adapter or Hugging Face folder.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; for GGUF a file if it ends in .gguf.")],
    format: Annotated[str, typer.Option(help="hf: a merged folder; peft: an adapter; gguf: for llama.cpp.")] = "hf",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16; q8_0 in GGUF.")] = "fp32",
    as_json: AsJson = False,
) -> None:
    """Write a model for transformers, vLLM, peft or llama.cpp."""
    from llmkit.checkpoint import locate
    from llmkit.errors import UserError
    from llmkit.export import FORMATS

    if format not in FORMATS:
        raise UserError("--format is unknown", got=format, expected=" or ".join(FORMATS))
    write, dtypes = FORMATS[format]
    if dtype not in dtypes:
        fix = "export q8_0 or bf16: llama.cpp's llama-quantize makes others of it" if format == "gguf" else None
        raise UserError(f"--dtype is unknown to {format}", got=dtype, expected=" or ".join(dtypes), fix=fix)
    refuse_to_mix(out)
    write(locate(model), out, dtype)
    show_written(out, as_json)


@app.command(name="import")
def import_(
    file: Annotated[Path, typer.Argument(help="A .bin checkpoint of llama2.c.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    tokenizer: Annotated[Path, typer.Option(help="Its tokenizer.bin, or a tokenizer.json or .model.")],
    as_json: AsJson = False,
) -> None:
    """Make somebody else's checkpoint into a Hugging Face folder, which every command takes."""
    from llmkit.errors import UserError
    from llmkit.imports import import_llama2c

    for path in (file, tokenizer):
        if not path.exists():
            raise UserError("there is no such file", at=path)
    refuse_to_mix(out)
    import_llama2c(file, tokenizer, out)
    show_written(out, as_json)


def refuse_to_mix(out: Path) -> None:
    from llmkit.errors import UserError

    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError("the folder to write is not empty", at=out, fix="name a new one")


def show_written(out: Path, as_json: bool) -> None:
    files = [out] if out.is_file() else sorted(out.iterdir())
    show({"written": str(out), "files": ", ".join(path.name for path in files)}, as_json)


# ---- looking around -------------------------------------------------------------------------------------------------


@app.command()
def plan(config: ConfigArg, o: Override = [], as_json: AsJson = False) -> None:
    """Parameters, FLOPs and memory of CONFIG, without making weights. Exit code 5: it will not fit here."""
    from llmkit.config import load_config
    from llmkit.pricing import plan_config, plan_rows

    figures = plan_config(load_config(config, o))
    show(figures if as_json else plan_rows(figures), as_json)
    if not figures["fits"]:
        raise typer.Exit(5)


@app.command()
def runs(
    names: Annotated[list[Path], typer.Argument(help="Run directories; default: all under ./runs.")] = [],
    plot: Annotated[Path | None, typer.Option(help="Write their losses in one picture (PNG).")] = None,
    as_json: AsJson = False,
) -> None:
    """List and compare runs."""
    from llmkit.errors import UserError
    from llmkit.run import list_runs, plot_runs, summarize, table

    folders = names or list_runs(Path("runs"))
    missing = [str(folder) for folder in folders if not (folder / "config.yaml").is_file()]
    if missing or not folders:
        raise UserError("there is no run", at=", ".join(missing) or "./runs", fix="llmkit pretrain CONFIG makes one")
    rows = [summarize(folder) for folder in folders]
    show({"runs": rows}, as_json) if as_json else print(table(rows))
    if plot:
        plot_runs(folders, plot)


@app.command()
def init(
    kind: Annotated[
        str, typer.Argument(help="pretrain, finetune, corpus, tiny-llama, gpt2-124m ...: a wrong name lists all.")
    ],
    out: Annotated[Path | None, typer.Option(help="Write it here instead of printing it.")] = None,
) -> None:
    """Print a commented example config."""
    from llmkit.presets import example

    text = example(kind)
    if out is None:
        print(text, end="")
    else:
        from llmkit.errors import UserError

        if out.exists():
            raise UserError("the file is there already", at=out, fix="name another one")
        out.write_text(text, encoding="utf-8")
        print(f"written: {out}")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """What this machine can do, and what is missing."""
    from llmkit.parallel import examine

    show(examine(), as_json)


# ---- the entry point ------------------------------------------------------------------------------------------------


def unnamed_run(say) -> Path:
    """The run of ./llmkit.yaml, else the one that last wrote, when no model is named."""
    from llmkit.config import load_config
    from llmkit.errors import UserError
    from llmkit.presets import LOCAL
    from llmkit.run import list_runs

    if LOCAL.is_file():
        say(f"config: {LOCAL}")
        return Path(load_config(LOCAL).run_dir)
    found = [run for run in list_runs(Path("runs")) if (run / "checkpoints").is_dir()]
    if not found:
        raise UserError(
            "no model is named, and there is no run under ./runs", fix="llmkit eval MODEL --perplexity --data FILE"
        )
    say(f"newest run: {found[-1]}")
    return found[-1]


def main(arguments: list[str] | None = None) -> None:
    """The entry point: a user's mistake is one block and an exit code, never a traceback."""
    from llmkit.errors import BUG, ENVIRONMENT, INTERRUPTED, UserError

    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        code = app(arguments, standalone_mode=False)
    except UserError as error:
        print(error, file=sys.stderr)
        code = error.code
    except KeyboardInterrupt:
        print("interrupted; a run or a build of data goes on when its command is given again", file=sys.stderr)
        code = INTERRUPTED[2]
    except BrokenPipeError:
        sys.stderr.close()
        code = 0
    except OSError as error:
        print(UserError(error.strerror or str(error), at=error.filename), file=sys.stderr)
        code = ENVIRONMENT
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            fix = "lower train.micro_batch_size, or set train.gradient_checkpointing: full"
            print(UserError("the device is out of memory", fix=fix), file=sys.stderr)
            code = ENVIRONMENT
        elif hasattr(error, "exit_code") and hasattr(error, "show"):  # the command line itself
            error.show()
            code = error.exit_code
        elif debug:
            raise
        else:
            print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
            print("  this is a bug of llmkit; --debug shows where", file=sys.stderr)
            code = BUG
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
