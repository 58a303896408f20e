"""Find exact and near duplicates: signatures per document, in parallel, then clusters over all documents at once.

Near duplicates: MinHash over word n-grams (Broder 1997), banded (Leskovec et al., Mining of Massive Datasets, 3.4).
Documents that share the key of a band are candidates. They are joined if enough rows of their signatures agree.
"""

import hashlib
from collections.abc import Callable, Iterable
from functools import cache

import numpy as np

from llmkit.readers.words import GOLDEN, TextFeatures, hash_ngrams, mix

AGREEMENT_MARGIN = 0.9  # candidates must agree in at least this fraction of the banding threshold
BLOCK = 2048  # n-grams per step of minhash: (112, 2048) 32-bit values fit in the cache


def exact_key(text: str) -> bytes:
    """Return 16 bytes (blake2b), equal for texts that differ only in white space and case."""
    return hashlib.blake2b(" ".join(text.casefold().split()).encode("utf-8", "replace"), digest_size=16).digest()


@cache
def hash_functions(number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (a, b), both (number, 1), of random permutations x -> a x + b of the integers mod 2^32, a odd."""
    draws = mix(mix(np.array([seed], np.uint64) + GOLDEN) + GOLDEN * np.arange(2 * number, dtype=np.uint64))
    a, b = (draws >> np.uint64(32)).astype(np.uint32).reshape(2, number, 1)
    return a | np.uint32(1), b


def minhash(text: TextFeatures, *, ngram: int = 5, bands: int = 14, rows: int = 8, seed: int = 0) -> np.ndarray:
    """Return the MinHash signature of a text's word n-grams: uint32 (bands * rows,).

    A row is the minimum of a x + b mod 2^32 over the n-grams x. Two texts of Jaccard similarity s agree in a row with
    probability s, so they share a band's key with probability 1 - (1 - s^rows)^bands:

        s                  .5    .6    .7    .8    .9
        14 bands, 8 rows   .05   .21   .57   .92   .9996

    A text of fewer than `ngram` words is one n-gram. Texts without words match only if their exact keys are equal.
    """
    hashes = text.hashes
    if not len(hashes):
        hashes = np.frombuffer(exact_key(text.text), np.uint64)
    grams = hash_ngrams(hashes, min(ngram, len(hashes)))
    grams = (grams >> np.uint64(32)).astype(np.uint32)
    a, b = hash_functions(bands * rows, seed)
    signature = np.full(bands * rows, 2**32 - 1, np.uint32)
    for start in range(0, len(grams), BLOCK):
        values = a * grams[start : start + BLOCK]  # (bands * rows, BLOCK)
        values += b
        np.minimum(signature, values.min(axis=1), out=signature)
    return signature


def band_keys(signature: np.ndarray, rows: int) -> np.ndarray:
    """Hash the rows of each band to a key: uint64 (bands,)."""
    return hash_ngrams(signature.astype(np.uint64), rows)[::rows]


def sketch(signature: np.ndarray) -> np.ndarray:
    """Return the low byte of each row, uint8 (bands * rows,): enough to estimate the agreement of two signatures."""
    return signature.astype(np.uint8)


def min_agreement(bands: int, rows: int) -> float:
    """Return the minimum share of rows in which near duplicates agree.

    This is AGREEMENT_MARGIN times the banding threshold (1 / bands)^(1 / rows), where the curve in `minhash` is steep.
    For 14 x 8 it is .65: it loses a pair of similarity .8 once in 100,000 times and passes one of .5 once in 200.
    """
    return AGREEMENT_MARGIN * (1 / bands) ** (1 / rows)


def near_clusters(
    documents: int,
    bands: Iterable[np.ndarray],
    is_similar: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """Cluster near duplicates: return the smallest index in each document's cluster (documents,).

    bands       the keys (documents,) of one band after another: documents with equal keys are joined (union-find).
                Needs about 40 bytes per document, for any number of bands
    is_similar  (left, right) indices of pairs -> mask of the pairs to join; None: join all

    >>> near_clusters(4, np.array([[1, 3, 3, 5], [2, 2, 9, 6]], dtype=np.uint64)).tolist()
    [0, 0, 0, 3]
    """
    parent = np.arange(documents, dtype=np.int32 if documents < 2**31 else np.int64)

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for keys in bands:
        order = np.argsort(keys, kind="stable")
        equal = keys[order[1:]] == keys[order[:-1]]
        left, right = order[:-1][equal], order[1:][equal]
        if is_similar is not None and len(left):  # also pair with the first of this key: the previous one may differ
            first = np.maximum.accumulate(np.where(np.append(True, ~equal), np.arange(len(order)), 0))[1:][equal]
            left, right = np.concatenate([left, order[first]]), np.concatenate([right, right])
        unjoined = parent[left] != parent[right]  # earlier bands have joined most pairs
        left, right = left[unjoined], right[unjoined]
        if is_similar is not None and len(left):
            similar = is_similar(left, right)
            left, right = left[similar], right[similar]
        for a, b in zip(left.tolist(), right.tolist(), strict=True):
            a, b = root(a), root(b)
            parent[max(a, b)] = min(a, b)
        while (parent[parent] != parent).any():  # point every document at its root
            parent = parent[parent]
    return parent


def longest_of(clusters: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return for each document the index of the longest document in its cluster, of equals the first.

    >>> longest_of(np.array([0, 0, 2, 2]), np.array([5, 9, 7, 7])).tolist()
    [1, 1, 2, 2]
    """
    order = np.lexsort((-lengths.astype(np.int64), clusters))  # stable: equals stay in order
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = clusters[order[1:]] != clusters[order[:-1]]
    longest = np.zeros(len(order), dtype=np.int64)
    longest[order] = order[is_first][np.cumsum(is_first) - 1]
    return longest


def first_occurrences(keys: np.ndarray, second_keys: np.ndarray) -> np.ndarray:
    """Return for each 128-bit key, given in two 64-bit halves (documents,), the index of its first occurrence.

    >>> first_occurrences(np.array([7, 7, 7]), np.array([1, 2, 1])).tolist()
    [0, 1, 0]
    """
    first = np.arange(len(keys))
    if len(keys) < 2:
        return first
    order = np.argsort(keys, kind="stable")
    same = np.append(False, keys[order[1:]] == keys[order[:-1]])
    shared = order[np.append(same[1:], False) | same]  # few: most keys are unique
    shared = shared[np.lexsort((second_keys[shared], keys[shared]))]
    left, right = shared[:-1], shared[1:]
    new = np.append(True, (keys[left] != keys[right]) | (second_keys[left] != second_keys[right]))[: len(shared)]
    first[shared] = shared[new][np.cumsum(new) - 1]
    return first


def paragraph_hashes(text: str, min_words: int) -> list[tuple[int, int]]:
    """Return (key, bytes) of every paragraph of at least `min_words` words. Keys ignore white space and case."""
    long = [part for part in text.split("\n\n") if len(part.split()) >= min_words]
    return [(int.from_bytes(exact_key(part)[:8], "little"), len(part.encode("utf-8", "replace"))) for part in long]


def cut_paragraphs(text: str, min_words: int, cut: np.ndarray) -> str:
    """Remove the long paragraphs (see `paragraph_hashes`) for which `cut` is True."""
    flags = iter(cut.tolist())
    kept = [part for part in text.split("\n\n") if len(part.split()) < min_words or not next(flags)]
    return "\n\n".join(kept).strip("\n")
