"""The real command line, end to end, and what it says when something is wrong."""

import contextlib
import fcntl
import json
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import llmkit, sentences, tiny_config

from llmkit.tokenizer.load import load_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Return a folder with texts, pairs and a tiny config, in which the tests run the quickstart's commands."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "text").mkdir()
    for i in range(30):
        (folder / "text" / f"{i}.md").write_text(sentences(i, 40))
    config = tiny_config(folder)
    config["data"] |= {"dir": "data/tiny", "sources": [{"name": "text", "path": "text"}]}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    pairs = [{"prompt": f"the river {i} ", "completion": "is small and it reads the code"} for i in range(60)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


def test_the_quickstart_arc(place):
    built = llmkit("data", "build", "tiny.yaml", cwd=place).stdout
    assert "text    30    0            0        30 " in built and "|" not in built
    dry = llmkit("pretrain", "tiny.yaml", "--dry-run", cwd=place).stdout
    assert "parameters" in dry and not (place / "runs").exists()
    first = llmkit("pretrain", "tiny.yaml", cwd=place).stdout
    assert "best val loss" in first and "next: llmkit eval runs/tiny --perplexity" in first
    assert "\x1b" not in first
    assert "resumed" in llmkit("pretrain", "tiny.yaml", cwd=place).stdout

    before = llmkit("eval", "--data", "pairs.jsonl", "--json", cwd=place)
    assert "with the best val loss, " in before.stderr
    before = json.loads(before.stdout)
    tuned = llmkit("finetune", "--lora", "--data", "pairs.jsonl", "-o", "train.max_steps=30", "-o", "optimizer.lr=1e-2",
                   "-o", "train.compile=false", cwd=place).stdout  # fmt: skip
    assert "the newest run" in tuned and "runs/tiny-lora" in tuned
    measured = llmkit("eval", "runs/tiny-lora", "--perplexity", "--data", "pairs.jsonl", "--json", cwd=place)
    after = json.loads(measured.stdout)
    assert "as they are, no chat template" in tuned and "llmkit generate runs/tiny-lora 'a prompt as in" in tuned
    assert after["perplexity"] < 0.7 * before["perplexity"] and after["window"] == before["window"]

    pairs = (place / "pairs.jsonl").read_text()
    (place / "damaged.jsonl").write_text(pairs + '{"prompt": "the", "completion": null}\n{"prompt": "cut o')
    flags = ("eval", "runs/tiny-lora", "--perplexity", "--data", "damaged.jsonl", "--json")
    refused = llmkit(*flags, cwd=place, code=3).stderr
    assert "2 of 62 records" in refused and "damaged.jsonl:61" in refused and "--max-bad-fraction" in refused
    rest = json.loads(llmkit(*flags, "--max-bad-fraction", 0.1, cwd=place).stdout)
    assert rest["loss"] == after["loss"] and "left out 2 of 62 records" in rest["bad_records"]

    text = [
        llmkit("generate", "runs/tiny-lora", "the river", "--max-new-tokens", 8, cwd=place).stdout for _ in range(2)
    ]
    assert text[0] == text[1] and text[0].startswith("the river")
    llmkit("export", "runs/tiny-lora", "merged", "--format", "hf", cwd=place)
    llmkit("export", "runs/tiny-lora", "adapter", "--format", "peft", cwd=place)
    merged = json.loads(llmkit("eval", "merged", "--perplexity", "--data", "pairs.jsonl", "--window", after["window"],
                               "--json", cwd=place).stdout)  # fmt: skip
    assert merged["loss"] == pytest.approx(after["loss"], rel=1e-2)
    assert (place / "adapter" / "adapter_config.json").is_file()

    listed = json.loads(llmkit("runs", "--json", cwd=place).stdout)["runs"]
    assert [Path(row["run"]).name for row in listed] == ["tiny", "tiny-lora"]
    tiny = listed[0]
    assert (tiny["data"], tiny["lr"]) == ("data/tiny", 1e-2)
    assert (place / f"runs/tiny/checkpoints/step-{tiny['best_step']:06d}").is_dir()
    table = llmkit("runs", "tiny", "runs/tiny-lora", "--plot", "both.png", cwd=place).stdout
    assert "best val loss" in table and "0.01" in table and "runs/tiny-lora" in table
    assert (place / "both.png").read_bytes().startswith(b"\x89PNG")


def test_bare_finetune_takes_the_newest_whole_run_and_its_data(place):
    said = llmkit("finetune", "--lora", "--dry-run", "-o", "run_dir=runs/other", cwd=place).stdout
    assert "model: runs/tiny, the newest run" in said and "data: data/tiny" in said and "lora, r 16" in said


def test_a_batch_of_more_rows_than_there_are_is_noted_and_a_config_names_its_run(place):
    config = {"init_from": "runs/tiny", "data": {"kind": "sft", "path": "chats.jsonl"}, "train": {"max_steps": 2}}
    (place / "mine.yaml").write_text(yaml.safe_dump(config))
    turns = [{"role": "user", "content": "the river"}, {"role": "assistant", "content": "is small"}]
    (place / "chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 9)
    said = llmkit("finetune", "mine.yaml", "--lora", cwd=place).stdout
    assert "a batch of 16 rows is more than the" in said and "records of messages through ChatML" in said
    assert "llmkit chat runs/mine-lora" in said
    llmkit("export", "runs/mine-lora", "chats", cwd=place)
    assert "<|im_start|>" in load_tokenizer(place / "chats").chat_template
    shutil.rmtree(place / "runs" / "mine-lora")


@pytest.mark.parametrize(
    ("override", "words"),
    [("peft.name=lora", "peft.name=lora, against"), ("init_from=x", "against init_from="), ("train.epochs=1", "")],
)
def test_an_override_may_not_undo_an_option_of_finetune(place, override, words):
    options = ["--full", "--data", "pairs.jsonl", "--from", "runs/tiny", "--dry-run", "-o", override]
    assert words in llmkit("finetune", *options, cwd=place, code=2 if words else 0).stderr


def test_finetune_on_text_names_the_way_to_continue_pretraining(place):
    (place / "more.txt").write_text(sentences(9, 300))
    newest = llmkit("finetune", "--data", "more.txt", cwd=place, code=2)  # without a model: the newest run
    assert "the newest run" in newest.stdout + newest.stderr and 'init_from: "runs/' in newest.stderr.replace("'", '"')
    said = llmkit("finetune", "--lora", "--from", "runs/tiny", "--data", "more.txt", cwd=place, code=2).stderr
    assert "is text, not prompts and answers" in said and "llmkit pretrain more.yaml" in said
    lines = [line.strip() for line in said[said.index("init_from:") :].splitlines()]
    (place / "more.yaml").write_text("\n".join(lines[:-1]))
    assert "best val loss" in llmkit("pretrain", "more.yaml", "-o", "train.compile=false", cwd=place).stdout
    assert load_tokenizer(place / "data/more/tokenizer").sha256 == load_tokenizer(place / "runs/tiny").sha256
    shutil.rmtree(place / "runs" / "more")


def test_data_is_built_from_a_config_with_data_alone(place):
    (place / "only.yaml").write_text("data: {dir: data/only, sources: text, tokenizer: {train: char}}")
    said = llmkit("data", "build", "only.yaml", cwd=place).stdout
    assert "text    30" in said and "llmkit pretrain" not in said
    assert "text    30" in llmkit("data", "report", "only.yaml", cwd=place).stdout
    assert not llmkit("data", "inspect", "only.yaml", "--kept", 1, cwd=place).stderr


def test_a_run_never_deletes_the_model_that_it_begins_with(place):
    options = ["--full", "--data", "pairs.jsonl", "--from", "runs/tiny", "-o", "run_dir=runs/tiny", "--fresh"]
    assert "lies in run_dir" in llmkit("finetune", *options, cwd=place, code=2).stderr
    assert (place / "runs/tiny/checkpoints").is_dir()


def test_doctor_knows_every_extra_that_is_no_tool_of_ours(place):
    extras = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    said = json.loads(llmkit("doctor", "--json", cwd=place).stdout)
    extras = extras["optional-dependencies"].keys() - {"test", "llama-cpp"}
    assert {f"extra {name}" for name in extras} == {key for key in said if key.startswith("extra ")}


def test_on_a_terminal_a_bar_runs_below_the_lines(place):
    terminal, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    command = [sys.executable, "-m", "llmkit", "pretrain", "tiny.yaml", "-o", "run_dir=runs/seen"]
    with subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=side, text=True) as process:
        os.close(side)
        drawn = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while some := os.read(terminal, 4096):
                drawn += some
        said = process.stdout.read()
    os.close(terminal)
    assert process.returncode == 0 and b"0/20" in drawn and b"step/s" in drawn and b"loss" not in drawn
    lines = [line for line in said.splitlines() if line.startswith("step ")]
    assert [line.split("/")[0] for line in lines] == [f"step {step}" for step in (0, 5, 10, 15, 20)]
    assert ["val" in line for line in lines] == [True, False, True, False, True]
    shutil.rmtree(place / "runs" / "seen")


def test_pretrain_builds_the_data_that_is_missing(place):
    changes = ["-o", "data.dir=data/new", "-o", "run_dir=runs/new", "-o", "train.max_steps=2"]
    done = llmkit("pretrain", "tiny.yaml", *changes, cwd=place)
    assert (place / "data/new/manifest.json").is_file() and "best val loss" in done.stdout
    shutil.rmtree(place / "runs" / "new")


def test_line_ends_do_not_change_an_evaluation(place):
    text = "The river is small.\nThe small river moves.\n" * 20
    for name, ends in (("lf", "\n"), ("crlf", "\r\n"), ("cr", "\r")):
        (place / f"{name}.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", ends).encode())
    figures = []
    for name in ("lf", "crlf", "cr"):
        found = json.loads(llmkit("eval", "runs/tiny", "--data", f"{name}.txt", "--json", cwd=place).stdout)
        figures.append({key: value for key, value in found.items() if key != "data"})
    assert figures[0] == figures[1] == figures[2]


