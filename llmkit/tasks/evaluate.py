"""Ask one or several models the questions of some tasks."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llmkit import __version__
from llmkit.config.defaults import TASKS
from llmkit.errors import UserError, did_you_mean
from llmkit.files import file_sha256
from llmkit.parallel.device import autocast, choose_precision, device_name
from llmkit.parallel.world import start_world
from llmkit.peft.adapter import WEIGHTS as ADAPTER_WEIGHTS
from llmkit.storage.locate import Located, choose_dtype, load_located, weights_sha256
from llmkit.tasks.harness import HarnessTask, harness_task
from llmkit.tasks.questions import not_searched
from llmkit.tasks.run import Prepared, Result, prepare
from llmkit.tasks.task import find_task


@dataclass
class Evaluated:
    """Hold a model's results."""

    name: str
    results: list[Result]
    about: dict[str, Any]


def prepare_tasks(
    names: Sequence[str], data: dict[str, Path], *, allow_code: bool = False, **options: Any
) -> list[Prepared | HarnessTask]:
    """Read tasks by their names or files; see `prepare`.

    data  name of a task -> file or folder of its records
    """
    files = {name: find_task(name, TASKS) for name in names}
    stems = {name: Path(name).stem for name in names}
    if unused := set(data) - {*stems, *stems.values()}:
        raise UserError("--data names a task that is not asked", got=", ".join(unused), expected=", ".join(names))
    found: list[Prepared | HarnessTask] = []
    for name, file in files.items():
        own = data.get(name, data.get(stems[name]))
        if file is not None:
            found.append(prepare(file, data=own, allow_code=allow_code, **options))
            continue
        known = sorted(path.stem for path in TASKS.glob("*.yaml"))
        if own is not None or options["metrics"]:
            what = f"{name} is no task file, and tasks of lm-evaluation-harness have their own data and metrics"
            raise UserError(what, fix=did_you_mean(name, known))
        how = {key: value for key, value in options.items() if key != "metrics"}
        found.append(harness_task(name, known, **how))
    return found


def evaluate_models(
    models: Sequence[Located],
    tasks: Sequence[Prepared | HarnessTask],
    *,
    precision: str = "auto",
    say: Callable[[str], None] = lambda line: None,
) -> list[Evaluated]:
    """Ask each model all tasks, one model after the other in memory."""
    device = start_world().device
    precision = choose_precision(precision, device)
    names, found = unique_names(models), []
    files = {task.name: task.about["data_sha256"] for task in tasks if isinstance(task, Prepared)}
    for name, located in zip(names, models, strict=True):
        for line in not_searched(located, files):
            say(line)
        dtype = choose_dtype(located, precision)
        model, tokenizer = load_located(located, device=device, dtype=dtype)
        results = []
        with autocast(device, precision):
            for task in tasks:
                label = task.name if len(models) == 1 else f"{name}, {task.name}"
                result = task.run(model, tokenizer, lambda passes, label=label: show(passes, label))
                for reason, number in result.lost.items():
                    say(f"{label}: {number} {reason}")
                results.append(result)
        adapter = located.folder / ADAPTER_WEIGHTS
        about = {
            "model": str(located.folder),
            "model_sha256": file_sha256(adapter) if located.is_adapter else weights_sha256(located.folder),
            **({"base_sha256": weights_sha256(located.base)} if located.is_adapter else {}),
            "tokenizer_sha256": tokenizer.sha256,
            "precision": precision,
            "device": device_name(device),
            "llmkit": __version__,
            "torch": torch.__version__,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        found.append(Evaluated(name, results, about))
    return found


def show(passes: Iterable, label: str) -> Iterable:
    """Show how many passes are done, on a terminal."""
    return tqdm(passes, desc=label, unit="pass", disable=None, leave=False)


def unique_names(models: Sequence[Located]) -> list[str]:
    """Return short names of models, or their folders if two have the same."""
    names = [(one.run_dir or one.folder).name for one in models]
    return names if len(set(names)) == len(names) else [str(one.folder) for one in models]
