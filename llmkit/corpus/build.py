"""The build: sources -> clean, kept, unique documents -> tokenizer -> token shards, a manifest and a report.

Work units go through the passes one after another, in as many processes as there are workers:
    A  measure   read, clean, scrub, score, sign          -> parts/<unit>.jsonl.zst, .scores.npy, .bands.npy ...
    B  decide    thresholds, duplicates, contamination    -> parts/<unit>.fate.npy; no text is read
    C  tokenizer train one on a sample, or take one       -> parts/tokenizer-<key>/
    D  encode    what is kept                             -> tokens/{train,val}/<source>/<unit>.bin + .idx, dropped/
A unit's files appear whole or not at all and are named after everything that made them, so that a build which was
killed, or whose later settings changed, redoes only what it must; the result does not depend on the workers.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.config.schema import CorpusData, OnError
from llmkit.corpus.decide import VAL, Decision, count_fates, decide, draw, limits_of
from llmkit.corpus.encode import encode_unit, kept_texts, split_text
from llmkit.corpus.engine import Pool, open_pool
from llmkit.corpus.filters import RULES
from llmkit.corpus.measure import Stopwatch, measure_unit, peak_mb, size_of
from llmkit.corpus.report import make_funnel, report
from llmkit.corpus.scorers import check_languages, classifier, word_list
from llmkit.corpus.units import VERSION, Unit, count_unknown_files, load_array, make_units, short_hash
from llmkit.data.tokens import changed, token_dtype
from llmkit.errors import DataError, MachineError, UserError, did_you_mean, raise_all
from llmkit.files import lock, write_atomically
from llmkit.readers.records import number_lines
from llmkit.tokenizer.tokenizer import Tokenizer, load_tokenizer
from llmkit.tokenizer.train import extend_bpe, train_tokenizer

PACKED = (".jsonl.gz", ".jsonl.zst", ".zip", ".parquet")
UNPACKED = 2  # bytes of text in a byte of a packed file, at least, for the estimate of disk space
MARKUP = (".html", ".htm", ".xhtml", ".warc", ".warc.gz", ".warc.zst")
SPACE = 0.8  # bytes on disk for a byte of text: clean texts 0.4 (packed), tokens 0.5; a little is always dropped


Where = Callable[[str], str | None]  # the file and line of a key of the config


def check_rules(data: CorpusData, where: Where) -> None:
    """Refuse rules that do not exist, and thresholds that are neither low nor high."""
    errors = []
    for rule, limits in data.filter.rules.items():
        if rule not in RULES:
            hint = did_you_mean(rule, RULES) or f"one of: {', '.join(RULES)}"
            at = where(f"data.filter.rules.{rule}")
            errors.append(UserError("data.filter.rules has an unknown rule", at=at, got=rule, fix=hint))
        elif limits is not False and limits.keys() - {"low", "high"}:
            wrong, at = ", ".join(limits.keys() - {"low", "high"}), where(f"data.filter.rules.{rule}")
            errors.append(UserError(f"data.filter.rules.{rule} takes low and high", at=at, got=wrong))
    raise_all(errors)


def check_scorers(data: CorpusData, where: Where) -> None:
    """Refuse languages, word lists and classifiers that are not there; loads them, so only where they are needed."""
    if data.filter.language:
        check_languages(data.filter.language.keep, where("data.filter.language.keep"))
    if data.filter.words:
        word_list(data.filter.words.path)
    if data.filter.classifier:
        classifier(data.filter.classifier.path, data.filter.classifier.label)


def check_corpus(data: CorpusData, where: Where = lambda key: None) -> None:
    """Refuse what can't be built."""
    if not isinstance(data, CorpusData):
        raise UserError(
            "only a corpus is built beforehand",
            got=f"data.kind: {data.kind}",
            fix="`llmkit finetune` encodes fine-tuning data by itself",
        )
    if not data.sources:
        raise UserError("there is nothing to build", expected="data.sources", fix="name at least one source")
    check_rules(data, where)


def build_corpus(
    data: CorpusData, *, say: Callable[[str], None] = print, where: Where = lambda key: None
) -> dict[str, Any]:
    """Build data.dir from data.sources, or return the manifest of the same build that is already there."""
    check_corpus(data, where)
    folder = Path(data.dir)
    units, named, recipe = make_recipe(data)
    if is_built(folder, recipe):
        say(f"data is built: {folder}/manifest.json")
        return read_manifest(folder)
    check_scorers(data, where)
    if (folder / "manifest.json").exists():
        say(f"{folder} holds another build, which this one replaces")
    with lock(folder, "another process is building this data", fix="wait for it, or choose another data.dir"):
        check_space(folder, units)
        try:
            return build_units(data, units, named, recipe)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise MachineError(
                "the disk is full",
                at=folder,
                got=f"{shutil.disk_usage(folder).free:,} bytes free",
                expected=f"about {space_needed(folder, units):,} more",
                fix="free some; the same command goes on",
            ) from None


