"""Prepare a run: check the config, open its data, derive the rest."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.config.data import CorpusData
from llmkit.config.fields import Choice
from llmkit.config.schema import Config
from llmkit.data.batches import GOLDEN, MASK, Batches, mix
from llmkit.data.splits import Splits
from llmkit.errors import DataError, UserError, raise_all
from llmkit.files import file_sha256
from llmkit.models import CONFIGS, build_model, family_of
from llmkit.models.heads import HeadConfig
from llmkit.models.hf_config import read_config
from llmkit.objectives import OBJECTIVES
from llmkit.objectives.heads import score_names
from llmkit.objectives.objective import Objective
from llmkit.parallel.device import choose_precision
from llmkit.parallel.memory import free_memory
from llmkit.parallel.world import World
from llmkit.peft import METHODS
from llmkit.peft.adapter import WEIGHTS, options_to_continue
from llmkit.peft.method import Method
from llmkit.records.build import list_record_files
from llmkit.records.labelled import list_labelled_files
from llmkit.storage.locate import base_sha256
from llmkit.storage.run import check_own, claim
from llmkit.tokenizer.load import has_tokenizer, load_tokenizer
from llmkit.tokenizer.tokenizer import Tokenizer
from llmkit.training.build_data import open_data
from llmkit.training.cost import Plan, choose_trained
from llmkit.training.evaluation import Extras, check_best, open_extras
from llmkit.training.fit import MEMORY_SHARE, cheapest_change, check_memory, choose_fit, head_of, row_len, rows_in_step
from llmkit.training.objective import check_same_tokens, choose_objective, keeps_copy
from llmkit.training.resolve import (
    Options,
    check_choices,
    check_machine,
    check_max_epochs,
    check_method,
    check_warmup,
    complete_records,
    count_steps,
    find_problems,
    reuse_resolved_values,
)
from llmkit.training.schedules import SCHEDULES
from llmkit.training.selection import check_patterns, train_only
from llmkit.training.start import find_base, stacked_base, with_labels


@dataclass
class CheckedConfig:
    """A config whose names, options and shapes are good, before any data is opened."""

    config: Config  # objective, packing and init_from are resolved, and what a resumed run keeps
    options: Options
    model_config: Any  # its vocab_size may still be None
    base: Path | None  # folder of the weights to start from
    adapter: Path | None  # folder of the adapter that init_from names


@dataclass
class Derived:
    """Hold what follows from a checked config and the size of its vocabulary and data."""

    precision: str
    micro_batch_size: int
    gradient_checkpointing: str | int | float
    max_steps: int | None  # None: in epochs of data that is not known
    plan: Plan
    smaller: str  # the cheapest change with which the planned peak fits; "" if it does


@dataclass
class PreparedRun:
    """A run that is ready to train: no value is "auto" any more."""

    config: Config  # resolved: training it again repeats the run
    world: World
    model_config: Any
    base: Path | None  # folder of the weights to start from
    adapter: Path | None  # folder of the adapter that is trained further
    new_tokens: dict[int, list[int]]  # tokens that the base has no rows for: see `resize_embeddings`
    data: Splits
    objective: Objective
    options: Options
    plan: Plan
    max_steps: int
    precision: str
    micro_batch_size: int
    gradient_checkpointing: str | int | float
    smaller: str
    extras: Extras

    @property
    def tokens_per_step(self) -> int:
        """Return the tokens that a step reads, on average of labelled texts, whose rows differ in length."""
        rows, longest = rows_in_step(self.config, self.options, 1), row_len(self.config, self.options)
        if self.data.mean_length:  # of a prompt with one answer, if prompts are answered
            return round(rows * (self.data.mean_length + longest - self.config.data.row_len))
        return rows * longest

    @property
    def token_bytes(self) -> np.ndarray | None:
        """The bytes of text per token, for bits per byte; None if not all tokens of a text are predicted."""
        return self.data.token_bytes if self.model_config.kind == "causal" else None

    @property
    def head(self) -> HeadConfig | None:
        """Return the head for the labels of the data; None: the model predicts tokens."""
        head = head_of(self.config, self.options, self.model_config.kind)
        if head is None or head.kind == "regress":
            return head
        return replace(head, labels=self.data.labels, multi_label=self.data.multi_label)

    @property
    def method(self) -> Method | None:
        """Return the PEFT method; None: all weights are trained."""
        return METHODS[self.config.peft.name] if self.config.peft else None

    @property
    def method_options(self) -> Any:
        """Return the options of the PEFT method, of its own type."""
        return self.method.options(**self.options["peft"])

    @property
    def quantize(self) -> tuple[str, dict[str, Any]] | None:
        """Return how the base is quantized, and the options; None: it is not."""
        return (self.config.quantize.name, self.options["quantize"]) if self.config.quantize else None

    @property
    def optimizer_options(self) -> dict[str, Any]:
        """Return the options of the optimizer, with the learning rate of LoRA's B if it is another one."""
        options, ratio = self.options["optimizer"], self.options.get("peft", {}).get("lr_ratio", 1.0)
        if ratio == 1.0:
            return options
        return options | {"lr_pattern": {**(options["lr_pattern"] or {}), r"\.lora_B$": ratio * options["lr"]}}

    @cached_property
    def base_sha256(self) -> str:
        """The checksum of the base, which an adapter remembers."""
        return base_sha256(self.base)

    @cached_property
    def start_sha256(self) -> str:
        """Return the checksum of what training starts from: the base, and an adapter that is trained further."""
        return " ".join([self.base_sha256, *([file_sha256(self.adapter / WEIGHTS)] if self.adapter else [])])

    @property
    def keeps_copy(self) -> bool:
        """Return whether the run compares its model with a frozen copy of what it starts from."""
        return keeps_copy(self.config, self.options, continues=self.adapter is not None)

    def batches(self, split: str, global_batch_size: int) -> Batches:
        """Return the batches of a split, corrupted as the objective wants them; of train, this rank's."""
        share = {"rank": self.world.rank, "world": self.world.size} if split == "train" else {}
        options = {"seed": self.config.seed, "corrupt": self.objective.corrupt}
        return self.data.batches(split, global_batch_size, **options, **share)

    def seed_at(self, step: int) -> int:
        """Return the seed of dropout in this step on this rank."""
        return mix((self.config.seed * GOLDEN + step * self.world.size + self.world.rank) & MASK) >> 1

    def lr_factor(self, step: int) -> float:
        """Return the schedule's share of the learning rate in a step."""
        return SCHEDULES[self.config.schedule.name](step, self.max_steps, **self.options["schedule"])


