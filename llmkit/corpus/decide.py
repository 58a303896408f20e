"""Pass B: what becomes of every document, from what was measured of it. No text is read, so it is a matter of seconds.

A document's fate is a number in FATES. The order is that of the list: a document is dropped by the first thing that
is wrong with it; only what the rules keep is compared with its like.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmkit.config.schema import CorpusData, NearDedup
from llmkit.corpus.dedup import first_of_equals, least_agreement, longest_of, near_clusters
from llmkit.corpus.filters import RULES, Bounds, outside, profile_limits, why
from llmkit.corpus.scorers import evaluation_ngrams
from llmkit.corpus.units import Unit, load_array, save_array
from llmkit.corpus.words import GOLDEN, mix

TRAIN, VAL = 0, 1
FATES = (
    "train",
    "val",
    "empty",
    "language",
    *RULES,
    "listed_words",
    "classifier",
    "pii",
    "exact duplicate",
    "near duplicate",
    "contaminated",
    "repeated paragraphs",
)
FATE = {name: number for number, name in enumerate(FATES)}
PAIRS = 100_000  # whose sketches are compared at a time
MIN_VAL_DOCUMENTS = 4  # documents that whole ones would give to val: below this, every document gives its tail
MAX_CUT_FRACTION = 0.8  # of a document in paragraphs that stood before: what is left would be scraps


@dataclass
class Decision:
    """What pass B found, for the report; the fates themselves lie in the units' .fate.npy files."""

    by_tail: bool  # whether the val split is the tail of every document, because there are few
    fates: list[np.ndarray]  # (documents,) of each unit, uint8
    clusters: int  # of near duplicates with more than one member
    largest: int  # members of the largest
    contamination: dict[str, int]
    cut_paragraphs: int

    @property
    def documents(self) -> int:
        return sum(int((fates <= VAL).sum()) for fates in self.fates)


def limits_of(data: CorpusData, profile: str) -> Bounds:
    """Limits by fate, in the order in which they are looked at."""
    checks = {"empty": {"low": 1}}
    if data.filter.language:
        checks["language"] = {"low": data.filter.language.min_score}
    checks |= profile_limits(profile, data.filter.rules)
    if data.filter.words:
        checks["listed_words"] = {"high": data.filter.words.max_per_1k}
    if data.filter.classifier:
        checks["classifier"] = {"high": data.filter.classifier.max_score}
    if data.pii.kinds:
        checks["pii"] = {"high": 0 if data.pii.action == "drop" else data.pii.drop_above}
    return checks


def values_of(table: np.ndarray, fate: str, data: CorpusData) -> np.ndarray:
    """What a check looks at, for every document of a unit."""
    if fate == "empty":
        return table["bytes"]
    if fate == "language":
        wanted = np.isin(table["language"], [code.encode() for code in data.filter.language.keep])
        return np.where(wanted, table["language_score"], -1.0)  # below any min_score, 0 too
    return table[fate]


def judge(table: np.ndarray, data: CorpusData, profile: str) -> np.ndarray:
    """(documents,) uint8: the first check that drops each, or TRAIN."""
    fates = np.full(len(table), TRAIN, np.uint8)
    for fate, limits in limits_of(data, profile).items():
        bad = outside(values_of(table, fate, data), limits) if limits else np.zeros(len(table), bool)
        fates[bad & (fates == TRAIN)] = FATE[fate]
    return fates


def reason(row: np.ndarray, fate: int, data: CorpusData, profile: str) -> str:
    """In words why a document with these scores was dropped, or only the fate's name."""
    name = FATES[fate]
    if name == "language":
        code, wanted = row["language"].decode(), data.filter.language
        if code not in wanted.keep:
            return f"language {code}, not {', '.join(wanted.keep)}"
        return f"language {code} {row['language_score']:.2f} < {wanted.min_score:g}"
    limits = limits_of(data, profile).get(name)
    return why(name, float(values_of(row[None], name, data)[0]), limits) if limits and name != "empty" else name


@dataclass
class Ledger:
    """What is known of all documents, unit after unit: arrays of the shape (documents,), about 60 bytes of each."""

    starts: np.ndarray  # (units + 1,): where each unit's documents begin
    fates: np.ndarray  # uint8
    lengths: np.ndarray  # bytes
    keys: np.ndarray  # the first half of the exact key, which also draws the val split
    heads: np.ndarray  # the first of a document's cluster: all of a cluster go where its head goes
    stand_ins: np.ndarray  # the document that stays for a dropped duplicate; itself for others

    @property
    def kept(self) -> np.ndarray:
        """Places of the documents that nothing was found against yet."""
        return np.flatnonzero(self.fates == TRAIN).astype(self.heads.dtype)


