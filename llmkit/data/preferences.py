"""Read the rows of encoded preferences, which `records.build.encode_turns` writes, as batches.

A preference is a tree, see `data/trees.py`: a prompt, and a branch for the better and the worse answer. Several trees
share a row. Beside the files of `data/rows.py` there are

    SPLIT-trees.npy      (N, 6) of every tree, row after row: place and length of its prompt, its better and its worse
                         answer in examples.bin; of a verdict about one answer, the other one has the length 0
    SPLIT-rows.npy       the ends of the rows among the trees
    SPLIT-reference.npy  log-probabilities of the answers (N, 2) under the model that training starts from, if it is not
                         at hand while training
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.data.batches import Batches
from llmkit.data.labelled import pad_batch
from llmkit.data.rows import open_encoded
from llmkit.data.trees import empty_rows, place_tree
from llmkit.types import Batch

PROMPT_AT, PROMPT, BETTER_AT, BETTER, WORSE_AT, WORSE = range(6)  # columns of an array of trees


def columns_of(trees: np.ndarray, apart: bool = False) -> np.ndarray:
    """Return how many tokens of a row each tree takes.

    apart  the prompt is read again for each answer

    >>> columns_of(np.array([[0, 5, 5, 3, 8, 2]])), columns_of(np.array([[0, 5, 5, 3, 8, 2]]), apart=True)
    (array([9]), array([13]))
    """
    answers = trees[:, [BETTER, WORSE]]
    before = np.maximum(trees[:, PROMPT] - 1, 0)
    if apart:
        return np.where(answers > 0, trees[:, [PROMPT]] + answers - 1, 0).sum(1)
    return before + np.where(answers > 0, answers - (trees[:, [PROMPT]] == 0), 0).sum(1)


def must_part(windows: Sequence[int | None], row_len: int) -> bool:
    """Return whether the windows of a model would hide a part of a prompt from an answer that is behind another one."""
    return any(window is not None and window < row_len for window in windows)


def open_trees(folder: Path, split: str, global_batch_size: int, **order: Any) -> Batches:
    """Return the batches of a split of encoded preferences. Raise DataError if a file changed after it was written.

    A batch has the `answers` (B, T): for each target, the number of its answer in the row, which is even for the better
    answer of a tree and odd for the worse one; -1 elsewhere. Its `reference` (B, A) has the log-probability of each
    answer under the model that training starts from, NaN if it is not known. Trees are counted, not targets.
    """
    report, tokens, (trees, row_ends) = open_encoded(folder, split, "trees", "rows")
    width, pad_id, apart = report["row_len"], report["eos_id"], report["apart"]
    slots = 2 * max(part["most"] for part in report["splits"].values())
    kept = folder / f"{split}-reference.npy"
    reference = np.load(kept, mmap_mode="r", allow_pickle=False) if kept.is_file() else None

    def rows(indices: list[int]) -> Batch:
        batch = empty_rows(len(indices), width, pad_id)
        batch.reference = np.full((len(indices), slots), np.nan, np.float32)
        for row, index in enumerate(indices):
            first, at, segment = int(row_ends[index - 1]) if index else 0, 0, 0
            chosen = trees[first : row_ends[index]]
            if reference is not None:
                batch.reference[row, : 2 * len(chosen)] = reference[first : row_ends[index]].ravel()
            for number, tree in enumerate(chosen.tolist()):
                prompt = tokens[tree[PROMPT_AT] : tree[PROMPT_AT] + tree[PROMPT]]
                answers = {
                    2 * number + side: tokens[tree[place] : tree[place] + tree[length]]
                    for side, (place, length) in enumerate(((BETTER_AT, BETTER), (WORSE_AT, WORSE)))
                    if tree[length]
                }
                at, segment = place_tree(batch, row, at, segment, prompt, answers, apart=apart)
        batch.counts = batch.answers.max(1) // 2 + 1
        if apart:
            batch.branches = None
        return batch

    return Batches(len(row_ends), rows, global_batch_size, **order)


def open_pairs(folder: Path, split: str, global_batch_size: int, **order: Any) -> Batches:
    """Return the batches of a split for a reward model: input_ids (B, 2, T), in which the better answer is first, each
    with its prompt and padded on the right, and lengths (B, 2). Raise DataError if a file changed since it was written.
    """
    report, tokens, (trees, _) = open_encoded(folder, split, "trees", "rows")

    def rows(indices: list[int]) -> Batch:
        sequences = []
        for tree in trees[indices].tolist():
            prompt = tokens[tree[PROMPT_AT] : tree[PROMPT_AT] + tree[PROMPT]]
            for place, length in ((BETTER_AT, BETTER), (WORSE_AT, WORSE)):
                sequences.append(np.concatenate([prompt, tokens[tree[place] : tree[place] + tree[length]]]))
        flat = pad_batch(
            sequences, np.zeros(len(sequences)), report["eos_id"], types=False, most=max(map(len, sequences))
        )
        pairs = len(indices)
        ids, lengths = flat.input_ids.reshape(pairs, 2, -1), flat.lengths.reshape(pairs, 2)
        return Batch(ids, np.zeros(pairs), lengths=lengths, counts=np.ones(pairs, np.int64))

    return Batches(len(trees), rows, global_batch_size, **order)
