"""More rows for the embedding and the head of a built model, for tokens that its tokenizer did not have."""

import torch
from torch import nn

from llmkit.models import family_of
from llmkit.models.layers import token_tables


@torch.no_grad()
def resize_embeddings(model: nn.Module, size: int, sources: dict[int, list[int]]) -> None:
    """Give the embedding, and the head where it is another matrix, at least `size` rows.

    sources  new id -> the ids that spelt it so far: its row begins as the mean of theirs, or of all tokens' where there
             are none, which keeps the others' probabilities almost as they were (Hewitt 2021). Rows that no token had,
             as padded vocabularies have them, are written over; all others stay
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
        more = bias.new_zeros(max(0, size - len(bias)))
        setattr(module, name, nn.Parameter(torch.cat((bias, more)), requires_grad=bias.requires_grad))
    model.config.vocab_size = max(size, model.config.vocab_size)
