"""Read and write Hugging Face folders: config.json and safetensors, as transformers expects them."""

import json
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llmkit.errors import ModelError, did_you_mean, raise_all
from llmkit.files import read_json
from llmkit.models import FAMILIES, build_model, family_of, shape_problems
from llmkit.models.family import Config
from llmkit.screen import printable

MAX_CONFIG_BYTES = 2**20
# Fields of a config.json that do not affect the forward pass: names, training, generation and output flags.
IGNORED_FIELDS = re.compile(
    r"architectures|model_type|(torch_)?dtype|transformers_version|(_model)?_name_or_path|_attn_implementation\w*|use_cache"
    r"|(bos|eos|pad|sep|unk|cls|mask)_token_id|return_dict\w*|output_\w+|id2label|label2id|num_labels|problem_type|is_decoder"
    r"|is_encoder_decoder|chunk_size_feed_forward|summary_\w+|task_specific_params|n_ctx|gradient_checkpointing"
    r"|is_llama_config|transformers\.js_config|tokenizer_class|prefix|torchscript|use_bfloat16|pruned_heads"
    r"|finetuning_task|tie_encoder_decoder|auto_map|directionality|pooler_\w+|unsloth_\w+|classifier_dropout"
)
FLOATS = ("F64", "F32", "F16", "BF16")  # types in safetensors files that are read, all by rounding to the model's dtype
MAX_SHARD_BYTES = 5 * 10**9  # of a weight file, as in transformers


def read_config(folder: Path) -> Config:
    """Return the Config of a model's folder; raise a ModelError if a field asks for mathematics that is not built."""
    path = folder / "config.json"
    try:
        hf = read_json(path, max_bytes=MAX_CONFIG_BYTES)
        if not isinstance(hf, dict):
            raise ValueError("not an object")
    except FileNotFoundError:
        raise ModelError(f"{folder} is not a model: it has no config.json", at=folder) from None
    except (ValueError, OSError) as error:
        raise ModelError(f"config.json can't be read: {error}", at=path) from None
    name = hf.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        expected, fix = " or ".join(FAMILIES), did_you_mean(str(name), FAMILIES)
        raise ModelError("this model family is not supported", at=path, got=name, expected=expected, fix=fix)
    family = FAMILIES[name]
    try:
        options = family.hf_defaults | family.from_hf(hf)
    except ModelError as error:
        error.at = path
        raise
    known = {field.name for field in fields(family.config)}
    errors = [
        ModelError(f"{name} with this {key} is not supported", at=path, got=value, expected=expected)
        for key, value in options.items()
        if (key in family.fixed_values or (key not in known and not IGNORED_FIELDS.fullmatch(key)))
        and (expected := family.fixed_values.get(key, "no such field")) != value
        and (value or expected)
    ]
    raise_all(errors)
    try:
        text = json.dumps({key: value for key, value in options.items() if key in known})
        config = TypeAdapter(family.config).validate_json(text, strict=True)
        problems = shape_problems(config)
    except ValidationError as error:
        found = [(".".join(map(str, item["loc"])), item["msg"], item["input"]) for item in error.errors()]
        raise_all([ModelError(f"config.json: {key}: {reason}", at=path, got=got) for key, reason, got in found])
    except (TypeError, ZeroDivisionError):
        raise ModelError("config.json has a value of the wrong type", at=path) from None
    if config.vocab_size is None:
        problems.append(("vocab_size", "is missing"))
    raise_all([ModelError(f"config.json: {key} {reason}", at=path) for key, reason in problems])
    return config


def weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """Return the safetensors files of a folder, and the tensors that its index lists for each; None without an index.

    Raises ModelError for a broken index, and for one that names a file elsewhere.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return {folder / "model.safetensors": None}
    try:
        weight_map = read_json(index)["weight_map"].items()
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"the weight index can't be read: {error}", at=index) from None
    listed: dict[str, set[str]] = {}
    for tensor, name in weight_map:
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError("a weight file must be in the model's folder", at=index, got=name)
        listed.setdefault(name, set()).add(tensor)
    return {folder / name: listed[name] for name in sorted(listed)}


def open_weights(path: Path):
    """Open a safetensors file without reading its tensors. safetensors refuses headers that lie about sizes."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ModelError("the weight file is missing", at=path) from None
    except (SafetensorError, OSError) as error:
        raise ModelError(f"the weights can't be read: {error}", at=path) from None


