"""Look up documents of a build: why a document was kept or dropped, and random samples of kept and dropped ones."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.config.data import CorpusData
from llmkit.corpus.build import decision_folder, is_built, make_recipe
from llmkit.corpus.decide import FATES, VAL, collect_limits, explain_fate
from llmkit.corpus.units import Unit, read_zst
from llmkit.data.tokens import load_array
from llmkit.errors import DataError, UserError, did_you_mean
from llmkit.readers.words import TextFeatures, hash_ngrams


def find_build(data: CorpusData) -> tuple[list[Unit], Path]:
    """Return the units of the finished build of this config, and the folder of its decisions."""
    units, _, _, recipe = make_recipe(data)
    if not is_built(Path(data.dir), recipe):
        other = (Path(data.dir) / "manifest.json").is_file()
        raise DataError(
            "data.dir holds a build of another config" if other else "this data is not built",
            at=data.dir,
            fix="give the same -o as `llmkit data build`, or build again" if other else "llmkit data build CONFIG",
        )
    return units, decision_folder(Path(data.dir), recipe)


def explain_document(data: CorpusData, id: str) -> dict[str, Any]:
    """Return the fate of a document and the reason: {id, fate, why, instead, scores: {rule: "value (limits)"}, text}.

    instead  the id of the document that was kept instead of this duplicate
    """
    (units, decided), parts = find_build(data), Path(data.dir) / "parts"
    for unit in units:
        if not id.startswith(f"{unit.source['name']}/"):
            continue
        for number, record in enumerate(read_zst(parts / f"{unit.part}.jsonl.zst")):
            if record["id"] == id:
                return describe_document(data, decided, units, unit, number, record)
    names, source = [unit.source["name"] for unit in units], id.partition("/")[0]
    hint = did_you_mean(source, names) if source not in names else None
    fix = hint or "ids are printed by --kept and --dropped; bad records are in quarantine.jsonl"
    raise DataError("no document has this id", at=data.dir, got=id, fix=fix)


def describe_document(
    data: CorpusData, decided: Path, units: list[Unit], unit: Unit, number: int, record: dict[str, Any]
) -> dict[str, Any]:
    """Return what `explain_document` returns, for document `number` of a unit."""
    parts, profile = Path(data.dir) / "parts", unit.source["profile"]
    row = load_array(parts / f"{unit.part}.scores.npy")[number]
    fate, replacement = load_array(decided / f"{unit.part}.fate.npy")[number]
    limits, scores = collect_limits(data, profile), {}
    for name in row.dtype.names[2:]:  # skip the key and the size
        shown = ", ".join(f"{bound} {value:g}" for bound, value in (limits.get(name) or {}).items())
        value = row[name].decode() if name == "language" else f"{row[name]:.4g}"
        scores[name] = f"{value}  ({shown})" if shown else value
    found = {"id": record["id"], "fate": FATES[fate] if fate > VAL else f"kept, in the {FATES[fate]} split"}
    if fate > VAL:
        found["why"] = explain_fate(row, int(fate), data, profile)
    if FATES[fate] == "contaminated":
        found["shared with an evaluation file"] = find_shared_ngram(data, parts, unit, number, record["text"])
    if replacement >= 0:
        found["instead"] = find_id(units, parts, decided, int(replacement))
    if url := record.get("url"):
        found["url"] = url
    return found | {"scores": scores, "text": record["text"]}


def find_shared_ngram(data: CorpusData, parts: Path, unit: Unit, number: int, text: str) -> str:
    """Return the first n-gram of a document that is also in an evaluation file."""
    hits, features, n = load_array(parts / f"{unit.part}.hits.npy"), TextFeatures(text), data.decontaminate.ngram
    grams = hits["gram"][hits["document"] == number]
    first = int(np.flatnonzero(np.isin(hash_ngrams(features.hashes, n), grams))[0])
    return b" ".join(features.folded[first : first + n]).decode("utf-8", "replace")


def find_id(units: list[Unit], parts: Path, decided: Path, index: int) -> str:
    """Return the id of the document with this index among the documents of all units."""
    for unit in units:
        size = len(load_array(decided / f"{unit.part}.fate.npy", mmap_mode="r"))
        if index < size:
            return next(itertools.islice(read_zst(parts / f"{unit.part}.jsonl.zst"), index, None))["id"]
        index -= size
    raise IndexError(index)


def sample_documents(
    data: CorpusData, number: int, *, kept: bool, rule: str | None = None, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Yield a random sample of the documents that were kept, or dropped (by one rule): {id, why, text}."""
    if rule is not None and rule not in FATES[VAL + 1 :]:
        fix = did_you_mean(rule, FATES) or f"one of: {', '.join(FATES[VAL + 1 :])}"
        raise UserError("no such reason to drop", got=rule, fix=fix)
    (units, decided), parts = find_build(data), Path(data.dir) / "parts"
    fates = [load_array(decided / f"{unit.part}.fate.npy")["fate"] for unit in units]
    wanted = [f <= VAL if kept else f > VAL if rule is None else f == FATES.index(rule) for f in fates]
    candidates = [(i, row) for i, flags in enumerate(wanted) for row in np.flatnonzero(flags).tolist()]
    chosen = [candidates[i] for i in np.random.default_rng(seed).permutation(len(candidates))[:number]]
    for i, unit in enumerate(units):
        rows = {row for owner, row in chosen if owner == i}
        if rows:
            scores = load_array(parts / f"{unit.part}.scores.npy")
            for row, record in enumerate(read_zst(parts / f"{unit.part}.jsonl.zst")):
                if row in rows:
                    why = explain_fate(scores[row], int(fates[i][row]), data, unit.source["profile"])
                    yield {"id": record["id"], "why": why, "text": record["text"]}
