"""Find the answers of conversations in what a chat template renders.

They are found in one of three ways, the first that fits:
1. the template marks answers with {% generation %}
2. the contents are rendered with a mark before and after each, and what is written around the last one tells where the
   template starts and ends an answer
3. the text up to an answer, and the text with it, begin the whole text; where a template rewrites earlier turns so that
   they do not, each answer becomes an example of its own
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmkit.tokenizer.chat_template import (
    Conversation,
    Rendered,
    adapt,
    break_special_tokens,
    find_loss,
    template_variables,
    to_parts,
)
from llmkit.tokenizer.renderer import Job, Texts, render_jobs
from llmkit.tokenizer.tokenizer import Tokenizer

LONGEST_OPENING = 50  # characters after the common start of an answer as it is, and as the template begins it


def render_examples(
    tokenizer: Tokenizer, template: str, conversations: list[Conversation], date: str | None = None
) -> list[list[Rendered] | ValueError]:
    """Render conversations and find their answers. A conversation is one example, or one for each answer.

    date  what the template takes for today, as 2026-01-31; None: today

    The error of a conversation says why the template, or this function, does not support it. Raise DataError if the
    template can't be parsed.
    """
    found: list[Any] = [adapted_or_error(tokenizer, template, one) for one in conversations]
    numbers = [i for i, one in enumerate(found) if isinstance(one, Conversation)]
    jobs = []
    for one in (found[i] for i in numbers):
        renderings = [(len(one.messages), False), *heads(one)]
        jobs.append(Job(to_parts(template, one.messages), renderings, template_variables(tokenizer, one), mark=True))
    by_prefix: list[tuple[int, Conversation, str]] = []
    for i, texts in zip(numbers, render_jobs(template, jobs, date), strict=True):
        one = found[i]
        found[i] = find_targets(tokenizer, one, texts) if isinstance(texts, Texts) else texts
        if found[i] is None:
            by_prefix.append((i, one, texts.texts[0]))
    jobs = [
        Job(to_parts(template, one.messages), list(prefixes(one)), template_variables(tokenizer, one))
        for _, one, _ in by_prefix
    ]
    for (i, one, whole), texts in zip(by_prefix, render_jobs(template, jobs, date), strict=True):
        found[i] = split_at_prefixes(tokenizer, one, whole, texts.texts) if isinstance(texts, Texts) else texts
    return found


def adapted_or_error(tokenizer: Tokenizer, template: str, one: Conversation) -> Conversation | ValueError:
    """Return a conversation as the template wants it, without special tokens in its texts, or why that can't be."""
    try:
        return break_special_tokens(tokenizer, adapt(template, one))
    except ValueError as error:
        return error


def find_targets(tokenizer: Tokenizer, one: Conversation, texts: Texts) -> list[Rendered] | ValueError | None:
    """Return the whole text with its targets; None if neither generation nor marks tell them."""
    if problem := find_loss(one, texts.texts[0]):
        return ValueError(problem)
    targets = spans_of_generation(one, texts)
    if targets is None and texts.places is not None:
        targets = spans_by_marks(tokenizer, one, texts)
    return None if targets is None else [Rendered(texts.texts[0], targets)]


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


def common_length(a: str, b: str) -> int:
    """Return how many characters two texts begin with in common.

    An answer may begin in another way than the template begins it: `<think>` is there, and not `<think></think>`.
    """
    if a.startswith(b):
        return len(b)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# ---- by marks -------------------------------------------------------------------------------------------------------


def is_plain(message: dict[str, Any]) -> bool:
    """Return whether the content of a message is all that it says, besides what is thought before it."""
    return bool(message["content"].strip()) and not message.get("tool_calls")


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


@dataclass
class Marked:
    """A whole text, and where the content of each message stands in it, outer white space included."""

    whole: str
    ends: dict[int, tuple[int, int]]  # message -> start, stop; those without a text are not there


def place_contents(one: Conversation, whole: str, places: list[tuple[int, int]]) -> Marked | None:
    """Return where the contents stand in a text, given the places of marks; None if these do not tell."""
    contents = [i for i, message in enumerate(one.messages) if message["content"].strip()]
    if len(places) != len(contents):
        return None
    ends = {}
    for i, (start, stop) in zip(contents, places, strict=True):
        content = one.messages[i]["content"]
        if whole[start:stop] != content.strip():  # the template moves or changes contents
            return None
        before, after = content[: len(content) - len(content.lstrip())], content[len(content.rstrip()) :]
        ends[i] = (
            start - len(before) if whole.endswith(before, 0, start) else start,
            stop + len(after) if whole.startswith(after, stop) else stop,
        )
    return Marked(whole, ends)


