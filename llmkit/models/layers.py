"""The parts that several families share. Shapes: B rows, T tokens, H heads, D channels a head, V vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmkit.types import IGNORE_INDEX

CHUNK_BYTES = 32 * 2**20  # fp32 logits that the loss holds at a time: small enough for memory, large enough for speed


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in fp32 (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


# ---- positions ------------------------------------------------------------------------------------------------------


def rope_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, fp32, (..., T, D); computed once a forward, shared by the blocks.

    Angles are position * theta^(-2i/D), i < D/2, written twice side by side: Hugging Face's layout of the
    rotary embedding (Su et al. 2021, arXiv:2104.09864), in which channel i turns together with channel i + D/2.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.float()[..., None] / theta**exponents  # (..., T, D/2)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs of x (B, H, T, D) by their position's angle."""
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)


# ---- attention ------------------------------------------------------------------------------------------------------


class KVCache:
    """Keys and values of the tokens seen so far, at a fixed capacity: (layers, B, kv heads, capacity, D) each."""

    def __init__(self, layers: int, batch: int, kv_heads: int, capacity: int, head_dim: int, *, device, dtype):
        self.keys = torch.zeros(layers, batch, kv_heads, capacity, head_dim, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.length = 0  # tokens in the cache; the model's forward moves it once all blocks have written

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, kv heads, T, D) of one block; returns all that block has seen."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


