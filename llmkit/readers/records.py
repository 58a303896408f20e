"""Read files as streams of records: text, HTML, source code, JSON Lines, CSV, Parquet, WARC, compressed or not.

Whatever can't be read becomes a `BadRecord` with its location and the reason, so that nothing is lost silently. A path
may also be a `zipfile.Path`, a file inside a zip.
"""

import csv
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmkit.config.data import TableFormat
from llmkit.errors import DataError, MachineError
from llmkit.readers import packed
from llmkit.readers.decode import decode, parse_json
from llmkit.readers.packed import READ_ERRORS, open_bytes, size_after, stored_size, suffix_of
from llmkit.readers.tally import BadRecord, Record
from llmkit.readers.warc import read_warc

BOM = b"\xef\xbb\xbf"  # of UTF-8, which some programs write at the start of a file
MAX_JSON_BYTES = 256_000_000  # a .json array is parsed as a whole and takes about four times its size in memory

TEXT_SUFFIXES = tuple(".txt .text .md .markdown .rst .tex .org .adoc".split())
HTML_SUFFIXES = (".html", ".htm", ".xhtml")
CODE_SUFFIXES = tuple(
    ".py .pyi .c .h .cc .cpp .cxx .hpp .cu .cuh .m .rs .go .java .kt .scala .swift .cs .js .mjs .jsx .ts .tsx .css "
    ".scss .sh .bash .ps1 .rb .php .pl .lua .r .jl .sql .hs .ml .ex .erl .clj .lisp .f90 .zig .dart .v .proto .cmake "
    ".yaml .yml .toml .ini .cfg".split()
)


Span = tuple[int, int]  # part of a file, [start, stop): bytes of JSON Lines, row groups of Parquet


def spans_of(path: Path, size: int) -> list[Span | None]:
    """Split a large file into spans of about `size` bytes. Return [None] if it has to be read as a whole."""
    kind = suffix_of(path)
    if kind not in (".jsonl", ".ndjson", ".parquet") or path.stat().st_size <= size:
        return [None]
    if kind != ".parquet":
        return [(start, start + size) for start in range(0, path.stat().st_size, size)]
    try:
        with pq.ParquetFile(path) as file:
            groups = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
    except READ_ERRORS:
        return [None]  # reading it will report the error
    spans, start, total = [], 0, 0
    for i, group in enumerate(groups):
        total += group
        if total >= size or i == len(groups) - 1:
            spans.append((start, i + 1))
            start, total = i + 1, 0
    return spans or [None]


def count_lines_before(path: Path, starts: list[int]) -> dict[int, int]:
    """Count the lines of a file that begin before each of the offsets, in one pass.

    >>> count_lines_before(Path("/dev/null"), [0])
    {0: 0}
    """
    found, lines, at = {}, 0, 0
    with path.open("rb") as file:
        for start in sorted(starts):
            while at < start and (block := file.read(min(2**24, start - at))):
                lines, at = lines + block.count(b"\n"), at + len(block)
            file.seek(max(0, start - 1))
            found[start] = lines + (start > 0 and file.read(1) != b"\n")  # count a line that crosses the offset, too
            file.seek(at)
    return found


def read_lines(path: Path, span: Span | None = None) -> Iterator[tuple[int, int, bytes | BadRecord]]:
    """Yield (number, offset, line) of each line that begins in the span. A line that is too long is a BadRecord."""
    start, stop = span or (0, None)
    with open_bytes(path) as file:
        number, offset = 0, start
        if start:
            file.seek(start - 1)
            while (line := file.readline(packed.MAX_DOCUMENT_BYTES)) and not line.endswith(b"\n"):
                pass  # a line that crosses the start belongs to the previous span
            offset = file.tell()
        while (stop is None or offset < stop) and (line := file.readline(packed.MAX_DOCUMENT_BYTES + 1)):
            number, size = number + 1, len(line)
            if offset == 0 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                yield (
                    number,
                    offset,
                    BadRecord(str(path), number, offset, "UTF-16: convert the file to UTF-8", size_after(path, 0)),
                )
                return
            if size > packed.MAX_DOCUMENT_BYTES:
                while line and not line.endswith(b"\n"):  # skip its rest
                    line = file.readline(packed.MAX_DOCUMENT_BYTES)
                    size += len(line)
                line = BadRecord(str(path), number, offset, f"a line over {packed.MAX_DOCUMENT_BYTES:,} bytes", size)
            yield number, offset, line
            offset += size


