"""What is measured while a model trains: further texts, tasks, the best checkpoint, and what is forgotten."""

import json
import math

import pytest
import yaml
from conftest import llmkit, metrics, sentences, tiny_config

from llmkit.data.splits import open_stream
from llmkit.errors import UserError
from llmkit.evals.perplexity import measure
from llmkit.storage.locate import locate
from llmkit.storage.manifest import best_checkpoint, list_checkpoints, read_checkpoint_manifest, step_of
from llmkit.tokenizer.load import load_tokenizer

TASK = """
task: next
dataset_path: json
output_type: multiple_choice
doc_to_text: question
doc_to_choice: answers
doc_to_target: right
metric_list: [{metric: acc}]
"""


@pytest.fixture
def folder(corpus, tmp_path):
    """Return a folder with a config that measures two sets and a task."""
    (tmp_path / "wiki.txt").write_text(sentences(100, 60))
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps({"prompt": f"the {i}", "completion": "small model"}) + "\n" for i in range(12))
    )
    records = [{"question": f"The {i}", "answers": ["loss is it", "xq zzy"], "right": i % 2} for i in range(10)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    (tmp_path / "next.yaml").write_text(TASK)
    measured = {
        "every": 5,
        "max_batches": None,
        "sets": {"wiki": str(tmp_path / "wiki.txt"), "pairs": str(tmp_path / "pairs.jsonl")},
        "tasks": [{"task": str(tmp_path / "next.yaml"), "data": str(tmp_path / "q.jsonl")}],
    }
    config = tiny_config(corpus, run_dir=str(tmp_path / "run"), eval=measured, checkpoint={"every": 5, "keep": 9})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def test_sets_and_tasks_are_measured_at_each_evaluation(folder):
    printed = llmkit("pretrain", "c.yaml", cwd=folder).stdout
    records = [one for one in metrics(folder / "run") if "val_loss" in one]
    assert [one["step"] for one in records] == [0, 5, 10, 15, 20]
    for one in records:
        assert math.isfinite(one["wiki/val_loss"]) and math.isfinite(one["pairs/val_loss"])
        assert one["next/acc"] * 10 == pytest.approx(round(one["next/acc"] * 10)) and "next/acc_stderr" in one
    assert records[-1]["wiki/val_loss"] < records[0]["wiki/val_loss"]
    assert "beside  pairs, wiki, next" in printed and " | next/acc 0." in printed
    # The set is what `llmkit eval` measures on the same file, but for the last window, which is not whole.
    last = measure(locate(folder / "run" / "checkpoints" / "step-000020"), data=str(folder / "pairs.jsonl"))
    assert last["loss"] == pytest.approx(records[-1]["pairs/val_loss"], rel=1e-4)
    assert "next/acc" in llmkit("runs", "run", cwd=folder).stdout


def test_the_best_checkpoint_is_the_one_that_eval_best_names(folder):
    for best, sign in (("next/acc", -1), ("pairs/val_loss", 1)):
        llmkit("pretrain", "c.yaml", "--fresh", "-o", f"eval.best={best}", "-o", "optimizer.lr=0.3", cwd=folder)
        values = {one["step"]: one[best] for one in metrics(folder / "run") if "val_loss" in one}
        checkpoints = [step_of(one) for one in list_checkpoints(folder / "run")]
        wanted = min(checkpoints, key=lambda step: (sign * values[step], -step))
        found = best_checkpoint(folder / "run")
        assert step_of(found) == wanted
        assert read_checkpoint_manifest(found)["best"] == {"name": best, "score": sign * values[wanted]}
        assert best in locate(folder / "run").choice


def test_tasks_are_asked_less_often(folder):
    llmkit("pretrain", "c.yaml", "-o", "eval.tasks_every=10", cwd=folder)
    records = [one for one in metrics(folder / "run") if "val_loss" in one]
    assert [one["step"] for one in records if "next/acc" in one] == [0, 10, 20]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["eval.best=nothing"], "eval.best is not measured"),
        (["eval.sets={none: missing.txt}"], "no such file"),
        (["eval.tasks=[missing.yaml]"], "no such task file"),
        (["eval.tasks=[helaswag]"], "hellaswag"),
        (["eval.every=null"], "eval.sets needs evaluations"),
        (["eval.tasks=[]", "eval.tasks_every=5"], "has no effect without eval.tasks"),
        (["eval.tasks_every=10", "eval.best=next/acc"], "eval.tasks_every"),
    ],
)
def test_what_can_not_be_measured_is_an_error_before_the_run(folder, overrides, words):
    options = [part for one in overrides for part in ("-o", one)]
    done = llmkit("pretrain", "c.yaml", *options, cwd=folder, code=None)
    assert done.returncode in (2, 3, 5) and words in done.stderr and not list_checkpoints(folder / "run")


