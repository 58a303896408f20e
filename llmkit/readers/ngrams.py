"""Find word n-grams of evaluation files in texts, so that benchmarks do not measure memorization."""

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.config.data import Decontaminate, EvaluationFile, TableFormat
from llmkit.files import file_sha256, file_stamps
from llmkit.readers.listing import list_files, refuse_zip
from llmkit.readers.packed import suffix_of
from llmkit.readers.records import READERS, read_formatted, read_text
from llmkit.readers.tally import BadRecord, Tally
from llmkit.readers.words import hash_ngrams, hash_words, split_words

TABLE_BITS = 24  # log2 of the number of slots of the table in NgramSet
Evaluation = str | EvaluationFile  # a path or glob, and how its records are read


class NgramSet:
    """A set of hashed n-grams with fast lookup: a boolean table first rejects most of the non-members."""

    def __init__(self, grams: np.ndarray):
        self.grams = np.unique(grams)
        self.table = np.zeros(2**TABLE_BITS if len(grams) else 1, bool)
        self.table[self.slots(self.grams)] = True

    def slots(self, grams: np.ndarray) -> np.ndarray:
        return (grams & np.uint64(len(self.table) - 1)).astype(np.int64)

    def find_in(self, grams: np.ndarray) -> np.ndarray:
        """Return the given n-grams that are members, repeats included."""
        maybe = grams[self.table[self.slots(grams)]]
        places = np.searchsorted(self.grams, maybe)  # np.isin would sort all of them again
        return maybe[self.grams[np.minimum(places, len(self.grams) - 1)] == maybe] if len(maybe) else maybe


def ngrams_of(words: list[bytes], n: int) -> np.ndarray:
    return hash_ngrams(hash_words(words), n)


def shared_ngrams(texts: Iterable[str], wanted: NgramSet, n: int) -> np.ndarray:
    """Return the different n-grams of some texts that are in a set; none crosses from one text into another."""
    grams = [wanted.find_in(ngrams_of(split_words(text), n)) for text in texts]
    return np.unique(np.concatenate([np.empty(0, np.uint64), *grams]))


def flag_contaminated(owners: np.ndarray, grams: np.ndarray, number: int, most: int) -> np.ndarray:
    """Return which of `number` examples share an n-gram with evaluation files that is in at most `most` of them: one in
    more is a common phrase.

    owners, grams  the example of each shared n-gram
    """
    _, ids, counts = np.unique(grams, return_inverse=True, return_counts=True)
    flagged = np.zeros(number, bool)
    flagged[owners[counts[ids] <= most]] = True
    return flagged


def list_evaluation_files(named: Sequence[Evaluation]) -> dict[Path, TableFormat]:
    """Return the evaluation files for decontamination, linked ones too, and how they are read. Raise DataError for a
    zip.
    """
    files: dict[Path, TableFormat] = {}
    for one in named:
        how = TableFormat() if isinstance(one, str) else one
        path = one if isinstance(one, str) else one.path
        for file in list_files(path, follow_links=True):
            refuse_zip(file, "evaluation files")
            files[file] = how
    return dict(sorted(files.items()))


def evaluation_key(named: Sequence[Evaluation]) -> list:
    """Return what changes when the evaluation files do: their stamps, and how they are read."""
    files = list_evaluation_files(named)
    return [file_stamps(files), [how.model_dump(exclude_defaults=True) for how in files.values()]]


def describe_search(evals: Decontaminate | None) -> dict[str, Any]:
    """Return what the report of some records says about a search for evaluation texts; {} if there was none."""
    if evals is None:
        return {"searched": []}
    _, texts, short = read_evaluation_ngrams(evals.files, evals.ngram)
    about = {"action": evals.action, "ngram": evals.ngram, "texts": texts, "short": short}
    return {"searched": evaluation_checksums(evals.files), "decontaminated": about}


def evaluation_checksums(named: Sequence[Evaluation]) -> list[str]:
    """Return the SHA-256 of each evaluation file, by which `eval --tasks` knows that a task was searched for."""
    return sorted(file_sha256(file) for file in list_evaluation_files(named))


def read_evaluation_ngrams(named: Sequence[Evaluation], n: int) -> tuple[NgramSet, int, int]:
    """Return (set of n-grams, number of texts, number of texts shorter than n words) of the evaluation files.

    Every string in the files is a text.

    Questions, choices and answers thus are separate, because no corpus joins them as a benchmark's prompt does.
    Texts shorter than n words have no n-grams, so they are not searched for.
    """
    files = list_evaluation_files(named)
    how = tuple(one.model_dump_json() for one in files.values())
    return _read_evaluation_ngrams(tuple(file_stamps(files)), how, n)


@lru_cache(maxsize=1)  # a worker measures many units
def _read_evaluation_ngrams(
    stamps: tuple[tuple[str, int, int], ...], formats: tuple[str, ...], n: int
) -> tuple[NgramSet, int, int]:
    grams, texts, short, tally = [np.empty(0, np.uint64)], 0, 0, Tally()
    for (name, _, _), how in zip(stamps, formats, strict=True):
        file, how = Path(name), TableFormat(**{k: v for k, v in json.loads(how).items() if k != "path"})
        for _, record, size in read_formatted(file, how):
            if isinstance(record, BadRecord):
                tally.add(0, record)
                continue
            tally.add(size)
            whole = READERS.get(suffix_of(file), read_text) is read_text
            for string in strings_in([record["text"]] if whole else record.values()):
                words = split_words(string)
                if len(words) >= n:
                    grams.append(ngrams_of(words, n))
                texts, short = texts + 1, short + (len(words) < n)
    tally.check(0.0, fix="repair the evaluation files: a question that is left out would not be looked for")
    return NgramSet(np.concatenate(grams)), texts, short


def strings_in(values: Any) -> Iterator[str]:
    """Yield every string in nested lists and objects."""
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from strings_in(value.values())
        elif isinstance(value, list):
            yield from strings_in(value)
