"""What a step minimises: (model, micro-batch on the device) -> sum of losses over the targets, and metrics."""

from collections.abc import Callable

from llmkit.objectives.lm import lm

OBJECTIVES: dict[str, Callable] = {"lm": lm}
