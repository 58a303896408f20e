"""Read and write the weights of Hugging Face folders: safetensors, as transformers expects them."""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llmkit.errors import ModelError, raise_all
from llmkit.files import read_json
from llmkit.models import build_model, family_of
from llmkit.models.heads import HeadConfig, head_parameters
from llmkit.models.hf_config import hf_config, read_config, read_head
from llmkit.models.layers import block_linears, init_weights
from llmkit.models.quantized import quantize_linear
from llmkit.screen import warn

FLOATS = ("F64", "F32", "F16", "BF16")  # types in safetensors files that are read, all by rounding to the model's dtype
MAX_SHARD_BYTES = 5 * 10**9  # of a weight file, as in transformers


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder: model.safetensors, as transformers prefers it, or those of the index.

    Raises ModelError for a broken index, and for one that names a file elsewhere. Which tensor it puts where is not
    asked: the files say that themselves.
    """
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if whole.exists() or not index.exists():
        return [whole]
    try:
        names = set(read_json(index)["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"the weight index can't be read: {error}", at=index) from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError("a weight file must be in the model's folder", at=index, got=name)
    return [folder / name for name in sorted(names)]


def open_weights(path: Path):
    """Open a safetensors file without reading its tensors. safetensors refuses headers that lie about sizes."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ModelError("the weight file is missing", at=path) from None
    except (SafetensorError, OSError) as error:
        raise ModelError(f"the weights can't be read: {error}", at=path) from None


@dataclass
class Found:
    """Hold what is found in a folder's weight files.

    places   name in `Family.disk_views` -> (file, name in it), of all weights that the model reads
    missing  names of the model's weights that are not there
    head     (file, name in it) of the output matrix, if the config ties it to the embedding
    """

    places: dict[str, tuple[Path, str]]
    missing: list[str]
    head: tuple[Path, str] | None


def load_model(
    folder: Path,
    *,
    device="cpu",
    dtype: torch.dtype = torch.float32,
    head: HeadConfig | None = None,
    seed: int = 0,
    quantize: tuple[str, dict[str, Any]] | None = None,
) -> nn.Module:
    """Load a model from a Hugging Face folder. Names and shapes are checked before memory is allocated.

    If the config ties the output matrix to the embedding, but the files have both and they differ, they are not tied,
    as in transformers.

    head  for labels, instead of the one for tokens. Its weights are initialised with `seed` where the folder has none,
          or those of other labels
    quantize  the linears of the blocks, one block after the other, so that the whole model is never in `dtype`: one of
              QUANTIZERS, and its options
    """
    config = read_config(folder)
    family = family_of(config)
    model = build_model(config, device="meta", seed=None, head=head)
    is_own = head is not None and (own := read_head(folder)) is not None and own.labels == head.labels
    files = weight_files(folder)
    found = find_weights(model, folder, files, reads_head=is_own)
    table = found.places.get(table_name(model))
    if found.head and table is None:
        found.places[table_name(model)] = found.head
    elif found.head and not torch.equal(read_tensor(*found.head), read_tensor(*table)):
        if config.kind == "seq2seq":  # transformers unties the matrices of T5, and still scales as if they were tied
            what = f"{found.head[1]} and {table[1]} differ, and its config.json ties them"
            raise ModelError(what, at=folder, fix="set tie_word_embeddings to what is right")
        warn(f"{folder} has two matrices where its config.json ties them: {found.head[1]} is not tied to {table[1]}")
        model = build_model(replace(config, tie_word_embeddings=False), device="meta", seed=None)
        found = find_weights(model, folder, files)
    own_head = head_parameters(model)
    if fresh := [name for name in found.missing if family.may_be_missing.fullmatch(name) or name in own_head]:
        if not head or is_own:
            warn(f"{folder} lacks {len(fresh)} weights; initialised: {', '.join(fresh)}")
        initialise(model, fresh, seed)
    names = [name for name, _ in model.named_parameters()]
    linears = block_linears(model) if quantize else {}
    blocks = {re.match(r".*?\.\d+\.", name)[0]: None for name in linears}
    groups = [[name for name in names if name.startswith(block)] for block in blocks]
    in_blocks = {name for group in groups for name in group}
    for group in [[name for name in names if name not in in_blocks], *groups]:
        fill_weights(model, group, found, fresh, device, dtype, folder)
        for name in [name for name in linears if f"{name}.weight" in group]:
            quantize_linear(linears[name], *quantize)
    if head:
        model.made_up = fresh
    return model.requires_grad_(True)


