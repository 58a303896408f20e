"""Read fine-tuning records of any usual layout.

A layout is known by its fields. Each record has its own, so that a file may mix them. Fields that have a meaning are
read, or the record is refused with their name; all others are counted.
"""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from llmkit.errors import DataError, did_you_mean
from llmkit.tokenizer.chat_template import Conversation
from llmkit.tokenizer.messages import (
    CALL_ROLES,
    CALLS,
    KNOWN_ROLES,
    LEARNT,
    MEDIA,
    from_json,
    is_learnt,
    one_of,
    split_turns,
    to_messages,
    to_text,
    to_tools,
    to_variables,
    usual_role,
)

TURNS = ("messages", "conversations", "conversation")  # lists of turns
QUESTIONS = ("instruction", "prompt", "question", "query", "input")
ANSWERS = ("output", "completion", "response", "answer")
OTHER_NAMES = {  # of data sets; taken for ours where a record has none of ours
    "question": ("problem", "inputs"),
    "answer": ("solution", "targets", "target"),
}
THOUGHTS = ("reasoning_content", "thinking")  # beside a question and an answer
CONTEXTS = ("input", "context")  # text that belongs to an instruction or a question
SYSTEM = ("system", "system_prompt", "system_message")
TOOLS = ("tools", "functions")
PREFERENCES = {  # field -> the objective that reads it
    **dict.fromkeys(("chosen", "rejected", "response_j", "response_k"), "dpo"),
    **dict.fromkeys(("label", "kto_tag"), "kto"),  # see `is_verdict`
}
VARIABLES = ("documents", "chat_template_kwargs")  # what templates get beside messages and tools
TURNS_IN_JSON = re.compile(r"\s*\[\s*\{")
FIELDS = (*TURNS, *QUESTIONS, *ANSWERS, "context", *SYSTEM, *TOOLS, "history", "instances", *VARIABLES)

Pair = tuple[str, str]  # a prompt and its completion, which no chat template touches
CONTINUED = "prompt/completion"  # the layout of pairs, if both are texts


