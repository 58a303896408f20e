"""The picture of the losses: what matplotlib draws does not overlap, and says what the metrics say."""

import itertools
import json
import math
from pathlib import Path

import pytest
from conftest import llmkit
from matplotlib.backends.backend_agg import FigureCanvasAgg

from llmkit.storage.curves import describe_curves
from llmkit.storage.plot import draw_runs, plot_runs, read_curves

LONG = "llama-wide-on-the-second-corpus-with-a-long-name"


def records(steps: int = 200, *, first=9.0, last=3.0, val: bool = True, shift=0.0) -> list[dict]:
    """Return the metrics of a run whose loss falls from `first` to `last`; every fifth record has a val loss."""
    made = []
    for step in range(10, steps + 1, 10):
        loss = shift + last + (first - last) * math.exp(-step / 30)
        made.append({"step": step, "tokens": step * 1000, "loss": loss})
        if val and step % 50 == 0:
            made[-1]["val_loss"] = loss + 0.1
    return made


def write(folder: Path, name: str, lines: list[dict]) -> Path:
    run = folder / name
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def diverged() -> list[dict]:
    high = [{"step": s, "tokens": s * 1000, "loss": s**4.0, "val_loss": s**4.0} for s in range(210, 400, 10)]
    odd = [{"step": 400, "tokens": 400_000, "loss": x, "val_loss": x} for x in (math.nan, math.inf, -math.inf)]
    return [*records(), *high, *odd, {"step": 400, "loss": 2.0}, {"step": 400, "tokens": 400_000}]


SETS = {
    "one": {"quickstart": records()},
    "without val": {"quickstart": records(val=False)},
    "val only": {"quickstart": [{"step": 0, "tokens": 0, "val_loss": 9.5}]},
    "one point": {"quickstart": records(10)},
    "empty": {"quickstart": []},
    "one of two is empty": {"a": [], "b": records()},
    "two empty": {"a": [], "b": []},
    "diverged": {"hot": diverged()},
    "one of five diverged": {"hot": diverged()} | {f"lr-{i}": records(shift=i / 1000) for i in range(4)},
    "nothing is finite": {"nan": [{"step": 1, "tokens": 1, "loss": math.nan, "val_loss": math.nan}]},
    "same values": {"flat": [{"step": s, "tokens": s, "loss": 1.0, "val_loss": 1.0} for s in range(9)]},
    "near-equal ends": {f"lr-{i}": records(shift=i / 10_000) for i in range(5)},
    "other lengths": {"short": records(50), "long": records(2000), "zero": [{"step": 0, "tokens": 0, "val_loss": 9}]},
    "a high first loss": {"tune": [{"step": 0, "tokens": 0, "val_loss": 4000.0}, *records()]},
    "twelve long names": {f"{LONG}-{i}-{'and-so-on' * 5}": records(shift=i) for i in range(12)},
    "longest names": {f"{i}-{'x' * 120}-{j}-{'y' * 120}": records() for i in range(2) for j in range(2)},
    "odd names": {"_hidden": records(), "$x_$": records(), "$\\frac$": records(), "\u65e5\u672c": records()},
    "twenty": {f"sweep-{i}": records(shift=i / 10) for i in range(20)},
    "fifty": {f"sweep-{i}": records(shift=i / 10) for i in range(50)},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("runs", SETS.values(), ids=SETS)
def test_nothing_overlaps_or_leaves_the_picture(runs, tmp_path):
    figure = draw_runs([write(tmp_path, name, lines) for name, lines in runs.items()])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer, [axes], [legend] = canvas.get_renderer(), figure.axes, figure.legends
    texts = [text.get_window_extent(renderer) for text in legend.get_texts()]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(texts, 2))
    drawn = axes.get_tightbbox(renderer)  # with title, labels and ticks
    for box in (*texts, drawn):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
    assert not any(text.overlaps(drawn) for text in texts)
    assert axes.bbox.height > 300 and axes.bbox.width > 600  # of 450 x 750 pixels: the legend leaves it its room


