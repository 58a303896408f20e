"""Arguments, errors and texts of the command line, in this process."""

import errno
import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from conftest import tiny_config

import llmkit
from llmkit.commands.app import main
from llmkit.config.keys import list_keys
from llmkit.errors import ENVIRONMENT, DataError, MachineError, UserError, explain_machine, raise_all
from llmkit.files import NO_SPACE, write_beside
from llmkit.generation.sampling import Sampling
from llmkit.screen import for_stream
from llmkit.tokenizer.load import fetch_tokenizer
from llmkit.training.resolve import TABLES


def run(capsys, *arguments: str, code: int = 0) -> str:
    """Run the command line here, assert its exit code, and return what it printed: the errors, or else the output."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    assert ended.value.code == code, said.err
    return said.err if code else said.out


def test_version_and_completion(capsys, monkeypatch):
    assert run(capsys, "--version") == f"llmkit {llmkit.__version__}\n"
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    assert "_LLMKIT_COMPLETE" in run(capsys, "--show-completion", "bash")


# ---- the keys -------------------------------------------------------------------------------------------------------


def test_every_key_has_a_meaning_and_fits_the_screen(capsys):
    said = run(capsys, "keys")
    assert max(map(len, said.splitlines())) <= 100
    rows = list(list_keys(None, TABLES))
    keys = {row["key"] for row in rows}
    assert not [row["key"] for row in rows if not row["meaning"] and not row["key"].endswith(".name")]
    assert {
        "data.sources.0.weight",
        "data.seq_len",
        "train.max_steps",
        "peft.r (lora, dora)",
        "data.dedup.near.rows",
    } <= keys
    assert {row["type"] for row in rows if row["key"] == "optimizer.name"} >= {"adamw", "muon"}


def test_keys_of_a_section_with_type_default_and_meaning(capsys):
    assert run(capsys, "keys", "log.every") == "log.every: number = 10\n    Steps between lines of the log.\n"
    assert "did you mean train?" in run(capsys, "keys", "trian", code=2)
    assert json.loads(run(capsys, "keys", "log.tensorboard", "--json"))["keys"][0]["default"] == "false"


def test_the_schema_for_editors_describes_the_keys(capsys):
    schema = json.loads(run(capsys, "schema"))
    assert schema["$defs"]["Train"]["properties"]["epochs"]["description"].startswith("Length of the run")
    assert schema["properties"]["schedule"]["anyOf"][0]["properties"]["name"]["enum"] == list(TABLES["schedule"])
    corpus = schema["$defs"]["CorpusData"]
    assert corpus["required"] == ["dir"] and {"type": "string"} in corpus["properties"]["sources"]["anyOf"]
    assert {"type": "string"} in corpus["properties"]["sources"]["anyOf"][0]["items"]["anyOf"]
    assert schema["$defs"]["SftData"]["required"] == ["kind"]
    assert schema["additionalProperties"] is False


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 3, 4, 12, 10_000])
def test_an_error_prints_at_most_14_lines_and_counts_the_rest(number):
    with pytest.raises(DataError) as caught:
        raise_all([DataError(f"row {i} is bad", at=f"x:{i}", got=i, fix="mend it") for i in range(number)])
    lines = str(caught.value).splitlines()
    assert lines[:4] == ["error: row 0 is bad", "  at:  x:0", "  got: 0", "  fix: mend it"]
    assert len(lines) <= 14 and len(caught.value.others) == number - 1
    told = sum("is bad" in line for line in lines)
    assert number != 12 or lines[4] == "also: row 1 is bad, at x:1 (mend it)"
    assert told == number or lines[-1] == f"... and {number - told:,} more errors"


def test_errors_of_errors_are_counted_too():
    inner = UserError("b", others=[UserError("c")])
    with pytest.raises(UserError) as caught:
        raise_all([UserError("a"), inner])
    assert [one.what for one in caught.value.others] == ["b", "c"]


def test_long_and_many_lined_values_take_one_line_each_and_a_fix_keeps_its_lines():
    error = UserError("x" * 10_000, at="a\nb\r\nc", got="7" * 100_000, fix="one\ntwo")
    what, at, got, *fix = str(error).splitlines()
    assert len(what) < 420 and at == "  at:  a b c" and len(got) < 420
    assert fix == ["  fix: one", "       two"]


def test_an_error_is_safe_for_a_terminal_and_without_passwords(capsys):
    said = run(capsys, "init", "\x1b]0;owned\x07https://me:hunter2@host/x", code=2)
    assert "\x1b" not in said and "\x07" not in said and "hunter2" not in said and "host/x" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval", "a", "--data", "x", "--data", "y"], "'--data' is given twice"),
        (["generate", "m", "p", "--top-k", "5", "--top-k=6"], "'--top-k' is given twice"),
        (["generate", "m", "p", "--compile", "--no-compile"], "is given twice"),
        (["eval", ""], "'MODEL' is empty"),
        (["finetune", "--lora", "--from", ""], "'--from' is empty"),
        (["finetune", "--lora", "--data="], "'--data' is empty"),
        (["runs", ""], "'names' is empty"),
        (["tokenizer", "train", ""], "'sources' is empty"),
        (["eval", "caf\udce9"], "not UTF-8"),
        (["pretrain", "c.yaml", "-o", "run_dir=caf\udce9"], "not UTF-8"),
        (["pretrain", "c.yaml", "--fres"], "did you mean --fresh?"),
        (["data", "bild"], "did you mean build?"),
        (["pretrain", "c.yaml", "--nproc", "a"], "Invalid value for '--nproc'"),
        (["pretrain", "c.yaml", "--nproc", "9" * 30], "Invalid value for '--nproc'"),
        (["data", "build", "c.yaml", "--dry-run", "9" * 30], "Invalid value for '--dry-run'"),
        (["generate", "m", "p", "--seed", "9" * 30], "Invalid value for '--seed'"),
        (["generate", "m", "p", "--temperature", "inf"], "temperature is out of range"),
        (["generate", "m", "p", "--top-p", "0"], "top_p is out of range"),
    ],
)
def test_odd_arguments_get_one_block(capsys, arguments, words):
    said = run(capsys, *arguments, code=2)
    assert said.startswith("error: ") and words in said and said.count("error: ") == 1
    assert len(said.splitlines()) <= 5


def test_options_declared_as_lists_may_be_repeated(capsys):
    assert "there is no model at m" in run(capsys, "generate", "m", "p", "--stop", "a", "--stop", "b", code=4)


def test_standard_input_that_is_not_utf8_is_repaired_and_every_character_can_be_printed(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    monkeypatch.setattr("sys.stdout", out := io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(SystemExit):
        main(["--help"])
    import sys

    assert sys.stdin.read() == "caf\ufffd"
    print("caf\xe9", file=out, flush=True)
    assert out.buffer.getvalue().endswith(b"caf\\xe9\n")


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": float("nan")}, {"temperature": float("inf")}, {"temperature": -0.1}, {"top_p": 0.0},
        {"top_p": float("nan")}, {"top_p": 1.1}, {"min_p": float("nan")}, {"top_k": -1}, {"repetition_penalty": 0.0},
        {"repetition_penalty": float("nan")},
    ],
)  # fmt: skip
def test_sampling_refuses_what_is_out_of_range(options):
    with pytest.raises(UserError, match="is out of range"):
        Sampling(**options)


# ---- what trials found ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="Path.resolve raises nothing any more")
def test_a_loop_of_links_is_one_error(capsys, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    Path("c.yaml").write_text(yaml.safe_dump(tiny_config(corpus, run_dir="loop/x")))
    said = run(capsys, "pretrain", "c.yaml", code=5)
    assert "a symbolic link leads back to itself" in said and "loop" in said


def test_an_error_of_the_system_says_what_to_do():
    for number, words in ((errno.EFBIG, "ulimit -f"), (errno.EACCES, "permissions"), (errno.ENOSPC, "free some space")):
        error = explain_machine(OSError(number, os.strerror(number), "/x"))
        assert (
            error.code == ENVIRONMENT and error.what == os.strerror(number) and error.at == "/x" and words in error.fix
        )


def test_an_output_that_does_not_fit_names_the_disk(tmp_path):
    for number in (errno.ENOSPC, errno.EFBIG):
        with pytest.raises(MachineError) as caught, write_beside(tmp_path / "out") as file:
            file.write_text("half")
            raise ValueError(f"a library: {os.strerror(number)}")
        assert caught.value.what == NO_SPACE[number] and "bytes free" in caught.value.got
    assert not list(tmp_path.iterdir())


def test_an_example_is_written_whole_or_not_at_all(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(capsys, "init", "pretrain", "--out", "c.yaml")
    assert Path("c.yaml").read_text() == run(capsys, "init", "pretrain")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda file: 1 / 0)
        with pytest.raises(SystemExit):
            main(["init", "pretrain", "--out", "d.yaml"])
    assert [path.name for path in Path().iterdir()] == ["c.yaml"]


def test_an_example_is_never_written_through_a_link(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("link.yaml").symlink_to("elsewhere.yaml")
    assert "exists already" in run(capsys, "init", "pretrain", "--out", "link.yaml", code=2)
    assert not Path("elsewhere.yaml").exists()


def test_a_damaged_report_is_printed_as_far_as_it_goes(capsys, corpus, tmp_path):
    shutil.copytree(corpus / "data", tmp_path / "data")
    report = tmp_path / "data/report.md"
    report.write_bytes(report.read_bytes()[:150] + b"\xff\n| a | b |\n|---|---|\n| c")
    assert "Data report" in run(capsys, "data", "report", tmp_path / "data")


@pytest.mark.parametrize("name", [" ", "a\0b", "a b/c"])
def test_a_name_that_can_be_no_tokenizer_is_one_error(name):
    with pytest.raises(UserError, match="neither a file nor a tokenizer"):
        fetch_tokenizer(name)


def test_a_closed_stream_is_no_terminal():
    assert for_stream("a\x1b", None) == "a\x1b"
