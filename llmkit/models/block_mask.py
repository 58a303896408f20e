"""Compute attention on a GPU in blocks, so that blocks of keys that no query of a block may see are skipped.

torch.compile generates the kernel: FlexAttention (Dong et al. 2024, arXiv:2412.05496). A mask of packed documents or of
a sliding window is a list of blocks and a function that says what is seen inside of them. Other kernels would read a
mask of T x T, and compute what it hides.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128  # queries and keys of a block, FlexAttention's own default


def make_block_mask(
    segments: Tensor | None,
    length: int,
    window: int | None,
    device: torch.device,
    *,
    causal: bool = True,
    branches: Tensor | None = None,
) -> BlockMask:
    """Return which blocks of keys each block of queries needs, wholly or in part.

    segments  (B, T) document number of each token: documents do not see each other; None: one document
    branches  (B, T) with segments: a token sees branch 0 of its document, and its own branch

    Documents are compared by the lowest and highest number in a block. If numbers do not rise along a row, a block may
    be listed although nothing in it is seen; the function hides it.
    """

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        shown = key <= query if causal else key >= 0
        if window is not None:
            shown = shown & (key > query - window)
        if segments is not None:
            shown = shown & (segments[row, query] == segments[row, key])
        if branches is not None:
            shown = shown & ((branches[row, key] == 0) | (branches[row, query] == branches[row, key]))
        return shown

    number = -(-length // BLOCK)
    first = torch.arange(number, device=device) * BLOCK
    last = (first + BLOCK - 1).clamp(max=length - 1)
    whole = first + BLOCK <= length
    some = torch.ones(1, number, number, dtype=torch.bool, device=device)  # (B, blocks of queries, blocks of keys)
    every = some & whole[:, None] & whole
    if causal:
        some, every = some & (first <= last[:, None]), every & (last <= first[:, None])
    if window is not None:
        some, every = some & (last > first[:, None] - window), every & (first > last[:, None] - window)
    if segments is not None:
        low, high = extremes(segments, number)
        some = some & (low[:, None] <= high[:, :, None]) & (low[:, :, None] <= high[:, None])
        every = every & (low[:, None] == high[:, :, None]) & (low[:, :, None] == high[:, None])
    if branches is not None:
        low, high = extremes(branches, number)
        same = (low[:, None] == high[:, :, None]) & (low[:, :, None] == high[:, None])
        every = every & (same | (high == 0)[:, None])
    lists = (x for blocks in (some & ~every, every) for x in listed(blocks[:, None]))
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(length, length))


def extremes(numbers: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Return the lowest and the highest of the numbers (B, T) in each block, (B, blocks) each."""
    end = numbers[:, -1:].expand(-1, blocks * BLOCK - numbers.shape[1])
    low, high = torch.cat((numbers, end), dim=1).unflatten(1, (blocks, BLOCK)).aminmax(dim=2)
    return low, high


def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many blocks are chosen in each row of (..., blocks), and their numbers, the chosen ones first."""
    return blocks.sum(-1, dtype=torch.int32), blocks.int().argsort(dim=-1, descending=True, stable=True).int()


def block_masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float | None = None) -> Tensor:
    """Return the attention of q (B, H, T, D) over k, v (B, kv heads, T, D), shape (B, H, T, D)."""
    q, k = q.to(v.dtype), k.to(v.dtype)  # norms and rotations may leave them in fp32 under autocast
    return flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
