"""Convert the messages of a conversation, in any usual layout, to those that chat templates read."""

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

ROLES = {  # other names, in lower case -> the role
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "environment": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")
CALL_ROLES = ("function_call", "tool_call")  # of ShareGPT: a turn of the assistant that only calls functions
REASONING = ("reasoning_content", "thinking", "reasoning")  # the first is the name that messages have here
RESERVED = {"messages", "tools", "documents", "add_generation_prompt"}  # names that chat_template_kwargs can't set
TEXT_PARTS = ("text", "input_text", "output_text")  # types of parts of a content
MEDIA = ("image", "images", "image_url", "audio", "audios", "video", "videos", "files", "attachments")
CALLS = ("tool_calls", "function_call", "function_calls", "tool_call", "toolCalls")
CALL_TYPES = ("function", "function_call", "tool_call", "tool_use")  # OpenAI, LangChain, Anthropic
ARGUMENTS = ("arguments", "parameters", "args", "input")  # of a call
REFUSED = (*MEDIA, "refusal", "tools", "functions", "train_detail")  # of a turn
LEARNT = ("train", "loss", "training")  # true or false
PLAIN_FIELDS = {"role", "content"}
KNOWN_FIELDS = {
    *("role", "from", "content", "value", "text", "tool_call_id", "name", "weight"),
    *(*CALLS, *REASONING, *REFUSED, *LEARNT),
}
PAIRED_TURNS = (("input", "output"), ("human", "assistant"), ("user", "assistant"))  # two turns in one object


def to_messages(turns: Any, unread: Counter[str]) -> tuple[list[dict[str, Any]], list[bool]]:
    """Return (messages, whether the record wants each of them to be learnt).

    A message has "role" and "content", a text, and where they are given "tool_calls" as OpenAI has them but with
    arguments that are objects, "reasoning_content", "name" and "tool_call_id". Only turns of the assistant are learnt,
    except those with `weight: 0` or `train: false`.

    unread  counts the fields that have no meaning here

    Raise ValueError, with the name of the field, for what can't be read.

    >>> to_messages([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], Counter())[0][1]
    {'role': 'assistant', 'content': 'Hello'}
    """
    turns = from_json(turns, "the list of turns")
    if not isinstance(turns, list) or not turns:
        raise ValueError("the turns are not a list, or there are none")
    messages, learnt = [], []
    for turn in turns:
        if not isinstance(turn, dict):
            raise ValueError("a turn is not an object")
        if turn.keys() == PLAIN_FIELDS and turn["role"] in KNOWN_ROLES and isinstance(turn["content"], str):  # most are
            messages.append(dict(turn))
            learnt.append(turn["role"] == "assistant")
            continue
        message = to_message(turn)
        unread.update(
            f"turn.{field}" for field, value in turn.items() if value is not None and field not in KNOWN_FIELDS
        )
        messages.append(message)
        learnt.append(message["role"] == "assistant" and is_learnt(turn))
    return messages, learnt


def split_turns(turns: Any) -> Any:
    """Return turns with a role each, of texts that alternate (LIMA) or of objects with a question and an answer.

    Return any other value as it is.

    >>> split_turns([{"input": "Hi", "output": "Hello"}])
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    """
    turns = from_json(turns, "the list of turns")
    if not isinstance(turns, list):
        return turns
    if all(isinstance(turn, str) for turn in turns):
        return [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]
    if all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in turns):  # most are
        return turns
    found = []
    for turn in turns:
        pair = next((pair for pair in PAIRED_TURNS if isinstance(turn, dict) and set(turn) == set(pair)), None)
        roles = zip(("user", "assistant"), pair, strict=True) if pair else ()
        found += [{"role": role, "content": turn[name]} for role, name in roles] or [turn]
    return found


