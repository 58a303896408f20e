"""Generate tokens: read the prompts in one forward pass, then decode token by token with a KV cache."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from llmkit.errors import DataError, ModelError
from llmkit.generation.sampling import DEFAULT_SAMPLING, GENERATE_MAX_NEW_TOKENS, Sampling
from llmkit.models import family_of
from llmkit.models.attention import KVCache
from llmkit.models.layers import FEW_ROWS, FewRows, swap_class
from llmkit.tokenizer.tokenizer import Tokenizer

Decode = Callable[[nn.Module, Tensor, KVCache], Tensor]  # `decode_one_token`, or the same eagerly or captured

CONTEXT_TOKENS = 8  # earlier tokens that may decide whether a new token's text begins with a space
MAX_INCOMPLETE_TOKENS = 16  # tokens after which bytes that are not a character yet are emitted as U+FFFD
GREEDY_BELOW = 1e-5  # at lower temperatures no other token is ever drawn, and the division would overflow
MOST_PROGRAMS = 256  # one for each number of rows, cache size and model
SHARED_TOKENS = 16  # fewest tokens that all prompts begin with, for which a forward pass of their own pays
STATIC_SLOTS = 256  # the smallest static cache; each further one has twice as many, and is compiled or captured anew


# ---- sampling -------------------------------------------------------------------------------------------------------


def logits_to_probs(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return the tokens that may follow and their probabilities, (B, k) each, from logits (B, V).

    They are sorted by token id, so that a draw does not depend on the order of equally likely tokens.
    """
    logits = logits.float() / sampling.temperature
    kept = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    logits, tokens = logits.topk(kept)
    probs = logits.softmax(-1)
    # Whole numbers: their sums are exact, and CUDA has no deterministic cumsum of floats.
    mass, top = (logits.double().softmax(-1) * 2**52).long(), math.ceil(sampling.top_p * 2**52)
    outside = (mass.cumsum(-1) - mass >= top) | (probs < sampling.min_p * probs[:, :1])
    probs = probs.masked_fill(outside, 0.0)
    tokens, order = tokens.sort()
    return tokens, (probs / probs.sum(-1, keepdim=True)).gather(-1, order)


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Return the logits (B, V) with the tokens that were seen (B, V) made less likely."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(logits: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> Tensor:
    """Draw one token for each row of logits (B, V), each row with its own generator; -1 where one is nan or inf.

    One uniform number for each row is looked up among the sums of the probabilities, which are whole numbers: their
    sums are exact, and CUDA has no deterministic cumsum of floats. Nothing here waits for the device.
    """
    if sampling.temperature < GREEDY_BELOW:
        return logits.argmax(-1)
    if not sampling.top_k and sampling.top_p == 1 and not sampling.min_p:  # nothing is cut off: no need to sort
        probs = (logits.float() / sampling.temperature).softmax(-1)
        tokens = torch.arange(probs.shape[-1], device=probs.device).expand(probs.shape)
    else:
        tokens, probs = logits_to_probs(logits, sampling)
    sums = (probs * 2**40).long().cumsum(-1)  # fp32 has 24 bits: what is left out is under 2^-40
    device = probs.device
    uniform = [torch.rand(1, generator=one, device=device, dtype=torch.float64) for one in generators]
    target = (torch.stack(uniform) * sums[:, -1:]).long()
    place = torch.searchsorted(sums, target, right=True).clamp(max=probs.shape[-1] - 1)
    drawn = tokens.gather(-1, place)[:, 0]
    return drawn.where(probs[:, 0].isfinite(), -1)  # one logit that is not finite leaves no probability that is


# ---- running the model ----------------------------------------------------------------------------------------------


@torch.compiler.set_stance("force_eager")
def prefill(model: nn.Module, prompts: list[list[int]], capacity: int, dtype: torch.dtype) -> tuple[KVCache, Tensor]:
    """Read the prompts and return a cache for `capacity` tokens in all, and logits (B, V) of the next token.

    Prompts of different lengths are padded on the left. With an encoder they are padded on the right, and the cache
    holds only the tokens that the decoder writes. Equal prompts are read once, and so is what all prompts begin with.
    """
    config, device = model.config, next(model.parameters()).device
    unique = list(dict.fromkeys(map(tuple, prompts)))
    longest = max(map(len, unique))
    pads = torch.tensor([longest - len(prompt) for prompt in unique], device=device)

    def make_cache(rows: int, columns: int, starts: Tensor | None) -> KVCache:
        shape = (config.windows, rows, config.num_key_value_heads, columns, config.head_dim)
        limit = config.max_position_embeddings
        return KVCache(*shape, device=device, dtype=dtype, starts=starts, max_positions=limit)

    cache = make_cache(len(unique), capacity, pads if pads.any() and config.kind == "causal" else None)
    if config.kind == "causal":
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in unique], device=device)
        if (shared := count_shared(unique)) >= SHARED_TOKENS and not any(config.windows):
            prefix = make_cache(1, shared, None)
            model(torch.tensor([unique[0][:shared]], device=device), cache=prefix, logits_to_keep=1)
            cache.begin_with(prefix)
    else:
        sources = torch.tensor([list(prompt) + [0] * (longest - len(prompt)) for prompt in unique], device=device)
        is_pad = torch.arange(longest, device=device) >= longest - pads[:, None]
        cache.encoded = model.encode(sources, -is_pad.long() if pads.any() else None)
        cache.encoded_mask = ~is_pad[:, None, None] if pads.any() else None
        ids = torch.full((len(unique), 1), family_of(config).start_token_id(config), device=device)
    logits = model(ids[:, cache.length :], cache=cache, logits_to_keep=1)[:, -1]
    if len(unique) == len(prompts):
        return cache, logits
    numbers = {prompt: row for row, prompt in enumerate(unique)}
    rows = torch.tensor([numbers[tuple(prompt)] for prompt in prompts], device=device)
    cache.select(rows)
    return cache, logits[rows]


