"""Save and load adapters of any method, in PEFT's folder layout."""

import json
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from llmkit.errors import ModelError, UserError, raise_all
from llmkit.files import read_json
from llmkit.models import build_model, family_of
from llmkit.models.folder import FLOATS, check_finite, open_weights, unsupported_type
from llmkit.models.heads import POOLINGS, HeadConfig, head_parameters, train_head
from llmkit.models.hf_config import hf_config, read_config, read_head
from llmkit.models.layers import token_tables
from llmkit.models.resize import resize_embeddings
from llmkit.peft import METHODS
from llmkit.peft.method import PREFIX, Method
from llmkit.screen import warn

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SAVED = "modules_to_save"  # names of modules that were trained as a whole, and are in the adapter's file
TASKS = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "masked": None}  # PEFT's names for kinds of models
HEAD_TASKS = {"classify": "SEQ_CLS", "regress": "SEQ_CLS", "tag": "TOKEN_CLS"}
# Fields of an adapter_config.json that do not change what an adapter computes: names, versions, training and loading.
IGNORED_FIELDS = set(
    "peft_type task_type inference_mode auto_mapping peft_version base_model_name_or_path revision".split()
)


def save_adapter(model: nn.Module, folder: Path, name: str, options: Any, *, base: str, base_sha256: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors of a method, for PEFT and for `load_adapter`."""
    folder.mkdir(parents=True, exist_ok=True)
    method, head = METHODS[name], getattr(model, "head", None)
    config = {
        "peft_type": method.peft_type,
        "task_type": HEAD_TASKS[head.kind] if head else TASKS[model.config.kind],
        "base_model_name_or_path": base,
        **method.to_peft(model, options),
        "inference_mode": True,
    }
    if head:  # peft saves no names of labels: they are in a config.json, that of the merged model
        config[SAVED] = [*config.get(SAVED, []), *short_names(model.head_names)]
        (folder / "config.json").write_text(
            json.dumps(hf_config(model.config, head), indent=2) + "\n", encoding="utf-8"
        )
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    trained = {f"{method.prefix}{key}": one for key, one in (method.to_file or method.tensors)(model).items()}
    trained |= {f"{PREFIX}{key}": one for key, one in head_parameters(model).items()}
    tensors = {key: value.detach().cpu().contiguous() for key, value in trained.items()}
    # One entry: safetensors writes several in another order each time, and equal runs would have different files.
    save_file(tensors, folder / WEIGHTS, metadata={"base_sha256": base_sha256})
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)


def saved_base_sha256(folder: Path) -> str | None:
    """Return the checksum of the base that an adapter was trained on, if its file has one; see `base_change`."""
    with open_weights(folder / WEIGHTS) as file:
        return (file.metadata() or {}).get("base_sha256")


def base_change(saved: str, now: str) -> str | None:
    """Return what differs between two checksums of a base, in words; None if nothing does.

    A checksum is "weights-config". Adapters of llmkit 0.1 have its first half only.

    >>> base_change("a1-b2", "a1-c3"), base_change("a1", "a1-c3")
    ('the config.json of the base has changed', None)
    """
    parts = ("the weights of the base have changed", "the config.json of the base has changed")
    pairs = zip(parts, saved.split("-"), now.split("-"), strict=False)
    return next((part for part, before, after in pairs if before != after), None)


def read_adapter_config(folder: Path) -> tuple[dict[str, Any], Method]:
    """Return an adapter_config.json and its method; refuse a value that would change what the adapter does."""
    path = folder / CONFIG
    try:
        config = read_json(path)
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{CONFIG} can't be read: {error}", at=path) from None
    method = next((one for one in METHODS.values() if one.peft_type == kind), None)
    if method is None:
        known = ", ".join(one.peft_type for one in METHODS.values())
        raise ModelError("adapters of this method are not supported", at=path, got=kind, expected=known)
    known = {field.name for field in fields(method.fields)} | IGNORED_FIELDS | method.ignored_fields | {SAVED}
    supported = method.supported_values
    errors = [
        ModelError(f"the adapter's {key} is not supported", at=path, got=value)
        for key, value in config.items()
        if key not in known and (value not in supported[key] if key in supported else value)
    ]
    saved = config.get(SAVED)
    if saved is not None and not (isinstance(saved, list) and all(isinstance(name, str) for name in saved)):
        errors.append(ModelError(f"{CONFIG}: {SAVED} is not a list of names", at=path))
    if not isinstance(config.get("base_model_name_or_path"), str | None):
        errors.append(ModelError(f"{CONFIG}: base_model_name_or_path is not a text", at=path))
    try:
        TypeAdapter(method.fields).validate_json(json.dumps(config), strict=True)
    except ValidationError as error:
        errors += [
            ModelError(f"{CONFIG}: {one['loc'][0]}: {one['msg']}", at=path, got=one["input"]) for one in error.errors()
        ]
    raise_all(errors)
    return config, method


def read_adapter_head(folder: Path, base: Path) -> HeadConfig | None:
    """Return the head for labels that an adapter of peft brings or was trained with, None if it predicts tokens.

    peft saves no names of labels: they are the base's, or LABEL_0, LABEL_1 ... as in transformers.
    """
    config, _ = read_adapter_config(folder)
    kind = {"SEQ_CLS": "classify", "TOKEN_CLS": "tag"}.get(str(config.get("task_type")))
    model_config = read_config(base)
    if kind is None or model_config.kind not in POOLINGS:
        return None
    family = family_of(model_config)
    name, _ = family.tag_head if kind == "tag" else family.text_head
    with open_weights(folder / WEIGHTS) as file:
        key = f"{PREFIX}{name}.weight"
        rows = file.get_slice(key).get_shape()[0] if key in file.keys() else None  # noqa: SIM118
    own = read_head(base)
    if own and rows in (None, len(own.labels)) and (own.kind == "tag") == (kind == "tag"):
        return own
    if rows is None:
        raise ModelError("the adapter lacks the weights of its head", at=folder / WEIGHTS, expected=key)
    labels = tuple(f"LABEL_{i}" for i in range(rows))
    kind = "regress" if kind == "classify" and rows == 1 else kind  # as transformers takes a single output
    return HeadConfig(kind, labels, None if kind == "tag" else POOLINGS[model_config.kind][0])


def short_names(head_names: list[str]) -> list[str]:
    """Return the names of a head's modules as peft lists them.

    >>> short_names(["bert.pooler.dense", "classifier"])
    ['pooler', 'classifier']
    """
    return [one.removesuffix(".dense").rpartition(".")[2] for one in head_names]


def options_to_continue(folder: Path, base: Path, name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the options with which an adapter is trained further: its own, and those given that only training reads.

    name, given  the method and the options that a config names. Raises ModelError for others than the adapter has
    """
    config, method = read_adapter_config(folder)
    if METHODS[name].peft_type != method.peft_type:
        raise ModelError("the adapter is of another method", at=folder, got=config["peft_type"], expected=name)
    with open_weights(folder / WEIGHTS) as file:
        shapes = {key.removeprefix(method.prefix): tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    head = read_head(folder) if (folder / "config.json").is_file() else read_adapter_head(folder, base)
    model = build_model(read_config(base), device="meta", seed=None, head=head)
    own, _ = method.from_peft(model, TypeAdapter(method.fields).validate_python(config), shapes)
    kept = asdict(own)
    saved = [one for one in config.get(SAVED) or [] if one not in short_names(getattr(model, "head_names", []))]
    if saved and SAVED in kept:
        kept[SAVED] = saved
    for key, value in given.items():
        if key not in method.training_options and kept.get(key) != value:
            what, fix = f"peft.{key} is another one than the adapter's", "leave it out, or stack: true"
            raise ModelError(what, at=folder, got=value, expected=kept.get(key), fix=fix)
    return kept | {key: value for key, value in given.items() if key in method.training_options}


def cast_adapter(model: nn.Module, dtype: torch.dtype) -> None:
    """Give an adapter the dtype of its base, but for factors of about 1, which 16 bits would round away."""
    for name, parameter in model.named_parameters():
        if parameter.dtype != dtype and not name.endswith(("ia3_l", "lora_magnitude")):
            parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def load_adapter(model: nn.Module, folder: Path, options: Any = None) -> Method:
    """Apply an adapter's method to its base model, fill in the trained tensors, and return the method.

    options  of the method, to go on training; None: those of adapter_config.json
    """
    config, method = read_adapter_config(folder)
    path, fix = folder / WEIGHTS, "name the base it was trained on"
    with open_weights(path) as file:
        types = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
        raise_all([unsupported_type(name, dtype, path) for name, dtype in types.items() if dtype not in FLOATS][:10])
        tensors = {name: file.get_tensor(name) for name in types}
    train_head(model)  # in fp32, as its tensors are
    resumed = getattr(options, SAVED, None) or []  # these are trained further
    names = [name for name in config.get(SAVED) or [] if not f".{name}".endswith(tuple(f".{one}" for one in resumed))]
    copy_saved_modules(model, names, tensors, path)
    try:
        tensors = {name.removeprefix(method.prefix): tensor for name, tensor in tensors.items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        saved, new_ids = method.from_peft(model, TypeAdapter(method.fields).validate_python(config), shapes)
        if new_ids:
            resize_embeddings(model, max(new_ids) + 1, {})
        method.apply(model, options or saved, 0, new_ids)
        train_head(model)
    except ValueError as error:
        raise ModelError(f"the adapter does not fit this model: {error}", at=folder / CONFIG, fix=fix) from None
    except UserError as error:
        what, details = f"the adapter does not fit this model: {error.what}", {"got": error.got, "others": error.others}
        raise ModelError(what, at=folder / CONFIG, expected=error.expected, fix=fix, **details) from None
    if method.from_file:
        tensors = method.from_file(model, tensors)
    for name, parameter in method.tensors(model).items():
        found = tensors.pop(name, None)
        if found is None or found.shape != parameter.shape:
            what = f"the adapter does not fit this model at {name}"
            got = "nothing" if found is None else tuple(found.shape)
            raise ModelError(what, at=path, got=got, expected=tuple(parameter.shape), fix=fix)
        parameter.copy_(found)
    check_finite(method.tensors(model), path)
    if unused := [name for name in sorted(types) if name.removeprefix(method.prefix) in tensors]:
        raise ModelError("the adapter has tensors for which the model has no place", at=path, got=unused[0])
    return method


def copy_saved_modules(model: nn.Module, names: list[str], tensors: dict[str, Tensor], path: Path) -> None:
    """Copy the modules that an adapter brings as a whole into the model, and remove them from its tensors.

    names  the modules' names, or the last parts of them. An embedding with further rows extends the model's
    """
    brought = {
        key.removeprefix(PREFIX): tensors.pop(key)
        for key in sorted(tensors)
        if any(f".{name}." in f".{key.removeprefix(PREFIX)}" for name in names)
    }
    tied = model.config.tie_word_embeddings
    tables = {name for name, module in model.named_modules() if any(module is table for table in token_tables(model))}
    if rows := [len(tensor) for name, tensor in brought.items() if name.removesuffix(".weight") in tables]:
        if tied:  # peft trains a copy of the embedding, and the head keeps the matrix of the base
            what, fix = f"the adapter's {SAVED} has a matrix that the model ties", "merge it with peft, and open that"
            raise ModelError(what, at=path, got=", ".join(brought), fix=fix)
        resize_embeddings(model, max(rows), {})
    parameters = dict(model.named_parameters())
    for name, tensor in brought.items():
        found = parameters.get(name)
        if found is None or found.shape != tensor.shape:
            what, got = f"the adapter does not fit this model at {name}", tuple(tensor.shape)
            raise ModelError(what, at=path, got=got, expected=None if found is None else tuple(found.shape))
        owner, _, last = name.rpartition(".")  # not in place: other models may share the base's parameter
        setattr(model.get_submodule(owner), last, nn.Parameter(tensor.to(found.device, found.dtype)))
    check_finite({name: model.get_parameter(name) for name in brought}, path)
    known = {part for name, _ in model.named_modules() for part in name.split(".")}
    missing = [name for name in names if not any(name in key for key in brought)]
    if brought and hasattr(model, "head"):  # peft lists all names that a head may have
        missing = [name for name in missing if name in known]
    if missing:
        raise ModelError(f"the adapter's file lacks {missing[0]}, which {SAVED} names", at=path)
    if hasattr(model, "head"):
        made_up = [name for name in model.made_up if name not in brought]
        if made_up:
            warn(f"neither {path} nor its base has {made_up[0]}, which is made up: predictions mean nothing")