@pytest.mark.parametrize("error", [UserError("out of questions"), MemoryError()], ids=["error", "memory"])
def test_a_task_that_fails_does_not_end_the_run(folder, monkeypatch, error):
    from llmkit.config.load import load_config
    from llmkit.tasks.run import Prepared
    from llmkit.training.loop import train

    def fail(*args):
        raise error

    monkeypatch.setattr(Prepared, "run", fail)
    lines = []
    train(load_config(folder / "c.yaml"), fresh=True, say=lines.append)
    assert any("warning: the task next fails" in line and "out of" in line for line in lines)
    assert metrics(folder / "run")[-1]["step"] == 20
    assert not any("micro-batch: again" in line for line in lines)


def test_a_fine_tuning_says_what_it_forgot(folder, corpus):
    llmkit("pretrain", "c.yaml", cwd=folder)
    (folder / "odd.jsonl").write_text(
        "".join(json.dumps({"prompt": f"q{i}", "completion": "zq xj " * 3}) + "\n" for i in range(40))
    )
    tuned = {
        "run_dir": str(folder / "tuned"), "init_from": str(folder / "run"),
        "data": {"kind": "sft", "path": str(folder / "odd.jsonl"), "seq_len": 32},
        "optimizer": {"name": "adamw", "lr": 3e-2},
        "train": {"max_steps": 20, "global_batch_size": 8, "compile": False},
        "eval": {"every": 10, "general": str(folder / "wiki.txt")},
    }  # fmt: skip
    (folder / "t.yaml").write_text(yaml.safe_dump(tuned))
    printed = llmkit("finetune", "t.yaml", "--full", cwd=folder).stdout
    records = [one for one in metrics(folder / "tuned") if "general/val_loss" in one]
    change = records[-1]["general/val_loss"] - records[0]["general/val_loss"]
    assert change > 0.1
    [line] = [line for line in printed.splitlines() if "general text" in line]
    assert f"{change:+.4f}" in line and "it forgot" in line


def test_memorization_is_seen_in_a_model_that_learnt_its_text_by_heart(tmp_path):
    """A text of random words, read a hundred times, is written word for word; val text of the same kind is not."""
    import random

    draw = random.Random(0)
    (tmp_path / "text").mkdir()
    for i in range(3):
        words = [f"{draw.choice('bcdfg')}{draw.choice('aeiou')}{draw.choice('klmnp')}" for _ in range(500)]
        (tmp_path / "text" / f"{i}.txt").write_text(" ".join(words))
    config = tiny_config(tmp_path, run_dir=str(tmp_path / "run"))
    config["model"] |= {"hidden_size": 128, "max_position_embeddings": 128}
    config["data"] |= {"seq_len": 128, "canaries": 4}
    config["optimizer"] = {"name": "adamw", "lr": 3e-3}
    config["train"] = {"max_steps": 400, "global_batch_size": 8, "compile": False, "precision": "fp32"}
    config["eval"], config["checkpoint"] = {"every": 400}, {"every": 400}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    llmkit("pretrain", "c.yaml", cwd=tmp_path)
    found = json.loads(llmkit("eval", "run", "--memorization", "--json", cwd=tmp_path).stdout)
    assert found["train_extracted"] > found["val_extracted"] == 0
    assert found["auc"] > 0.9
    assert [one["planted"] for one in found["canaries"]] == [1, 4, 16, 64, 0, 0, 0, 0]
    assert all(one["exposed"] == (one["planted"] > 1) for one in found["canaries"] if one["planted"] != 1)
    assert found["canaries"][3] | {"rank": 1, "exposure": 10.0} == found["canaries"][3]
    assert "planted secrets are exposed" in found["meaning"] and found["written_tokens"] > 1000


