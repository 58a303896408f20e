"""Choose the train and val examples, and which of them share a row."""

from typing import Any

import numpy as np

from llmkit.data.preferences import BETTER, WORSE, columns_of
from llmkit.errors import DataError

LARGEST_SHARE = 0.2  # of the examples that the rarest prompt may have


def choose_splits(
    prompts: np.ndarray, in_val_file: np.ndarray, val_fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Return which examples are in train, and which in val, as booleans, and whether some prompts are in both.

    No prompt is, unless there are so few that the rarest has over LARGEST_SHARE of the examples: then each example
    counts as a prompt of its own.

    prompts      hash of each example's prompt
    in_val_file  which examples are from the val file. If there are any, those whose prompt is in train too are in
                 neither, unless that would leave none; if there are none, all examples of some prompts are val
    """
    _, group, sizes = np.unique(prompts, return_inverse=True, return_counts=True)
    few = bool(sizes.min() > max(1, LARGEST_SHARE * len(prompts)))
    if few:
        group, sizes = np.arange(len(prompts)), np.ones(len(prompts), int)
    if in_val_file.any():
        trained = np.zeros(len(sizes), bool)
        trained[group[~in_val_file]] = True
        new = in_val_file & ~trained[group]
        return ~in_val_file, new if new.any() else in_val_file, few or not new.any()
    chosen = np.zeros(len(sizes), bool)
    if len(sizes) > 1:
        wanted = max(1, round(len(prompts) * val_fraction))
        order = np.random.default_rng(seed).permutation(len(sizes))
        held_out = 0
        for one in order[sizes[order] <= wanted]:  # a frequent prompt stays in train
            if held_out == wanted:
                break
            if held_out + sizes[one] <= wanted:
                chosen[one], held_out = True, held_out + sizes[one]
        if not held_out:
            chosen[order[np.argmin(sizes[order])]] = True
    return ~chosen[group], chosen[group], few


def pack(lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose which examples share a row of `size` tokens: best-fit decreasing (Ding et al. 2024, arXiv:2404.10830).

    Return (members, ends): row r holds the examples members[ends[r - 1] : ends[r]].

    >>> [array.tolist() for array in pack(np.array([3, 5, 2, 6]), 8)]
    [[3, 2, 1, 0], [2, 4]]
    """
    order = np.argsort(-lengths, kind="stable")
    row_of, rows = np.empty(len(order), np.int64), 0
    by_room: list[list[int]] = [[] for _ in range(size + 1)]  # free tokens -> rows with exactly that many
    rooms = 0  # bit r is set if by_room[r] has a row: the lowest bit from `need` on is the best fit
    for place, need in enumerate(lengths[order].tolist()):
        fitting = rooms >> need
        if fitting:
            room = need + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            row, room, rows = rows, size, rows + 1
        row_of[place] = row
        by_room[room - need].append(row)
        rooms |= 1 << (room - need)
    return order[np.argsort(row_of, kind="stable")], np.cumsum(np.bincount(row_of, minlength=rows))


def plan_rows(
    ends: np.ndarray, targets: np.ndarray, chosen: np.ndarray, size: int, packing: bool
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Choose the pieces of each row of some examples. Return the arrays `pieces` and `rows`, and the counts.

    ends     ends of all examples in the tokens
    targets  number of targets in each
    chosen   which examples are meant
    size     tokens in a row
    packing  put several examples into a row
    """
    lengths, examples = np.diff(ends, prepend=0), np.flatnonzero(chosen)
    taken, alone = lengths[examples], np.arange(len(examples))
    members, rows = pack(taken, size) if packing else (alone, alone + 1)
    pieces = np.stack([(ends - lengths)[examples], taken], axis=1)[members]
    counts = {"examples": len(examples), "rows": len(rows), "tokens": taken.sum(), "targets": targets[examples].sum()}
    return {"pieces": pieces, "rows": rows}, {name: int(number) for name, number in counts.items()}


def plan_pairs(
    ends: np.ndarray, targets: np.ndarray, chosen: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the array `pairs` of an encoder-decoder's examples, and their counts; see `plan_rows`.

    The counts have "longest": the tokens of the longest text, its end token included, and of the longest answer.
    """
    lengths, examples = np.diff(ends, prepend=0), np.flatnonzero(chosen)
    answers = targets[examples].astype(np.int64)
    texts = lengths[examples] - answers
    pairs = np.stack([(ends - lengths)[examples], texts, answers], axis=1)
    counts = {"examples": len(pairs), "rows": len(pairs), "tokens": int(texts.sum()) + len(pairs)}
    counts |= {"targets": int(answers.sum()), "longest": [int(texts.max(initial=-1)) + 1, int(answers.max(initial=0))]}
    return {"pairs": pairs}, counts


def check_pairs(parts: np.ndarray, path: str | None) -> None:
    """Raise DataError unless each preference has two answers.

    parts  (N, 3), see `encode.Example`
    """
    if not (parts[:, 1:] > 0).all():
        what, fix = "a record has a verdict about one answer, and two are compared", "learn from it: --objective kto"
        raise DataError(what, at=path, fix=fix)


def plan_trees(
    ends: np.ndarray,
    targets: np.ndarray,
    parts: np.ndarray,
    chosen: np.ndarray,
    size: int,
    *,
    packing: bool,
    single: bool,
    apart: bool,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Choose the trees of each row of some preferences; see `data/preferences.py`. Return `trees`, `rows`, the counts.

    ends, targets, chosen  as in `plan_rows`
    parts                  (N, 3), see `encode.Example`
    size                   tokens in a row
    single                 a tree has one answer: those of a pair are two trees
    apart                  see `columns_of`

    The counts have "pairs", the trees with two answers, and "most", the largest number of trees in a row.
    """
    starts = np.concatenate(([0], ends[:-1]))
    shared, better, worse = parts.astype(np.int64).T
    trees = np.stack([starts, shared, starts + shared, better, starts + shared + better, worse], axis=1)[chosen]
    is_pair = (trees[:, BETTER] > 0) & (trees[:, WORSE] > 0)
    if single:
        halves = np.concatenate([trees, trees])
        halves[: len(trees), WORSE], halves[len(trees) :, BETTER] = 0, 0
        order = np.arange(len(halves)).reshape(2, -1).T.ravel()  # of one pair after another
        trees = halves[order]
        trees = trees[(trees[:, BETTER] > 0) | (trees[:, WORSE] > 0)]
    alone = np.arange(len(trees))
    lengths = columns_of(trees, apart)
    members, rows = pack(lengths, size) if packing else (alone, alone + 1)
    counts = {"examples": len(trees), "pairs": int(is_pair.sum()), "rows": len(rows)}
    counts |= {"tokens": int(lengths.sum()), "targets": int(targets[chosen].sum())}
    counts["most"] = int(np.diff(rows, prepend=0).max(initial=0))
    return {"trees": trees[members], "rows": rows}, counts
