"""LoRA: y = W x + scale * B A x with W frozen (Hu et al. 2021, arXiv:2106.09685). Adapters have PEFT's layout.

`apply` swaps the class of each chosen linear for one derived from its present class, so that weight names never
change and whatever the linear was before (quantized, say) goes on working underneath.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from llmkit.errors import ModelError, UserError, raise_all
from llmkit.models import folder as model_folder
from llmkit.models import gpt2
from llmkit.models.layers import token_tables
from llmkit.models.resize import resize_embeddings


class LoRA:
    """What a linear becomes; mixed in front of its class by `adapted`."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        x = F.dropout(x, self.lora_dropout, self.training)
        return y + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.lora_scale


class TrainedRows:
    """What an embedding or a head becomes of which only some rows, `token_ids`, are trained: as `token_rows`, apart."""

    def all_rows(self) -> Tensor:
        return self.weight.index_copy(0, self.token_ids, self.token_rows.to(self.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.all_rows()) if isinstance(self, nn.Embedding) else F.linear(x, self.all_rows())


@functools.cache
def adapted(base: type[nn.Module], change: type = LoRA) -> type[nn.Module]:
    """The class of a module's class and what it becomes."""
    return type(f"{change.__name__}{base.__name__}", (change, base), {})


def train_rows(model: nn.Module, token_ids: list[int]) -> None:
    """Let these rows of the embedding, and of a head with a matrix of its own, be trained, and nothing else of them."""
    for module in token_tables(model):
        module.token_ids = torch.tensor(token_ids, device=module.weight.device)
        module.token_rows = nn.Parameter(module.weight.detach()[token_ids].float())
        module.__class__ = adapted(module.__class__, TrainedRows)


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear inside the blocks, by its full name. The head stays out: its product is a part of the loss."""
    return {
        f"{prefix}.{name}": module
        for prefix, block in model.named_modules()
        if any(block is one for one in model.blocks)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }


def apply(
    model: nn.Module,
    seed: int = 0,
    *,
    r: Annotated[int, Field(ge=1)] = 16,
    alpha: Annotated[float, Field(gt=0)] = 32.0,
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    target_modules: list[str] | None = None,
    rslora: bool = False,
    new_tokens: bool = False,
) -> None:
    """Freeze the model and give the chosen linears a trainable A (r, in), random, and B (out, r), zero.

    alpha           the update is scaled by alpha / r; by alpha / sqrt(r) with rslora (Kalajdzievski 2023, 2312.03732)
    target_modules  names or ends of names ("q_proj", "mlp.up_proj"); None: every linear of the blocks
    new_tokens      the rows of tokens that the model's tokenizer did not have are trained too: see `train_rows`
    A is uniform in +-1/sqrt(in), PEFT's initialisation; both stay in fp32.
    """
    linears = block_linears(model)
    chosen = {
        name: module
        for name, module in linears.items()
        if target_modules is None or any(f".{name}".endswith(f".{target}") for target in target_modules)
    }
    candidates = sorted({name.rsplit(".", 1)[-1] for name in linears})
    raise_all(
        [
            UserError("peft.target_modules matches no linear of the blocks", got=target, expected=", ".join(candidates))
            for target in target_modules or []
            if not any(f".{name}".endswith(f".{target}") for name in linears)
        ]
    )
    model.requires_grad_(False)
    for index, module in enumerate(chosen.values()):
        device = module.weight.device
        a = torch.empty(r, module.in_features, device=device)
        if device.type != "meta":
            generator = torch.Generator(device).manual_seed(seed * 1_000_003 + index)
            bound = 1 / math.sqrt(module.in_features)
            a.uniform_(-bound, bound, generator=generator)
        module.lora_A = nn.Parameter(a)
        module.lora_B = nn.Parameter(torch.zeros(module.out_features, r, device=device))
        module.lora_scale = alpha / (math.sqrt(r) if rslora else r)
        module.lora_dropout = dropout
        module.__class__ = adapted(module.__class__)
    if new_tokens:  # `model.new_tokens` is what was added to it
        train_rows(model, model.new_tokens)
    model.lora = {"r": r, "alpha": alpha, "dropout": dropout, "rslora": rslora}
    model.lora["target_modules"] = target_modules or candidates


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Fold every update into its weight, in fp32, and give the linears their class back."""
    for module in list(model.modules()):
        if isinstance(module, LoRA):
            update = module.lora_B.float() @ module.lora_A.float() * module.lora_scale
            module.weight.copy_(module.weight.float() + update)
            del module.lora_A, module.lora_B, module.lora_scale, module.lora_dropout
            module.__class__ = module.__class__.__mro__[2]
        if isinstance(module, TrainedRows):
            module.weight[module.token_ids] = module.token_rows.to(module.weight.dtype)
            del module.token_ids, module.token_rows
            module.__class__ = module.__class__.__mro__[2]
    del model.lora
    model.requires_grad_(True)


# ---- PEFT's adapter folder ------------------------------------------------------------------------------------------

TASKS = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "masked": None}  # PEFT's names for kinds of models
PREFIX, ROWS = "base_model.model.", "token_adapter.trainable_tokens_delta"
# Fields of an adapter_config.json that would change what the adapter does, and the only values that are built here.
SUPPORTED_VALUES = {
    "bias": ("none",),
    "use_dora": (False,),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "layers_to_transform": (None, []),
    "layers_pattern": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "exclude_modules": (None, []),
    "target_parameters": (None, []),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "megatron_config": (None,),
    "arrow_config": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # others change the base itself
}


