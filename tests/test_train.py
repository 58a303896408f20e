"""The loop: what it adds up, what it survives, and that each option does what it says."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import llmkit, metrics, tiny_config
from safetensors.torch import load_file

from llmkit.config.fields import Choice
from llmkit.config.load import load_config
from llmkit.errors import USAGE, UserError
from llmkit.models import llama
from llmkit.models.hf_config import read_config
from llmkit.parallel.compile import describe_checkpointing
from llmkit.parallel.world import start_world
from llmkit.storage import checkpoint
from llmkit.storage.locate import load_located, locate
from llmkit.storage.manifest import list_checkpoints, newest_intact_checkpoint, verify
from llmkit.storage.run import open_run
from llmkit.tokenizer.chat_template import encode_chat
from llmkit.tokenizer.load import load_tokenizer
from llmkit.training.loop import train
from llmkit.training.prepare import check_rows_option, prepare
from llmkit.training.progress import initial_counters, update_loss_scale
from llmkit.types import IGNORE_INDEX


def run(corpus: Path, folder: Path, say=lambda line: None, **sections) -> tuple[Path, dict]:
    """Train in this process. Return the run directory and the summary."""
    folder.mkdir(exist_ok=True)
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(tiny_config(corpus, **sections)))
    config = load_config(path, [f"run_dir={folder / 'run'}"])
    return folder / "run", train(config, say=say)


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / f"step-{step:06d}" / "model" / "model.safetensors")


def worst(one: dict, other: dict) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


def steps(number: int, **train_options) -> dict:
    return {"max_steps": number, **train_options}


# ---- arithmetic -----------------------------------------------------------------------------------------------------


def test_accumulation_changes_nothing(corpus, tmp_path):
    made = {}
    for micro in (8, 4, 1):
        where, _ = run(corpus, tmp_path / str(micro), (said := []).append, optimizer={"lr": 1e-3},
                       train=steps(3, micro_batch_size=micro))  # fmt: skip
        assert f"8 = {micro} micro x {8 // micro} accumulated" in "\n".join(said)
        made[micro] = (weights(where, 3), [r.get("loss") for r in metrics(where)])
    assert worst(made[8][0], made[1][0]) < 1e-5 and worst(made[8][0], made[4][0]) < 1e-5
    assert made[8][1] == pytest.approx(made[1][1], abs=1e-5)


@pytest.mark.slow
def test_two_ranks_train_as_one(corpus, tmp_path):
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump(tiny_config(corpus, train=steps(3, micro_batch_size=2), optimizer={"lr": 1e-3}))
    )
    llmkit("pretrain", "c.yaml", "-o", "run_dir=one", cwd=tmp_path)
    llmkit("pretrain", "c.yaml", "-o", "run_dir=two", "--nproc", 2, cwd=tmp_path)
    assert worst(weights(tmp_path / "one", 3), weights(tmp_path / "two", 3)) < 1e-5
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, abs=1e-4)


def test_checkpointing_is_the_same_gradient_from_blocks_made_twice(corpus, tmp_path, monkeypatch):
    calls = []
    attend = llama.attend
    monkeypatch.setattr(llama, "attend", lambda *a, **k: calls.append(torch.is_grad_enabled()) or attend(*a, **k))
    made = {}
    for mode, recomputed, words in (("none", 0, "none"), ("full", 2, "all"), (2, 1, "one in 2"),
                                    ("selective", 2, "all but matrix products"),
                                    (0.5, 2, "all but 50% of the matrix products")):  # fmt: skip
        calls.clear()
        where, _ = run(corpus, tmp_path / str(mode), (said := []).append, train=steps(3, gradient_checkpointing=mode))
        assert f"2, {words} recomputed, compiled: no" in "\n".join(said)
        assert sum(calls) == 5 * (2 + recomputed)  # three steps, after a plan and a rehearsal
        made[mode] = weights(where, 3)
    assert all(worst(made["none"], others) < 1e-6 for others in made.values())


@pytest.mark.slow
def test_compiled_blocks_are_the_same_model(corpus, tmp_path):
    made = []
    for mode, words in ((False, "compiled: no (as the config says)"), (True, "compiled: every block, and the loss")):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        where, _ = run(corpus, tmp_path / str(mode), (said := []).append, optimizer={"lr": 1e-3},
                       train=steps(3, compile=mode))  # fmt: skip
        assert words in "\n".join(said)
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) is mode
        made.append(weights(where, 3))
    assert worst(*made) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", 2, "selective", 0.5])
def test_many_blocks_are_recomputed_and_compiled_as_one(corpus, tmp_path, mode):
    made = []
    for options in ({}, {"gradient_checkpointing": mode, "compile": True}):
        torch._dynamo.reset()
        where, _ = run(corpus, tmp_path / str(len(options)), (said := []).append, optimizer={"lr": 1e-3},
                       model={"num_hidden_layers": 12}, train=steps(2, **options))  # fmt: skip
        made.append(weights(where, 2))
    assert f"12, {describe_checkpointing(mode)}, compiled: every block" in "\n".join(said)
    assert worst(*made) < 1e-5


@pytest.mark.parametrize("model", ["gpt2", "llama"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "muon"])
def test_the_loss_falls(corpus, tmp_path, model, optimizer):
    section = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    config = tiny_config(corpus, train=steps(40), optimizer={"name": optimizer, "lr": 1e-2})
    config["model"] = {"name": model, **section}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    train(load_config(tmp_path / "c.yaml", [f"run_dir={tmp_path / 'run'}"]), say=print)
    losses = [r["val_loss"] for r in metrics(tmp_path / "run") if "val_loss" in r]
    assert losses[0] - losses[-1] > 1.0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains_close_to_fp32(corpus, tmp_path, monkeypatch, precision):
    for place in (
        "llmkit.parallel.device.matmul_rate",
        "llmkit.training.loop.matmul_rate",
    ):  # a minute in fp16 on a CPU
        monkeypatch.setattr(place, lambda *_: 1e15)
    losses = {}
    for name in ("fp32", precision):
        where, _ = run(corpus, tmp_path / name, train=steps(20, precision=name))
        losses[name] = [r["val_loss"] for r in metrics(where) if "val_loss" in r]
        assert all(tensor.dtype == torch.float32 for tensor in weights(where, 20).values())
    assert losses[precision][-1] == pytest.approx(losses["fp32"][-1], rel=0.05)
    assert all(low != full for low, full in zip(*losses.values(), strict=True))


def test_the_fp16_scale_halves_after_a_bad_step_and_doubles_after_enough_good_ones(monkeypatch):
    monkeypatch.setattr("llmkit.training.progress.SCALE_GROWTH", 3)
    steps_found_inf = [1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    scales = {}
    for precision in ("fp16", "bf16"):
        tensors = initial_counters(torch.device("cpu"), precision)
        scales[precision] = []
        for found_inf in steps_found_inf:
            update_loss_scale(tensors, torch.tensor(float(found_inf)), precision)
            scales[precision].append(tensors["scale"].item())
        assert tensors["skipped"] == 3 and tensors["bad_in_a_row"] == 0 and tensors["good_in_a_row"] == 7
    assert scales["fp16"] == [2**15, 2**14, 2**14, 2**14, 2**13, 2**13, 2**13, 2**14, 2**14, 2**14, 2**15, 2**15]
    assert set(scales["bf16"]) == {1}


def test_dropout_draws_differ_by_step_and_turn_off_in_evaluation(corpus, tmp_path):
    model = {"name": "gpt2", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "resid_pdrop": 0.5,
             "max_position_embeddings": 64}  # fmt: skip
    config = tiny_config(corpus, train=steps(2), eval={"every": 1}) | {"model": model}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    values = {}
    for dropout in (0.0, 0.5):
        loaded = load_config(
            tmp_path / "c.yaml", [f"model.resid_pdrop={dropout}", f"run_dir={tmp_path / str(dropout)}"]
        )
        train(loaded, say=print)
        values[dropout] = (
            [record.get("loss") for record in metrics(tmp_path / str(dropout))],
            metrics(tmp_path / str(dropout))[0]["val_loss"],
        )
    assert values[0.0][1] == values[0.5][1]  # before any step: the same weights, and no dropout in evaluation
    assert values[0.0][0] != values[0.5][0]


# ---- resuming -------------------------------------------------------------------------------------------------------

LONG = {
    "train": {"max_steps": 240, "global_batch_size": 8, "micro_batch_size": 4},  # epochs are about 30 steps
    "checkpoint": {"every": 20}, "eval": {"every": 40}, "log": {"every": 7},
    "model": {"name": "gpt2", "resid_pdrop": 0.1, "attn_pdrop": 0.1, "embd_pdrop": 0.1},
}  # fmt: skip


def long_config(corpus: Path, optimizer: str, average: str = "none") -> str:
    config = tiny_config(corpus, **LONG, optimizer={"name": optimizer, "lr": 1e-2})
    config["checkpoint"]["average"] = average
    config["model"].pop("num_key_value_heads")
    return yaml.safe_dump(config)


@pytest.mark.parametrize(("optimizer", "average"), [("adamw", "none"), ("muon", "tail")])
def test_kill_9_and_the_same_command_give_the_same_bits(corpus, tmp_path, optimizer, average):
    (tmp_path / "c.yaml").write_text(long_config(corpus, optimizer, average))
    llmkit("pretrain", "c.yaml", "-o", "run_dir=calm", cwd=tmp_path)
    command = [sys.executable, "-m", "llmkit", "pretrain", "c.yaml", "-o", "run_dir=killed"]
    for step in (60, 140):
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (tmp_path / f"killed/checkpoints/step-{step:06d}").exists():
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = llmkit("pretrain", "c.yaml", "-o", "run_dir=killed", cwd=tmp_path)
    assert "resumed" in done.stdout
    assert worst(weights(tmp_path / "calm", 240), weights(tmp_path / "killed", 240)) == 0
    calm, killed = (
        load_file(tmp_path / name / "checkpoints/step-000240/trainer/tensors.safetensors")
        for name in ("calm", "killed")
    )
    assert calm.keys() == killed.keys() and all(torch.equal(calm[key], killed[key]) for key in calm)
    assert metrics(tmp_path / "calm") == metrics(tmp_path / "killed")
    logged = [record["step"] for record in metrics(tmp_path / "killed")]
    assert logged == sorted(set(logged))


def raw_weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Return the weights that training goes on from, where model/ has an average."""
    tensors = load_file(run_dir / "checkpoints" / f"step-{step:06d}" / "trainer" / "tensors.safetensors")
    return {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}


