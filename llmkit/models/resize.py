"""Resize the embedding and the head of a built model for new tokens."""

import torch
from torch import nn

from llmkit.models import family_of
from llmkit.models.layers import token_tables


@torch.no_grad()
def resize_embeddings(model: nn.Module, size: int, sources: dict[int, list[int]]) -> None:
    """Extend the embedding, and an untied head, to at least `size` rows.

    sources  new id -> the ids that encoded its text so far. The new row is the mean of their rows, or of all rows if
             there are none, which hardly changes the probabilities of other tokens (Hewitt 2021). A new id may be an
             unused row of a padded vocabulary. All other rows stay the same
    """
    for module in token_tables(model):
        old = module.weight
        mean = old[[i for i in range(len(old)) if i not in sources]].float().mean(0)
        rows = torch.cat((old, mean.to(old.dtype).expand(max(0, size - len(old)), -1)))
        for new, pieces in sources.items():
            rows[new] = old[pieces].float().mean(0) if pieces else mean
        module.weight = nn.Parameter(rows.contiguous(), requires_grad=old.requires_grad)
    for module, name in family_of(model.config).token_biases(model):
        bias = getattr(module, name)
        zeros = bias.new_zeros(max(0, size - len(bias)))
        setattr(module, name, nn.Parameter(torch.cat((bias, zeros)), requires_grad=bias.requires_grad))
    model.config.vocab_size = max(size, model.config.vocab_size)
