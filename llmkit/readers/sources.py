"""List the files of a source, and group them into units for workers."""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from llmkit.config.data import SourceFiles
from llmkit.errors import UserError
from llmkit.files import write_atomically
from llmkit.readers.documents import dataset_files, is_saved_dataset
from llmkit.readers.listing import Stamp, find_stamps, root_of, start_below
from llmkit.readers.records import Span, count_lines_before, spans_of

Piece = tuple[str, Span | None]  # a file, or a span of one


def source_files(source: SourceFiles, skipped: Counter[str]) -> tuple[Path, dict[str, Stamp]] | None:
    """Return (root, files) of a source, or None if `datasets` reads it.

    skipped  counts the files that are not read: see `find_stamps`
    """
    links = {"follow_links": source.follow_links}
    if source.path and is_saved_dataset(Path(source.path).expanduser()):
        return None
    if source.path:
        return root_of(source.path), find_stamps(source.path, source.include, source.exclude, skipped, **links)
    found = dataset_files(source.hf, source.config, source.split, skipped, **links)
    if found and (source.streaming or source.revision):
        raise UserError("streaming and revision have no effect on local files", at=source.hf, fix="delete them")
    if not found and source.follow_links:
        raise UserError("follow_links has an effect on a folder of files only", at=source.hf, fix="delete it")
    return found and (found[0], stamps_of(found[1]))


def stamps_of(files: Iterable[Path]) -> dict[str, Stamp]:
    return {str(file): (stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()]}


def group_files(
    files: dict[str, Stamp], root: Path, most: int, whole: bool = False
) -> Iterator[tuple[list[Piece], int]]:
    """Yield (pieces, bytes) of units of at most `most` bytes, in order: small files together, large ones in spans.

    root   the folder of the files, below which their names decide where units end; see `cut_by_names`
    whole  put all files into one unit
    """
    pieces, sizes, names, below = [], [], [], start_below(root)
    for path, (size, _) in files.items():
        spans = [None] if whole or size <= most else spans_of(Path(path), most)
        pieces += [(path, span) for span in spans]
        sizes += [size // len(spans)] * len(spans)
        names += [f"{path[below:]} {span and span[0]}" for span in spans]
    for start, stop in [(0, len(pieces))] if whole else cut_by_names(names, sizes, most):
        yield pieces[start:stop], sum(sizes[start:stop])


def cut_by_names(names: list[str], sizes: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Yield the (start, stop) of groups of pieces with at most `most` bytes, half as many on average, in order.

    All pieces are cut in two after the one whose name has the least hash, and each part again while it is too large.
    So a cut depends on no piece that is far from it: one that is new or changed changes groups of 2 * `most` bytes and
    its own at most. Only a piece that has more than `most` bytes itself makes a group with more.
    """
    hashes = [hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest() for name in names]
    ends, parts = list(itertools.accumulate(sizes, initial=0)), [(0, len(names))]
    while parts:
        start, stop = parts.pop()
        if ends[stop] - ends[start] <= most or stop - start == 1:
            yield start, stop
        else:
            cut = min(range(start, stop - 1), key=hashes.__getitem__) + 1
            parts += [(cut, stop), (start, cut)]


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
