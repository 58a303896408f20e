"""Text from a model: prefill the prompt, then one token at a time from the cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from llmkit.errors import DATA, UserError
from llmkit.models.layers import KVCache


def logits_to_probs(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0) -> Tensor:
    """Next-token probabilities (V,) of logits (V,).

    temperature  divides the logits
    top_k        only the k likeliest tokens
    top_p        only the likeliest tokens that together reach this probability (Holtzman et al. 2019, 1904.09751)
    """
    logits = logits.float() / temperature
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    probs = torch.softmax(logits, dim=-1)
    if top_p < 1.0:
        ordered, order = probs.sort(descending=True)
        outside = ordered.cumsum(0) - ordered >= top_p  # the token that crosses the line stays in
        outside[0] = False
        probs[order[outside]] = 0.0
        probs = probs / probs.sum()
    return probs


def sample(logits: Tensor, generator: torch.Generator, temperature: float, top_k: int | None, top_p: float) -> int:
    """One token id; temperature 0 takes the likeliest."""
    if temperature == 0:
        return int(logits.argmax())
    probs = logits_to_probs(logits, temperature, top_k, top_p)
    return int(torch.multinomial(probs, 1, generator=generator))


def prefill(model: nn.Module, prompt: Tensor, cache: KVCache) -> Tensor:
    """Run the prompt (1, T) through the model; logits (V,) of the token after it."""
    return model(prompt, cache=cache)[0, -1]


def decode_one_token(model: nn.Module, token: int, cache: KVCache, device: torch.device) -> Tensor:
    """Run one more token; logits (V,) of the token after it."""
    return model(torch.tensor([[token]], device=device), cache=cache)[0, -1]


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt: list[int],
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float = 1.0,
    stop: frozenset[int] = frozenset(),
    seed: int = 0,
) -> Iterator[int]:
    """Token ids after the prompt, as they are drawn; ends at a stop token, or where the positions end.

    The same seed gives the same text. The model's global RNG is not touched. UserError for a prompt that leaves no
    position to write at.
    """
    training, config = model.training, model.config
    if len(prompt) >= config.max_position_embeddings:
        raise UserError(
            "the prompt fills all of the model's positions", got=f"{len(prompt)} tokens",
            expected=f"at most {config.max_position_embeddings - 1}", fix="shorten it", code=DATA,
        )  # fmt: skip
    model.eval()
    first = next(model.parameters())
    generator = torch.Generator(first.device).manual_seed(seed)
    capacity = min(config.max_position_embeddings, len(prompt) + max_new_tokens)
    dtype = torch.get_autocast_dtype(first.device.type) if torch.is_autocast_enabled(first.device.type) else first.dtype
    cache = KVCache(
        config.num_hidden_layers, 1, config.num_key_value_heads, capacity, config.head_dim,
        device=first.device, dtype=dtype,
    )  # fmt: skip
    logits = prefill(model, torch.tensor([prompt], device=first.device), cache)
    for _ in range(max_new_tokens):
        token = sample(logits, generator, temperature, top_k, top_p)
        if token in stop:
            break
        yield token
        if cache.length == capacity:
            break
        logits = decode_one_token(model, token, cache, first.device)
    model.train(training)
