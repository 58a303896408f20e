"""Read fine-tuning records of any usual layout.

A layout is known by its fields. Each record has its own, so that a file may mix them. Fields that have a meaning are
read, or the record is refused with their name; all others are counted.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from llmkit.errors import DataError, did_you_mean
from llmkit.tokenizer.chat_template import Conversation
from llmkit.tokenizer.messages import from_json, to_messages, to_text, to_tools

TURNS = ("messages", "conversations", "conversation")  # lists of turns
QUESTIONS = ("instruction", "prompt", "question", "query", "input")
ANSWERS = ("output", "completion", "response", "answer")
CONTEXTS = ("input", "context")  # text that belongs to an instruction or a question
SYSTEM = ("system", "system_prompt")
TOOLS = ("tools", "functions")
PREFERENCES = dict.fromkeys(("chosen", "rejected", "response_j", "response_k"), "dpo") | {
    "label": "kto"
}  # -> objective
FIELDS = (*TURNS, *QUESTIONS, *ANSWERS, "context", *SYSTEM, *TOOLS, "history", "instances", "chat_template_kwargs")


Pair = tuple[str, str]  # a prompt and its completion, which no chat template touches
CONTINUED = "prompt/completion"  # the layout of pairs, if both are texts


def rename_columns(record: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """Return the fields of a record that `data.columns` names, under our names. Without columns: all fields."""
    if not columns:
        return record
    for name in columns.values():
        if name not in record:
            raise ValueError(f"there is no field {name}, which data.columns names")
    return {ours: record[name] for ours, name in columns.items()}


def read_examples(
    record: dict[str, Any], columns: dict[str, str], unread: Counter[str], at: str
) -> Iterator[tuple[str, Pair | Conversation]]:
    """Yield (layout, example) for each example of a record; most records are one.

    columns  our name of a field -> the record's name
    unread   counts the fields that are not read

    Raise DataError, for the whole file, if it is of another kind; ValueError if only the record is bad.
    """
    given = rename_columns(record, columns)
    fields = {name: value for name, value in given.items() if value is not None}
    check_kind(fields, at)
    try:
        read, layout, conversations = read_layout(fields, unread)
    except UnknownLayoutError:
        if nulls := [name for name in FIELDS if name in given and given[name] is None]:
            raise ValueError(f"{nulls[0]} is null") from None
        raise
    unread.update(set(record) - {columns.get(name, name) for name in read})
    for one in conversations:
        yield layout, one


def check_kind(fields: dict[str, Any], at: str) -> None:
    """Raise DataError for records that another objective reads, and for plain texts."""
    wrong = [name for name in PREFERENCES if name in fields and (name != "label" or isinstance(fields[name], bool))]
    if wrong:
        objective = PREFERENCES[wrong[0]]
        what = f"the records have {wrong[0]}: they are preferences, not answers"
        fix = f"the objective {objective} reads them, which is not there yet"
        raise DataError(what, at=at, got=describe_fields(fields), fix=fix)
    if "text" in fields and not set(fields) & {*TURNS, *QUESTIONS, *ANSWERS}:
        what, fix = "the records are texts, not prompts and answers", "continue pretraining on them: llmkit pretrain"
        raise DataError(what, at=at, got=describe_fields(fields), fix=fix)


def is_record(fields: dict[str, Any]) -> bool:
    """Return whether a record has a question and an answer, or turns."""
    return any(name in fields for name in TURNS) or (
        any(name in fields for name in QUESTIONS) and any(name in fields for name in (*ANSWERS, "instances"))
    )


def describe_fields(record: dict[str, Any]) -> str:
    return "the fields " + ", ".join(str(key)[:50] for key in list(record)[:30])


def read_layout(fields: dict[str, Any], unread: Counter[str]) -> tuple[set[str], str, list[Pair | Conversation]]:
    """Return (names of the fields that are read, layout, examples) of a record."""
    turns = [name for name in TURNS if name in fields]
    if turns:
        read, layout = {turns[0], *SYSTEM, *TOOLS}, turns[0]
        messages, learnt = to_messages(fields[turns[0]], unread)
        conversations = [Conversation(messages, learnt)]
    else:
        read, layout, conversations = read_questions(fields, unread)
    if any(isinstance(one, Conversation) and not speaks(one) for one in conversations):
        raise ValueError("no turn of the assistant")
    if isinstance(conversations[0], tuple):
        if extra := [name for name in (*SYSTEM, *TOOLS, "history") if fields.get(name)]:
            raise ValueError(f"prompt and completion are continued text, which has no place for {extra[0]}")
        return read, layout, conversations
    read |= {"chat_template_kwargs", "documents"}
    system = "".join(to_text(fields[name], name) for name in SYSTEM if name in fields)
    tools = next((found for name in TOOLS if (found := to_tools(fields.get(name)))), None)
    variables = from_json(fields.get("chat_template_kwargs"), "chat_template_kwargs", must=True) or {}
    for one in conversations:
        if system and one.messages[0]["role"] in ("system", "developer"):
            if one.messages[0]["content"] != system:
                raise ValueError("there is a system text, and the turns begin with another one")
        elif system:
            one.messages.insert(0, {"role": "system", "content": system})
            one.learnt.insert(0, False)
        one.tools, one.variables = tools, dict(variables)
    return read, layout, conversations


def speaks(one: Conversation) -> bool:
    return any(message["role"] == "assistant" for message in one.messages)


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
    if layout == CONTINUED and isinstance(fields[question], str) and isinstance(fields[answer], str):
        if not fields[question] or not fields[answer]:
            raise ValueError(f"{answer if fields[question] else question} is empty")
        if contexts:
            raise ValueError(f"prompt and completion are continued text, which has no place for {contexts[0]}")
        return {question, answer}, layout, [(fields[question], fields[answer])]
    asked, _ = to_messages(as_turns(fields[question], "user", question), unread)
    answered, learnt = to_messages(as_turns(fields[answer], "assistant", answer), unread)
    for context in (to_text(fields[name], name) for name in contexts):
        asked[-1]["content"] += f"\n\n{context}" if context else ""
    earlier = read_history(fields.get("history"))
    conversation = Conversation([*earlier, *asked, *answered], [m["role"] == "assistant" for m in earlier])
    conversation.learnt += [False] * len(asked) + learnt
    layout = f"{layout} of a chat" if layout == CONTINUED else layout
    return {question, answer, *contexts, *SYSTEM, *TOOLS, "history"}, layout, [conversation]


class UnknownLayoutError(ValueError):
    """A record has none of the known layouts."""


def as_turns(value: Any, role: str, name: str) -> list[Any]:
    """Return a text as one turn; a list of turns as it is."""
    value = from_json(value, name) if isinstance(value, list) else value
    return value if isinstance(value, list) else [{"role": role, "content": to_text(value, name)}]


def read_history(value: Any) -> list[dict[str, str]]:
    """Return the messages of Alpaca's `history`: pairs of question and answer."""
    messages = []
    for pair in from_json(value, "history", must=True) or []:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ValueError("history is not a list of [question, answer]")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


