"""Define optimizers. Steps with non-finite gradients are skipped, without a host synchronization."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from llmkit.parallel.world import World

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Ratio = Annotated[float, Field(ge=0, lt=1)]
ALONE = World(torch.device("cpu"))  # one rank: nothing is shared

# ---- Muon -----------------------------------------------------------------------------------------------------------

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients (Jordan 2024, post on Muon)
SLICE = 2**26  # elements of the matrices that are orthogonalized at once, 256 MiB in fp32: bounds what a step allocates


def orthogonalize(matrices: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Return approximately the nearest (semi-)orthogonal matrices, with singular values in about [0.7, 1.2].

    matrices  (n, rows, columns). Newton-Schulz iterations run in bf16 on the wide orientation, for all n at once
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
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
    world      the ranks that share the work: each orthogonalizes some matrices, and gets the others' results in bf16
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        weight_decay: float,
        momentum: float,
        adjust_lr: str = "match_rms_adamw",
        world: World = ALONE,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "adjust_lr": adjust_lr})
        self.world = world
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    if "momentum_buffer" not in self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                    # Views of every matrix; an expert dimension may come first.
                    views = (t.view(-1, *p.shape[-2:]).unbind() for t in (p, p.grad, self.state[p]["momentum_buffer"]))
                    by_shape[p.shape[-2:]] += zip(*views, strict=True)
            for shape, matrices in by_shape.items():
                number = max(self.world.size, SLICE // shape.numel())
                for start in range(0, len(matrices), number):
                    self.update(group, *map(list, zip(*matrices[start : start + number], strict=True)))

    def update(self, group: dict, weights: list[Tensor], grads: list[Tensor], buffers: list[Tensor]) -> None:
        """Update matrices of one shape, and their momentum."""
        if self.found_inf is not None:  # keep nan out of the momentum; the weights stay, see below
            skip = self.found_inf > 0
            grads = [torch.where(skip, buffer, g) for g, buffer in zip(grads, buffers, strict=True)]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        rows, columns = weights[0].shape
        share = math.ceil(len(weights) / self.world.size)
        mine = slice(self.world.rank * share, (self.world.rank + 1) * share)
        update = weights[0].new_zeros(share, rows, columns, dtype=torch.bfloat16)
        if grads[mine]:
            nesterov = torch.stack(torch._foreach_lerp(grads[mine], buffers[mine], group["momentum"]))
            update[: len(nesterov)] = orthogonalize(nesterov)
        update = self.world.gather(update)[: len(weights)].to(weights[0].dtype)
        scale = {
            "original": math.sqrt(max(1, rows / columns)),
            "match_rms_adamw": 0.2 * math.sqrt(max(rows, columns)),
        }[group["adjust_lr"]]
        keep, gain = 1 - group["lr"] * group["weight_decay"], -group["lr"] * scale
        if self.found_inf is not None:
            keep, gain = torch.where(skip, 1.0, keep), torch.where(skip, 0.0, gain)
        torch._foreach_mul_(weights, keep)
        torch._foreach_add_(weights, list(torch.unbind(update.mul_(gain))))


# ---- optimizers: (model, world, options) -> a list of torch optimizers -----------------------------------------------


def adamw_groups(params: Iterable[nn.Parameter], weight_decay: float) -> list[dict]:
    """Return parameter groups: matrices with weight decay, norms and biases without it."""
    params = [p for p in params if p.requires_grad]
    matrices, vectors = [p for p in params if p.dim() >= 2], [p for p in params if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adamw(
    model: nn.Module,
    world: World = ALONE,
    *,
    lr: Positive = 3e-4,
    betas: Annotated[list[Ratio], Field(min_length=2, max_length=2)] = [0.9, 0.95],
    eps: Positive = 1e-8,
    weight_decay: NotNegative = 0.1,
) -> list[torch.optim.Optimizer]:
    """Use AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101), with torch's fused kernel."""
    groups = adamw_groups(model.parameters(), weight_decay)
    return [torch.optim.AdamW(groups, lr=lr, betas=tuple(betas), eps=eps, fused=True)]


def muon(
    model: nn.Module,
    world: World = ALONE,
    *,
    lr: Positive = 3e-3,
    momentum: Ratio = 0.95,
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
    adamw_lr: Positive | None = None,
    betas: Annotated[list[Ratio], Field(min_length=2, max_length=2)] = [0.9, 0.95],
    eps: Positive = 1e-8,
    weight_decay: NotNegative = 0.1,
) -> list[torch.optim.Optimizer]:
    """Use Muon for `muon_matrices`, and AdamW for embeddings, head, norms and biases.

    adamw_lr  learning rate of AdamW; None: lr
    """
    matrices = muon_matrices(model)
    taken = {id(p) for p in matrices}
    groups = adamw_groups((p for p in model.parameters() if id(p) not in taken), weight_decay)
    return [
        Muon(matrices, lr, weight_decay, momentum, adjust_lr, world),
        torch.optim.AdamW(groups, lr=adamw_lr or lr, betas=tuple(betas), eps=eps, fused=True),
    ]


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


OPTIMIZERS: dict[str, Callable[..., list[torch.optim.Optimizer]]] = {"adamw": adamw, "muon": muon}


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
