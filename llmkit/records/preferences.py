"""Read preferences: records of a prompt with a better and a worse answer, or with one answer that is good or bad."""

import re
from collections import Counter
from typing import Any

from llmkit.records.layouts import (
    ANSWERS,
    CONTINUED,
    QUESTIONS,
    TURNS,
    OtherKindError,
    Pair,
    UnknownLayoutError,
    as_turns,
    check_media,
    describe_fields,
    is_record,
    is_turn,
    read_layout,
    rename_columns,
    use_other_names,
)
from llmkit.tokenizer.chat_template import Conversation
from llmkit.tokenizer.messages import split_turns, usual_role

CHOSEN, REJECTED = ("chosen", "response_j"), ("rejected", "response_k")
VERDICTS = ("label", "kto_tag")
YES, NO = ("true", "1", "1.0"), ("false", "0", "0.0")
SPEAKERS = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")  # of the transcripts of hh-rlhf (Bai et al. 2022)

Read = tuple[str, list[Pair | Conversation], bool | None]


def read_preference(record: dict[str, Any], columns: dict[str, str], unread: Counter[str]) -> Read:
    """Return (layout, examples, verdict) of a record: two examples, of which the first is the better one, and None; or
    one example, and whether it is good.

    Only what follows the part that both have in common is learnt, or the last answer if there is one alone.

    columns  our name of a field -> the record's name
    unread   counts the fields that are not read

    Raise ValueError if the record is bad: OtherKindError if it is no preference, UnknownLayoutError if its layout is
    not known.
    """
    given = rename_columns(record, columns)
    fields = {name: value for name, value in given.items() if value is not None}
    names = use_other_names(fields) if not columns else {}
    check_media(fields)
    pair = [next((name for name in known if name in fields), None) for known in (CHOSEN, REJECTED)]
    if any(pair) and not all(pair):
        missing = next(known[0] for known, name in zip((CHOSEN, REJECTED), pair, strict=True) if name is None)
        raise ValueError(f"there is no {missing} answer beside {next(filter(None, pair))}")
    if all(pair):
        rest = {name: value for name, value in fields.items() if name not in (*pair, *ANSWERS)}
        found = [read_one(add_answer(rest, fields[name], name), unread) for name in pair]
        read = {*pair}.union(*(one[0] for one in found))
        layout, examples, verdict = describe(found[0], "/".join(pair)), [one[2] for one in found], None
        keep_differences(*examples)
    else:
        name = next((name for name in VERDICTS if name in fields), None)
        if name is None:
            raise no_preference(fields)
        verdict = parse_verdict(fields.pop(name), name)
        one = read_one(fields, unread)
        layout, examples, read = describe(one, f"{name}"), [one[2]], {*one[0], name}
        keep_last(examples[0])
    unread.update(set(record) - {columns.get(name, names.get(name, name)) for name in read if name in given})
    return layout, examples, verdict


def read_one(fields: dict[str, Any], unread: Counter[str]) -> tuple[set[str], str, Pair | Conversation]:
    """Return (names of the fields that are read, layout, example) of the fields of a record with one answer."""
    read, layout, examples = read_layout(fields, unread)
    if len(examples) > 1:
        raise ValueError(f"{layout} has several examples, which a preference can't be about")
    return read, layout, examples[0]


def describe(one: tuple[set[str], str, Pair | Conversation], answers: str) -> str:
    """Return the layout of a preference, given how its prompt is read, and the names of what is said about it."""
    _, layout, example = one
    asked = layout.partition("/")[0].removesuffix(" of a chat")
    is_chat = asked == "prompt" and not isinstance(example, tuple)
    return f"{asked}/{answers}" + (" of a chat" if is_chat else "")


def is_continued(layout: str) -> bool:
    """Return whether records of a layout are prompts and texts that continue them, which no chat template touches."""
    return layout == CONTINUED or (layout.startswith("prompt/") and not layout.endswith(" of a chat"))


