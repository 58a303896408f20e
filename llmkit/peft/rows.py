"""Train a few rows of the embedding and the head: those of added tokens."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.models.layers import restore_class, swap_class, token_tables


class TrainedRows:
    """A token table of which some rows, `token_ids`, are trained, as a parameter `token_rows` of their own."""

    def rows(self) -> Tensor:
        return self.weight.index_copy(0, self.token_ids, self.token_rows.to(self.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.rows())


def train_rows(model: nn.Module, token_ids: list[int]) -> None:
    """Train these rows of the embedding, and of a head with a matrix of its own; the other rows stay frozen."""
    for table in token_tables(model):
        table.token_ids = torch.tensor(token_ids, device=table.weight.device)
        table.token_rows = nn.Parameter(table.weight.detach()[token_ids].float())
        swap_class(table, TrainedRows)


def trained_tables(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the tables with trained rows, by their full names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, TrainedRows))


@torch.no_grad()
def merge_rows(model: nn.Module) -> None:
    """Write the trained rows into their tables."""
    for _, table in list(trained_tables(model)):
        table.weight[table.token_ids] = table.token_rows.to(table.weight.dtype)
        del table.token_ids, table.token_rows
        restore_class(table)


def common_rows(model: nn.Module, indices: dict[str, list[int]]) -> list[int]:
    """Return the row numbers that an adapter brings for every token table of a model.

    indices  table (the last part of its name) -> row numbers, as `trainable_token_indices` of PEFT has them
    Raises ValueError if tables or numbers do not fit the model.
    """
    tables = [name.rpartition(".")[2] for name, module in model.named_modules() if module in token_tables(model)]
    first, *others = indices.values()
    if set(indices) != set(tables) or any(ids != first for ids in others):
        raise ValueError(f"the trained rows of {', '.join(indices)} do not fit a model with {', '.join(tables)}")
    if len(first) != len(set(first)) or not all(0 <= i < model.config.vocab_size + len(first) for i in first):
        raise ValueError(f"the trained row indices are invalid: {str(first)[:80]}")
    return first