def decide(units: list[Unit], data: CorpusData, parts: Path, decided: Path) -> Decision:
    """Settle the fate of every document; writes each unit's .fate.npy (fate, stand-in) and .cut.npy (its paragraphs).

    Memory holds the ledger, and what was found in some documents: n-grams of evaluation files, long paragraphs.
    """
    ledger = open_ledger(units, data, parts)
    clusters, largest = join_near(ledger, units, parts, data.dedup.near) if data.dedup.near else (0, 0)
    contamination = find_contaminated(ledger, units, data, parts)
    cuts = find_repeated_paragraphs(ledger, units, parts) if data.dedup.paragraphs else None
    by_tail = hold_out(ledger, data)
    decided.mkdir(exist_ok=True)
    for i, unit in enumerate(units):
        here = np.arange(ledger.starts[i], ledger.starts[i + 1])
        table = np.zeros(len(here), [("fate", "u1"), ("stand_in", "<i8")])
        table["fate"], table["stand_in"] = ledger.fates[here], ledger.stand_ins[here]
        table["stand_in"][table["stand_in"] == here] = -1
        save_array(decided / f"{unit.part}.fate.npy", table)
        save_array(decided / f"{unit.part}.cut.npy", cuts[i] if cuts else np.empty(0, bool))
    cut = sum(int(one.sum()) for one in cuts or [])
    return Decision(by_tail, np.split(ledger.fates, ledger.starts[1:-1]), clusters, largest, contamination, cut)


def open_ledger(units: list[Unit], data: CorpusData, parts: Path) -> Ledger:
    """Open the ledger: every document judged by itself, and exact duplicates put together."""
    starts = np.cumsum([0, *(load_array(parts / f"{unit.part}.scores.npy", mmap_mode="r").shape[0] for unit in units)])
    number = int(starts[-1])
    index = np.int32 if number < 2**31 else np.int64
    fates, lengths = np.empty(number, np.uint8), np.empty(number, np.uint32)
    keys, keys_too = np.empty(number, np.uint64), np.empty(number, np.uint64)
    for unit, start, stop in zip(units, starts, starts[1:], strict=False):
        table = load_array(parts / f"{unit.part}.scores.npy")
        fates[start:stop] = judge(table, data, unit.source["profile"])
        lengths[start:stop] = table["bytes"]
        keys[start:stop], keys_too[start:stop] = table["key"].T
    ledger = Ledger(starts, fates, lengths, keys, np.arange(number, dtype=index), np.arange(number, dtype=index))
    kept = ledger.kept
    ledger.heads[kept] = kept[first_of_equals(keys[kept], keys_too[kept])]
    if data.dedup.exact:
        ledger.stand_ins[kept] = ledger.heads[kept]
        fates[kept[ledger.heads[kept] != kept]] = FATE["exact duplicate"]
    return ledger


def join_near(ledger: Ledger, units: list[Unit], parts: Path, near: NearDedup) -> tuple[int, int]:
    """Put near duplicates together, and drop all but the longest; returns (clusters, documents in the largest)."""
    kept, least = ledger.kept, least_agreement(near.bands, near.rows)
    together = near_clusters(
        len(kept),
        (band_column(units, parts, ledger.starts, band)[kept] for band in range(near.bands)),
        lambda left, right: agreement(units, parts, ledger.starts, kept[left], kept[right]) >= least,
    )
    ledger.heads[kept] = ledger.heads[kept[together]]
    if near.keep == "longest":
        ledger.stand_ins[kept] = kept[longest_of(together, ledger.lengths[kept])]
        ledger.fates[kept[ledger.stand_ins[kept] != kept]] = FATE["near duplicate"]
        ledger.stand_ins = ledger.stand_ins[ledger.stand_ins]  # one that stayed for its equals may be gone now
    sizes = np.bincount(together)
    return int((sizes > 1).sum()), int(sizes.max(initial=0))


def hold_out(ledger: Ledger, data: CorpusData) -> bool:
    """Give whole clusters to val; True where there are so few documents that the tail of each has to do."""
    kept = ledger.kept
    if len(kept) * data.split.val_fraction < MIN_VAL_DOCUMENTS:
        return True
    drawn = draw(ledger.keys[ledger.heads[kept]], data.seed) < data.split.val_fraction
    ledger.fates[kept[drawn]] = VAL
    return False


