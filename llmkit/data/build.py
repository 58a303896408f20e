"""The build: sources -> clean, kept, unique documents -> tokenizer -> token shards, a manifest and a report.

Work units go through the passes one after another, in as many processes as there are workers:
    A  read, clean, filter, sign          -> parts/<unit>.jsonl.zst, .npy signatures, .json counts
    B  find duplicates over all units     -> keep flags
    C  train or take the tokenizer
    D  encode what is kept                -> tokens/{train,val}/<source>/<unit>.bin + .idx
A unit's files appear whole or not at all and are named after everything that made them, so that a build which was
killed, or whose later settings changed, redoes only what it must; the result does not depend on the workers.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import zstandard
from tqdm import tqdm

from llmkit.config import CorpusData, Source
from llmkit.data.batches import GOLDEN, MASK, mix
from llmkit.data.clean import STEPS, clean
from llmkit.data.dedup import exact_key, keep_longest, minhash_bands, near_clusters
from llmkit.data.documents import BadRecord, list_files, read_dataset, read_file
from llmkit.data.filters import RULES, first_reason
from llmkit.data.tokenizer import CHECKED, Tokenizer, load_tokenizer, train_bpe
from llmkit.data.tokens import token_dtype, write_shard
from llmkit.errors import DATA, UserError, did_you_mean, raise_all
from llmkit.run import count, write_atomically
from llmkit.types import Document

UNIT_BYTES = 32 * 2**20  # of source files in one work unit
EXAMPLES = 3  # of every reason to drop, in the report
WARN_DROP = 0.25  # a rule that drops more of a source than this is worth a look
VERSION = 1  # of the pipeline: another one redoes everything


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
        made_of = (
            VERSION,
            source.model_dump(),
            data.clean.model_dump(),
            data.filter.model_dump(),
            data.dedup.model_dump(),
        )
        if source.hf:
            units.append(Unit(f"{source.name}-000", source.model_dump(), (), hash_of(*made_of)))
            continue
        batches, size = [[]], 0
        for path in list_files(source.path, source.include, source.exclude):
            if size > UNIT_BYTES and source.limit is None:  # a limit counts over the whole source
                batches.append([])
                size = 0
            batches[-1].append(path)
            size += path.stat().st_size
        for number, files in enumerate(batches):
            stamps = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
            name = f"{source.name}-{number:03d}"
            units.append(Unit(name, source.model_dump(), tuple(map(str, files)), hash_of(*made_of, stamps)))
    return units


def read_unit(unit: Unit) -> Iterator[Document | BadRecord]:
    """A unit's documents, at most the source's limit."""
    source = Source(**unit.source)
    if source.hf:
        found = read_dataset(
            source.hf, source=source.name, config=source.config, split=source.split, streaming=source.streaming,
            text_key=source.text_key,
        )  # fmt: skip
    else:
        root = Path(source.path).expanduser()
        root = root if root.is_dir() else Path(source.path.partition("*")[0]).parent
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
    """Read, clean, filter and sign one unit; returns its counts. What another run has done is only read."""
    counts_path = parts / f"{unit.part}.json"
    if counts_path.exists():
        return json.loads(counts_path.read_text(encoding="utf-8"))
    steps = [step for step in STEPS if step != "html" or data.clean.html is not False]
    off = {"encoding": data.clean.fix_encoding, "unicode": data.clean.unicode, "control": data.clean.control,
           "whitespace": data.clean.whitespace}  # fmt: skip
    steps = [step for step in steps if off.get(step, True)]
    read, kept, text_bytes = 0, 0, 0
    reasons: Counter[str] = Counter()
    warnings: Counter[str] = Counter()
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
            if document.meta.get("encoding") == "cp1252":
                warnings["decoded as cp1252"] += 1
            if data.clean.html is True:
                document.meta["format"] = "html"
            document = clean(document, steps)
            reason = "empty" if not document.text else first_reason(document, unit.source["profile"], data.filter.rules)
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
        "dropped": dict(reasons), "warnings": dict(warnings), "examples": examples, "bad": bad, "bytes": text_bytes,
        "cpu_seconds": time.process_time() - started,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }  # fmt: skip
    write_atomically(counts_path, json.dumps(counts))
    return counts


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


# ---- pass B ---------------------------------------------------------------------------------------------------------


def find_duplicates(tables: list[np.ndarray], *, exact: bool, near: bool) -> tuple[np.ndarray, np.ndarray]:
    """(exact, near): True for every document, over all units in order, that is dropped as a duplicate."""
    table = np.concatenate(tables)
    is_exact = np.zeros(len(table), dtype=bool)
    if exact and len(table):
        _, first = np.unique(table[:, :2], axis=0, return_index=True)
        is_exact[:] = True
        is_exact[first] = False
    is_near = np.zeros(len(table), dtype=bool)
    if near and len(table):
        rest = np.flatnonzero(~is_exact)
        keep = keep_longest(near_clusters(table[rest, 3:]), table[rest, 2].astype(np.int64))
        is_near[rest[~keep]] = True
    return is_exact, is_near


# ---- pass D ---------------------------------------------------------------------------------------------------------


def split_text(id: str, text: str, val_fraction: float, seed: int, by_tail: bool) -> tuple[str, str]:
    """(train, val) text of a document: whole on one side, or, where documents are too few, its tail to val."""
    if not by_tail:
        return ("", text) if seeded(id, seed) < val_fraction else (text, "")
    cut = round(len(text) * (1 - val_fraction))
    cut = text.rfind("\n", 0, cut) + 1 or cut
    return text[:cut], text[cut:]


def encode_unit(
    unit: Unit, keep: np.ndarray, folder: Path, val_fraction: float, seed: int, by_tail: bool, key: str
) -> dict[str, Any]:
    """Encode one unit's kept documents into a shard of each split; returns files and counts."""
    done = folder / "parts" / f"{unit.part}.tokens-{key}.json"
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(folder / "tokenizer")
    dtype = token_dtype(len(tokenizer))
    texts: dict[str, list[str]] = {"train": [], "val": []}
    for record, wanted in zip(read_part(folder / "parts" / f"{unit.part}.jsonl.zst"), keep, strict=True):
        if wanted:
            for split, text in zip(
                texts, split_text(record["id"], record["text"], val_fraction, seed, by_tail), strict=True
            ):
                if text:
                    texts[split].append(text)
    tokenizer.agrees([text[:10_000] for text in texts["train"][:CHECKED]])
    end = np.array([tokenizer.eos_id], dtype=np.uint32)
    result: dict[str, Any] = {}
    for split, chosen in texts.items():
        path = folder / "tokens" / split / unit.source["name"] / unit.name
        documents = (np.concatenate((ids, end)) for ids in encode_in_blocks(tokenizer, chosen))
        documents_written, tokens = write_shard(path, documents, dtype)
        files = []
        if tokens:
            binary = path.with_suffix(".bin")
            with binary.open("rb") as file:
                checksum = hashlib.file_digest(file, "sha256").hexdigest()
            files = [{"path": str(binary.relative_to(folder)), "bytes": binary.stat().st_size, "sha256": checksum}]
        size = sum(len(text.encode("utf-8", "replace")) for text in chosen)
        result[split] = {"documents": documents_written, "tokens": tokens, "bytes": size, "files": files}
    write_atomically(done, json.dumps(result))
    return result