def stars(figure) -> list[tuple[float, float]]:
    """Return the places of the stars that are drawn."""
    [axes] = figure.axes
    return [tuple(line.get_xydata()[0]) for line in axes.lines if line.get_marker() == "*" and len(line.get_xydata())]


@pytest.mark.parametrize("runs", SETS.values(), ids=SETS)
def test_the_best_val_loss_is_marked_and_told(runs, tmp_path):
    figure = draw_runs([write(tmp_path, name, lines) for name, lines in runs.items()])
    [axes], [legend] = figure.axes, figure.legends
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    told, expected = "\n".join(" ".join(text.get_text().split()) for text in legend.get_texts()), []
    for lines in runs.values():
        val = [line for line in lines if math.isfinite(line.get("val_loss", math.nan))]
        if val:
            best = min(val, key=lambda line: line["val_loss"])
            expected.append((best["tokens"], best["val_loss"]))
            assert f"best val {best['val_loss']:.4f} at step {best['step']}" in told
    assert stars(figure) == expected
    for tokens, loss in expected:
        assert bottom < loss < top and (left < tokens < right or (tokens == 0 and axes.get_xscale() == "log"))


def test_the_best_is_not_the_last(tmp_path):
    lines = [*records(), {"step": 210, "tokens": 210_000, "val_loss": 5.0}]
    assert stars(draw_runs([write(tmp_path, "over", lines)])) == [(200_000, lines[-2]["val_loss"])]


@pytest.mark.parametrize(("steps", "scale"), [((200, 1990), "linear"), ((200, 2000), "log"), ((2000,), "linear")])
def test_runs_of_very_different_lengths_get_a_logarithmic_axis(steps, scale, tmp_path):
    [axes] = draw_runs([write(tmp_path, str(n), records(n)) for n in steps]).axes
    assert axes.get_xscale() == scale and ("log scale" in axes.get_xlabel()) == (scale == "log")


@pytest.mark.parametrize(
    ("lines", "is_cut"),
    [
        (records(), False),
        ([{"step": 0, "tokens": 0, "loss": 4000.0}, *records()], True),
        ([*records(), {"step": 210, "tokens": 210_000, "loss": 1e30}], True),
    ],
    ids=["plain", "first", "last"],
)
def test_few_losses_that_dwarf_the_rest_are_cut_off_and_it_is_said(lines, is_cut, tmp_path):
    [axes] = draw_runs([write(tmp_path, "run", lines)]).axes
    assert ("cut off" in axes.get_ylabel()) == is_cut
    assert axes.get_ylim()[1] < 30
    shown = [line["loss"] for line in lines if axes.get_ylim()[0] < line["loss"] < axes.get_ylim()[1]]
    assert len(shown) >= len(lines) - 1


def names_in_legend(folders: list[Path]) -> list[str]:
    [legend] = draw_runs(folders).legends
    return ["".join(text.get_text().split()).rpartition(":bestval")[0] for text in legend.get_texts()]


@pytest.mark.parametrize("middle", ["{0}", "{0}-" + "z" * 60, "z" * 60 + "-{0}", "{1}-" + "z" * 30 + "-{0}" + "y" * 60])
def test_long_names_stay_different(middle, tmp_path):
    names = [f"{LONG}-{middle.format(i, j)}-{LONG}" for i in range(3) for j in range(2)]
    names = list(dict.fromkeys(names))
    shown = names_in_legend([write(tmp_path, name, records()) for name in names])
    assert len(set(shown)) == len(names) and all(name.startswith("llama-wide") for name in shown)


def test_long_names_are_cut_in_the_middle(tmp_path):
    first, second = names_in_legend([write(tmp_path, f"{LONG}-{LONG}-{i}", records()) for i in (1, 2)])
    assert max(len(first), len(second)) <= 44 and first.startswith("llama-wide") and first.endswith("long-name-1")
    assert "..." in first and second.endswith("long-name-2")


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    shown = names_in_legend([write(tmp_path / one, "same", records()) for one in "ab"])
    assert len(set(shown)) == 2 and [name[-6:] for name in shown] == ["a/same", "b/same"]


