"""Encode fine-tuning records into a folder, as arrays of rows with the same length."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.config.schema import SftData
from llmkit.data.layouts import detect_layout, to_turns
from llmkit.errors import DataError
from llmkit.files import file_sha256, write_atomically
from llmkit.readers.records import BadRecord, read_records
from llmkit.tokenizer.chat_template import default_template, encode_example
from llmkit.tokenizer.tokenizer import Tokenizer
from llmkit.types import IGNORE_INDEX

VERSION = 2  # of the encoding; data of another version is encoded again
ROW_ARRAYS = ("ids", "targets", "segments", "positions")  # the files of a split
PAIR_ARRAYS = ("sources", "segments", "answers")  # the files of a split for an encoder-decoder
Example = tuple[str, list[int], list[bool]]  # record name, token ids, which of them are targets


def encode_records(
    path: Path, tokenizer: Tokenizer, template: str, bad: Counter, layouts: set[str]
) -> Iterator[Example]:
    """Encode the good records of a JSON, JSONL (.gz, .zst), CSV or Parquet file.

    bad      counts the bad records by reason; updated in place
    layouts  gets the layout of the file, which its first good record decides
    """
    layout = None
    for line, record in read_records(path):
        if isinstance(record, BadRecord):
            bad[record.reason] += 1
            continue
        layout = layout or detect_layout(record, f"{path}:{line}")
        layouts.add(layout)
        try:
            ids, targets = encode_example(tokenizer, template, to_turns(record, layout))
        except ValueError as error:
            bad[str(error)] += 1
            continue
        yield f"{path.name}:{line}", ids, targets


def pack(lengths: np.ndarray, size: int) -> list[list[int]]:
    """Choose which examples share a row of `size` tokens: best-fit decreasing (Ding et al. 2024, arXiv:2404.10830).

    >>> pack(np.array([3, 5, 2, 6]), 8)
    [[3, 2], [1, 0]]
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # free tokens -> rows with exactly that many
    for i in np.argsort(-lengths, kind="stable"):
        need = int(lengths[i])
        room = next((r for r in range(need, size + 1) if by_room.get(r)), None)
        if room is None:
            rows.append([])
            row, room = len(rows) - 1, size
        else:
            row = by_room[room].pop()
        rows[row].append(int(i))
        by_room.setdefault(room - need, []).append(row)
    return rows


def encode_sft(data: SftData, tokenizer: Tokenizer, out: Path, *, seed: int, pairs: bool = False) -> dict[str, Any]:
    """Encode `data` into arrays in OUT/<key>/, unless they exist. Return the report, which names the folder.

    The key is a hash of all settings and files, so that the data of other runs is never overwritten.

    A row holds seq_len + 1 tokens: several whole examples (packing), or one example and padding.
    Files of a split: ids (rows, seq_len + 1) int32, targets bool, segments int32 (the example's number in its row,
    -1 for padding), positions int32.

    pairs  write pairs of prompts and answers for an encoder-decoder instead: see `write_pairs`
    """
    sources = [Path(data.path), *([Path(data.val_path)] if data.val_path else [])]
    template = default_template(tokenizer)
    settings = [VERSION, pairs, data.model_dump(), seed, template, tokenizer.sha256, *map(checksum, sources)]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    out = out / key
    report_path = out / "report.json"
    if report_path.exists():
        return json.loads(report_path.read_text())
    out.mkdir(parents=True, exist_ok=True)
    bad, layouts = Counter(), set()
    train = list(encode_records(sources[0], tokenizer, template, bad, layouts))
    if data.val_path:
        val = list(encode_records(sources[1], tokenizer, template, bad, layouts))
    else:
        order = np.random.default_rng(seed).permutation(len(train))
        val_indices = set(order[: max(1, round(len(train) * data.val_fraction))].tolist()) if len(train) > 1 else set()
        val = [one for i, one in enumerate(train) if i in val_indices]
        train = [one for i, one in enumerate(train) if i not in val_indices]
    report = {
        "key": key,
        "folder": str(out),
        "files": [str(path) for path in sources],
        "bad": dict(bad),
        "formats": sorted(layouts),
        "splits": {},
    }
    for split, encoded in (("train", train), ("val", val)):
        write = write_pairs if pairs else write_rows
        report["splits"][split] = write(out / split, encoded, data, tokenizer.eos_id)
    if not report["splits"]["train"]["rows"]:
        got = f"{sum(bad.values())} bad records: {dict(bad)}"
        raise DataError("no example is left to train on", at=data.path, got=got)
    write_atomically(report_path, json.dumps(report, indent=2))
    return report


