"""Read files, folders, globs and Hugging Face datasets as streams of documents."""

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
    DOCUMENT_FORMATS,
    MAX_DOCUMENT_BYTES,
    READ_ERRORS,
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

# ---- files ----------------------------------------------------------------------------------------------------------


def list_files(
    path: str, include: Sequence[str] = (), exclude: Sequence[str] = (), unknown: Counter[str] | None = None
) -> list[Path]:
    """List the readable files of a path (a file, folder or glob), sorted. Skip hidden, empty and special files.

    include, exclude  globs for the path below the folder, or for the bare name; `*` also matches slashes
    unknown           counts the selected files that have no reader, by suffix

    A zip is listed as one file if it is not excluded. `include` selects among its members.
    """
    start, root = Path(path).expanduser(), root_of(path)
    if not start.is_dir() and (start.exists() or start.is_symlink()):
        check_file(start)
    elif not root.is_dir():
        raise DataError("no such file or folder", at=path)
    pattern = start.relative_to(root).as_posix() if start != root else "**"
    named = [start] if start.is_file() else root.glob(f"{pattern}/*" if pattern.endswith("**") else pattern)
    if not pattern.endswith("**") and not pattern.endswith("**/*"):  # replace folders by their files
        named = {file for match in named for file in (match.rglob("*") if is_folder(match) else [match])}
    found, files = [file for file in named if file.is_file()], []
    for file in found:
        suffix = suffix_of(file)
        selected = is_selected(file.relative_to(root), () if suffix == ".zip" else include, exclude, file == start)
        if selected and (suffix in READERS or suffix == ".zip") and file.stat().st_size:
            files.append(file)
        elif selected and unknown is not None and suffix not in READERS:
            unknown[suffix or "no suffix"] += 1
    if not files:
        seen = Counter(suffix_of(file) or "no suffix" for file in found).most_common(8)
        globs = "".join(
            f", {key} {list(value)}" for key, value in [("include", include), ("exclude", exclude)] if value
        )
        got = ", ".join(f"{n} {suffix}" for suffix, n in seen) or "no files at all"
        expected = f"files with a known suffix, neither empty nor hidden{globs}"
        raise DataError("no file to read", at=path, got=got, expected=expected)
    return sorted(files, key=Path.as_posix)


def root_of(path: str) -> Path:
    """Return the root of the documents' ids: the folder itself, a file's folder, or a glob's fixed part.

    >>> root_of("corpora/docs/**/*.html").as_posix()
    'corpora/docs'
    """
    start = Path(path).expanduser()
    if start.exists() or start.is_symlink():
        return start if start.is_dir() else start.parent
    wildcards = [i for i, part in enumerate(start.parts) if re.search(r"[*?[]", part)]
    return Path(*start.parts[: wildcards[0]]) if wildcards else start


def is_folder(path: Path) -> bool:
    """Return True for a folder, but not for a symbolic link to one, which could form a cycle."""
    return path.is_dir() and not path.is_symlink()


def check_file(path: Path) -> None:
    """Raise DataError if a file that the user named can't be read."""
    problem, got, fix = None, None, None
    if not path.exists():
        problem = "the link points to a missing file" if path.is_symlink() else "no such file"
    elif not path.is_file():
        problem = "not a regular file"
    elif not path.stat().st_size:
        problem = "the file is empty"
    elif (got := suffix_of(path)) not in (*READERS, ".zip"):
        problem, fix = "no reader for files with this suffix", did_you_mean(got, READERS)
    if problem:
        raise DataError(problem, at=path, got=got, fix=fix)


def is_selected(path: Path, include: Sequence[str], exclude: Sequence[str], hidden: bool = False) -> bool:
    """Match a path below the folder against the globs. Hidden folders and files match only if `hidden`."""
    visible = not any(part.startswith(".") or part in ("__pycache__", "node_modules") for part in path.parts)
    return (visible or hidden) and (not include or matches_any(path, include)) and not matches_any(path, exclude)


