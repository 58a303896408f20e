"""Measure texts for quality filters, one function per rule. A document outside a rule's thresholds is dropped.

The measured values are stored, so that new thresholds need no second pass over the texts.

Sources of the thresholds: Gopher (Rae et al. 2021, arXiv:2112.11446, appendix A), FineWeb (Penedo et al. 2024,
arXiv:2406.17557), C4 (Raffel et al. 2019, arXiv:1910.10683), and The Stack's rules for code (arXiv:2211.15533).
"""

import math
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import filterfalse
from typing import Any

import numpy as np

from llmkit.readers.words import GOLDEN, TextFeatures, mix

STOP_WORDS = {  # prose has at least two stop words of its language; the English list is Gopher's
    "en": "the be to of and that have with",
    "de": "der die das und zu den ist nicht von mit ein sich auf",
    "fr": "le la les de et un une est que dans des pour pas",
    "es": "el la los de y que en un es por con para una",
    "it": "il la di e che un per non con sono una del",
    "pt": "o a de e que um para com em os uma não",
    "nl": "de het een en van is dat niet met op te zijn",
}
LANGUAGES_BY_STOP_WORD = {  # stop word -> languages
    word: [language for language, words in STOP_WORDS.items() if word in words.split()]
    for word in " ".join(STOP_WORDS.values()).split()
}

# Sentences end here without a space, too. From Unicode's property Sentence_Terminal: Chinese and Japanese, Devanagari
# and Bengali, Arabic and Urdu, Ethiopic, Armenian, Burmese, Khmer.
OTHER_STOPS = "。！？।॥؟۔።։။៕"
SENTENCE_END = re.compile(rf"[.!?{OTHER_STOPS}](?:(?<=[{OTHER_STOPS}])|[\"'”“’»«)\]]*(?:\s|$))")
LINE_ENDS = tuple(".!?…\"'”“’»«›‹:;)]」』" + OTHER_STOPS)
BULLETS = ("-", "*", "•", "‣", "◦", "▪", "●", "·")
ELLIPSES = ("...", "…")
LETTER = re.compile(r"[^\W\d_]")
FOREIGN_LETTER = re.compile(r"[^\W\d_a-zA-Z]")
GENERATED = re.compile(r"auto-?generated|automatically generated|@generated|do not (edit|modify)", re.IGNORECASE)


def ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


@lru_cache(maxsize=1)  # the rules for all n measure the same text
def measure_repeats(text: TextFeatures) -> dict[int, float]:
    """Return {n: share of the words' bytes in repeated word n-grams}, by Gopher's measures. Zeros are omitted.

    n = 2..4   all occurrences of the most frequent n-gram, if it occurs at least twice (ties: the longest)
    n = 5..10  all occurrences after the first of any n-gram; overlaps count once

    An n-gram repeats only where its first n-1 words repeat, so few positions are left after n = 2 or 3.

    >>> measure_repeats(TextFeatures("a b c a b d"))
    {2: 0.6666666666666666}
    """
    words, hashes = text.folded, text.hashes
    sizes = np.fromiter(map(len, words), np.int64, len(words))  # in bytes
    ends = np.append(0, np.cumsum(sizes))  # word i is ends[i]..ends[i + 1]
    starts, grams, found = np.arange(len(words)), hashes, {}
    for n in range(2, 11):
        inside = starts <= len(words) - n
        starts = starts[inside]
        grams = mix(grams[inside] * GOLDEN + hashes[starts + n - 1])
        # Put the position in the low bits of the hash: sorting that is much faster than a stable argsort.
        low = np.uint64((1 << len(starts).bit_length()) - 1)
        keys = np.sort((grams & ~low) | np.arange(len(starts), dtype=np.uint64))
        same = (keys[1:] ^ keys[:-1]) <= low  # equal to the key before
        if not same.any():
            break
        order = (keys & low).astype(np.int64)
        later = np.concatenate([[False], same])  # occurrences after the first
        repeated = later.copy()
        repeated[:-1] |= same
        if n <= 4:
            firsts = np.flatnonzero(~later[repeated])
            counts = np.diff(firsts, append=np.count_nonzero(repeated))
            where = starts[order[repeated][firsts]]
            share = ((ends[where + n] - ends[where]) * counts)[counts == counts.max()].max()
        else:
            covered = np.zeros(len(words), dtype=bool)
            for i in range(n):
                covered[starts[order[later]] + i] = True
            share = sizes[covered].sum()
        found[n] = min(1.0, float(share / ends[-1]))  # occurrences of the most frequent n-gram can overlap
        keep = np.sort(order[repeated])
        starts, grams = starts[keep], grams[keep]
    return found