def rename_columns(record: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """Return the fields of a record that `data.columns` names, under our names. Without columns: all fields.

    A record may lack a column, but not one that is its question, its answer or its turns: raise UnknownColumnError.
    """
    if not columns:
        return record
    for ours, name in columns.items():
        if name not in record and ours in (*TURNS, *QUESTIONS, *ANSWERS, *PREFERENCES):
            raise UnknownColumnError(f"there is no field {name}, which data.columns names", did_you_mean(name, record))
    return {ours: record[name] for ours, name in columns.items() if name in record}


def read_examples(
    record: dict[str, Any], columns: dict[str, str], unread: Counter[str]
) -> Iterator[tuple[str, Pair | Conversation]]:
    """Yield (layout, example) for each example of a record; most records are one.

    columns  our name of a field -> the record's name
    unread   counts the fields that are not read

    Raise ValueError if the record is bad: OtherKindError if it is of a kind that has another use, UnknownLayoutError if
    its layout is not known.
    """
    given = rename_columns(record, columns)
    fields = {name: value for name, value in given.items() if value is not None}
    names = use_other_names(fields) if not columns else {}
    check_kind(fields)
    try:
        read, layout, conversations = read_layout(fields, unread)
    except UnknownLayoutError:
        if nulls := [name for name in FIELDS if name in given and given[name] is None]:
            raise ValueError(f"{nulls[0]} is null") from None
        raise
    unread.update(set(record) - {columns.get(name, names.get(name, name)) for name in read if name in fields})
    for one in conversations:
        yield layout, one


def use_other_names(fields: dict[str, Any]) -> dict[str, str]:
    """Rename a question or an answer that has a name of OTHER_NAMES to ours. Return {our name: the record's}.

    Raise ValueError if one of both has several: {problem, solution, answer} may be learnt in two ways.
    """
    names: dict[str, str] = {}
    if any(name in fields for name in TURNS):
        return names
    for ours, known in zip(OTHER_NAMES, (QUESTIONS, ANSWERS), strict=True):
        found = [name for name in OTHER_NAMES[ours] if name in fields]
        candidates = [name for name in known if name in fields] + found
        if len(candidates) > 1 and found:
            raise ValueError(f"both {candidates[0]} and {candidates[1]} are there: choose with data.columns")
        if candidates == found != []:
            fields[ours], names[ours] = fields.pop(found[0]), found[0]
    return names


class UnknownLayoutError(ValueError):
    """A record has none of the known layouts."""


class UnknownColumnError(ValueError):
    """A record lacks a field that data.columns names. `hint` is the name that may be meant."""

    def __init__(self, what: str, hint: str | None):
        super().__init__(what)
        self.hint = hint


class OtherKindError(ValueError):
    """A record is of a kind that is not for fine-tuning on answers. `fix` says what to do with a file of them."""

    def __init__(self, what: str, fix: str):
        super().__init__(what)
        self.fix = fix


def check_kind(fields: dict[str, Any]) -> None:
    """Raise OtherKindError for records that another objective reads, and for plain texts; ValueError for media."""
    wrong = [name for name in PREFERENCES if name in fields and (name != "label" or is_verdict(fields))]
    if wrong:
        fix = f"learn what is preferred: llmkit finetune --objective {PREFERENCES[wrong[0]]}"
        if wrong[0] == "chosen":
            fix += "; or the good answers alone: data.columns: {question: prompt, answer: chosen}"
        raise OtherKindError(f"a preference, not an answer: it has {wrong[0]}", fix)
    check_media(fields)
    if "text" in fields and not is_record(fields):
        fix = "continue pretraining on texts: llmkit pretrain"
        if fields.keys() & {"label", "labels"}:
            fix = "learn the labels: llmkit finetune --objective classify"
        raise OtherKindError("a text, not a prompt and an answer", fix)


def check_media(fields: dict[str, Any]) -> None:
    """Raise ValueError for a record with pictures or sound."""
    if media := [name for name in MEDIA if fields.get(name)]:
        raise ValueError(f"the record has {media[0]}, and only text is read")


def is_verdict(fields: dict[str, Any]) -> bool:
    """Return whether a `label` says that an answer is good or bad, as opposed to a class of a classifier.

    Beside a prompt and a completion, as KTO's data sets have it, 0, 1 and the texts of a CSV file say so too.
    """
    label = fields["label"]
    if "prompt" in fields and "completion" in fields:
        return label in (0, 1) or str(label).strip().lower() in ("true", "false", "0", "1")
    return isinstance(label, bool)


def is_record(fields: dict[str, Any]) -> bool:
    """Return whether a record has a question and an answer, or turns."""
    return any(name in fields for name in TURNS) or (
        any(name in fields for name in QUESTIONS) and any(name in fields for name in (*ANSWERS, "instances"))
    )


def describe_fields(record: dict[str, Any]) -> str:
    """Return the names of a record's fields, for an error."""
    return "the fields " + ", ".join(str(key)[:50] for key in list(record)[:30])


def read_layout(fields: dict[str, Any], unread: Counter[str]) -> tuple[set[str], str, list[Pair | Conversation]]:
    """Return (names of the fields that are read, layout, examples) of a record."""
    turns = [name for name in TURNS if name in fields]
    marks = {name: fields[name] for name in LEARNT if isinstance(fields.get(name), bool)}  # a loss may be a figure
    marks |= {"weight": fields["weight"]} if "weight" in fields else {}
    if turns:
        read, layout, examples = read_turns(turns, fields, unread)
    else:
        read, layout, examples = read_questions(fields, unread)
    if isinstance(examples[0], tuple):
        if extra := [name for name in (*SYSTEM, *TOOLS, "history", *VARIABLES, *THOUGHTS) if fields.get(name)]:
            raise ValueError(f"prompt and completion are continued text, which has no place for {extra[0]}")
        if not is_learnt(marks):
            raise ValueError("a record of prompt and completion has no turns to leave out: delete it instead")
        return {*read, *marks}, layout, examples
    for one in examples:
        add_context(one, fields)
        if not any(message["role"] == "assistant" for message in one.messages):
            raise ValueError("no turn of the assistant")
        if not is_learnt(marks):
            one.learnt = [False] * len(one.learnt)
    return {*read, *SYSTEM, *TOOLS, *VARIABLES, *marks}, layout, examples


def read_turns(
    turns: list[str], fields: dict[str, Any], unread: Counter[str]
) -> tuple[set[str], str, list[Pair | Conversation]]:
    """Return what `read_layout` returns, for a record with turns. An answer may stand beside a last question."""
    if len(turns) > 1:
        raise ValueError(f"both {turns[0]} and {turns[1]} are there: choose with data.columns")
    if beside := [name for name in ("history", *CALLS, *THOUGHTS) if fields.get(name)]:
        raise ValueError(f"{beside[0]} is beside {turns[0]}, and not in a turn")
    messages, learnt = to_messages(split_turns(fields[turns[0]]), unread)
    answers = [name for name in ANSWERS if fields.get(name)] if messages[-1]["role"] == "user" else []
    if len(answers) > 1:
        raise ValueError(f"both {answers[0]} and {answers[1]} are there: choose with data.columns")
    if answers:
        messages.append({"role": "assistant", "content": to_text(fields[answers[0]], answers[0])})
        learnt.append(True)
    return {turns[0], *answers}, turns[0], [Conversation(messages, learnt)]


def add_context(one: Conversation, fields: dict[str, Any]) -> None:
    """Add what a record says beside the turns: the system text, the tools, and variables of the template."""
    system = one_of({name: text for name, text in fields.items() if not is_blank(text)}, SYSTEM)
    if system is not None and one.messages[0]["role"] in ("system", "developer"):
        if one.messages[0]["content"] != system:
            raise ValueError("there is a system text, and the turns begin with another one")
    elif system is not None:
        one.messages.insert(0, {"role": "system", "content": to_text(system, "the system text")})
        one.learnt.insert(0, False)
    one.tools = to_tools(one_of({name: value for name, value in fields.items() if value}, TOOLS))
    one.variables = to_variables(fields.get("chat_template_kwargs"), fields.get("documents"))


def read_questions(fields: dict[str, Any], unread: Counter[str]) -> tuple[set[str], str, list[Pair | Conversation]]:
    """Return what `read_layout` returns, for records of a question and an answer."""
    answers = [name for name in ANSWERS if name in fields]
    questions = [name for name in QUESTIONS if name in fields]
    contexts = [name for name in CONTEXTS if name in fields and name != next(iter(questions), None)]
    questions = [name for name in questions if name not in contexts]
    if "instances" in fields and "instruction" in fields and not answers:
        return read_instances(fields, unread)
    if not questions or not answers:
        raise UnknownLayoutError(f"no known layout: {describe_fields(fields)}")
    for names in (questions, answers):
        if len(names) > 1:
            raise ValueError(f"both {names[0]} and {names[1]} are there: choose with data.columns")
    [question], [answer] = questions, answers
    layout = f"{question}/{answer}"
    asked, answered = fields[question], fields[answer]
    lists = as_turns(asked, question), as_turns(answered, answer)
    if all(isinstance(value, list) for value in lists):  # one alone is a text about turns
        asked, answered = lists
    asked, answered = text_or_turns(asked, question), text_or_turns(answered, answer)
    if layout == CONTINUED and isinstance(asked, str) and isinstance(answered, str):
        if not asked or not answered:
            raise ValueError(f"{answer if asked else question} is empty")
        if full := [name for name in contexts if fields[name]]:
            raise ValueError(f"prompt and completion are continued text, which has no place for {full[0]}")
        return {question, answer, *contexts, *SYSTEM, *TOOLS, "history"}, layout, [(asked, answered)]
    earlier = read_history(fields.get("history"))
    messages, _ = to_messages([{"role": "user", "content": asked}] if isinstance(asked, str) else asked, unread)
    context = [text for name in contexts if not is_blank(text := to_text(fields[name], name))]
    if context and messages[-1]["role"] != "user":
        raise ValueError(f"{contexts[0]} has no question to stand beside")
    messages[-1]["content"] = "\n\n".join(filter(None, [messages[-1]["content"], *context]))
    if calls := [name for name in CALLS if fields.get(name)]:
        raise ValueError(f"{calls[0]} is beside {answer}, and not in a turn")
    thoughts = one_of({name: text for name, text in fields.items() if text}, THOUGHTS)
    turn = {"role": "assistant", "content": answered} | ({THOUGHTS[0]: thoughts} if thoughts else {})
    if thoughts and not isinstance(answered, str):
        raise ValueError(f"the thoughts are beside {answer}, and not in a turn")
    reply, learnt = to_messages([turn] if isinstance(answered, str) else answered, unread)
    begin = 1 if messages[0]["role"] in ("system", "developer") else 0
    one = Conversation([*messages[:begin], *earlier, *messages[begin:], *reply], [False] * begin)
    one.learnt += [message["role"] == "assistant" for message in earlier]
    one.learnt += [False] * (len(messages) - begin) + learnt
    layout = f"{layout} of a chat" if layout == CONTINUED else layout
    return {question, answer, *contexts, "history", *THOUGHTS}, layout, [one]


def is_blank(value: Any) -> bool:
    return not value or (isinstance(value, str) and not value.strip())


def text_or_turns(value: Any, name: str) -> str | list[Any]:
    return value if isinstance(value, list) and all(map(is_turn, value)) else to_text(value, name)


def as_turns(value: Any, name: str) -> Any:
    """Return the list of turns that a string holds as JSON; any other value as it is."""
    if isinstance(value, str) and TURNS_IN_JSON.match(value):
        with suppress(ValueError):  # a text that only looks like JSON
            turns = from_json(value, name)
            if isinstance(turns, list) and all(map(is_turn, turns)):
                return turns
    return value


def is_turn(value: Any) -> bool:
    """Return whether a value is a turn of a conversation, as opposed to other JSON that a text may be."""
    role = value.get("role", value.get("from")) if isinstance(value, dict) else None
    return isinstance(role, str) and usual_role(role) in (*KNOWN_ROLES, *CALL_ROLES)


def read_history(value: Any) -> list[dict[str, str]]:
    """Return the messages of Alpaca's `history`: pairs of question and answer."""
    messages, pairs = [], from_json(value, "history", must=True) or []
    if not isinstance(pairs, list):
        raise ValueError("history is not a list of [question, answer]")
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ValueError("history is not a list of [question, answer]")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


def read_instances(fields: dict[str, Any], unread: Counter[str]) -> tuple[set[str], str, list[Conversation]]:
    """Return what `read_layout` returns, for an instruction with several inputs and outputs (Self-Instruct)."""
    instances = fields["instances"]
    if not isinstance(instances, list) or not instances or not all(isinstance(one, dict) for one in instances):
        raise ValueError("instances is not a list of objects")
    if beside := [name for name in ("context", "input", *THOUGHTS, *CALLS) if fields.get(name)]:
        raise ValueError(f"{beside[0]} is beside instances, and not in one of them")
    found = []
    for one in instances:
        to_text(one.get("output"), "the output of one of the instances")
        unread.update(f"instances.{name}" for name in set(one) - {"input", "output"})
        rest = {"history": fields["history"]} if "history" in fields else {}
        record = {"instruction": fields["instruction"], "output": one["output"], **rest}
        record |= {"input": one["input"]} if one.get("input") else {}
        found += read_questions(record, unread)[2]
    return {"instruction", "instances", "history"}, "instruction/instances", found


def refuse_first(record: dict[str, Any], at: str, error: ValueError) -> DataError:
    """Return the error for a file whose first record is of another kind, or has no known layout or not the columns."""
    if isinstance(error, UnknownColumnError):
        return DataError(str(error), at=at, got=describe_fields(record), fix=error.hint or "correct data.columns")
    if isinstance(error, OtherKindError):
        what = f"the first record of the file is {error}"
        return DataError(what, at=at, got=describe_fields(record), fix=error.fix)
    hints = [hint for key in record if key not in FIELDS and (hint := did_you_mean(str(key), FIELDS))]
    return DataError(
        "this is not a fine-tuning record",
        at=at,
        got=describe_fields(record),
        expected="messages, conversations, prompt/completion, question/answer, instruction/output or similar fields",
        fix=hints[0] if hints else "name the fields: data.columns: {question: ..., answer: ...}",
    )
