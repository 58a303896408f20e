"""Corrupt an encoder's input: mask tokens (BERT) or cut out spans (T5). A row's number seeds its corruption."""

from collections.abc import Callable, Sequence

import numpy as np

from llmkit.errors import DataError
from llmkit.tokenizer.tokenizer import ROLES, Tokenizer
from llmkit.types import IGNORE_INDEX, Batch

Corrupt = Callable[[Batch, Sequence[int]], Batch]  # (batch, numbers of its rows) -> corrupted batch


def row_rng(seed: int, number: int) -> np.random.Generator:
    """Return a random generator for a row, so that its corruption does not depend on the rest of the batch."""
    return np.random.default_rng((seed, number))


def shift_right(labels: np.ndarray, start_id: int) -> np.ndarray:
    """Return a decoder's input for `labels` (B, T): the labels shifted right, with start_id in front and as padding.

    >>> shift_right(np.array([[7, 8, 9, -100]]), 0).tolist()
    [[0, 7, 8, 9]]
    """
    shifted = np.roll(labels, 1, axis=1)
    shifted[:, 0] = start_id
    return np.where(shifted == IGNORE_INDEX, start_id, shifted)


# ---- masked tokens: BERT --------------------------------------------------------------------------------------------


def masking(
    tokenizer: Tokenizer, seed: int, *, mask_fraction: float, random_fraction: float, keep_fraction: float
) -> Corrupt:
    """Return a function that masks tokens of a batch (Devlin et al. 2018, arXiv:1810.04805, section 3.1).

    mask_fraction    share of a row's tokens that are labels, at least one; special tokens are never chosen
    random_fraction  share of the labels whose inputs are replaced by random tokens
    keep_fraction    share of the labels whose inputs are kept; all others are replaced by the mask token
    """
    mask_id = tokenizer.rust.token_to_id(tokenizer.roles.get("mask_token", ""))
    if mask_id is None:
        fix = "data.tokenizer: {train: wordpiece}, or special_tokens: ['<mask>'] for another kind"
        raise DataError("the tokenizer has no mask token", expected=" or ".join(ROLES["mask_token"]), fix=fix)
    specials = np.array(sorted(tokenizer.specials.values()))
    plain = np.setdiff1d(np.arange(len(tokenizer)), specials)

    def corrupt(batch: Batch, numbers: Sequence[int]) -> Batch:
        inputs, labels = batch.input_ids.copy(), np.full(batch.input_ids.shape, IGNORE_INDEX, np.int64)
        for ids, label, number in zip(inputs, labels, numbers, strict=True):
            rng = row_rng(seed, number)
            places = rng.permutation(np.flatnonzero(~np.isin(ids, specials)))
            places = places[: max(1, round(mask_fraction * len(places)))]
            label[places] = ids[places]
            chance = rng.random(len(places))
            new = np.where(chance < random_fraction, rng.choice(plain, len(places)), mask_id)
            ids[places] = np.where(chance >= 1 - keep_fraction, ids[places], new)
        return Batch(inputs, labels, batch.positions, batch.segments)

    return corrupt


# ---- spans cut out: T5 ----------------------------------------------------------------------------------------------


def span_lengths(length: int, noise_fraction: float, mean_span: float) -> tuple[int, int]:
    """Return (tokens to cut out of `length`, number of spans). At least one kept token precedes every span."""
    noise = min(max(round(length * noise_fraction), 1), length - 1)
    return noise, max(1, min(round(noise / mean_span), noise, length - noise))


def random_parts(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `parts` positive integers that add up to `total`. All such sequences are equally likely."""
    borders = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate(([0], borders, [total])))


def span_corruption(
    tokenizer: Tokenizer, seed: int, *, noise_fraction: float, mean_span: float, start_id: int = 0
) -> Corrupt:
    """Return a function that replaces spans of a batch by sentinels (Raffel et al. 2019, arXiv:1910.10683, 3.1.4).

    The labels are the sentinels, each followed by the span that it replaces. Inputs and labels get an end token. The
    same number of tokens is cut out of every row, so that all rows of a batch have the same length.

    noise_fraction  share of the tokens that are cut out, see `span_lengths`
    mean_span       average length of a span in tokens

    Example: "thank you for inviting me" -> "thank <extra_id_0> inviting me </s>", "<extra_id_0> you for </s>"
    """
    sentinels = [tokenizer.rust.token_to_id(f"<extra_id_{i}>") for i in range(1000)]
    sentinels = sentinels[: sentinels.index(None)] if None in sentinels else sentinels

    def corrupt(batch: Batch, numbers: Sequence[int]) -> Batch:
        length = batch.input_ids.shape[1]
        if length < 2:
            raise DataError("a row of one token is too short for span corruption", fix="raise data.seq_len")
        noise, spans = span_lengths(length, noise_fraction, mean_span)
        if spans > len(sentinels):
            raise DataError(
                "the tokenizer has too few sentinels for the spans of a row",
                got=f"{len(sentinels)} <extra_id_...>",
                expected=f"{spans} for {length} tokens",
                fix="data.tokenizer.extra_ids: 100, or a lower data.seq_len",
            )
        inputs, labels = [], []
        marks = np.array(sentinels[:spans])  # one for each span
        for ids, number in zip(batch.input_ids, numbers, strict=True):
            rng = row_rng(seed, number)
            kept, cut = random_parts(length - noise, spans, rng), random_parts(noise, spans, rng)
            ends = np.cumsum(np.stack((kept, cut), axis=1).ravel())  # of a kept part, a cut part, a kept part, ...
            parts = np.split(ids, ends[:-1])
            inputs.append(np.concatenate([*interleave(parts[::2], marks), [tokenizer.eos_id]]))
            labels.append(np.concatenate([*interleave(marks, parts[1::2]), [tokenizer.eos_id]]))
        inputs, labels = np.stack(inputs), np.stack(labels)
        return Batch(inputs, labels, decoder_input_ids=shift_right(labels, start_id))

    return corrupt


def interleave(first: Sequence, second: Sequence) -> list[np.ndarray]:
    return [np.atleast_1d(one) for pair in zip(first, second, strict=True) for one in pair]