def test_what_is_kept_and_evaluated_is_the_average_of_the_last_weights(corpus, tmp_path):
    often = {"every": 1, "keep": 10}
    plain, _ = run(corpus, tmp_path / "plain", train=steps(5), checkpoint=often, eval={"every": 5})
    tail = often | {"average": "tail", "average_fraction": 0.5}
    where, _ = run(corpus, tmp_path / "tail", train=steps(5), checkpoint=tail, eval={"every": 5})
    raw = [raw_weights(where, step) for step in range(1, 6)]
    assert all(worst(raw[step - 1], weights(plain, step)) == 0 for step in range(1, 6))  # training is the same
    # A fraction of 1/2 is a power of 2. Step s is averaged in with 3 / (s + 2): that is s (s + 1) / 2 of the whole.
    shares = [1 / 35, 3 / 35, 6 / 35, 10 / 35, 15 / 35]
    expected = {name: sum(share * one[name] for share, one in zip(shares, raw, strict=True)) for name in raw[0]}
    kept = weights(where, 5)
    assert worst(kept, expected) < 1e-6 < worst(kept, raw[-1])
    averages, last = ({r["step"]: r.get("val_loss") for r in metrics(one)}[5] for one in (where, plain))
    again, _ = run(corpus, tmp_path / "again", train=steps(1), init_from=str(where), model=None)
    assert metrics(again)[0]["val_loss"] == pytest.approx(averages, abs=1e-6)
    assert averages != pytest.approx(last, abs=1e-4)


