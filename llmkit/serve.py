"""An OpenAI-compatible server for one model, and a page to talk with it. Starlette and uvicorn, an extra.

All tokens are drawn in one thread, where the requests take turns; each has a cache of its own.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from llmkit.errors import ENVIRONMENT, UserError
from llmkit.generate import Sampling
from llmkit.talk import Text, Writer

PAGE = Path(__file__).with_name("serve.html")
# The page loads nothing from elsewhere and talks to this server alone.
PAGE_POLICY = "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    body_bytes: int = 1_000_000
    new_tokens: int = 2048
    at_once: int = 8  # requests; more are told to come back
    choices: int = 8  # prompts times `n` of one request


# ---- requests -------------------------------------------------------------------------------------------------------


def only_zero(penalty: float) -> float:
    """OpenAI's two penalties are not built; clients send their default."""
    if penalty:
        raise PydanticCustomError("unbuilt", "only 0 is supported; there is repetition_penalty instead")
    return penalty


Stop = Annotated[str, Field(min_length=1, max_length=256)]
Zero = Annotated[float, AfterValidator(only_zero)]


class Asked(BaseModel):
    """What both kinds of requests share: OpenAI's fields, and vLLM's for the rest of the sampling.

    A field that is not here is refused, for to ignore it would answer another question.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str | None = None  # this one, whatever it is called here
    n: Annotated[int, Field(ge=1)] = 1
    stream: bool = False
    stream_options: dict[Literal["include_usage"], bool] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    seed: int | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = 0  # 0 and -1: all
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    presence_penalty: Zero = 0
    frequency_penalty: Zero = 0
    user: str | None = None  # who asks: nothing depends on it


class Completion(Asked):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=1)] = 16
    echo: bool = False


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]


class ChatCompletion(Asked):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None


class Refused(Exception):
    """A request that is answered with an error, in OpenAI's shape."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def response(self) -> Response:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        headers = {"retry-after": "1"} if self.status == 429 else None
        return JSONResponse({"error": error}, self.status, headers)


async def read_request(request: Request, kind: type[Asked], limits: Limits) -> Asked:
    """The body as a request of this kind; what is too long is never read to its end."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "the body must be application/json")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > limits.body_bytes:
            raise Refused(413, f"the body is over {limits.body_bytes} bytes")
    try:
        return TypeAdapter(kind).validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"]) or None
        what = "is not supported" if first["type"] == "extra_forbidden" else first["msg"]
        raise Refused(400, f"{param or 'the body'}: {what}", param=param) from None


# ---- answers --------------------------------------------------------------------------------------------------------


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
            raise Refused(429, f"{self.running} requests are being answered", code="rate_limit_exceeded")
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
            routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
            exception_handlers={
                Refused: lambda request, error: error.response(),
                UserError: lambda request, error: Refused(400, str(error.what)).response(),
                ClientDisconnect: lambda request, error: Response(status_code=499),  # nobody reads it
                Exception: lambda request, error: Refused(500, f"{type(error).__name__}: {error}").response(),
                HTTPException: lambda request, error: Refused(error.status_code, error.detail).response(),
            },
        )  # fmt: skip

    async def page(self, request: Request) -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"content-security-policy": PAGE_POLICY})

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "running": self.running})

    async def models(self, request: Request) -> Response:
        one = {"id": self.name, "object": "model", "created": self.started, "owned_by": "llmkit"}
        limits = {"max_model_len": self.writer.longest, "max_tokens": self.limits.new_tokens}
        return JSONResponse({"object": "list", "data": [one | limits]})

    async def completions(self, request: Request) -> Response:
        asked = await read_request(request, Completion, self.limits)
        prompts = [asked.prompt] if isinstance(asked.prompt, str) or is_ids(asked.prompt) else asked.prompt
        self.check(asked, len(prompts), asked.max_tokens)
        to_ids = lambda one: self.writer.encode(one) if isinstance(one, str) else one  # noqa: E731
        ids = await self.encode(lambda: list(map(to_ids, prompts)))
        self.check_prompts(ids)
        before = [self.writer.tokenizer.decode(prompt) if isinstance(prompt, list) else prompt for prompt in prompts]
        return await self.answer(request, asked, ids, asked.max_tokens, before=before if asked.echo else None)

    async def chat_completions(self, request: Request) -> Response:
        asked = await read_request(request, ChatCompletion, self.limits)
        if asked.max_tokens and asked.max_completion_tokens:
            raise Refused(400, "max_tokens and max_completion_tokens are both given", param="max_tokens")
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
        self, request: Request, asked: Asked, prompts: list[list[int]], max_tokens: int, *, chat: bool = False,
        before: list[str] | None = None,
    ) -> Response:  # fmt: skip
        """Write what was asked for, whole or as server-sent events."""
        rows = [prompt for prompt in prompts for _ in range(asked.n)]
        sampling = Sampling(
            asked.temperature, asked.top_k if asked.top_k > 0 else None, asked.top_p, asked.min_p,
            asked.repetition_penalty,
        )  # fmt: skip
        stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
        seed = random.getrandbits(31) if asked.seed is None else asked.seed % 2**31
        options = {"sampling": sampling, "max_new_tokens": max_tokens, "stop": stop, "seed": seed, "chat": chat}
        frame = Frame(self.name, chat, sum(map(len, prompts)))
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

    def check(self, asked: Asked, prompts: int, max_tokens: int) -> None:
        """Refuse what these limits do not allow, before any work is done for it."""
        if asked.model not in (None, self.name):
            message = f"the model {asked.model} is not here; this server has {self.name}"
            raise Refused(404, message, param="model", code="model_not_found")
        if max_tokens > self.limits.new_tokens:
            raise Refused(400, f"max_tokens is over this server's {self.limits.new_tokens}", param="max_tokens")
        if asked.stream_options and not asked.stream:
            raise Refused(400, "stream_options is given without stream", param="stream_options")
        if prompts * asked.n > self.limits.choices:
            raise Refused(400, f"over {self.limits.choices} answers in one request", param="n")

    def check_prompts(self, prompts: list[list[int]]) -> None:
        """Refuse what this model can't read."""
        longest, size = self.writer.longest, len(self.writer.tokenizer)
        if not prompts or not all(prompts):
            raise Refused(400, "a prompt is empty", param="prompt")
        if any(not 0 <= token < size for prompt in prompts for token in prompt):
            raise Refused(400, f"a token id is not below {size}", param="prompt")
        if (most := max(map(len, prompts))) >= longest:
            message = f"the prompt has {most} tokens, and the model at most {longest} positions"
            raise Refused(400, message, code="context_length_exceeded")

    async def pieces(
        self, rows: list[list[int]], options: dict[str, Any], before: list[str] | None
    ) -> AsyncIterator[Any]:
        """First the Texts, then (which of them, its next piece); what is not read to its end is not written further."""
        self.enter()
        texts: list[Text] = []
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


