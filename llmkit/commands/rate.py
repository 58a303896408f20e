"""Define the command `rate`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from llmkit.commands.show import MOST, AsJson, show, terminal_text, to_stderr, without_nan


def rate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL MODEL ...", help="Models that answer the prompts.")],
    prompts: Annotated[Path, typer.Option(help="A text with a prompt on each line, or records with a prompt.")],
    out: Annotated[Path, typer.Option(help="Folder for answers and judgements.")] = Path("ratings"),
    rater: Annotated[str, typer.Option(help="Your name, if several people rate.")] = "me",
    limit: Annotated[int | None, typer.Option(min=1, max=MOST, help="Take only the first N prompts.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MOST, help="Tokens of an answer at the most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=100)] = 0.7,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1)] = 0,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8001,
    judge: Annotated[
        str | None, typer.Option(help="Let this model judge too: a MODEL, or the address of a server.")
    ] = None,
    results: Annotated[bool, typer.Option("--results", help="Print the results so far, and rate nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Rate the answers of models side by side on a local page, without knowing whose they are."""
    from llmkit.errors import MachineError, UserError
    from llmkit.evals import rating
    from llmkit.generation.sampling import Sampling

    if results:
        print_or_show(rating.summarize(out), out, as_json)
        return
    if len(models) < 2 or len(set(models)) < len(models):
        what = "rate compares two models or more" if len(models) < 2 else "a model is named twice"
        raise UserError(what, got=", ".join(models), fix="name another model")
    if rater.startswith(rating.JUDGE):
        raise UserError("--rater has the name of a judging model", got=rater)
    from llmkit.evals.judge import judge_all, write_missing_answers
    from llmkit.storage.locate import locate

    check_writers(models)
    asked = rating.read_prompts(prompts)[:limit]
    folders = [str(locate(model, check=False).folder) for model in models]  # another checkpoint writes other answers
    options = {
        "folders": folders,
        "limit": limit,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
    }
    rating.open_folder(out, models, prompts, options)
    pairs = rating.make_pairs(len(asked), len(models), seed)
    sampling = Sampling(temperature=temperature)
    write_missing_answers(out, models, asked, sampling, max_new_tokens, seed, to_stderr)
    if judge is not None:
        judge_all(out, judge, pairs, asked, to_stderr)
    done = {row["pair"] for row in rating.read_judgements(out) if row["rater"] == rater}
    if judge is None and not done.issuperset(pair.id for pair in pairs):
        try:
            from llmkit.evals.rating_server import rate_pairs
        except ImportError as error:
            raise MachineError(f"the page needs {error.name}", fix="pip install 'llmkit[serve]'") from None
        rate_pairs(out, pairs, asked, rater, port, to_stderr)
    print_or_show(rating.summarize(out), out, as_json)


def check_writers(models: list[str]) -> None:
    """Raise ModelError for a model that writes no text, before anything is written about it."""
    from llmkit.errors import ModelError
    from llmkit.models.hf_config import read_config
    from llmkit.storage.locate import locate, read_located_head

    for model in models:
        located = locate(model)
        if read_located_head(located):
            raise ModelError("this model predicts labels, and writes no text", at=model, fix="llmkit eval measures it")
        if read_config(located.base).kind == "masked":
            raise ModelError("an encoder writes no text", at=model, fix="llmkit eval, or embed, can use it")


def print_or_show(found: dict[str, Any], out: Path, as_json: bool) -> None:
    """Print the results of a comparison."""
    from llmkit.evals.rating import JUDGEMENTS

    if as_json:
        show(without_nan(found), as_json)
        return
    print_results(found)
    print(f"judgements: {out / JUDGEMENTS}")


def print_results(found: dict[str, Any]) -> None:
    """Print what people and judging models found, and how far they agree."""
    from llmkit.screen import format_table

    for title, one in {f"{found['judgements']} judgements of people": found, **found["judges"]}.items():
        print(title)
        rows = [
            {
                "model": row["model"],
                "against": row["against"],
                "wins": row["wins"],
                "losses": row["losses"],
                "ties": row["ties"],
                "both bad": row["both_bad"],
                "win rate": share(row["win_rate"], row["win_rate_interval"]),
            }
            for row in one["pairs"]
        ]
        if rows:
            print(terminal_text(format_table(rows)))
        if strengths := one.get("strengths"):
            rows = [
                {
                    "model": row["model"],
                    "points": "{:.0f} ({:.0f} to {:.0f})".format(row["points"], *row["points_interval"]),
                }
                for row in strengths
            ]
            print(terminal_text(format_table(rows)))
    rows = [
        {"raters": " and ".join(row["raters"]), "pairs": row["pairs"], "agree": f"{row['agree']:.1%}",
         "kappa": f"{row['kappa']:.2f}"}
        for row in found["agreement"]
    ]  # fmt: skip
    if rows:
        print(terminal_text(format_table(rows)))


def share(value: float, interval: list[float]) -> str:
    """Return a share with its interval, in percent."""
    low, high = interval
    return f"{value:.1%}" + (f" ({low:.1%} to {high:.1%})" if low == low else "")