def try_corpus(data: CorpusData, documents: int, *, where: Where = lambda key: None) -> tuple[str, dict[str, Any]]:
    """(report, funnel) of a build of each source's first documents, up to pass B; it leaves nothing behind."""
    check_corpus(data, where)
    check_scorers(data, where)
    sources = [
        source.model_copy(update={"limit": min(documents, source.limit or documents)}) for source in data.sources
    ]
    with tempfile.TemporaryDirectory() as place:
        anything = OnError(max_bad_fraction=1.0)
        trial = data.model_copy(update={"sources": sources, "cluster": None, "on_error": anything})
        units, parts = make_units(trial), Path(place)
        with open_pool(trial, len(units)) as pool:
            counts = measure_units(pool, units, trial, parts)
        decision = decide(units, trial, parts, parts / "decided")
    funnel = make_funnel(units, counts, decision)
    return report({"funnel": funnel}, counts, [], decision), funnel


def measure_units(pool: Pool, units: list[Unit], data: CorpusData, parts: Path) -> list[dict[str, Any]]:
    """Pass A over all units; returns their counts."""
    sizes = [unit.bytes for unit in units]
    return pool.map(measure_unit, [(unit, data, parts) for unit in units], "read, clean, measure", sizes)


def make_recipe(data: CorpusData) -> tuple[list[Unit], Tokenizer | None, str]:
    """The work units, the tokenizer that is named if one is, and a hash of all that the build depends on."""
    units = make_units(data)
    path = data.tokenizer.path or data.tokenizer.extend
    named = load_tokenizer(Path(path)) if path else None
    settings = data.model_dump(exclude={"dir", "sources", "workers", "cluster", "seq_len", "document_mask"})
    return units, named, short_hash(VERSION, [unit.part for unit in units], settings, named and named.sha256)


def decision_folder(folder: Path, recipe: str) -> Path:
    """Where pass B of a recipe leaves the fates: a build that is cut off must not touch those of the finished one."""
    return folder / "parts" / f"decided-{recipe}"


def needs_build(data: CorpusData) -> bool:
    """Whether `build_corpus` would have something to do; raises what it would raise before it begins."""
    if not data.sources:
        return False
    check_corpus(data)
    if is_built(Path(data.dir), make_recipe(data)[2]):
        return False
    check_scorers(data, lambda key: None)
    return True


def is_built(folder: Path, recipe: str) -> bool:
    """Whether the folder holds a finished build of this recipe, the tokenizer included."""
    if not (folder / "manifest.json").exists():
        return False
    tokenizer, manifest = folder / "tokenizer", read_manifest(folder)
    if manifest["recipe"] != recipe:
        return False
    files = [one for part in manifest["splits"].values() for file in part["files"] for one in (file, file["index"])]
    if not (tokenizer / "tokenizer.json").is_file() or any(changed(folder / one["path"], one) for one in files):
        return False
    return load_tokenizer(tokenizer).sha256 == manifest["tokenizer_sha256"]


def space_needed(folder: Path, units: list[Unit]) -> int:
    """Bytes that a build will still write, at the least: text files alone tell, markup and limits leave little."""
    needed = 0
    for unit in units:
        names = [path.lower() for path, _ in unit.pieces]
        if unit.source["limit"] is None and not any(name.endswith(MARKUP) for name in names):
            needed += int(SPACE * unit.bytes * (UNPACKED if any(name.endswith(PACKED) for name in names) else 1))
    there = sum(max(0, size_of(folder / "parts" / f"{unit.part}.jsonl.zst")) for unit in units)
    return max(0, needed - there)


def check_space(folder: Path, units: list[Unit]) -> None:
    """Refuse to begin what the disk can't hold."""
    needed, free = space_needed(folder, units), shutil.disk_usage(folder).free
    if free < needed:
        raise MachineError(
            "the disk is too small for this build",
            at=folder,
            got=f"{free:,} bytes free",
            expected=f"about {needed:,} bytes",
            fix="free some, or put data.dir on another disk",
        )