def fill_weights(
    model: nn.Module, names: list[str], found: Found, fresh: list[str], device, dtype: torch.dtype, folder: Path
) -> None:
    """Allocate these weights of a model that is on the meta device, and read them from its files.

    fresh  names of weights that are there already
    """
    family = family_of(model.config)
    weights = {name: torch.empty(model.get_parameter(name).shape, dtype=dtype, device=device) for name in names}
    for name in fresh:
        if name in weights:
            weights[name].copy_(model.get_parameter(name))
    views = {disk: view for name, tensor in weights.items() for disk, view in family.disk_views(name, tensor).items()}
    for path in dict.fromkeys(place for place, _ in found.places.values()):
        with open_weights(path) as file:
            for name, (place, disk_name) in found.places.items():
                if place == path and name in views:
                    views[name].copy_(file.get_tensor(disk_name))
    for name, other in family.missing_copies.items():
        if name in found.missing and name in weights:
            weights[name].copy_(weights[other])
    check_finite(weights, folder)
    model.load_state_dict(weights, assign=True, strict=False)


def initialise(model: nn.Module, names: list[str], seed: int) -> None:
    """Initialise these parameters of a model that is on the meta device; the others stay without data."""
    for name in names:
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, last, nn.Parameter(torch.empty(getattr(module, last).shape, device="cpu")))
    init_weights(model, family_of(model.config), torch.Generator().manual_seed(seed), names)


def table_name(model: nn.Module) -> str:
    """Return the name of the weight of a model's token embedding."""
    return next(name for name, parameter in model.named_parameters() if parameter is model.wte.weight)


def without_numbers(name: str) -> str:
    """Return the name that a weight has in every layer."""
    return re.sub(r"\d+", "*", name)


def read_tensor(path: Path, name: str) -> Tensor:
    with open_weights(path) as file:
        return file.get_tensor(name)


def find_weights(model: nn.Module, folder: Path, files: list[Path], reads_head: bool = False) -> Found:
    """Find the weights of a model in its files. Raise a ModelError with all that does not fit.

    Files of a model without its head lack the prefix of names. Weights of no known name are named in a warning, as
    transformers does, but not those of a layer that the config does not have: it is probably that of another model.

    reads_head  whether the head for labels is in the files; else only what lies before it is read, if it is there
    """
    family, head_names = family_of(model.config), getattr(model, "head_names", [])
    new = set() if reads_head else {f"{name}.{end}" for name in head_names[-1:] for end in ("weight", "bias")}
    without_tokens = tuple(f"{name}." for name in family.token_heads if getattr(model, name) is None and head_names)
    shapes = {
        disk: tuple(view.shape)
        for name, p in model.named_parameters()
        for disk, view in family.disk_views(name, p).items()
    }
    in_layers = {without_numbers(name) for name in shapes}
    errors, places, unknown, head = [], {}, [], None
    for path in files:
        with open_weights(path) as file:
            for disk_name in file.keys():  # noqa: SIM118  it is no dict
                name = family.from_disk_name(disk_name)
                name = f"{family.prefix}{name}" if f"{family.prefix}{name}" in shapes else name
                shape, dtype = tuple(file.get_slice(disk_name).get_shape()), file.get_slice(disk_name).get_dtype()
                is_ignored = family.ignored_weights.fullmatch(name) and name not in shapes
                if is_ignored or name in new or name.startswith(without_tokens):
                    continue
                if name == "lm_head.weight" and model.config.tie_word_embeddings:
                    head = (path, disk_name)
                    expected = shapes[table_name(model)]
                elif name in places:
                    errors.append(ModelError(f"the weight {name} is there twice", at=path))
                    continue
                elif name not in shapes and {without_numbers(name), without_numbers(family.prefix + name)} & in_layers:
                    what = f"the model has no weight {disk_name}"
                    fix = "correct the number of layers in config.json, or take both files from one source"
                    errors.append(ModelError(what, at=path, fix=fix))
                    continue
                elif name not in shapes:
                    unknown.append(disk_name)
                    continue
                else:
                    places[name] = (path, disk_name)
                    expected = shapes[name]
                if shape != expected:
                    errors.append(ModelError(f"{disk_name} has the wrong shape", at=path, got=shape, expected=expected))
                elif dtype not in FLOATS:
                    errors.append(unsupported_type(disk_name, dtype, path))
    missing = [name for name in shapes if name not in places]
    allowed = {*family.missing_copies, *([table_name(model)] if head else [])}
    allowed |= head_parameters(model).keys()
    needed = [name for name in missing if name not in allowed and not family.may_be_missing.fullmatch(name)]
    if needed and not errors:
        errors.append(ModelError(f"{len(needed)} weights are missing, for example {needed[0]}", at=folder))
    raise_all(errors)
    if unknown:
        more = f" and {len(unknown) - 5} others" if len(unknown) > 5 else ""
        warn(f"{folder} has weights that the model does not use: {', '.join(unknown[:5])}{more}")
    return Found(places, missing, head)


