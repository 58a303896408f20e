"""Measure each part of `recipe: modern` alone: how many tokens, and how many seconds, it needs for the recipe's loss.

    python scripts/measure_recipe.py config.yaml                         # all parts, one seed, to choose
    python scripts/measure_recipe.py config.yaml row_scaling head_lr --seeds 3

Each run is a `llmkit pretrain` of the config with a part changed. The recipe itself is also run with fewer and more
tokens: from its losses, the script reads how many tokens the recipe needs for the loss of a part. `tokens` is the
part's tokens as a share of these: .93 means 7 % fewer. `seconds` counts what a step costs, too.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

from llmkit.config.load import load_config

LENGTHS = [0.7, 0.85, 1.0, 1.2]  # of the recipe's own runs, times the config's tokens
# name -> what is changed. A value of the recipe is repeated by none of them.
PARTS: dict[str, list[str]] = {
    "without: muon": ["optimizer={name: adamw, lr: 3.0e-3}"],
    "without: zero init": ["model.init=normal"],
    "without: query and key norms": ["model.name=llama"],
    "without: long decay": ["schedule.decay_fraction=0.2"],
    "without: momentum .9": ["optimizer.momentum=0.95"],
    "decay .8": ["schedule.decay_fraction=0.8"],
    "decay all": ["schedule.decay_fraction=1.0"],
    "cosine": ["schedule={name: cosine}"],
    "lr x .5": ["optimizer.lr=2.5e-3"],
    "lr x 2": ["optimizer.lr=1.0e-2"],
    "lr x 3": ["optimizer.lr=1.5e-2"],
    "adamw_lr x .4": ["optimizer.adamw_lr=2.0e-3"],
    "adamw_lr x 3": ["optimizer.adamw_lr=1.5e-2"],
    "embedding_lr x .3": ["optimizer.embedding_lr=1.5e-3"],
    "embedding_lr x 3": ["optimizer.embedding_lr=1.5e-2"],
    "embedding_lr x 10": ["optimizer.embedding_lr=5.0e-2"],
    "head_lr x .3": ["optimizer.head_lr=1.5e-3"],
    "head_lr x 3": ["optimizer.head_lr=1.5e-2"],
    "scalar_lr x 3": ["optimizer.scalar_lr=1.5e-2"],
    "scalar_lr x 10": ["optimizer.scalar_lr=5.0e-2"],
    "row_scaling": ["optimizer.row_scaling=true"],
    "cautious": ["optimizer.cautious_weight_decay=true"],
    "weight_decay 0": ["optimizer.weight_decay=0.0"],
    "momentum .85": ["optimizer.momentum=0.85"],
    "betas .8 .95": ["optimizer.betas=[0.8, 0.95]"],
    "betas .9 .99": ["optimizer.betas=[0.9, 0.99]"],
    "original lr": ["optimizer.adjust_lr=original", "optimizer.lr=2.0e-2", "optimizer.adamw_lr=5.0e-3"],
    "relu2": ["model.hidden_act=relu2"],
    "tied": ["model.tie_word_embeddings=true"],
    "half the batch": ["train.global_batch_size={half}"],
}


def run(config: Path, name: str, seed: int, overrides: list[str]) -> dict[str, float]:
    """Train once, unless it is done, and return the val loss and the seconds per token."""
    folder = config.parent / "recipe" / name.replace(" ", "_").replace(":", "") / str(seed)
    options = [f"run_dir={folder}", f"seed={seed}", "recipe=modern", *overrides]
    command = [sys.executable, "-m", "llmkit", "pretrain", str(config)]
    done = subprocess.run([*command, *(x for o in options for x in ("-o", o))], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name}: {done.stderr[-2000:]}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = sorted(line["tokens_per_second"] for line in lines if "tokens_per_second" in line)
    return {"val_loss": lines[-1]["val_loss"], "seconds": 1 / rates[len(rates) // 2]}


def tokens_for(loss: float, curve: list[tuple[float, float]]) -> float:
    """Return the share of its tokens at which the recipe reaches a loss, on a line through (share, loss) in log-log."""
    xs, ys = [math.log(share) for share, _ in curve], [math.log(loss) for _, loss in curve]
    middle, level = mean(xs), mean(ys)
    slope = sum((x - middle) * (y - level) for x, y in zip(xs, ys, strict=True)) / sum((x - middle) ** 2 for x in xs)
    return math.exp(middle + (math.log(loss) - level) / slope)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a config with train.max_tokens")
    parser.add_argument("parts", nargs="*", help="of PARTS, joined by + to change several; default: each alone")
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    if unknown := {part for name in args.parts for part in name.split("+")} - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    config = load_config(args.config, ["recipe=modern"])
    if not config.train.max_tokens:
        parser.error("the config has no train.max_tokens")
    tokens, half = config.train.max_tokens, config.train.global_batch_size // 2

    def losses(name: str, overrides: list[str]) -> list[dict[str, float]]:
        filled = [override.replace("{half}", str(half)) for override in overrides]
        return [run(args.config, name, seed, filled) for seed in range(args.seeds)]

    ours = {x: losses(f"recipe {x}", [f"train.max_tokens={int(x * tokens)}"]) for x in LENGTHS}
    curve = [(x, mean(r["val_loss"] for r in results)) for x, results in ours.items()]
    print("the recipe's val loss: " + ", ".join(f"{loss:.4f} at {share:g}" for share, loss in curve))
    print("\n| part | val loss | less than the recipe's, by seed | tokens | seconds |\n|---|---|---|---|---|")
    for name in args.parts or PARTS:
        results = losses(name, [override for part in name.split("+") for override in PARTS[part]])
        gains = [ours["val_loss"] - r["val_loss"] for ours, r in zip(ours[1.0], results, strict=True)]
        spread = f" (sd {stdev(gains):.4f})" if len(gains) > 1 else ""
        loss, cost = (mean(r[key] for r in results) for key in ("val_loss", "seconds"))
        fewer = 1 / tokens_for(loss, curve)
        slower = cost / mean(r["seconds"] for r in ours[1.0])
        print(f"| {name} | {loss:.4f} | {mean(gains):+.4f}{spread} | {fewer:.2f} | {fewer * slower:.2f} |", flush=True)


if __name__ == "__main__":
    main()
