"""Let a model write answers, many at a time."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from llmkit.generation.generate import generate
from llmkit.generation.sampling import Sampling
from llmkit.tokenizer.tokenizer import Tokenizer

MANY_ROWS = 256  # of short answers, of which none waits for its text
ROWS = 32  # most prompts that are continued together
TAIL = 32  # newest tokens in which the end of an answer is looked for


def write_answers(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    *,
    until: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[str]:
    """Return the text that a model writes after each prompt, up to the first of the texts that end it.

    Prompts of similar length are continued together, until all of them have ended.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    found: dict[int, str] = {}
    for start in progress(range(0, len(order), ROWS)):
        numbers = order[start : start + ROWS]
        rows: list[list[int]] = [[] for _ in numbers]
        ended = [False] * len(numbers)
        steps = generate(
            model,
            [prompts[i] for i in numbers],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=frozenset(tokenizer.stop_ids),
        )
        for tokens in steps:
            for i, token in enumerate(tokens):
                if token is None or ended[i]:
                    ended[i] = True
                    continue
                rows[i].append(token)
                tail = tokenizer.decode(rows[i][-TAIL:])
                ended[i] = any(end in tail for end in until)
            if all(ended):
                break
        found |= {i: cut(tokenizer.decode(row), until) for i, row in zip(numbers, rows, strict=True)}
    return [found[i] for i in range(len(prompts))]


def cut(text: str, until: Sequence[str]) -> str:
    """Return a text up to the first of the texts that end it.

    >>> cut("42. Next: 7", ["Next:", "."])
    '42'
    """
    for end in until:
        text = text.split(end)[0]
    return text


@torch.no_grad()
def write_tokens(
    model: nn.Module,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop: frozenset[int],
    seed: int = 0,
    rows: int = MANY_ROWS,
) -> list[list[int]]:
    """Return the tokens that a model writes after each prompt, with the one of `stop` that ends an answer.

    rows  prompts that are continued together at the most; copies of a prompt are neighbours, and are read once

    Prompt i draws with seed + i.
    """
    found = []
    for start in range(0, len(prompts), rows):
        some = list(prompts[start : start + rows])
        answers: list[list[int]] = [[] for _ in some]
        options = {"max_new_tokens": max_new_tokens, "sampling": sampling, "stop": stop, "with_stop": True}
        for tokens in generate(model, some, seed=seed + start, **options):
            for answer, token in zip(answers, tokens, strict=True):
                if token is not None:
                    answer.append(token)
        found += answers
    return found