# ---- check -> open the data -> derive -------------------------------------------------------------------------------


def prepare(
    config: Config, world: World, *, fresh: bool = False, keep: bool = True, say: Callable[[str], None] = print
) -> PreparedRun:
    """Check a config, open its data and derive the rest. It writes data only: a corpus to build, records to encode.

    fresh  ignore what an earlier run in the run directory resolved
    keep   create the run directory, if records are to be encoded into it; False: encode into a temporary folder, which
           is deleted when this process ends
    """
    checked = check(config, world.size, fresh=fresh)
    check_machine(config, world.device)
    config, options, model_config = checked.config, checked.options, checked.model_config
    world.on_main(lambda: check_own(Path(config.run_dir)))  # before rank 0 claims it: others would see that half done
    if config.data.kind != "corpus":  # its records are encoded into the run directory
        for source in config.data.all_sources():
            if config.data.kind == "labelled":
                list_labelled_files(source, config.objective.name, config.data.header)
            else:
                list_record_files(source)
        if keep:
            world.on_main(lambda: claim(Path(config.run_dir)))
    if config.stack and keep:
        make = partial(stacked_base, Path(config.run_dir), checked.adapter)
        checked.base = world.from_main(world.on_main(make, builds_data=True))
        model_config.vocab_size = read_config(checked.base).vocab_size  # the adapter may have added tokens
    start_id = family_of(model_config).start_token_id(model_config)
    written = options["objective"].get("max_new_tokens", 0)
    adapter = None if config.stack else checked.adapter
    spelt = adapter if adapter and has_tokenizer(adapter) else checked.base
    data = open_data(config, world, spelt, start_id, say, max_new_tokens=written, keep=keep)
    new_tokens = fit_vocabulary(checked, data.tokenizer)
    check_same_tokens(config, options["objective"], data.tokenizer)
    for split, samples in data.samples.items():
        if samples < 1:
            fix = "lower data.seq_len or add text" if config.data.kind == "corpus" else "add records"
            if data.samples["train" if split == "val" else "val"] > 1 and not getattr(config.data, "val_path", None):
                key = "data.split.val_fraction" if isinstance(config.data, CorpusData) else "data.val_fraction"
                fix += f", or {'raise' if split == 'val' else 'lower'} {key}"
            raise DataError(f"the {split} split is shorter than one sample", at=config.where("data"), fix=fix)
    precision, room = choose_precision(config.train.precision, world.device), free_memory(world.device)
    derived = derive(checked, world.device.type, precision, room, world.size, len(new_tokens), data.samples["train"])
    check_memory(derived.plan, room, derived.smaller)
    objective = OBJECTIVES[config.objective.name].build(data.tokenizer, config.seed, start_id, **options["objective"])
    run = PreparedRun(
        config=resolve(checked, derived),
        world=world,
        model_config=model_config,
        base=checked.base,
        adapter=adapter,
        new_tokens=new_tokens,
        data=data,
        objective=objective,
        options=options,
        **vars(derived),
        extras=open_extras(config, model_config, data.tokenizer) if config.eval.every else Extras(),
    )
    if config.eval.every:
        check_best(config, run.extras, objective.scores or (score_names(run.head) if run.head else ()))
    raise_all(list(check_max_epochs(config, epochs_by_source(run), data.shares, derived.max_steps)))
    return run


