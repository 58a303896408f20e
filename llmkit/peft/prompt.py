"""Prompt tuning: the embeddings of virtual tokens are trained (Lester et al. 2021, arXiv:2104.08691).

The default learning rate is that of peft's example. The paper's is 0.3, of Adafactor.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from llmkit.peft import virtual
from llmkit.peft.method import Method


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of prompt tuning.

    num_virtual_tokens  the length of the prompt
    """

    num_virtual_tokens: virtual.VirtualTokens = 20


def keys_values(model: nn.Module) -> virtual.KeysValues:
    """Return the keys and values of the virtual tokens, which the model reads first."""
    return virtual.read_vectors(model, model.prompt_embeddings)


def apply(model: nn.Module, options: Options, seed: int = 0, new_ids: Sequence[int] = ()) -> None:
    """Freeze the model and train the embeddings (V, hidden) of virtual tokens, which begin as frequent tokens."""
    virtual.prepend(model, options.num_virtual_tokens, keys_values)
    model.prompt_embeddings = nn.Parameter(virtual.first_vectors(model, options.num_virtual_tokens, seed))


METHOD = Method(
    options=Options,
    lr=3e-2,
    apply=apply,
    tensors=lambda model: virtual.embeddings_of(model, keys_values),
    disabled=virtual.disabled,
    merge=None,
    peft_type="PROMPT_TUNING",
    in_peft=True,
    prefix="",
    fields=virtual.PeftFields,
    ignored_fields=virtual.DESCRIBING
    | frozenset("prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs".split()),
    to_peft=lambda model, options: (
        virtual.common_fields(model, options.num_virtual_tokens) | {"prompt_tuning_init": "RANDOM"}
    ),
    from_peft=lambda model, fields, shapes: (Options(num_virtual_tokens=fields.num_virtual_tokens), []),
)
