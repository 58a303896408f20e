"""Render conversations with chat templates, encode them, and mark the tokens that are targets.

The ids are those of the whole rendered text, as transformers gives them. Where an answer stands in it is found in one
of three ways, the first that fits:
1. the template marks answers with {% generation %}
2. the contents are rendered with a mark before and after each, and what is written around the last one tells where the
   template starts and ends an answer
3. the text up to an answer, and the text with it, begin the whole text; where a template rewrites earlier turns so that
   they do not, each answer becomes an example of its own
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from llmkit.tokenizer.renderer import Job, Texts, render_jobs
from llmkit.tokenizer.tokenizer import CHAT_END, CHAT_START, Tokenizer

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
    "{% if message.content or not loop.first %}\n{% endif %}<tool_call>{{ call.function | tojson }}</tool_call>"
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
    "{% if message.content or not loop.first %}\n{% endif %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% else %}\n{% endif %}{% endfor %}"
)

# Noncharacters of Unicode, which no text has:
BREAK = "\ufdd0"  # stands inside special tokens that a message spells out
START, STOP = "\ufdd1", "\ufdd2"  # stand before and after the content of a message
OURS = re.compile("[\ufdd0-\ufdd4]")
# in templates of models that see pictures: they loop over the parts of a content
LOOP_OVER_PARTS = re.compile(r"for \w+ in message(\.content|\[['\"]content['\"]\])")
LONGEST_OPENING = 50  # characters after the common start of an answer as it is, and as the template begins it
REASONING = ("reasoning_content", "thinking", "reasoning")  # the names that templates read, the first being ours


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


def reads(template: str, name: str) -> bool:
    """Return whether a template mentions a field of messages, as `.name` or as `['name']`."""
    return re.search(rf"\.{name}\b|['\"]{name}['\"]", template) is not None


def adapt(template: str, one: Conversation) -> Conversation:
    """Name the reasoning as the template does. Raise ValueError for what the template has no place for."""
    if one.tools and not re.search(r"\btools\b", template):
        raise ValueError("the chat template has no place for tools")
    if any("tool_calls" in message for message in one.messages) and not reads(template, "tool_calls"):
        raise ValueError("the chat template has no place for tool_calls")
    if not any(REASONING[0] in message for message in one.messages):
        return one
    name = next((name for name in REASONING if reads(template, name)), None)
    if name is None:
        raise ValueError("the chat template has no place for reasoning_content")
    messages = [{name if key == REASONING[0] else key: value for key, value in m.items()} for m in one.messages]
    return replace(one, messages=messages)


def to_parts(template: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with contents as lists of parts if the template takes no texts."""
    if not LOOP_OVER_PARTS.search(template) or "is string" in template:
        return messages
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def variables(tokenizer: Tokenizer, one: Conversation) -> dict[str, Any]:
    """Return the variables of a template, besides the messages, as transformers gives them."""
    tokens = {"bos_token": tokenizer.bos or "", "eos_token": tokenizer.eos}
    return {**tokens, **tokenizer.roles, "tools": one.tools, "documents": None, **one.variables}


def encode_chat(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
) -> list[int]:
    """Return the ids of a conversation up to the start of the next answer.

    Raise ValueError if the template does not support it, DataError if it can't be parsed.
    """
    template = default_template(tokenizer)
    one = adapt(template, Conversation(messages, [False] * len(messages), tools))
    one = break_special_tokens(tokenizer, one)
    [found] = render_jobs(
        template, [Job(to_parts(template, one.messages), [(len(messages), True)], variables(tokenizer, one))]
    )
    if isinstance(found, ValueError):
        raise found
    if problem := find_loss(one, found.texts[0]):
        raise ValueError(problem)
    return encode_rendered(tokenizer, Rendered(found.texts[0], []))[0]


# ---- answers in a rendered text -------------------------------------------------------------------------------------


