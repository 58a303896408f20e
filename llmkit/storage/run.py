"""The run directory: one writer at a time, metrics with each step exactly once, a plot, a report, and lists of runs."""

from __future__ import annotations

import contextlib
import json
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import yaml

from llmkit import __version__
from llmkit.errors import UserError
from llmkit.files import lock, write_atomically
from llmkit.screen import count

METRICS = "metrics.jsonl"


WRITTEN = (
    "checkpoints",
    "tensorboard",
    METRICS,
    "config.yaml",
    "run.json",
    "loss.png",
    "report.md",
)  # what --fresh deletes


CHANGEABLE_KEYS = {  # keys that a run may take up again with another value
    "run_dir",
    "train.max_steps",
    "train.max_tokens",
    "train.epochs",
    "train.early_stopping_patience",
    "train.max_bad_steps",
    "train.micro_batch_size",
    "data.workers",
    "data.cluster",
    "eval",
    "checkpoint",
    "log",
}


@dataclass
class Run:
    """An open run directory, locked for this process."""

    folder: Path
    lock: TextIO
    config: dict[str, Any]
    about: dict[str, Any]

    def begin(self, step: int | None) -> None:
        """Write down what now trains, once nothing can refuse it any more; forget the metrics after `step`."""
        write_atomically(self.folder / "config.yaml", yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True))
        write_atomically(self.folder / "run.json", json.dumps(self.about, indent=2) + "\n")
        self.forget_after(-1 if step is None else step)

    def append(self, record: dict[str, Any]) -> None:
        """Add one step's events to the metrics."""
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder)

    def forget_after(self, step: int) -> None:
        """Drop the metrics of steps that a resumed run takes again, and a line that was cut off."""
        kept = [record for record in self.metrics() if record["step"] <= step]
        write_atomically(self.folder / METRICS, "".join(json.dumps(record) + "\n" for record in kept))

    def close(self) -> None:
        self.lock.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All whole lines of a run's metrics; the last one may have been cut off by a kill."""
    path = folder / METRICS
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
    return records


def open_run(folder: Path, config: dict[str, Any], *, fresh: bool = False, info: dict[str, Any] | None = None) -> Run:
    """Make or take up a run directory and lock it.

    config  the resolved config; a run that was started with another one is refused, but for CHANGEABLE_KEYS
    fresh   delete what an earlier run left there
    """
    held = lock(
        folder, "another process is training in this run directory", fix="wait for it, or choose another run_dir"
    )
    if fresh:
        for path in (folder / name for name in WRITTEN):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    else:
        try:
            refuse_another(folder, config)
        except UserError:
            held.close()
            raise
    about = {
        "command": without_secrets(" ".join(sys.argv)),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "llmkit": __version__,
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "git": git_commit(),
        **(info or {}),
    }
    return Run(folder, held, config, about)


def refuse_another(folder: Path, config: dict[str, Any]) -> None:
    """Raise where this folder holds a run, with checkpoints, of another config in more than CHANGEABLE_KEYS."""
    saved = folder / "config.yaml"
    if not saved.exists() or not (folder / "checkpoints").exists():  # a run that saved nothing binds nobody
        return
    before = flatten(yaml.safe_load(saved.read_text(encoding="utf-8")))
    after = flatten(config)
    differing = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    changed = [key for key in differing if key not in CHANGEABLE_KEYS and key.split(".")[0] not in CHANGEABLE_KEYS]
    changed.sort(key=lambda key: key not in before or key not in after)  # another value says more than another section
    if changed:
        raise UserError(
            "this run directory holds a run with another config",
            at=saved,
            got="; ".join(f"{key}: {after.get(key)} (was {before.get(key)})" for key in changed[:5]),
            fix="choose another (-o run_dir=runs/NAME), or delete the old run with --fresh",
        )


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, name + ".") if isinstance(value, dict) else {name: value}
    return flat


def without_secrets(text: str) -> str:
    """User and password of an address, and anything that is called a token, struck out.

    >>> without_secrets("-o data.path=https://me:hunter2@host/x hf_token=abc")
    '-o data.path=https://***@host/x hf_token=***'
    """
    text = re.sub(r"//[^/@\s]+@", "//***@", text)
    return re.sub(r"(?i)((?:token|password|secret|api_?key)\s*[=:]\s*)\S+", r"\1***", text)


def git_commit() -> str | None:
    """The commit of the folder one stands in, with + when it has changes; None outside a checkout."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


# ---- lists, plots, reports ------------------------------------------------------------------------------------------


def list_runs(root: Path) -> list[Path]:
    """Run directories under `root`, oldest first: those with a config.yaml, by when they last wrote."""
    found = [path.parent for path in root.glob("*/config.yaml")] if root.is_dir() else []

    def written(folder: Path) -> float:
        path = folder / METRICS
        return (path if path.exists() else folder / "config.yaml").stat().st_mtime

    return sorted(found, key=written)


def summarize(folder: Path) -> dict[str, Any]:
    """One run in a row: where it stands and its best val loss."""
    records = read_metrics(folder)
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
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


def plot_runs(folders: list[Path], out: Path) -> None:
    """Loss over tokens seen, train and val, of one run or several in one picture (PNG)."""
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
    axes.xaxis.set_major_formatter(lambda value, _: count(value))
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    figure.tight_layout()
    half = out.with_name(out.name + ".tmp")
    figure.savefig(half, format="png")
    pyplot.close(figure)
    half.replace(out)


def write_report(run: Run, header: dict[str, Any], summary: dict[str, Any]) -> None:
    """report.md: what the header and the summary said, and the picture."""
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
