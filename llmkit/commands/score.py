"""Define the command `score`."""

from pathlib import Path
from typing import Annotated

import typer

from llmkit.commands.show import AsJson, ModelArg, Precision, check_is_new, terminal_text, to_stderr

SHOWN_TOKENS = 200  # lines of the table on a terminal


def score(
    model: ModelArg,
    text: Annotated[str, typer.Argument(metavar="TEXT|FILE", help="A text, or a file with one.")],
    beside: Annotated[str | None, typer.Option(help="A second model: what does it find more, or less likely?")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page, coloured by surprise.")] = None,
    attribute: Annotated[
        bool, typer.Option("--attribute", help="Which tokens speak for the next one, and the attention; with --html.")
    ] = False,
    top: Annotated[int, typer.Option(min=0, max=100, help="Likeliest tokens to show beside each.")] = 5,
    precision: Precision = "fp32",
    as_json: AsJson = False,
) -> None:
    """Show how likely a model finds each token of a text; of a reward model, the rewards of answers."""
    import json

    from llmkit.errors import UserError
    from llmkit.evals import probabilities
    from llmkit.files import write_atomically
    from llmkit.parallel.device import DTYPES, choose_precision
    from llmkit.parallel.world import start_world
    from llmkit.storage.locate import load_located, locate, read_located_head

    first = locate(model)
    if read_located_head(first) is not None:
        from llmkit.evals.rewards import is_reward_model, reward_texts
        from llmkit.screen import format_table

        if beside or html or attribute or not is_reward_model(first):
            what = (
                "this model predicts labels" if not is_reward_model(first) else "a reward model has no tokens to show"
            )
            raise UserError(what, at=first.folder, fix=f"llmkit classify {model} TEXT, or leave out other options")
        to_stderr(first.choice)
        rows, lost = reward_texts(first, text, precision)
        to_stderr(lost)
        if as_json:
            print(json.dumps(rows))
        else:
            shown = [{key: f"{v:.4f}" if isinstance(v, float) else v for key, v in row.items()} for row in rows]
            print(format_table(shown))
        return
    if attribute and html is None:
        raise UserError("--attribute draws on a page", fix="add --html page.html")
    if html is not None:
        check_is_new(html)
    text = read_text(text)
    device = start_world().device
    dtype = DTYPES[choose_precision(precision, device)]
    found, why = [], None
    for name in [model] + ([beside] if beside else []):
        located = locate(name)
        to_stderr(located.choice)
        loaded, tokenizer = load_located(located, device=device, dtype=dtype, merge=True)
        if found:
            probabilities.check_same_tokens(found[0][1], tokenizer)
        elif attribute:
            why = probabilities.attribute(loaded, tokenizer, text)
        found.append((name, tokenizer, probabilities.score_text(loaded, tokenizer, text, top=top)))
        del loaded
    (_, _, ours), other = found[0], found[1][::2] if beside else None
    if html is not None:
        from llmkit.evals.page import make_page

        write_atomically(html, make_page(model, ours, other, why))
        to_stderr(f"page: {html}")
    if as_json:
        results = {"model": model, **ours.to_json()}
        print(json.dumps(results | ({"beside": {"model": beside, **other[1].to_json()}} if other else {})))
        return
    for line in table(ours, other):
        print(terminal_text(line))


def read_text(text: str) -> str:
    """Return a text, or that of the file that it names."""
    from llmkit.errors import UserError

    path = Path(text)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # too long a name, or one with a NUL
        is_file = False
    if not is_file:
        return text
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError("the file is not UTF-8 text", at=f"{path}, byte {error.start}") from None


def table(ours, other) -> list[str]:
    """Return lines of a table: token, probability, rank, alternatives; and the sums."""
    from llmkit.evals.page import probability
    from llmkit.screen import format_table

    rows = []
    theirs = other[1].tokens if other else [None] * len(ours.tokens)
    for one, two in list(zip(ours.tokens, theirs, strict=True))[:SHOWN_TOKENS]:
        row = {"token": repr(one.text), "probability": probability(one), "rank": one.rank}
        if two:
            row |= {"beside": probability(two), "nats": f"{two.surprise - one.surprise:+.3f}"}
        rows.append(row | {"likeliest": " ".join(f"{word!r} {p:.1%}" for word, p in one.alternatives)})
    lines = format_table(rows).splitlines()
    if (more := len(ours.tokens) - SHOWN_TOKENS) > 0:
        lines.append(f"... and {more} more tokens")
    count = len(ours.tokens)
    lines.append(f"{count} tokens, {-ours.log_prob:.4f} nats, {-ours.log_prob / count:.4f} a token")
    if other:
        total = -other[1].log_prob
        lines.append(f"beside: {total:.4f} nats, {total / count:.4f} a token")
    return lines
