"""Parameter-efficient methods, by their name in the YAML. A new one is a file that fills `Method`, and a line here."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from llmkit.peft import bitfit, lora
from llmkit.peft.method import Method

METHODS: dict[str, Method] = {"lora": lora.METHOD, "bitfit": bitfit.METHOD}


def is_adapted(model: nn.Module) -> bool:
    """Return whether a model has an adapter of any method."""
    return any(method.tensors(model) for method in METHODS.values())


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Let a model compute what its base computes, whatever its adapter."""
    with ExitStack() as stack:
        for method in METHODS.values():
            stack.enter_context(method.disabled(model))
        yield
