"""Format numbers, times, tables and text for a terminal."""

import itertools
import re
import sys
import textwrap
from typing import Any, TextIO

CONTROLS = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)"  # all but tabs and line ends
REORDERING = r"[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"  # Unicode's controls for the direction of text
LONE_SURROGATES = r"[\ud800-\udfff]"
# But not eos_token or max_tokens.
NAMES = r"[\w-]*(?:password|passwd|secret|(?:api|access)[_-]?key|(?:hf|access|auth|api|github|gitlab)[_-]?token)"
SECRETS = [  # what is a secret, and what is shown for it
    (r"://(?:[^/?#\s\"']*|[^/?#\s\"'@:]*:(?!\d+/)[^\s\"']*)@", "://***@"),  # the user and the password in a URL
    (r"(?i)([?&][\w-]*(?:token|key|secret|password|signature|sig|auth)=)[^&#\s\"']+", r"\1***"),
    (r"(?i)(\bauthorization[\"']?\s*[=:]\s*[\"']?)(?:(?:bearer|basic|token)\s+)?[^\s\"',]+", r"\1***"),
    (r"(?i)(\bbearer\s+)[\w.~+/=-]{8,}", r"\1***"),
    (rf"(?i)((?:{NAMES}|\btoken)[\"']?\s*=\s*[\"']?)[^\s&\"',}}]+", r"\1***"),
    (rf"(?im)({NAMES}[\"']?\s*:\s*[\"']?)[^\s&\"',}}]+(?=[\"',}}]*\s*(?:[,}}]|$))", r"\1***"),  # no prose
    (rf"(?i)(--(?:{NAMES}|token)\s+)\S+", r"\1***"),
    (r"\b(?:hf_|sk-|gh[pousr]_)[A-Za-z0-9_-]{20,}", "***"),
]


def printable(text: str) -> str:
    """Replace characters that a terminal obeys: controls, but for tabs and newlines, and marks that reorder text.

    >>> printable("a\\x1b[31mb\\n"), printable("abc\\u202ecba")
    ('a\ufffd[31mb\\n', 'abc\ufffdcba')
    """
    return re.sub(f"{CONTROLS}|{REORDERING}|{LONE_SURROGATES}", "\ufffd", text)


def for_stream(text: str, stream: TextIO) -> str:
    """Return a text from a file or a model as it may be printed: `printable` on a terminal, unchanged elsewhere."""
    return printable(text) if stream and stream.isatty() else text  # None: the stream was closed


def replace_surrogates(text: str) -> str:
    """Replace lone surrogates, which UTF-8 can't encode, by U+FFFD. Join pairs of them.

    >>> replace_surrogates("a\\ud800b")
    'a\ufffdb'
    """
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def hide_secrets(text: str) -> str:
    """Replace passwords in URLs, access tokens, and values that are named like a secret, by ***.

    >>> hide_secrets("-o data.path=https://me:hunter2@host/x?sig=1 hf_token=abc")
    '-o data.path=https://***@host/x?sig=*** hf_token=***'
    >>> hide_secrets("Authorization: Bearer abc.def, and hf_" + "a" * 34)
    'Authorization: ***, and ***'
    """
    for pattern, replacement in SECRETS:
        text = re.sub(pattern, replacement, text)
    return text


def format_count(number: float) -> str:
    """Format a number with a unit.

    >>> format_count(412_345), format_count(7.25e9), format_count(930)
    ('412k', '7.25B', '930')
    """
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            short = f"{number / size:.3g}"
            return f"{float(short):g}{unit}"
    return f"{number:.0f}"


def format_duration(seconds: float) -> str:
    """Format seconds as h:mm:ss, or as days or years.

    >>> format_duration(3725), format_duration(3e5), format_duration(7e9)
    ('1:02:05', '3.47 days', '222 years')
    """
    whole = int(seconds)
    for unit, name, least in ((365.25 * 86400, "years", 1), (86400, "days", 2)):
        if seconds >= least * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def format_table(rows: list[dict[str, Any]]) -> str:
    """Format rows with the same keys as aligned columns."""
    cells = [list(rows[0]), *[[format_cell(value) for value in row.values()] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def format_markdown(text: str) -> str:
    """Return a report in Markdown as it reads best on a terminal: aligned tables, no marks of headings and bold.

    >>> print(format_markdown("## a\\n| x | y |\\n|---|---|\\n| long | **b** |"))
    a
    x     y
    long  b
    """
    lines = []
    for is_table, group in itertools.groupby(text.splitlines(), lambda line: line.startswith("|")):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in group] if is_table else []
        if len(rows) > 2:  # a header, its underline, and what is below
            padding = [""] * len(rows[0])  # for a line that is cut off
            lines.append(format_table([dict(zip(rows[0], [*row, *padding], strict=False)) for row in rows[2:]]))
        elif not is_table:
            lines += [line.lstrip("# ") if line.startswith("#") else line for line in group]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines).replace("**", ""))


def format_keys(rows: list[dict[str, str]], width: int = 98) -> str:
    """Format the keys of a config, each with its meaning indented below it.

    >>> print(format_keys([{"key": "log.every", "type": "number", "default": "10", "meaning": "Steps."}]))
    log.every: number = 10
        Steps.
    """
    lines = []
    for row in rows:
        head = f"{row['key']}: {row['type']}" + (f" = {row['default']}" if row["default"] else "")
        lines += textwrap.wrap(head, width, subsequent_indent="        ")
        lines += textwrap.wrap(row["meaning"], width, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def count(number: int, noun: str) -> str:
    """Return a number with its noun: "1 rank", "2 ranks"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def warn(text: str) -> None:
    """Print a warning on stderr."""
    print(printable(f"warning: {text}"), file=sys.stderr)
