"""Compute the products of large linear layers in fp8, by torchao."""

import importlib.util

import torch
from torch import nn

LARGE = 1024  # inputs and outputs of a layer: in smaller products, scaling takes the time that fp8 saves
CAPABILITY = (8, 9)  # of the first GPUs that multiply fp8: Ada and Hopper


def fp8_obstacle(device: torch.device, precision: str) -> str | None:
    """Return why products can't be in fp8 here, or None."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        return f"needs a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]}"
    if precision != "bf16":
        return "needs train.precision: bf16"
    if importlib.util.find_spec("torchao") is None:
        return "needs torchao: pip install 'llmkit[fp8]'"
    return None


def apply_fp8(model: nn.Module, *, emulate: bool = False) -> int:
    """Let the large linear layers of the blocks multiply in fp8; return how many. Names and weights stay.

    emulate  round to fp8, but multiply in the precision of the model, on any device

    Each tensor is scaled by its largest number (Micikevicius et al. 2022, arXiv:2209.05433): inputs and weights are
    e4m3, gradients e5m2.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def is_large(module: nn.Module, name: str) -> bool:
        return (
            type(module) is nn.Linear and min(sizes := module.weight.shape) >= LARGE and not any(n % 16 for n in sizes)
        )

    # Products of rows x tokens that are no multiple of 16 are padded.
    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    number = 0
    for block in model.blocks:
        number += sum(is_large(module, name) for name, module in block.named_modules())
        convert_to_float8_training(block, config=config, module_filter_fn=is_large)
    return number
