"""Compare models by what people, or a model, find of their answers: pairs, judgements, and what follows from them.

A folder holds setup.json, answers.jsonl and judgements.jsonl; rating goes on where it was left.
"""

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.errors import DataError, UserError
from llmkit.files import file_sha256, write_atomically
from llmkit.intervals import SEED, bootstrap
from llmkit.readers.packed import suffix_of
from llmkit.readers.records import DOCUMENT_FORMATS, read_records
from llmkit.readers.tally import BadRecord
from llmkit.tokenizer.messages import to_messages

SETUP, ANSWERS, JUDGEMENTS = "setup.json", "answers.jsonl", "judgements.jsonl"
VERDICTS = ("left", "right", "tie", "both bad")
PROMPTS = ("prompt", "question", "instruction", "input", "text")  # fields of a record
JUDGE = "judge: "  # begins the name of a rater that is a model
POINTS = 400 / np.log(10)  # of a strength on Elo's scale: 400 points are odds of 10 to 1
DRAWN = 200  # times that prompts are drawn again for the intervals of strengths
ROUNDS = 200  # of the iteration for Bradley and Terry's strengths

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Pair:
    """Hold two answers to one prompt that are shown side by side.

    prompt       number of the prompt
    left, right  numbers of the models
    """

    prompt: int
    left: int
    right: int

    @property
    def id(self) -> str:
        return f"{self.prompt}-{min(self.left, self.right)}-{max(self.left, self.right)}"


def read_prompts(path: Path) -> list[Messages]:
    """Return the prompts of a file as conversations: each line of a text, or the field of a record that holds one."""
    found: list[Messages] = []
    if not path.is_file():
        raise DataError("no such file", at=path)
    for line, record, _ in read_records(path):
        if isinstance(record, BadRecord):
            raise DataError("a prompt can't be read", at=record.place, got=record.reason)
        if DOCUMENT_FORMATS.get(suffix_of(path)) == "text":
            found += [[{"role": "user", "content": one}] for one in record["text"].split("\n") if one.strip()]
            continue
        if isinstance(record.get("messages"), list):
            messages, _ = to_messages(record["messages"], Counter())
            last = max((i for i, one in enumerate(messages) if one["role"] == "user"), default=-1)
            if last >= 0:
                found.append(messages[: last + 1])
                continue
        name = next((name for name in PROMPTS if isinstance(record.get(name), str) and record[name].strip()), None)
        if name is None:
            expected = f"messages, or one of {', '.join(PROMPTS)}"
            raise DataError("a record has no prompt", at=f"{path}:{line}", got=", ".join(record), expected=expected)
        found.append([{"role": "user", "content": record[name]}])
    if not found:
        raise DataError("there is no prompt", at=path)
    return found


def make_pairs(prompts: int, models: int, seed: int) -> list[Pair]:
    """Return each prompt with each two models, in random order and on random sides, the same for all raters."""
    draw = np.random.default_rng(seed)
    pairs = [(i, a, b) for i in range(prompts) for a, b in itertools.combinations(range(models), 2)]
    order, swaps = draw.permutation(len(pairs)), draw.random(len(pairs)) < 0.5
    return [Pair(i, b, a) if swaps[k] else Pair(i, a, b) for k in order for i, a, b in [pairs[k]]]


# ---- the folder -----------------------------------------------------------------------------------------------------


