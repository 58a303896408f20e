"""Cleaning: one function a step, Document -> Document. Code blocks, maths and indentation come through unharmed."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import replace

from llmkit.types import Document

HTML_LIKE = re.compile(r"\s*(<!doctype html|<html\b)", re.IGNORECASE)
# Bytes of UTF-8 that were read as Latin-1 or cp1252: a lead byte's letter and a continuation byte's after it.
MOJIBAKE = re.compile(
    "[\u00c2\u00c3\u00c5\u00ce\u00cf\u00d0\u00d1\u00e2\u00f0][\u0080-\u00bf\u0152-\u0192\u2013-\u2122]"
)
# C0 and C1 controls but tab and line feed, zero-width space, soft hyphen, BOM, directional marks that only hide text.
# Zero-width joiners stay: Arabic, Indic scripts and emoji need them.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u00ad\ufeff\u202a-\u202e\u2066-\u2069\ufff9-\ufffb]")
SURROGATE = re.compile("[\ud800-\udfff]")
BREAKS = re.compile("\r\n?|\u2028|\u2029|\x85|\x0b|\x0c")
TRAILING = re.compile(r"[ \t\u00a0]+$", re.MULTILINE)
BLANK_LINES = re.compile(r"\n{4,}")


def html(document: Document) -> Document:
    """HTML to text, code blocks verbatim; text that is not HTML is left alone."""
    if document.meta.get("format") != "html" and not HTML_LIKE.match(document.text[:200]):
        return document
    from resiliparse.extract.html2text import extract_plain_text

    text = extract_plain_text(document.text, preserve_formatting=True, main_content=False, alt_texts=False)
    return replace(document, text=text)


def encoding(document: Document) -> Document:
    """Repair text that was decoded with the wrong charset; the expensive look only where a cheap one finds signs."""
    if not MOJIBAKE.search(document.text):
        return document
    import ftfy

    fixed = ftfy.fix_encoding(document.text)
    return replace(document, text=fixed)


def unicode(document: Document) -> Document:
    """NFC: one code point where there is one. NFKC would change code, maths and ligatures."""
    if document.text.isascii() or unicodedata.is_normalized("NFC", document.text):
        return document
    return replace(document, text=unicodedata.normalize("NFC", document.text))


def control(document: Document) -> Document:
    """One kind of line break; no control characters; lone surrogates become U+FFFD."""
    text = CONTROL.sub("", BREAKS.sub("\n", document.text))
    return replace(document, text=SURROGATE.sub("\ufffd", text))


def whitespace(document: Document) -> Document:
    """No spaces at line ends, at most two blank lines in a row, none around; indentation stays."""
    text = BLANK_LINES.sub("\n\n\n", TRAILING.sub("", document.text))
    return replace(document, text=text.rstrip().lstrip("\n"))


STEPS: dict[str, Callable[[Document], Document]] = {  # in the order in which they run
    "html": html, "encoding": encoding, "unicode": unicode, "control": control, "whitespace": whitespace,
}  # fmt: skip


def clean(document: Document, steps: Iterable[str] = STEPS) -> Document:
    """Apply steps by name, in the order of STEPS.

    >>> clean(Document("d", "a\\u200bb  \\r\\n\\tc", "s")).text
    'ab\\n\\tc'
    """
    chosen = set(steps)
    for name, step in STEPS.items():
        if name in chosen:
            document = step(document)
    return document
