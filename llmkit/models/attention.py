"""Compute attention, its masks and the KV cache. Shapes: B rows, T tokens, S keys, H heads, D channels per head."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkit.models.block_mask import BlockMask, block_masked_attention, make_block_mask
from llmkit.models.blockwise import QUERY_BLOCK, block_attention

Window = int | None  # number of keys that a query may see, including its own; None: all up to its own
Masks = dict[Window, Tensor | BlockMask | None]  # one mask for all layers with the same window, as `attend` takes it


# ---- the cache ------------------------------------------------------------------------------------------------------


class LayerCache:
    """Hold the keys and values of one layer, (B, kv heads, slots, D) each. Column c is in slot c % slots."""

    def __init__(self, shape: tuple[int, int, int, int], device, dtype: torch.dtype):
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.slots = shape[2]
        self.length: int | Tensor = 0  # columns written before this forward pass
        self.cross: tuple[Tensor, Tensor] | None = None  # keys and values of the cross-attention, for T5
        self.slot: Tensor | None = None  # (1,) slot of a single new token, whose query attends to all slots

    def resize(self, slots: int) -> None:
        """Append empty slots. Columns are in their own slots until all are taken, so nothing moves."""
        more = (0, 0, 0, slots - self.slots)
        self.keys, self.values, self.slots = F.pad(self.keys, more), F.pad(self.values, more), slots

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, kv heads, T, D). Return all keys and values that a query may still see."""
        k, v = k.to(self.keys.dtype), v.to(self.values.dtype)
        if self.slot is not None:
            return self.keys.index_copy_(2, self.slot, k), self.values.index_copy_(2, self.slot, v)
        new, end = k.shape[2], self.length + k.shape[2]
        if end <= self.slots:
            self.keys[:, :, self.length : end], self.values[:, :, self.length : end] = k, v
            return self.keys[:, :, :end], self.values[:, :, :end]
        kept = min(self.length, self.slots)
        seen = torch.cat((self.keys[:, :, :kept], k), dim=2), torch.cat((self.values[:, :, :kept], v), dim=2)
        last = min(new, self.slots)  # earlier tokens would be overwritten immediately
        slots = torch.arange(end - last, end, device=k.device) % self.slots
        self.keys[:, :, slots], self.values[:, :, slots] = k[:, :, -last:], v[:, :, -last:]
        return seen

    def columns(self, new: int) -> Tensor:
        """Return the column of each key that `update` returns for `new` tokens; negative for a slot never written."""
        device, end = self.keys.device, self.length + new
        if self.slot is None and end <= self.slots:
            return torch.arange(end, device=device)
        last = self.length - 1 if self.slot is None else self.length  # the newest column in the slots
        held = last - (last - torch.arange(self.slots, device=device)) % self.slots
        if self.slot is not None:
            return held
        return torch.cat((held[: min(self.length, self.slots)], torch.arange(self.length, end, device=device)))


