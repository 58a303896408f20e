"""Compute the cross-entropy of a head in chunks of logits. Shapes: N tokens, h channels, V vocabulary."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.models.layers import linear
from llmkit.types import IGNORE_INDEX

CHUNK_BYTES = 32 * 2**20  # of fp32 logits in memory at a time; larger chunks are hardly faster


class Logits(nn.Module):
    """Compute hidden @ weight.T + bias. A module, so that decoding can compile it."""

    def forward(self, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(hidden, weight, bias)


class ChunkLoss(nn.Module):
    """Compute the losses of a chunk and their gradients. A module, so that it is compiled like the blocks."""

    def forward(self, logits: Tensor, labels: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
        """Return fp32 losses (n,) and d loss / d logits (n, V) = (softmax(logits) - onehot(label)) * upstream.

        logits (n, V), labels (n,), upstream a scalar or (n, 1). The label IGNORE_INDEX has no loss and no gradient.
        """
        scores = logits.float()
        valid, target = (labels != IGNORE_INDEX)[:, None], labels.clamp(min=0)[:, None]
        log_sum = scores.logsumexp(-1, keepdim=True)
        losses = torch.where(valid, log_sum - scores.gather(1, target), 0.0)[:, 0]
        onehot = torch.arange(logits.shape[1], device=logits.device) == target
        d_logits = torch.where(valid, ((scores - log_sum).exp() - onehot.float()) * upstream, 0.0)
        return losses, d_logits.to(logits.dtype)


class LinearCrossEntropy(torch.autograd.Function):
    """Compute the cross-entropy of `hidden @ weight.T + bias` in chunks, so that logits (N, V) are never in memory.

    The gradient of a summed loss is known up to a scalar: the forward pass computes it and the backward pass scales it.
    For losses per token, the backward pass recomputes the logits of each chunk.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        reduction: str,
        chunk: int,
        chunk_loss: ChunkLoss,
    ) -> Tensor:
        ctx.reduction, ctx.chunk, ctx.chunk_loss, ctx.dtype = reduction, chunk, chunk_loss, weight.dtype
        wants_grad = any(ctx.needs_input_grad[:3])
        if wants_grad and reduction == "sum":
            one = hidden.new_ones((), dtype=torch.float32)
            losses, *gradients = losses_and_gradients(ctx, hidden, weight, bias, labels, one)
            ctx.save_for_backward(*gradients)
            return losses.sum()
        if wants_grad:
            ctx.save_for_backward(hidden, weight, bias, labels)
        losses = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = F.linear(hidden[rows], weight, bias).float()  # (chunk, V)
            losses[rows] = F.cross_entropy(logits, labels[rows], reduction="none", ignore_index=IGNORE_INDEX)
        return losses.sum() if reduction == "sum" else losses

    @staticmethod
    def backward(ctx, upstream: Tensor):
        if ctx.reduction == "sum":
            d_hidden, d_weight, d_bias = (None if d is None else d * upstream for d in ctx.saved_tensors)
        else:
            _, d_hidden, d_weight, d_bias = losses_and_gradients(ctx, *ctx.saved_tensors, upstream[:, None])
        d_weight, d_bias = (None if d is None else d.to(ctx.dtype) for d in (d_weight, d_bias))
        return d_hidden, d_weight, d_bias, None, None, None, None


def losses_and_gradients(
    ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return losses (N,), d_hidden (N, h), d_weight (V, h) and d_bias (V,); a gradient is None if not needed."""
    losses = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
    d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
    d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
    d_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
    for start in range(0, len(hidden), ctx.chunk):
        rows = slice(start, start + ctx.chunk)
        part = upstream[rows] if upstream.dim() else upstream
        losses[rows], d_logits = ctx.chunk_loss(F.linear(hidden[rows], weight, bias), labels[rows], part)
        if d_hidden is not None:
            d_hidden[rows] = d_logits @ weight
        if d_weight is not None:
            d_weight += d_logits.T @ hidden[rows]
        if d_bias is not None:
            d_bias += d_logits.sum(0, dtype=torch.float32)
    return losses, d_hidden, d_weight, d_bias


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    reduction: str = "sum",
    chunk: int | None = None,
    chunk_loss: ChunkLoss | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return the cross-entropy of the labels, with one chunk of logits in memory.

    hidden      (..., h), the normed output of the last block
    weight      (V, h), the head
    labels      (...), token ids aligned with hidden; IGNORE_INDEX: no target, the loss is 0
    reduction   "sum": a scalar; "none": fp32 losses in the shape of labels
    chunk       largest number of rows of logits at a time; None: CHUNK_BYTES of them
    chunk_loss  of the model, which may be compiled
    bias        (V,), of the head
    Values and gradients are those of F.cross_entropy(hidden @ weight.T + bias, labels).
    """
    if not torch.is_grad_enabled():
        # ctx.needs_input_grad ignores no_grad, so the forward pass would compute unused gradients.
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    rows = max(1, labels.numel())
    chunk = chunk or max(128, CHUNK_BYTES // (4 * weight.shape[0]))
    chunk = math.ceil(rows / math.ceil(rows / chunk))  # chunks of one size share a compiled program
    losses = LinearCrossEntropy.apply(
        hidden.flatten(0, -2), weight, bias, labels.flatten(), reduction, chunk, chunk_loss or ChunkLoss()
    )
    return losses if reduction == "sum" else losses.view(labels.shape)
