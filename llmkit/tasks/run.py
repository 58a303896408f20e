"""Ask a model the questions of a task, and compute its scores."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from llmkit.errors import DataError, ModelError, UserError, raise_all
from llmkit.generation.answers import write_answers
from llmkit.generation.sampling import Sampling
from llmkit.intervals import RESAMPLES, bootstrap, fairness, mean_error, mean_interval
from llmkit.tasks.documents import Doc, read_split
from llmkit.tasks.encode import EMPTY, cut_left, encode_answers, encode_prompts, encode_sources, encode_windows
from llmkit.tasks.likelihood import Score, score_requests, score_sources
from llmkit.tasks.metrics import (
    METRICS,
    SLOW,
    SLOW_RESAMPLES,
    Answered,
    Item,
    aggregation_of,
    apply_filter,
    check_metrics,
    chosen,
    is_right,
    mean,
    percentage,
    target_and_choice,
)
from llmkit.tasks.prompts import SEED, Question, build_questions, fill, run_code
from llmkit.tasks.questions import checksums
from llmkit.tasks.task import Filter, Metric, Task, read_task
from llmkit.tokenizer.tokenizer import Tokenizer
from llmkit.user_code import load_named

Progress = Callable[[Iterable], Iterable]


@dataclass
class Prepared:
    """Hold a task with its questions, which are the same for all models."""

    task: Task
    questions: list[Question]
    about: dict[str, Any]  # what is needed to repeat it

    @property
    def name(self) -> str:
        return self.task.task

    def run(self, model: nn.Module, tokenizer: Tokenizer, progress: Progress = iter) -> "Result":
        """Ask a model, in the autocast context of the caller."""
        return run_task(self, model, tokenizer, progress=progress)


@dataclass
class Result:
    """Hold the scores of a model on a task."""

    name: str
    figures: dict[str, Any]  # name -> value, with name_stderr and name_interval; n; groups
    items: dict[str, list[Item]]  # of each metric, by question, in order
    asked: list[int]  # numbers of the questions
    lost: Counter[str]
    answered: list[Answered] = field(default_factory=list)


def prepare(
    path: Path,
    *,
    data: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    allow_code: bool = False,
    metrics: Sequence[str] = (),
) -> Prepared:
    """Read a task file and its records, and build the questions.

    data     file or folder of the records, in the place of the task's own
    shots    examples before each question; None: the task's
    limit    ask only this many of the first questions, of each group
    chat     make chats for the model's chat template
    metrics  the user's own, as my.py:function, in addition to the task's
    """
    task = read_task(path, allow_code=allow_code)
    if metrics and (task.output_type not in ("multiple_choice", "generate_until") or task.process_results):
        what = f"{task.task}: a metric of your own scores choices or written answers, without process_results"
        raise UserError(what, got=task.output_type, fix="leave out --metric")
    if metrics:
        task.metric_list = [*task.metrics, *(Metric(metric=load_named(one, "--metric")) for one in metrics)]
    raise_all(check_metrics(task))
    number = (task.num_fewshot or 0) if shots is None else shots
    if number and task.output_type == "loglikelihood_rolling":
        raise DataError(f"{task.task}: whole texts are scored without examples", fix="leave out --shots")
    docs = read_split(task, task.asked_split, path.parent, data)
    if chat and task.gen_prefix:
        raise UserError(
            f"{task.task}: --chat can't begin an answer with gen_prefix", at=path, fix="leave out one of them"
        )
    split = task.shots_split or task.training_split or task.validation_split or task.asked_split
    same, pool = split == task.asked_split, docs
    if number and not same and not task.fewshot_config.samples:
        pool = read_split(task, split, path.parent, data)
    asked = docs if limit is None else first_of_groups(task, docs, limit)
    questions = build_questions(task, asked, pool, number, same_split=same, chat=chat)
    prompts = json.dumps([[one.contexts, one.answers, str(one.target)] for one in questions])
    about = {
        "task": task.task,
        "version": task.metadata.get("version"),
        "shots": number,
        "seed": SEED,
        "chat": chat,
        "limit": limit,
        "questions": len(questions),
        "data_sha256": checksums(task, path.parent, data),
        "prompts_sha256": hashlib.sha256(prompts.encode()).hexdigest(),
    }
    return Prepared(task, questions, about)


def first_of_groups(task: Task, docs: list[Doc], limit: int) -> list[Doc]:
    """Return the first records of each group."""
    taken: Counter[Any] = Counter()
    kept = []
    for doc, group in zip(docs, fill(task, task.group_by, docs), strict=True):
        taken[group] += 1
        kept += [doc] if taken[group] <= limit else []
    return kept


def run_task(prepared: Prepared, model: nn.Module, tokenizer: Tokenizer, *, progress: Progress = iter) -> Result:
    """Ask a model, in the autocast context of the caller."""
    task, lost = prepared.task, Counter()
    kind = model.config.kind
    if kind == "masked" or (kind == "seq2seq" and task.output_type in ("loglikelihood_rolling", "pairs")):
        raise ModelError(f"{task.task}: {task.output_type} needs a decoder alone, not {model.config.model_type}")
    if kind == "seq2seq" and any(one.messages for one in prepared.questions):
        raise ModelError(f"{task.task}: --chat needs a decoder alone, not {model.config.model_type}")
    positions = model.config.max_position_embeddings
    if task.output_type == "generate_until":
        written = task.generation_kwargs.max_gen_toks
        if kind == "seq2seq":
            sources = [tokenizer.encode_source(one.contexts[0]) for one in prepared.questions]
            prompts = [cut_left(ids, positions, 0, lost) for ids in sources]
        else:
            prompts = encode_prompts(prepared.questions, tokenizer, positions, written, lost)
        texts = write_answers(
            model,
            tokenizer,
            prompts,
            until=task.until,
            max_new_tokens=written,
            sampling=sampling_of(task),
            progress=progress,
        )
        answered = [Answered(one, [], text) for one, text in zip(prepared.questions, texts, strict=True)]
    else:
        answered = score_answers(prepared, model, tokenizer, positions, lost, progress)
    if not answered:
        raise DataError(f"{task.task}: no question is left to ask", got="; ".join(lost) or None)
    figures, items = compute_figures(task, answered)
    return Result(task.task, figures, items, [one.question.number for one in answered], +lost, answered)


def sampling_of(task: Task) -> Sampling:
    """Return how tokens of written answers are chosen."""
    options = task.generation_kwargs
    if not options.do_sample or not options.temperature:
        return Sampling(temperature=0)
    return Sampling(options.temperature, options.top_k, options.top_p)


def score_answers(
    prepared: Prepared,
    model: nn.Module,
    tokenizer: Tokenizer,
    positions: int,
    lost: Counter[str],
    progress: Progress,
) -> list[Answered]:
    """Return the questions with the scores of their answers, without those that do not fit the model."""
    if prepared.task.output_type == "loglikelihood_rolling":
        found = [list(encode_windows(one.answers[0], tokenizer, positions)) for one in prepared.questions]
    else:
        encode = encode_answers if model.config.kind == "causal" else encode_sources
        found = encode(prepared.questions, tokenizer, positions, lost)
    kept = [i for i, one in enumerate(found) if one]
    lost[EMPTY] += sum(one == [] for one in found)  # whole texts without a token
    requests = [request for i in kept for request in found[i]]
    owners = [i for i in kept for _ in found[i]]
    if prepared.task.output_type == "loglikelihood_rolling":
        owners = range(len(requests))  # windows of a text are no answers to the same question
    if model.config.kind == "causal":
        scores = iter(score_requests(model, requests, owners, progress=progress))
    else:
        scores = iter(score_sources(model, requests, progress=progress))
    answered = []
    for i in kept:
        own = [next(scores) for _ in found[i]]
        if prepared.task.output_type == "loglikelihood_rolling":
            own = [Score(sum(one.log_prob for one in own), all(one.greedy for one in own))]
        answered.append(Answered(prepared.questions[i], own))
    return answered


def compute_figures(task: Task, answered: list[Answered]) -> tuple[dict[str, Any], dict[str, list[Item]]]:
    """Return the scores with their errors and intervals, and what each metric made of each question."""
    figures: dict[str, Any] = {}
    items: dict[str, list[Item]] = {}
    for one in task.filter_list or [Filter()]:
        filtered = answered
        if task.output_type == "generate_until":
            filtered = [Answered(a.question, [], apply_filter(one, a.text)) for a in answered]
        suffix = "" if one.name == "none" else f",{one.name}"
        for name, (found, aggregate) in score_all(task, filtered).items():
            items[name + suffix] = found
            figures |= summarize(name + suffix, found, aggregate)
    figures["n"] = len(answered)
    if task.group_by is not None:
        figures |= by_group(task, answered, items)
    return figures, items


def score_all(task: Task, answered: list[Answered]) -> dict[str, tuple[list[Item], Callable]]:
    """Return what each metric makes of each question, and how these are put together."""
    if task.process_results is not None:
        found = [run_code(task, task.process_results, one.question.doc, results_of(one)) for one in answered]
        named = {metric.name: metric for metric in task.metrics}
        return {name: ([one[name] for one in found], aggregation_of(named.get(name))) for name in found[0]}
    scored = {}
    for metric in task.metrics:
        if callable(metric.metric):
            scored[metric.name] = [run_metric(metric, one) for one in answered], aggregation_of(metric)
        else:
            score = METRICS[metric.name][0]
            scored[metric.name] = [score(one, metric) for one in answered], aggregation_of(metric)
    return scored


def results_of(one: Answered) -> list[Any]:
    """Return what the harness gives to a task's own code."""
    if one.text is not None:
        return [one.text]
    if not one.question.contexts[0] and len(one.scores) == 1 and one.question.target == one.question.answers[0]:
        return [one.scores[0].log_prob]  # of a whole text
    return [(score.log_prob, score.greedy) for score in one.scores]


