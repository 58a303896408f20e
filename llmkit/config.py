"""The YAML file: its schema, its loader and its errors. No torch here, so a wrong key is named in under a second.

Every section but the "choose one" sections is spelled out below, with its defaults: they live here and nowhere else.
A "choose one" section is `{name: adamw, lr: 3e-4}`: `name` picks a function, the rest are that function's keyword-only
arguments, checked against its signature by `check_options` once torch may be imported.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, create_model

from llmkit.errors import UserError, did_you_mean, raise_all
from llmkit.yamlfile import LENGTHS, merge, read_yaml, set_override

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A fixed section: unknown keys are errors, and `true`, `10.5` or `"three"` are no integers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Choice(BaseModel):
    """A "choose one" section: a name from a dict in the code, and the options of what it names."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    name: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


# ---- data -----------------------------------------------------------------------------------------------------------


class Source(Section):
    """Where documents come from: `path` (file, folder, glob) or `hf` (a hub id, or a local dataset folder)."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    path: str | None = None
    include: list[str] = []
    exclude: list[str] = []
    hf: str | None = None
    config: str | None = None  # the subset of a Hugging Face dataset
    split: str = "train"
    streaming: bool = False
    text_key: str = "text"
    limit: Count | None = None  # documents
    profile: Literal["web", "docs", "code", "books", "none"] = "none"


class OnError(Section):
    mode: Literal["quarantine", "fail"] = "quarantine"
    max_bad_fraction: Fraction = 0.01


class Clean(Section):
    html: Literal["auto"] | bool = "auto"  # auto: files and records that are HTML
    fix_encoding: bool = True
    unicode: Literal["NFC"] | None = "NFC"
    control: bool = True
    whitespace: bool = True


class Filter(Section):
    """Thresholds by rule, over the profile's: `{words: {low: 20}}`; `false` turns a rule off."""

    rules: dict[str, dict[str, float] | Literal[False]] = {}


class Pii(Section):
    """Personal data: which kinds are looked for (none by default), and what happens to them."""

    kinds: list[Literal["email", "phone", "ip", "card", "iban", "ssn", "secret"]] = []
    action: Literal["replace", "tag", "drop"] = "replace"  # by values nobody owns; by <EMAIL>; the whole document
    drop_above: Annotated[int, Field(ge=0)] = 50  # findings in one document, from which it is a list of people


class NearDedup(Section):
    ngram: Count = 5
    bands: Count = 14
    rows: Count = 8


class Dedup(Section):
    exact: bool = True
    near: NearDedup | Literal[False] = NearDedup()


class Split(Section):
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.005


class TokenizerSection(Section):
    """Train one (`train: bpe`), or take an existing tokenizer.json (`path`)."""

    train: Literal["bpe"] | None = None
    vocab_size: Annotated[int, Field(ge=259)] = 32_000
    path: str | None = None
    sample_mb: Annotated[float, Field(gt=0)] = 64.0  # megabytes of text that the training reads


class CorpusData(Section):
    """Documents joined into one stream of tokens and cut into samples of `seq_len`."""

    kind: Literal["corpus"]
    dir: str
    seed: Annotated[int, Field(ge=0)] = 1234  # of the split, and of the sample that the tokenizer sees
    sources: list[Source] = []  # empty: `dir` was built before
    workers: Count | Literal["auto"] = "auto"
    on_error: OnError = OnError()
    clean: Clean = Clean()
    filter: Filter = Filter()
    pii: Pii = Pii()
    dedup: Dedup = Dedup()
    split: Split = Split()
    tokenizer: TokenizerSection = TokenizerSection(train="bpe")
    seq_len: Count = 1024


class SftData(Section):
    """Prompts and answers: only the answers are targets.

    Records are {prompt, completion}, {instruction, input, output}, {messages: [{role, content}]} or
    {conversations: [{from, value}]}; the first record decides.
    """

    kind: Literal["sft"]
    path: str
    val_path: str | None = None
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05  # held out of `path` when there is no val_path
    seq_len: Count = 1024
    packing: bool = True
    too_long: Literal["truncate", "drop"] = "truncate"
    chat_template: str | None = None  # a Jinja file; default: the tokenizer's own, else a plain one


