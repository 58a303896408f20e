"""Read fine-tuning records of any usual layout.

A layout is known by its fields. Each record has its own, so that a file may mix them. Fields that have a meaning are
read, or the record is refused with their name; all others are counted.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from llmkit.errors import DataError, did_you_mean
from llmkit.tokenizer.chat_template import Conversation
from llmkit.tokenizer.messages import (
    CALL_ROLES,
    KNOWN_ROLES,
    ROLES,
    from_json,
    one_of,
    to_messages,
    to_text,
    to_tools,
    to_variables,
)

TURNS = ("messages", "conversations", "conversation")  # lists of turns
QUESTIONS = ("instruction", "prompt", "question", "query", "input")
ANSWERS = ("output", "completion", "response", "answer")
CONTEXTS = ("input", "context")  # text that belongs to an instruction or a question
SYSTEM = ("system", "system_prompt")
TOOLS = ("tools", "functions")
PREFERENCES = dict.fromkeys(("chosen", "rejected", "response_j", "response_k"), "dpo") | {
    "label": "kto"
}  # -> objective
VARIABLES = ("documents", "chat_template_kwargs")  # what templates get beside messages and tools
FIELDS = (*TURNS, *QUESTIONS, *ANSWERS, "context", *SYSTEM, *TOOLS, "history", "instances", *VARIABLES)

Pair = tuple[str, str]  # a prompt and its completion, which no chat template touches
CONTINUED = "prompt/completion"  # the layout of pairs, if both are texts


def rename_columns(record: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """Return the fields of a record that `data.columns` names, under our names. Without columns: all fields.

    A record may lack a column, but not one that is its question, its answer or its turns.
    """
    if not columns:
        return record
    for ours, name in columns.items():
        if name not in record and ours in (*TURNS, *QUESTIONS, *ANSWERS):
            raise ValueError(f"there is no field {name}, which data.columns names")
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
    check_kind(fields)
    try:
        read, layout, conversations = read_layout(fields, unread)
    except UnknownLayoutError:
        if nulls := [name for name in FIELDS if name in given and given[name] is None]:
            raise ValueError(f"{nulls[0]} is null") from None
        raise
    unread.update(set(record) - {columns.get(name, name) for name in read if name in given})
    for one in conversations:
        yield layout, one


class UnknownLayoutError(ValueError):
    """A record has none of the known layouts."""


class OtherKindError(ValueError):
    """A record is of a kind that is not for fine-tuning on answers. `fix` says what to do with a file of them."""

    def __init__(self, what: str, fix: str):
        super().__init__(what)
        self.fix = fix


def check_kind(fields: dict[str, Any]) -> None:
    """Raise OtherKindError for records that another objective reads, and for plain texts."""
    wrong = [name for name in PREFERENCES if name in fields and (name != "label" or isinstance(fields[name], bool))]
    if wrong:
        objective = PREFERENCES[wrong[0]]
        fix = f"llmkit can't train on preferences yet; the objective {objective} will read them"
        raise OtherKindError(f"a preference, not an answer: it has {wrong[0]}", fix)
    if "text" in fields and not is_record(fields):
        raise OtherKindError("a text, not a prompt and an answer", "continue pretraining on texts: llmkit pretrain")


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
    if turns:
        if len(turns) > 1:
            raise ValueError(f"both {turns[0]} and {turns[1]} are there: choose with data.columns")
        read, layout = {turns[0]}, turns[0]
        messages, learnt = to_messages(fields[turns[0]], unread)
        examples: list[Pair | Conversation] = [Conversation(messages, learnt)]
    else:
        read, layout, examples = read_questions(fields, unread)
    if isinstance(examples[0], tuple):
        if extra := [name for name in (*SYSTEM, *TOOLS, "history") if fields.get(name)]:
            raise ValueError(f"prompt and completion are continued text, which has no place for {extra[0]}")
        return read, layout, examples
    for one in examples:
        add_context(one, fields)
        if not any(message["role"] == "assistant" for message in one.messages):
            raise ValueError("no turn of the assistant")
    return {*read, *SYSTEM, *TOOLS, *VARIABLES}, layout, examples


def add_context(one: Conversation, fields: dict[str, Any]) -> None:
    """Add what a record says beside the turns: the system text, the tools, and variables of the template."""
    system = one_of({name: text for name, text in fields.items() if text}, SYSTEM)
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
    asked, answered = as_turns(fields[question], question), as_turns(fields[answer], answer)
    if layout == CONTINUED and isinstance(asked, str) and isinstance(answered, str):
        if not asked or not answered:
            raise ValueError(f"{answer if asked else question} is empty")
        if full := [name for name in contexts if fields[name]]:
            raise ValueError(f"prompt and completion are continued text, which has no place for {full[0]}")
        return {question, answer, *contexts, *SYSTEM, *TOOLS, "history"}, layout, [(asked, answered)]
    earlier = read_history(fields.get("history"))
    messages, _ = to_messages([{"role": "user", "content": asked}] if isinstance(asked, str) else asked, unread)
    for context in (to_text(fields[name], name) for name in contexts):
        messages[-1]["content"] += f"\n\n{context}" if context else ""
    turns = [{"role": "assistant", "content": answered}] if isinstance(answered, str) else answered
    reply, learnt = to_messages(turns, unread)
    one = Conversation([*earlier, *messages, *reply], [message["role"] == "assistant" for message in earlier])
    one.learnt += [False] * len(messages) + learnt
    layout = f"{layout} of a chat" if layout == CONTINUED else layout
    return {question, answer, *contexts, "history"}, layout, [one]


def as_turns(value: Any, name: str) -> str | list[Any]:
    """Return a text, or a list of turns, which may be JSON in a string."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        with suppress(ValueError):  # a text that only looks like JSON
            turns = from_json(value, name)
            if isinstance(turns, list) and all(is_turn(turn) for turn in turns):
                return turns
    return value if isinstance(value, list) else to_text(value, name)


def is_turn(value: Any) -> bool:
    """Return whether a value is a turn of a conversation, as opposed to other JSON that a text may be."""
    role = value.get("role", value.get("from")) if isinstance(value, dict) else None
    return isinstance(role, str) and role in (*ROLES, *KNOWN_ROLES, *CALL_ROLES)


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
        rest = {"history": fields["history"]} if "history" in fields else {}
        record = {"instruction": fields["instruction"], "output": one.get("output"), **rest}
        record |= {"input": one["input"]} if one.get("input") else {}
        found += read_questions({name: value for name, value in record.items() if value is not None}, unread)[2]
    return {"instruction", "instances", "history"}, "instruction/instances", found


def refuse_first(record: dict[str, Any], at: str, error: ValueError) -> DataError:
    """Return the error for a file whose first record is of another kind, or has no known layout."""
    if isinstance(error, OtherKindError):
        what = f"the first record of the file is {error}"
        return DataError(what, at=at, got=describe_fields(record), fix=error.fix)
    hints = [hint for key in record if (hint := did_you_mean(str(key), FIELDS))]
    return DataError(
        "this is not a fine-tuning record",
        at=at,
        got=describe_fields(record),
        expected="messages, conversations, prompt/completion, question/answer, instruction/output or similar fields",
        fix=hints[0] if hints else "name the fields: data.columns: {question: ..., answer: ...}",
    )
