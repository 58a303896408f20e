"""Decode bytes to text or JSON: detect the encoding, and reject binary data."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import orjson

from llmkit.screen import replace_surrogates

BYTE_ORDER_MARKS = {  # UTF-32 comes first, because its mark starts with that of UTF-16
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
    b"\xef\xbb\xbf": "utf-8-sig",
}
GUESSED_ENCODINGS = ("cp1252", "utf-8 (damaged)")  # values of meta["encoding"] that cause a warning


def decode(data: bytes, html: bool = False, declared: str | None = None) -> tuple[str, str]:
    """Decode bytes to (text, encoding). Try the byte order mark, UTF-8, the declared charset and cp1252, in this order.

    declared  charset named by the server; it takes precedence over HTML's <meta charset>

    Raise ValueError with the reason if none fits. No charset detector is used: one was wrong on 25 of 60 cp1252 files.

    >>> decode("caf\\u00e9".encode("cp1252"))
    ('caf\\xe9', 'cp1252')
    """
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            return data.decode(encoding), encoding.removesuffix("-sig")
    named = list(declared_encodings(data, html, declared))
    for name, encoding in named:  # before UTF-8: UTF-16 has NULs and ISO-2022-JP is ASCII
        if (encoding.startswith("utf-16") and 0 in data) or (encoding == "iso2022_jp" and b"\x1b" in data):
            with suppress(UnicodeDecodeError):
                return data.decode(encoding), name
    if data.count(0) > len(data) / 100:
        raise ValueError("binary: over 1 % NUL bytes")
    with suppress(UnicodeDecodeError):
        return data.decode(), "utf-8"
    if 0 in data:
        raise ValueError("binary: NUL bytes and not UTF-8")
    for name, encoding in named:
        if not encoding.startswith("utf"):  # the tags of a page in UTF-16 have NULs
            with suppress(UnicodeDecodeError):
                return data.decode(encoding), name
    repaired = data.decode("utf-8", "replace")
    if len(re.findall(r"[^\x00-\x7f\ufffd]", repaired)) > repaired.count("\ufffd"):
        return repaired, "utf-8 (damaged)"  # text in other encodings hardly ever contains valid UTF-8 sequences
    with suppress(UnicodeDecodeError):
        return data.decode("cp1252"), "cp1252"
    raise ValueError("unknown encoding: neither UTF-8 nor cp1252")


def declared_encodings(data: bytes, html: bool, declared: str | None) -> Iterator[tuple[str, str]]:
    """Yield (name, encoding) of the declared charset, then of HTML's <meta charset>. Skip names unknown to browsers."""
    tag = rb"<(?:meta|\?xml)\b[^<>]*?(?<![\w-])(?:charset|encoding)\s*=\s*[\"']?([\w-]+)"  # not that of a script
    found = re.findall(tag, data[:2048], re.IGNORECASE) if html else []
    for name in (declared, *(name.decode("ascii", "ignore") for name in found)):
        if name:
            from resiliparse.parse.encoding import map_encoding_to_html5

            if encoding := map_encoding_to_html5(name.lower(), False):  # never Python's "hex" or "utf-7"
                yield name.lower(), encoding


def parse_json(data: bytes) -> Any:
    """Parse JSON with orjson, or with json where orjson fails. Raise ValueError with a short reason."""
    with suppress(orjson.JSONDecodeError):
        return orjson.loads(data)
    try:
        utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        # Slow, but it accepts what Python writes and orjson rejects: lone surrogates and a byte order mark.
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
        value = json.loads(text, parse_constant=refuse_constant)
        if "\\u" in text:  # an escape may be a lone surrogate
            value = json.loads(replace_surrogates(json.dumps(value, ensure_ascii=False)))
        return value
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("invalid UTF-16" if utf16 else "invalid UTF-8") from None
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno} column {error.colno}"
        raise ValueError(f"bad JSON: {error.msg.removesuffix(' at')} at {place}") from None
    except ValueError as error:
        raise ValueError(f"bad JSON: {error}") from None


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