def count_shared(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all of several prompts begin with, at most all but the last of the shortest.

    >>> count_shared([(1, 2, 3), (1, 2, 4, 5)]), count_shared([(1, 2)]), count_shared([(1, 2), (1, 2, 3)])
    (2, 0, 1)
    """
    low, high = min(prompts), max(prompts)
    shared = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return 0 if len(prompts) == 1 else min(shared, min(map(len, prompts)) - 1)


def decode_one_token(model: nn.Module, tokens: Tensor, cache: KVCache) -> Tensor:
    """Read one more token for each row, tokens (B,), and return logits (B, V) of the token after it."""
    return model(tokens[:, None], cache=cache, logits_to_keep=1)[:, -1]


@torch.compiler.set_stance("force_eager")
def decode_eagerly(model: nn.Module, tokens: Tensor, cache: KVCache) -> Tensor:
    """Compute `decode_one_token` without compiled blocks, because every new length would be compiled anew."""
    return decode_one_token(model, tokens, cache)


def capture(decode: Decode, model: nn.Module, tokens: Tensor, cache: KVCache) -> Decode:
    """Return `decode` for a static cache as one CUDA graph, which is launched at once instead of kernel by kernel.

    A pass before it loads what is loaded lazily. The column that it writes is written again by the first token.
    """
    tokens, length = tokens.clone(), cache.length.clone()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        decode(model, tokens, cache)
        cache.length.copy_(length)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        logits = decode(model, tokens, cache)

    def replay(_model: nn.Module, new: Tensor, _cache: KVCache) -> Tensor:
        tokens.copy_(new)
        graph.replay()
        return logits

    return replay


def count_new_tokens(model: nn.Module, prompts: list[list[int]], max_new_tokens: int) -> list[int]:
    """Return how many tokens may be generated for each prompt. Raise DataError if a prompt leaves no position free."""
    longest, limit = max(map(len, prompts)), model.config.max_position_embeddings
    if longest >= limit:
        what, expected = "the prompt fills all of the model's positions", f"at most {limit - 1}"
        raise DataError(what, got=f"{longest} tokens", expected=expected, fix="shorten it")
    taken = [len(prompt) if model.config.kind == "causal" else 1 for prompt in prompts]
    return [min(max_new_tokens, limit - read + 1) for read in taken]  # the last token is written, but not read


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: list[list[int]],
    *,
    max_new_tokens: int = GENERATE_MAX_NEW_TOKENS,
    sampling: Sampling = DEFAULT_SAMPLING,
    stop: frozenset[int] = frozenset(),
    with_stop: bool = False,
    seed: int = 0,
    compiled: bool = False,
) -> Iterator[list[int | None]]:
    """Yield the next token of every prompt, step by step, None for a row that has ended.

    A row ends at a stop token, which is yielded only if `with_stop`, after max_new_tokens, or when the positions of the
    model are used up. When half of the rows have ended, only the others are continued, unless the cache is static.
    Row b draws with seed + b, so that its text is the same alone with that seed. The global RNG is not touched.

    compiled  the model's blocks were compiled by `compile_decoding`. Batches over FEW_ROWS are written eagerly

    Compiled and on CUDA the cache is static, and doubles when it is full: a token attends to its empty slots too.
    Elsewhere a token attends to the columns that are there. The host waits for the device once a token.

    >>> list(generate(model, [[1, 2], [3]], max_new_tokens=2, sampling=Sampling(temperature=0)))   # doctest: +SKIP
    [[17, 4], [17, None]]
    """
    if model.config.kind == "masked":
        raise ModelError(f"{model.config.model_type} reads in both directions, and writes no text")
    limits = count_new_tokens(model, prompts, max_new_tokens)
    read = max(map(len, prompts)) if model.config.kind == "causal" else 1
    training, first = model.training, next(model.parameters())
    model.eval()
    device = first.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else first.dtype
    generators = [torch.Generator(first.device).manual_seed(seed + row) for row in range(len(prompts))]
    seen = None
    if sampling.repetition_penalty != 1.0:
        seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=first.device)
        for row, prompt in zip(seen, prompts, strict=True):
            row[prompt if model.config.kind == "causal" else []] = True
    compiled = compiled and len(prompts) <= FEW_ROWS and model.config.kind == "causal"
    decode: Decode = decode_one_token if compiled else decode_eagerly
    static = compiled or device == "cuda"
    # Autocast keeps copies of weights that a graph would outlive; some products of experts wait for the device.
    captured = device == "cuda" and not autocast and not family_of(model.config).experts(model.config)
    slots = static_slots(read) if static else read + max(limits) - 1
    next_token, live, ended = decode, list(range(len(prompts))), [False] * len(prompts)
    try:
        cache, logits = prefill(model, prompts, slots, dtype)
        for step in range(max(limits)):
            if seen is not None:
                logits = apply_repetition_penalty(logits, seen, sampling.repetition_penalty)
            drawn = sample(logits, sampling, [generators[row] for row in live])
            tokens = drawn.tolist()
            if -1 in tokens:
                raise ModelError("the model's logits are not finite", fix="use another --precision")
            found = dict(zip(live, tokens, strict=True))
            before = [done or step >= limit for done, limit in zip(ended, limits, strict=True)]
            ended = [done or found[row] in stop for row, done in enumerate(before)]
            hidden = before if with_stop else ended
            if not all(hidden):
                yield [None if is_hidden else found[row] for row, is_hidden in enumerate(hidden)]
            if all(ended) or step + 1 == max(limits):
                break
            if seen is not None:
                seen.scatter_(1, drawn[:, None], True)
            if not static and 2 * (len(ended) - sum(ended)) <= len(live):
                kept = torch.tensor([i for i, row in enumerate(live) if not ended[row]], device=first.device)
                cache.select(kept)
                drawn, seen, live = drawn[kept], None if seen is None else seen[kept], [live[i] for i in kept.tolist()]
            if static and (step == 0 or read + step == slots):
                slots = static_slots(read + step + 1)
                cache.resize(slots)
                next_token = capture(decode, model, drawn, cache) if captured else decode
            logits = next_token(model, drawn, cache)
    finally:
        model.train(training)


def static_slots(columns: int) -> int:
    """Return how many slots a static cache of so many columns has.

    >>> static_slots(100), static_slots(256), static_slots(257)
    (256, 256, 512)
    """
    return max(STATIC_SLOTS, 2 ** math.ceil(math.log2(columns)))


def stream(model: nn.Module, prompt: list[int], **options) -> Iterator[int]:
    """Yield the tokens that `generate` writes after one prompt."""
    return (token for [token] in generate(model, [prompt], **options))


def compile_decoding(model: nn.Module) -> None:
    """Compile the modules that decode a token: on a CPU, weights are then read at twice the speed."""
    torch._dynamo.config.recompile_limit = MOST_PROGRAMS
    for module in model.modules():
        if type(module) is nn.Linear:
            swap_class(module, FewRows)
    for part in (*model.blocks, model.to_logits):
        part.compile(fullgraph=True, dynamic=False)


# ---- text -----------------------------------------------------------------------------------------------------------


def decode_until_stop(
    tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterable[int], stop: Sequence[str] = ()
) -> Iterator[str]:
    """Yield the text that the tokens add to a prompt, piece by piece, up to the first stop string.

    Text that may be the beginning of a stop string is held back until the next tokens decide.
    """
    held = ""
    for piece in decode_incrementally(tokenizer, prompt, tokens):
        held += piece
        found = [start for word in stop if (start := held.find(word)) >= 0]
        if found:
            held = held[: min(found)]
            break
        prefixes = (word[:n] for word in stop for n in range(1, min(len(word), len(held) + 1)))
        undecided = max((len(prefix) for prefix in prefixes if held.endswith(prefix)), default=0)
        ready, held = held[: len(held) - undecided], held[len(held) - undecided :]
        if ready:
            yield ready
    if held:
        yield held


def decode_incrementally(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """Yield the text of the tokens after a prompt, in pieces of whole characters.

    New tokens are decoded together with earlier ones, which may decide whether the text begins with a space. Bytes that
    never become a character are yielded as U+FFFD. Half a character at the end is dropped.
    """
    before, new = list(prompt[-CONTEXT_TOKENS:]), []
    for token in tokens:
        new.append(token)
        known, text = tokenizer.decode(before), tokenizer.decode(before + new)
        if not text.endswith("\ufffd") or len(new) >= MAX_INCOMPLETE_TOKENS:
            yield text[len(known) :]
            before, new = new, []
    if new:
        yield tokenizer.decode(before + new)[len(tokenizer.decode(before)) :].rstrip("\ufffd")