def attention_mask(segments: Tensor | None, length: int, past: int, device: torch.device) -> Tensor | None:
    """What may be attended: True where query t may see key s; None stands for plain causal attention.

    segments  (B, T) numbers of documents that must not see each other, or None
    past      tokens in the cache before the `length` new ones
    """
    if segments is None and (past == 0 or length == 1):
        return None
    rows = torch.arange(past, past + length, device=device)
    mask = torch.arange(past + length, device=device) <= rows[:, None]  # (T, S)
    if segments is not None:
        mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])  # (B, 1, T, S)
    return mask


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Causal attention of q (B, H, T, D) over k, v (B, kv heads, S, D), heads joined again: (B, T, H * D).

    Compiled for a CPU it is products of query blocks, which beat SDPA there by a fifth at T 256; SDPA elsewhere.
    """
    if q.device.type == "cpu" and torch.compiler.is_compiling() and not dropout and q.shape[2] == k.shape[2]:
        blocked = recomputed(blocked_attention) if q.shape[2] >= RECOMPUTE_FROM else blocked_attention
        return blocked(q, k, v, mask).transpose(1, 2).flatten(2)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None and q.shape[2] > 1,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2).flatten(2)


QUERY_BLOCK = 128  # queries whose scores stand in memory at a time
RECOMPUTE_FROM = 512  # tokens from which the backward makes the scores again: they weigh more than their product costs


def recomputed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, whose inside is made again in the backward instead of kept (Chen et al. 2016, arXiv:1604.06174)."""

    def again(*args):  # no functools.partial: torch.compile would not look into it
        return checkpoint(function, *args, use_reentrant=False)

    return again


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Causal attention as plain products, a block of queries at a time, each over the keys that it may see.

    q (B, H, T, D) over k, v (B, kv heads, T, D); the query heads that share a key head are rows of one product.
    """
    heads, length, channels = q.shape[1:]
    q = q.unflatten(1, (k.shape[1], heads // k.shape[1])) * channels**-0.5  # (B, kv heads, group, T, D)
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        seen = causal(start, stop, q.device) if mask is None else mask[..., None, start:stop, :stop]
        scores = grouped(q[:, :, :, start:stop], k[:, :, :stop].mT)  # (B, kv heads, group, block, stop)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1, dtype=torch.float32).to(v.dtype)
        blocks.append(grouped(weights, v[:, :, :stop]))
    return torch.cat(blocks, dim=3).flatten(1, 2)


def grouped(a: Tensor, b: Tensor) -> Tensor:
    """a (B, K, G, n, x) @ b (B, K, x, y) -> (B, K, G, n, y), the G heads of a group as rows of one product."""
    return (a.flatten(2, 3) @ b).unflatten(2, a.shape[2:4])


def causal(start: int, stop: int, device: torch.device) -> Tensor:
    """Which of the keys [0, stop) the queries [start, stop) may see."""
    return torch.arange(stop, device=device) <= torch.arange(start, stop, device=device)[:, None]


# ---- the loss -------------------------------------------------------------------------------------------------------


class ChunkLoss(nn.Module):
    """Losses of a chunk's tokens and what they send back; a module, so that it is compiled as the blocks are."""

    def forward(self, logits: Tensor, labels: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 losses (n,) and d loss / d logits (n, V) = (softmax(logits) - onehot(label)) * upstream.

        logits (n, V), labels (n,), upstream a scalar or (n, 1); IGNORE_INDEX has no loss and no gradient.
        """
        wide = logits.float()
        valid, target = (labels != IGNORE_INDEX)[:, None], labels.clamp(min=0)[:, None]
        log_sum = wide.logsumexp(-1, keepdim=True)
        losses = torch.where(valid, log_sum - wide.gather(1, target), 0.0)[:, 0]
        onehot = torch.arange(logits.shape[1], device=logits.device) == target
        d_logits = torch.where(valid, ((wide - log_sum).exp() - onehot.float()) * upstream, 0.0)
        return losses, d_logits.to(logits.dtype)


class LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `hidden @ weight.T` against labels, chunk by chunk, so that (N, V) logits never exist.

    For a summed loss the gradient needs no knowledge of what comes later but a scalar, so it is made in the forward
    and only scaled in the backward; for losses per token the backward makes the chunks' logits again.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str, chunk: int, chunk_loss: ChunkLoss
    ) -> Tensor:
        ctx.reduction, ctx.chunk, ctx.chunk_loss, ctx.dtype = reduction, chunk, chunk_loss, weight.dtype
        wants_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        if wants_grad and reduction == "sum":
            one = hidden.new_ones((), dtype=torch.float32)
            losses, *gradients = in_chunks(ctx, hidden, weight, labels, one)
            ctx.save_for_backward(*gradients)
            return losses.sum()
        if wants_grad:
            ctx.save_for_backward(hidden, weight, labels)
        losses = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = (hidden[rows] @ weight.T).float()  # (chunk, V)
            losses[rows] = F.cross_entropy(logits, labels[rows], reduction="none", ignore_index=IGNORE_INDEX)
        return losses.sum() if reduction == "sum" else losses

    @staticmethod
    def backward(ctx, upstream: Tensor):
        if ctx.reduction == "sum":
            d_hidden, d_weight = (None if d is None else d * upstream for d in ctx.saved_tensors)
        else:
            _, d_hidden, d_weight = in_chunks(ctx, *ctx.saved_tensors, upstream[:, None])
        return d_hidden, None if d_weight is None else d_weight.to(ctx.dtype), None, None, None, None


def in_chunks(
    ctx, hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Losses (N,), d_hidden (N, h) and d_weight (V, h), fp32; None where autograd does not ask."""
    losses = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
    d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
    d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
    for start in range(0, len(hidden), ctx.chunk):
        rows = slice(start, start + ctx.chunk)
        part = upstream[rows] if upstream.dim() else upstream
        losses[rows], d_logits = ctx.chunk_loss(hidden[rows] @ weight.T, labels[rows], part)
        if d_hidden is not None:
            d_hidden[rows] = d_logits @ weight
        if d_weight is not None:
            d_weight += d_logits.T @ hidden[rows]
    return losses, d_hidden, d_weight


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    reduction: str = "sum",
    chunk: int | None = None,
    chunk_loss: ChunkLoss | None = None,
) -> Tensor:
    """Losses of the tokens that `labels` names, without ever holding all logits.

    hidden      (..., h), the last block's normed output
    weight      (V, h), the head
    labels      (...), token ids already aligned with hidden, IGNORE_INDEX where there is no target (loss 0)
    reduction   "sum": a scalar; "none": fp32 losses of labels' shape
    chunk       rows of logits at a time, at most; None: CHUNK_BYTES of them
    chunk_loss  a compiled one, if there is any
    Equals F.cross_entropy(hidden @ weight.T, labels) with its gradients (a test), at the memory of one chunk.
    """
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()  # nobody will ask for gradients: make none
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    rows = max(1, labels.numel())
    chunk = chunk or max(128, CHUNK_BYTES // (4 * weight.shape[0]))
    chunk = math.ceil(rows / math.ceil(rows / chunk))  # of one size, so that they share a program
    losses = LinearCrossEntropy.apply(
        hidden.flatten(0, -2), weight, labels.flatten(), reduction, chunk, chunk_loss or ChunkLoss()
    )
    return losses if reduction == "sum" else losses.view(labels.shape)


def head(hidden: Tensor, weight: Tensor, labels: Tensor | None, reduction: str, chunk_loss: ChunkLoss) -> Tensor:
    """What a language model returns: logits (B, T, V) without labels, losses with them."""
    if labels is None:
        return F.linear(hidden, weight)
    return linear_cross_entropy(hidden, weight, labels, reduction, chunk_loss=chunk_loss)


# ---- initialisation -------------------------------------------------------------------------------------------------


@torch.no_grad()
def init_weights(
    model: nn.Module, scheme: str, std: float, residual: Iterable[str], depth: int, generator: torch.Generator
) -> None:
    """Fill every parameter of a fresh model; the one place where weights begin.

    scheme    normal  matrices ~ N(0, std^2) (GPT-2, Radford et al. 2019)
              xavier  matrices ~ N(0, 2 / (fan_in + fan_out)) (Glorot and Bengio 2010)
              he      matrices ~ N(0, 2 / fan_in) (He et al. 2015, arXiv:1502.01852)
    residual  names of the linears that write into the residual stream: scaled by 1 / sqrt(2 * depth), so that the
              stream's variance does not grow with depth (GPT-2; each block writes twice)
    Embeddings are N(0, std^2) in every scheme, norm weights 1, biases 0.
    """
    for name, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            if kind == "bias":
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                fan_out, fan_in = parameter.shape
                spread = {"normal": std, "xavier": math.sqrt(2 / (fan_in + fan_out)), "he": math.sqrt(2 / fan_in)}
                sigma = std if isinstance(module, nn.Embedding) else spread[scheme]
                if name.rsplit(".", 1)[-1] in residual:
                    sigma /= math.sqrt(2 * depth)
                parameter.normal_(0.0, sigma, generator=generator)
