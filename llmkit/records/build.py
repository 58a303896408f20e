"""Encode the records of a fine-tuning run into a folder; `data/rows.py` says which files it has.

Workers encode units of at most UNIT_BYTES each into files of their own, which are then joined in order: neither the ids
nor the rows depend on the number of workers. Nothing but a few numbers per example is held in memory. If the process is
killed, the next one goes on with the units that are done.
"""

import hashlib
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.config.data import Decontaminate
from llmkit.config.records import PreferenceData, RecordSource, TurnData
from llmkit.data.rows import QUARANTINE, REPORT, TOKENS, read_report
from llmkit.data.tokens import ShardWriter, describe_file, find_change, load_array, read_sealed, save_array, seal
from llmkit.errors import DataError, UserError
from llmkit.files import delete, delete_leftovers, file_sha256, folder_stamps, open_atomically, write_atomically
from llmkit.parallel.workers import open_pool
from llmkit.readers.documents import dataset_files, is_saved_dataset, load_dataset_rows
from llmkit.readers.listing import check_file, refuse_zip
from llmkit.readers.ngrams import (
    describe_search,
    evaluation_checksums,
    flag_contaminated,
    read_evaluation_ngrams,
    shared_ngrams,
)
from llmkit.readers.records import read_records
from llmkit.readers.sources import Piece, group_files, source_files, stamps_of, write_quarantine
from llmkit.readers.tally import Record, Tally
from llmkit.records.encode import Found, encode_records
from llmkit.records.fit import fit_pairs, fit_preference, fit_row
from llmkit.records.rows import check_pairs, choose_splits, plan_pairs, plan_rows, plan_trees
from llmkit.tokenizer.chat_template import default_template
from llmkit.tokenizer.load import load_tokenizer
from llmkit.tokenizer.tokenizer import Tokenizer

VERSION = 10  # of the encoding; data of another version is encoded again
UNIT_BYTES = 8 * 2**20  # most source bytes in one unit
VALIDATION = "validation"  # the split that is read from a folder for validation
LENGTHS = {"median": 0.5, "p90": 0.9, "p99": 0.99, "longest": 1.0}  # of the examples, in the report
EXAMPLE = np.dtype([("prompt", "<u8"), ("record", "<i8"), ("targets", "<i4"), ("parts", "<i4", (3,))])
HIT = np.dtype([("record", "<i8"), ("gram", "<u8")])  # an n-gram that a record shares with evaluation files


@dataclass(frozen=True)
class Recipe:
    """Hold what the encoding of a record depends on, besides its source."""

    template: str
    train_on: str
    date: str | None
    seq_len: int
    too_long: str
    form: str  # rows of examples; pairs of a text and an answer, for an encoder-decoder; or trees of preferences
    single: bool = False  # of preferences: an answer is a tree of its own, as kto wants it
    apart: bool = False  # of preferences: the prompt is read again for each answer
    whole: bool = False  # of preferences: the last token of an answer is read too, as a reward model does
    decontaminate: Decontaminate | None = None


@dataclass(frozen=True)
class Unit:
    """A part of a source that a worker encodes."""

    name: str  # of its files
    is_val: bool  # from data.val_path
    source: RecordSource
    pieces: tuple[Piece, ...]  # empty if `datasets` reads the source
    size: int  # bytes
    columns: dict[str, str]


def list_record_files(
    source: RecordSource, skipped: Counter[str] | None = None, *, split: str | None = None
) -> list[Path] | None:
    """Return the files of a source, or None if `datasets` reads it. Raise DataError for what can't be read.

    A folder is that of a dataset: if its files are named after splits, those of the source's split are read.

    skipped  counts the files that are not read
    split    the split to read instead of the source's
    """
    skipped, path = Counter() if skipped is None else skipped, Path(source.path or "").expanduser()
    if source.path and path.is_dir() and not is_saved_dataset(path) and not source.include:
        files = dataset_files(source.path, None, split or source.split, skipped, follow_links=source.follow_links)
    else:
        if source.path and not path.is_dir() and not any(sign in source.path for sign in "*?["):
            check_file(path)
        files = source_files(source, skipped)
    found = [Path(file) for file in files[1]] if files else None
    for file in found or []:
        refuse_zip(file, "fine-tuning records")
    return found


