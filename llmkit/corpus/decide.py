"""Pass B: decide the fate of every document from the scores of pass A, without reading any text, in seconds.

A fate is an index into FATES: the split of a kept document, or the check that dropped it. Checks run in the order of
that list, and the first one that a document fails drops it. Only documents that pass all rules are compared with
each other.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmkit.config.data import CorpusData, NearDedup
from llmkit.corpus.dedup import first_occurrences, longest_of, min_agreement, near_clusters
from llmkit.corpus.filters import RULES, Bounds, explain, is_outside, profile_limits
from llmkit.corpus.units import Unit
from llmkit.data.tokens import load_array, save_array
from llmkit.readers.ngrams import read_evaluation_ngrams
from llmkit.readers.words import GOLDEN, mix

TRAIN, VAL = 0, 1
FATES = ("train", "val", "empty", "language", *RULES, "listed_words", "classifier", "pii")
FATES += ("exact duplicate", "near duplicate", "contaminated", "repeated paragraphs")  # compared with other texts
FATE_IDS = {name: number for number, name in enumerate(FATES)}
PAIRS_PER_BLOCK = 100_000  # pairs of sketches compared at a time
MIN_VAL_DOCUMENTS = 4  # with fewer, val consists of the tails of all documents instead of whole documents
MAX_CUT_FRACTION = 0.8  # a document is dropped if repeated paragraphs are more of its bytes


@dataclass
class Decision:
    """The results of pass B that the report shows; the fates are also in the units' .fate.npy files."""

    by_tail: bool  # the val split is the tail of every document, because there are few
    fates: list[np.ndarray]  # (documents,) of each unit, uint8
    clusters: int  # clusters of near duplicates with more than one member
    largest: int  # members of the largest cluster
    contamination: dict[str, int]
    cut_paragraphs: int

    @property
    def documents(self) -> int:
        return sum(int((fates <= VAL).sum()) for fates in self.fates)


def collect_limits(data: CorpusData, profile: str) -> Bounds:
    """Return the limits of every check by fate, in the order in which the checks run."""
    limits = {"empty": {"low": 1}}
    if data.filter.language:
        limits["language"] = {"low": data.filter.language.min_score}
    limits |= profile_limits(profile, data.filter.rules)
    if data.filter.words:
        limits["listed_words"] = {"high": data.filter.words.max_per_1k}
    if data.filter.classifier:
        limits["classifier"] = {"high": data.filter.classifier.max_score}
    if data.pii.kinds:
        limits["pii"] = {"high": 0 if data.pii.action == "drop" else data.pii.drop_above}
    return limits


def select_values(scores: np.ndarray, fate: str, data: CorpusData) -> np.ndarray:
    """Return the values that a check compares with its limits, one per document of a unit."""
    if fate == "empty":
        return scores["bytes"]
    if fate == "language":
        wanted = np.isin(scores["language"], [code.encode() for code in data.filter.language.keep])
        return np.where(wanted, scores["language_score"], -1.0)  # -1 is below any min_score, even 0
    return scores[fate]


def apply_limits(scores: np.ndarray, data: CorpusData, profile: str) -> np.ndarray:
    """Return the fate of each document as (documents,) uint8: the first check that it fails, or TRAIN."""
    fates = np.full(len(scores), TRAIN, np.uint8)
    for fate, limits in collect_limits(data, profile).items():
        if limits:
            fates[is_outside(select_values(scores, fate, data), limits) & (fates == TRAIN)] = FATE_IDS[fate]
    return fates


def explain_fate(row: np.ndarray, fate: int, data: CorpusData, profile: str) -> str:
    """Return why a document with these scores was dropped: the value and the limit, or else just the fate's name."""
    name = FATES[fate]
    if name == "language":
        code, wanted = row["language"].decode(), data.filter.language
        if code not in wanted.keep:
            return f"language {code}, not {', '.join(wanted.keep)}"
        return f"language {code} {row['language_score']:.2f} < {wanted.min_score:g}"
    limits = collect_limits(data, profile).get(name)
    if not limits or name == "empty":
        return name
    return explain(name, float(select_values(row[None], name, data)[0]), limits)


@dataclass
class DocumentTable:
    """Hold the state of all documents, unit after unit, in (documents,) arrays: about 60 bytes per document."""

    unit_starts: np.ndarray  # (units + 1,): the index of each unit's first document
    fates: np.ndarray  # uint8
    lengths: np.ndarray  # bytes
    keys: np.ndarray  # first half of the exact key; also decides which documents go to val
    cluster_heads: np.ndarray  # first document of the cluster: a whole cluster goes to the split of its head
    replacements: np.ndarray  # the document that is kept instead of a dropped duplicate; itself for others

    @property
    def kept(self) -> np.ndarray:
        """Return the indices of the documents that no check has dropped so far."""
        return np.flatnonzero(self.fates == TRAIN).astype(self.cluster_heads.dtype)


