"""Text from a model: prefill the prompts, then one token at a time from the cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmkit.errors import DataError, ModelError
from llmkit.models.attention import KVCache
from llmkit.models.layers import RowLinear
from llmkit.tokenizer.tokenizer import Tokenizer

CONTEXT = 8  # tokens of a prompt that may decide whether the next one begins with a space
PATIENCE = 16  # tokens after which bytes that are no character yet never will be
GREEDY_BELOW = 1e-5  # a temperature at which another token is never drawn, and the division would overflow
FIXED_CAPACITIES = [512 * 4**k for k in range(12)]  # slots of a compiled model's cache: few, for each compiles anew


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the model's probabilities; the steps are taken in this order.

    repetition_penalty  logits of tokens that were read or drawn before are divided by it if positive, else multiplied
                        (Keskar et al. 2019, arXiv:1909.05858)
    temperature         divides the logits; 0: always the likeliest token
    top_k               only the k likeliest tokens
    top_p               only the likeliest tokens that together reach this probability (Holtzman 2019, 1904.09751)
    min_p               only tokens with at least this share of the likeliest one's probability (arXiv:2407.01082)
    """

    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


# ---- drawing tokens -------------------------------------------------------------------------------------------------


def logits_to_probs(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens that may follow and their probabilities, (B, k) each, from logits (B, V).

    They come in the order of their ids: a draw must not hang on which of two equally likely ones is called first.
    """
    logits = logits.float() / sampling.temperature
    kept = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    logits, tokens = logits.topk(kept)
    probs = logits.softmax(-1)
    outside = (probs.cumsum(-1) - probs >= sampling.top_p) | (probs < sampling.min_p * probs[:, :1])
    outside[:, 0] = False  # the likeliest stays, and so does the token that crosses the line
    probs = probs.masked_fill(outside, 0.0)
    tokens, order = tokens.sort()
    return tokens, (probs / probs.sum(-1, keepdim=True)).gather(-1, order)


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the tokens that were seen (B, V) less likely."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(logits: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> list[int]:
    """One token a row of logits (B, V), each row with a generator of its own."""
    if sampling.temperature < GREEDY_BELOW:
        return logits.argmax(-1).tolist()
    if not logits.isfinite().all():
        raise ModelError("the model's logits are not finite", fix="use another --precision")
    tokens, probs = logits_to_probs(logits, sampling)
    rows = enumerate(zip(probs, generators, strict=True))
    return [int(tokens[b, torch.multinomial(row, 1, generator=generator)]) for b, (row, generator) in rows]


# ---- running the model ----------------------------------------------------------------------------------------------


def prefill(model: nn.Module, prompts: list[list[int]], capacity: int, dtype: torch.dtype) -> tuple[KVCache, Tensor]:
    """Read the prompts: a cache with room for `capacity` tokens in all, and logits (B, V) of the next token.

    Prompts of different lengths begin in different columns and end in the same one; an encoder reads them apart from
    the cache, which then holds what the decoder writes.
    """
    config, device, longest = model.config, next(model.parameters()).device, max(map(len, prompts))
    pads = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    cache = KVCache(
        config.windows,
        len(prompts),
        config.num_key_value_heads,
        capacity,
        config.head_dim,
        device=device,
        dtype=dtype,
        starts=pads if pads.any() and config.kind == "causal" else None,
        longest=config.max_position_embeddings,
    )
    if config.kind == "causal":
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    else:
        sources = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
        is_pad = torch.arange(longest, device=device) >= longest - pads[:, None]
        cache.encoded = model.encode(sources, -is_pad.long() if pads.any() else None)
        cache.seen = ~is_pad[:, None, None] if pads.any() else None
        ids = torch.full((len(prompts), 1), config.decoder_start_token_id, device=device)
    return cache, model(ids, cache=cache, logits_to_keep=1)[:, -1]


def decode_one_token(model: nn.Module, tokens: list[int], cache: KVCache) -> Tensor:
    """Read one more token a row; logits (B, V) of the token after it."""
    ids = torch.tensor(tokens, device=cache.device)[:, None]
    return model(ids, cache=cache, logits_to_keep=1)[:, -1]


def tokens_left(model: nn.Module, prompts: list[list[int]], max_new_tokens: int) -> list[int]:
    """How many tokens may be written after each prompt; a UserError for one that leaves no position to write at."""
    longest, limit = max(map(len, prompts)), model.config.max_position_embeddings
    if longest >= limit:
        raise DataError(
            "the prompt fills all of the model's positions",
            got=f"{longest} tokens",
            expected=f"at most {limit - 1}",
            fix="shorten it",
        )
    taken = [len(prompt) if model.config.kind == "causal" else 1 for prompt in prompts]
    return [min(max_new_tokens, limit - read + 1) for read in taken]  # the last one is written, but not read


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: list[list[int]],
    *,
    max_new_tokens: int = 200,
    sampling: Sampling = Sampling(),
    stop: frozenset[int] = frozenset(),
    seed: int = 0,
    compiled: bool = False,
) -> Iterator[list[int | None]]:
    """The next token of every prompt, again and again; None for a row that has ended.

    A row ends at a stop token, which is not given out, after max_new_tokens, or where its positions end. Row b draws
    with seed + b, and is the same text alone, with that seed, or beside others; the global RNG is not touched.

    compiled  the model's blocks were compiled by `compile_decoding`

    >>> list(generate(model, [[1, 2], [3]], max_new_tokens=2, sampling=Sampling(temperature=0)))   # doctest: +SKIP
    [[17, 4], [17, None]]
    """
    if model.config.kind == "masked":
        raise ModelError(f"{model.config.model_type} reads in both directions, and writes no text")
    rooms = tokens_left(model, prompts, max_new_tokens)
    read = max(map(len, prompts)) if model.config.kind == "causal" else 1
    capacity = read + max(rooms) - 1
    compiled = compiled and len(prompts) == 1 and model.config.kind == "causal"  # each other shape compiles anew
    if compiled:
        capacity = next(n for n in FIXED_CAPACITIES if n >= capacity)
    training, first = model.training, next(model.parameters())
    model.eval()
    device = first.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else first.dtype
    generators = [torch.Generator(first.device).manual_seed(seed + row) for row in range(len(prompts))]
    seen = None
    if sampling.repetition_penalty != 1.0:
        seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=first.device)
        for row, prompt in zip(seen, prompts, strict=True):
            row[prompt if model.config.kind == "causal" else []] = True
    ended = [False] * len(prompts)
    try:
        with eager():
            cache, logits = prefill(model, prompts, capacity, dtype)
        cache.fixed = compiled
        for step in range(max(rooms)):
            logits = logits if seen is None else penalize(logits, seen, sampling.repetition_penalty)
            tokens = sample(logits, sampling, generators)
            over = (
                done or token in stop or step >= room for done, token, room in zip(ended, tokens, rooms, strict=True)
            )
            ended = list(over)
            if all(ended):
                break
            yield [None if done else token for done, token in zip(ended, tokens, strict=True)]
            if step + 1 == max(rooms):
                break
            if seen is not None:
                seen[range(len(tokens)), tokens] = True
            with contextlib.nullcontext() if compiled else eager():
                logits = decode_one_token(model, tokens, cache)
    finally:
        model.train(training)


def eager():
    """Blocks that were compiled run as written: every new length would be compiled anew."""
    return torch.compiler.set_stance("force_eager")


def stream(model: nn.Module, prompt: list[int], **options) -> Iterator[int]:
    """`generate` for one prompt."""
    return (token for [token] in generate(model, [prompt], **options))


def compile_decoding(model: nn.Module) -> None:
    """Compile what a decoded token runs through: on a CPU weights are then read at twice the speed."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = RowLinear
    for part in (*model.blocks, model.to_logits):
        part.compile(fullgraph=True, dynamic=False)


# ---- text -----------------------------------------------------------------------------------------------------------


def text_pieces(
    tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterable[int], stop: Sequence[str] = ()
) -> Iterator[str]:
    """What the tokens after a prompt add to the text, as soon as it is sure, up to a stop string.

    Half a character waits for the rest of it, and what may turn out to begin a stop string waits too.
    """
    held = ""
    for piece in whole_characters(tokenizer, prompt, tokens):
        held += piece
        found = [place for word in stop if (place := held.find(word)) >= 0]
        if found:
            held = held[: min(found)]
            break
        longest = len(held) + 1
        waits = max(
            (n for word in stop for n in range(1, min(len(word), longest)) if held.endswith(word[:n])), default=0
        )
        ready, held = held[: len(held) - waits], held[len(held) - waits :]
        if ready:
            yield ready
    if held:
        yield held


def whole_characters(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens after a prompt, in pieces that end where a character ends.

    Each piece is what the tokens since the last one add to those before it: whether a token begins with a space may
    depend on what stands before. Bytes that are no character, and never become one, are given out as U+FFFD; half a
    character at the end is not.
    """
    before, new = list(prompt[-CONTEXT:]), []
    for token in tokens:
        new.append(token)
        known, text = tokenizer.decode(before), tokenizer.decode(before + new)
        if not text.endswith("\ufffd") or len(new) >= PATIENCE:
            yield text[len(known) :]
            before, new = new, []
    if new:
        yield tokenizer.decode(before + new)[len(tokenizer.decode(before)) :].rstrip("\ufffd")
