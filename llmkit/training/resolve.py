"""Resolve what a config leaves open: the options of "choose one" sections, the objective, and every "auto"."""

import importlib.util
import math
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch

from llmkit.config.data import CorpusData
from llmkit.config.fields import Choice
from llmkit.config.load import check_options
from llmkit.config.records import TurnData
from llmkit.config.schema import Config, Train
from llmkit.errors import DataError, MachineError, UserError, did_you_mean, raise_all
from llmkit.models import CONFIGS, build_model, family_of, shape_problems
from llmkit.models.quantized import QUANTIZERS
from llmkit.objectives import OBJECTIVES
from llmkit.parallel.device import choose_precision
from llmkit.parallel.fp8 import fp8_obstacle
from llmkit.peft import METHODS
from llmkit.readers.records import DOCUMENT_FORMATS, suffix_of
from llmkit.records.label_layouts import OURS
from llmkit.records.layouts import FIELDS, PREFERENCES
from llmkit.storage.manifest import best_checkpoint, list_checkpoints
from llmkit.storage.run import CONFIG as RUN_CONFIG
from llmkit.storage.run import is_run, read_run_config
from llmkit.training.optim import OPTIMIZERS, muon_matrices
from llmkit.training.presets import continue_pretraining
from llmkit.training.schedules import SCHEDULES

RESOLVED_ONCE = (
    "precision",
    "micro_batch_size",
    "gradient_checkpointing",
    "compile",
)  # keys of train whose "auto" a resumed run keeps
TABLES: dict[str, dict[str, Callable]] = {  # "choose one" section -> name -> function or dataclass with the options
    "model": CONFIGS,
    "objective": {name: one.build for name, one in OBJECTIVES.items()},
    "peft": {name: method.options for name, method in METHODS.items()},
    "quantize": QUANTIZERS,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
}
Options = dict[str, dict[str, Any]]  # of the "choose one" sections, by section

# ---- choices --------------------------------------------------------------------------------------------------------


def check_choices(config: Config) -> Options:
    """Return the options of every "choose one" section, defaults filled in; raise all errors at once."""
    options, errors = {}, []
    for section, table in TABLES.items():
        if section == "objective":  # its options are checked when the model is known
            continue
        choice = getattr(config, section)
        if choice is not None:
            options[section], wrong = check_options(table, section, choice, config)
            errors += wrong
    if config.objective and config.objective.name not in OBJECTIVES:
        errors += check_objective(config, config.objective)[1]
    raise_all(errors)
    return options


def check_objective(config: Config, choice: Choice) -> tuple[dict[str, Any], list[UserError]]:
    """Return the options of an objective, defaults filled in, and what is wrong with them."""
    return check_options(TABLES["objective"], "objective", choice, config)


def complete_records(config: Config, model_config: Any) -> Config:
    """Return the config with what its section of records leaves open.

    Examples share rows, unless an encoder reads the prompts. Today is the date that chat templates show.
    """
    if not isinstance(config.data, TurnData):
        return config
    packing, data = config.data.packing, config.data
    shares = model_config.kind != "seq2seq" and config.objective.name != "reward"
    packing = shares if packing is None else packing
    update = {"packing": packing, "date": data.date or date.today().isoformat()}
    return config.model_copy(update={"data": data.model_copy(update=update)})


def describe_choice(name: str, options: dict[str, Any]) -> str:
    """Return a choice and its options on one line."""
    return ", ".join([name, *(f"{key} {value}" for key, value in options.items() if value is not None)])


# ---- what does not fit ----------------------------------------------------------------------------------------------


