"""Files and datasets to documents, as a stream: text, Markdown, HTML, JSONL, Parquet, CSV, source code, Hugging Face.

Whatever can't be read becomes a `BadRecord` with its place and reason; nothing is lost in silence.
"""

from __future__ import annotations

import contextlib
import csv
import fnmatch
import glob
import gzip
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import zstandard

from llmkit.errors import DATA, UserError, did_you_mean
from llmkit.types import Document

MAX_DOCUMENT_BYTES = 50_000_000
CODE_SUFFIXES = frozenset("""
    .py .pyi .c .h .cc .cpp .hpp .cu .cuh .rs .go .java .js .jsx .ts .tsx .sh .bash .rb .php .sql .jl .scala .kt .swift
    .lua .r .m .cs .hs .ml .ex .erl .clj .pl .zig .dart .css .scss .yaml .yml .toml .ini .cfg .rst .tex .org
""".split())  # fmt: skip
TEXT_SUFFIXES = CODE_SUFFIXES | {".txt", ".text", ".md", ".markdown", ".html", ".htm", ".xhtml"}
SKIPPED_FOLDERS = frozenset({"__pycache__", "node_modules"})  # and every hidden one


@dataclass(frozen=True)
class BadRecord:
    """Something that can't become a document: where it lies, and why. Offsets are bytes in the decompressed file."""

    path: str
    line: int
    offset: int
    reason: str


# ---- which files ----------------------------------------------------------------------------------------------------


def suffix_of(path: Path) -> str:
    """The suffix that tells the format, without a compression's: a.jsonl.gz is .jsonl."""
    name = path.name.lower()
    for packed in (".gz", ".zst"):
        name = name.removesuffix(packed)
    return Path(name).suffix


def list_files(path: str, include: list[str] = (), exclude: list[str] = ()) -> list[Path]:
    """The readable files of a file, folder or glob, sorted.

    include, exclude  globs over the path inside the folder, or over the bare name
    Folders are walked for known suffixes; hidden ones, __pycache__ and node_modules are passed over.
    """
    root = Path(path).expanduser()
    if root.is_file():
        return [root]
    if root.is_dir():
        found = sorted(p for p in root.rglob("*") if is_wanted(p, root, include, exclude))
        if not found:
            kinds = ", ".join(sorted({p.suffix for p in root.rglob("*") if p.is_file()}))
            raise UserError(
                "the folder has no file that can be read", at=path, got=f"files ending in {kinds or 'nothing'}",
                fix="check include and exclude", code=DATA,
            )  # fmt: skip
        return found
    matches = [Path(match) for match in sorted(glob.glob(str(root), recursive=True))]  # noqa: PTH207 (** and absolute)
    found = [p for p in matches if p.is_file() and is_wanted(p, p.parent, include, exclude)]
    if not found:
        what = "is not a regular file" if root.exists() else "does not exist, and matches nothing as a glob"
        raise UserError(f"the source {what}", at=path, code=DATA)
    return found


def is_wanted(path: Path, root: Path, include: list[str], exclude: list[str]) -> bool:
    """Whether a walk takes this file."""
    inside = path.relative_to(root)
    if any(part in SKIPPED_FOLDERS or part.startswith(".") for part in inside.parts):
        return False

    def matches(patterns: list[str]) -> bool:
        return any(fnmatch.fnmatch(str(inside), glob) or fnmatch.fnmatch(path.name, glob) for glob in patterns)

    known = bool(include) or suffix_of(path) in READERS
    return known and path.is_file() and (not include or matches(include)) and not matches(exclude)


# ---- bytes and text -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[io.BufferedIOBase]:
    """A file's bytes, decompressed as they are read."""
    with path.open("rb") as raw:
        if path.suffix == ".gz":
            with gzip.open(raw) as file:
                yield file
        elif path.suffix == ".zst":
            with zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True) as file:
                yield io.BufferedReader(file)
        else:
            yield raw


BROKEN = (OSError, EOFError, zstandard.ZstdError, gzip.zlib.error)  # what reading a damaged archive raises
BOMS = {b"\xef\xbb\xbf": "utf-8", b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}
CHARSET = re.compile(rb"""<meta[^>]+charset\s*=\s*["']?\s*([\w-]+)""", re.IGNORECASE)


def decode(data: bytes) -> tuple[str, str]:
    """Text and the encoding it was in: a byte-order mark, strict UTF-8, a declared charset, cp1252, in this order.

    >>> decode("caf\\u00e9".encode("cp1252"))
    ('caf\\xe9', 'cp1252')
    """
    for mark, encoding in BOMS.items():
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding, errors="replace"), encoding
    try:
        return data.decode("utf-8"), "utf-8"
    except UnicodeDecodeError:
        pass
    declared = CHARSET.search(data[:2048])
    with contextlib.suppress(LookupError, UnicodeDecodeError):
        if declared:
            return data.decode(declared[1].decode()), declared[1].decode().lower()
    return data.decode("cp1252", errors="replace"), "cp1252"


# ---- records: (line, record) of a file ------------------------------------------------------------------------------

Record = tuple[int, dict[str, Any] | BadRecord]


def read_jsonl(path: Path) -> Iterator[Record]:
    """One JSON object a line."""
    offset = 0
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            start, offset = offset, offset + len(line)
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            if len(line) > MAX_DOCUMENT_BYTES:
                yield number, BadRecord(str(path), number, start, "over 50 MB")
                continue
            try:
                record = orjson.loads(line)
            except ValueError as error:
                kind = "not UTF-8" if "UTF-8" in str(error) or "utf-8" in str(error) else "not JSON"
                yield number, BadRecord(str(path), number, start, kind)
                continue
            if not isinstance(record, dict):
                record = BadRecord(str(path), number, start, "not a JSON object")
            yield number, record


