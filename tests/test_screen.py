"""What files and models say reaches a terminal as text only, and secrets reach neither a screen nor a file."""

import io
import json
import sys

import pytest
import yaml

from llmkit.commands.show import progress_printer, show, terminal_text, to_stderr
from llmkit.screen import hide_secrets, printable
from llmkit.storage.run import open_run, without_secrets

EVIL = "a\x1b]0;title\x07b\u202ec\rd\x9be"
SAFE = "a\ufffd]0;title\ufffdb\ufffdc\ufffdd\ufffde"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("text, shown", [
    (EVIL, SAFE), ("one\n\ttwo\r\nthree", "one\n\ttwo\r\nthree"), ("\ud800", "\ufffd"),
    ("\u2066x\u2069 \u200fy", "\ufffdx\ufffd \ufffdy"),
    *((text, text) for text in ("\u0939\u093f", "\U0001f468\u200d\U0001f469", "\u05d0", "caf\u00e9", "[31m")),
])  # fmt: skip
def test_only_what_a_terminal_obeys_is_replaced(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize("write", [
    lambda: show({"why": EVIL}, as_json=False), lambda: progress_printer(as_json=False)(EVIL),
    lambda: progress_printer(as_json=True)(EVIL), lambda: to_stderr(EVIL), lambda: print(terminal_text(EVIL)),
])  # fmt: skip
def test_a_terminal_gets_text_and_a_file_gets_the_bytes(write, monkeypatch):
    for stream, text in ((Terminal, SAFE), (io.StringIO, EVIL)):
        out = stream()
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", out)
        write()
        assert text in out.getvalue()


@pytest.mark.parametrize("text, shown", [
    ("https://me:hunter2@host/x", "https://***@host/x"), ("s3://me:p@ss@host", "s3://***@host"),
    ("https://host/x?token=abc&a=1", "https://host/x?token=***&a=1"),
    ("https://host/x?X-Amz-Signature=ab12", "https://host/x?X-Amz-Signature=***"),
    ("HF_TOKEN=abc", "HF_TOKEN=***"), ("--password: abc", "--password: ***"), ("got hf_" + "aB3" * 12, "got ***"),
    ("{'Authorization': 'Bearer abc.def'}", "{'Authorization': '***'}"), ("bearer abcdefgh1", "bearer ***"),
    ('{"api_key": "abc", "n": 1}', '{"api_key": "***", "n": 1}'),
])  # fmt: skip
def test_secrets_are_struck_out(text, shown):
    assert hide_secrets(text) == shown


@pytest.mark.parametrize("text", [
    "eos_token: <|endoftext|>", "data/a@b/c.jsonl", "https://host/a@b", "git@github.com:a/b", "tokens: 7", "hf_hub",
    "the tokenizer: a BPE", "batch_tokens=5", "bos_token=<s>", "password: the user forgot it", "https://host:80/a@b",
    "--max-new-tokens 5", "no secret: it is open to all",
])  # fmt: skip
def test_what_is_no_secret_stays(text):
    assert hide_secrets(text) == text


def test_a_run_directory_holds_no_secrets_and_is_the_same_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["llmkit", "-o", "data.path=https://me:hunter2@host/x"])
    config = {"data": {"path": "https://me:hunter2@host/x"}, "seed": 1}
    for _ in range(2):
        run = open_run(tmp_path, without_secrets(config))
        run.begin(None)
        run.close()
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {
        "data": {"path": "https://***@host/x"}, "seed": 1
    }  # fmt: skip
    assert "***" in json.loads((tmp_path / "run.json").read_text())["command"]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]


@pytest.mark.parametrize("text", [
    "GITHUB_TOKEN=ghp_" + "a" * 36, "AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI/K7MDENG", "passwd=hunter2", "--token hunter2",
    "--hf-token hunter2", "https://me:hun/ter2@host/x", "https://me:hun#ter2@host/x", "password: hunter2",
    '{"api_key": "hunter2", "x": 1}', "see ghp_" + "b" * 36,
])  # fmt: skip
def test_the_usual_spellings_of_secrets_are_struck_out(text):
    assert "***" in hide_secrets(text)
    assert not any(secret in hide_secrets(text) for secret in ("hunter2", "ter2", "aaaa", "bbbb", "MDENG"))
