"""Replace personal data in texts: find candidates with one linear-time pattern, then check each of them.

Names and postal addresses are not looked for, because only a language model could find them. The report says so.
"""

import ipaddress
import re
import string
from collections import Counter
from collections.abc import Iterator
from functools import cache

from llmkit.errors import MachineError

# For RE2, which has no look-around: `find_pii` checks the characters around a match. Where two kinds match at the same
# place, the first in this order wins.
PATTERNS = {
    "secret": "|".join(
        (
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:[A-Za-z0-9+/=:,.\s]|-[A-Za-z])+?-----END [A-Z ]*PRIVATE KEY-----",
            r"(?:AKIA|ASIA)[0-9A-Z]{16}",  # AWS
            r"gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{82}|glpat-[A-Za-z0-9_-]{20,}",  # GitHub, GitLab
            r"xox[abprs]-[A-Za-z0-9-]{10,}|AIza[0-9A-Za-z_-]{35}",  # Slack, Google
            r"hf_[A-Za-z]{34}|sk-[A-Za-z0-9_-]{32,}",  # Hugging Face, OpenAI
            r"eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",  # JSON web token
            # password=..., in code and settings; see `is_secret`
            r"[\w-]{0,40}(?i:password|passwd|pwd|passwort|api_?key|secret_?key)[\"']? ?[=:] ?"
            r"(?:\"[^\"\n]{4,100}\"|'[^'\n]{4,100}'"
            r"|[^\s\"'<>(),;]{3,99}[^\s\"'<>(),;.:!?])",
        )
    ),
    "email": r"[A-Za-z0-9._%+-]{1,64}@(?:(?:[A-Za-z0-9-]|[^\x00-\x7f]){1,63}\.){1,8}[A-Za-z]{2,24}",
    "iban": r"[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?",
    "card": r"\d{4}(?:[ -]\d{4}){3}|\d{4}[ -]\d{6}[ -]\d{4,5}|\d{13,19}",  # grouped as printed, or plain digits
    "ssn": r"\d{3}-\d{2}-\d{4}",
    "ip": r"(?:\d{1,3}\.){3}\d{1,3}|[0-9A-Fa-f]{1,4}(?:::?[0-9A-Fa-f]{1,4}){2,7}",
    "phone": r"\+\d{1,3}(?:[ .-]?\(?\d{1,4}\)?){2,6}|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}[ .-]\d{3}[ .-]\d{4}"
    # national: 030/901820, (0171) 2345678, 020 7946 0958, 01 23 45 67 89
    r"|(?:\(0\d{1,4}\) ?|0\d{1,4}(?:[ /-]| / ))\d{3,8}(?:[ -]\d{2,6}){0,3}|0\d(?:[ .-]\d\d){4}",
}
PII_KINDS = tuple(PATTERNS)
# Values that belong to nobody. CHECKS rejects them, so scrubbing a text again changes nothing. RFC 2606 reserves
# example.com, RFC 5737 192.0.2.0/24, and NANP 555-0100 to 555-0199. No SSN, card or IBAN begins with zeros.
REPLACEMENTS = {
    "secret": "SECRET",
    "email": "email@example.com",
    "iban": "XX00 0000 0000 0000",
    "card": "0000 0000 0000 0000",
    "ssn": "000-00-0000",
    "ip": "192.0.2.1",
    "phone": "202-555-0100",
}
FILE_SUFFIXES = frozenset(b"png jpg jpeg gif svg webp css js py html".split())  # icon@2x.png is not an address
SECRET_NAME = re.compile(rb"[\w-]+[\"']? ?[=:] ?[\"']?")  # of `password="..."`, up to the value
VERSION_BEFORE = re.compile(
    rb"(?i:\b(?:v|ver|version|release|build|firmware)[ .:]*|[a-z][-/_]|==)$"
)  # what is no address
WORD_BYTES = frozenset(f"{string.ascii_letters}{string.digits}_".encode())