def decide(units: list[Unit], data: CorpusData, parts: Path, decided: Path) -> Decision:
    """Decide the fate of every document, and write each unit's .fate.npy (fate, replacement) and .cut.npy (paragraphs).

    Memory holds the document table, the n-gram hits of evaluation files and the hashes of long paragraphs.
    """
    docs = make_document_table(units, data, parts)
    clusters, largest = drop_near_duplicates(docs, units, parts, data.dedup.near) if data.dedup.near else (0, 0)
    contamination = find_contaminated(docs, units, data, parts)
    cuts = find_repeated_paragraphs(docs, units, parts) if data.dedup.paragraphs else None
    by_tail = assign_val_split(docs, data)
    decided.mkdir(exist_ok=True)
    for i, unit in enumerate(units):
        indices = np.arange(docs.unit_starts[i], docs.unit_starts[i + 1])
        table = np.zeros(len(indices), [("fate", "u1"), ("stand_in", "<i8")])
        table["fate"], table["stand_in"] = docs.fates[indices], docs.replacements[indices]
        table["stand_in"][table["stand_in"] == indices] = -1
        save_array(decided / f"{unit.part}.fate.npy", table)
        save_array(decided / f"{unit.part}.cut.npy", cuts[i] if cuts else np.empty(0, bool))
    cut_paragraphs = sum(int(cut.sum()) for cut in cuts or [])
    fates = np.split(docs.fates, docs.unit_starts[1:-1])
    return Decision(by_tail, fates, clusters, largest, contamination, cut_paragraphs)


def make_document_table(units: list[Unit], data: CorpusData, parts: Path) -> DocumentTable:
    """Make the table of all documents: apply the limits to each of them, and drop exact duplicates."""
    starts = np.cumsum([0, *(len(load_array(parts / f"{unit.part}.scores.npy", mmap_mode="r")) for unit in units)])
    number = int(starts[-1])
    index = np.int32 if number < 2**31 else np.int64
    fates, lengths = np.empty(number, np.uint8), np.empty(number, np.uint32)
    keys, second_keys = np.empty(number, np.uint64), np.empty(number, np.uint64)
    for unit, start, stop in zip(units, starts, starts[1:], strict=False):
        scores = load_array(parts / f"{unit.part}.scores.npy")
        fates[start:stop] = apply_limits(scores, data, unit.source["profile"])
        lengths[start:stop] = scores["bytes"]
        keys[start:stop], second_keys[start:stop] = scores["key"].T
    docs = DocumentTable(starts, fates, lengths, keys, np.arange(number, dtype=index), np.arange(number, dtype=index))
    kept = docs.kept
    docs.cluster_heads[kept] = kept[first_occurrences(keys[kept], second_keys[kept])]
    if data.dedup.exact:
        docs.replacements[kept] = docs.cluster_heads[kept]
        fates[kept[docs.cluster_heads[kept] != kept]] = FATE_IDS["exact duplicate"]
    return docs


def drop_near_duplicates(docs: DocumentTable, units: list[Unit], parts: Path, near: NearDedup) -> tuple[int, int]:
    """Cluster near duplicates and drop all but the longest; return (clusters, documents in the largest)."""
    kept, threshold = docs.kept, min_agreement(near.bands, near.rows)
    clusters = near_clusters(
        len(kept),
        (load_band(units, parts, docs.unit_starts, band)[kept] for band in range(near.bands)),
        lambda left, right: compare_sketches(units, parts, docs.unit_starts, kept[left], kept[right]) >= threshold,
    )
    docs.cluster_heads[kept] = docs.cluster_heads[kept[clusters]]
    if near.keep == "longest":
        docs.replacements[kept] = kept[longest_of(clusters, docs.lengths[kept])]
        docs.fates[kept[docs.replacements[kept] != kept]] = FATE_IDS["near duplicate"]
        # The document that replaces an exact duplicate may itself have been dropped just now.
        docs.replacements = docs.replacements[docs.replacements]
    sizes = np.bincount(clusters)
    return int((sizes > 1).sum()), int(sizes.max(initial=0))


def assign_val_split(docs: DocumentTable, data: CorpusData) -> bool:
    """Assign whole clusters to val. Return True if there are too few: val then takes the tail of each document."""
    kept = docs.kept
    if len(kept) * data.split.val_fraction < MIN_VAL_DOCUMENTS:
        return True
    drawn = uniform_hash(docs.keys[docs.cluster_heads[kept]], data.seed) < data.split.val_fraction
    docs.fates[kept[drawn]] = VAL
    return False


