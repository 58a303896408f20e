"""Define the forward pass that all decoders share: embedding, blocks, norm and head."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmkit.models.attention import KVCache, LayerCache, Masks, attention_mask
from llmkit.models.layers import Head, token_tables
from llmkit.models.loss import ChunkLoss, Logits, linear_cross_entropy
from llmkit.models.shared_prefix import SharedLayer, SharedPrefix


class Context(NamedTuple):
    """Arguments of a block besides its input."""

    masks: Masks
    rope: tuple[Tensor, Tensor] | None = None  # cos and sin of rotary positions
    cache: LayerCache | SharedLayer | None = None  # of this layer


class CausalLM(nn.Module):
    """Run a decoder and its head. A family's Model defines these, so that weights have Hugging Face's names:

    blocks   nn.ModuleList; each block is called with (x, context), and may also return balance statistics
    norm     of the output of the last block
    embed    (input_ids, positions) -> the input of the first block (B, T, hidden), and cos and sin of rotary positions
    wte      the token embedding
    lm_head  None if it is tied to the embedding
    """

    block_masks = False  # whether masks are block masks, which compiled attention on a GPU reads

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.chunk_loss, self.to_logits = ChunkLoss(), Logits()
        self.lm_head = None if config.tie_word_embeddings else Head(config.hidden_size, config.vocab_size)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        reduction: str = "sum",
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        branches: Tensor | None = None,
        cache: KVCache | SharedPrefix | None = None,
        logits_to_keep: int | Tensor = 0,
        with_balance: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits (B, T, V) of input_ids (B, T), or losses if there are labels (B, T), aligned with the logits.

        reduction            of the losses, see `linear_cross_entropy`
        positions, segments  (B, T), for packed rows
        branches             (B, T), for preferences, see `attention_mask`
        cache                continue after the tokens in it
        logits_to_keep       compute logits or losses of this many last tokens only, or of these columns; 0: of all
        with_balance         also return the balance statistics of the experts, see `Family.aux_loss`
        """
        x, balances = self.run_blocks(input_ids, positions, segments, branches, cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = self.norm(x[:, kept])
        weight = token_tables(self)[-1].rows()
        if labels is None:
            result = self.to_logits(hidden, weight)
        else:
            result = linear_cross_entropy(hidden, weight, labels, reduction, chunk_loss=self.chunk_loss)
        return (result, torch.stack(balances)) if with_balance else result

    def encode(self, input_ids: Tensor, **inputs: Tensor) -> Tensor:
        """Return the hidden states (B, T, hidden) of the last block, normed: what the head reads.

        inputs  positions, segments and branches, see `forward`
        """
        return self.norm(self.run_blocks(input_ids, **inputs)[0])

    def run_blocks(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        branches: Tensor | None = None,
        cache: KVCache | SharedPrefix | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the output (B, T, hidden) of the last block, and the balance statistics of the blocks with experts."""
        positions, masks, layers = self.look_back(input_ids, positions, segments, branches, cache)
        x, rope = self.embed(input_ids, positions)
        balances = []
        for block, layer in zip(self.blocks, layers, strict=True):
            x = block(x, Context(masks, rope, layer))
            if isinstance(x, tuple):
                x, balance = x
                balances.append(balance)
        if cache is not None:
            cache.length += input_ids.shape[1]
        return x, balances

    def look_back(
        self,
        input_ids: Tensor,
        positions: Tensor | None,
        segments: Tensor | None,
        branches: Tensor | None,
        cache: KVCache | SharedPrefix | None,
    ) -> tuple[Tensor, Masks, Sequence[LayerCache | SharedLayer | None]]:
        """Return the positions of tokens (B, T), what they may see, and what each layer has read before them."""
        length = input_ids.shape[1]
        if cache is not None:
            return *cache.begin(length), cache.layers
        if positions is None:
            positions = torch.arange(length, device=input_ids.device)
        windows = dict.fromkeys(self.config.windows)
        options = {"device": input_ids.device, "in_blocks": self.block_masks, "branches": branches}
        masks = {window: attention_mask(segments, length, window, **options) for window in windows}
        return positions, masks, [None] * len(self.blocks)
