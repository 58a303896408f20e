"""Define AdamW with state in fewer bits, and with cautious weight decay."""

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

PART = 2**26  # elements that are updated at once, 256 MiB in fp32: bounds what a step allocates
BLOCK = 256  # elements that share a scale, in 8 bits
SMALLEST = 4096  # tensors with fewer elements keep fp32 state instead of 8 bits, as in bitsandbytes

# ---- bf16 -----------------------------------------------------------------------------------------------------------


def round_to_bf16(x: Tensor, step: Tensor) -> Tensor:
    """Round fp32 to bf16, up as often over the steps as the cut-off bits ask for.

    To the nearest, an average with beta 0.999 would stand still: its steps are smaller than bf16's. What is added to
    the bits below bf16's is a Weyl sequence over steps: no generator, and the same on all ranks and after a resume.
    """
    noise = torch.arange(x.numel(), device=x.device, dtype=torch.int32).view(x.shape) * 40_503 + step.int() * 25_033
    return ((x.view(torch.int32) + (noise & 0xFFFF)) & -0x10000).view(torch.float32).bfloat16()


# ---- 8 bits: block-wise dynamic quantization (Dettmers et al. 2021, arXiv:2110.02861) --------------------------------


def dynamic_values(signed: bool) -> Tensor:
    """Return the 256 values in [-1, 1] or [0, 1], in ascending order: seven decades, the higher the finer."""
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1)
        centres = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)
        values += [centres, -centres] if signed else [centres]
    return torch.cat(values).sort().values


VALUES = {
    signed: dynamic_values(signed) for signed in (True, False)
}  # made on import, so never in a plan, without data


@cache
def dynamic_map(signed: bool, device: torch.device) -> Tensor:
    """Return `dynamic_values` on a device, copied to it once."""
    return VALUES[signed].to(device)


def quantize(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Return the codes, (n,) uint8, and the largest absolute values of the blocks, (n / BLOCK,) fp32."""
    values = dynamic_map(signed, x.device)
    scale = x.view(-1, BLOCK).abs().amax(1)
    share = x.view(-1, BLOCK) / scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
    return torch.bucketize(share, (values[1:] + values[:-1]) / 2).to(torch.uint8).flatten(), scale


def dequantize(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """Return the values of codes, (n,) fp32."""
    return (dynamic_map(signed, codes.device)[codes.view(-1, BLOCK).int()] * scale.unsqueeze(1)).flatten()


# ---- AdamW ----------------------------------------------------------------------------------------------------------


class AdamW(torch.optim.Optimizer):
    """Step like torch.optim.AdamW, computing in fp32 from state that is stored in fewer bits. Weights are fp32.

    state_dtype  fp32, bf16, or int8 (a code of 8 bits for each element, and an fp32 scale for each block)
    cautious     decay an element only where the update does not move it away from zero: update * weight >= 0
                 (Chen et al. 2025, arXiv:2510.12402)
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
        *,
        state_dtype: str,
        cautious: bool,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.state_dtype, self.cautious = state_dtype, cautious
        self.found_inf: Tensor | None = None

    def initial_state(self, p: Tensor) -> dict[str, Tensor]:
        """Return the state before the first step; `..._scale` belongs to averages of 8 bits."""
        state = {"step": torch.zeros((), device=p.device)}
        eight_bits = self.state_dtype == "int8" and p.numel() >= SMALLEST and p.numel() % BLOCK == 0
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            if eight_bits:
                codes, scale = quantize(torch.zeros(BLOCK, device=p.device), signed)
                state[name] = codes[:1].expand(p.numel()).clone().view(p.shape)
                state[f"{name}_scale"] = scale.expand(p.numel() // BLOCK).clone()
            else:
                state[name] = torch.zeros_like(p, dtype=torch.bfloat16 if self.state_dtype == "bf16" else None)
        return state

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p] = self.state[p] or self.initial_state(p)
                    step = state["step"] + 1
                    tensors = {"weight": p, "grad": p.grad.contiguous(), **state}
                    self.store(tensors.pop("step"), step)
                    # Of scales there are fewer than of elements, by BLOCK.
                    parts = [t.view(-1).split(PART * t.numel() // p.numel()) for t in tensors.values()]
                    for part in zip(*parts, strict=True):
                        self.update(group, step, dict(zip(tensors, part, strict=True)))

    def update(self, group: dict, step: Tensor, part: dict[str, Tensor]) -> None:
        """Update a part of a weight and of its averages, all of them flat."""
        (beta1, beta2), lr, weight, grad = group["betas"], group["lr"], part["weight"], part["grad"]
        mean = self.read(part, "exp_avg").lerp(grad, 1 - beta1)
        square = self.read(part, "exp_avg_sq").lerp(grad.square(), 1 - beta2)
        update = (mean / (1 - beta1**step)).div_((square / (1 - beta2**step)).sqrt_().add_(group["eps"]))
        decay = weight * (lr * group["weight_decay"])
        if self.cautious:
            decay = torch.where(update * weight >= 0, decay, 0.0)
        self.store(weight, weight - decay - update.mul_(lr))
        for name, average in (("exp_avg", mean), ("exp_avg_sq", square)):
            if f"{name}_scale" in part:
                codes, scale = quantize(average, signed=name == "exp_avg")
                self.store(part[name], codes)
                self.store(part[f"{name}_scale"], scale)
            else:
                self.store(part[name], average if self.state_dtype != "bf16" else round_to_bf16(average, step))

    def read(self, part: dict[str, Tensor], name: str) -> Tensor:
        """Return an average in fp32."""
        if f"{name}_scale" in part:
            return dequantize(part[name], part[f"{name}_scale"], signed=name == "exp_avg")
        return part[name].float()

    def store(self, old: Tensor, new: Tensor) -> None:
        """Overwrite a tensor, unless the step is skipped, which is decided on the device."""
        old.copy_(new if self.found_inf is None else torch.where(self.found_inf > 0, old, new))
