"""Clean documents: one function per step, Document -> Document. Code blocks, math and indentation are kept."""

import itertools
import math
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import replace

from llmkit.errors import UserError, did_you_mean
from llmkit.types import Document

# A page starts with one of these tags, perhaps after a byte order mark or comments. Saved pages may also start with a
# script, a meta tag or a warning of PHP (<br />); then a later tag must show that they are pages.
HTML_START = re.compile(
    r"(?>\s+|\ufeff|<!--(?>.*?-->)|<\?xml[^>]*>)*+"
    r"<(?:(!doctype html|html|head|body)|base|br|link|meta|noscript|script|style|title)[\s>/]",
    re.IGNORECASE | re.DOTALL,
)
HTML_LATER = re.compile(r"<(?:!doctype html|html|head|body)[\s>/]", re.IGNORECASE)
# CSS selectors of the elements that are removed. Not removed: forms that wrap the whole page (ASP.NET), headers of
# articles, footers of block quotes, and hidden MathML, which often accompanies an image of the formula.
# If a formula has its TeX source as an annotation, only the TeX is kept.
# No selector may search far up or down the tree: pages can be 100,000 elements deep.
SITE_HEADER = "header:not(article > header, main > header, section > header, :has(> h1))"
NO_TEXT = [
    *"button noscript iframe svg".split(),
    *"rt rp".split(),  # ruby: how a word is read, above it
    *"img area object video audio".split(),  # not alt_texts=False: that drops <figure> with the code in it
]
HTML_SKIPPED = [
    *NO_TEXT,
    *"nav aside".split(),
    *("footer:not(blockquote > footer)", "form:not(body > form)", "semantics > :first-child:has(+ annotation)"),
    SITE_HEADER,
    *(f"[role={role}]" for role in "navigation contentinfo complementary search".split()),
    *("[hidden]", "[aria-hidden=true i]:not(:has(> math))"),
    *(f"[class~={name}]" for name in "hidden d-none sr-only visually-hidden".split()),  # Bootstrap, Tailwind
    *(
        f'[style*="{style}" i]:not(:has(> math))'
        for style in ("display:none", "display: none", "visibility:hidden", "visibility: hidden")
    ),
]
WORD = re.compile(r"\w+")
RUN, SHARE, GAP = 4, 0.7, 5  # of an article's lines: words; of a line's runs; words
ITEM = re.compile(r"( *)(?:•|\d+\.) ")  # of a list in the visible text
NO_BOXES = re.compile("<!--.*?(?:-->|$)|<(script|style)\\b.*?(?:</\\1|$)", re.DOTALL | re.IGNORECASE)
BOX, DEEPEST = re.compile("<(/?)(?:div|article|section|main)\\b", re.IGNORECASE), 1000
RUBY = ["//rt", "//rp"]  # how a word is read, above it
LONGEST_PAGE = 2_000_000  # characters; trafilatura would take seconds for more
PRE = re.compile(r"(<pre\b[^<>]*>)(?:\r?\n)?", re.IGNORECASE)
PRE_END = re.compile(r"(?:\r?\n)?</pre\b", re.IGNORECASE)
CODE, PROSE, CODE_MARKS = "\ufdd0", "\ufdd1", re.compile("[\ufdd0\ufdd1]")  # noncharacters, which no text has
XML_EMPTY = re.compile(  # an HTML parser would take everything after <script/> as part of the script
    r"<(?!(?:area|base|br|col|embed|hr|img|input|link|meta|param|source|track|wbr)\b)([a-z][\w-]*)((?:\s[^<>]*)?)/>",
    re.IGNORECASE,
)
# What UTF-8 becomes if it is decoded with another encoding: several letters that are not ASCII in a row, a C1 control,
# or one letter and a space. Few lines in Latin scripts have that; ftfy then looks at them more closely.
MOJIBAKE = re.compile("[^\x00-\x7f]{2}|[\x80-\x9f]|[\xc2\xc3] ")
LINE_BREAKS = re.compile("[\r\x0b\x0c\x85\u2028\u2029]")
# Removed: C0 and C1 controls except tab and line feed, soft hyphen, zero-width space, word joiner, byte order mark.
# Kept: zero-width (non-)joiners and direction marks. Arabic, Indic scripts and emoji need them.
CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u00ad\u200b\u2060\ufeff]")
ASCII_LINE_BREAKS = bytes.maketrans(b"\r\x0b\x0c", b"\n\n\n")
ASCII_CONTROL = bytes(code for code in range(128) if CONTROL.match(chr(code)))
SURROGATE = re.compile("[\ud800-\udfff]")
BLANK_LINES = re.compile(r"\n{4,}")