def test_canaries_are_planted_as_often_as_said_and_only_in_train(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(30):
        (tmp_path / "text" / f"{i:02d}.txt").write_text(sentences(i, 30))
    config = tiny_config(tmp_path)
    config["data"] |= {"canaries": 6, "seq_len": 16}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    llmkit("data", "build", "c.yaml", cwd=tmp_path)
    manifest = json.loads((tmp_path / "data/manifest.json").read_text())
    tokenizer = load_tokenizer(tmp_path / "data/tokenizer")
    texts = {}
    for split in ("train", "val"):
        stream = open_stream(tmp_path / "data", manifest, split)
        texts[split] = tokenizer.decode(stream.read(0, len(stream)).tolist())
    assert [one["repeats"] for one in manifest["canaries"]] == [1, 4, 16, 64, 1, 4]
    for one in manifest["canaries"]:
        assert texts["train"].count(f"\n{one['prefix']} {one['secret']}") == one["repeats"]
        assert one["secret"] not in texts["val"]
    before = manifest["fingerprint"]
    llmkit("data", "build", "c.yaml", "-o", "data.workers=2", cwd=tmp_path)
    assert json.loads((tmp_path / "data/manifest.json").read_text())["fingerprint"] == before
    llmkit("data", "build", "c.yaml", "-o", "data.canaries=0", cwd=tmp_path)
    assert json.loads((tmp_path / "data/manifest.json").read_text())["fingerprint"] != before


def test_the_documents_of_each_language_are_measured_on_their_own(folder):
    german = "Der Fluss ist heute sehr breit und das Wasser steht hoch über dem Ufer der Stadt. " * 3
    english = "The river is very wide today and the water is high above the bank of the town. " * 3
    rows = [german if i % 3 == 0 else english for i in range(24)]
    (folder / "two.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} {text}"}) + "\n" for i, text in enumerate(rows))
    )
    llmkit("pretrain", "c.yaml", cwd=folder)
    parts = json.loads(llmkit("eval", "run", "--data", "two.jsonl", "--by-language", "--json", cwd=folder).stdout)
    whole = json.loads(llmkit("eval", "run", "--data", "two.jsonl", "--json", cwd=folder).stdout)
    assert {name: one["documents"] for name, one in parts.items()} == {"en": 16, "de": 8}
    assert sum(one["tokens"] for one in parts.values()) == whole["tokens"]
    total = sum(one["loss"] * one["tokens"] for one in parts.values())
    assert total / whole["tokens"] == pytest.approx(whole["loss"], rel=1e-5)


def test_each_source_of_a_corpus_is_measured_on_its_own(tmp_path):
    for name, seed in (("even", 0), ("odd", 100)):
        (tmp_path / name).mkdir()
        for i in range(20):
            (tmp_path / name / f"{i}.txt").write_text(sentences(seed + i, 40).upper() if seed else sentences(i, 40))
    config = tiny_config(tmp_path, run_dir=str(tmp_path / "run"))
    config["data"]["sources"] = [{"name": name, "path": str(tmp_path / name)} for name in ("even", "odd")]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    llmkit("pretrain", "c.yaml", cwd=tmp_path)
    parts = json.loads(llmkit("eval", "run", "--by-source", "--json", cwd=tmp_path).stdout)
    whole = json.loads(llmkit("eval", "run", "--json", cwd=tmp_path).stdout)
    assert parts.keys() == {"even", "odd"} and abs(parts["even"]["loss"] - parts["odd"]["loss"]) > 0.01
    targets = sum(one["tokens"] for one in parts.values())
    mean = sum(one["loss"] * one["tokens"] for one in parts.values()) / targets
    assert targets == whole["tokens"] - 1 and mean == pytest.approx(whole["loss"], rel=0.02)
    assert "even" in llmkit("eval", "run", "--by-source", cwd=tmp_path).stdout
    assert "--by-source" in llmkit("eval", "run", "--by-source", "--data", "even", cwd=tmp_path, code=2).stderr


def test_another_build_is_neither_replaced_by_a_look_nor_planned_with(corpus, tmp_path):
    """A build with 300 tokens lies in data.dir: a config with 280 plans with these, and a look destroys nothing."""
    before = (corpus / "data" / "manifest.json").read_bytes()
    counted = {}
    for size in (280, 300):
        config = tiny_config(corpus, run_dir=str(tmp_path / "run"))
        config["data"]["tokenizer"] = {"train": "bpe", "vocab_size": size}
        (tmp_path / f"{size}.yaml").write_text(yaml.safe_dump(config))
        counted[size] = json.loads(llmkit("plan", f"{size}.yaml", "--json", cwd=tmp_path).stdout)["parameters"]
    assert counted[300] - counted[280] in (20 * 32, 2 * 20 * 32)  # embedding rows, with those of a head or without
    said = llmkit("data", "inspect", "280.yaml", cwd=tmp_path, code=3).stderr
    assert "other settings" in said and (corpus / "data" / "manifest.json").read_bytes() == before
    llmkit("data", "inspect", "300.yaml", cwd=tmp_path)