def encode_turns(
    data: TurnData,
    tokenizer: Tokenizer,
    out: Path,
    *,
    seed: int,
    form: str = "rows",
    single: bool = False,
    apart: bool = False,
    whole: bool = False,
    keep: bool = True,
) -> dict[str, Any]:
    """Encode `data` into OUT/<key>/, unless that is done. Return the report, with the folder added.

    The key is a hash of all settings and files, so that the data of other runs is never overwritten.

    form, single, apart, whole  see `Recipe`. A row of examples has seq_len + 1 tokens, one of trees reads data.row_len
    keep   whether the folder stays: only then messages name the list of bad records in it

    Raise DataError if more records are bad than data.on_error allows, or if a file changed after it was written.
    """
    template = default_template(tokenizer)
    date = data.date if "strftime_now" in template else None
    train_on = getattr(data, "train_on", "last")
    fixed = (template, train_on, date, data.seq_len, data.too_long)
    recipe = Recipe(*fixed, form, single, apart, whole, data.decontaminate)
    searched = evaluation_checksums(data.decontaminate.files) if data.decontaminate else []
    sources, skipped = data.all_sources(), Counter()
    val = [RecordSource(name="val", path=data.val_path)] if data.val_path else []
    files = [list_record_files(source, skipped) for source in sources]
    files += [list_record_files(source, skipped, split=VALIDATION) for source in val]
    contents = [
        [file_sha256(path) for path in paths] if paths else folder_stamps(Path(source.path or source.hf).expanduser())
        for source, paths in zip((*sources, *val), files, strict=True)
    ]
    settings = data.model_dump(exclude={"on_error", "workers", "date", "path", "val_path", "sources"})
    named = [source.model_dump() for source in (*sources, *val)]
    facts = [VERSION, asdict(recipe), settings, named, seed, tokenizer.sha256, contents, searched]
    key = hashlib.sha256(json.dumps(facts, default=Decontaminate.model_dump).encode()).hexdigest()[:16]
    folder = out / key
    listed_in = folder / QUARANTINE if keep else "quarantine.jsonl of the run, once it is started"
    try:
        report = read_report(folder)
    except DataError:  # there is none yet, or it is damaged
        units = list(make_units([*sources, *val], files, data))
        report = write_examples(data, units, tokenizer, recipe, folder, seed, listed_in)
        report = seal(report | {"skipped": dict(skipped)} | describe_search(data.decontaminate))
        write_atomically(folder / REPORT, json.dumps(report, indent=2))
        delete(folder / "parts")
    check_records(Tally(**report["records"]), data, listed_in)
    return report | {"key": key, "folder": str(folder), "listed_in": str(listed_in)}


def make_units(sources: list[RecordSource], files: list[list[Path] | None], data: TurnData) -> Iterator[Unit]:
    """Yield the units of some sources, given their files, in order. If there is a val_path, it is the last source."""
    number = itertools.count()
    for source, paths in zip(sources, files, strict=True):
        columns = data.columns if source.columns is None else source.columns
        is_val = data.val_path is not None and source is sources[-1]
        found = (
            group_files(stamps_of(paths), Path(), UNIT_BYTES, whole=source.limit is not None) if paths else [((), 0)]
        )
        for pieces, size in found:
            yield Unit(f"unit-{next(number):05d}", is_val, source, tuple(pieces), size, columns)


def check_records(tally: Tally, data: TurnData, listed_in: Path | str) -> None:
    """Raise DataError if there are more bad records than the config allows."""
    tally.check(data.on_error.max_fraction, fix=data.on_error.fix, listed_in=listed_in)


