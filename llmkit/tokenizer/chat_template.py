"""Render conversations with chat templates, encode them, and mark the tokens that are targets."""

import re
from collections.abc import Iterator
from typing import Any

from llmkit.tokenizer.renderer import render_prefixes
from llmkit.tokenizer.tokenizer import CHAT_END, CHAT_START, Tokenizer

# ChatML, for tokenizers that have no template of their own.
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    f"{CHAT_START}{{{{ message.role }}}}\n{{{{ message.content }}}}{CHAT_END}\n"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{CHAT_START}assistant\n{{% endif %}}"
)

# For tokenizers without chat markers, such as GPT-2's: plain text. The end token ends an answer.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{{ message.content }}{{ eos_token }}{% else %}"
    "{{ message.content }}\n{% endif %}{% endfor %}"
)

BREAK = "\ue000"  # a private-use character, inserted into special tokens that a message spells out


# ---- templates ------------------------------------------------------------------------------------------------------


def render(
    tokenizer: Tokenizer, template: str, messages: list[dict[str, str]], renderings: list[tuple[int, bool]]
) -> Iterator[str]:
    """Yield a text for each of `renderings`; see `render_prefixes`, which also says what is raised.

    Raise ValueError if the last text is blank.
    """
    variables = {"bos_token": tokenizer.bos or "", "eos_token": tokenizer.eos, "tools": None, "documents": None}
    text = ""
    for text in render_prefixes(template, messages, renderings, variables):
        yield text
    if not text.strip():
        raise ValueError("the chat template renders nothing")


def default_template(tokenizer: Tokenizer) -> str:
    """Return the tokenizer's own template, else ChatML if it has the markers, else the plain-text template."""
    if tokenizer.chat_template is not None:
        return tokenizer.chat_template
    return CHATML_TEMPLATE if CHAT_START in tokenizer.specials else PLAIN_TEMPLATE


def encode_chat(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    """Return the ids of a conversation up to the start of the next answer. Raise ValueError as `render` does."""
    messages = break_special_tokens(tokenizer, messages)
    [text] = render(tokenizer, default_template(tokenizer), messages, [(len(messages), True)])
    return encode_rendered(tokenizer, text)


# ---- tokens and targets ---------------------------------------------------------------------------------------------


def encode_rendered(tokenizer: Tokenizer, text: str, *, is_start: bool = True) -> list[int]:
    """Return the ids of a rendered template. Special tokens become their ids, but those inside messages stay text.

    is_start  False if the text continues an earlier one
    """
    ids: list[int] = []
    pieces = re.split("(" + "|".join(map(re.escape, tokenizer.specials)) + ")", text) if tokenizer.specials else [text]
    for place, piece in enumerate(pieces):
        if piece in tokenizer.specials:
            ids.append(tokenizer.specials[piece])
        elif piece:
            encode = tokenizer.encode if is_start and place == 0 else tokenizer.encode_continuation
            ids += encode(piece.replace(BREAK, ""))
    return ids


def break_special_tokens(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Break up special tokens that messages spell out, so that `encode_rendered` sees none."""
    safe = []
    for message in messages:
        text = message["content"].replace(BREAK, "")
        for special in tokenizer.specials:
            text = text.replace(special, special[0] + BREAK + special[1:])
        safe.append({**message, "content": text})
    return safe


def encode_example(tokenizer: Tokenizer, template: str, turns: Any) -> tuple[list[int], list[bool]]:
    """Return (ids, targets) of an example. Targets are the assistant's answers and their end tokens.

    turns  (prompt, completion), or messages

    Raise ValueError if the template does not support the messages.
    """
    if isinstance(turns, tuple):
        prompt, completion = tokenizer.encode_prompt(turns[0]), tokenizer.encode(turns[1])
        return [*prompt, *completion, tokenizer.eos_id], [False] * len(prompt) + [True] * (len(completion) + 1)
    messages = break_special_tokens(tokenizer, turns)
    renderings: list[tuple[int, bool]] = []  # up to each answer, and with it
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            renderings += [(i, True), (i + 1, False)] if i else [(1, False)]
    if messages[-1]["role"] != "assistant":
        renderings.append((len(messages), False))
    ids: list[int] = []
    targets: list[bool] = []
    done = ""  # the text that is encoded already
    for (number, starts_answer), text in zip(
        renderings, render(tokenizer, template, messages, renderings), strict=True
    ):
        if not text.startswith(done):
            raise ValueError("the chat template rewrites earlier turns, so targets can't be told from prompts")
        is_answer = messages[number - 1]["role"] == "assistant" and not starts_answer
        # White space after the end token (a line break in ChatML) is part of the template, not of the answer.
        turn = text[len(done) :]
        end = len(turn.rstrip()) if turn.rstrip().endswith(tuple(tokenizer.specials)) else len(turn)
        for piece, target in ((turn[:end], is_answer), (turn[end:], False)):
            new = encode_rendered(tokenizer, piece, is_start=not ids)
            ids += new
            targets += [target] * len(new)
        done = text
    return ids, targets