def add_answer(fields: dict[str, Any], answer: Any, name: str) -> dict[str, Any]:
    """Return the fields of a record with an answer, in a layout that `read_layout` knows.

    answer  a text, a turn, turns after the prompt, the whole conversation, or a transcript of it
    """
    answer = [answer] if is_turn(answer) else as_turns(answer, name)
    turns = next((key for key in TURNS if key in fields), None)
    question = next((key for key in QUESTIONS if key in fields), None)
    if not isinstance(answer, list | str) or not answer or (isinstance(answer, str) and not answer.strip()):
        raise ValueError(f"{name} is empty" if not answer or isinstance(answer, str) else f"{name} is no answer")
    if isinstance(answer, str) and turns:
        return {**fields, turns: without_answer(split_turns(fields[turns])), "answer": answer}
    if isinstance(answer, str) and question:
        return {**fields, "completion" if question == "prompt" else "answer": answer}
    if isinstance(answer, str):
        return {**fields, "messages": split_transcript(answer, name)}
    first = answer[0] if isinstance(answer[0], dict) else {}
    role = first.get("role", first.get("from"))
    if isinstance(role, str) and usual_role(role) == "assistant":
        if turns:
            return {**fields, turns: [*without_answer(split_turns(fields[turns])), *answer]}
        if question:
            return {**fields, "completion" if question == "prompt" else "answer": answer}
    return {**{key: value for key, value in fields.items() if key not in (turns, question)}, "messages": answer}


def without_answer(turns: Any) -> Any:
    """Return the turns without an answer at the end, which a record may have beside the two that it compares."""
    last = turns[-1] if isinstance(turns, list) and turns and isinstance(turns[-1], dict) else {}
    role = last.get("role", last.get("from"))
    return turns[:-1] if isinstance(role, str) and usual_role(role) == "assistant" else turns


def split_transcript(text: str, name: str) -> list[dict[str, str]]:
    r"""Return the turns of a text with Human: and Assistant: at the start of each.

    >>> split_transcript("\n\nHuman: Hi\n\nAssistant: Hello", "chosen")
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    """
    before, *parts = SPEAKERS.split(text)
    if before.strip() or not parts:
        raise ValueError(f"{name} has no prompt beside it, and is no transcript: Human: ..., Assistant: ...")
    speakers = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": "user" if who == "Human" else "assistant", "content": said.strip()} for who, said in speakers]


def keep_differences(better: Pair | Conversation, worse: Pair | Conversation) -> None:
    """Learn only the answers after what two conversations have in common. Raise ValueError if one has none."""
    if isinstance(better, tuple) or isinstance(worse, tuple):
        return
    pairs = zip(better.messages, worse.messages, strict=False)
    common = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(better.messages), len(worse.messages)))
    if common == len(better.messages) == len(worse.messages):  # twice the same: `encode.join_answers` leaves it out
        common -= 1
    for one, name in ((better, "chosen"), (worse, "rejected")):
        roles = [message["role"] for message in one.messages]
        if common == 0:
            raise ValueError("chosen and rejected have no prompt in common")
        if "assistant" not in roles[common:]:
            raise ValueError(f"{name} has no answer after the prompt")
        one.learnt[:] = [i >= common and role == "assistant" for i, role in enumerate(roles)]


def keep_last(one: Pair | Conversation) -> None:
    """Learn only the last answer of a conversation."""
    if isinstance(one, Conversation):
        last = max(i for i, message in enumerate(one.messages) if message["role"] == "assistant")
        one.learnt[:] = [i == last for i in range(len(one.messages))]


def parse_verdict(value: Any, name: str) -> bool:
    """Return whether an answer is good. Raise ValueError for what does not say it."""
    said = str(value).strip().lower()
    if said not in (*YES, *NO):
        raise ValueError(f"{name} is neither true nor false: {said[:40]}")
    return said in YES


def no_preference(fields: dict[str, Any]) -> ValueError:
    """Return the error for a record that has neither two answers nor a verdict."""
    if is_record(fields):
        fix = "learn the answers: data.kind: sft; or name the fields: data.columns: {chosen: ..., rejected: ...}"
        return OtherKindError("a prompt and an answer, without another one or a verdict", fix)
    return UnknownLayoutError(f"no known layout of preferences: {describe_fields(fields)}")