def render_examples(
    tokenizer: Tokenizer, template: str, conversations: list[Conversation], date: str | None = None
) -> list[list[Rendered] | ValueError]:
    """Render conversations and find their answers. A conversation is one example, or one for each answer.

    The error of a conversation says why the template, or this function, does not support it. Raise DataError if the
    template can't be parsed.
    """
    found: list[list[Rendered] | ValueError] = []
    jobs, places = [], []
    for one in conversations:
        try:
            one = break_special_tokens(tokenizer, adapt(template, one))
        except ValueError as error:
            found.append(error)
            continue
        places.append((len(found), one))
        found.append([])
        whole = [(len(one.messages), False)]
        plain, marked = (to_parts(template, some) for some in (one.messages, [*map(mark, one.messages)]))
        jobs.append(Job(plain, whole + list(heads(one)), variables(tokenizer, one), marked))
    texts = render_jobs(template, jobs, date) if jobs else []
    again: list[tuple[int, Conversation, str]] = []
    for (place, one), plain in zip(places, texts, strict=True):
        if isinstance(plain, ValueError):
            found[place] = plain
            continue
        if problem := find_loss(one, plain.texts[0]):
            found[place] = ValueError(problem)
            continue
        targets = spans_of_generation(one, plain)
        if targets is None and plain.marked is not None:
            targets = spans_by_marks(tokenizer, one, plain)
        if targets is None:
            again.append((place, one, plain.texts[0]))
        else:
            found[place] = [Rendered(plain.texts[0], targets)]
    jobs = [
        Job(to_parts(template, one.messages), list(prefixes(one)), variables(tokenizer, one)) for _, one, _ in again
    ]
    for (place, one, text), parts in zip(again, render_jobs(template, jobs, date) if jobs else [], strict=True):
        found[place] = parts if isinstance(parts, ValueError) else by_prefixes(tokenizer, one, text, parts.texts)
    return found


def spans_of_generation(one: Conversation, plain: Texts) -> list[tuple[int, int]] | None:
    """Return the targets that {% generation %} marks; None if it is not clear which answer each mark is about."""
    answers = [
        learnt for message, learnt in zip(one.messages, one.learnt, strict=True) if message["role"] == "assistant"
    ]
    if not plain.spans or (len(plain.spans) != len(answers) and not all(answers)):
        return None
    if all(answers):  # the template may mark more than the answers, such as an end token after all of them
        return [span for span in plain.spans if span[0] < span[1]]
    return [span for span, learnt in zip(plain.spans, answers, strict=True) if learnt and span[0] < span[1]]


def find_loss(one: Conversation, text: str) -> str | None:
    """Return what a rendered text lacks of a conversation. Earlier thoughts may be left out, as templates do."""
    if not text.strip():
        return "the chat template renders nothing"
    for message in one.messages:
        content = message["content"].strip()
        spellings = [content, *(json.dumps(content, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))]
        if message["role"] != "assistant" and not any(one in text for one in spellings):
            return f"the chat template leaves out what a message of the role {message['role']} says"
    return None


def common_length(a: str, b: str) -> int:
    """Return how many characters two texts begin with in common.

    An answer may begin in another way than the template begins it: `<think>` is there, and not `<think></think>`.
    """
    if a.startswith(b):
        return len(b)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def is_plain(message: dict[str, Any]) -> bool:
    """Return whether the content of a message is all that it says, besides what is thought before it."""
    return bool(message["content"].strip()) and not message.get("tool_calls")