def save_adapter(model: nn.Module, folder: Path, *, base: str, base_sha256: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors, for PEFT and for `load_adapter`."""
    folder.mkdir(parents=True, exist_ok=True)
    options = model.lora
    config = {
        "peft_type": "LORA",
        "task_type": TASKS[model.config.kind],
        "base_model_name_or_path": base,
        "r": options["r"],
        "lora_alpha": options["alpha"],
        "lora_dropout": options["dropout"],
        "use_rslora": options["rslora"],
        "target_modules": options["target_modules"],
        "fan_in_fan_out": isinstance(model, gpt2.Model),  # its linears are stored transposed
        "bias": "none",
        "inference_mode": True,
    }
    trained = {name: module for name, module in model.named_modules() if isinstance(module, TrainedRows)}
    if trained:
        config["trainable_token_indices"] = {
            name.rpartition(".")[2]: module.token_ids.tolist() for name, module in trained.items()
        }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {f"{PREFIX}{name}.{ROWS}": module.token_rows.detach().cpu() for name, module in trained.items()}
    for name, module in model.named_modules():
        if isinstance(module, LoRA):
            tensors[f"{PREFIX}{name}.lora_A.weight"] = module.lora_A.detach().cpu().contiguous()
            tensors[f"{PREFIX}{name}.lora_B.weight"] = module.lora_B.detach().cpu().contiguous()
    about = {"format": "pt", "base_sha256": base_sha256}
    save_file(tensors, folder / "adapter_model.safetensors", metadata=about)
    shutil.copymode(folder / "adapter_config.json", folder / "adapter_model.safetensors")


def base_sha256(folder: Path) -> str | None:
    """The checksum of the base's weights that an adapter was trained on, if it tells."""
    with model_folder.open_weights(folder / "adapter_model.safetensors") as file:
        return (file.metadata() or {}).get("base_sha256")


@dataclass
class Options:
    """What of an adapter_config.json is read, and must make sense."""

    r: Annotated[int, Field(ge=1)]
    lora_alpha: Annotated[float, Field(gt=0)]
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_rslora: bool = False
    target_modules: list[str] | None = None
    trainable_token_indices: dict[str, list[int]] | None = None  # module -> rows of it that the adapter brings


OPTIONS = TypeAdapter(Options)


def read_adapter_config(folder: Path) -> dict:
    """An adapter_config.json; a kind of adapter that is not built here is refused, never half used."""
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise ModelError(f"adapter_config.json can't be read: {error}", at=path) from None
    errors = [
        ModelError(f"the adapter's {key} is not supported", at=path, got=config[key])
        for key, plain in SUPPORTED_VALUES.items()
        if key in config and config[key] not in plain
    ]
    if kind != "LORA":
        errors.insert(0, ModelError("only LoRA adapters are supported", at=path, got=kind))
    try:
        OPTIONS.validate_json(json.dumps(config), strict=True)
    except ValidationError as error:
        errors += [
            ModelError(f"adapter_config.json: {one['loc'][0]}: {one['msg']}", at=path, got=one["input"])
            for one in error.errors()
        ]
    raise_all(errors)
    return config


def load_rows(model: nn.Module, indices: dict[str, list[int]] | None, tensors: dict[str, Tensor], folder: Path) -> None:
    """The rows that an adapter brings, which may be more than its base has; they are taken out of `tensors`."""
    if not indices:
        return
    known = {
        name.rpartition(".")[2]: (name, module)
        for name, module in model.named_modules()
        if module in token_tables(model)
    }
    shared = {tuple(ids) for ids in indices.values()}
    width = model.config.hidden_size
    rows = {name: tensors.pop(f"{PREFIX}{known[name][0]}.{ROWS}", None) for name in indices if name in known}
    [ids] = shared if len(shared) == 1 else [None]
    if (
        ids is None
        or set(indices) != set(known)
        or any(r is None or r.shape != (len(ids), width) for r in rows.values())
    ):
        raise ModelError(
            "the adapter's trained rows do not fit this model",
            at=folder,
            got=", ".join(indices),
            expected=", ".join(known),
        )
    if len(ids) != len(set(ids)) or not all(0 <= i < model.config.vocab_size + len(ids) for i in ids):
        raise ModelError("the adapter's trained rows make no sense", at=folder, got=str(ids)[:80])
    resize_embeddings(model, max(ids) + 1, {})
    train_rows(model, list(ids))
    for name, (_, module) in known.items():
        module.token_rows.data.copy_(rows[name])


@torch.no_grad()
def load_adapter(model: nn.Module, folder: Path) -> None:
    """`apply` an adapter's configuration to its base model and fill in its weights."""
    config = read_adapter_config(folder)
    path = folder / "adapter_model.safetensors"
    tensors: dict[str, Tensor] = {}
    with model_folder.open_weights(path) as file:
        for name in file.keys():  # noqa: SIM118 (safe_open is no dict)
            tensors[name] = file.get_tensor(name)
    load_rows(model, config.get("trainable_token_indices"), tensors, folder)
    try:
        apply(
            model,
            r=config["r"],
            alpha=config["lora_alpha"],
            dropout=config.get("lora_dropout", 0.0),
            target_modules=config.get("target_modules"),
            rslora=config.get("use_rslora", False),
        )
    except UserError as error:
        raise ModelError(
            "the adapter does not fit this model",
            at=folder / "adapter_config.json",
            got=error.got,
            expected=error.expected,
            fix="name the base it was trained on",
        ) from None
    for name, module in model.named_modules():
        if isinstance(module, LoRA):
            for part in ("lora_A", "lora_B"):
                key = f"{PREFIX}{name}.{part}.weight"
                target = getattr(module, part)
                if key not in tensors or tensors[key].shape != target.shape:
                    got = tuple(tensors[key].shape) if key in tensors else "nothing"
                    raise ModelError(
                        f"the adapter does not fit this model at {name}.{part}",
                        at=path,
                        got=got,
                        expected=tuple(target.shape),
                        fix="name the base it was trained on",
                    )
                target.copy_(tensors.pop(key))
    for _, module in model.named_modules():
        if isinstance(module, TrainedRows):
            module.token_rows.requires_grad_(True)
    if tensors:
        raise ModelError("the adapter has tensors for which the model has no place", at=path, got=next(iter(tensors)))
