"""Looking at tokens: what the model reads, and which tokens it learns to say."""

from pathlib import Path
from typing import Any

from llmkit.readers.documents import read_texts
from llmkit.readers.records import READERS, suffix_of
from llmkit.screen import printable
from llmkit.tokenizer.tokenizer import Tokenizer
from llmkit.types import IGNORE_INDEX, Batch

MEASURED = 2_000_000  # characters of a source that `tokenizer show` encodes
TARGET, CONTEXT, SHADES, RESET = "\x1b[1;32m", "\x1b[2m", ("\x1b[44m", "\x1b[45m"), "\x1b[0m"


def inspect_rows(batch: Batch, tokenizer: Tokenizer) -> list[list[dict[str, Any]]]:
    """Every row of a batch as tokens {id, text, target}: `target` says that the model is asked for this very token."""
    rows = []
    for inputs, labels in zip(batch.input_ids, batch.labels, strict=True):
        asked = [False, *(labels != IGNORE_INDEX).tolist()]  # label t is the token at t + 1
        ids = [*inputs.tolist(), int(labels[-1]) if labels[-1] != IGNORE_INDEX else tokenizer.eos_id]
        row = [{"id": i, "text": tokenizer.decode([i]), "target": a} for i, a in zip(ids, asked, strict=True)]
        while row and not row[-1]["target"] and row[-1]["id"] == tokenizer.eos_id:  # padding
            row.pop()
        rows.append(row)
    return rows


def paint(rows: list[list[dict[str, Any]]], *, colour: bool) -> str:
    """Rows for a terminal: targets bright green, context dim; without colour, targets in [[double brackets]]."""
    painted = []
    for number, row in enumerate(rows):
        targets = sum(token["target"] for token in row)
        text, before = "", None
        for token in row:
            if token["target"] != before:
                if colour:
                    text += RESET + (TARGET if token["target"] else CONTEXT)
                elif before is not None or token["target"]:
                    text += "[[" if token["target"] else "]]"
                before = token["target"]
            text += printable(token["text"]) if colour else token["text"]
        text += RESET if colour else ("]]" if before else "")
        painted.append(f"--- row {number}: {len(row)} tokens, {targets} targets\n{text}")
    return "\n".join(painted)


def paint_tokens(texts: list[str], *, colour: bool) -> str:
    """Tokens side by side, in alternating shades, or parted by | without colour."""
    if not colour:
        return "|".join(texts)
    return "".join(f"{SHADES[i % 2]}{printable(text)}" for i, text in enumerate(texts)) + RESET


def is_path(text: str) -> bool:
    """Whether an argument names files rather than being a text itself."""
    magic = len(text) < 4096 and any(sign in text for sign in "*?[") and "/" in text
    if len(text.split()) == 1 and suffix_of(Path(text)) in READERS:  # misspelt, most likely
        return True
    return magic or (len(text) < 4096 and "\n" not in text and Path(text).expanduser().exists())


def compression(
    tokenizer: Tokenizer, beside: Tokenizer | None, sources: list[str], text_key: str
) -> list[dict[str, Any]]:
    """A row for each source, a text or files: its size, the tokens it makes, and how many with another tokenizer.

    Of files, the first MEASURED characters are encoded.
    """
    rows = []
    for source in sources:
        texts, size = [], 0
        for text in read_texts([source], text_key) if is_path(source) else [source]:
            texts.append(text)
            size += len(text)
            if size > MEASURED:
                break
        row: dict[str, Any] = {"source": source if is_path(source) else repr(source[:30])}
        row |= {"characters": size, "bytes": sum(len(text.encode()) for text in texts)}
        for prefix, one in (("", tokenizer), ("beside: ", beside)):
            if one is not None:
                tokens = sum(map(len, one.encode_slowly(texts)))
                row |= {f"{prefix}tokens": tokens, f"{prefix}characters a token": round(size / max(1, tokens), 3)}
        rows.append(row)
    return rows
