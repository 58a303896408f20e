"""Hold the weights of frozen linears in 4 or 8 bits: NF4 of QLoRA (Dettmers et al. 2023, arXiv:2305.14314), and int8.

The class of a linear is replaced by a subclass of it whose `weight` is computed when it is read. A forward or backward
pass computes one matrix at a time, in the dtype of its input, and keeps none. Shapes: n weights, N rows of input.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn
from torch.utils.flop_counter import register_flop_formula

from llmkit.models.layers import swap_class

BLOCK, SCALES = 64, 256  # weights that share a scale, and scales that share one of their own: the paper's
LEVELS = (  # quantiles of a normal distribution with an exact zero: appendix E of the paper
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
PAIR = {torch.float32: torch.int64, torch.bfloat16: torch.int32, torch.float16: torch.int32}  # two numbers in one


# ---- a matrix and its parts -----------------------------------------------------------------------------------------


def nf4(weight: Tensor, *, double_quantization: bool = True) -> dict[str, Tensor]:
    """Return a matrix in 4 bits a weight: two codes a byte, and a scale for each block of 64 weights.

    double_quantization  of the scales too, in 8 bits: 0.516 bytes a weight in all, and 0.563 without
    """
    flat = weight.detach().float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    levels = torch.tensor(LEVELS, device=weight.device)
    borders = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(blocks / scales.clamp(min=1e-30)[:, None], borders).to(torch.uint8).flatten()
    parts = {"codes": codes[::2] * 16 + codes[1::2], "scales": scales}
    if double_quantization:
        mean = scales.mean()
        groups = F.pad(scales - mean, (0, -len(scales) % SCALES)).view(-1, SCALES)
        steps = groups.abs().amax(1) / 127
        rounded = (groups / steps.clamp(min=1e-30)[:, None]).round().to(torch.int8).flatten()[: len(scales)]
        parts |= {"scales": rounded, "steps": steps, "mean": mean}
    return parts


def int8(weight: Tensor) -> dict[str, Tensor]:
    """Return a matrix (out, in) in 8 bits a weight, and a scale for each row (LLM.int8(), arXiv:2208.07339)."""
    scales = weight.detach().float().abs().amax(1, keepdim=True) / 127
    return {"codes": (weight.detach().float() / scales.clamp(min=1e-30)).round().to(torch.int8), "scales": scales}


QUANTIZERS: dict[str, Callable[..., dict[str, Tensor]]] = {"nf4": nf4, "int8": int8}
PARTS = ("codes", "scales", "steps", "mean")


def pairs_of_levels(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the two weights of each byte as one integer: a look-up of both takes the time of one."""
    levels, codes = torch.tensor(LEVELS, device=device), torch.arange(256, device=device)
    return torch.stack((levels[codes >> 4], levels[codes & 15]), dim=1).to(dtype).view(PAIR[dtype]).flatten()


def dequantize(
    shape: list[int], dtype: torch.dtype, codes: Tensor, scales: Tensor, steps: Tensor | None, mean: Tensor | None
) -> Tensor:
    """Return the matrix that parts of `nf4` or `int8` stand for."""
    if codes.dtype == torch.int8:
        return codes.to(dtype) * scales.to(dtype)
    if mean is not None:
        scales = scales.float() * steps.repeat_interleave(SCALES)[: len(scales)] + mean
    pairs = pairs_of_levels(dtype, codes.device).index_select(0, codes.int())
    blocks = pairs.view(dtype).view(-1, BLOCK).mul_(scales.to(dtype)[:, None])
    return blocks.flatten()[: math.prod(shape)].view(shape)


# ---- products: torch.compile calls them and does not look into them, or it would keep the matrices ------------------


@library.custom_op("llmkit::quantized_linear", mutates_args=())
def quantized_linear(
    x: Tensor,
    shape: list[int],
    codes: Tensor,
    scales: Tensor,
    steps: Tensor | None,
    mean: Tensor | None,
    transposed: bool,
) -> Tensor:
    """Return x (..., in) @ W.T, or with `transposed` x (..., out) @ W, for a matrix W (out, in) in parts."""
    weight = dequantize(shape, x.dtype, codes, scales, steps, mean)
    return x @ weight if transposed else F.linear(x, weight)


@quantized_linear.register_fake
def _(x, shape, codes, scales, steps, mean, transposed):
    return x.new_empty(*x.shape[:-1], shape[1] if transposed else shape[0])


def _save(ctx, inputs, output) -> None:
    _, ctx.shape, *parts, ctx.transposed = inputs
    ctx.save_for_backward(*parts)


def _backward(ctx, d_y: Tensor):
    d_x = quantized_linear(d_y, ctx.shape, *ctx.saved_tensors, not ctx.transposed)
    return d_x, None, None, None, None, None, None


quantized_linear.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.llmkit.quantized_linear)
def _flops(x, shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(x[:-1]) * math.prod(shape)


# ---- the module -----------------------------------------------------------------------------------------------------


class Quantized:
    """Mixin for a Linear whose weight is in parts, as buffers `weight_codes` and so on."""

    @property
    def weight(self) -> Tensor:
        """Return the matrix (out, in), computed anew, in the dtype that it had."""
        return dequantize(self.weight_shape, self.weight_dtype, *self.parts())

    def parts(self) -> list[Tensor | None]:
        return [getattr(self, f"weight_{name}") for name in PARTS]

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = quantized_linear(x, self.weight_shape, *self.parts(), False)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def quantize_linear(module: nn.Linear, name: str, options: dict[str, Any]) -> None:
    """Put the parts of a linear's weight in its place; QUANTIZERS lists the names."""
    parts = QUANTIZERS[name](module.weight, **options)
    module.weight_shape, module.weight_dtype = list(module.weight.shape), module.weight.dtype
    del module._parameters["weight"]
    for part in PARTS:
        module.register_buffer(f"weight_{part}", parts.get(part), persistent=False)
    swap_class(module, Quantized)


def is_quantized(model: nn.Module) -> bool:
    """Return whether a linear of a model holds its weight in parts."""
    return any(isinstance(module, Quantized) for module in model.modules())