@pytest.mark.parametrize("modes", [("none", "tail"), ("tail", "none")])
def test_averaging_may_begin_or_end_when_a_run_is_resumed(corpus, tmp_path, modes):
    constant = {"name": "constant"}
    plain, _ = run(corpus, tmp_path / "plain", train=steps(8), schedule=constant)
    for length, mode in zip((4, 8), modes, strict=True):
        checkpoint = {"every": 4, "average": mode}
        where, _ = run(corpus, tmp_path / "changed", train=steps(length), schedule=constant, checkpoint=checkpoint)
    last = raw_weights(where, 8) if modes[-1] == "tail" else weights(where, 8)
    assert worst(weights(plain, 8), last) == 0


def test_a_finished_run_stays_finished_and_can_be_lengthened(corpus, tmp_path):
    where, _ = run(corpus, tmp_path, train=steps(10))
    before = metrics(where)
    run(corpus, tmp_path, train=steps(10))
    assert metrics(where) == before
    run(corpus, tmp_path, train=steps(20))
    assert metrics(where)[: len(before)] == before and metrics(where)[-1]["step"] == 20


def test_another_config_is_refused_and_fresh_starts_over(corpus, tmp_path):
    where, _ = run(corpus, tmp_path, train=steps(10))
    with pytest.raises(UserError, match="another config"):
        run(corpus, tmp_path, train=steps(10), optimizer={"lr": 5e-3})
    assert yaml.safe_load((where / "config.yaml").read_text())["optimizer"]["lr"] == 1e-2
    train(load_config(tmp_path / "c.yaml", [f"run_dir={where}"]), fresh=True, say=print)
    assert yaml.safe_load((where / "config.yaml").read_text())["optimizer"]["lr"] == 5e-3


