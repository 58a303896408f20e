"""Prepare conversations for chat templates, and encode what these render.

The ids are those of the whole rendered text, as transformers gives them. `answers.py` finds the targets in it.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np

from llmkit.tokenizer.messages import REASONING
from llmkit.tokenizer.renderer import Job, Texts, render_jobs
from llmkit.tokenizer.tokenizer import CHAT_END, CHAT_START, Tokenizer

# A newline after a block tag is dropped (`trim_blocks`, as in transformers): it is written as {{ '\n' }}.

# ChatML, for tokenizers that have no template of their own. Tools and calls are written as in Hermes 2 Pro.
CHATML_TEMPLATE = (
    "{% if tools %}"
    f"{CHAT_START}system\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    "You may call these functions:\n<tools>\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}</tools>\n"
    'Write a call as <tool_call>{"name": NAME, "arguments": OBJECT}</tool_call>.'
    f"{CHAT_END}\n"
    "{% endif %}"
    "{% for message in messages %}{% if not (tools and loop.first and message.role == 'system') %}"
    f"{CHAT_START}{{{{ message.role }}}}\n"
    "{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "{% if message.content or not loop.first %}{{ '\\n' }}{% endif %}"
    "<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}"
    f"{CHAT_END}\n"
    "{% endif %}{% endfor %}"
    f"{{% if add_generation_prompt %}}{CHAT_START}assistant\n{{% endif %}}"
)

# For tokenizers without chat markers, such as GPT-2's: plain text. The end token ends an answer.
PLAIN_TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% for message in messages %}"
    "{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "{% if message.content or not loop.first %}{{ '\\n' }}{% endif %}"
    "<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
)

# Noncharacters of Unicode, which no text has:
BREAK = "\ufdd0"  # stands inside special tokens that a message spells out
OURS = re.compile("[\ufdd0-\ufdd4]")  # the others are those of sandbox.py
# in templates of models that see pictures: they loop over the parts of a content
LOOP_OVER_PARTS = re.compile(r"for \w+ in message(\.content|\[['\"]content['\"]\])")
DOCUMENT_TEXTS = ("text", "content", "contents", "snippet")  # fields of documents; others describe them
MAX_DEPTH = 100  # of lists and objects in a conversation


@dataclass
class Conversation:
    """A conversation as chat templates take it; `messages.to_messages` says what a message has.

    learnt     for each message: whether its text is a target
    variables  further variables of the template
    """

    messages: list[dict[str, Any]]
    learnt: list[bool]
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = field(default_factory=dict)


@dataclass
class Rendered:
    """A rendered conversation, and the characters [start, stop) of it that are targets."""

    text: str
    targets: list[tuple[int, int]]


# ---- templates ------------------------------------------------------------------------------------------------------


def default_template(tokenizer: Tokenizer) -> str:
    """Return the tokenizer's own template, else ChatML if it has the markers, else the plain-text template."""
    if tokenizer.chat_template is not None:
        return tokenizer.chat_template
    return CHATML_TEMPLATE if CHAT_START in tokenizer.specials else PLAIN_TEMPLATE


def describe_template(tokenizer: Tokenizer) -> str:
    """Return which template `default_template` takes."""
    forms = {CHATML_TEMPLATE: "ChatML", PLAIN_TEMPLATE: "a plain template with a line for each turn"}
    return forms.get(default_template(tokenizer), "the chat template")


def mentions(template: str, name: str) -> bool:
    """Return whether a template mentions a field of messages, as `.name` or as `['name']`."""
    return re.search(rf"\.{name}\b|['\"]{name}['\"]", template) is not None


def adapt(template: str, one: Conversation) -> Conversation:
    """Write a conversation as the template wants it. Raise ValueError for what the template has no place for."""
    for name, value in {"tools": one.tools or None, **one.variables}.items():
        if value is not None and not re.search(rf"\b{re.escape(name)}\b", template):
            raise ValueError(f"the chat template has no place for {name}")
    changes: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {}
    if any("tool_calls" in message for message in one.messages):
        if not mentions(template, "tool_calls"):
            raise ValueError("the chat template has no place for tool_calls")
        if takes_arguments_as_text(template):
            changes["tool_calls"] = lambda m: m | {"tool_calls": [*map(with_arguments_as_text, m["tool_calls"])]}
    if any(REASONING[0] in message for message in one.messages):
        name = next((name for name in REASONING if mentions(template, name)), None)
        if name is None:
            raise ValueError(f"the chat template has no place for {REASONING[0]}")
        changes[REASONING[0]] = lambda m: {name if key == REASONING[0] else key: value for key, value in m.items()}
    if "developer" not in template:
        changes["role"] = lambda m: m | {"role": "system"} if m["role"] == "developer" else m
    messages = one.messages
    for key, change in changes.items():
        messages = [change(message) if key in message else message for message in messages]
    return replace(one, messages=messages)