def build_units(data: CorpusData, units: list[Unit], named: Tokenizer | None, recipe: str) -> dict[str, Any]:
    """All passes over all units; returns the manifest. What an earlier build has done and still fits is only read."""
    folder, started = Path(data.dir), time.perf_counter()
    parts = folder / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    with open_pool(data, len(units)) as pool:
        counts = measure_units(pool, units, data, parts)
        stop_on_bad_records(data, counts, write_quarantine(units, parts, folder))
        watch = Stopwatch()
        decided = decision_folder(folder, recipe)
        decision = decide(units, data, parts, decided)
        watch.lap("deciding")
        funnel = make_funnel(units, counts, decision)
        for source in data.sources:
            funnel[source.name]["passed over"] = count_unknown_files(source)
        if decision.documents == 0:
            raise nothing_left(folder, funnel)
        tokenizer, tokenizer_folder = make_tokenizer(data, parts, decided, units, decision, named)
        watch.lap("tokenizer")
        spent = watch.seconds
        keys = [encoding_key(data, decided, unit, decision, tokenizer) for unit in units]
        jobs = [
            (unit, data, decided, tokenizer_folder, decision.by_tail, key)
            for unit, key in zip(units, keys, strict=True)
        ]
        shards = pool.map(encode_unit, jobs, "encode", [unit.bytes for unit in units])

    splits: dict[str, Any] = {}
    for split in ("train", "val"):
        made = [shard[split] for shard in shards]
        splits[split] = {name: sum(one[name] for one in made) for name in ("documents", "tokens", "bytes")}
        splits[split]["files"] = [file | {"source": s["source"]} for s in shards for file in s[split]["files"]]
    totals = {name: sum(row[name] for row in funnel.values()) for name in ("read", "quarantined", "kept")}
    totals["dropped"] = totals["read"] - totals["quarantined"] - totals["kept"]
    seconds = sum((Counter(one["seconds"]) for one in [*counts, *shards]), Counter()) + spent
    manifest = {
        "version": VERSION,
        "recipe": recipe,
        "dtype": token_dtype(len(tokenizer)).str,
        "vocab_size": len(tokenizer),
        "tokenizer_sha256": tokenizer.sha256,
        "split_by": "tail of every document" if decision.by_tail else "document",
        "counts": totals,
        "funnel": funnel,
        "splits": splits,
        "fingerprint": short_hash([file["sha256"] for s in splits.values() for file in s["files"]]),
        "seconds": round(time.perf_counter() - started, 2),
        "workers": pool.workers,
        "cpu_seconds": {stage: round(value, 2) for stage, value in seconds.items()},
        "peak_mb": round(max(peak_mb(), *(one["peak_mb"] for one in [*counts, *shards])), 1),
    }
    write_atomically(folder / "val_documents.txt", "".join(f"{id}\n" for shard in shards for id in shard["held_out"]))
    write_atomically(folder / "report.md", report(manifest, counts, shards, decision))
    write_atomically(folder / "report.json", json.dumps(manifest | {"units": counts}, indent=1))
    tokenizer.save(folder / "tokenizer")
    write_atomically(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    delete_earlier(folder, units, [tokenizer_folder, decided], keys)
    return manifest


def encoding_key(data: CorpusData, decided: Path, unit: Unit, decision: Decision, tokenizer: Tokenizer) -> str:
    """A hash of all that a unit's shards and the reasons beside them depend on."""
    fates, cut = (load_array(decided / f"{unit.part}.{name}.npy") for name in ("fate", "cut"))
    checks = limits_of(data, unit.source["profile"])
    met = {name: checks.get(name) for name in count_fates(fates["fate"])}  # other thresholds that drop nothing else
    if "language" in met:
        met["language"] |= {"keep": data.filter.language.keep}
    splitting = (data.split.val_fraction if decision.by_tail else None, decision.by_tail)
    return short_hash(unit.part, checksum(fates["fate"]), checksum(cut), met, tokenizer.sha256, splitting)


def checksum(array: np.ndarray) -> str:
    return hashlib.blake2b(array.tobytes(), digest_size=16).hexdigest()


def delete_earlier(folder: Path, units: list[Unit], made: list[Path], keys: list[str]) -> None:
    """Delete what earlier builds left and no manifest names any more: nothing that only lies there."""
    current = {unit.part for unit in units} | {f"{unit.name}-{key}" for unit, key in zip(units, keys, strict=True)}
    known = set(keys)
    for path in itertools.chain(folder.glob("parts/*"), (folder / "tokens").rglob("*"), folder.glob("dropped/*")):
        stem = re.match(r"(.+-\d+-[0-9a-f]{16})\.(tokens-([0-9a-f]{16}))?", path.name)
        if stem and path.is_file():
            if stem[1] not in current or path.name.endswith(".tmp") or (stem[3] and stem[3] not in known):
                path.unlink()
        elif re.match(r"(tokenizer|decided)-[0-9a-f]{16}(\.tmp)?$", path.name) and path not in made:
            shutil.rmtree(path)


def write_quarantine(units: list[Unit], parts: Path, folder: Path) -> str:
    """Join what the units could not read in quarantine.jsonl, with lines counted from the start of each file.

    Returns where the first of it stands.
    """
    cut = {Path(path): [] for unit in units for path, span in unit.pieces if span}
    found = []
    for unit in units:
        starts = {path: span[0] for path, span in unit.pieces if span and not path.lower().endswith(".parquet")}
        for line in (parts / f"{unit.part}.bad.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            start = starts.get(record["path"], 0)
            if start:
                cut[Path(record["path"])].append(start)
            found.append((record, start))
    before = {str(path): number_lines(path, starts) for path, starts in cut.items() if starts}
    for record, start in found:
        record["line"] += before[record["path"]][start] if start else 0
    write_atomically(folder / "quarantine.jsonl", "".join(json.dumps(record) + "\n" for record, _ in found))
    return (
        f"{found[0][0]['path']}:{found[0][0]['line']} and others, all in {folder / 'quarantine.jsonl'}" if found else ""
    )


def stop_on_bad_records(data: CorpusData, counts: list[dict], where: str) -> None:
    """Raise when records could not be read and the config does not allow that many."""
    bad, read = (sum(one[name] for one in counts) for name in ("quarantined", "read"))
    most = 0.0 if data.on_error.mode == "fail" else data.on_error.max_bad_fraction
    if bad and bad > most * read:
        reasons = sum((Counter(one["bad"]) for one in counts), Counter())
        raise DataError(
            f"{bad} of {read} records can't be read",
            at=where,
            got=", ".join(f"{number} {reason}" for reason, number in reasons.most_common(8)),
            fix="mend the files, or raise data.on_error.max_bad_fraction",
        )


def nothing_left(folder: Path, funnel: dict[str, Any]) -> UserError:
    dropped = sum((Counter(row["dropped"]) for row in funnel.values()), Counter())
    if not dropped:
        return DataError("the sources hold no document", at=folder, fix="look at data.sources")
    return DataError(
        "no document is left",
        at=folder,
        got=", ".join(f"{n} {rule}" for rule, n in dropped.most_common()),
        fix="loosen the profile or data.filter.rules",
    )


def make_tokenizer(
    data: CorpusData, parts: Path, decided: Path, units: list[Unit], decision: Decision, named: Tokenizer | None
) -> tuple[Tokenizer, Path]:
    """The tokenizer of the build and where it lies: the named one, or one that learns from a sample of train."""
    flags = [checksum(fates) for fates in decision.fates]
    splitting = (data.split.val_fraction, decision.by_tail)
    section = data.tokenizer
    settings = (section.model_dump(), named and named.sha256, data.seed, splitting)
    made_of = named.sha256 if section.path else short_hash([unit.part for unit in units], flags, settings)
    folder = parts / f"tokenizer-{made_of[:16]}"
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder), folder

    def sample() -> Iterable[str]:
        sizes = (load_array(parts / f"{unit.part}.scores.npy")["bytes"] for unit in units)
        size = sum(int(one[fates <= VAL].sum(dtype="u8")) for one, fates in zip(sizes, decision.fates, strict=True))
        share = section.sample_mb * 1e6 / max(1, size)
        for unit in units:
            taken = draw(load_array(parts / f"{unit.part}.scores.npy")["key"][:, 0], data.seed + 1) < share
            for (_, fate, text), wanted in zip(kept_texts(unit, data, parts, decided), taken.tolist(), strict=True):
                if wanted and text:
                    yield split_text(text, fate, *splitting)[0]

    if section.path:
        tokenizer = named
    elif section.extend:
        tokenizer = extend_bpe(named, sample(), section.vocab_size)
    else:
        options = section.model_dump(include={"vocab_size", "pattern", "normalize"})
        options["special_tokens"] = [*section.special_tokens, *(f"<extra_id_{i}>" for i in range(section.extra_ids))]
        tokenizer = train_tokenizer(sample(), section.train, **options)
    half = folder.with_name(folder.name + ".tmp")
    tokenizer.save(half)
    half.rename(folder)
    return load_tokenizer(folder), folder  # as everyone else will read it: Unigram's scores lose a digit on the way


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished build."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or not {"recipe", "splits", "tokenizer_sha256"} <= manifest.keys():
            raise ValueError("it is none")
        return manifest
    except FileNotFoundError:
        raise DataError(
            "there is no built data", at=folder, fix="name data.sources, or run `llmkit data build CONFIG`"
        ) from None
    except ValueError as error:
        fix = "delete it and build again"
        raise DataError(f"the manifest can't be read: {error}", at=path, fix=fix) from None
