"""The contract of a parameter-efficient method: what its file tells the rest of llmkit, in one typed object."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to train few parameters of a built model. Its functions change the model in place.

    options           dataclass of the options in the YAML
    apply             (model, options, seed, ids of added tokens): freeze the model and add what is trained
    tensors           model -> {name in the adapter's file: trained parameter}, for saving and for loading
    disabled          model -> a context in which the model computes what its base does (a reference model)
    merge             model -> None: fold what was trained into the weights, in fp32, and leave a plain model

    The adapter's folder, in PEFT's layout:
    peft_type         the method's name in adapter_config.json
    in_peft           whether the peft library has the method
    fields            dataclass of the fields of adapter_config.json that are read
    supported_values  fields that would change what the adapter does -> the values that are built
    to_peft           (model, options) -> the fields of adapter_config.json
    from_peft         (model, fields) -> (options, ids of added tokens); raises ValueError if they do not fit
    """

    options: type
    apply: Callable[[nn.Module, Any, int, list[int]], None]
    tensors: Callable[[nn.Module], dict[str, nn.Parameter]]
    disabled: Callable[[nn.Module], AbstractContextManager[None]]
    merge: Callable[[nn.Module], None]

    peft_type: str
    in_peft: bool
    fields: type
    supported_values: dict[str, tuple] = field(default_factory=dict)
    to_peft: Callable[[nn.Module, Any], dict[str, Any]]
    from_peft: Callable[[nn.Module, Any], tuple[Any, list[int]]]
