"""Choose the objective of a run, and find the models that it asks beside the one that is trained."""

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

from llmkit.config.fields import Choice
from llmkit.config.schema import Config
from llmkit.errors import UserError, raise_all
from llmkit.models import build_model
from llmkit.models.heads import POOLINGS
from llmkit.models.hf_config import read_config, read_head
from llmkit.objectives import fitting_objectives
from llmkit.objectives.grpo import as_configs, choose_answers_per_row, row_lengths
from llmkit.objectives.rewards import RewardConfig
from llmkit.parallel.device import DTYPES
from llmkit.storage.locate import locate
from llmkit.tokenizer.load import load_tokenizer
from llmkit.tokenizer.tokenizer import Tokenizer
from llmkit.training.resolve import Options, check_objective


def choose_objective(config: Config, model_config: Any) -> tuple[Choice, dict[str, Any]]:
    """Return the objective and its options: the chosen one, else the default for this kind of model and data."""
    name, kind, data = model_config.model_type, model_config.kind, config.data.kind
    fitting = fitting_objectives(kind, data)
    if not fitting:
        why = "labels: it has no head for them" if data == "labelled" else "prompts and answers: it writes no text"
        why = "preferences: only decoders are" if data == "preference" else why
        fix = "for texts with labels: data.kind: labelled, or --objective classify" if data == "sft" else None
        raise UserError(f"{name} can't be trained on {why}", at=config.where("data.kind"), got=data, fix=fix)
    choice = config.objective or Choice(name=fitting[0])
    if choice.name not in fitting:
        expected, fix = " or ".join(fitting), "leave the objective out"
        what = f"does not fit {name} on this data"
        raise config.error("objective.name", what, got=choice.name, expected=expected, fix=fix)
    options, errors = check_objective(config, choice)
    raise_all(errors)
    if "teacher" in options:
        options["teacher"] = find_teacher(config, options["teacher"], model_config)
        if options["on_policy"] and config.train.compile is True:
            raise config.error("train.compile", "can't be done: answers differ in length", fix="delete it")
        if options["on_policy"] and data == "corpus":
            what, fix = "needs prompts, and a corpus has none", "delete it, or fine-tune on prompts and answers"
            raise config.error("objective.on_policy", what, got=options["on_policy"], fix=fix)
    if "reward" in options:
        rewards = as_configs(options["reward"])
        paths = [find_judge(config, one.path, model_config) if is_model(one) else one.path for one in rewards]
        rewards = [one.model_copy(update={"path": path}) for one, path in zip(rewards, paths, strict=True)]
        options["reward"] = [one.model_dump(exclude_defaults=True) for one in rewards]
    if "answers_per_row" in options:
        options["answers_per_row"] = share_rows(config, options, model_config)
    if "pooling" in options:
        options["pooling"] = options["pooling"] or POOLINGS[kind][0]
        if options["pooling"] not in POOLINGS[kind]:
            what, expected = f"does not fit {name}", " or ".join(POOLINGS[kind])
            raise config.error("objective.pooling", what, got=options["pooling"], expected=expected)
    return choice, options


def share_rows(config: Config, options: dict[str, Any], model_config: Any) -> int:
    """Return how many answers to a prompt share a row of training. Raise a UserError if they can't."""
    sizes, asked = {key: options[key] for key in ("group_size", "max_new_tokens")}, options["answers_per_row"]
    chosen = asked or choose_answers_per_row(config.data.seq_len, **sizes)
    if chosen > options["group_size"]:
        raise config.error("objective.answers_per_row", "is over objective.group_size", got=chosen, fix="delete it")
    longest = min((one for one in model_config.windows if one), default=math.inf)  # a row that no window cuts
    lengths = {n: row_lengths(config.data.seq_len, **options | {"answers_per_row": n})[0] for n in range(1, chosen + 1)}
    most = max(n for n, length in lengths.items() if n == 1 or length <= longest)
    if asked and most < asked:
        what = "can't be done: a window would hide the prompt from an answer behind another one"
        raise config.error("objective.answers_per_row", what, got=asked, expected=f"at most {most}", fix="delete it")
    return asked or math.ceil(options["group_size"] / math.ceil(options["group_size"] / most))


