"""Give the experts of a mixture their LoRA: each has an A and a B of its own, beside its part of a common tensor."""

import itertools
import math
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.models.layers import swap_class
from llmkit.models.mixtral import Experts, grouped_product
from llmkit.peft.targets import Layers, block_of, chosen_blocks

RANK_MULTIPLE = 8  # grouped products take rows of a multiple of 16 bytes


class Update(nn.Module):
    """Hold the A and B of E experts in peft's layout: A (E * r, in) by experts, B (out, r * E) by ranks."""

    def __init__(self, matrices: Tensor, r: int, scale: float, dropout: float, generator: torch.Generator | None):
        super().__init__()
        self.number, rows, columns = matrices.shape
        a, bound = torch.empty(self.number * r, columns, device=matrices.device), 1 / math.sqrt(columns)
        self.lora_A = nn.Parameter(a if generator is None else a.uniform_(-bound, bound, generator=generator))
        self.lora_B = nn.Parameter(torch.zeros(rows, r * self.number, device=matrices.device))
        self.scale, self.dropout = scale, dropout

    def by_expert(self) -> tuple[Tensor, Tensor]:
        """Return A (E, r, in) and B (E, out, r), r padded with zeros to what a grouped product takes."""
        a = self.lora_A.unflatten(0, (self.number, -1))
        b = self.lora_B.unflatten(1, (-1, self.number)).permute(2, 0, 1)
        padding = -a.shape[1] % RANK_MULTIPLE
        return F.pad(a, (0, 0, 0, padding)), F.pad(b, (0, padding)).contiguous()

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Return the updates of x (N, in), whose rows up to ends[e] are those of expert e."""
        a, b = self.by_expert()
        x = F.dropout(x, self.dropout, self.training)
        return grouped_product(grouped_product(x, a, ends) * self.scale, b, ends)

    def change(self) -> Tensor:
        """Return the changes (E, out, in) of the matrices, in fp32."""
        a, b = self.by_expert()
        return b.float() @ a.float() * self.scale


class LoRAExperts:
    """Add updates to the products of experts: `updates` has them by the matrix's name."""

    def product(self, name: str, x: Tensor, ends: Tensor) -> Tensor:
        """Return the product of the experts' matrices of a name, and of their update if they have one."""
        y = super().product(name, x, ends)
        return y + self.updates[name](x, ends) if name in self.updates else y


def expert_matrices(model: nn.Module, layers: Layers | None = None) -> dict[str, Experts]:
    """Return the modules of the experts by the full names of their matrices."""
    blocks = chosen_blocks(model, layers)
    return {
        f"{path}.{name}": module
        for path, module in model.named_modules()
        if isinstance(module, Experts) and block_of(path) in blocks
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    }


def add_updates(model: nn.Module, ranks: dict[str, int], scales: dict[str, float], dropout: float, seed: int) -> None:
    """Give expert matrices, by their full names, updates that change nothing yet."""
    for index, (full, r) in enumerate(ranks.items()):
        path, _, name = full.rpartition(".")
        module = model.get_submodule(path)
        matrices = getattr(module, name)
        is_real = matrices.device.type != "meta"
        generator = torch.Generator(matrices.device).manual_seed(seed * 1_000_003 + index) if is_real else None
        if not isinstance(module, LoRAExperts):
            module.updates = nn.ModuleDict()
            swap_class(module, LoRAExperts)
        module.updates[name] = Update(matrices.detach(), r, scales[full], dropout, generator)


def updated_experts(model: nn.Module) -> dict[str, LoRAExperts]:
    """Return the modules of experts with updates, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRAExperts)}


def update_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters by peft's names: it wraps the matrices of a module in their order, one in another,
    so that the last one is the outermost.
    """
    found = {}
    for path, module in updated_experts(model).items():
        for wrapped, update in zip(wrappers(path, len(module.updates)), module.updates.values(), strict=True):
            found |= {f"{wrapped}.lora_A.weight": update.lora_A, f"{wrapped}.lora_B.weight": update.lora_B}
    return found


def wrappers(path: str, number: int) -> list[str]:
    """Return peft's names of the updates of a module's matrices.

    >>> wrappers("mlp.experts", 2)
    ['mlp.experts.base_layer', 'mlp.experts']
    """
    return [f"{path}{'.base_layer' * depth}" for depth in reversed(range(number))]


def ranks_in_file(matrices: dict[str, Experts], targets: list[str], shapes: dict[str, tuple]) -> dict[str, int]:
    """Return the ranks of the updates of expert matrices, by their full names, that the tensors of a file have.

    targets  ends of the names of the matrices that have updates
    """
    named, found = [name for name in matrices if any(f".{name}".endswith(f".{end}") for end in targets)], {}
    for path, names in itertools.groupby(named, lambda name: name.rpartition(".")[0]):
        names = list(names)
        for name, wrapped in zip(names, wrappers(path, len(names)), strict=True):
            if f"{wrapped}.lora_A.weight" in shapes:
                experts = len(getattr(matrices[name], name.rpartition(".")[2]))
                found[name] = shapes[f"{wrapped}.lora_A.weight"][0] // experts
    return found


def ends_of(names: Collection[str]) -> list[str]:
    """Return the ends of full names that are alike in all blocks.

    >>> ends_of(["model.layers.0.mlp.experts.down_proj", "model.layers.1.mlp.experts.down_proj"])
    ['mlp.experts.down_proj']
    """
    return sorted({name.split(".", 3)[3] for name in names})
