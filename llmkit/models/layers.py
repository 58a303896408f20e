"""The parts that several families share. Shapes: B rows, T tokens, H heads, D channels a head, V vocabulary."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
        return blocked_attention(q, k, v, mask).transpose(1, 2).flatten(2)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None and q.shape[2] > 1,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2).flatten(2)


QUERY_BLOCK = 128  # queries whose scores stand in memory at a time
RECOMPUTE_FROM = 512  # tokens from which the backward makes the scores again: they weigh more than their product costs


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Causal attention as plain products, a block of queries at a time, each over the keys that it may see.

    q (B, H, T, D) over k, v (B, kv heads, T, D); the query heads that share a key head are rows of one product.
    """
    heads, length, channels = q.shape[1:]
    q = q.unflatten(1, (k.shape[1], heads // k.shape[1])) * channels**-0.5  # (B, kv heads, group, T, D)
    if mask is None and length >= RECOMPUTE_FROM and length % QUERY_BLOCK == 0:
        return RecomputedAttention.apply(q, k, v).flatten(1, 2)
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


class RecomputedAttention(torch.autograd.Function):
    """`blocked_attention` that keeps no scores: the backward makes them again from the row sums (Dao et al. 2022)."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs, sums = [], []
        for start in range(0, q.shape[3], QUERY_BLOCK):
            stop = start + QUERY_BLOCK
            scores = grouped(q[:, :, :, start:stop], k[:, :, :stop].mT).float()
            scores = scores.masked_fill(~causal(start, stop, q.device), -torch.inf)
            log_sum = scores.logsumexp(-1, keepdim=True)
            outs.append(grouped((scores - log_sum).exp().to(v.dtype), v[:, :, :stop]))
            sums.append(log_sum)
        out, log_sums = torch.cat(outs, dim=3), torch.cat(sums, dim=3)
        ctx.save_for_backward(q, k, v, out, log_sums)
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor):
        q, k, v, out, log_sums = ctx.saved_tensors
        length = q.shape[3]
        drift = (d_out.float() * out.float()).sum(-1, keepdim=True)  # sum over keys of weight * d_weight
        d_q, d_k, d_v = [], torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        for start in range(0, length, QUERY_BLOCK):
            stop = start + QUERY_BLOCK
            rows, keys, values = slice(start, stop), k[:, :, :stop], v[:, :, :stop]
            queries, d_rows = q[:, :, :, rows], d_out[:, :, :, rows]
            scores = grouped(queries, keys.mT).float().masked_fill(~causal(start, stop, q.device), -torch.inf)
            weights = (scores - log_sums[:, :, :, rows]).exp()
            d_weights = grouped(d_rows, values.mT).float()
            d_scores = (weights * (d_weights - drift[:, :, :, rows])).to(q.dtype)
            d_q.append(grouped(d_scores, keys))
            rest = (0, 0, 0, length - stop)  # later keys get nothing from this block
            d_k = d_k + F.pad(d_scores.flatten(2, 3).mT @ queries.flatten(2, 3), rest)
            d_v = d_v + F.pad(weights.to(v.dtype).flatten(2, 3).mT @ d_rows.flatten(2, 3), rest)
        return torch.cat(d_q, dim=3), d_k.to(k.dtype), d_v.to(v.dtype)


# ---- the loss -------------------------------------------------------------------------------------------------------


class LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `hidden @ weight.T` against labels, chunk by chunk, so that (N, V) logits never exist.

    For a summed loss the gradient needs no knowledge of what comes later but a scalar, so it is made in the forward
    and only scaled in the backward; for losses per token the backward makes the chunks' logits again.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str, chunk: int) -> Tensor:
        ctx.reduction, ctx.chunk = reduction, chunk
        wants_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        now = wants_grad and reduction == "sum"
        losses = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if now and ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if now and ctx.needs_input_grad[1] else None
        scale = hidden.new_ones((), dtype=torch.float32)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = (hidden[rows] @ weight.T).float()  # (chunk, V)
            losses[rows] = F.cross_entropy(logits, labels[rows], reduction="none", ignore_index=IGNORE_INDEX)
            if now:
                chunk_backward(logits, hidden, weight, labels, rows, scale, d_hidden, d_weight)
        if now:
            ctx.save_for_backward(d_hidden, d_weight)
            ctx.weight_dtype = weight.dtype
        elif wants_grad:
            ctx.save_for_backward(hidden, weight, labels)
        return losses.sum() if reduction == "sum" else losses

    @staticmethod
    def backward(ctx, upstream: Tensor):
        if ctx.reduction == "sum":
            d_hidden, d_weight = ctx.saved_tensors
            if d_hidden is not None:
                d_hidden = d_hidden * upstream.to(d_hidden.dtype)
            if d_weight is not None:
                d_weight = d_weight.mul_(upstream).to(ctx.weight_dtype)
            return d_hidden, d_weight, None, None, None
        hidden, weight, labels = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            logits = (hidden[rows] @ weight.T).float()
            chunk_backward(logits, hidden, weight, labels, rows, upstream[rows, None], d_hidden, d_weight)
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None


def chunk_backward(logits, hidden, weight, labels, rows, scale, d_hidden, d_weight) -> None:
    """Add one chunk's gradients: d loss / d logits = softmax(logits) - onehot(label), nothing for ignored labels."""
    target = labels[rows]
    valid = (target != IGNORE_INDEX)[:, None]
    d_logits = torch.softmax(logits, dim=-1)
    d_logits.scatter_add_(1, target.clamp(min=0)[:, None], -valid.float())
    d_logits = torch.where(valid, d_logits * scale, 0.0).to(hidden.dtype)
    if d_hidden is not None:
        d_hidden[rows] = d_logits @ weight
    if d_weight is not None:
        d_weight += d_logits.T @ hidden[rows]


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str = "sum", chunk: int | None = None
) -> Tensor:
    """Losses of the tokens that `labels` names, without ever holding all logits.

    hidden     (..., h), the last block's normed output
    weight     (V, h), the head
    labels     (...), token ids already aligned with hidden, IGNORE_INDEX where there is no target (loss 0)
    reduction  "sum": a scalar; "none": fp32 losses of labels' shape
    Equals F.cross_entropy(hidden @ weight.T, labels) with its gradients (a test), at the memory of one chunk.
    """
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()  # nobody will ask for gradients: make none
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    chunk = chunk or max(128, CHUNK_BYTES // (4 * weight.shape[0]))
    losses = LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, labels.flatten(), reduction, chunk)
    return losses if reduction == "sum" else losses.view(labels.shape)


def head(hidden: Tensor, weight: Tensor, labels: Tensor | None, reduction: str) -> Tensor:
    """What a language model returns: logits (B, T, V) without labels, losses with them."""
    return F.linear(hidden, weight) if labels is None else linear_cross_entropy(hidden, weight, labels, reduction)


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
