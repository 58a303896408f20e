"""Quality filters: one function a rule, which measures a text; a document is dropped outside the rule's thresholds.

Sources of the thresholds: Gopher (Rae et al. 2021, arXiv:2112.11446, appendix A), FineWeb (Penedo et al. 2024,
arXiv:2406.17557), C4 (Raffel et al. 2019, arXiv:1910.10683), and The Stack's rules for code (arXiv:2211.15533).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from llmkit.types import Document

STOP_WORDS = {  # a text that has fewer than two of one language's is hardly prose in it
    "en": {"the", "be", "to", "of", "and", "that", "have", "with", "is", "in"},
    "de": {"der", "die", "das", "und", "zu", "den", "ist", "nicht", "von", "mit"},
    "fr": {"le", "la", "les", "de", "et", "un", "une", "est", "que", "dans"},
    "es": {"el", "la", "los", "de", "y", "que", "en", "un", "es", "por"},
    "it": {"il", "la", "di", "e", "che", "un", "per", "non", "con", "sono"},
    "pt": {"o", "a", "de", "e", "que", "um", "para", "com", "em", "os"},
    "nl": {"de", "het", "een", "en", "van", "is", "dat", "niet", "met", "op"},
}
SENTENCE_END = re.compile(r"[.!?。！？][\"'”’)\]]*(?:\s|$)|[。！？]")
GENERATED = re.compile(r"auto-?generated|automatically generated|@generated|do not (edit|modify)", re.IGNORECASE)


class Text:
    """A text and its cuts, each made once for all rules."""

    def __init__(self, text: str):
        self.text = text
        self.words = text.split()
        self.lines = [line.strip() for line in text.split("\n") if line.strip()]
        self.paragraphs = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]

    @property
    def spaced(self) -> bool:
        """Whether white space parts words; in Chinese or Thai it does not, and rules over words mean nothing."""
        return len(self.text) < 12 * max(1, len(self.words))


def ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def repeated(items: list[str]) -> tuple[float, float]:
    """Share of items that stood before, and the share of characters in them."""
    again = [item for item, number in Counter(items).items() for _ in range(number - 1)]
    return ratio(len(again), len(items)), ratio(sum(map(len, again)), sum(map(len, items)))


def gram_hashes(words: list[str], n: int) -> np.ndarray:
    """A 64-bit hash of each of the n-grams of words."""
    hashes = np.fromiter((hash(word) for word in words), dtype=np.int64, count=len(words)).view(np.uint64)
    grams = np.zeros(max(0, len(words) - n + 1), dtype=np.uint64)
    for i in range(n):
        grams = grams * np.uint64(0x9E3779B97F4A7C15) + hashes[i : i + len(grams)]
    return grams


def top_gram(text: Text, n: int) -> float:
    """Share of the text's characters in its most frequent n-gram of words, where that stands twice or more."""
    grams = gram_hashes(text.words, n)
    if not len(grams):
        return 0.0
    _, first, counts = np.unique(grams, return_index=True, return_counts=True)
    top = counts.argmax()
    if counts[top] < 2:
        return 0.0
    length = sum(map(len, text.words[first[top] : first[top] + n]))
    return ratio(int(counts[top]) * length, sum(map(len, text.words)))


def duplicate_grams(text: Text, n: int) -> float:
    """Share of the text's characters that lie in n-grams which stood before; overlaps count once."""
    grams = gram_hashes(text.words, n)
    _, first = np.unique(grams, return_index=True)
    again = np.ones(len(grams), dtype=bool)
    again[first] = False
    covered = np.zeros(len(text.words) + 1, dtype=np.int64)
    np.add.at(covered, np.flatnonzero(again), 1)
    np.add.at(covered, np.flatnonzero(again) + n, -1)
    lengths = np.fromiter(map(len, text.words), dtype=np.int64, count=len(text.words))
    return ratio(int(lengths[np.cumsum(covered)[:-1] > 0].sum()), int(lengths.sum()))


def stop_words(text: Text) -> float:
    """The most distinct stop words of any one language."""
    words = {word.strip(".,;:!?\"'()").lower() for word in text.words}
    return max(len(words & stops) for stops in STOP_WORDS.values())