def read_text(path: Path) -> Iterator[Record]:
    """Read a whole file as one record {text, format, encoding}."""
    with open_bytes(path) as file:
        data = file.read(packed.MAX_DOCUMENT_BYTES + 1)
    doc_format = DOCUMENT_FORMATS.get(suffix_of(path), "text")
    try:
        if len(data) > packed.MAX_DOCUMENT_BYTES:
            raise ValueError(
                f"over {packed.MAX_DOCUMENT_BYTES:,} bytes: split it, or convert it to a .jsonl of documents"
            )
        text, encoding = decode(data, html=doc_format == "html")
        text = text.replace("\r\n", "\n").replace("\r", "\n")  # as Python reads text files
        yield 1, {"text": text, "format": doc_format, "encoding": encoding}, len(data)
    except ValueError as error:
        yield 1, BadRecord(str(path), 1, 0, str(error), max(len(data), stored_size(path))), len(data)


def read_jsonl(path: Path, span: Span | None = None) -> Iterator[Record]:
    """Read one JSON object per line, skipping blank lines."""
    for number, offset, line in read_lines(path, span):
        if isinstance(line, BadRecord):
            yield number, line, line.size
        elif line.strip():
            try:
                record = as_record(parse_json(line.rstrip(b"\r\n")), path, number, offset, len(line))
            except ValueError as error:
                record = BadRecord(str(path), number, offset, str(error), len(line))
            yield number, record, len(line)


def read_json(path: Path) -> Iterator[Record]:
    """Read an array of records, a single record, or JSON Lines in a file named .json."""
    with open_bytes(path) as file:
        data, lines = file.readline(MAX_JSON_BYTES + 1), False
        with suppress(ValueError):
            lines = data.removeprefix(BOM).startswith(b"{") and isinstance(parse_json(data), dict)
        data += b"" if lines else file.read(MAX_JSON_BYTES + 1 - len(data))
    if lines:
        yield from read_jsonl(path)
        return
    if len(data) > MAX_JSON_BYTES:
        what, expected = "the .json file is too large to be parsed as a whole", f"<= {MAX_JSON_BYTES:,} bytes"
        fix = f"convert it to JSON Lines: jq -c '.[]' {path.name} > {path.stem}.jsonl"
        raise DataError(what, at=path, expected=expected, fix=fix)
    try:
        content = parse_json(data)
    except ValueError as error:
        yield 1, BadRecord(str(path), 1, 0, str(error), len(data)), len(data)
        return
    values = content if isinstance(content, list) else [content]
    size = len(data) // max(1, len(values))
    for number, value in enumerate(values, 1):
        yield number, as_record(value, path, number, None, size), size


def as_record(value: Any, path: Path, number: int, offset: int | None, size: int) -> dict[str, Any] | BadRecord:
    kinds = {list: "an array", str: "a string", int: "a number", float: "a number", bool: "a boolean"}
    reason = f"{kinds.get(type(value), 'null')}, not an object"
    return value if isinstance(value, dict) else BadRecord(str(path), number, offset, reason, size)


