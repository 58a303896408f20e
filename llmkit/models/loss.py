"""Compute the cross-entropy of a head in chunks of logits. Shapes: N tokens, h channels, V vocabulary."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.models.layers import linear
from llmkit.types import IGNORE_INDEX

CHUNK_BYTES = 96 * 2**20  # of fp32 logits at a time on a CPU: with 32 MiB, GPT-2 124M takes 7 % longer a step
GPU_CHUNK_BYTES, GPU_CHUNK_ROWS = 2**30, 4096  # on a GPU: each chunk reads the whole head, which must not be most of it
FEW_TARGETS, MOST_TARGETS = 256, 0.8  # rows of a chunk of targets alone; share of targets up to which they are picked
GPU_MULTIPLE = 64  # of the vocabulary in matrix products on a GPU: others are slower (Karpathy 2023, nanoGPT: 25 %)


class Logits(nn.Module):
    """Compute hidden @ weight.T + bias. A module, so that decoding can compile it."""

    def forward(self, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(hidden, weight, bias)


class ChunkLoss(nn.Module):
    """Compute the losses of a chunk and their gradients. A module, so that it is compiled like the blocks."""

    def forward(self, logits: Tensor, labels: Tensor, upstream: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
        """Return fp32 losses (n,) and d loss / d logits (n, V) = (softmax(logits) - onehot(label)) * upstream.

        logits (n, V), of which the first `vocab` are tokens and the others padding; labels (n,); upstream a scalar or
        (n, 1). The label IGNORE_INDEX has no loss and no gradient.
        """
        scores = logits.float()
        if vocab < logits.shape[1]:
            scores = scores.masked_fill(torch.arange(logits.shape[1], device=logits.device) >= vocab, -torch.inf)
        valid, target = (labels != IGNORE_INDEX)[:, None], labels.clamp(min=0)[:, None]
        log_sum = scores.logsumexp(-1, keepdim=True)
        losses = torch.where(valid, log_sum - scores.gather(1, target), 0.0)[:, 0]
        onehot = torch.arange(logits.shape[1], device=logits.device) == target
        # In place: without a compiler this is two matrices of the logits' size less, and 1.7 times faster.
        d_scores = scores.sub_(log_sum).exp_().sub_(onehot.float()).mul_(upstream)
        return losses, torch.where(valid, d_scores, 0.0).to(logits.dtype)


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
        multiple: int,
    ) -> Tensor:
        ctx.reduction, ctx.chunk, ctx.chunk_loss, ctx.multiple = reduction, chunk, chunk_loss, multiple
        wants_grad = any(ctx.needs_input_grad[:3])
        if wants_grad and reduction == "sum":
            one = hidden.new_ones((), dtype=torch.float32)
            losses, *gradients = losses_and_gradients(ctx, hidden, weight, bias, labels, one)
            ctx.save_for_backward(*gradients)
            return losses.sum()
        if wants_grad:
            ctx.save_for_backward(hidden, weight, bias, labels)
        losses = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
        weight, bias = (None if one is None else one.to(hidden.dtype) for one in (weight, bias))
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = F.linear(hidden[rows], weight, bias).float()  # (chunk, V)
            losses[rows] = F.cross_entropy(logits, labels[rows], reduction="none", ignore_index=IGNORE_INDEX)
        return losses.sum() if reduction == "sum" else losses

    @staticmethod
    def backward(ctx, upstream: Tensor):
        if ctx.reduction == "sum":  # scaled in place: a second backward pass through the same loss raises an error
            gradients = [None if d is None else d.mul_(upstream) for d in ctx.saved_tensors]
        else:
            _, *gradients = losses_and_gradients(ctx, *ctx.saved_tensors, upstream[:, None])
        return *gradients, None, None, None, None, None


def losses_and_gradients(
    ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return losses (N,), d_hidden (N, h), d_weight (V, h) and d_bias (V,); a gradient is None if not needed.

    Products are computed in the dtype of `hidden`, and those that are added up over the chunks are added in fp32: in
    fp16 a sum over thousands of rows may overflow at any loss scale.
    """
    needs, vocab, dtypes = (
        ctx.needs_input_grad,
        len(weight),
        [one if one is None else one.dtype for one in (weight, bias)],
    )
    padding = -vocab % ctx.multiple if weight.dtype != hidden.dtype else 0  # only in a copy that is made anyway
    weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    if padding:
        weight, bias = F.pad(weight, (0, 0, 0, padding)), None if bias is None else F.pad(bias, (0, padding))
    losses = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
    d_hidden = torch.empty_like(hidden) if needs[0] else None
    d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs[1] else None
    d_bias = torch.zeros_like(bias, dtype=torch.float32) if needs[2] else None
    for start in range(0, len(hidden), ctx.chunk):
        rows = slice(start, start + ctx.chunk)
        part = upstream[rows] if upstream.dim() else upstream
        losses[rows], d_logits = ctx.chunk_loss(F.linear(hidden[rows], weight, bias), labels[rows], part, vocab)
        if d_hidden is not None:
            d_hidden[rows] = d_logits @ weight
        if d_weight is not None:
            add_product(d_weight, d_logits.T, hidden[rows])
        if d_bias is not None:
            d_bias += d_logits.sum(0, dtype=torch.float32)
    d_weight, d_bias = (
        None if d is None else d[:vocab].to(dtype) for d, dtype in zip((d_weight, d_bias), dtypes, strict=True)
    )
    return losses, d_hidden, d_weight, d_bias


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to an fp32 matrix; the product is never rounded to fp16."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, out=total)
    elif a.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    elif a.dtype == torch.float16:
        torch.addmm(total, a.float(), b.float(), out=total)
    else:
        total += a @ b


