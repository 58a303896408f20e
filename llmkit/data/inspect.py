"""Show the tokens and targets of training rows, and measure how well a tokenizer compresses text."""

from pathlib import Path
from typing import Any

from llmkit.config.defaults import MAX_BAD_FRACTION
from llmkit.readers.documents import read_texts
from llmkit.readers.packed import suffix_of
from llmkit.readers.records import READERS
from llmkit.readers.tally import Tally
from llmkit.screen import printable
from llmkit.tokenizer.tokenizer import Tokenizer
from llmkit.types import IGNORE_INDEX, Batch

MAX_CHARACTERS = 2_000_000  # of each source that `tokenizer show` encodes
TARGET, CONTEXT, SHADES, RESET = "\x1b[1;32m", "\x1b[2m", ("\x1b[44m", "\x1b[45m"), "\x1b[0m"


def inspect_rows(batch: Batch, tokenizer: Tokenizer) -> list[list[dict[str, Any]]]:
    """Return the rows of a batch as tokens {id, text, target}. The model is trained to predict the targets."""
    rows = []
    for inputs, labels in zip(batch.input_ids, batch.labels, strict=True):
        targets = [False, *(labels != IGNORE_INDEX).tolist()]  # label t is the token at t + 1
        ids = [*inputs.tolist(), int(labels[-1]) if labels[-1] != IGNORE_INDEX else tokenizer.eos_id]
        row = [{"id": i, "text": tokenizer.decode([i]), "target": t} for i, t in zip(ids, targets, strict=True)]
        while row and not row[-1]["target"] and row[-1]["id"] == tokenizer.eos_id:  # padding
            row.pop()
        rows.append(row)
    return rows


def format_rows(rows: list[list[dict[str, Any]]], *, colour: bool) -> str:
    """Format rows for a terminal: targets bright green, context dim. Without colour, targets are in [[brackets]]."""
    formatted = []
    for number, row in enumerate(rows):
        targets = sum(token["target"] for token in row)
        text, previous = "", None
        for token in row:
            if token["target"] != previous:
                if colour:
                    text += RESET + (TARGET if token["target"] else CONTEXT)
                elif previous is not None or token["target"]:
                    text += "[[" if token["target"] else "]]"
                previous = token["target"]
            text += printable(token["text"]) if colour else token["text"]
        text += RESET if colour else ("]]" if previous else "")
        formatted.append(f"--- row {number}: {len(row)} tokens, {targets} targets\n{text}")
    return "\n".join(formatted)


def format_tokens(texts: list[str], *, colour: bool) -> str:
    """Format tokens side by side in alternating shades, or separated by | without colour."""
    if not colour:
        return "|".join(texts)
    return "".join(f"{SHADES[i % 2]}{printable(text)}" for i, text in enumerate(texts)) + RESET


def is_path(text: str) -> bool:
    """Return whether a command-line argument names files, as opposed to being a text itself."""
    if len(text.split()) == 1 and suffix_of(Path(text)) in READERS:  # even if there is no such file
        return True
    is_glob = any(sign in text for sign in "*?[") and "/" in text
    return len(text) < 4096 and (is_glob or ("\n" not in text and Path(text).expanduser().exists()))


def measure_compression(
    tokenizer: Tokenizer, other: Tokenizer | None, sources: list[str], text_key: str
) -> list[dict[str, Any]]:
    """Return a row for each source: its size, and its number of tokens with one or two tokenizers.

    A source is a text, or a path of files. Of files, about the first MAX_CHARACTERS are encoded.
    """
    rows = []
    for source in sources:
        texts, size, tally = [], 0, Tally()
        for text in read_texts([source], text_key, tally) if is_path(source) else [source]:
            texts.append(text)
            size += len(text)
            if size > MAX_CHARACTERS:
                break
        tally.check(MAX_BAD_FRACTION, fix="repair the files, or leave them out")
        row: dict[str, Any] = {"source": source if is_path(source) else repr(source[:30])}
        row |= {"characters": size, "bytes": sum(len(text.encode()) for text in texts)}
        for prefix, one in (("", tokenizer), ("beside: ", other)):
            if one is not None:
                tokens = sum(map(len, one.encode_slowly(texts)))
                row |= {f"{prefix}tokens": tokens, f"{prefix}characters a token": round(size / max(1, tokens), 3)}
        rows.append(row | {"bad records": tally.describe() or None})
    is_any_bad = any(row["bad records"] for row in rows)
    return [{name: value for name, value in row.items() if is_any_bad or name != "bad records"} for row in rows]