class KVCache:
    """Hold the keys and values of the tokens read so far, so that each token is read once.

    A layer with a sliding window keeps only the last `window` tokens: the newest takes the slot of the oldest.

    A static cache (see `resize`) reads one token at a time, which attends to all slots: from token to token, shapes and
    addresses are the same, and what changes is in tensors. Compiled programs and CUDA graphs need that.

    windows        one per layer
    capacity       largest number of columns
    starts         (B,) first column of each row: prompts of different lengths end in the same column, and the padding
                   before them is masked; None: all rows begin at 0
    max_positions  of the model; None: `capacity`. Positions stop there, as finished rows of a batch continue

    >>> cache = KVCache([None, 4], batch=1, kv_heads=1, capacity=32, head_dim=8)
    >>> [layer.slots for layer in cache.layers]
    [32, 4]
    """

    def __init__(
        self,
        windows: Sequence[Window],
        batch: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        *,
        device="cpu",
        dtype: torch.dtype = torch.float32,
        starts: Tensor | None = None,
        max_positions: int | None = None,
    ):
        self.windows, self.starts, self.device = windows, starts, torch.device(device)
        self.max_positions = max_positions or capacity
        self.length: int | Tensor = 0  # columns in the cache; of a static one, (1,) on the device
        self.encoded: Tensor | None = None  # for T5: (B, S, hidden), the output of the encoder
        self.encoded_mask: Tensor | None = None  # (B, 1, 1, S), False for padding; None: no padding
        slots = [capacity if window is None else min(capacity, window) for window in windows]
        self.layers = [LayerCache((batch, kv_heads, n, head_dim), self.device, dtype) for n in slots]

    @property
    def is_static(self) -> bool:
        return isinstance(self.length, Tensor)

    def resize(self, capacity: int) -> None:
        """Make the cache static, with room for `capacity` columns, no fewer than now."""
        if not self.is_static:
            self.length = torch.tensor([self.length], device=self.device)
        for layer, window in zip(self.layers, self.windows, strict=True):
            layer.resize(capacity if window is None else min(capacity, window))

    def begin_with(self, prefix: "KVCache") -> None:
        """Copy the columns of a cache of one row to where each row begins. The rows may differ after it.

        A row with padding is read on from a column within its prefix, whose end is then computed once more. No layer
        may have a window.
        """
        starts = [0] * len(self.layers[0].keys) if self.starts is None else self.starts.tolist()
        for layer, read in zip(self.layers, prefix.layers, strict=True):
            for row, start in enumerate(starts):
                columns = slice(start, start + prefix.length)
                layer.keys[row, :, columns], layer.values[row, :, columns] = read.keys[0], read.values[0]
        self.length = prefix.length

    def select(self, rows: Tensor) -> None:
        """Keep rows by their numbers (B,), in this order; one may be named several times."""
        self.starts, self.encoded, self.encoded_mask = (
            None if x is None else x[rows] for x in (self.starts, self.encoded, self.encoded_mask)
        )
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
            layer.cross = layer.cross and tuple(x[rows] for x in layer.cross)

    def begin(self, new: int) -> tuple[Tensor, Masks]:
        """Prepare the layers for `new` tokens. Return the tokens' positions, (T,) or (B, T), and their masks."""
        positions = columns = (
            self.length + 0 if self.is_static else torch.arange(self.length, self.length + new, device=self.device)
        )
        slots = {size: columns % size for size in {layer.slots for layer in self.layers}} if new == 1 else {}
        for layer in self.layers:
            in_place = self.is_static or (new == 1 and self.length >= layer.slots)
            layer.length, layer.slot = self.length, slots[layer.slots] if in_place else None
        if self.starts is not None:
            positions = (columns - self.starts[:, None]).clamp(0, self.max_positions - 1)
        first_layers = dict(zip(reversed(self.windows), reversed(self.layers), strict=True))
        return positions, {window: self.mask(window, layer, columns) for window, layer in first_layers.items()}

    def mask(self, window: Window, layer: LayerCache, queries: Tensor) -> Tensor | None:
        """Return the mask of a layer for queries at these columns, None if `attend` needs no mask."""
        new = len(queries)
        if self.starts is None and not self.is_static:
            sees_all = new == 1 and (window is None or layer.slots == window or self.length < window)
            if self.length == 0 or sees_all:
                return None
        keys, queries = layer.columns(new), queries[:, None]
        seen = visible(queries, keys, window)  # (T, S)
        if self.starts is None:
            return seen
        # A query in the padding sees its own key, because a softmax over no key is nan.
        return (seen & (keys >= self.starts[:, None, None, None])) | (keys == queries)


# ---- masks ----------------------------------------------------------------------------------------------------------


def visible(queries: Tensor, keys: Tensor, window: Window) -> Tensor:
    """Return whether each query column may see each key column; the two broadcast."""
    seen = (keys <= queries) & (keys >= 0)
    return seen if window is None else seen & (keys > queries - window)


def attention_mask(
    segments: Tensor | None,
    length: int,
    window: Window,
    device: torch.device,
    *,
    causal: bool = True,
    in_blocks: bool = False,
    branches: Tensor | None = None,
) -> Tensor | BlockMask | None:
    """Return the mask of `length` tokens without a cache, as `attend` takes it.

    segments   (B, T) document number of each token: documents do not see each other; None: one document
    branches   (B, T) with segments: a token sees branch 0 of its document, and its own branch; no window may hide any
    in_blocks  return a block mask, for compiled attention on a GPU; None if one document sees all of itself
    """
    if in_blocks and (segments is not None or (window is not None and window < length)):
        return make_block_mask(segments, length, window, device, causal=causal, branches=branches)
    if segments is None:
        return None
    if not causal:
        return same_segment(segments)
    columns = torch.arange(length, device=device)
    seen = visible(columns[:, None], columns, window) & same_segment(segments)
    if branches is None:
        return seen
    return seen & (same_segment(branches) | (branches == 0)[:, None, None])


def same_segment(segments: Tensor) -> Tensor:
    """Return whether two tokens are in the same document, (B, 1, T, T)."""
    return segments[:, None, :, None] == segments[:, None, None, :]


