"""Rate answers side by side: blind pairs, a page that goes on where it was left, and what follows from judgements."""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import llmkit, tiny_config

from llmkit.evals.rating import (
    JUDGEMENTS,
    Pair,
    agreement,
    append_line,
    compare_models,
    judge_pair,
    make_pairs,
    open_folder,
    read_judgements,
    read_prompts,
    strengths,
)

pytest.importorskip("starlette")


def judged(prompt: int, first: int, second: int, score: float, rater: str = "me") -> dict:
    pair = f"{prompt}-{first}-{second}"
    return {"prompt": prompt, "first": first, "second": second, "score": score, "rater": rater, "pair": pair,
            "verdict": "tie" if score == 0.5 else "left"}  # fmt: skip


def test_pairs_are_all_there_once_in_random_order_on_random_sides():
    pairs = make_pairs(50, 3, seed=1)
    assert len({pair.id for pair in pairs}) == len(pairs) == 150
    assert pairs == make_pairs(50, 3, seed=1) != make_pairs(50, 3, seed=2)
    assert 50 < sum(pair.left < pair.right for pair in pairs) < 100
    assert [pair.prompt for pair in pairs] != sorted(pair.prompt for pair in pairs)


def test_a_win_rate_counts_ties_as_half_and_has_an_interval():
    rows = [judged(i, 0, 1, score) for i, score in enumerate([1.0] * 6 + [0.0] * 2 + [0.5] * 2)]
    [pair] = compare_models(["a", "b"], rows)["pairs"]
    assert pair["win_rate"] == 0.7 and (pair["wins"], pair["losses"], pair["ties"]) == (6, 2, 2)
    low, high = pair["win_rate_interval"]
    assert 0.3 < low < 0.7 < high <= 1
    assert "strengths" not in compare_models(["a", "b"], rows)


def test_strengths_are_the_maximum_likelihood_of_bradley_and_terry():
    draw, true = np.random.default_rng(0), np.array([150.0, 0.0, -150.0])
    parts = []
    for i in range(4000):
        a, b = sorted(draw.choice(3, 2, replace=False).tolist())
        chance = 1 / (1 + 10 ** ((true[b] - true[a]) / 400))
        parts.append([judged(i, a, b, float(draw.random() < chance))])
    found = strengths(parts, 3)
    np.testing.assert_allclose(found, true, atol=25)
    assert sum(found) == pytest.approx(0, abs=1e-6)
    # at the maximum, each model has won as often as its strengths say
    wins, expected = np.full(3, 1.0), np.zeros(3)
    power = 10 ** (np.array(found) / 400)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        games = 1 + sum(row["first"] == a and row["second"] == b for [row] in parts)
        expected[a] += games * power[a] / (power[a] + power[b])
        expected[b] += games * power[b] / (power[a] + power[b])
    for [row] in parts:
        wins[row["first"]] += row["score"]
        wins[row["second"]] += 1 - row["score"]
    np.testing.assert_allclose(wins, expected, rtol=1e-6)
    assert all(np.isfinite(strengths([[judged(0, 0, 1, 1.0)]], 2)))  # a model that never won


def test_agreement_is_cohens_kappa():
    draw = np.random.default_rng(1)
    one = draw.choice([0.0, 0.5, 1.0], size=80)
    other = np.where(draw.random(80) < 0.6, one, draw.choice([0.0, 0.5, 1.0], size=80))
    rows = [judged(i, 0, 1, s, "ann") for i, s in enumerate(one)] + [
        judged(i, 0, 1, s, "bo") for i, s in enumerate(other)
    ]
    [found] = agreement(rows)
    kappa = pytest.importorskip("sklearn.metrics").cohen_kappa_score((one * 2).astype(int), (other * 2).astype(int))
    assert found["kappa"] == pytest.approx(kappa) and found["pairs"] == 80


def test_judgements_survive_a_line_that_was_cut_off(tmp_path):
    pair = Pair(0, 1, 0)
    judge_pair(tmp_path, pair, "me", "left")
    judge_pair(tmp_path, Pair(1, 0, 1), "me", "tie", "a note")
    path = tmp_path / JUDGEMENTS
    path.write_bytes(path.read_bytes() + b'{"pair": "2-0')
    assert len(read_judgements(tmp_path)) == 2
    judge_pair(tmp_path, pair, "me", "right")  # a later judgement replaces an earlier one
    first = {row["pair"]: row["score"] for row in read_judgements(tmp_path)}
    assert first == {"0-0-1": 1.0, "1-0-1": 0.5}


def test_judgements_after_a_line_that_was_cut_off_are_read(tmp_path):
    path = tmp_path / JUDGEMENTS
    path.write_bytes(b'{"pair": "2-0')
    append_line(path, {"pair": "0-0-1", "left": 0, "right": 1, "rater": "me", "verdict": "left", "prompt": 0})
    assert [row["score"] for row in read_judgements(tmp_path)] == [1.0]


def test_an_undone_judgement_is_none(tmp_path):
    judge_pair(tmp_path, Pair(0, 0, 1), "me", "left")
    judge_pair(tmp_path, Pair(0, 0, 1), "me", "undone")
    assert read_judgements(tmp_path) == []


