"""Define learning-rate schedules: pure functions from a step to a factor of the learning rate, in [0, 1]."""

import math
from collections.abc import Callable
from typing import Annotated

from pydantic import Field

from llmkit.training.optim import Ratio

Warmup = Annotated[int, Field(ge=0)]  # steps


def warmup(step: int, warmup_steps: int) -> float:
    """Rise linearly from 1/n at step 0 to 1 at step n - 1."""
    return min(1.0, (step + 1) / max(1, warmup_steps))


def progress(step: int, max_steps: int, begin: int) -> float:
    """Return how far a step is between `begin` and the end of the run, in [0, 1).

    The end comes after the last step, as in transformers' schedules: with a minimum of 0, too, every step trains.
    """
    return min(1.0, max(0.0, (step - begin) / max(1, max_steps - begin)))


def constant(step: int, max_steps: int, *, warmup_steps: Warmup = 0) -> float:
    """Stay at 1 after the warm-up."""
    return warmup(step, warmup_steps)


def linear(step: int, max_steps: int, *, warmup_steps: Warmup = 0, min_lr_ratio: Ratio = 0.0) -> float:
    """Fall linearly from 1 at the end of the warm-up to min_lr_ratio after the last step."""
    decay = 1 - (1 - min_lr_ratio) * progress(step, max_steps, warmup_steps)
    return warmup(step, warmup_steps) if step < warmup_steps else decay


def cosine(step: int, max_steps: int, *, warmup_steps: Warmup = 0, min_lr_ratio: Ratio = 0.1) -> float:
    """Fall along half a cosine from 1 at the end of the warm-up to min_lr_ratio after the last step (arXiv:1608.03983).

    >>> [round(cosine(step, 10, warmup_steps=0, min_lr_ratio=0.1), 3) for step in (0, 5, 9)]
    [1.0, 0.55, 0.122]
    """
    if step < warmup_steps:
        return warmup(step, warmup_steps)
    wave = 0.5 * (1 + math.cos(math.pi * progress(step, max_steps, warmup_steps)))
    return min_lr_ratio + (1 - min_lr_ratio) * wave


def wsd(
    step: int,
    max_steps: int,
    *,
    warmup_steps: Warmup = 0,
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.4,
    min_lr_ratio: Ratio = 0.0,
) -> float:
    """Warm up, stay at 1, then fall linearly over the last `decay_fraction` of the steps (WSD, arXiv:2404.06395)."""
    begin = max(warmup_steps, round(max_steps * (1 - decay_fraction)))
    decay = 1 - (1 - min_lr_ratio) * progress(step, max_steps, begin)
    return warmup(step, warmup_steps) if step < warmup_steps else decay


SCHEDULES: dict[str, Callable[..., float]] = {"constant": constant, "linear": linear, "cosine": cosine, "wsd": wsd}
