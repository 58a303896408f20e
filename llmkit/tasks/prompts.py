"""Make prompts of records: the question, the examples before it, and the answers that are scored.

Everything here is as lm-evaluation-harness 0.4 has it, so that scores can be compared. One thing is not: a question is
never among its own examples, also where a task names no split for them.
"""

import ast
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from llmkit.errors import DataError
from llmkit.tasks.documents import Doc
from llmkit.tasks.task import Task
from llmkit.tokenizer.renderer import TemplateLimit, render_texts

SEED = 1234  # of the harness, for examples
Message = dict[str, str]


@dataclass
class Question:
    """Hold a record, and what a model is asked about it.

    number    of the record in its split, from 0
    contexts  one text for all answers, or one for each
    answers   the texts that are scored after them; none if the answer is written
    target    the number of the right answer, or several; else the right text, or several
    choices   the choices as they are, without a delimiter
    """

    doc: Doc
    number: int
    contexts: list[str]
    answers: list[str]
    target: Any
    choices: list[str] = field(default_factory=list)
    group: str | None = None
    messages: list[list[Message]] | None = None  # the contexts as chats


@dataclass
class Parts:
    """Hold what the templates of a task make of a record."""

    text: Any
    target: Any
    choices: list[str] | None
    prefix: str
    description: str
    group: str | None


def fill(task: Task, template: Any, docs: list[Doc], *, numbers: bool = False, lists: bool = False) -> list[Any]:
    """Return what a field, a template or a function makes of each record. Raise DataError for the first it fails on.

    numbers, lists  whether digits that a template renders are a number, and brackets a list; a field is what it is
    """
    if callable(template):
        return [run_code(task, template, doc) for doc in docs]
    if not isinstance(template, str):
        return [template] * len(docs)
    if template in docs[0]:
        return [doc[template] for doc in docs]
    try:
        found = render_texts(template, docs) if "{" in template else [template] * len(docs)
    except TemplateLimit as error:
        raise DataError(f"{task.task}: {error}", fix=f"the template is {template[:120]!r}") from None
    for doc, text in zip(docs, found, strict=True):
        if isinstance(text, ValueError):
            raise DataError(f"{task.task}: {text}", got=str(doc)[:200], fix=f"the template is {template[:120]!r}")
    return [read_rendered(text, numbers, lists) for text in found]


def run_code(task: Task, function: Callable, *arguments: Any) -> Any:
    """Call a function of a task's own code."""
    try:
        return function(*arguments)
    except Exception as error:
        what = f"{task.task}: {function.__name__} fails: {type(error).__name__}: {error}"
        raise DataError(what, got=str(arguments[0])[:200]) from error


def read_parts(task: Task, docs: list[Doc]) -> list[Parts]:
    """Apply the templates of a task to records."""
    if not docs:
        return []
    has_choices, default = task.doc_to_choice is not None, 0 if task.output_type == "pairs" else None
    texts = fill(task, "" if task.doc_to_text is None else task.doc_to_text, docs, numbers=has_choices)
    target = default if task.doc_to_target is None else task.doc_to_target
    targets = fill(task, target, docs, numbers=has_choices, lists=True)
    for doc, text in zip(docs, texts, strict=True):
        if text is None:
            raise DataError(f"{task.task}: a record has no question", got=str(doc)[:200])
    choices = [None] * len(docs)
    if has_choices:
        wanted = list(task.doc_to_choice.values()) if isinstance(task.doc_to_choice, dict) else task.doc_to_choice
        choices = [read_list(task, one, doc) for one, doc in zip(fill(task, wanted, docs), docs, strict=True)]
    rest = (
        [one or "" for one in fill(task, task.gen_prefix or "", docs)],
        fill(task, task.description, docs),
        fill(task, task.group_by, docs),
    )
    columns = zip(texts, targets, choices, *rest, strict=True)
    return [Parts(*one[:-1], None if task.group_by is None else str(one[-1])) for one in columns]