def encode_in_blocks(tokenizer: Tokenizer, texts: list[str], size: int = 256) -> Iterator[np.ndarray]:
    for start in range(0, len(texts), size):
        yield from tokenizer.encode_batch(texts[start : start + size])


# ---- the whole ------------------------------------------------------------------------------------------------------


def over_units(function: Callable, jobs: list[tuple], workers: int, what: str, say: Callable[[str], None]) -> list[Any]:
    """function(*job) for every job, in spawned processes where there is more than one of each; results in order."""
    if workers == 1 or len(jobs) <= 1:
        return [function(*job) for job in tqdm(jobs, desc=what, disable=None, leave=False)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context) as pool:
        futures = [pool.submit(function, *job) for job in jobs]
        return [future.result() for future in tqdm(futures, desc=what, disable=None, leave=False)]


def check_filters(data: CorpusData) -> None:
    """Rules that do not exist, and thresholds that are neither low nor high."""
    errors = []
    for rule, limits in data.filter.rules.items():
        if rule not in RULES:
            hint = did_you_mean(rule, RULES) or f"one of: {', '.join(RULES)}"
            errors.append(UserError("data.filter.rules has an unknown rule", got=rule, fix=hint))
        elif limits is not False and limits.keys() - {"low", "high"}:
            errors.append(UserError(f"data.filter.rules.{rule} takes low and high", got=", ".join(limits)))
    raise_all(errors)


