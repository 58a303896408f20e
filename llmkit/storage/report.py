"""List runs, plot them, and write their reports."""

import math
import time
from pathlib import Path
from typing import Any

from llmkit.errors import ModelError
from llmkit.files import write_atomically
from llmkit.screen import format_count, hide_secrets
from llmkit.storage.manifest import list_checkpoints, step_of
from llmkit.storage.run import CONFIG, METRICS, RunDirectory, read_metrics, read_run_config


def list_runs(root: Path) -> list[Path]:
    """Return the run directories under `root`, sorted by their last write, oldest first."""

    def last_write(folder: Path) -> float:
        path = folder / METRICS
        return (path if path.exists() else folder / CONFIG).stat().st_mtime

    return sorted((path.parent for path in root.glob(f"*/{CONFIG}")), key=last_write)


def summarize(folder: Path) -> dict[str, Any]:
    """Return figures of a run: its setup, its last step, and the best val loss of a checkpoint that exists."""
    records = read_metrics(folder)
    try:
        config = read_run_config(folder)
    except ModelError as error:  # one damaged run does not hide the others
        config = {"init_from": error.what}
    losses = [record for record in records if "loss" in record]
    kept = {step_of(checkpoint) for checkpoint in list_checkpoints(folder)}
    evaluated = [r for r in records if r["step"] in kept and math.isfinite(r.get("val_loss", math.nan))]
    best = min(evaluated, key=lambda record: record["val_loss"], default={})
    model = (config.get("model") or {}).get("name") or config.get("init_from")
    data = config.get("data") or {}
    return {
        "run": str(folder),
        "model": f"{model} + {config['peft']['name']}" if config.get("peft") else model,
        "data": data.get("path") or data.get("dir"),
        "lr": (config.get("optimizer") or {}).get("lr"),
        "step": records[-1]["step"] if records else 0,
        "tokens": records[-1].get("tokens") if records else 0,
        "loss": losses[-1]["loss"] if losses else None,
        "val_loss": best.get("val_loss"),
        "val_perplexity": best.get("val_perplexity"),
        "bits_per_byte": best.get("bits_per_byte"),
        "best_step": best.get("step"),
    }


def summary_table(summaries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a table about runs that fits a screen; "at step" is the step of the best checkpoint."""
    return [
        {
            **{key: one[key] for key in ("run", "model", "data")},
            "lr": None if one["lr"] is None else f"{one['lr']:g}",
            "step": one["step"],
            "tokens": one["tokens"] and format_count(one["tokens"]),
            "best val loss": one["val_loss"],
            "at step": one["best_step"],
        }
        for one in summaries
    ]


def plot_runs(folders: list[Path], out: Path) -> None:
    """Plot train and val loss over the tokens seen, of one or several runs, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), dpi=130)
    for i, folder in enumerate(folders):
        records = read_metrics(folder)
        name = f"{folder.name} " if len(folders) > 1 else ""
        train = [(r["tokens"], r["loss"]) for r in records if r.get("loss") is not None]
        val = [(r["tokens"], r["val_loss"]) for r in records if "val_loss" in r and "tokens" in r]
        if train:
            axes.plot(*zip(*train, strict=True), color=f"C{i}", alpha=0.45, linewidth=1.2, label=f"{name}train")
        if val:
            axes.plot(*zip(*val, strict=True), "o-", color=f"C{i}", markersize=4, linewidth=1.6, label=f"{name}val")
            tokens, loss = val[-1]
            axes.annotate(
                f"{loss:.3f}", (tokens, loss), textcoords="offset points", xytext=(0, 8), ha="right", fontsize=9
            )
    axes.set_xlabel("tokens seen")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(folders[0].name if len(folders) == 1 else "runs")
    axes.xaxis.set_major_formatter(lambda value, _: format_count(value))
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    figure.tight_layout()
    temporary = out.with_name(out.name + ".tmp")
    figure.savefig(temporary, format="png")
    pyplot.close(figure)
    temporary.replace(out)


def write_report(run: RunDirectory, header: dict[str, Any], summary: dict[str, Any]) -> None:
    """Write report.md: header, summary and plot."""
    lines = [f"# {run.folder.name}", "", f"Written {time.strftime('%Y-%m-%d %H:%M')}.", "", "![loss](loss.png)", ""]
    for title, rows in (("Setup", header), ("Result", summary)):
        lines += [
            f"## {title}",
            "",
            "| | |",
            "|---|---|",
            *(f"| {k.replace('_', ' ')} | {v} |" for k, v in rows.items()),
            "",
        ]
    write_atomically(run.folder / "report.md", hide_secrets("\n".join(lines)))
