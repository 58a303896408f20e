"""Render chat templates in a process of its own, which the system ends when it takes too much time or memory.

A chat template comes from a stranger's model, and the sandbox of jinja2 bounds neither. This file is the program of
that process: it imports nothing but jinja2 and the standard library. `renderer.py` starts it and talks to it.

It reads requests from the connection that its argument names, and answers each: both are JSON.
A request is {template, messages, variables, renderings: [[number of messages, add_generation_prompt], ...]}.
An answer is {texts: [[characters shared with the text before, rest], ...]}, or {error: kind, reason: text} with a kind
of "syntax", "limit" or "refusal" (the template rejects the messages).
"""

import json
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_SECONDS, MEMORY, CHARACTERS = 2.0, 400 * 2**20, 10_000_000  # limits for a request; memory on top of the start's
LONGEST_REASON = 300  # characters; `raise_exception` takes any text


class Generation(Extension):
    """Render what stands between {% generation %} and {% endgeneration %}, the marks of answers, as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(8)
def compile_template(source: str) -> Template:
    """Compile a chat template with the functions that transformers gives it. Raise TemplateSyntaxError."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])

    def raise_exception(message: str) -> None:
        raise ValueError(message)  # templates call it for conversations that they do not support

    def tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    env.filters["tojson"] = tojson  # jinja2's own escapes HTML
    env.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return env.from_string(source)


def render(request: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a request."""
    kind, texts, before, size = "syntax", [], "", 0
    try:
        template = compile_template(request["template"])
        kind = "refusal"
        for number, starts_answer in request["renderings"]:
            variables = {**request["variables"], "add_generation_prompt": starts_answer}
            text = template.render(messages=request["messages"][:number], **variables)
            shared = len(before) if text.startswith(before) else 0
            texts.append((shared, text[shared:]))
            size, before = size + len(text) - shared, text
            if size > CHARACTERS:
                return {"error": "limit", "reason": f"renders more than {CHARACTERS // 10**6} million characters"}
    except MemoryError:
        return {"error": "limit", "reason": f"takes over {MEMORY // 2**20} MiB of memory"}
    except TemplateSyntaxError as error:
        return {"error": kind, "reason": f"{error} (line {error.lineno})"[:LONGEST_REASON]}
    except Exception as error:  # a template can raise any error
        return {"error": kind, "reason": (str(error) or type(error).__name__)[:LONGEST_REASON]}
    return {"texts": texts}


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
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # then SIGPROF ends this process
        try:
            answer = json.dumps(render(json.loads(raw))).encode()
        except MemoryError:
            answer = b'{"error": "limit", "reason": "gets or renders too much text"}'
        connection.send_bytes(answer)


if __name__ == "__main__":
    main()
