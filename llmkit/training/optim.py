"""Define optimizers. Steps with non-finite gradients are skipped, without a host synchronization."""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from llmkit.config.fields import Regex
from llmkit.errors import UserError
from llmkit.models.layers import Head
from llmkit.parallel.device import has_fast_bf16
from llmkit.parallel.world import World
from llmkit.training.adamw import AdamW
from llmkit.training.selection import check_patterns, split_by_name

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Ratio = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[list[Ratio], Field(min_length=2, max_length=2)]
LrPattern, DecayPattern = dict[Regex, Positive] | None, dict[Regex, NotNegative] | None
ALONE = World(torch.device("cpu"))  # one rank: nothing is shared

# ---- Muon -----------------------------------------------------------------------------------------------------------

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients (Jordan 2024, post on Muon)
ROW_BETA = 0.95  # decay of NorMuon's average of squares, as in its paper
SLICE = 2**26  # elements of the matrices that are orthogonalized at once, 256 MiB in fp32: bounds what a step allocates


@functools.cache
def newton_schulz_dtype(device: torch.device) -> torch.dtype:
    """Return bf16 where the device multiplies it, else fp32: other CPUs take 20 to 80 times as long in bf16."""
    return torch.bfloat16 if has_fast_bf16(device) else torch.float32


