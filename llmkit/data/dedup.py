"""Exact and near duplicates. Signatures are made per document, in parallel; clusters from all of them at once."""

from __future__ import annotations

import hashlib
import re
from functools import cache

import numpy as np

from llmkit.data.batches import GOLDEN, mix

WORD = re.compile(r"\w+")


def exact_key(text: str) -> bytes:
    """16 bytes that are equal for texts that differ in white space and case alone (blake2b)."""
    return hashlib.blake2b(" ".join(text.casefold().split()).encode("utf-8", "replace"), digest_size=16).digest()


@cache
def hash_functions(number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Odd multipliers and offsets (number, 1) of the hash functions x -> (a x + b) >> 32 over 64 bits."""
    draws = [mix((seed * 2 + 1) * GOLDEN + i * GOLDEN & (2**64 - 1)) for i in range(2 * number)]
    a = np.array(draws[:number], dtype=np.uint64) | np.uint64(1)
    return a[:, None], np.array(draws[number:], dtype=np.uint64)[:, None]


def minhash_bands(text: str, *, ngram: int = 5, bands: int = 14, rows: int = 8, seed: int = 0) -> np.ndarray:
    """MinHash signature of a text's word n-grams, folded into `bands` keys, uint64 (Broder 1997; banding: LSH).

    Two texts of Jaccard similarity s share at least one key with probability 1 - (1 - s^rows)^bands:
    0.92 at s = 0.8 and 0.05 at s = 0.5 for 14 bands of 8 rows. A text of fewer words than `ngram` is one n-gram.
    """
    words = [hash_word(word) for word in WORD.findall(text.casefold())] or [0]
    hashes = np.array(words, dtype=np.uint64)
    width = min(ngram, len(hashes))
    grams = np.zeros(len(hashes) - width + 1, dtype=np.uint64)
    for i in range(width):  # a polynomial in an odd constant: order matters, and wrapping is intended
        grams = grams * np.uint64(GOLDEN) + hashes[i : i + len(grams)]
    grams = np.unique(grams ^ (grams >> np.uint64(29)))
    a, b = hash_functions(bands * rows, seed)
    signature = np.full((bands * rows, 1), np.iinfo(np.uint64).max, dtype=np.uint64)
    for start in range(0, len(grams), 4096):  # bounded memory for books
        values = (a * grams[start : start + 4096] + b) >> np.uint64(32)
        signature = np.minimum(signature, values.min(axis=1, keepdims=True))
    table = signature.reshape(bands, rows)
    keys = np.arange(bands, dtype=np.uint64)  # equal rows in different bands are different keys
    for column in table.T:
        keys = (keys ^ column) * np.uint64(GOLDEN)
        keys ^= keys >> np.uint64(31)
    return keys


@cache
def hash_word(word: str) -> int:
    """64 bits of a word, the same in every process."""
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "little")


def near_clusters(bands: np.ndarray) -> np.ndarray:
    """Clusters of near duplicates: for each document the smallest index of its cluster.

    bands  (documents, bands) keys. Documents with an equal key in a band belong together (union-find).

    >>> near_clusters(np.array([[1, 2], [3, 2], [3, 9], [5, 6]], dtype=np.uint64)).tolist()
    [0, 0, 0, 3]
    """
    parent = np.arange(len(bands))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for keys in bands.T:
        order = np.argsort(keys, kind="stable")
        same = np.flatnonzero(keys[order][1:] == keys[order][:-1])
        for i in same:
            one, other = root(order[i]), root(order[i + 1])
            parent[max(one, other)] = min(one, other)
    return np.array([root(i) for i in range(len(bands))])


def keep_longest(clusters: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """True for the longest document of every cluster, the first of equals."""
    order = np.lexsort((np.arange(len(clusters)), -lengths, clusters))
    first = np.ones(len(order), dtype=bool)
    first[1:] = clusters[order][1:] != clusters[order][:-1]
    keep = np.zeros(len(order), dtype=bool)
    keep[order[first]] = True
    return keep
