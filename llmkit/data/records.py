"""Files to records: text, HTML, source code, JSON Lines, CSV, Parquet, packed or not, as a stream.

Whatever can't be read becomes a `BadRecord` with its place and reason; nothing is lost in silence.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from llmkit.errors import DATA, ENVIRONMENT, UserError

MAX_DOCUMENT_BYTES = 50_000_000  # a text, or a line of JSON Lines or CSV, beyond this is bad
MAX_JSON_BYTES = 256_000_000  # a .json array is parsed whole, at about four times its size in memory
BYTE_ORDER_MARKS = {  # UTF-32 first: its mark begins like UTF-16's
    b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16",
    b"\xef\xbb\xbf": "utf-8-sig",
}  # fmt: skip
GUESSED_ENCODINGS = ("cp1252", "utf-8 (damaged)")  # values of meta["encoding"] that deserve a warning
BROKEN = (EOFError, OSError, zlib.error, pa.ArrowException)  # what torn or wrong gz, zst and parquet files raise

TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc")
HTML_SUFFIXES = (".html", ".htm", ".xhtml")
CODE_SUFFIXES = (
    ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".cuh", ".m", ".rs", ".go", ".java", ".kt",
    ".scala", ".swift", ".cs", ".js", ".mjs", ".jsx", ".ts", ".tsx", ".css", ".scss", ".sh", ".bash", ".ps1", ".rb",
    ".php", ".pl", ".lua", ".r", ".jl", ".sql", ".hs", ".ml", ".ex", ".erl", ".clj", ".lisp", ".f90", ".zig", ".dart",
    ".v", ".proto", ".cmake", ".yaml", ".yml", ".toml", ".ini", ".cfg",
)  # fmt: skip


@dataclass(frozen=True)
class BadRecord:
    """Something that can't become a document: line (or row) counts from 1, offset is in uncompressed bytes."""

    path: str
    line: int
    offset: int | None
    reason: str


Record = tuple[int, dict[str, Any] | BadRecord]  # with its line or row


# ---- bytes and text -------------------------------------------------------------------------------------------------


def suffix_of(path: Path) -> str:
    """The key of READERS: `.txt` of `a.b.TXT`, `.jsonl.gz` of `a.b.jsonl.gz`."""
    return "".join(path.suffixes[-2:] if path.suffix.lower() in (".gz", ".zst") else path.suffixes[-1:]).lower()


def open_bytes(path: Path) -> BinaryIO:
    """A file's bytes, decompressed as they are read; a torn file raises one of BROKEN where it breaks."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path)
    if path.suffix.lower() == ".zst":  # pyarrow's reader: zstandard's own takes a torn file for a finished one
        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))
    return path.open("rb")


def decode(data: bytes, html: bool = False) -> tuple[str, str]:
    """(text, encoding), by the byte order mark, else UTF-8, else the charset that HTML declares, else cp1252.

    Guessing further does harm: a charset detector was wrong on 25 of 60 cp1252 files. Raises ValueError with why not.

    >>> decode("caf\\u00e9".encode("cp1252"))
    ('caf\\xe9', 'cp1252')
    """
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            return data.decode(encoding), encoding.removesuffix("-sig")
    if data.count(0) > len(data) / 100:
        raise ValueError("binary: over 1 % NUL bytes")
    with suppress(UnicodeDecodeError):
        return data.decode(), "utf-8"
    if 0 in data:
        raise ValueError("binary: NUL bytes, and not UTF-8")
    if html and (declared := re.search(rb"(?:charset|encoding)\s*=\s*[\"']?([\w-]+)", data[:2048])):
        from resiliparse.parse.encoding import map_encoding_to_html5

        name = declared[1].decode("ascii", "ignore").lower()
        encoding = map_encoding_to_html5(name, False)  # what browsers know, so none of Python's "hex" or "utf-7"
        if encoding and not encoding.startswith("utf"):
            with suppress(UnicodeDecodeError):
                return data.decode(encoding), name
    repaired = data.decode("utf-8", "replace")
    if len(re.findall(r"[^\x00-\x7f\ufffd]", repaired)) > repaired.count("\ufffd"):
        return repaired, "utf-8 (damaged)"  # a few bad bytes: other encodings hardly ever form UTF-8's pairs
    with suppress(UnicodeDecodeError):
        return data.decode("cp1252"), "cp1252"
    raise ValueError("in no known encoding: neither UTF-8 nor cp1252")


def parse_json(data: bytes) -> Any:
    """Like json.loads, at orjson's speed; raises ValueError with a short reason."""
    with suppress(orjson.JSONDecodeError):
        return orjson.loads(data)
    try:
        utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        # Slow, but takes what Python writes and orjson refuses: lone surrogates, NaN, a byte order mark.
        return json.loads(data.decode("utf-16" if utf16 else "utf-8-sig"))
    except RecursionError:
        raise ValueError("JSON nested too deep") from None
    except UnicodeDecodeError:
        raise ValueError("invalid UTF-16" if utf16 else "invalid UTF-8") from None
    except ValueError as error:
        raise ValueError(f"bad JSON: {error}") from None


