"""Train a few modules as a whole beside an adapter: the embedding, the head, norms (peft's `modules_to_save`)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.errors import UserError, raise_all
from llmkit.models.layers import restore_class, swap_class, token_tables
from llmkit.models.quantized import Quantized
from llmkit.peft.experts import LoRAExperts


class WholeTable:
    """A token table that is trained in fp32 and read in the dtype of its base."""

    def rows(self) -> Tensor:
        return self.weight.to(self.base_weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.rows())


def train_whole(model: nn.Module, names: list[str]) -> None:
    """Train all parameters of the modules with these names, or ends of names, in fp32; keep what they were.

    Raises UserError for names that match nothing, and for a table that the model uses twice.
    """
    modules = {name: module for name, module in model.named_modules() if module._parameters}
    matching = {one: [name for name in modules if f".{name}".endswith(f".{one}")] for one in names}
    known = ", ".join(sorted({name.rpartition(".")[2] for name in modules}))
    what = "peft.modules_to_save matches no module"
    raise_all([UserError(what, got=one, expected=known) for one, found in matching.items() if not found])
    tables = token_tables(model)
    for name in dict.fromkeys(name for found in matching.values() for name in found):
        module = modules[name]
        has_update = any(last.startswith("lora_") for last in module._parameters) or isinstance(module, LoRAExperts)
        if isinstance(module, Quantized) or has_update:
            what = "peft.modules_to_save names a module that is quantized, or that has an update already"
            raise UserError(what, got=name, fix="leave it out, or out of peft.target_modules")
        if module is model.wte and model.lm_head is None:
            what = "peft.modules_to_save names the embedding, which is the head of this model too"
            raise UserError(what, got=name, fix="train all weights, or the rows of new tokens alone")
        for last, parameter in list(module._parameters.items()):
            if parameter is not None:
                module.register_buffer(f"base_{last}", parameter.detach(), persistent=False)
                setattr(module, last, nn.Parameter(parameter.detach().float().clone()))
        if any(module is table for table in tables):
            swap_class(module, WholeTable)


def whole_modules(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Return the modules that are trained as a whole, by their full names, with their parameters."""
    return {
        name: {last: one for last, one in module._parameters.items() if f"base_{last}" in module._buffers}
        for name, module in model.named_modules()
        if any(key.startswith("base_") for key in module._buffers)
    }


@contextmanager
def base_weights(model: nn.Module) -> Iterator[None]:
    """Put the weights of the base in the place of the trained ones inside a `with` block."""
    modules = [(model.get_submodule(name), own) for name, own in whole_modules(model).items()]
    trained = [(module, last, one, one.data) for module, own in modules for last, one in own.items()]
    for module, last, parameter, _ in trained:
        parameter.data = module._buffers[f"base_{last}"].float()
    try:
        yield
    finally:
        for _, _, parameter, data in trained:
            parameter.data = data


@torch.no_grad()
def keep_whole(model: nn.Module) -> None:
    """Keep the trained weights, in the dtype of their base."""
    for name, own in whole_modules(model).items():
        module = model.get_submodule(name)
        for last, parameter in own.items():
            setattr(module, last, nn.Parameter(parameter.detach().to(module._buffers[f"base_{last}"].dtype)))
            del module._buffers[f"base_{last}"]
        if isinstance(module, WholeTable):
            restore_class(module)
