"""The contract of a parameter-efficient method: what its file tells the rest of llmkit, in one typed object."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

PREFIX = "base_model.model."  # of a tensor's name in PEFT's files


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to train few parameters of a built model. Its functions change the model in place."""

    options: type  # dataclass of the options in the YAML
    # options that only training reads: another value goes with an adapter that is trained further
    training_options: frozenset[str] = frozenset()
    # of `llmkit finetune` if the config says nothing; the source is in the docstring of its file
    lr: float
    epochs: int = 3
    rows_option: str | None = None  # the option that trains the rows of added tokens; None: the method can't
    # (model, options, seed, ids of added tokens); raises UserError if the method does not fit the model
    apply: Callable[[nn.Module, Any, int, Sequence[int]], None]
    tensors: Callable[[nn.Module], dict[str, nn.Parameter]]  # name in the adapter's file -> trained parameter
    disabled: Callable[[nn.Module], AbstractContextManager[None]]  # in it the model computes what its base does
    # fold what was trained into the weights, in fp32; leave a plain model. None: it is no change of weights
    merge: Callable[[nn.Module], None] | None
    # While training, see `training.loop`:
    penalty: Callable[[nn.Module, Any], Tensor] | None = None  # (model, options) -> what is added to the loss of a step
    # (model, options, steps taken, max_steps), after each of the optimizer's steps, with its gradients
    after_step: Callable[[nn.Module, Any, int, int], None] | None = None
    state: Callable[[nn.Module], dict[str, Tensor]] = lambda model: {}  # what a checkpoint keeps beside the adapter

    # The adapter's folder, in PEFT's layout:
    peft_type: str  # the method's name in adapter_config.json
    in_peft: bool  # whether the peft library has the method
    prefix: str = PREFIX  # of the names of its tensors
    fields: type  # dataclass of the fields of adapter_config.json that are read
    ignored_fields: frozenset[str] = frozenset()  # fields that change only training or loading
    # further fields -> the values that are built; of all others null, false and empty ones
    supported_values: dict[str, tuple] = field(default_factory=dict)
    to_peft: Callable[[nn.Module, Any], dict[str, Any]]  # (model, options) -> fields of adapter_config.json
    # (model, fields, shapes of the tensors) -> (options, ids of added tokens); raises ValueError if they do not fit
    from_peft: Callable[[nn.Module, Any, dict[str, tuple]], tuple[Any, list[int]]]
    # what a file has in the place of `tensors` (PiSSA: matrices of twice the rank), and back; None: the same
    to_file: Callable[[nn.Module], dict[str, Tensor]] | None = None
    from_file: Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]] | None = None