def orthogonalize(matrices: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Return approximately the nearest (semi-)orthogonal matrices, with singular values in about [0.7, 1.2].

    matrices  (n, rows, columns). Newton-Schulz iterations run in `newton_schulz_dtype` on the wide orientation, for all
              n at once
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(newton_schulz_dtype(matrices.device))
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalize the momentum by Newton-Schulz, like torch.optim.Muon, but batched over matrices of one shape.

    adjust_lr  match_rms_adamw  0.2 * sqrt(max(rows, columns)): AdamW's lr and weight decay carry over
                                (Moonlight, Liu et al. 2025, arXiv:2502.16982)
               original         sqrt(max(1, rows / columns)) (Jordan)
    world      the ranks that share the work: each orthogonalizes some matrices, and gets the others' results
    cautious   decay an element only where update * weight >= 0 (Chen et al. 2025, arXiv:2510.12402)
    row_scaling
               divide each row of the orthogonalized update by the root of the average square that it had over the
               steps, and keep the update's norm (NorMuon, Li et al. 2025, arXiv:2510.05491)
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        weight_decay: float,
        momentum: float,
        adjust_lr: str = "match_rms_adamw",
        world: World = ALONE,
        *,
        cautious: bool = False,
        row_scaling: bool = False,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "adjust_lr": adjust_lr})
        self.world, self.cautious, self.row_scaling = world, cautious, row_scaling
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Tensor, ...]]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    state, like = self.state[p], {"momentum_buffer": p}
                    if self.row_scaling:
                        like["row_squares"] = p[..., :1]
                    for name, tensor in like.items():
                        if name not in state:
                            state[name] = torch.zeros_like(tensor)
                    tensors = (p, p.grad, *(state[name] for name in like))
                    # Views of every matrix; an expert dimension may come first.
                    views = (t.view(-1, *t.shape[-2:]).unbind() for t in tensors)
                    by_shape[p.shape[-2:]] += zip(*views, strict=True)
            for shape, matrices in by_shape.items():
                number = max(self.world.size, SLICE // shape.numel())
                for start in range(0, len(matrices), number):
                    self.update(group, *map(list, zip(*matrices[start : start + number], strict=True)))

    def update(
        self,
        group: dict,
        weights: list[Tensor],
        grads: list[Tensor],
        buffers: list[Tensor],
        squares: list[Tensor] | None = None,
    ) -> None:
        """Update matrices of one shape, their momentum, and the average squares (rows, 1) of their updates."""
        if self.found_inf is not None:  # keep nan out of the momentum; the weights stay, see below
            skip = self.found_inf > 0
            grads = [torch.where(skip, buffer, g) for g, buffer in zip(grads, buffers, strict=True)]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        rows, columns = weights[0].shape
        share = math.ceil(len(weights) / self.world.size)
        mine = slice(self.world.rank * share, (self.world.rank + 1) * share)
        update = weights[0].new_zeros(share, rows, columns, dtype=newton_schulz_dtype(weights[0].device))
        if grads[mine]:
            nesterov = torch.stack(torch._foreach_lerp(grads[mine], buffers[mine], group["momentum"]))
            update[: len(nesterov)] = orthogonalize(nesterov)
        update = self.world.gather(update)[: len(weights)].to(weights[0].dtype)
        if squares is not None:  # every rank has all updates by now: the averages are the same on all
            means = update.square().mean(-1, keepdim=True)
            if self.found_inf is not None:
                means = torch.where(skip, torch.stack(squares), means)
            torch._foreach_lerp_(squares, list(means.unbind()), 1 - ROW_BETA)
            norm = update.norm(dim=(-2, -1), keepdim=True)
            update /= torch.stack(squares).sqrt() + 1e-10
            update *= norm / (update.norm(dim=(-2, -1), keepdim=True) + 1e-10)
        scale = {
            "original": math.sqrt(max(1, rows / columns)),
            "match_rms_adamw": 0.2 * math.sqrt(max(rows, columns)),
        }[group["adjust_lr"]]
        keep, gain = 1 - group["lr"] * group["weight_decay"], -group["lr"] * scale
        if self.found_inf is not None:
            keep, gain = torch.where(skip, 1.0, keep), torch.where(skip, 0.0, gain)
        if self.cautious:
            keep = [torch.where(u * w >= 0, keep, 1.0) for u, w in zip(update, weights, strict=True)]
        torch._foreach_mul_(weights, keep)
        torch._foreach_add_(weights, list(torch.unbind(update.mul_(gain))))


# ---- optimizers: (model, world, options) -> a list of torch optimizers -----------------------------------------------


def make_groups(
    model: nn.Module,
    weight_decay: float,
    lr: float,
    embedding_lr: float | None = None,
    head_lr: float | None = None,
    scalar_lr: float | None = None,
    *,
    lr_pattern: dict[str, float] | None = None,
    weight_decay_pattern: dict[str, float] | None = None,
    without: Iterable[nn.Parameter] = (),
) -> list[dict]:
    """Return the groups of trained parameters: matrices with weight decay first, norms and biases last without it.

    lr_pattern, weight_decay_pattern  regex -> the value of parameters in whose names it is found; the first one counts
    Raises UserError for a regex that is found in no trained parameter's name.
    """
    kinds: dict[int, str] = {id(p): "none" for p in without}
    for module in model.modules():
        kind = "embedding" if isinstance(module, nn.Embedding) else "head" if isinstance(module, Head) else "matrix"
        for p in module.parameters(recurse=False):
            kinds.setdefault(id(p), kind if p.dim() >= 2 else "scalar")
    rates = {"matrix": lr, "embedding": embedding_lr or lr, "head": head_lr or lr, "scalar": scalar_lr or lr}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    check_patterns(model, lr_pattern, weight_decay_pattern)
    return [
        group
        for kind, rate in rates.items()
        for group in split_by_name(
            [(name, p) for name, p in named if kinds[id(p)] == kind],
            rate,
            0.0 if kind == "scalar" else weight_decay,
            lr_pattern,
            weight_decay_pattern,
        )
    ]


def make_adamw(groups: list[dict], betas: list[float], eps: float, **options: Any) -> torch.optim.Optimizer:
    """Return torch's fused AdamW where it can do what is asked for, else `AdamW`, which takes several kernels more."""
    shared = {"lr": groups[0]["lr"], "betas": tuple(betas), "eps": eps}
    if options == {"state_dtype": "fp32", "cautious": False}:
        return torch.optim.AdamW(groups, **shared, fused=True)
    return AdamW(groups, **shared, **options)


def adamw(
    model: nn.Module,
    world: World = ALONE,
    *,
    lr: Positive = 3e-4,
    embedding_lr: Positive | None = None,
    head_lr: Positive | None = None,
    scalar_lr: Positive | None = None,
    betas: Betas = [0.9, 0.95],
    eps: Positive = 1e-8,
    weight_decay: NotNegative = 0.1,
    cautious_weight_decay: bool = False,
    state_dtype: Literal["fp32", "bf16"] = "fp32",
    lr_pattern: LrPattern = None,
    weight_decay_pattern: DecayPattern = None,
) -> list[torch.optim.Optimizer]:
    """Use AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101).

    state_dtype  type of the averages of gradients and of their squares; bf16 takes half the memory of fp32
    """
    patterns = {"lr_pattern": lr_pattern, "weight_decay_pattern": weight_decay_pattern}
    groups = make_groups(model, weight_decay, lr, embedding_lr, head_lr, scalar_lr, **patterns)
    return [make_adamw(groups, betas, eps, state_dtype=state_dtype, cautious=cautious_weight_decay)]


def adamw8bit(
    model: nn.Module,
    world: World = ALONE,
    *,
    lr: Positive = 3e-4,
    embedding_lr: Positive | None = None,
    head_lr: Positive | None = None,
    scalar_lr: Positive | None = None,
    betas: Betas = [0.9, 0.95],
    eps: Positive = 1e-8,
    weight_decay: NotNegative = 0.1,
    cautious_weight_decay: bool = False,
    lr_pattern: LrPattern = None,
    weight_decay_pattern: DecayPattern = None,
) -> list[torch.optim.Optimizer]:
    """Use AdamW with state of 8 bits in blocks of 256 (Dettmers et al. 2021, arXiv:2110.02861)."""
    patterns = {"lr_pattern": lr_pattern, "weight_decay_pattern": weight_decay_pattern}
    groups = make_groups(model, weight_decay, lr, embedding_lr, head_lr, scalar_lr, **patterns)
    return [make_adamw(groups, betas, eps, state_dtype="int8", cautious=cautious_weight_decay)]


def muon(
    model: nn.Module,
    world: World = ALONE,
    *,
    lr: Positive = 3e-3,
    momentum: Ratio = 0.95,
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
    row_scaling: bool = False,
    adamw_lr: Positive | None = None,
    embedding_lr: Positive | None = None,
    head_lr: Positive | None = None,
    scalar_lr: Positive | None = None,
    betas: Betas = [0.9, 0.95],
    eps: Positive = 1e-8,
    weight_decay: NotNegative = 0.1,
    cautious_weight_decay: bool = False,
    lr_pattern: LrPattern = None,
    weight_decay_pattern: DecayPattern = None,
) -> list[torch.optim.Optimizer]:
    """Use Muon for `muon_matrices`, and AdamW for embeddings, head, norms and biases.

    row_scaling   even out the sizes that the rows of the update have over the steps (NorMuon, arXiv:2510.05491)
    adamw_lr      learning rate of AdamW; null: lr
    embedding_lr  learning rate of embeddings; null: adamw_lr
    head_lr       learning rate of a head with weights of its own; null: adamw_lr
    scalar_lr     learning rate of norms and biases; null: adamw_lr
    """
    matrices = muon_matrices(model)
    if not matrices:
        what = "Muon has nothing to train: it updates whole matrices of blocks"
        raise UserError(what, fix="optimizer.name: adamw")
    patterns = {"lr_pattern": lr_pattern, "weight_decay_pattern": weight_decay_pattern}
    rates = (adamw_lr or lr, embedding_lr, head_lr, scalar_lr)
    groups = make_groups(model, weight_decay, *rates, **patterns, without=matrices)
    names = {id(p): name for name, p in model.named_parameters()}
    matrix_groups = split_by_name([(names[id(p)], p) for p in matrices], lr, weight_decay, **patterns)
    options = {"cautious": cautious_weight_decay}
    by_adamw = [make_adamw(groups, betas, eps, state_dtype="fp32", **options)] if groups else []
    return [
        Muon(matrix_groups, lr, weight_decay, momentum, adjust_lr, world, row_scaling=row_scaling, **options),
        *by_adamw,
    ]


def sgd(
    model: nn.Module,
    world: World = ALONE,
    *,
    lr: Positive = 0.1,
    momentum: Ratio = 0.9,
    nesterov: bool = False,
    weight_decay: NotNegative = 0.0,
    lr_pattern: LrPattern = None,
    weight_decay_pattern: DecayPattern = None,
) -> list[torch.optim.Optimizer]:
    """Use SGD with momentum, with torch's fused kernel.

    nesterov      look one step of the momentum ahead (Sutskever et al. 2013)
    weight_decay  added to the gradient of matrices (L2), times the weight; norms and biases have none
    """
    groups = make_groups(model, weight_decay, lr, lr_pattern=lr_pattern, weight_decay_pattern=weight_decay_pattern)
    # Without momentum, Nesterov's step is the plain one, which torch refuses to be told.
    optimizer = torch.optim.SGD(groups, momentum=momentum, nesterov=nesterov and momentum > 0, fused=True)
    for p in (p for group in groups for p in group["params"] if momentum):
        # torch would leave memory as it finds it there if the first step is skipped.
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return [optimizer]


def muon_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the trained matrices of the blocks: weights of linears and routers, and those of experts (E, out, in).

    Tables are none of them, such as T5's biases of distances: a step sees few of their rows. Nor are LoRA's factors A
    and B: an orthogonal update of a factor is none of the product B A, which is what LoRA trains.
    """
    return [
        p
        for module in model.blocks.modules()
        if not isinstance(module, nn.Embedding)
        for name, p in module.named_parameters(recurse=False)
        if p.requires_grad and (p.dim() == 3 or (p.dim() == 2 and name == "weight"))
    ]


OPTIMIZERS: dict[str, Callable[..., list[torch.optim.Optimizer]]] = {
    "adamw": adamw,
    "adamw8bit": adamw8bit,
    "muon": muon,
    "sgd": sgd,
}


def make_state(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Make the optimizers allocate their state, by a step that is skipped.

    In the first step it would come to lie between activations, and the heap would keep their gaps: 8 % of the peak of a
    GPT-2 of 124M on a CPU.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.found_inf = torch.ones((), device=trained[0].device)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def set_lr(optimizers: list[torch.optim.Optimizer], factor: float) -> float:
    """Set every group's lr to `factor` times its initial lr; return the first group's, for the log."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
    return optimizers[0].param_groups[0]["lr"]


def clip(params: list[nn.Parameter], max_norm: float | None, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Undo the loss scale and clip gradients in place; all results stay on the device.

    Return the norm before clipping, and found_inf: 1.0 if any gradient is not finite, so that optimizers skip the step.
    """
    grads = [p.grad for p in params if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))) / scale
    found_inf = (~torch.isfinite(norm)).float()
    factor = 1 / scale
    if max_norm is not None:
        factor = factor * torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    torch._foreach_mul_(grads, factor)
    return norm, found_inf
