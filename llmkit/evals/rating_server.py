"""Show pairs of answers on a local page, and keep what a person finds of them. Needs llmkit[serve]."""

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from llmkit.evals.judge import to_text
from llmkit.evals.rating import VERDICTS, Messages, Pair, judge_pair, read_answers, read_judgements
from llmkit.inference.server import PAGE_HEADERS, check_host, host_names, listen, make_http_server

PAGE = Path(__file__).with_name("rating.html")
MOST_BYTES = 20_000  # of a judgement
HOST = "127.0.0.1"


def build_app(
    folder: Path, pairs: Sequence[Pair], prompts: Sequence[Messages], rater: str, finished: Callable[[], None]
) -> Starlette:
    """Return the application that shows a rater the pairs that are left.

    finished  is called when the last one is judged
    """
    answers, by_id = read_answers(folder), {pair.id: pair for pair in pairs}
    done = [row["pair"] for row in read_judgements(folder) if row["rater"] == rater and row["pair"] in by_id]

    async def page(request: Request) -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=PAGE_HEADERS)

    async def next_pair(request: Request) -> Response:
        left = next((pair for pair in pairs if pair.id not in done), None)
        state: dict = {"done": len(done), "total": len(pairs), "rater": rater}
        if left is not None:
            sides = {side: answers[model, left.prompt] for side, model in (("left", left.left), ("right", left.right))}
            state |= {"pair": left.id, "prompt": to_text(prompts[left.prompt]), **sides}
        return JSONResponse(state)

    async def judgement(request: Request) -> Response:
        if not request.headers.get("content-type", "").startswith("application/json"):
            return JSONResponse({"error": "JSON is expected"}, 415)  # a form of another site can't send it
        if int(request.headers.get("content-length") or MOST_BYTES + 1) > MOST_BYTES:
            return JSONResponse({"error": "the note is too long"}, 413)
        try:
            body = await request.json()
            pair, verdict, note = by_id[body["pair"]], body["verdict"], body.get("note", "")
        except (ValueError, KeyError, TypeError):
            return JSONResponse({"error": "no such pair"}, 400)
        if verdict not in (*VERDICTS, "undone") or not isinstance(note, str):
            return JSONResponse({"error": "no such verdict"}, 400)
        judge_pair(folder, pair, rater, verdict, note, time=int(time.time()))
        if verdict == "undone":
            done[:] = [one for one in done if one != pair.id]
        elif pair.id not in done:
            done.append(pair.id)
        if len(done) == len(pairs):
            # In a second: the page still asks for the next pair, and the last judgement may be undone.
            asyncio.get_running_loop().call_later(1, lambda: finished() if len(done) == len(pairs) else None)
        return JSONResponse({"last": done[-1] if done else None})

    routes = [Route("/", page), Route("/next", next_pair), Route("/judgement", judgement, methods=["POST"])]
    return Starlette(routes=routes, middleware=[Middleware(check_host, hosts=host_names(HOST))])


def rate_pairs(
    folder: Path, pairs: Sequence[Pair], prompts: Sequence[Messages], rater: str, port: int, say: Callable[[str], None]
) -> None:
    """Show the page until all pairs are judged, or until it is interrupted."""
    listening, address = listen(HOST, port)

    def finished() -> None:
        server.should_exit = True

    server = make_http_server(build_app(folder, pairs, prompts, rater, finished))
    say(f"{address}  rate the pairs there (Ctrl-C to stop; the same command goes on)")
    server.run(sockets=[listening])