def read_instances(fields: dict[str, Any], unread: Counter[str]) -> tuple[set[str], str, list[Conversation]]:
    """Return what `read_layout` returns, for an instruction with several inputs and outputs (Self-Instruct)."""
    instances = fields["instances"]
    if not isinstance(instances, list) or not instances or not all(isinstance(one, dict) for one in instances):
        raise ValueError("instances is not a list of objects")
    found = []
    for one in instances:
        unread.update(f"instances.{name}" for name in set(one) - {"input", "output"})
        rest = {name: fields[name] for name in (*SYSTEM, *TOOLS, "history") if name in fields}
        record = {"instruction": fields["instruction"], "output": one.get("output"), **rest}
        record |= {"input": one["input"]} if one.get("input") else {}
        found += read_questions({name: value for name, value in record.items() if value is not None}, unread)[2]
    return {"instruction", "instances", *SYSTEM, *TOOLS, "history"}, "instruction/instances", found


def refuse_first(record: dict[str, Any], at: str) -> DataError:
    """Return the error for a file whose first record has no known layout."""
    hints = [hint for key in record if (hint := did_you_mean(str(key), FIELDS))]
    return DataError(
        "this is not a fine-tuning record",
        at=at,
        got=describe_fields(record),
        expected="messages, conversations, prompt/completion, question/answer, instruction/output or similar fields",
        fix=hints[0] if hints else "name the fields: data.columns: {question: ..., answer: ...}",
    )
