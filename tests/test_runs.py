"""The run directory: whose files it holds, what damage it survives, and what a resumed run is told."""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from conftest import llmkit, metrics, tiny_config

from llmkit.commands.show import check_is_new
from llmkit.config.load import load_config
from llmkit.errors import MODEL, USAGE, DataError, ModelError, UserError
from llmkit.evals.perplexity import measure
from llmkit.files import temporary_path, write_beside
from llmkit.screen import count
from llmkit.storage.locate import base_sha256, load_located, locate
from llmkit.storage.manifest import (
    MANIFEST,
    add_dependent_run,
    best_checkpoint,
    list_checkpoints,
    newest_intact_checkpoint,
    read_checkpoint_manifest,
    verify,
)
from llmkit.storage.plot import plot_runs
from llmkit.storage.report import summarize
from llmkit.storage.run import METRICS, metrics_line, read_metrics, read_run_config, without_secrets
from llmkit.training.loop import train
from llmkit.training.schedules import SCHEDULES


def write_config(path: Path, corpus: Path, **sections) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tiny_config(corpus, **sections)))
    return path


def train_in(folder: Path, corpus: Path, overrides: tuple[str, ...] = (), fresh: bool = False, **sections) -> list[str]:
    """Train into FOLDER/run in this process. Return what it says."""
    said: list[str] = []
    path = write_config(folder / "c.yaml", corpus, **sections)
    train(load_config(path, [f"run_dir={folder / 'run'}", *overrides]), say=said.append, fresh=fresh)
    return said


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory) -> Path:
    """Return a run of 20 steps with checkpoints at 10 and 20; tests copy it."""
    folder = tmp_path_factory.mktemp("finished")
    train_in(folder, corpus)
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


# ---- whose files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fresh", [[], ["--fresh"]])
@pytest.mark.parametrize(
    "files", [["config.yaml"], ["report.md", "checkpoints/mine.txt"], ["notes.txt"], ["run.json", "metrics.jsonl"]]
)
def test_a_folder_with_files_of_the_users_is_never_written_to(corpus, tmp_path, files, fresh):
    for name in files:
        write_config(tmp_path / "mine" / name, corpus, run_dir="mine")
    if "run.json" in files:
        (tmp_path / "mine/run.json").write_text('{"a": 1}')  # of another tool
    config = write_config(tmp_path / "c.yaml", corpus, run_dir="mine")
    config = tmp_path / "mine/config.yaml" if files == ["config.yaml"] else config
    before = snapshot(tmp_path)
    errors = llmkit("pretrain", config, *fresh, cwd=tmp_path, code=USAGE).stderr
    assert "run_dir holds files that are no run's" in errors and files[0].split("/")[0] in errors
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("run_dir", "words"),
    [
        ("''", "not empty"),
        (".", "working dir"),
        ("..", "working dir"),
        ("data", "data.dir"),
        ("text", "path"),
        ("data/run", "lies in data.dir"),
    ],
)
def test_a_folder_that_can_be_no_run_is_refused(corpus, tmp_path, monkeypatch, run_dir, words):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = write_config(tmp_path / "c.yaml", corpus)
    overrides = [f"run_dir={run_dir}", "data.dir=data", "data.sources.0.path=text"]
    with pytest.raises(UserError, match=words) as caught:
        train(load_config(path, overrides))
    assert str(path) in caught.value.at or "run_dir" in caught.value.at
    assert not list(Path().iterdir())


def test_a_run_resumes_from_its_own_config_and_never_rewrites_it(run, capsys):
    own = run / "config.yaml"
    own.write_text("# a note of mine\n" + own.read_text())
    text = own.read_text()
    train(load_config(own, [f"run_dir={run}"]), say=lambda line: None)
    assert own.read_text() == text
    for options, overrides in (({}, ["log.every=1"]), ({"fresh": True}, ["train.max_steps=2"])):
        with pytest.raises(UserError, match="the run's own record"):
            train(load_config(own, [f"run_dir={run}", *overrides]), **options)
        assert own.read_text() == text and len(list_checkpoints(run)) == 2


