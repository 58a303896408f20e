"""Show the tokens and targets of training rows, and measure how well a tokenizer compresses text."""

import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.config.defaults import MAX_BAD_FRACTION
from llmkit.readers.documents import read_texts
from llmkit.readers.packed import suffix_of
from llmkit.readers.records import READERS
from llmkit.readers.tally import Tally
from llmkit.tokenizer.spell import LEGEND, spell_text, spell_tokens, token_gap, visible
from llmkit.tokenizer.tokenizer import Tokenizer
from llmkit.types import IGNORE_INDEX, Batch

MAX_CHARACTERS = 2_000_000  # of each source that `tokenizer show` encodes
TARGET, WORSE, CONTEXT, RESET = "\x1b[1;32m", "\x1b[1;31m", "\x1b[2m", "\x1b[0m"
SHADES = ("\x1b[44m", "\x1b[45m")


def inspect_rows(batch: Batch, tokenizer: Tokenizer, kind: str) -> list[list[dict[str, Any]]]:
    """Return the rows of a batch as tokens {id, text, target}, without padding. The model learns to predict targets.

    In packed rows, a token also has the number of its "example" in the row.

    kind  "causal": the tokens of a row, of which some are targets
          "masked": the tokens that the encoder reads; where it has to predict the original one, that one follows
          "seq2seq": the tokens that the encoder reads, then the targets of the decoder
    """
    rows = []
    for number, (inputs, labels) in enumerate(zip(batch.input_ids, batch.labels, strict=True)):
        is_target, segments = labels != IGNORE_INDEX, inputs[:0]
        if batch.segments is not None:  # padding has the segment -1
            segments = batch.segments[number][batch.segments[number] >= 0]
            inputs = inputs[: len(segments)]
        if kind == "causal":  # label t is the token at t + 1
            ids = [*inputs, *labels[-1:][is_target[-1:]]]
            targets = [False, *is_target][: len(ids)]
            segments = [*segments, *segments[-1:]]  # the last target follows the last input
        elif kind == "masked":
            places = np.flatnonzero(is_target)
            ids = np.insert(inputs, places + 1, labels[places])
            targets = np.insert(np.zeros(len(inputs), bool), places + 1, True)
            segments = np.insert(segments, places + 1, segments[places]) if len(segments) else segments
        else:
            ids = [*inputs, *labels[is_target]]
            targets = [False] * len(inputs) + [True] * int(is_target.sum())
        tokens = zip(map(int, ids), spell_tokens(tokenizer, map(int, ids)), map(bool, targets), strict=True)
        row = [{"id": i, "text": text.decode(errors="replace"), "target": target} for i, text, target in tokens]
        if batch.positions is not None:
            for token, segment in zip(row, segments[: len(row)], strict=True):
                token["example"] = int(segment)
        rows.append(row)
    return rows


def format_rows(rows: list[list[dict[str, Any]]], tokenizer: Tokenizer, *, colour: bool) -> str:
    """Format rows for a terminal: targets bright green, context dim. Without colour, targets are in [[brackets]].

    LEGEND explains the marks. Of two equal brackets in a text, the first is escaped. A short line stands between two
    examples that share a row.
    """
    formatted = []
    for number, row in enumerate(rows):
        targets = sum(token["target"] for token in row)
        examples = [list(tokens) for _, tokens in itertools.groupby(row, key=lambda token: token.get("example"))]
        text = "\n-\n".join(format_example(tokens, tokenizer, colour=colour) for tokens in examples)
        formatted.append(f"--- row {number}: {len(row)} tokens, {targets} targets\n{text}")
    return "\n".join([*formatted, f"{'green' if colour else '[[ ]]'}: targets, {LEGEND}"])


def format_example(tokens: list[dict[str, Any]], tokenizer: Tokenizer, *, colour: bool) -> str:
    """Format the tokens of an example; see `format_rows`."""
    parts = []
    for is_target, run in itertools.groupby(tokens, key=lambda token: token["target"]):
        part = spell_text(tokenizer, [token["id"] for token in run])
        if colour:
            part = RESET + (TARGET if is_target else CONTEXT) + part
        else:
            part = re.sub(r"\[(?=\[)|\](?=\])", lambda sign: f"\\x{ord(sign[0]):x}", part)
            part = f"[[{part}]]" if is_target else part
        parts.append(part)
    return token_gap(tokenizer).join(parts) + (RESET if colour else "")


