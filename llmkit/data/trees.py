"""Lay out trees, a prompt that is read once and answers that continue it, in rows:

    prompt but its last token | last token, an answer | last token, another answer      what the model reads
    positions                 | go on                 | go on from the same one
    branches  0 0 0 0 0 0 0 0 | 1 1 1 1 1 1 1 1 1 1 1 | 2 2 2 2 2 2 2 2 2 2 2
    labels    none            | the answer            | the other answer

A token sees the prompt and its own branch. A row may hold several trees, each with a segment of its own.
"""

from collections.abc import Sequence

import numpy as np

from llmkit.data.rows import token_ids
from llmkit.types import IGNORE_INDEX, Batch


def empty_rows(rows: int, width: int, pad_id: int) -> Batch:
    """Return rows without a tree."""
    filled = {"input_ids": pad_id, "labels": IGNORE_INDEX, "positions": 0, "segments": -1, "branches": 0, "answers": -1}
    return Batch(**{name: np.full((rows, width), value, np.int64) for name, value in filled.items()})


def place_tree(
    batch: Batch,
    row: int,
    at: int,
    segment: int,
    prompt: np.ndarray,
    answers: dict[int, np.ndarray],
    *,
    apart: bool = False,
) -> tuple[int, int]:
    """Write a tree into a row from a column on. Return the column and the segment after it.

    prompt   coded tokens, see `data/rows.encode_tokens`; answers: their numbers in the row -> coded tokens
    apart    read the prompt again for each answer, which is then a segment of its own
    """
    before = 0 if apart else max(0, len(prompt) - 1)  # tokens that all answers continue
    cells = slice(at, at + before)
    batch.input_ids[row, cells], batch.positions[row, cells] = token_ids(prompt[:before]), np.arange(before)
    batch.segments[row, cells], at = segment, at + before
    for branch, (number, answer) in enumerate(answers.items(), 1):
        coded = np.concatenate([prompt[before:], answer])
        cells, following = slice(at, at + len(coded) - 1), coded[1:]
        batch.input_ids[row, cells] = token_ids(coded[:-1])
        batch.positions[row, cells] = before + np.arange(len(following))
        batch.labels[row, cells] = np.where(following >= 0, following, IGNORE_INDEX)
        batch.answers[row, cells] = np.where(following >= 0, number, -1)
        batch.segments[row, cells], batch.branches[row, cells] = segment, 0 if apart else branch
        at, segment = at + len(following), segment + apart
    return at, segment + (not apart)


def rows_of_trees(trees: Sequence[tuple[list[int], list[list[int]]]], pad_id: int) -> Batch:
    """Return a row for each prompt and its answers, whose tokens are targets. Rows of one answer each need no mask."""
    widths = [len(prompt) - 1 + sum(map(len, answers)) for prompt, answers in trees]
    batch = empty_rows(len(trees), max(widths), pad_id)
    for row, (prompt, answers) in enumerate(trees):
        coded = {number: np.array(answer) for number, answer in enumerate(answers)}
        place_tree(batch, row, 0, 0, ~np.array(prompt), coded)
    if all(len(answers) == 1 for _, answers in trees):
        batch.positions = batch.segments = batch.branches = None
    return batch
