"""Split sources into work units, each processed by one worker, and read and write the files of a unit.

A unit's files are written atomically and named after a hash of all their inputs.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
import zstandard

from llmkit.config.data import CorpusData, Source
from llmkit.corpus.filters import PROFILES
from llmkit.errors import DataError, UserError
from llmkit.files import file_stamps, folder_stamps, open_atomically
from llmkit.readers.documents import read_dataset, read_file
from llmkit.readers.listing import Stamp, start_below
from llmkit.readers.ngrams import evaluation_key
from llmkit.readers.sources import Piece, group_files, source_files
from llmkit.readers.tally import BadRecord
from llmkit.types import Document

UNIT_BYTES = 32 * 2**20  # most source bytes in one work unit
VERSION = 13  # of the pipeline; increase it if results change for the same inputs, so that builds start over


@dataclass(frozen=True)
class Unit:
    """A work unit: a piece of one source that a worker measures and later encodes independently."""

    source: dict[str, Any]  # the Source section
    root: str  # the folder that document ids are relative to
    pieces: tuple[Piece, ...]  # empty if `datasets` reads the source
    bytes: int  # size of the files
    key: str  # hash of all inputs of pass A

    @property
    def part(self) -> str:
        """Return the part of the unit's file names before the first dot."""
        return f"{self.source['name']}-{self.key}"


def short_hash(*values: Any) -> str:
    """Return 16 hex digits of a hash of the values."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def measured_rules(data: CorpusData, profile: str) -> list[str]:
    """Return the names of the rules that a profile or the config's own thresholds use."""
    return [*PROFILES[profile], *sorted(data.filter.rules.keys() - PROFILES[profile].keys())]


def measuring_key(data: CorpusData, source: Source) -> str:
    """Hash all inputs of pass A for a source. Thresholds are left out, since only pass B uses them."""
    filters, pii, near, evals = data.filter, data.pii, data.dedup.near, data.decontaminate
    libraries = [version(name) for name in ("ftfy", "resiliparse", "trafilatura", "py3langid", "fastwarc")]
    return short_hash(
        VERSION,
        libraries,
        source.model_dump(exclude={"weight", "max_epochs"}),
        data.clean.model_dump(),
        measured_rules(data, source.profile),
        bool(filters.language),
        filters.words and file_stamps(path for path in [Path(filters.words.path).expanduser()] if path.is_file()),
        filters.classifier and (filters.classifier.label, folder_stamps(Path(filters.classifier.path).expanduser())),
        pii.kinds,
        pii.action if pii.kinds else None,
        near and (near.ngram, near.bands, near.rows),
        data.dedup.paragraphs,
        evals and (evals.ngram, evaluation_key(evals.files)),
    )


def make_units(data: CorpusData) -> tuple[list[Unit], dict[str, dict[str, int]]]:
    """Split every source into units of at most UNIT_BYTES. Return them and, by source, counts of the skipped files."""
    units, skipped = [], {}
    for source in data.sources:
        counts: Counter[str] = Counter()
        key, section = measuring_key(data, source), source.model_dump()
        try:
            files = exclude_build(source, source_files(source, counts), Path(data.dir))
        except UserError as error:
            error.fix = error.fix or f"correct the source {source.name} in the config"
            raise
        skipped[source.name] = dict(counts)
        if files is None:
            stamps = folder_stamps(Path(source.path or source.hf).expanduser())
            size = sum(size for _, size, _ in stamps)
            units.append(Unit(section, "", (), size, short_hash(key, stamps)))
            continue
        root, found = files
        for pieces, size in group_files(found, root, UNIT_BYTES, whole=source.limit is not None):
            unit_key = short_hash(key, {path: found[path] for path, _ in pieces}, pieces)
            units.append(Unit(section, str(root), tuple(pieces), size, unit_key))
    return units, skipped


def exclude_build(
    source: Source, files: tuple[Path, dict[str, Stamp]] | None, built: Path
) -> tuple[Path, dict[str, Stamp]] | None:
    """Exclude the files in the build's own folder from those of a source that is given by its path."""
    if not source.path or not files:
        return files
    root, built = files[0], built.absolute()
    start, below, inside = f"{root.absolute() / 'x'}"[:-1], start_below(root), f"{built}/"
    found = {file: stamp for file, stamp in files[1].items() if not f"{start}{file[below:]}".startswith(inside)}
    if not found:
        raise UserError("all files of the source are in data.dir itself", at=source.path, got=f"data.dir {built}")
    return root, found


def read_unit(unit: Unit) -> Iterator[Document | BadRecord]:
    """Yield a unit's documents and bad records, at most as many as the source's limit."""
    source = Source(**unit.source)
    if unit.pieces:
        options = {"root": Path(unit.root), "include": source.include, "exclude": source.exclude}
        found = (
            one
            for path, span in unit.pieces
            for one in read_file(Path(path), source=source.name, text_key=source.text_key, span=span, **options)
        )
    else:
        found = read_dataset(
            source.path or source.hf,
            source=source.name,
            config=source.config,
            split=source.split,
            streaming=source.streaming,
            text_key=source.text_key,
            revision=source.revision,
        )
    yield from islice(found, source.limit)


# ---- a unit's files -------------------------------------------------------------------------------------------------


@contextmanager
def open_zst_writer(path: Path) -> Iterator[Callable[[dict], int]]:
    """Open a .zst file of JSON lines atomically, and return the function that writes a record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
    with open_atomically(path) as file, compressor.stream_writer(file, closefd=False) as stream:
        yield lambda record: stream.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))


def read_zst(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records that `open_zst_writer` wrote."""
    with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
        rest = b""
        try:
            while block := stream.read(2**20):
                *lines, rest = (rest + block).split(b"\n")
                yield from map(orjson.loads, lines)
        except zstandard.ZstdError as error:
            fix = "delete it and build again"
            raise DataError(f"a file of this build is damaged: {error}", at=path, fix=fix) from None
