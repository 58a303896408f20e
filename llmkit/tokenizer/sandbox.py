"""Render chat templates in a process of its own, which the system ends when it takes too much time or memory.

A chat template comes from a stranger's model, and the sandbox of jinja2 bounds neither. This file is the program of
that process: it imports nothing but jinja2 and the standard library. `renderer.py` starts it and talks to it.

It reads requests from the connection that its argument names, and answers each: both are JSON.
A request is {template, date, jobs: [job, ...]}, and a job {messages, variables, renderings: [[number of messages,
add_generation_prompt], ...], mark: whether to find the contents, if the template does not mark answers itself: then
the other renderings tell nothing, and are left out}.
An answer is a list with one entry for each job. It is {texts, spans, places}: texts are [[characters shared with the
text before, rest] or null where the template fails, ...], spans what stands in {% generation %} in the first one, and
places [start, stop] of each content that is not blank in it, or null. Or it is {error: kind, reason: text} with a kind
of "syntax", "limit" or "refusal" (the template rejects all messages together). A request that is too large as a whole
has one such error.

A request {template, jobs: [variables, ...]} without a date is that of a task's template; see `render_task`.
"""

import json
import re
import resource
import signal
import sys
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from itertools import accumulate
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_SECONDS, MEMORY, CHARACTERS = 2.0, 400 * 2**20, 10_000_000  # limits for a job; memory on top of the start's
START, STOP = "\ufdd1", "\ufdd2"  # noncharacters, which no text has, before and after a content
GENERATION = re.compile("[\ufdd3\ufdd4]")  # where {% generation %} starts and ends
TOO_LONG = {"error": "limit", "reason": f"renders more than {CHARACTERS // 10**6} million characters"}
TOO_MUCH = {"error": "limit", "reason": "gets or renders too much text"}
LONGEST_REASON = 300  # characters; `raise_exception` takes any text


class Generation(Extension):
    """Render what stands between {% generation %} and {% endgeneration %}, the marks of answers, with GENERATION."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        start, stop = (nodes.Output([nodes.TemplateData(mark)]).set_lineno(line) for mark in "\ufdd3\ufdd4")
        return [start, *body, stop]


@lru_cache(8)
def compile_template(source: str, date: str | None) -> Template:
    """Compile a chat template with the functions that transformers gives it. Raise TemplateSyntaxError.

    date  the day that `strftime_now` takes for today, as 2026-01-31; None: today
    """
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])

    def raise_exception(message: str) -> None:
        raise ValueError(message)  # templates call it for conversations that they do not support

    def tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        return (datetime.fromisoformat(date) if date else datetime.now()).strftime(form)

    env.filters["tojson"] = tojson  # jinja2's own escapes HTML
    env.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return env.from_string(source)


@lru_cache(8)
def compile_task_template(source: str) -> Template:
    """Compile a template of a task with what lm-evaluation-harness gives it. Raise TemplateSyntaxError."""
    env = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)

    def regex_replace(text: str, pattern: str, replacement: str, count: int = 0) -> str:
        return re.sub(pattern, replacement, text, count=count)

    env.filters["regex_replace"] = regex_replace
    return env.from_string(source)


def render_task(template: str, variables: dict[str, Any]) -> dict[str, Any]:
    """Return {text}, what a template of a task makes of a record, or an error as `render` does."""
    kind = "syntax"
    try:
        compiled = compile_task_template(template)
        kind = "refusal"
        text = compiled.render(variables)
    except Exception as error:  # a template can raise any error
        return describe_error(error, kind)
    return {"text": text} if len(text) <= CHARACTERS else TOO_LONG


def describe_error(error: Exception, kind: str) -> dict[str, str]:
    """Return the answer to a job whose template raised an error."""
    if isinstance(error, MemoryError):
        return {"error": "limit", "reason": f"takes over {MEMORY // 2**20} MiB of memory"}
    reason = f"{error} (line {error.lineno})" if isinstance(error, TemplateSyntaxError) else str(error)
    return {"error": kind, "reason": (reason or type(error).__name__)[:LONGEST_REASON]}


def render(template: str, date: str | None, job: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a job."""
    kind, texts, spans, before, size, places = "syntax", [], [], "", 0, None
    try:
        compiled = compile_template(template, date)
        kind = "refusal"
        for number, starts_answer in job["renderings"]:
            variables = {**job["variables"], "add_generation_prompt": starts_answer}
            try:
                rendered = compiled.render(messages=job["messages"][:number], **variables)
            except (MemoryError, RecursionError):
                raise
            except Exception:
                if not texts:  # of the others, each tells more about the first one, and none is needed
                    raise
                texts.append(None)
                continue
            text, found = take_generation_marks(rendered)
            if not texts:
                whole, spans = text, found
            shared = len(before) if text.startswith(before) else len(text) if before.startswith(text) else 0
            texts.append((shared, text[shared:]))
            size, before = size + len(text) - shared, text
            if size > CHARACTERS:
                return TOO_LONG
            if spans and job["mark"]:  # they tell where the answers are
                return {"texts": texts, "spans": spans, "places": None}
        if job["mark"]:
            with suppress(Exception):  # a template may refuse marks
                messages = [*map(mark, job["messages"])]
                text = compiled.render(messages=messages, **job["variables"], add_generation_prompt=False)
                places = take_marks(take_generation_marks(text)[0], whole)
    except Exception as error:  # a template can raise any error
        return describe_error(error, kind)
    return {"texts": texts, "spans": spans, "places": places}


