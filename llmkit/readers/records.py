"""Files to records: text, HTML, source code, JSON Lines, CSV, Parquet, WARC, packed or not, as a stream.

Whatever can't be read becomes a `BadRecord` with its place and reason; nothing is lost in silence. A path may also be
a `zipfile.Path`, a file inside a zip.
"""

from __future__ import annotations

import csv
import gzip
import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from llmkit.errors import DataError, MachineError
from llmkit.readers.decode import decode, parse_json

MAX_DOCUMENT_BYTES = 50_000_000  # a text, or a line of JSON Lines or CSV, beyond this is bad
MAX_JSON_BYTES = 256_000_000  # a .json array is parsed whole, at about four times its size in memory
BROKEN = (  # what torn or wrong files raise; RuntimeError: a zip with a password
    EOFError,
    OSError,
    zlib.error,
    lzma.LZMAError,
    pa.ArrowException,
    zipfile.BadZipFile,
    RuntimeError,
)

TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc")
HTML_SUFFIXES = (".html", ".htm", ".xhtml")
CODE_SUFFIXES = (
    ".py",
    ".pyi",
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".cxx",
    ".hpp",
    ".cu",
    ".cuh",
    ".m",
    ".rs",
    ".go",
    ".java",
    ".kt",
    ".scala",
    ".swift",
    ".cs",
    ".js",
    ".mjs",
    ".jsx",
    ".ts",
    ".tsx",
    ".css",
    ".scss",
    ".sh",
    ".bash",
    ".ps1",
    ".rb",
    ".php",
    ".pl",
    ".lua",
    ".r",
    ".jl",
    ".sql",
    ".hs",
    ".ml",
    ".ex",
    ".erl",
    ".clj",
    ".lisp",
    ".f90",
    ".zig",
    ".dart",
    ".v",
    ".proto",
    ".cmake",
    ".yaml",
    ".yml",
    ".toml",
    ".ini",
    ".cfg",
)


@dataclass(frozen=True)
class BadRecord:
    """Something that can't become a document: line (or row) counts from 1, offset is in uncompressed bytes.

    Of a file that is read in pieces, lines count from the start of the piece: `number_lines` puts that right.
    """

    path: str
    line: int
    offset: int | None
    reason: str


Record = tuple[int, dict[str, Any] | BadRecord]  # with its line or row
Span = tuple[int, int]  # a piece of a file, [start, stop): bytes of JSON Lines, row groups of Parquet


def suffix_of(path: Path) -> str:
    """The key of READERS: `.txt` of `a.b.TXT`, `.jsonl.gz` of `a.b.jsonl.gz`."""
    return "".join(path.suffixes[-2:] if path.suffix.lower() in (".gz", ".zst") else path.suffixes[-1:]).lower()


def open_bytes(path: Path) -> BinaryIO:
    """A file's bytes, decompressed as they are read; a torn file raises one of BROKEN where it breaks."""
    raw = path.open("rb")
    if path.suffix.lower() == ".gz":
        return gzip.open(raw)
    if path.suffix.lower() == ".zst":  # pyarrow's reader: zstandard's own takes a torn file for a finished one
        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw), "zstd"))
    return raw


def spans_of(path: Path, size: int) -> list[Span | None]:
    """The pieces of about `size` bytes that a large file can be read in; [None]: only as a whole."""
    kind = suffix_of(path)
    if kind not in (".jsonl", ".ndjson", ".parquet") or path.stat().st_size <= size:
        return [None]
    if kind != ".parquet":
        borders = range(0, path.stat().st_size, size)
        return [(start, start + size) for start in borders]
    try:
        with pq.ParquetFile(path) as file:
            groups = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
    except BROKEN:
        return [None]  # who reads it will say why
    spans, start, total = [], 0, 0
    for i, group in enumerate(groups):
        total += group
        if total >= size or i == len(groups) - 1:
            spans.append((start, i + 1))
            start, total = i + 1, 0
    return spans or [None]


def number_lines(path: Path, starts: list[int]) -> dict[int, int]:
    """How many lines of a file come before each of some offsets: one pass over it.

    >>> number_lines(Path("/dev/null"), [0])
    {0: 0}
    """
    found, lines, at = {}, 0, 0
    with path.open("rb") as file:
        for start in sorted(starts):
            while at < start and (block := file.read(min(2**24, start - at))):
                lines, at = lines + block.count(b"\n"), at + len(block)
            file.seek(max(0, start - 1))
            found[start] = lines + (start > 0 and file.read(1) != b"\n")  # the line that began before is not ours
            file.seek(at)
    return found


