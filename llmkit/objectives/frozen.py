"""Hold models that a step asks beside the one that it trains: a teacher, a judge, and what training started from."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from llmkit.models.folder import load_model
from llmkit.models.hf_config import read_head
from llmkit.peft import disabled, is_adapted


def frozen_model(folder: Path) -> Callable[[torch.device], nn.Module]:
    """Return a function that gives a folder's model on a device, with its head for labels if it has one.

    It is loaded in the dtype of the caller's autocast when it is first asked for, so that a plan or a check loads none.
    """
    loaded: dict[torch.device, nn.Module] = {}

    def load(device: torch.device) -> nn.Module:
        if device not in loaded:
            dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
            model = load_model(folder, device=device, dtype=dtype, head=read_head(folder))
            loaded[device] = model.eval().requires_grad_(False)
        return loaded[device]

    return load


def set_reference(model: nn.Module, reference: nn.Module | None) -> None:
    """Give a model the one that it is compared with, if that is not the model without its adapter.

    reference  a frozen copy of what training started from; None: what it says is in the batches
    """
    model.__dict__["reference"] = reference  # as an attribute it would become a part of the model


@contextmanager
def reference_of(model: nn.Module) -> Iterator[nn.Module | None]:
    """Give the model that training started from, in evaluation mode: of a new adapter, the same model without it.

    None: there is none in memory, see `set_reference`.
    """
    found = model.__dict__.get("reference", model if is_adapted(model) else None)
    if found is not model:
        yield found
        return
    training = model.training
    model.eval()
    try:
        with disabled(model):
            yield model
    finally:
        model.train(training)
