"""Manage a run directory: one writer at a time, and each step exactly once in the metrics."""

import contextlib
import json
import platform
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import yaml

from llmkit import __version__
from llmkit.errors import UserError
from llmkit.files import lock, write_atomically
from llmkit.screen import hide_secrets

CONFIG, ABOUT, METRICS = "config.yaml", "run.json", "metrics.jsonl"
OUTPUTS = ("checkpoints", "tensorboard", METRICS, CONFIG, ABOUT, "loss.png", "report.md")  # --fresh deletes them
# Keys and sections whose values may change when a run is resumed.
CHANGEABLE_KEYS = set(
    "run_dir data.workers data.cluster eval checkpoint log train.max_steps train.max_tokens train.epochs"
    " train.early_stopping_patience train.max_bad_steps train.micro_batch_size".split()
)


@dataclass
class RunDirectory:
    """An open run directory, locked for this process."""

    folder: Path
    lock: TextIO
    config: dict[str, Any]
    about: dict[str, Any]

    def begin(self, step: int | None) -> None:
        """Write the config and run.json, and drop the metrics after `step`, or all if it is None.

        A resumed run logs those steps again. Call it after the last check that can refuse the run.
        """
        write_atomically(self.folder / CONFIG, yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True))
        write_atomically(self.folder / ABOUT, json.dumps(self.about, indent=2) + "\n")
        kept = [record for record in self.metrics() if step is not None and record["step"] <= step]
        write_atomically(self.folder / METRICS, "".join(json.dumps(record) + "\n" for record in kept))

    def append(self, record: dict[str, Any]) -> None:
        """Append the events of one step to the metrics."""
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder)

    def close(self) -> None:
        self.lock.close()


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run directory, and not a model's folder."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def read_run_config(folder: Path) -> dict[str, Any]:
    """Return the resolved config of a run; raise a UserError if its file is damaged."""
    try:
        config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"the run's config can't be read: {reason}", at=folder / CONFIG) from None
    if not isinstance(config, dict):
        raise UserError("the run's config is not a mapping", at=folder / CONFIG, fix="restore it, or delete the run")
    return config


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return all complete records of a run's metrics; a kill may have cut off the last line."""
    path, records = folder / METRICS, []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
    return records


def open_run(
    folder: Path, config: dict[str, Any], *, fresh: bool = False, info: dict[str, Any] | None = None
) -> RunDirectory:
    """Create or reopen a run directory, and lock it; raise a UserError if its config differs, see `check_same_config`.

    config  the resolved config
    fresh   delete the outputs of an earlier run
    """
    config = json.loads(hide_secrets(json.dumps(config)))  # as it is stored, and compared with what is stored
    what = "another process is training in this run directory"
    held = lock(folder, what, fix="wait for it, or choose another run_dir")
    if fresh:
        for path in (folder / name for name in OUTPUTS):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    else:
        try:
            check_same_config(folder, config)
        except UserError:
            held.close()
            raise
    about = {
        "command": hide_secrets(" ".join(sys.argv)),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "llmkit": __version__,
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "git": git_commit(),
        **(info or {}),
    }
    return RunDirectory(folder, held, config, about)


def check_same_config(folder: Path, config: dict[str, Any]) -> None:
    """Raise a UserError if the run has checkpoints and its config differs in other keys than CHANGEABLE_KEYS."""
    if not (folder / CONFIG).exists() or not (folder / "checkpoints").exists():  # no checkpoint to protect
        return
    before, after = flatten(read_run_config(folder)), flatten(config)
    differing = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    changed = [key for key in differing if not {key, key.split(".")[0]} & CHANGEABLE_KEYS]
    changed.sort(key=lambda key: key not in before or key not in after)  # changed values before new and removed keys
    if changed:
        got = "; ".join(f"{key}: {after.get(key)} (was {before.get(key)})" for key in changed[:5])
        fix = "choose another (-o run_dir=runs/NAME), or delete the old run with --fresh"
        raise UserError("this run directory holds a run with another config", at=folder / CONFIG, got=got, fix=fix)


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested sections by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, name + ".") if isinstance(value, dict) else {name: value}
    return flat


def git_commit() -> str | None:
    """Return the commit of the working directory, with + if it has changes; None outside a repository."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
