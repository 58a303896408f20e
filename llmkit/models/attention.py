"""Attention, what may be attended, and the cache. B rows, T tokens, S keys, H heads, D channels a head."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Window = int | None  # keys that a query may see, itself the last of them; None: all before it
Masks = dict[Window, Tensor | None]  # of the layers with that window: see `attend`


# ---- the cache ------------------------------------------------------------------------------------------------------


class LayerCache:
    """Keys and values of one layer, (B, kv heads, slots, D) each: column c of the text lies in slot c % slots."""

    def __init__(self, shape: tuple[int, int, int, int], device, dtype: torch.dtype):
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.slots = shape[2]
        self.length = 0  # columns written before this forward
        self.encoded: tuple[Tensor, Tensor] | None = None  # keys and values of what an encoder read, for T5
        self.at: Tensor | None = None  # (1,) the slot that one token takes, all others being attended too

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, kv heads, T, D); returns all keys and values that a query may still see."""
        k, v = k.to(self.keys.dtype), v.to(self.values.dtype)
        if self.at is not None:
            return self.keys.index_copy_(2, self.at, k), self.values.index_copy_(2, self.at, v)
        new, end = k.shape[2], self.length + k.shape[2]
        if end <= self.slots:
            self.keys[:, :, self.length : end], self.values[:, :, self.length : end] = k, v
            return self.keys[:, :, :end], self.values[:, :, :end]
        kept = min(self.length, self.slots)
        seen = torch.cat((self.keys[:, :, :kept], k), dim=2), torch.cat((self.values[:, :, :kept], v), dim=2)
        last = min(new, self.slots)  # the others would be overwritten at once
        at = torch.arange(end - last, end, device=k.device) % self.slots
        self.keys[:, :, at], self.values[:, :, at] = k[:, :, -last:], v[:, :, -last:]
        return seen

    def columns(self, new: int) -> Tensor:
        """The column of each key that `update` returns for `new` tokens, negative where nothing is written yet."""
        device, end = self.keys.device, self.length + new
        if self.at is None and end <= self.slots:
            return torch.arange(end, device=device)
        last = self.length - (self.at is None)  # the newest column in the slots
        held = last - (last - torch.arange(self.slots, device=device)) % self.slots
        if self.at is not None:
            return held
        return torch.cat((held[: min(self.length, self.slots)], torch.arange(self.length, end, device=device)))


class KVCache:
    """What the tokens read so far left behind, so that each is read once.

    A layer with a window keeps the last `window` tokens only: the newest takes the slot of the oldest.

    windows   of the layers
    capacity  columns that may be read in all
    starts    (B,) column at which each row begins: prompts of different lengths end in the same column, and what
              stands before them is never seen; None: all rows begin at 0
    longest   positions that the model has: rows that are over may be read beyond them, to no end

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
        longest: int | None = None,
    ):
        self.windows, self.starts, self.device = windows, starts, torch.device(device)
        self.longest = longest or capacity
        self.fixed = False  # one token at a time and all slots attended: what compiled blocks need
        self.length = 0  # columns in the cache
        self.encoded: Tensor | None = None  # what an encoder read, and which of it may be seen: for T5
        self.seen: Tensor | None = None
        slots = [capacity if window is None else min(capacity, window) for window in windows]
        self.layers = [LayerCache((batch, kv_heads, n, head_dim), self.device, dtype) for n in slots]

    def begin(self, new: int) -> tuple[Tensor, Masks]:
        """Make ready for `new` tokens: their positions, (T,) or (B, T), and what they may see."""
        places = {
            n: torch.tensor([self.length % n], device=self.device) for n in {layer.slots for layer in self.layers}
        }
        for layer in self.layers:
            in_place = self.fixed or (new == 1 and self.length >= layer.slots)
            layer.length, layer.at = self.length, places[layer.slots] if in_place else None
        columns = torch.arange(self.length, self.length + new, device=self.device)
        positions = columns if self.starts is None else (columns - self.starts[:, None]).clamp(0, self.longest - 1)
        first = dict(zip(reversed(self.windows), reversed(self.layers), strict=True))
        return positions, {window: self.mask(window, layer, columns) for window, layer in first.items()}

    def mask(self, window: Window, layer: LayerCache, queries: Tensor) -> Tensor | None:
        """What the queries at these columns may see of a layer; None where `attend` knows without it."""
        new = len(queries)
        begins = self.length == 0 and (window is None or new <= window)
        sees_all = new == 1 and (window is None or layer.slots == window or self.length < window)
        if self.starts is None and not self.fixed and (begins or sees_all):
            return None
        keys, queries = layer.columns(new), queries[:, None]
        seen = visible(queries, keys, window)  # (T, S)
        if self.starts is None:
            return seen
        return (seen & (keys >= self.starts[:, None, None, None])) | (keys == queries)  # no row that sees nothing


# ---- what may be attended -------------------------------------------------------------------------------------------


def visible(queries: Tensor, keys: Tensor, window: Window) -> Tensor:
    """Whether the query at one column may see the key at another, for columns that broadcast."""
    seen = (keys <= queries) & (keys >= 0)
    return seen if window is None else seen & (keys > queries - window)


def attention_mask(
    segments: Tensor | None, length: int, window: Window, device: torch.device, *, causal: bool = True
) -> Tensor | None:
    """What each of `length` tokens may see, without a cache: see `attend`.

    segments  (B, T) numbers of documents that must not see each other, or None
    """
    if segments is None and (window is None or window >= length):
        return None
    if not causal:
        return same_segment(segments)
    columns = torch.arange(length, device=device)
    seen = visible(columns[:, None], columns, window)
    return seen if segments is None else seen & same_segment(segments)


def same_segment(segments: Tensor) -> Tensor:
    """(B, 1, T, T): whether two tokens lie in the same document."""
    return segments[:, None, :, None] == segments[:, None, None, :]


# ---- attention ------------------------------------------------------------------------------------------------------


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    *,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Attention of q (B, H, T, D) over k, v (B, kv heads, S, D), heads joined again: (B, T, H * D).

    mask    broadcasts to (B, H, T, S): True where query t may see key s, or numbers that are added to the scores
    causal  what None stands for as a mask: each token sees those before it, or all
    scale   of the scores; None: D^-1/2

    Compiled for a CPU it is products of query blocks, which beat SDPA there by a fifth at T 256, and a sum for a single
    query; SDPA elsewhere.
    """
    compiled = q.device.type == "cpu" and torch.compiler.is_compiling() and not dropout
    if compiled and q.shape[:1] + q.shape[2:3] == (1, 1):
        return single_attention(q, k, v, mask, scale).flatten(1)[:, None]
    if compiled and q.shape[2] > 1:
        blocked = recomputed(blocked_attention) if q.shape[2] >= RECOMPUTE_FROM else blocked_attention
        return blocked(q, k, v, mask, causal, scale).transpose(1, 2).flatten(2)
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal and mask is None and q.shape[2] > 1,
        enable_gqa=q.shape[1] != k.shape[1],
        scale=scale,
    )
    return out.transpose(1, 2).flatten(2)


