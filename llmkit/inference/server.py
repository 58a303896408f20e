"""Serve one model with OpenAI's protocol and a chat page. Needs Starlette and uvicorn (llmkit[serve]).

All tokens are drawn in one thread, in which the requests take turns. Each request has its own KV cache.
"""

import asyncio
import contextlib
import functools
import logging
import random
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from llmkit.errors import MachineError, UserError
from llmkit.generation.sampling import Sampling
from llmkit.inference.connections import WatchedProtocol
from llmkit.inference.logprobs import score_ids
from llmkit.inference.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    Limits,
    RequestError,
    ResponseFormatter,
    SamplingRequest,
    format_logprobs,
    is_token_ids,
    read_field,
    read_request,
)
from llmkit.inference.writer import GeneratedText, Writer
from llmkit.tokenizer.messages import to_messages, to_tools, to_variables

PAGE = Path(__file__).with_name("server.html")
PAGE_HEADERS = {  # it loads nothing from other hosts, connects only to this server, and is shown in no other page
    "content-security-policy": (
        "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class Server:
    """Answer the HTTP requests to a model, and to adapters that share its weights.

    writers  name -> writer; "" is the model, whose name for clients is `name`
    """

    def __init__(self, writers: dict[str, Writer], name: str, limits: Limits):
        if name in writers:
            raise UserError("an adapter has the name of the model", got=name, fix="name it otherwise")
        self.name, self.limits = name, limits
        self.writers = {key or name: writer for key, writer in writers.items()}
        self.executor = ThreadPoolExecutor(1)  # always the same thread, because torch's worker threads belong to it
        self.running = 0
        self.started = int(time.time())

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a slow function in the one thread that draws tokens, so that the event loop is not blocked."""
        return await asyncio.get_running_loop().run_in_executor(self.executor, function, *args)

    @contextlib.contextmanager
    def count_request(self) -> Iterator[None]:
        """Count a request as running inside the context. Raise RequestError 429 if too many are running."""
        if self.running >= self.limits.concurrent_requests:
            raise RequestError(429, f"{self.running} requests are running already", code="rate_limit_exceeded")
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    async def encode(self, function: Callable[[], Any]) -> Any:
        """Run a function that encodes a request, which counts as running while it waits for its token ids."""
        with self.count_request():
            return await self.run(function)

    def warm_up(self) -> None:
        """Draw a few tokens, so that the first request does not wait for the compiler."""
        for writer in self.writers.values():
            [text] = writer.write([writer.encode("a")], sampling=Sampling(temperature=0), max_new_tokens=3)
            self.executor.submit(list, text).result()

    def build_app(self, hosts: set[str]) -> Starlette:
        """Return the application, for requests to `hosts`; see `check_host`."""
        routes = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
        ]
        return Starlette(
            routes=routes,
            middleware=[Middleware(check_host, hosts=hosts)],
            exception_handlers={
                RequestError: lambda request, error: error.response(),
                UserError: lambda request, error: RequestError(400, str(error.what)).response(),
                ClientDisconnect: lambda request, error: Response(status_code=499),  # the client does not read it
                Exception: lambda request, error: RequestError(500, f"{type(error).__name__}: {error}").response(),
                HTTPException: lambda request, error: RequestError(error.status_code, error.detail).response(),
            },
        )

    async def page(self, request: Request) -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=PAGE_HEADERS)

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "running": self.running})

    async def models(self, request: Request) -> Response:
        about = {"object": "model", "created": self.started, "owned_by": "llmkit", "max_tokens": self.limits.new_tokens}
        models = [{"id": name, "max_model_len": one.max_length} | about for name, one in self.writers.items()]
        return JSONResponse({"object": "list", "data": models})

    async def completions(self, request: Request) -> Response:
        body = await read_request(request, CompletionRequest, self.limits)
        prompts = [body.prompt] if isinstance(body.prompt, str) or is_token_ids(body.prompt) else body.prompt
        writer = self.check(body, len(prompts), body.max_tokens)
        if not prompts or not all(prompts):
            raise RequestError(400, "a prompt is empty", param="prompt")
        encode = writer.encode
        ids = await self.encode(lambda: [encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts])
        self.check_prompts(writer, ids)
        decode, top = writer.tokenizer.decode, None if body.logprobs is False else body.logprobs
        echo = [decode(prompt) if isinstance(prompt, list) else prompt for prompt in prompts] if body.echo else None
        return await self.answer(writer, request, body, ids, body.max_tokens, echo=echo, top=top)

    async def chat_completions(self, request: Request) -> Response:
        body = await read_request(request, ChatCompletionRequest, self.limits)
        max_tokens = body.max_tokens or body.max_completion_tokens
        if body.max_tokens and body.max_completion_tokens:
            raise RequestError(400, "max_tokens and max_completion_tokens are both given", param="max_tokens")
        turns = [message.model_dump(exclude_none=True) for message in body.messages]
        messages, _ = read_field("messages", lambda: to_messages(turns, Counter()))
        tools = read_field("tools", lambda: to_tools([tool.model_dump() for tool in body.tools or []]))
        variables = read_field("chat_template_kwargs", lambda: to_variables(body.chat_template_kwargs, None))
        variables |= read_field("documents", lambda: to_variables(None, body.documents))
        if tools and body.tool_choice == "none":
            raise RequestError(400, "the template shows tools: leave them out, if none is to be called", param="tools")
        effort = body.reasoning_effort
        if effort is not None and variables.setdefault("reasoning_effort", effort) != effort:
            raise RequestError(400, "chat_template_kwargs has another reasoning_effort", param="reasoning_effort")
        writer = self.check(body, 1, max_tokens or 1)
        ids = await self.encode(lambda: writer.encode_chat(messages, tools, variables))
        self.check_prompts(writer, [ids])
        max_tokens = max_tokens or max(1, min(self.limits.new_tokens, writer.max_length - len(ids)))
        if body.top_logprobs and not body.logprobs:
            raise RequestError(400, "top_logprobs is given without logprobs", param="top_logprobs")
        top = (body.top_logprobs or 0) if body.logprobs else None
        return await self.answer(writer, request, body, [ids], max_tokens, chat=True, top=top)

    async def answer(
        self,
        writer: Writer,
        request: Request,
        body: SamplingRequest,
        prompts: list[list[int]],
        max_tokens: int,
        *,
        chat: bool = False,
        echo: list[str] | None = None,
        top: int | None = None,
    ) -> Response:
        """Write body.n texts for each prompt, as one response or as server-sent events.

        top  likeliest tokens beside the log-probability of each token; None: no log-probabilities
        """
        if top is not None and (body.stream or not writer.is_causal):
            reason = "with stream" if body.stream else f"for {writer.model.config.model_type}"
            raise RequestError(400, f"logprobs: is not supported {reason}", param="logprobs")
        rows = [prompt for prompt in prompts for _ in range(body.n)]
        top_k = max(body.top_k, 0)
        sampling = Sampling(body.temperature, top_k, body.top_p, body.min_p, body.repetition_penalty)
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        seed = random.getrandbits(31) if body.seed is None else body.seed % 2**31
        options = {"sampling": sampling, "max_new_tokens": max_tokens, "stop": stop, "seed": seed, "chat": chat}
        formatter = ResponseFormatter(body.model or self.name, chat, sum(map(len, prompts)))
        pieces = self.stream_pieces(writer, rows, options, echo and [text for text in echo for _ in range(body.n)])
        texts = await anext(pieces)  # errors are raised here, before the first byte of an answer
        if body.stream:
            with_usage = bool((body.stream_options or {}).get("include_usage"))
            return StreamingResponse(formatter.events(pieces, texts, with_usage), media_type="text/event-stream")
        answers = [""] * len(rows)
        try:
            async for index, piece in pieces:
                answers[index] += piece
                if await request.is_disconnected():
                    raise ClientDisconnect
        finally:
            await pieces.aclose()
        logprobs = None
        if top is not None:
            score = functools.partial(self.score, writer, top=top, chat=chat, echo=echo is not None)
            logprobs = [await self.run(score, row, text.tokens) for row, text in zip(rows, texts, strict=True)]
        return JSONResponse(formatter.whole(answers, texts, logprobs))

    def score(
        self, writer: Writer, prompt: list[int], written: list[int], *, top: int, chat: bool, echo: bool
    ) -> dict[str, Any]:
        """Return the log-probabilities of written tokens, and with `echo` of the prompt's, as answers have them."""
        scores = score_ids(writer.model, prompt + written, 1 if echo else len(prompt), top)
        first_id = prompt[0] if echo else None
        return format_logprobs(writer.tokenizer, scores, chat=chat, first_id=first_id)

    def check(self, body: SamplingRequest, prompts: int, max_tokens: int) -> Writer:
        """Return the writer of a request. Raise RequestError if it exceeds the limits, before any work is done."""
        if body.model not in (None, *self.writers):
            message = f"there is no model {body.model}; this server has {', '.join(self.writers)}"
            raise RequestError(404, message, param="model", code="model_not_found")
        if max_tokens > self.limits.new_tokens:
            raise RequestError(400, f"max_tokens is over this server's {self.limits.new_tokens}", param="max_tokens")
        if body.stream_options and not body.stream:
            raise RequestError(400, "stream_options is given without stream", param="stream_options")
        if prompts * body.n > self.limits.choices:
            raise RequestError(400, f"over {self.limits.choices} answers in one request", param="n")
        return self.writers[body.model or self.name]

    def check_prompts(self, writer: Writer, prompts: list[list[int]]) -> None:
        """Raise RequestError if the model can't read one of the prompts."""
        longest, size = writer.max_length, len(writer.tokenizer)
        if any(not 0 <= token < size for prompt in prompts for token in prompt):
            raise RequestError(400, f"a token id is outside 0..{size - 1}", param="prompt")
        if (most := max(map(len, prompts))) >= longest:
            message = f"the prompt has {most} tokens, but the model only {longest} positions"
            raise RequestError(400, message, code="context_length_exceeded")

    async def stream_pieces(
        self, writer: Writer, rows: list[list[int]], options: dict[str, Any], echo: list[str] | None
    ) -> AsyncIterator[Any]:
        """Yield the list of texts first, then (index of a text, its next piece). Closing it stops the writing."""
        texts: list[GeneratedText] = []
        with self.count_request():
            try:
                texts = await self.run(lambda: writer.write(rows, **options))
                yield texts
                for index, text in enumerate(texts):
                    piece: str | None = echo[index] if echo else ""
                    while piece is not None:
                        yield index, piece
                        piece = await self.run(next, text.pieces, None)
            finally:
                for text in texts:
                    self.executor.submit(text.pieces.close)


def check_host(app: ASGIApp, hosts: set[str]) -> ASGIApp:
    """Return an application that refuses requests to other names, against DNS rebinding. "*" stands for all names."""

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        host = Headers(scope=scope).get("host", "") if scope["type"] == "http" else ""
        name = host.rpartition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
        if scope["type"] == "http" and not {"*", name.lower()} & hosts:
            await RequestError(400, "the Host header names another host").response()(scope, receive, send)
        else:
            await app(scope, receive, send)

    return checked


def serve(
    writers: dict[str, Writer], name: str, host: str, port: int, limits: Limits, say: Callable[[str], None] = print
) -> None:
    """Answer requests until interrupted."""
    listening, address = listen(host, port)
    server = Server(writers, name, limits)
    server.warm_up()
    say(f"{address}  chat page at /, API at /v1/completions and /v1/chat/completions  (Ctrl-C to stop)")
    make_http_server(server.build_app(host_names(host))).run(sockets=[listening])


def listen(host: str, port: int) -> tuple[socket.socket, str]:
    """Return a socket that listens, and its address for a browser. Raise MachineError if that is not possible."""
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, TypeError, ValueError) as error:  # the latter for names that can be none
        what, fix = f"the server can't listen: {getattr(error, 'strerror', None) or error}", "choose another --port"
        raise MachineError(what, at=f"{host}:{port}", fix=fix) from None
    return listening, f"http://{f'[{host}]' if ':' in host else host}:{port}"


def host_names(host: str) -> set[str]:
    """Return the names by which clients may ask for a server that listens on a host, for `check_host`."""
    if host in ("0.0.0.0", "::"):
        return {"*"}
    return {(f"[{host}]" if ":" in host else host).lower(), "127.0.0.1", "localhost", "[::1]"}


def make_http_server(app: Starlette) -> uvicorn.Server:
    """Return a server for an application, to run with a socket of `listen`."""
    options = {"http": WatchedProtocol, "ws": "none", "log_level": "warning", "timeout_graceful_shutdown": 1}
    http_server = uvicorn.Server(uvicorn.Config(app, **options))
    handle_exit = http_server.handle_exit

    def exit_quietly(signal_number: int, frame: FrameType | None) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # answers that are cut off here are no errors
        handle_exit(signal_number, frame)

    http_server.handle_exit = exit_quietly
    return http_server