def read_lines(path: Path) -> Iterator[tuple[int, int, bytes | BadRecord]]:
    """(number, offset, line); never more than MAX_DOCUMENT_BYTES of a line in memory."""
    with open_bytes(path) as file:
        number, offset = 0, 0
        while line := file.readline(MAX_DOCUMENT_BYTES + 1):
            number, size = number + 1, len(line)
            if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                yield number, offset, BadRecord(str(path), number, offset, "UTF-16: convert the file to UTF-8")
                return
            if size > MAX_DOCUMENT_BYTES:
                while line and not line.endswith(b"\n"):  # pass over the rest of it
                    line = file.readline(MAX_DOCUMENT_BYTES)
                    size += len(line)
                line = BadRecord(str(path), number, offset, f"a line over {MAX_DOCUMENT_BYTES:,} bytes")
            yield number, offset, line
            offset += size


# ---- records --------------------------------------------------------------------------------------------------------


def read_text(path: Path) -> Iterator[Record]:
    """A whole file as one record {text, format, encoding}."""
    with open_bytes(path) as file:
        data = file.read(MAX_DOCUMENT_BYTES + 1)
    form = FORMATS.get(suffix_of(path), "text")
    try:
        if len(data) > MAX_DOCUMENT_BYTES:
            raise ValueError(f"over {MAX_DOCUMENT_BYTES:,} bytes: split it, or make it a .jsonl of documents")
        text, encoding = decode(data, html=form == "html")
        yield 1, {"text": text, "format": form, "encoding": encoding}
    except ValueError as error:
        yield 1, BadRecord(str(path), 1, 0, str(error))


def read_jsonl(path: Path) -> Iterator[Record]:
    """One JSON object a line; blank lines are nothing."""
    for number, offset, line in read_lines(path):
        if isinstance(line, BadRecord):
            yield number, line
        elif line.strip():
            try:
                yield number, as_record(parse_json(line), path, number, offset)
            except ValueError as error:
                yield number, BadRecord(str(path), number, offset, str(error))


def read_json(path: Path) -> Iterator[Record]:
    """An array of records, one record, or JSON Lines under the wrong name."""
    with open_bytes(path) as file:
        data, lines = file.readline(MAX_JSON_BYTES + 1), False
        with suppress(ValueError):
            lines = data.startswith(b"{") and isinstance(parse_json(data), dict)
        data += b"" if lines else file.read(MAX_JSON_BYTES + 1 - len(data))
    if lines:
        yield from read_jsonl(path)
        return
    if len(data) > MAX_JSON_BYTES:
        raise UserError(
            "a .json file is parsed whole, and this one is too large", at=path, expected=f"<= {MAX_JSON_BYTES:,} bytes",
            fix=f"turn it into JSON Lines: jq -c '.[]' {path.name} > {path.stem}.jsonl", code=DATA,
        )  # fmt: skip
    try:
        content = parse_json(data)
    except ValueError as error:
        yield 1, BadRecord(str(path), 1, 0, str(error))
        return
    for number, record in enumerate(content if isinstance(content, list) else [content], 1):
        yield number, as_record(record, path, number, None)