def test_sigterm_saves_and_says_so(corpus, tmp_path):
    (tmp_path / "c.yaml").write_text(long_config(corpus, "adamw").replace("max_steps: 240", "max_steps: 100000"))
    command = [sys.executable, "-m", "llmkit", "pretrain", "c.yaml", "-o", "run_dir=r"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "r/checkpoints/step-000020").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143 and "a checkpoint is saved" in errors and "Traceback" not in errors
    last = list_checkpoints(tmp_path / "r")[-1]
    verify(last)
    assert metrics(tmp_path / "r")[-1]["step"] == int(last.name.removeprefix("step-"))


@pytest.mark.parametrize("file", ["model/model.safetensors", "trainer/tensors.safetensors", "trainer/state.json"])
@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_a_damaged_checkpoint_is_named_and_passed_over(corpus, tmp_path, capsys, file, damage):
    source, _ = cached_run(corpus)
    shutil.copytree(source, tmp_path / "run")
    (tmp_path / "c.yaml").write_text((source.parent / "c.yaml").read_text())
    victim = tmp_path / "run/checkpoints/step-000020" / file
    content = bytearray(victim.read_bytes())
    if damage == "gone":
        victim.unlink()
    else:
        content[len(content) // 2] ^= 1
        victim.write_bytes(content if damage == "bit" else content[:-1])
    assert newest_intact_checkpoint(tmp_path / "run").name == "step-000010"
    warning = capsys.readouterr().err
    assert "warning" in warning and str(victim) in warning
    for name in ("", "/model") if file.startswith("model") else ():  # the trainer's files are not needed to evaluate
        with pytest.raises(UserError) as caught:
            locate(f"{tmp_path}/run/checkpoints/step-000020{name}")
        assert caught.value.code == 4 and caught.value.at == victim


CACHED: dict = {}


def cached_run(corpus: Path) -> tuple[Path, dict]:
    """Return a run of 20 steps with checkpoints at 10 and 20, shared by tests that do not change it."""
    if not CACHED:
        folder = corpus / "cached"
        folder.mkdir()
        CACHED["made"] = run(corpus, folder)
    return CACHED["made"]


def test_a_second_writer_of_a_run_directory_exits_7(corpus, tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tiny_config(corpus)))
    first = open_run(tmp_path / "r", {"a": 1})
    errors = llmkit("pretrain", "c.yaml", "-o", "run_dir=r", cwd=tmp_path, code=7).stderr
    assert "another process is training" in errors and f"pid {os.getpid()} " in errors
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["lock", "run.json"]
    first.close()
    open_run(tmp_path / "r", {"a": 1}).close()


# ---- faults ---------------------------------------------------------------------------------------------------------


