"""Looking at documents of a build: why one was kept or dropped, and samples of both, to be read by eye."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.config.schema import CorpusData
from llmkit.corpus.build import decision_folder, is_built, make_recipe
from llmkit.corpus.decide import FATES, VAL, limits_of, reason
from llmkit.corpus.units import Unit, load_array, read_zst
from llmkit.corpus.words import TextFeatures, hash_ngrams
from llmkit.errors import DataError, UserError, did_you_mean


def built_units(data: CorpusData) -> tuple[list[Unit], Path]:
    """The units of a build that is there and fits the config, and the folder of what was decided of them."""
    units, _, recipe = make_recipe(data)
    if not is_built(Path(data.dir), recipe):
        other = (Path(data.dir) / "manifest.json").is_file()
        raise DataError(
            "data.dir holds a build of another config" if other else "this data is not built",
            at=data.dir,
            fix="give the same -o as `llmkit data build`, or build again" if other else "llmkit data build CONFIG",
        )
    return units, decision_folder(Path(data.dir), recipe)


def explain_document(data: CorpusData, id: str) -> dict[str, Any]:
    """What became of a document and why: {id, fate, why, instead, scores: {rule: "value (limits)"}, text}.

    instead  the document that was kept in the place of a duplicate
    """
    (units, decided), parts = built_units(data), Path(data.dir) / "parts"
    for unit in units:
        if not id.startswith(f"{unit.source['name']}/"):
            continue
        for number, record in enumerate(read_zst(parts / f"{unit.part}.jsonl.zst")):
            if record["id"] == id:
                return describe(data, decided, units, unit, number, record)
    names, source = [unit.source["name"] for unit in units], id.partition("/")[0]
    fix = "ids are printed by --kept and --dropped; bad records are in quarantine.jsonl"
    fix = fix if source in names else did_you_mean(source, names) or fix
    raise DataError("no document has this id", at=data.dir, got=id, fix=fix)


def describe(
    data: CorpusData, decided: Path, units: list[Unit], unit: Unit, number: int, record: dict[str, Any]
) -> dict[str, Any]:
    """See `explain_document`."""
    parts, profile = Path(data.dir) / "parts", unit.source["profile"]
    row = load_array(parts / f"{unit.part}.scores.npy")[number]
    fate, stand_in = load_array(decided / f"{unit.part}.fate.npy")[number]
    checks, scores = limits_of(data, profile), {}
    for name in row.dtype.names[2:]:  # after the key and the size
        limits = ", ".join(f"{word} {value:g}" for word, value in (checks.get(name) or {}).items())
        value = row[name].decode() if name == "language" else f"{row[name]:.4g}"
        scores[name] = f"{value}{f'  ({limits})' if limits else ''}"
    found = {"id": record["id"], "fate": FATES[fate] if fate > VAL else f"kept, in the {FATES[fate]} split"}
    if fate > VAL:
        found["why"] = reason(row, int(fate), data, profile)
    if FATES[fate] == "contaminated":
        found["shared with an evaluation file"] = shared_words(data, parts, unit, number, record["text"])
    if stand_in >= 0:
        found["instead"] = id_at(units, parts, decided, int(stand_in))
    if url := record.get("url"):
        found["url"] = url
    return found | {"scores": scores, "text": record["text"]}


def shared_words(data: CorpusData, parts: Path, unit: Unit, number: int, text: str) -> str:
    """The first n-gram of a document that an evaluation file has too."""
    hits, cut, n = load_array(parts / f"{unit.part}.hits.npy"), TextFeatures(text), data.decontaminate.ngram
    grams = hits["gram"][hits["document"] == number]
    first = int(np.flatnonzero(np.isin(hash_ngrams(cut.hashes, n), grams))[0])
    return b" ".join(cut.folded[first : first + n]).decode("utf-8", "replace")


def id_at(units: list[Unit], parts: Path, decided: Path, place: int) -> str:
    """The id of the document at a place in the order of all."""
    for unit in units:
        size = len(load_array(decided / f"{unit.part}.fate.npy", mmap_mode="r"))
        if place < size:
            return next(r["id"] for i, r in enumerate(read_zst(parts / f"{unit.part}.jsonl.zst")) if i == place)
        place -= size
    raise IndexError(place)


def sample_documents(
    data: CorpusData, number: int, *, kept: bool, rule: str | None = None, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Some documents that were kept, or dropped (by one rule), drawn from all: {id, why, text}."""
    if rule is not None and rule not in FATES[VAL + 1 :]:
        fix = did_you_mean(rule, FATES) or f"one of: {', '.join(FATES[VAL + 1 :])}"
        raise UserError("no such reason to drop", got=rule, fix=fix)
    (units, decided), parts = built_units(data), Path(data.dir) / "parts"
    fates = [load_array(decided / f"{unit.part}.fate.npy")["fate"] for unit in units]
    wanted = [f <= VAL if kept else f > VAL if rule is None else f == FATES.index(rule) for f in fates]
    places = [(i, row) for i, flags in enumerate(wanted) for row in np.flatnonzero(flags).tolist()]
    drawn = np.random.default_rng(seed).permutation(len(places))[:number]
    chosen = {places[i] for i in drawn}
    for i, unit in enumerate(units):
        rows = {row for where, row in chosen if where == i}
        if rows:
            scores = load_array(parts / f"{unit.part}.scores.npy")
            for row, record in enumerate(read_zst(parts / f"{unit.part}.jsonl.zst")):
                if row in rows:
                    why = reason(scores[row], int(fates[i][row]), data, unit.source["profile"])
                    yield {"id": record["id"], "why": why, "text": record["text"]}
