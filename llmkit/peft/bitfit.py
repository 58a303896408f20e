"""BitFit: only the biases are trained (Ben Zaken et al. 2021, arXiv:2106.10199).

The peft library has no BitFit: its adapters have PEFT's layout, but only llmkit loads them. The default learning rate
is one of the four that the paper tries.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from llmkit.errors import UserError
from llmkit.peft.method import Method


@dataclass(frozen=True, kw_only=True)
class Options:
    """BitFit has no options."""


def biased_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules with a bias by their full names."""
    return {name: module for name, module in model.named_modules() if "bias" in module._parameters}


def apply(model: nn.Module, options: Options, seed: int = 0, new_ids: Sequence[int] = ()) -> None:
    """Freeze the model but for its biases, which become fp32; `base_bias` keeps what they were."""
    modules = {name: module for name, module in biased_modules(model).items() if module.bias is not None}
    if not modules:
        raise UserError("BitFit trains biases, and this model has none", got=model.config.model_type, fix="use LoRA")
    model.requires_grad_(False)
    for module in modules.values():
        module.register_buffer("base_bias", module.bias.detach(), persistent=False)
        module.bias = nn.Parameter(module.bias.detach().float().clone())
        if isinstance(module, nn.LayerNorm):  # whose kernel wants one dtype of both
            module.weight = nn.Parameter(module.weight.detach().float(), requires_grad=False)


def adapted_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules whose bias is trained, by their full names."""
    return {name: module for name, module in biased_modules(model).items() if "base_bias" in module._buffers}


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Compute what the base computes: put its biases in the place of the trained ones.

    Only `.data` changes, so compiled blocks, which take parameters as inputs, see it too.
    """
    trained = {module: module.bias.data for module in adapted_modules(model).values()}
    for module in trained:
        module.bias.data = module.base_bias.float()
    try:
        yield
    finally:
        for module, bias in trained.items():
            module.bias.data = bias


def merge(model: nn.Module) -> None:
    """Keep the trained biases, and give all weights the dtype that the base's had."""
    for module in adapted_modules(model).values():
        dtype = module.base_bias.dtype
        module.bias = nn.Parameter(module.bias.detach().to(dtype))
        if isinstance(module, nn.LayerNorm):  # exact: `apply` widened it
            module.weight.data = module.weight.data.to(dtype)
        del module.base_bias
    model.requires_grad_(True)


METHOD = Method(
    options=Options,
    lr=4e-4,
    apply=apply,
    tensors=lambda model: {f"{name}.bias": module.bias for name, module in adapted_modules(model).items()},
    disabled=disabled,
    merge=merge,
    peft_type="BITFIT",
    in_peft=False,
    fields=Options,
    supported_values={"layers_to_transform": (None, [])},  # 0 is a layer
    to_peft=lambda model, options: {},
    from_peft=lambda model, fields, shapes: (Options(), []),
)
