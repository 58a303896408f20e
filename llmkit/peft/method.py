"""The contract of a parameter-efficient method: what its file tells the rest of llmkit, in one typed object."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to train few parameters of a built model. Its functions change the model in place."""

    options: type  # dataclass of the options in the YAML
    rows_option: str | None = None  # the option that trains the rows of added tokens; None: the method can't
    # (model, options, seed, ids of added tokens); raises UserError if the method does not fit the model
    apply: Callable[[nn.Module, Any, int, Sequence[int]], None]
    tensors: Callable[[nn.Module], dict[str, nn.Parameter]]  # name in the adapter's file -> trained parameter
    disabled: Callable[[nn.Module], AbstractContextManager[None]]  # in it the model computes what its base does
    merge: Callable[[nn.Module], None]  # fold what was trained into the weights, in fp32; leave a plain model

    # The adapter's folder, in PEFT's layout:
    peft_type: str  # the method's name in adapter_config.json
    in_peft: bool  # whether the peft library has the method
    fields: type  # dataclass of the fields of adapter_config.json that are read
    ignored_fields: frozenset[str] = frozenset()  # fields that change only training or loading
    # further fields -> the values that are built; of all others null, false and empty ones
    supported_values: dict[str, tuple] = field(default_factory=dict)
    to_peft: Callable[[nn.Module, Any], dict[str, Any]]  # (model, options) -> fields of adapter_config.json
    # (model, fields, shapes of the tensors) -> (options, ids of added tokens); raises ValueError if they do not fit
    from_peft: Callable[[nn.Module, Any, dict[str, tuple]], tuple[Any, list[int]]]
