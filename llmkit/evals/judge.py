"""Let models answer prompts, and let a model judge pairs of answers, for `rating.py`."""

import contextlib
import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmkit.errors import DataError, MachineError
from llmkit.evals.rating import ANSWERS, JUDGE, Messages, Pair, append_line, judge_pair, read_answers, read_judgements
from llmkit.generation.sampling import Sampling
from llmkit.inference.writer import Writer, open_writer

ROWS = 16  # prompts that are answered together
SECONDS = 600  # to wait for a server's answer
JUDGE_TOKENS = 1024  # of a judging server's answer, which may think before it
QUESTION = """Here is a request, and two answers to it.

Request:
{prompt}

Answer 1:
{first}

Answer 2:
{second}

Which answer is better? Reply with 1 or 2 alone."""


def to_text(messages: Messages) -> str:
    """Return a prompt as text: the message of the user, or the turns of a conversation with their roles."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{one['role']}: {one['content']}" for one in messages)


def encode(writer: Writer, messages: Messages) -> list[int]:
    """Return the ids of a prompt: through the chat template if the model has one, else as text to continue."""
    if writer.tokenizer.chat_template is not None:
        return writer.encode_chat(messages)
    return writer.encode(to_text(messages))


def write_missing_answers(
    folder: Path, models: Sequence[str], prompts: Sequence[Messages], sampling: Sampling, max_new_tokens: int,
    seed: int, say: Callable[[str], None],
) -> None:  # fmt: skip
    """Let each model answer the prompts that it has not answered yet, one model after the other in memory."""
    there = read_answers(folder)
    for number, model in enumerate(models):
        missing = [i for i in range(len(prompts)) if (number, i) not in there]
        if not missing:
            continue
        say(f"{model} writes {len(missing)} answers")
        writer = open_writer(model, compile=False, say=lambda line: None)
        chat = writer.tokenizer.chat_template is not None
        for start in range(0, len(missing), ROWS):
            part = missing[start : start + ROWS]
            rows = [encode(writer, prompts[i]) for i in part]
            if longest := [i for i, row in zip(part, rows, strict=True) if len(row) >= writer.max_length]:
                what, got = f"a prompt is longer than the positions of {model}", f"prompt {longest[0] + 1}"
                raise DataError(what, got=got, expected=f"under {writer.max_length} tokens")
            options = {"sampling": sampling, "max_new_tokens": max_new_tokens, "seed": seed + part[0], "chat": chat}
            texts = writer.write(rows, **options)
            for i, text in zip(part, texts, strict=True):
                append_line(folder / ANSWERS, {"model": number, "prompt": i, "text": "".join(text)})
        del writer  # before the next model is loaded


def judge_all(
    folder: Path, judge: str, pairs: Sequence[Pair], prompts: Sequence[Messages], say: Callable[[str], None]
) -> None:
    """Let a model judge the pairs that it has not judged yet, each in both orders: if they disagree, it is a tie.

    judge  a MODEL, or the address of a server with OpenAI's protocol
    """
    rater, answers = f"{JUDGE}{judge}", read_answers(folder)
    done = {row["pair"] for row in read_judgements(folder) if row["rater"] == rater}
    missing = [pair for pair in pairs if pair.id not in done]
    if not missing:
        return
    say(f"{judge} judges {len(missing)} pairs")
    ask = ask_server(judge) if judge.startswith(("http://", "https://")) else ask_model(judge)
    same = 0
    for pair in missing:
        prompt, left, right = to_text(prompts[pair.prompt]), *(answers[m, pair.prompt] for m in (pair.left, pair.right))
        one = ask(QUESTION.format(prompt=prompt, first=left, second=right))
        other = ask(QUESTION.format(prompt=prompt, first=right, second=left))
        verdict = {(1, 2): "left", (2, 1): "right"}.get((one, other), "tie")
        same += one == other
        judge_pair(folder, pair, rater, verdict, answers=[one, other])
    if same:
        say(f"{judge} chose the same place in both orders of {same} of {len(missing)} pairs, which count as ties")


def ask_model(model: str) -> Callable[[str], int]:
    """Return a function that asks a model which answer is better: the likelier one of 1 and 2."""
    writer = open_writer(model, compile=False, say=lambda line: None)
    ids = [writer.tokenizer.encode_continuation(digit)[-1] for digit in ("1", "2")]
    if ids[0] == ids[1]:
        raise DataError("the model's tokenizer can't tell 1 from 2", at=model)
    device = next(writer.model.parameters()).device

    @torch.no_grad()
    def ask(question: str) -> int:
        prompt = encode(writer, [{"role": "user", "content": question}])
        if len(prompt) > writer.max_length:
            what, expected = "two answers are longer than the judge's positions", f"at most {writer.max_length} tokens"
            raise DataError(what, got=len(prompt), expected=expected, fix="lower --max-new-tokens")
        logits = writer.model(torch.tensor([prompt], device=device), logits_to_keep=1)[0, -1].float()
        return 1 + int(np.argmax(logits[ids].cpu().numpy()))

    return ask


def ask_server(url: str) -> Callable[[str], int]:
    """Return a function that asks a server which answer is better: the last 1 or 2 in what it says.

    Raises MachineError for a server that does not answer, and for one that says neither.
    """
    root = url.rstrip("/")
    root = root if root.endswith("/v1") else f"{root}/v1"
    address, name = f"{root}/chat/completions", None
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError, TypeError):
        response = urllib.request.urlopen(f"{root}/models", timeout=SECONDS)
        name = json.loads(response.read())["data"][0]["id"]  # OpenAI's protocol asks for a name

    def ask(question: str) -> int:
        body: dict[str, Any] = {"messages": [{"role": "user", "content": question}], "temperature": 0}
        body |= {"max_tokens": JUDGE_TOKENS, **({"model": name} if name else {})}
        request = urllib.request.Request(
            address, json.dumps(body).encode(), {"content-type": "application/json"}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as response:
                text = json.load(response)["choices"][0]["message"]["content"] or ""
        except urllib.error.HTTPError as error:
            said = error.read(500).decode("utf-8", "replace")
            raise MachineError("the judging server refuses", at=address, got=f"{error.code}: {said}") from None
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise MachineError("the judging server does not answer", at=address, got=str(error)[:200]) from None
        said = re.findall(r"\b[12]\b", text)
        if not said:
            what, fix = "the judging server says neither 1 nor 2", "choose another judge; what it judged is kept"
            raise MachineError(what, at=address, got=repr(text[-200:]), fix=fix)
        return int(said[-1])

    return ask
