"""Build a corpus: sources -> clean, unique documents -> tokenizer -> token shards, a manifest and a report.

A build has four passes over all work units. A and D run in parallel, one unit per worker at a time:
    A  measure   read, clean, scrub, score, MinHash       -> parts/<unit>.jsonl.zst, .scores.npy, .bands.npy ...
    B  decide    thresholds, duplicates, contamination    -> parts/decided-<recipe>/<unit>.fate.npy; reads no text
    C  tokenizer train one on a sample, or load one       -> parts/tokenizer-<key>/
    D  encode    the kept documents                       -> tokens/{train,val}/<source>/<unit>.bin + .idx, dropped/
A unit's files are written atomically and named after a hash of all their inputs. A build that was killed, or whose
settings changed, therefore repeats only the necessary work. The result does not depend on the number of workers.
"""

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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from llmkit import __version__
from llmkit.config.data import CorpusData, OnError
from llmkit.corpus.canaries import make_canaries, place_canaries
from llmkit.corpus.decide import TRAIN, VAL, Decision, collect_limits, count_fates, decide, uniform_hash
from llmkit.corpus.encode import encode_unit, read_decided, split_text
from llmkit.corpus.filters import RULES
from llmkit.corpus.measure import StageTimer, file_size, measure_unit, peak_mb
from llmkit.corpus.report import make_funnel, merge_records, render_report
from llmkit.corpus.scorers import check_languages, load_classifier, load_word_list
from llmkit.corpus.units import VERSION, Unit, make_units, short_hash
from llmkit.data.splits import read_manifest
from llmkit.data.tokens import find_change, load_array, seal, token_dtype
from llmkit.errors import DataError, MachineError, UserError, did_you_mean, raise_all
from llmkit.files import NO_SPACE, delete_leftovers, free_space, lock, write_atomically
from llmkit.parallel.workers import Pool, open_pool
from llmkit.readers.ngrams import evaluation_checksums
from llmkit.readers.sources import write_quarantine
from llmkit.tokenizer.load import load_tokenizer
from llmkit.tokenizer.tokenizer import Tokenizer
from llmkit.tokenizer.train import extend_bpe, train_tokenizer

# For the estimate of disk space.
COMPRESSED_SUFFIXES = (".jsonl.gz", ".jsonl.zst", ".zip", ".parquet")
MIN_COMPRESSION_RATIO = 2  # bytes of text per byte of a compressed file
MARKUP_SUFFIXES = (".html", ".htm", ".xhtml", ".warc", ".warc.gz", ".warc.zst")
DISK_BYTES_PER_TEXT_BYTE = 0.8  # clean texts, compressed: 0.4; tokens: 0.5; minus the dropped documents

MARKER = "made-by-llmkit"  # the first file of a build, in parts/: the folder is llmkit's

Locator = Callable[[str], str | None]  # returns the file and line of a key of the config


def check_rules(data: CorpusData, where: Locator) -> None:
    """Raise UserError if data.filter.rules names an unknown rule, or a threshold other than low and high."""
    errors = []
    for rule, limits in data.filter.rules.items():
        if rule not in RULES:
            hint = did_you_mean(rule, RULES) or f"one of: {', '.join(RULES)}"
            at = where(f"data.filter.rules.{rule}")
            errors.append(UserError("data.filter.rules has an unknown rule", at=at, got=rule, fix=hint))
        elif limits is not False and limits.keys() - {"low", "high"}:
            wrong, at = ", ".join(limits.keys() - {"low", "high"}), where(f"data.filter.rules.{rule}")
            errors.append(UserError(f"data.filter.rules.{rule} takes only low and high", at=at, got=wrong))
    raise_all(errors)


def check_scorers(data: CorpusData, where: Locator) -> None:
    """Raise UserError if a language, word list or classifier is missing. This is slow, because it loads them."""
    if data.filter.language:
        check_languages(data.filter.language.keep, where("data.filter.language.keep"))
    if data.filter.words:
        load_word_list(data.filter.words.path)
    if data.filter.classifier:
        load_classifier(data.filter.classifier.path, data.filter.classifier.label)


