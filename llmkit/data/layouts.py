"""Detect the layout of fine-tuning records and convert records to turns."""

from llmkit.errors import DataError, did_you_mean

ROLE_ALIASES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "observation": "tool"}
KNOWN_ROLES = ("system", "user", "assistant", "tool")
LAYOUTS = {  # name -> the fields that identify it
    "prompt/completion": ("prompt", "completion"),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "instruction": ("instruction", "output"),
}


def detect_layout(record: dict, at: str) -> str:
    """Return the name of a record's layout, one of LAYOUTS."""
    for name, fields in LAYOUTS.items():
        if all(field in record for field in fields):
            return name
    known = [field for fields in LAYOUTS.values() for field in fields]
    hints = [hint for key in record if (hint := did_you_mean(key, known))]
    raise DataError(
        "this is not a fine-tuning record",
        at=at,
        got=describe_fields(record),
        expected=" or ".join("{" + ", ".join(fields) + "}" for fields in LAYOUTS.values()),
        fix=hints[0] if hints else "rename the fields: a question to prompt, its answer to completion",
    )


def describe_fields(record: dict) -> str:
    return "the fields " + ", ".join(str(key)[:50] for key in list(record)[:30])


def to_turns(record: dict, layout: str) -> tuple[str, str] | list[dict[str, str]]:
    """Convert a record to (prompt, completion) or to messages with roles. Raise ValueError if it is malformed."""
    if layout == "prompt/completion":
        pair = record.get("prompt"), record.get("completion")
        if not all(isinstance(text, str) and text for text in pair):
            raise ValueError("prompt or completion is missing, empty or not a string")
        return pair
    if layout == "instruction":
        question, context, answer = record.get("instruction"), record.get("input"), record.get("output")
        if not (isinstance(question, str) and isinstance(answer, str) and answer):
            raise ValueError("instruction or output is missing, empty or not a string")
        if not (context is None or isinstance(context, str)):
            raise ValueError("input is not a string")
        question = f"{question}\n\n{context}" if context else question
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    turns = record.get(layout)
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{layout} is not a list of turns")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise ValueError("a turn is not an object")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str):
            raise ValueError("a turn's role is not a string")
        role = ROLE_ALIASES.get(role, role)
        if role not in KNOWN_ROLES:
            raise ValueError(f"unknown role {role[:50]!r}")
        if not isinstance(content, str):
            raise ValueError("a turn's content is not a string")
        if messages and role == messages[-1]["role"] and role != "tool":
            raise ValueError(f"two {role} turns in a row")
        messages.append({"role": role, "content": content})
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError("no assistant turn")
    return messages
