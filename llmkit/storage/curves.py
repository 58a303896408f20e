"""Say in a sentence what the losses of a run show."""

from typing import Any

import numpy as np

from llmkit.storage.report import is_finite

FEWEST = 4  # evaluations, below which nothing is said
LITTLE = 0.003  # share of a loss: a smaller change is none
JUMP = 5.0  # times the median of the gradient norm
MANY_JUMPS = 0.05  # of the logged steps after the first fifth
JUMPING = 0.1  # share of a loss by which it rises and falls again


def describe_curves(records: list[dict[str, Any]]) -> str:
    """Return in a sentence whether the val loss of a run still falls, is flat, or rises while the train loss falls, and
    whether the run was unstable.

    >>> describe_curves([{"step": s, "val_loss": 4 - s / 10} for s in range(6)])
    'still falling: over the last quarter the val loss fell from 3.7000 to 3.5000; train longer'
    """
    val = [(one["step"], one["val_loss"]) for one in records if is_finite(one.get("val_loss"))]
    train = [(one["step"], one["loss"]) for one in records if is_finite(one.get("loss"))]
    if len(val) < FEWEST:
        return f"too few evaluations to say anything ({len(val)})"
    if problem := find_instability(records, val):
        return problem
    steps, losses = map(np.array, zip(*val, strict=True))
    lowest = int(losses.argmin())
    rise = losses[-1] - losses[lowest]
    if rise > LITTLE * losses[lowest] and falls(train, steps[lowest]):
        return (
            f"over-fitting since step {steps[lowest]}: the val loss rose from {losses[lowest]:.4f} to {losses[-1]:.4f} "
            "while the train loss fell; stop there, or take more data"
        )
    before = losses[steps <= steps[-1] - (steps[-1] - steps[0]) / 4][-1]
    change = f"from {before:.4f} to {losses[-1]:.4f}"
    if before - losses[-1] > LITTLE * before:
        return f"still falling: over the last quarter the val loss fell {change}; train longer"
    return f"flat: over the last quarter the val loss went {change}"


def find_instability(records: list[dict[str, Any]], val: list[tuple[int, float]]) -> str:
    """Return in what a run was unstable; "" if it was not."""
    norms = [one["grad_norm"] for one in records if one.get("grad_norm") is not None]
    norms = norms[len(norms) // 5 :]
    finite = [norm for norm in norms if is_finite(norm)]
    most = JUMP * float(np.median(finite)) if finite else 0.0
    jumps = sum(not is_finite(norm) or norm > most for norm in norms)
    if norms and jumps > max(1, MANY_JUMPS * len(norms)):
        return (
            f"unstable: in {jumps} of {len(norms)} logged steps the gradient norm was over {JUMP:g} times its median; "
            "lower optimizer.lr or lengthen the warm-up"
        )
    for i in range(1, len(val) - 1):
        step, loss = val[i]
        least = JUMPING * max(abs(loss), abs(val[i - 1][1]))  # rewards are losses below 0
        if loss - val[i - 1][1] > least and loss - min(later for _, later in val[i + 1 :]) > least:
            return f"unstable: the val loss jumped to {loss:.4f} at step {step} and came back; lower optimizer.lr"
    return ""


def falls(train: list[tuple[int, float]], step: int) -> bool:
    """Return whether the train loss fell after a step, by the means of the logged losses before it and of the last."""
    before = [loss for at, loss in train if at <= step]
    after = [loss for at, loss in train if at > step]
    if not before or not after:
        return False
    return float(np.mean(after[-max(1, len(after) // 2) :])) < float(np.mean(before[-max(1, len(before) // 5) :]))
