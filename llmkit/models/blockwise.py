"""Compute attention on a CPU as matrix products, a block of queries at a time, as an operator of torch.

torch.compile calls the operator and does not look into it, so that compiling takes the same time for rows of any
length. The scores are computed again in the backward pass, as in FlashAttention (Dao et al. 2022, arXiv:2205.14135),
and keys that no query of a block may see are skipped.

Shapes: N rows times key heads, in C blocks of n queries of G query heads that share a key head, S keys, D channels.
"""

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, library
from torch.utils.flop_counter import register_flop_formula

QUERY_BLOCK = 128  # largest number of queries whose scores are in memory at a time

# ---- what is fused between the matrix products ----------------------------------------------------------------------


def masked(scores: Tensor, mask: Tensor | None, groups: int, causal: bool, window: int | None, shift: int) -> Tensor:
    """Return fp32 scores (N, n * G, keys) of a block, with -inf where a query may not see a key.

    mask   (rows or 1, key heads or 1, n, G or 1, keys), see `attend`; None: by `causal` and `window`
    shift  the column of the block's first query minus that of its first key
    """
    scores = scores.float().unflatten(1, (-1, groups))  # (N, n, G, keys)
    if mask is not None:
        rows = by_row(scores, mask)
        rows = rows.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else rows + mask
        return rows.flatten(0, 1).flatten(1, 2)
    if causal:
        queries = torch.arange(scores.shape[1], device=scores.device)[:, None, None] + shift
        keys = torch.arange(scores.shape[3], device=scores.device)
        seen = keys <= queries if window is None else (keys <= queries) & (keys > queries - window)
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores.flatten(1, 2)


def by_row(scores: Tensor, mask: Tensor) -> Tensor:
    """Return scores (N, ...) as (rows, key heads, ...), or as (N, 1, ...), which broadcasts with the mask."""
    return scores.unflatten(0, (mask.shape[0], -1) if mask.shape[0] > 1 else (-1, mask.shape[1]))


def block_softmax(scores: Tensor, *mask) -> tuple[Tensor, Tensor]:
    """Return the softmax of a block's scores in their dtype, and its fp32 log-sum-exp (N, n * G)."""
    shown = masked(scores, *mask)
    highest = shown.amax(-1, keepdim=True)
    weights = (shown - highest).exp()
    total = weights.sum(-1, keepdim=True)
    return (weights / total).to(scores.dtype), (highest + total.log()).squeeze(-1)


def block_gradients(
    scores: Tensor, d_weights: Tensor, lse: Tensor, out: Tensor, d_out: Tensor, *mask
) -> tuple[Tensor, Tensor]:
    """Return the softmax of a block's scores again, and the gradient of the scores, in their dtype."""
    weights = (masked(scores, *mask) - lse[..., None]).exp()
    delta = (out.float() * d_out.float()).sum(-1, keepdim=True)  # the sum of each weight times its gradient
    return weights.to(scores.dtype), (weights * (d_weights.float() - delta)).to(scores.dtype)


@functools.cache
def fused(function: Callable) -> Callable:
    """Return a function compiled for blocks of all sizes. It is compiled anew for another kind of mask."""
    return torch.compile(function, dynamic=True)


# ---- the operator ---------------------------------------------------------------------------------------------------


def keys_by_block(
    blocks: int, queries: int, keys: int, causal: bool, window: int | None
) -> Iterator[tuple[int, slice]]:
    """Yield the number of each block, and the keys that one of its queries may see.

    The last comes first: what is compiled for a block that is not square then fits all others too.
    """
    for i in reversed(range(blocks)):
        first = max(0, i * queries - window + 1) if causal and window else 0
        yield i, slice(first, min(keys, (i + 1) * queries) if causal else keys)


@library.custom_op("llmkit::block_attention", mutates_args=())
def block_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, groups: int, causal: bool, window: int | None, compiled: bool
) -> tuple[Tensor, Tensor]:
    """Return the attention of scaled queries q (C, N, n * G, D) over k, v (N, S, D), and its log-sum-exp.

    mask      (rows or 1, key heads or 1, C, n, G or 1, S), see `masked`
    groups    G
    causal    queries and keys are the same tokens, and none sees a later one
    compiled  whether the steps between the matrix products are compiled
    """
    softmax = fused(block_softmax) if compiled else block_softmax
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    size = q.shape[2] // groups
    for i, keys in keys_by_block(len(q), size, k.shape[1], causal, window):
        part, shift = None if mask is None else mask[:, :, i, :, :, keys], i * size - keys.start
        scores = q[i] @ k[:, keys].mT
        weights, lse[i] = softmax(scores, part, groups, causal, window, shift)
        torch.bmm(weights, v[:, keys], out=out[i])
    return out, lse


@library.custom_op("llmkit::block_attention_backward", mutates_args=())
def block_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    groups: int,
    causal: bool,
    window: int | None,
    compiled: bool,
    learns_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and of a mask that is added to the scores; that one is empty if not learnt."""
    gradients = fused(block_gradients) if compiled else block_gradients
    d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    d_mask = torch.zeros_like(mask) if learns_mask else q.new_empty(0)
    size = q.shape[2] // groups
    for i, keys in keys_by_block(len(q), size, k.shape[1], causal, window):
        part, shift = None if mask is None else mask[:, :, i, :, :, keys], i * size - keys.start
        seen_k = k[:, keys].contiguous()
        scores, d_weights = q[i] @ seen_k.mT, d_out[i] @ v[:, keys].mT
        options = (part, groups, causal, window, shift)
        weights, d_scores = gradients(scores, d_weights, lse[i], out[i], d_out[i], *options)
        torch.bmm(d_scores, seen_k, out=d_q[i])
        d_k[:, keys] += d_scores.mT @ q[i]
        d_v[:, keys] += weights.mT @ d_out[i]
        if learns_mask:
            d_rows = by_row(d_scores.float().unflatten(1, (size, groups)), mask)
            d_mask[:, :, i, :, :, keys] = d_rows.sum_to_size(part.shape)
    return d_q, d_k, d_v, d_mask


@block_attention.register_fake
def _(q, k, v, mask, groups, causal, window, compiled):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@block_attention_backward.register_fake
def _(d_out, q, k, v, mask, out, lse, groups, causal, window, compiled, learns_mask):
    d_mask = torch.empty_like(mask) if learns_mask else q.new_empty(0)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), d_mask


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.groups, ctx.causal, ctx.window, ctx.compiled = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, d_out: Tensor, _: Tensor):
    learns_mask = ctx.needs_input_grad[3]
    options = (ctx.groups, ctx.causal, ctx.window, ctx.compiled, learns_mask)
    d_q, d_k, d_v, d_mask = block_attention_backward(d_out.contiguous(), *ctx.saved_tensors, *options)
    return d_q, d_k, d_v, d_mask if learns_mask else None, None, None, None, None


block_attention.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.llmkit.block_attention)
def _flops(q, k, *args, out_shape=None, **kwargs) -> int:
    """Count the products, so that torch.compile does not take the operator for one that is cheap to repeat."""
    return 4 * math.prod(q) * k[1]