QUERY_BLOCK = 128  # queries whose scores stand in memory at a time
RECOMPUTE_FROM = 512  # tokens from which the backward makes the scores again: they weigh more than their product costs


def recomputed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, whose inside is made again in the backward instead of kept (Chen et al. 2016, arXiv:1604.06174)."""

    def again(*args):  # no functools.partial: torch.compile would not look into it
        return checkpoint(function, *args, use_reentrant=False)

    return again


def blocked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = True, scale: float | None = None
) -> Tensor:
    """`attend` as plain products, a block of queries at a time; causal ones only over the keys that they may see.

    q (B, H, T, D) over k, v (B, kv heads, S, D); the query heads that share a key head are rows of one product.
    """
    heads, length, channels = q.shape[1:]
    q = q.unflatten(1, (k.shape[1], heads // k.shape[1]))  # (B, kv heads, group, T, D)
    q = q * (channels**-0.5 if scale is None else scale)
    if mask is not None and mask.dim() == 4:  # one for all heads, or one a head
        mask = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (k.shape[1], -1))
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        seen = stop if causal and length == k.shape[2] else k.shape[2]
        scores = grouped(q[:, :, :, start:stop], k[:, :, :seen].mT)  # (B, kv heads, group, block, seen)
        if mask is not None:
            part = mask[..., start:stop, :seen]
            scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part
        elif causal:
            scores = scores.masked_fill(~before(start, stop, q.device), -torch.inf)
        weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
        blocks.append(grouped(weights, v[:, :, :seen]))
    return torch.cat(blocks, dim=3).flatten(1, 2)


def single_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """`attend` of one query in one row as products and sums, which a compiler fuses: (1, H, D)."""
    q = q.unflatten(1, (k.shape[1], -1)) * (q.shape[-1] ** -0.5 if scale is None else scale)  # (1, kv heads, G, 1, D)
    scores = (q * k[:, :, None]).sum(-1)  # (1, kv heads, G, S)
    if mask is not None:
        mask = mask.flatten(0, -2).unflatten(0, (1, -1, 1))  # (1, 1 or H, 1, S)
        mask = mask if mask.shape[1] == 1 else mask.view(1, *scores.shape[1:])
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    return (weights[..., None] * v[:, :, None]).sum(3).flatten(1, 2)


def grouped(a: Tensor, b: Tensor) -> Tensor:
    """a (B, K, G, n, x) @ b (B, K, x, y) -> (B, K, G, n, y), the G heads of a group as rows of one product."""
    return (a.flatten(2, 3) @ b).unflatten(2, a.shape[2:4])


def before(start: int, stop: int, device: torch.device) -> Tensor:
    """Which of the keys [0, stop) the queries [start, stop) may see."""
    return torch.arange(stop, device=device) <= torch.arange(start, stop, device=device)[:, None]
