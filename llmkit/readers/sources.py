"""List the files of a source, and group them into units for workers."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from llmkit.config.data import SourceFiles
from llmkit.errors import UserError
from llmkit.files import write_atomically
from llmkit.readers.documents import dataset_files, is_saved_dataset
from llmkit.readers.listing import list_files, root_of
from llmkit.readers.records import Span, count_lines_before, spans_of

Piece = tuple[str, Span | None]  # a file, or a span of one


def source_files(source: SourceFiles, skipped: Counter[str]) -> tuple[Path, list[Path]] | None:
    """Return (root, files) of a source, or None if `datasets` reads it.

    skipped  counts the files that are not read: see `list_files`
    """
    links = {"follow_links": source.follow_links}
    if source.path and is_saved_dataset(Path(source.path).expanduser()):
        return None
    if source.path:
        return root_of(source.path), list_files(source.path, source.include, source.exclude, skipped, **links)
    found = dataset_files(source.hf, source.config, source.split, skipped, **links)
    if found and (source.streaming or source.revision):
        raise UserError("streaming and revision have no effect on local files", at=source.hf, fix="delete them")
    if not found and source.follow_links:
        raise UserError("follow_links has an effect on a folder of files only", at=source.hf, fix="delete it")
    return found


def group_files(files: Iterable[Path], size: int, whole: bool = False) -> Iterator[tuple[list[Piece], int]]:
    """Yield (pieces, bytes) of units of about `size` bytes: small files together, large ones in spans.

    whole  put all files into one unit
    """
    pieces, total = [], 0
    for path in files:
        spans = [None] if whole else spans_of(path, size)
        piece_size = path.stat().st_size // len(spans)
        for span in spans:
            if total and total + piece_size > size and not whole:
                yield pieces, total
                pieces, total = [], 0
            pieces.append((str(path), span))
            total += piece_size
    yield pieces, total


def write_quarantine(units: Iterable[tuple[Iterable[Piece], Path]], out: Path) -> str:
    """Join the bad records of units in one file, with lines counted from the start of each source file.

    units  (pieces of a unit, JSON Lines of its bad records)

    Return the place and reason of the first bad record.
    """
    span_starts: dict[str, list[int]] = {}
    found = []
    for pieces, path in units:
        starts = {file: span[0] for file, span in pieces if span and not file.lower().endswith(".parquet")}
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if start := starts.get(record["path"], 0):
                span_starts.setdefault(record["path"], []).append(start)
            found.append((record, start))
    lines_before = {file: count_lines_before(Path(file), starts) for file, starts in span_starts.items()}
    for record, start in found:
        record["line"] += lines_before[record["path"]][start] if start else 0
    write_atomically(out, "".join(json.dumps(record) + "\n" for record, _ in found))
    if not found:
        return ""
    first = found[0][0]
    return f"{first['path']}:{first['line']} ({first['reason'][:200]})"
