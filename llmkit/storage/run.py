"""Manage a run directory: one writer at a time, and each step exactly once in the metrics."""

import json
import math
import platform
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from pydantic import TypeAdapter

from llmkit import __version__
from llmkit.config.load import load_config
from llmkit.config.yaml import dump_yaml
from llmkit.errors import MachineError, ModelError, UserError
from llmkit.files import delete, delete_leftovers, lock, write_atomically
from llmkit.screen import hide_secrets
from llmkit.storage.manifest import MANIFEST, dependent_runs, list_checkpoints, warn

CONFIG, ABOUT, METRICS = "config.yaml", "run.json", "metrics.jsonl"
OUTPUTS = ("checkpoints", "answers", "tensorboard", METRICS, "loss.png", "report.md")  # --fresh deletes them
# Keys and sections whose values may change when a run is resumed.
CHANGEABLE_KEYS = set(
    "run_dir data.workers data.cluster eval checkpoint log train.max_steps train.max_tokens train.epochs"
    " train.early_stopping_patience train.max_bad_steps train.micro_batch_size train.gradient_checkpointing".split()
)
LARGEST = 1e300  # of these numbers; JSON may hold longer ones than a float
NUMBERS = ("step", "tokens", "loss", "val_loss", "tokens_per_second", "memory_gb")  # keys of a record that are numbers
RECORD = TypeAdapter(dict[str, int | float | str | None])  # of the metrics
SHOWN_FACTS = ("device", "ranks", "torch", "llmkit")  # of run.json: a change may change the last digits


@dataclass
class RunDirectory:
    """An open run directory, locked for this process.

    fresh    delete the outputs of an earlier run
    changes  what differs from the run that is resumed, as "key: old -> new"
    """

    folder: Path
    lock: TextIO
    config: dict[str, Any]
    about: dict[str, Any]
    fresh: bool
    changes: list[str]

    def begin(self, step: int | None) -> None:
        """Write the config and run.json, and drop the metrics after `step`, or all if it is None.

        A resumed run logs those steps again. Call it after the last check that can refuse the run.
        """
        if self.fresh:
            for path in (self.folder / name for name in OUTPUTS):
                if path.exists():  # renamed first: a kill while it is deleted leaves no half of it under its name
                    delete(path.rename(path.with_name(f"{path.name}.old.tmp")))
        delete_leftovers(self.folder)
        for half_deleted in self.folder.glob("*.old.tmp"):
            delete(half_deleted)
        self.write_config()
        self.write_about()
        kept = [record for record in self.metrics() if step is not None and record["step"] <= step]
        self.write_metrics(kept)

    def write_about(self, **facts: int) -> None:
        """Write run.json, with further facts of the run."""
        self.about |= facts
        write_atomically(self.folder / ABOUT, json.dumps(self.about, indent=2) + "\n")

    def write_config(self) -> None:
        """Write the resolved config, if it has changed."""
        if not is_same_config(self.folder, self.config):
            write_atomically(self.folder / CONFIG, dump_yaml(self.config))

    def write_metrics(self, records: list[dict[str, Any]]) -> None:
        write_atomically(self.folder / METRICS, "".join(map(metrics_line, records)))

    def complete(self, record: dict[str, Any]) -> None:
        """Add what was measured after all to the metrics of the last step."""
        *others, last = self.metrics()
        self.write_metrics([*others, last | record])

    def append(self, record: dict[str, Any]) -> None:
        """Append the events of one step to the metrics."""
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(metrics_line(record))

    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder)

    def close(self) -> None:
        self.lock.close()


def metrics_line(record: dict[str, Any]) -> str:
    """Return a record as a line of JSON, which has no NaN: null stands for a number that is not finite."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


# ---- read ------------------------------------------------------------------------------------------------------------


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run directory, and not a model's folder."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def read_run_config(folder: Path) -> dict[str, Any]:
    """Return the resolved config of a run; raise a ModelError if its file is damaged."""
    try:
        return load_config(folder / CONFIG).model_dump()
    except UserError as error:
        what, fix = f"the run's config is damaged: {error.what}", "restore the file, or delete the run"
        raise ModelError(what, at=error.at, got=error.got, expected=error.expected, fix=fix) from None


def read_about(folder: Path) -> dict[str, Any]:
    """Return a run's run.json; raise a ModelError if it is damaged."""
    try:
        about = json.loads((folder / ABOUT).read_bytes())
        return TypeAdapter(dict[str, str | int | None]).validate_python(about, strict=True)
    except (OSError, ValueError, RecursionError) as error:  # pydantic's errors are ValueErrors
        fix = "resume the run, which writes it again"
        reason = str(error).partition("\n")[0]
        raise ModelError(f"the run's {ABOUT} can't be read: {reason}", at=folder / ABOUT, fix=fix) from None


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return all complete records of a run's metrics; warn about lines that are no records.

    The last line may be incomplete, because a kill cut it off. None is a number that was not finite.
    """
    path, records, damaged = folder / METRICS, [], []
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                record = RECORD.validate_python(json.loads(line), strict=True)
                numbers = [record.get(key, 0) for key in NUMBERS]
                fit = all(one is None or (isinstance(one, int | float) and not abs(one) > LARGEST) for one in numbers)
                if not fit or not isinstance(record.get("step"), int):
                    raise ValueError("no record of a step")
                records.append(record)
        except (ValueError, RecursionError):
            damaged += [number] if number < len(lines) else []
    if damaged:
        what = f"{len(damaged)} of the lines are damaged, the first is line {damaged[0]}"
        warn(ModelError(what, at=path))
    return records


# ---- open ------------------------------------------------------------------------------------------------------------


def is_own(folder: Path) -> bool:
    """Return whether `claim` has made a folder: its run.json says so, or holds a checkpoint if that is damaged."""
    try:
        return "llmkit" in read_about(folder)
    except ModelError:
        return (folder / ABOUT).is_file() and any((path / MANIFEST).is_file() for path in list_checkpoints(folder))


def check_own(folder: Path) -> None:
    """Raise a UserError if a folder holds files and is no run directory: llmkit never writes between a user's files."""
    if not folder.exists() or is_own(folder):
        return
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else ["a file"]
    if found:
        fix = "choose a new or empty folder (-o run_dir=runs/NAME)"
        raise UserError("run_dir holds files that are no run's", at=folder, got=", ".join(found[:6]), fix=fix)