def read_csv(
    path: Path, header: list[str] | None = None, separator: str | None = None, quoted: bool = True
) -> Iterator[Record]:
    """Read the rows after a header line, quoted as in Excel.

    Columns are separated by commas, by tabs in .tsv files, and by semicolons if the header has some and no comma: so
    does Excel in countries that write 1,5 for 1.5.

    header     names of the columns of a file without such a line
    separator  between the columns, if it is another one
    quoted     whether quotes around a field have a meaning
    """
    csv.field_size_limit(packed.MAX_DOCUMENT_BYTES)  # for the whole process; the default is 131,072 characters

    bad_lines: list[BadRecord] = []  # bad lines of the file, which csv.reader does not get
    taken, damaged = 0, False  # bytes of the lines that it gets; whether the last row has replacement characters

    def lines() -> Iterator[str]:
        nonlocal taken, damaged
        for _, _, line in read_lines(path):
            if isinstance(line, BadRecord):
                bad_lines.append(replace(line, reason=f"bad CSV: {line.reason}"))
                continue
            taken += len(line)
            try:
                yield line.decode("utf-8-sig")
            except UnicodeDecodeError:  # decoded line by line: memory stays constant, and other lines may be UTF-8
                try:
                    yield line.decode("cp1252")
                except UnicodeDecodeError:
                    damaged = True
                    yield line.decode("utf-8", "replace")  # it may hold the quote that ends a field

    begin = next((line for _, _, line in read_lines(path) if isinstance(line, bytes) and line.strip()), b"")
    comma = ";" if b";" in begin and b"," not in begin else ","
    delimiter = separator or ("\t" if ".tsv" in suffix_of(path) else comma)
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    rows, number = csv.reader(lines(), delimiter=delimiter, quoting=quoting, strict=True), 1
    while True:
        before, damaged = taken, False
        try:
            row = next(rows, None)
            while bad_lines:
                bad = bad_lines.pop(0)
                yield bad.line, bad, bad.size
            if row is None:
                return
            if damaged:
                raise csv.Error("neither UTF-8 nor cp1252")
            if row and header is None:
                header = row
                check_columns(header, path)
            elif row:
                if row == header and number > 1:
                    raise csv.Error("the header line again")
                if len(row) != len(header):
                    raise csv.Error(f"{len(row)} fields, but the header has {len(header)}")
                yield number, dict(zip(header, row, strict=True)), taken - before
        except csv.Error as error:
            if header is None:  # no other row can be understood without it
                yield number, BadRecord(str(path), number, 0, f"bad CSV header: {error}", size_after(path, 0)), 0
                return
            # A quote that is never closed swallows the lines up to the next one.
            yield number, BadRecord(str(path), number, None, f"bad CSV: {error}", taken - before), taken - before
        number = rows.line_num + 1  # the first line of the next row


def check_columns(names: list[str], path: Path) -> None:
    """Raise DataError if two columns share a name, so that one would hide the other. One may have none: an index."""
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if repeated or not any(name.strip() for name in names):
        what = f"two columns are named {repeated[0]!r}" if repeated else "the columns have no names"
        raise DataError(what, at=f"{path}:1", got=", ".join(names)[:200], fix="give every column a name of its own")


def read_parquet(path: Path, span: Span | None = None) -> Iterator[Record]:
    """Read rows in batches. A damaged row group costs its remaining rows, and no other group's."""
    with path.open("rb") as raw, pq.ParquetFile(raw) as file:
        names, metadata = file.schema_arrow.names, file.metadata
        check_columns(names, path)
        start, stop = span or (0, file.num_row_groups)
        number = sum(metadata.row_group(i).num_rows for i in range(start))
        size = stored_size(path) // max(1, metadata.num_rows)
        for group in range(start, stop):
            end = number + metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(batch_size=256, row_groups=[group]):
                    columns = to_columns(batch)
                    for row in range(batch.num_rows):
                        number += 1
                        try:
                            values = (columns[n][row] if columns else batch[n][row].as_py() for n in names)
                            record = {n: drop_absent(value) for n, value in zip(names, values, strict=True)}
                        except UnicodeDecodeError:
                            record = BadRecord(str(path), number, None, "invalid UTF-8", size)
                        except (ValueError, OverflowError) as error:  # a date in the year 300,000
                            reason = f"a value that Python can't hold: {error}"
                            record = BadRecord(str(path), number, None, reason, size)
                        yield number, record, size
            except (OSError, pa.ArrowException) as error:
                reason, rows = f"the rest of row group {group} is damaged: {error}", end - number
                yield number + 1, BadRecord(str(path), number + 1, None, reason, rows * size, rows), rows * size
                number = end