def rows_in_chunk(rows: int, vocab: int, device: torch.device) -> int:
    """Return how many of so many rows have their logits in memory at a time: in chunks of one size, or nearly so.

    >>> rows_in_chunk(8192, 50257, torch.device("cuda")), rows_in_chunk(8192, 128_256, torch.device("cuda"))
    (4096, 2048)
    """
    on_gpu = device.type == "cuda"
    most = (GPU_CHUNK_BYTES if on_gpu else CHUNK_BYTES) // (4 * vocab)
    most = min(most, GPU_CHUNK_ROWS) if on_gpu else most
    return math.ceil(rows / math.ceil(rows / max(128, most)))  # chunks of one size share a compiled program


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    reduction: str = "sum",
    chunk: int | None = None,
    chunk_loss: ChunkLoss | None = None,
    bias: Tensor | None = None,
    multiple: int | None = None,
) -> Tensor:
    """Return the cross-entropy of the labels, with one chunk of logits in memory.

    hidden      (..., h), the normed output of the last block
    weight      (V, h), the head
    labels      (...), token ids aligned with hidden; IGNORE_INDEX: no target, the loss is 0
    reduction   "sum": a scalar; "none": fp32 losses in the shape of labels
    chunk       largest number of rows of logits at a time; None: see `rows_in_chunk`
    chunk_loss  of the model, which may be compiled
    bias        (V,), of the head
    multiple    pad V to a multiple of it in the products of mixed precision; None: GPU_MULTIPLE on a GPU
    Values and gradients are those of F.cross_entropy(hidden @ weight.T + bias, labels).
    """
    if not torch.is_grad_enabled():
        # ctx.needs_input_grad ignores no_grad, so the forward pass would compute unused gradients.
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    multiple = multiple or (GPU_MULTIPLE if hidden.device.type == "cuda" else 1)
    rows = max(1, labels.numel())
    chunk = math.ceil(rows / math.ceil(rows / chunk)) if chunk else rows_in_chunk(rows, len(weight), hidden.device)
    flat, labels_flat = hidden.flatten(0, -2), labels.flatten()
    kept = target_rows(labels_flat)
    if kept is not None:
        chunk, padding = FEW_TARGETS, -len(kept) % FEW_TARGETS  # chunks of one size, however many targets there are
        flat = F.pad(flat.index_select(0, kept), (0, 0, 0, padding))
        labels_flat = F.pad(labels_flat[kept], (0, padding), value=IGNORE_INDEX)
    losses = LinearCrossEntropy.apply(
        flat, weight, bias, labels_flat, reduction, chunk, chunk_loss or ChunkLoss(), multiple
    )
    if reduction == "sum":
        return losses
    if kept is not None:
        losses = losses.new_zeros(labels.numel()).index_copy(0, kept, losses[: len(kept)])
    return losses.view(labels.shape)


def target_rows(labels: Tensor) -> Tensor | None:
    """Return the numbers of the labels that are targets, if the head is to read these rows alone; None: all.

    On a GPU, counting them would wait for the device. Labels of a simulated step have no data.
    """
    if labels.device.type != "cpu" or type(labels) is not Tensor:
        return None
    kept = (labels != IGNORE_INDEX).nonzero()[:, 0]
    return kept if len(kept) + FEW_TARGETS <= len(labels) * MOST_TARGETS else None