def read_lines(path: Path, span: Span | None = None) -> Iterator[tuple[int, int, bytes | BadRecord]]:
    """(number, offset, line) of the lines that begin in the span; at most MAX_DOCUMENT_BYTES of one in memory."""
    start, stop = span or (0, None)
    with open_bytes(path) as file:
        number, offset = 0, start
        if start:
            file.seek(start - 1)
            while (line := file.readline(MAX_DOCUMENT_BYTES)) and not line.endswith(b"\n"):
                pass  # the line that began before belongs to the piece before
            offset = file.tell()
        while (stop is None or offset < stop) and (line := file.readline(MAX_DOCUMENT_BYTES + 1)):
            number, size = number + 1, len(line)
            if offset == 0 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                yield number, offset, BadRecord(str(path), number, offset, "UTF-16: convert the file to UTF-8")
                return
            if size > MAX_DOCUMENT_BYTES:
                while line and not line.endswith(b"\n"):  # pass over the rest of it
                    line = file.readline(MAX_DOCUMENT_BYTES)
                    size += len(line)
                line = BadRecord(str(path), number, offset, f"a line over {MAX_DOCUMENT_BYTES:,} bytes")
            yield number, offset, line
            offset += size


def read_text(path: Path) -> Iterator[Record]:
    """A whole file as one record {text, format, encoding}."""
    with open_bytes(path) as file:
        data = file.read(MAX_DOCUMENT_BYTES + 1)
    form = DOCUMENT_FORMATS.get(suffix_of(path), "text")
    try:
        if len(data) > MAX_DOCUMENT_BYTES:
            raise ValueError(f"over {MAX_DOCUMENT_BYTES:,} bytes: split it, or make it a .jsonl of documents")
        text, encoding = decode(data, html=form == "html")
        yield 1, {"text": text, "format": form, "encoding": encoding}
    except ValueError as error:
        yield 1, BadRecord(str(path), 1, 0, str(error))


def read_jsonl(path: Path, span: Span | None = None) -> Iterator[Record]:
    """One JSON object a line; blank lines are nothing."""
    for number, offset, line in read_lines(path, span):
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
        raise DataError(
            "a .json file is parsed whole, and this one is too large",
            at=path,
            expected=f"<= {MAX_JSON_BYTES:,} bytes",
            fix=f"turn it into JSON Lines: jq -c '.[]' {path.name} > {path.stem}.jsonl",
        )
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

    too_long: list[BadRecord] = []  # lines that never reach the reader

    def lines() -> Iterator[str]:
        for number, offset, line in read_lines(path):
            if isinstance(line, BadRecord):
                too_long.append(BadRecord(str(path), number, offset, f"bad CSV: {line.reason}"))
                continue
            try:
                yield line.decode("utf-8-sig")
            except UnicodeDecodeError:  # line by line: memory stays flat, and one bad row says nothing of the others
                yield line.decode("cp1252", "replace")

    rows = csv.reader(lines(), delimiter="\t" if ".tsv" in suffix_of(path) else ",", strict=True)
    header, number = None, 1
    while True:
        try:
            row = next(rows, None)
            while too_long:
                bad = too_long.pop(0)
                yield bad.line, bad
            if row is None:
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


def read_parquet(path: Path, span: Span | None = None) -> Iterator[Record]:
    """Rows, a batch of each row group at a time."""
    with path.open("rb") as raw, pq.ParquetFile(raw) as file:
        start, stop = span or (0, file.num_row_groups)
        number = sum(file.metadata.row_group(i).num_rows for i in range(start))
        try:
            for batch in file.iter_batches(batch_size=256, row_groups=range(start, stop)):
                columns = columns_of(batch)
                for row in range(batch.num_rows):
                    number += 1
                    try:
                        names = batch.schema.names
                        yield number, {n: columns[n][row] if columns else batch[n][row].as_py() for n in names}
                    except UnicodeDecodeError:
                        yield number, BadRecord(str(path), number, None, "invalid UTF-8")
                    except (ValueError, OverflowError) as error:  # a date in the year 300,000
                        yield number, BadRecord(str(path), number, None, f"a value that Python can't hold: {error}")
        except (OSError, pa.ArrowException) as error:
            yield number + 1, BadRecord(str(path), number + 1, None, f"the file is broken from here on: {error}")


def columns_of(batch: pa.RecordBatch) -> dict[str, list] | None:
    """All columns as Python values; None where one of them can't be, and rows must be looked at one by one."""
    try:
        batch.validate(full=True)  # UTF-8 too
        return batch.to_pydict()
    except (pa.ArrowInvalid, ValueError, OverflowError):
        return None


# ---- web archives ---------------------------------------------------------------------------------------------------

WEB_TYPES = {"text/html": "html", "application/xhtml+xml": "html", "text/plain": "text"}


CHUNK = re.compile(rb"([0-9a-fA-F]{1,8})[ \t]*(?:;[^\r\n]*)?\r\n")  # the line before each: its size in hex
NEXT_RECORD = re.compile(rb"\r\n\r\nWARC/1\.[01]\r\nWARC-")


