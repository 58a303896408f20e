"""Reward the answers that a model writes: by the user's own functions, by ready ones, or by a reward model."""

import inspect
import math
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from llmkit.config.fields import NonBlank, Section
from llmkit.data.labelled import pad_batch
from llmkit.errors import UserError
from llmkit.objectives.frozen import frozen_model
from llmkit.parallel.device import to_device
from llmkit.user_code import load_named

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
SHOWN = 200  # characters of an answer in an error


class RewardConfig(Section):
    """Name a reward."""

    name: NonBlank
    """exact, number, regex, format, length or model; or a function of your own, as my_rewards.py:function."""
    field: str = "answer"
    """Name the field of the record with the right answer, for exact, number and regex."""
    pattern: str | None = None
    """Give the expression whose first group must be the right answer (regex), or that matches the answer (format)."""
    most: Annotated[int, Field(ge=1)] = 200
    """Give the whole reward of length up to so many characters; it falls to 0 at twice as many."""
    path: str | None = None
    """Name the reward model (model): a run with objective reward, or a folder with a head that gives a number."""
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Multiply this reward in the sum."""


@dataclass(frozen=True)
class Written:
    """Hold the answers of a batch: for each its prompt, its text, the record of its prompt, and the tokens of both.

    device, rows  where a reward model may read them, and how many at a time
    """

    prompts: list[str]
    answers: list[str]
    records: list[dict[str, Any]]
    tokens: list[list[int]]
    device: torch.device
    rows: int


Reward = Callable[[Written], list[float]]


# ---- ready ones: of an answer and its record ------------------------------------------------------------------------


def right_answer(record: dict[str, Any], field: str) -> str:
    """Return the right answer of a record. Of GSM8K's solutions it is what follows ####."""
    if field not in record:
        raise UserError(f"the record has no field {field}", got=", ".join(map(str, record)), fix="name another `field`")
    return str(record[field]).rpartition("####")[2].strip()


def exact(answer: str, record: dict[str, Any], one: RewardConfig) -> float:
    """Return 1 if the answer is the right one, but for spaces around it."""
    return float(answer.strip() == right_answer(record, one.field))


def number(answer: str, record: dict[str, Any], one: RewardConfig) -> float:
    """Return 1 if the last number in the answer is the right one."""
    found, right = (NUMBER.findall(text) for text in (answer, right_answer(record, one.field)))
    return float(bool(found and right) and float(found[-1].replace(",", "")) == float(right[-1].replace(",", "")))


def regex(answer: str, record: dict[str, Any], one: RewardConfig) -> float:
    """Return 1 if what the pattern's first group finds is the right answer."""
    found = re.search(one.pattern, answer)
    said = (found.group(1) if found and found.re.groups else found.group(0)) if found else None
    return float(said is not None and said.strip() == right_answer(record, one.field))


def has_format(answer: str, record: dict[str, Any], one: RewardConfig) -> float:
    """Return 1 if the pattern matches the whole answer."""
    return float(re.fullmatch(one.pattern, answer) is not None)


def length(answer: str, record: dict[str, Any], one: RewardConfig) -> float:
    """Return 1 for an answer of at most `most` characters, less for a longer one, and 0 from twice as many on.

    >>> length("a" * 15, {}, RewardConfig(name="length", most=10))
    0.5
    """
    return max(0.0, min(1.0, 2 - len(answer) / one.most))


READY = {"exact": exact, "number": number, "regex": regex, "format": has_format, "length": length}
TAKEN = {  # options besides the weight
    "exact": ("field",),
    "number": ("field",),
    "regex": ("field", "pattern"),
    "format": ("pattern",),
    "length": ("most",),
}


# ---- all of a run ---------------------------------------------------------------------------------------------------


def load_rewards(configs: Sequence[RewardConfig]) -> dict[str, tuple[float, Reward]]:
    """Return name -> (weight, reward). Raise UserError for a function that is not there, or a pattern that is none."""
    found: dict[str, tuple[float, Reward]] = {}
    for one in configs:
        check_options(one)
        try:
            re.compile(one.pattern or "")
        except re.error as error:
            what = f"the pattern of reward {one.name} is no regular expression: {error}"
            raise UserError(what, at="objective.reward", got=one.pattern) from None
        name = one.name.rpartition(":")[2]
        name = name if name not in found else f"{name}-{len(found)}"
        if one.name in READY:
            found[name] = (one.weight, with_ready(one))
        elif one.name == "model":
            found[name] = (one.weight, with_model(Path(one.path)))
        elif ":" in one.name:
            found[name] = (one.weight, with_function(load_named(one.name, "objective.reward"), one.name))
        else:
            expected = f"{', '.join(READY)}, model, or my_rewards.py:function"
            raise UserError("there is no such reward", at="objective.reward", got=one.name, expected=expected)
    return found