# ---- a unit ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def cached_tokenizer(folder: Path, sha256: str) -> Tokenizer:
    """Load the tokenizer of a worker. `sha256` tells those of several runs in one process apart."""
    return load_tokenizer(folder)


def read_unit(unit: Unit) -> Iterator[tuple[str, bool, Iterator[Record]]]:
    """Yield (file, whether it begins the file, records) of each piece of a unit."""
    for path, span in unit.pieces:
        yield path, span is None or span[0] == 0, read_records(Path(path), span)
    if not unit.pieces:
        one, name = unit.source, unit.source.path or unit.source.hf
        saved = is_saved_dataset(Path(name).expanduser())
        if saved and (one.config or one.streaming or one.revision):
            what, fix = "config, revision and streaming do not apply to a saved dataset", "delete them"
            raise UserError(what, at=name, fix=fix)
        yield name, True, load_dataset_rows(name, one.config, one.split, one.streaming, saved, "", one.revision)


def encode_unit(unit: Unit, recipe: Recipe, parts: Path, sha256: str) -> dict[str, Any]:
    """Encode a unit into files of its own, unless that is done. Return the counts.

    parts   folder for these files; it has the tokenizer
    sha256  of the tokenizer
    """
    done = parts / f"{unit.name}.json"
    try:
        result = read_sealed(done)
        if not any(find_change(parts / entry["path"], entry) for entry in result["files"]):
            return result
    except (FileNotFoundError, ValueError):  # not done, or damaged
        pass
    tokenizer, tally, found = cached_tokenizer(parts / "tokenizer", sha256), Tally(), Found()
    lengths, examples, hits, record, texts = [], [], [], -1, None
    evals = recipe.decontaminate
    wanted = read_evaluation_ngrams(evals.files, evals.ngram)[0] if evals else None
    options = {"train_on": recipe.train_on, "date": recipe.date, "columns": unit.columns}
    options["preferences"] = recipe.form == "trees"
    left = unit.source.limit
    with (
        ShardWriter(parts / unit.name, TOKENS) as shard,
        open_atomically(parts / f"{unit.name}.bad.jsonl") as bad,
    ):

        def write_bad(one: Any) -> None:
            bad.write(json.dumps(vars(one)).encode() + b"\n")

        for path, strict, records in read_unit(unit):
            if left is not None:
                records = itertools.islice(records, max(0, left - tally.rows))  # a bad one may be many rows
            encoded = encode_records(
                records, path, tokenizer, recipe.template, tally, found, write_bad, strict=strict, **options
            )
            for example in encoded:
                lengths.append(len(example.tokens))
                if example.texts is not texts:  # examples of one record share them
                    record, texts = record + 1, example.texts
                    shared = shared_ngrams(texts, wanted, evals.ngram) if evals else ()
                    hits += [(record, gram) for gram in shared]
                fit = fit_preference if recipe.form == "trees" else fit_row
                if recipe.form == "pairs":
                    fitting = fit_pairs(example, recipe.seq_len, recipe.too_long, found)
                else:
                    room = recipe.seq_len + (not recipe.whole)
                    fitting = fit(example, room, recipe.too_long, tokenizer.bos_id, found)
                for tokens, prompt, _, parts_of in fitting:
                    shard.add(tokens)
                    first = 0 if recipe.form == "pairs" else 1  # nothing predicts the first token of a row
                    examples.append((prompt, record, np.count_nonzero(tokens[first:] >= 0), parts_of))
    save_array(parts / f"{unit.name}.examples.npy", np.array(examples, EXAMPLE))
    save_array(parts / f"{unit.name}.lengths.npy", np.array(lengths, np.int32))
    save_array(parts / f"{unit.name}.hits.npy", np.array(hits, HIT))
    names = [f"{unit.name}.{end}" for end in ("bad.jsonl", "examples.npy", "lengths.npy", "hits.npy")]
    files = [*(parts / name for name in names), *([shard.path, shard.index] if examples else [])]
    result = {
        "records": tally.counts(),
        "found": found.counts(),
        "examples": len(examples),
        "texts": record + 1,
        "files": [describe_file(path, parts) for path in files],
    }
    write_atomically(done, json.dumps(seal(result)))
    return result


