"""batch_at(step): the global batch as a pure function of (seed, step), whatever the number of ranks.

There is no shuffle state: sample positions are permuted by a keyed bijection, so that resuming needs only the step.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.data.corrupt import shift_right
from llmkit.data.sft import PAIR_ARRAYS, ROW_ARRAYS
from llmkit.data.tokens import TokenStream
from llmkit.types import IGNORE_INDEX, Batch

ROUNDS = 4
SLOTS = 65_536  # samples in which a mixture comes round, so a weight is exact to 1 in as many
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


class Mixture:
    """Which source each position of an endless order draws from, in fixed proportions and evenly spread.

    Weights become counts of SLOTS; slot k of a source that has n of them stands at (k + 1/2) / n of the way, so that
    any batch has its share of every source, to within a sample or two.

    >>> mixture = Mixture([10, 10], [3, 1])
    >>> [mixture.turn_at(position) for position in range(4)]
    [(0, 0), (0, 1), (1, 0), (0, 2)]
    """

    def __init__(self, samples: Sequence[int], weights: Sequence[float]):
        self.samples, self.starts = list(samples), np.cumsum([0, *samples]).tolist()
        exact = np.array(weights) / sum(weights) * SLOTS
        slots = np.maximum(1, exact.astype(int))  # no source is left out
        while (left := SLOTS - slots.sum()) > 0:  # the largest remainders get what is left
            slots[np.argmax(exact - slots)] += 1
        slots[np.argmax(slots)] += min(0, left)
        self.slots = slots.tolist()
        places = np.concatenate([(np.arange(n) + 0.5) / n for n in self.slots])
        order = np.argsort(places, kind="stable")
        self.sources = np.repeat(np.arange(len(slots), dtype=np.uint16), slots)[order]
        self.turns = np.concatenate([np.arange(n, dtype=np.uint32) for n in self.slots])[order]

    def turn_at(self, position: int) -> tuple[int, int]:
        """(source, how many positions before drew from it)."""
        block, slot = divmod(position, SLOTS)
        source = int(self.sources[slot])
        return source, block * self.slots[source] + int(self.turns[slot])

    def shares(self) -> list[float]:
        """Of the positions, by source."""
        return [n / SLOTS for n in self.slots]


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
    mixture: Mixture | None = None  # samples are those of its sources, one after another
    corrupt: Callable[[Batch, Sequence[int]], Batch] | None = None  # see data/corrupt.py; told each row's number

    def batch_at(self, step: int) -> Batch:
        """This rank's share of a step: a pure function of (seed, step)."""
        first = step * self.global_batch_size
        positions = range(first + self.rank, first + self.global_batch_size, self.world)
        return self.made([self.sample_at(position) for position in positions], positions)

    def made(self, samples: list[int], numbers: Sequence[int]) -> Batch:
        """The batch of these samples, corrupted as a function of the rows' numbers."""
        batch = self.rows(samples)
        return self.corrupt(batch, numbers) if self.corrupt else batch

    def sample_at(self, position: int) -> int:
        """The sample that stands at a position of the endless permuted order."""
        if self.mixture is None:
            return self.permuted(position, self.samples, self.seed)
        source, turn = self.mixture.turn_at(position)
        seed = self.seed + mix(source + 1)
        return self.mixture.starts[source] + self.permuted(turn, self.mixture.samples[source], seed)

    @staticmethod
    def permuted(turn: int, samples: int, seed: int) -> int:
        epoch, place = divmod(turn, samples)
        return permute(place, samples, key=mix((seed * GOLDEN + epoch) & MASK))

    def in_order(self, limit: int | None = None) -> Iterator[Batch]:
        """The first `limit` samples, or all, once each, `global_batch_size` at a time: what an evaluation reads."""
        stop = self.samples if limit is None else min(self.samples, limit)
        for start in range(0, stop, self.global_batch_size):
            samples = list(range(start, min(start + self.global_batch_size, stop)))
            yield self.made(samples, samples)


def corpus_batches(
    streams: Sequence[TokenStream],
    seq_len: int,
    global_batch_size: int,
    *,
    mixture: Mixture | None = None,
    document_mask: bool = False,
    **order: Any,
) -> Batches:
    """Sample i of a stream is the seq_len + 1 tokens at i * seq_len: every token is an input once an epoch.

    mixture        of the samples of the streams; None: there is but one stream
    document_mask  attention stays inside a document, positions begin anew with each, and no document is asked for
                   the first token of the next
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
        begins = np.zeros((len(indices), seq_len + 1), bool)  # where a document begins
        for row, (stream, place) in zip(begins, places, strict=True):
            row[stream.document_starts(place, seq_len + 1) - place] = True
        at = np.arange(seq_len)
        since = np.maximum.accumulate(np.where(begins[:, :-1], at, 0), axis=1)
        labels = np.where(begins[:, 1:], IGNORE_INDEX, labels)
        return Batch(inputs, labels, at - since, begins[:, :-1].cumsum(axis=1))

    return Batches(sum(samples), rows, global_batch_size, mixture=mixture, **order)


def samples_in(stream: TokenStream, seq_len: int) -> int:
    """How many samples a stream gives an epoch; the last tokens may be too few for one."""
    return max(0, (len(stream) - 1) // seq_len)


def open_rows(folder: Path, split: str, global_batch_size: int, start_id: int | None = None, **order) -> Batches:
    """What `sft.encode_sft` wrote: for a decoder, or, with its first token, for an encoder and a decoder."""
    if start_id is None:
        return packed_batches(folder, split, global_batch_size, **order)
    return pair_batches(folder, split, global_batch_size, start_id=start_id, **order)


def packed_batches(folder: Path, split: str, global_batch_size: int, **order) -> Batches:
    """Rows that `sft.encode_sft` packed; only the answers are labels."""
    arrays = [np.load(folder / f"{split}-{name}.npy", mmap_mode="r", allow_pickle=False) for name in ROW_ARRAYS]

    def rows(indices: list[int]) -> Batch:
        ids, targets, segments, positions = (array[indices] for array in arrays)
        labels = np.where(targets[:, 1:], ids[:, 1:], IGNORE_INDEX).astype(np.int64)
        inputs, segments, positions = (x[:, :-1].astype(np.int64) for x in (ids, segments, positions))
        return Batch(inputs, labels, positions, segments)

    return Batches(len(arrays[0]), rows, global_batch_size, **order)


def pair_batches(folder: Path, split: str, global_batch_size: int, *, start_id: int, **order) -> Batches:
    """Texts and their answers as `sft.encode_sft` padded them, for an encoder and a decoder.

    start_id  what the decoder reads first
    """
    sources, segments, answers = (
        np.load(folder / f"{split}-{name}.npy", mmap_mode="r", allow_pickle=False) for name in PAIR_ARRAYS
    )

    def rows(indices: list[int]) -> Batch:
        ids, seen, labels = (array[indices].astype(np.int64) for array in (sources, segments, answers))
        return Batch(ids, labels, segments=seen, decoder_input_ids=shift_right(labels, start_id))

    return Batches(len(sources), rows, global_batch_size, **order)
