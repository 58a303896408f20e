"""List runs, and write their reports."""

import time
from pathlib import Path
from typing import Any

from llmkit.files import write_atomically
from llmkit.storage.run import CONFIG, METRICS, RunDirectory, read_metrics, read_run_config


def list_runs(root: Path) -> list[Path]:
    """Return the run directories under `root`, sorted by their last write, oldest first."""

    def last_write(folder: Path) -> float:
        path = folder / METRICS
        return (path if path.exists() else folder / CONFIG).stat().st_mtime

    return sorted((path.parent for path in root.glob(f"*/{CONFIG}")), key=last_write)


def summarize(folder: Path) -> dict[str, Any]:
    """Return a table row about a run: its last step and its best val loss."""
    records = read_metrics(folder)
    config = read_run_config(folder)
    losses = [record for record in records if "loss" in record]
    evaluated = [record for record in records if "val_loss" in record]
    best = min(evaluated, key=lambda record: record["val_loss"], default={})
    model = (config.get("model") or {}).get("name") or config.get("init_from")
    return {
        "run": str(folder),
        "model": f"{model} + {config['peft']['name']}" if config.get("peft") else model,
        "step": records[-1]["step"] if records else 0,
        "tokens": records[-1].get("tokens") if records else 0,
        "loss": losses[-1]["loss"] if losses else None,
        "val_loss": best.get("val_loss"),
        "val_perplexity": best.get("val_perplexity"),
        "bits_per_byte": best.get("bits_per_byte"),
        "best_step": best.get("step"),
    }


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
    write_atomically(run.folder / "report.md", "\n".join(lines))