def spans_by_marks(tokenizer: Tokenizer, one: Conversation, texts: Texts) -> list[tuple[int, int]] | None:
    """Return the targets of a conversation; None if the marks do not tell them.

    texts  the whole text, and those of `heads`
    """
    learnt = [i for i, is_learnt in enumerate(one.learnt) if is_learnt]
    placed = place_contents(one, texts.texts[0], texts.places)
    if placed is None or not all(is_plain(one.messages[i]) for i in learnt):
        return None
    around = openings_and_closing(tokenizer, one, placed, texts.texts[1:])
    if around is None:
        return None
    openings, closing = around
    whole, targets = placed.whole, []
    for i in learnt:
        start, stop = placed.ends[i]
        if i:
            opening, before = openings[one.messages[i - 1]["role"]], placed.ends.get(i - 1)
            if before is None or not whole.startswith(opening, before[1]) or before[1] + len(opening) > stop:
                return None
            start = before[1] + len(opening)
        if whole.startswith(closing, stop):
            stop += len(closing)
        elif special := next((s for s in tokenizer.specials if whole.startswith(s, stop)), None):
            stop += len(special)
        targets.append((start, stop))
    return targets


def openings_and_closing(
    tokenizer: Tokenizer, one: Conversation, placed: Marked, parts: list[str | None]
) -> tuple[dict[str, str], str] | None:
    """Return what a template writes between a content of each role and an answer, and after an answer.

    parts  the texts of `heads`, None where the template fails

    None if a part does not go on as the whole text does, which then holds something else there.
    """
    whole, openings, closing = placed.whole, {}, None
    for (number, starts_answer), part in zip(heads(one), parts, strict=True):
        if part is None or number - 1 not in placed.ends:
            return None
        after, shared = placed.ends[number - 1][1], common_length(whole, part)
        if shared < after or not (starts_answer or whole.startswith(part)):
            return None
        if starts_answer:
            openings[one.messages[number - 1]["role"]] = whole[after:shared]
        else:
            closing = part[after:]
    last = max((i for i, learnt in enumerate(one.learnt) if learnt), default=-1)
    if last + 1 == len(one.messages):
        closing = whole[placed.ends[last][1] :]
    return openings, strip_after_special(tokenizer, closing or "")


def strip_after_special(tokenizer: Tokenizer, text: str) -> str:
    """Return a text without the white space after a special token that ends it, which is part of the template."""
    stripped = text.rstrip()
    return stripped if stripped.endswith(tuple(tokenizer.specials)) else text


# ---- by prefixes ----------------------------------------------------------------------------------------------------


def prefixes(one: Conversation) -> Iterator[tuple[int, bool]]:
    """Yield the renderings with each answer, and up to it, if anything precedes it."""
    for i, learnt in enumerate(one.learnt):
        if learnt:
            yield i + 1, False
            yield from [(i, True)] if i else []


def split_at_prefixes(
    tokenizer: Tokenizer, one: Conversation, whole: str, texts: list[str | None]
) -> list[Rendered] | ValueError:
    """Return the whole text with its targets if the texts of `prefixes` begin it; else an example for each answer."""
    rest, answers = iter(texts), []
    for i, learnt in enumerate(one.learnt):
        if not learnt:
            continue
        text, before = next(rest), next(rest) if i else ""
        if text is None:
            return ValueError("the chat template fails for the part of the conversation that ends with an answer")
        if i and before is not None:
            start = common_length(text, before)
            if len(before) - start > LONGEST_OPENING:
                return ValueError("the chat template rewrites earlier turns, so targets can't be told from prompts")
        elif (start := text.rfind(one.messages[i]["content"].strip())) < 0 or one.messages[i].get("tool_calls"):
            return ValueError("the chat template does not show where an answer begins")
        answers.append(Rendered(text, [(start, len(strip_after_special(tokenizer, text)))]))
    if all(whole.startswith(answer.text) for answer in answers):
        return [Rendered(whole, [span for answer in answers for span in answer.targets])]
    return answers
