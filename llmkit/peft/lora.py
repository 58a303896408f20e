"""LoRA: y = W x + scale * B A x with W frozen (Hu et al. 2021, arXiv:2106.09685).

The class of each chosen linear is replaced by a subclass of it. Weight names do not change, and the original layer
(quantized, for example) still computes W x. The default learning rate is that of QLoRA up to 13B (arXiv:2305.14314).
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from llmkit.errors import UserError
from llmkit.models import family_of
from llmkit.models.layers import block_linears, original_classes, restore_class, swap_class
from llmkit.peft.experts import (
    LoRAExperts,
    add_updates,
    ends_of,
    expert_matrices,
    ranks_in_file,
    update_tensors,
    updated_experts,
)
from llmkit.peft.method import Method
from llmkit.peft.rows import TrainedRows, common_rows, merge_rows, train_rows, trained_tables
from llmkit.peft.targets import Layers, block_of, by_pattern, candidates, choose_linears
from llmkit.peft.whole import base_weights, keep_whole, train_whole, whole_modules


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of LoRA.

    alpha           the update is scaled by alpha / r; by alpha / sqrt(r) with rslora (Kalajdzievski 2023, 2312.03732)
    target_modules  names or ends of names ("q_proj", "mlp.up_proj"); None: every linear of the blocks, and all experts
    rank_pattern    other ranks of some linears: the end of a name, which may be a regex -> r
    alpha_pattern   other alphas of some linears
    layers          only linears of these blocks: their numbers, or "first 4", "last 4"
    dora            also train the length of each row of a weight, whose direction A and B change (Liu et al. 2024,
                    arXiv:2402.09353)
    init            default: as peft, A uniform and B 0; pissa: the r largest singular directions of the weight, whose
                    change is the update (Meng et al. 2024, arXiv:2404.02948). Files have twice the rank then
    lr_ratio        the learning rate of B is that of A times this (LoRA+, Hayou et al. 2024, arXiv:2402.12354, with 16)
    new_tokens      also train the embedding rows of tokens that were added to the model's tokenizer
    """

    r: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: list[str] | None = None
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] | None = None
    alpha_pattern: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = None
    layers: Layers | None = None
    rslora: bool = False
    dora: bool = False
    init: Literal["default", "pissa"] = "default"
    lr_ratio: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    modules_to_save: list[str] | None = None
    new_tokens: bool = False


@dataclass(frozen=True, kw_only=True)
class DoraOptions(Options):
    __doc__ = Options.__doc__

    dora: bool = True


class LoRA:
    """A linear with an update B A beside its weight."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        x = F.dropout(x, self.lora_dropout, self.training)
        return y + F.linear(F.linear(x, self.lora_A) * self.lora_scale, self.lora_B)


class DoRA(LoRA):
    """A linear whose weight is W + B A with rows of the lengths `lora_magnitude` (out,)."""

    def forward(self, x: Tensor) -> Tensor:
        y = super(LoRA, self).forward(x)
        dropped = F.dropout(x, self.lora_dropout, self.training)
        update = F.linear(F.linear(dropped, self.lora_A) * self.lora_scale, self.lora_B)
        share = self.shares().to(y.dtype)
        if self.training and self.lora_dropout:  # as in peft, all that is changed reads the same input
            plain = F.linear(dropped, self.weight)
        else:
            plain = y if self.bias is None else y - self.bias
        return y + (share - 1) * plain + share * update

    def shares(self) -> Tensor:
        """Return the factor of each row, (out,): its length over that of W + B A, through which no gradient goes."""
        with torch.no_grad():
            update = (self.lora_B @ self.lora_A) * self.lora_scale
            lengths = torch.linalg.vector_norm(self.weight.float() + update.float(), dim=1)
        return self.lora_magnitude / lengths


class PiSSA(LoRA):
    """A linear whose update is B A minus what it was at first, B0 A0: the largest part of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        y = super(LoRA, self).forward(x)
        x = F.dropout(x, self.lora_dropout, self.training)
        a, b = torch.cat((self.lora_A, self.first_A)), torch.cat((self.lora_B, -self.first_B), dim=1)
        return y + F.linear(F.linear(x, a) * self.lora_scale, b)