def check_options(one: RewardConfig) -> None:
    """Raise UserError for an option that a reward does not have, or lacks."""
    taken = ("path",) if one.name == "model" else TAKEN.get(one.name, ())
    fields = {key: field.default for key, field in RewardConfig.model_fields.items() if key not in ("name", "weight")}
    given = [key for key, default in fields.items() if key not in taken and getattr(one, key) != default]
    if given:
        expected = ", ".join(("weight", *taken))
        raise UserError(f"reward {one.name} has no {given[0]}", at="objective.reward", expected=expected)
    if "pattern" in taken and one.pattern is None:
        raise UserError(f"reward {one.name} needs a pattern", at="objective.reward", fix=r"pattern: '<a>(.*?)</a>'")
    if "path" in taken and one.path is None:
        raise UserError("reward model needs a path", at="objective.reward", fix="path: runs/reward")


def with_ready(one: RewardConfig) -> Reward:
    """Return a ready reward for lists of answers."""

    def reward(written: Written) -> list[float]:
        pairs = zip(written.answers, written.records, strict=True)
        return [READY[one.name](answer, record, one) for answer, record in pairs]

    return reward


def with_model(folder: Path) -> Reward:
    """Return a reward model of a folder as a reward. Of tokens that are too many for it, it reads the last ones."""
    load = frozen_model(folder)

    @torch.no_grad()
    def reward(written: Written) -> list[float]:
        model, found = load(written.device), []
        most = model.config.max_position_embeddings
        for first in range(0, len(written.tokens), written.rows):
            rows = [np.array(tokens[-most:]) for tokens in written.tokens[first : first + written.rows]]
            batch = to_device(pad_batch(rows, np.zeros(len(rows)), 0, types=False, most=most), written.device)
            found += model(batch["input_ids"], lengths=batch["lengths"]).float().flatten().tolist()
        return check_rewards(found, written.answers, "model")

    return reward


def with_function(function: Callable, name: str) -> Reward:
    """Return a function of the user's as a reward: called with `prompts`, `completions`, and a list for each field of
    the records, as trl calls it; only with those that it takes, if it does not take all.
    """
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters)
    taken = {one.name for one in parameters}

    def reward(written: Written) -> list[float]:
        records, answers = written.records, written.answers
        fields = dict.fromkeys(key for record in records for key in record)
        given: dict[str, Any] = {key: [record.get(key) for record in records] for key in fields}
        given |= {"prompts": written.prompts, "completions": answers}
        given = given if takes_all else {key: value for key, value in given.items() if key in taken}
        try:
            found = function(**given)
        except Exception as error:
            line = traceback.extract_tb(error.__traceback__)[-1]
            what, at = f"the reward {name} fails: {type(error).__name__}: {error}", f"{line.filename}:{line.lineno}"
            raise UserError(what, at=at, got=f"{len(answers)} answers, first: {answers[0][:SHOWN]!r}") from error
        return check_rewards(found, answers, name)

    return reward


def check_rewards(found: Any, answers: list[str], name: str) -> list[float]:
    """Return rewards as floats. Raise UserError unless there is a finite number for each answer."""
    try:
        values = [float(value) for value in found]
    except (TypeError, ValueError):
        raise UserError(f"the reward {name} returns no list of numbers", got=repr(found)[:SHOWN]) from None
    if len(values) != len(answers):
        what, got = f"the reward {name} returns another number of rewards", f"{len(values)}, of {len(answers)} answers"
        raise UserError(what, got=got)
    if wrong := [i for i, value in enumerate(values) if not math.isfinite(value)]:
        what, got = f"the reward {name} is not finite", f"{values[wrong[0]]} for {answers[wrong[0]][:SHOWN]!r}"
        raise UserError(what, got=got)
    return values