def mark(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with marks around its content, inside of white space, which templates may strip."""
    text = message["content"]
    if not text.strip():
        return message
    begin, end = len(text) - len(text.lstrip()), len(text.rstrip())
    return {**message, "content": f"{text[:begin]}{START}{text[begin:end]}{STOP}{text[end:]}"}


def heads(one: Conversation) -> Iterator[tuple[int, bool]]:
    """Yield the renderings that tell how a template begins an answer after each role, and how it ends one."""
    seen = set()
    answers = [i for i, learnt in enumerate(one.learnt) if learnt]
    for i in answers:
        if i and (role := one.messages[i - 1]["role"]) not in seen:
            seen.add(role)
            yield i, True
    if answers and answers[-1] + 1 < len(one.messages):
        yield answers[0] + 1, False


def spans_by_marks(tokenizer: Tokenizer, one: Conversation, plain: Texts) -> list[tuple[int, int]] | None:
    """Return the targets of a conversation; None if the marks do not tell them.

    plain  the whole text, those of `heads`, and the text with marks
    """
    whole, *parts = plain.texts
    pieces = re.split(f"{START}|{STOP}", plain.marked)
    contents = [i for i, message in enumerate(one.messages) if message["content"].strip()]
    learnt = [i for i, is_learnt in enumerate(one.learnt) if is_learnt]
    order = re.findall(f"{START}|{STOP}", plain.marked)
    if "".join(pieces) != whole or order != [START, STOP] * len(contents):
        return None
    if not all(is_plain(one.messages[i]) for i in learnt):
        return None
    ends, at = {}, 0  # of the content of each message, outer white space included
    for place, i in enumerate(contents):
        start = at + len(pieces[2 * place])
        stop = start + len(pieces[2 * place + 1])
        content, at = one.messages[i]["content"], stop
        before, after = content[: len(content) - len(content.lstrip())], content[len(content.rstrip()) :]
        ends[i] = (
            start - len(before) if whole.endswith(before, 0, start) else start,
            stop + len(after) if whole.startswith(after, stop) else stop,
        )
    openings: dict[str, str] = {}  # role before the answer -> what stands between its content and the answer
    closing = None
    for (number, starts_answer), part in zip(heads(one), parts, strict=True):
        if number - 1 not in ends:
            return None
        after = ends[number - 1][1]
        if starts_answer:
            openings[one.messages[number - 1]["role"]] = whole[after : max(after, common_length(whole, part))]
        elif whole.startswith(part):
            closing = part[after:]
    if learnt and learnt[-1] + 1 == len(one.messages):
        closing = whole[ends[learnt[-1]][1] :]
    closing = strip_after_special(tokenizer, closing or "")
    targets = []
    for i in learnt:
        start, stop = ends[i]
        if i:
            opening = openings[one.messages[i - 1]["role"]]
            if i - 1 not in ends or not whole.startswith(opening, ends[i - 1][1]):
                return None
            start = ends[i - 1][1] + len(opening)
        if whole.startswith(closing, stop):
            stop += len(closing)
        elif special := next((s for s in tokenizer.specials if whole.startswith(s, stop)), None):
            stop += len(special)
        targets.append((start, stop))
    return targets


def strip_after_special(tokenizer: Tokenizer, text: str) -> str:
    """Return a text without the white space after a special token that ends it, which is part of the template."""
    stripped = text.rstrip()
    return stripped if stripped.endswith(tuple(tokenizer.specials)) else text


def prefixes(one: Conversation) -> Iterator[tuple[int, bool]]:
    """Yield the renderings up to each answer, if anything precedes it, and with it."""
    for i, learnt in enumerate(one.learnt):
        if learnt:
            yield from [(i, True)] if i else []
            yield i + 1, False


def by_prefixes(tokenizer: Tokenizer, one: Conversation, whole: str, texts: list[str]) -> list[Rendered] | ValueError:
    """Return the whole text with its targets if the texts of `prefixes` begin it; else an example for each answer."""
    rest, answers = iter(texts), []
    for i, learnt in enumerate(one.learnt):
        if learnt:
            before = next(rest) if i else ""
            text = next(rest)
            start = common_length(text, before) if i else max(0, text.find(one.messages[i]["content"].strip()))
            if len(before) - start > LONGEST_OPENING:
                return ValueError("the chat template rewrites earlier turns, so targets can't be told from prompts")
            answers.append(Rendered(text, [(start, len(strip_after_special(tokenizer, text)))]))
    if all(whole.startswith(answer.text) for answer in answers):
        return [Rendered(whole, [span for answer in answers for span in answer.targets])]
    return answers


# ---- tokens and targets ---------------------------------------------------------------------------------------------


def break_special_tokens(tokenizer: Tokenizer, one: Conversation) -> Conversation:
    """Break up special tokens that a conversation spells out, so that they stay text."""
    names = (
        re.compile("|".join(map(re.escape, sorted(tokenizer.specials, key=len, reverse=True))))
        if tokenizer.specials
        else None
    )

    def broken(value: Any) -> Any:
        if isinstance(value, str):
            value = OURS.sub("", value)
            return names.sub(lambda found: found[0][0] + BREAK + found[0][1:], value) if names else value
        if isinstance(value, dict):
            return {broken(key): broken(inner) for key, inner in value.items()}
        return [broken(inner) for inner in value] if isinstance(value, list) else value

    return Conversation(broken(one.messages), one.learnt, broken(one.tools), broken(one.variables))


def encode_rendered(tokenizer: Tokenizer, rendered: Rendered) -> tuple[list[int], list[bool]]:
    """Return (ids, targets) of a rendered text. Special tokens become their ids, but those inside messages stay text.

    A token is a target if any of its characters is.
    """
    if BREAK not in rendered.text:
        return tokenizer.encode_with_specials(rendered.text, rendered.targets)
    ids, targets = [], []
    for piece, is_target in split_at(
        rendered
    ):  # the seams change ids; only texts that spell out special tokens have them
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
    return ids, targets


def split_at(rendered: Rendered) -> Iterator[tuple[str, bool]]:
    """Yield the pieces of a text between the ends of its targets, and whether each is one."""
    at = 0
    for start, stop in rendered.targets:
        yield rendered.text[at:start], False
        yield rendered.text[start:stop], True
        at = stop
    yield rendered.text[at:], False