def inspect_trees(batch: Batch, tokenizer: Tokenizer) -> list[list[dict[str, Any]]]:
    """Return the rows of a batch of preferences as trees {prompt, better, worse}, each a list of tokens {id, text}.

    Of pairs of sequences, `better` and `worse` have the prompt too.
    """

    def spell(ids: Any) -> list[dict[str, Any]]:
        ids = list(map(int, ids))
        texts = (text.decode(errors="replace") for text in spell_tokens(tokenizer, ids))
        return [{"id": i, "text": text} for i, text in zip(ids, texts, strict=True)]

    if batch.answers is None:
        pairs = zip(batch.input_ids, batch.lengths, strict=True)
        return [[{"better": spell(a[:n]), "worse": spell(b[:m])}] for (a, b), (n, m) in pairs]
    rows = []
    for number, answers in enumerate(batch.answers):
        inputs, labels, segments = (one[number] for one in (batch.input_ids, batch.labels, batch.segments))
        trees: list[dict[str, Any]] = [{} for _ in range(answers.max() // 2 + 1)]
        for answer in np.unique(answers[answers >= 0]):
            places = np.flatnonzero(answers == answer)
            own = segments == segments[places[0]]
            before = own & (np.arange(len(own)) <= places[0])
            if batch.branches is not None:
                branches = batch.branches[number]
                before &= (branches == 0) | (branches == branches[places[0]])
            tree = trees[answer // 2]
            tree["prompt"] = spell(inputs[before])
            # what lies between answers, such as a further question, is an input that is no target
            inside = np.arange(places[0], places[-1] + 1)
            ids = [*inputs[inside[1:]], labels[places[-1]]]
            tree["worse" if answer % 2 else "better"] = spell(ids)
        rows.append(trees)
    return rows


def format_trees(rows: list[list[dict[str, Any]]], tokenizer: Tokenizer, *, colour: bool) -> str:
    """Format rows of `inspect_trees`: prompts dim, better answers green, worse ones red; without colour [[+ ]], [[- ]].

    A short line stands between two trees that share a row.
    """
    signs = {"prompt": (CONTEXT, "", ""), "better": (TARGET, "[[+", "]]"), "worse": (WORSE, "[[-", "]]")}
    formatted = []
    for number, trees in enumerate(rows):
        texts = []
        for tree in trees:
            lines = []
            for part, (shade, opening, closing) in signs.items():
                if part in tree:
                    text = spell_text(tokenizer, [token["id"] for token in tree[part]])
                    lines.append(f"{RESET}{shade}{text}{RESET}" if colour else f"{opening}{text}{closing}")
            texts.append("\n".join(lines))
        formatted.append(f"--- row {number}: {len(trees)} preferences\n" + "\n-\n".join(texts))
    marks = "green and red" if colour else "[[+ ]] and [[- ]]"
    return "\n".join([*formatted, f"{marks}: the better and the worse answer, {LEGEND}"])


def inspect_labelled(batch: Batch, tokenizer: Tokenizer, names: tuple[str, ...], *, tags: bool) -> list[dict[str, Any]]:
    """Return the rows of a batch of labelled texts: tokens {id, text}, and the label, the labels, the number, or the
    tag of each token that has one.

    names  of the labels; of numbers, none
    """
    rows = []
    for ids, label, length in zip(batch.input_ids, batch.labels, batch.lengths, strict=True):
        ids = ids[:length].tolist()
        texts = [text.decode(errors="replace") for text in spell_tokens(tokenizer, ids)]
        tokens: list[dict[str, Any]] = [{"id": i, "text": text} for i, text in zip(ids, texts, strict=True)]
        row: dict[str, Any] = {"tokens": tokens}
        if tags:
            for token, number in zip(tokens, label, strict=False):
                token |= {} if number == IGNORE_INDEX else {"tag": names[number]}
        elif not names:
            row["label"] = float(label)
        else:
            row["label"] = (
                [name for name, there in zip(names, label, strict=True) if there] if label.ndim else names[label]
            )
        rows.append(row)
    return rows


def format_labelled(rows: list[dict[str, Any]], tokenizer: Tokenizer) -> str:
    """Format rows of `inspect_labelled` for a terminal: a tag stands in brackets behind its token."""
    formatted = []
    for number, row in enumerate(rows):
        label = f", label {row['label']}" if "label" in row else ""
        parts = [
            spell_text(tokenizer, [token["id"]]) + (f"[{token['tag']}]" if "tag" in token else "")
            for token in row["tokens"]
        ]
        text = token_gap(tokenizer).join(parts)
        formatted.append(f"--- row {number}: {len(parts)} tokens{label}\n{text}")
    return "\n".join([*formatted, LEGEND])


def format_tokens(tokens: list[bytes], *, colour: bool) -> str:
    """Format tokens side by side in alternating shades, or separated by | without colour. A | in a token is \\x7c."""
    texts = [visible(token) for token in tokens]
    if not colour:
        return "|".join(text.replace("|", "\\x7c") for text in texts)
    return "".join(f"{SHADES[i % 2]}{text}" for i, text in enumerate(texts)) + RESET


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
        texts, size, tally, skipped = [], 0, Tally(), Counter()
        for text in read_texts([source], text_key, tally, skipped) if is_path(source) else [source]:
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
        not_read = ", ".join(f"{number} {reason}" for reason, number in skipped.items())
        rows.append(row | {"bad records": tally.describe() or None, "skipped files": not_read or None})
    empty = {name for name in ("bad records", "skipped files") if not any(row[name] for row in rows)}
    return [{name: value for name, value in row.items() if name not in empty} for row in rows]
