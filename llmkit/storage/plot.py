"""Plot the losses of runs."""

import io
import itertools
import textwrap
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from llmkit.files import write_atomically
from llmkit.screen import format_count, printable
from llmkit.storage.report import is_finite, is_score
from llmkit.storage.run import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The palette of Okabe and Ito (2008), which colour-blind readers can tell apart, without black and yellow. Six colours
# and seven markers: the first 42 runs differ in one or both.
COLOURS, MARKERS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"), "os^Dv<>"
LINE = 88  # characters of a line of the legend
LOG_RATIO = 10  # the tokens axis is logarithmic if the longest run has this many times the tokens of the shortest
# Three quarters of the losses lie in a band above the lowest one. If the highest loss is more than OUTLIER bands above
# the lowest, the loss axis ends after SHOWN bands.
OUTLIER, SHOWN = 10, 6


LOSS = "loss (nats per token)"


class Point(NamedTuple):
    """A loss that was logged."""

    tokens: float
    loss: float
    step: int


class Curves(NamedTuple):
    """The losses of a run. `best` is its lowest val loss: one point, or none.

    sets    name of a set of `eval.sets` -> its losses
    panels  what is drawn in small panels below -> (tokens, value)
    unit    what is drawn: losses of tokens or of labels, or rewards of answers
    """

    train: list[Point]
    val: list[Point]
    best: list[Point]
    sets: dict[str, list[Point]]
    panels: dict[str, list[tuple[float, float]]]
    unit: str = LOSS


MOST_SCORES = 6  # that are drawn
PANELS = {  # of what a run has logged
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens/s",
    "reward": "reward, training",
    "answer_tokens": "tokens of an answer",
    "kl": "KL to the start",
}
COLUMNS = 3  # of panels


def plot_runs(folders: list[Path], out: Path) -> None:
    """Plot the losses of one or several runs to a PNG file: see `draw_runs`."""
    png = io.BytesIO()
    with warnings.catch_warnings(category=UserWarning, action="ignore"):  # letters of a name that the font lacks
        draw_runs(folders).savefig(png, format="png", dpi=130)
    write_atomically(out, png.getvalue())


