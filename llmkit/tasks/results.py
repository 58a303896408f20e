"""Put the scores of several models together: a table, a picture, and a file with all that is needed to repeat them."""

import io
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmkit.files import write_atomically
from llmkit.intervals import bootstrap_difference, paired_difference
from llmkit.screen import for_stream, format_table
from llmkit.tasks.metrics import METRICS, mean
from llmkit.tasks.run import Prepared, Result


def metric_names(figures: dict[str, Any]) -> list[str]:
    """Return the names of the scores among the figures of a result."""
    return [name for name in figures if f"{name}_stderr" in figures]


def to_json(about: dict[str, Any], tasks: Sequence[Prepared], results: Sequence[Result]) -> dict[str, Any]:
    """Return the results of one model, in the form of lm-evaluation-harness with intervals beside.

    about  the model, the machine and the versions
    """
    return {
        "results": {one.name: one.figures for one in results},
        "tasks": {task.about["task"]: task.about for task in tasks},
        "lost": {one.name: dict(one.lost) for one in results if one.lost},
        **about,
    }


def compare(ours: Sequence[Result], theirs: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Return the paired difference of each score of two models, on the questions that both were asked."""
    found: dict[str, dict[str, Any]] = {}
    for our, their in zip(ours, theirs, strict=True):
        for name in [name for name in our.items if name in their.items]:
            pairs = [(our.items[name], our.asked), (their.items[name], their.asked)]
            both = sorted(set(our.asked) & set(their.asked))
            one, other = ([dict(zip(asked, items, strict=True))[i] for i in both] for items, asked in pairs)
            aggregate = METRICS[base][1] if (base := name.partition(",")[0]) in METRICS else mean
            if not both or (not all(isinstance(item, int | float) for item in (*one, *other)) and aggregate is mean):
                continue
            own = found.setdefault(our.name, {})
            own[name] = (
                paired_difference(one, other) if aggregate is mean else bootstrap_difference(one, other, aggregate)
            )
    return found


def format_score(figures: dict[str, Any], name: str) -> str:
    """Return a score with its interval: 0.5312 (0.4721 to 0.5894)."""
    low, high = figures[f"{name}_interval"]
    if not math.isfinite(low):
        return format_number(figures[name])
    return f"{format_number(figures[name])} ({format_number(low)} to {format_number(high)})"


def format_number(value: float, sign: str = "") -> str:
    """Return a number with four decimals, or four digits if it is large."""
    return f"{value:{sign}.4f}" if abs(value) < 1e4 else f"{value:{sign}.4g}"


def tabulate(names: Sequence[str], models: Sequence[Sequence[Result]]) -> str:
    """Return a table: one line for each task and score, one column for each model."""
    rows = []
    for of_models in zip(*models, strict=True):
        first = of_models[0]
        for name in metric_names(first.figures):
            scores = {model: format_score(one.figures, name) for model, one in zip(names, of_models, strict=True)}
            rows.append({"task": first.name, "score": name, "n": first.figures["n"]} | scores)
    return format_table(rows)


VERDICTS = {"higher": "higher than", "lower": "lower than", "no difference": "the same as"}


def tabulate_differences(name: str, baseline: str, found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return a table of the differences of a model from another one, and in words whether there is one."""
    rows = []
    for task, by_metric in found.items():
        for metric, one in by_metric.items():
            low, high = one["interval"]
            words = VERDICTS.get(one["verdict"], "not clearly different from")
            edges = f"{format_number(low, '+')} to {format_number(high, '+')}"
            value = f"{format_number(one['difference'], '+')} ({edges})"
            rows.append({"task": task, "score": metric, "difference": value, name: f"{words} {baseline}"})
    return format_table(rows)


def draw(names: Sequence[str], models: Sequence[Sequence[Result]], out: Path) -> None:
    """Draw a score of each task for each model, with its interval, to a PNG file: a share if there is one."""
    from matplotlib.figure import Figure

    tasks = list(zip(*models, strict=True))
    figure = Figure(layout="constrained", figsize=(7.5, 0.6 + len(tasks) * (0.7 + 0.28 * len(names))))
    all_axes = figure.subplots(len(tasks), squeeze=False)[:, 0]
    for axes, results in zip(all_axes, tasks, strict=True):
        first = results[0].figures
        metrics = metric_names(first)
        metric = next((one for one in metrics if 0 <= first[one] <= 1), metrics[0])
        for i, one in enumerate(results):
            low, high = one.figures[f"{metric}_interval"]
            axes.barh(i, one.figures[metric], color=f"C{i}", alpha=0.8)
            if math.isfinite(low):
                axes.plot([low, high], [i, i], color="black", linewidth=1.4)
        axes.set_yticks(range(len(names)), names)
        axes.set_title(f"{results[0].name}: {metric}, n {first['n']}", fontsize=10, loc="left", parse_math=False)
        if all(0 <= one.figures[metric] <= 1 for one in results):
            axes.set_xlim(0, 1)
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.25)
        for text in axes.get_yticklabels():
            text.set_parse_math(False)
    all_axes[-1].set_xlabel("score, with its 95 % interval")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=130)
    write_atomically(out, png.getvalue())


def write_results(out: Path, results: list[dict[str, Any]]) -> None:
    """Write the results of all models to a JSON file; numbers that are not finite become null."""
    text = json.dumps(results if len(results) > 1 else results[0], indent=2, ensure_ascii=False, default=str)
    write_atomically(out, text.encode())


def describe_groups(results: Sequence[Result]) -> Iterator[str]:
    """Yield lines with the first score of each group, and how fair a model is to the groups."""
    for one in results:
        if groups := one.figures.get("groups"):
            name = metric_names(one.figures)[0]
            yield f"{one.name} {name}: " + ", ".join(f"{group} {own[name]:.3f}" for group, own in groups.items())
        if fair := one.figures.get("fairness"):
            names = ("demographic_parity", "equalized_odds", "bias_amplification")
            yield f"{one.name}: " + ", ".join(f"{key.replace('_', ' ')} {fair[key]:.3f}" for key in names)


def show_questions(prepared: Prepared, result: Result, number: int) -> Iterator[str]:
    """Yield the whole prompts of the first questions, and what the model made of them."""
    for one in result.answered[:number]:
        question = one.question
        yield f"---- {result.name}, question {question.number} ----"
        yield for_stream("\n...\n".join(question.contexts), sys.stdout)
        for i, (answer, score) in enumerate(zip(question.answers, one.scores, strict=False)):
            right = question.target if isinstance(question.target, list) else [question.target]
            mark = "*" if question.choices and i in right else " "
            greedy = ", each token the likeliest" if score.greedy else ""
            yield for_stream(f"{mark} {answer!r}: {score.log_prob:.4f} nats{greedy}", sys.stdout)
        if one.text is not None:
            yield for_stream(f"  written: {one.text!r}\n  wanted: {question.target!r}", sys.stdout)
