"""LLaMA-Adapter: attention to trained prompts in the last layers, behind a gate (Zhang et al. 2023, arXiv:2303.16199).

For families with Llama's attention. Nothing here is made fast: queries are computed a second time, as in peft. The
default learning rate and number of epochs are the paper's.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from llmkit.errors import UserError
from llmkit.models.causal import Context
from llmkit.models.layers import original_classes, rotate, swap_class
from llmkit.models.llama import Attention
from llmkit.peft.method import Method


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of LLaMA-Adapter.

    adapter_len     vectors of the prompt of a layer, 10 in the paper
    adapter_layers  the last layers that have one; 30 of 32 in the paper. Null: all but two, or all of fewer than four
    """

    adapter_len: Annotated[int, Field(ge=1, le=4096)] = 10
    adapter_layers: Annotated[int, Field(ge=1)] | None = None


class PromptedAttention:
    """Attention that adds what its queries read of a prompt `adaption_prompt` (1, P, hidden), times `adaption_gate`."""

    def forward(self, x: Tensor, context: Context) -> Tensor:
        y, prompt = super().forward(x, context), self.adaption_prompt.to(x.dtype)
        q, k, v = (
            project(one).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B or 1, heads, T or P, D)
            for project, one in ((self.q_proj, x), (self.k_proj, prompt), (self.v_proj, prompt))
        )
        q, k = rotate(self.q_norm(q), *context.rope), self.k_norm(k)
        k, v = (one.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for one in (k, v))
        weights = (q @ k.mT / math.sqrt(self.head_dim)).softmax(-1, dtype=torch.float32) * self.adaption_gate
        read = (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)
        return y + nn.functional.linear(read, self.o_proj.weight)


def apply(model: nn.Module, options: Options, seed: int = 0, new_ids: Sequence[int] = ()) -> None:
    """Freeze the model and give the last layers a prompt ~ N(0, 1) and a gate that is 0, both fp32."""
    depth = len(model.blocks)
    number = options.adapter_layers or (depth - 2 if depth >= 4 else depth)
    attentions = [getattr(block, "self_attn", None) for block in model.blocks]
    if not all(isinstance(one, Attention) for one in attentions):
        what = "LLaMA-Adapter needs the attention of Llama's families"
        raise UserError(what, got=model.config.model_type, fix="use prefix")
    if number > depth:
        raise UserError("peft.adapter_layers is over the layers of the model", got=number, expected=f"at most {depth}")
    model.requires_grad_(False)
    for index, module in enumerate(attentions[depth - number :]):
        device = module.o_proj.weight.device
        prompt = torch.empty(1, options.adapter_len, model.config.hidden_size, device=device)
        if device.type != "meta":
            generator = torch.Generator(device).manual_seed(seed * 1_000_003 + index)
            prompt.normal_(generator=generator)
        module.adaption_prompt = nn.Parameter(prompt)
        module.adaption_gate = nn.Parameter(torch.zeros(1, device=device))
        swap_class(module, PromptedAttention)


def adapted(model: nn.Module) -> dict[str, nn.Module]:
    """Return the attentions with a prompt, by their full names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PromptedAttention)}


def tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters by PEFT's names."""
    names = ("adaption_prompt", "adaption_gate")
    return {f"{name}.{last}": getattr(module, last) for name, module in adapted(model).items() for last in names}


def disabled(model: nn.Module) -> AbstractContextManager[None]:
    """Compute what the base computes."""
    return original_classes(model, (PromptedAttention,))


@dataclass
class PeftFields:
    """The fields of an adapter_config.json that are read."""

    adapter_len: Annotated[int, Field(ge=1)]
    adapter_layers: Annotated[int, Field(ge=1)]


METHOD = Method(
    options=Options,
    lr=9e-3,
    epochs=5,
    apply=apply,
    tensors=tensors,
    disabled=disabled,
    merge=None,
    peft_type="ADAPTION_PROMPT",
    in_peft=True,
    fields=PeftFields,
    supported_values={"target_modules": ("self_attn", None)},
    to_peft=lambda model, options: {
        "adapter_len": options.adapter_len,
        "adapter_layers": len(adapted(model)),
        "target_modules": "self_attn",
    },
    from_peft=lambda model, fields, shapes: (Options(**vars(fields)), []),
)
