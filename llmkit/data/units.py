"""Work units: a piece of a source that one worker reads, cleans, filters, signs, and later encodes, by itself.

A unit's files appear whole or not at all, and are named after everything that made them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import zstandard

from llmkit.config import CorpusData, Pii, Source
from llmkit.data.batches import GOLDEN, MASK, mix
from llmkit.data.clean import STEPS, clean
from llmkit.data.dedup import exact_key, minhash_bands
from llmkit.data.documents import list_files, read_dataset, read_file, root_of
from llmkit.data.filters import first_reason
from llmkit.data.pii import scrub
from llmkit.data.records import GUESSED_ENCODINGS, BadRecord
from llmkit.data.tokenizer import CHECKED, load_tokenizer
from llmkit.data.tokens import token_dtype, write_shard
from llmkit.errors import UserError
from llmkit.run import file_sha256, write_atomically
from llmkit.types import Document

UNIT_BYTES = 32 * 2**20  # of source files in one work unit
EXAMPLES = 3  # of every reason to drop, in the report
VERSION = 4  # of the pipeline: another one redoes everything


@dataclass(frozen=True)
class Unit:
    """A piece of one source that a worker takes through passes A and D by itself."""

    name: str  # <source>-<number>
    source: dict[str, Any]  # the Source section
    files: tuple[str, ...]  # empty: the source is a Hugging Face dataset
    key: str  # a hash of everything that pass A depends on

    @property
    def part(self) -> str:
        return f"{self.name}-{self.key}"


def hash_of(*values: Any) -> str:
    """16 letters that change with any of the values."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def seeded(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on text and seed alone."""
    digest = int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "little")
    return mix((digest + seed * GOLDEN) & MASK) / 2**64


def make_units(data: CorpusData) -> list[Unit]:
    """Cut every source into units of about UNIT_BYTES."""
    units = []
    for source in data.sources:
        sections = (data.clean, data.filter, data.pii, data.dedup)
        made_of = (VERSION, source.model_dump(), [section.model_dump() for section in sections])
        if source.hf:
            folder = Path(source.hf).expanduser()
            stamps = stamps_of(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
            units.append(Unit(f"{source.name}-000", source.model_dump(), (), hash_of(*made_of, stamps)))
            continue
        batches, size = [[]], 0
        try:
            files = list_files(source.path, source.include, source.exclude)
        except UserError as error:
            error.fix = error.fix or f"correct the source {source.name} in the config"
            raise
        for path in files:
            if size > UNIT_BYTES and source.limit is None:  # a limit counts over the whole source
                batches.append([])
                size = 0
            batches[-1].append(path)
            size += path.stat().st_size
        for number, files in enumerate(batches):
            name = f"{source.name}-{number:03d}"
            units.append(Unit(name, source.model_dump(), tuple(map(str, files)), hash_of(*made_of, stamps_of(files))))
    return units


def stamps_of(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """What tells whether files have changed: their names, sizes and times."""
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(paths)]


def read_unit(unit: Unit) -> Iterator[Document | BadRecord]:
    """A unit's documents, at most the source's limit."""
    source = Source(**unit.source)
    if source.hf:
        found = read_dataset(
            source.hf, source=source.name, config=source.config, split=source.split, streaming=source.streaming,
            text_key=source.text_key,
        )  # fmt: skip
    else:
        root = root_of(source.path)
        found = (
            one
            for path in unit.files
            for one in read_file(Path(path), source=source.name, root=root, text_key=source.text_key)
        )
    for taken, one in enumerate(found):
        if source.limit is not None and taken >= source.limit:
            return
        yield one


# ---- pass A ---------------------------------------------------------------------------------------------------------


def filter_unit(unit: Unit, data: CorpusData, parts: Path) -> dict[str, Any]:
    """Read, clean, filter, scrub and sign one unit; returns its counts. What another run has done is only read."""
    counts_path = parts / f"{unit.part}.json"
    if counts_path.exists():
        return json.loads(counts_path.read_text(encoding="utf-8"))
    wanted = {
        "html": data.clean.html, "encoding": data.clean.fix_encoding, "unicode": data.clean.unicode,
        "control": data.clean.control, "whitespace": data.clean.whitespace,
    }  # fmt: skip
    steps = [step for step in STEPS if wanted[step]]
    read, kept, text_bytes = 0, 0, 0
    reasons: Counter[str] = Counter()
    warnings: Counter[str] = Counter()
    pii: Counter[str] = Counter()
    kinds = tuple(kind for kind in data.pii.kinds if kind != "phone" or unit.source["profile"] != "code")
    examples: dict[str, list] = {}
    bad: list[dict] = []
    exact, bands, lengths = [], [], []
    started = time.process_time()
    with (
        atomic_zst(parts / f"{unit.part}.jsonl.zst") as write,
        atomic_zst(parts / f"{unit.part}.dropped.jsonl.zst") as write_dropped,
    ):
        for document in read_unit(unit):
            read += 1
            if isinstance(document, BadRecord):
                bad.append(vars(document) | {"source": unit.source["name"]})
                continue
            if document.meta.get("encoding") in GUESSED_ENCODINGS:
                warnings[f"decoded as {document.meta['encoding']}"] += 1
            if data.clean.html is True:
                document.meta["format"] = "html"
            document = clean(document, steps)
            reason = "empty" if not document.text else first_reason(document, unit.source["profile"], data.filter.rules)
            if not reason and kinds:
                document.text, found = scrub(document.text, kinds, data.pii.action)
                reason = too_personal(found.total(), data.pii)
                pii.update(found)
            if reason:
                rule = reason.split(" ", 1)[0]
                reasons[rule] += 1
                if len(examples.setdefault(rule, [])) < EXAMPLES:
                    examples[rule].append({"id": document.id, "why": reason, "text": document.text[:200]})
                write_dropped({"id": document.id, "why": reason, "text": document.text})
                continue
            write({"id": document.id, "text": document.text})
            kept += 1
            size = len(document.text.encode("utf-8", "replace"))
            text_bytes += size
            lengths.append(size)
            exact.append(np.frombuffer(exact_key(document.text), dtype="<u8"))
            if data.dedup.near:
                near = data.dedup.near
                bands.append(minhash_bands(document.text, ngram=near.ngram, bands=near.bands, rows=near.rows))
    width = data.dedup.near.bands if data.dedup.near else 0
    table = np.zeros((len(lengths), 3 + width), dtype="<u8")  # two words of the exact key, the size, the bands
    if lengths:
        table[:, :2], table[:, 2] = exact, lengths
        if width:
            table[:, 3:] = bands
    half = parts / f"{unit.part}.npy.tmp"
    with half.open("wb") as file:
        np.save(file, table, allow_pickle=False)
    half.replace(parts / f"{unit.part}.npy")
    counts = {
        "unit": unit.name, "source": unit.source["name"], "read": read, "passed": kept, "quarantined": len(bad),
        "dropped": dict(reasons), "warnings": dict(warnings), "pii": dict(pii), "examples": examples, "bad": bad,
        "bytes": text_bytes, "cpu_seconds": time.process_time() - started,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }  # fmt: skip
    write_atomically(counts_path, json.dumps(counts))
    return counts


def too_personal(found: int, pii: Pii) -> str | None:
    """Why a document with so many findings is dropped, if it is."""
    most = 0 if pii.action == "drop" else pii.drop_above
    return f"pii {found} > {most}" if found > most else None


class atomic_zst:
    """A writer of JSON lines into a .zst file that appears when the block ends well."""

    def __init__(self, path: Path):
        self.path, self.half = path, path.with_name(path.name + ".tmp")

    def __enter__(self) -> Callable[[dict], None]:
        self.raw = self.half.open("wb")
        self.stream = zstandard.ZstdCompressor(level=3).stream_writer(self.raw, closefd=False)
        return lambda record: self.stream.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))

    def __exit__(self, kind, *_) -> None:
        self.stream.close()
        os.fsync(self.raw.fileno())
        self.raw.close()
        if kind is None:
            self.half.replace(self.path)


