"""AdaLoRA: updates P diag(E) Q whose ranks are cut where they matter least (Zhang et al. 2023, arXiv:2303.10512).

The default learning rate is that of the paper's runs on MNLI and on summaries.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from llmkit.errors import UserError
from llmkit.models import family_of
from llmkit.models.layers import block_linears, original_classes, restore_class, swap_class
from llmkit.peft import lora
from llmkit.peft.method import Method
from llmkit.peft.targets import Layers, choose_linears

Ratio = Annotated[float, Field(gt=0, lt=1)]
FACTORS = ("lora_A", "lora_B", "lora_E")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of AdaLoRA. The defaults are peft's, but for the share of the steps that the paper's runs have.

    r               the rank on average at the end, peft's target_r
    init_r          the rank of each linear at first
    alpha           the update is scaled by alpha / init_r
    target_modules  names or ends of names of linears; null: every linear of the blocks
    layers          only linears of these blocks: their numbers, or "first 4", "last 4"
    warmup          share of the steps before ranks are cut
    final           share of the steps after which they stay as they are
    every           steps between two cuts
    beta1           decay of the average of an element's importance, |weight x gradient|
    beta2           decay of the average of how much its importance changes
    orthogonality   weight of the loss that keeps P and Q orthogonal
    """

    r: Annotated[int, Field(ge=1)] = 8
    init_r: Annotated[int, Field(ge=2)] = 12
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: list[str] | None = None
    layers: Layers | None = None
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    final: Annotated[float, Field(ge=0, lt=1)] = 0.3
    every: Annotated[int, Field(ge=1)] = 10
    beta1: Ratio = 0.85
    beta2: Ratio = 0.85
    orthogonality: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5


class AdaLoRA:
    """A linear with an update B (E * A) beside its weight: A (r, in), B (out, r), E (r, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        x = F.dropout(x, self.lora_dropout, self.training)
        return y + F.linear(F.linear(x, self.lora_A * self.lora_E), self.lora_B) * self.lora_scale


def apply(model: nn.Module, options: Options, seed: int = 0, new_ids: Sequence[int] = ()) -> None:
    """Freeze the model and give the chosen linears A and B ~ N(0, 0.02^2) and E = 0, all fp32, as peft does."""
    chosen, _ = choose_linears(model, options.layers, options.target_modules)
    if options.r >= options.init_r:
        raise UserError(
            "peft.r is not under peft.init_r, from which ranks are cut", got=f"{options.r}, {options.init_r}"
        )
    if options.warmup + options.final >= 1:
        got = f"warmup {options.warmup}, final {options.final}"
        raise UserError("peft.warmup and peft.final leave no steps in which ranks are cut", got=got)
    model.requires_grad_(False)
    for index, module in enumerate(chosen.values()):
        device, r = module.weight.device, options.init_r
        shapes = {"lora_A": (r, module.in_features), "lora_B": (module.out_features, r), "lora_E": (r, 1)}
        for name, shape in shapes.items():
            factor = torch.zeros(shape, device=device)
            if name != "lora_E" and device.type != "meta":
                generator = torch.Generator(device).manual_seed((seed * 1_000_003 + index) * 2 + (name == "lora_B"))
                factor.normal_(0.0, 0.02, generator=generator)
            setattr(module, name, nn.Parameter(factor))
            for average in ("importance", "change"):
                module.register_buffer(f"{name}_{average}", torch.zeros(shape, device=device), persistent=False)
        module.register_buffer("lora_kept", torch.ones(r, 1, device=device, dtype=torch.bool), persistent=False)
        module.lora_scale, module.lora_dropout = options.alpha / (r + 1e-5), options.dropout  # peft's scale
        swap_class(module, AdaLoRA)


def adapted(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linears with an update, by their full names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaLoRA)}


def tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters by PEFT's names."""
    return {f"{name}.{last}": getattr(module, last) for name, module in adapted(model).items() for last in FACTORS}


def state(model: nn.Module) -> dict[str, Tensor]:
    """Return the averages that importance is measured by, and which ranks are kept."""
    names = [*(f"{factor}_{average}" for factor in FACTORS for average in ("importance", "change")), "lora_kept"]
    return {f"{name}.{last}": getattr(module, last) for name, module in adapted(model).items() for last in names}