def test_a_fresh_run_that_can_not_start_leaves_the_old_one(corpus, run, monkeypatch):
    before = snapshot(run)
    monkeypatch.setattr("llmkit.training.loop.make_model", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_in(run.parent, corpus, fresh=True)
    assert snapshot(run) == before


def test_fresh_keeps_a_checkpoint_that_another_run_needs(corpus, run, tmp_path):
    (tmp_path / "tuned").mkdir()
    add_dependent_run(run / "checkpoints/step-000020/model", tmp_path / "tuned")
    with pytest.raises(UserError, match="other runs start from") as caught:
        train_in(tmp_path, corpus, fresh=True)
    assert "step-000020 by" in caught.value.got and len(list_checkpoints(run)) == 2
    (tmp_path / "tuned").rmdir()
    train_in(tmp_path, corpus, fresh=True, train={"max_steps": 2})
    assert [path.name for path in list_checkpoints(run)] == ["step-000002"]


@pytest.mark.parametrize("name", ["report.md", "parts/mine.txt", "notes/a.txt"])
def test_a_build_never_writes_between_files_of_the_users(corpus, tmp_path, name):
    (tmp_path / "data" / name).parent.mkdir(parents=True)
    (tmp_path / "data" / name).write_text("mine")
    path = write_config(tmp_path / "c.yaml", corpus, data={"dir": str(tmp_path / "data")})
    with pytest.raises(DataError, match="files that are no build's") as caught:
        train(load_config(path, [f"run_dir={tmp_path / 'run'}"]))
    assert caught.value.got == name.split("/")[0]
    assert snapshot(tmp_path / "data") == {f"{tmp_path}/data/{name}": b"mine"}


def test_a_tokenizer_never_goes_into_a_folder_with_files(corpus, run):
    model = run / "checkpoints/step-000020/model"
    before = snapshot(model)
    errors = llmkit("tokenizer", "train", corpus / "text", "--out", model, cwd=run, code=USAGE).stderr
    assert "exists already and is not empty" in errors and snapshot(model) == before


def test_an_output_appears_whole_or_not_at_all(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    with write_beside(tmp_path / "out") as folder:
        folder.mkdir()
        (folder / "a").write_text("a")
        assert not (tmp_path / "out").exists()
        left = [folder.with_name(folder.name.replace(str(os.getpid()), pid)) for pid in (str(dead.pid), "1")]
    for path in left:
        path.mkdir()
    with pytest.raises(ZeroDivisionError), write_beside(tmp_path / "other") as folder:
        folder.mkdir()
        raise ZeroDivisionError
    with write_beside(tmp_path / "out.txt") as file:
        file.write_text("b")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.txt", *(path.name for path in left)}
    (tmp_path / "out/a").unlink()
    with write_beside(tmp_path / "out") as folder:  # replaces an empty folder
        folder.mkdir()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.txt", left[1].name}  # 1 is a running process


def test_what_a_kill_left_behind_is_cleaned_by_the_next_save(corpus, run):
    dead = subprocess.Popen(["true"])
    dead.wait()
    half = temporary_path(run / "config.yaml").name.replace(str(os.getpid()), str(dead.pid))
    for name in (half, "checkpoints/step-000015.tmp", "checkpoints/step-5.old.tmp", "tensorboard.old.tmp", "notes.tmp"):
        (run / name).mkdir()
    train_in(run.parent, corpus, train={"max_steps": 21})
    assert [path.name for path in run.rglob("*.tmp")] == ["notes.tmp"]  # the user's


# ---- damage ---------------------------------------------------------------------------------------------------------


def test_one_bit_in_a_manifest_is_noticed_or_means_nothing(run):
    folder = run / "checkpoints/step-000020"
    path = folder / MANIFEST
    content, good = path.read_bytes(), read_checkpoint_manifest(folder)
    noticed = 0
    for place in range(len(content)):
        for bit in range(8):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            try:
                assert read_checkpoint_manifest(folder) == good
            except ModelError as error:
                noticed += 1
                assert error.at == path
    assert noticed > 0.8 * 8 * len(content)  # the others change white space


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "3", "{", '{"files": 3}', '{"files": [{"file": 1}]}', "\xff"])
def test_a_manifest_of_any_shape_is_a_damaged_checkpoint_and_the_one_before_is_used(corpus, run, capsys, text):
    path = run / "checkpoints/step-000020" / MANIFEST
    path.write_bytes(text.encode("latin-1"))
    assert newest_intact_checkpoint(run).name == "step-000010"
    assert best_checkpoint(run).name == "step-000010"
    assert capsys.readouterr().err.count(str(path)) == 2
    with pytest.raises(ModelError, match="manifest"):
        locate(path.parent)
    train_in(run.parent, corpus)
    verify(path.parent)