def read_part(path: Path) -> Iterator[dict[str, Any]]:
    """The records that `atomic_zst` wrote."""
    with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
        rest = b""
        while block := stream.read(2**20):
            *lines, rest = (rest + block).split(b"\n")
            yield from map(orjson.loads, lines)


# ---- pass D ---------------------------------------------------------------------------------------------------------


def split_text(id: str, text: str, val_fraction: float, seed: int, by_tail: bool) -> tuple[str, str]:
    """(train, val) text of a document: whole on one side, or, where documents are too few, its tail to val."""
    if not by_tail:
        return ("", text) if seeded(id, seed) < val_fraction else (text, "")
    cut = round(len(text) * (1 - val_fraction))
    cut = text.rfind("\n", 0, cut) + 1 or cut
    return text[:cut], text[cut:]


def encode_unit(
    unit: Unit, keep: np.ndarray, folder: Path, tokenizer_folder: Path, val_fraction: float, seed: int, by_tail: bool,
    key: str,
) -> dict[str, Any]:  # fmt: skip
    """Encode one unit's kept documents into a shard of each split; returns files and counts."""
    done = folder / "parts" / f"{unit.part}.tokens-{key}.json"
    if done.exists():
        result = json.loads(done.read_text(encoding="utf-8"))
        if all((folder / file["path"]).exists() for split in ("train", "val") for file in result[split]["files"]):
            return result
    tokenizer = load_tokenizer(tokenizer_folder)
    dtype = token_dtype(len(tokenizer))
    held_out: list[str] = []
    sizes = Counter()

    def texts(split: int) -> Iterator[str]:
        """The texts of one split, read again for each, so that memory does not grow with the unit."""
        for record, wanted in zip(read_part(folder / "parts" / f"{unit.part}.jsonl.zst"), keep, strict=True):
            text = split_text(record["id"], record["text"], val_fraction, seed, by_tail)[split] if wanted else ""
            if text:
                sizes[split] += len(text.encode("utf-8", "replace"))
                held_out.extend([record["id"]] * split)
                yield text

    tokenizer.agrees([text[:10_000] for text in itertools.islice(texts(0), CHECKED)])
    sizes.clear()
    result: dict[str, Any] = {"held_out": held_out}
    for split, name in enumerate(("train", "val")):
        path = folder / "tokens" / name / unit.source["name"] / f"{unit.name}-{key}"
        documents, tokens = write_shard(path, tokenizer.encode_documents(texts(split)), dtype)
        files = []
        if tokens:
            binary = path.with_suffix(".bin")
            entry = {"path": str(binary.relative_to(folder)), "bytes": binary.stat().st_size}
            files = [entry | {"sha256": file_sha256(binary)}]
        result[name] = {"documents": documents, "tokens": tokens, "bytes": sizes[split], "files": files}
    write_atomically(done, json.dumps(result))
    return result
