"""Tokens as a reader sees them: `tokenizer show`, and the marks that it shares with `data inspect`."""

import json

import pytest
from conftest import sentences
from tokenizers import Tokenizer as Rust
from tokenizers import decoders, models, pre_tokenizers

from llmkit.commands.app import main
from llmkit.data.inspect import format_rows, format_tokens
from llmkit.tokenizer.spell import LEGEND, spell_text, spell_tokens, visible
from llmkit.tokenizer.tokenizer import Tokenizer
from llmkit.tokenizer.train import train_tokenizer

TEXTS = [
    "the river is small",
    " a  b\t\tc\r\n\n",
    "caf\u00e9 \u65e5\u672c\u8a9e \U0001f600",
    "col\u00b7lecci\u00f3 \u2192 \u21b5",
    "\x1b[31mred\x00 \u200b\u202e\u00a0",
    "a|b||c [[x]] [[[y",
    r"\x41 \n",
]


def metaspace() -> Tokenizer:
    """Return a tokenizer like Llama's: spaces are U+2581, unknown characters become bytes."""
    tokens = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "\u2581the", "river", "\u2581r"]
    rust = Rust(models.BPE({token: i for i, token in enumerate(tokens)}, [], byte_fallback=True, unk_token="<unk>"))
    rust.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    rust.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    rust.add_special_tokens(["</s>"])
    return Tokenizer(rust, 1)


TOKENIZERS = {kind: lambda kind=kind: train_tokenizer([sentences(0, 50)], kind, vocab_size=300)
              for kind in ("bpe", "unigram", "char")} | {"metaspace": metaspace}  # fmt: skip


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request) -> Tokenizer:
    return TOKENIZERS[request.param]()


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_the_tokens_are_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert b"".join(spell_tokens(tokenizer, ids)) == text.encode()
    assert spell_text(tokenizer, ids) == visible(text.encode())


@pytest.mark.parametrize("text", TEXTS)
def test_nothing_invisible_is_left(text):
    shown = visible(text.encode())
    assert " " not in shown and "\t" not in shown and "\ufffd" not in shown
    assert all(sign.isprintable() or sign == "\n" for sign in shown)
    assert shown.count("\u00b7") == text.count(" ") and shown.count("\u21b5\n") == text.count("\n")


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b" ", "\u00b7"),
        (b"\t", "\u2192"),
        (b"\n", "\u21b5\n"),
        (b"\r", "\\r"),
        (b"\xe6\x97", "\\xe6\\x97"),
        (b"\xa5 a", "\\xa5\u00b7a"),
        (b"\x1b[0m", "\\x1b[0m"),
        ("\u00b7".encode(), "\\xb7"),
        ("\u2192\u21b5".encode(), "\\u2192\\u21b5"),
        ("\u00a0\u200b\u202e".encode(), "\\xa0\\u200b\\u202e"),
        ("\u65e5\U0001f600".encode(), "\u65e5\U0001f600"),
        (b"", ""),
    ],
)
def test_marks_and_escapes(raw, shown):
    assert visible(raw) == shown


def test_a_character_of_several_tokens_is_bytes_alone_and_whole_in_a_row(tokenizer):
    ids = tokenizer.encode("\u65e5")
    alone = [visible(token) for token in spell_tokens(tokenizer, ids)]
    assert alone == ["\\xe6", "\\x97", "\\xa5"] and spell_text(tokenizer, ids) == "\u65e5"


def test_wordpiece_shows_what_continues_a_word_and_plain_spaces_between_tokens():
    words = train_tokenizer([sentences(0, 50)], "wordpiece", vocab_size=300)
    ids = words.encode("the rivers")
    assert spell_tokens(words, ids) == [b"the", b"river", b"##s"]
    assert spell_text(words, ids) == "the river ##s"


@pytest.mark.parametrize("tokens", [[b"|"], [b"a", b"b"], [b"a|b"], [b"a", b"|", b"b"], [b"", b""], [b"||", b"|"]])
def test_a_separator_inside_a_token_looks_different(tokens):
    shown = format_tokens(tokens, colour=False)
    assert shown.split("|") == [token.decode().replace("|", "\\x7c") for token in tokens]


@pytest.mark.parametrize("text", ["a [[x]] b", "a[[[b]]]c", "a [ [ ] ] b", "a]][[b"])
def test_brackets_in_a_text_look_different_from_those_of_targets(text):
    tokenizer = TOKENIZERS["bpe"]()
    rows = [[{"id": i, "target": target} for target in (False, True) for i in tokenizer.encode(text)]]
    shown = format_rows(rows, tokenizer, colour=False).split("\n")[1].replace("\u00b7", " ")
    assert shown.count("[[") == shown.count("]]") == 1
    assert shown.replace("\\x5b", "[").replace("\\x5d", "]") == f"{text}[[{text}]]"


def test_show_separates_tokens_and_explains_the_marks(tmp_path, capsys, monkeypatch):
    tokenizer = TOKENIZERS["bpe"]()
    tokenizer.save(tmp_path)
    text = "the river |\tcaf\u00e9\n"
    for terminal in (False, True):
        monkeypatch.setattr("sys.stdout.isatty", lambda terminal=terminal: terminal)
        with pytest.raises(SystemExit, match="0"):
            main(["tokenizer", "show", str(tmp_path), text])
        printed = capsys.readouterr().out
        assert printed.startswith(format_tokens(spell_tokens(tokenizer, tokenizer.encode(text)), colour=terminal))
        assert LEGEND in printed and "\\xc3" in printed and "\ufffd" not in printed
    with pytest.raises(SystemExit, match="0"):
        main(["tokenizer", "show", str(tmp_path), text, "--json"])
    assert json.loads(capsys.readouterr().out)["sources"][0]["ids"] == tokenizer.encode(text)
