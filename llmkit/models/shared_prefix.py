"""Hold what a row of trees reads: its masks, and the keys and values that other rows continue.

A tree is a trunk of tokens and branches that continue it. A token sees the trunk of its own tree and its own branch up
to itself, and all of the prefix that comes before the row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmkit.models.attention import Masks, Window


class SharedLayer:
    """Hold the keys and values of one layer, (1, kv heads, P + T, D): P tokens of a prefix, and T of the row."""

    def __init__(self, prefix: "SharedLayer | None"):
        self.prefix, self.keys, self.values = prefix, None, None

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the prefix and of the row, in the place of `LayerCache.update`."""
        if self.prefix is not None:
            k, v = torch.cat((self.prefix.keys, k), dim=2), torch.cat((self.prefix.values, v), dim=2)
        self.keys, self.values = k, v
        return k, v


class SharedPrefix:
    """Hold a row of trees in the place of a `KVCache`, for one forward pass of a decoder. Then it may be a prefix.

    windows    one per layer
    positions  (T,) of each token in its text
    trees      (T,) number of each token's tree
    branches   (T,) number of its branch; 0: the trunk
    prefix     what all trees continue, a row without branches

    >>> trunk_and_two_branches = SharedPrefix([None], *torch.tensor([[0, 1, 1], [0, 0, 0], [0, 1, 2]]))
    >>> trunk_and_two_branches.begin(3)[1][None].int().tolist()
    [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    """

    def __init__(
        self,
        windows: Sequence[Window],
        positions: Tensor,
        trees: Tensor,
        branches: Tensor,
        prefix: "SharedPrefix | None" = None,
    ):
        self.windows, self.positions, self.trees, self.branches = windows, positions, trees, branches
        self.before = positions[:0] if prefix is None else prefix.positions
        self.layers = [SharedLayer(None if prefix is None else prefix.layers[i]) for i in range(len(windows))]
        self.length = 0  # columns read, which the model counts

    def begin(self, new: int) -> tuple[Tensor, Masks]:
        """Return the positions (T,) of the row, and the masks (T, P + T) of its layers."""
        columns = torch.arange(new, device=self.positions.device)
        same_tree = self.trees[:, None] == self.trees
        on_path = (self.branches == 0) | (self.branches[:, None] == self.branches)
        seen = (columns <= columns[:, None]) & same_tree & on_path
        seen = torch.cat((seen.new_ones(new, len(self.before)), seen), dim=1)
        apart = self.positions[:, None] - torch.cat((self.before, self.positions))
        masks = {window: seen if window is None else seen & (apart < window) for window in set(self.windows)}
        return self.positions, masks
