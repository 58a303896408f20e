"""Cleaning: one function a step, Document -> Document. Code blocks, maths and indentation come through unharmed."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import replace

from llmkit.errors import UserError, did_you_mean
from llmkit.types import Document

HTML_START = re.compile(r"\s*(<\?xml[^>]*>\s*)?(<!doctype html|<html\b)", re.IGNORECASE)
# The form around a whole page (ASP.NET), an article's own header and the signature of a quoted letter stay. Formulas
# are often hidden, with a picture in their place: kept, as TeX where they come with it. No selector may look far up or
# down: pages can be 100,000 elements deep.
HTML_SKIPPED = [
    "nav",
    "aside",
    "footer:not(blockquote > footer)",
    "form:not(body > form)",
    "button",
    "noscript",
    "iframe",
    "svg",
    *("img", "area", "object", "video", "audio"),  # not alt_texts=False: that drops <figure> with the code in it
    *(f"[role={role}]" for role in ("navigation", "contentinfo", "complementary", "search")),
    *("[hidden]", "[aria-hidden=true i]:not(:has(> math))", "semantics > :first-child:has(+ annotation)"),
    "header:not(article > header, main > header, section > header, :has(> h1))",  # of the site
    *("[class~=hidden]", "[class~=d-none]", "[class~=sr-only]", "[class~=visually-hidden]"),  # Bootstrap, Tailwind
    *(
        f'[style*="{style}" i]:not(:has(> math))'
        for style in ("display:none", "display: none", "visibility:hidden", "visibility: hidden")
    ),
]
PRE = re.compile(r"(<pre\b[^<>]*>)(?:\r?\n)?", re.IGNORECASE)
XML_EMPTY = re.compile(  # <script/>: an HTML parser would take the rest of the page for the script
    r"<(?!(?:area|base|br|col|embed|hr|img|input|link|meta|param|source|track|wbr)\b)([a-z][\w-]*)((?:\s[^<>]*)?)/>",
    re.IGNORECASE,
)
# Signs of UTF-8 read as another encoding: a lead byte's letter, then what that encoding makes of a continuation byte.
# By line: C1 controls, which no text has; Latin-1, cp1252 and cp1250; MacRoman; cp1251; cp437. The search skips fast
# to one of the first letters; a false alarm only costs time.
MOJIBAKE = re.compile(
    "[\u0080-\u009f\u00c2-\u00f4\u0102\u0139\u221a\u0393\u00ac\u201a\u2248\u0420\u0421\u0432\u0440\u0441\u2564\u2568](?:"
    "(?<=[\u0080-\u009f])"
    "|(?<=[\u00c2-\u00f4\u0102\u0139])[\u0080-\u00bf\u0152-\u017e\u0192\u02c6-\u02dd\u2013-\u203a\u20ac\u2122]"
    "|(?<=[\u221a\u0393\u00ac\u201a\u2248])[\u00a0-\u00ff\u0192\u02c6-\u02dd\u03c0\u2013-\u2044\u20ac-\u25ca]"
    "|(?<=[\u0420\u0421\u0432\u0440\u0441])[\u0080-\u00bf\u0402-\u040f\u0452-\u0491\u2013-\u203a\u20ac\u2116\u2122]"
    "|(?<=[\u2564\u2568])[\u00c0-\u00ff\u2510-\u2593])"
)
BREAKS = re.compile("[\r\x0b\x0c\x85\u2028\u2029]")
# Removed: C0 and C1 controls but tab and line feed, soft hyphen, zero-width space, word joiner, byte order mark.
# Kept: zero-width (non-)joiners and direction marks, which Arabic, Indic scripts and emoji need.
CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u00ad\u200b\u2060\ufeff]")
ASCII_BREAKS = bytes.maketrans(b"\r\x0b\x0c", b"\n\n\n")
ASCII_CONTROL = bytes(code for code in range(128) if CONTROL.match(chr(code)))
SURROGATE = re.compile("[\ud800-\udfff]")
BLANK_LINES = re.compile(r"\n{4,}")


def html(document: Document) -> Document:
    """The visible text of HTML, without menus and forms, code blocks verbatim. Other documents are left alone.

    A record is HTML if it starts like a page; a file if its suffix says so (a page quoted in a .md stays as it is).
    """
    if document.meta.get("format", "html" if HTML_START.match(document.text) else None) != "html":
        return document
    from resiliparse.extract.html2text import extract_plain_text

    text = document.text
    if text.lstrip().startswith("<?xml"):
        text = XML_EMPTY.sub(r"<\1\2></\1>", text)
    text = PRE.sub(r"\1\n\n", text)  # in a list, only the first line would be indented: let that be an empty one
    text = extract_plain_text(text, preserve_formatting=True, skip_elements=HTML_SKIPPED)
    return replace(document, text=text, meta=document.meta | {"format": "text"})


def encoding(document: Document) -> Document:
    """Repair lines that were decoded with the wrong charset (ftfy), looking only at those with signs of it.

    >>> encoding(Document("d", "caf\\u00c3\\u00a9", "s")).text
    'caf\\xe9'
    """
    if document.text.isascii() or not MOJIBAKE.search(document.text):
        return document
    import ftfy

    lines = document.text.split("\n")  # line by line: text that is right in one would hide what is wrong in another
    fixed = [ftfy.fix_encoding(line) if MOJIBAKE.search(line) else line for line in lines]
    return replace(document, text="\n".join(fixed))


def control(document: Document) -> Document:
    """One kind of line break, no invisible characters, U+FFFD for lone surrogates."""
    text = document.text.replace("\r\n", "\n")
    if text.isascii():  # by far the quicker way
        return replace(document, text=text.encode().translate(ASCII_BREAKS, ASCII_CONTROL).decode())
    return replace(document, text=SURROGATE.sub("\ufffd", CONTROL.sub("", BREAKS.sub("\n", text))))


def unicode(document: Document) -> Document:
    """NFC: one code point where there is one. NFKC would change code, maths and ligatures."""
    return replace(document, text=unicodedata.normalize("NFC", document.text))  # quick where nothing is to do


def whitespace(document: Document) -> Document:
    """No spaces at line ends, at most two blank lines in a row, none around the text; indentation stays."""
    text = "\n".join([line.rstrip() for line in document.text.split("\n")])  # a regex takes n^2 for n spaces in a row
    return replace(document, text=BLANK_LINES.sub("\n\n\n", text).strip("\n"))


STEPS: dict[str, Callable[[Document], Document]] = {  # in the order in which they run
    "html": html,
    "encoding": encoding,  # before control: the halves of a mangled character are often C1 controls
    "control": control,  # before unicode: a soft hyphen can part a letter from its accent
    "unicode": unicode,
    "whitespace": whitespace,
}


def clean(document: Document, steps: Iterable[str] = STEPS) -> Document:
    """Apply steps by name, in the order of STEPS. Cleaning twice changes nothing more.

    >>> clean(Document("d", "a\\u200bb  \\r\\n\\tc", "s")).text
    'ab\\n\\tc'
    """
    chosen = list(steps)
    for name in chosen:
        if name not in STEPS:
            raise UserError(f"{name} is no cleaning step", expected=", ".join(STEPS), fix=did_you_mean(name, STEPS))
    for name, step in STEPS.items():
        if name in chosen:
            document = step(document)
    return document