def check(config: Config, ranks: int = 1, *, fresh: bool = False) -> CheckedConfig:
    """Check names, options and shapes, and choose the objective; read no data. All errors are raised at once.

    fresh  ignore what an earlier run in the run directory resolved
    """
    options = check_choices(config)
    config = reuse_resolved_values(config, ranks, fresh=fresh)
    base, adapter = find_base(config)
    model_config = read_config(base) if base else CONFIGS[config.model.name](**options["model"])
    objective, options["objective"] = choose_objective(config, model_config)
    config = complete_records(config.model_copy(update={"objective": objective}), model_config)
    raise_all(list(find_problems(config, options, model_config, ranks)))
    if adapter and not config.stack:
        config = with_labels(config, adapter)
        options["peft"] = options_to_continue(adapter, base, config.peft.name, config.peft.options)
        if options["peft"].get("new_tokens"):
            raise config.error("init_from", "is an adapter that trains new tokens", fix="stack: true")
    if config.peft:
        check_method(config, options["peft"], model_config)
    if config.train.only:
        head = head_of(config, options, model_config.kind)
        try:
            train_only(build_model(model_config, device="meta", seed=None, head=head), config.train.only)
        except UserError as error:
            error.at = config.where("train.only")
            raise
    if patterns := {key: value for key, value in options["optimizer"].items() if key.endswith("_pattern") and value}:
        check_optimizer_patterns(config, options, model_config, patterns)
    return CheckedConfig(config, options, model_config, base, adapter)


def check_optimizer_patterns(config: Config, options: Options, model_config: Any, patterns: dict[str, Any]) -> None:
    """Raise a UserError for a regex of the optimizer that is found in no trained parameter's name."""
    head = head_of(config, options, model_config.kind)
    model = build_model(model_config, device="meta", seed=None, head=head)
    peft = (config.peft.name, options["peft"]) if config.peft else None
    choose_trained(model, peft=peft, new_rows=0, only=config.train.only)
    try:
        check_patterns(model, patterns.get("lr_pattern"), patterns.get("weight_decay_pattern"))
    except UserError as error:
        error.at = config.where("optimizer")
        raise


def fit_vocabulary(checked: CheckedConfig, tokenizer: Tokenizer) -> dict[int, list[int]]:
    """Set the model's vocabulary size by the tokenizer if the config leaves it open, and return `added_tokens`."""
    config, model_config = checked.config, checked.model_config
    new_tokens = added_tokens(config, checked.base, tokenizer) if checked.base else {}
    if config.peft:
        check_rows_option(config, checked.options["peft"], len(new_tokens))
    if model_config.vocab_size is None or (new_tokens and model_config.vocab_size < len(tokenizer)):
        model_config.vocab_size = len(tokenizer)
    if model_config.vocab_size < len(tokenizer):
        got = f"{len(tokenizer)} tokens, {model_config.vocab_size} embeddings"
        raise UserError("the tokenizer has more tokens than the model", at=config.where("model.vocab_size"), got=got)
    return new_tokens