def extract_visible_text(document: Document) -> Document:
    """Replace HTML by its visible text, without menus and forms, with code blocks verbatim. Keep other documents.

    A file is HTML if its suffix says so, a record if it starts like a page. A page quoted in a .md file stays as it is.
    """
    if not is_html(document):
        return document
    return replace(document, text=visible_text(document.text), meta=document.meta | {"format": "text"})


def extract_article(document: Document) -> Document:
    """Replace HTML by the text of its article, line by line as in its visible text. Keep other documents.

    The rest of a page, such as teasers, comments and notices, is left out. A line stays if trafilatura finds it in the
    article, if it is code or a list in a list, which trafilatura may drop, after a line that stays, or if it is one of
    a few words between lines that stay. If trafilatura finds no article, resiliparse's main content is taken for it,
    and if that is empty, all lines stay.
    """
    if not is_html(document):
        return document
    page = document.text
    lines, are_code = split_code(visible_text(page, mark_code=True))
    words = [words_of(line) for line in lines]
    chosen = [True] * len(lines)
    for find in (find_article, find_main_content) if len(page) <= LONGEST_PAGE else ():
        found = find_lines(find(page), words)
        if any(found):
            prose = [() if code else line for code, line in zip(are_code, words, strict=True)]
            chosen = add_parts(bridge_gaps(found, prose), are_code, lines)
            break
    text = "\n".join(line for line, keep in zip(lines, chosen, strict=True) if keep)
    return replace(document, text=text, meta=document.meta | {"format": "text"})


def is_html(document: Document) -> bool:
    """Return whether a document is HTML: by its format if it has one, else by how it starts."""
    if "format" in document.meta:
        return document.meta["format"] == "html"
    start = HTML_START.match(document.text)
    return bool(start and (start[1] or HTML_LATER.search(document.text, start.end())))


def is_deep(page: str) -> bool:
    """Return whether boxes are nested deeper than DEEPEST: resiliparse's main content takes quadratic time for them."""
    depth = 0
    for box in BOX.finditer(NO_BOXES.sub("", page)):
        depth = max(0, depth - 1) if box[1] else depth + 1
        if depth > DEEPEST:
            return True
    return False


def visible_text(page: str, *, main_content: bool = False, mark_code: bool = False) -> str:
    """Return the text of a page that resiliparse takes for visible, or for its main content.

    mark_code  put CODE and PROSE around blocks of code, for `split_code`
    """
    from resiliparse.extract.html2text import extract_plain_text

    if page.lstrip().startswith("<?xml"):
        page = XML_EMPTY.sub(r"<\1\2></\1>", page)
    if mark_code:
        page = page.replace(CODE, "").replace(PROSE, "")
        page = PRE_END.sub(rf"{PROSE}\g<0>", PRE.sub(rf"\1{CODE}", page))
    page = PRE.sub(r"\1\n\n", page)  # in a list, resiliparse indents only the first line, so insert an empty one
    options = {"preserve_formatting": True, "main_content": main_content}
    # All may be in a header that is never closed, or in a form or a menu.
    for skipped in (HTML_SKIPPED, [one for one in HTML_SKIPPED if one != SITE_HEADER], NO_TEXT):
        text = extract_plain_text(page, skip_elements=skipped, **options)
        if text.strip():
            break
    return text


def split_code(text: str) -> tuple[list[str], list[bool]]:
    """Return (lines, whether each is code) of a text with marks around its blocks of code.

    >>> split_code(f"a\\n{CODE}x = 1\\ny = 2{PROSE}\\nb")
    (['a', 'x = 1', 'y = 2', 'b'], [False, True, True, False])
    """
    if (last := text.rfind(CODE)) > text.rfind(PROSE):  # never closed: only the line itself may be code
        text = text[:last] + text[last + 1 :]
    lines, are_code, inside = [], [], False
    for line in text.split("\n"):
        are_code.append(inside or CODE in line)
        inside = line.rfind(CODE) > line.rfind(PROSE) if CODE_MARKS.search(line) else inside
        lines.append(CODE_MARKS.sub("", line))
    return lines, are_code


def find_article(page: str) -> str:
    """Return the text of the article that trafilatura finds."""
    import trafilatura

    return trafilatura.extract(page, fast=True, favor_recall=True, include_comments=False, prune_xpath=RUBY) or ""


def find_main_content(page: str) -> str:
    """Return what resiliparse takes for the main content of a page; nothing of a page that is too deep for it."""
    return "" if is_deep(page) else visible_text(page, main_content=True)


