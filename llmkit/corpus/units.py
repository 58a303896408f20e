"""Work units: pieces of sources that one worker takes through a pass by itself, and the files it leaves behind.

A unit's files appear whole or not at all, and are named after everything that made them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import zstandard

from llmkit.config.schema import CorpusData, Source
from llmkit.corpus.filters import PROFILES
from llmkit.corpus.scorers import evaluation_files
from llmkit.errors import DataError, UserError
from llmkit.files import file_stamps, folder_stamps, temporary_path
from llmkit.readers.documents import dataset_files, list_files, read_dataset, read_file, root_of
from llmkit.readers.records import BadRecord, Span, spans_of
from llmkit.types import Document

UNIT_BYTES = 32 * 2**20  # of source files in one work unit
VERSION = 7  # of the pipeline: another one redoes everything


@dataclass(frozen=True)
class Unit:
    """A piece of one source that a worker measures and later encodes by itself."""

    name: str  # <source>-<number>
    source: dict[str, Any]  # the Source section
    root: str  # what documents' ids are relative to
    pieces: tuple[tuple[str, Span | None], ...]  # files, or spans of them; empty: `datasets` reads it
    bytes: int  # of the files
    key: str  # a hash of everything that measuring depends on

    @property
    def part(self) -> str:
        return f"{self.name}-{self.key}"


def short_hash(*values: Any) -> str:
    """16 letters that change with any of the values."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def measured_rules(data: CorpusData, profile: str) -> list[str]:
    """The rules that a profile and the config's own thresholds look at."""
    return [*PROFILES[profile], *sorted(data.filter.rules.keys() - PROFILES[profile].keys())]


def measuring_key(data: CorpusData, source: Source) -> str:
    """A hash of all that measuring a source depends on. No threshold is in it: another one only decides anew."""
    filters, pii, near, evals = data.filter, data.pii, data.dedup.near, data.decontaminate
    libraries = [version(name) for name in ("ftfy", "resiliparse", "py3langid", "fastwarc")]
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
        evals and (evals.ngram, file_stamps(evaluation_files(evals.files))),
    )


def make_units(data: CorpusData) -> list[Unit]:
    """Cut every source into units of about UNIT_BYTES."""
    units = []
    for source in data.sources:
        key, section = measuring_key(data, source), source.model_dump()
        try:
            files = source_files(source, Path(data.dir))
        except UserError as error:
            error.fix = error.fix or f"correct the source {source.name} in the config"
            raise
        if files is None:
            stamps = folder_stamps(Path(source.hf).expanduser())
            size = sum(size for _, size, _ in stamps)
            units.append(Unit(f"{source.name}-000", section, "", (), size, short_hash(key, stamps)))
            continue
        root, paths = files
        for number, (pieces, size) in enumerate(group_files(paths, whole=source.limit is not None)):
            stamps = file_stamps({Path(path) for path, _ in pieces})
            made_of = short_hash(key, stamps, pieces)
            units.append(Unit(f"{source.name}-{number:03d}", section, str(root), tuple(pieces), size, made_of))
    return units


def source_files(source: Source, built: Path) -> tuple[Path, list[Path]] | None:
    """(root, files) of a source, without what a build left in `built`; None where the `datasets` library reads it."""
    if source.hf:
        found = dataset_files(source.hf, source.config, source.split)
        if found and (source.streaming or source.revision):
            raise UserError("streaming and revision mean nothing to local files", at=source.hf, fix="delete them")
        return found
    files = list_files(source.path, source.include, source.exclude)
    built = built.absolute()
    found = [file for file in files if not file.absolute().is_relative_to(built)]
    if not found:
        raise UserError("the source holds nothing but what was built from it", at=source.path, got=f"data.dir {built}")
    return root_of(source.path), found


def count_unknown_files(source: Source) -> dict[str, int]:
    """How many files of a source are of no known kind, by suffix."""
    found: Counter[str] = Counter()
    if source.path:
        list_files(source.path, source.include, source.exclude, found)
    return dict(found)


def group_files(files: list[Path], whole: bool) -> Iterator[tuple[list[tuple[str, Span | None]], int]]:
    """(pieces, bytes) of each unit: small files together, large ones in spans; `whole`: all in one, to be counted."""
    pieces, total = [], 0
    for path in files:
        spans = [None] if whole else spans_of(path, UNIT_BYTES)
        size = path.stat().st_size // len(spans)
        for span in spans:
            if total and total + size > UNIT_BYTES and not whole:
                yield pieces, total
                pieces, total = [], 0
            pieces.append((str(path), span))
            total += size
    yield pieces, total


def read_unit(unit: Unit) -> Iterator[Document | BadRecord]:
    """A unit's documents, at most the source's limit."""
    source = Source(**unit.source)
    if unit.pieces:
        place = {"root": Path(unit.root), "include": source.include, "exclude": source.exclude}
        found = (
            one
            for path, span in unit.pieces
            for one in read_file(Path(path), source=source.name, text_key=source.text_key, span=span, **place)
        )
    else:
        found = read_dataset(
            source.hf,
            source=source.name,
            config=source.config,
            split=source.split,
            streaming=source.streaming,
            text_key=source.text_key,
            revision=source.revision,
        )
    for taken, one in enumerate(found):
        if source.limit is not None and taken >= source.limit:
            return
        yield one


# ---- a unit's files -------------------------------------------------------------------------------------------------


class atomic_zst:
    """A writer of JSON lines into a .zst file that appears when the block ends well."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.half = path, temporary_path(path)

    def __enter__(self) -> Callable[[dict], None]:
        self.raw = self.half.open("wb")
        self.stream = zstandard.ZstdCompressor(level=3, write_checksum=True).stream_writer(self.raw, closefd=False)
        return lambda record: self.stream.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))

    def __exit__(self, kind, *_) -> None:
        try:
            self.stream.close()  # where a full disk may show
            os.fsync(self.raw.fileno())
        finally:
            self.raw.close()
        if kind is None:
            self.half.replace(self.path)


def read_zst(path: Path) -> Iterator[dict[str, Any]]:
    """The records that `atomic_zst` wrote."""
    with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
        rest = b""
        try:
            while block := stream.read(2**20):
                *lines, rest = (rest + block).split(b"\n")
                yield from map(orjson.loads, lines)
        except zstandard.ZstdError as error:
            raise DataError(
                f"a file of this build is damaged: {error}", at=path, fix="delete it and build again"
            ) from None


def save_array(path: Path, array: np.ndarray) -> None:
    """A .npy file that appears whole."""
    half = temporary_path(path)
    with half.open("wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    half.replace(path)


def load_array(path: Path, **options: Any) -> np.ndarray:
    return np.load(path, allow_pickle=False, **options)