def write_rows(out: Path, encoded: list, data: SftData, pad_id: int) -> dict[str, Any]:
    """Write the arrays of a split of packed rows. Return its counts."""
    size = data.seq_len + 1
    fitting, counts = [], Counter(examples=len(encoded))
    for name, ids, targets in encoded:
        if len(ids) > size:
            counts["too long"] += 1
            if data.too_long == "drop":
                continue
            ids, targets = ids[:size], targets[:size]
        if not any(targets[1:]):  # the answer is empty or was truncated away
            counts["without a target"] += 1
            continue
        fitting.append((name, ids, targets))
    lengths = np.array([len(ids) for _, ids, _ in fitting], dtype=np.int64)
    rows = pack(lengths, size) if data.packing is not False else [[i] for i in range(len(fitting))]
    ids, targets = np.full((len(rows), size), pad_id, np.int32), np.zeros((len(rows), size), bool)
    segments, positions = np.full((len(rows), size), -1, np.int32), np.zeros((len(rows), size), np.int32)
    for r, members in enumerate(rows):
        start = 0
        for number, i in enumerate(members):
            _, example, example_targets = fitting[i]
            cut = slice(start, start + len(example))
            ids[r, cut], segments[r, cut], positions[r, cut] = example, number, np.arange(len(example))
            targets[r, cut] = example_targets
            targets[r, start] = False  # no token precedes the first one, so it can't be predicted
            start += len(example)
    for name, array in zip(ROW_ARRAYS, (ids, targets, segments, positions), strict=True):
        np.save(out.with_name(f"{out.name}-{name}.npy"), array, allow_pickle=False)
    return dict(counts) | {"rows": len(rows), "tokens": int(lengths.sum()), "targets": int(targets.sum())}


def split_into_pairs(ids: list[int], targets: list[bool], eos_id: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield a pair for each answer of an example: (all that precedes it and an end token, answer).

    >>> list(split_into_pairs([5, 6, 7, 1], [False, False, True, True], 1))
    [([5, 6, 1], [7, 1])]
    """
    for start in range(len(ids)):
        if targets[start] and not (start and targets[start - 1]):
            stop = next((i for i in range(start, len(ids)) if not targets[i]), len(ids))
            yield [*ids[:start], eos_id], ids[start:stop]


def truncate_pair(source: list[int], answer: list[int], size: int) -> tuple[list[int], list[int]]:
    """Truncate source and answer to `size` tokens each. The source keeps its end token."""
    return (source if len(source) <= size else [*source[: size - 1], source[-1]]), answer[:size]


def write_pairs(out: Path, encoded: list, data: SftData, eos_id: int) -> dict[str, Any]:
    """Write the arrays of a split of prompts and answers, each padded to the longest. Return the counts.

    Files: sources (rows, S) int32; segments (rows, S) int8, 0 and -1 for padding; answers (rows, T) int32, padded with
    IGNORE_INDEX.
    """
    counts, fitting = Counter(examples=len(encoded)), []
    for _, ids, targets in encoded:
        for source, answer in split_into_pairs(ids, targets, eos_id):
            if max(len(source), len(answer)) > data.seq_len:
                counts["too long"] += 1
                if data.too_long == "drop":
                    continue
                source, answer = truncate_pair(source, answer, data.seq_len)
            fitting.append((source, answer))
    longest = [max(map(len, side)) for side in zip(*fitting, strict=True)] or [0, 0]
    sources = np.full((len(fitting), longest[0]), eos_id, np.int32)
    segments = np.full(sources.shape, -1, np.int8)
    answers = np.full((len(fitting), longest[1]), IGNORE_INDEX, np.int32)
    for row, (source, answer) in enumerate(fitting):
        sources[row, : len(source)], segments[row, : len(source)] = source, 0
        answers[row, : len(answer)] = answer
    for name, array in zip(PAIR_ARRAYS, (sources, segments, answers), strict=True):
        np.save(out.with_name(f"{out.name}-{name}.npy"), array, allow_pickle=False)
    sizes = {"tokens": int((segments == 0).sum()), "targets": int((answers != IGNORE_INDEX).sum())}
    return dict(counts) | {"rows": len(fitting)} | sizes


def checksum(path: Path) -> str:
    """Return the checksum of a file. Raise DataError if there is none."""
    if not path.is_file():
        raise DataError("the data file does not exist", at=path)
    return file_sha256(path)
