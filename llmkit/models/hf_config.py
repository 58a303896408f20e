"""Read and write the config.json of a Hugging Face folder."""

import json
import re
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from llmkit.errors import ModelError, did_you_mean, raise_all
from llmkit.files import read_json
from llmkit.models import FAMILIES, family_of, shape_problems
from llmkit.models.family import Config
from llmkit.models.heads import HeadConfig, head_fields, parse_head
from llmkit.screen import warn

MAX_CONFIG_BYTES = 2**20
# Fields of a config.json that do not affect the forward pass: names, training, generation and output flags.
IGNORED_FIELDS = re.compile(
    r"architectures|model_type|(torch_)?dtype|transformers_version|(_model)?_name_or_path|_attn_implementation\w*|use_cache"
    r"|(bos|eos|pad|sep|unk|cls|mask)_token_id|return_dict\w*|output_\w+|id2label|label2id|num_labels|problem_type|is_decoder"
    r"|is_encoder_decoder|chunk_size_feed_forward|summary_\w+|task_specific_params|n_ctx|gradient_checkpointing"
    r"|is_llama_config|transformers\.js_config|tokenizer_class|prefix|torchscript|use_bfloat16|pruned_heads"
    r"|finetuning_task|tie_encoder_decoder|auto_map|directionality|pooler_\w+|unsloth_\w+|classifier_(dropout|pooling)"
)
# Fields that change the mathematics of other families, or of any: a model that sets one is not what its type says.
MATHEMATICS = re.compile(
    r"(quantization|compression)_config|layer_types|partial_rotary_factor|rotary_pct|num(_local)?_experts\w*"
    r"|\w*(softcap|multiplier|clip_qkv|qk_norm|alibi)\w*"
)


def read_config(folder: Path) -> Config:
    """Return the Config of a model's folder; raise a ModelError if a field asks for mathematics that is not built."""
    path, hf = folder / "config.json", read_fields(folder)
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
        if key in family.fixed_values and (expected := family.fixed_values[key]) != value and (value or expected)
    ]
    unused = unused_fields(name, options)
    errors += [
        ModelError(f"{name} with {key} is not supported", at=path, got=options[key], expected="no such field")
        for key in unused
        if MATHEMATICS.fullmatch(key)
    ]
    raise_all(errors)
    if unused:
        warn_once(f"{path} has fields that {name} does not have, in transformers either: {', '.join(unused)}")
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


def read_fields(folder: Path) -> dict[str, Any]:
    """Return the fields of a folder's config.json as they are."""
    path = folder / "config.json"
    try:
        hf = read_json(path, max_bytes=MAX_CONFIG_BYTES)
        if not isinstance(hf, dict):
            raise ValueError("not an object")
    except FileNotFoundError:
        raise ModelError(f"{folder} is not a model: it has no config.json", at=folder) from None
    except (ValueError, OSError) as error:
        raise ModelError(f"config.json can't be read: {error}", at=path) from None
    return hf


def read_head(folder: Path) -> HeadConfig | None:
    """Return the head for labels that a folder's config.json describes, None if the model predicts tokens."""
    hf = read_fields(folder)
    family = FAMILIES.get(str(hf.get("model_type")))
    try:
        return parse_head(hf, family.config.kind) if family else None
    except ModelError as error:
        error.at = folder / "config.json"
        raise


def unused_fields(name: str, options: dict[str, Any]) -> list[str]:
    """Return the fields of a config.json that say something, and that neither llmkit nor transformers reads."""
    family = FAMILIES[name]
    known = {field.name for field in fields(family.config)} | family.fixed_values.keys()
    return [key for key, value in options.items() if value and key not in known and not IGNORED_FIELDS.fullmatch(key)]


@lru_cache
def warn_once(text: str) -> None:
    """Print a warning, but not a second time: a command reads a config.json several times."""
    warn(text)


def hf_config(config: Config, head: HeadConfig | None = None) -> dict:
    """Return the fields of a Config's config.json, with those of a head for labels."""
    family = family_of(config)
    options = {key: value for key, value in asdict(config).items() if key != "init"}
    names = {"model_type": config.model_type, "architectures": [family.architecture]}
    fields = family.to_hf(options) | family.fixed_values | names
    return fields | head_fields(config, family, head) if head else fields
