"""Spell tokens out for a reader: with their spaces, and byte by byte where they are no whole characters."""

import re
from collections.abc import Iterable

from tokenizers import models

from llmkit.tokenizer.fast import bytes_to_unicode
from llmkit.tokenizer.foreign import SPACE
from llmkit.tokenizer.tokenizer import Tokenizer

MARKS = {" ": "\u00b7", "\t": "\u2192", "\n": "\u21b5\n"}  # a middle dot, an arrow, a return arrow
LEGEND = "\u00b7 space, \u2192 tab, \u21b5 line break, \\x.. or \\u....: a byte or a character that can't be shown"


def spell_tokens(tokenizer: Tokenizer, ids: Iterable[int]) -> list[bytes]:
    """Return the bytes of text that each token stands for. A token of WordPiece keeps the ## that continues a word."""
    letters = {letter: byte for byte, letter in enumerate(bytes_to_unicode())}
    decoder, added = tokenizer.rust.decoder, tokenizer.rust.get_added_tokens_decoder()
    is_bytelevel = decoder is not None and b"ByteLevel" in decoder.__getstate__()
    spelt = []
    for i in ids:
        token = added[i].content if i in added else tokenizer.rust.id_to_token(i)
        if is_bytelevel and i not in added:
            spelt.append(bytes(letters[letter] for letter in token))
        elif re.fullmatch("<0x[0-9A-F]{2}>", token):  # SentencePiece's name for a byte
            spelt.append(bytes.fromhex(token[3:5]))
        else:
            spelt.append(token.replace(SPACE, " ").encode())
    return spelt


def spell_text(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """Return the `visible` text of tokens in a row, of which several may make up one character."""
    tokens = spell_tokens(tokenizer, ids)
    gap = token_gap(tokenizer)
    return gap.join(map(visible, tokens)) if gap else visible(b"".join(tokens))


def token_gap(tokenizer: Tokenizer) -> str:
    """Return what separates tokens in a row: a plain space for WordPiece, whose tokens contain none."""
    return " " if isinstance(tokenizer.rust.model, models.WordPiece) else ""


def visible(text: bytes) -> str:
    """Mark spaces, tabs and line breaks in a text, and escape what is invisible or no UTF-8. LEGEND explains the marks.

    >>> visible("a caf\u00e9\x1b".encode()), visible("caf\u00e9".encode()[:4])
    ('a\u00b7caf\u00e9\\\\x1b', 'caf\\\\xc3')
    """
    shown = text.decode("utf-8", "backslashreplace")
    hidden = {sign for sign in shown if not sign.isprintable() or sign in "".join(MARKS.values())}
    return shown.translate(str.maketrans({sign: ascii(sign)[1:-1] for sign in hidden} | MARKS))