def draw(keys: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1) for each key, which depends on it and the seed alone."""
    return mix(keys + np.array([seed], np.uint64) * GOLDEN) / 2.0**64


def band_column(units: list[Unit], parts: Path, starts: np.ndarray, band: int) -> np.ndarray:
    """One band's keys of all documents. Mapped and let go at once, so that only these bytes come into memory."""
    keys = np.empty(starts[-1], np.uint64)
    for i, unit in enumerate(units):
        keys[starts[i] : starts[i + 1]] = load_array(parts / f"{unit.part}.bands.npy", mmap_mode="r")[band]
    return keys


def agreement(units: list[Unit], parts: Path, starts: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The share of rows in which the sketches of each pair of documents agree: it estimates their similarity."""
    shares = []
    for begin in range(0, len(left), PAIRS):
        wanted = np.concatenate([left[begin : begin + PAIRS], right[begin : begin + PAIRS]])
        unit_of, rows = np.searchsorted(starts, wanted, side="right") - 1, {}
        for number in np.unique(unit_of).tolist():
            sketches = load_array(parts / f"{units[number].part}.sketches.npy", mmap_mode="r")
            here = np.flatnonzero(unit_of == number)
            rows[number] = here, sketches[wanted[here] - starts[number]]
        table = np.empty((len(wanted), sketches.shape[1]), np.uint8)
        for here, found in rows.values():
            table[here] = found
        one, other = np.split(table, 2)
        shares.append((one == other).mean(axis=1))
    return np.concatenate(shares)


def find_contaminated(ledger: Ledger, units: list[Unit], data: CorpusData, parts: Path) -> dict[str, int]:
    """Drop what shares a rare n-gram with the evaluation files; returns counts for the report.

    A cluster of duplicates counts once, lest copies of a leaked question make its n-grams look common.
    """
    evals = data.decontaminate
    if evals is None:
        return {}
    _, texts, short = evaluation_ngrams(evals.files, evals.ngram)
    hits = [load_array(parts / f"{unit.part}.hits.npy") for unit in units]
    documents = np.concatenate([one["document"] + start for one, start in zip(hits, ledger.starts, strict=False)])
    grams = np.concatenate([one["gram"] for one in hits])
    here = ledger.fates[documents] == TRAIN
    documents, grams = documents[here], grams[here]
    unique, which = np.unique(grams, return_inverse=True)
    pairs = np.unique(np.stack([which, ledger.heads[documents]], axis=1), axis=0)
    rare = np.bincount(pairs[:, 0], minlength=len(unique)) <= evals.ignore_if_in_docs
    flagged = np.unique(documents[rare[which]])
    if evals.action == "drop":
        ledger.fates[flagged] = FATE["contaminated"]
    return {
        "evaluation texts": texts,
        f"shorter than {evals.ngram} words, not looked for": short,
        "contaminated documents": len(flagged),
        "n-grams found": int(rare.sum()),
        "common n-grams ignored": len(unique) - int(rare.sum()),
    }


def find_repeated_paragraphs(ledger: Ledger, units: list[Unit], parts: Path) -> list[np.ndarray]:
    """For each unit which of its long paragraphs stood in an earlier place; drops documents that are little else."""
    found = [load_array(parts / f"{unit.part}.paragraphs.npy") for unit in units]
    documents = np.concatenate([one["document"] + start for one, start in zip(found, ledger.starts, strict=False)])
    keys, sizes = (np.concatenate([one[name] for one in found]) for name in ("key", "bytes"))
    for dropping in (True, False):  # again for those that are left: what stood in a dropped one has to stay elsewhere
        here = np.flatnonzero(ledger.fates[documents] == TRAIN)
        cut = np.zeros(len(documents), bool)
        cut[here] = True
        cut[here[np.unique(keys[here], return_index=True)[1]]] = False  # the first of equals stays
        if dropping:
            gone = np.bincount(documents[cut], weights=sizes[cut], minlength=len(ledger.fates))
            ledger.fates[gone > MAX_CUT_FRACTION * ledger.lengths] = FATE["repeated paragraphs"]
    return np.split(cut, np.cumsum([len(one) for one in found])[:-1])


def count_fates(fates: np.ndarray) -> Counter[str]:
    """How many documents met each fate."""
    return Counter({FATES[i]: int(n) for i, n in enumerate(np.bincount(fates, minlength=len(FATES))) if n})