def find_problems(config: Config, options: Options, model_config: Any, ranks: int) -> Iterator[UserError]:
    """Yield what does not fit among the model, its data, the length and the number of ranks."""
    name, kind, data = model_config.model_type, model_config.kind, config.data.kind
    yield from check_run_dir(config)
    if kind == "masked" and config.eval.sample_prompt is not None:
        yield config.error("eval.sample_prompt", f"can't be used: {name} writes no text", fix="delete it")
    if kind == "seq2seq" and data == "sft" and config.data.packing:
        yield config.error("data.packing", f"can't be done: {name} has each prompt in a row of its own")
    if kind == "seq2seq" and data == "corpus" and config.data.document_mask:
        yield config.error("data.document_mask", "can't be done: spans are cut out of whole rows")
    if isinstance(config.data, TurnData):
        yield from record_problems(config, kind)
    if data == "preference":
        yield from preference_problems(config)
    if data == "prompts":
        yield from prompt_problems(config, options["objective"])
    if data == "labelled":
        yield from head_problems(config)
    section = "model" if config.model else "init_from"
    for key, reason in shape_problems(model_config):
        yield UserError(f"model.{key} {reason}", at=config.where(f"{section}.{key}"))
    if (seq_len := config.data.seq_len) > (longest := model_config.max_position_embeddings):
        expected = f"at most {longest} (max_position_embeddings)"
        fix = f"set data.seq_len: {longest}"
        yield config.error(
            "data.seq_len", "is over the model's longest position", got=seq_len, expected=expected, fix=fix
        )
    yield from check_warmup(config, options, config.train.max_steps)
    if config.train.fp8 and config.peft:
        yield config.error("train.fp8", "trains whole models: an adapter's base stays as it is", fix="delete it")
    if config.quantize and family_of(model_config).experts(model_config):
        what = "can't be done: the experts of this model, most of its weights, are no linears"
        yield config.error("quantize", what, got=name, fix="delete it")
    if config.train.only and config.peft:
        yield config.error("train.only", "chooses among all weights, and an adapter is trained", fix="delete one")
    if (size := config.train.global_batch_size) % ranks:
        yield config.error(
            "train.global_batch_size", "is not a multiple of the number of ranks", got=f"{size}, {ranks}"
        )


def record_problems(config: Config, model_kind: str) -> Iterator[UserError]:
    """Yield what is wrong with a section of records."""
    data = config.data
    for path in [*(source.path for source in data.all_sources()), data.val_path]:
        if path and suffix_of(Path(path)) in DOCUMENT_FORMATS:
            key = "data.path" if path == data.path else "data.val_path" if path == data.val_path else "data.sources"
            fix = continue_pretraining(config.init_from, path)
            yield config.error(key, "is text, not prompts and answers", got=path, fix=fix)
    places = [f"data.sources.{i}" for i in range(len(data.sources))]
    known = (*PREFERENCES, *FIELDS) if data.kind == "preference" else FIELDS
    for place, section in zip(["data", *places], [data, *data.sources], strict=True):
        for name in [name for name in section.columns or {} if name not in known]:
            fix = did_you_mean(name, known) or f"name one of {', '.join(known)}"
            yield config.error(f"{place}.columns", f"has {name}, which is no field of a record", fix=fix)
    if data.too_long == "split" and model_kind == "seq2seq":
        what, fix = "can't be split for an encoder and a decoder", "data.too_long: drop or truncate_prompt"
        yield config.error("data.too_long", what, fix=fix)


def preference_problems(config: Config) -> Iterator[UserError]:
    """Yield what does not fit preferences."""
    if config.objective.name == "kto" and config.train.compile is True:
        yield config.error("train.compile", "can't be done: rows of other answers differ in length", fix="delete it")
    if config.objective.name == "reward":
        yield from number_problems(config)
        if config.data.packing:
            yield config.error("data.packing", "can't be done: a reward is that of a row", fix="delete it")


def prompt_problems(config: Config, options: dict[str, Any]) -> Iterator[UserError]:
    """Yield what does not fit prompts that the model answers while it is trained."""
    for name in [name for name in config.data.columns if name not in FIELDS]:
        fix = did_you_mean(name, FIELDS) or f"name one of {', '.join(FIELDS)}"
        yield config.error("data.columns", f"has {name}, which is no field of a record", fix=fix)
    if (most := options["max_new_tokens"]) >= config.data.seq_len:
        got = f"{most}, data.seq_len: {config.data.seq_len}"
        yield config.error("objective.max_new_tokens", "leaves no room for a prompt", got=got)
    if config.train.max_tokens is not None:
        yield config.error(
            "train.max_tokens", "can't be counted: the model writes them", fix="give epochs or max_steps"
        )
    if config.train.compile is True:
        yield config.error("train.compile", "can't be done: answers differ in length", fix="delete it")


def head_problems(config: Config) -> Iterator[UserError]:
    """Yield what does not fit a head for labels."""
    for name in [name for name in config.data.columns if name not in OURS]:
        fix = did_you_mean(name, OURS) or f"name one of {', '.join(OURS)}"
        yield config.error("data.columns", f"has {name}, which is no field of a record", fix=fix)
    yield from number_problems(config)
    unused = {"classify": (), "tag": ("multi_label", "label_separator")}
    for key in unused.get(config.objective.name, ("multi_label", "label_separator", "labels")):
        if getattr(config.data, key) is not None:
            what = f"has no effect with objective {config.objective.name}"
            yield config.error(f"data.{key}", what, fix="delete it")


