"""Exact keys, MinHash bands and clusters, against hand-computed cases and the theory's curve."""

import random
import subprocess
import sys

import numpy as np
import pytest

from llmkit.corpus.dedup import (
    band_keys,
    exact_key,
    first_occurrences,
    longest_of,
    min_agreement,
    minhash,
    near_clusters,
    sketch,
)
from llmkit.readers.words import TextFeatures, split_words


def minhash_bands(text: str, *, rows: int = 8, **options) -> np.ndarray:
    return band_keys(minhash(TextFeatures(text), rows=rows, **options), rows)


def shares_a_key(one: str, other: str) -> bool:
    return bool((minhash_bands(one) == minhash_bands(other)).any())


def test_exact_key_ignores_white_space_and_case_only():
    assert exact_key("A  cat\nsat.") == exact_key(" a cat sat.")
    assert exact_key("A cat sat.") != exact_key("A cat sat!")
    assert len(exact_key("")) == 16


def test_words():
    assert split_words("Don't: \u00c9T\u00c9 2x") == [b"don", b"t", "\u00e9t\u00e9".encode(), b"2x"]
    assert split_words("\u201cquoted\u201d") == split_words('"quoted"') == [b"quoted"]
    assert split_words("\u732b\u3067\u3059\u3002") == [c.encode() for c in "\u732b\u3067\u3059"]


def test_signatures_are_the_same_in_every_process():
    code = (
        "from llmkit.corpus.dedup import *;"
        "print(band_keys(minhash(TextFeatures('the cat sat on the mat again')), 8).tolist())"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True)
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout == f"{minhash_bands('the cat sat on the mat again').tolist()}\n"


def test_case_and_punctuation_make_no_difference_and_order_does():
    assert (minhash_bands("The cat, sat on; the mat!") == minhash_bands("the CAT sat on the mat")).all()
    words = "a b c d e f g h".split()
    assert not shares_a_key(" ".join(words), " ".join(reversed(words)))


def test_seed_and_shape():
    one = minhash_bands("a b c d e f", bands=3, rows=2)
    assert one.shape == (3,) and one.dtype == np.uint64
    assert (one != minhash_bands("a b c d e f", bands=3, rows=2, seed=1)).all()


@pytest.mark.parametrize("one, other, same", [
    ("hello", "Hello.", True), ("hello", "world", False), ("!!!", "???", False), ("!!!", "!!!", True), ("", " ", True),
    ("two words", "words two", False),
])  # fmt: skip
def test_texts_shorter_than_an_ngram(one, other, same):
    assert shares_a_key(one, other) is same


@pytest.mark.parametrize("edits, low, high", [(4, 0.97, 1.0), (10, 0.75, 0.97), (20, 0.15, 0.5), (400, 0.0, 0.0)])
def test_planted_copies_are_found_as_often_as_the_theory_says(edits, low, high):
    # 400 random words, k of them replaced: about 396 - 5k of 396 + 5k 5-grams are shared, J = .90, .78, .61, 0
    draw = random.Random(edits)
    hits = 0
    for _ in range(100):
        words = [f"w{draw.randrange(5000)}" for _ in range(400)]
        copy = list(words)
        for place in draw.sample(range(400), edits):
            copy[place] = f"x{draw.randrange(10**9)}"
        hits += shares_a_key(" ".join(words), " ".join(copy))
    assert low <= hits / 100 <= high


def test_long_texts_are_hashed_in_blocks_with_the_same_result():
    words = [f"w{i}" for i in range(5000)]
    parts = [minhash_bands(" ".join(words), rows=1), minhash_bands(" ".join([*words, *words[:4]]), rows=1)]
    assert (parts[0] == parts[1]).mean() > 0.8  # four n-grams more can take only few of the minima


def test_clusters_join_through_any_band_and_through_others():
    #           band 0: 1=3      band 1: 0=1, 4=5     so 0=1=3, 4=5, 2 alone
    bands = np.array([[10, 7], [11, 7], [12, 8], [11, 9], [13, 6], [14, 6]], dtype=np.uint64)
    assert near_clusters(6, bands.T).tolist() == [0, 0, 2, 0, 4, 4]
    assert near_clusters(0, np.empty((14, 0), np.uint64)).tolist() == []


def test_agreeing_rows_estimate_the_similarity_and_part_chance_meetings():
    draw = random.Random(0)
    words = [f"w{draw.randrange(5000)}" for _ in range(400)]
    for edits, jaccard in ((4, 0.9), (10, 0.78), (24, 0.55)):
        agreed = []
        for _ in range(20):
            copy = list(words)
            for place in draw.sample(range(400), edits):
                copy[place] = f"x{draw.randrange(10**9)}"
            one, other = (sketch(minhash(TextFeatures(" ".join(text)))) for text in (words, copy))
            agreed.append((one == other).mean())
        assert sum(agreed) / 20 == pytest.approx(jaccard, abs=0.04)
    assert 0.55 < min_agreement(14, 8) < 0.7
    keys = np.array([[7, 7, 7, 8]], np.uint64)  # 0, 1 and 2 met by chance or not: 1 is the odd one
    joined = near_clusters(4, iter(keys), lambda left, right: (left != 1) & (right != 1))
    assert joined.tolist() == [0, 1, 0, 3]


def test_clusters_equal_a_plain_graph_search():
    bands = np.random.default_rng(0).integers(0, 300, (400, 2)).astype(np.uint64)
    expected = np.arange(400)
    for _ in range(400):  # spread the smallest index until nothing changes
        for column in bands.T:
            for key in np.unique(column):
                expected[column == key] = expected[column == key].min()
    assert (near_clusters(400, bands.T) == expected).all()


def test_longest_of_a_cluster_and_first_occurrences():
    assert longest_of(np.array([0, 1, 0, 1, 4]), np.array([3, 5, 8, 5, 1])).tolist() == [2, 1, 2, 1, 4]
    assert longest_of(np.array([], int), np.array([], int)).tolist() == []
    halves = np.array([[1, 1, 1, 0, 1], [2, 3, 2, 2, 2]], np.uint64)  # equal in both or not at all
    assert first_occurrences(*halves).tolist() == [0, 1, 0, 3, 0]
