"""Start the process that renders chat templates, and send it requests."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from multiprocessing import Pipe
from pathlib import Path
from threading import Lock
from typing import Any

from llmkit.errors import DataError
from llmkit.tokenizer.sandbox import CPU_SECONDS

WALL_SECONDS = 60  # without an answer; the limit of CPU_SECONDS comes first, unless the machine is very busy
TOGETHER = 500  # records of a task that are rendered in one request
NEEDED = ("PATH", "HOME", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "TZ")  # no other variable is handed on


class TemplateLimit(ValueError):
    """Say that a chat template exceeds a limit of time, memory or text for these messages."""


class Renderer:
    """Hold the process that renders chat templates. It starts at the first request, and again after its death."""

    def __init__(self):
        self.lock, self.process, self.connection = Lock(), None, None

    def start(self) -> None:
        """Start the process. It ends when this process closes its end of the connection or dies."""
        self.connection, theirs = Pipe()
        program = str(Path(__file__).with_name("sandbox.py"))
        self.process = subprocess.Popen(
            [sys.executable, "-P", program, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={name: os.environ[name] for name in NEEDED if name in os.environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C is for this process alone
        )
        theirs.close()

    def stop(self) -> int:
        """End the process. Return its exit code, negative for a signal."""
        self.connection.close()
        self.process.kill()
        code, self.process = self.process.wait(), None
        return code

    def ask(self, request: dict[str, Any]) -> list[dict[str, Any]] | dict[str, Any]:
        """Return the answer to a request; see sandbox.py. Raise TemplateLimit if the process ends over it."""
        with self.lock:
            if self.process and self.process.poll() is not None:  # killed while it waited, which is no template's fault
                self.stop()
            if self.process is None:
                self.start()
            try:
                self.connection.send_bytes(json.dumps(request, default=str).encode())
                if self.connection.poll(WALL_SECONDS):
                    return json.loads(self.connection.recv_bytes())
                reason = f"gave no answer for {WALL_SECONDS} s"
            except (OSError, EOFError):
                reason = ""
            except BaseException:
                self.stop()
                raise
            code = self.stop()
        if code == -signal.SIGPROF:
            reason = f"takes over {CPU_SECONDS:g} s of computing time"
        raise TemplateLimit(reason or f"ended its process (exit code {code})")


@cache
def renderer(pid: int) -> Renderer:
    """Return the renderer of a process: a forked process must not share the one of its parent."""
    return Renderer()


@dataclass
class Job:
    """What is to be rendered of one conversation.

    renderings  (number of messages from the first on, whether to start an answer after them)
    variables   further variables of the template
    mark        whether to find the contents in the first text, by rendering them with marks; a template with
                {% generation %} needs neither this nor the other renderings
    """

    messages: list[dict[str, Any]]
    renderings: list[tuple[int, bool]]
    variables: dict[str, Any]
    mark: bool = False


@dataclass
class Texts:
    """The texts of a job's renderings. The first one has a text; others may fail.

    spans   what stands in {% generation %} in the first text
    places  (start, stop) of each content in the first text, if marks show that
    """

    texts: list[str | None]
    spans: list[tuple[int, int]]
    places: list[tuple[int, int]] | None


def render_jobs(template: str, jobs: list[Job], date: str | None = None) -> list[Texts | ValueError]:
    """Render the conversations of some jobs.

    date  what the template takes for today, as 2026-01-31; None: today

    The error of a job is TemplateLimit if the template exceeds a limit, and another ValueError if it rejects the
    messages. Raise DataError if the template can't be parsed.
    """
    if not jobs:
        return []
    request = {"template": template, "date": date, "jobs": [vars(job) for job in jobs]}
    try:
        answers = renderer(os.getpid()).ask(request)
    except TemplateLimit as error:
        answers = {"error": "limit", "reason": str(error)}
    if isinstance(answers, dict) and len(jobs) > 1:  # find out which one it was, or whether they are too much together
        return [found for job in jobs for found in render_jobs(template, [job], date)]
    answers = [answers] if isinstance(answers, dict) else answers
    return [read_answer(answer, job) for answer, job in zip(answers, jobs, strict=True)]


def render_texts(template: str, variables: list[dict[str, Any]]) -> list[str | ValueError]:
    """Render a template of a task for some records, whose fields are its variables. See `sandbox.render_task`.

    The error of a record on which the template fails is a ValueError. Raise TemplateLimit for the first record with
    which it exceeds a limit, DataError if it can't be parsed.
    """
    found: list[str | ValueError] = []
    for start in range(0, len(variables), TOGETHER):
        part = variables[start : start + TOGETHER]
        try:
            answers = renderer(os.getpid()).ask({"template": template, "jobs": part})
        except TemplateLimit:
            if len(part) == 1:
                raise
            answers = {"error": "limit"}
        if isinstance(answers, dict):  # find out which one it was, or whether they are too much together
            if len(part) == 1:
                raise TemplateLimit(f"the template {answers['reason']}")
            found += [text for one in part for text in render_texts(template, [one])]
            continue
        for answer in answers:
            match answer.get("error"):
                case "syntax":
                    raise DataError(f"the template can't be parsed: {answer['reason']}", got=template[:200])
                case "limit":
                    raise TemplateLimit(f"the template {answer['reason']}")
            found.append(ValueError(f"the template fails: {answer['reason']}") if "error" in answer else answer["text"])
    return found


def read_answer(answer: dict[str, Any], job: Job) -> Texts | ValueError:
    """Return the texts of a job's answer, or its error; see `render_jobs`."""
    match answer.get("error"):
        case "syntax":
            raise DataError(f"the chat template can't be parsed: {answer['reason']}")
        case "limit":
            size = sum(len(str(message["content"])) for message in job.messages)
            return TemplateLimit(f"the chat template {answer['reason']}: messages with {size:,} characters")
        case "refusal":
            return ValueError(f"the chat template fails: {answer['reason']}")
    texts, text = [], ""
    for entry in answer["texts"]:
        text = text[: entry[0]] + entry[1] if entry else text
        texts.append(text if entry else None)
    return Texts(texts, [tuple(span) for span in answer["spans"]], answer["places"])
