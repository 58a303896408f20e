"""A run, its data, its tokenizer and its model belong together: what was changed in between is noticed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import llmkit, sentences, tiny_config
from tokenizers.processors import TemplateProcessing

from llmkit.config.data import CorpusData
from llmkit.config.load import load_config
from llmkit.corpus.build import build_corpus, read_manifest
from llmkit.data.rows import token_ids
from llmkit.errors import DATA, LOCKED, MODEL, UserError
from llmkit.evals.perplexity import measure
from llmkit.files import lock
from llmkit.generation.generate import stream
from llmkit.generation.sampling import Sampling
from llmkit.models import build_model, llama
from llmkit.records.encode import encode_pair
from llmkit.storage.locate import locate
from llmkit.storage.manifest import best_checkpoint, dependent_runs, list_checkpoints, read_checkpoint_manifest
from llmkit.storage.report import summarize
from llmkit.storage.run import read_run_config
from llmkit.tokenizer.load import load_tokenizer
from llmkit.tokenizer.train import train_tokenizer
from llmkit.training.log import progress_line
from llmkit.training.loop import train

quiet = {"say": lambda line: None}


def place(tmp_path: Path, **sections) -> tuple[Path, dict]:
    """Return a folder of texts, and a config that trains on them."""
    (tmp_path / "text").mkdir()
    for i in range(8):
        (tmp_path / "text" / f"{i}.txt").write_text(sentences(i, 40))
    return tmp_path, tiny_config(tmp_path, run_dir=str(tmp_path / "run"), **sections)


def load(folder: Path, values: dict):
    (folder / "c.yaml").write_text(yaml.safe_dump(values))
    return load_config(folder / "c.yaml")


def corpus_of(values: dict, **changes) -> CorpusData:
    return CorpusData(**values["data"] | changes)


# ---- data and tokenizer ---------------------------------------------------------------------------------------------


def test_a_tokenizer_trained_before_is_not_mistaken_for_a_named_one(tmp_path):
    folder, values = place(tmp_path)
    build_corpus(corpus_of(values), **quiet)
    trained = load_tokenizer(folder / "data/tokenizer")
    other = train_tokenizer([sentences(99, 30)], vocab_size=280)
    other.save(folder / "other")
    named = corpus_of(values, tokenizer={"path": str(folder / "other")})
    assert build_corpus(named, **quiet)["tokenizer_sha256"] == other.sha256 != trained.sha256
    again = build_corpus(corpus_of(values), **quiet)
    assert again["tokenizer_sha256"] == load_tokenizer(folder / "data/tokenizer").sha256 == trained.sha256


def test_a_named_tokenizer_that_changes_is_a_new_build(tmp_path):
    folder, values = place(tmp_path)
    section = corpus_of(values, tokenizer={"path": str(folder / "other")})
    made = []
    for seed in (1, 2):
        train_tokenizer([sentences(seed, 30)], vocab_size=280).save(folder / "other")
        made.append(build_corpus(section, **quiet)["fingerprint"])
    assert made[0] != made[1]


def test_a_foreign_tokenizer_beside_the_shards_is_noticed(tmp_path):
    folder, values = place(tmp_path)
    values["data"] |= {"sources": []}
    build_corpus(corpus_of(tiny_config(tmp_path)), **quiet)
    train_tokenizer([sentences(99, 30)], vocab_size=290).save(folder / "data/tokenizer")
    with pytest.raises(UserError, match="not the one that the data was encoded with") as caught:
        train(load(folder, values), **quiet)
    assert caught.value.code == DATA


def test_earlier_builds_leave_nothing_behind(tmp_path):
    folder, values = place(tmp_path)
    build_corpus(corpus_of(values, seed=1), **quiet)
    build_corpus(corpus_of(values, clean={"whitespace": False}), **quiet)
    manifest = read_manifest(folder / "data")
    named = {file["path"] for split in manifest["splits"].values() for file in split["files"]}
    there = {str(path.relative_to(folder / "data")) for path in (folder / "data/tokens").rglob("*.bin")}
    assert there == named
    assert len(list((folder / "data/parts").glob("*.scores.npy"))) == 1


def test_a_changed_local_dataset_folder_is_a_new_build(tmp_path):
    folder, values = place(tmp_path)
    rows = folder / "rows"
    rows.mkdir()
    made = []
    for seed in (1, 2):
        lines = [json.dumps({"text": sentences(seed * 10 + i, 30)}) for i in range(6)]
        (rows / "train.jsonl").write_text("\n".join(lines))
        made.append(build_corpus(corpus_of(values, sources=[{"name": "rows", "hf": str(rows)}]), **quiet))
    assert made[0]["fingerprint"] != made[1]["fingerprint"]


def test_a_tokenizer_that_was_deleted_is_made_again(tmp_path):
    folder, values = place(tmp_path)
    before = build_corpus(corpus_of(values), **quiet)
    shutil.rmtree(folder / "data/tokenizer")
    assert build_corpus(corpus_of(values), **quiet)["tokenizer_sha256"] == before["tokenizer_sha256"]
    assert load_tokenizer(folder / "data/tokenizer").sha256 == before["tokenizer_sha256"]


def test_data_has_one_builder_at_a_time(tmp_path):
    folder, values = place(tmp_path)
    with lock(folder / "data", "taken", fix="wait"), pytest.raises(UserError) as caught:
        build_corpus(corpus_of(values), **quiet)
    assert caught.value.code == LOCKED
    build_corpus(corpus_of(values), **quiet)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"sources": [{"name": "a", "path": "x", "streaming": True}]}, "data.sources.0.streaming"),
        ({"sources": [{"name": "a", "hf": "x", "include": ["*"]}]}, "data.sources.0.include"),
        ({"tokenizer": {"path": "x", "vocab_size": 300}}, "data.tokenizer.vocab_size"),
    ],
)
def test_keys_that_would_be_ignored_are_errors(tmp_path, section, key):
    values = tiny_config(tmp_path)
    values["data"] |= section
    with pytest.raises(UserError, match=f"{key} has no effect"):
        load(tmp_path, values)


# ---- runs and checkpoints -------------------------------------------------------------------------------------------


def test_eval_refuses_a_val_split_that_was_rebuilt(tmp_path):
    folder, values = place(tmp_path)
    train(load(folder, values), **quiet)
    before = measure(locate(folder / "run"))["loss"]
    build_corpus(corpus_of(values, split={"val_fraction": 0.3}), **quiet)
    with pytest.raises(UserError, match="built anew"):
        measure(locate(folder / "run"))
    build_corpus(corpus_of(values), **quiet)
    assert measure(locate(folder / "run"))["loss"] == before


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(tmp_path):
    folder, values = place(tmp_path)
    train(load(folder, values), **quiet)
    metrics = (folder / "run/metrics.jsonl").read_bytes()
    for state in (folder / "run/checkpoints").glob("*/trainer/state.json"):
        state.write_text("{}")
    with pytest.raises(UserError, match="every checkpoint of this run is damaged") as caught:
        train(load(folder, values), **quiet)
    assert caught.value.code == MODEL
    assert (folder / "run/metrics.jsonl").read_bytes() == metrics
    train(load(folder, values), fresh=True, **quiet)


def test_the_summary_names_the_best_checkpoint_that_exists(tmp_path):
    folder, values = place(tmp_path, eval={"every": 4}, checkpoint={"every": 10, "keep": 1})
    summary = train(load(folder, values), **quiet)
    best = Path(summary["best_checkpoint"])
    assert best == best_checkpoint(folder / "run") and best.is_dir()
    assert summary["best_val_loss"] == round(read_checkpoint_manifest(best)["val_loss"], 4)


def test_patience_that_runs_out_at_a_checkpoint_ends_the_run_there(tmp_path):
    values = {"train": {"max_steps": 40, "early_stopping_patience": 1}, "optimizer": {"lr": 1e-12}}
    folder, values = place(tmp_path, eval={"every": 8}, checkpoint={"every": 5}, **values)
    values["optimizer"]["weight_decay"] = 0.0
    summary = train(load(folder, values), **quiet)
    assert summary["ended"].startswith("stopped early") and summary["steps"] == 5


@pytest.mark.parametrize("content", [b"model: [", b"- a list", b"\xff"])
def test_a_damaged_config_of_a_run_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match="the run's config") as caught:
        read_run_config(tmp_path)
    assert str(tmp_path / "config.yaml") in str(caught.value.at)
    assert "the run's config is damaged" in summarize(tmp_path)["model"]


def test_an_objective_may_be_evaluated_without_a_perplexity():
    assert progress_line({"step": 2, "val_loss": 0.5}, 4) == "step 2/4 | val 0.500"


def test_fresh_forgets_what_auto_meant_before(tmp_path):
    folder, values = place(tmp_path, train={"precision": "auto"})
    train(load(folder, values), **quiet)
    saved = folder / "run/config.yaml"
    before = yaml.safe_load(saved.read_text())
    before["train"]["micro_batch_size"] = 2
    saved.write_text(yaml.safe_dump(before))
    assert " 2 micro" in train(load(folder, values), dry_run=True, **quiet)["batch"]
    assert " 8 micro" in train(load(folder, values), dry_run=True, fresh=True, **quiet)["batch"]


def test_a_checkpoint_copied_elsewhere_is_a_model(tmp_path):
    folder, values = place(tmp_path)
    train(load(folder, values), **quiet)
    copy = tmp_path / "far/away/copy"
    shutil.copytree(best_checkpoint(folder / "run"), copy)
    (tmp_path / "one.txt").write_text(sentences(3, 20))
    assert locate(copy).run_dir is None
    text = str(tmp_path / "one.txt")
    figures = [measure(locate(path), data=text, window=32)["loss"] for path in (copy, folder / "run")]
    assert figures[0] == figures[1]


def test_the_base_of_an_adapter_outlives_its_own_run(tmp_path):
    folder, values = place(tmp_path, checkpoint={"every": 10, "keep": 1})
    train(load(folder, values), **quiet)
    base = best_checkpoint(folder / "run")
    values_lora = {key: value for key, value in values.items() if key != "model"}
    tuned = values_lora | {"run_dir": str(folder / "lora"), "init_from": str(folder / "run"), "peft": {"name": "lora"}}
    train(load(folder, tuned), **quiet)
    before = measure(locate(folder / "lora"))["loss"]
    values["train"]["max_steps"] = 60
    train(load(folder, values), **quiet)
    assert base.is_dir() and len(list_checkpoints(folder / "run")) <= 3
    assert measure(locate(folder / "lora"))["loss"] == before
    shutil.rmtree(folder / "lora")
    assert not dependent_runs(base)


def test_a_dry_run_writes_nothing_and_refuses_what_the_run_would(tmp_path):
    folder, values = place(tmp_path)
    assert train(load(folder, values), dry_run=True, **quiet)["parameters"] > 0
    assert not (folder / "data").exists() and not (folder / "run").exists()
    train(load(folder, values), **quiet)
    assert "steps" in train(load(folder, values), dry_run=True, **quiet)["length"]
    values["optimizer"] = {"name": "adamw", "lr": 0.5}
    with pytest.raises(UserError, match="another config"):
        train(load(folder, values), dry_run=True, **quiet)


def test_files_for_others_are_readable_by_others(tmp_path):
    folder, values = place(tmp_path)
    train(load(folder, values), **quiet)
    files = [path for path in best_checkpoint(folder / "run").rglob("*") if path.is_file()]
    assert len({path.stat().st_mode for path in files}) == 1


@pytest.mark.parametrize("records", [0, 1])
def test_too_few_pairs_are_an_error_of_the_users(tmp_path, records):
    folder, values = place(tmp_path)
    train(load(folder, values), **quiet)
    (folder / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n" if records else "")
    del values["model"]
    values |= {"run_dir": str(folder / "sft"), "init_from": str(folder / "run"), "peft": {"name": "lora"}}
    values["data"] = {"kind": "sft", "path": str(folder / "pairs.jsonl"), "seq_len": 32}
    with pytest.raises(UserError) as caught:
        train(load(folder, values), **quiet)
    assert caught.value.code == DATA


# ---- texts begin as the tokenizer says ------------------------------------------------------------------------------


@pytest.fixture
def with_bos(tmp_path) -> Path:
    """Return a tokenizer that puts <s> before every text, as Llama's does."""
    made = train_tokenizer([sentences(1, 50)], vocab_size=300)
    made.rust.add_special_tokens(["<s>"])
    begin = made.rust.token_to_id("<s>")
    made.rust.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    made.bos = "<s>"
    made.save(tmp_path / "bos")
    return tmp_path / "bos"