def test_divergence_exits_6_after_max_bad_steps_and_the_weights_stay_finite(corpus, tmp_path):
    config = tiny_config(corpus, optimizer={"lr": 1e30}, train=steps(40, max_bad_steps=3), checkpoint={"every": 1},
                         log={"every": 1})  # fmt: skip
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    errors = llmkit("pretrain", "c.yaml", "-o", "run_dir=r", cwd=tmp_path, code=6).stderr
    assert "not finite in 3 steps in a row" in errors and "lr 1e+30" in errors
    command, step = re.search(r"llmkit (data inspect \S+) --step (\d+)", errors).groups()
    assert f"steps {step} to" in errors
    assert "33 tokens, 32 targets" in llmkit(*command.split(), "--step", step, cwd=tmp_path).stdout
    saved = list_checkpoints(tmp_path / "r")
    assert saved
    for folder in saved:
        assert all(torch.isfinite(t).all() for t in load_file(folder / "model" / "model.safetensors").values())


def test_a_full_disk_leaves_older_checkpoints_and_goes_on(corpus, tmp_path, monkeypatch):
    where, _ = run(corpus, tmp_path, train=steps(10))
    real = checkpoint.save_file

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError) as caught:
        run(corpus, tmp_path, train=steps(20))
    assert caught.value.code == 5 and "bytes free" in caught.value.got and str(where) in caught.value.got
    assert [folder.name for folder in list_checkpoints(where)] == ["step-000010"]
    monkeypatch.setattr(checkpoint, "save_file", real)
    run(corpus, tmp_path, train=steps(20))
    assert newest_intact_checkpoint(where).name == "step-000020"


# ---- options that something must observe ----------------------------------------------------------------------------


def test_early_stopping_and_the_best_checkpoint_is_kept(corpus, tmp_path):
    # A rate far too high after a good start: the val loss rises, and the run ends long before its length.
    where, summary = run(
        corpus, tmp_path, train=steps(400, early_stopping_patience=3), eval={"every": 5}, optimizer={"lr": 0.1},
        checkpoint={"every": 5, "keep": 1}, schedule={"name": "constant"},
    )  # fmt: skip
    assert "stopped early" in summary["ended"] and summary["steps"] < 400
    evaluated = {r["step"]: r["val_loss"] for r in metrics(where) if "val_loss" in r and r["step"]}
    best = min(evaluated, key=evaluated.get)
    assert {f.name for f in list_checkpoints(where)} == {f"step-{best:06d}", f"step-{summary['steps']:06d}"}
    assert len([step for step in evaluated if step > best]) == 3
    assert locate(where).folder.parent.name == f"step-{best:06d}"


