"""Count what a run has done, and decide whether it goes on: the loss scale, divergence, early stopping."""

import math
import shlex
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmkit.errors import DIVERGED, UserError
from llmkit.storage.run import CONFIG
from llmkit.training.average import Average
from llmkit.training.prepare import PreparedRun

FIRST_SCALE, SCALE_GROWTH = 2.0**16, 2000  # fp16 loss scale: its start; good steps before it doubles (apex, torch)


@dataclass
class Progress:
    """Count what a run has done. A resumed run needs it, the weights and the optimizer state, nothing else."""

    step: int = 0
    best: str = "val_loss"  # the figure that best_val is of: eval.best
    best_val: float = math.inf  # lower is better
    evals_without_gain: int = 0
    seconds: float = 0.0  # that earlier processes of this run took
    # On the device, so that a step never waits for the host:
    tensors: dict[str, Tensor] = field(default_factory=dict)
    average: Average = field(default_factory=dict)

    def numbers(self) -> dict[str, float]:
        """Return what is not on the device."""
        return {key: value for key, value in vars(self).items() if key not in ("tensors", "average")}


def initial_counters(device: torch.device, precision: str) -> dict[str, Tensor]:
    """Return the counters that live on the device."""
    names = ("skipped", "bad_in_a_row", "good_in_a_row")
    tensors = {name: torch.zeros((), dtype=torch.float64, device=device) for name in names}
    return tensors | {"scale": torch.tensor(FIRST_SCALE if precision == "fp16" else 1.0, device=device)}


def update_loss_scale(tensors: dict[str, Tensor], found_inf: Tensor, precision: str) -> None:
    """Count skipped steps. Halve fp16's loss scale after one, and double it after enough good steps."""
    tensors["skipped"] += found_inf
    tensors["bad_in_a_row"] = (tensors["bad_in_a_row"] + found_inf) * found_inf
    tensors["good_in_a_row"] = (tensors["good_in_a_row"] + 1) * (1 - found_inf)
    if precision == "fp16":
        grow = (tensors["good_in_a_row"] > 0) & (tensors["good_in_a_row"] % SCALE_GROWTH == 0)
        factor = torch.where(found_inf > 0, 0.5, torch.where(grow, 2.0, 1.0))
        tensors["scale"] = (tensors["scale"] * factor).float()


def stop_if_diverged(run: PreparedRun, progress: Progress) -> None:
    """Raise a UserError after too many steps in a row that are not finite. The last finite weights are kept."""
    bad = int(progress.tensors["bad_in_a_row"].item())
    # fp16 may need 16 steps to halve its scale from 2^16 to 1: that is no divergence.
    allowed = run.config.train.max_bad_steps + (int(math.log2(FIRST_SCALE)) if run.precision == "fp16" else 0)
    if bad >= allowed:
        first = progress.step - bad
        raise UserError(
            f"the gradients were not finite in {bad} steps in a row",
            at=f"steps {first} to {progress.step - 1}",
            got=f"lr {run.options['optimizer']['lr']}; the weights were left as before step {first}",
            fix="lower optimizer.lr, lengthen schedule.warmup_steps, or look at the data: llmkit data inspect "
            f"{shlex.quote(f'{run.config.run_dir}/{CONFIG}')} --step {first}; checkpoints hold the last finite weights",
            code=DIVERGED,
        )


def early_stop(run: PreparedRun, progress: Progress) -> str | None:
    """Return why to stop before the full length, if patience has run out."""
    patience = run.config.train.early_stopping_patience
    if patience and progress.evals_without_gain >= patience:
        best = run.config.eval.best
        gain = "a lower val loss" if best == "val_loss" else f"a better {best}"
        return f"stopped early: {patience} evaluations without {gain}"
    return None
