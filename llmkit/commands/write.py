"""Define the commands that let a model write: `generate`, `chat` and `serve`."""

import sys
from typing import Annotated

import typer

from llmkit.commands.show import AsJson, ModelArg, Precision, show, terminal_text, to_stderr
from llmkit.generation.sampling import CHAT_MAX_NEW_TOKENS, GENERATE_MAX_NEW_TOKENS, Sampling

MaxNewTokens = Annotated[int, typer.Option(min=1)]
Temperature = Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")]
TopK = Annotated[int, typer.Option(min=0, help="Only the k likeliest tokens; 0: all.")]
TopP = Annotated[float, typer.Option(min=0, max=1, help="Only the likeliest tokens that reach this probability.")]
MinP = Annotated[float, typer.Option(min=0, max=1, help="Only tokens with this fraction of the top probability.")]
Penalty = Annotated[float, typer.Option(min=0.01, max=100, help="Above 1: repeated tokens become less likely.")]
Stop = Annotated[list[str], typer.Option("--stop", help="A text that ends the answer. May be repeated.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="The same seed gives the same text.")]
Adapters = Annotated[list[str], typer.Option("--adapter", help="NAME=ADAPTER, trained on MODEL. May be repeated.")]
Compile = Annotated[
    bool | None, typer.Option("--compile/--no-compile", help="Faster tokens after some seconds; default: if it pays.")
]


def parse_adapters(given: list[str]) -> dict[str, str]:
    """Return name -> adapter of the options NAME=ADAPTER."""
    from llmkit.errors import UserError

    pairs = [one.partition("=")[::2] for one in given]
    for name, adapter in pairs:
        if not name or not adapter or [key for key, _ in pairs].count(name) > 1:
            raise UserError("--adapter is NAME=ADAPTER, each name once", got=f"{name}={adapter}")
    return dict(pairs)


def generate(
    model: ModelArg,
    prompts: Annotated[list[str], typer.Argument(help="Texts to continue; - reads one from standard input.")],
    max_new_tokens: MaxNewTokens = GENERATE_MAX_NEW_TOKENS,
    temperature: Temperature = Sampling.temperature,
    top_k: TopK = Sampling.top_k,
    top_p: TopP = Sampling.top_p,
    min_p: MinP = Sampling.min_p,
    repetition_penalty: Penalty = Sampling.repetition_penalty,
    stop: Stop = [],
    seed: Seed = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put each prompt through the chat template.")] = False,
    compile: Compile = None,
    precision: Precision = "auto",
    as_json: AsJson = False,
) -> None:
    """Continue PROMPTS; several are written side by side."""
    from llmkit.inference.writer import open_writer

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    options = {"expected_tokens": max_new_tokens, "prompts": len(prompts), "say": to_stderr}
    writer = open_writer(model, precision=precision, compile=compile, **options)
    texts = [(sys.stdin.read() if sys.stdin else "") if prompt == "-" else prompt for prompt in prompts]
    encode = (lambda text: writer.encode_chat([{"role": "user", "content": text}])) if chat else writer.encode
    options = {"sampling": sampling, "max_new_tokens": max_new_tokens, "stop": stop, "seed": seed, "chat": chat}
    continues = writer.is_causal and not chat
    written = writer.write([encode(text) for text in texts], **options)
    if as_json or len(texts) > 1:
        answers = ["".join(text) for text in written]
        rows = [
            {"prompt": prompt, "text": answer, "tokens": len(text.tokens), "ended": text.ended}
            for prompt, answer, text in zip(texts, answers, written, strict=True)
        ]
        if as_json:
            show(rows[0] if len(rows) == 1 else {"texts": rows}, as_json)
            return
        between = "" if continues else "\n"
        print("\n---\n".join(terminal_text(row["prompt"] + between + row["text"]) for row in rows))
        return
    print(terminal_text(texts[0]) if continues else "", end="", flush=True)
    for piece in written[0]:
        print(terminal_text(piece), end="", flush=True)
    print()
    if written[0].ended == "length" and len(written[0].tokens) < max_new_tokens:
        to_stderr(f"(the model's {writer.max_length} positions are full after {len(written[0].tokens)} tokens)")


def chat(
    model: ModelArg,
    system: Annotated[str | None, typer.Option(help="A system message, which comes before the first message.")] = None,
    max_new_tokens: MaxNewTokens = CHAT_MAX_NEW_TOKENS,
    temperature: Temperature = Sampling.temperature,
    top_k: TopK = Sampling.top_k,
    top_p: TopP = Sampling.top_p,
    min_p: MinP = Sampling.min_p,
    repetition_penalty: Penalty = Sampling.repetition_penalty,
    seed: Seed = 0,
    adapter: Adapters = [],
    compile: Compile = None,
    precision: Precision = "auto",
) -> None:
    """Talk with a model: each line is a message, /new starts over, /adapter NAME takes another one, /exit ends."""
    from llmkit.errors import UserError
    from llmkit.generation.generate import count_new_tokens
    from llmkit.inference.writer import open_writers
    from llmkit.tokenizer.chat_template import describe_template

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    adapters = parse_adapters(adapter)
    writers = open_writers(model, adapters, precision=precision, compile=compile, say=to_stderr)
    writer = writers[""]
    if writer.tokenizer.chat_template is None:
        form = describe_template(writer.tokenizer)
        to_stderr(f"this model has no chat template: messages are formatted by {form}, which it may not know")
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
        if line.split()[:1] == ["/adapter"]:
            name = line.strip().removeprefix("/adapter").strip()
            if name in writers:
                writer = writers[name]
                to_stderr(f"({name or 'no adapter'} answers from here on)")
            else:
                to_stderr(f"(there is no adapter {name}: there is {', '.join(adapters) or 'none'})")
            continue
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        try:
            ids, dropped = writer.encode_recent(messages, max_new_tokens)
            count_new_tokens(writer.model, [ids], max_new_tokens)  # raises an error if the message alone is too long
        except UserError as error:  # the conversation continues without this message
            to_stderr(str(error))
            messages.pop()
            continue
        if dropped:
            to_stderr(f"({dropped} old messages no longer fit the model's {writer.max_length} positions)")
        answer = ""
        options = {"sampling": sampling, "max_new_tokens": max_new_tokens, "seed": seed, "chat": True}
        try:
            for piece in writer.write([ids], **options)[0]:
                print(terminal_text(piece), end="", flush=True)
                answer += piece
        except KeyboardInterrupt:  # ends this answer, not the conversation
            pass
        print()
        messages.append({"role": "assistant", "content": answer})


def serve(
    model: ModelArg,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 127.0.0.1 can be reached from this machine only.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="Name of the model for clients; default: MODEL.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens in a request.")] = 2048,
    max_body_kb: Annotated[int, typer.Option(min=1, help="Largest body of a request.")] = 1000,
    max_requests: Annotated[int, typer.Option(min=1, help="Most requests at the same time.")] = 8,
    adapter: Adapters = [],
    compile: Compile = None,
    precision: Precision = "auto",
) -> None:
    """Serve OpenAI's protocol at /v1, and a chat page at /."""
    from llmkit.errors import MachineError

    try:
        from llmkit.inference import server
    except ImportError as error:
        raise MachineError(f"a server needs {error.name}", fix="pip install 'llmkit[serve]'") from None
    from llmkit.inference.writer import open_writers

    options = {"precision": precision, "compile": compile, "expected_tokens": 5000, "say": to_stderr}
    writers = open_writers(model, parse_adapters(adapter), **options)
    limits = server.Limits(body_bytes=max_body_kb * 1000, new_tokens=max_tokens, concurrent_requests=max_requests)
    server.serve(writers, name or model, host, port, limits, to_stderr)