def check_corpus(data: CorpusData, where: Locator = lambda key: None) -> None:
    """Raise UserError if the data section can't be built."""
    if not isinstance(data, CorpusData):
        fix = "`llmkit finetune` encodes fine-tuning data by itself"
        raise UserError("only corpus data has to be built", got=f"data.kind: {data.kind}", fix=fix)
    if not data.sources:
        raise UserError("there is nothing to build", expected="data.sources", fix="name at least one source")
    check_rules(data, where)


def build_corpus(
    data: CorpusData, *, say: Callable[[str], None] = print, where: Locator = lambda key: None
) -> dict[str, Any]:
    """Build data.dir from data.sources, unless the same build is there already, and return its manifest."""
    check_corpus(data, where)
    folder = Path(data.dir)
    units, skipped, given_tokenizer, recipe = make_recipe(data)
    if is_built(folder, recipe):
        say(f"data is already built: {folder}/manifest.json")
        return read_manifest(folder)
    check_scorers(data, where)
    check_folder(folder)
    if (folder / "manifest.json").exists():
        say(f"replacing another build in {folder}")
    with lock(folder, "another process is building this data", fix="wait for it, or choose another data.dir"):
        check_space(folder, units)
        try:
            return run_passes(data, units, skipped, given_tokenizer, recipe, say)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            got = free_space(folder) if error.errno == errno.ENOSPC else error.strerror
            expected = f"room for about {space_needed(folder, units):,} more bytes"
            fix = "make room and run the same command again: it resumes"
            at = error.filename or folder
            raise MachineError(NO_SPACE[error.errno], at=at, got=got, expected=expected, fix=fix) from None


def check_folder(folder: Path) -> None:
    """Raise DataError if a folder holds files, and none that a build has left: they are the user's."""
    parts = folder / "parts"
    if (parts / MARKER).is_file() or (parts.is_dir() and (folder / "manifest.json").is_file()) or not folder.is_dir():
        return
    killed_early = parts.is_dir() and all(path.suffix == ".tmp" for path in parts.iterdir())
    ours = {"lock", "parts"} if killed_early else {"lock"}
    if found := sorted({path.name for path in folder.iterdir()} - ours):
        got, fix = ", ".join(found[:6]), "choose a new or empty folder as data.dir"
        raise DataError("data.dir holds files that are no build's", at=folder, got=got, fix=fix)


def try_corpus(data: CorpusData, documents: int, *, where: Locator = lambda key: None) -> tuple[str, dict[str, Any]]:
    """Run passes A and B on the first documents of each source; return (report, funnel), and leave no files."""
    check_corpus(data, where)
    check_scorers(data, where)
    sources = [one.model_copy(update={"limit": min(documents, one.limit or documents)}) for one in data.sources]
    with tempfile.TemporaryDirectory() as folder:
        on_error = OnError(max_bad_fraction=1.0)
        trial = data.model_copy(update={"sources": sources, "cluster": None, "on_error": on_error})
        (units, _), parts = make_units(trial), Path(folder)
        with open_pool(trial.workers, len(units)) as pool:
            counts = measure_units(pool, units, trial, parts)
        decision = decide(units, trial, parts, parts / "decided")
    funnel = make_funnel(units, counts, decision)
    return render_report({"funnel": funnel}, counts, [], decision), funnel


def measure_units(pool: Pool, units: list[Unit], data: CorpusData, parts: Path) -> list[dict[str, Any]]:
    """Run pass A over all units and return their counts."""
    sizes = [unit.bytes for unit in units]
    return pool.map(measure_unit, [(unit, data, parts) for unit in units], "read, clean, measure", sizes)


