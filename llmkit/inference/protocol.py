"""OpenAI's protocol: what its clients may ask for, and the shapes in which they expect answers and errors."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from llmkit.errors import UserError
from llmkit.inference.writer import GeneratedText


@dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    body_bytes: int = 1_000_000
    new_tokens: int = 2048
    at_once: int = 8  # requests; more are told to come back
    choices: int = 8  # prompts times `n` of one request


# ---- requests --------------------------------------------------------------------------------------------------------


def only_zero(penalty: float) -> float:
    """OpenAI's two penalties are not built; clients send their default."""
    if penalty:
        raise PydanticCustomError("unbuilt", "only 0 is supported; there is repetition_penalty instead")
    return penalty


Stop = Annotated[str, Field(min_length=1, max_length=256)]
Zero = Annotated[float, AfterValidator(only_zero)]


class SamplingRequest(BaseModel):
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


class CompletionRequest(SamplingRequest):
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


class ChatCompletionRequest(SamplingRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None


class RequestError(Exception):
    """A request that is answered with an error, in OpenAI's shape."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def response(self) -> Response:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        headers = {"retry-after": "1"} if self.status == 429 else None
        return JSONResponse({"error": error}, self.status, headers)


async def read_request(request: Request, kind: type[SamplingRequest], limits: Limits) -> SamplingRequest:
    """The body as a request of this kind; what is too long is never read to its end."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError(415, "the body must be application/json")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > limits.body_bytes:
            raise RequestError(413, f"the body is over {limits.body_bytes} bytes")
    try:
        return TypeAdapter(kind).validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"]) or None
        what = "is not supported" if first["type"] == "extra_forbidden" else first["msg"]
        raise RequestError(400, f"{param or 'the body'}: {what}", param=param) from None


def is_token_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int)


# ---- answers ---------------------------------------------------------------------------------------------------------


class ResponseFormatter:
    """What OpenAI's clients expect around the text."""

    def __init__(self, model: str, chat: bool, prompt_tokens: int):
        self.chat, self.prompt_tokens = chat, prompt_tokens
        self.shared = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, answers: list[str], texts: list[GeneratedText]) -> dict[str, Any]:
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
        self, pieces: AsyncIterator[tuple[int, str]], texts: list[GeneratedText], with_usage: bool
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

    def usage(self, texts: list[GeneratedText]) -> dict[str, int]:
        written = sum(len(text.tokens) for text in texts)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self.prompt_tokens + written,
        }

    def part(self, number: int, said: dict[str, str], ended: str | None = None) -> dict[str, Any]:
        said = {"delta": said} if self.chat else {"text": said.get("text", "")}
        return {"index": number, **said, "logprobs": None, "finish_reason": ended}


def event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()