def matches_any(path: Path, patterns: Sequence[str]) -> bool:
    """Match a path against globs. The variant with a leading slash lets `**/x` match an x at the top."""
    names = (path.as_posix(), f"/{path.as_posix()}", path.name)
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
    """Yield the documents of one file, with ids "SOURCE/PATH BELOW ROOT[:line or row]", in constant memory.

    span              part of the file (see `spans_of`); ids then are PATH@BYTE:LINE, with lines counted from BYTE
    include, exclude  globs for the members of a zip

    meta holds "format" (text, html, code) and "encoding" for files that are one document and for web pages, and "url"
    for web pages. Raises DataError if the first record lacks the text column.
    """
    relative = os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "replace")  # names can be any bytes
    prefix = f"{source}/{relative}"
    if suffix_of(path) == ".zip":
        yield from read_zip(path, prefix, source, text_key, include, exclude)
        return
    if span and span[0] and suffix_of(path) != ".parquet":
        prefix += f"@{span[0]}"
    yield from read_single_file(path, prefix, source, text_key, span)


def read_single_file(
    path: Path, prefix: str, source: str, text_key: str, span: Span | None = None
) -> Iterator[Document | BadRecord]:
    """Yield the documents of a file on disk or in a zip."""
    strict = span is None or span[0] == 0  # the first record of a later span may be a bad one
    reader = READERS.get(suffix_of(path), read_text)
    yield from to_documents(read_records(path, span), source, prefix, str(path), text_key, reader, strict)


def read_zip(
    path: Path, prefix: str, source: str, text_key: str, include: Sequence[str], exclude: Sequence[str]
) -> Iterator[Document | BadRecord]:
    """Yield the documents of the files in a zip, in order of their names, without unpacking to disk."""
    seen = set()
    try:
        with zipfile.ZipFile(path) as archive:
            for info in sorted(archive.infolist(), key=lambda info: info.filename):
                inside = Path(info.filename)
                if not info.file_size or suffix_of(inside) not in READERS or not is_selected(inside, include, exclude):
                    continue
                if info.filename in seen:
                    yield BadRecord(f"{path}/{info.filename}", 1, None, "the zip has two files of this name")
                    continue
                seen.add(info.filename)
                member = zipfile.Path(archive, info.filename)
                yield from read_single_file(member, f"{prefix}/{inside.as_posix()}", source, text_key)
    except (*READ_ERRORS, UnicodeDecodeError) as error:
        yield BadRecord(str(path), 1, None, f"the zip is broken: {error}")
    else:
        if not (seen or include or exclude):
            yield BadRecord(str(path), 1, None, "nothing to read in the zip: no file with a known suffix")


def read_texts(sources: list[str], text_key: str = "text", bad: list[BadRecord] | None = None) -> Iterator[str]:
    """Yield all texts of files, folders and globs. Append what can't be read to `bad`."""
    for source in sources:
        for path in list_files(source):
            for document in read_file(path, source="text", root=path.parent, text_key=text_key):
                if isinstance(document, Document):
                    yield document.text
                elif bad is not None:
                    bad.append(document)


def to_documents(
    records: Iterator[Record],
    source: str,
    prefix: str,
    path: str,
    text_key: str,
    reader: Callable | None = None,
    strict: bool = True,
) -> Iterator[Document | BadRecord]:
    """Turn records into documents.

    reader  the function that read the records; for `read_text` the file is one document, whose id is `prefix`
    strict  raise DataError if the first record lacks the text column; False: treat it like any other bad record
    """
    decoded = reader in (read_text, read_warc)  # these return text, format and encoding
    text_key, check_key = "text" if decoded else text_key, strict
    for number, record in records:
        if isinstance(record, BadRecord):
            yield record
            continue
        if check_key and text_key not in record:
            got = ", ".join(str(key)[:50] for key in list(record)[:30])
            fix = did_you_mean(text_key, map(str, record)) or "set text_key to one of these, or exclude the file"
            raise DataError(f"the records have no field {text_key}", at=f"{path}:{number}", got=got, fix=fix)
        check_key = False
        try:
            text = extract_text(record, text_key)
        except ValueError as error:
            yield BadRecord(path, number, None, str(error))
            continue
        meta = {key: value for key, value in record.items() if key != "text"} if decoded else {}
        yield Document(prefix if reader is read_text else f"{prefix}:{number}", text, source, meta)


