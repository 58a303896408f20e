"""Adapters that go on: trained further, stacked, merged with weights, several over one base; averages of models."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import llmkit
from peft.utils import merge_utils

from llmkit.errors import MODEL, UserError
from llmkit.formats.merge import MERGES, average_models, merge_models
from llmkit.generation.sampling import Sampling
from llmkit.inference.writer import open_writers
from llmkit.models import build_model, folder, llama
from llmkit.peft import METHODS
from llmkit.peft.adapter import load_adapter, save_adapter
from llmkit.storage.locate import base_sha256
from llmkit.tokenizer.train import train_tokenizer

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
WORDS = "copy this line and then the next line please".split()
IDS = torch.arange(24).view(2, 12)


def randomize(parameters, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.empty(p.shape).normal_(0, 0.1, generator=generator))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a base, records, and two adapters of different methods: base, rows.jsonl, a, b."""
    place = tmp_path_factory.mktemp("adapters")
    tokenizer = train_tokenizer([" ".join(WORDS)] * 20, vocab_size=300)
    model = build_model(llama.Config(**SIZES, vocab_size=len(tokenizer)))
    randomize(model.parameters(), 0)
    folder.save_model(model, place / "base", **tokenizer.config_ids)
    tokenizer.save(place / "base")
    rows = [{"prompt": f"copy {a} {b}", "completion": f"{a} {b}"} for a in WORDS for b in WORDS]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [row | {"chosen": row["completion"], "rejected": "no"} for row in rows]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    for seed, (name, method) in enumerate({"a": "lora", "b": "ia3"}.items(), 1):
        adapted = folder.load_model(place / "base")
        options = METHODS[method].options()
        METHODS[method].apply(adapted, options, seed, [])
        randomize(METHODS[method].tensors(adapted).values(), seed)
        digest = base_sha256(place / "base")
        save_adapter(adapted, place / name, method, options, base=str(place / "base"), base_sha256=digest)
    return place


def adapted(place, name: str) -> torch.nn.Module:
    model = folder.load_model(place / "base")
    load_adapter(model, place / name)
    return model.eval()


