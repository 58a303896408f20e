"""Distillation: the divergences of trl, packed rows, a run that learns from its teacher."""

import json

import numpy as np
import pytest
import torch
import yaml
from conftest import llmkit, metrics
from safetensors.torch import load_file
from test_families import OURS, made

from llmkit.models import build_model
from llmkit.models.folder import save_model
from llmkit.objectives import distill
from llmkit.objectives.objective import Step
from llmkit.parallel.world import start_world
from llmkit.tokenizer.train import train_tokenizer
from llmkit.types import IGNORE_INDEX, Batch

WORDS = ["How large is the river, or the model? It reads tokens."] * 3


@pytest.mark.parametrize(("loss", "beta"), [("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.5)])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergences_equal_those_of_trl(loss, beta, temperature):
    from trl.experimental.gkd import GKDTrainer

    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 5, 40).mul(2).requires_grad_(), torch.randn(2, 5, 40) * 2
    labels = torch.tensor([[1, 2, -100, 4, 5], [-100, -100, 3, 3, -100]])
    found = distill.divergence(ours[labels >= 0], theirs[labels >= 0], loss, temperature).mean()
    found.backward()
    mine, ours.grad = ours.grad, None
    expected = GKDTrainer.generalized_jsd_loss(ours, theirs, labels, beta, temperature)
    expected.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(mine, ours.grad)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_chunks_of_packed_rows_have_the_gradient_of_the_whole(name, monkeypatch):
    student, teacher = made(OURS[name]), made(OURS[name])
    torch.manual_seed(0)
    for p in teacher.parameters():
        p.data += 0.1 * torch.randn_like(p)
    vocab = student.config.vocab_size
    ids = torch.randint(0, vocab, (2, 16))
    labels = torch.where(torch.rand(2, 16) < 0.6, torch.randint(0, vocab, (2, 16)), IGNORE_INDEX)
    segments = torch.tensor([[0] * 6 + [1] * 10] * 2)
    positions = torch.tensor([[*range(6), *range(10)]] * 2)
    batch = {"input_ids": ids, "labels": labels, "segments": segments, "positions": positions}
    monkeypatch.setattr(distill, "rows_in_chunk", lambda rows, *_: 3)
    options = {"loss": "reverse_kl", "temperature": 1.5}
    loss, _ = distill.sum_of_losses(student, batch, teacher=lambda device: teacher, **options)
    loss.backward()
    found = {key: p.grad.clone() for key, p in student.named_parameters()}
    student.zero_grad()
    places = {"segments": segments, "positions": positions}
    with torch.no_grad():
        theirs = teacher(ids, **places)
    whole = distill.divergence(student(ids, **places)[labels >= 0], theirs[labels >= 0], **options).sum()
    whole.backward()
    torch.testing.assert_close(loss, whole, rtol=1e-5, atol=1e-5)
    for key, p in student.named_parameters():
        torch.testing.assert_close(found[key], p.grad, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("distill"), train_tokenizer(WORDS, vocab_size=300)
    config = made(OURS["llama"]).config
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 64
    for seed, name in enumerate(("student", "teacher")):
        save_model(build_model(config, device="cpu", seed=seed), folder / name, **tokenizer.config_ids)
        tokenizer.save(folder / name)
    other = train_tokenizer(["Something else, 1 2 3"] * 3, vocab_size=300)
    save_model(build_model(config, device="cpu", seed=3), folder / "other", **tokenizer.config_ids)
    other.save(folder / "other")
    lines = [
        {"question": f"How large is {i}?", "answer": "It reads tokens" + ", or the model" * (i % 3)} for i in range(40)
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = {
        "init_from": "teacher",
        "data": {"kind": "sft", "path": "answers.jsonl", "seq_len": 64, "val_fraction": 0.2},
        "optimizer": {"name": "adamw", "lr": 5e-3},
        "schedule": {"name": "constant"},
        "train": {"max_steps": 30, "global_batch_size": 4, "precision": "fp32", "compile": False},
        "eval": {"every": 10}, "checkpoint": {"every": 5}, "log": {"every": 1},
    }  # fmt: skip
    (folder / "teach.yaml").write_text(yaml.safe_dump(run))
    llmkit("finetune", "teach.yaml", "--full", "-o", "run_dir=runs/teacher", cwd=folder)
    run |= {"init_from": "student", "objective": {"name": "distill", "teacher": "runs/teacher"}}
    run["train"] |= {"max_steps": 15}
    (folder / "distill.yaml").write_text(yaml.safe_dump(run))
    return folder


def test_a_step_does_not_depend_on_its_micro_batches(workplace):
    found = []
    for size in (1, 4):
        llmkit("finetune", "distill.yaml", "--full", "-o", f"run_dir=runs/micro-{size}", "-o", "train.max_steps=2",
               "-o", f"train.micro_batch_size={size}", cwd=workplace)  # fmt: skip
        found.append(load_file(workplace / f"runs/micro-{size}/checkpoints/step-000002/model/model.safetensors"))
    assert max((found[0][key] - found[1][key]).abs().max() for key in found[0]) < 1e-3


@pytest.mark.parametrize("options", [[], ["-o", "objective.on_policy=0.5", "-o", "objective.max_new_tokens=8"]])
def test_a_student_comes_near_its_teacher_and_goes_on_with_the_same_bits(options, workplace):
    name = f"runs/student-{len(options)}"
    llmkit("finetune", "distill.yaml", "--full", "-o", f"run_dir={name}", *options, cwd=workplace)
    found = metrics(workplace / name)
    losses = [record["loss"] for record in found if "loss" in record]
    values = [record["val_loss"] for record in found if "val_loss" in record]
    assert np.mean(losses[-3:]) < losses[0] - 0.5 and values[-1] < values[0] - 0.5
    assert not options or 0 < np.mean([record["on_policy"] for record in found if "on_policy" in record]) < 1
    for steps in (5, 15):
        llmkit("finetune", "distill.yaml", "--full", "-o", f"run_dir={name}-2", "-o", f"train.max_steps={steps}",
               *options, cwd=workplace)  # fmt: skip
    once, twice = (
        load_file(workplace / f"{run}/checkpoints/step-000015/model/model.safetensors") for run in (name, f"{name}-2")
    )
    assert all(torch.equal(once[key], twice[key]) for key in once)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("objective.teacher=other", "another tokenizer"),
        ("objective.teacher=none", "none"),
        ("objective.loss=kl", "forward_kl"),
        ("objective.teacher=null", "teacher"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(override, words, workplace):
    done = llmkit(
        "finetune", "distill.yaml", "--full", "-o", "run_dir=runs/bad", "-o", override, cwd=workplace, code=None
    )
    assert done.returncode in (2, 4) and words in done.stderr and not (workplace / "runs/bad/checkpoints").exists()


def test_answers_of_its_own_continue_the_prompts_of_packed_rows():
    model = made(OURS["llama"])
    tokenizer = train_tokenizer(WORDS, vocab_size=300)
    model = build_model(model.config, device="cpu", seed=0)
    ids = np.array([[5, 6, 7, 8, 9, 10, 11, 12]])
    labels = np.array([[-100, 7, 8, -100, -100, 11, 12, -100]])
    batch = Batch(ids, labels, segments=np.array([[0, 0, 0, 1, 1, 1, 1, 1]]))
    assert distill.split_prompts(batch) == [([5, 6], 2), ([8, 9, 10], 2)]
    options = {"tokenizer": tokenizer, "share": 1.0, "max_new_tokens": 5, "temperature": 1.0}
    rows, figures = distill.answer_prompts(model, batch, Step(0, 1, start_world(), 4, None), **options)
    assert figures == {"on_policy": 1.0} and rows.input_ids[0, :2].tolist() == [5, 6]
    assert rows.input_ids[1, :3].tolist() == [8, 9, 10]
    for row, start in ((0, 1), (1, 2)):
        answer = rows.labels[row][rows.labels[row] != IGNORE_INDEX]
        assert 0 < len(answer) <= 5 and (rows.labels[row, :start] == IGNORE_INDEX).all()
        assert rows.input_ids[row, start + 1 : start + len(answer)].tolist() == answer[:-1].tolist()