def make_recipe(data: CorpusData) -> tuple[list[Unit], dict[str, dict[str, int]], Tokenizer | None, str]:
    """Return (work units, skipped files by source, the tokenizer named in the config or None, hash of all inputs)."""
    units, skipped = make_units(data)
    path = data.tokenizer.path or data.tokenizer.extend
    given = load_tokenizer(Path(path)) if path else None
    settings = data.model_dump(exclude={"dir", "sources", "workers", "cluster", "seq_len", "document_mask"})
    return units, skipped, given, short_hash(VERSION, [unit.part for unit in units], settings, given and given.sha256)


def decision_folder(folder: Path, recipe: str) -> Path:
    """Return the folder for the fates of a build. Each recipe has its own, so that finished builds stay intact."""
    return folder / "parts" / f"decided-{recipe}"


def needs_build(data: CorpusData) -> bool:
    """Return whether `build_corpus` would build anything. Raise the errors that it raises before it starts."""
    if not data.sources:
        return False
    check_corpus(data)
    if is_built(Path(data.dir), make_recipe(data)[-1]):
        return False
    check_scorers(data, lambda key: None)
    return True


def is_built(folder: Path, recipe: str) -> bool:
    """Return whether the folder holds a finished, unchanged build of this recipe with its tokenizer."""
    try:
        tokenizer, manifest = folder / "tokenizer", read_manifest(folder)
    except DataError:  # there is none, or it is damaged or of another version
        return False
    if manifest["recipe"] != recipe:
        return False
    files = [one for part in manifest["splits"].values() for file in part["files"] for one in (file, file["index"])]
    if not (tokenizer / "tokenizer.json").is_file() or any(find_change(folder / one["path"], one) for one in files):
        return False
    return load_tokenizer(tokenizer).sha256 == manifest["tokenizer_sha256"]


def space_needed(folder: Path, units: list[Unit]) -> int:
    """Return a lower bound for the bytes that a build has yet to write. Units of markup or with a limit count as 0."""
    needed = 0
    for unit in units:
        names = [path.lower() for path, _ in unit.pieces]
        if unit.source["limit"] is None and not any(name.endswith(MARKUP_SUFFIXES) for name in names):
            ratio = MIN_COMPRESSION_RATIO if any(name.endswith(COMPRESSED_SUFFIXES) for name in names) else 1
            needed += int(DISK_BYTES_PER_TEXT_BYTE * unit.bytes * ratio)
    written = sum(max(0, file_size(folder / "parts" / f"{unit.part}.jsonl.zst")) for unit in units)
    return max(0, needed - written)


def check_space(folder: Path, units: list[Unit]) -> None:
    """Raise MachineError if the disk has too little free space for the build."""
    needed, free = space_needed(folder, units), shutil.disk_usage(folder).free
    if free < needed:
        got, expected = f"{free:,} bytes free", f"about {needed:,} bytes"
        fix = "free some space, or put data.dir on another disk"
        raise MachineError("the disk is too small for this build", at=folder, got=got, expected=expected, fix=fix)