def to_message(turn: dict[str, Any]) -> dict[str, Any]:
    """Return one message; see `to_messages`."""
    turn = {field: value for field, value in turn.items() if value is not None}  # Parquet gives all turns all fields
    role = one_of(turn, ("role", "from"))
    if not isinstance(role, str):
        raise ValueError("a turn's role is not a string")
    if refused := [field for field in REFUSED if turn.get(field)]:
        raise ValueError(f"a turn has {refused[0]}, which is not read there")
    value = one_of(turn, ("content", "value", "text"))
    calls = [found for field in CALLS if (found := from_json(turn.get(field), field))]
    role = usual_role(role)
    if role in CALL_ROLES:
        role, value, calls = "assistant", "", [*calls, value]
    if role not in KNOWN_ROLES:
        raise ValueError(f"unknown role {role[:50]!r}")
    if calls and role != "assistant":
        raise ValueError(f"a turn of the role {role} has tool_calls")
    if len(calls) > 1:
        raise ValueError("a turn has calls in two fields")
    reasoning = one_of({field: text for field, text in turn.items() if text}, REASONING)
    message = {"role": role}
    if calls:
        message["tool_calls"] = to_calls(calls[0])
    for field in ("name", "tool_call_id"):
        if field in turn:
            message[field] = to_text(turn[field], field)
    if reasoning is not None:
        message[REASONING[0]] = to_text(reasoning, REASONING[0])
    if value is None and (calls or reasoning):
        value = ""
    if role == "tool" and (isinstance(value, dict) or (isinstance(value, list) and not are_parts(value))):
        value = to_json(value)
    return message | {"content": join_parts(value)}


def usual_role(role: str) -> str:
    """Return the role that a name stands for, in any case: "user" for "Human". Return other names in lower case."""
    role = role.strip().lower().replace("-", "_")
    return ROLES.get(role, role)


def one_of(fields: dict[str, Any], names: Iterable[str]) -> Any:
    """Return the value of the field that is there, of several names for it; None if none is.

    Raise ValueError if two are there and differ.
    """
    found = [name for name in names if name in fields]
    if any(fields[name] != fields[found[0]] for name in found):
        raise ValueError(f"{' and '.join(found)} are both there, and differ")
    return fields[found[0]] if found else None