def passes_luhn(digits: bytes) -> bool:
    """Verify the checksum of a card number (ISO/IEC 7812-1)."""
    total = 0
    for i, digit in enumerate(reversed(digits)):
        value = (digit - 48) * (1 + i % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def is_card(found: bytes) -> bool:
    digits = re.sub(rb"\D", b"", found)
    return 13 <= len(digits) <= 19 and digits[:1] in b"3456" and len(set(digits)) > 1 and passes_luhn(digits)


def is_iban(found: bytes) -> bool:
    """Verify the length and the checksum: the rearranged number modulo 97 is 1 (ISO 13616)."""
    plain = found.replace(b" ", b"").decode()
    return 15 <= len(plain) <= 34 and int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1


def is_ssn(found: bytes) -> bool:
    """Reject numbers never issued by the Social Security Administration: areas 000, 666, 9xx, group 00, serial 0000."""
    area, group, serial = found.split(b"-")
    return area not in (b"000", b"666") and area < b"900" and group != b"00" and serial != b"0000"


def is_ip(found: bytes) -> bool:
    """Accept public addresses only: private, local and documentation ranges identify nobody."""
    try:
        return ipaddress.ip_address(found.decode()).is_global
    except ValueError:
        return False


def is_email(found: bytes) -> bool:
    host = found.rpartition(b"@")[2].lower()
    reserved = host.removeprefix(b"www.") in (b"example.com", b"example.org", b"example.net")
    return not (reserved or host.rpartition(b".")[2] in FILE_SUFFIXES or found.startswith((b".", b"-")))


def is_phone(found: bytes) -> bool:
    digits = re.sub(rb"\D", b"", found)
    if found.lstrip(b"(")[:1] == b"0":  # a national number
        return 9 <= len(digits) <= 12 and len(set(digits)) > 2 and digits[:2] != b"00"
    if b"." in found and b" " in found:  # a row of scores
        return False
    return (10 if found[:1] != b"+" else 8) <= len(digits) <= 15 and b"55501" not in digits[-7:]


def is_secret(found: bytes) -> bool:
    """Accept keys by their form; after a name such as `password=`, values that are no code and no placeholder."""
    named = SECRET_NAME.match(found)
    if named is None:
        return True
    value = found[named.end() :]
    if found[named.end() - 1 : named.end()] in (b'"', b"'"):
        return not re.search(rb"[{}<>$%]|\*{3}|[ ]", value)
    return re.search(rb"\d", value) is not None and not re.search(rb"[\[{}$%*]|\w\.\w|://", value)


CHECKS = {
    "secret": is_secret,
    "email": is_email,
    "iban": is_iban,
    "card": is_card,
    "ssn": is_ssn,
    "ip": is_ip,
    "phone": is_phone,
}


@cache
def compile_pattern(kinds: tuple[str, ...]):
    """Compile one alternation of the kinds with RE2. On hostile text the standard library's `re` could take hours."""
    try:
        import re2
    except ImportError:
        fix = "pip install 'llmkit[pii]'"
        raise MachineError("data.pii needs the google-re2 package", fix=fix) from None
    return re2.compile("|".join(f"(?P<{kind}>{PATTERNS[kind]})" for kind in PII_KINDS if kind in kinds).encode())


def belongs_to_other(kind: str, text: bytes, start: int, end: int) -> bool:
    """Return whether what surrounds a match says that it is a version, or a part of a longer number."""
    if kind == "ip":
        return VERSION_BEFORE.search(text[max(0, start - 20) : start]) is not None
    if kind == "email":  # git@host.org:name is where a repository is
        return text[start : start + 4] == b"git@" and text[end : end + 1] == b":"
    is_national = kind == "phone" and text[start : start + 1] in (b"0", b"(")
    before, after = re.search(rb"\d[ -]$", text[max(0, start - 2) : start]), re.match(rb"[ -]\d", text[end : end + 2])
    return is_national and (before or after) is not None


def find_pii(text: bytes, kinds: tuple[str, ...]) -> Iterator[tuple[int, int, str]]:
    """Yield (start, end, kind) of the personal data in UTF-8 text, in order and without overlaps.

    >>> list(find_pii(b"mail jo@corp.org from 8.8.8.8", ("email", "ip")))
    [(5, 16, 'email'), (22, 29, 'ip')]
    """
    at = 0
    while match := compile_pattern(kinds).search(text, at):
        (start, end), kind = match.span(), match.lastgroup.decode()
        in_word = (start > 0 and text[start - 1] in WORD_BYTES) or (end < len(text) and text[end] in WORD_BYTES)
        if not in_word and CHECKS[kind](match.group()) and not belongs_to_other(kind, text, start, end):
            if kind == "secret" and (named := SECRET_NAME.match(match.group())) and named.end() < end - start:
                start, end = start + named.end(), end - (text[end - 1 : end] in (b'"', b"'"))
            yield start, end, kind
            at = end
            continue
        # A false alarm. A later kind may match here, and any kind may match after the first word.
        others = tuple(k for k in kinds if PII_KINDS.index(k) > PII_KINDS.index(kind))
        nested = next(find_pii(text[start:end], others), None) if others and not in_word else None
        if nested:
            yield start + nested[0], start + nested[1], nested[2]
            at = start + nested[1]
        else:
            at = next((i for i in range(start + 1, end) if text[i] not in WORD_BYTES), end)


def scrub(text: str, kinds: tuple[str, ...], action: str) -> tuple[str, Counter[str]]:
    """Replace the personal data in a text. Return the new text and the number of findings of each kind.

    action  "replace": insert the values in REPLACEMENTS; anything else: insert tags such as <EMAIL>

    >>> scrub("call 212-736-5000", ("phone",), "tag")
    ('call <PHONE>', Counter({'phone': 1}))
    """
    raw, pieces, counts, last = text.encode("utf-8", "surrogatepass"), [], Counter(), 0
    for start, end, kind in find_pii(raw, kinds):
        counts[kind] += 1
        pieces += [raw[last:start], (REPLACEMENTS[kind] if action == "replace" else f"<{kind.upper()}>").encode()]
        last = end
    if not counts:
        return text, counts
    return b"".join([*pieces, raw[last:]]).decode("utf-8", "surrogatepass"), counts
