"""Personal data in texts: found by one linear-time pattern, believed only when a check agrees, then replaced.

Names and postal addresses need a language model to be found, and are not looked for; the report says so.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache

from llmkit.errors import MachineError

# Every kind's shape, for RE2: no look-around, so that what borders a match is the check's business. In this order
# where two could begin at the same place.
SHAPES: dict[str, str] = {
    "secret": "|".join(
        [
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----[A-Za-z0-9+/=:,.\s-]+?-----END [A-Z ]*PRIVATE KEY-----",
            r"(?:AKIA|ASIA)[0-9A-Z]{16}",  # AWS
            r"gh[pousr]_[A-Za-z0-9]{36,255}",
            r"github_pat_[A-Za-z0-9_]{82}",
            r"glpat-[A-Za-z0-9_-]{20,}",
            r"xox[abprs]-[A-Za-z0-9-]{10,}",  # GitLab, Slack
            r"AIza[0-9A-Za-z_-]{35}",
            r"hf_[A-Za-z]{34}",
            r"sk-[A-Za-z0-9_-]{32,}",  # Google, Hugging Face, OpenAI
            r"eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",  # a JSON web token
        ]
    ),
    "email": r"[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}",
    "iban": r"[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?",
    "card": r"\d{4}(?:[ -]\d{4}){3}|\d{4}[ -]\d{6}[ -]\d{4,5}|\d{13,19}",  # in one piece, or as it is printed
    "ssn": r"\d{3}-\d{2}-\d{4}",
    "ip": r"(?:\d{1,3}\.){3}\d{1,3}|[0-9A-Fa-f]{1,4}(?:::?[0-9A-Fa-f]{1,4}){2,7}",
    "phone": r"\+\d{1,3}(?:[ .-]?\(?\d{1,4}\)?){2,6}|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}[ .-]\d{3}[ .-]\d{4}",
}
PII_KINDS = tuple(SHAPES)
# Values that nobody owns, so that nothing is found in a text that was cleaned before: RFC 2606 and RFC 5737 reserve
# example.com and 192.0.2.0/24, NANP 555-0100 to 555-0199; no SSN, card or IBAN begins with zeros.
RESERVED = {
    "secret": "SECRET",
    "email": "email@example.com",
    "iban": "XX00 0000 0000 0000",
    "card": "0000 0000 0000 0000",
    "ssn": "000-00-0000",
    "ip": "192.0.2.1",
    "phone": "202-555-0100",
}
FILES = {b"png", b"jpg", b"jpeg", b"gif", b"svg", b"webp", b"css", b"js", b"py", b"html"}  # icon@2x.png is no address


def luhn(digits: bytes) -> bool:
    """The checksum of card numbers (ISO/IEC 7812-1)."""
    total = 0
    for i, digit in enumerate(reversed(digits)):
        value = (digit - 48) * (1 + i % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def is_card(found: bytes) -> bool:
    digits = re.sub(rb"\D", b"", found)
    return 13 <= len(digits) <= 19 and digits[:1] in b"3456" and len(set(digits)) > 1 and luhn(digits)


def is_iban(found: bytes) -> bool:
    """Country, two check digits, and the whole modulo 97 is 1 (ISO 13616)."""
    plain = found.replace(b" ", b"").decode()
    return 15 <= len(plain) <= 34 and int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1


def is_ssn(found: bytes) -> bool:
    """Areas 000, 666 and 9xx, group 00 and serial 0000 were never given out (Social Security Administration)."""
    area, group, serial = found.split(b"-")
    return area not in (b"000", b"666") and area < b"900" and group != b"00" and serial != b"0000"


def is_ip(found: bytes) -> bool:
    """An address of the open internet; private, local and documentation ranges belong to nobody."""
    try:
        return ipaddress.ip_address(found.decode()).is_global
    except ValueError:
        return False


def is_email(found: bytes) -> bool:
    host = found.rpartition(b"@")[2].lower()
    reserved = host.removeprefix(b"www.") in (b"example.com", b"example.org", b"example.net")
    return not reserved and host.rpartition(b".")[2] not in FILES and not found.startswith((b".", b"-"))


def is_phone(found: bytes) -> bool:
    digits = re.sub(rb"\D", b"", found)
    return (10 if found[:1] != b"+" else 8) <= len(digits) <= 15 and b"55501" not in digits[-7:]


CHECKS: dict[str, Callable[[bytes], bool]] = {
    "secret": lambda found: True,
    "email": is_email,
    "iban": is_iban,
    "card": is_card,
    "ssn": is_ssn,
    "ip": is_ip,
    "phone": is_phone,
}
WORD = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")


@cache
def pattern(kinds: tuple[str, ...]):
    """One alternation of the kinds, for RE2: on hostile text the standard library's `re` could take hours over it."""
    try:
        import re2
    except ImportError:
        fix = "pip install 'llmkit[pii]'"
        raise MachineError("data.pii needs the google-re2 package", fix=fix) from None
    return re2.compile("|".join(f"(?P<{kind}>{SHAPES[kind]})" for kind in PII_KINDS if kind in kinds).encode())


def find(text: bytes, kinds: tuple[str, ...]) -> Iterator[tuple[int, int, str]]:
    """(start, end, kind) of what is personal in UTF-8 text, in order and without overlaps.

    >>> list(find(b"mail jo@corp.org from 8.8.8.8", ("email", "ip")))
    [(5, 16, 'email'), (22, 29, 'ip')]
    """
    at = 0
    while match := pattern(kinds).search(text, at):
        (start, end), kind = match.span(), match.lastgroup.decode()
        inside = (start > 0 and text[start - 1] in WORD) or (end < len(text) and text[end] in WORD)
        if not inside and CHECKS[kind](match.group()):
            yield start, end, kind
            at = end
            continue
        # It only looked so: another kind may begin in the same place, and any behind its first word.
        others = tuple(one for one in kinds if PII_KINDS.index(one) > PII_KINDS.index(kind))
        nested = next(find(text[start:end], others), None) if others and not inside else None
        if nested:
            yield start + nested[0], start + nested[1], nested[2]
            at = start + nested[1]
        else:
            at = next((i for i in range(start + 1, end) if text[i] not in WORD), end)


def scrub(text: str, kinds: tuple[str, ...], action: str) -> tuple[str, Counter[str]]:
    """The text without what is personal in it, and how much of each kind was found.

    action  replace: by values that nobody owns; anything else: by <EMAIL> and the like

    >>> scrub("call 212-736-5000", ("phone",), "tag")
    ('call <PHONE>', Counter({'phone': 1}))
    """
    raw, pieces, counts, last = text.encode("utf-8", "surrogatepass"), [], Counter(), 0
    for start, end, kind in find(raw, kinds):
        counts[kind] += 1
        pieces += [raw[last:start], (RESERVED[kind] if action == "replace" else f"<{kind.upper()}>").encode()]
        last = end
    if not counts:
        return text, counts
    return b"".join([*pieces, raw[last:]]).decode("utf-8", "surrogatepass"), counts
