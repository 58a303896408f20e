"""Read the rows of encoded fine-tuning records, which `records.build.encode_turns` writes, as batches.

Tokens are coded as int32: the id of a target, or ~id (below 0) of any other token. The files of their folder are
    examples.bin       the coded tokens of all examples
    examples.idx       the ends of the examples in it
    SPLIT-pieces.npy   packed rows: (place in examples.bin, tokens) of every piece, row after row
    SPLIT-rows.npy     packed rows: the ends of the rows among the pieces
    SPLIT-pairs.npy    for an encoder-decoder: (place, tokens before the answer, tokens of the answer)
    quarantine.jsonl   the bad records
    report.json        counts and checksums, written last
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from llmkit.data.batches import Batches
from llmkit.data.corrupt import shift_right
from llmkit.data.tokens import check_unchanged, read_sealed
from llmkit.errors import DataError
from llmkit.types import IGNORE_INDEX, Batch

TOKENS = np.dtype("<i4")
REPORT, QUARANTINE = "report.json", "quarantine.jsonl"
ANSWERS_LOST = "answers lost"  # in the report's count of what is too long
ENCODE_AGAIN = "delete {} and fine-tune again: the records are then encoded again"


def encode_tokens(ids: ArrayLike, targets: ArrayLike) -> np.ndarray:
    """Return coded tokens.

    >>> encode_tokens([5, 6], [False, True]).tolist()
    [-6, 6]
    """
    ids = np.asarray(ids, TOKENS)
    return np.where(targets, ids, ~ids)


def token_ids(coded: np.ndarray) -> np.ndarray:
    """Return the ids of coded tokens."""
    return np.maximum(coded, ~coded)


def read_report(folder: Path) -> dict[str, Any]:
    """Return the report of a folder of encoded records. Raise DataError if it is missing or not as it was written."""
    path, fix = folder / REPORT, ENCODE_AGAIN.format(folder)
    try:
        return read_sealed(path)
    except FileNotFoundError:
        raise DataError("there are no encoded records", at=folder, fix=fix) from None
    except ValueError:
        what = "the report of the encoded records is damaged, or of another version of llmkit"
        raise DataError(what, at=path, fix=fix) from None


def open_encoded(folder: Path, split: str, *names: str) -> tuple[dict[str, Any], np.ndarray, list[np.ndarray]]:
    """Return (report, tokens, the split's arrays of these names), memory-mapped.

    Raise DataError if a file changed after it was written.
    """
    report = read_report(folder)
    check_unchanged(folder, report["files"], "the encoded records changed", fix=ENCODE_AGAIN.format(folder))
    arrays = [np.load(folder / f"{split}-{name}.npy", mmap_mode="r", allow_pickle=False) for name in names]
    return report, np.memmap(folder / "examples.bin", TOKENS, "r"), arrays


def open_rows(folder: Path, split: str, global_batch_size: int, start_id: int | None = None, **order) -> Batches:
    """Return the batches of a split of encoded records: packed rows, or pairs if `start_id` is given."""
    if start_id is None:
        return packed_batches(folder, split, global_batch_size, **order)
    return pair_batches(folder, split, global_batch_size, start_id=start_id, **order)


def count_up(sizes: np.ndarray) -> np.ndarray:
    """Return 0, 1, ... size - 1 for each of the sizes, one after another.

    >>> count_up(np.array([2, 3])).tolist()
    [0, 1, 0, 1, 2]
    """
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def packed_batches(folder: Path, split: str, global_batch_size: int, **order) -> Batches:
    """Return the batches of packed rows, in which only the answers are labels."""
    report, tokens, (pieces, row_ends) = open_encoded(folder, split, "pieces", "rows")
    width, pad_id = report["seq_len"] + 1, report["eos_id"]

    def rows(indices: list[int]) -> Batch:
        shape, ends = (len(indices), width), row_ends[indices]
        ids, targets = np.full(shape, pad_id, np.int64), np.zeros(shape, bool)
        segments, positions = np.full(shape, -1, np.int64), np.zeros(shape, np.int64)
        firsts = np.where(np.array(indices) > 0, row_ends[np.array(indices) - 1], 0)
        counts = ends - firsts  # pieces in each row
        number = count_up(counts)  # of each piece in its row
        place, length = pieces[np.repeat(firsts, counts) + number].T
        start = np.cumsum(length) - length
        start -= np.repeat(start[np.cumsum(counts) - counts], counts)  # of each piece in its row
        at = count_up(length)  # position of each token in its piece
        coded = tokens[np.repeat(place, length) + at]
        cells = np.repeat(np.repeat(np.arange(len(indices)), counts), length), np.repeat(start, length) + at
        ids[cells], targets[cells] = token_ids(coded), (coded >= 0) & (at > 0)
        segments[cells], positions[cells] = np.repeat(number, length), at
        labels = np.where(targets[:, 1:], ids[:, 1:], IGNORE_INDEX)
        return Batch(ids[:, :-1], labels, positions[:, :-1], segments[:, :-1])

    return Batches(len(row_ends), rows, global_batch_size, **order)


def pair_batches(folder: Path, split: str, global_batch_size: int, *, start_id: int, **order) -> Batches:
    """Return the batches of prompts for an encoder and answers for a decoder, padded to the longest of the split.

    start_id  the decoder's first input token
    """
    report, tokens, (pairs,) = open_encoded(folder, split, "pairs")
    source_width, answer_width = report["splits"][split]["longest"]

    def rows(indices: list[int]) -> Batch:
        ids = np.full((len(indices), source_width), report["eos_id"], np.int64)
        segments = np.full(ids.shape, -1, np.int64)
        labels = np.full((len(indices), answer_width), IGNORE_INDEX, np.int64)
        for row, (place, before, answer) in enumerate(pairs[indices].tolist()):
            coded = tokens[place : place + before]
            ids[row, : len(coded)], segments[row, : len(coded) + 1] = token_ids(coded), 0
            labels[row, :answer] = tokens[place + before : place + before + answer]
        return Batch(ids, labels, segments=segments, decoder_input_ids=shift_right(labels, start_id))

    return Batches(len(pairs), rows, global_batch_size, **order)