def test_what_can_not_be_evaluated_and_a_misspelt_run_say_what_to_do(place):
    (place / "odd.csv").write_text("id,Frage,Antwort\n1,a,b\n")
    said = llmkit("eval", "runs/tiny", "--data", "odd.csv", cwd=place, code=3).stderr
    assert "neither texts nor prompts and answers" in said and "the fields id, Frage, Antwort" in said
    assert "data.columns" in llmkit("finetune", "--lora", "--data", "odd.csv", cwd=place, code=3).stderr
    assert "did you mean runs/tiny?" in llmkit("generate", "runs/tinny", "x", cwd=place, code=4).stderr


def test_plan_json_and_exit_code(place):
    figures = json.loads(llmkit("plan", "tiny.yaml", "--json", cwd=place).stdout)
    assert figures["parameters"] == sum(figures["parameters_by_part"].values())
    assert figures["peak_memory"] == sum(figures["memory_by_part"].values()) and figures["fits"]
    assert figures["seconds"] > 0
    said = llmkit("plan", "tiny.yaml", cwd=place).stdout
    assert f"{figures['parameters']:,}" in said and "TFLOP/s, this device's matrix rate" in said
    huge = ["-o", "model={name: llama, hidden_size: 16384, num_hidden_layers: 200, num_attention_heads: 128}"]
    llmkit("plan", "tiny.yaml", *huge, cwd=place, code=5)


