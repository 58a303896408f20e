"""P-tuning: virtual tokens that a small MLP makes of trained vectors (Liu et al. 2021, arXiv:2103.10385).

The default learning rate is that of peft's example.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from llmkit.peft import virtual
from llmkit.peft.method import Method


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of P-tuning.

    num_virtual_tokens   the length of the prompt
    encoder_hidden_size  width of the MLP; null: hidden_size. 0: no MLP, as an adapter that peft has saved
    """

    num_virtual_tokens: virtual.VirtualTokens = 20
    encoder_hidden_size: Annotated[int, Field(ge=0, le=2**20)] | None = None


class PromptEncoder(nn.Module):
    """Make embeddings (V, hidden) of trained vectors; peft's MLP has three linears and ReLUs between them too."""

    def __init__(self, number: int, hidden_size: int, width: int):
        super().__init__()
        self.embedding = nn.Embedding(number, hidden_size)
        sizes = (hidden_size, width, width, hidden_size)
        linears = [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
        self.mlp_head = nn.Sequential(linears[0], nn.ReLU(), linears[1], nn.ReLU(), linears[2])

    def forward(self) -> Tensor:
        return self.mlp_head(self.embedding.weight)


def vectors(model: nn.Module) -> Tensor:
    """Return the embeddings (V, hidden) of the virtual tokens."""
    return model.prompt_encoder() if hasattr(model, "prompt_encoder") else model.prompt_embeddings


def keys_values(model: nn.Module) -> virtual.KeysValues:
    """Return the keys and values of the virtual tokens, which the model reads first."""
    return virtual.read_vectors(model, vectors(model))


def apply(model: nn.Module, options: Options, seed: int = 0, new_ids: Sequence[int] = ()) -> None:
    """Freeze the model and train vectors and an MLP, fp32, with torch's initialisation of linears.

    The vectors begin as embeddings of frequent tokens.
    """
    number, width = options.num_virtual_tokens, options.encoder_hidden_size
    virtual.prepend(model, number, keys_values)
    first = virtual.first_vectors(model, number, seed)
    if width == 0:
        model.prompt_embeddings = nn.Parameter(first)
        return
    with first.device:
        encoder = PromptEncoder(number, model.config.hidden_size, width or model.config.hidden_size)
    if first.device.type != "meta":
        generator = torch.Generator(first.device).manual_seed(seed)
        with torch.no_grad():
            for linear in encoder.mlp_head[::2]:
                bound = linear.in_features**-0.5
                for parameter in linear.parameters():
                    parameter.uniform_(-bound, bound, generator=generator)
            encoder.embedding.weight.copy_(first)
    model.prompt_encoder = encoder


def tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters. Those of the MLP have no name in PEFT's files, which have what it makes."""
    if getattr(model, "keys_values", None) is not keys_values:
        return {}
    if not hasattr(model, "prompt_encoder"):
        return {"prompt_embeddings": model.prompt_embeddings}
    return {f"prompt_encoder.{name}": parameter for name, parameter in model.prompt_encoder.named_parameters()}


@torch.no_grad()
def to_file(model: nn.Module) -> dict[str, Tensor]:
    """Return what peft reads, and the parameters of the MLP, with which training goes on."""
    return tensors(model) | {"prompt_embeddings": vectors(model)}


def from_file(model: nn.Module, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a file's tensors without what its MLP makes."""
    return {name: tensor for name, tensor in found.items() if name != "prompt_embeddings" or name in tensors(model)}


@dataclass
class PeftFields:
    """The fields of an adapter_config.json that are read."""

    num_virtual_tokens: Annotated[int, Field(ge=1)]
    encoder_hidden_size: Annotated[int, Field(ge=1)] | None = None


def to_peft(model: nn.Module, options: Options) -> dict:
    """Return the fields of adapter_config.json."""
    width = options.encoder_hidden_size or model.config.hidden_size
    more = {"encoder_reparameterization_type": "MLP", "encoder_hidden_size": width}
    return virtual.common_fields(model, options.num_virtual_tokens) | more


def from_peft(model: nn.Module, fields: PeftFields, shapes: dict[str, tuple]) -> tuple[Options, list[int]]:
    """Return the options of an adapter_config.json; without an MLP if its file has none."""
    width = shapes.get("prompt_encoder.mlp_head.0.weight", (0,))[0]
    return Options(num_virtual_tokens=fields.num_virtual_tokens, encoder_hidden_size=width), []


METHOD = Method(
    options=Options,
    lr=1e-3,
    apply=apply,
    tensors=tensors,
    disabled=virtual.disabled,
    merge=None,
    peft_type="P_TUNING",
    in_peft=True,
    prefix="",
    fields=PeftFields,
    ignored_fields=virtual.DESCRIBING
    | frozenset("encoder_reparameterization_type encoder_dropout encoder_num_layers".split()),
    to_peft=to_peft,
    from_peft=from_peft,
    to_file=to_file,
    from_file=from_file,
)