def duplicate_fraction(items: list[str]) -> float:
    """Return the share of items that repeat an earlier one."""
    return ratio(len(items) - len(set(items)), len(items))


def duplicate_character_fraction(items: list[str]) -> float:
    """Return the share of all characters that lies in items that repeat an earlier one."""
    total = sum(map(len, items))
    return ratio(total - sum(map(len, set(items))), total)


def stop_words(text: TextFeatures) -> float | None:
    """Return the number of distinct stop words, up to 2, in the language that has the most of them.

    Return None if there are fewer than 2 and STOP_WORDS probably lacks the language: the script has no spaces, or over
    3 % of the characters are non-ASCII letters.
    """
    found: dict[str, set[str]] = {language: set() for language in STOP_WORDS}
    for word in text.words:  # prose has two of them within a line or two
        word = word.strip(".,;:!?\"'()").lower()
        for language in LANGUAGES_BY_STOP_WORD.get(word, ()):
            found[language].add(word)
            if len(found[language]) == 2:
                return 2
    foreign = not text.spaced or len(FOREIGN_LETTER.findall(text.text)) > 0.03 * text.letters
    return None if foreign else max(map(len, found.values()))


def mean_word_length(text: TextFeatures) -> float | None:
    return ratio(text.letters, len(text.words)) if text.spaced else None


def alphabetic_words(text: TextFeatures) -> float | None:
    """Return the share of words with a letter, None for scripts without spaces."""
    if not text.spaced:  # each character counts as a word there, and many are combining marks
        return None
    plain = sum(map(str.isalpha, text.words))
    mixed = sum(map(bool, map(LETTER.search, filterfalse(str.isalpha, text.words))))  # loops in C: a hot spot
    return ratio(plain + mixed, len(text.words))


def repeated_ngrams(text: TextFeatures, n: int) -> float | None:
    # In scripts without spaces words are characters, and n-grams of characters repeat in any text.
    return measure_repeats(text).get(n, 0.0) if text.spaced else None


def matching_fraction(lines: list[str], test: Callable[[str], bool]) -> float:
    return ratio(sum(map(test, lines)), len(lines))


def matching_characters(lines: list[str], test: Callable[[str], bool]) -> float:
    """Return the share of the lines' characters that is in matching lines."""
    return ratio(sum(map(len, filter(test, lines))), sum(map(len, lines)))


def is_short(line: str) -> bool:
    return len(line) <= 30


def is_punctuated(line: str) -> bool:
    return line.endswith(LINE_ENDS)


def punctuated_text(text: TextFeatures) -> float:
    """Return the share of the lines that end with punctuation, or of the characters in them, the larger of the two."""
    return max(matching_fraction(text.lines, is_punctuated), matching_characters(text.lines, is_punctuated))


# name in the config -> function; it returns None if the rule does not apply to a text
RULES: dict[str, Callable[[TextFeatures], float | None]] = {
    "words": lambda t: len(t.words),
    "mean_word_length": mean_word_length,
    "hashes_per_word": lambda t: ratio(t.text.count("#"), len(t.words)),
    "ellipses_per_word": lambda t: ratio(sum(map(t.text.count, ELLIPSES)), len(t.words)),
    "bullet_lines": lambda t: matching_fraction(t.lines, lambda line: line.startswith(BULLETS)),
    "ellipsis_lines": lambda t: matching_fraction(t.lines, lambda line: line.endswith(ELLIPSES)),
    "alphabetic_words": alphabetic_words,
    "stop_words": stop_words,
    "duplicate_lines": lambda t: duplicate_fraction(t.lines),
    "duplicate_line_characters": lambda t: duplicate_character_fraction(t.lines),
    "duplicate_paragraphs": lambda t: duplicate_fraction(t.paragraphs),
    "duplicate_paragraph_characters": lambda t: duplicate_character_fraction(t.paragraphs),
    **{f"top_{n}_gram": lambda t, n=n: repeated_ngrams(t, n) for n in (2, 3, 4)},
    **{f"duplicate_{n}_grams": lambda t, n=n: repeated_ngrams(t, n) for n in range(5, 11)},
    "punctuated_lines": lambda t: matching_fraction(t.lines, is_punctuated),
    "punctuated_text": punctuated_text,
    "short_lines": lambda t: matching_fraction(t.lines, is_short) if t.spaced else None,
    "short_line_characters": lambda t: matching_characters(t.lines, is_short) if t.spaced else None,
    # Not counting blank lines: FineWeb set its threshold on text without any.
    "newlines_per_word": lambda t: ratio(max(0, len(t.lines) - 1), len(t.words)),
    "words_per_line": lambda t: ratio(len(t.words), len(t.lines)),
    "sentences": lambda t: len(SENTENCE_END.findall(t.text)),
    "characters": lambda t: len(t.text),
    "lorem_ipsum": lambda t: t.text.lower().count("lorem ipsum"),
    "mean_line_length": lambda t: ratio(len(t.text), t.text.count("\n") + 1),
    "longest_line": lambda t: max(map(len, t.text.split("\n"))),
    "alphanumeric": lambda t: ratio(sum(map(str.isalnum, t.text)), len(t.text)),
    "generated": lambda t: len(GENERATED.findall(t.text[:500])),
}

