"""Compute how likely a model finds answers, reading once what several of them share.

The answers of a question share the question, and questions share the examples before them. So requests become trees:

    root      what the questions of several passes share: it is read once, and its keys and values are kept
    trunk     what the answers of a question share: the rest of its context
    branches  the answers, up to their last token

A pass reads the trees of many questions in one row, one after the other, without padding. A token sees the root, the
trunk of its tree, and its own branch (`models.shared_prefix`). Such masks are those of speculative decoding with trees
(Miao et al. 2024, arXiv:2305.09781), and prefixes are shared over requests as in SGLang (Zheng et al. 2024,
arXiv:2312.07104). The head computes logits only where a token is scored.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise

import numpy as np
import torch
from torch import nn

from llmkit.data.corrupt import shift_right
from llmkit.models import family_of
from llmkit.models.shared_prefix import SharedPrefix
from llmkit.types import IGNORE_INDEX

ROW = {"cpu": 1024, "cuda": 8192}  # most tokens of a pass, but for a tree that is longer
LOGIT_BYTES = 2**28  # most bytes of fp32 logits of a pass, but for a tree that has more
SHORTEST_ROOT = 8  # tokens; to read fewer alone costs more than it saves


@dataclass(frozen=True)
class Request:
    """Hold tokens, of which the last ones are scored."""

    tokens: tuple[int, ...]
    scored: int  # at least 1, and fewer than there are tokens


@dataclass(frozen=True)
class Score:
    """Hold how likely the scored tokens of a request are."""

    log_prob: float  # nats, the sum over the tokens
    greedy: bool  # whether each of them is the likeliest one


@dataclass
class Tree:
    """Hold the requests of one question, and their numbers."""

    numbers: list[int]
    requests: list[Request]

    @cached_property
    def inputs(self) -> list[tuple[int, ...]]:
        """Return what the model reads: all but the last token of each request."""
        return [one.tokens[:-1] for one in self.requests]

    @cached_property
    def trunk(self) -> int:
        """Return how many first tokens all requests share."""
        return shared(min(self.inputs), max(self.inputs))  # in the order of a dictionary, all are between these two

    @cached_property
    def longest_root(self) -> int:
        """Return how many first tokens may be read before: shared ones, before the first logits that are needed."""
        return min(self.trunk, *(len(one.tokens) - 1 - one.scored for one in self.requests))

    @cached_property
    def branches(self) -> dict[tuple[int, ...], int]:
        """Map what follows the trunk to the column where it begins, if the tree is read from its start."""
        starts, column = {}, self.trunk
        for one in self.inputs:
            if one[self.trunk :] not in starts:
                starts[one[self.trunk :]] = column
                column += len(one) - self.trunk
        return starts

    @property
    def size(self) -> int:
        """Return how many tokens are read if the tree is read from its start."""
        return self.trunk + sum(map(len, self.branches))

    @property
    def logits(self) -> int:
        return sum(one.scored for one in self.requests)


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many first items two sequences share.

    >>> shared((1, 2, 3), (1, 2, 4, 5))
    2
    """
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def score_requests(
    model: nn.Module,
    requests: Sequence[Request],
    questions: Sequence[int] | None = None,
    *,
    share: bool = True,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[Score]:
    """Return the score of each request, in the autocast context of the caller.

    questions  a number for each request, the same for those of one question, whose context is read once
    share      False: read each request from its start in a row of its own, to compare with
    progress   wraps the passes, to show how far they are
    """
    if questions is None or not share:
        questions = range(len(requests))
    order = sorted(range(len(requests)), key=questions.__getitem__)
    members = [[*numbers] for _, numbers in groupby(order, key=questions.__getitem__)]
    most_tokens = ROW.get(next(model.parameters()).device.type, ROW["cuda"])
    most_logits = max(1, LOGIT_BYTES // (4 * model.config.vocab_size))
    trees = [tree for numbers in members for tree in make_trees(numbers, requests, most_tokens, most_logits)]
    passes = plan_passes(trees, most_tokens, most_logits) if share else [(0, [tree]) for tree in trees]
    found: dict[int, Score] = {}
    training, root, root_tokens = model.training, None, ()
    model.eval()
    try:
        with torch.inference_mode():
            for length, row in progress(passes):
                if (tokens := row[0].inputs[0][:length]) != root_tokens:
                    root, root_tokens = read_root(model, tokens), tokens
                found |= read_trees(model, row, root, length)
    finally:
        model.train(training)
    return [found[i] for i in range(len(requests))]


def make_trees(numbers: list[int], requests: Sequence[Request], most_tokens: int, most_logits: int) -> Iterator[Tree]:
    """Yield the requests of a question as one tree, or as several if they are many."""
    kept, tokens, logits = [], 0, 0
    for i in numbers:
        size = len(requests[i].tokens)
        if kept and (tokens + size > 4 * most_tokens or logits + requests[i].scored > most_logits):
            yield Tree(kept, [requests[j] for j in kept])
            kept, tokens, logits = [], 0, 0
        kept, tokens, logits = [*kept, i], tokens + size, logits + requests[i].scored
    yield Tree(kept, [requests[j] for j in kept])


# ---- what is read together ------------------------------------------------------------------------------------------


def plan_passes(trees: list[Tree], most_tokens: int, most_logits: int) -> list[tuple[int, list[Tree]]]:
    """Divide trees into passes, each with the length of the root that its trees share."""
    trees = sorted(trees, key=lambda tree: tree.inputs[0])
    common = [min(shared(a.inputs[0], b.inputs[0]), a.longest_root, b.longest_root) for a, b in pairwise(trees)]
    groups = [(length, trees[start:stop]) for start, stop, length in best_groups(common)]
    alone = [tree for length, members in groups if not length for tree in members]
    groups = [group for group in groups if group[0]]
    groups += [(0, sorted(alone, key=lambda tree: tree.size))] if alone else []
    return [
        (length, row)
        for length, members in groups
        for row in divide(members, lambda tree, length=length: tree.size - length, most_tokens, most_logits)
    ]


def divide(trees: list[Tree], size: Callable[[Tree], int], most_tokens: int, most_logits: int) -> Iterator[list[Tree]]:
    """Yield the trees in rows with at most so many tokens and logits, or with one tree."""
    row, tokens, logits = [], 0, 0
    for tree in trees:
        if row and (tokens + size(tree) > most_tokens or logits + tree.logits > most_logits):
            yield row
            row, tokens, logits = [], 0, 0
        row, tokens, logits = [*row, tree], tokens + size(tree), logits + tree.logits
    if row:
        yield row


def best_groups(common: list[int]) -> list[tuple[int, int, int]]:
    """Divide sorted sequences into groups, so that reading once what a group shares saves the most tokens.

    common  how many first tokens each sequence shares with the next one

    Return (start, stop, length shared) of each group. Neighbours are joined, those that share the most first. A part
    that is joined so is one group if that saves at least as much as the best division of its two sides does.

    >>> best_groups([10, 100, 100])
    [(0, 1, 0), (1, 4, 100)]
    """
    count = len(common) + 1
    stops = [i + 1 for i in range(count)]  # of the part that begins at i
    starts = [*range(count)]  # of the part that ends with i
    saved, is_group = [0] * count, {(i, i + 1): 0 for i in range(count)}  # of the part that begins at i
    cuts: dict[tuple[int, int], int] = {}  # where a part that is no group is divided
    for edge in sorted(range(count - 1), key=lambda i: -common[i]):
        start, stop = starts[edge], stops[edge + 1]
        length = common[edge] if common[edge] >= SHORTEST_ROOT else 0
        together, apart = (stop - start - 1) * length, saved[start] + saved[edge + 1]
        if length and together >= apart:
            is_group[start, stop] = length
        else:
            cuts[start, stop] = edge + 1
        saved[start], stops[start], starts[stop - 1] = max(together, apart), stop, start
    found, open_parts = [], [(0, count)]
    while open_parts:
        start, stop = open_parts.pop()
        if (start, stop) in is_group:
            found.append((start, stop, is_group[start, stop]))
        else:
            cut = cuts[start, stop]
            open_parts += [(cut, stop), (start, cut)]
    return found


# ---- reading --------------------------------------------------------------------------------------------------------


def read_root(model: nn.Module, tokens: tuple[int, ...]) -> SharedPrefix | None:
    """Read what the questions of the next passes begin with. Return its keys and values, None if there is no root."""
    if not tokens:
        return None
    device = next(model.parameters()).device
    columns, nothing = torch.arange(len(tokens), device=device), torch.zeros(len(tokens), dtype=int, device=device)
    root = SharedPrefix(model.config.windows, columns, nothing, nothing)
    model(torch.tensor([tokens], device=device), cache=root, logits_to_keep=1)
    return root


def read_trees(model: nn.Module, trees: list[Tree], root: SharedPrefix | None, length: int) -> dict[int, Score]:
    """Read trees in one row after a root of some length, and return the score of each request by its number."""
    device = next(model.parameters()).device
    ids, positions, owners, branches, columns = [], [], [], [], []
    for number, tree in enumerate(trees):
        first, trunk = len(ids) - length, tree.trunk  # the column of the tree's first token, if it were there
        parts = [(0, tree.inputs[0][:trunk], length), *((i, one, 0) for i, one in enumerate(tree.branches, 1))]
        for branch, tokens, skipped in parts:
            start = trunk if branch else 0
            ids += tokens[skipped:]
            positions += range(start + skipped, start + len(tokens))
            branches += [branch] * (len(tokens) - skipped)
        owners += [number] * (len(ids) - len(owners))
        for one, inputs in zip(tree.requests, tree.inputs, strict=True):
            places = np.arange(len(inputs) - one.scored, len(inputs))  # in the request
            columns.append(first + np.where(places < trunk, places, places - trunk + tree.branches[inputs[trunk:]]))
    needed, rows = np.unique(np.concatenate(columns), return_inverse=True)
    row = (torch.tensor(values, device=device) for values in (positions, owners, branches))
    cache = SharedPrefix(model.config.windows, *row, root)
    kept = torch.from_numpy(needed).to(device)
    logits = model(torch.tensor([ids], device=device), cache=cache, logits_to_keep=kept)[0].float()  # (n, V)
    requests = [one for tree in trees for one in tree.requests]
    targets = torch.tensor([token for one in requests for token in one.tokens[-one.scored :]], device=device)
    at = torch.from_numpy(rows).to(device)
    log_probs = (logits[at, targets].double() - logits.logsumexp(-1).double()[at]).cpu()
    greedy = (logits.argmax(-1)[at] == targets).cpu()
    sizes = [one.scored for one in requests]
    scores = [
        Score(some.sum().item(), bool(same.all()))
        for some, same in zip(log_probs.split(sizes), greedy.split(sizes), strict=True)
    ]
    return dict(zip((i for tree in trees for i in tree.numbers), scores, strict=True))


# ---- an encoder and a decoder ---------------------------------------------------------------------------------------


def score_sources(
    model: nn.Module, requests: Sequence[Request], *, progress: Callable[[Iterable], Iterable] = iter
) -> list[Score]:
    """Return the score of each request, of which an encoder reads all but the scored tokens, and a decoder writes
    these. Requests of similar lengths are read together, in the autocast context of the caller.
    """
    device, start_id = next(model.parameters()).device, family_of(model.config).start_token_id(model.config)
    most, found, training = ROW.get(device.type, ROW["cuda"]), {}, model.training
    order = sorted(range(len(requests)), key=lambda i: (len(requests[i].tokens), requests[i].scored))
    batches: list[list[int]] = [[]]
    for i in order:
        if batches[-1] and (len(batches[-1]) + 1) * len(requests[i].tokens) > most:
            batches.append([])
        batches[-1].append(i)
    model.eval()
    try:
        with torch.inference_mode():
            for numbers in progress(batches if order else []):
                found |= read_sources(model, {i: requests[i] for i in numbers}, start_id, device)
    finally:
        model.train(training)
    return [found[i] for i in range(len(requests))]


def read_sources(
    model: nn.Module, requests: dict[int, Request], start_id: int, device: torch.device
) -> dict[int, Score]:
    """Read requests side by side, and return the score of each by its number; see `score_sources`."""
    halves = [(one.tokens[: -one.scored], one.tokens[-one.scored :]) for one in requests.values()]
    width, length = (max(len(half[side]) for half in halves) for side in (0, 1))
    source, segments = np.zeros((len(halves), width), np.int64), np.full((len(halves), width), -1)
    labels = np.full((len(halves), length), IGNORE_INDEX)
    for row, (read, written) in enumerate(halves):
        source[row, : len(read)], segments[row, : len(read)], labels[row, : len(written)] = read, 0, written
    inputs = {"segments": segments, "decoder_input_ids": shift_right(labels, start_id)}
    tensors = {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}
    logits = model(torch.from_numpy(source).to(device), **tensors).float()
    targets = torch.from_numpy(np.maximum(labels, 0)).to(device)
    log_probs = (logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)).double().cpu().numpy()
    is_greedy = (logits.argmax(-1) == targets).cpu().numpy()
    is_target = labels != IGNORE_INDEX
    return {
        number: Score(float(log_probs[row][is_target[row]].sum()), bool(is_greedy[row][is_target[row]].all()))
        for row, number in enumerate(requests)
    }