def build_corpus(data: CorpusData, *, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Build data.dir from data.sources, or return the manifest of the same build that is already there."""
    if not data.sources:
        raise UserError("there is nothing to build", expected="data.sources", fix="name at least one source")
    check_filters(data)
    folder = Path(data.dir)
    units = make_units(data)
    recipe = hash_of(
        VERSION, [unit.part for unit in units], data.split.model_dump(), data.tokenizer.model_dump(), data.seed
    )
    manifest_path = folder / "manifest.json"
    if manifest_path.exists() and read_manifest(folder)["recipe"] == recipe:
        say(f"data is built: {folder}/manifest.json")
        return read_manifest(folder)
    workers = (os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count()) or 1
    workers = workers if data.workers == "auto" else data.workers
    started = time.perf_counter()
    parts = folder / "parts"
    parts.mkdir(parents=True, exist_ok=True)

    # A: read, clean, filter, sign.
    counts = over_units(filter_unit, [(unit, data, parts) for unit in units], workers, "clean and filter", say)
    stop_on_bad_records(data, counts, folder)
    # B: duplicates.
    tables = [np.load(parts / f"{unit.part}.npy", allow_pickle=False) for unit in units]
    is_exact, is_near = find_duplicates(tables, exact=data.dedup.exact, near=bool(data.dedup.near))
    borders = np.cumsum([len(table) for table in tables])[:-1]
    exact, near = np.split(is_exact, borders), np.split(is_near, borders)
    keep = [~(e | n) for e, n in zip(exact, near, strict=True)]
    funnel = make_funnel(counts, exact, near, keep)
    kept = sum(row["kept"] for row in funnel.values())
    if kept == 0:
        dropped = sum((Counter(row["dropped"]) for row in funnel.values()), Counter())
        raise UserError(
            "no document is left", at=folder, got=", ".join(f"{n} {rule}" for rule, n in dropped.most_common()),
            fix="loosen the profile or data.filter.rules", code=DATA,
        )  # fmt: skip
    # C: the tokenizer.
    by_tail = kept * data.split.val_fraction < 4  # a split of whole documents would leave val to chance
    splitting = (data.split.val_fraction, data.seed, by_tail)
    tokenizer = make_tokenizer(data, folder, units, keep, splitting)
    # D: token shards.
    key = hash_of(recipe, hashlib.sha256(tokenizer.rust.to_str().encode()).hexdigest(), is_exact.tobytes().hex()[:64])
    jobs = [(unit, flags, folder, *splitting, key) for unit, flags in zip(units, keep, strict=True)]
    shards = over_units(encode_unit, jobs, workers, "encode", say)

    splits: dict[str, Any] = {}
    for split in ("train", "val"):
        made = [shard[split] for shard in shards]
        splits[split] = {name: sum(one[name] for one in made) for name in ("documents", "tokens", "bytes")}
        splits[split]["files"] = [file for one in made for file in one["files"]]
    totals = {name: sum(row[name] for row in funnel.values()) for name in ("read", "quarantined", "kept")}
    totals["dropped"] = totals["read"] - totals["quarantined"] - totals["kept"]
    manifest = {
        "version": VERSION, "recipe": recipe, "dtype": token_dtype(len(tokenizer)).str, "vocab_size": len(tokenizer),
        "split_by": "tail of every document" if by_tail else "document", "counts": totals, "funnel": funnel,
        "splits": splits, "fingerprint": hash_of([file["sha256"] for s in splits.values() for file in s["files"]]),
        "seconds": round(time.perf_counter() - started, 2), "workers": workers,
        "peak_mb": round(max(one["peak_mb"] for one in counts), 1),
    }  # fmt: skip
    write_atomically(folder / "report.md", report(manifest, counts))
    write_atomically(folder / "report.json", json.dumps({"funnel": funnel, "units": counts}, indent=1))
    write_atomically(
        folder / "quarantine.jsonl", "".join(json.dumps(bad) + "\n" for one in counts for bad in one["bad"])
    )
    write_atomically(manifest_path, json.dumps(manifest, indent=2) + "\n")
    return manifest


def stop_on_bad_records(data: CorpusData, counts: list[dict], folder: Path) -> None:
    """Raise when records could not be read and the config does not allow that many."""
    bad = [record for one in counts for record in one["bad"]]
    read = sum(one["read"] for one in counts)
    most = 0.0 if data.on_error.mode == "fail" else data.on_error.max_bad_fraction
    if bad and len(bad) > most * read:
        first = bad[0]
        reasons = Counter(record["reason"] for record in bad)
        raise UserError(
            f"{len(bad)} of {read} records can't be read", at=f"{first['path']}:{first['line']} and others",
            got=", ".join(f"{number} {reason}" for reason, number in reasons.most_common()),
            fix="mend the files, or raise data.on_error.max_bad_fraction", code=DATA,
        )  # fmt: skip


def make_funnel(counts: list[dict], exact: list, near: list, keep: list) -> dict[str, dict[str, Any]]:
    """By source: read = quarantined + dropped by every rule + kept, which is asserted."""
    funnel: dict[str, dict[str, Any]] = {}
    for one, e, n, k in zip(counts, exact, near, keep, strict=True):
        row = funnel.setdefault(one["source"], {"read": 0, "quarantined": 0, "dropped": {}, "kept": 0, "warnings": {}})
        row["read"] += one["read"]
        row["quarantined"] += one["quarantined"]
        row["kept"] += int(k.sum())
        dropped = one["dropped"] | {"exact duplicate": int(e.sum()), "near duplicate": int(n.sum())}
        row["dropped"] = dict(Counter(row["dropped"]) + Counter(dropped))
        row["warnings"] = dict(Counter(row["warnings"]) + Counter(one["warnings"]))
    for source, row in funnel.items():
        assert row["read"] == row["quarantined"] + sum(row["dropped"].values()) + row["kept"], source
    return funnel


def make_tokenizer(data: CorpusData, folder: Path, units: list[Unit], keep: list, splitting: tuple) -> Tokenizer:
    """The tokenizer of the build: trained on a seeded sample of the train split's text, or the one that is named."""
    if data.tokenizer.path:
        tokenizer = load_tokenizer(Path(data.tokenizer.path))
        tokenizer.save(folder / "tokenizer")
        return tokenizer
    key = hash_of([unit.part for unit in units], data.tokenizer.model_dump(), splitting)
    stamp = folder / "tokenizer" / "made_of"
    if stamp.exists() and stamp.read_text() == key:
        return load_tokenizer(folder / "tokenizer")
    size = sum(int(np.load(folder / "parts" / f"{unit.part}.npy", mmap_mode="r")[:, 2].sum()) for unit in units)
    share = min(1.0, data.tokenizer.sample_mb * 1e6 / max(1, size))

    def sample() -> Iterable[str]:
        for unit, flags in zip(units, keep, strict=True):
            for record, wanted in zip(read_part(folder / "parts" / f"{unit.part}.jsonl.zst"), flags, strict=True):
                if wanted and seeded(record["id"], data.seed + 1) < share:
                    yield split_text(record["id"], record["text"], *splitting)[0]

    tokenizer = train_bpe(iter(sample()), data.tokenizer.vocab_size)
    tokenizer.save(folder / "tokenizer")
    stamp.write_text(key)
    return tokenizer


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished build."""
    path = folder / "manifest.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            "there is no built data", at=folder, fix="name data.sources, or run `llmkit data build CONFIG`", code=DATA
        ) from None
    except ValueError as error:
        raise UserError(f"the manifest can't be read: {error}", at=path, code=DATA) from None


def report(manifest: dict[str, Any], counts: list[dict]) -> str:
    """What went in, what was dropped and why, what came out: Markdown."""
    lines = ["# Data report", "", "| source | read | quarantined | dropped | kept |", "|---|---|---|---|---|"]
    for source, row in manifest["funnel"].items():
        dropped = sum(row["dropped"].values())
        lines.append(f"| {source} | {row['read']} | {row['quarantined']} | {dropped} | {row['kept']} |")
    lines += ["", "| split | documents | tokens | MB | characters a token |", "|---|---|---|---|---|"]
    for split, part in manifest["splits"].items():
        per_token = part["bytes"] / max(1, part["tokens"])
        lines.append(
            f"| {split} | {part['documents']} | {count(part['tokens'])} | {part['bytes'] / 1e6:.2f} | {per_token:.2f} bytes |"
        )
    seconds = sum(one["cpu_seconds"] for one in counts)
    size = sum(one["bytes"] for one in counts) / 1e6
    lines += ["", f"Split by {manifest['split_by']}; vocabulary {manifest['vocab_size']}; {manifest['seconds']} s with "
              f"{manifest['workers']} workers, cleaning and signing {size / max(seconds, 1e-9):.1f} MB per CPU-second, "
              f"{manifest['peak_mb']:.0f} MB peak memory a worker."]  # fmt: skip
    for source, row in manifest["funnel"].items():
        lines += ["", f"## {source}", ""]
        lines += [f"- warning: {number} documents {what}" for what, number in row["warnings"].items()]
        for rule, number in sorted(row["dropped"].items(), key=lambda item: -item[1]):
            share = number / row["read"]
            lines.append(
                f"- dropped {number} ({share:.1%}) by `{rule}`" + (" - **look at these**" if share > WARN_DROP else "")
            )
            shown = [e for one in counts if one["source"] == source for e in one["examples"].get(rule, [])][:EXAMPLES]
            lines += [f"  - `{e['id']}`: {e['why']}: {e['text'][:100]!r}" for e in shown]
    lines += ["", "Names and addresses of people are not looked for."]
    return "\n".join(lines) + "\n"