def test_manifests_without_a_checksum_are_still_read(run):
    path = run / "checkpoints/step-000020" / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    path.write_text(json.dumps(manifest))
    assert newest_intact_checkpoint(run) == path.parent


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"3", b"data: 3", b"train: []", b"run_dir: [", b"{}: 1"])
def test_a_damaged_config_is_one_error_and_hides_no_other_run(corpus, run, content):
    (run / "config.yaml").write_bytes(content)
    shutil.copytree(run.parent / "run", run.parent / "runs/bad")
    errors = llmkit("eval", "run", "--perplexity", cwd=run.parent, code=MODEL).stderr
    assert "the run's config is damaged" in errors and "fix:" in errors
    with pytest.raises(ModelError, match="the run's config is damaged"):
        train_in(run.parent, corpus)
    assert "damaged" in str(summarize(run))


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"3", b'{"llmkit": []}', b"{"])
def test_a_damaged_run_json_is_one_error_and_written_again_by_the_run(corpus, run, content):
    (run / "run.json").write_bytes(content)
    errors = llmkit("eval", "run", "--perplexity", cwd=run.parent, code=MODEL).stderr
    assert "run.json" in errors and "resume the run" in errors
    train_in(run.parent, corpus)
    llmkit("eval", "run", "--perplexity", cwd=run.parent)


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe",
        b"[]",
        b"3",
        b'{"loss": 1.0}',
        b'{"step": "a"}',
        b'{"step": 1, "loss": []}',
        b"{",
        b'{"step": 1, "val_loss": ' + b"9" * 401 + b"}",
        b'{"step": null}',
    ],
)
def test_a_damaged_line_of_the_metrics_is_told_and_costs_no_other(corpus, run, capsys, line):
    good = read_metrics(run)
    path = run / METRICS
    path.write_bytes(line + b"\n" + path.read_bytes() + line[:-1])  # the last one was cut off by a kill
    assert read_metrics(run) == good
    assert "1 of the lines are damaged, the first is line 1" in capsys.readouterr().err
    assert summarize(run)["step"] == 20
    train_in(run.parent, corpus)
    assert read_metrics(run) == good


def test_metrics_are_json_even_if_they_are_not_finite(run):
    line = metrics_line({"step": 30, "tokens": 1, "loss": math.nan, "val_loss": math.inf})
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 30, "tokens": 1, "loss": None, "val_loss": None}
    with (run / METRICS).open("a") as file:
        file.write(line)
    assert read_metrics(run)[-1]["loss"] is None
    row = summarize(run)
    assert row["step"] == 30 and row["loss"] is None and row["best_step"] in (10, 20)
    plot_runs([run], run / "x.png")


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ('password="abc" and more', 'password="abc" and more'),
        ("pairs?token=abc.jsonl", "pairs?token=abc.jsonl"),
        ("https://me:pw@host/x?token=abc", "https://***@host/x?token=***"),
    ],
)
def test_a_stored_config_has_no_secrets_and_is_else_the_same(text, stored):
    assert without_secrets({"a": [text, 1], "b": {"c": text}}) == {"a": [stored, 1], "b": {"c": stored}}