def take_generation_marks(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Return a text without the marks of GENERATION, and what stood in them."""
    pieces = GENERATION.split(text)
    ends = list(accumulate(map(len, pieces)))
    return "".join(pieces), list(zip(ends[:-1:2], ends[1::2], strict=False))


def mark(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with marks around its content, inside of white space, which templates may strip."""
    content = message["content"]
    if isinstance(content, list):
        return message | {"content": [part | {"text": mark_text(part["text"])} for part in content]}
    return message | {"content": mark_text(content)}


def mark_text(text: str) -> str:
    """Return a text with marks, but not a blank one."""
    if not text.strip():
        return text
    begin, end = len(text) - len(text.lstrip()), len(text.rstrip())
    return f"{text[:begin]}{START}{text[begin:end]}{STOP}{text[end:]}"


def take_marks(text: str, whole: str) -> list[tuple[int, int]] | None:
    """Return what stands between marks, if the text is the whole one without them and they come in pairs."""
    starts = text.split(START)
    pieces = [piece.split(STOP) for piece in starts[1:]]
    if any(len(piece) != 2 for piece in pieces) or "".join([starts[0], *map("".join, pieces)]) != whole:
        return None
    places, at = [], len(starts[0])
    for inside, after in pieces:
        places.append((at, at + len(inside)))
        at += len(inside) + len(after)
    return places


def limit_memory() -> None:
    """Limit the address space. Where the system does not tell its size, only the time is limited."""
    sizes = Path("/proc/self/statm")
    if sizes.exists():
        used = int(sizes.read_text().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        most = used + MEMORY if hard == resource.RLIM_INFINITY else min(used + MEMORY, hard)
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def main() -> None:
    """Answer requests until the other end of the connection is closed."""
    connection = Connection(int(sys.argv[1]))
    limit_memory()
    while True:
        signal.setitimer(signal.ITIMER_PROF, 0)
        try:
            raw = connection.recv_bytes()
        except EOFError:
            return
        try:
            request, answers = json.loads(raw), []
            for job in request["jobs"]:
                signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # then SIGPROF ends this process
                if "date" in request:
                    answers.append(render(request["template"], request["date"], job))
                else:
                    answers.append(render_task(request["template"], job))
            answer = json.dumps(answers).encode()
        except MemoryError:
            answer = json.dumps(TOO_MUCH).encode()
        connection.send_bytes(answer)


if __name__ == "__main__":
    main()