def with_arguments_as_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return call | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


@lru_cache
def takes_arguments_as_text(template: str) -> bool:
    """Return whether a template writes the arguments of a call as they are, so that they have to be JSON already.

    Others convert objects themselves. A call is rendered both ways: Python's own form of an object shows that it was
    written as it is.
    """
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    call = {"type": "function", "id": "a12345678", "function": {"name": "f", "arguments": {"key": "value"}}}
    found = []
    for one in (call, with_arguments_as_text(call)):
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [one]}]
        job = Job(to_parts(template, messages), [(2, False)], {"bos_token": "", "eos_token": "", "tools": [tool]})
        [texts] = render_jobs(template, [job])
        found.append(texts.texts[0] if isinstance(texts, Texts) else None)
    from_object, from_text = found
    return from_text is not None and '{"key"' in from_text and (from_object is None or "{'key'" in from_object)


def to_parts(template: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with contents as lists of parts if the template takes no texts."""
    if not takes_parts(template):
        return messages
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


@lru_cache
def takes_parts(template: str) -> bool:
    """Return whether a template takes contents as lists of parts only."""
    return LOOP_OVER_PARTS.search(template) is not None and "is string" not in template


def template_variables(tokenizer: Tokenizer, one: Conversation) -> dict[str, Any]:
    """Return the variables of a template, besides the messages, as transformers gives them."""
    tokens = {"bos_token": tokenizer.bos or "", "eos_token": tokenizer.eos}
    return {**tokens, **tokenizer.roles, "tools": one.tools, "documents": None, **one.variables}


def encode_chat(
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    variables: dict[str, Any] | None = None,
) -> list[int]:
    """Return the ids of a conversation up to the start of the next answer; see `render_chat`."""
    return encode_rendered(tokenizer, Rendered(render_chat(tokenizer, messages, tools, variables), []))[0].tolist()


def render_chat(
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    variables: dict[str, Any] | None = None,
    *,
    starts_answer: bool = True,
) -> str:
    """Return the text of a conversation, which `encode_rendered` reads.

    variables      further ones of the template, such as enable_thinking
    starts_answer  whether it ends with the start of the next answer

    Raise ValueError if the template does not support it, DataError if it can't be parsed.
    """
    template = default_template(tokenizer)
    one = adapt(template, Conversation(messages, [False] * len(messages), tools, variables or {}))
    one = break_special_tokens(tokenizer, one)
    rendering = (len(messages), starts_answer)
    [found] = render_jobs(
        template, [Job(to_parts(template, one.messages), [rendering], template_variables(tokenizer, one))]
    )
    if isinstance(found, ValueError):
        raise found
    if problem := find_loss(one, found.texts[0]):
        raise ValueError(problem)
    return found.texts[0]


def find_loss(one: Conversation, text: str) -> str | None:
    """Return what a rendered text lacks of a conversation.

    Templates leave out the thoughts of earlier answers. Some also leave out what an answer says beside a call: that is
    a loss in a record, which has learnt turns, but no reason to refuse a request to a server.
    """
    if not text.strip():
        return "the chat template renders nothing"
    answers = [i for i, message in enumerate(one.messages) if message["role"] == "assistant"]
    for i, message in enumerate(one.messages):
        content, role = message["content"].strip(), message["role"]
        if role == "assistant":
            content = content.rpartition("</think>")[2].strip() if any(one.learnt) else ""
            if one.learnt[i] and i == answers[-1] and not are_in(text, thoughts_of(message)):
                return "the chat template leaves out the thoughts of an answer"
        if not is_in(text, content):
            return f"the chat template leaves out what a message of the role {role} says"
        for function in (call["function"] for call in message.get("tool_calls", [])):
            arguments = function["arguments"]
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            if not are_in(text, (function["name"], *arguments, *leaves(arguments))):
                return "the chat template leaves out a call"
    if not are_in(text, (tool["function"]["name"] for tool in one.tools or [])):
        return "the chat template leaves out a tool"
    documents = one.variables.get("documents", [])
    said = [document[name] for document in documents for name in DOCUMENT_TEXTS if isinstance(document.get(name), str)]
    if not are_in(text, said):
        return "the chat template leaves out what a document says"
    return None


def thoughts_of(message: dict[str, Any]) -> list[str]:
    """Return the thoughts of an answer: those in its content, and those in a field."""
    inside = message["content"].rpartition("</think>")[0].rpartition("<think>")[2]
    return [text for text in (inside.strip(), *(message[name] for name in REASONING if name in message)) if text]


def count_lost_thoughts(one: Conversation, text: str) -> int:
    """Return the number of learnt answers whose thoughts a rendered text lacks."""
    text = text.replace(BREAK, "")
    answers = [message for message, learnt in zip(one.messages, one.learnt, strict=True) if learnt]
    return sum(not are_in(text, thoughts_of(message)) for message in answers)


def leaves(value: Any) -> Iterator[str | float]:
    """Yield the texts and numbers in a value of JSON."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from leaves(inner)
    elif isinstance(value, str | int | float) and not isinstance(value, bool):  # Python spells true in another way
        yield value


def are_in(text: str, parts: Iterable[str | float]) -> bool:
    """Return whether a rendered text says all of something."""
    return all(is_in(text, part) for part in parts)


def is_in(text: str, part: str | float) -> bool:
    """Return whether a rendered text says something, as it is or as JSON spells it, but for white space around it."""
    part = part.strip() if isinstance(part, str) else json.dumps(part)
    return part in text or any(json.dumps(part, ensure_ascii=ascii)[1:-1] in text for ascii in (False, True))


# ---- tokens and targets ---------------------------------------------------------------------------------------------


def break_special_tokens(tokenizer: Tokenizer, one: Conversation) -> Conversation:
    """Break up special tokens that a conversation spells out, so that they stay text.

    Raise ValueError if it is nested too deeply.
    """
    names, signs = special_patterns(tuple(tokenizer.controls))
    if not one.tools and not one.variables:  # most have nothing to change
        texts = [value for message in one.messages for value in message.values()]
        if all(isinstance(text, str) for text in texts):
            joined = "\0".join(texts)
            if not any(sign in joined for sign in signs):
                return one

    def broken(value: Any, depth: int = 0) -> Any:
        if isinstance(value, str):
            return names.sub(lambda found: found[0][0] + BREAK + found[0][1:], OURS.sub("", value))
        if depth == MAX_DEPTH:
            raise ValueError("the conversation is nested too deeply")
        if isinstance(value, dict):
            return {broken(key): broken(inner, depth + 1) for key, inner in value.items()}
        if isinstance(value, list):
            return [broken(inner, depth + 1) for inner in value]
        if not isinstance(value, str | int | float | None):  # a date of Parquet
            raise ValueError(f"the conversation has a value that is no JSON: {type(value).__name__}")
        return value

    return Conversation(broken(one.messages), one.learnt, broken(one.tools), broken(one.variables))


@lru_cache
def special_patterns(specials: tuple[str, ...]) -> tuple[re.Pattern, set[str]]:
    """Return a pattern of special tokens, and characters: a text without any of them has no such token, and no OURS."""
    names = "|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or r"(?!)"
    return re.compile(names), {name[0] for name in specials} | set(map(chr, range(0xFDD0, 0xFDD5)))


def encode_rendered(tokenizer: Tokenizer, rendered: Rendered) -> tuple[np.ndarray, np.ndarray]:
    """Return (ids, targets) of a rendered text. Special tokens become their ids, but those inside messages stay text.

    A token is a target if any of its characters is.
    """
    if BREAK not in rendered.text:
        return tokenizer.encode_with_specials(rendered.text, rendered.targets)
    ids: list[int] = []
    targets: list[bool] = []
    for piece, is_target in split_at(rendered):  # its seams change ids, but only of texts that spell out special tokens
        for part in re.split("(" + "|".join(map(re.escape, tokenizer.specials)) + ")", piece):
            if part in tokenizer.specials:
                new = [tokenizer.specials[part]]
            else:
                new = (
                    (tokenizer.encode_continuation if ids else tokenizer.encode)(part.replace(BREAK, ""))
                    if part
                    else []
                )
            ids += new
            targets += [is_target] * len(new)
    return np.array(ids, np.uint32), np.array(targets, bool)


def split_at(rendered: Rendered) -> Iterator[tuple[str, bool]]:
    """Yield the pieces of a text between the ends of its targets, and whether each is one."""
    at = 0
    for start, stop in rendered.targets:
        yield rendered.text[at:start], False
        yield rendered.text[start:stop], True
        at = stop
    yield rendered.text[at:], False