def test_an_output_that_can_not_be_replaced_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="working directory"):
        check_is_new(Path())
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    dead = subprocess.Popen(["true"])
    dead.wait()
    half = temporary_path(tmp_path / "real/model.gguf").name.replace(str(os.getpid()), str(dead.pid))
    (tmp_path / "real" / half).write_text("half")
    check_is_new(tmp_path / "link")
    with write_beside(tmp_path / "link") as folder:
        folder.mkdir()
        (folder / "a").write_text("a")
    assert (tmp_path / "link/a").read_text() == "a"


def test_a_checkpoint_is_hashed_once_and_only_what_is_read(run, monkeypatch):
    hashed: list[str] = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: hashed.append(file.name) or digest(file, name))
    for _ in range(2):
        load_located(locate(run))
        base_sha256(locate(run).folder)
    assert len(hashed) == len(set(hashed)) and any(name.endswith("model.safetensors") for name in hashed)
    assert not any("trainer" in name for name in hashed)


# ---- resume ---------------------------------------------------------------------------------------------------------


def test_what_changed_is_shown_when_a_run_is_resumed(corpus, run):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        said = train_in(run.parent, corpus, train={"max_steps": 24}, log={"every": 2})
    finally:
        torch.set_num_threads(threads)
    changed = [line.split(maxsplit=1)[1] for line in said if line.strip().startswith("changed")]
    assert changed[:2] == ["train.max_steps: 20 -> 24", "log.every: 5 -> 2"], changed[2:]
    assert f"{count(threads, 'thread')} -> " in changed[2] and f"{threads + 1} threads" in changed[2]


def test_a_lora_run_keeps_its_base_while_the_base_run_goes_on(corpus, tmp_path):
    options = {"eval": {"every": 10}, "optimizer": {"lr": 1e-3}}
    train_in(tmp_path / "base", corpus, **options)
    pairs = [{"prompt": f"the river {i}", "completion": "reads a book"} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    text = {
        "run_dir": str(tmp_path / "tuned"), "init_from": str(tmp_path / "base/run"), "peft": {"name": "lora", "r": 2},
        "data": {"kind": "sft", "path": str(tmp_path / "pairs.jsonl"), "seq_len": 32},
        "train": {"max_steps": 4, "global_batch_size": 8, "compile": False}, "checkpoint": {"every": 2},
        "eval": {"every": None},
    }  # fmt: skip
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(text))
    train(load_config(tmp_path / "tune.yaml"), say=lambda line: None)
    began = read_run_config(tmp_path / "tuned")["init_from"]
    train_in(tmp_path / "base", corpus, ["train.max_steps=40", "checkpoint.keep=1"], **options)
    best = best_checkpoint(tmp_path / "base/run")
    assert Path(began) != best and Path(began).is_dir()
    train(load_config(tmp_path / "tune.yaml", ["train.max_steps=6"]), say=lambda line: None)
    assert read_run_config(tmp_path / "tuned")["init_from"] == began
    train(load_config(tmp_path / "tune.yaml"), fresh=True, say=lambda line: None)
    assert read_run_config(tmp_path / "tuned")["init_from"] == str(best)