def metrics(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


STEPS = ["-o", "train.epochs=null", "-o", "train.max_steps=4", "-o", "eval.every=2", "-o", "checkpoint.every=2"]
STEPS += ["-o", "train.precision=fp32"]


def test_an_adapter_is_trained_further_and_resumed(place):
    """The first loss is the adapter's; a run that was cut off and resumed ends with the same bytes."""
    data = ["--data", place / "rows.jsonl", *STEPS]
    llmkit("finetune", "--lora", "--from", "base", *data, "-o", "run_dir=runs/first", cwd=place)
    first = metrics(place / "runs/first")
    further = ["finetune", "--lora", "--from", "runs/first", *data, "-o", "optimizer.lr=1e-2"]
    said = llmkit(*further, "-o", "run_dir=runs/second", cwd=place).stdout
    assert "trained further" in said
    second = metrics(place / "runs/second")
    assert second[0]["val_loss"] == pytest.approx(min(one["val_loss"] for one in first if "val_loss" in one), abs=1e-4)
    assert second[-1]["val_loss"] < second[0]["val_loss"]
    llmkit(*further, "-o", "run_dir=runs/third", "-o", "train.max_steps=2", "-o", "schedule.name=constant", cwd=place)
    llmkit(*further, "-o", "run_dir=runs/third", "-o", "schedule.name=constant", cwd=place)
    llmkit(*further, "-o", "run_dir=runs/fourth", "-o", "schedule.name=constant", cwd=place)
    last = "checkpoints/step-000004/model/adapter_model.safetensors"
    assert (place / "runs/third" / last).read_bytes() == (place / "runs/fourth" / last).read_bytes()
    refused = llmkit(*further, "-o", "run_dir=runs/fifth", "-o", "peft.r=8", cwd=place, code=MODEL)
    assert "peft.r is another one than the adapter's" in refused.stderr


def test_a_second_adapter_is_stacked_on_the_merged_base(place):
    args = ["finetune", "--method", "ia3", "--from", "a", "--data", place / "rows.jsonl", *STEPS, "-o", "stack=true"]
    llmkit(*args, "-o", "run_dir=runs/stacked", cwd=place)
    merged = folder.load_model(place / "runs/stacked/base").eval()
    torch.testing.assert_close(merged(IDS), adapted(place, "a")(IDS), rtol=1e-4, atol=1e-4)
    where = next((place / "runs/stacked/checkpoints").glob("*4/model"))
    saved = json.loads((where / "adapter_config.json").read_text())
    assert (
        saved["base_model_name_or_path"] == str((place / "runs/stacked/base").resolve()) and saved["peft_type"] == "IA3"
    )


def test_the_reference_of_a_further_adapter_is_where_it_began(place):
    """DPO and KTO of a further adapter begin with rewards of 0: their reference is the adapter, not the base."""
    for objective in ("dpo", "kto"):
        args = ["finetune", "--lora", "--objective", objective, "--data", place / "pairs.jsonl", *STEPS]
        for steps in (2, 4):  # the second one is resumed
            llmkit(*args, "--from", "a", "-o", f"run_dir=runs/{objective}", "-o", f"train.max_steps={steps}", cwd=place)
        found = [one for one in metrics(place / "runs" / objective) if "val_loss" in one]
        assert found[0]["val_loss"] == pytest.approx(0.6931 if objective == "dpo" else 0.5, abs=1e-3)
        assert found[0]["val_margin"] == pytest.approx(0, abs=1e-4) and found[-1]["val_margin"] > 1e-4


def test_the_labels_of_a_further_adapter_keep_their_order(place):
    """The second run does not number them by the alphabet, as a first one does; another order is refused."""
    rows = [{"text": f"{a} {b}", "label": "long" if len(a + b) > 8 else "short"} for a in WORDS for b in WORDS]
    for name in ("one", "two"):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ["finetune", "--lora", "--objective", "classify", *STEPS]
    begin = [*args, "--from", "base", "--data", place / "one.jsonl", "-o", "run_dir=runs/one"]
    llmkit(*begin, "-o", "data.labels=[short, long]", cwd=place)  # not in the order of the alphabet
    further = [*args, "--from", "runs/one", "--data", place / "two.jsonl", "-o", "run_dir=runs/two"]
    llmkit(*further, cwd=place)
    labels = [
        json.loads((place / f"runs/{name}/checkpoints/step-000004/model/config.json").read_text())["id2label"]
        for name in ("one", "two")
    ]
    assert labels == [{"0": "short", "1": "long"}] * 2
    refused = llmkit(*further, "-o", "data.labels=[long, short]", "--fresh", cwd=place, code=2)
    assert "in another order" in refused.stderr


@pytest.mark.parametrize("by", ["linear", "ties", "dare"])
def test_merges_are_those_of_peft(by):
    generator = torch.Generator().manual_seed(3)
    changes = torch.randn(3, 40, generator=generator)
    weights = torch.tensor([0.5, 1.0, -0.3])
    found = MERGES[by](changes, weights[:, None], 0.4, torch.Generator().manual_seed(1))
    if by == "linear":
        expected = merge_utils.task_arithmetic(list(changes), weights)
    if by == "ties":
        expected = merge_utils.ties(list(changes), weights, 0.4)
    if by == "dare":  # what is kept is drawn: the mean over draws is the linear merge
        draws = [
            MERGES[by](changes, weights[:, None], 0.4, torch.Generator().manual_seed(seed)) for seed in range(2000)
        ]
        found, expected = torch.stack(draws).mean(0), weights @ changes
        assert (found - expected).abs().max() < 0.5 and (found - expected).abs().mean() < 0.08
        return
    torch.testing.assert_close(found, expected)


def test_adapters_are_merged_with_weights(place):
    llmkit("merge", "a=0.5", "b", "merged", cwd=place)
    base = dict(folder.load_model(place / "base").named_parameters())
    parts = []
    for name in "ab":
        model = adapted(place, name)
        METHODS[{"a": "lora", "b": "ia3"}[name]].merge(model)
        parts.append(dict(model.named_parameters()))
    for name, p in folder.load_model(place / "merged").named_parameters():
        expected = base[name] + 0.5 * (parts[0][name] - base[name]) + (parts[1][name] - base[name])
        torch.testing.assert_close(p, expected)


def test_whole_models_are_averaged(place, tmp_path):
    models = [folder.load_model(place / "base") for _ in range(3)]
    for seed, model in enumerate(models):
        randomize(model.parameters(), 10 + seed)
        folder.save_model(model, tmp_path / str(seed))
        train_tokenizer([" ".join(WORDS)] * 20, vocab_size=300).save(tmp_path / str(seed))
    average_models([str(tmp_path / str(i)) for i in range(3)], tmp_path / "out", torch.float32)
    parts = [dict(model.named_parameters()) for model in models]
    for name, p in folder.load_model(tmp_path / "out").named_parameters():
        torch.testing.assert_close(p, sum(part[name] for part in parts) / 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["average", "a", "b", "out1"], "this is an adapter"),
        (["merge", "a", "base", "out2"], "--base"),
        (["merge", "a=x", "out3"], "a weight is no number"),
        (["merge", "a", "out4", "--by", "tie"], "did you mean ties?"),
        (["merge", "out5"], "models and a folder"),
    ],
)
def test_what_can_not_be_merged_is_refused(arguments, words, place):
    assert words in llmkit(*arguments, cwd=place, code=None).stderr and not (place / arguments[-1]).exists()


