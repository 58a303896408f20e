"""IA3: keys, values and the inner activations of MLPs are scaled by trained vectors (Liu et al. 2022, 2205.05638).

The default learning rate is the paper's.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmkit.models import family_of
from llmkit.models.layers import block_linears, original_classes, restore_class, swap_class
from llmkit.peft.method import Method
from llmkit.peft.targets import Layers, choose_linears, in_layers, writing_linears


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of IA3.

    target_modules       ends of names of the linears; null: keys, values, and the last linear of MLPs
    feedforward_modules  those of them whose input is scaled, in place of the output; null: the last linear of MLPs
    layers               only linears of these blocks: their numbers, or "first 4", "last 4"
    """

    target_modules: list[str] | None = None
    feedforward_modules: list[str] | None = None
    layers: Layers | None = None


class ScaledOutput:
    """A linear whose output is scaled by `ia3_l` (out, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return (y * self.ia3_l.flatten()).to(y.dtype)


class ScaledInput:
    """A linear whose input is scaled by `ia3_l` (1, in)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x * self.ia3_l.flatten()).to(x.dtype))


def apply(model: nn.Module, options: Options, seed: int = 0, new_ids: Sequence[int] = ()) -> None:
    """Freeze the model and give the chosen linears a vector of ones, which are trained in fp32."""
    feedforward = options.feedforward_modules
    if feedforward is None:
        feedforward = [names[-1] for names in writing_linears(model)]
    targets = options.target_modules
    if targets is None:
        targets = [*family_of(model.config).keys_values, *feedforward]
    inside = in_layers(model, options.layers)
    chosen = {name: module for name, module in choose_linears(model, None, targets)[0].items() if name in inside}
    model.requires_grad_(False)
    for name, module in chosen.items():
        on_input = f".{name}".endswith(tuple(f".{end}" for end in feedforward))
        shape = (1, module.in_features) if on_input else (module.out_features, 1)
        module.ia3_l = nn.Parameter(torch.ones(shape, device=module.weight.device))
        swap_class(module, ScaledInput if on_input else ScaledOutput)


def tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained vectors by PEFT's names."""
    adapted = (ScaledInput, ScaledOutput)
    return {f"{name}.ia3_l": one.ia3_l for name, one in model.named_modules() if isinstance(one, adapted)}


def disabled(model: nn.Module) -> AbstractContextManager[None]:
    """Compute what the base computes."""
    return original_classes(model, (ScaledInput, ScaledOutput))


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Scale rows or columns of the weights, in fp32, and give the linears their class back."""
    for module in list(model.modules()):
        if isinstance(module, ScaledInput | ScaledOutput):
            module.weight.copy_(module.weight.float() * module.ia3_l)
            if isinstance(module, ScaledOutput) and module.bias is not None:
                module.bias.copy_(module.bias.float() * module.ia3_l.flatten())
            del module.ia3_l
            restore_class(module)
    model.requires_grad_(True)


@dataclass
class PeftFields:
    """The fields of an adapter_config.json that are read. The names and shapes of the tensors say the rest."""

    target_modules: list[str] | str | None = None
    feedforward_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None


def to_peft(model: nn.Module, options: Options) -> dict:
    """Return the fields of adapter_config.json."""
    adapted = {name: isinstance(one, ScaledInput) for name, one in model.named_modules() if hasattr(one, "ia3_l")}
    return {
        "target_modules": list(adapted),
        "feedforward_modules": [name for name, on_input in adapted.items() if on_input],
        "fan_in_fan_out": bool(family_of(model.config).transposed),
    }


def from_peft(model: nn.Module, fields: PeftFields, shapes: dict[str, tuple]) -> tuple[Options, list[int]]:
    """Return the options of an adapter_config.json, by the names and shapes of its tensors."""
    found = {name: shapes[key] for name in block_linears(model) if (key := f"{name}.ia3_l") in shapes}
    if not found:
        raise ValueError("its file has no vector of a linear of the blocks")
    on_input = [name for name, shape in found.items() if shape[0] == 1]
    return Options(target_modules=list(found), feedforward_modules=on_input), []


METHOD = Method(
    options=Options,
    lr=3e-3,
    apply=apply,
    tensors=tensors,
    disabled=disabled,
    merge=merge,
    peft_type="IA3",
    in_peft=True,
    fields=PeftFields,
    ignored_fields=frozenset({"fan_in_fan_out", "init_ia3_weights"}),
    to_peft=to_peft,
    from_peft=from_peft,
)