def number_problems(config: Config) -> Iterator[UserError]:
    """Yield what does not fit a model that predicts no tokens, whose rows differ in length."""
    measured = ("sample_prompt", "sets", "general", "tasks")
    for key in [key for key in measured if getattr(config.eval, key)]:
        yield config.error(f"eval.{key}", "needs a head for tokens, and this run trains another one", fix="delete it")
    if config.train.max_tokens is not None:
        yield config.error(
            "train.max_tokens", "can't be counted: texts differ in length", fix="give epochs or max_steps"
        )
    if config.train.compile is True:
        yield config.error("train.compile", "can't be done: rows differ in length", fix="delete it")


def check_method(config: Config, options: dict[str, Any], model_config: Any) -> None:
    """Raise a UserError if the PEFT method does not fit the model; nothing is allocated."""
    method, model = METHODS[config.peft.name], build_model(model_config, device="meta", seed=None)
    try:
        method.apply(model, method.options(**options), 0, [])
    except UserError as error:
        for one in (error, *error.others):
            one.at = config.where("peft")
        raise
    if method.after_step and config.checkpoint.average == "tail":
        what = f"can't be done with peft.name {config.peft.name}: ranks that are cut would come back"
        raise config.error("checkpoint.average", what, got="tail", fix="delete it")
    if (length := config.data.seq_len) > (most := model.config.max_position_embeddings):
        what, got = "takes positions from the text", f"data.seq_len: {length}, and {most} are left"
        raise config.error("peft.num_virtual_tokens", what, got=got, fix=f"data.seq_len: {most}")
    if config.optimizer.name == "muon" and not muon_matrices(model):
        what = f"has nothing to train beside peft.name {config.peft.name}: it updates whole matrices"
        raise config.error("optimizer.name", what, got="muon", fix="optimizer.name: adamw")


def check_machine(config: Config, device: torch.device) -> None:
    """Raise a MachineError if the run needs a package that is not installed, or a device that can do more."""
    if config.log.tensorboard and importlib.util.find_spec("tensorboard") is None:
        fix = "pip install 'llmkit[tensorboard]'"
        raise config.error("log.tensorboard", "needs the tensorboard package", kind=MachineError, fix=fix)
    precision = choose_precision(config.train.precision, device)
    if config.train.fp8 and (reason := fp8_obstacle(device, precision)):
        raise config.error("train.fp8", reason, kind=MachineError, fix="delete it")


def check_run_dir(config: Config) -> Iterator[UserError]:
    """Yield an error if run_dir names a folder that can't be a run's own."""
    fix, folder = "name a folder of its own, such as runs/NAME", Path(config.run_dir).resolve()
    if Path.cwd().is_relative_to(folder):
        yield config.error("run_dir", "is the working directory, or contains it", got=config.run_dir, fix=fix)
    elif isinstance(config.data, CorpusData):
        data = Path(config.data.dir).resolve()
        if folder != data and (folder.is_relative_to(data) or data.is_relative_to(folder)):
            got = f"{config.run_dir}, data.dir: {config.data.dir}"
            yield config.error("run_dir", "lies in data.dir, or data.dir in it", got=got, fix=fix)
        paths = {f"data.sources.{i}.path": one.path for i, one in enumerate(config.data.sources) if one.path}
        for key, path in {"data.dir": config.data.dir, **paths}.items():
            if Path(path).resolve() == folder:
                yield config.error("run_dir", f"is the same folder as {key}", got=config.run_dir, fix=fix)


def check_warmup(config: Config, options: Options, max_steps: int | None) -> Iterator[UserError]:
    """Yield an error if the warm-up leaves no step to train, or overlaps with the decay of WSD."""
    warmup, fraction = (options["schedule"].get(key, 0) for key in ("warmup_steps", "decay_fraction"))
    if not max_steps:
        return
    if warmup >= max_steps:
        expected = f"less than {max_steps} (the steps of this run)"
        yield config.error("schedule.warmup_steps", "leaves no step to train", got=warmup, expected=expected)
    elif fraction and warmup > (begin := round(max_steps * (1 - fraction))):
        what, got = "overlaps with the decay", f"{warmup}, but the decay begins at step {begin} of {max_steps}"
        fix = f"lower it to {begin}, or lower schedule.decay_fraction"
        yield config.error("schedule.warmup_steps", what, got=got, fix=fix)


