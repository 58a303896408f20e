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

from llmkit.corpus.decide import Decision, decide, draw
from llmkit.corpus.encode import encode_unit, kept_texts, split_text
from llmkit.corpus.engine import open_pool
from llmkit.corpus.measure import Stopwatch, measure_unit, peak_mb, size_of
from llmkit.corpus.report import make_funnel, report
from llmkit.corpus.units import VERSION, Unit, hash_of, load_array, make_units
from llmkit.data.filters import RULES
from llmkit.data.records import number_lines
from llmkit.data.scorers import check_languages, classifier, word_list
from llmkit.data.tokenizer import Tokenizer, load_tokenizer
from llmkit.data.tokens import changed, token_dtype
from llmkit.data.vocabulary import extend_bpe, train_tokenizer
from llmkit.errors import DATA, ENVIRONMENT, UserError, did_you_mean, raise_all
from llmkit.run import lock, write_atomically
from llmkit.schema import CorpusData

PACKED = (".gz", ".zst", ".zip", ".parquet")
UNPACKED = 4  # bytes of text in a byte of a packed file, for the estimate of disk space
SPACE = 0.9  # bytes on disk for a byte of text: clean texts 0.4 (packed), tokens 0.5


def check_settings(data: CorpusData) -> None:
    """What the schema can't know: rules and languages that do not exist, files that are not there."""
    errors = []
    for rule, limits in data.filter.rules.items():
        if rule not in RULES:
            hint = did_you_mean(rule, RULES) or f"one of: {', '.join(RULES)}"
            errors.append(UserError("data.filter.rules has an unknown rule", got=rule, fix=hint))
        elif limits is not False and limits.keys() - {"low", "high"}:
            errors.append(UserError(f"data.filter.rules.{rule} takes low and high", got=", ".join(limits)))
    raise_all(errors)
    if data.filter.language:
        check_languages(data.filter.language.keep)
    if data.filter.words:
        word_list(data.filter.words.path)
    if data.filter.classifier:
        classifier(data.filter.classifier.path, data.filter.classifier.label)


def check_corpus(data: CorpusData) -> None:
    """Refuse what can't be built."""
    if not isinstance(data, CorpusData):
        raise UserError(
            "only a corpus is built beforehand", got=f"data.kind: {data.kind}",
            fix="`llmkit finetune` encodes fine-tuning data by itself",
        )  # fmt: skip
    if not data.sources:
        raise UserError("there is nothing to build", expected="data.sources", fix="name at least one source")
    check_settings(data)


def build_corpus(data: CorpusData, *, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Build data.dir from data.sources, or return the manifest of the same build that is already there."""
    check_corpus(data)
    folder = Path(data.dir)
    units, named, recipe = make_recipe(data)
    if is_built(folder, recipe):
        say(f"data is built: {folder}/manifest.json")
        return read_manifest(folder)
    if (folder / "manifest.json").exists():
        say(f"{folder} holds another build, which this one replaces")
    with lock(folder, "another process is building this data", fix="wait for it, or choose another data.dir"):
        check_space(folder, units)
        try:
            return build_units(data, units, named, recipe)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise UserError(
                "the disk is full", at=folder, got=f"{shutil.disk_usage(folder).free:,} bytes free", code=ENVIRONMENT,
                expected=f"about {space_needed(folder, units):,} more", fix="free some; the same command goes on",
            ) from None  # fmt: skip


def try_corpus(data: CorpusData, documents: int) -> str:
    """The report of a build of each source's first documents, which leaves nothing behind."""
    check_corpus(data)
    sources = [
        source.model_copy(update={"limit": min(documents, source.limit or documents)}) for source in data.sources
    ]
    with tempfile.TemporaryDirectory() as folder:
        trial = data.model_copy(update={"sources": sources, "dir": folder, "cluster": None})
        trial.on_error = data.on_error.model_copy(update={"max_bad_fraction": 1.0})
        units, named, recipe = make_recipe(trial)
        build_units(trial, units, named, recipe, writing=False)
        return (Path(folder) / "report.md").read_text(encoding="utf-8")


def make_recipe(data: CorpusData) -> tuple[list[Unit], Tokenizer | None, str]:
    """The work units, the tokenizer that is named if one is, and a hash of all that the build depends on."""
    units = make_units(data)
    path = data.tokenizer.path or data.tokenizer.extend
    named = load_tokenizer(Path(path)) if path else None
    settings = data.model_dump(exclude={"dir", "sources", "workers", "cluster", "seq_len", "document_mask"})
    return units, named, hash_of(VERSION, [unit.part for unit in units], settings, named and named.sha256)


def needs_build(data: CorpusData) -> bool:
    """Whether `build_corpus` would have something to do."""
    return bool(data.sources) and not is_built(Path(data.dir), make_recipe(data)[2])


def is_built(folder: Path, recipe: str) -> bool:
    """Whether the folder holds a finished build of this recipe, the tokenizer included."""
    if not (folder / "manifest.json").exists() or read_manifest(folder)["recipe"] != recipe:
        return False
    tokenizer, manifest = folder / "tokenizer", read_manifest(folder)
    files = [one for part in manifest["splits"].values() for file in part["files"] for one in (file, file["index"])]
    if not (tokenizer / "tokenizer.json").is_file() or any(changed(folder / one["path"], one) for one in files):
        return False
    return load_tokenizer(tokenizer).sha256 == manifest["tokenizer_sha256"]


def space_needed(folder: Path, units: list[Unit]) -> int:
    """Bytes that a build will still write, roughly: less what of it is there."""
    packed = sum(unit.bytes for unit in units if any(path.endswith(PACKED) for path, _ in unit.pieces))
    needed = int(SPACE * (sum(unit.bytes for unit in units) + (UNPACKED - 1) * packed))
    there = sum(max(0, size_of(folder / "parts" / f"{unit.part}.jsonl.zst")) for unit in units)
    return max(0, needed - there)


def check_space(folder: Path, units: list[Unit]) -> None:
    """Refuse to begin what the disk can't hold."""
    needed, free = space_needed(folder, units), shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            "the disk is too small for this build", at=folder, got=f"{free:,} bytes free",
            expected=f"about {needed:,} bytes", fix="free some, or put data.dir on another disk", code=ENVIRONMENT,
        )  # fmt: skip