def open_folder(folder: Path, models: list[str], prompts: Path, options: dict[str, Any]) -> None:
    """Create the folder of a comparison, or check that it is one of the same models, prompts and options."""
    setup = {"models": models, "prompts_sha256": file_sha256(prompts), **options}
    if (folder / SETUP).is_file():
        before = json.loads((folder / SETUP).read_text(encoding="utf-8"))
        if changed := [key for key in setup if before.get(key) != setup[key]]:
            what, got = f"this folder compares with other {changed[0]}", before.get(changed[0])
            raise UserError(what, at=folder, got=got, fix="name another --out")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError("the folder holds files that are no comparison's", at=folder, fix="name another --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / SETUP, json.dumps(setup, indent=2) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a JSONL file, without one that was cut off by a kill."""
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else []:
        with suppress(ValueError):
            rows += [json.loads(line)] if line.strip() else []
    return rows


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Append a line to a JSONL file."""
    with path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        whole = file.read(1) in (b"", b"\n")  # a line that was cut off stays a line of its own
        file.write(("" if whole else "\n").encode() + json.dumps(row, ensure_ascii=False).encode() + b"\n")


def read_answers(folder: Path) -> dict[tuple[int, int], str]:
    """Return the answers by (model, prompt)."""
    return {(row["model"], row["prompt"]): row["text"] for row in read_lines(folder / ANSWERS)}


def judge_pair(folder: Path, pair: Pair, rater: str, verdict: str, note: str = "", **more: Any) -> None:
    """Keep a judgement. A later one of the same rater on the same pair replaces it."""
    row = {"pair": pair.id, **asdict(pair), "rater": rater, "verdict": verdict, "note": note, **more}
    append_line(folder / JUDGEMENTS, row)


def read_judgements(folder: Path) -> list[dict[str, Any]]:
    """Return the newest judgement of each rater on each pair, with its `score`: 1 if the model with the lower number
    won, 0 if the other one did, 0.5 for a tie or two bad answers.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in read_lines(folder / JUDGEMENTS):
        if row["verdict"] == "undone":
            found.pop((row["rater"], row["pair"]), None)
            continue
        winner = {"left": row["left"], "right": row["right"]}.get(row["verdict"])
        first, second = sorted((row["left"], row["right"]))
        score = 0.5 if winner is None else float(winner == first)
        found[row["rater"], row["pair"]] = row | {"first": first, "second": second, "score": score}
    return list(found.values())


# ---- results --------------------------------------------------------------------------------------------------------


def compare_models(names: Sequence[str], judgements: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return what judgements say: how often each model beats each other one, and with more than two models their
    strengths, each with its 95 % interval; prompts are what is drawn again.
    """
    rows = list(judgements)
    by_prompt: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], []).append(row)
    parts, pairs = list(by_prompt.values()), []
    for first, second in itertools.combinations(range(len(names)), 2):
        own = [row for row in rows if (row["first"], row["second"]) == (first, second)]
        if not own:
            continue

        def rate(drawn: Sequence[list[dict]], first: int = first, second: int = second) -> float:
            scores = [
                one["score"] for part in drawn for one in part if (one["first"], one["second"]) == (first, second)
            ]
            return float(np.mean(scores)) if scores else float("nan")

        error, interval = bootstrap(parts, rate)
        wins = [sum(row["score"] == value for row in own) for value in (1.0, 0.0)]
        bad = sum(row["verdict"] == "both bad" for row in own)
        pairs.append({
            "model": names[first], "against": names[second], "win_rate": rate(parts), "win_rate_stderr": error,
            "win_rate_interval": list(interval), "wins": wins[0], "losses": wins[1],
            "ties": len(own) - sum(wins) - bad, "both_bad": bad, "judgements": len(own),
        })  # fmt: skip
    found: dict[str, Any] = {"pairs": pairs}
    if len(names) > 2 and rows:
        draw, points = np.random.default_rng(SEED), strengths(parts, len(names))
        drawn = [
            strengths([parts[k] for k in draw.integers(len(parts), size=len(parts))], len(names)) for _ in range(DRAWN)
        ]
        low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
        rows = zip(names, points, low.tolist(), high.tolist(), strict=True)
        found["strengths"] = [{"model": name, "points": one, "points_interval": [a, b]} for name, one, a, b in rows]
    return found


def strengths(parts: Sequence[list[dict[str, Any]]], models: int) -> list[float]:
    """Return the strengths of models on Elo's scale, 0 on average: odds of a win are their ratio (Bradley and Terry
    1952), found by Hunter's iteration (2004, Annals of Statistics 32). A tie is half a win for both.

    One tie of each two models is added, so that a model that never won has a finite strength.
    """
    wins = np.full((models, models), 0.5)
    for part in parts:
        for row in part:
            wins[row["first"], row["second"]] += row["score"]
            wins[row["second"], row["first"]] += 1 - row["score"]
    np.fill_diagonal(wins, 0)
    games, strength = wins + wins.T, np.ones(models)
    for _ in range(ROUNDS):
        strength = wins.sum(1) / (games / (strength[:, None] + strength)).sum(1)
        strength /= np.exp(np.log(strength).mean())
    return (POINTS * np.log(strength)).tolist()


def agreement(judgements: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each two raters how many pairs both judged, how often they agree (a win of either model, or neither),
    and Cohen's kappa (1960): 0 is chance, 1 is always.
    """
    by_rater: dict[str, dict[str, float]] = {}
    for row in judgements:
        by_rater.setdefault(row["rater"], {})[row["pair"]] = row["score"]
    found = []
    for one, other in itertools.combinations(by_rater, 2):
        common = sorted(by_rater[one].keys() & by_rater[other].keys())
        if not common:
            continue
        a, b = (np.array([by_rater[name][pair] for pair in common]) for name in (one, other))
        same = float((a == b).mean())
        chance = sum(float((a == value).mean() * (b == value).mean()) for value in (0.0, 0.5, 1.0))
        kappa = (same - chance) / (1 - chance) if chance < 1 else 1.0
        found.append({"raters": [one, other], "pairs": len(common), "agree": same, "kappa": kappa})
    return found


def summarize(folder: Path) -> dict[str, Any]:
    """Return the results of a comparison: of people, of each judging model, and how far they agree."""
    if not (folder / SETUP).is_file():
        raise UserError("there is no comparison in this folder", at=folder, fix="name that of `llmkit rate --out`")
    names = json.loads((folder / SETUP).read_text(encoding="utf-8"))["models"]
    rows = read_judgements(folder)
    people = [row for row in rows if not row["rater"].startswith(JUDGE)]
    found: dict[str, Any] = {"models": names, "judgements": len(people), **compare_models(names, people)}
    judges = dict.fromkeys(row["rater"] for row in rows if row["rater"].startswith(JUDGE))
    found["judges"] = {name: compare_models(names, [row for row in rows if row["rater"] == name]) for name in judges}
    found["agreement"] = agreement(rows)
    return found
