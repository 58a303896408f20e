"""Define the command `eval`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from llmkit.commands.show import (
    MOST,
    AsJson,
    Columns,
    MaxBadFraction,
    Precision,
    format_float,
    parse_columns,
    progress_printer,
    show,
    terminal_text,
    to_stderr,
    without_nan,
)
from llmkit.config.defaults import MAX_BAD_FRACTION

LABEL_OPTIONS = ("--columns", "--max-bad-fraction", "--group-by")  # that a model with a head for labels takes too


def evaluate(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL", help="A run, checkpoint, adapter or folder.")
    ] = None,
    perplexity: Annotated[
        bool, typer.Option("--perplexity", help="Loss, perplexity, bits per byte: the default.")
    ] = False,
    memorization: Annotated[
        bool, typer.Option("--memorization", help="How much of its training text the model of a run gives away.")
    ] = False,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Texts, records or a data.dir; default: the val split. Of tasks: NAME=PATH, may be repeated."
        ),
    ] = None,
    each: Annotated[bool, typer.Option("--each", help="Score each text on its own, after a begin token.")] = False,
    by_source: Annotated[bool, typer.Option("--by-source", help="Each source of a run's corpus on its own.")] = False,
    by_language: Annotated[
        bool, typer.Option("--by-language", help="The documents of each language on their own.")
    ] = False,
    group_by: Annotated[
        str | None, typer.Option(help="Labels: a field of the records, to compare predictions for its values.")
    ] = None,
    columns: Columns = None,
    window: Annotated[int | None, typer.Option(min=1, max=MOST, help="Tokens in a sliding window.")] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Tokens between windows; default: the window.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=MOST)] = 8,
    tasks: Annotated[str | None, typer.Option(help="Names or files of tasks, with commas between them.")] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, max=1000, help="Tasks: examples before each question; default: the task's.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, max=MOST, help="Tasks: ask only the first N questions.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Tasks: ask in the model's chat template.")] = False,
    shown: Annotated[int, typer.Option("--show", min=0, max=1000, help="Tasks: print N prompts and their scores.")] = 0,
    baseline: Annotated[str | None, typer.Option(help="A model to compare with.")] = None,
    metrics: Annotated[
        list[str] | None, typer.Option("--metric", help="Tasks: score with a function, my.py:function.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Tasks: JSON file of the results; default: in ./evals.")] = None,
    allow_code: Annotated[bool, typer.Option("--allow-code", help="Tasks: run the code that a task brings.")] = False,
    precision: Precision = "auto",
    max_bad_fraction: MaxBadFraction = MAX_BAD_FRACTION,
    as_json: AsJson = False,
) -> None:
    """Measure a model: its loss, perplexity and bits per byte, or its scores on tasks."""
    from llmkit.errors import UserError
    from llmkit.storage.locate import locate, read_located_head

    of_tasks: dict[str, Any] = {"--shots": shots is not None, "--limit": limit, "--chat": chat, "--show": shown}
    of_tasks |= {"--out": out, "--allow-code": allow_code, "--metric": metrics}
    of_text = {"--perplexity": perplexity, "--each": each, "--columns": columns, "--window": window, "--stride": stride}
    of_text |= {"--by-source": by_source, "--by-language": by_language, "--group-by": group_by}
    of_text |= {"--max-bad-fraction": max_bad_fraction != MAX_BAD_FRACTION, "--batch-size": batch_size != 8}
    if tasks and memorization:
        raise UserError("--tasks and --memorization are two measurements", fix="give one of them")
    if given := [name for name, value in (of_text if tasks else of_tasks).items() if value]:
        has = "with" if tasks else "without"
        raise UserError(f"{given[0]} has no effect {has} --tasks", fix="leave it out")
    if not tasks and len(models or []) > 1:
        raise UserError("without --tasks, one model is measured at a time", got=", ".join(models), fix="name one")
    if not tasks and len(data or []) > 1:
        raise UserError("'--data' is given twice", at="llmkit eval", fix="give it once")
    given = {"--max-bad-fraction": of_text["--max-bad-fraction"], "--each": each, "--columns": columns}
    if not data and (unused := [name for name, value in given.items() if value]):
        raise UserError(f"{unused[0]} has no effect without --data", fix="leave it out")
    located = []
    for model in models or [find_default_run(progress_printer(as_json))]:
        located.append(locate(model))
        to_stderr(located[-1].choice)
    if memorization:
        from llmkit.evals.memorization import measure_memorization
        from llmkit.screen import format_table

        if given := [name for name, value in {**of_text, "--data": data, "--baseline": baseline}.items() if value]:
            raise UserError(f"{given[0]} has no effect with --memorization", fix="leave it out")
        figures = measure_memorization(located[0], precision=precision)
        canaries = [] if as_json else figures.pop("canaries")
        if not as_json and isinstance(kinds := figures["personal_data"], dict):
            figures["personal_data"] = ", ".join(f"{n} {kind}" for kind, n in kinds.items()) or "none found"
        show(figures, as_json)
        if canaries:
            print(format_table([row | {"exposure": f"{row['exposure']:.1f} bits"} for row in canaries]))
        return
    if tasks:
        options = {"shots": shots, "limit": limit, "chat": chat, "allow_code": allow_code, "metrics": metrics or []}
        evaluate_tasks(located, tasks, data or [], baseline, shown, out, precision, as_json, options)
        return
    if read_located_head(located[0]):
        given = {**of_text, "--baseline": baseline}
        if unused := [name for name, value in given.items() if value and name not in LABEL_OPTIONS]:
            what = f"{unused[0]} has no effect on a model that predicts labels"
            raise UserError(what, at=located[0].folder, fix="leave it out")
        options: dict[str, Any] = {"precision": precision, "max_bad_fraction": max_bad_fraction}
        from llmkit.evals.rewards import is_reward_model, measure_rewards

        if is_reward_model(located[0]):
            if columns or group_by:
                raise UserError("--columns and --group-by have no effect on a reward model", fix="leave them out")
            show(measure_rewards(located[0], data=data[0] if data else None, **options), as_json)
            return
        options |= {"columns": parse_columns(columns), "group_by": group_by}
        evaluate_labels(located[0], data[0] if data else None, as_json, options)
        return
    if group_by is not None:
        raise UserError(
            "--group-by is for models that predict labels", fix="leave it out; tasks have their own group_by"
        )
    from llmkit.evals.perplexity import compare, measure_by_language, measure_parts

    options = {"window": window, "stride": stride, "batch_size": batch_size, "precision": precision}
    options |= {"each": each, "columns": parse_columns(columns), "max_bad_fraction": max_bad_fraction}
    if by_source and by_language:
        raise UserError("--by-source and --by-language are two tables", fix="ask for one after the other")
    if by_source:
        show_by_source(located[0], options, bool(data or baseline), as_json)
        return
    options["data"] = data[0] if data else None
    if by_language:
        if baseline is not None:
            raise UserError("--by-language has no baseline", fix="leave out --baseline")
        show_parts("language", measure_by_language(located[0], **options), as_json)
        return
    measured = measure_parts(located[0], **options)
    if baseline is None:
        show(measured.figures, as_json)
        return
    if not data:
        raise UserError("--baseline needs --data, which both models read", fix="name a file")
    other = measure_parts(locate(baseline), **options)
    difference = compare(measured, other)
    if as_json:
        show(measured.figures | {"baseline": other.figures, "difference": difference}, as_json)
        return
    show(measured.figures, as_json)
    print(f"baseline {baseline}")
    names = ("loss", "loss_stderr", "perplexity", "perplexity_interval", "bits_per_byte")
    show({name: other.figures[name] for name in names if name in other.figures}, as_json)
    print(describe_loss(difference))


def evaluate_labels(located, data: str | None, as_json: bool, options: dict[str, Any]) -> None:
    """Print how often a model with a head for labels is right."""
    from llmkit.evals.labels import measure_labels
    from llmkit.screen import format_table

    figures = measure_labels(located, data=data, **options)
    if as_json:
        show(figures, as_json)
        return
    by_label, groups = figures.pop("labels", None), figures.pop("accuracy_by_group", {})
    sizes = figures.pop("examples_by_group", {})
    by_group = [{"group": name, "accuracy": value, "examples": sizes[name]} for name, value in groups.items()]
    names = [key.removesuffix("_stderr") for key in figures if key.endswith("_stderr")]
    rows = []
    for name in names:
        value, error, interval = (figures.pop(f"{name}{end}", None) for end in ("", "_stderr", "_interval"))
        row = {"score": name.replace("_", " "), "value": value, "stderr": error}
        rows.append(row | {"95 % interval": " to ".join(map(format_float, interval)) if interval else ""})
    show(figures, as_json)
    for table in (rows, by_label, by_group):
        if table:
            shown = [{key: format_float(v) if isinstance(v, float) else v for key, v in row.items()} for row in table]
            print(f"\n{terminal_text(format_table(shown))}")


def show_by_source(located, options: dict[str, Any], is_other: bool, as_json: bool) -> None:
    """Print a table with the figures of each source in the val split of a run."""
    from llmkit.errors import UserError
    from llmkit.evals.perplexity import measure_by_source

    if is_other or options.pop("each") or options.pop("columns"):
        raise UserError("--by-source measures the val split of a run, and nothing else", fix="leave out other options")
    show_parts("source", measure_by_source(located, **options), as_json)


def show_parts(kind: str, found: dict[str, dict[str, Any]], as_json: bool) -> None:
    """Print a table with the figures of each part of a text.

    kind  of the parts: source or language
    """
    from llmkit.screen import format_table

    if as_json:
        show(found, as_json)
        return
    names = ("documents", "tokens", "loss", "loss_stderr", "perplexity", "bits_per_byte")
    rows = [
        {kind: part} | {name.replace("_", " "): figures[name] for name in names if name in figures}
        for part, figures in found.items()
    ]
    print(format_table([{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows]))


def describe_loss(found: dict[str, Any]) -> str:
    """Return in words whether a loss is higher than a baseline's."""
    low, high = found["interval"]
    words = {"higher": "is worse", "lower": "is better", "no difference": "is the same"}
    verdict = words.get(found["verdict"], "is not clearly another")
    return f"the loss {verdict}: {found['difference']:+.4f} ({low:+.4f} to {high:+.4f}) nats a token"


