"""Choose the modules of a model that a parameter-efficient method changes, by names, patterns and blocks."""

import itertools
import re
from collections.abc import Collection
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from llmkit.errors import UserError, raise_all
from llmkit.models import family_of
from llmkit.models.layers import block_linears

# Blocks by their numbers, or "first 4", "last 4".
Layers = list[Annotated[int, Field(ge=0)]] | Annotated[str, Field(pattern=r"^(first|last) [1-9]\d*$")]


def chosen_blocks(model: nn.Module, layers: Layers | None) -> range | list[int]:
    """Return the numbers of some of the blocks, see `Layers`; None: of all. Raise UserError for a missing one."""
    number = len(model.blocks)
    if layers is None:
        return range(number)
    if isinstance(layers, str):
        side, count = layers.split()
        chosen = range(number)[: int(count)] if side == "first" else range(number)[-int(count) :]
    else:
        chosen = layers
    last = max(chosen, default=0) if not isinstance(layers, str) else int(layers.split()[1]) - 1
    if last >= number or not chosen:
        got, expected = layers or "none", f"of {number} blocks, numbered from 0"
        raise UserError("peft.layers names no block of the model", got=got, expected=expected)
    return chosen


def in_layers(model: nn.Module, layers: Layers | None) -> dict[str, nn.Linear]:
    """Return the linears of some of the blocks, see `chosen_blocks`."""
    chosen, linears = chosen_blocks(model, layers), block_linears(model)
    return linears if layers is None else {name: one for name, one in linears.items() if block_of(name) in chosen}


def block_of(name: str) -> int:
    """Return the number of the block that a module is in.

    >>> block_of("model.layers.3.mlp.up_proj")
    3
    """
    return int(re.search(r"\.(\d+)\.", name)[1])


def candidates(model: nn.Module) -> list[str]:
    """Return the names that `target_modules` may give: the last parts of the linears' names."""
    return sorted({name.rsplit(".", 1)[-1] for name in block_linears(model)})


def by_pattern(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    """Return the value for a linear: of the first pattern that matches the end of its name, as in PEFT, or the default.

    >>> by_pattern({"q_proj": 4, r"layers\\.1\\..*": 8}, "model.layers.1.mlp.up_proj", 16)
    8
    """
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default)


def choose_linears(
    model: nn.Module, layers: Layers | None, targets: list[str] | None, beside: Collection[str] = ()
) -> tuple[dict[str, nn.Linear], list[str]]:
    """Return the linears of the blocks whose names, or ends of names, are `targets`, and those names of `beside` that
    they match; None: every one.

    beside  names of matrices of experts, which are no linears. Without them, None is refused in a model with experts
    Raises UserError for targets that match nothing.
    """
    linears = in_layers(model, layers)
    if targets is None:
        if not beside and family_of(model.config).experts(model.config):
            what = "peft.target_modules must be named: the experts of this model are no linears, and get no update"
            raise UserError(what, fix=f"peft.target_modules: [{', '.join(candidates(model))}]")
        return linears, [*beside]
    names = [*linears, *beside]
    matching = {target: [name for name in names if f".{name}".endswith(f".{target}")] for target in targets}
    ends = {name.rpartition(".")[2] for name in beside}
    what, known = "peft.target_modules matches no linear of the blocks", ", ".join(sorted({*candidates(model), *ends}))
    raise_all([UserError(what, got=target, expected=known) for target, names in matching.items() if not names])
    found = set(itertools.chain.from_iterable(matching.values()))
    return {name: one for name, one in linears.items() if name in found}, [name for name in beside if name in found]


def writing_linears(model: nn.Module) -> list[list[str]]:
    """Return the names of the linears of each block that write into the residual stream; the MLP's comes last.

    Raises UserError for a model with experts, whose matrices are no linears.
    """
    family = family_of(model.config)
    if family.experts(model.config):
        raise UserError("this method changes linears of MLPs, and experts are none", got=model.config.model_type)
    found: dict[str, list[str]] = {}
    for name in block_linears(model):
        if f".{name}".endswith(tuple(f".{end}" for end in family.writers)):
            found.setdefault(name[: re.search(r"\.\d+\.", name).end()], []).append(name)
    return list(found.values())