@pytest.mark.slow
def test_auto_compiles_where_the_run_is_long_enough_and_keeps_its_choice(corpus, tmp_path, monkeypatch):
    options = {"train": {"compile": "auto", "max_steps": 3}}
    said = train_in(tmp_path / "short", corpus, **options)
    assert "compiled: no (takes about 0:00:45, saves about 0:00:0" in "\n".join(said)
    monkeypatch.setattr("llmkit.training.warmup.COMPILE_SECONDS", 0)
    said = train_in(tmp_path / "long", corpus, **options)
    assert "compiled: every block, and the loss (takes about" in "\n".join(said)
    assert any(line.startswith("compiled in ") for line in said)
    for name, compiled in (("short", False), ("long", True)):
        assert read_run_config(tmp_path / name / "run")["train"]["compile"] is compiled
        said = train_in(tmp_path / name, corpus, ["train.max_steps=4"], **options)
        assert ("compiled: every block" in "\n".join(said)) is compiled
    speeds = [row["eta_seconds"] for row in read_metrics(tmp_path / "long/run") if "eta_seconds" in row]
    assert max(speeds) < 5  # the time of the compilation is in no step


# ---- what is logged, and when it is saved ---------------------------------------------------------------------------


def test_metrics_are_averages_of_the_interval_however_the_batch_is_cut(corpus, tmp_path):
    experts = {"name": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}
    rows = {}
    for micro in (8, 2):
        options = {"train": {"max_steps": 4, "micro_batch_size": micro}, "log": {"every": 2}, "optimizer": {"lr": 1e-4}}
        train_in(tmp_path / str(micro), corpus, model=experts, **options)
        rows[micro] = [row for row in metrics(tmp_path / str(micro) / "run") if "balance" in row]
    options = {"train": {"max_steps": 4, "micro_batch_size": 8}, "log": {"every": 1}, "optimizer": {"lr": 1e-4}}
    train_in(tmp_path / "one", corpus, model=experts, **options)
    steps = [row for row in metrics(tmp_path / "one/run") if "balance" in row]
    assert len(rows[8]) == 2
    for i, row in enumerate(rows[8]):
        for key in ("loss", "balance"):
            assert row[key] == pytest.approx((steps[2 * i][key] + steps[2 * i + 1][key]) / 2, abs=1e-6)
        assert rows[2][i]["loss"] == pytest.approx(row["loss"], abs=1e-4)
        assert rows[2][i]["balance"] == pytest.approx(row["balance"], rel=0.05)  # that of fewer rows is another one


def test_the_loss_that_ended_a_run_is_logged(corpus, tmp_path):
    options = {"optimizer": {"lr": 1e30}, "train": {"max_bad_steps": 2}, "log": {"every": 100}, "eval": {"every": None}}
    with pytest.raises(UserError, match="not finite"):
        train_in(tmp_path, corpus, checkpoint={"every": 5}, **options)
    [last] = metrics(tmp_path / "run")  # before the checkpoint that would hold it
    assert last["step"] == 5 and last["skipped"] >= 2 and last["loss"] > 0


def test_an_early_stop_logs_its_last_interval(corpus, tmp_path):
    options = {"optimizer": {"lr": 1e-9}, "log": {"every": 7}, "eval": {"every": 4}}
    train_in(tmp_path, corpus, train={"early_stopping_patience": 2}, **options)
    rows = metrics(tmp_path / "run")
    assert rows[-1]["step"] % 7 and {"loss", "val_loss", "lr"} <= rows[-1].keys()


@pytest.mark.parametrize("max_steps", [4, 100])
def test_sigterm_at_an_evaluation_saves_first_and_is_no_success(corpus, tmp_path, monkeypatch, max_steps):
    """At the last step, too: the same command then measures the checkpoint and ends the run."""
    from llmkit.data.batches import Batches

    batch_at = Batches.batch_at

    def send(self, step):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
        return batch_at(self, step)

    monkeypatch.setattr(Batches, "batch_at", send)
    options = {"train": {"max_steps": max_steps}, "eval": {"every": 4}}
    with pytest.raises(UserError, match="interrupted at step 4; a checkpoint is saved") as caught:
        train_in(tmp_path, corpus, **options)
    assert caught.value.code == 143
    last = list_checkpoints(tmp_path / "run")[-1]
    assert last.name == "step-000004" and read_checkpoint_manifest(last)["val_loss"] is None
    if max_steps == 4:
        train_in(tmp_path, corpus, **options)
        assert read_checkpoint_manifest(last)["val_loss"] == metrics(tmp_path / "run")[-1]["val_loss"]
        train_in(tmp_path, corpus, **options)
        assert [row["step"] for row in metrics(tmp_path / "run")] == [0, 4]
        verify(last)


