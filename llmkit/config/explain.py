"""Convert pydantic's errors to UserErrors with the file and line, the rejected value and a suggestion."""

import re
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from llmkit.config.schema import Config
from llmkit.config.yaml import find_origin
from llmkit.errors import UserError, did_you_mean

# Key of the config -> its names in other tools. People also write these names in the wrong section.
ALIASES = {
    "optimizer.lr": "lr learning_rate",
    "optimizer.weight_decay": "weight_decay",
    "optimizer.betas": "betas",
    "schedule.warmup_steps": "warmup_steps warmup",
    "schedule.min_lr_ratio": "min_lr_ratio",
    "train.global_batch_size": "batch_size",
    "train.global_batch_size (accumulation is derived from it)": "gradient_accumulation_steps",
    "train.micro_batch_size": "per_device_train_batch_size",
    "train.max_grad_norm": "grad_clip",
    "train.epochs": "num_train_epochs",
    "data.seq_len": "block_size sequence_len seq_len",
    "data.tokenizer.vocab_size": "vocab_size",
    "peft.r": "lora_r",
    "peft.alpha": "lora_alpha",
    "run_dir": "output_dir",
    "model.num_hidden_layers": "n_layer",
    "model.num_attention_heads": "n_head",
    "model.hidden_size": "n_embd",
    "eval.every": "eval_steps",
    "checkpoint.every": "save_steps",
    "log.every": "logging_steps",
}
# Of the section data; pydantic names the one that it took in the path of a problem.
KINDS = ("corpus", "sft", "preference", "prompts", "labelled")
KEY_OF_ALIAS = {alias: key for key, aliases in ALIASES.items() for alias in aliases.split()}


def explain_all(
    error: ValidationError, schema: type[BaseModel], origins: dict[tuple, str], prefix: tuple = ()
) -> list[UserError]:
    """Convert a validation error to UserErrors, one per problem. The failed branches of a union become one error.

    origins  the "file:line" of each key path, from `read_yaml`
    prefix   the key path of the section that `schema` describes
    """
    found: dict[str, UserError] = {}
    for problem in error.errors(include_url=False):
        one = explain(problem, schema, origins, prefix)
        if one.what in found and one.expected:
            found[one.what].expected = f"{found[one.what].expected} or {one.expected}"
        else:
            found[one.what] = one
    return list(found.values())


def explain(problem: dict, schema: type[BaseModel], origins: dict[tuple, str], prefix: tuple = ()) -> UserError:
    """Convert one problem of a validation error to a UserError."""
    tagged = [part for part in problem["loc"] if part != "[key]"]
    loc = [part for part in tagged if part not in KINDS]
    known = fields_at(schema, tagged[:-1])
    if problem["type"] not in ("extra_forbidden", "missing", "union_tag_invalid"):
        while len(loc) > 1 and (*prefix, *loc) not in origins:  # the branches of a union end in type names
            loc.pop()
    path = (*prefix, *loc)
    key, at = ".".join(map(str, path)), find_origin(origins, path)
    if problem["type"] == "extra_forbidden":
        word = str(path[-1])
        kinds = [
            kind
            for kind in KINDS
            if word in fields_at(schema, [kind if part in KINDS else part for part in tagged[:-1]])
        ]
        hint = f"it is a key of data of kind {kinds[0]}" if kinds else did_you_mean(word, known)
        hint = hint or (f"use {KEY_OF_ALIAS[word]}" if word in KEY_OF_ALIAS else None)
        if hint is None:
            sections = [name for name, section in Config.model_fields.items() if word in fields_at(Config, [name])]
            keys = f"known keys: {', '.join(sorted(known))}" if known else "delete it: this section has no such options"
            hint = f"did you mean {sections[0]}.{word}?" if sections else keys
        return UserError(f"{key} is not a key", at=at, got=word, fix=hint)
    if problem["type"] == "missing":
        return UserError(f"{key} is missing", at=at, fix=f"add `{path[-1]}:`")
    if problem["type"] == "union_tag_invalid":
        return UserError(f"{key}.kind is unknown", at=at, got=problem["ctx"]["tag"], expected=" or ".join(KINDS))
    expected = problem["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    expected = re.sub(r"dictionary or instance of \w+|dictionary", "a section", expected)
    names = {
        "boolean": "true or false",
        "False": "false",
        r"String should match pattern '\S'": "some text, not a blank",
    }
    expected = names.get(expected, expected)
    fix = write_section(key, problem["input"]) if "section" in expected else None
    return UserError(f"{key} is not valid", at=at, got=repr(problem["input"]), expected=expected, fix=fix)


def write_section(key: str, value: Any) -> str | None:
    """Return how to write a section that was given as a=b,c=d; None for any other value."""
    pairs = re.findall(r"([^=,]+)=([^,]+)", value) if isinstance(value, str) else []
    section = "{" + ", ".join(f"{name.strip()}: {inner.strip()}" for name, inner in pairs) + "}"
    return f"write {key}: {section}, or -o '{key}={section}'" if pairs else None


def fields_at(schema: type[BaseModel], loc: list) -> set[str]:
    """Return the keys that the schema allows at a key path. One of KINDS in it chooses a branch of a union."""
    models: list[Any] = [schema]
    for part in loc:
        of_kind = [model for model in models if part in kinds_of(model)]
        if of_kind:
            models = of_kind
            continue
        inner = []
        for model in models:
            field = getattr(model, "model_fields", {}).get(part) if isinstance(part, str) else None
            inner += flatten(field.annotation) if field else ([model] if isinstance(part, int) else [])
        models = inner
    return {name for model in models for name in getattr(model, "model_fields", {})}


def kinds_of(model: Any) -> tuple[str, ...]:
    """Return the values of `kind` that choose a section: ("corpus",) for CorpusData."""
    kind = getattr(model, "model_fields", {}).get("kind")
    return get_args(kind.annotation) if kind else ()


def flatten(annotation: Any) -> list[Any]:
    """Return the classes inside `X | None`, `list[X]` and similar types."""
    inner = [leaf for arg in get_args(annotation) for leaf in flatten(arg)]
    return inner or [annotation]