def draw_runs(folders: list[Path]) -> "Figure":
    """Draw train and val loss over the tokens seen.

    A star marks the best val loss of a run. The legend tells its value and stands below the axes, where it covers no
    curve. Losses that are not finite are left out. Below the losses of a single run are small panels with its scores,
    the learning rate, the gradient norm and the speed.
    """
    from matplotlib.figure import Figure

    runs, names = [read_curves(folder) for folder in folders], name_runs(folders)
    figure = Figure(layout="constrained")
    panels = runs[0].panels if len(runs) == 1 else {}
    lines = -(-len(panels) // COLUMNS)  # of panels
    grid = figure.add_gridspec(1 + lines, COLUMNS, height_ratios=[4] + [1] * lines)
    axes = figure.add_subplot(
        grid[0, :], xlabel="tokens seen", ylabel=runs[0].unit if len({run.unit for run in runs}) == 1 else "loss"
    )
    for i, (name, points) in enumerate(panels.items()):
        draw_panel(figure.add_subplot(grid[1 + i // COLUMNS, i % COLUMNS]), name, points)
    rows = []  # of the legend: (line, text)
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        marker, star = MARKERS[i % len(MARKERS)], {"markeredgecolor": "white", "linestyle": "none", "zorder": 3}
        train, val, best = (
            axes.plot([p.tokens for p in points], [p.loss for p in points], color=COLOURS[i % len(COLOURS)], **style)[0]
            for points, style in (
                (run.train, {"marker": ".", "markersize": 3, "linewidth": 1.2, "alpha": 0.5}),
                (run.val, {"marker": marker, "markersize": 4, "linewidth": 1.6}),
                (run.best, {"marker": "*", "markersize": 15, **star}),
            )
        )
        own = [(train, "train"), (val, "val"), (best, describe(run))]
        for j, (set_name, points) in enumerate(run.sets.items() if len(runs) == 1 else ()):
            style = {"color": COLOURS[(j + 1) % len(COLOURS)], "linestyle": "--", "linewidth": 1.2}
            [line] = axes.plot([p.tokens for p in points], [p.loss for p in points], **style)
            own.insert(2 + j, (line, set_name))
        several = [(val if run.val else train, f"{name}: {describe(run)}")]
        rows += several if len(runs) > 1 else [(line, text) for line, text in own if len(line.get_xdata())]
    title = names[0] if len(runs) == 1 else f"{len(runs)} runs (thin: train, with markers: val, star: best val)"
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.25)
    set_limits(axes, runs)
    texts = [textwrap.fill(text, LINE) for _, text in rows]
    legend = figure.legend([line for line, _ in rows], [""] * len(rows), loc="outside lower left", frameon=False)
    for drawn, text in zip(legend.get_texts(), texts, strict=True):  # here $ and a leading _ have no special meaning
        drawn.set(text=text, parse_math=False, fontsize=9)
    figure.set_size_inches(7.5, 4.5 + 1.3 * lines + 0.2 * sum(text.count("\n") + 1 for text in texts))
    return figure


def draw_panel(axes: "Axes", name: str, points: list[tuple[float, float]]) -> None:
    """Draw a small panel below the losses."""
    from matplotlib.ticker import MaxNLocator

    axes.plot(*zip(*points, strict=True), color="#555555", linewidth=1)
    axes.set_title(PANELS.get(name, printable(name.removeprefix("val_"))), fontsize=9, parse_math=False)
    axes.tick_params(labelsize=7)
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.xaxis.set_major_formatter(lambda value, _: format_count(value))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}" if value < 100 else format_count(value))
    axes.grid(alpha=0.25)
    if name == "grad_norm":  # a few large ones at the start would flatten all others
        axes.set_ylim(0, 3 * float(np.median([value for _, value in points])) or 1)


def set_limits(axes: "Axes", runs: list[Curves]) -> None:
    """Choose a linear or logarithmic tokens axis, and cut the loss axis where a few losses dwarf all others."""
    points = [[*run.train, *run.val, *itertools.chain(*run.sets.values())] for run in runs if run.train or run.val]
    if not points:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no losses yet", transform=axes.transAxes, ha="center", va="center")
        return
    ends = [max(point.tokens for point in own) for own in points]
    if max(ends) >= LOG_RATIO * min(ends) > 0:
        axes.set_xscale("log", nonpositive="mask")
        axes.set_xlabel("tokens seen (log scale)")
    axes.xaxis.set_major_formatter(lambda value, _: format_count(value))
    # As many quantiles of each run, so that one with many losses does not outweigh the others.
    losses = np.array([np.quantile([point.loss for point in own], np.linspace(0, 1, 101)) for own in points])
    low, high = losses.min(), losses.max()
    band = np.quantile(losses, 0.75) - low
    if high - low > OUTLIER * band > 0:
        top = max([low + SHOWN * band, *(point.loss + band / 2 for run in runs for point in run.best)])
        axes.set(ylim=(low - band / 5, top), ylabel=f"{axes.get_ylabel()}, cut off: the highest is {high:.4g}")


def read_curves(folder: Path) -> Curves:
    """Return the finite losses of a run."""
    records = [record for record in read_metrics(folder) if "tokens" in record]
    names = dict.fromkeys(key for record in records for key in record if key.endswith("/val_loss"))

    def points(key: str) -> list[Point]:
        return [Point(one["tokens"], one[key], one["step"]) for one in records if is_finite(one.get(key))]

    is_rewarded = any("val_reward" in record for record in records)  # its loss says nothing: it is drawn about 0
    train, val = (points(key) for key in (("reward", "val_reward") if is_rewarded else ("loss", "val_loss")))
    scores = dict.fromkeys(key for record in records for key in record if is_score(key) and key not in names)
    panels = {key: [(one.tokens, one.loss) for one in points(key)] for key in [*[*scores][:MOST_SCORES], *PANELS]}
    panels = {key: found for key, found in panels.items() if len(found) > 1}
    for key in ("reward", "val_reward") if is_rewarded else ():
        panels.pop(key, None)
    best = min(val, key=lambda point: -point.loss if is_rewarded else point.loss, default=None)
    return Curves(
        train,
        val,
        [best] if best else [],
        {name.removesuffix("/val_loss"): points(name) for name in names},
        panels,
        "reward" if is_rewarded else LOSS if all("/" in key for key in scores) else "loss",
    )


def describe(run: Curves) -> str:
    """Return the best val loss of a run in words."""
    if run.best:
        return f"best val {run.best[0].loss:.4f} at step {run.best[0].step}"
    return "no val loss" if run.train else "no losses yet"


# ---- names ----------------------------------------------------------------------------------------------------------


def name_runs(folders: list[Path]) -> list[str]:
    """Return the names of run directories, or their paths if two have the same name. Long names are shortened."""
    names = [folder.absolute().name for folder in folders]
    return shorten_names(names if len(set(names)) == len(names) else [str(folder) for folder in folders])


def shorten_names(names: list[str], longest: int = 44) -> list[str]:
    """Cut the middle out of long names, but keep what tells them apart: their first difference, else the whole name.

    >>> shorten_names(["llama-wide-and-deep-1", "llama-wide-and-deep-2"], 17)
    ['llama-w...-deep-1', 'llama-w...-deep-2']
    >>> shorten_names(["llama-wide-with-lr-1-and-decay", "llama-wide-with-lr-2-and-decay"], 21)
    ['llama...lr-1-...decay', 'llama...lr-2-...decay']
    """
    side, third = (longest - 3) // 2, (longest - 6) // 3
    cut = [name if len(name) <= longest else f"{name[:side]}...{name[-side:]}" for name in names]
    for short in {short for short in cut if cut.count(short) > 1}:
        alike = [i for i, other in enumerate(cut) if other == short]
        letters = zip(*(names[i] for i in alike), strict=False)
        start = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, letters)) - third // 2 - 1
        for i in alike:
            cut[i] = f"{names[i][:third]}...{names[i][start : start + third]}...{names[i][-third:]}"
    return [printable(name if cut.count(short) > 1 else short) for name, short in zip(names, cut, strict=True)]