Bounds = dict[str, dict[str, float]]  # rule -> {low, high}, both inclusive; cheap rules first
GOPHER: Bounds = {
    "words": {"low": 50, "high": 100_000},
    "mean_word_length": {"low": 3, "high": 10},
    "hashes_per_word": {"high": 0.1},
    "ellipses_per_word": {"high": 0.1},
    "bullet_lines": {"high": 0.9},
    "ellipsis_lines": {"high": 0.3},
    "alphabetic_words": {"low": 0.8},
    "stop_words": {"low": 2},
    "duplicate_line_characters": {"high": 0.10},  # from FineWeb
    "duplicate_paragraph_characters": {"high": 0.20},
}
# Gopher also limits duplicate_lines and duplicate_paragraphs; FineWeb, punctuated_lines (0.12) and short_lines (0.67).
# These count lines, and so drop long articles with short lines between: captions, tags, a mark at each advertisement.
# Of 42 pages that they dropped, 23 were good. Counted in characters, the good ones are far from the limits.
FINEWEB: Bounds = {
    "punctuated_text": {"low": 0.12},
    "short_line_characters": {"high": 0.35},
    "newlines_per_word": {"high": 0.3},
}
# C4 itself requires 5 sentences. Of 13 documents dropped by that rule, 10 were good short articles.
C4: Bounds = {"words_per_line": {"low": 3}, "sentences": {"low": 3}, "lorem_ipsum": {"high": 0}}
REPETITION: Bounds = {  # also from Gopher
    "top_2_gram": {"high": 0.20},
    "top_3_gram": {"high": 0.18},
    "top_4_gram": {"high": 0.16},
    **{f"duplicate_{n}_grams": {"high": round(0.20 - 0.01 * n, 2)} for n in range(5, 11)},
}
PROFILES: dict[str, Bounds] = {
    "none": {},
    "web": GOPHER | FINEWEB | C4 | REPETITION,
    "docs": {  # manuals have many lists and tables, and repeat their warnings
        "words": {"low": 20},
        "alphabetic_words": {"low": 0.5},
        "lorem_ipsum": {"high": 0},
        "duplicate_paragraph_characters": {"high": 0.5},
        "top_2_gram": {"high": 0.35},
        "duplicate_10_grams": {"high": 0.5},
    },
    "code": {
        "mean_line_length": {"high": 100},
        "longest_line": {"high": 1000},
        "alphanumeric": {"low": 0.25},
        "generated": {"high": 0},
    },
    "books": {  # loose limits: plays repeat names and poems have short lines
        "words": {"low": 200},
        "mean_word_length": {"low": 3, "high": 12},
        "alphabetic_words": {"low": 0.8},
        "stop_words": {"low": 2},
        "duplicate_line_characters": {"high": 0.3},
        "duplicate_10_grams": {"high": 0.3},
    },
}


def profile_limits(profile: str, overrides: dict[str, Any]) -> Bounds:
    """Return the profile's thresholds, updated with {rule: {low, high}}. {rule: False} removes a rule's thresholds."""
    bounds = dict(PROFILES[profile])
    for rule, change in overrides.items():
        bounds[rule] = {} if change is False else bounds.get(rule, {}) | change
    return bounds


def measure(text: TextFeatures, rules: Iterable[str]) -> list[float]:
    """Return the value of each rule, rounded to four digits, nan if the rule does not apply to the text."""
    values = [RULES[rule](text) for rule in rules]
    return [math.nan if value is None else round(value, 4) for value in values]


def is_outside(values: np.ndarray | float, limits: dict[str, float]) -> np.ndarray:
    """Return a mask of the values below the low or above the high limit. nan is within all limits."""
    return (values < limits.get("low", -math.inf)) | (values > limits.get("high", math.inf))


def explain(rule: str, value: float, limits: dict[str, float]) -> str:
    """Format a value and the limit that it violates.

    >>> explain("words", 4, {"low": 20})
    'words 4 < 20'
    """
    low = value < limits.get("low", -math.inf)
    return f"{rule} {value:.4g} {'<' if low else '>'} {limits['low' if low else 'high']:g}"
