"""Words of any script and their hashes: what filters, duplicates and decontamination are all made of.

Every hash is arithmetic of our own, the same in every process and on every machine.
"""

from __future__ import annotations

import re
from functools import cached_property
from zlib import crc32

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: odd, so multiplying by it loses nothing
# Scripts written without spaces, in which a character is taken for a word: Thai, Lao, Tibetan, Burmese, Khmer, kana,
# Chinese characters.
UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
PUNCTUATION = re.compile("[\u00a0-\u00bf\u2000-\u206f\u3000-\u303f\uff01-\uff0f]+")  # what is not ASCII of it
# ASCII in lower case, with a space for all that is neither letter nor digit; bytes of other characters as they are.
FOLD = bytes(b if b > 127 else ord(chr(b).lower()) if chr(b).isalnum() else ord(" ") for b in range(256))


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


class TextFeatures:
    """A text and its cuts, each made when something first asks, once for all who do."""

    def __init__(self, text: str):
        self.text = text

    @cached_property
    def spaced(self) -> bool:
        """Whether white space parts words; in Chinese, Japanese or Thai, characters stand in for them."""
        start = self.text[:2000]
        return start.isascii() or len(UNSPACED.findall(start)) < 0.3 * len(start)

    @cached_property
    def words(self) -> list[str]:
        """What white space parts, punctuation and all; characters where nothing does."""
        return self.text.split() if self.spaced else list("".join(self.text.split()))

    @cached_property
    def letters(self) -> int:
        """Characters in words."""
        return sum(map(len, self.words))

    @cached_property
    def lines(self) -> list[str]:
        return [line for line in map(str.strip, self.text.split("\n")) if line]

    @cached_property
    def paragraphs(self) -> list[str]:
        return [part for part in map(str.strip, self.text.split("\n\n")) if part]

    @cached_property
    def folded(self) -> list[bytes]:
        """Words as `split_words` gives them."""
        return split_words(self.text)

    @cached_property
    def hashes(self) -> np.ndarray:
        """One of each folded word."""
        return hash_words(self.folded)