def to_json(value: Any) -> str:
    """Return a value as JSON. Raise ValueError if it is nested too deeply."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise ValueError("a value is nested too deeply") from None
    except TypeError as error:  # a date of Parquet
        raise ValueError(f"a value is no JSON: {error}") from None


def are_parts(content: Any) -> bool:
    """Return whether a content is a list of parts, as opposed to other JSON, which a function may have returned."""
    known = (*TEXT_PARTS, *MEDIA)
    return bool(content) and all(
        isinstance(part, dict)
        and (str(part.get("type")).removeprefix("input_") in known or isinstance(part.get("file"), dict))
        for part in content
    )


def join_parts(content: Any) -> str:
    """Return a content as text: a string, or a list of parts that are all text."""
    if not isinstance(content, list):
        return to_text(content, "content")
    texts = []
    for part in content:
        if isinstance(part, dict):
            if part.get("type", "text") not in TEXT_PARTS:
                raise ValueError(f"content has a part of the type {str(part['type'])[:50]}, and only text is read")
            if beside := [name for name in part if name not in ("type", "text") and part[name]]:
                raise ValueError(f"a part of content has {beside[0]}, and only text is read")
        texts.append(to_text(part.get("text") if isinstance(part, dict) else part, "the text of a part of content"))
    return "".join(texts)


def to_text(value: Any, what: str) -> str:
    """Return a value that is a text. Raise ValueError, with what it is, for any other."""
    if not isinstance(value, str):
        raise ValueError(f"{what} is {'null or missing' if value is None else type(value).__name__}, not text")
    return value


def is_learnt(turn: dict[str, Any]) -> bool:
    """Return what `weight` and the fields of LEARNT say about a turn or a whole record."""
    weight = turn.get("weight")
    if weight not in (None, 0, 1):
        raise ValueError(f"a weight is {str(weight)[:20]}, and only 0 and 1 are supported")
    for name in LEARNT:
        if not isinstance(turn.get(name), bool | None):
            raise ValueError(f"`{name}` is neither true nor false")
    return weight != 0 and all(turn.get(name) is not False for name in LEARNT)


def to_calls(value: Any) -> list[dict[str, Any]]:
    """Return calls of functions as OpenAI has them, but with arguments that are objects, which templates expect.

    >>> to_calls('{"name": "add", "arguments": "{\\\\"a\\\\": 1}"}')
    [{'type': 'function', 'function': {'name': 'add', 'arguments': {'a': 1}}}]
    """
    value = from_json(value, "function_call", must=True)
    calls = []
    for one in value if isinstance(value, list) else [value]:
        call, function = nested(one, "a call in tool_calls", {"id", "type", "index"})
        if call.get("type", "function") not in CALL_TYPES:
            raise ValueError(f"a call in tool_calls has the type {str(call['type'])[:50]}, and only functions are read")
        if unknown := function.keys() - {"name", *ARGUMENTS}:
            raise ValueError(f"a call in tool_calls has {min(unknown)}, which is not read")
        arguments = from_json(one_of(function, ARGUMENTS), "arguments", must=True)
        arguments = {} if arguments is None else arguments
        if not isinstance(arguments, dict):
            raise ValueError("the arguments of a call in tool_calls are no object")
        known = {"id": str(call["id"])} if "id" in call else {}
        calls.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}} | known)
    return calls


def to_tools(value: Any) -> list[dict[str, Any]] | None:
    """Return descriptions of functions as OpenAI has them: {type: function, function: {...}}; None for none."""
    value = from_json(value, "tools", must=True)
    tools = []
    for one in value if isinstance(value, list) else [value] if value else []:
        tool, function = nested(from_json(one, "tools"), "a tool", {"type"})
        if tool.get("type", "function") != "function":
            raise ValueError(f"a tool has the type {str(tool['type'])[:50]}, and only functions are read")
        tools.append({"type": "function", "function": function})
    return tools or None


def nested(one: Any, what: str, outer: set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (fields of a call or a tool, fields of its function), which may stand in one object. Leave out nulls.

    outer  names of the fields that are not the function's, wherever they stand
    """
    function = one.get("function", one) if isinstance(one, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{what} has no name of a function")
    function = {name: value for name, value in function.items() if value is not None}
    fields = {name: value for name, value in one.items() if value is not None and name != "function"}
    if "function" in one and (beside := [name for name in fields if fields[name] and name not in outer]):
        raise ValueError(f"{what} has {beside[0]} beside its function")
    fields = {name: value for name, value in (function | fields).items() if name in outer}
    return fields, {name: value for name, value in function.items() if name not in outer}


def to_variables(options: Any, documents: Any) -> dict[str, Any]:
    """Return the further variables of a chat template: a chat_template_kwargs and documents, also as JSON texts."""
    variables = from_json(options, "chat_template_kwargs", must=True) or {}
    if not isinstance(variables, dict) or variables.keys() & RESERVED:
        raise ValueError(f"chat_template_kwargs is not an object, or sets one of {', '.join(sorted(RESERVED))}")
    documents = from_json(documents, "documents", must=True)
    if not documents:
        return variables
    if not isinstance(documents, list) or not all(isinstance(document, dict) for document in documents):
        raise ValueError("documents is not a list of objects")
    return {"documents": documents} | variables


def from_json(value: Any, what: str, *, must: bool = False) -> Any:
    """Parse a value that is JSON in a string, as in Parquet and CSV files; return any other value as it is.

    must  raise ValueError for a string that is not JSON; otherwise only one that looks like a list or an object must be
    """
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply") from None
    except ValueError:
        if must or value.lstrip()[0] in "[{":
            raise ValueError(f"{what} is not JSON") from None
        return value
