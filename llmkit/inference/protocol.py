"""Define OpenAI's protocol: the requests that are accepted, and the format of answers and errors."""

import itertools
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from llmkit.errors import UserError
from llmkit.generation.sampling import Sampling
from llmkit.inference.logprobs import TokenLogprob, token_texts
from llmkit.inference.writer import GeneratedText
from llmkit.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Limits:
    """Hold the limits for requests."""

    body_bytes: int
    new_tokens: int
    concurrent_requests: int  # further ones get status 429
    choices: int = 8  # number of prompts times `n`, in one request


# ---- requests --------------------------------------------------------------------------------------------------------


def check_zero(penalty: float) -> float:
    """Return the penalty if it is 0, which clients send by default; refuse any other value."""
    if penalty:
        raise PydanticCustomError("unsupported", "only 0 is supported, use repetition_penalty instead")
    return penalty


def check_unset(value: Any) -> Any:
    """Return a value that turns an option off, as clients send by default; refuse any other."""
    if value:
        raise PydanticCustomError("unsupported", "is not supported, leave it out")
    return value


TopLogprobs = Annotated[int, Field(ge=0, le=20)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]


Zero = Annotated[float, AfterValidator(check_zero)]
Unset = Annotated[Any, AfterValidator(check_unset)]


class StrictModel(BaseModel):
    """Refuse unknown fields, because ignoring one would change the meaning of the request. A null is no value."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def read_values(cls, fields: Any) -> Any:
        """Leave out the fields that are null, which clients send for all that they do not set; read 3.0 as 3."""
        if not isinstance(fields, dict):
            return fields
        whole = {k: int(v) for k, v in fields.items() if isinstance(v, float) and v.is_integer()}
        return {k: v for k, v in (fields | whole).items() if v is not None}


class SamplingRequest(StrictModel):
    """Hold the fields that both kinds of requests share: OpenAI's, and vLLM's for further sampling options."""

    model: str | None = None  # None: the model of this server
    n: Annotated[int, Field(ge=1)] = 1
    stream: bool = False
    stream_options: dict[Literal["include_usage"], bool] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    seed: int | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0  # the protocol's default
    top_p: Annotated[float, Field(gt=0, le=1)] = Sampling.top_p
    top_k: Annotated[int, Field(ge=-1)] = 0  # the protocol's default; 0 and -1: all
    min_p: Annotated[float, Field(ge=0, le=1)] = Sampling.min_p
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = Sampling.repetition_penalty
    presence_penalty: Zero = 0
    frequency_penalty: Zero = 0
    logit_bias: Unset = None
    store: Unset = None
    service_tier: Literal["auto", "default"] | None = None
    user: str | None = None  # accepted, not used
    metadata: dict[str, str] | None = None  # accepted, not used


class CompletionRequest(SamplingRequest):
    """Hold a request to POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=1)] = 16
    echo: bool = False
    logprobs: TopLogprobs | Literal[False] | None = None  # of the written tokens, with echo also of the prompt's


class TextPart(StrictModel):
    type: Literal["text"]
    text: str


class FunctionCall(StrictModel):
    name: str
    arguments: str | dict[str, Any] = ""


class ToolCall(StrictModel):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None  # of a streamed call; not used


class Message(StrictModel):
    """Hold one message; `messages.to_messages` checks what fits its role."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: FunctionCall | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    annotations: Annotated[list, Field(max_length=0)] | None = None  # what OpenAI's answers have, sent back


class Function(BaseModel):
    """Hold a function that may be called; the template gets all that it has."""

    model_config = ConfigDict(extra="allow", strict=True)
    name: str


class Tool(StrictModel):
    type: Literal["function"] = "function"
    function: Function


class ChatCompletionRequest(SamplingRequest):
    """Hold a request to POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    logprobs: bool = False
    top_logprobs: TopLogprobs | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    reasoning_effort: str | None = None  # a variable of the chat template
    chat_template_kwargs: dict[str, Any] | None = None  # as in vLLM: further variables
    documents: list[dict[str, Any]] | None = None  # as in vLLM
    modalities: list[Literal["text"]] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None


class RequestError(Exception):
    """An error that answers a request, in OpenAI's format."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def response(self) -> Response:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        headers = {"retry-after": "1"} if self.status == 429 else None
        return JSONResponse({"error": error}, self.status, headers)


def read_field(name: str, read: Callable[[], Any]) -> Any:
    """Return what a function makes of a field. Raise RequestError with the field's name for its ValueError."""
    try:
        return read()
    except ValueError as error:
        raise RequestError(400, str(error), param=name) from None