# ---- the models beside the one that is trained ----------------------------------------------------------------------


def find_whole(config: Config, key: str, name: str, model_config: Any) -> tuple[Path, Any]:
    """Return the folder and the Config of a model that reads the tokens of the one that is trained."""
    located = locate(name)
    if located.is_adapter:
        fix = f"llmkit export {name} merged --format hf, and name that"
        raise config.error(key, "is an adapter, but a whole model is read", got=name, fix=fix)
    theirs = read_config(located.folder)
    if (model_config.vocab_size or theirs.vocab_size) != theirs.vocab_size:
        got = f"{theirs.model_type}, {theirs.vocab_size} tokens, and {model_config.vocab_size} of the model"
        what = "has other tokens than the model that is trained"
        raise config.error(key, what, got=got, fix="name one with the same")
    return located.folder.resolve(), theirs


def find_teacher(config: Config, name: str, model_config: Any) -> str:
    """Return the folder of the model to learn from. Raise a UserError if it does not fit the student."""
    folder, theirs = find_whole(config, "objective.teacher", name, model_config)
    if theirs.kind != "causal" or read_head(folder):
        got = f"{theirs.model_type}, with a head for labels" if theirs.kind == "causal" else theirs.model_type
        raise config.error("objective.teacher", "does not continue texts", got=got, fix="name a decoder")
    return str(folder)


def find_judge(config: Config, name: str, model_config: Any) -> str:
    """Return the folder of a reward model. Raise a UserError if it does not fit the model that is trained."""
    folder, _ = find_whole(config, "objective.reward", name, model_config)
    head = read_head(folder)
    if head is None or head.kind != "regress":
        fix = "train one on pairs of answers: objective: {name: reward}"
        got = "a head for labels" if head else "none"
        raise config.error("objective.reward", "has no head that gives a number", got=f"{name}: {got}", fix=fix)
    return str(folder)


def is_model(reward: RewardConfig) -> bool:
    """Return whether a reward is a reward model."""
    return reward.name == "model" and reward.path is not None


def folders_beside(options: dict[str, Any]) -> list[tuple[str, Path]]:
    """Return (key, folder) of the other models that an objective loads."""
    teachers = [options["teacher"]] if "teacher" in options else []
    judges = [one.path for one in as_configs(options.get("reward", [])) if is_model(one)]
    return [("objective.teacher", Path(one)) for one in teachers] + [("objective.reward", Path(one)) for one in judges]


def check_same_tokens(config: Config, options: dict[str, Any], ours: Tokenizer) -> None:
    """Raise a UserError unless the other models have the tokens of the data."""
    for key, folder in folders_beside(options):
        theirs = load_tokenizer(folder)
        if theirs.rust.get_vocab(with_added_tokens=True) != ours.rust.get_vocab(with_added_tokens=True):
            raise config.error(key, "has another tokenizer than the data", fix="name one with the same")


def keeps_copy(config: Config, options: Options, *, continues: bool) -> bool:
    """Return whether a run keeps a frozen copy of the model that it starts from, to compare with.

    A new adapter is switched off instead, and DPO's comparison is computed before the first step.

    continues  whether an adapter is trained further
    """
    compares = config.objective.name == "kto" or (config.objective.name == "grpo" and options["objective"]["beta"] > 0)
    return compares and (config.peft is None or continues)


def memory_beside(config: Config, options: Options, precision: str, memory: dict[str, int]) -> dict[str, int]:
    """Return the bytes of the models that a run has in memory beside the one that is trained.

    memory  of that model, by part
    """
    number = sum(count_weights(folder) for _, folder in folders_beside(options["objective"]))
    can_continue = config.peft and config.init_from and not config.stack
    continues = bool(can_continue) and locate(config.init_from, check=False).is_adapter
    copied = memory.get("trained weights", 0) if keeps_copy(config, options, continues=continues) else 0
    total = number * DTYPES[precision].itemsize + copied
    return {"other models": total} if total else {}


@lru_cache
def count_weights(folder: Path) -> int:
    """Return the number of weights of a model's folder."""
    model = build_model(read_config(folder), device="meta", seed=None)
    return sum(parameter.numel() for parameter in model.parameters())