def as_record(value: Any, path: Path, number: int, offset: int | None) -> dict[str, Any] | BadRecord:
    kinds = {list: "an array", str: "a string", int: "a number", float: "a number", bool: "a boolean"}
    reason = f"{kinds.get(type(value), 'null')}, not an object"
    return value if isinstance(value, dict) else BadRecord(str(path), number, offset, reason)


def read_csv(path: Path) -> Iterator[Record]:
    """Rows under a header line; tabs in .tsv files. Quotes are Excel's."""
    csv.field_size_limit(MAX_DOCUMENT_BYTES)  # of the process; by default 131,072 characters

    def lines() -> Iterator[str]:
        for _, _, line in read_lines(path):
            if isinstance(line, BadRecord):
                raise csv.Error(line.reason)
            try:
                yield line.decode("utf-8-sig")
            except UnicodeDecodeError:  # line by line: memory stays flat, and one bad row says nothing of the others
                yield line.decode("cp1252", "replace")

    rows = csv.reader(lines(), delimiter="\t" if ".tsv" in suffix_of(path) else ",", strict=True)
    header, number = None, 1
    while True:
        try:
            if (row := next(rows, None)) is None:
                return
            if header is None:
                header = row
            elif row:
                if len(row) != len(header):
                    raise csv.Error(f"{len(row)} fields under a header of {len(header)}")
                yield number, dict(zip(header, row, strict=True))
        except csv.Error as error:
            yield number, BadRecord(str(path), number, None, f"bad CSV: {error}")
        number = rows.line_num + 1  # the line at which the next row starts


def read_parquet(path: Path) -> Iterator[Record]:
    """Rows, a batch of each row group at a time."""
    with pq.ParquetFile(path) as file:
        number = 0
        for batch in file.iter_batches(batch_size=256):
            columns = batch.to_pydict() if is_utf8(batch) else None
            for row in range(batch.num_rows):
                number += 1
                try:
                    names = batch.schema.names
                    yield number, {n: columns[n][row] if columns else batch[n][row].as_py() for n in names}
                except UnicodeDecodeError:
                    yield number, BadRecord(str(path), number, None, "invalid UTF-8")


def is_utf8(batch: pa.RecordBatch) -> bool:
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


FORMATS = {  # of the files that are one document: what `clean` needs to know
    suffix + packed: kind
    for kind, suffixes in {"text": TEXT_SUFFIXES, "html": HTML_SUFFIXES, "code": CODE_SUFFIXES}.items()
    for suffix in suffixes
    for packed in ("", ".gz", ".zst")
}
LINES = {".jsonl": read_jsonl, ".ndjson": read_jsonl, ".json": read_json, ".csv": read_csv, ".tsv": read_csv}
READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".parquet": read_parquet,
    **{suffix + packed: reader for suffix, reader in LINES.items() for packed in ("", ".gz", ".zst")},
    **dict.fromkeys(FORMATS, read_text),
}


def read_records(path: Path) -> Iterator[Record]:
    """(line, record) of any file; a broken one ends in a BadRecord, after all that came before the break."""
    number = 0
    try:
        for number, record in READERS.get(suffix_of(path), read_text)(path):
            yield number, record
    except BROKEN as error:
        if isinstance(error, OSError) and error.errno is not None:  # the machine's fault, not the file's
            raise UserError("can't read the file", at=path, got=error.strerror, code=ENVIRONMENT) from error
        yield number + 1, BadRecord(str(path), number + 1, None, f"the file is broken from here on: {error}")
