"""Prefix tuning: the keys and values of virtual tokens are trained, for every layer (Li and Liang 2021, 2101.00190).

The default learning rate is that of peft's example. The paper trains an MLP that makes the prefix, at 5e-5.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from llmkit.peft import virtual
from llmkit.peft.method import Method


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of prefix tuning.

    num_virtual_tokens  the length of the prefix
    """

    num_virtual_tokens: virtual.VirtualTokens = 20


def keys_values(model: nn.Module) -> virtual.KeysValues:
    """Return the keys and values of each layer, as they are trained."""
    rows, config = model.prompt_embeddings, model.config
    both = rows.view(len(rows), config.num_hidden_layers, 2, config.num_key_value_heads, config.head_dim)
    both = both.permute(1, 2, 3, 0, 4)[:, :, None]  # (layers, 2, 1, kv heads, V, D)
    return [tuple(pair) for pair in both]


def apply(model: nn.Module, options: Options, seed: int = 0, new_ids: Sequence[int] = ()) -> None:
    """Freeze the model and train a prefix (V, layers * 2 * kv heads * D), which begins as that of frequent tokens."""
    number, config = options.num_virtual_tokens, model.config
    virtual.prepend(model, number, keys_values)
    vectors = virtual.first_vectors(model, number, seed)
    if vectors.device.type == "meta":
        width = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
        rows = torch.empty(number, width, device="meta")
    else:
        with torch.no_grad():
            read = virtual.read_vectors(model, vectors)
            rows = torch.cat([one[0].transpose(0, 1).flatten(1) for pair in read for one in pair], dim=1).float()
    model.prompt_embeddings = nn.Parameter(rows)


def to_peft(model: nn.Module, options: Options) -> dict:
    """Return the fields of adapter_config.json: as peft has them where queries share keys."""
    heads = model.config.num_key_value_heads
    width = {"token_dim": heads * model.config.head_dim, "num_attention_heads": heads}
    return virtual.common_fields(model, options.num_virtual_tokens) | width


METHOD = Method(
    options=Options,
    lr=1e-2,
    apply=apply,
    tensors=lambda model: virtual.embeddings_of(model, keys_values),
    disabled=virtual.disabled,
    merge=None,
    peft_type="PREFIX_TUNING",
    in_peft=True,
    prefix="",
    fields=virtual.PeftFields,
    # a prefix that an MLP made is in the file as it is
    ignored_fields=virtual.DESCRIBING | {"encoder_hidden_size", "prefix_projection", "init_weights"},
    to_peft=to_peft,
    from_peft=lambda model, fields, shapes: (Options(num_virtual_tokens=fields.num_virtual_tokens), []),
)
