"""Render conversations with chat templates, encode them, and mark the tokens that are targets."""

import re
from functools import cache
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from llmkit.errors import DataError
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

MAX_LOOP_DEPTH, MAX_CHARACTERS = 2, 10_000_000  # nested loops and output: no real template needs more
BREAK = "\ue000"  # a private-use character, inserted into special tokens that a message spells out


# ---- templates ------------------------------------------------------------------------------------------------------


@cache
def compile_template(source: str):
    """Compile a chat template in jinja2's immutable sandbox. Refuse one that could run for hours or fill memory.

    The sandbox forbids private attributes and mutation, but allows `**`, nested loops and repeated strings.
    """
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def raise_exception(message: str):
        raise ValueError(message)  # templates call it for conversations that they do not support

    for name in ("center", "format", "indent", "replace", "wordwrap"):
        env.filters.pop(name)  # these can make long strings from short ones
    env.globals = {"raise_exception": raise_exception, "namespace": env.globals["namespace"]}
    try:
        tree = env.parse(source)
        heavy = [node for kind in (nodes.Pow, nodes.Mul) for node in tree.find_all(kind)]
        depth = max((loop_depth(loop) for loop in tree.find_all(nodes.For)), default=0)
        if heavy or depth > MAX_LOOP_DEPTH:
            got = f"{type(heavy[0]).__name__} at line {heavy[0].lineno}" if heavy else f"{depth} nested loops"
            raise DataError("the chat template uses operations that could run for hours or fill memory", got=got)
        return env.from_string(source)
    except TemplateError as error:
        raise DataError(f"the chat template can't be parsed: {error}") from None


def loop_depth(loop: nodes.Node) -> int:
    """Return the nesting depth of a loop, counting the loop itself."""
    return 1 + max((loop_depth(inner) for inner in loop.find_all(nodes.For)), default=0)


def render(tokenizer: Tokenizer, template: str, messages: list[dict[str, str]], *, start_answer: bool = False) -> str:
    """Render messages. Raise ValueError if the template rejects them.

    start_answer  append the start of an assistant's answer: the template's generation prompt
    """
    try:
        text = compile_template(template).render(
            messages=messages,
            add_generation_prompt=start_answer,
            bos_token=tokenizer.bos or "",
            eos_token=tokenizer.eos,
            tools=None,
        )
    except (TemplateError, SecurityError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        raise ValueError(f"the chat template fails: {error}") from None
    if len(text) > MAX_CHARACTERS:
        raise ValueError("the chat template renders more than 10 million characters")
    return text


def default_template(tokenizer: Tokenizer) -> str:
    """Return the tokenizer's own template, else ChatML if it has the markers, else the plain-text template."""
    return tokenizer.chat_template or (CHATML_TEMPLATE if CHAT_START in tokenizer.specials else PLAIN_TEMPLATE)


def encode_chat(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    """Return the ids of a conversation up to the start of the next answer. Raise ValueError as `render` does."""
    messages = break_special_tokens(tokenizer, messages)
    return encode_rendered(tokenizer, render(tokenizer, default_template(tokenizer), messages, start_answer=True))


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
    ids: list[int] = []
    targets: list[bool] = []
    done = ""  # the text that is encoded already
    for i, message in enumerate(messages):
        if message["role"] != "assistant" and i + 1 < len(messages):
            continue
        is_answer = message["role"] == "assistant"
        before = render(tokenizer, template, messages[:i], start_answer=True) if is_answer and i else done
        rendered = render(tokenizer, template, messages[: i + 1])
        if not (before.startswith(done) and rendered.startswith(before)):
            raise ValueError("the chat template rewrites earlier turns, so targets can't be told from prompts")
        # White space after the end token (a line break in ChatML) is part of the template, not of the answer.
        turn = rendered[len(before) :]
        end = len(turn.rstrip()) if turn.rstrip().endswith(tuple(tokenizer.specials)) else len(turn)
        pieces = ((before[len(done) :], False), (turn[:end], is_answer), (turn[end:], False))
        for piece, target in pieces:
            new = encode_rendered(tokenizer, piece, is_start=not ids)
            ids += new
            targets += [target] * len(new)
        done = rendered
    return ids, targets