# ---- all units ------------------------------------------------------------------------------------------------------


def write_examples(
    data: TurnData,
    units: list[Unit],
    tokenizer: Tokenizer,
    recipe: Recipe,
    folder: Path,
    seed: int,
    listed_in: Path | str,
) -> dict[str, Any]:
    """Encode all units, join them, and choose the rows of each split. Return the report."""
    (parts := folder / "parts").mkdir(parents=True, exist_ok=True)
    for path in (folder, parts):
        delete_leftovers(path)
    tokenizer.save(parts / "tokenizer")
    jobs = [(unit, recipe, parts, tokenizer.sha256) for unit in units]
    with open_pool(data.workers, len(units)) as pool:
        results = pool.map(encode_unit, jobs, "encode records", [unit.size for unit in units])
    tally, found = Tally(), Found()
    for result in results:
        tally.merge(Tally(**result["records"]))
        found.merge(Found.from_counts(result["found"]))
    bad = [(unit.pieces, parts / f"{unit.name}.bad.jsonl") for unit in units]
    tally.first = write_quarantine(bad, folder / QUARANTINE) or None
    check_records(tally, data, listed_in)
    filled = [unit for unit, result in zip(units, results, strict=True) if result["examples"]]
    if not filled:
        raise no_examples_error(data, found, tally, listed_in)
    ends = join_tokens([parts / unit.name for unit in filled], folder / "examples")
    examples = np.concatenate([load_array(parts / f"{unit.name}.examples.npy") for unit in filled])
    if recipe.form == "trees" and not recipe.single:
        check_pairs(examples["parts"], filled[0].source.path)
    lengths = np.concatenate([load_array(parts / f"{unit.name}.lengths.npy") for unit in units])
    sizes = [result["examples"] for result in results]
    names = np.repeat([unit.source.name for unit in units], sizes)
    is_val = np.repeat([unit.is_val for unit in units], sizes)
    train, val, is_shared = choose_splits(examples["prompt"], is_val, data.val_fraction, seed)
    if recipe.decontaminate:
        starts = np.cumsum([0, *(result["texts"] for result in results)])
        hits = [load_array(parts / f"{unit.name}.hits.npy") for unit in units]
        owners = np.concatenate([one["record"] + start for one, start in zip(hits, starts, strict=False)])
        grams, most = np.concatenate([one["gram"] for one in hits]), recipe.decontaminate.ignore_if_in_docs
        records = examples["record"] + np.repeat(starts[:-1], sizes)
        flagged = flag_contaminated(owners, grams, int(starts[-1]), most)[records]
        found.contaminated = int(flagged.sum())
        if recipe.decontaminate.action == "drop":
            train, val = train & ~flagged, val & ~flagged
    weights = {source.name: source.weight for source in data.sources if source.weight}

    def plan(chosen: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        if recipe.form == "pairs":
            return plan_pairs(ends, examples["targets"], chosen)
        if recipe.form == "trees":
            options = {"packing": data.packing is not False, "single": recipe.single, "apart": recipe.apart}
            return plan_trees(ends, examples["targets"], examples["parts"], chosen, data.row_len, **options)
        return plan_rows(ends, examples["targets"], chosen, data.seq_len + 1, data.packing is not False)

    planned = {"val": plan(val)}
    for name in weights:
        if not (train & (names == name)).any():
            what, fix = f"source {name} has a weight, but no example to train on", "leave it out, or see its records"
            raise DataError(what, got=tally.describe(listed_in) or None, fix=fix)
    groups = [plan(train & (names == name)) for name in weights] or [plan(train)]
    planned["train"] = join_plans(groups)
    if not planned["train"][1]["rows"]:
        raise no_examples_error(data, found, tally, listed_in)
    plan_files = []
    for split, (arrays, _) in planned.items():
        for name, values in arrays.items():
            plan_files.append(folder / f"{split}-{name}.npy")
            save_array(plan_files[-1], values)
    files = [folder / "examples.bin", folder / "examples.idx", *plan_files]
    quantiles = np.quantile(lengths, list(LENGTHS.values()), method="inverted_cdf")
    return {
        "files": [describe_file(path, folder) for path in files],
        "records": tally.counts(),
        "found": found.counts(),
        "lengths": dict(zip(LENGTHS, map(int, quantiles), strict=True)),
        "seq_len": data.seq_len,
        "row_len": data.row_len,
        "form": recipe.form,
        "apart": recipe.apart,
        "too_long": data.too_long,
        "eos_id": tokenizer.eos_id,
        "splits": {split: planned[split][1] for split in ("train", "val")},
        "prompts in both": is_shared,
        "val prompts in train": int((is_val & ~val).sum()),
        "sources": {name: counts["rows"] for name, (_, counts) in zip(weights, groups, strict=False)},
    }


def join_tokens(parts: list[Path], out: Path) -> np.ndarray:
    """Join the tokens of parts in OUT.bin, and write and return the ends of the examples in them."""
    ends, tokens = [], 0
    with open_atomically(out.with_name(f"{out.name}.bin")) as file:
        for part in parts:
            with part.with_name(f"{part.name}.bin").open("rb") as source:
                shutil.copyfileobj(source, file, 2**22)
            ends.append(np.fromfile(part.with_name(f"{part.name}.idx"), "<i8") + tokens)
            tokens = int(ends[-1][-1])
    joined = np.concatenate(ends)
    write_atomically(out.with_name(f"{out.name}.idx"), joined.astype("<i8").tobytes())
    return joined


def join_plans(plans: list[tuple[dict[str, np.ndarray], dict[str, Any]]]) -> tuple[dict[str, np.ndarray], dict]:
    """Join the rows of several sources, one source after another."""
    arrays = {name: [one[name] for one, _ in plans] for name in plans[0][0]}
    if "rows" in arrays:  # they are ends among the pieces
        members = arrays["pieces" if "pieces" in arrays else "trees"]
        before = np.cumsum([0, *map(len, members[:-1])])
        arrays["rows"] = [rows + start for rows, start in zip(arrays["rows"], before, strict=True)]
    counts: dict[str, Any] = {}
    for name in plans[0][1]:
        values = [one[name] for _, one in plans]
        if name == "longest":
            counts[name] = [max(value) for value in zip(*values, strict=True)]
        else:
            counts[name] = max(values) if name == "most" else sum(values)
    return {name: np.concatenate(values) for name, values in arrays.items()}, counts


def no_examples_error(data: TurnData, found: Found, tally: Tally, listed_in: Path | str) -> DataError:
    """Return the error for data of which no example is left."""
    reasons = [
        f"{number} examples {fate}, longer than {data.seq_len} tokens" for fate, number in found.too_long.items()
    ]
    reasons += [f"{found.without_target} without a target"] if found.without_target else []
    nothing = "no usable record" if tally.rows else "no record at all"
    got = "; ".join([", ".join(reasons) or nothing, *filter(None, [tally.describe(listed_in)])])
    at = data.path or ", ".join(source.name for source in data.sources)
    other = "truncate_prompt" if isinstance(data, PreferenceData) else "split"
    fix = f"raise data.seq_len if the model has longer positions, or set data.too_long: {other}"
    return DataError("no example is left to train on", at=at, got=got, fix=fix if found.too_long else None)
