"""Commands that let a model write: generate, chat, serve."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from llmkit.commands.show import AsJson, show, terminal_text

Model = Annotated[str, typer.Argument(help="A run, checkpoint, adapter or Hugging Face folder.")]
MaxNewTokens = Annotated[int, typer.Option(min=1)]
Temperature = Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")]
TopK = Annotated[int, typer.Option(min=0, help="Only the k likeliest tokens; 0: all.")]
TopP = Annotated[float, typer.Option(min=0, max=1, help="Only the likeliest that reach this probability.")]
MinP = Annotated[float, typer.Option(min=0, max=1, help="Only tokens with this share of the likeliest's.")]
Penalty = Annotated[float, typer.Option(min=0.01, max=100, help="Over 1: tokens that were there become less likely.")]
Stop = Annotated[list[str], typer.Option("--stop", help="A text that ends the answer; may be given again.")]
Seed = Annotated[int, typer.Option(min=0, help="The same seed gives the same text.")]
Precision = Annotated[str, typer.Option(help="auto, bf16, fp16 or fp32.")]
Compile = Annotated[
    bool | None, typer.Option("--compile/--no-compile", help="Faster tokens after seconds; default: if it pays.")
]


def generate(
    model: Model,
    prompts: Annotated[list[str], typer.Argument(help="Texts to continue; - reads one from standard input.")],
    max_new_tokens: MaxNewTokens = 200,
    temperature: Temperature = 0.8,
    top_k: TopK = 50,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    stop: Stop = [],
    seed: Seed = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put each prompt through the chat template.")] = False,
    compile: Compile = None,
    precision: Precision = "auto",
    as_json: AsJson = False,
) -> None:
    """Continue PROMPTS; several are written side by side."""
    from llmkit.inference.generate import Sampling
    from llmkit.inference.writer import open_writer

    sampling = Sampling(temperature, top_k or None, top_p, min_p, repetition_penalty)
    writer = open_writer(model, precision=precision, compile=compile, tokens=max_new_tokens, say=to_stderr)
    texts = [sys.stdin.read() if prompt == "-" else prompt for prompt in prompts]
    encode = (lambda text: writer.encode_chat([{"role": "user", "content": text}])) if chat else writer.encode
    options = {"sampling": sampling, "max_new_tokens": max_new_tokens, "stop": stop, "seed": seed, "chat": chat}
    written = writer.write([encode(text) for text in texts], **options)
    if as_json or len(texts) > 1:
        answers = ["".join(text) for text in written]
        rows = [
            {"prompt": prompt, "text": answer, "tokens": len(text.tokens), "ended": text.ended}
            for prompt, answer, text in zip(texts, answers, written, strict=True)
        ]
        show(rows[0] if len(rows) == 1 else {"texts": rows}, as_json) if as_json else print_texts(rows)
        return
    continues = writer.continues and not chat
    print(texts[0] if continues else "", end="", flush=True)
    for piece in written[0]:
        print(terminal_text(piece), end="", flush=True)
    print()
    if written[0].ended == "length" and len(written[0].tokens) < max_new_tokens:
        to_stderr(f"(the model's {writer.longest} positions are full after {len(written[0].tokens)} tokens)")


def print_texts(rows: list[dict]) -> None:
    for row in rows:
        print(f"--- {terminal_text(row['prompt'])}\n{terminal_text(row['text'])}")


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="What the model is told before the first message.")] = None,
    max_new_tokens: MaxNewTokens = 500,
    temperature: Temperature = 0.8,
    top_k: TopK = 50,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    compile: Compile = None,
    precision: Precision = "auto",
) -> None:
    """Talk with a model: a line is a message, /new begins again, /exit or Ctrl-D ends."""
    from llmkit.errors import UserError
    from llmkit.inference.generate import Sampling, tokens_left
    from llmkit.inference.writer import open_writer
    from llmkit.tokenizer.chat_template import CHATML_TEMPLATE, default_template

    sampling = Sampling(temperature, top_k or None, top_p, min_p, repetition_penalty)
    writer = open_writer(model, precision=precision, compile=compile, say=to_stderr)
    if writer.tokenizer.chat_template is None:
        way = "in ChatML" if default_template(writer.tokenizer) == CHATML_TEMPLATE else "in plain text"
        to_stderr(f"this model has no chat template: it is asked {way}, which it may not know")
    begin = [{"role": "system", "content": system}] if system else []
    messages = list(begin)
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line.strip() == "/exit":
            return
        if line.strip() == "/new":
            messages = list(begin)
            continue
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        try:
            ids, dropped = writer.encode_recent(messages, max_new_tokens)
            tokens_left(writer.model, [ids], max_new_tokens)
        except UserError as error:  # the conversation goes on without this message
            to_stderr(str(error))
            messages.pop()
            continue
        if dropped:
            to_stderr(f"({dropped} old messages no longer fit the model's {writer.longest} positions)")
        answer = ""
        options = {"sampling": sampling, "max_new_tokens": max_new_tokens, "seed": seed, "chat": True}
        try:
            for piece in writer.write([ids], **options)[0]:
                print(terminal_text(piece), end="", flush=True)
                answer += piece
        except KeyboardInterrupt:  # enough of this answer
            pass
        print()
        messages.append({"role": "assistant", "content": answer})


def serve(
    model: Model,
    host: Annotated[
        str, typer.Option(help="Another address than this machine's own opens it to others.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the model; default: MODEL.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens that a request may ask for.")] = 2048,
    max_body_kb: Annotated[int, typer.Option(min=1, help="Size that a request may have.")] = 1000,
    max_requests: Annotated[int, typer.Option(min=1, help="Requests that are answered at once.")] = 8,
    compile: Compile = None,
    precision: Precision = "auto",
) -> None:
    """Answer OpenAI's clients at /v1, and show a page to chat at /."""
    from llmkit.errors import MachineError

    try:
        from llmkit.inference import server
    except ImportError as error:
        raise MachineError(f"a server needs {error.name}", fix="pip install 'llmkit[serve]'") from None
    from llmkit.inference.writer import open_writer

    writer = open_writer(model, precision=precision, compile=compile, tokens=5000, say=to_stderr)
    limits = server.Limits(body_bytes=max_body_kb * 1000, new_tokens=max_tokens, at_once=max_requests)
    server.serve(writer, name or model, host, port, limits, to_stderr)