def weight_names(config: Config, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield the two names of each weight that the model reads: in the file, and in `Family.disk_views`."""
    family = family_of(config)
    for disk_name in names:
        name = family.from_disk_name(disk_name)
        tied = config.tie_word_embeddings and name == "lm_head.weight"
        if not tied and not family.ignored_weights.fullmatch(name):
            yield disk_name, name


def load_model(folder: Path, *, device="cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load a model from a Hugging Face folder. Names and shapes are checked before memory is allocated."""
    config = read_config(folder)
    family = family_of(config)
    model = build_model(config, device="meta", seed=None)
    files = weight_files(folder)
    missing = check_weights(model, folder, files)
    weights = {name: torch.empty(p.shape, dtype=dtype, device=device) for name, p in model.named_parameters()}
    if fresh := [name for name in missing if family.may_be_missing.fullmatch(name)]:
        warning = f"warning: {folder} lacks {len(fresh)} weights; initialised: {', '.join(fresh)}"
        print(printable(warning), file=sys.stderr)
        initial = build_model(config, seed=0).state_dict()
        for name in fresh:
            weights[name].copy_(initial[name])
    views = {disk: view for name, tensor in weights.items() for disk, view in family.disk_views(name, tensor).items()}
    for path in files:
        with open_weights(path) as file:
            for disk_name, name in weight_names(config, file.keys()):
                views[name].copy_(file.get_tensor(disk_name))
    for name, other in family.missing_copies.items():
        if name in missing:
            weights[name].copy_(weights[other])
    check_finite(weights, folder)
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(True)


def check_weights(model: nn.Module, folder: Path, files: dict[Path, set[str] | None]) -> list[str]:
    """Raise a ModelError with what does not fit a model in `weight_files`. Return the names of missing weights.

    Only weights that `Family` allows to be missing are returned.
    """
    family = family_of(model.config)
    shapes = {
        disk: tuple(view.shape)
        for name, p in model.named_parameters()
        for disk, view in family.disk_views(name, p).items()
    }
    errors, seen = [], set()
    for path, listed in files.items():
        with open_weights(path) as file:
            names = set(file.keys())
            for name in sorted((names if listed is None else listed) ^ names):
                fix = "copy index and files again from one source"
                got = "it is in the file, but not in the index" if name in names else "it is only in the index"
                errors.append(ModelError(f"the weight index is wrong about {name}", at=path, got=got, fix=fix))
            for disk_name, name in weight_names(model.config, file.keys()):
                shape, dtype = tuple(file.get_slice(disk_name).get_shape()), file.get_slice(disk_name).get_dtype()
                if name in seen:
                    errors.append(ModelError(f"the weight {name} is there twice", at=path))
                elif name not in shapes:
                    errors.append(ModelError(f"the model has no weight {disk_name}", at=path))
                elif shape != (expected := shapes[name]):
                    errors.append(ModelError(f"{disk_name} has the wrong shape", at=path, got=shape, expected=expected))
                elif dtype not in FLOATS:
                    errors.append(unsupported_type(disk_name, dtype, path))
                seen.add(name)
    missing = [name for name in shapes if name not in seen]
    allowed = [name for name in missing if name in family.missing_copies or family.may_be_missing.fullmatch(name)]
    needed = [name for name in missing if name not in allowed]
    if needed and not errors:
        errors.append(ModelError(f"{len(needed)} weights are missing, for example {needed[0]}", at=folder))
    raise_all(errors)
    return missing


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
    dtype: torch.dtype | None = None,
) -> None:
    """Write config.json and model.safetensors, and generation_config.json if there are several stop tokens.

    dtype  of the weights; None: that of the parameters. Raises ModelError if its range is too small
    """
    weights = {name: tensor.to(dtype or tensor.dtype) for name, tensor in disk_weights(model)}
    if dtype:
        check_finite(weights, folder)
    folder.mkdir(parents=True, exist_ok=True)
    token_ids = {"bos_token_id": bos_token_id, "eos_token_id": next(iter(eos_token_ids), None)}
    config = hf_config(model.config) | token_ids
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


def hf_config(config: Config) -> dict:
    """Return the fields of a Config's config.json."""
    family = family_of(config)
    options = {key: value for key, value in asdict(config).items() if key != "init"}
    names = {"model_type": config.model_type, "architectures": [family.architecture]}
    return family.to_hf(options) | family.fixed_values | names
