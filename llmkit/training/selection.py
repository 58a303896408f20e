"""Choose the parameters that are trained: `train.only`."""

import re

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
