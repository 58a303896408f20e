"""Define the commands `pretrain`, `finetune` and `plan`."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from llmkit.commands.show import MOST, AsJson, Columns, ConfigArg, Override, parse_columns, progress_printer, show

DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check the config, and the data if it is built; print the header; load no weights."),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Delete what an earlier run left in the run directory.")]
Nproc = Annotated[int, typer.Option("--nproc", min=1, max=1024, help="Processes on this machine, one per device.")]


def pretrain(
    config: ConfigArg,
    o: Override = [],
    dry_run: DryRun = False,
    fresh: Fresh = False,
    nproc: Nproc = 1,
    as_json: AsJson = False,
) -> None:
    """Train the model of CONFIG. The same command resumes an interrupted run. Missing data is built first."""
    from llmkit.config.load import load_config

    run_training(load_config(config, o), dry_run=dry_run, fresh=fresh, nproc=nproc, as_json=as_json)


def finetune(
    config: Annotated[Path | None, typer.Argument(help="A YAML file; default: ./llmkit.yaml, if it is there.")] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Train a LoRA adapter.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Train all weights.")] = False,
    method: Annotated[str | None, typer.Option(help="Another PEFT method, by name.")] = None,
    from_: Annotated[str | None, typer.Option("--from", help="The model to start from.")] = None,
    data: Annotated[Path | None, typer.Option(help="Prompts and answers: JSONL, JSON, CSV or Parquet.")] = None,
    columns: Columns = None,
    rank: Annotated[int | None, typer.Option(min=1, max=MOST, help="Rank of the LoRA adapter.")] = None,
    o: Override = [],
    dry_run: DryRun = False,
    fresh: Fresh = False,
    nproc: Nproc = 1,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model on prompts and answers, with --lora, --full or another --method; by default the newest run."""
    from llmkit.training.presets import finetune_config

    chosen = [name for name, given in (("lora", lora), ("full", full), (method, method is not None)) if given]
    given = {"model": from_, "data": data, "columns": parse_columns(columns), "rank": rank}
    loaded = finetune_config(config, chosen, **given, overrides=o, say=progress_printer(as_json))
    run_training(loaded, dry_run=dry_run, fresh=fresh, nproc=nproc, as_json=as_json)


def run_training(config: Any, *, dry_run: bool, fresh: bool, nproc: int, as_json: bool) -> None:
    """Train in this process or in `nproc` processes, and print the summary."""
    options = {"as_json": as_json, "fresh": fresh, "dry_run": dry_run}
    if nproc > 1:
        from llmkit.parallel.launch import launch

        if nproc > (rows := config.train.global_batch_size):
            what, got = "is less than one row for each process", f"{rows} rows, --nproc {nproc}"
            raise config.error("train.global_batch_size", what, got=got, fix=f"pass --nproc {rows} at most")
        summary = launch(train_rank, nproc, config, **options)
    else:
        summary = train_rank(config, **options)
    if os.environ.get("RANK", "0") != "0":  # started by torchrun: rank 0 prints
        return
    if as_json:
        show(summary, as_json)
    elif not dry_run:
        commands = summary.pop("next")
        show(summary, as_json)
        print("\nnext: " + "\n      ".join(commands))


def train_rank(config: Any, *, as_json: bool, **options: Any) -> dict[str, Any]:
    """Train in one process, and return the summary."""
    from llmkit.training.loop import train

    return train(config, say=progress_printer(as_json), **options)


def plan(config: ConfigArg, o: Override = [], as_json: AsJson = False) -> None:
    """Estimate parameters, FLOPs and memory of CONFIG without creating weights. Exit code 5: it does not fit here."""
    from llmkit.config.load import load_config
    from llmkit.training.plan import plan_config, plan_rows

    figures = plan_config(load_config(config, o))
    show(figures if as_json else plan_rows(figures), as_json)
    if not figures["fits"]:
        raise typer.Exit(5)
