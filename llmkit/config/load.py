"""Load a config and check it. Nothing here imports torch, so a wrong key is reported in under a second."""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import ValidationError, create_model

from llmkit.config.data import CorpusData, Pii, TokenizerSection
from llmkit.config.defaults import PATTERN
from llmkit.config.explain import explain_all
from llmkit.config.fields import Choice, Section
from llmkit.config.records import FileData, LabelledData, RecordData, TurnData
from llmkit.config.schema import RECIPES, Checkpoint, Config, Eval
from llmkit.config.yaml import LENGTHS, find_origin, merge, read_yaml, set_override
from llmkit.errors import UserError, raise_all, suggest


def load_config(
    path: Path | None, overrides: list[str] = (), defaults: dict | None = None, *, for_training: bool = True
) -> Config:
    """Read, override and check a config against the schema.

    path          a YAML file, or None for a config made of `defaults` and `overrides` alone
    overrides     "section.key=value" strings, applied in order
    defaults      values that the file may replace
    for_training  False: only the data section is used, so that a model and a length may be missing
    """
    values, origins = read_yaml(path) if path else ({}, {(): "the command line"})
    values = merge(defaults or {}, values)
    for override in overrides:
        values = set_override(values, origins, override)
    recipe = RECIPES.get(values["recipe"], {}) if isinstance(values.get("recipe"), str) else {}
    if values.get("init_from"):
        recipe = {section: value for section, value in recipe.items() if section != "model"}
    values = merge(recipe, values)
    values = complete_data(values, origins)
    if path and "run_dir" not in values:
        values["run_dir"] = f"runs/{path.stem}"
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise_all(explain_all(error, Config, origins))
    config._origins = origins
    raise_all([*(run_conflicts(config) if for_training else ()), *data_conflicts(config)])
    return config


def complete_data(values: dict, origins: dict[tuple, str]) -> dict:
    """Return the parsed config with what its data section leaves open.

    The kind is corpus. A corpus that is built for the model of init_from gets that model's tokenizer.
    Raises UserError for a section of records that does not say so.
    """
    data, base = values.get("data"), values.get("init_from")
    if not isinstance(data, dict):
        return values
    if "path" in data and not data.keys() & {"kind", "dir", "sources"}:
        at = find_origin(origins, ("data", "path"))
        raise UserError("data.kind is missing", at=at, fix="add kind: sft for prompts and answers, or kind: labelled")
    data = {"kind": "corpus"} | data
    if data["kind"] == "corpus" and data.get("sources") and isinstance(base, str) and data.get("tokenizer") is None:
        data["tokenizer"] = {"path": base}
    return values | {"data": data}


def run_conflicts(config: Config) -> Iterator[UserError]:
    """Yield errors about keys of a training run that contradict each other."""
    error = config.error
    lengths = [name for name in LENGTHS if getattr(config.train, name) is not None]
    if len(lengths) != 1:
        at, got = config.where(f"train.{lengths[-1]}" if lengths else "train"), " and ".join(lengths) or "none"
        expected = "max_steps, max_tokens or epochs"
        yield UserError("train needs exactly one length", at=at, got=got, expected=expected)
    micro, size = config.train.micro_batch_size, config.train.global_batch_size
    if isinstance(micro, int) and size % micro and config.data.kind != "prompts":  # each has several answers
        what, got = "is not a multiple of train.micro_batch_size", f"{size} and {micro}"
        yield error("train.global_batch_size", what, got=got)
    if config.model is None and config.init_from is None:
        expected = "a `model:` section, or `init_from:` with a model's folder"
        yield UserError("there is no model", at=config.where(""), expected=expected)
    if config.model is not None and config.init_from is not None:
        yield error("model", "and init_from are both given", fix="delete the model section: init_from has one")
    if config.peft and config.init_from is None:
        yield error("peft", "needs a model to start from", fix="name one as init_from, or delete the peft section")
    if config.quantize and not config.peft:
        yield error("quantize", "freezes the weights, and all of them are trained", fix="add a peft section: --lora")
    if config.train.early_stopping_patience and config.eval.every is None:
        what, fix = "needs evaluations, but eval.every is null", "set eval.every, or delete the patience"
        yield error("train.early_stopping_patience", what, fix=fix)
    measured = {key: getattr(config.eval, key) for key in ("sets", "general", "tasks", "tasks_every")}
    for key in [key for key, value in measured.items() if value and config.eval.every is None]:
        yield error(f"eval.{key}", "needs evaluations, but eval.every is null", fix="set eval.every, or delete it")
    if config.eval.tasks_every and not config.eval.tasks:
        yield error("eval.tasks_every", "has no effect without eval.tasks", fix="delete it")
    if config.eval.every is None and config.eval.best != Eval().best:
        yield error("eval.best", "needs evaluations, but eval.every is null", fix="set eval.every, or delete it")
    if config.checkpoint.average == "none" and config.checkpoint.average_fraction != Checkpoint().average_fraction:
        what, fix = "has no effect with average: none", "set checkpoint.average: tail, or delete it"
        yield error("checkpoint.average_fraction", what, fix=fix)
    if config.resize_embeddings and config.init_from is None:
        yield error("resize_embeddings", "needs a model to start from", fix="name one as init_from, or delete it")
    if isinstance(config.data, RecordData) and config.init_from is None:
        what = f"{config.data.kind} needs a trained model to start from"
        yield error("data.kind", what, fix="name one as init_from")