def is_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int)


class Frame:
    """What OpenAI's clients expect around the text."""

    def __init__(self, model: str, chat: bool, prompt_tokens: int):
        self.chat, self.prompt_tokens = chat, prompt_tokens
        self.shared = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model,
        }  # fmt: skip

    def whole(self, answers: list[str], texts: list[Text]) -> dict[str, Any]:
        """The answer in one piece."""
        said = [{"message": {"role": "assistant", "content": a}} if self.chat else {"text": a} for a in answers]
        choices = [
            {"index": i, **one, "logprobs": None, "finish_reason": text.ended}
            for i, (one, text) in enumerate(zip(said, texts, strict=True))
        ]
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.shared, "object": kind, "choices": choices, "usage": self.usage(texts)}

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return event(json.dumps({**self.shared, "object": kind, "choices": choices, **more}))

    async def events(
        self, pieces: AsyncIterator[tuple[int, str]], texts: list[Text], with_usage: bool
    ) -> AsyncIterator[bytes]:
        """The answer as it is written, as server-sent events."""
        open_one: int | None = None  # the answer that is being written
        try:
            async for number, piece in pieces:
                if self.chat and number != open_one:
                    yield self.chunk([self.part(number, {"role": "assistant", "content": ""})])
                if open_one is not None and number != open_one:
                    yield self.chunk([self.part(open_one, {}, texts[open_one].ended)])
                open_one = number
                if piece:
                    yield self.chunk([self.part(number, {"content": piece} if self.chat else {"text": piece})])
            if open_one is not None:
                yield self.chunk([self.part(open_one, {}, texts[open_one].ended)])
            if with_usage:
                yield self.chunk([], usage=self.usage(texts))
            yield event("[DONE]")
        except UserError as error:  # in mid-answer: the status is sent already
            yield event(json.dumps({"error": {"message": str(error.what), "type": "server_error"}}))
        finally:
            await pieces.aclose()

    def usage(self, texts: list[Text]) -> dict[str, int]:
        written = sum(len(text.tokens) for text in texts)
        return {
            "prompt_tokens": self.prompt_tokens, "completion_tokens": written,
            "total_tokens": self.prompt_tokens + written,
        }  # fmt: skip

    def part(self, number: int, said: dict[str, str], ended: str | None = None) -> dict[str, Any]:
        said = {"delta": said} if self.chat else {"text": said.get("text", "")}
        return {"index": number, **said, "logprobs": None, "finish_reason": ended}


def event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()


def serve(writer: Writer, name: str, host: str, port: int, limits: Limits, say: Callable[[str], None] = print) -> None:
    """Answer until interrupted."""
    import uvicorn

    hosts = ["*"] if host in ("0.0.0.0", "::") else list({host, "127.0.0.1", "localhost", "[::1]"})
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(
            f"the server can't listen: {error.strerror or error}", at=f"{host}:{port}", fix="choose another --port",
            code=ENVIRONMENT,
        ) from None  # fmt: skip
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