def test_prompts_of_any_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.jsonl").write_text(
        '{"instruction": "say hi", "output": "hi"}\n'
        '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, '
        '{"role": "assistant", "content": "a"}]}\n'
    )
    assert read_prompts(tmp_path / "a.txt") == [[{"role": "user", "content": text}] for text in ("one", "two")]
    first, second = read_prompts(tmp_path / "b.jsonl")
    assert first == [{"role": "user", "content": "say hi"}] and [one["role"] for one in second] == ["system", "user"]


def test_a_folder_of_another_comparison_is_refused(tmp_path):
    from llmkit.errors import UserError

    (tmp_path / "p.txt").write_text("hi\n")
    open_folder(tmp_path / "r", ["a", "b"], tmp_path / "p.txt", {"seed": 0})
    open_folder(tmp_path / "r", ["a", "b"], tmp_path / "p.txt", {"seed": 0})
    with pytest.raises(UserError, match="other seed"):
        open_folder(tmp_path / "r", ["a", "b"], tmp_path / "p.txt", {"seed": 1})
    with pytest.raises(UserError, match="no comparison's"):
        open_folder(tmp_path, ["a", "b"], tmp_path / "p.txt", {"seed": 0})


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rate")
    for name, seed in (("a", 1), ("b", 2)):
        config = tiny_config(corpus, train={"max_steps": 2, "global_batch_size": 4, "compile": False})
        config |= {"seed": seed, "run_dir": f"runs/{name}"}
        config["model"]["max_position_embeddings"] = 512
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
        llmkit("pretrain", f"{name}.yaml", cwd=folder)
    (folder / "prompts.txt").write_text("the river\na model\none token\n")
    return folder


def ask(
    port: int, path: str, body: dict | None = None, kind: str = "application/json", host: str | None = None
) -> dict:
    headers = {"content-type": kind} | ({"host": host} if host else {})
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)
    with urllib.request.urlopen(request, timeout=10) as response:
        text = response.read().decode()
        return json.loads(text) if path != "/" else {"text": text}


def start(folder: Path, port: int, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "llmkit", "rate", "runs/a", "runs/b", "--prompts", "prompts.txt", "--out", "out"]
    command += ["--max-new-tokens", "8", "--port", str(port), *more]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        try:
            ask(port, "/next")
            return process
        except OSError:
            time.sleep(0.2)
    raise AssertionError(process.communicate(timeout=5))


def test_rating_goes_on_where_it_was_left_and_ends_with_the_results(folder):
    process = start(folder, 8371)
    state = ask(8371, "/next")
    assert (state["done"], state["total"]) == (0, 3) and "runs/" not in json.dumps(state)  # blind
    assert "<title>llmkit rate" in ask(8371, "/")["text"]
    first = state["pair"]
    assert ask(8371, "/judgement", {"pair": first, "verdict": "left", "note": "clearer"}) == {"last": first}
    for body, kind, host in (({"pair": first, "verdict": "left"}, "text/plain", None),
                             ({"pair": "9-9-9", "verdict": "left"}, "application/json", None),
                             ({"pair": first, "verdict": "great"}, "application/json", None),
                             ({"pair": first, "verdict": "left"}, "application/json", "evil.example")):  # fmt: skip
        with pytest.raises(urllib.error.HTTPError):
            ask(8371, "/judgement", body, kind, host)
    process.kill()
    process.wait()
    answers = (folder / "out/answers.jsonl").read_bytes()
    process = start(folder, 8372)
    assert (folder / "out/answers.jsonl").read_bytes() == answers  # no answer is written twice
    state = ask(8372, "/next")
    assert state["done"] == 1 and state["pair"] != first
    while "pair" in state:
        ask(8372, "/judgement", {"pair": state["pair"], "verdict": "tie"})
        state = ask(8372, "/next")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "3 judgements of people" in out
    rows = read_judgements(folder / "out")
    assert [row["verdict"] for row in rows] == ["left", "tie", "tie"] and rows[0]["note"] == "clearer"


def test_a_model_judges_the_same_pairs_and_its_agreement_is_printed(folder):
    options = ["runs/a", "runs/b", "--prompts", "prompts.txt", "--out", "out", "--max-new-tokens", 8]
    if not (folder / "out" / JUDGEMENTS).is_file():
        for pair in make_pairs(3, 2, 0):
            judge_pair(folder / "out", pair, "me", "tie")
    found = json.loads(llmkit("rate", *options, "--judge", "runs/a", "--json", cwd=folder).stdout)
    assert found["judges"]["judge: runs/a"]["pairs"][0]["judgements"] == 3
    [row] = [row for row in found["agreement"] if "judge: runs/a" in row["raters"]]
    assert row["pairs"] == 3 and 0 <= row["agree"] <= 1
    assert "judge: runs/a" in llmkit("rate", *options, "--results", cwd=folder).stdout
    said = llmkit("rate", *options, "--judge", "http://127.0.0.1:9", cwd=folder, code=None).stderr
    assert "the judging server does not answer" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["runs/a", "--prompts", "prompts.txt"], "two models or more"),
        (["runs/a", "runs/b", "--prompts", "none.txt"], "no such file"),
        (["runs/a", "runs/c", "--prompts", "prompts.txt", "--out", "other"], "there is no model"),
    ],
)
def test_what_can_not_be_rated_is_one_error(arguments, said, folder):
    done = llmkit("rate", *arguments, cwd=folder, code=None)
    assert done.returncode and said in done.stderr and done.stderr.count("error:") == 1