# ---- attention ------------------------------------------------------------------------------------------------------


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | BlockMask | None,
    dropout: float = 0.0,
    *,
    causal: bool = True,
    window: Window = None,
    scale: float | None = None,
) -> Tensor:
    """Return the attention of q (B, H, T, D) over k, v (B, kv heads, S, D), with the heads joined: (B, T, H * D).

    mask    broadcasts to (B, H, T, S): True where query t may see key s, or numbers that are added to the scores; or
            a block mask, which takes no dropout
    causal  without a mask: each token sees itself and earlier tokens, or (False) all tokens
    scale   of the scores; None: D^-1/2

    window  without a mask: how many keys a query may see, including its own; None: all. With a mask (B, 1, T, T), which
            has the window in it, keys that are outside of it are skipped; a mask (T, S) may be in any order

    On a CPU, a single query is a sum of products when compiled, and two products in 16 bits, 1.2 to 5 times faster than
    SDPA. Windows and compiled blocks are computed by `block_attention`, a fifth faster than SDPA at T 256. Everything
    else is SDPA.
    """
    if isinstance(mask, BlockMask):
        return block_masked_attention(q, k, v, mask, scale).transpose(1, 2).flatten(2)
    aligned = q.shape[2] == k.shape[2] and (mask is None or mask.dim() == 4)
    on_cpu, compiled = q.device.type == "cpu", torch.compiler.is_compiling()
    window = window if causal and aligned and window is not None and window < q.shape[2] else None
    if on_cpu and compiled and q.shape[2] == 1:
        return single_attention(q, k, v, mask, scale).flatten(1)[:, None]
    if on_cpu and q.shape[2] == 1 and q.dtype != torch.float32 and not dropout:
        return products_of_one(q, k, v, mask, scale).flatten(1)[:, None]
    if on_cpu and not dropout and q.shape[2] > 1 and (compiled or window):
        return grouped_attention(q, k, v, mask, causal, window, scale, compiled)
    if mask is None and window:
        columns = torch.arange(q.shape[2], device=q.device)
        mask = visible(columns[:, None], columns, window)
    causal, grouped = causal and mask is None and q.shape[2] > 1, q.shape[1] != k.shape[1]
    if grouped and mask is not None and not on_cpu:  # with a mask, the fast kernels take no grouped keys
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        grouped = False
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(2)


def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    window: Window,
    scale: float | None,
    compiled: bool,
) -> Tensor:
    """Compute `attend` by `block_attention`, in which the query heads that share a key head are rows of one product."""
    rows, heads, length, channels = q.shape
    kv_heads, blocks = k.shape[1], math.ceil(length / QUERY_BLOCK)
    size = math.ceil(length / blocks)
    padding = blocks * size - length  # queries at the end that nobody reads
    q = F.pad(q * (channels**-0.5 if scale is None else scale), (0, 0, 0, padding))
    q = q.view(rows, kv_heads, heads // kv_heads, blocks, size, channels)
    q = q.permute(3, 0, 1, 4, 2, 5).flatten(3, 4).flatten(1, 2)  # (blocks, B * kv heads, size * group, D)
    if mask is not None:
        mask = F.pad(mask[(None,) * (4 - mask.dim())], (0, 0, 0, padding), value=mask.dtype == torch.bool)
        mask = mask.unflatten(1, (-1, 1) if mask.shape[1] == 1 else (kv_heads, -1))
        mask = mask.unflatten(3, (blocks, size)).permute(0, 1, 3, 4, 2, 5)  # (1 or B, .., blocks, size, .., S)
    options = (heads // kv_heads, causal and length == k.shape[2], window, compiled)
    out, _ = block_attention(q.contiguous(), *(x.flatten(0, 1).contiguous() for x in (k, v)), mask, *options)
    out = out.view(blocks, rows, kv_heads, size, -1, channels)
    return out.permute(1, 0, 3, 2, 4, 5).flatten(3).flatten(1, 2)[:, :length]


def products_of_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """Return the attention of one query, (B, kv heads, G, D), as products of the query heads that share a key head."""
    q = q.view(len(q), k.shape[1], -1, q.shape[-1]).float() * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = q @ k.float().transpose(2, 3)  # (B, kv heads, G, S), in fp32 as in SDPA: drawn tokens are trained on
    if mask is not None:
        scores = with_mask(scores, mask)
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def with_mask(scores: Tensor, mask: Tensor) -> Tensor:
    """Return the scores (B, kv heads, G, S) of one query under a mask, as `attend` takes it."""
    mask = mask[(None,) * (4 - mask.dim())]  # (1 or B, 1 or H, 1, S)
    mask = mask if mask.shape[1] == 1 else mask.view(-1, *scores.shape[1:])
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


def single_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """Compute `attend` for one query of each row as sums of products, which a compiler fuses; return (B, H, D)."""
    q = q.unflatten(1, (k.shape[1], -1)) * (q.shape[-1] ** -0.5 if scale is None else scale)  # (B, kv heads, G, 1, D)
    scores = (q * k[:, :, None]).sum(-1)  # (B, kv heads, G, S)
    if mask is not None:
        scores = with_mask(scores, mask)
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    return (weights[..., None] * v[:, :, None]).sum(3).flatten(1, 2)