def build_units(
    data: CorpusData, units: list[Unit], named: Tokenizer | None, recipe: str, writing: bool = True
) -> dict[str, Any]:
    """All passes over all units; returns the manifest. What an earlier build has done and still fits is only read.

    writing  False: stop after pass B, with a report of what would be dropped
    """
    folder, started = Path(data.dir), time.perf_counter()
    parts = folder / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    sizes = [unit.bytes for unit in units]
    with open_pool(data, len(units)) as pool:
        counts = pool.map(measure_unit, [(unit, data, parts) for unit in units], "read, clean, measure", sizes)
        write_quarantine(units, parts, folder)
        stop_on_bad_records(data, counts, folder)
        watch = Stopwatch()
        decision = decide(units, data, parts)
        watch.lap("deciding")
        funnel = make_funnel(units, counts, decision)
        if not writing:
            write_atomically(folder / "report.md", report({"funnel": funnel}, counts, [], decision))
            return {}
        if decision.documents == 0:
            raise nothing_left(folder, funnel)
        tokenizer, tokenizer_folder = make_tokenizer(data, parts, units, decision, named)
        watch.lap("tokenizer")
        spent = watch.seconds
        jobs = [
            (unit, data, tokenizer_folder, decision.by_tail, encoding_key(data, parts, unit, decision, tokenizer))
            for unit in units
        ]
        shards = pool.map(encode_unit, jobs, "encode", sizes)

    splits: dict[str, Any] = {}
    for split in ("train", "val"):
        made = [shard[split] for shard in shards]
        splits[split] = {name: sum(one[name] for one in made) for name in ("documents", "tokens", "bytes")}
        splits[split]["files"] = [file | {"source": s["source"]} for s in shards for file in s[split]["files"]]
    totals = {name: sum(row[name] for row in funnel.values()) for name in ("read", "quarantined", "kept")}
    totals["dropped"] = totals["read"] - totals["quarantined"] - totals["kept"]
    seconds = sum((Counter(one["seconds"]) for one in [*counts, *shards]), Counter()) + spent
    manifest = {
        "version": VERSION, "recipe": recipe, "dtype": token_dtype(len(tokenizer)).str, "vocab_size": len(tokenizer),
        "tokenizer_sha256": tokenizer.sha256,
        "split_by": "tail of every document" if decision.by_tail else "document", "counts": totals, "funnel": funnel,
        "splits": splits, "fingerprint": hash_of([file["sha256"] for s in splits.values() for file in s["files"]]),
        "seconds": round(time.perf_counter() - started, 2), "workers": pool.workers,
        "cpu_seconds": {stage: round(value, 2) for stage, value in seconds.items()},
        "peak_mb": round(max(peak_mb(), *(one["peak_mb"] for one in [*counts, *shards])), 1),
    }  # fmt: skip
    write_atomically(folder / "val_documents.txt", "".join(f"{id}\n" for shard in shards for id in shard["held_out"]))
    write_atomically(folder / "report.md", report(manifest, counts, shards, decision))
    write_atomically(folder / "report.json", json.dumps(manifest | {"units": counts}, indent=1))
    tokenizer.save(folder / "tokenizer")
    write_atomically(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    delete_earlier(folder, units, tokenizer_folder, [job[-1] for job in jobs])
    return manifest


def encoding_key(data: CorpusData, parts: Path, unit: Unit, decision: Decision, tokenizer: Tokenizer) -> str:
    """A hash of all that a unit's shards depend on: other thresholds that drop nothing else change nothing."""
    fates, cut = (load_array(parts / f"{unit.part}.{name}.npy") for name in ("fate", "cut"))
    splitting = (data.split.val_fraction if decision.by_tail else None, decision.by_tail)
    return hash_of(unit.part, fates["fate"].tobytes().hex(), cut.tobytes().hex(), tokenizer.sha256, splitting)


def delete_earlier(folder: Path, units: list[Unit], tokenizer_folder: Path, keys: list[str]) -> None:
    """Delete what earlier builds left in parts/, tokens/ and dropped/, and no manifest names any more."""
    current = {unit.part for unit in units} | {f"{unit.name}-{key}" for unit, key in zip(units, keys, strict=True)}
    there = [folder.glob("parts/*"), (folder / "tokens").rglob("*"), folder.glob("dropped/*")]
    for path in itertools.chain(*there):
        stem = re.match(r"(.+-\d+-[0-9a-f]{16})\.", path.name)
        if path.is_file() and (stem is None or stem[1] not in current):
            path.unlink()
        elif path.parent.name == "parts" and path.is_dir() and path != tokenizer_folder:
            shutil.rmtree(path)


def write_quarantine(units: list[Unit], parts: Path, folder: Path) -> None:
    """Join what the units could not read in quarantine.jsonl, with lines counted from the start of each file."""
    cut = {Path(path): [] for unit in units for path, span in unit.pieces if span}
    found = []
    for unit in units:
        starts = {path: span[0] for path, span in unit.pieces if span and not path.endswith(".parquet")}
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


def stop_on_bad_records(data: CorpusData, counts: list[dict], folder: Path) -> None:
    """Raise when records could not be read and the config does not allow that many."""
    bad, read = (sum(one[name] for one in counts) for name in ("quarantined", "read"))
    most = 0.0 if data.on_error.mode == "fail" else data.on_error.max_bad_fraction
    if bad and bad > most * read:
        reasons = sum((Counter(one["bad"]) for one in counts), Counter())
        first = next(one["first_bad"] for one in counts if one["first_bad"])
        raise UserError(
            f"{bad} of {read} records can't be read", at=f"{first} and others, all in {folder / 'quarantine.jsonl'}",
            got=", ".join(f"{number} {reason}" for reason, number in reasons.most_common(8)),
            fix="mend the files, or raise data.on_error.max_bad_fraction", code=DATA,
        )  # fmt: skip


def nothing_left(folder: Path, funnel: dict[str, Any]) -> UserError:
    dropped = sum((Counter(row["dropped"]) for row in funnel.values()), Counter())
    if not dropped:
        return UserError("the sources hold no document", at=folder, fix="look at data.sources", code=DATA)
    return UserError(
        "no document is left", at=folder, got=", ".join(f"{n} {rule}" for rule, n in dropped.most_common()),
        fix="loosen the profile or data.filter.rules", code=DATA,
    )  # fmt: skip


def make_tokenizer(
    data: CorpusData, parts: Path, units: list[Unit], decision: Decision, named: Tokenizer | None
) -> tuple[Tokenizer, Path]:
    """The tokenizer of the build and where it lies: the named one, or one that learns from a sample of train."""
    flags = [load_array(parts / f"{unit.part}.fate.npy")["fate"].tobytes().hex() for unit in units]
    splitting = (data.split.val_fraction, decision.by_tail)
    section = data.tokenizer
    settings = (section.model_dump(), named and named.sha256, data.seed, splitting)
    made_of = named.sha256 if section.path else hash_of([unit.part for unit in units], hash_of(flags), settings)
    folder = parts / f"tokenizer-{made_of[:16]}"
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder), folder
    size = sum(int(load_array(parts / f"{unit.part}.scores.npy")["bytes"].sum(dtype="u8")) for unit in units)
    share = data.tokenizer.sample_mb * 1e6 / max(1, size)

    def sample() -> Iterable[str]:
        for unit in units:
            draws = draw(load_array(parts / f"{unit.part}.scores.npy")["key"][:, 0], data.seed + 1)
            for (_, fate, text), wanted in zip(kept_texts(unit, data, parts), (draws < share).tolist(), strict=True):
                if wanted and text:
                    yield split_text(text, fate, *splitting)[0]

    if section.path:
        tokenizer = named
    elif section.extend:
        tokenizer = extend_bpe(named, sample(), section.vocab_size)
    else:
        options = section.model_dump(include={"vocab_size", "pattern", "normalize", "special_tokens"})
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
        raise UserError(
            "there is no built data", at=folder, fix="name data.sources, or run `llmkit data build CONFIG`", code=DATA
        ) from None
    except ValueError as error:
        fix = "delete it and build again"
        raise UserError(f"the manifest can't be read: {error}", at=path, fix=fix, code=DATA) from None
