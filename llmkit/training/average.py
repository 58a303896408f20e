"""Average the weights over the last steps, which does for a constant rate what a decay of the rate does.

Sources: LAWA (Sanyal et al. 2023, arXiv:2306.03241); Hägele et al. 2024 (arXiv:2405.18392).
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

Average = dict[nn.Parameter, Tensor]  # trained parameter -> its average in fp32; empty: nothing is averaged


def start_average(trained: list[nn.Parameter]) -> Average:
    """Return the average of one set of weights."""
    return {p: p.detach().clone() for p in trained}


def update_average(average: Average, step: int, fraction: float) -> None:
    """Add the weights after `step` steps to the average, in place.

    Step s has a weight proportional to about s^(2 / fraction - 2) (Shamir and Zhang 2013, arXiv:1212.1824). So at any
    step the average is as old as that of the last `fraction` of the steps with equal weights, and needs no window.
    """
    power = 2 / fraction - 2
    torch._foreach_lerp_(list(average.values()), [p.detach() for p in average], (power + 1) / (step + power))


@contextlib.contextmanager
def averaged(average: Average) -> Iterator[None]:
    """Put the average in the place of the weights. Only `.data` changes: compiled blocks see it too."""
    weights = [p.data for p in average]
    try:
        for p, mean in average.items():
            p.data = mean
        yield
    finally:
        for p, data in zip(average, weights, strict=True):
            p.data = data
