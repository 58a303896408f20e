"""Bottleneck adapters: small MLPs behind the linears that write into the residual stream, with a skip around each.

Houlsby et al. 2019 (arXiv:1902.00751) have one behind attention and one behind the MLP of each block; Pfeiffer et al.
2020 (arXiv:2005.00247) the second alone. The peft library has none of them: only llmkit loads such an adapter.
The default learning rate is Pfeiffer's.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from llmkit.models.layers import ACTIVATIONS, original_classes, swap_class
from llmkit.peft.method import Method
from llmkit.peft.targets import Layers, in_layers, writing_linears

Activation = Literal["gelu", "gelu_pytorch_tanh", "relu", "relu2", "silu"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of bottleneck adapters.

    placement         houlsby: behind attention and behind the MLP; pfeiffer: behind the MLP alone
    reduction_factor  the bottleneck has hidden_size / reduction_factor channels, 16 in Pfeiffer's paper
    activation        of the bottleneck
    layers            only in these blocks: their numbers, or "first 4", "last 4"
    """

    placement: Literal["houlsby", "pfeiffer"] = "pfeiffer"
    reduction_factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 16.0
    activation: Activation = "relu"
    layers: Layers | None = None


class Adapted:
    """A linear behind which y + up(act(down(y))) is computed."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        inner = self.adapter_act(F.linear(y, self.adapter_down, self.adapter_down_bias))
        return y + F.linear(inner, self.adapter_up, self.adapter_up_bias)


NAMES = ("adapter_down", "adapter_down_bias", "adapter_up", "adapter_up_bias")


def apply(model: nn.Module, options: Options, seed: int = 0, new_ids: Sequence[int] = ()) -> None:
    """Freeze the model and put adapters behind the chosen linears; `up` is 0, so that nothing changes at first."""
    first = 0 if options.placement == "houlsby" else -1
    wanted = [name for names in writing_linears(model) for name in names[first:]]
    chosen = in_layers(model, options.layers)
    size = max(1, int(model.config.hidden_size / options.reduction_factor))
    model.requires_grad_(False)
    for index, module in enumerate(chosen[name] for name in wanted if name in chosen):
        device, width = module.weight.device, module.out_features
        down = torch.empty(size, width, device=device)
        if device.type != "meta":
            generator = torch.Generator(device).manual_seed(seed * 1_000_003 + index)
            down.uniform_(-1 / math.sqrt(width), 1 / math.sqrt(width), generator=generator)
        zeros = (torch.zeros(shape, device=device) for shape in ((size,), (width, size), (width,)))
        for name, tensor in zip(NAMES, (down, *zeros), strict=True):
            setattr(module, name, nn.Parameter(tensor))
        module.adapter_act = ACTIVATIONS[options.activation]
        swap_class(module, Adapted)


def tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters by their names in the adapter's file."""
    adapted = ((name, module) for name, module in model.named_modules() if isinstance(module, Adapted))
    return {f"{name}.{last}": getattr(module, last) for name, module in adapted for last in NAMES}


def disabled(model: nn.Module) -> AbstractContextManager[None]:
    """Compute what the base computes."""
    return original_classes(model, (Adapted,))


METHOD = Method(
    options=Options,
    lr=1e-4,
    apply=apply,
    tensors=tensors,
    disabled=disabled,
    merge=None,
    peft_type="BOTTLENECK",
    in_peft=False,
    fields=Options,
    to_peft=lambda model, options: vars(options),
    from_peft=lambda model, options, shapes: (options, []),
)