# ---- the run --------------------------------------------------------------------------------------------------------


class Train(Section):
    max_steps: Count | None = None
    max_tokens: Count | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    global_batch_size: Count = 32  # sequences in one optimizer step
    micro_batch_size: Count | Literal["auto"] = "auto"  # sequences in one forward
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    gradient_checkpointing: Literal["none", "full"] | Count = "none"  # k: every k-th block
    compile: Literal["auto"] | bool = "auto"
    deterministic: bool = False
    early_stopping_patience: Count | None = None  # evaluations in a row without a lower val loss
    max_bad_steps: Count = 5  # non-finite steps in a row, all skipped, before the run stops


class Eval(Section):
    every: Count | None = 250
    max_batches: Count | None = 50  # of global_batch_size sequences of the val split; null: all of it
    sample_prompt: str | None = None  # text to continue at every evaluation
    sample_tokens: Count = 64


class Checkpoint(Section):
    every: Count = 500
    keep: Count = 2  # the newest ones; the best by val loss is kept beside them


class Log(Section):
    every: Count = 10
    tensorboard: bool = False


class Config(Section):
    """One run. `where("train.max_steps")` says which file and line a value came from."""

    run_dir: str = "runs/default"
    seed: Annotated[int, Field(ge=0)] = 1337
    init_from: str | None = None
    model: Choice | None = None
    data: Annotated[CorpusData | SftData, Field(discriminator="kind")]
    objective: Choice = Choice(name="lm")
    peft: Choice | None = None
    optimizer: Choice = Choice(name="adamw")
    schedule: Choice = Choice(name="cosine")
    train: Train = Train()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()

    _origins: dict[tuple, str] = PrivateAttr(default_factory=dict)

    def where(self, key: str) -> str:
        """The file and line of a dotted key, or of the nearest section that holds it."""
        return nearest(self._origins, tuple(key.split(".")))

    def dump(self) -> str:
        """The whole config as YAML, every default written out."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


# ---- loading and checking ----------------------------------------------------------------------------------------


def load_config(path: Path | None, overrides: list[str] = (), defaults: dict | None = None) -> Config:
    """Read, override and check a config against the schema.

    path       a YAML file, or None for a config made of `defaults` and `overrides` alone
    overrides  "section.key=value" strings, applied in order
    defaults   values that the file may replace (what `finetune --lora` brings along)
    """
    values, origins = read_yaml(path) if path else ({}, {(): "the command line"})
    values = merge(defaults or {}, values)
    for override in overrides:
        values = set_override(values, origins, override)
    if path and "run_dir" not in values:
        values["run_dir"] = f"runs/{path.stem}"
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise_all(explain_all(error, Config, origins))
    config._origins = origins
    raise_all(list(conflicts(config)))
    return config


def conflicts(config: Config) -> Iterator[UserError]:
    """What no single key shows: keys that contradict each other."""
    lengths = [name for name in LENGTHS if getattr(config.train, name) is not None]
    if len(lengths) != 1:
        yield UserError(
            "train needs exactly one length", at=config.where(f"train.{lengths[-1]}" if lengths else "train"),
            got=" and ".join(lengths) or "none", expected="max_steps, max_tokens or epochs",
        )  # fmt: skip
    micro = config.train.micro_batch_size
    if isinstance(micro, int) and config.train.global_batch_size % micro:
        yield UserError(
            "train.global_batch_size is not a multiple of train.micro_batch_size",
            at=config.where("train.global_batch_size"), got=f"{config.train.global_batch_size} and {micro}",
        )  # fmt: skip
    if config.model is None and config.init_from is None:
        yield UserError(
            "there is no model",
            at=config.where(""),
            expected="a `model:` section, or `init_from:` with a model's folder",
        )
    if config.model is not None and config.init_from is not None:
        yield UserError(
            "model and init_from are both given",
            at=config.where("model"),
            fix="delete the model section: init_from has one",
        )
    if isinstance(config.data, SftData):
        if config.init_from is None:
            yield UserError(
                "data.kind: sft needs a trained model to start from", at=config.where("data.kind"),
                fix="name one as init_from",
            )  # fmt: skip
        yield from useless(config, "data", config.data, "val_path", ["val_fraction"])
    if isinstance(config.data, CorpusData):
        pii = config.data.pii
        if not pii.kinds and pii != Pii():
            yield UserError(
                "data.pii looks for nothing", at=config.where("data.pii"), expected="kinds: [email, phone, ...]"
            )
        if pii.action == "drop" and pii.drop_above != Pii().drop_above:
            yield UserError(
                "data.pii.drop_above means nothing beside action: drop, which drops at the first finding",
                at=config.where("data.pii.drop_above"), fix="delete it",
            )  # fmt: skip
        names = [source.name for source in config.data.sources]
        for i, source in enumerate(config.data.sources):
            if (source.path is None) == (source.hf is None):
                yield UserError(
                    f"source {source.name} needs either path or hf", at=config.where(f"data.sources.{i}"),
                    got="both" if source.path else "neither",
                )  # fmt: skip
            place = f"data.sources.{i}"
            yield from useless(config, place, source, "path", ["config", "split", "streaming"])
            yield from useless(config, place, source, "hf", ["include", "exclude"])
            if source.name in names[:i]:
                yield UserError("two sources share a name", at=config.where(f"data.sources.{i}"), got=source.name)
        tokenizer = config.data.tokenizer
        if (tokenizer.train is None) == (tokenizer.path is None):
            yield UserError(
                "data.tokenizer needs either train or path", at=config.where("data.tokenizer"),
                expected="{train: bpe, vocab_size: 32000} or {path: tokenizer.json}",
            )  # fmt: skip
        yield from useless(config, "data.tokenizer", tokenizer, "path", ["vocab_size", "sample_mb"])


def useless(config: Config, place: str, section: Section, given: str, keys: list[str]) -> Iterator[UserError]:
    """Keys that would be ignored because `given` is there; values at their defaults mean nothing and pass."""
    for key in keys:
        default = type(section).model_fields[key].default
        if getattr(section, given) is not None and getattr(section, key) != default:
            yield UserError(
                f"{place}.{key} means nothing beside {given}", at=config.where(f"{place}.{key}"), fix="delete it"
            )


# ---- explaining -----------------------------------------------------------------------------------------------------

# What people type out of habit, and where it lives here.
ELSEWHERE = {
    "lr": "optimizer.lr", "learning_rate": "optimizer.lr", "weight_decay": "optimizer.weight_decay",
    "betas": "optimizer.betas", "warmup_steps": "schedule.warmup_steps", "warmup": "schedule.warmup_steps",
    "min_lr_ratio": "schedule.min_lr_ratio", "batch_size": "train.global_batch_size",
    "grad_clip": "train.max_grad_norm",
    "per_device_train_batch_size": "train.micro_batch_size", "num_train_epochs": "train.epochs",
    "gradient_accumulation_steps": "train.global_batch_size (accumulation is derived from it)",
    "block_size": "data.seq_len", "sequence_len": "data.seq_len", "seq_len": "data.seq_len",
    "vocab_size": "data.tokenizer.vocab_size", "lora_r": "peft.r", "lora_alpha": "peft.alpha", "output_dir": "run_dir",
    "n_layer": "model.num_hidden_layers", "n_head": "model.num_attention_heads", "n_embd": "model.hidden_size",
    "eval_steps": "eval.every", "save_steps": "checkpoint.every", "logging_steps": "log.every",
}  # fmt: skip


def nearest(origins: dict[tuple, str], path: tuple) -> str:
    """Where the longest known part of a key path was written."""
    path = tuple(int(part) if isinstance(part, str) and part.isdigit() else part for part in path)
    while path and path not in origins:
        path = path[:-1]
    return origins.get(path, origins.get((), "the config"))


def explain_all(
    error: ValidationError, schema: type[BaseModel], origins: dict[tuple, str], prefix: tuple = ()
) -> list[UserError]:
    """Every problem of a validation; the failed branches of one union become one problem."""
    found: dict[str, UserError] = {}
    for problem in error.errors(include_url=False):
        one = explain(problem, schema, origins, prefix)
        if one.what in found and one.expected:
            found[one.what].expected = f"{found[one.what].expected} or {one.expected}"
        else:
            found[one.what] = one
    return list(found.values())


def explain(problem: dict, schema: type[BaseModel], origins: dict[tuple, str], prefix: tuple = ()) -> UserError:
    """One pydantic error in the user's words."""
    loc = [part for part in problem["loc"] if part not in ("corpus", "sft", "[key]")]
    known = fields_at(schema, loc[:-1])
    if problem["type"] not in ("extra_forbidden", "missing", "union_tag_invalid", "union_tag_not_found"):
        while len(loc) > 1 and (*prefix, *loc) not in origins:  # the branches of a union end in type names
            loc.pop()
    path = (*prefix, *loc)
    key, at = ".".join(map(str, path)), nearest(origins, path)
    if problem["type"] == "extra_forbidden":
        word = str(path[-1])
        hint = did_you_mean(word, known) or (f"this lives in {ELSEWHERE[word]}" if word in ELSEWHERE else None)
        if hint is None:
            homes = [name for name, section in Config.model_fields.items() if word in fields_at(Config, [name])]
            hint = f"did you mean {homes[0]}.{word}?" if homes else f"known keys: {', '.join(sorted(known))}"
        return UserError(f"{key} is not a key", at=at, got=word, fix=hint)
    if problem["type"] == "missing":
        return UserError(f"{key} is missing", at=at, fix=f"add `{path[-1]}:`")
    if problem["type"] == "union_tag_invalid":
        return UserError(f"{key}.kind is unknown", at=at, got=problem["ctx"]["tag"], expected="corpus or sft")
    if problem["type"] == "union_tag_not_found":
        return UserError(f"{key}.kind is missing", at=at, expected="kind: corpus or kind: sft")
    expected = problem["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    expected = re.sub(r"dictionary or instance of \w+", "a section", expected)
    return UserError(f"{key} is not valid", at=at, got=repr(problem["input"]), expected=expected)


def fields_at(schema: type[BaseModel], loc: list) -> set[str]:
    """The keys that a section knows, found by walking the schema."""
    models: list[Any] = [schema]
    for part in loc:
        inner = []
        for model in models:
            field = getattr(model, "model_fields", {}).get(part) if isinstance(part, str) else None
            inner += flatten(field.annotation) if field else ([model] if isinstance(part, int) else [])
        models = inner
    return {name for model in models for name in getattr(model, "model_fields", {})}


def flatten(annotation: Any) -> list[Any]:
    """The classes inside `X | None`, `list[X]` and their like."""
    inner = [leaf for arg in get_args(annotation) for leaf in flatten(arg)]
    return inner or [annotation]


def check_options(
    table: dict[str, Callable], section: str, choice: Choice, config: Config
) -> tuple[dict[str, Any], list[UserError]]:
    """Check a "choose one" section against what it names.

    table   name -> function or dataclass; its keyword-only parameters are the options
    Returns every option with defaults filled in, and what was wrong.
    """
    if choice.name not in table:
        hint = did_you_mean(choice.name, table) or f"one of: {', '.join(table)}"
        at = config.where(f"{section}.name")
        return {}, [UserError(f"{section}.name is unknown", at=at, got=choice.name, fix=hint)]
    chosen = table[choice.name]
    parameters = inspect.signature(chosen).parameters.values()
    hints = get_type_hints(chosen.__init__ if inspect.isclass(chosen) else chosen, include_extras=True)
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
