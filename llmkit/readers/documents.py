"""Files, folders, globs and Hugging Face datasets to documents, as a stream."""

from __future__ import annotations

import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from llmkit.errors import DataError, UserError, did_you_mean
from llmkit.readers.records import (
    BROKEN,
    DOCUMENT_FORMATS,
    MAX_DOCUMENT_BYTES,
    READERS,
    BadRecord,
    Record,
    Span,
    read_records,
    read_text,
    read_warc,
    suffix_of,
)
from llmkit.types import Document

# ---- which files ----------------------------------------------------------------------------------------------------


def list_files(
    path: str, include: Sequence[str] = (), exclude: Sequence[str] = (), others: Counter[str] | None = None
) -> list[Path]:
    """The readable files behind a file, a folder or a glob, sorted; never hidden, empty or irregular ones.

    include, exclude  globs over the path below the folder, or over the bare name; `*` crosses folders
    others            counts the wanted files of no known suffix

    A zip counts as a folder: it is listed as one file, and the globs pick among what is inside it.
    """
    start, root = Path(path).expanduser(), root_of(path)
    if not start.is_dir() and (start.exists() or start.is_symlink()):
        check_file(start)
    elif not root.is_dir():
        raise DataError("no such file or folder", at=path)
    pattern = start.relative_to(root).as_posix() if start != root else "**"
    named = [start] if start.is_file() else root.glob(f"{pattern}/*" if pattern.endswith("**") else pattern)
    if not pattern.endswith("**") and not pattern.endswith("**/*"):  # a folder that a glob names is what is in it
        named = {file for match in named for file in (match.rglob("*") if is_folder(match) else [match])}
    found, files = [file for file in named if file.is_file()], []
    for file in found:
        inside, kind = file.relative_to(root), suffix_of(file)
        wanted = is_wanted(inside, () if kind == ".zip" else include, exclude, hidden=file == start)
        if wanted and (kind in READERS or kind == ".zip") and file.stat().st_size:
            files.append(file)
        elif wanted and others is not None and kind not in READERS:
            others[kind or "no suffix"] += 1
    if not files:
        seen = Counter(suffix_of(file) or "no suffix" for file in found).most_common(8)
        globs = "".join(f", {word} {list(given)}" for word, given in [("in", include), ("not in", exclude)] if given)
        raise DataError(
            "no file to read",
            at=path,
            got=", ".join(f"{n} {suffix}" for suffix, n in seen) or "no files at all",
            expected=f"files of a known suffix, neither empty nor hidden{globs}",
        )
    return sorted(files, key=Path.as_posix)


def root_of(path: str) -> Path:
    """What documents' ids are relative to: the folder itself, a file's folder, a glob's fixed part.

    >>> root_of("corpora/docs/**/*.html").as_posix()
    'corpora/docs'
    """
    start = Path(path).expanduser()
    if start.exists() or start.is_symlink():
        return start if start.is_dir() else start.parent
    magic = [i for i, part in enumerate(start.parts) if re.search(r"[*?[]", part)]
    return Path(*start.parts[: magic[0]]) if magic else start


def is_folder(path: Path) -> bool:
    """Whether it is one and no link to one, which could lead around in circles."""
    return path.is_dir() and not path.is_symlink()


def check_file(path: Path) -> None:
    """Refuse a file, named by the user, that can't give a document."""
    problem, got, fix = None, None, None
    if not path.exists():
        problem = "the link leads nowhere" if path.is_symlink() else "no such file"
    elif not path.is_file():
        problem = "this is not a regular file"
    elif not path.stat().st_size:
        problem = "the file is empty"
    elif (got := suffix_of(path)) not in (*READERS, ".zip"):
        problem, fix = "no reader for files of this kind", did_you_mean(got, READERS)
    if problem:
        raise DataError(problem, at=path, got=got, fix=fix)


def is_wanted(inside: Path, include: Sequence[str], exclude: Sequence[str], hidden: bool = False) -> bool:
    """Whether the globs let a path below the folder through; hidden folders and files only if `hidden`."""
    shown = not any(part.startswith(".") or part in ("__pycache__", "node_modules") for part in inside.parts)
    return (shown or hidden) and (not include or matches(inside, include)) and not matches(inside, exclude)


def matches(inside: Path, patterns: Sequence[str]) -> bool:
    """Whether a glob fits; with the slash in front `**/x` also finds an x at the top."""
    names = (inside.as_posix(), f"/{inside.as_posix()}", inside.name)
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


