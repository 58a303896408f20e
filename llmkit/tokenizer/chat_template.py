"""Conversations to tokens: the record formats people have, chat templates, and which tokens are targets."""

import re
from functools import cache
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from llmkit.errors import DataError
from llmkit.tokenizer.tokenizer import CHAT_END, CHAT_START, Tokenizer

# ChatML, for tokenizers that bring no template of their own.
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    f"{CHAT_START}{{{{ message.role }}}}\n{{{{ message.content }}}}{CHAT_END}\n"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{CHAT_START}assistant\n{{% endif %}}"
)


# For tokenizers that reserve no chat markers (GPT-2's): plain text, ended by the end token.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{{ message.content }}{{ eos_token }}{% else %}"
    "{{ message.content }}\n{% endif %}{% endfor %}"
)


MAX_LOOPS, MAX_RENDERED = 2, 10_000_000  # nested loops and characters that an honest template never reaches


BREAK = "\ue000"  # a private-use letter that breaks up control tokens spelt out in somebody's message


# ---- templates ------------------------------------------------------------------------------------------------------


@cache
def compile_template(source: str):
    """A chat template in jinja2's immutable sandbox; what could run for hours or fill memory is refused.

    The sandbox alone forbids attributes and mutation, not work: `**`, nested ranges and repeated strings.
    """
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def raise_exception(message: str):
        raise ValueError(message)  # templates call it for conversations they can't express

    for name in ("center", "format", "indent", "replace", "wordwrap"):
        env.filters.pop(name)  # they make much out of little
    env.globals = {"raise_exception": raise_exception, "namespace": env.globals["namespace"]}
    try:
        tree = env.parse(source)
        heavy = [node for kind in (nodes.Pow, nodes.Mul) for node in tree.find_all(kind)]
        deep = max((depth(loop) for loop in tree.find_all(nodes.For)), default=0)
        if heavy or deep > MAX_LOOPS:
            what = f"{type(heavy[0]).__name__} at line {heavy[0].lineno}" if heavy else f"{deep} nested loops"
            raise DataError("the chat template does more than a template needs", got=what)
        return env.from_string(source)
    except TemplateError as error:
        raise DataError(f"the chat template can't be parsed: {error}") from None


def depth(loop: nodes.Node) -> int:
    """How deep loops lie inside a loop, itself counted."""
    return 1 + max((depth(inner) for inner in loop.find_all(nodes.For)), default=0)


def render(tokenizer: Tokenizer, template: str, messages: list[dict[str, str]], *, prompt: bool = False) -> str:
    """Messages as text; `prompt` ends it where an answer begins. ValueError for conversations it can't express."""
    try:
        text = compile_template(template).render(
            messages=messages,
            add_generation_prompt=prompt,
            bos_token=tokenizer.bos or "",
            eos_token=tokenizer.eos,
            tools=None,
        )
    except (TemplateError, SecurityError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        raise ValueError(f"the chat template fails: {error}") from None
    if len(text) > MAX_RENDERED:
        raise ValueError("the chat template wrote over 10 million characters")
    return text


def default_template(tokenizer: Tokenizer) -> str:
    """The tokenizer's own template, else ChatML where its markers are reserved, else plain text."""
    return tokenizer.chat_template or (CHATML_TEMPLATE if CHAT_START in tokenizer.specials else PLAIN_TEMPLATE)


def encode_chat(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    """Ids of a conversation, ready for the assistant's answer; ValueError where the template can't express it."""
    safe = [{**message, "content": break_special_tokens(tokenizer, message["content"])} for message in messages]
    return encode_rendered(tokenizer, render(tokenizer, default_template(tokenizer), safe, prompt=True))


# ---- tokens and targets ---------------------------------------------------------------------------------------------


def encode_rendered(tokenizer: Tokenizer, text: str, *, begins: bool = True) -> list[int]:
    """Ids of a rendered template: its control tokens become ids, guarded ones inside messages stay text.

    begins  nothing stands before the text
    """
    ids: list[int] = []
    pieces = re.split("(" + "|".join(map(re.escape, tokenizer.specials)) + ")", text) if tokenizer.specials else [text]
    for place, piece in enumerate(pieces):
        if piece in tokenizer.specials:
            ids.append(tokenizer.specials[piece])
        elif piece:
            encode = tokenizer.encode if begins and place == 0 else tokenizer.encode_inside
            ids += encode(piece.replace(BREAK, ""))
    return ids


def break_special_tokens(tokenizer: Tokenizer, text: str) -> str:
    """Break up control tokens that a message spells out, so that `encode_rendered` sees none."""
    text = text.replace(BREAK, "")
    for special in tokenizer.specials:
        text = text.replace(special, special[0] + BREAK + special[1:])
    return text


def encode_example(tokenizer: Tokenizer, template: str, turns: Any) -> tuple[list[int], list[bool]]:
    """Ids of one example, and which of them are targets: what the assistant says, its end mark included.

    turns  (prompt, completion), or messages; ValueError when the template can't express them
    """
    if isinstance(turns, tuple):
        prompt, completion = tokenizer.encode_prompt(turns[0]), tokenizer.encode(turns[1])
        return [*prompt, *completion, tokenizer.eos_id], [False] * len(prompt) + [True] * (len(completion) + 1)
    messages = [{**turn, "content": break_special_tokens(tokenizer, turn["content"])} for turn in turns]
    ids: list[int] = []
    targets: list[bool] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant" and i + 1 < len(messages):
            continue
        answers = message["role"] == "assistant"
        before = render(tokenizer, template, messages[:i], prompt=True) if answers and i else done
        upto = render(tokenizer, template, messages[: i + 1])
        if not (before.startswith(done) and upto.startswith(before)):
            raise ValueError("the chat template rewrites earlier turns, so targets can't be told from prompts")
        # What follows the answer's end mark (a line break in ChatML) belongs to the template, not to the answer.
        said = upto[len(before) :]
        tail = said[len(said.rstrip()) :] if said.rstrip().endswith(tuple(tokenizer.specials)) else ""
        pieces = ((before[len(done) :], False), (said.removesuffix(tail) if tail else said, answers), (tail, False))
        for piece, target in pieces:
            new = encode_rendered(tokenizer, piece, begins=not ids)
            ids += new
            targets += [target] * len(new)
        done = upto
    return ids, targets