def run_passes(
    data: CorpusData,
    units: list[Unit],
    skipped: dict[str, dict[str, int]],
    given: Tokenizer | None,
    recipe: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Run all passes over all units, reusing files of earlier builds with the same inputs; return the manifest."""
    folder, started = Path(data.dir), time.perf_counter()
    parts = folder / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    write_atomically(parts / MARKER, json.dumps({"llmkit": __version__}) + "\n")
    with open_pool(data.workers, len(units), data.cluster) as pool:
        counts = measure_units(pool, units, data, parts)
        first = write_quarantine(
            [(unit.pieces, parts / f"{unit.part}.bad.jsonl") for unit in units], folder / "quarantine.jsonl"
        )
        check_bad_records(data.on_error, counts, first, folder, say)
        timer = StageTimer()
        decided = decision_folder(folder, recipe)
        decision = decide(units, data, parts, decided)
        timer.lap("deciding")
        funnel = make_funnel(units, counts, decision)
        for source in data.sources:
            funnel[source.name]["skipped files"] = skipped[source.name]
        if decision.documents == 0:
            raise no_documents_error(folder, funnel)
        tokenizer, tokenizer_folder = make_tokenizer(data, parts, decided, units, decision, given, say)
        timer.lap("tokenizer")
        main_seconds = timer.seconds
        canaries = make_canaries(data.canaries, data.seed)
        trained = [int((fates == TRAIN).sum()) for fates in decision.fates]
        pairs = list(zip(units, place_canaries(canaries, trained, data.seed), strict=True))
        keys = [encoding_key(data, decided, unit, decision, tokenizer, planted) for unit, planted in pairs]
        common = (data, decided, tokenizer_folder, decision.by_tail)
        jobs = [(unit, *common, key, planted) for (unit, planted), key in zip(pairs, keys, strict=True)]
        shards = pool.map(encode_unit, jobs, "encode", [unit.bytes for unit in units])

    splits: dict[str, Any] = {}
    for split in ("train", "val"):
        splits[split] = {name: sum(s[split][name] for s in shards) for name in ("documents", "tokens", "bytes")}
        splits[split]["files"] = [file | {"source": s["source"]} for s in shards for file in s[split]["files"]]
    totals = {name: sum(row[name] for row in funnel.values()) for name in ("read", "quarantined", "kept")}
    totals["dropped"] = totals["read"] - totals["quarantined"] - totals["kept"]
    seconds = sum((Counter(one["seconds"]) for one in [*counts, *shards]), Counter()) + main_seconds
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
        "canaries": [asdict(canary) for canary in canaries],
        "searched": evaluation_checksums(data.decontaminate.files) if data.decontaminate else [],
        "fingerprint": short_hash([file["sha256"] for s in splits.values() for file in s["files"]]),
        "seconds": round(time.perf_counter() - started, 2),
        "workers": pool.workers,
        "cpu_seconds": {stage: round(value, 2) for stage, value in seconds.items()},
        "peak_mb": round(max(peak_mb(), *(one["peak_mb"] for one in [*counts, *shards])), 1),
    }
    write_atomically(folder / "val_documents.txt", "".join(f"{id}\n" for shard in shards for id in shard["held_out"]))
    write_atomically(folder / "report.md", render_report(manifest, counts, shards, decision))
    write_atomically(folder / "report.json", json.dumps(manifest | {"units": counts}, indent=1))
    tokenizer.save(folder / "tokenizer")
    write_atomically(folder / "manifest.json", json.dumps(seal(manifest), indent=2) + "\n")
    delete_stale_files(folder, units, [tokenizer_folder, decided], keys)
    return manifest


def encoding_key(
    data: CorpusData, decided: Path, unit: Unit, decision: Decision, tokenizer: Tokenizer, planted: dict[int, str]
) -> str:
    """Hash all inputs of a unit's shards and of its list of dropped documents."""
    fates, cut = (load_array(decided / f"{unit.part}.{name}.npy") for name in ("fate", "cut"))
    limits = collect_limits(data, unit.source["profile"])
    # Only the limits that dropped something. A change of the others does not require a new encoding.
    applied = {name: limits.get(name) for name in count_fates(fates["fate"])}
    if "language" in applied:
        applied["language"] |= {"keep": data.filter.language.keep}
    splitting = (data.split.val_fraction if decision.by_tail else None, decision.by_tail)
    inputs = (unit.part, checksum(fates["fate"]), checksum(cut), applied, tokenizer.sha256, splitting)
    return short_hash(*inputs, *([planted] if planted else []))


def checksum(array: np.ndarray) -> str:
    return hashlib.blake2b(array.tobytes(), digest_size=16).hexdigest()


def delete_stale_files(folder: Path, units: list[Unit], keep: list[Path], keys: list[str]) -> None:
    """Delete the files of earlier builds that the manifest no longer uses. Keep files that no build wrote."""
    delete_leftovers(folder)
    current = {unit.part for unit in units} | {
        f"{unit.source['name']}-{key}" for unit, key in zip(units, keys, strict=True)
    }
    known = set(keys)
    for path in itertools.chain(folder.glob("parts/*"), (folder / "tokens").rglob("*"), folder.glob("dropped/*")):
        unit_file = re.match(r"(.+?-[0-9a-f]{16})\.(tokens-([0-9a-f]{16}))?", path.name)
        if unit_file and path.is_file():
            if unit_file[1] not in current or path.name.endswith(".tmp") or unit_file[3] not in (None, *known):
                path.unlink()
        elif re.match(r"(tokenizer|decided)-[0-9a-f]{16}(\.tmp)?$", path.name) and path not in keep:
            shutil.rmtree(path)


def check_bad_records(
    on_error: OnError, counts: list[dict], first: str, folder: Path, say: Callable[[str], None]
) -> None:
    """Raise DataError if there are more bad records than the config allows. Else say how many there are."""
    records, listed_in = merge_records(counts), folder / "quarantine.jsonl"
    records.first = first
    records.check(on_error.max_fraction, fix=on_error.fix, listed_in=listed_in)
    if records.bad:
        say(records.describe(listed_in))


def no_documents_error(folder: Path, funnel: dict[str, Any]) -> DataError:
    """Return the error for a build that keeps no documents: the sources are empty, or rules dropped everything."""
    dropped = sum((Counter(row["dropped"]) for row in funnel.values()), Counter())
    if not dropped:
        return DataError("the sources hold no document", at=folder, fix="check data.sources")
    return DataError(
        "no document is left",
        at=folder,
        got=", ".join(f"{n} {rule}" for rule, n in dropped.most_common()),
        fix="loosen the profile or data.filter.rules",
    )


def make_tokenizer(
    data: CorpusData,
    parts: Path,
    decided: Path,
    units: list[Unit],
    decision: Decision,
    given: Tokenizer | None,
    say: Callable[[str], None],
) -> tuple[Tokenizer, Path]:
    """Return the tokenizer of the build and its folder: the given one, or one trained on part of the train split."""
    fate_checksums = [checksum(fates) for fates in decision.fates]
    splitting = (data.split.val_fraction, decision.by_tail)
    section = data.tokenizer
    settings = (section.model_dump(), given and given.sha256, data.seed, splitting)
    key = given.sha256 if section.path else short_hash([unit.part for unit in units], fate_checksums, settings)
    folder = parts / f"tokenizer-{key[:16]}"
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder), folder

    def sample() -> Iterable[str]:
        sizes = (load_array(parts / f"{unit.part}.scores.npy")["bytes"] for unit in units)
        size = sum(int(one[fates <= VAL].sum(dtype="u8")) for one, fates in zip(sizes, decision.fates, strict=True))
        share = section.sample_mb * 1e6 / max(1, size)
        for unit in units:
            keys = load_array(parts / f"{unit.part}.scores.npy")["key"][:, 0]
            drawn = (uniform_hash(keys, data.seed + 1) < share).tolist()
            for (_, fate, text), in_sample in zip(read_decided(unit, data, parts, decided), drawn, strict=True):
                if in_sample and text:
                    yield split_text(text, fate, *splitting)[0]

    if section.path:
        tokenizer = given
    elif section.extend:
        tokenizer = extend_bpe(given, sample(), section.vocab_size, say=say)
    else:
        options = section.model_dump(include={"vocab_size", "pattern", "normalize"})
        options["special_tokens"] = [*section.special_tokens, *(f"<extra_id_{i}>" for i in range(section.extra_ids))]
        try:
            tokenizer = train_tokenizer(sample(), section.train, say=say, **options)
        except DataError as error:
            error.fix = "add text, or lower data.split.val_fraction: the tokenizer learns from the train split"
            raise
    temporary = folder.with_name(folder.name + ".tmp")
    tokenizer.save(temporary)
    temporary.rename(folder)
    return load_tokenizer(folder), folder  # reloaded, because saving rounds the scores of a Unigram tokenizer