def test_a_val_loss_that_is_not_finite_is_never_the_best(corpus, tmp_path, monkeypatch):
    from llmkit.objectives import lm

    measure, calls = lm.perplexity, []  # the first call is the one before step 0, whose result is not kept

    def sometimes_nan(*args, **options):
        calls.append(args)
        return measure(*args, **options) | ({"val_loss": torch.nan} if len(calls) in (2, 4) else {})

    monkeypatch.setattr(lm, "perplexity", sometimes_nan)
    train_in(tmp_path, corpus)
    assert read_checkpoint_manifest(tmp_path / "run/checkpoints/step-000020")["val_loss"] is None
    assert best_checkpoint(tmp_path / "run").name == "step-000010"
    assert summarize(tmp_path / "run")["best_step"] == 10


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_eval_measures_what_the_evaluations_of_the_run_did(corpus, tmp_path, family):
    """The same rows, corrupted by the same seed; a text with unknown tokens has the bytes that it has."""
    (tmp_path / "text").mkdir()
    for i in range(12):
        text = (corpus / "text" / f"{i:02d}.txt").read_text()
        (tmp_path / "text" / f"{i}.txt").write_text(text.replace("river", "\u6cb3" if i else "\u5ddd"))
    model = {"name": family, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model |= {"head_dim": 16} if family == "t5" else {}
    tokenizer = {"train": "wordpiece", "vocab_size": 300, "extra_ids": 20 if family == "t5" else 0}
    data = {
        "dir": str(tmp_path / "data"), "seq_len": 32, "tokenizer": tokenizer, "split": {"val_fraction": 0.3},
        "sources": [{"name": "text", "path": str(tmp_path / "text")}],
    }  # fmt: skip
    options = {"train": {"max_steps": 4}, "eval": {"every": 4, "max_batches": None}, "seed": 7}
    path = write_config(tmp_path / "c.yaml", corpus, data=data, **options)
    values = yaml.safe_load(path.read_text()) | {"model": model}
    path.write_text(yaml.safe_dump(values))
    train(load_config(path, [f"run_dir={tmp_path / 'run'}"]), say=lambda line: None)
    in_training, result = metrics(tmp_path / "run")[-1], measure(locate(tmp_path / "run"), precision="fp32")
    if family != "llama":
        assert result["loss"] == pytest.approx(in_training["val_loss"], abs=1e-6)
        return
    manifest = json.loads((tmp_path / "data/manifest.json").read_text())["splits"]["val"]
    share = result["tokens"] / (manifest["tokens"] - manifest["documents"])  # each document has an end token
    bits = result["loss"] * result["tokens"] / math.log(2)
    assert 0.97 < bits / manifest["bytes"] / result["bits_per_byte"] < 1.03 and 0.97 < share < 1.03
    assert result["bits_per_byte"] == pytest.approx(in_training["bits_per_byte"], rel=0.05)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_step_trains(name):
    for max_steps in (1, 2, 3, 10):
        for options in ({}, {"min_lr_ratio": 0.0}) if name != "constant" else ({},):
            factors = [SCHEDULES[name](step, max_steps, **options) for step in range(max_steps)]
            assert min(factors) > 0 and max(factors) == 1


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_decays_are_those_of_transformers(kind):
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    make = getattr(transformers, f"get_{kind}_schedule_with_warmup")
    schedule = make(optimizer, num_warmup_steps=3, num_training_steps=20)
    for step in range(20):
        if step >= 3:
            ours = SCHEDULES[kind](step, 20, warmup_steps=3, min_lr_ratio=0.0)
            assert ours == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()
