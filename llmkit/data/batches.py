"""Make the batch of a step: a pure function of (seed, step), for any number of ranks.

There is no shuffle state: a keyed bijection permutes the samples, so that resuming needs only the step.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmkit.data.tokens import TokenStream
from llmkit.types import IGNORE_INDEX, Batch

ROUNDS = 4  # of the Feistel network in `permute`
SLOTS = 65_536  # period of a mixture in samples: weights are exact to 1 in 65,536
MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: splitmix64's increment (Steele et al. 2014)


def mix(x: int) -> int:
    """Hash a 64-bit integer by splitmix64's finalizer."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def permute(index: int, size: int, key: int) -> int:
    """Permute range(size) by a keyed bijection: return where `index` goes.

    A Feistel network permutes the next larger even power of two, in four rounds (Luby and Rackoff 1988). It is repeated
    until the result is below `size`, fewer than four times on average (cycle walking: Black and Rogaway 2002).

    >>> sorted(permute(i, 10, key=7) for i in range(10)) == list(range(10))
    True
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for round_ in range(ROUNDS):
            left, right = right, left ^ (mix((key + GOLDEN * (round_ + 1) + right) & MASK) & low)
        index = (left << half) | right
        if index < size:
            return index


def permute_epochs(position: int, samples: int, seed: int) -> int:
    """Return the sample at a position of an endless order, in which each epoch is permuted differently."""
    epoch, index = divmod(position, samples)
    return permute(index, samples, key=mix((seed * GOLDEN + epoch) & MASK))


class Mixture:
    """Choose the source of each position in an endless order of samples: in proportion to weights, evenly spread.

    The order has a period of SLOTS positions, of which each source gets a number proportional to its weight. A source
    with n slots has its slot k at (k + 1/2) / n of the period. Thus every batch holds each source's share, to within a
    sample or two.

    >>> mixture = Mixture([10, 10], [3, 1])
    >>> [mixture.turn_at(position) for position in range(4)]
    [(0, 0), (0, 1), (1, 0), (0, 2)]
    """

    def __init__(self, samples: Sequence[int], weights: Sequence[float]):
        self.samples, self.starts = list(samples), np.cumsum([0, *samples]).tolist()
        exact = np.array(weights) / sum(weights) * SLOTS
        slots = np.maximum(1, exact.astype(int))  # every source gets a slot
        while (left := SLOTS - slots.sum()) > 0:  # the largest remainders get one more
            slots[np.argmax(exact - slots)] += 1
        slots[np.argmax(slots)] += min(0, left)
        self.slots = slots.tolist()
        places = np.concatenate([(np.arange(n) + 0.5) / n for n in self.slots])
        order = np.argsort(places, kind="stable")
        self.sources = np.repeat(np.arange(len(slots), dtype=np.uint16), slots)[order]
        self.turns = np.concatenate([np.arange(n, dtype=np.uint32) for n in self.slots])[order]

    def turn_at(self, position: int) -> tuple[int, int]:
        """Return (source, turn) of a position, where turn is the number of earlier positions with the same source."""
        block, slot = divmod(position, SLOTS)
        source = int(self.sources[slot])
        return source, block * self.slots[source] + int(self.turns[slot])

    def shares(self) -> list[float]:
        """Return each source's share of the positions."""
        return [n / SLOTS for n in self.slots]


@dataclass(frozen=True)
class Batches:
    """Hold the samples of a split and the order in which steps read them.

    samples            number of samples; positions continue over epochs, and each epoch is permuted differently
    rows               function that reads the samples with the given numbers as a batch
    global_batch_size  samples in a step, over all ranks; this rank takes positions rank, rank + world, ...
    mixture            order of several sources, whose samples are numbered one source after another
    corrupt            function that corrupts a batch, given a number for each row: see data/corrupt.py
    """

    samples: int
    rows: Callable[[list[int]], Batch]
    global_batch_size: int
    seed: int
    rank: int = 0
    world: int = 1
    mixture: Mixture | None = None
    corrupt: Callable[[Batch, Sequence[int]], Batch] | None = None

    def batch_at(self, step: int) -> Batch:
        """Return this rank's share of a step."""
        return self.rows_from(step, -(-(self.global_batch_size - self.rank) // self.world))

    def rows_from(self, step: int, number: int) -> Batch:
        """Return this rank's first rows from a step on, at most an epoch. They may go on into later steps."""
        number = min(number, max(1, self.samples // self.world))
        first = step * self.global_batch_size + self.rank
        positions = range(first, first + number * self.world, self.world)
        return self.make_batch([self.sample_at(position) for position in positions], positions)

    def make_batch(self, samples: list[int], numbers: Sequence[int]) -> Batch:
        """Return the batch of these samples. A row's number seeds its corruption."""
        batch = self.rows(samples)
        return self.corrupt(batch, numbers) if self.corrupt else batch

    def sample_at(self, position: int) -> int:
        """Return the number of the sample at a position."""
        if self.mixture is None:
            return permute_epochs(position, self.samples, self.seed)
        source, turn = self.mixture.turn_at(position)
        seed = self.seed + mix(source + 1)
        return self.mixture.starts[source] + permute_epochs(turn, self.mixture.samples[source], seed)

    def in_order(self, limit: int | None = None) -> Iterator[Batch]:
        """Yield the first `limit` samples, or all, in their stored order, `global_batch_size` at a time."""
        stop = self.samples if limit is None else min(self.samples, limit)
        for start in range(0, stop, self.global_batch_size):
            samples = list(range(start, min(start + self.global_batch_size, stop)))
            yield self.make_batch(samples, samples)


def corpus_batches(
    streams: Sequence[TokenStream],
    seq_len: int,
    global_batch_size: int,
    *,
    mixture: Mixture | None = None,
    document_mask: bool = False,
    **order: Any,
) -> Batches:
    """Return the batches of token streams.

    Sample i of a stream is the seq_len + 1 tokens from i * seq_len on: every token is an input once per epoch.

    mixture        order of the streams; None if there is only one
    document_mask  keep attention inside a document, restart positions in each, and do not train on predicting the
                   first token of the next document
    """
    samples = [samples_in(stream, seq_len) for stream in streams]
    starts = np.cumsum([0, *samples])

    def rows(indices: list[int]) -> Batch:
        sources = (np.searchsorted(starts, indices, side="right") - 1).tolist()
        places = [(streams[s], (i - int(starts[s])) * seq_len) for i, s in zip(indices, sources, strict=True)]
        tokens = np.stack([stream.read(place, seq_len + 1) for stream, place in places]).astype(np.int64)
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        if not document_mask:
            return Batch(inputs, labels)
        begins = np.zeros((len(indices), seq_len + 1), bool)
        for row, (stream, place) in zip(begins, places, strict=True):
            row[stream.document_starts(place, seq_len + 1) - place] = True
        index = np.arange(seq_len)
        document_start = np.maximum.accumulate(np.where(begins[:, :-1], index, 0), axis=1)
        labels = np.where(begins[:, 1:], IGNORE_INDEX, labels)
        return Batch(inputs, labels, index - document_start, begins[:, :-1].cumsum(axis=1))

    return Batches(sum(samples), rows, global_batch_size, mixture=mixture, **order)


def samples_in(stream: TokenStream, seq_len: int) -> int:
    """Return the number of whole samples in a stream. The remaining tokens at its end are not used."""
    return max(0, (len(stream) - 1) // seq_len)
