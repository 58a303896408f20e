"""Parameter-efficient methods, by their name in the YAML. A new one is a file that fills `Method`, and a line here."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from torch import nn

from llmkit.peft import adalora, bitfit, bottleneck, ia3, llama_adapter, lora, p_tuning, prefix, prompt
from llmkit.peft.method import Method

METHODS: dict[str, Method] = {
    "lora": lora.METHOD,
    "dora": replace(lora.METHOD, options=lora.DoraOptions),
    "adalora": adalora.METHOD,
    "ia3": ia3.METHOD,
    "adapter": bottleneck.METHOD,
    "prefix": prefix.METHOD,
    "prompt": prompt.METHOD,
    "p_tuning": p_tuning.METHOD,
    "llama_adapter": llama_adapter.METHOD,
    "bitfit": bitfit.METHOD,
}


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