def find_lines(found: str, lines: list[tuple[str, ...]]) -> list[bool]:
    """Return which lines of a page, given as words, are in a text that was found in it.

    A line is there if the text has the same one, or most of its runs of RUN words.
    """
    same, all_words = {words_of(line) for line in found.split("\n")}, words_of(found)
    runs = set(zip(*(all_words[start:] for start in range(RUN)), strict=False))

    def is_there(line: tuple[str, ...]) -> bool:
        if line in same or len(line) < RUN:
            return bool(line) and line in same
        own = list(zip(*(line[start:] for start in range(RUN)), strict=False))
        return sum(run in runs for run in own) >= SHARE * len(own)

    return [is_there(line) for line in lines]


def words_of(text: str) -> tuple[str, ...]:
    return tuple(WORD.findall(text.replace("\u00ad", "")))  # trafilatura keeps fewer soft hyphens


def bridge_gaps(chosen: list[bool], lines: list[tuple[str, ...]]) -> list[bool]:
    """Return the choice with the lines between two chosen ones, if together they have GAP words or fewer.

    >>> bridge_gaps([True, False, True, False], [("a",), ("b",), ("c",), ("d",)])
    [True, True, True, False]
    """
    bridged, places = chosen.copy(), [i for i, keep in enumerate(chosen) if keep]
    for left, right in itertools.pairwise(places):
        if sum(map(len, lines[left + 1 : right])) <= GAP:
            bridged[left:right] = [True] * (right - left)
    return bridged


def add_parts(chosen: list[bool], are_code: list[bool], lines: list[str]) -> list[bool]:
    """Return the choice with what directly follows a chosen line: code, and the items of a list inside its item.

    >>> add_parts([True, False, False, False], [False] * 4, ["  • a", "    • b", "    • c", "d"])
    [True, True, True, False]
    """
    added, follows, depth = chosen.copy(), False, math.inf
    for i, (code, line) in enumerate(zip(are_code, lines, strict=True)):
        item = ITEM.match(line)
        if chosen[i]:
            depth = len(item[1]) if item else math.inf
        added[i] |= follows and (code or bool(item and len(item[1]) > depth))
        follows = added[i] if code or line.strip() else follows  # across blank lines
    return added


def repair_encoding(document: Document) -> Document:
    """Repair lines that were decoded with the wrong charset. MOJIBAKE finds candidates, and ftfy repairs them.

    >>> repair_encoding(Document("d", "caf\\u00c3\\u00a9", "s")).text
    'caf\\xe9'
    """
    if document.text.isascii() or not MOJIBAKE.search(document.text):
        return document
    import ftfy

    def fix(line: str) -> str:
        return ftfy.fix_encoding(line) if MOJIBAKE.search(line) and ftfy.badness.is_bad(line) else line

    # Line by line, because correct text in one line would hide errors in another.
    return replace(document, text="\n".join(map(fix, document.text.split("\n"))))


def remove_control_characters(document: Document) -> Document:
    """Turn all line breaks into "\\n", remove invisible characters, and replace lone surrogates by U+FFFD."""
    text = document.text.replace("\r\n", "\n")
    if text.isascii():  # much faster than the regexes below
        return replace(document, text=text.encode().translate(ASCII_LINE_BREAKS, ASCII_CONTROL).decode())
    return replace(document, text=SURROGATE.sub("\ufffd", CONTROL.sub("", LINE_BREAKS.sub("\n", text))))


def normalize_unicode(document: Document) -> Document:
    """Normalize to NFC, which prefers composed characters. NFKC would change code, maths and ligatures."""
    return replace(document, text=unicodedata.normalize("NFC", document.text))  # fast for text in NFC


def clean_whitespace(document: Document) -> Document:
    """Strip trailing spaces and the blank lines around the text. Keep at most two blank lines in a row."""
    text = "\n".join([line.rstrip() for line in document.text.split("\n")])  # a regex is O(n^2) for n spaces
    return replace(document, text=BLANK_LINES.sub("\n\n\n", text).strip("\n"))


STEPS: dict[str, Callable[[Document], Document]] = {  # name in the config -> function, in running order
    "html": extract_article,
    "html_all": extract_visible_text,
    "encoding": repair_encoding,  # before control: the halves of a mangled character are often C1 controls
    "control": remove_control_characters,  # before unicode: a soft hyphen can separate a letter from its accent
    "unicode": normalize_unicode,
    "whitespace": clean_whitespace,
}


def clean(document: Document, steps: Iterable[str] = STEPS) -> Document:
    """Apply the named steps in the order of STEPS. Cleaning a second time changes nothing.

    >>> clean(Document("d", "a\\u200bb  \\r\\n\\tc", "s")).text
    'ab\\n\\tc'
    """
    chosen = list(steps)
    for name in chosen:
        if name not in STEPS:
            raise UserError(f"unknown cleaning step: {name}", expected=", ".join(STEPS), fix=did_you_mean(name, STEPS))
    for name, step in STEPS.items():
        if name in chosen:
            document = step(document)
    return document
