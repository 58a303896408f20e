"""An OpenAI-compatible server for one model, and a page to talk with it. Starlette and uvicorn, an extra.

All tokens are drawn in one thread, where the requests take turns; each has a cache of its own.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from llmkit.errors import MachineError, UserError
from llmkit.inference.generate import Sampling
from llmkit.inference.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    Limits,
    RequestError,
    ResponseFormatter,
    SamplingRequest,
    is_token_ids,
    read_request,
)
from llmkit.inference.writer import GeneratedText, Writer

PAGE = Path(__file__).with_name("server.html")
# The page loads nothing from elsewhere and talks to this server alone.
PAGE_POLICY = "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"


class Server:
    """The routes of one model."""

    def __init__(self, writer: Writer, name: str, limits: Limits):
        self.writer, self.name, self.limits = writer, name, limits
        self.thread = ThreadPoolExecutor(1)  # torch's own threads belong to the one that starts them
        self.running = 0
        self.started = int(time.time())

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """What takes time is done in the one thread that draws tokens, so that the server goes on listening."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, function, *args)

    def enter(self) -> None:
        """Count a request as one that is being answered, or refuse it."""
        if self.running >= self.limits.at_once:
            raise RequestError(429, f"{self.running} requests are being answered", code="rate_limit_exceeded")
        self.running += 1

    async def encode(self, function: Callable[[], Any]) -> Any:
        """What a request is in ids; it counts as one while it waits for them too."""
        self.enter()
        try:
            return await self.run(function)
        finally:
            self.running -= 1

    def warm_up(self) -> None:
        """Draw a few tokens, so that the first request does not wait for a compiler."""
        options = {"sampling": Sampling(temperature=0), "max_new_tokens": 3}
        write = lambda: list(self.writer.write([self.writer.encode("a")], **options)[0])  # noqa: E731
        self.thread.submit(write).result()

    def app(self, hosts: list[str]) -> Starlette:
        """hosts: names under which it may be reached; a foreign page that points its own name here is refused."""
        routes = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
        ]
        return Starlette(
            routes=routes,
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
            exception_handlers={
                RequestError: lambda request, error: error.response(),
                UserError: lambda request, error: RequestError(400, str(error.what)).response(),
                ClientDisconnect: lambda request, error: Response(status_code=499),  # nobody reads it
                Exception: lambda request, error: RequestError(500, f"{type(error).__name__}: {error}").response(),
                HTTPException: lambda request, error: RequestError(error.status_code, error.detail).response(),
            },
        )

    async def page(self, request: Request) -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"content-security-policy": PAGE_POLICY})

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "running": self.running})

    async def models(self, request: Request) -> Response:
        one = {"id": self.name, "object": "model", "created": self.started, "owned_by": "llmkit"}
        limits = {"max_model_len": self.writer.longest, "max_tokens": self.limits.new_tokens}
        return JSONResponse({"object": "list", "data": [one | limits]})

    async def completions(self, request: Request) -> Response:
        asked = await read_request(request, CompletionRequest, self.limits)
        prompts = [asked.prompt] if isinstance(asked.prompt, str) or is_token_ids(asked.prompt) else asked.prompt
        self.check(asked, len(prompts), asked.max_tokens)
        to_ids = lambda one: self.writer.encode(one) if isinstance(one, str) else one  # noqa: E731
        ids = await self.encode(lambda: list(map(to_ids, prompts)))
        self.check_prompts(ids)
        before = [self.writer.tokenizer.decode(prompt) if isinstance(prompt, list) else prompt for prompt in prompts]
        return await self.answer(request, asked, ids, asked.max_tokens, before=before if asked.echo else None)

    async def chat_completions(self, request: Request) -> Response:
        asked = await read_request(request, ChatCompletionRequest, self.limits)
        if asked.max_tokens and asked.max_completion_tokens:
            raise RequestError(400, "max_tokens and max_completion_tokens are both given", param="max_tokens")
        messages = []
        for message in asked.messages:
            parts = [message.content] if isinstance(message.content, str) else [part.text for part in message.content]
            role = "system" if message.role == "developer" else message.role
            messages.append({"role": role, "content": "".join(parts)})
        self.check(asked, 1, asked.max_tokens or asked.max_completion_tokens or 1)
        ids = await self.encode(lambda: self.writer.encode_chat(messages))
        self.check_prompts([ids])
        room = max(1, min(self.limits.new_tokens, self.writer.longest - len(ids)))
        tokens = asked.max_tokens or asked.max_completion_tokens or room
        return await self.answer(request, asked, [ids], tokens, chat=True)

    async def answer(
        self,
        request: Request,
        asked: SamplingRequest,
        prompts: list[list[int]],
        max_tokens: int,
        *,
        chat: bool = False,
        before: list[str] | None = None,
    ) -> Response:
        """Write what was asked for, whole or as server-sent events."""
        rows = [prompt for prompt in prompts for _ in range(asked.n)]
        sampling = Sampling(
            asked.temperature,
            asked.top_k if asked.top_k > 0 else None,
            asked.top_p,
            asked.min_p,
            asked.repetition_penalty,
        )
        stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
        seed = random.getrandbits(31) if asked.seed is None else asked.seed % 2**31
        options = {"sampling": sampling, "max_new_tokens": max_tokens, "stop": stop, "seed": seed, "chat": chat}
        frame = ResponseFormatter(self.name, chat, sum(map(len, prompts)))
        pieces = self.pieces(rows, options, before and [text for text in before for _ in range(asked.n)])
        texts = await anext(pieces)  # errors come before the first byte of an answer
        if asked.stream:
            with_usage = bool((asked.stream_options or {}).get("include_usage"))
            return StreamingResponse(frame.events(pieces, texts, with_usage), media_type="text/event-stream")
        said = [""] * len(rows)
        try:
            async for number, piece in pieces:
                said[number] += piece
                if await request.is_disconnected():
                    raise ClientDisconnect
        finally:
            await pieces.aclose()
        return JSONResponse(frame.whole(said, texts))

    def check(self, asked: SamplingRequest, prompts: int, max_tokens: int) -> None:
        """Refuse what these limits do not allow, before any work is done for it."""
        if asked.model not in (None, self.name):
            message = f"the model {asked.model} is not here; this server has {self.name}"
            raise RequestError(404, message, param="model", code="model_not_found")
        if max_tokens > self.limits.new_tokens:
            raise RequestError(400, f"max_tokens is over this server's {self.limits.new_tokens}", param="max_tokens")
        if asked.stream_options and not asked.stream:
            raise RequestError(400, "stream_options is given without stream", param="stream_options")
        if prompts * asked.n > self.limits.choices:
            raise RequestError(400, f"over {self.limits.choices} answers in one request", param="n")

    def check_prompts(self, prompts: list[list[int]]) -> None:
        """Refuse what this model can't read."""
        longest, size = self.writer.longest, len(self.writer.tokenizer)
        if not prompts or not all(prompts):
            raise RequestError(400, "a prompt is empty", param="prompt")
        if any(not 0 <= token < size for prompt in prompts for token in prompt):
            raise RequestError(400, f"a token id is not below {size}", param="prompt")
        if (most := max(map(len, prompts))) >= longest:
            message = f"the prompt has {most} tokens, and the model at most {longest} positions"
            raise RequestError(400, message, code="context_length_exceeded")

    async def pieces(
        self, rows: list[list[int]], options: dict[str, Any], before: list[str] | None
    ) -> AsyncIterator[Any]:
        """First the Texts, then (which of them, its next piece); what is not read to its end is not written further."""
        self.enter()
        texts: list[GeneratedText] = []
        try:
            texts = await self.run(lambda: self.writer.write(rows, **options))
            yield texts
            for number, text in enumerate(texts):
                piece: str | None = before[number] if before else ""
                while piece is not None:
                    yield number, piece
                    piece = await self.run(next, text.pieces, None)
        finally:
            self.running -= 1
            for text in texts:
                self.thread.submit(text.pieces.close)


def serve(writer: Writer, name: str, host: str, port: int, limits: Limits, say: Callable[[str], None] = print) -> None:
    """Answer until interrupted."""
    import uvicorn

    hosts = ["*"] if host in ("0.0.0.0", "::") else list({host, "127.0.0.1", "localhost", "[::1]"})
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise MachineError(
            f"the server can't listen: {error.strerror or error}", at=f"{host}:{port}", fix="choose another --port"
        ) from None
    server = Server(writer, name, limits)
    server.warm_up()
    address = f"[{host}]" if ":" in host else host
    say(f"http://{address}:{port}  a page to chat; /v1/completions, /v1/chat/completions  (Ctrl-C ends)")
    config = uvicorn.Config(server.app(hosts), log_level="warning", timeout_graceful_shutdown=1)
    running = uvicorn.Server(config)
    leave = running.handle_exit

    def leave_quietly(number: int, frame: FrameType | None) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # answers that are cut off are no news
        leave(number, frame)

    running.handle_exit = leave_quietly
    running.run(sockets=[listening])