def claim(folder: Path) -> None:
    """Create a run directory, if it is none yet, and mark it as one; raise a UserError as `check_own` does."""
    check_own(folder)
    if not is_own(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / ABOUT, json.dumps({"llmkit": __version__}) + "\n")
        except OSError as error:
            raise MachineError(f"the run directory can't be created: {error.strerror}", at=folder) from None


def check_can_open(folder: Path, config: dict[str, Any], config_file: Path, *, fresh: bool = False) -> None:
    """Raise a UserError if a run with this resolved config may not write into a run directory.

    config_file  the file that the config was read from: it is never changed
    """
    check_own(folder)
    if fresh:
        needed = {name: path for path in list_checkpoints(folder) for name in dependent_runs(path)}
        if needed:
            got = ", ".join(f"{path.name} by {name}" for name, path in needed.items())
            fix = "choose another run_dir, or delete those runs first"
            raise UserError("--fresh would delete checkpoints that other runs start from", at=folder, got=got, fix=fix)
    else:
        check_same_config(folder, config)
    own = folder / CONFIG
    if own.exists() and config_file.exists() and own.samefile(config_file) and not is_same_config(folder, config):
        what = "the config is the run's own record, which this command would change"
        fix = f"copy it to another file, and run llmkit pretrain with that: cp {own} new.yaml"
        raise UserError(what, at=own, fix=fix)


def open_run(
    folder: Path,
    config: dict[str, Any],
    config_file: Path = Path("the command line"),
    *,
    fresh: bool = False,
    info: dict[str, Any] | None = None,
) -> RunDirectory:
    """Create or reopen a run directory, and lock it; raise a UserError as `check_can_open` does.

    config  the resolved config
    fresh   let `begin` delete the outputs of an earlier run
    info    further entries of run.json
    """
    claim(folder)
    what = "another process is training in this run directory"
    held = lock(folder, what, fix="wait for it, or choose another run_dir")
    try:
        check_can_open(folder, config, config_file, fresh=fresh)
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
    return RunDirectory(folder, held, config, about, fresh, list_changes(folder, config, about))


def list_changes(folder: Path, config: dict[str, Any], about: dict[str, Any]) -> list[str]:
    """Return the changed keys of the config and facts of run.json since a run was last started."""
    if not list_checkpoints(folder) or not (folder / CONFIG).is_file():
        return []
    before, after = flatten(read_run_config(folder)), flatten(config)
    with suppress(ModelError):  # a damaged run.json is about to be replaced
        old = read_about(folder)
        before |= {key: old.get(key, about.get(key)) for key in SHOWN_FACTS}
        after |= {key: about.get(key) for key in SHOWN_FACTS}
    keys = [key for key in after if before.get(key) != after[key] and key != "run_dir"]
    return [f"{key}: {before.get(key)} -> {after[key]}" for key in keys]


def is_same_config(folder: Path, config: dict[str, Any]) -> bool:
    """Return whether a run's config.yaml says the same as a resolved config, wherever the run directory lies."""
    try:
        return read_run_config(folder) | {"run_dir": config["run_dir"]} == config
    except ModelError:
        return False


def check_same_config(folder: Path, config: dict[str, Any]) -> None:
    """Raise a UserError if the run has checkpoints and its config differs in other keys than CHANGEABLE_KEYS."""
    if not (folder / CONFIG).exists() or not list_checkpoints(folder):  # no checkpoint to protect
        return
    before, after = flatten(read_run_config(folder)), flatten(config)
    differing = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    changed = [key for key in differing if not {key, key.split(".")[0]} & CHANGEABLE_KEYS]
    changed.sort(key=lambda key: key not in before or key not in after)  # changed values before new and removed keys
    if changed:
        got = "; ".join(f"{key}: {after.get(key)} (was {before.get(key)})" for key in changed[:5])
        fix = "choose another (-o run_dir=runs/NAME), or delete the old run with --fresh"
        raise UserError("this run directory holds a run with another config", at=folder / CONFIG, got=got, fix=fix)


def without_secrets(value: Any) -> Any:
    """Return a resolved config as it may be stored: without the passwords and tokens of its URLs."""
    if isinstance(value, dict):
        return {key: without_secrets(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_secrets(one) for one in value]
    return hide_secrets(value) if isinstance(value, str) and "://" in value else value


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
