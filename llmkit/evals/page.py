"""Draw the probabilities of a text's tokens as one HTML page, which loads nothing from elsewhere."""

import base64
import io
import math
from html import escape
from pathlib import Path

from torch import Tensor

from llmkit.evals.probabilities import ScoredText, TokenScore

PAGE = Path(__file__).with_name("page.html")
MOST_SURPRISE = 10.0  # nats: at and above it the colour is full
MOST_DIFFERENCE = 5.0  # nats
MOST_LAYERS = 12  # whose attention is drawn


def make_page(
    title: str,
    text: ScoredText,
    other: tuple[str, ScoredText] | None = None,
    why: tuple[str, list[float], list[Tensor]] | None = None,
) -> str:
    """Return the page of a text. Each token has the colour of its surprise, and on hover its probability and what else
    the model would have written.

    other  a second model, by name, and its scores: colours are then the difference, and the page says which is better
    why    see `attribute`
    """
    theirs = other[1].tokens if other else [None] * len(text.tokens)
    most = max((abs(value) for value in why[1]), default=0.0) if why else 0.0
    shown = []
    for i, (one, two) in enumerate(zip(text.tokens, theirs, strict=True)):
        share = why[1][i] / most if why and most else None
        shown.append(draw_token(one, two, share))
    count = len(text.tokens)
    facts = [f"{count} tokens", f"{-text.log_prob:.2f} nats in all", f"{-text.log_prob / count:.4f} a token"]
    if other:
        difference = (other[1].log_prob - text.log_prob) / count
        better = title if difference < 0 else other[0]
        facts.append(f"{other[0]}: {-other[1].log_prob / count:.4f} a token; {better} finds the text likelier")
    legend = "Blue: likelier than in the other model; orange: less likely" if other else "Orange: surprising"
    if why:
        facts.append(f"Likeliest next: {why[0]!r}. Underlined: what speaks for it (blue) or against it (orange)")
    return (
        PAGE.read_text(encoding="utf-8")
        .replace("{{title}}", escape(title))
        .replace("{{facts}}", escape(". ".join(facts)))
        .replace("{{legend}}", legend)
        .replace("{{pictures}}", draw_attention(why[2]) if why and why[2] else "")
        .replace("{{text}}", "".join(shown))  # last: the text may have any of the words above
    )


def draw_token(one: TokenScore, other: TokenScore | None, share: float | None) -> str:
    """Return a token as an HTML element."""
    if other is None:
        strength, blue = min(1.0, one.surprise / MOST_SURPRISE), False
    else:
        apart = other.surprise - one.surprise
        strength, blue = min(1.0, abs(apart) / MOST_DIFFERENCE), apart > 0
    lines = [f"{one.text!r}: probability {probability(one)}, rank {one.rank}"]
    if other is not None:
        lines.append(f"other model: probability {probability(other)}, rank {other.rank}")
    lines += [f"{value:.1%} {word!r}" for word, value in one.alternatives]
    style = f"--s:{strength:.3f}"
    classes = "t" + (" b" if blue else "")
    if share is not None:
        classes += " for" if share > 0 else " against"
        style += f";--w:{abs(share):.3f}"
    tip = escape("\n".join(lines), quote=True)
    return f'<span class="{classes}" style="{style}" tabindex="0" data-tip="{tip}">{escape(one.text)}</span>'


def probability(one: TokenScore) -> str:
    """Return a probability in percent, or if it is small as a power of ten."""
    value = math.exp(-one.surprise)
    return f"{value:.2%}" if value >= 1e-3 else f"{value:.1e}"


def draw_attention(layers: list[Tensor]) -> str:
    """Return a picture of the attention of each layer: one small square for each head."""
    from matplotlib.figure import Figure

    figures = []
    for number, heads in list(enumerate(layers, 1))[:MOST_LAYERS]:
        figure = Figure(figsize=(1.15 * len(heads), 1.3), layout="constrained")
        for i, head in enumerate(heads):
            axes = figure.add_subplot(1, len(heads), i + 1)
            axes.imshow(head.cpu().numpy() ** 0.5, cmap="Greys", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            axes.set_title(f"{number}.{i + 1}", fontsize=7, pad=2)
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=110)
        data = base64.b64encode(png.getvalue()).decode()
        figures.append(f'<img alt="attention of layer {number}" src="data:image/png;base64,{data}">')
    rest = f"<p>and {len(layers) - MOST_LAYERS} more layers</p>" if len(layers) > MOST_LAYERS else ""
    what = "Attention by layer and head: a row is a token, dark is where it looks (square roots of the weights)."
    return f"<section><p>{what}</p>{''.join(figures)}{rest}</section>"