def evaluate_tasks(
    located: list,
    tasks: str,
    data: list[str],
    baseline: str | None,
    shown: int,
    out: Path | None,
    precision: str,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    """Ask models the questions of tasks, and print and write their scores."""
    import json
    from datetime import datetime

    from llmkit.errors import UserError
    from llmkit.storage.locate import locate
    from llmkit.tasks import results
    from llmkit.tasks.evaluate import evaluate_models, prepare_tasks

    pairs = [one.partition("=")[::2] for one in data]
    if wrong := [one for one, (_, path) in zip(data, pairs, strict=True) if not path]:
        raise UserError("--data names the records of a task as NAME=PATH", got=wrong[0])
    if not tasks.replace(",", " ").strip():
        raise UserError("--tasks names no task", got=repr(tasks))
    names = list(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
    prepared = prepare_tasks(names, {name: Path(path).expanduser() for name, path in pairs}, **options)
    if baseline is not None:
        located = [*located, locate(baseline)]
    out = out or Path("evals") / f"{datetime.now():%Y%m%d-%H%M%S}.json"
    out.parent.mkdir(parents=True, exist_ok=True)  # before the work, in case that it can't be made
    found = evaluate_models(located, prepared, precision=precision, say=to_stderr)
    as_values = [results.to_json(one.about, prepared, one.results) for one in found]
    differences = {}
    if len(found) == 2 or baseline is not None:
        differences = {one.name: results.compare(one.results, found[-1].results) for one in found[:-1]}
        for value, one in zip(as_values, found[:-1], strict=False):
            value |= {"compared_with": found[-1].about["model"], "differences": differences[one.name]}
    results.write_results(out, [without_nan(value) for value in as_values])
    if as_json:
        print(json.dumps(without_nan(as_values if len(as_values) > 1 else as_values[0]), allow_nan=False))
        return
    for task, result in zip(prepared, found[0].results, strict=True):
        if shown and not result.answered:
            to_stderr(f"{task.name}: --show has no prompts of lm-evaluation-harness's tasks: lm_eval --log_samples")
        for line in results.show_questions(task, result, shown):
            print(line)
    print(results.tabulate([one.name for one in found], [one.results for one in found]))
    for one in found:
        for line in results.describe_groups(one.results):
            print(f"{one.name}: {line}" if len(found) > 1 else line)
    for name, by_task in differences.items():
        if by_task:
            print(results.tabulate_differences(name, found[-1].name, by_task))
    if len(found) > 1:
        results.draw([one.name for one in found], [one.results for one in found], out.with_suffix(".png"))
        print(f"picture: {out.with_suffix('.png')}")
    print(f"results: {out}")


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
