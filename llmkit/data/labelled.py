"""Read encoded texts with labels, which `records.labelled.encode_labelled` writes, as batches. The files are

tokens.bin, tokens.idx  the ids of all examples, ~id of a second text, and the ends of the examples
labels.npy              a label for each example: (N,) numbers, or (N, L) of 0 and 1, int8
tags.bin                instead: the tag of each token, -1 where there is none
train.npy, val.npy      the numbers of the examples of each split
report.json             counts, the names of the labels, and checksums, written last
"""

from pathlib import Path
from typing import Any

import numpy as np

from llmkit.data.batches import Batches
from llmkit.data.rows import ENCODE_AGAIN, TOKENS, read_report, token_ids
from llmkit.data.tokens import check_unchanged
from llmkit.types import IGNORE_INDEX, Batch

FILES = {"tokens": TOKENS, "tags": np.dtype("<i4")}
MULTIPLE = 8  # of the tokens in a row


def pad_batch(
    examples: list[np.ndarray], labels: np.ndarray | list[np.ndarray], pad_id: int, *, types: bool, most: int
) -> Batch:
    """Return examples of coded tokens as a batch of rows, padded on the right to the longest one.

    labels  an array with a label for each; or of tags, a list with an array for each
    types   say which tokens are of a second text
    most    tokens of a row, at the most
    """
    lengths = np.array([len(one) for one in examples])
    width = min(-(-int(lengths.max()) // MULTIPLE) * MULTIPLE, most)
    ids, segments = np.full((len(examples), width), pad_id, np.int64), np.zeros((len(examples), width), np.int64)
    cells = np.arange(width) < lengths[:, None]
    coded = np.concatenate(examples)
    ids[cells], segments[cells] = token_ids(coded), coded < 0
    if isinstance(labels, list):
        rows = np.full(ids.shape, IGNORE_INDEX, np.int64)
        tags = np.concatenate(labels)
        rows[cells] = np.where(tags < 0, IGNORE_INDEX, tags)
        labels = rows
    return Batch(ids, labels, lengths=lengths, token_type_ids=segments if types else None)


def open_labelled_rows(folder: Path, split: str, global_batch_size: int, *, types: bool, **order: Any) -> Batches:
    """Return the batches of a split.

    types  see `pad_batch`. Raise DataError if a file changed after it was written
    """
    report = read_report(folder)
    check_unchanged(folder, report["files"], "the encoded records changed", fix=ENCODE_AGAIN.format(folder))
    tokens, ends = np.memmap(folder / "tokens.bin", TOKENS, "r"), np.fromfile(folder / "tokens.idx", "<i8")
    starts = np.concatenate([[0], ends[:-1]])
    chosen = np.load(folder / f"{split}.npy", allow_pickle=False)
    is_tagged = report["task"] == "tag"
    tags = np.memmap(folder / "tags.bin", FILES["tags"], "r") if is_tagged else None
    labels = None if is_tagged else np.load(folder / "labels.npy", allow_pickle=False)

    def rows(indices: list[int]) -> Batch:
        numbers = chosen[indices]
        parts = [slice(starts[i], ends[i]) for i in numbers]
        right = [tags[part] for part in parts] if is_tagged else labels[numbers]
        if not is_tagged and right.ndim > 1:
            right = right.astype(np.int64)
        return pad_batch([tokens[part] for part in parts], right, report["pad_id"], types=types, most=report["seq_len"])

    return Batches(len(chosen), rows, global_batch_size, **order)