def test_runs_draws_what_is_there(tmp_path):
    for name, lines in (("one", records()), ("\u65e5\u672c", [])):
        (write(tmp_path / "runs", name, lines) / "config.yaml").write_text("model: {name: llama}\n")
    done = llmkit("runs", "--plot", "all.png", cwd=tmp_path)
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG") and done.stderr == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.png", "runs"]


def test_the_picture_is_the_same_for_the_same_metrics(tmp_path):
    run = write(tmp_path, "run", records())
    for name in ("a.png", "b.png"):
        plot_runs([run], tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_panels_and_sets_of_a_run_are_drawn_below_and_beside_its_losses(tmp_path):
    lines = [one | {"lr": 1e-3, "grad_norm": 1.0 + i % 3, "tokens_per_second": 5e3} for i, one in enumerate(records())]
    for one in lines:
        if "val_loss" in one:
            one["wiki/val_loss"] = one["val_loss"] + 1
    figure = draw_runs([write(tmp_path, "run", lines)])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    assert [axes.get_title() for axes in figure.axes] == ["run", "learning rate", "gradient norm", "tokens/s"]
    assert "wiki" in [text.get_text() for text in figure.legends[0].get_texts()]
    boxes = [axes.get_tightbbox(renderer) for axes in figure.axes]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    two = draw_runs([write(tmp_path, "a", lines), write(tmp_path, "b", lines)])
    assert len(two.axes) == 1


CURVES = {
    "still falling": ([4.0, 3.5, 3.2, 3.0, 2.8], None),
    "flat": ([4.0, 3.0, 2.9, 2.9, 2.899], None),
    "over-fitting since step 200": ([4.0, 3.0, 2.9, 3.0, 3.2], [4.0, 3.0, 2.8, 2.4, 2.0]),
    "unstable": ([4.0, 3.0, 5.0, 3.0, 2.9], None),
    "too few": ([4.0, 3.0], None),
}


@pytest.mark.parametrize("words", CURVES)
def test_a_sentence_says_what_the_curves_show(words):
    from llmkit.storage.curves import describe_curves

    val, train = CURVES[words]
    lines = [{"step": i * 100, "val_loss": loss, "loss": (train or val)[i]} for i, loss in enumerate(val)]
    assert describe_curves(lines).startswith(words)


def test_jumps_of_the_gradient_are_unstable():
    from llmkit.storage.curves import describe_curves

    lines = [
        {"step": i, "val_loss": 4 - i / 100, "loss": 4.0, "grad_norm": 9.0 if i % 8 == 0 else 1.0} for i in range(80)
    ]
    assert "gradient norm" in describe_curves(lines)
    steady = [line | {"grad_norm": 1.0} for line in lines]
    assert describe_curves(steady).startswith("still falling")


def test_a_run_that_learns_from_rewards_draws_them_and_not_its_loss(tmp_path):
    """Its loss is about 0 whatever it learns; the star is at the highest reward."""
    records = [{"step": 0, "tokens": 0, "val_loss": -0.7, "val_reward": 0.7}]
    records += [{"step": s, "tokens": s * 9, "loss": 0.0, "reward": s / 10} for s in (1, 2, 3)]
    records += [{"step": 3, "tokens": 27, "val_loss": -0.9, "val_reward": 0.9}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    curves = read_curves(tmp_path)
    assert curves.unit == "reward" and [point.loss for point in curves.train] == [0.1, 0.2, 0.3]
    assert curves.best[0].loss == 0.9 and not {"reward", "val_reward"} & curves.panels.keys()


def test_a_reward_that_rises_is_not_called_unstable():
    records = [{"step": s, "val_loss": loss} for s, loss in enumerate((-0.715, -0.72, -0.765, -0.81, -0.835, -0.9))]
    assert "unstable" not in describe_curves(records)