def read_list(task: Task, value: Any, doc: Doc) -> list[str]:
    """Return choices, which a template renders as a Python list."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            raise DataError(f"{task.task}: the choices are not a list", got=value[:200]) from None
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(one, str) for one in value):
        raise DataError(f"{task.task}: a record has no list of choices", got=f"{str(value)[:80]} in {str(doc)[:120]}")
    return value


def read_rendered(text: str, numbers: bool, lists: bool) -> Any:
    """Return the number of a choice, or the list of answers, that a template renders; else its text."""
    if numbers and text.isdigit():
        return int(text)
    if lists and text[:1] == "[" and text[-1:] == "]":
        with suppress(SyntaxError, ValueError):
            return ast.literal_eval(text)
    return text


# ---- examples -------------------------------------------------------------------------------------------------------


def choose_shots(
    task: Task,
    number: int,
    docs: list[Doc],
    pool: list[Doc],
    groups: list[str | None],
    pool_groups: list[str | None],
    same_split: bool,
) -> list[list[int]]:
    """Return, for each record, the positions in `pool` of its examples: of its own group, and never itself."""
    if not number:
        return [[] for _ in docs]
    members, draws, shots = defaultdict(list), {}, []
    for i, group in enumerate(pool_groups):
        members[group].append(i)
    for doc, group in zip(docs, groups, strict=True):
        here = members[group]
        if task.fewshot_config.sampler == "first_n":
            drawn = [i for i in here if not (same_split and pool[i] == doc)][:number]
        else:
            draw = draws.setdefault(group, Random(SEED))
            drawn = draw.sample(here, min(len(here), number + same_split))
            if same_split:
                drawn = [i for i in drawn if pool[i] != doc][:number]
                others = [i for i in here if pool[i] != doc] if len(drawn) < number else []
                if len(others) >= number:  # several records were equal to it
                    drawn = draw.sample(others, number)
        if len(drawn) < number:
            got = f"{len(drawn)} of {number}" + (f" for {group}" if group else "")
            raise DataError(f"{task.task}: there are too few examples", got=got, fix="lower --shots")
        shots.append(drawn)
    return shots


def join(before: str, after: str, delimiter: str) -> str:
    """Join two texts, with the delimiter between them unless one of them is empty or has white space there."""
    if not before or not after or before[-1].isspace() or after[0].isspace():
        return before + after
    return before + delimiter + after


def answer_text(task: Task, parts: Parts) -> str:
    """Return the right answer of an example."""
    target = parts.target[0] if isinstance(parts.target, list) and parts.target else parts.target
    if parts.choices and isinstance(target, int) and not isinstance(parts.text, int):
        if not 0 <= target < len(parts.choices):
            raise DataError(f"{task.task}: an example has no choice {target}", got=str(parts.choices)[:200])
        return parts.choices[target]
    if target is None or target == []:
        raise DataError(f"{task.task}: an example has no answer", got=str(parts.text)[:200])
    return str(target)


def turns_of(task: Task, parts: Parts, *, answered: bool) -> list[Message]:
    """Return the turns of a record: a question, and its answer in an example. In plain text `after` follows a turn."""
    text = parts.choices[parts.text] if isinstance(parts.text, int) and parts.choices else str(parts.text)
    if not answered:
        follows = task.target_delimiter if parts.prefix and join(text, parts.prefix, "|") != text + parts.prefix else ""
        turns = [{"role": "user", "content": text, "after": follows}]
        return turns + ([{"role": "assistant", "content": parts.prefix, "after": ""}] if parts.prefix else [])
    answer = join(parts.prefix, answer_text(task, parts), " ")
    return [
        {"role": "user", "content": text, "after": task.target_delimiter if answer else ""},
        {"role": "assistant", "content": answer, "after": task.fewshot_delimiter},
    ]


def build_questions(
    task: Task, docs: list[Doc], pool: list[Doc], number: int, *, same_split: bool = False, chat: bool = False
) -> list[Question]:
    """Return the question of each record.

    pool        records that examples are taken from
    number      of examples before each question
    same_split  whether the pool holds the records that are asked, too
    chat        make chats: questions are the user's turns, and answers the assistant's
    """
    all_parts = read_parts(task, docs)
    samples = task.fewshot_config.samples or pool
    shot_parts = read_parts(task, samples) if number else []
    groups, shot_groups = [one.group for one in all_parts], [one.group for one in shot_parts]
    shots = choose_shots(task, number, docs, samples, groups, shot_groups, same_split)
    questions = []
    for number, (doc, parts, chosen) in enumerate(zip(docs, all_parts, shots, strict=True)):
        turns = [{"role": "system", "content": parts.description, "after": ""}] if parts.description else []
        turns += [turn for i in chosen for turn in turns_of(task, shot_parts[i], answered=True)]
        questions.append(build_question(task, doc, number, parts, turns, chat))
    return questions


def build_question(task: Task, doc: Doc, number: int, parts: Parts, before: list[Message], chat: bool) -> Question:
    """Return the question of one record, after the turns of its examples."""
    target, choices = parts.target, parts.choices or []
    if task.output_type == "loglikelihood_rolling":
        return Question(doc, number, [""], [str(target)], target, group=parts.group)
    varies = isinstance(parts.text, int) and bool(choices)  # each choice is a context, and the target follows
    endings = [replace(parts, text=i) for i in range(len(choices))] if varies else [parts]
    chats = [[*before, *turns_of(task, one, answered=False)] for one in endings]
    contexts = ["".join(turn["content"] + turn["after"] for turn in turns) for turns in chats]
    delimiter = "" if chat and not parts.prefix else task.target_delimiter
    if task.output_type == "generate_until":
        answers, target = [], choices[target] if choices and isinstance(target, int) else target
    elif task.output_type == "loglikelihood":
        answers = [str(target)]
    elif varies:
        answers, target = [delimiter + str(target)] * len(choices), parts.text
    else:
        answers = [delimiter + choice for choice in choices]
    if task.output_type in ("multiple_choice", "pairs"):
        target = number_of_choice(task, doc, target, choices)
    messages = [[{"role": t["role"], "content": t["content"]} for t in turns] for turns in chats] if chat else None
    return Question(doc, number, contexts, answers, target, choices, parts.group, messages)


def number_of_choice(task: Task, doc: Doc, target: Any, choices: list[str]) -> int | list[int]:
    """Return the number of the right choice, or the numbers. Raise DataError if there is no such choice."""
    if isinstance(target, list):
        return [number_of_choice(task, doc, one, choices) for one in target]
    if isinstance(target, str) and target in choices:
        return choices.index(target)
    if isinstance(target, str) and target.strip().isdecimal():  # of a CSV file, where all is text
        target = int(target)
    if isinstance(target, float) and target.is_integer():
        target = int(target)
    if not isinstance(target, int) or not 0 <= target < len(choices):
        got = f"{target!r} for the choices {str(choices)[:120]} in {str(doc)[:120]}"
        raise DataError(f"{task.task}: the label of a record is none of its choices", got=got)
    return int(target)  # BoolQ's files have true and false
