"""batch_at(step): the global batch as a pure function of (seed, step), whatever the number of ranks.

There is no shuffle state: sample positions are permuted by a keyed bijection, so that resuming needs only the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmkit.data.sft import ROW_ARRAYS
from llmkit.data.tokens import TokenStream
from llmkit.types import IGNORE_INDEX, Batch

ROUNDS = 4
MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: splitmix64's increment (Steele et al. 2014)


def mix(x: int) -> int:
    """splitmix64's finalizer: 64 bits in, 64 well-mixed bits out."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def permute(index: int, size: int, key: int) -> int:
    """A keyed bijection on range(size): a Feistel network over the next even power of two, walked until inside.

    Luby and Rackoff 1988: four rounds make a strong pseudorandom permutation; cycle walking (Black and Rogaway 2002)
    takes fewer than four tries on average.

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


@dataclass(frozen=True)
class Batches:
    """Samples of one split and the order in which steps take them.

    samples            how many there are; positions run on over epochs, and each epoch is permuted anew
    rows               sample numbers -> Batch
    global_batch_size  samples in a step, over all ranks; this rank takes positions rank, rank + world, ...
    """

    samples: int
    rows: Callable[[list[int]], Batch]
    global_batch_size: int
    seed: int
    rank: int = 0
    world: int = 1

    def batch_at(self, step: int) -> Batch:
        """This rank's share of a step: a pure function of (seed, step)."""
        first = step * self.global_batch_size
        positions = range(first + self.rank, first + self.global_batch_size, self.world)
        return self.rows([self.sample_at(position) for position in positions])

    def sample_at(self, position: int) -> int:
        """The sample that stands at a position of the endless permuted order."""
        epoch, place = divmod(position, self.samples)
        return permute(place, self.samples, key=mix((self.seed * GOLDEN + epoch) & MASK))

    def in_order(self, limit: int | None = None) -> Iterator[Batch]:
        """The first `limit` samples, or all, once each, `global_batch_size` at a time: what an evaluation reads."""
        stop = self.samples if limit is None else min(self.samples, limit)
        for start in range(0, stop, self.global_batch_size):
            yield self.rows(list(range(start, min(start + self.global_batch_size, stop))))


def corpus_batches(stream: TokenStream, seq_len: int, global_batch_size: int, **order) -> Batches:
    """Sample i is the seq_len + 1 tokens at i * seq_len: every token is an input once an epoch, and a target once."""

    def rows(indices: list[int]) -> Batch:
        tokens = np.stack([stream.read(i * seq_len, seq_len + 1) for i in indices]).astype(np.int64)
        return Batch(tokens[:, :-1], tokens[:, 1:])

    return Batches((len(stream) - 1) // seq_len, rows, global_batch_size, **order)


def packed_batches(folder: Path, split: str, global_batch_size: int, **order) -> Batches:
    """Rows that `sft.encode_sft` packed; only the answers are labels."""
    arrays = [np.load(folder / f"{split}-{name}.npy", mmap_mode="r", allow_pickle=False) for name in ROW_ARRAYS]

    def rows(indices: list[int]) -> Batch:
        ids, targets, segments, positions = (array[indices] for array in arrays)
        labels = np.where(targets[:, 1:], ids[:, 1:], IGNORE_INDEX).astype(np.int64)
        inputs, segments, positions = (x[:, :-1].astype(np.int64) for x in (ids, segments, positions))
        return Batch(inputs, labels, positions, segments)

    return Batches(len(arrays[0]), rows, global_batch_size, **order)
