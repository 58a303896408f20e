"""What every decoder does, whatever its parts are called: embed, run the blocks, norm, and the head."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmkit.models.attention import KVCache, LayerCache, Masks, attention_mask
from llmkit.models.layers import Head, token_tables
from llmkit.models.loss import ChunkLoss, Logits, linear_cross_entropy


class Context(NamedTuple):
    """What a block is told beside its input."""

    masks: Masks  # by window: what may be attended
    rope: tuple[Tensor, Tensor] | None = None  # cos and sin, where positions are rotary
    cache: LayerCache | None = None  # its own


class CausalLM(nn.Module):
    """A decoder and its head. A family's Model says where its parts are, under Hugging Face's weight names.

    blocks   its nn.ModuleList; each block is called with (x, context), and may return balance statistics beside x
    norm     what follows the last block
    embed    (input_ids, positions) -> the first block's input (B, T, hidden), and cos and sin where they are rotary
    wte      the token embedding
    lm_head  None where the embedding is the head
    """

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
        cache: KVCache | None = None,
        logits_to_keep: int = 0,
        with_balance: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, T, V) of input_ids (B, T); with aligned labels (B, T), their losses: see `linear_cross_entropy`.

        positions, segments  (B, T), for packed rows
        cache                continue after the tokens it holds
        logits_to_keep       logits of only so many of the last tokens; 0: of all
        with_balance         return beside it how evenly the experts were used: see `Family.aux_loss`
        """
        length = input_ids.shape[1]
        if cache is not None:
            positions, masks = cache.begin(length)
        else:
            if positions is None:
                positions = torch.arange(length, device=input_ids.device)
            windows = dict.fromkeys(self.config.windows)
            masks = {window: attention_mask(segments, length, window, input_ids.device) for window in windows}
        x, rope = self.embed(input_ids, positions)
        balances = []
        for layer, block in enumerate(self.blocks):
            x = block(x, Context(masks, rope, cache.layers[layer] if cache else None))
            if isinstance(x, tuple):
                x, balance = x
                balances.append(balance)
        if cache is not None:
            cache.length += length
        hidden = self.norm(x[:, -logits_to_keep:])
        weight = token_tables(self)[-1].rows()
        if labels is None:
            result = self.to_logits(hidden, weight)
        else:
            result = linear_cross_entropy(hidden, weight, labels, reduction, chunk_loss=self.chunk_loss)
        return (result, torch.stack(balances)) if with_balance else result