async def read_request(request: Request, kind: type[SamplingRequest], limits: Limits) -> SamplingRequest:
    """Read and check a request's body. Raise RequestError if it is invalid, or as soon as it is too large."""
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
        problem = "is not supported" if first["type"] == "extra_forbidden" else first["msg"]
        raise RequestError(400, f"{param or 'the body'}: {problem}", param=param) from None


def is_token_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int)


# ---- answers ---------------------------------------------------------------------------------------------------------


class ResponseFormatter:
    """Put texts into OpenAI's format for answers."""

    def __init__(self, model: str, chat: bool, prompt_tokens: int):
        self.chat, self.prompt_tokens = chat, prompt_tokens
        self.shared = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(
        self, answers: list[str], texts: list[GeneratedText], logprobs: list[dict[str, Any]] | None = None
    ) -> dict[str, Any]:
        """Return the response body for answers that are complete, and their log-probabilities in its format."""
        contents = [{"message": {"role": "assistant", "content": a}} if self.chat else {"text": a} for a in answers]
        choices = [
            {"index": i, **content, "logprobs": logprobs and logprobs[i], "finish_reason": text.ended}
            for i, (content, text) in enumerate(zip(contents, texts, strict=True))
        ]
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.shared, "object": kind, "choices": choices, "usage": self.usage(texts)}

    async def events(
        self, pieces: AsyncIterator[tuple[int, str]], texts: list[GeneratedText], with_usage: bool
    ) -> AsyncIterator[bytes]:
        """Yield the answers as server-sent events while they are written."""
        current: int | None = None  # index of the answer that is being written
        try:
            async for index, piece in pieces:
                if self.chat and index != current:
                    yield self.chunk(index, {"role": "assistant", "content": ""})
                if current is not None and index != current:
                    yield self.chunk(current, {}, texts[current].ended)
                current = index
                if piece:
                    yield self.chunk(index, {"content": piece} if self.chat else {"text": piece})
            if current is not None:
                yield self.chunk(current, {}, texts[current].ended)
            if with_usage:
                yield self.chunk_event([], usage=self.usage(texts))
            yield event("[DONE]")
        except UserError as error:  # the status was sent before the answer began
            yield event(json.dumps({"error": {"message": str(error.what), "type": "server_error"}}))
        finally:
            await pieces.aclose()

    def chunk(self, index: int, content: dict[str, str], ended: str | None = None) -> bytes:
        """Return the event for a part of one answer."""
        content = {"delta": content} if self.chat else {"text": content.get("text", "")}
        return self.chunk_event([{"index": index, **content, "logprobs": None, "finish_reason": ended}])

    def chunk_event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return event(json.dumps({**self.shared, "object": kind, "choices": choices, **more}))

    def usage(self, texts: list[GeneratedText]) -> dict[str, int]:
        written = sum(len(text.tokens) for text in texts)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self.prompt_tokens + written,
        }


def format_logprobs(
    tokenizer: Tokenizer, scores: list[TokenLogprob], *, chat: bool, first_id: int | None = None
) -> dict[str, Any]:
    """Return the log-probabilities of tokens in the format of an answer.

    first_id  a first token, which nothing is before, so that it has no log-probability: of a prompt that is echoed
    """
    ids = ([] if first_id is None else [first_id]) + [one.id for one in scores]
    texts = token_texts(tokenizer, ids)
    if chat:

        def entry(text: str, log_prob: float) -> dict[str, Any]:
            whole = "\ufffd" not in text  # else it is a part of a character, whose bytes a text does not tell
            return {"token": text, "logprob": log_prob, "bytes": list(text.encode()) if whole else None}

        content = [
            entry(text, one.log_prob) | {"top_logprobs": [entry(tokenizer.decode([i]), p) for i, p in one.top]}
            for one, text in zip(scores, texts, strict=True)
        ]
        return {"content": content, "refusal": None}
    # Likeliest tokens have their own text as a key: where two have the same, the likelier one is kept.
    top = [{tokenizer.decode([i]): p for i, p in reversed(one.top)} for one in scores]
    own = [tokenizer.decode([i]) for i in ids]
    missing = [] if first_id is None else [None]
    return {
        "tokens": own,
        "token_logprobs": missing + [one.log_prob for one in scores],
        "top_logprobs": missing + top,
        "text_offset": list(itertools.accumulate(map(len, texts[:-1]), initial=0)) if texts else [],
    }


def event(data: str) -> bytes:
    """Return a server-sent event."""
    return f"data: {data}\n\n".encode()