def apply(model: nn.Module, options: Options, seed: int = 0, new_ids: Sequence[int] = ()) -> None:
    """Freeze the model and give the chosen linears a trainable A (r, in) and B (out, r), both fp32.

    A is uniform in +-1/sqrt(in), PEFT's initialisation; B is 0. Raises UserError for targets that match nothing, and
    for an r that no matrix of the chosen ones could have as its rank.
    """
    matrices = expert_matrices(model, options.layers)
    chosen, sparse = choose_linears(model, options.layers, options.target_modules, list(matrices))
    if sparse and (options.dora or options.init != "default"):
        what, fix = "peft.dora and peft.init: pissa take linears alone, not experts", ", ".join(candidates(model))
        raise UserError(what, fix=f"peft.target_modules: [{fix}]")
    if options.init == "pissa" and options.dora:
        raise UserError("peft.init: pissa and peft.dora both say what B A begins as", fix="choose one of them")
    if options.new_tokens and options.modules_to_save:
        what, fix = "peft.modules_to_save can't be used beside added tokens", "train all weights"
        raise UserError(what, got=", ".join(options.modules_to_save), fix=fix)
    ranks = {name: by_pattern(options.rank_pattern, name, options.r) for name in [*chosen, *sparse]}
    shapes = [module.weight.shape for module in chosen.values()]
    shapes += [getattr(matrices[name], name.rpartition(".")[2]).shape[1:] for name in sparse]
    largest = max(map(min, shapes))
    if (most := max(ranks.values())) > largest:
        what, expected = "peft.r is over the rank of every matrix that it would update", f"at most {largest}"
        raise UserError(what, got=most, expected=expected)
    model.requires_grad_(False)
    for index, (name, module) in enumerate(chosen.items()):
        device, r = module.weight.device, ranks[name]
        a = torch.empty(r, module.in_features, device=device)
        if device.type != "meta":
            generator = torch.Generator(device).manual_seed(seed * 1_000_003 + index)
            bound = 1 / math.sqrt(module.in_features)
            a.uniform_(-bound, bound, generator=generator)
        module.lora_A = nn.Parameter(a)
        module.lora_B = nn.Parameter(torch.zeros(module.out_features, r, device=device))
        module.lora_scale = scale_of(options, name, r)
        module.lora_dropout = options.dropout
        if options.dora:
            module.lora_magnitude = nn.Parameter(torch.linalg.vector_norm(module.weight.detach().float(), dim=1))
        if options.init == "pissa":
            begin_with_largest(module)
        swap_class(module, DoRA if options.dora else PiSSA if options.init == "pissa" else LoRA)
    scales = {name: scale_of(options, name, ranks[name]) for name in sparse}
    add_updates(model, {name: ranks[name] for name in sparse}, scales, options.dropout, seed + 1)
    if options.modules_to_save:
        train_whole(model, options.modules_to_save)
    if options.new_tokens and new_ids:
        train_rows(model, list(new_ids))


def scale_of(options: Options, name: str, r: int) -> float:
    """Return what the update of a matrix is multiplied by."""
    return by_pattern(options.alpha_pattern, name, options.alpha) / (math.sqrt(r) if options.rslora else r)


