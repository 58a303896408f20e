"""Mixtral: Mistral with a mixture of experts in place of each MLP (arXiv:2401.04088).

The weights of all experts are one tensor, which two grouped matrix products use. In files each expert has its own name.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.models import llama, mistral
from llmkit.models.causal import Context
from llmkit.models.family import Family, Problem
from llmkit.models.layers import ACTIVATIONS, rope_problems

MOST_EXPERTS = 2**16  # in all layers: each has names of its own in files. Switch-C: 15 * 2,048 (arXiv:2101.03961)


@dataclass(kw_only=True)
class Config(mistral.Config):
    model_type: ClassVar[str] = "mixtral"

    sliding_window: int | None = None
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    router_aux_loss_coef: float = 0.001  # weight of `balance_loss` in training


class Router(nn.Module):
    """Choose the experts of each of N tokens, and their weights."""

    def __init__(self, config: Config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_local_experts, config.hidden_size))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map x (N, hidden) to chosen experts (N, k), their weights (N, k), and balance statistics (2, E)."""
        probs = F.linear(x, self.weight).softmax(-1, dtype=torch.float32)  # (N, E)
        weights, chosen = probs.topk(self.top_k, dim=-1)
        used = F.one_hot(chosen, probs.shape[1]).sum(1).float().mean(0)  # (E,) share of the tokens
        return chosen, weights / weights.sum(-1, keepdim=True), torch.stack((used, probs.mean(0)))


class Experts(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        experts, hidden, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs; x (N, hidden), chosen and weights (N, k)."""
        top_k = chosen.shape[1]
        order = chosen.flatten().argsort(stable=True)  # (N * k,) rows, by expert
        ends = F.one_hot(chosen.flatten(), len(self.down_proj)).sum(0).cumsum(0).to(torch.int32)  # (E,)
        gate, up = self.product("gate_up_proj", x[order // top_k], ends).chunk(2, dim=-1)
        y = self.product("down_proj", self.act(gate) * up, ends)  # (N * k, hidden)
        y = y * weights.flatten()[order, None].to(y.dtype)
        # With its dtype said, autocast on CUDA does not make the sum, and so all that follows, fp32.
        return y[order.argsort()].unflatten(0, (-1, top_k)).sum(1, dtype=y.dtype)

    def product(self, name: str, x: Tensor, ends: Tensor) -> Tensor:
        """Multiply rows x (N, in) by the matrices of a name, see `grouped_product`."""
        return grouped_product(x, getattr(self, name), ends)


def grouped_product(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Multiply x (N, in) by matrices (E, out, in).mT, its rows up to ends[e] by matrix e; return (N, out)."""
    if torch.is_autocast_enabled(x.device.type):  # autocast does not cover grouped_mm
        dtype = torch.get_autocast_dtype(x.device.type)
        x, matrices = x.to(dtype), matrices.to(dtype)
    return F.grouped_mm(x, matrices.mT, offs=ends)


class SparseMLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.flatten(0, -2)  # (N, hidden)
        chosen, weights, balance = self.gate(rows)
        return self.experts(rows, chosen, weights).view_as(x), balance


class Block(nn.Module):
    def __init__(self, config: Config, variant: llama.Variant, layer: int):
        super().__init__()
        self.input_layernorm = variant.norm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = llama.Attention(config, variant, layer)
        self.post_attention_layernorm = variant.norm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SparseMLP(config)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        x = x + self.self_attn(self.input_layernorm(x), context)
        y, balance = self.mlp(self.post_attention_layernorm(x))
        return x + y, balance


def balance_loss(balances: Tensor) -> Tensor:
    """Return the loss of unevenly used experts from the layers' statistics (L, 2, E); it is k if all are used equally.

    E * sum over experts of (share of the tokens) * (mean probability), each a mean over layers: Fedus et al. 2021
    (arXiv:2101.03961, equation 4), over all layers at once as transformers does.
    """
    used, probs = balances.mean(0)
    return balances.shape[-1] * (used.detach() * probs).sum()


# ---- the family -----------------------------------------------------------------------------------------------------


def problems(config: Config) -> Iterator[Problem]:
    """Yield the problems of rotary positions and of the numbers of experts."""
    yield from rope_problems(config)
    if (experts := config.num_local_experts * config.num_hidden_layers) > MOST_EXPERTS:
        yield "num_local_experts", f"makes {experts} experts in all layers, over {MOST_EXPERTS}"
    if config.num_experts_per_tok > config.num_local_experts:
        yield "num_experts_per_tok", f"is {config.num_experts_per_tok}, over the {config.num_local_experts} experts"


def to_disk(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return views of a parameter by their names in files: each expert, gate and up are separate."""
    path, _, last = name.replace(".mlp.", ".block_sparse_moe.").rpartition(".")
    if not path.endswith(".experts"):
        return {f"{path}.{last}": tensor}
    if last == "down_proj":
        return {f"{path}.{e}.w2.weight": expert for e, expert in enumerate(tensor)}
    halves = [expert.chunk(2) for expert in tensor]
    return {
        f"{path}.{e}.{w}.weight": half
        for e, pair in enumerate(halves)
        for w, half in zip(("w1", "w3"), pair, strict=True)
    }


def gguf_layout(config: Config, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Split the gate and up projections of all experts; treat other weights as in Llama."""
    if name.endswith("experts.gate_up_proj"):
        gate, up = tensor.chunk(2, dim=1)
        path = name.removesuffix("gate_up_proj")
        return {f"{path}gate_proj.weight": gate, f"{path}up_proj.weight": up}
    if name.endswith("experts.down_proj"):
        return {f"{name}.weight": tensor}
    return llama.gguf_layout(config, name, tensor)


MIXTRAL = mistral.MISTRAL | {
    "problems": problems,
    "hf_defaults": mistral.MISTRAL["hf_defaults"] | {"rms_norm_eps": 1e-5, "rope_theta": 1e6},
    "gguf": replace(llama.LLAMA["gguf"], layout=gguf_layout),
}
FAMILY = Family(
    **MIXTRAL,
    config=Config,
    build=lambda config: llama.Model(config, block=Block),
    architecture="MixtralForCausalLM",
    fixed_values={"router_jitter_noise": 0.0},
    to_disk=to_disk,
    experts=lambda config: (config.num_local_experts, config.num_experts_per_tok),
    aux_loss_weight=lambda config: config.router_aux_loss_coef,
    aux_loss=balance_loss,
)
