"""Read the records that a task asks about, from files or from a data set on the hub."""

import re
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any

from llmkit.errors import DataError
from llmkit.readers.documents import load_dataset_rows
from llmkit.readers.listing import list_files
from llmkit.readers.packed import open_bytes
from llmkit.readers.records import read_formatted
from llmkit.readers.tally import BadRecord
from llmkit.tasks.task import Files, Task

Doc = dict[str, Any]
FORMATS = {  # dataset_path -> what is read of a folder
    "json": ("*.json", "*.jsonl", "*.ndjson", "*.json.*", "*.jsonl.*"),
    "csv": ("*.csv", "*.tsv", "*.csv.*", "*.tsv.*"),
    "parquet": ("*.parquet",),
    "text": ("*.txt",),
}


def read_split(task: Task, split: str, home: Path, data: Path | None) -> list[Doc]:
    """Read the records of a split, each with the stem of its `file` unless it has a field of that name.

    home  folder of the task file, in which relative paths are looked for before the working folder
    data  a file or folder that replaces the task's: a file holds the split that is asked, and a folder the task's files

    Raise DataError for a record that can't be read, and for a split without records.
    """
    if data is None and task.dataset_path not in FORMATS and not Path(task.dataset_path).exists():
        rows = load_dataset_rows(task.dataset_path, task.dataset_name, split, False, False, "", None)
        docs = [row for _, row, _ in rows]
    else:
        files = find_files(task, split, home, data)
        docs = [doc for file in files for doc in read_file(file, task, split)]
        if labels := task.dataset_kwargs.labels:
            docs = add_labels(docs, resolve(labels, home, data), labels)
    if task.process_docs is not None:
        docs = process(task, docs)
    if not docs:
        raise DataError(f"{task.task}: there is no record in the split {split}", at=data or task.dataset_path)
    # As Arrow has it, a field that is not there is null. Templates know "Best Answer" as Best_Answer.
    fields = dict.fromkeys(name for doc in docs for name in doc)
    aliases = {re.sub(r"^(?=\d)|\W", "_", name): name for name in fields if not name.isidentifier()}
    fields = {name: name for name in fields} | {alias: name for alias, name in aliases.items() if alias not in fields}
    return [{name: doc.get(source) for name, source in fields.items()} for doc in docs]


def process(task: Task, docs: list[Doc]) -> list[Doc]:
    """Return the records as the task's own code prepares them. It expects a data set of the `datasets` library."""
    import datasets

    try:
        return list(task.process_docs(datasets.Dataset.from_list(docs)))
    except Exception as error:
        raise DataError(f"{task.task}: process_docs fails: {type(error).__name__}: {error}") from error


def find_files(task: Task, split: str, home: Path, data: Path | None) -> list[Path]:
    """Find the files of a split."""
    named = task.dataset_kwargs.data_files
    if data is not None and not data.exists():
        raise DataError("no such file or folder", at=data)
    if data is not None and data.is_file():
        if split != task.asked_split:
            fix = f"name a folder that has the files of {named or 'both splits'}"
            raise DataError(
                f"{task.task}: the examples are in the split {split}, and this is one file", at=data, fix=fix
            )
        return [data]
    if named is None and Path(task.dataset_path).exists() and data is None:
        return list_files(task.dataset_path)
    if named is None:
        fix = f"--data {task.task}=PATH"
        if data is None:
            raise DataError(f"{task.task}: it is not said where the questions are", fix=fix)
        return list_files(str(data), FORMATS.get(task.dataset_path, ()))
    patterns = named.get(split) if isinstance(named, dict) else named
    if patterns is None:
        raise DataError(f"{task.task}: there are no files of the split {split}", got=", ".join(named))
    patterns = [patterns] if isinstance(patterns, str) else patterns
    files = [file for pattern in patterns for file in resolve(pattern, home, data)]
    if not files:
        raise DataError(
            f"{task.task}: there is no file for the split {split}",
            at=data or Path.cwd(),
            expected=" or ".join(patterns),
            fix=f"--data {task.task}=FOLDER with such files" + (", or =FILE" if split == task.asked_split else ""),
        )
    return files


def resolve(pattern: str, home: Path, data: Path | None) -> list[Path]:
    """Return the files of a path or glob: in the user's folder, else beside the task file, else from here."""
    roots = [home, Path()] if data is None else [data if data.is_dir() else data.parent]
    for root in roots:
        whole = root / Path(pattern).expanduser()  # which is the pattern itself if that is absolute
        paths = sorted(map(Path, glob(str(whole), recursive=True)))  # noqa: PTH207 Path.glob takes no absolute pattern
        if found := [file for path in paths for file in (list_files(str(path)) if path.is_dir() else [path])]:
            return found
    return []


def read_file(file: Path, task: Task, split: str) -> Iterator[Doc]:
    """Yield the records of a file. Raise DataError at the first one that can't be read."""
    options: Files = task.dataset_kwargs
    if task.dataset_path == "text":
        with open_bytes(file) as lines:
            name = file.name.partition(".")[0]
            yield from ({"file": name, "text": line.decode("utf-8", "replace").rstrip("\r\n")} for line in lines)
        return
    for _, record, _ in read_formatted(file, options):
        if isinstance(record, BadRecord):
            raise DataError(f"{task.task}: a record can't be read", at=record.place, got=record.reason)
        yield {"file": file.name.partition(".")[0]} | record


def add_labels(docs: list[Doc], files: list[Path], pattern: str) -> list[Doc]:
    """Return the records with a field `label` from the lines of a file."""
    if len(files) != 1:
        raise DataError("there is no file of labels, or more than one", got=len(files), expected=pattern)
    [file] = files
    labels = file.read_text(encoding="utf-8", errors="replace").split("\n")
    labels = labels[:-1] if labels and not labels[-1] else labels
    if len(labels) != len(docs):
        what = "the file of labels has another length than the records"
        raise DataError(what, at=file, got=f"{len(labels)} lines", expected=len(docs))
    return [
        doc | {"label": int(label) if label.strip().isdigit() else label}
        for doc, label in zip(docs, labels, strict=True)
    ]