# ---- documents ------------------------------------------------------------------------------------------------------


def read_file(
    path: Path,
    *,
    source: str,
    root: Path,
    text_key: str = "text",
    span: Span | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Iterator[Document | BadRecord]:
    """The documents of one file, with ids "SOURCE/PATH BELOW ROOT[:line or row]"; memory does not grow with the file.

    span              a piece of the file (see `spans_of`); the lines in the ids count from the byte after the @
    include, exclude  globs for what is inside a zip

    meta carries what our readers say: "format" (text, html, code) and "encoding" of files that are one document and
    of web pages, the "url" of these. Raises UserError when the first record lacks the text column.
    """
    inside = os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "replace")  # names may be any bytes
    prefix = f"{source}/{inside}"
    if suffix_of(path) == ".zip":
        yield from read_zip(path, prefix, source, text_key, include, exclude)
        return
    if span and span[0] and suffix_of(path) != ".parquet":
        prefix += f"@{span[0]}"
    yield from read_members(path, prefix, source, text_key, span)


def read_members(
    path: Path, prefix: str, source: str, text_key: str, span: Span | None = None
) -> Iterator[Document | BadRecord]:
    """The documents of a file on disk or in a zip."""
    sure = span is None or span[0] == 0  # the first record of a later piece may just be a bad one
    yield from to_documents(
        read_records(path, span), source, prefix, str(path), text_key, READERS.get(suffix_of(path), read_text), sure
    )


def read_zip(
    path: Path, prefix: str, source: str, text_key: str, include: Sequence[str], exclude: Sequence[str]
) -> Iterator[Document | BadRecord]:
    """The documents of the files in a zip, in the order of their names. Nothing is unpacked to disk."""
    read = set()
    try:
        with zipfile.ZipFile(path) as archive:
            for info in sorted(archive.infolist(), key=lambda info: info.filename):
                inside = Path(info.filename)
                if not info.file_size or suffix_of(inside) not in READERS or not is_wanted(inside, include, exclude):
                    continue
                if info.filename in read:
                    yield BadRecord(f"{path}/{info.filename}", 1, None, "two files of this name in the zip")
                    continue
                read.add(info.filename)
                member = zipfile.Path(archive, info.filename)
                yield from read_members(member, f"{prefix}/{inside.as_posix()}", source, text_key)
    except (*BROKEN, UnicodeDecodeError) as error:
        yield BadRecord(str(path), 1, None, f"the zip is broken: {error}")
    else:
        if not (read or include or exclude):
            yield BadRecord(str(path), 1, None, "nothing to read in the zip: no file of a known suffix")


def read_texts(sources: list[str], text_key: str = "text", bad: list[BadRecord] | None = None) -> Iterator[str]:
    """All texts of files, folders and globs; what can't be read is added to `bad`."""
    for source in sources:
        for path in list_files(source):
            for one in read_file(path, source="text", root=path.parent, text_key=text_key):
                if isinstance(one, Document):
                    yield one.text
                elif bad is not None:
                    bad.append(one)


def to_documents(
    records: Iterator[Record],
    source: str,
    prefix: str,
    path: str,
    text_key: str,
    reader: Callable | None = None,
    sure: bool = True,
) -> Iterator[Document | BadRecord]:
    """Take the text out of each record; a first record without one is an error of the user's.

    reader  what read them: the file is one document for `read_text`, which gives it its name
    sure    False: the first record may be a bad one like any other
    """
    decoded = reader in (read_text, read_warc)  # these decode the text, and say in which format and encoding it was
    text_key, first = "text" if decoded else text_key, sure
    for number, record in records:
        if isinstance(record, BadRecord):
            yield record
            continue
        if first and text_key not in record:
            raise DataError(
                f"the records have no field {text_key}",
                at=f"{path}:{number}",
                got=", ".join(str(key)[:50] for key in list(record)[:30]),
                fix=did_you_mean(text_key, map(str, record)) or "set text_key to one of these, or exclude the file",
            )
        first = False
        try:
            text = text_of(record, text_key)
        except ValueError as error:
            yield BadRecord(path, number, None, str(error))
            continue
        meta = {key: value for key, value in record.items() if key != "text"} if decoded else {}
        yield Document(prefix if reader is read_text else f"{prefix}:{number}", text, source, meta)


