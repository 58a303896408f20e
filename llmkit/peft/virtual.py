"""Put virtual tokens before all texts: what prefix tuning, prompt tuning and P-tuning have in common.

What the virtual tokens are to a layer is its keys and values of them. These are computed once for a batch, whatever the
texts and however they are packed, and every text reads them as if it continued them.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from llmkit.errors import UserError
from llmkit.models.attention import Masks, visible
from llmkit.models.causal import Context
from llmkit.models.layers import original_classes, swap_class
from llmkit.models.shared_prefix import SharedPrefix

FREQUENT = (
    5000  # tokens that virtual ones begin as, as in Lester et al. 2021: a BPE vocabulary begins with its commonest
)
VirtualTokens = Annotated[int, Field(ge=1, le=4096)]
KeysValues = list[tuple[Tensor, Tensor]]  # of each layer, (1, kv heads, V, D)


class PrefixedLayer:
    """Read virtual tokens before what a layer's cache holds, or before a text without a cache."""

    def __init__(self, keys: Tensor, values: Tensor, cache):
        self.keys, self.values, self.cache = keys, values, cache

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the virtual tokens and of the text, in the place of `LayerCache.update`."""
        if self.cache is not None:
            k, v = self.cache.update(k, v)
        k, v = (
            torch.cat((one.to(x.dtype).expand(x.shape[0], -1, -1, -1), x), dim=2)
            for one, x in ((self.keys, k), (self.values, v))
        )
        return k, v


class WithVirtualTokens:
    """Mixin for a CausalLM that reads the virtual tokens of `keys_values` before each text."""

    def look_back(self, input_ids: Tensor, *read) -> tuple[Tensor, Masks, Sequence[PrefixedLayer]]:
        positions, masks, layers = super().look_back(input_ids, *read)
        number, length = self.number_of_virtual_tokens, input_ids.shape[1]
        most = self.config.max_position_embeddings + number - 1  # a row that is done counts on
        masks = {window: with_columns(mask, number, length, input_ids.device) for window, mask in masks.items()}
        pairs = zip(self.keys_values(self), layers, strict=True)
        return (positions + number).clamp(max=most), masks, [PrefixedLayer(*pair, layer) for pair, layer in pairs]


class TokensOrVectors:
    """Mixin for an embedding that leaves vectors as they are."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.is_floating_point() else super().forward(x)


def with_columns(mask: Tensor | None, number: int, length: int, device: torch.device) -> Tensor | None:
    """Return a mask, as `attend` takes it, with columns before the others that all `length` queries see."""
    if mask is None:
        if length == 1:
            return None
        columns = torch.arange(length, device=device)
        mask = visible(columns[:, None], columns, None)
    return torch.cat((mask.new_ones(*mask.shape[:-1], number), mask), dim=-1)


def prepend(model: nn.Module, number: int, keys_values: Callable[[nn.Module], KeysValues]) -> None:
    """Freeze a model, and make it read `number` virtual tokens first, whose `keys_values(model)` there are.

    The longest text that it can read is shorter by them. Raises UserError for a model that can't read them.
    """
    config = model.config
    if config.kind != "causal" or any(config.windows):
        why = "sliding windows, which would lose them" if config.kind == "causal" else "no decoder alone"
        raise UserError("virtual tokens can't be read by this model", got=f"{config.model_type}: {why}")
    if number >= config.max_position_embeddings:
        got = f"{number}, of {config.max_position_embeddings} positions"
        raise UserError("peft.num_virtual_tokens leaves no positions to texts", got=got)
    model.requires_grad_(False)
    model.config = replace(config, max_position_embeddings=config.max_position_embeddings - number)
    model.number_of_virtual_tokens, model.keys_values = number, keys_values
    swap_class(model.wte, TokensOrVectors)
    swap_class(model, WithVirtualTokens)


def disabled(model: nn.Module) -> AbstractContextManager[None]:
    """Compute what the base computes."""
    return original_classes(model, (WithVirtualTokens,))


def read_vectors(model: nn.Module, vectors: Tensor) -> KeysValues:
    """Return the keys and values of virtual tokens with these embeddings (V, hidden)."""
    number, device = len(vectors), vectors.device
    zeros = torch.zeros(number, dtype=torch.long, device=device)
    cache = SharedPrefix(model.config.windows, torch.arange(number, device=device), zeros, zeros)
    positions, masks = cache.begin(number)
    x, rope = model.embed(vectors[None].to(model.wte.weight.dtype), positions)
    for block, layer in zip(model.blocks, cache.layers, strict=True):
        x = block(x, Context(masks, rope, layer))
        x = x[0] if isinstance(x, tuple) else x  # with statistics of experts
    return [(layer.keys, layer.values) for layer in cache.layers]


def first_vectors(model: nn.Module, number: int, seed: int) -> Tensor:
    """Return embeddings of tokens that are drawn from the most frequent ones, fp32 (V, hidden)."""
    table = model.wte.weight
    if table.device.type == "meta":
        return torch.empty(number, table.shape[1], device="meta")
    ids = torch.randint(min(FREQUENT, len(table)), (number,), generator=torch.Generator().manual_seed(seed))
    return table.detach()[ids.to(table.device)].float()


def embeddings_of(model: nn.Module, keys_values: Callable) -> dict[str, nn.Parameter]:
    """Return the trained parameter by PEFT's name, if it is `keys_values` that makes the virtual tokens of it."""
    found = getattr(model, "keys_values", None) is keys_values
    return {"prompt_embeddings": model.prompt_embeddings} if found else {}


@dataclass
class PeftFields:
    """The fields of an adapter_config.json that are read."""

    num_virtual_tokens: Annotated[int, Field(ge=1)]


def common_fields(model: nn.Module, number: int) -> dict:
    """Return fields of adapter_config.json that peft reads for every kind of virtual tokens."""
    config = model.config
    return {
        "num_virtual_tokens": number,
        "token_dim": config.hidden_size,
        "num_transformer_submodules": 1,
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_hidden_layers,
    }


DESCRIBING = frozenset("token_dim num_transformer_submodules num_attention_heads num_layers".split())