def unsupported_type(name: str, dtype: str, path: Path) -> ModelError:
    """Return the error about a tensor whose type is not one of FLOATS."""
    what, expected = f"{name} has a type that is not supported", ", ".join(FLOATS)
    return ModelError(what, at=path, got=dtype, expected=expected, fix="take the model's files that are not quantized")


def check_finite(weights: dict[str, Tensor], at: Path) -> None:
    """Raise a ModelError with the weights that have NaN or infinite values, `at` a file or folder."""
    bad = [name for name, tensor in weights.items() if not torch.stack(torch.aminmax(tensor)).isfinite().all()]
    if bad:
        what, dtype = f"{len(bad)} weights have values that are not finite, for example {bad[0]}", weights[bad[0]].dtype
        fix = "use bf16 or fp32, which have a wider range" if dtype == torch.float16 else None
        raise ModelError(what, at=at, got=str(dtype).removeprefix("torch."), fix=fix)


def disk_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's weights with the names and in the layout of its family's files."""
    for name, tensor in model.state_dict().items():
        for disk_name, view in family_of(model.config).disk_views(name, tensor.detach()).items():
            yield disk_name, view.contiguous().cpu()


def save_model(
    model: nn.Module,
    folder: Path,
    *,
    eos_token_ids: Sequence[int] = (),
    bos_token_id: int | None = None,
    pad_token_id: int | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write config.json and model.safetensors, and generation_config.json if there are several stop tokens.

    pad_token_id  for a head for labels, which transformers finds the last token of a text by
    dtype  of the weights; None: that of the parameters. Raises ModelError if its range is too small
    """
    weights = {name: tensor.to(dtype or tensor.dtype) for name, tensor in disk_weights(model)}
    if dtype:
        check_finite(weights, folder)
    folder.mkdir(parents=True, exist_ok=True)
    token_ids = {"bos_token_id": bos_token_id, "eos_token_id": next(iter(eos_token_ids), None)}
    config = hf_config(model.config, getattr(model, "head", None)) | token_ids
    if pad_token_id is not None and hasattr(model, "head"):
        config["pad_token_id"] = pad_token_id
    config["dtype"] = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if len(eos_token_ids) > 1:
        generation = token_ids | {"eos_token_id": list(eos_token_ids)}
        generation |= {key: config[key] for key in ("pad_token_id", "decoder_start_token_id") if key in config}
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in weights.items():
        if size and size + tensor.nbytes > MAX_SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else "model"
        path = folder / f"{name}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", path)  # safetensors makes it readable by the owner only
        index |= dict.fromkeys(shard, path.name)
    if len(shards) > 1:
        total = {"total_size": sum(tensor.nbytes for tensor in weights.values())}
        text = json.dumps({"metadata": total, "weight_map": index}, indent=2)
        (folder / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")