def run_metric(metric: Metric, one: Answered) -> Item:
    """Call a user's metric with the answer and the right one, as `metric(predictions=[...], references=[...])`."""
    question, answer = one.question, one.text
    right = question.target
    if answer is None:
        answer = question.choices[chosen(one)]
        right = [question.choices[i] for i in right] if isinstance(right, list) else question.choices[right]
    try:
        found = metric.metric(predictions=[answer], references=[right])
    except Exception as error:
        what = f"the metric {metric.name} fails: {type(error).__name__}: {error}"
        raise DataError(what, got=str(one.question.doc)[:200]) from error
    found = found.get(metric.name) if isinstance(found, dict) else found
    if not isinstance(found, Number | np.generic):
        raise DataError(f"the metric {metric.name} returns no number", got=repr(found)[:100])
    return float(found)


def summarize(name: str, items: list[Item], aggregate: Callable) -> dict[str, Any]:
    """Return a score with its standard error and 95 % interval."""
    if aggregate in (mean, percentage):
        scale = aggregate([1.0])
        error, interval = scale * mean_error(items), [scale * edge for edge in mean_interval(items)]
    else:
        error, interval = bootstrap(items, aggregate, SLOW_RESAMPLES if aggregate in SLOW else RESAMPLES)
    return {name: aggregate(items), f"{name}_stderr": error, f"{name}_interval": list(interval)}


def by_group(task: Task, answered: list[Answered], items: dict[str, list[Item]]) -> dict[str, Any]:
    """Return the scores of each group, and for choices how fair they are."""
    groups = [one.question.group for one in answered]
    members = defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(i)
    aggregates = {name: aggregate for name, (_, aggregate) in score_all(task, answered[:1]).items()}
    found = {
        group: {
            **{
                name: aggregates[name.partition(",")[0]]([values[i] for i in numbers]) for name, values in items.items()
            },
            "n": len(numbers),
        }
        for group, numbers in sorted(members.items())
    }
    if not task.fairness:
        return {"groups": found}
    choices, targets = [chosen(one) for one in answered], [target_and_choice(one)[0] for one in answered]
    right = [is_right(one, choice) for one, choice in zip(answered, choices, strict=True)]
    return {"groups": found, "fairness": fairness(groups, right, choices, targets)}
