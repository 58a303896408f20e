"""Read fine-tuning records of every layout as turns."""

from llmkit.errors import DataError, did_you_mean

ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "observation": "tool"}


KNOWN_ROLES = ("system", "user", "assistant", "tool")


LAYOUTS = {  # format -> the fields that tell it
    "prompt/completion": ("prompt", "completion"),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "instruction": ("instruction", "output"),
}


def detect_layout(record: dict, at: str) -> str:
    """Which of FORMATS a first record is."""
    for name, fields in LAYOUTS.items():
        if all(field in record for field in fields):
            return name
    known = [field for fields in LAYOUTS.values() for field in fields]
    hints = [hint for key in record if (hint := did_you_mean(key, known))]
    raise DataError(
        "this is no fine-tuning record",
        at=at,
        got=f"the fields {', '.join(map(str, record))}",
        expected=" or ".join("{" + ", ".join(fields) + "}" for fields in LAYOUTS.values()),
        fix=hints[0] if hints else None,
    )


def to_turns(record: dict, form: str) -> tuple[str, str] | list[dict[str, str]]:
    """A record as (prompt, completion), or as messages with roles. Raises ValueError with the reason it is bad."""
    if form == "prompt/completion":
        pair = record.get("prompt"), record.get("completion")
        if not all(isinstance(text, str) and text for text in pair):
            raise ValueError("prompt or completion is missing, empty or no text")
        return pair
    if form == "instruction":
        parts = [record.get("instruction"), record.get("input") or None, record.get("output")]
        if not (isinstance(parts[0], str) and isinstance(parts[2], str) and parts[2]):
            raise ValueError("instruction or output is missing, empty or no text")
        question = f"{parts[0]}\n\n{parts[1]}" if parts[1] else parts[0]
        return [{"role": "user", "content": question}, {"role": "assistant", "content": parts[2]}]
    turns = record.get(form)
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{form} is no list of turns")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise ValueError("a turn is no object")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        role = ROLES.get(role, role)
        if role not in KNOWN_ROLES:
            raise ValueError(f"unknown role {role!r}")
        if not isinstance(content, str):
            raise ValueError("a turn's content is no text")
        if messages and role == messages[-1]["role"] and role != "tool":
            raise ValueError(f"two {role} turns in a row")
        messages.append({"role": role, "content": content})
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError("no assistant turn")
    return messages
