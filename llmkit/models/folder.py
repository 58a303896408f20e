"""Hugging Face folders: config.json and safetensors, read with distrust and written so that transformers opens them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llmkit.errors import MODEL, UserError, did_you_mean, raise_all
from llmkit.models import FAMILIES, build_model, family_of, shape_problems

MAX_CONFIG_BYTES = 2**20
# Fields of a config.json that change nothing in a forward pass: names, training habits, generation and output flags.
HARMLESS = re.compile(
    r"architectures|model_type|(torch_)?dtype|transformers_version|_name_or_path|_attn_implementation\w*|use_cache"
    r"|(bos|eos|pad|sep)_token_id|return_dict\w*|output_\w+|id2label|label2id|num_labels|problem_type|is_decoder"
    r"|is_encoder_decoder|chunk_size_feed_forward|summary_\w+|task_specific_params|n_ctx|gradient_checkpointing"
    r"|is_llama_config|transformers\.js_config|tokenizer_class|prefix|torchscript|use_bfloat16|pruned_heads|finetuning_task|tie_encoder_decoder"
)
BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)$")  # old files store these constants


def read_config(folder: Path):
    """The Config of a model's folder; fields that would change the mathematics are refused, never ignored."""
    path = folder / "config.json"
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise UserError("config.json is too large to be one", at=path, code=MODEL)
        hf = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(hf, dict):
            raise ValueError("not an object")
    except FileNotFoundError:
        raise UserError(f"{folder} is not a model: it has no config.json", at=folder, code=MODEL) from None
    except (ValueError, OSError) as error:
        raise UserError(f"config.json can't be read: {error}", at=path, code=MODEL) from None
    name = hf.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(
            "this model family is not supported", at=path, got=name, expected=" or ".join(FAMILIES),
            fix=did_you_mean(str(name), FAMILIES), code=MODEL,
        )  # fmt: skip
    family = FAMILIES[name]
    options = family.from_hf(hf)
    known = {field.name for field in fields(family.Config)}
    errors = [
        UserError(f"{name} with this {key} is not supported", at=path, got=value, expected=expected, code=MODEL)
        for key, value in options.items()
        if key not in known and not HARMLESS.fullmatch(key)
        and (expected := family.FIXED.get(key, "no such field")) != value
    ]  # fmt: skip
    raise_all(errors)
    try:
        wanted = json.dumps({key: value for key, value in options.items() if key in known})
        config = TypeAdapter(family.Config).validate_json(wanted, strict=True)
        problems = shape_problems(config)
    except (ValidationError, TypeError, ZeroDivisionError):
        raise UserError("config.json has a value of the wrong type", at=path, code=MODEL) from None
    if config.vocab_size is None:
        problems.append(("vocab_size", "is missing"))
    raise_all([UserError(f"config.json: {key} {reason}", at=path, code=MODEL) for key, reason in problems])
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder; an index may only name files that lie in it."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"the weight index can't be read: {error}", at=index, code=MODEL) from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError("a weight file must lie in the model's folder", at=index, got=name, code=MODEL)
    return [folder / name for name in names]


def open_weights(path: Path):
    """A safetensors file, opened without reading the tensors."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError("the weights are missing", at=path, code=MODEL) from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"the weights can't be read: {error}", at=path, code=MODEL) from None


def from_disk_name(config, name: str) -> str:
    """GPT-2's first public files lack the prefix that every other one has."""
    bare = family_of(config) is FAMILIES["gpt2"] and not name.startswith(("transformer.", "lm_head."))
    return f"transformer.{name}" if bare else name


def disk_layout(config, name: str, tensor: Tensor) -> Tensor:
    """The tensor as it lies on disk, or back again: some families store some linears transposed."""
    return tensor.T if name.endswith(getattr(family_of(config), "TRANSPOSED", ())) else tensor


def load_model(folder: Path, *, device="cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model with the weights of a Hugging Face folder. Names and shapes are checked before memory is taken."""
    config = read_config(folder)
    model = build_model(config, device="meta", seed=None)
    wanted = dict(model.named_parameters())
    found: dict[str, Tensor] = {}
    errors = []
    for path in weight_files(folder):
        with open_weights(path) as file:
            for disk_name in file.keys():  # noqa: SIM118 (safe_open is no dict)
                name = from_disk_name(config, disk_name)
                if BUFFERS.match(name) or (name == "lm_head.weight" and config.tie_word_embeddings):
                    continue
                if name not in wanted:
                    errors.append(UserError(f"the model has no place for {disk_name}", at=path, code=MODEL))
                    continue
                shape = tuple(disk_layout(config, name, wanted[name]).shape)
                if tuple(file.get_slice(disk_name).get_shape()) != shape:
                    got = tuple(file.get_slice(disk_name).get_shape())
                    errors.append(
                        UserError(f"{disk_name} has the wrong shape", at=path, got=got, expected=shape, code=MODEL)
                    )
                    continue
                tensor = disk_layout(config, name, file.get_tensor(disk_name))
                found[name] = tensor.to(device, dtype).contiguous()
    missing = [name for name in wanted if name not in found and not errors]
    if missing:
        errors.append(UserError(f"{len(missing)} weights are missing, {missing[0]} among them", at=folder, code=MODEL))
    raise_all(errors[:10])
    model.load_state_dict(found, assign=True)
    return model.requires_grad_(True)


def disk_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A model's weights under the names and in the layout of its Hugging Face family."""
    for name, tensor in model.state_dict().items():
        yield name, disk_layout(model.config, name, tensor.detach()).contiguous().cpu()


def save_model(
    model: nn.Module,
    folder: Path,
    *,
    eos_token_id: int | None = None,
    bos_token_id: int | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write config.json and model.safetensors; `dtype` None keeps the parameters' own."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to(dtype or tensor.dtype) for name, tensor in disk_weights(model)}
    options = {key: value for key, value in asdict(model.config).items() if key != "init"}
    config = family_of(model.config).to_hf(options)
    config |= {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
    config["dtype"] = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors lets only the owner read
