"""The build: sources -> clean, kept, unique documents -> tokenizer -> token shards, a manifest and a report.

Work units go through the passes one after another, in as many processes as there are workers:
    A  read, clean, filter, scrub, sign   -> parts/<unit>.jsonl.zst, .npy signatures, .json counts
    B  find duplicates over all units     -> keep flags
    C  train or take the tokenizer       -> parts/tokenizer-<key>/
    D  encode what is kept                -> tokens/{train,val}/<source>/<unit>.bin + .idx
A unit's files appear whole or not at all and are named after everything that made them, so that a build which was
killed, or whose later settings changed, redoes only what it must; the result does not depend on the workers.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from llmkit.config import CorpusData
from llmkit.data.dedup import keep_longest, near_clusters
from llmkit.data.filters import RULES
from llmkit.data.report import make_funnel, report
from llmkit.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from llmkit.data.tokens import token_dtype
from llmkit.data.units import (
    VERSION,
    Unit,
    encode_unit,
    filter_unit,
    hash_of,
    make_units,
    read_part,
    seeded,
    split_text,
)
from llmkit.errors import DATA, UserError, did_you_mean, raise_all
from llmkit.run import lock, write_atomically

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


# ---- the whole ------------------------------------------------------------------------------------------------------


def over_units(function: Callable, jobs: list[tuple], workers: int, what: str) -> list[Any]:
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
    if not isinstance(data, CorpusData):
        raise UserError(
            "only a corpus is built beforehand", got=f"data.kind: {data.kind}",
            fix="`llmkit finetune` encodes fine-tuning data by itself",
        )  # fmt: skip
    if not data.sources:
        raise UserError("there is nothing to build", expected="data.sources", fix="name at least one source")
    check_filters(data)
    folder = Path(data.dir)
    units, named, recipe = make_recipe(data)
    if is_built(folder, recipe):
        say(f"data is built: {folder}/manifest.json")
        return read_manifest(folder)
    if (folder / "manifest.json").exists():
        say(f"{folder} holds another build, which this one replaces")
    with lock(folder, "another process is building this data", fix="wait for it, or choose another data.dir"):
        return build_units(data, units, named, recipe)


def make_recipe(data: CorpusData) -> tuple[list[Unit], Tokenizer | None, str]:
    """The work units, the named tokenizer if there is one, and a hash of all that the build depends on."""
    units = make_units(data)
    named = load_tokenizer(Path(data.tokenizer.path)) if data.tokenizer.path else None
    later = (data.split.model_dump(), data.tokenizer.model_dump(), named and named.sha256, data.seed)
    return units, named, hash_of(VERSION, [unit.part for unit in units], later, data.on_error.model_dump())


def needs_build(data: CorpusData) -> bool:
    """Whether `build_corpus` would have something to do."""
    return bool(data.sources) and not is_built(Path(data.dir), make_recipe(data)[2])


def is_built(folder: Path, recipe: str) -> bool:
    """Whether the folder holds a finished build of this recipe, the tokenizer included."""
    if not (folder / "manifest.json").exists() or read_manifest(folder)["recipe"] != recipe:
        return False
    tokenizer = folder / "tokenizer"
    there = (tokenizer / "tokenizer.json").is_file()
    return there and load_tokenizer(tokenizer).sha256 == read_manifest(folder)["tokenizer_sha256"]


def build_units(data: CorpusData, units: list[Unit], named: Tokenizer | None, recipe: str) -> dict[str, Any]:
    """All passes over all units; returns the manifest. What an earlier build has done and still fits is only read."""
    folder = Path(data.dir)
    workers = (os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count()) or 1
    workers = workers if data.workers == "auto" else data.workers
    started = time.perf_counter()
    parts = folder / "parts"
    parts.mkdir(parents=True, exist_ok=True)

    # A: read, clean, filter, scrub personal data, sign.
    counts = over_units(filter_unit, [(unit, data, parts) for unit in units], workers, "clean and filter")
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
    tokenizer, tokenizer_folder = make_tokenizer(data, parts, units, keep, splitting, named)
    # D: token shards.
    key = hash_of(recipe, tokenizer.sha256)
    jobs = [(unit, flags, folder, tokenizer_folder, *splitting, key) for unit, flags in zip(units, keep, strict=True)]
    shards = over_units(encode_unit, jobs, workers, "encode")

    splits: dict[str, Any] = {}
    for split in ("train", "val"):
        made = [shard[split] for shard in shards]
        splits[split] = {name: sum(one[name] for one in made) for name in ("documents", "tokens", "bytes")}
        splits[split]["files"] = [file for one in made for file in one["files"]]
    totals = {name: sum(row[name] for row in funnel.values()) for name in ("read", "quarantined", "kept")}
    totals["dropped"] = totals["read"] - totals["quarantined"] - totals["kept"]
    manifest = {
        "version": VERSION, "recipe": recipe, "dtype": token_dtype(len(tokenizer)).str, "vocab_size": len(tokenizer),
        "tokenizer_sha256": tokenizer.sha256,
        "split_by": "tail of every document" if by_tail else "document", "counts": totals, "funnel": funnel,
        "splits": splits, "fingerprint": hash_of([file["sha256"] for s in splits.values() for file in s["files"]]),
        "seconds": round(time.perf_counter() - started, 2), "workers": workers,
        "peak_mb": round(max(one["peak_mb"] for one in counts), 1),
    }  # fmt: skip
    write_atomically(folder / "val_documents.txt", "".join(f"{id}\n" for shard in shards for id in shard["held_out"]))
    write_atomically(folder / "report.md", report(manifest, counts))
    write_atomically(folder / "report.json", json.dumps({"funnel": funnel, "units": counts}, indent=1))
    bad = [record for one in counts for record in one["bad"]]
    write_atomically(folder / "quarantine.jsonl", "".join(json.dumps(record) + "\n" for record in bad))
    tokenizer.save(folder / "tokenizer")
    write_atomically(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    delete_earlier(folder, units, tokenizer_folder, {file["path"] for s in splits.values() for file in s["files"]})
    return manifest


def delete_earlier(folder: Path, units: list[Unit], tokenizer_folder: Path, shards: set[str]) -> None:
    """Delete what earlier builds left in parts/ and tokens/ and no manifest names any more."""
    current = {Path(file).stem for file in shards}
    for path in (folder / "tokens").rglob("*"):
        if path.is_file() and path.stem not in current:
            path.unlink()
    for path in (folder / "parts").iterdir():
        if path.is_dir() and path != tokenizer_folder:
            shutil.rmtree(path)
        elif path.is_file() and not path.name.startswith(tuple(f"{unit.part}." for unit in units)):
            path.unlink()


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


def make_tokenizer(
    data: CorpusData, parts: Path, units: list[Unit], keep: list, splitting: tuple, named: Tokenizer | None
) -> tuple[Tokenizer, Path]:
    """The tokenizer of the build and where it lies: the named one, or one trained on a sample of the train split."""
    made_of = named.sha256 if named else hash_of([unit.part for unit in units], data.tokenizer.model_dump(), splitting)
    folder = parts / f"tokenizer-{made_of[:16]}"
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder), folder
    size = sum(int(np.load(parts / f"{unit.part}.npy", mmap_mode="r")[:, 2].sum()) for unit in units)
    share = min(1.0, data.tokenizer.sample_mb * 1e6 / max(1, size))

    def sample() -> Iterable[str]:
        for unit, flags in zip(units, keep, strict=True):
            for record, wanted in zip(read_part(parts / f"{unit.part}.jsonl.zst"), flags, strict=True):
                if wanted and seeded(record["id"], data.seed + 1) < share:
                    yield split_text(record["id"], record["text"], *splitting)[0]

    tokenizer = named or train_bpe(iter(sample()), data.tokenizer.vocab_size)
    half = folder.with_name(folder.name + ".tmp")
    tokenizer.save(half)
    half.rename(folder)
    return tokenizer, folder


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
