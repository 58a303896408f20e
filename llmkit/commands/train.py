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
Profile = Annotated[
    int, typer.Option("--profile", min=0, max=MOST, help="Profile N steps: a trace and a table in the run directory.")
]


def pretrain(
    config: ConfigArg,
    o: Override = [],
    dry_run: DryRun = False,
    fresh: Fresh = False,
    nproc: Nproc = 1,
    profile: Profile = 0,
    as_json: AsJson = False,
) -> None:
    """Train the model of CONFIG. The same command resumes an interrupted run. Missing data is built first."""
    from llmkit.config.load import load_config

    run_training(load_config(config, o), dry_run=dry_run, fresh=fresh, nproc=nproc, profiled=profile, as_json=as_json)


def finetune(
    config: Annotated[Path | None, typer.Argument(help="A YAML file; default: ./llmkit.yaml, if it is there.")] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Train a LoRA adapter.")] = False,
    qlora: Annotated[bool, typer.Option("--qlora", help="Train a LoRA adapter on a base in 4 bits.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Train all weights.")] = False,
    method: Annotated[str | None, typer.Option(help="Another PEFT method, by name.")] = None,
    from_: Annotated[str | None, typer.Option("--from", help="The model to start from.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Prompts and answers, or texts with labels: JSONL, CSV, Parquet.")
    ] = None,
    columns: Columns = None,
    rank: Annotated[int | None, typer.Option(min=1, max=MOST, help="Rank of the LoRA adapter.")] = None,
    objective: Annotated[
        str | None,
        typer.Option(help="dpo, kto, reward, grpo; classify, regress, tag. Default: answers."),
    ] = None,
    o: Override = [],
    dry_run: DryRun = False,
    fresh: Fresh = False,
    nproc: Nproc = 1,
    profile: Profile = 0,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model on prompts and answers, with --lora, --qlora, --full or --method; by default the newest run."""
    from llmkit.training.presets import finetune_config

    flags = (("lora", lora), ("qlora", qlora), ("full", full), (method, method is not None))
    chosen = [name for name, given in flags if given]
    given = {"model": from_, "data": data, "columns": parse_columns(columns), "rank": rank, "objective": objective}
    loaded = finetune_config(config, chosen, **given, overrides=o, say=progress_printer(as_json))
    run_training(loaded, dry_run=dry_run, fresh=fresh, nproc=nproc, profiled=profile, as_json=as_json)


def run_training(config: Any, *, dry_run: bool, fresh: bool, nproc: int, profiled: int, as_json: bool) -> None:
    """Train in this process or in `nproc` processes, and print the summary."""
    options = {"as_json": as_json, "fresh": fresh, "dry_run": dry_run, "profiled": profiled}
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


def plan(
    config: ConfigArg,
    device: Annotated[str | None, typer.Option(help="A GPU that is not here: h100, a100, l4 ...")] = None,
    devices: Annotated[int, typer.Option(min=1, max=1024, help="How many of them share a batch.")] = 1,
    price: Annotated[float | None, typer.Option(min=0, max=MOST, help="Of one device for an hour.")] = None,
    inference: Annotated[bool, typer.Option("--inference", help="What serving the model takes.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="List the parameters, layer by layer.")] = False,
    o: Override = [],
    as_json: AsJson = False,
) -> None:
    """Estimate parameters, FLOPs, memory and time of CONFIG without creating weights. Exit code 5: it does not fit."""
    from llmkit.config.load import load_config
    from llmkit.screen import format_table
    from llmkit.training.plan import inference_rows, layer_rows, list_layers, plan_config, plan_inference, plan_rows

    check_plan_options(inference, layers, device, devices, price)
    loaded = load_config(config, o)
    if layers:
        rows = list_layers(loaded)
        show({"layers": rows}, as_json) if as_json else print(format_table(layer_rows(rows)))
    elif inference:
        figures = plan_inference(loaded, device)
        rows, table = inference_rows(figures)
        show(figures if as_json else rows, as_json)
        if not as_json:
            print(f"\n{format_table(table)}")
    else:
        figures = plan_config(loaded, gpu=device, devices=devices, price=price)
        show(figures if as_json else plan_rows(figures), as_json)
        if not figures["fits"]:
            raise typer.Exit(5)


def check_plan_options(inference: bool, layers: bool, device: str | None, devices: int, price: float | None) -> None:
    """Raise a UserError if options of `plan` do not go together."""
    from llmkit.errors import UserError

    if inference and layers:
        raise UserError("--inference and --layers print two different tables", fix="ask for one after the other")
    given = {"--devices": devices > 1, "--price": price is not None, "--device": device is not None and layers}
    for name in (name for name, is_given in given.items() if is_given and (layers or inference)):
        raise UserError(f"{name} has no effect on this table", fix="leave it out")