def read_json(path: Path) -> Iterator[Record]:
    """An array of objects, or one object."""
    with open_bytes(path) as file:
        try:
            content = orjson.loads(file.read())
        except ValueError:
            yield 1, BadRecord(str(path), 1, 0, "not JSON")
            return
    for number, record in enumerate(content if isinstance(content, list) else [content], 1):
        yield number, record if isinstance(record, dict) else BadRecord(str(path), number, 0, "not a JSON object")


def read_csv(path: Path) -> Iterator[Record]:
    """Rows under a header line; tabs in .tsv files."""
    csv.field_size_limit(MAX_DOCUMENT_BYTES)
    with open_bytes(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        rows = csv.DictReader(text, delimiter="\t" if suffix_of(path) == ".tsv" else ",")
        try:
            for row in rows:
                extra = row.pop(None, None)
                bad = BadRecord(str(path), rows.line_num, 0, "more fields than the header")
                yield rows.line_num, bad if extra else row
        except csv.Error as error:
            yield rows.line_num, BadRecord(str(path), rows.line_num, 0, f"not CSV: {error}")


def read_parquet(path: Path) -> Iterator[Record]:
    """Rows, a batch of each row group at a time."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for record in batch.to_pylist():
                number += 1
                yield number, record
    except pyarrow.ArrowException as error:
        yield number + 1, BadRecord(str(path), number + 1, 0, f"not Parquet: {str(error).splitlines()[0]}")


def read_text(path: Path) -> Iterator[Record]:
    """A whole file as one record {text, format, encoding}."""
    with open_bytes(path) as file:
        data = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        yield 1, BadRecord(str(path), 1, 0, "over 50 MB")
    elif b"\0" in data[:8192] and not data.startswith(tuple(BOMS)):
        yield 1, BadRecord(str(path), 1, 0, "binary")
    else:
        text, encoding = decode(data)
        form = "html" if suffix_of(path) in (".html", ".htm", ".xhtml") else "text"
        yield 1, {"text": text, "format": form, "encoding": encoding}


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": read_jsonl, ".ndjson": read_jsonl, ".json": read_json, ".parquet": read_parquet,
    ".csv": read_csv, ".tsv": read_csv, **dict.fromkeys(sorted(TEXT_SUFFIXES), read_text),
}  # fmt: skip


def read_records(path: Path) -> Iterator[Record]:
    """(line, record) of any file; a broken archive ends in a BadRecord, after all that came before the break."""
    line = 0
    try:
        for line, record in READERS.get(suffix_of(path), read_text)(path):
            yield line, record
    except BROKEN as error:
        yield line + 1, BadRecord(str(path), line + 1, 0, f"the file breaks off: {type(error).__name__}")


# ---- documents ------------------------------------------------------------------------------------------------------


def to_document(record: dict[str, Any], id: str, source: str, text_key: str) -> Document | str:
    """A record as a document, or why it can't be one."""
    text = record.get(text_key)
    if text is None:
        return f"no {text_key}"
    if not isinstance(text, str):
        return f"{text_key} is no text"
    if len(text) > MAX_DOCUMENT_BYTES:
        return "over 50 MB"
    small = (str, int, float, bool)
    meta = {k: v for k, v in record.items() if k != text_key and isinstance(v, small) and len(str(v)) <= 500}
    return Document(id, text, source, meta)


def read_file(path: Path, *, source: str, root: Path, text_key: str = "text") -> Iterator[Document | BadRecord]:
    """The documents of one file; raises UserError when its very first record lacks the text column."""
    inside = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
    whole = READERS.get(suffix_of(path), read_text) is read_text
    key = "text" if whole else text_key
    first = True
    for line, record in read_records(path):
        if isinstance(record, BadRecord):
            yield record
            continue
        if first and key not in record:
            hint = did_you_mean(key, record)
            raise UserError(
                f"the records have no field {key}", at=f"{path}:{line}", got=", ".join(map(str, record)),
                fix=hint or "name the field that holds the text as text_key", code=DATA,
            )  # fmt: skip
        first = False
        document = to_document(record, f"{source}/{inside}" + ("" if whole else f":{line}"), source, key)
        yield document if isinstance(document, Document) else BadRecord(str(path), line, 0, document)


def read_texts(sources: list[str], text_key: str = "text") -> Iterator[str]:
    """All texts of files, folders and globs; bad records are passed over."""
    for source in sources:
        for path in list_files(source):
            for one in read_file(path, source="text", root=path.parent, text_key=text_key):
                if isinstance(one, Document):
                    yield one.text


def read_dataset(
    name: str, *, source: str, config: str | None = None, split: str = "train", streaming: bool = False,
    text_key: str = "text",
) -> Iterator[Document | BadRecord]:  # fmt: skip
    """The documents of a Hugging Face dataset: a hub id, a save_to_disk folder, or a folder of data files.

    Only data is read: loading scripts are not run. The network is used for hub ids alone.
    """
    import datasets

    datasets.disable_progress_bars()
    folder = Path(name)
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(name)
            rows = loaded[split] if isinstance(loaded, dict) else loaded
        else:
            rows = datasets.load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:  # datasets raises some twenty kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        at = f"{name}, config {config}, split {split}"
        raise UserError(f"the dataset can't be opened: {reason}", at=at, code=DATA) from None
    columns = rows.column_names
    if columns and text_key not in columns:
        hint = did_you_mean(text_key, columns) or "name the column that holds the text as text_key"
        raise UserError(f"the dataset has no column {text_key}", at=name, got=", ".join(columns), fix=hint, code=DATA)
    for number, record in enumerate(rows):
        document = to_document(record, f"{source}/{number}", source, text_key)
        yield document if isinstance(document, Document) else BadRecord(name, number, 0, document)
