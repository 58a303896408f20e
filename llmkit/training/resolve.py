"""The "choose one" sections of a config against the code: options, the model's shape, the objective that fits."""

from __future__ import annotations

from typing import Any

from llmkit.config.load import check_options
from llmkit.config.schema import Choice, Config
from llmkit.errors import UserError, raise_all
from llmkit.models import CONFIGS, shape_problems
from llmkit.models.folder import read_config
from llmkit.objectives import FITTING, OBJECTIVES
from llmkit.peft import METHODS
from llmkit.storage.locate import locate
from llmkit.training.optim import OPTIMIZERS
from llmkit.training.schedules import SCHEDULES


def check_choices(config: Config) -> dict[str, dict[str, Any]]:
    """Every "choose one" section's options with defaults filled in; all errors at once."""
    tables = {"model": CONFIGS, "peft": METHODS, "optimizer": OPTIMIZERS, "schedule": SCHEDULES}
    options, errors = {}, []
    for section, table in tables.items():
        choice = getattr(config, section)
        if choice is not None:
            options[section], wrong = check_options(table, section, choice, config)
            errors += wrong
    if config.objective and config.objective.name not in OBJECTIVES:
        errors += check_options(OBJECTIVES, "objective", config.objective, config)[1]
    raise_all(errors)
    return options


def read_model_config(config: Config, options: dict[str, dict[str, Any]]) -> Any:
    """The architecture: from the model section, or from the folder that init_from names."""
    if config.init_from is None:
        return CONFIGS[config.model.name](**options["model"])
    return read_config(locate(config.init_from).base)


def choose_objective(config: Config, model_config: Any) -> tuple[Choice, dict[str, Any]]:
    """The objective and its options: the one that fits the model and the data, which none other does."""
    kind, data = model_config.kind, config.data.kind
    fitting = FITTING.get((kind, data))
    if fitting is None:
        raise UserError(
            f"{model_config.model_type} can't be trained on prompts and answers: it writes no text",
            at=config.where("data.kind"),
            got=data,
        )
    choice = config.objective or Choice(name=fitting)
    if choice.name != fitting:
        raise UserError(
            f"{model_config.model_type} has another objective on this data",
            at=config.where("objective.name"),
            got=choice.name,
            expected=fitting,
            fix="leave the objective out",
        )
    if kind == "masked" and config.eval.sample_prompt is not None:
        raise UserError(
            f"{model_config.model_type} writes no text", at=config.where("eval.sample_prompt"), fix="delete it"
        )
    if kind == "seq2seq" and data == "sft" and config.data.packing:
        raise UserError(
            f"{model_config.model_type} has each prompt in a row of its own", at=config.where("data.packing")
        )
    if kind == "seq2seq" and data == "corpus" and config.data.document_mask:
        raise UserError("spans are cut out of whole rows: no document mask", at=config.where("data.document_mask"))
    options, errors = check_options(OBJECTIVES, "objective", choice, config)
    raise_all(errors)
    return choice, options


def choose_packing(config: Config, model_config: Any) -> Config:
    """The config with data.packing decided: examples share rows, but for an encoder and a decoder."""
    if config.data.kind != "sft" or config.data.packing is not None:
        return config
    return config.model_copy(
        update={"data": config.data.model_copy(update={"packing": model_config.kind != "seq2seq"})}
    )


def model_problems(config: Config, model_config: Any) -> list[UserError]:
    """Shapes that do not fit each other or the data."""
    section = "model" if config.model else "init_from"
    errors = [
        UserError(f"model.{key} {reason}", at=config.where(f"{section}.{key}"))
        for key, reason in shape_problems(model_config)
    ]
    longest = model_config.max_position_embeddings
    if config.data.seq_len > longest:
        errors.append(
            UserError(
                "data.seq_len is over the model's longest position",
                at=config.where("data.seq_len"),
                got=config.data.seq_len,
                expected=f"at most {longest} (max_position_embeddings)",
            )
        )
    return errors


def describe_choice(name: str, options: dict[str, Any]) -> str:
    """A choice and its options on one line."""
    return ", ".join([name, *(f"{key} {value}" for key, value in options.items() if value is not None)])