# Each rule measures a Text; all but WORDLESS are skipped for scripts without spaces.
RULES: dict[str, Callable[[Text], float]] = {
    "words": lambda t: len(t.words),
    "mean_word_length": lambda t: ratio(sum(map(len, t.words)), len(t.words)),
    "symbols_per_word": lambda t: ratio(t.text.count("#") + t.text.count("...") + t.text.count("\u2026"), len(t.words)),
    "bullet_lines": lambda t: ratio(sum(line[0] in "-*\u2022" for line in t.lines), len(t.lines)),
    "ellipsis_lines": lambda t: ratio(sum(line.endswith(("...", "\u2026")) for line in t.lines), len(t.lines)),
    "alphabetic_words": lambda t: ratio(sum(any(map(str.isalpha, word)) for word in t.words), len(t.words)),
    "stop_words": stop_words,
    "duplicate_lines": lambda t: repeated(t.lines)[0],
    "duplicate_line_characters": lambda t: repeated(t.lines)[1],
    "duplicate_paragraphs": lambda t: repeated(t.paragraphs)[0],
    "duplicate_paragraph_characters": lambda t: repeated(t.paragraphs)[1],
    **{f"top_{n}_gram": lambda t, n=n: top_gram(t, n) for n in (2, 3, 4)},
    **{f"duplicate_{n}_grams": lambda t, n=n: duplicate_grams(t, n) for n in range(5, 11)},
    "punctuated_lines": lambda t: ratio(sum(line[-1] in ".!?\"'”’:;。！？" for line in t.lines), len(t.lines)),
    "short_lines": lambda t: ratio(sum(len(line) <= 30 for line in t.lines), len(t.lines)),
    "newlines_per_word": lambda t: ratio(t.text.count("\n"), len(t.words)),
    "sentences": lambda t: len(SENTENCE_END.findall(t.text)),
    "lorem_ipsum": lambda t: t.text.lower().count("lorem ipsum"),
    "characters": lambda t: len(t.text),
    "mean_line_length": lambda t: ratio(sum(map(len, t.lines)), len(t.lines)),
    "longest_line": lambda t: max(map(len, t.lines), default=0),
    "alphanumeric": lambda t: ratio(sum(map(str.isalnum, t.text)), len(t.text)),
    "generated": lambda t: len(GENERATED.findall(t.text[:500])),
}
WORDLESS = {
    "duplicate_lines", "duplicate_line_characters", "duplicate_paragraphs", "duplicate_paragraph_characters",
    "lorem_ipsum", "characters", "longest_line", "generated", "sentences",
}  # fmt: skip

Bounds = dict[str, dict[str, float]]  # rule -> {low, high}, both inclusive
GOPHER: Bounds = {
    "words": {"low": 50, "high": 100_000}, "mean_word_length": {"low": 3, "high": 10},
    "symbols_per_word": {"high": 0.1}, "bullet_lines": {"high": 0.9}, "ellipsis_lines": {"high": 0.3},
    "alphabetic_words": {"low": 0.8}, "stop_words": {"low": 2},
}  # fmt: skip
REPETITION: Bounds = {
    "duplicate_lines": {"high": 0.30}, "duplicate_line_characters": {"high": 0.10},
    "duplicate_paragraphs": {"high": 0.30}, "duplicate_paragraph_characters": {"high": 0.20},
    "top_2_gram": {"high": 0.20}, "top_3_gram": {"high": 0.18}, "top_4_gram": {"high": 0.16},
    **{f"duplicate_{n}_grams": {"high": round(0.20 - 0.01 * n, 2)} for n in range(5, 11)},
}  # fmt: skip
PROFILES: dict[str, Bounds] = {
    "none": {},
    "web": GOPHER | REPETITION | {
        "punctuated_lines": {"low": 0.12}, "short_lines": {"high": 0.67}, "newlines_per_word": {"high": 0.3},
        "sentences": {"low": 5}, "lorem_ipsum": {"high": 0},
    },
    "docs": {"words": {"low": 20}, "lorem_ipsum": {"high": 0}, "top_2_gram": {"high": 0.35},
             "duplicate_10_grams": {"high": 0.5}},
    "code": {"mean_line_length": {"high": 100}, "longest_line": {"high": 1000}, "alphanumeric": {"low": 0.25},
             "generated": {"high": 0}},
    "books": {"words": {"low": 200}, "mean_word_length": {"low": 3, "high": 12}, "alphabetic_words": {"low": 0.8},
              "duplicate_line_characters": {"high": 0.3}},
}  # fmt: skip


def first_reason(document: Document, profile: str, overrides: dict[str, Any] | None = None) -> str | None:
    """The first rule that drops a document, as "rule value < low" or "rule value > high"; None: it is kept.

    overrides  {rule: {low, high}} over the profile's thresholds, {rule: False} turns one off

    >>> first_reason(Document("d", "only four words here", "s"), "docs")
    'words 4 < 20'
    """
    bounds: dict[str, Any] = dict(PROFILES[profile])
    for rule, change in (overrides or {}).items():
        bounds[rule] = {} if change is False else bounds.get(rule, {}) | change
    text = Text(document.text)
    for rule, limits in bounds.items():
        if not limits or (rule not in WORDLESS and not text.spaced):
            continue
        value = RULES[rule](text)
        if value < limits.get("low", value):
            return f"{rule} {value:.4g} < {limits['low']:g}"
        if value > limits.get("high", value):
            return f"{rule} {value:.4g} > {limits['high']:g}"
    return None