def extract_text(record: dict[str, Any], text_key: str) -> str:
    """Return the text of a record, encodable as UTF-8. Raise ValueError if there is none or it is too large."""
    text = record.get(text_key)
    if not isinstance(text, str):
        empty = "null" if text_key in record else "missing"
        raise ValueError(f"{text_key} is " + (empty if text is None else f"{type(text).__name__}, not text"))
    try:
        size = len(text.encode())
    except UnicodeEncodeError:  # join surrogate pairs; a lone surrogate becomes U+FFFD
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        size = len(text.encode())
    if size > MAX_DOCUMENT_BYTES:
        raise ValueError(f"{text_key} has over {MAX_DOCUMENT_BYTES:,} bytes")
    return text


# ---- Hugging Face datasets ------------------------------------------------------------------------------------------


def dataset_files(name: str, config: str | None, split: str) -> tuple[Path, list[Path]] | None:
    """Return (root, data files) of a local folder of data files, or None for a hub id or a save_to_disk folder."""
    folder = Path(name).expanduser()
    if not folder.is_dir() and (folder.exists() or name.startswith(("/", ".", "~"))):
        raise DataError("a local dataset must be a folder", at=name, fix="use `path` for files and globs")
    if not folder.is_dir() or is_saved_dataset(folder):
        return None
    folder = folder / config if config else folder
    return folder, split_files(folder, split)


def is_saved_dataset(folder: Path) -> bool:
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
    """Yield the documents of a hub id, a save_to_disk folder, or a local folder of data files.

    Loading scripts never run. Only hub ids use the network. Local data is memory-mapped or streamed in any case.
    """
    if found := dataset_files(name, config, split):
        for file in found[1]:
            yield from read_file(file, source=source, root=found[0], text_key=text_key)
        return
    saved = is_saved_dataset(Path(name).expanduser())
    if saved and (config or streaming or revision):
        raise UserError("config, revision and streaming do not apply to a saved dataset", at=name, fix="delete them")
    rows = load_dataset_rows(name, config, split, streaming, saved, text_key, revision)
    yield from to_documents(rows, source, f"{source}/{split}", name, text_key)


def split_files(folder: Path, split: str) -> list[Path]:
    """Return the data files whose path names the split (train-00000.parquet, test/a.jsonl), or all files as train."""
    kinds = [f"*{suffix}" for suffix in READERS if suffix not in DOCUMENT_FORMATS]
    files = list_files(str(folder), kinds, ["dataset_info.json", "dataset_infos.json"])
    words = {file: set(re.split(r"[^a-z0-9]+", file.relative_to(folder).as_posix().lower())) for file in files}
    known = {"train", "test", "validation", "valid", "val", "dev", "eval"}
    named = [file for file in files if split.lower() in words[file]]
    if named or (split == "train" and not any(known & names for names in words.values())):
        return named or files
    names = ", ".join(file.name for file in files[:8])
    raise DataError(f"no data file for the split {split}", at=folder, got=names)


def load_dataset_rows(
    name: str, config: str | None, split: str, streaming: bool, saved: bool, text_key: str, revision: str | None
) -> Iterator[Record]:
    """Yield (number from 1, row) from the `datasets` library, with its various errors converted to DataError."""
    import datasets

    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False  # before version 4 it would ask on the terminal
    try:
        if saved:
            data = datasets.load_from_disk(str(Path(name).expanduser()))
            if isinstance(data, dict):
                if split not in data:
                    raise ValueError(f"no split {split}; the dataset has {', '.join(data)}")
                data = data[split]
        else:
            data = datasets.load_dataset(name, config, split=split, streaming=streaming, revision=revision)
        simple = [key for key, kind in (data.features or {}).items() if isinstance(kind, datasets.Value)]
        if text_key in simple:
            data = data.select_columns(simple)  # do not decode images and audio
        yield from enumerate(data, 1)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().partition("\n")[0][:300]
        raise DataError(
            "the dataset can't be read",
            at=f"{name}, config {config or 'default'}, split {split}",
            got=f"{type(error).__name__}: {reason}",
            fix="check the id, config and split; a gated dataset needs HF_TOKEN; offline, name a local folder",
        ) from error