def test_bos_goes_where_transformers_puts_it(with_bos):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(with_bos)
    ours = load_tokenizer(with_bos)
    text = "The model reads a token"
    assert ours.encode_prompt(text) == theirs(text)["input_ids"]
    assert ours.encode_prompt(text)[0] == ours.bos_id
    (document,) = ours.encode_documents([text])
    assert document.tolist() == [*theirs(text)["input_ids"], ours.eos_id]
    tokens = encode_pair(ours, ("The model", " reads"))
    assert tokens[0] == ~ours.bos_id and (token_ids(tokens) == ours.bos_id).sum() == 1


def test_without_a_post_processor_nothing_is_put_before_a_text():
    plain = train_tokenizer([sentences(1, 50)], vocab_size=300)
    assert plain.prefix == [] and plain.encode_prompt("a") == plain.encode("a")


# ---- the rest -------------------------------------------------------------------------------------------------------


def test_a_prompt_is_kept_whole_or_refused():
    model = build_model(llama.Config(vocab_size=40, hidden_size=16, num_attention_heads=2, num_hidden_layers=1,
                                     max_position_embeddings=16), seed=0)  # fmt: skip
    prompt = list(range(12))
    assert len(list(stream(model, prompt, max_new_tokens=200, seed=1))) == 16 - 12 + 1
    greedy = Sampling(temperature=0)
    long, short = (list(stream(model, prompt, max_new_tokens=n, sampling=greedy)) for n in (200, 2))
    assert long[:2] == short
    with pytest.raises(UserError, match="fills all"):
        next(stream(model, list(range(16))))


def test_the_wheel_brings_every_file_of_the_package_and_the_example_configs(tmp_path):
    root = Path(__file__).parents[1]
    source = tmp_path / "source"
    for name in ("llmkit", "configs"):
        shutil.copytree(root / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    built = subprocess.run(pip, cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    shutil.unpack_archive(next(tmp_path.glob("*.whl")), tmp_path / "installed", "zip")
    shown = llmkit("init", "pretrain", cwd=tmp_path, PYTHONPATH=str(tmp_path / "installed"))
    assert shown.stdout == (root / "configs/llama-150m.yaml").read_text()
    shutil.copytree(root / "configs", source / "llmkit/configs")
    files, brought = (
        {path.relative_to(tree) for path in (tree / "llmkit").rglob("*.*") if "__pycache__" not in path.parts}
        for tree in (source, tmp_path / "installed")
    )
    assert files == brought