def disabled(model: nn.Module) -> AbstractContextManager[None]:
    """Compute what the base computes."""
    return original_classes(model, (AdaLoRA,))


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Fold every update into its weight, in fp32, and give the linears their class back."""
    for module in adapted(model).values():
        update = module.lora_B.float() @ (module.lora_A.float() * module.lora_E.float()) * module.lora_scale
        module.weight.copy_(module.weight.float() + update)
        for name in [name for name in (*module._parameters, *module._buffers) if name.startswith("lora_")]:
            delattr(module, name)
        del module.lora_scale, module.lora_dropout
        restore_class(module)
    model.requires_grad_(True)


# ---- while training -------------------------------------------------------------------------------------------------


def penalty(model: nn.Module, options: Options) -> Tensor:
    """Return how far the rows of A and the columns of B are from orthonormal, weighted; equation 4 of the paper."""
    grams = [
        one
        for module in adapted(model).values()
        for one in (module.lora_A @ module.lora_A.T, module.lora_B.T @ module.lora_B)
    ]
    apart = [torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)) for gram in grams]
    return options.orthogonality * torch.stack(apart).mean()


def budget(options: Options, linears: int, step: int, max_steps: int) -> int:
    """Return the ranks that all linears keep together from a step on: a cubic fall, equation 11 of the paper.

    >>> [budget(Options(), 10, step, 100) for step in (10, 30, 70)]
    [120, 91, 80]
    """
    first, last = options.init_r * linears, options.r * linears
    begin, end = round(options.warmup * max_steps), round((1 - options.final) * max_steps)
    if step <= begin and step < end:
        return first
    left = max(0.0, 1 - (step - begin) / max(1, end - begin))
    return int(last + (first - last) * left**3)


@torch.no_grad()
def after_step(model: nn.Module, options: Options, step: int, max_steps: int) -> None:
    """Update the importance of all elements by their gradients, and set E to 0 for the ranks that matter least.

    A rank's importance is that of its element of E and the mean ones of its row of A and column of B; the importance
    of an element is the average of |weight x gradient| times the average of its change. Equations 8 to 10.
    """
    modules, end = list(adapted(model).values()), min(round((1 - options.final) * max_steps), max_steps - 1)
    if step < end:
        for module in modules:
            for name in FACTORS:
                weight, importance, change = (
                    getattr(module, f"{name}{more}") for more in ("", "_importance", "_change")
                )
                # a step that is skipped has gradients that are not finite
                now = torch.nan_to_num((weight * weight.grad).abs(), 0.0, 0.0)
                importance.lerp_(now, 1 - options.beta1)
                change.lerp_((now - importance).abs(), 1 - options.beta2)
    kept = budget(options, len(modules), step, max_steps)
    if (step < end and step % options.every == 0 and kept < options.init_r * len(modules)) or step == end:
        scores = [
            (module.lora_E_importance * module.lora_E_change).flatten()
            + (module.lora_A_importance * module.lora_A_change).mean(1)
            + (module.lora_B_importance * module.lora_B_change).mean(0)
            for module in modules
        ]
        highest = torch.cat(scores).topk(kept).indices
        flags = torch.zeros(len(scores) * options.init_r, dtype=torch.bool, device=highest.device)
        flags[highest] = True
        for module, mine in zip(modules, flags.split(options.init_r), strict=True):
            module.lora_kept.copy_(mine[:, None])
            module.lora_E *= module.lora_kept
    elif step > end:  # the optimizer's momentum would bring them back
        for module in modules:
            module.lora_E *= module.lora_kept


# ---- PEFT's layout --------------------------------------------------------------------------------------------------


@dataclass
class PeftFields:
    """The fields of an adapter_config.json that are read. The names and shapes of the tensors say the rest."""

    init_r: Annotated[int, Field(ge=1)]
    lora_alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    target_r: Annotated[int, Field(ge=1)] = 8
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    rank_pattern: dict[str, list[bool]] | None = field(default=None)  # flags of the ranks that are kept


def to_peft(model: nn.Module, options: Options) -> dict:
    """Return the fields of adapter_config.json. Ranks that were cut are zeros of E: all linears have init_r."""
    return {
        "r": 8,  # of LoRA, which AdaLoRA does not read: peft warns of another one than its default
        "init_r": options.init_r,
        "target_r": options.r,
        "lora_alpha": options.alpha,
        "lora_dropout": options.dropout,
        "target_modules": list(adapted(model)),
        "fan_in_fan_out": bool(family_of(model.config).transposed),
        "total_step": 10**9,  # peft asks for one, and would train up to it
    }


def from_peft(model: nn.Module, fields: PeftFields, shapes: dict[str, tuple]) -> tuple[Options, list[int]]:
    """Return the options of an adapter_config.json. peft cuts the matrices of a file to the ranks that were kept."""
    names = [name for name in block_linears(model) if f"{name}.lora_E" in shapes]
    if not names:
        raise ValueError("its file has no update of a linear of the blocks")
    if (most := max(shapes[f"{name}.lora_E"][0] for name in names)) > fields.init_r:
        raise ValueError(f"a linear has rank {most}, and init_r is {fields.init_r}")
    options = Options(
        r=min(fields.target_r, fields.init_r - 1),
        init_r=fields.init_r,
        alpha=fields.lora_alpha,
        dropout=fields.lora_dropout,
        target_modules=names,
    )
    return options, []


def from_file(model: nn.Module, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a file's tensors with all ranks of the model: those that peft has cut away are zeros."""
    for name, parameter in tensors(model).items():
        if (tensor := found.get(name)) is not None and tensor.dim() == 2:
            more = [parameter.shape[axis] - tensor.shape[axis] for axis in (1, 0)]
            found[name] = F.pad(tensor, (0, max(0, more[0]), 0, max(0, more[1])))
    return found


METHOD = Method(
    options=Options,
    lr=5e-4,
    training_options=frozenset("dropout r warmup final every beta1 beta2 orthogonality".split()),
    apply=apply,
    tensors=tensors,
    disabled=disabled,
    merge=merge,
    penalty=penalty,
    after_step=after_step,
    state=state,
    peft_type="ADALORA",
    in_peft=True,
    fields=PeftFields,
    ignored_fields=lora.IGNORED_FIELDS | set("r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step".split()),
    supported_values=lora.SUPPORTED_VALUES,
    to_peft=to_peft,
    from_peft=from_peft,
    from_file=from_file,
)
