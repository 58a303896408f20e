"""Make examples that are longer than a row fit into rows, without training on an answer that was cut."""

from collections.abc import Iterator

import numpy as np

from llmkit.data.rows import ANSWERS_LOST
from llmkit.records.encode import Example, Found


def answer_spans(tokens: np.ndarray) -> list[tuple[int, int]]:
    """Return (start, stop) of each run of targets in coded tokens.

    >>> answer_spans(np.array([-6, 6, 7, -8, 8]))
    [(1, 3), (4, 5)]
    """
    is_target = np.concatenate(([False], tokens >= 0, [False]))
    return [tuple(span) for span in np.flatnonzero(is_target[1:] != is_target[:-1]).reshape(-1, 2).tolist()]


def without_targets(tokens: np.ndarray) -> np.ndarray:
    """Return the same coded tokens, none of them a target."""
    return np.minimum(tokens, ~tokens)


def fit_row(example: Example, room: int, too_long: str, bos_id: int | None, found: Found) -> list[Example]:
    """Return an example as examples of at most `room` tokens, whose answers are whole; [] if that can't be.

    too_long  "drop", "truncate_prompt" (see `truncate_prompt`) or "split" (see `split_row`)
    bos_id    the begin token, which a shortened prompt keeps
    found     counts the examples, and those in which nothing is learnt
    """
    tokens = example.tokens
    targets = np.flatnonzero(tokens[1:] >= 0)  # no token precedes the first one, so it can't be predicted
    if not len(targets):
        found.without_target += 1
        return []
    if len(tokens) <= room:
        return [example]
    tokens = tokens[: targets[-1] + 2]  # what follows the last answer teaches nothing
    if len(tokens) <= room:
        return [example._replace(tokens=tokens)]
    if too_long == "split":
        found.too_long["split"] += 1
        return [example._replace(tokens=window) for window in split_row(tokens, room, max(1, room // 2))]
    shorter = truncate_prompt(tokens, room, bos_id) if too_long == "truncate_prompt" else None
    if shorter is None:
        found.too_long["left out"] += 1
        return []
    found.too_long["prompt truncated"] += 1
    if lost := len(answer_spans(tokens)) - len(answer_spans(shorter)):
        found.too_long[ANSWERS_LOST] += lost
    return [example._replace(tokens=shorter)]


def truncate_prompt(tokens: np.ndarray, room: int, bos_id: int | None) -> np.ndarray | None:
    """Leave out the first of coded tokens that end with an answer, but not the begin token.

    Answers that begin among the tokens that are left out are no targets. Return None if the last one does.

    >>> truncate_prompt(np.array([~1, ~5, ~6, 7, 8]), 4, bos_id=1).tolist()
    [-2, -7, 7, 8]
    """
    head = tokens[:1] if tokens[0] in (bos_id, ~bos_id if bos_id is not None else None) else tokens[:0]
    cut = len(tokens) - (room - len(head))
    kept = tokens.copy()
    for start, stop in answer_spans(tokens):
        if start <= cut:  # it is not whole, or nothing of its prompt is left
            kept[start:stop] = ~kept[start:stop]
    shorter = np.concatenate([without_targets(head), kept[cut:]])
    return shorter if shorter.max() >= 0 else None


def split_row(tokens: np.ndarray, room: int, stride: int) -> Iterator[np.ndarray]:
    """Yield windows of at most `room` coded tokens, every `stride` tokens, in which each target is learnt once.

    >>> [window.tolist() for window in split_row(np.array([~5, 6, 7, 8, 9]), 4, 2)]
    [[-6, 6, 7, 8], [-8, -9, 9]]
    """
    learnt = 1
    for start in range(0, len(tokens), stride):
        window = tokens[start : start + room].copy()
        window[: learnt - start] = without_targets(window[: learnt - start])
        if window.max() >= 0:
            yield window
        learnt = start + len(window)
        if learnt == len(tokens):
            return


def fit_pairs(example: Example, size: int, too_long: str, found: Found) -> list[Example]:
    """Return an example for each answer: the text before it, and the answer, whose tokens are the targets.

    Each is of at most `size` tokens, counting the end token that a text gets. If too_long is "truncate_prompt", a
    longer text loses its end, since its start says what to do. All else that is longer is left out.
    """
    tokens = example.tokens
    pairs = []
    for start, stop in answer_spans(tokens):
        fits = stop - start <= size and (start < size or too_long == "truncate_prompt")
        if not fits or start >= size:
            found.too_long["prompt truncated" if fits else "left out"] += 1
        if fits:
            text = without_targets(tokens[: min(start, size - 1)])
            pairs.append(example._replace(tokens=np.concatenate([text, tokens[start:stop]])))
    found.without_target += not (tokens >= 0).any()
    return pairs


def fit_preference(example: Example, room: int, too_long: str, bos_id: int | None, found: Found) -> list[Example]:
    """Return a preference of which the prompt with either answer has at most `room` tokens; [] if that can't be.

    too_long  "drop", or "truncate_prompt": the start of the prompt is left out, but not the begin token
    """
    shared, *answers = example.parts
    over = shared + max(answers) - room
    if over <= 0:
        return [example]
    tokens = example.tokens
    head = int(shared > 0 and tokens[0] == ~bos_id) if bos_id is not None else 0
    if too_long != "truncate_prompt" or shared - over <= head:
        found.too_long["left out"] += 1
        return []
    found.too_long["prompt truncated"] += 1
    tokens = np.concatenate([tokens[:head], tokens[head + over :]])
    return [example._replace(tokens=tokens, parts=(shared - over, *answers))]