@torch.no_grad()
def begin_with_largest(module: nn.Linear) -> None:
    """Set A and B to the r largest singular directions of a weight, over the scale, and keep them as they are now."""
    r, weight = len(module.lora_A), module.weight
    if weight.device.type != "meta":
        u, s, vt = torch.linalg.svd(weight.float() / module.lora_scale, full_matrices=False)
        module.lora_A.copy_(s[:r, None].sqrt() * vt[:r])
        module.lora_B.copy_(u[:, :r] * s[:r].sqrt())
    for name in ("A", "B"):
        module.register_buffer(f"first_{name}", getattr(module, f"lora_{name}").detach().clone(), persistent=False)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Compute what the base computes."""
    with original_classes(model, (LoRA, LoRAExperts, TrainedRows)), base_weights(model):
        yield


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Fold every update into its weight, in fp32, and give the linears their class back."""
    for module in list(model.modules()):
        if isinstance(module, LoRA):
            update = module.lora_B.float() @ module.lora_A.float() * module.lora_scale
            if isinstance(module, PiSSA):
                update -= module.first_B.float() @ module.first_A.float() * module.lora_scale
                del module.first_A, module.first_B
            merged = module.weight.float() + update
            if isinstance(module, DoRA):
                merged *= module.shares()[:, None]
                del module.lora_magnitude
            module.weight.copy_(merged)
            del module.lora_A, module.lora_B, module.lora_scale, module.lora_dropout
            restore_class(module)
    for module in updated_experts(model).values():
        for name, update in module.updates.items():
            matrices = getattr(module, name)
            matrices.copy_(matrices.float() + update.change())
        del module.updates
        restore_class(module)
    merge_rows(model)
    keep_whole(model)
    model.requires_grad_(True)


# ---- PEFT's layout --------------------------------------------------------------------------------------------------


@dataclass
class PeftFields:
    """The fields of an adapter_config.json that are read."""

    r: Annotated[int, Field(ge=1)]
    lora_alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    target_modules: list[str] | str | None = None  # a text is a regex for whole names, or "all-linear"
    target_parameters: list[str] | None = None  # ends of the names of the experts' matrices
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = field(default_factory=dict)
    alpha_pattern: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = field(default_factory=dict)
    trainable_token_indices: dict[str, list[int]] | None = None  # see `rows.common_rows`


IGNORED_FIELDS = frozenset(  # they say how an adapter is initialised, or how peft computes the same
    "fan_in_fan_out loftq_config eva_config corda_config lora_ga_config qalora_group_size megatron_core"
    " runtime_config".split()
)
# What people write as a pattern of names. Any regex could take forever on a name.
MOST_WILDCARDS = 3  # in a pattern
SIMPLE_PATTERN = re.compile(r"\^?([\w.-]|\\\.|\\d\+?|(?<!\*)\.\*){0,100}\$?")
SUPPORTED_VALUES = {
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # others change the base itself
}


def tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters by PEFT's names."""
    found = {f"{name}.token_adapter.trainable_tokens_delta": table.token_rows for name, table in trained_tables(model)}
    for name, module in model.named_modules():
        if isinstance(module, LoRA):
            found |= {f"{name}.lora_A.weight": module.lora_A, f"{name}.lora_B.weight": module.lora_B}
        if isinstance(module, DoRA):
            found[f"{name}.lora_magnitude_vector"] = module.lora_magnitude
    found |= update_tensors(model)
    whole = whole_modules(model).items()
    return found | {f"{name}.{last}": one for name, own in whole for last, one in own.items()}


