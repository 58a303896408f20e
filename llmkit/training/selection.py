"""Choose parameters by their names: those that are trained, and those with rates of their own."""

import re
from collections import defaultdict

from torch import nn

from llmkit.errors import UserError
from llmkit.models.heads import head_parameters


def train_only(model: nn.Module, only: list[str]) -> None:
    """Freeze all parameters but those that an entry of `only` names.

    only  "first 2" or "last 2" blocks; "head", that of the labels or of the tokens; or a regex that is found in a name
    Raises UserError for an entry that names nothing.
    """
    chosen: dict[str, nn.Parameter] = {}
    for entry in only:
        if not (found := named_by(model, entry)):
            tied = entry == "head" and "the head is the embedding: name that"
            what = "train.only names no parameter"
            raise UserError(what, got=entry, expected=next(iter(dict(model.named_parameters()))), fix=tied or None)
        chosen |= found
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)


def named_by(model: nn.Module, entry: str) -> dict[str, nn.Parameter]:
    """Return the parameters that an entry of `train.only` names."""
    parameters, number = dict(model.named_parameters()), len(model.blocks)
    if side := re.fullmatch(r"(first|last) ([1-9]\d*)", entry):
        count = min(int(side[2]), number)
        blocks = model.blocks[:count] if side[1] == "first" else model.blocks[number - count :]
        inside = {id(p) for block in blocks for p in block.parameters()}
        return {name: p for name, p in parameters.items() if id(p) in inside}
    if entry == "head":
        heads = head_parameters(model)
        return heads or {name: p for name, p in parameters.items() if name.startswith("lm_head.")}
    return {name: p for name, p in parameters.items() if re.search(entry, name)}


def check_patterns(
    model: nn.Module, lr_pattern: dict[str, float] | None, weight_decay_pattern: dict[str, float] | None
) -> None:
    """Raise a UserError for a regex that is found in no trained parameter's name."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for option, patterns in (("lr_pattern", lr_pattern), ("weight_decay_pattern", weight_decay_pattern)):
        for one in patterns or {}:
            if not any(re.search(one, name) for name in names):
                raise UserError(f"optimizer.{option} matches no trained parameter", got=one, expected=names[0])


def split_by_name(
    named: list[tuple[str, nn.Parameter]],
    lr: float,
    weight_decay: float,
    lr_pattern: dict[str, float] | None,
    weight_decay_pattern: dict[str, float] | None,
) -> list[dict]:
    """Return one group of parameters for each pair of a learning rate and a weight decay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, p in named:
        groups[by_name(lr_pattern, name, lr), by_name(weight_decay_pattern, name, weight_decay)].append(p)
    return [{"params": own, "lr": rate, "weight_decay": decay} for (rate, decay), own in groups.items()]


def by_name(patterns: dict[str, float] | None, name: str, default: float) -> float:
    """Return the value of the first regex that is found in a name, else the default.

    >>> by_name({r"layers\\.0\\.": 1e-5}, "model.layers.0.mlp.up_proj.weight", 1e-4)
    1e-05
    """
    return next((value for one, value in (patterns or {}).items() if re.search(one, name)), default)