def test_deterministic_is_asked_for_when_the_config_says_so(corpus, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("llmkit.training.loop.make_deterministic", asked.append)
    for wanted in (False, True):
        run(corpus, tmp_path / str(wanted), train=steps(1, deterministic=wanted))
        assert len(asked) == wanted


def test_samples_tensorboard_plot_and_report(corpus, tmp_path):
    where, _ = run(corpus, tmp_path, eval={"sample_prompt": "the", "sample_tokens": 5}, log={"tensorboard": True})
    assert all(record["sample"].startswith("the") for record in metrics(where) if "val_loss" in record)
    assert list((where / "tensorboard").glob("events*"))
    assert (where / "loss.png").read_bytes().startswith(b"\x89PNG") and "![loss]" in (where / "report.md").read_text()


def test_lengths_in_tokens_and_epochs(corpus, tmp_path):
    for name, length, expected in (("a", {"max_tokens": 1000}, 4), ("b", {"epochs": 0.1}, None)):
        (tmp_path / name).mkdir()
        config = tiny_config(corpus)
        config["train"] = {k: v for k, v in config["train"].items() if k != "max_steps"} | length
        (tmp_path / name / "c.yaml").write_text(yaml.safe_dump(config))
        header = train(load_config(tmp_path / name / "c.yaml"), dry_run=True, say=print)
        steps_planned = int(header["length"].split()[0])
        if expected:
            assert steps_planned == expected
        else:
            assert float(header["length"].split()[-2]) == pytest.approx(0.1, abs=0.02)


def test_option_errors_come_at_once_and_write_nothing(corpus, tmp_path):
    with pytest.raises(UserError) as caught:
        run(corpus, tmp_path, optimizer={"learning_rate": 1}, schedule={"name": "cosin"}, model={"hidden_size": "x"})
    found = {caught.value.what} | {error.what for error in caught.value.others}
    assert found == {
        "optimizer.learning_rate is not a key",
        "schedule.name is unknown",
        "model.hidden_size is not valid",
    }
    with pytest.raises(UserError) as caught:
        run(
            corpus,
            tmp_path,
            model={"hidden_size": 33},
            data={"seq_len": 100},
            schedule={"name": "cosine", "warmup_steps": 50},
        )
    assert len([caught.value, *caught.value.others]) == 3
    assert not (tmp_path / "run").exists()


def write_sft_config(corpus: Path, folder: Path, records: list[dict], train: dict, **sections) -> None:
    """Write FOLDER/c.yaml, which fine-tunes the cached run on these records."""
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    data = {"kind": "sft", "path": str(folder / "records.jsonl"), "seq_len": 48} | sections.pop("data", {})
    config = tiny_config(corpus, train=train) | {"init_from": str(cached_run(corpus)[0]), "data": data} | sections
    config.pop("model")
    (folder / "c.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.parametrize("average", ["none", "tail"])
def test_lora_trains_only_the_adapter_and_resumes(corpus, tmp_path, average):
    pairs = [{"prompt": "the model reads ", "completion": f"the code of river {i}"} for i in range(40)]
    write_sft_config(corpus, tmp_path, pairs, steps(20), peft={"name": "lora", "r": 4, "dropout": 0.1})
    for name, lengths in (("once", (20,)), ("twice", (10, 20))):
        for length in lengths:
            train(load_config(tmp_path / "c.yaml", [f"run_dir={tmp_path / name}", f"train.max_steps={length}",
                                                    f"checkpoint.average={average}",
                                                    "schedule={name: constant}"]), say=print)  # fmt: skip
    adapter = "checkpoints/step-000020/model/adapter_model.safetensors"
    one, two = (load_file(tmp_path / name / adapter) for name in ("once", "twice"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    losses = [record["val_loss"] for record in metrics(tmp_path / "once") if "val_loss" in record]
    assert losses[-1] < losses[0] - 0.5
    located = locate(tmp_path / "once")
    assert located.is_adapter and read_config(located.base).hidden_size == 32
    with pytest.raises(UserError, match="init_from is an adapter"):
        train(load_config(tmp_path / "c.yaml", [f"init_from={tmp_path / 'once'}", "peft=null", "run_dir=x"]), say=print)


def test_a_second_method_goes_through_the_same_loop_bit_equal_when_resumed(corpus, tmp_path):
    gpt2 = {"name": "gpt2", "num_key_value_heads": None}
    config = tiny_config(corpus, train=steps(2))
    config["model"] = {key: value for key, value in (config["model"] | gpt2).items() if value is not None}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(config))
    train(load_config(tmp_path / "base.yaml", [f"run_dir={tmp_path / 'base'}"]), say=print)
    pairs = [{"prompt": "the model reads ", "completion": f"the code of river {i}"} for i in range(40)]
    write_sft_config(corpus, tmp_path, pairs, steps(8), peft={"name": "bitfit"}, checkpoint={"every": 4})
    options = [f"init_from={tmp_path / 'base'}", "schedule={name: constant}"]
    for name, lengths in (("once", (8,)), ("twice", (4, 8))):
        for length in lengths:
            overrides = [*options, f"run_dir={tmp_path / name}", f"train.max_steps={length}"]
            train(load_config(tmp_path / "c.yaml", overrides), say=print)
    files = [tmp_path / name / "checkpoints/step-000008/model/adapter_model.safetensors" for name in ("once", "twice")]
    one, two = map(load_file, files)
    assert all(torch.equal(one[key], two[key]) for key in one) and all(key.endswith(".bias") for key in one)
    losses = [record["val_loss"] for record in metrics(tmp_path / "once") if "val_loss" in record]
    assert losses[-1] < losses[0]
    merged, _ = load_located(locate(tmp_path / "once"), merge=True)
    base, tuned = weights(tmp_path / "base", 2), merged.state_dict()
    assert all(torch.equal(base[name], tuned[name]) == ("bias" not in name) for name in base if base[name].dim() == 1)


@pytest.mark.parametrize("peft", [{"name": "bitfit"}, {"name": "lora", "target_modules": ["c_attn", "q_proj"]}])
def test_a_method_that_does_not_fit_the_model_is_refused_before_data_is_encoded(corpus, tmp_path, peft):
    write_sft_config(corpus, tmp_path, [{"prompt": "the ", "completion": "river"}] * 20, steps(4), peft=peft)
    with pytest.raises(UserError, match=r"has none|matches no linear") as caught:
        train(load_config(tmp_path / "c.yaml", [f"run_dir={tmp_path / 'run'}"]), say=print)
    assert caught.value.code == USAGE and "c.yaml" in caught.value.at
    assert not (tmp_path / "run" / "data").exists()


def test_rows_of_added_tokens_need_a_method_that_trains_them(corpus, tmp_path):
    data, peft = {"special_tokens": ["<x>"]}, {"name": "lora", "new_tokens": False}
    pairs = [{"prompt": "the ", "completion": "river"}] * 20
    write_sft_config(corpus, tmp_path, pairs, steps(4), peft=peft, data=data, resize_embeddings=True)
    config = load_config(tmp_path / "c.yaml", [f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(UserError, match="if there are added tokens") as caught:
        train(config, say=print)
    assert caught.value.fix == "peft.new_tokens: true"
    with pytest.raises(UserError, match="rows of added tokens") as caught:
        check_rows_option(config.model_copy(update={"peft": Choice(name="bitfit")}), {}, 1)
    assert caught.value.fix == "peft.name: lora or dora"


def test_full_finetuning_moves_every_weight(corpus, tmp_path):
    write_sft_config(corpus, tmp_path, [{"prompt": "the ", "completion": "river is small"}] * 20, steps(4))
    train(load_config(tmp_path / "c.yaml", [f"run_dir={tmp_path / 'run'}"]), say=print)
    before, after = weights(cached_run(corpus)[0], 20), weights(tmp_path / "run", 4)
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_a_chat_template_file_shapes_the_rows_and_goes_into_checkpoints(corpus, tmp_path):
    template = "{% for turn in messages %}{{ turn.role }}> {{ turn.content }}{{ eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant> {% endif %}"
    (tmp_path / "chat.jinja").write_text(template)
    records = [{"messages": [{"role": "user", "content": "the river"}, {"role": "assistant", "content": "is small"}]}]
    write_sft_config(corpus, tmp_path, records * 8, steps(1), data={"chat_template": str(tmp_path / "chat.jinja")})
    config = load_config(tmp_path / "c.yaml", [f"run_dir={tmp_path / 'run'}"])
    batch = prepare(config, start_world()).batches("train", 1).batch_at(0)
    train(config, say=print)
    tokenizer = load_tokenizer(tmp_path / "run/checkpoints/step-000001/model")
    assert tokenizer.chat_template == template
    assert tokenizer.decode(batch.input_ids[0]).startswith("user> the river<|endoftext|>assistant> is small")
    targets = tokenizer.decode(batch.labels[batch.labels != IGNORE_INDEX])
    assert targets == " is small<|endoftext|>" * targets.count("is")  # the space of " is" is the template's
    prompt = encode_chat(tokenizer, [{"role": "user", "content": "one"}])
    assert tokenizer.decode(prompt) == "user> one<|endoftext|>assistant> "


def test_profiled_steps_leave_a_trace_and_a_table_that_adds_up(corpus, tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tiny_config(corpus, train=steps(6), eval={"every": 6})))
    out = llmkit("pretrain", "c.yaml", "-o", "run_dir=run", "--profile", 2, cwd=tmp_path).stdout
    assert "run/profile: profile.txt, trace.json" in out
    names = {
        event.get("name") for event in json.loads((tmp_path / "run/profile/trace.json").read_text())["traceEvents"]
    }
    assert {"aten::mm", "ProfilerStep#2", "ProfilerStep#3"} <= names and "ProfilerStep#4" not in names
    kinds, operations = (tmp_path / "run/profile/profile.txt").read_text().split("\n\n")
    assert sum(float(share) for share in re.findall(r"([\d.]+)%", kinds)) == pytest.approx(100, abs=0.5)
    assert {"matrix products", "optimizer"} <= {line.split("  ")[0] for line in kinds.splitlines()}
    rows = [re.split(r"  +", line) for line in operations.splitlines()[1:]]
    calls = {name: float(count) for name, count, *_ in rows}
    # 7 matrices in each of 2 blocks, and the head: forward, and two products in the backward. One is an addmm, which
    # is too short to be always among the longest: the sum of the head's gradient over chunks.
    assert calls["aten::mm"] == 3 * (7 * 2 + 1) - 1