def unpack(data: bytes, headers: Any) -> bytes:
    """A body out of its chunks and its compression; raises ValueError where it breaks off.

    Crawlers often keep the headers of what they have unpacked: a body that is not as its headers say is taken as it is.
    """
    said = {name.lower(): value.lower() for name, value in headers}
    if "chunked" in said.get("transfer-encoding", "") and CHUNK.match(data):
        pieces, at = [], 0
        while True:
            head = CHUNK.match(data, at)
            if head is None:
                raise ValueError("cut short between its chunks")
            size, at = int(head[1], 16), head.end()
            if size == 0:
                break
            if at + size > len(data):
                raise ValueError("cut short inside a chunk")
            pieces.append(data[at : at + size])
            at += size + 2
        data = b"".join(pieces)
    if data.startswith(b"\x1f\x8b") and "gzip" in said.get("content-encoding", ""):
        stream = zlib.decompressobj(31)
        try:
            data = stream.decompress(data, MAX_DOCUMENT_BYTES + 1)
        except zlib.error as error:
            raise ValueError(f"broken gzip: {error}") from None
        if len(data) > MAX_DOCUMENT_BYTES:
            raise ValueError(f"over {MAX_DOCUMENT_BYTES:,} bytes")
        if not stream.eof:
            raise ValueError("cut short inside its gzip")
    elif said.get("content-encoding", "identity") in ("br", "zstd"):
        raise ValueError(f"packed with {said['content-encoding']}, which is not read")
    return data


def read_warc(path: Path) -> Iterator[Record]:
    """The pages of a web archive (ISO 28500), and the texts of a WET file: {text, format, encoding, url}.

    Requests, pictures, redirects and error pages are no documents, and not counted. A record's number is its place in
    the archive, its offset that of its (compressed) beginning.
    """
    from fastwarc.warc import ArchiveIterator, WarcRecordType

    wanted = WarcRecordType.response | WarcRecordType.resource | WarcRecordType.conversion
    number = 0
    with path.open("rb") as raw:
        for number, record in enumerate(ArchiveIterator(raw), 1):
            url = (record.headers.get("WARC-Target-URI") or "").strip("<>")
            if not record.record_type & wanted or (record.is_http and record.http_headers.status_code != 200):
                continue
            kind = record.http_content_type if record.is_http else record.headers.get("Content-Type")
            form = WEB_TYPES.get((kind or "").partition(";")[0].strip().lower())
            if form is None or url.startswith("metadata:"):  # wget's own log
                continue
            size = record.content_length
            try:
                data = record.reader.read(MAX_DOCUMENT_BYTES + 1)
                if len(data) > MAX_DOCUMENT_BYTES:
                    raise ValueError(f"over {MAX_DOCUMENT_BYTES:,} bytes")
                if len(data) < size:
                    raise ValueError(f"cut short: {len(data):,} of {size:,} bytes")
                if NEXT_RECORD.search(data):
                    raise ValueError("cut short: it runs on into the next record")
                data = unpack(data, record.http_headers) if record.is_http else data
                text, encoding = decode(data, html=form == "html", declared=record.http_charset)
            except (ValueError, OSError) as error:
                yield number, BadRecord(str(path), number, record.stream_pos, str(error))
                continue
            yield number, {"text": text, "format": form, "encoding": encoding, "url": url}
    if not number:
        yield 1, BadRecord(str(path), 1, 0, "no WARC record in it")


DOCUMENT_FORMATS = {  # of the files that are one document: what `clean` needs to know
    suffix + packed: kind
    for kind, suffixes in {"text": TEXT_SUFFIXES, "html": HTML_SUFFIXES, "code": CODE_SUFFIXES}.items()
    for suffix in suffixes
    for packed in ("", ".gz", ".zst")
}
LINES = {".jsonl": read_jsonl, ".ndjson": read_jsonl, ".json": read_json, ".csv": read_csv, ".tsv": read_csv}
READERS: dict[str, Callable[..., Iterator[Record]]] = {
    ".parquet": read_parquet,
    ".warc": read_warc,
    ".warc.gz": read_warc,
    ".warc.zst": read_warc,
    ".wet.gz": read_warc,
    **{suffix + packed: reader for suffix, reader in LINES.items() for packed in ("", ".gz", ".zst")},
    **dict.fromkeys(DOCUMENT_FORMATS, read_text),
}


def read_records(path: Path, span: Span | None = None) -> Iterator[Record]:
    """(line, record) of any file; a broken one ends in a BadRecord, after all that came before the break.

    span  one of `spans_of(path)`, to read but a piece of a large file
    """
    number, reader = 0, READERS.get(suffix_of(path), read_text)
    try:
        for number, record in reader(path) if span is None else reader(path, span):
            yield number, record
    except BROKEN as error:
        if isinstance(error, OSError) and error.errno is not None and isinstance(path, Path):  # not the file's fault
            raise MachineError("can't read the file", at=path, got=error.strerror) from error
        yield number + 1, BadRecord(str(path), number + 1, None, f"the file is broken from here on: {error}")