def test_adapters_share_the_weights_of_one_base(place):
    """Each name writes what its adapter writes alone, and no weight of the base is there twice."""
    writers = open_writers(
        str(place / "base"), {"a": str(place / "a"), "b": str(place / "b")}, precision="fp32", compile=False
    )
    base = writers[""].model
    for name in "ab":
        model = writers[name].model
        own = {id(p) for p in METHODS[{"a": "lora", "b": "ia3"}[name]].tensors(model).values()}
        assert {id(p) for p in model.parameters()} - own == {id(p) for p in base.parameters()}
        torch.testing.assert_close(model(IDS), adapted(place, name)(IDS))
    torch.testing.assert_close(base(IDS), folder.load_model(place / "base").eval()(IDS))
    prompt = writers[""].encode("copy this")
    written = {
        name: list(writer.write([prompt], sampling=Sampling(temperature=0), max_new_tokens=8)[0].pieces)
        for name, writer in writers.items()
    }
    assert len({"".join(one) for one in written.values()}) == 3


def test_chat_switches_adapters(place):
    command = [sys.executable, "-m", "llmkit", "chat", "base", "--adapter", f"a={place / 'a'}", "--max-new-tokens", "4"]
    lines = "copy\n/adapter a\ncopy\n/adapter x\n/adapter\n/exit\n"
    said = subprocess.run(
        [*command, "--no-compile"], cwd=place, input=lines, capture_output=True, text=True, check=True
    )
    assert "a answers from here on" in said.stderr and "there is no adapter x: there is a" in said.stderr
    assert "no adapter answers from here on" in said.stderr


def test_an_adapter_of_another_base_is_refused(place, tmp_path):
    model = folder.load_model(place / "base")
    randomize(model.parameters(), 77)
    folder.save_model(model, tmp_path / "other")
    train_tokenizer([" ".join(WORDS)] * 20, vocab_size=300).save(tmp_path / "other")
    with pytest.raises(UserError, match="trained on another base"):
        open_writers(str(tmp_path / "other"), {"a": str(place / "a")}, precision="fp32", compile=False)
    with pytest.raises(UserError):
        merge_models(
            [(str(place / "a"), 1.0)], tmp_path / "m", by="linear", density=1, base=str(place / "nowhere"), seed=0,
            dtype=torch.float32,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("adalora", ["-o", "peft.warmup=0", "-o", "peft.final=0.25", "-o", "peft.every=1"]),
        ("lora", ["-o", "peft.init=pissa", "-o", "peft.modules_to_save=[norm]", "-o", "peft.lr_ratio=4"]),
        ("p_tuning", ["-o", "data.seq_len=32", "-o", "peft.num_virtual_tokens=4"]),
    ],
)
def test_a_run_of_a_method_is_resumed_with_the_same_bits(name, flags, place):
    """What a checkpoint keeps beside the adapter is there again: averages of importance, the MLP of P-tuning."""
    args = ["finetune", "--method", name, "--from", "base", "--data", place / "rows.jsonl", *STEPS, *flags]
    args += ["-o", "optimizer.lr=1e-2", "-o", "schedule.name=constant"]
    whole, cut = f"runs/{name}-whole", f"runs/{name}-cut"
    llmkit(*args, "-o", f"run_dir={whole}", cwd=place)
    llmkit(*args, "-o", f"run_dir={cut}", cwd=place)
    shutil.rmtree(place / cut / "checkpoints/step-000004")  # as if it was killed before the last one
    llmkit(*args, "-o", f"run_dir={cut}", cwd=place)
    last = "checkpoints/step-000004/model/adapter_model.safetensors"
    assert (place / whole / last).read_bytes() == (place / cut / last).read_bytes()
    first = "checkpoints/step-000002/model/adapter_model.safetensors"
    assert (place / whole / last).read_bytes() != (place / whole / first).read_bytes()