def uniform_hash(keys: np.ndarray, seed: int) -> np.ndarray:
    """Hash each key and the seed to a number in [0, 1)."""
    return mix(keys + np.array([seed], np.uint64) * GOLDEN) / 2.0**64


def load_band(units: list[Unit], parts: Path, starts: np.ndarray, band: int) -> np.ndarray:
    """Load one band's keys of all documents. The files are memory-mapped, so that no other band is read."""
    keys = np.empty(starts[-1], np.uint64)
    for i, unit in enumerate(units):
        keys[starts[i] : starts[i + 1]] = load_array(parts / f"{unit.part}.bands.npy", mmap_mode="r")[band]
    return keys


def compare_sketches(
    units: list[Unit], parts: Path, starts: np.ndarray, left: np.ndarray, right: np.ndarray
) -> np.ndarray:
    """Return for each pair of documents the share of equal rows in their sketches, an estimate of their similarity."""
    shares = []
    for begin in range(0, len(left), PAIRS_PER_BLOCK):
        wanted = np.concatenate([left[begin : begin + PAIRS_PER_BLOCK], right[begin : begin + PAIRS_PER_BLOCK]])
        unit_of, rows = np.searchsorted(starts, wanted, side="right") - 1, {}
        for number in np.unique(unit_of).tolist():
            sketches = load_array(parts / f"{units[number].part}.sketches.npy", mmap_mode="r")
            places = np.flatnonzero(unit_of == number)
            rows[number] = places, sketches[wanted[places] - starts[number]]
        table = np.empty((len(wanted), sketches.shape[1]), np.uint8)
        for places, found in rows.values():
            table[places] = found
        one, other = np.split(table, 2)
        shares.append((one == other).mean(axis=1))
    return np.concatenate(shares)


def find_contaminated(docs: DocumentTable, units: list[Unit], data: CorpusData, parts: Path) -> dict[str, int]:
    """Find documents that share a rare n-gram with the evaluation files, drop them if asked; return counts to report.

    A cluster of duplicates counts as one document. Otherwise copies of a leaked question would make its n-grams
    look common.
    """
    evals = data.decontaminate
    if evals is None:
        return {}
    _, texts, short = read_evaluation_ngrams(evals.files, evals.ngram)
    hits = [load_array(parts / f"{unit.part}.hits.npy") for unit in units]
    documents = np.concatenate([one["document"] + start for one, start in zip(hits, docs.unit_starts, strict=False)])
    grams = np.concatenate([one["gram"] for one in hits])
    active = docs.fates[documents] == TRAIN
    documents, grams = documents[active], grams[active]
    unique, gram_ids = np.unique(grams, return_inverse=True)
    pairs = np.unique(np.stack([gram_ids, docs.cluster_heads[documents]], axis=1), axis=0)
    rare = np.bincount(pairs[:, 0], minlength=len(unique)) <= evals.ignore_if_in_docs
    flagged = np.unique(documents[rare[gram_ids]])
    if evals.action == "drop":
        docs.fates[flagged] = FATE_IDS["contaminated"]
    return {
        "evaluation texts": texts,
        f"shorter than {evals.ngram} words and not searched for": short,
        "contaminated documents": len(flagged),
        "n-grams found": int(rare.sum()),
        "common n-grams ignored": len(unique) - int(rare.sum()),
    }


def find_repeated_paragraphs(docs: DocumentTable, units: list[Unit], parts: Path) -> list[np.ndarray]:
    """Return each unit's mask of long paragraphs that repeat an earlier one. Drop documents made mostly of them."""
    found = [load_array(parts / f"{unit.part}.paragraphs.npy") for unit in units]
    documents = np.concatenate([one["document"] + start for one, start in zip(found, docs.unit_starts, strict=False)])
    keys, sizes = (np.concatenate([one[name] for one in found]) for name in ("key", "bytes"))
    # The second round ignores the documents that the first one dropped, so their paragraphs may stay elsewhere.
    for dropping in (True, False):
        active = np.flatnonzero(docs.fates[documents] == TRAIN)
        cut = np.zeros(len(documents), bool)
        cut[active] = True
        cut[active[np.unique(keys[active], return_index=True)[1]]] = False  # the first copy stays
        if dropping:
            cut_bytes = np.bincount(documents[cut], weights=sizes[cut], minlength=len(docs.fates))
            docs.fates[cut_bytes > MAX_CUT_FRACTION * docs.lengths] = FATE_IDS["repeated paragraphs"]
    return np.split(cut, np.cumsum([len(one) for one in found])[:-1])


def count_fates(fates: np.ndarray) -> Counter[str]:
    """Count the documents of each fate."""
    return Counter({FATES[i]: int(n) for i, n in enumerate(np.bincount(fates, minlength=len(FATES))) if n})
