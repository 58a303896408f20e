"""Split text of any script into words and hash them, for filters, deduplication and decontamination.

All hashes are the same in every process and on every machine.
"""

import re
from functools import cached_property
from zlib import crc32

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: odd, so multiplication by it is invertible
# Scripts written without spaces, where each character counts as a word: Thai, Lao, Tibetan, Burmese, Khmer, kana,
# Chinese characters.
UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
PUNCTUATION = re.compile("[\u00a0-\u00bf\u2000-\u206f\u3000-\u303f\uff01-\uff0f]+")  # non-ASCII only
# Maps ASCII letters to lower case and ASCII punctuation to spaces. Keeps digits and the bytes of other characters.
FOLD_TABLE = bytes(b if b > 127 else ord(chr(b).lower()) if chr(b).isalnum() else ord(" ") for b in range(256))


def split_words(text: str) -> list[bytes]:
    """Split text into UTF-8 words without case and punctuation. In scripts without spaces each character is a word.

    >>> split_words("The cat's 2 hats!")
    [b'the', b'cat', b's', b'2', b'hats']
    """
    if not text.isascii():
        text = UNSPACED.sub(r" \g<0> ", PUNCTUATION.sub(" ", text.lower()))
    return text.encode("utf-8", "replace").translate(FOLD_TABLE).split()


def mix(x: np.ndarray) -> np.ndarray:
    """Apply the splitmix64 finalizer (Steele et al. 2014): every output bit depends on all bits of x, modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_words(words: list[bytes]) -> np.ndarray:
    """Hash words to uint64 (words,). CRC-32 is the fastest for short strings; two words in a million collide."""
    return mix(np.fromiter(map(crc32, words), np.uint64, len(words)) * GOLDEN)


def hash_ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """Hash all word n-grams to uint64 (words - n + 1,). Hashes are polynomials in GOLDEN, so word order matters."""
    grams = np.zeros(max(0, len(hashes) - n + 1), np.uint64)
    for i in range(n):
        grams = grams * GOLDEN + hashes[i : i + len(grams)]
    return mix(grams)


class TextFeatures:
    """A text with its words, lines, paragraphs and hashes, each computed on first use and cached."""

    def __init__(self, text: str):
        self.text = text

    @cached_property
    def spaced(self) -> bool:
        """Return True if white space separates words, unlike in Chinese, Japanese or Thai."""
        start = self.text[:2000]
        return start.isascii() or len(UNSPACED.findall(start)) < 0.3 * len(start)

    @cached_property
    def words(self) -> list[str]:
        """Split at white space, keeping punctuation. Without spaces between words, return the characters."""
        return self.text.split() if self.spaced else list("".join(self.text.split()))

    @cached_property
    def letters(self) -> int:
        """Count the characters in words."""
        return sum(map(len, self.words))

    @cached_property
    def lines(self) -> list[str]:
        return [line for line in map(str.strip, self.text.split("\n")) if line]

    @cached_property
    def paragraphs(self) -> list[str]:
        return [part for part in map(str.strip, self.text.split("\n\n")) if part]

    @cached_property
    def folded(self) -> list[bytes]:
        """Return the words of `split_words`: lower case, without punctuation."""
        return split_words(self.text)

    @cached_property
    def hashes(self) -> np.ndarray:
        """Return the hashes of the folded words (words,)."""
        return hash_words(self.folded)
