"""The run directory: one writer at a time, metrics with each step exactly once, a plot, a report, and lists of runs."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import yaml

from llmkit import __version__
from llmkit.errors import ENVIRONMENT, LOCKED, UserError

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
FREE_TO_CHANGE = {  # keys that a run may take up again with another value
    "run_dir", "train.max_steps", "train.max_tokens", "train.epochs", "train.early_stopping_patience",
    "train.max_bad_steps", "train.micro_batch_size", "data.workers", "data.cluster",
    "eval", "checkpoint", "log",
}  # fmt: skip


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


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamps_of(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """What tells whether files have changed: their names, sizes and times."""
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(paths)]


def stamps_in(folder: Path) -> list[tuple[str, int, int]]:
    """Of every file in a folder; nothing of what is no folder."""
    return stamps_of(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []


def half_of(path: Path) -> Path:
    """Where a file is written before it is renamed: another place for every process, on any machine."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")


def write_atomically(path: Path, content: str | bytes) -> None:
    """The file has its old or its new content at every moment."""
    half = half_of(path)
    with half.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    half.replace(path)


def lock(folder: Path, taken: str, *, fix: str) -> TextIO:
    """Make a folder and hold it for this process until the returned file is closed; UserError `taken` if one has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"the folder can't be made: {error.strerror}", at=folder, code=ENVIRONMENT) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel drops a dead holder's lock
    except OSError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise UserError(taken, at=folder, got=holder, fix=fix, code=LOCKED) from None
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def open_run(folder: Path, config: dict[str, Any], *, fresh: bool = False, info: dict[str, Any] | None = None) -> Run:
    """Make or take up a run directory and lock it.

    config  the resolved config; a run that was started with another one is refused, but for FREE_TO_CHANGE
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
        "command": without_secrets(" ".join(sys.argv)), "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "llmkit": __version__, "python": platform.python_version(), "host": socket.gethostname(), "git": git_commit(),
        **(info or {}),
    }  # fmt: skip
    return Run(folder, held, config, about)


def refuse_another(folder: Path, config: dict[str, Any]) -> None:
    """Raise where this folder holds a run, with checkpoints, of another config in more than FREE_TO_CHANGE."""
    saved = folder / "config.yaml"
    if not saved.exists() or not (folder / "checkpoints").exists():  # a run that saved nothing binds nobody
        return
    before = flatten(yaml.safe_load(saved.read_text(encoding="utf-8")))
    after = flatten(config)
    differing = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    changed = [key for key in differing if key not in FREE_TO_CHANGE and key.split(".")[0] not in FREE_TO_CHANGE]
    changed.sort(key=lambda key: key not in before or key not in after)  # another value says more than another section
    if changed:
        raise UserError(
            "this run directory holds a run with another config", at=saved,
            got="; ".join(f"{key}: {after.get(key)} (was {before.get(key)})" for key in changed[:5]),
            fix="choose another (-o run_dir=runs/NAME), or delete the old run with --fresh",
        )  # fmt: skip


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


# ---- on screen ------------------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """Text without what a terminal would obey: escape and other control characters, but for tabs and line ends.

    >>> printable("a\\x1b[31mb\\n")
    'a\ufffd[31mb\\n'
    """
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", "\ufffd", text)


def progress_line(record: dict[str, Any], total: int) -> str:
    """One step as a line: step 1200/5000 | loss 2.913 | val 2.88 ppl 17.8 | lr 2.7e-4 | ..."""
    parts = [f"step {record['step']}/{total}"]
    if "loss" in record:
        parts.append(f"loss {record['loss']:.3f}")
    if "val_loss" in record:
        parts.append(f"val {record['val_loss']:.3f} ppl {record['val_perplexity']:.2f}")
    if "lr" in record:
        parts.append(f"lr {record['lr']:.1e}")
        parts.append(f"gnorm {record['grad_norm']:.2f}")
        parts.append(f"{count(record['tokens_per_second'])} tok/s")
        parts.append(f"mfu {record['mfu']:.0%}")
        parts.append(f"mem {record['memory_gb']:.1f}G")
        parts.append(f"ETA {clock(record['eta_seconds'])}")
    return " | ".join(parts)


def count(number: float) -> str:
    """A number as people say it.

    >>> count(412_345), count(7.25e9), count(930)
    ('412k', '7.25B', '930')
    """
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            short = f"{number / size:.3g}"
            return f"{float(short):g}{unit}"
    return f"{number:.0f}"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, or as days or years where there are many.

    >>> clock(3725), clock(3e5), clock(7e9)
    ('1:02:05', '3.47 days', '222 years')
    """
    whole = int(seconds)
    for unit, name, least in ((365.25 * 86400, "years", 1), (86400, "days", 2)):
        if seconds >= least * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


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


def table(rows: list[dict[str, Any]]) -> str:
    """Rows with the same keys as aligned columns."""
    cells = [list(rows[0]), *[[cell(value) for value in row.values()] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


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
