"""Give labels numbers, and refuse what is no label."""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmkit.config.records import LabelledData, RecordSource
from llmkit.errors import DataError
from llmkit.records.label_layouts import LABELS, TAGS

MOST_ABSENT = 0.05  # of the labels -1, to mean that there is none
MOST_CLASSES = 1000  # over which a label that most records do not share is no label


class Labels:
    """Give labels numbers: in the order in which they come, or those of data.labels alone.

    multi_label  whether a text has any number of labels; None: as the first one has it
    """

    def __init__(self, task: str, names: list[str] | None, multi_label: bool | None):
        self.task, self.is_open, self.multi_label = task, names is None, multi_label if task == "classify" else False
        self.numbers = {name: i for i, name in enumerate(names or [])}

    def encode(self, label: Any) -> Any:
        """Return a label of `parse_label` as a number, several labels or tags as a list of numbers."""
        if self.task == "regress":
            return label
        if self.multi_label is None:
            self.multi_label = isinstance(label, list)
        if self.multi_label or self.task == "tag":
            return [self.number_of(one) for one in (label if isinstance(label, list) else [label])]
        if isinstance(label, list):
            raise ValueError("several labels, where the first record has one: data.multi_label")
        return self.number_of(label)

    def number_of(self, name: str) -> int:
        """Return the number of a label. Raise ValueError if it is not one of data.labels, nor the number of one."""
        if self.is_open:
            return self.numbers.setdefault(name, len(self.numbers))
        if name in self.numbers:
            return self.numbers[name]
        if name.isdecimal() and int(name) < len(self.numbers) and not any(map(str.isdecimal, self.numbers)):
            return int(name)
        known = ", ".join(list(self.numbers)[:10])
        raise ValueError(f"there is no such label: {name[:40]}, but {known}")

    def absent(self, labels: list, most: float) -> int | None:
        """Return the number of the label -1, which means "no label" in many data sets: where data.labels does not name
        it, the others count from 0, and it is at most this share of the labels.
        """
        number = self.numbers.get("-1") if self.is_open and self.task == "classify" and not self.multi_label else None
        others = all(name.isdecimal() for name in self.numbers if name != "-1")
        if number is None or not others or labels.count(number) > most * len(labels):
            return None
        return number

    def forget(self, name: str) -> None:
        """Take a label out, so that those after it have a number less."""
        number = self.numbers.pop(name)
        self.numbers = {one: i - (i > number) for one, i in self.numbers.items()}

    def in_order(self) -> tuple[list[str], np.ndarray]:
        """Return the names, sorted unless data.labels gives an order, and the new number of each old one."""
        names = list(self.numbers)
        if self.is_open:
            whole = all(re.fullmatch(r"[+-]?\d{1,18}", name) for name in names)
            names.sort(key=int if whole else str)
        places = {name: i for i, name in enumerate(names)}
        return names, np.array([places[name] for name in self.numbers], np.int64)

    def as_array(self, labels: list) -> np.ndarray:
        """Return the labels of all examples: float32 (N,) numbers, int64 (N,), or int8 (N, L) of 0 and 1."""
        if self.task == "regress":
            return np.array(labels, np.float32)
        _, places = self.in_order()
        if not self.multi_label:
            return places[np.array(labels, np.int64)]
        array = np.zeros((len(labels), len(places)), np.int8)
        for row, numbers in zip(array, labels, strict=True):
            row[places[np.array(numbers, np.int64)]] = 1
        return array


def count_labels(task: str, names: list[str], labels: np.ndarray) -> dict[str, float]:
    """Return how often each label is there; of numbers the least, the mean and the largest."""
    if task == "regress":
        return {"least": float(labels.min()), "mean": float(labels.mean()), "largest": float(labels.max())}
    counts = labels.sum(0) if labels.ndim > 1 else np.bincount(labels[labels >= 0], minlength=len(names))
    return dict(zip(names, counts.tolist(), strict=True))


def check_labels(
    data: LabelledData, task: str, multi_label: bool | None, counts: dict[str, float], examples: int
) -> None:
    """Raise DataError for labels from which nothing can be learnt, or which are no labels."""
    names = list(counts)
    if task == "regress":
        return
    if len(names) < (1 if multi_label else 2):
        raise DataError("all records have the same label", at=data.path, got=", ".join(names)[:100] or "no label")
    if task == "classify" and len(names) > MOST_CLASSES and len(names) > examples / 2:
        what, fix = "most records have a label of their own", "name the field: data.columns: {text: ..., label: ...}"
        raise DataError(what, at=data.path, got=f"{len(names):,} labels, {names[0][:40]!r} first", fix=fix)
    if multi_label and data.labels is None and set(names) == {"0", "1"}:
        what, fix = "the labels are lists of 0 and 1", "name what they stand for: data.labels: [sport, news, ...]"
        raise DataError(what, at=data.path, fix=fix)
    numbers = [name for name in names if re.fullmatch(r"-?\d+\.\d+", name)]
    if task == "classify" and len(numbers) > len(names) / 2 and data.labels is None:
        fix = "objective: {name: regress} predicts numbers; data.labels says that these are classes"
        raise DataError("the labels are numbers", at=data.path, got=", ".join(numbers[:5]), fix=fix)


def stored_names(source: RecordSource, files: list[Path] | None, data: LabelledData, task: str) -> list[str] | None:
    """Return the names of the labels that a data set of the `datasets` library stores beside the numbers, in Parquet
    files or in a saved folder; None if there are none.
    """
    found: Any = None
    with suppress(OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        if files and files[0].suffix == ".parquet":
            metadata = pq.read_schema(files[0]).metadata or {}
            found = json.loads(metadata[b"huggingface"])["info"]["features"]
        elif not files:
            folder = Path(source.path).expanduser()
            info = next(path for path in (folder, folder / source.split) if (path / "dataset_info.json").is_file())
            found = json.loads((info / "dataset_info.json").read_text(encoding="utf-8"))["features"]
    if not isinstance(found, dict):
        return None
    ours, usual = ("tags", TAGS) if task == "tag" else ("label", LABELS)
    wanted = [data.columns[ours]] if ours in data.columns else usual
    field = next((found[name] for name in wanted if isinstance(found.get(name), dict)), {})
    field = field if "names" in field else field.get("feature", {})
    names = field.get("names") if isinstance(field, dict) else None
    return names if isinstance(names, list) and len(names) > 1 and all(isinstance(one, str) for one in names) else None