def text_of(record: dict[str, Any], text_key: str) -> str:
    """The text, which UTF-8 can hold; raises ValueError where there is none."""
    text = record.get(text_key)
    if not isinstance(text, str):
        why = "null" if text_key in record else "missing"
        raise ValueError(f"{text_key} is " + (why if text is None else f"{type(text).__name__}, not text"))
    try:
        size = len(text.encode())
    except UnicodeEncodeError:  # pair surrogates up; a lone one becomes U+FFFD
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        size = len(text.encode())
    if size > MAX_DOCUMENT_BYTES:
        raise ValueError(f"{text_key} has over {MAX_DOCUMENT_BYTES:,} bytes")
    return text


# ---- Hugging Face datasets ------------------------------------------------------------------------------------------


def dataset_files(name: str, config: str | None, split: str) -> tuple[Path, list[Path]] | None:
    """(root, data files) of a local folder of data files; None: a hub id or a save_to_disk folder, for `datasets`."""
    folder = Path(name).expanduser()
    if not folder.is_dir() and (folder.exists() or name.startswith(("/", ".", "~"))):
        raise DataError("a local dataset is a folder", at=name, fix="for files and globs use `path`")
    if not folder.is_dir() or is_saved(folder):
        return None
    folder = folder / config if config else folder
    return folder, split_files(folder, split)


def is_saved(folder: Path) -> bool:
    return any((folder / file).is_file() for file in ("dataset_dict.json", "state.json"))


def read_dataset(
    name: str,
    *,
    source: str,
    config: str | None = None,
    split: str = "train",
    streaming: bool = False,
    text_key: str = "text",
    revision: str | None = None,
) -> Iterator[Document | BadRecord]:
    """The documents of a hub id, a save_to_disk folder, or a local folder of data files.

    Loading scripts never run; the network is used for hub ids alone. Local data is memory-mapped or streamed anyway.
    """
    if found := dataset_files(name, config, split):
        for file in found[1]:
            yield from read_file(file, source=source, root=found[0], text_key=text_key)
        return
    saved = is_saved(Path(name).expanduser())
    if saved and (config or streaming or revision):
        raise UserError("config, revision and streaming mean nothing to a saved dataset", at=name, fix="delete them")
    rows = dataset_rows(name, config, split, streaming, saved, text_key, revision)
    yield from to_documents(rows, source, f"{source}/{split}", name, text_key)


def split_files(folder: Path, split: str) -> list[Path]:
    """The data files whose path names the split (train-00000.parquet, test/a.jsonl), or all as train."""
    kinds = [f"*{suffix}" for suffix in READERS if suffix not in DOCUMENT_FORMATS]
    files = list_files(str(folder), kinds, ["dataset_info.json", "dataset_infos.json"])
    words = {file: set(re.split(r"[^a-z0-9]+", file.relative_to(folder).as_posix().lower())) for file in files}
    known = {"train", "test", "validation", "valid", "val", "dev", "eval"}
    named = [file for file in files if split.lower() in words[file]]
    if named or (split == "train" and not any(known & names for names in words.values())):
        return named or files
    names = ", ".join(file.name for file in files[:8])
    raise DataError(f"no data file is of the split {split}", at=folder, got=names)


def dataset_rows(
    name: str, config: str | None, split: str, streaming: bool, saved: bool, text_key: str, revision: str | None
) -> Iterator[Record]:
    """Rows that the `datasets` library loads, numbered from 1; its many errors become one of ours."""
    import datasets

    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False  # before version 4 it would ask on the terminal
    try:
        if saved:
            data = datasets.load_from_disk(str(Path(name).expanduser()))
            if isinstance(data, dict):
                if split not in data:
                    raise ValueError(f"no split {split}; there is {', '.join(data)}")
                data = data[split]
        else:
            data = datasets.load_dataset(name, config, split=split, streaming=streaming, revision=revision)
        simple = [key for key, kind in (data.features or {}).items() if isinstance(kind, datasets.Value)]
        if text_key in simple:
            data = data.select_columns(simple)  # images and audio would be decoded for nothing
        yield from enumerate(data, 1)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().partition("\n")[0][:300]
        raise DataError(
            "the dataset can't be read",
            at=f"{name}, config {config or 'default'}, split {split}",
            got=f"{type(error).__name__}: {reason}",
            fix="check the id, config and split; a gated dataset needs HF_TOKEN; offline, name a local folder",
        ) from error
