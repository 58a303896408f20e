"""List runs, and write their reports."""

import math
import time
from pathlib import Path
from typing import Any

from llmkit.errors import ModelError
from llmkit.files import write_atomically
from llmkit.screen import format_count, hide_secrets
from llmkit.storage.manifest import best_checkpoint, list_checkpoints, step_of
from llmkit.storage.run import CONFIG, METRICS, RunDirectory, read_metrics, read_run_config


def list_runs(root: Path) -> list[Path]:
    """Return the run directories under `root`, sorted by their last write, oldest first."""

    def last_write(folder: Path) -> float:
        path = folder / METRICS
        return (path if path.exists() else folder / CONFIG).stat().st_mtime

    return sorted((path.parent for path in root.glob(f"*/{CONFIG}")), key=last_write)


COUNTED = ("val_loss", "val_perplexity", "val_tokens", "val_examples")  # figures of the val split that are no scores


def summarize(folder: Path) -> dict[str, Any]:
    """Return figures of a run: its setup, its last step, and the best val loss of a checkpoint that exists."""
    records = read_metrics(folder)
    try:
        config = read_run_config(folder)
    except ModelError as error:  # one damaged run does not hide the others
        config = {"init_from": error.what}
    losses = [record for record in records if "loss" in record]
    kept = {step_of(checkpoint) for checkpoint in list_checkpoints(folder)}
    evaluated = [r for r in records if r["step"] in kept and is_finite(r.get("val_loss"))]
    if any(is_score(key) for record in evaluated for key in record) and (chosen := best_checkpoint(folder)):
        # eval.best may be another figure than the val loss
        evaluated = [record for record in evaluated if record["step"] == step_of(chosen)] or evaluated
    best = min(evaluated, key=lambda record: record["val_loss"], default={})
    model = (config.get("model") or {}).get("name") or config.get("init_from")
    return {
        "run": str(folder),
        "model": f"{model} + {config['peft']['name']}" if config.get("peft") else model,
        "data": data_name(config.get("data") or {}),
        "lr": (config.get("optimizer") or {}).get("lr"),
        "step": records[-1]["step"] if records else 0,
        "tokens": records[-1].get("tokens") if records else 0,
        "loss": losses[-1]["loss"] if losses else None,
        "val_loss": best.get("val_loss"),
        "val_perplexity": best.get("val_perplexity"),
        "bits_per_byte": best.get("bits_per_byte"),
        "best_step": best.get("step"),
        "scores": {key: value for key, value in best.items() if is_score(key)},
    }


def is_score(key: str) -> bool:
    """Return whether a figure of an evaluation is the loss of a set, or a score of a task or of a head for labels."""
    if "/" in key:
        return not key.endswith(("_stderr", "/val_perplexity", "/bits_per_byte"))
    return key.startswith("val_") and key not in COUNTED


def data_name(data: dict[str, Any]) -> str | None:
    """Return the name of a run's data: its folder, or its file or sources of records."""
    sources = ", ".join(source["name"] for source in data.get("sources") or [])
    return data.get("dir") or data.get("path") or sources or None


def is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def summary_table(summaries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a table about runs that fits a screen; "at step" is the step of the best checkpoint."""
    measured = any(one["scores"] for one in summaries)
    return [
        {
            **{key: one[key] for key in ("run", "model", "data")},
            "lr": None if one["lr"] is None else f"{one['lr']:g}",
            "step": one["step"],
            "tokens": one["tokens"] and format_count(one["tokens"]),
            "best val loss": one["val_loss"],
            "at step": one["best_step"],
            **({"scores": ", ".join(f"{k} {v:.4g}" for k, v in one["scores"].items())} if measured else {}),
        }
        for one in summaries
    ]


def write_report(
    run: RunDirectory, header: dict[str, Any], summary: dict[str, Any], more: list[str] | None = None
) -> None:
    """Write report.md: header, summary, plot, and more lines."""
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
    write_atomically(run.folder / "report.md", hide_secrets("\n".join(lines + (more or []))))