def check_max_epochs(config: Config, epochs: dict[str, float], shares: dict, max_steps: int) -> Iterator[UserError]:
    """Yield an error for each source that the run would read for more epochs than its max_epochs."""
    sources = config.data.sources if isinstance(config.data, CorpusData) else []
    for i, source in enumerate(sources):
        if source.max_epochs and epochs[source.name] > source.max_epochs + 1e-9:
            most = source.max_epochs / epochs[source.name]
            share = shares.get(source.name, (1.0, 0))[0] * most
            lower = f"give it at most {share:.3g} of all weights, or " if shares else ""
            yield DataError(
                f"source {source.name} would be read for more epochs than its max_epochs",
                at=config.where(f"data.sources.{i}.max_epochs"),
                got=f"{epochs[source.name]:.2f} epochs",
                expected=f"at most {source.max_epochs:g}",
                fix=f"{lower}train at most {math.floor(max_steps * most)} steps",
            )


# ---- "auto" ---------------------------------------------------------------------------------------------------------


def reuse_resolved_values(config: Config, ranks: int, *, fresh: bool) -> Config:
    """Return the config with what the run that it resumes has resolved before its first checkpoint.

    These are the values that the config leaves to "auto" (the micro-batch, if it divides a rank's rows), and the
    checkpoint of the run that init_from names: a new run takes the best one.

    fresh  there is no run to resume
    """
    folder = Path(config.run_dir)
    if fresh or not list_checkpoints(folder) or not (folder / RUN_CONFIG).is_file():
        return name_checkpoint(config)
    before, update = read_run_config(folder), {}
    kept = {key: before["train"][key] for key in RESOLVED_ONCE if getattr(config.train, key) == "auto"}
    micro, rows = kept.get("micro_batch_size", "auto"), config.train.global_batch_size // ranks
    if micro != "auto" and config.data.kind != "prompts" and rows % micro:  # a prompt has several answers
        kept["micro_batch_size"] = "auto"
    update["train"] = config.train.model_copy(update=kept)
    if (
        isinstance(config.data, TurnData) and config.data.date is None
    ):  # a chat template shows the day of the first start
        update["data"] = config.data.model_copy(update={"date": before["data"].get("date")})
    if config.objective and config.objective.name == (before.get("objective") or {}).get("name"):
        update["objective"] = keep_models(config.objective, before["objective"])
    if config.init_from and before["init_from"] and is_inside(before["init_from"], config.init_from):
        return config.model_copy(update=update | {"init_from": before["init_from"]})
    return name_checkpoint(config.model_copy(update=update))


def keep_models(choice: Choice, before: dict[str, Any]) -> Choice:
    """Return an objective with the checkpoints of its teacher and its reward models that a resumed run has chosen."""
    options = dict(choice.options)
    teacher, rewards = options.get("teacher"), options.get("reward")
    if isinstance(teacher, str) and is_inside(before["teacher"], teacher):
        options["teacher"] = before["teacher"]
    given, known = (one if isinstance(one, list) else [one] for one in (rewards, before.get("reward")))
    if rewards is not None and len(given) == len(known):
        options["reward"] = [keep_path(one, old) for one, old in zip(given, known, strict=True)]
    return Choice(name=choice.name, **options)


def keep_path(reward: Any, before: Any) -> Any:
    """Return a reward with the checkpoint that was chosen before in the folder that it names, if it names one."""
    paths = [one.get("path") if isinstance(one, dict) else None for one in (reward, before)]
    return reward | {"path": paths[1]} if all(paths) and is_inside(paths[1], paths[0]) else reward


def is_inside(path: str, folder: str) -> bool:
    """Return whether a path lies in a folder, however the two are spelt."""
    return Path(path).resolve().is_relative_to(Path(folder).resolve())


def name_checkpoint(config: Config) -> Config:
    """Return the config with the best checkpoint of the run that init_from names."""
    run = Path(config.init_from or "")
    if not config.init_from or not is_run(run) or (best := best_checkpoint(run)) is None:
        return config
    return config.model_copy(update={"init_from": str(best)})


def count_steps(train: Train, row_len: int, samples: int | None, updates: int = 1) -> int | None:
    """Return the optimizer steps of a run; None if it is given in epochs and the samples are not known.

    updates  steps that take the same batch
    """
    if train.max_steps:
        return train.max_steps
    if train.max_tokens:
        return math.ceil(train.max_tokens / (train.global_batch_size * row_len))
    return math.ceil(train.epochs * samples / train.global_batch_size) * updates if samples else None