def check_rows_option(config: Config, options: dict[str, Any], new_tokens: int) -> None:
    """Raise a UserError unless the PEFT method trains the rows of added tokens exactly if there are some."""
    option = METHODS[config.peft.name].rows_option
    if option and options[option] != bool(new_tokens):
        what, got = "must be true if there are added tokens, and false otherwise", f"{new_tokens} added tokens"
        fix = f"peft.{option}: {bool(new_tokens)}".lower()
        raise config.error(f"peft.{option}", what, got=f"{got}, {option}: {options[option]}".lower(), fix=fix)
    if new_tokens and not option:
        fix = "peft.name: " + " or ".join(name for name, method in METHODS.items() if method.rows_option)
        raise config.error("peft.name", "can't train the rows of added tokens", got=config.peft.name, fix=fix)


def added_tokens(config: Config, base: Path, tokenizer: Tokenizer) -> dict[int, list[int]]:
    """Return the tokens that the base's tokenizer lacks: new id -> the ids that spelt it so far.

    Raises a UserError if the data's tokenizer changes tokens of the base's, or adds some without resize_embeddings.
    """
    old = load_tokenizer(base)
    ids = tokenizer.rust.get_vocab(with_added_tokens=True)
    known = old.rust.get_vocab(with_added_tokens=True)
    if any(ids.get(token) != i for token, i in known.items()):
        what = "the data was encoded with another tokenizer than the model's"
        fix = f"data.tokenizer: {{path: {base / 'tokenizer.json'}}}, and another data.dir"
        raise UserError(what, at=config.where("data.tokenizer"), fix=fix)
    new = {i: token for token, i in ids.items() if token not in known}
    if new and not config.resize_embeddings:
        got, fix = f"{len(new)} of them, {new[min(new)]} first", "resize_embeddings: true"
        raise UserError("the tokenizer has tokens that the model lacks", at=config.where("init_from"), got=got, fix=fix)
    return {i: [] if token in tokenizer.specials else old.encode(tokenizer.decode([i])) for i, token in new.items()}


def derive(
    checked: CheckedConfig,
    device: str,
    precision: str,
    room: int,
    ranks: int,
    new_rows: int = 0,
    samples: int | None = None,
) -> Derived:
    """Derive length, precision, micro-batch and plan of a checked config whose vocab_size is known.

    device   "cpu" or "cuda"
    room     bytes of memory that the run may use
    samples  of the train split; None: not known
    """
    config, options, model_config = checked.config, checked.options, checked.model_config
    max_steps = count_steps(config.train, config.data.row_len, samples, options["objective"].get("updates", 1))
    raise_all(list(check_warmup(config, options, max_steps)))
    planned = (model_config, device, precision, new_rows)
    config, plan = choose_fit(config, ranks, room, options, *planned)
    smaller = "" if plan.peak_memory <= room else cheapest_change(config, options, ranks, MEMORY_SHARE * room, *planned)
    train = config.train
    return Derived(precision, train.micro_batch_size, train.gradient_checkpointing, max_steps, plan, smaller)


def resolve(checked: CheckedConfig, derived: Derived) -> Config:
    """Return the config with every option and derived value written out."""
    names = ("precision", "micro_batch_size", "gradient_checkpointing")
    config, update = checked.config, {name: getattr(derived, name) for name in names}
    choices = {
        section: Choice(name=getattr(config, section).name, **options)
        for section, options in checked.options.items()
        if section != "model"
    }
    if config.model:
        choices["model"] = Choice(name=config.model.name, **vars(checked.model_config))
    return config.model_copy(update=choices | {"train": config.train.model_copy(update=update)})


def epochs_by_source(run: PreparedRun) -> dict[str, float]:
    """Return how often the run reads each source of its data."""
    sources = [source.name for source in run.config.data.sources]
    drawn = run.max_steps * run.config.train.global_batch_size / run.objective.updates
    parts = {name: run.data.shares.get(name, (1.0, run.data.samples["train"])) for name in sources}
    return {name: share * drawn / samples for name, (share, samples) in parts.items()}