def to_file(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a file: of PiSSA, matrices of twice the rank that are its update of the base."""
    found: dict[str, Tensor] = dict(tensors(model))
    for name, module in model.named_modules():
        if isinstance(module, PiSSA):
            found[f"{name}.lora_A.weight"] = torch.cat((module.lora_A, module.first_A))
            found[f"{name}.lora_B.weight"] = torch.cat((module.lora_B, -module.first_B), dim=1)
    return found


def from_file(model: nn.Module, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a file's tensors without what PiSSA began with, which goes to its place."""
    for name, module in model.named_modules():
        a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        if isinstance(module, PiSSA) and a in found and b in found:
            (found[a], first_a), (found[b], first_b) = found[a].chunk(2), found[b].chunk(2, dim=1)
            module.first_A.copy_(first_a)
            module.first_B.copy_(-first_b)
    return found


def to_peft(model: nn.Module, options: Options) -> dict:
    """Return the fields of adapter_config.json."""
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoRA)]
    rows = {name.rpartition(".")[2]: table.token_ids.tolist() for name, table in trained_tables(model)}
    times = 2 if options.init == "pissa" else 1  # of the rank in the file; alpha / r stays
    scaled = math.sqrt(times) if options.rslora else times
    more = {"trainable_token_indices": rows} if rows else {}
    if whole := whole_modules(model):
        more["modules_to_save"] = list(whole)
    sparse = [f"{path}.{name}" for path, module in updated_experts(model).items() for name in module.updates]
    if sparse:  # peft chooses by these names alone, and ignores the layers
        more["target_parameters"] = sparse if options.layers else ends_of(sparse)
    linears = [
        target
        for target in options.target_modules or candidates(model)
        if any(f".{name}".endswith(f".{target}") for name in adapted)
    ]
    return {
        "r": options.r * times,
        "lora_alpha": options.alpha * scaled,
        "lora_dropout": 0.0 if sparse else options.dropout,  # peft has none beside experts
        "use_rslora": options.rslora,
        "use_dora": options.dora,
        "target_modules": linears,
        "rank_pattern": {key: r * times for key, r in (options.rank_pattern or {}).items()},
        "alpha_pattern": {key: alpha * scaled for key, alpha in (options.alpha_pattern or {}).items()},
        "fan_in_fan_out": bool(family_of(model.config).transposed),
        "bias": "none",
        "layers_to_transform": sorted({block_of(name) for name in (*adapted, *sparse)}) if options.layers else None,
    } | more


def from_peft(model: nn.Module, fields: PeftFields, shapes: dict[str, tuple]) -> tuple[Options, list[int]]:
    """Return the options and the ids of added tokens of an adapter_config.json.

    shapes  of the tensors in the adapter's file. Their names tell which linears have an update, and their shapes its
            rank: no regex of a stranger's file is run
    """
    rows = common_rows(model, fields.trainable_token_indices) if fields.trainable_token_indices else []
    layers, excluded = fields.layers_to_transform, fields.exclude_modules
    layers = [layers] if isinstance(layers, int) else layers
    ranks = {
        name: shapes[key][0]
        for name in block_linears(model)
        if (key := f"{name}.lora_A.weight") in shapes
        and (not layers or block_of(name) in layers)
        and not (isinstance(excluded, list) and any(f".{name}".endswith(f".{end}") for end in excluded))
    }
    parameters = fields.target_parameters or []
    sparse = ranks_in_file(expert_matrices(model), parameters, shapes)  # which peft chooses without the layers
    ranks |= sparse
    is_plain = isinstance(fields.target_modules, list) and not excluded and not layers
    if not is_plain and not ranks:
        raise ValueError("its file has no update of a linear of the blocks")
    patterns = {
        key: value
        for key, value in fields.alpha_pattern.items()
        if SIMPLE_PATTERN.fullmatch(key) and key.count(".*") <= MOST_WILDCARDS
    }
    if unknown := sorted(set(fields.alpha_pattern) - set(patterns)):
        raise ValueError(f"alpha_pattern has a regex that is not supported: {unknown[0][:80]}")
    options = Options(
        r=fields.r,
        alpha=fields.lora_alpha,
        dropout=fields.lora_dropout,
        target_modules=[*fields.target_modules, *parameters] if is_plain else list(ranks),
        rank_pattern={re.escape(name): rank for name, rank in ranks.items() if rank != fields.r},
        alpha_pattern=patterns,
        rslora=fields.use_rslora,
        dora=fields.use_dora,
        new_tokens=bool(rows),
    )
    if not fields.rank_pattern and options.rank_pattern:
        options = replace(options, rank_pattern=None)  # another rank is then a mistake, which `load_adapter` names
    return options, rows


METHOD = Method(
    options=Options,
    lr=2e-4,
    training_options=frozenset({"dropout", "lr_ratio"}),
    rows_option="new_tokens",
    apply=apply,
    tensors=tensors,
    disabled=disabled,
    merge=merge,
    peft_type="LORA",
    in_peft=True,
    fields=PeftFields,
    ignored_fields=IGNORED_FIELDS,
    supported_values=SUPPORTED_VALUES,
    to_peft=to_peft,
    from_peft=from_peft,
    to_file=to_file,
    from_file=from_file,
)