def data_conflicts(config: Config) -> Iterator[UserError]:
    """Yield errors about keys of the data section that contradict each other."""
    yield from source_conflicts(config, config.data)
    if isinstance(config.data, RecordData):
        yield from ignored_keys(config, "data", config.data, "val_path", ["val_fraction"])
    if (evals := config.data.decontaminate) and not (evals.files or evals.tasks):
        yield config.error("data.decontaminate", "names nothing to look for", fix="give files or tasks")
    if isinstance(config.data, FileData) and config.data.path is None:
        yield UserError("data has no path", at=config.where("data"), fix="name the file of the records as data.path")
    if isinstance(config.data, LabelledData) and len(set(config.data.labels or [])) < len(config.data.labels or []):
        yield config.error("data.labels", "names a label twice", got=", ".join(config.data.labels))
    if isinstance(config.data, TurnData) and (config.data.path is None) != bool(config.data.sources):
        got = "both" if config.data.path else "neither"
        yield UserError("data needs either path or sources", at=config.where("data"), got=got)
    if isinstance(config.data, CorpusData):
        yield from ignored_keys(config, "data", config.data, "cluster", ["workers"])
        yield from pii_conflicts(config, config.data.pii)
        yield from tokenizer_conflicts(config, config.data.tokenizer)


def pii_conflicts(config: Config, pii: Pii) -> Iterator[UserError]:
    """Yield errors about personal data."""
    if not pii.kinds and pii != Pii():
        yield config.error("data.pii", "has no kinds to look for", expected="kinds: [email, phone, ...]")
    if pii.action == "drop" and pii.drop_above != Pii().drop_above:
        what = "has no effect with action: drop, which drops a document at its first finding"
        yield config.error("data.pii.drop_above", what, fix="delete it")


def source_conflicts(config: Config, data: CorpusData | RecordData) -> Iterator[UserError]:
    """Yield errors about sources."""
    names = [source.name for source in data.sources]
    without = [source.name for source in data.sources if source.weight is None]
    if without and len(without) < len(names):
        got, fix = f"none: {', '.join(without)}", "give all of them one, or none"
        yield UserError(
            "some sources have a weight and some have none", at=config.where("data.sources"), got=got, fix=fix
        )
    of_files = ["config", "revision", "streaming", *(["split"] if isinstance(data, CorpusData) else [])]
    for i, source in enumerate(data.sources):
        place, at = f"data.sources.{i}", config.where(f"data.sources.{i}")
        if (source.path is None) == (source.hf is None):
            got = "both" if source.path else "neither"
            yield UserError(f"source {source.name} needs either path or hf", at=at, got=got)
        yield from ignored_keys(config, place, source, "path", of_files)
        yield from ignored_keys(config, place, source, "hf", ["include", "exclude"])
        if source.name in names[:i]:
            yield UserError("two sources share a name", at=at, got=source.name)


def tokenizer_conflicts(config: Config, tokenizer: TokenizerSection) -> Iterator[UserError]:
    """Yield errors about tokenizer options that exclude each other or have no effect."""
    given = [name for name in ("train", "path", "extend") if getattr(tokenizer, name) is not None]
    if len(given) != 1:
        got, expected = " and ".join(given) or "none", "{train: bpe, vocab_size: 32000} or {path: tokenizer.json}"
        yield config.error("data.tokenizer", "needs one of train, path and extend", got=got, expected=expected)
    training_keys = ["pattern", "normalize", "special_tokens", "extra_ids"]
    yield from ignored_keys(config, "data.tokenizer", tokenizer, "path", ["vocab_size", "sample_mb", *training_keys])
    yield from ignored_keys(config, "data.tokenizer", tokenizer, "extend", training_keys)
    if tokenizer.train in ("wordpiece", "char") and tokenizer.pattern != PATTERN:
        yield config.error("data.tokenizer.pattern", f"has no effect with {tokenizer.train}", fix="delete it")


def ignored_keys(config: Config, place: str, section: Section, given: str, keys: list[str]) -> Iterator[UserError]:
    """Yield an error for each of the keys that was changed from its default but is ignored because `given` is set."""
    for key in keys:
        default = type(section).model_fields[key].default
        if getattr(section, given) is not None and getattr(section, key) != default:
            yield config.error(f"{place}.{key}", f"has no effect with {given}", fix="delete it")


def check_options(
    table: dict[str, Callable], section: str, choice: Choice, config: Config
) -> tuple[dict[str, Any], list[UserError]]:
    """Check the options of a "choose one" section against the function or dataclass that it names.

    table   name -> function or dataclass, whose keyword-only parameters are the options
    Return (all options with defaults filled in, errors).
    """
    if choice.name not in table:
        return {}, [config.error(f"{section}.name", "is unknown", got=choice.name, fix=suggest(choice.name, table))]
    chosen = table[choice.name]
    parameters = inspect.signature(chosen).parameters.values()
    hints = get_type_hints(chosen, include_extras=True)
    fields: dict[str, Any] = {
        p.name: (hints[p.name], ... if p.default is p.empty else p.default)
        for p in parameters
        if p.kind is p.KEYWORD_ONLY
    }
    schema = create_model(choice.name, __config__=Section.model_config, **fields)
    try:
        return schema.model_validate(choice.options).model_dump(), []
    except ValidationError as error:
        return {}, explain_all(error, schema, config._origins, prefix=(section,))