def test_tokenizer_commands(place):
    llmkit("tokenizer", "train", "text", "--vocab-size", 300, "--out", "tok", cwd=place)
    shown = json.loads(llmkit("tokenizer", "show", "tok", "the river", "--json", cwd=place).stdout)
    (row,) = shown["sources"]
    assert shown["vocabulary"] == 300 and row["bytes"] == 9 and len(row["ids"]) == row["tokens"]


@pytest.mark.parametrize("kind", ["pretrain", "finetune", "quickstart", "gpt2-124m", "llama-1b", "corpus"])
def test_init_prints_configs_that_load(tmp_path, kind):
    llmkit("init", kind, "--out", "c.yaml", cwd=tmp_path)
    from llmkit.config.load import load_config

    assert load_config(tmp_path / "c.yaml")


def test_doctor_answers(tmp_path):
    assert json.loads(llmkit("doctor", "--json", cwd=tmp_path).stdout)["precision"].startswith("auto means")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["finetune", "--lora"], 2, "finetune needs a model and data"),
        (["eval", "--perplexity"], 2, "no model is named"),
        (["eval", "nowhere", "--perplexity"], 4, "there is no model at nowhere"),
        (["eval", "x", "--perplexity", "--max-bad-fraction", "0.5"], 2, "has no effect without --data"),
        (["eval"], 2, "no model is named"),
        (["finetune", "--method", "dora", "--from", "x", "--data", "y"], 4, "there is no model at x"),
        (["export", "nowhere", "out", "--format", "awq"], 2, "awq is not there yet"),
        (["finetune", "--lora", "--full"], 2, "one method"),
        (["finetune"], 2, "needs a method"),
        (["pretrain", "none.yaml"], 2, "no such config file"),
        (["generate", "nowhere", "x"], 4, "there is no model"),
        (["export", "nowhere", "out", "--format", "gguff"], 2, "--format is unknown"),
        (["init", "pretrian"], 2, "did you mean pretrain?"),
        (["runs"], 2, "there is no run"),
        (["pretrain"], 2, "Missing argument"),
        (["nonsense"], 2, "No such command"),
        (["tokenizer", "show", "none"], 4, "there is no tokenizer"),
    ],
)
def test_mistakes_get_one_block_and_a_code(tmp_path, arguments, code, words):
    assert words in llmkit(*arguments, cwd=tmp_path, code=code).stderr
    assert not list(tmp_path.iterdir())
