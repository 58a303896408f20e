"""Exact and near duplicates. Signatures are made per document, in parallel; clusters from all of them at once.

Near duplicates: MinHash over word n-grams (Broder 1997), banded (Leskovec et al., Mining of Massive Datasets, 3.4).
Every hash is arithmetic of our own, the same in every process and on every machine.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from zlib import crc32

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: odd, so multiplying by it loses nothing
BLOCK = 2048  # n-grams hashed at a time: (112, 2048) 32-bit values stay in the cache
# Scripts written without spaces, in which a character is taken for a word: Thai to Khmer, kana, Chinese characters.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
PUNCTUATION = re.compile("[\u00a0-\u00bf\u2000-\u206f\u3000-\u303f\uff01-\uff0f]+")  # what is not ASCII of it
# ASCII in lower case, with a space for all that is neither letter nor digit; bytes of other characters as they are.
FOLD = bytes(b if b > 127 else ord(chr(b).lower()) if chr(b).isalnum() else ord(" ") for b in range(256))


def exact_key(text: str) -> bytes:
    """16 bytes (blake2b) that are equal for texts that differ in white space and case alone."""
    return hashlib.blake2b(" ".join(text.casefold().split()).encode("utf-8", "replace"), digest_size=16).digest()


def split_words(text: str) -> list[bytes]:
    """Words without case and punctuation, in UTF-8; single characters where the script has no spaces.

    >>> split_words("The cat's 2 hats!")
    [b'the', b'cat', b's', b'2', b'hats']
    """
    if not text.isascii():
        text = UNSPACED.sub(r" \g<0> ", PUNCTUATION.sub(" ", text.lower()))
    return text.encode("utf-8", "replace").translate(FOLD).split()


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer (Steele et al. 2014): every bit depends on all bits of x. Wrapping is meant."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_words(words: list[bytes]) -> np.ndarray:
    """64-bit hashes (words,). CRC-32 is the quickest hash of many short strings; two words in a million share one."""
    return mix(np.fromiter(map(crc32, words), np.uint64, len(words)) * GOLDEN)


def hash_ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """64-bit hashes of the n-grams (words - n + 1,): polynomials in GOLDEN, so that order counts."""
    grams = np.zeros(max(0, len(hashes) - n + 1), np.uint64)
    for i in range(n):
        grams = grams * GOLDEN + hashes[i : i + len(grams)]
    return mix(grams)


@cache
def hash_functions(number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(a, b), both (number, 1): permutations x -> a x + b of the integers mod 2^32, a odd."""
    draws = mix(mix(np.array([seed], np.uint64) + GOLDEN) + GOLDEN * np.arange(2 * number, dtype=np.uint64))
    a, b = (draws >> np.uint64(32)).astype(np.uint32).reshape(2, number, 1)
    return a | np.uint32(1), b


def minhash_bands(text: str, *, ngram: int = 5, bands: int = 14, rows: int = 8, seed: int = 0) -> np.ndarray:
    """The MinHash signature of a text's word n-grams, folded into one key a band: uint64 (bands,).

    A row is the least a x + b mod 2^32 over the n-grams x. Two texts of Jaccard similarity s agree in a row with
    probability s, so they share a key with probability 1 - (1 - s^rows)^bands:

        s                  .5    .6    .7    .8    .9
        14 bands, 8 rows   .05   .21   .57   .92   .9996

    A text of fewer than `ngram` words is one gram; one without any word is like none but its equals.
    """
    words = split_words(text) or [exact_key(text)]
    grams = hash_ngrams(hash_words(words), min(ngram, len(words)))
    grams = (grams >> np.uint64(32)).astype(np.uint32)
    a, b = hash_functions(bands * rows, seed)
    signature = np.full(bands * rows, 2**32 - 1, np.uint32)
    for start in range(0, len(grams), BLOCK):
        values = a * grams[start : start + BLOCK]  # (bands * rows, BLOCK)
        values += b
        np.minimum(signature, values.min(axis=1), out=signature)
    return hash_ngrams(signature.astype(np.uint64), rows)[::rows]  # a band's key hashes its rows


def near_clusters(bands: np.ndarray) -> np.ndarray:
    """Clusters of near duplicates: for each document the smallest index of its cluster.

    bands  (documents, bands) keys, in memory or memory-mapped: one band is sorted at a time, and documents with
           equal keys are joined (union-find). Needs about 40 bytes a document

    >>> near_clusters(np.array([[1, 2], [3, 2], [3, 9], [5, 6]], dtype=np.uint64)).tolist()
    [0, 0, 0, 3]
    """
    parent = np.arange(len(bands))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for column in bands.T:
        keys = np.ascontiguousarray(column)
        order = np.argsort(keys, kind="stable")
        equal = keys[order[1:]] == keys[order[:-1]]
        left, right = order[:-1][equal], order[1:][equal]
        apart = parent[left] != parent[right]  # most pairs were joined by an earlier band
        for one, other in zip(left[apart].tolist(), right[apart].tolist(), strict=True):
            one, other = root(one), root(other)
            parent[max(one, other)] = min(one, other)
        while (parent[parent] != parent).any():  # point everyone at the root
            parent = parent[parent]
    return parent


def keep_longest(clusters: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """True for the longest document of every cluster, the first of equals.

    >>> keep_longest(np.array([0, 0, 2, 2]), np.array([5, 9, 7, 7])).tolist()
    [False, True, True, False]
    """
    order = np.lexsort((-lengths, clusters))  # stable: equals stay in order
    first = np.ones(len(order), dtype=bool)
    first[1:] = clusters[order[1:]] != clusters[order[:-1]]
    keep = np.zeros(len(order), dtype=bool)
    keep[order[first]] = True
    return keep