def drop_absent(value: Any) -> Any:
    """Return a value of Arrow without the nulls that structs have for fields that only other rows have.

    >>> drop_absent([{"name": "f", "arguments": {"x": 1, "y": None}}])
    [{'name': 'f', 'arguments': {'x': 1}}]
    """
    if isinstance(value, dict):
        return {name: drop_absent(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list) and value and isinstance(value[0], dict | list):  # not of numbers, which may be many
        return [drop_absent(inner) for inner in value]
    return value


def to_columns(batch: pa.RecordBatch) -> dict[str, list] | None:
    """Convert all columns to Python values. Return None if any value fails; then convert row by row."""
    try:
        batch.validate(full=True)  # checks UTF-8
        return batch.to_pydict()
    except (pa.ArrowInvalid, ValueError, OverflowError):
        return None


# ---- any file -------------------------------------------------------------------------------------------------------

PACKED = ("", ".gz", ".zst")
DOCUMENT_FORMATS = {  # suffix -> format, for files that are one document
    suffix + ending: kind
    for kind, suffixes in {"text": TEXT_SUFFIXES, "html": HTML_SUFFIXES, "code": CODE_SUFFIXES}.items()
    for suffix in suffixes
    for ending in PACKED
}
RECORD_READERS = {".jsonl": read_jsonl, ".ndjson": read_jsonl, ".json": read_json, ".csv": read_csv, ".tsv": read_csv}
READERS: dict[str, Callable[..., Iterator[Record]]] = {
    ".parquet": read_parquet,
    **dict.fromkeys([f".{kind}{ending}" for kind in ("warc", "wet") for ending in PACKED], read_warc),
    **{suffix + ending: reader for suffix, reader in RECORD_READERS.items() for ending in PACKED},
    **dict.fromkeys(DOCUMENT_FORMATS, read_text),
}


def read_formatted(path: Path, how: TableFormat) -> Iterator[Record]:
    """Yield (line, record, bytes) of a file whose format is given beyond its suffix; see `read_records`."""
    if how.column_names or how.separator or how.quoting:
        rows = read_csv(path, how.column_names, how.separator, not how.quoting)
    else:
        rows = read_records(path)
    for number, record, size in rows:
        if how.field is None or isinstance(record, BadRecord):
            yield number, record, size
            continue
        inner = record.get(how.field)
        if not isinstance(inner, list):
            yield number, BadRecord(str(path), number, None, f"there is no list {how.field}", size), size
            continue
        for one in inner:
            yield number, as_record(one, path, number, None, size // len(inner)), size // len(inner)


def read_records(path: Path, span: Span | None = None) -> Iterator[Record]:
    """Yield (line, record, bytes) of any file. A damaged file gives the records before the damage, then a BadRecord.

    span  one of `spans_of(path)`, to read only a part of a large file
    """
    number, done, reader = 0, 0, READERS.get(suffix_of(path), read_text)
    try:
        if not stored_size(path):
            yield 1, BadRecord(str(path), 1, 0, "the file is empty"), 0
            return
        for number, record, size in reader(path) if span is None else reader(path, span):
            done += size
            yield number, record, size
    except READ_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None and isinstance(path, Path):  # from the system
            raise MachineError("can't read the file", at=path, got=error.strerror) from error
        reason, lost = f"the file is broken from here on: {error}", size_after(path, done)
        yield number + 1, BadRecord(str(path), number + 1, None, reason, lost), lost
