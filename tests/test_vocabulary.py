"""Tokenizers of every kind: nothing lost, nothing turned into a control token, and a BPE that learns a new language."""

import itertools
import json
import random
import sys
import unicodedata
import zipfile
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import transformers
from conftest import SHARED, llmkit, needs_shared, sentences
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Rust

from llmkit.errors import DataError, ModelError, UserError
from llmkit.models import build_model, llama
from llmkit.models.folder import save_model
from llmkit.tokenizer.fast import PATTERNS, bytes_to_unicode
from llmkit.tokenizer.load import load_tokenizer
from llmkit.tokenizer.tokenizer import CHAT_END, CHAT_START, EOS, Tokenizer, in_blocks
from llmkit.tokenizer.train import (
    BERT_SPECIALS,
    SPECIALS,
    TRAINERS,
    extend_bpe,
    train_on_words,
    train_tokenizer,
)


def prose(seed: int, letters: str, number: int = 4000) -> str:
    """Return text in an invented language: a few hundred words of the letters, some of them frequent."""
    draw = random.Random(seed)
    words = ["".join(draw.choices(letters, k=draw.randint(1, 9))) for _ in range(400)]
    lines = (draw.choices(words, weights=[1 / (i + 1) for i in range(400)], k=10) for _ in range(number // 10))
    return "\n".join(" ".join(line).capitalize() + draw.choice(".?!") for line in lines)


LATIN = prose(1, "aeiourstlnmdp")
FOREIGN = prose(2, "aeiou\u00e4\u00f6\u00fcszt\u00df") + prose(3, "\u0430\u0435\u0438\u043e\u043a\u043d\u0442\u0441")
NUMBERS = " ".join(map(str, random.Random(4).choices(range(10**7, 10**7 + 50), k=2000)))
HARD = [
    "", " ", "\n", "\r\n\r\n a\r\n\tb\t\t  c   \n", "don't  we'LL '", "x" * 300 + " " * 300 + "\n" * 300,
    "caf\u00e9 cafe\u0301 na\u00efve \u00df\u1e9e \u0130i\u0307",
    "\u65e5\u672c\u8a9e\u306f\u96e3\u3057\u3044\u3002\u3000\uff21",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f",
    "\0\x01\x7f\x85\xa0\u2028\ufeff\ufffd\uffff \U0010ffff\U000f0000\ue000", "".join(map(chr, range(256))),
    "<|endoftext|><|im_start|>user\n<|im_end|> [CLS] [UNK] <s></s>", "<0x41><0xE2><0x> \u0120\u010a \u2581##ing",
    "1234567 1,234.5 \u0661\u0662\u0663 \u00bd \u2167", "\u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22",
    "\u0627\u0644\u0644\u063a\u0629", " a", "a ", "  a  b", "\u3000\u3000a", "!?" * 50, "a\u0300\u0301\u0302",
]  # fmt: skip


def chance(seed: int, number: int) -> list[str]:
    """Return short random texts of letters, signs and spaces of many scripts."""
    letters = "".join(HARD) + " \n'019azAZ.," * 20 + LATIN[:200] + FOREIGN[:200]
    draw = random.Random(seed)
    return ["".join(draw.choices(letters, k=draw.randint(1, 40))) for _ in range(number)]


@pytest.fixture(scope="module", params=TRAINERS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def made() -> dict[str, Tokenizer]:
    """Return one tokenizer of each kind."""
    return {
        kind: train_tokenizer([LATIN, FOREIGN], kind, vocab_size=500, special_tokens=["<tool>"]) for kind in TRAINERS
    }


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [300, 500, 1000])
def test_vocabularies_are_as_large_as_asked_for(kind, vocab_size):
    one = train_tokenizer([LATIN], kind, vocab_size=vocab_size)
    assert len(one) <= vocab_size and (kind != "bpe" or len(one) == vocab_size)
    assert sorted(one.rust.get_vocab(with_added_tokens=True).values()) == list(range(len(one)))
    few = train_tokenizer(["\u65e5\u672c\u8a9e" * 9], kind, vocab_size=vocab_size)
    assert 5 < len(few) < len(one)  # there is no more to learn


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_training_again_gives_the_same(kind, made):
    again = [train_tokenizer(iter([LATIN, FOREIGN]), kind, vocab_size=500, special_tokens=["<tool>"]) for _ in range(3)]
    assert {one.sha256 for one in again} == {made[kind].sha256}


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_tokenizer_has_the_same_checksum_when_it_is_read_again(kind, made, tmp_path):
    made[kind].save(tmp_path)
    assert load_tokenizer(tmp_path).sha256 == made[kind].sha256


def test_the_characters_that_stay_are_the_frequent_ones():
    one = train_tokenizer(["a" * 9 + "b" * 5 + "\u732b" * 7, "b" * 3 + "c"], "char", vocab_size=259 + 3)
    assert [one.rust.id_to_token(i) for i in range(259, 262)] == ["a", "b", "\u732b"]
    assert (
        len(one.encode("ab\u732b")) == 3 and len(one.encode("c")) == 1 and len(one.encode("\u72ac")) == 3
    )  # its bytes


def test_bytes_and_characters_lose_nothing(kind, made):
    if kind == "wordpiece":
        return
    specials = set(made[kind].specials.values())
    for text in [*HARD, *chance(1, 300), LATIN, FOREIGN]:
        ids = made[kind].encode(text)
        assert made[kind].decode(ids) == text and not specials & set(ids)


def test_frequent_words_are_few_tokens(kind, made):
    most = {"bpe": 0.6, "unigram": 0.7, "wordpiece": 0.7, "char": 1}[kind]
    assert len(made[kind].encode(LATIN)) <= most * len(LATIN)


def test_words_and_their_parts():
    one = train_tokenizer(["the cats and the cat's tables"] * 9, "wordpiece", vocab_size=100)
    assert [*one.specials] == [*BERT_SPECIALS] and one.eos == "[SEP]"
    ids = one.encode("the Cat, \t tables\u732b")
    tokens = [one.rust.id_to_token(i) for i in ids]
    assert tokens[0] == "the" and "tables" in tokens and tokens[-1] == "[UNK]"
    assert one.decode(one.encode("the  cats\nand tables")) == "the cats and tables"
    assert any(token.startswith("##") for token in one.rust.get_vocab())
    assert one.rust.encode("cats").tokens[0] == "[CLS]" and one.prefix == [one.specials["[CLS]"]]
    assert next(one.encode_documents(["cats"])).tolist() == [2, *one.encode("cats"), 3]


def test_sizes_of_tokens_add_up(made):
    for kind, text in itertools.product(("bpe", "unigram"), HARD):
        assert made[kind].token_bytes[made[kind].encode(text)].sum() == len(text.encode())


def test_sizes_of_single_bytes_add_up(made):
    assert made["char"].token_bytes[made["char"].encode("\u732b")].sum() == 3


def test_sizes_of_parts_of_words_add_up():
    one = train_tokenizer(["cats and cats"] * 9, "wordpiece", vocab_size=100)
    assert one.token_bytes[one.encode("catsand")].sum() == 7


@pytest.mark.parametrize("kind, options", [
    ("char", {"vocab_size": 259, "special_tokens": ["<x>"]}), ("bpe", {"vocab_size": 259, "special_tokens": ["<x>"]}),
    ("unigram", {"vocab_size": 259}), ("wordpiece", {"vocab_size": 20}),
])  # fmt: skip
def test_too_small_a_vocabulary_is_refused_or_kept_to(kind, options):
    with suppress(UserError):
        assert len(train_tokenizer([LATIN], kind, **options)) <= options["vocab_size"]


# ---- patterns -------------------------------------------------------------------------------------------------------


def pieces(one: Tokenizer, text: str) -> list[str]:
    return [text[start:end] for _, (start, end) in one.rust.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("pattern, longest", [("gpt2", 9), ("llama3", 3), ("qwen2", 1)])
def test_digits_are_cut_by_the_pattern(kind, pattern, longest):
    one = train_tokenizer([NUMBERS], kind, vocab_size=400, pattern=pattern)
    tokens = {one.decode([i]).replace(" ", "x") for i in one.encode(NUMBERS)}
    assert max(map(len, tokens)) == longest or (kind == "unigram" and pattern != "qwen2")
    assert max(map(len, tokens)) <= longest == max(map(len, pieces(one, "x 12345678")))


@pytest.mark.parametrize("pattern, text, cut", [
    ("gpt2", "It's 2024,  ok\r\n\n", ["It", "'s", " 2024", ",", " ", " ok", "\r\n\n"]),
    ("llama3", "It's 2024,  ok\r\n\n", ["It", "'s", " ", "202", "4", ",", " ", " ok", "\r\n\n"]),
    ("qwen2", "IT'S 24;\n x", ["IT", "'S", " ", "2", "4", ";\n", " x"]),
    ("gpt2", "IT'S", ["IT", "'", "S"]),
    ("llama3", "(foo) $bar", ["(foo", ")", " $", "bar"]),
])  # fmt: skip
def test_pieces_of_the_patterns(pattern, text, cut):
    one = train_tokenizer([LATIN], vocab_size=260, pattern=pattern)
    assert pieces(one, text) == cut


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_pattern_of_ones_own(kind):
    one = train_tokenizer([LATIN], kind, vocab_size=600, pattern=r"[\s\S]{1,2}")
    assert max(len(one.decode([i])) for i in range(3, len(one))) == (2 if kind == "bpe" else 1)  # too short to learn
    assert [one.decode([i]) for i in one.encode("x y")] in (["x ", "y"], ["x", " ", "y"])
    assert all(one.decode(one.encode(text)) == text for text in HARD)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("pattern", ["(", "[a-", "*", r"\p{Nothing}", "a{2,1}b(?="])
def test_a_pattern_that_is_no_regex(kind, pattern):
    with pytest.raises(UserError, match="is not a valid regex") as error:
        train_tokenizer([LATIN], kind, vocab_size=300, pattern=pattern)
    assert error.value.got == pattern


@pytest.mark.parametrize("train", [
    lambda texts, pattern: train_tokenizer(texts, vocab_size=300, pattern=pattern),
    lambda texts, pattern: extend_bpe(train_tokenizer(["b c"], vocab_size=270, pattern=pattern), texts, 300),
], ids=["train", "extend"])  # fmt: skip
def test_a_pattern_that_takes_too_many_steps_is_one_error(train, capfd):
    with pytest.raises(UserError, match="retry-limit"):

        def texts():
            print("reading", file=sys.stderr)
            yield "a" * 40 + "b"

        train(texts(), "(a+)+$")
    assert capfd.readouterr().err == "reading\n"  # nothing of Rust's panic


def test_a_pattern_that_takes_too_many_steps_is_one_error_when_it_is_read(tmp_path):
    train_tokenizer(["b c"], vocab_size=270, pattern="(a+)+$").save(tmp_path)
    one = load_tokenizer(tmp_path)
    for encode in (one.encode, one.encode_continuation, lambda text: one.encode_batch([text])):
        with pytest.raises(ModelError, match="can't encode a text: Onig"):
            encode("a" * 40 + "b")
    assert one.decode(one.encode("aaa")) == "aaa"


def test_lone_surrogates_are_replaced(kind, made):
    one = made[kind]
    assert one.encode("a\ud800b") == one.encode("a\ufffdb")
    assert one.encode_continuation("\udfff") == one.encode_continuation("\ufffd")
    assert one.encode("\ud83d\ude00") == one.encode("\U0001f600")  # a pair of them
    broken, mended = (one.encode_with_specials(f"a{sign}b", [(1, 2)]) for sign in ("\ud800", "\ufffd"))
    assert [part.tolist() for part in broken] == [part.tolist() for part in mended]
    assert [ids.tolist() for ids in one.encode_batch(["\ud800"] * 2)] == [one.encode("\ufffd")] * 2
    assert "\ufffd" in train_tokenizer(["a\ud800b"] * 9, "char", vocab_size=270).rust.get_vocab()


@pytest.mark.parametrize("texts", [[], [""], [" \n", "\t"]])
def test_no_text_is_refused(kind, texts):
    with pytest.raises(DataError, match="there is no text to train a tokenizer on"):
        train_tokenizer(texts, kind, vocab_size=400)


def test_a_vocab_size_without_room_for_the_alphabet_is_refused(kind):
    with pytest.raises(UserError, match="vocab_size is too small for the special tokens and the alphabet") as error:
        train_tokenizer([LATIN], kind, vocab_size=5)
    assert error.value.expected.startswith("at least ")


# ---- words of any length --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [PATTERNS["gpt2"], r"[^\n]+\n?"])
def test_training_gets_no_long_word(pattern):
    """Training time grows with the square of a word's length."""
    lengths: list[int] = []

    def train_from_iterator(texts, trainer):
        lengths.extend(len(word) for text in texts for word, _ in rust.pre_tokenizer.pre_tokenize_str(text))

    whole = pre_tokenizers.Split(Regex(pattern), "isolated")
    rust = SimpleNamespace(pre_tokenizer=whole, normalizer=None, train_from_iterator=train_from_iterator)
    train_on_words(rust, ["abcdefgh" * 5000], None, lambda line: None)
    assert lengths == [1000] * 40 and rust.pre_tokenizer is whole


@pytest.mark.parametrize(("pattern", "text", "words"), [
    ("gpt2", "\u65e5\u672c" * 200, 1),  # 400 characters, 1200 bytes
    ("qwen2", "\u65e5\u672c\u3002" * 1000, 0),  # words of 2 characters, without a space
    ("llama3", "=" * 3000 + " " + "ab" * 600, 2),
    (r"[^\n]+\n?", "one line of words " * 100 + "\nand a short one", 1),
], ids=["CJK", "signs between", "signs", "own pattern"])  # fmt: skip
def test_every_cut_word_is_said(pattern, text, words):
    said: list[str] = []
    train_tokenizer([text], vocab_size=300, pattern=pattern, say=said.append)
    expected = [f"the tokenizer learned from parts of {words} words that are longer than 1,000 letters"]
    assert said == (expected if words else [])
    if words:  # the words of `extend` are those of the base, with its tokens as letters
        extend_bpe(train_tokenizer(["b c"], vocab_size=259, pattern=pattern), [text * 2], 300, say=said.append)
        assert len(said) == 2


def test_long_words_are_cut_for_training_only_and_counted(kind):
    said: list[str] = []
    word = "abcdefgh" * 1000
    one = train_tokenizer([f"{word} and {word} {LATIN}"], kind, vocab_size=400, say=said.append)
    assert said == ([] if kind == "char" else [
        "the tokenizer learned from parts of 2 words that are longer than 1,000 letters"
    ])  # fmt: skip
    assert one.decode(one.encode(word)) == ("[UNK]" if kind == "wordpiece" else word)
    spec = one.rust.to_str()
    train_tokenizer([LATIN], kind, vocab_size=400, say=said.append)
    assert len(said) == (kind != "char") and "1000" not in spec


def test_tokens_of_usual_texts_do_not_depend_on_the_longest_word(monkeypatch):
    made = []
    for longest in (1000, 50_000):
        monkeypatch.setattr("llmkit.tokenizer.train.LONGEST_WORD", longest)
        made.append(train_tokenizer([LATIN, FOREIGN, NUMBERS], vocab_size=600).sha256)
    assert made[0] == made[1]


# ---- normalizers ----------------------------------------------------------------------------------------------------

ACCENTED = "Caf\u00e9 CAFE\u0301 \ufb01n \uff21 \u212b"


@pytest.mark.parametrize("names, change", [
    (["lowercase"], str.lower), (["nfc"], lambda text: unicodedata.normalize("NFC", text)),
    (["nfd"], lambda text: unicodedata.normalize("NFD", text)),
    (["nfkc"], lambda text: unicodedata.normalize("NFKC", text)),
    (["strip_accents"], lambda text: "Cafe CAFE \ufb01n \uff21 A"),
    (["nfkc", "strip_accents", "lowercase"], lambda text: "cafe cafe fin a a"),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["bpe", "unigram", "char"])
def test_what_normalizers_change(kind, names, change):
    one = train_tokenizer([ACCENTED, LATIN], kind, vocab_size=320, normalize=names)
    assert one.decode(one.encode(ACCENTED)) == change(ACCENTED) != ACCENTED
    assert one.encode(ACCENTED) == one.encode(change(ACCENTED))
    plain = train_tokenizer([ACCENTED, LATIN], kind, vocab_size=320)
    assert plain.decode(plain.encode(ACCENTED)) == ACCENTED
    assert [ids.tolist() for ids in one.encode_batch([ACCENTED])] == [one.encode(ACCENTED)]  # not by tiktoken


def test_normalizers_of_words():
    one = train_tokenizer(
        ["cafe", "fin a"] * 9, "wordpiece", vocab_size=80, normalize=["nfkc", "strip_accents", "lowercase"]
    )
    assert one.decode(one.encode(ACCENTED)) == "cafe cafe fin a a"


def test_an_unknown_normalizer_is_named(kind):
    with pytest.raises(UserError, match="normalizer is unknown") as error:
        train_tokenizer([LATIN], kind, vocab_size=300, normalize=["nfc", "lower_case"])
    assert error.value.got == "lower_case" and "lowercase" in error.value.fix


# ---- special tokens -------------------------------------------------------------------------------------------------


def test_special_tokens_are_special_and_never_come_from_text(kind, made):
    one = made[kind]
    own = BERT_SPECIALS if kind == "wordpiece" else SPECIALS
    assert one.specials == {token: i for i, token in enumerate([*own, "<tool>"])}
    unknown = {one.specials.get("[UNK]")}
    text = "".join(one.specials) + " " + " x ".join(one.specials)
    for ids in (one.encode(text), one.encode_batch([text])[0].tolist()):
        assert not set(ids) & (set(one.specials.values()) - unknown)
    control, word = one.specials["<tool>"], one.encode("at")
    assert one.decode([*word, control]).replace(" ", "") == one.decode(word) + "<tool>"
    assert not one.token_bytes[[*one.specials.values()]].any()


def test_transformers_finds_the_role_of_each_control_token(kind, made, tmp_path):
    made[kind].save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    roles = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]", "cls_token": "[CLS]"}
    plain = dict.fromkeys(roles) | {"pad_token": EOS}
    roles = {**roles, "sep_token": "[SEP]"} if kind == "wordpiece" else plain
    assert {role: getattr(theirs, role) for role in roles} == roles and theirs.eos_token == made[kind].eos
    ids = theirs(["a cat", "a"], padding=True).input_ids
    assert len(ids[0]) == len(ids[1]) and ids[1][-1] == made[kind].specials[roles["pad_token"]]


def test_roles_that_a_file_names_are_kept(made, tmp_path):
    made["bpe"].save(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    roles = {
        "pad_token": {"content": "<|endoftext|>"},
        "mask_token": "<tool>",
        "unk_token": None,
        "sep_token": "absent",
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | roles))
    one = load_tokenizer(tmp_path)
    assert one.roles == {"pad_token": "<|endoftext|>", "mask_token": "<tool>"}
    one.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").roles == one.roles


def test_all_that_ends_an_answer_is_told_to_transformers_and_read_from_it(made, tmp_path):
    config = llama.Config(vocab_size=400, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    one = load_saved(made["bpe"], tmp_path / "plain", config)
    assert one.stop_ids == [one.eos_id] and not (tmp_path / "plain" / "generation_config.json").exists()
    one.chat_template = "{{ messages }}"
    again = load_saved(one, tmp_path / "chats", config)
    assert again.stop_ids == [one.eos_id, one.end_of_turn_id]
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path / "chats")
    assert theirs.eos_token_id == again.stop_ids
    file = tmp_path / "chats" / "generation_config.json"
    plain = one.encode("a")[0]
    file.write_text(json.dumps({"eos_token_id": [one.specials["<tool>"], plain, 10**6]}))
    ends = [one.eos_id, one.end_of_turn_id, one.specials["<tool>"], plain]  # special or not
    assert load_tokenizer(tmp_path / "chats").stop_ids == ends
    config_file = tmp_path / "chats" / "config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"eos_token_id": plain + 1}))
    assert load_tokenizer(tmp_path / "chats").stop_ids == [*ends[:2], plain + 1, *ends[2:]]


def load_saved(one: Tokenizer, path: Path, config: llama.Config) -> Tokenizer:
    """Load a tokenizer that was saved beside a model."""
    one.save(path)
    save_model(build_model(config), path, eos_token_ids=one.stop_ids)
    return load_tokenizer(path)


def test_chat_tokens_are_there(kind, made):
    if kind != "wordpiece":
        assert made[kind].eos == EOS and made[kind].end_of_turn_id == made[kind].specials[CHAT_END]
        assert made[kind].specials[CHAT_START] == 1


@pytest.mark.parametrize("pattern", [r"\S+|\s+", r"[\s\S]+"])
def test_special_tokens_never_come_from_text_however_it_is_cut(pattern):
    one = train_tokenizer([LATIN[:2000]], vocab_size=400, pattern=pattern)
    for ids in (one.encode("".join(SPECIALS)), one.encode_batch([EOS])[0].tolist(), one.encode(EOS)):
        assert not set(ids) & set(one.specials.values())


@pytest.mark.parametrize("kind, options", [
    ("bpe", {"pattern": r"\S+|\s+"}), ("unigram", {"pattern": r"\S+|\s+"}),
])  # fmt: skip
def test_special_tokens_are_not_learnt_from_text(kind, options):
    text = "<|endoftext|> end the end | <|endoftext|>"
    one = train_tokenizer([text] * 50, kind, vocab_size=310, **options)
    assert not set(one.encode(text)) & set(one.specials.values())


@pytest.mark.parametrize("special", ["|", "a", "tool", "42"])
def test_special_tokens_that_texts_are_made_of_are_refused(special):
    with pytest.raises(UserError, match="special token"):
        train_tokenizer(["a tool | 42"], "char", vocab_size=300, special_tokens=[special])


# ---- the folder -----------------------------------------------------------------------------------------------------


def test_the_saved_folder_is_transformers_own(kind, made, tmp_path):
    transformers = pytest.importorskip("transformers")
    made[kind].save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert len(theirs) == len(made[kind]) and theirs.eos_token_id == made[kind].eos_id
    assert set(theirs.all_special_tokens) <= set(made[kind].specials)
    plain = [text for text in [*HARD, *chance(2, 50)] if not any(token in text for token in made[kind].specials)]
    assert len(plain) > 60
    for text in plain:
        assert theirs(text, add_special_tokens=False)["input_ids"] == made[kind].encode(text)
    assert theirs("<tool>", add_special_tokens=False)["input_ids"] == [made[kind].specials["<tool>"]]
    assert [load_tokenizer(tmp_path).encode(text) for text in plain] == [made[kind].encode(text) for text in plain]
    assert load_tokenizer(tmp_path).eos_id == made[kind].eos_id


# ---- the fast encoder -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=PATTERNS)
def patterned(request) -> Tokenizer:
    return train_tokenizer([LATIN, FOREIGN, NUMBERS], vocab_size=700, pattern=request.param)


def fast_agrees(one: Tokenizer, texts: list[str]) -> None:
    assert one.fast is not None
    for text, ids in zip(texts, one.encode_batch(texts), strict=True):
        assert ids.tolist() == one.encode(text), text[:100]
        assert one.fast.encode_ordinary(text) == ids.tolist()
    assert one.verify_fast_encoder(texts)


def like_qwens(words: list[str], **options: bool) -> Tokenizer:
    """Return a tokenizer with NFC, and added tokens that are no special ones, as Qwen's for tools."""
    one = train_tokenizer([LATIN, FOREIGN, NUMBERS], vocab_size=700, pattern="qwen2")
    one.rust.normalizer = normalizers.NFC()
    one.rust.add_tokens([AddedToken(word, normalized=False, **options) for word in words])
    return Tokenizer(one.rust, one.eos_id)


def test_the_fast_encoder_reads_tokenizers_like_qwens(tmp_path):
    one = like_qwens(["<tool_call>", "</tool_call>", "<think>", "</think>"])
    one.save(tmp_path)
    theirs, ours = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    calls = ["<tool_call>\n{}\n</tool_call>", "a<think>b</think> <tool_call", f"{EOS}<think>", "<think><think>"]
    texts = [*HARD, *chance(4, 300), *calls, "cafe\u0301 \ufb01", LATIN]
    assert ours.fast is not None and ours.verify_fast_encoder(texts)
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        assert ids.tolist() == ours.encode(text)
        if not any(name in text for name in ours.specials):
            assert ids.tolist() == theirs(text, add_special_tokens=False).input_ids
    ids = ours.encode_batch(calls)[0]
    assert ours.token_bytes[ids].sum() == len(calls[0]) and theirs.convert_tokens_to_ids("<tool_call>") == ids[0]


@pytest.mark.parametrize("words, options", [(["<a>"], {"lstrip": True}), (["<a", "<a>"], {}), (["<|end"], {})])
def test_added_tokens_that_the_fast_encoder_may_read_differently_are_left_to_the_other(words, options):
    one = like_qwens(words, **options)
    assert one.fast is None
    assert one.encode_batch([" <a> <a <|end"])[0].tolist() == one.encode(" <a> <a <|end")


def test_the_fast_encoder_agrees_on_hard_text(patterned):
    fast_agrees(patterned, [*HARD, *chance(3, 1000), LATIN, FOREIGN, NUMBERS])


@pytest.fixture(scope="module")
def many_languages() -> list[str]:
    """Return the declaration of human rights in a dozen scripts."""
    codes = "eng deu fra rus ell_monotonic arb heb hin tam tha kat amh jpn cmn_hans kor vie tur".split()
    with zipfile.ZipFile(SHARED / "pretrain" / "nltk" / "udhr2.zip") as archive:
        found = [f"udhr2/{code}.txt" for code in codes if f"udhr2/{code}.txt" in archive.namelist()]
        return [archive.read(name).decode()[:4000] for name in found]


@needs_shared
def test_the_fast_encoder_agrees_on_many_languages(patterned, many_languages):
    assert len(many_languages) > 12
    fast_agrees(patterned, many_languages)
    assert all(patterned.decode(patterned.encode(text)) == text for text in many_languages)


@needs_shared
def test_the_fast_encoder_agrees_for_gpt2s_own_vocabulary(many_languages):
    gpt2 = load_tokenizer(SHARED / "tokenizers" / "gpt2" / "tokenizer.json")
    fast_agrees(gpt2, [*HARD, *chance(4, 1000), *many_languages])


@needs_shared
def test_the_fast_encoder_agrees_for_a_vocabulary_learnt_from_many_languages(many_languages):
    for pattern in PATTERNS:
        fast_agrees(train_tokenizer(many_languages, vocab_size=3000, pattern=pattern), [*HARD, *many_languages])


@pytest.mark.parametrize("letter", ["a", " ", "\u732b"])
def test_very_long_runs(patterned, letter):
    text = "a b " + letter * 200_000 + " c"
    short = "a b " + letter * 2_000 + " c"
    assert [ids.tolist() for ids in patterned.encode_batch([text, short])] == [
        patterned.encode(text),
        patterned.encode(short),
    ]


def test_a_million_spaces():  # on which tiktoken's regex overflows its stack
    one = train_tokenizer([LATIN], vocab_size=300)
    assert len(one.encode_batch([" " * 1_000_000])[0]) == len(one.encode(" " * 1_000_000))


@needs_shared
def test_very_long_runs_in_gpt2s_own_vocabulary():
    gpt2 = load_tokenizer(SHARED / "tokenizers" / "gpt2" / "tokenizer.json")
    for letter in ("a", " "):
        assert gpt2.encode_batch([letter * 200_000])[0].tolist() == gpt2.encode(letter * 200_000)


# ---- long texts in pieces -------------------------------------------------------------------------------------------


def cut_everywhere(monkeypatch, one: Tokenizer, text: str, at_least: int) -> None:
    """Check that a tokenizer gives a text its ids if it is cut wherever it may be, with each of its encoders."""
    for module in ("fast", "tokenizer"):
        monkeypatch.setattr(f"llmkit.tokenizer.{module}.PIECE", 1)
    whole, pieces = one.encode(text), list(one.cut(text))
    assert len(pieces) > at_least and "".join(pieces) == text
    assert np.concatenate(list(one.encode_slowly(pieces))).tolist() == whole
    assert one.encode_batch([text, "a b", text])[2].tolist() == whole


def many_signs(number: int) -> str:
    """Return random text with runs of white space, contractions, digits, marks and signs that compose."""
    draw = random.Random(9)
    signs = [
        "  ", "\n\n", " \n ", "\r\n", "\n\n\u0301  ", "\u037a  ", "'ll", "'s", " 'T", "\u017f", "12345", "e\u0301",
        ".\n", "\u1100\u1161", ",,\n", "\u732b", "\u732b\u3002\n", "\u304b\u3099\u3001", "\u0301", "a", "Z", " ", ".",
        "\ud83d", "\ude00", *HARD,
    ]  # fmt: skip
    return "".join(draw.choices(signs, k=number)) + "".join(chance(7, number // 20))


def test_every_pattern_reads_a_text_cut_anywhere_as_the_whole(patterned, monkeypatch):
    every = (f"{letter} {letter}.{letter},{letter}\n" for letter in map(chr, range(0x3400)))
    cut_everywhere(monkeypatch, patterned, many_signs(10_000) + "".join(every), 15_000)


@pytest.mark.parametrize("steps", [(), ("nfc",), ("nfkc", "lowercase"), ("nfd",)])
@pytest.mark.parametrize("kind", TRAINERS)
def test_every_kind_reads_a_text_cut_anywhere_as_the_whole(kind, steps, monkeypatch):
    one = train_tokenizer([LATIN, FOREIGN], kind, vocab_size=600, normalize=steps)
    cut_everywhere(monkeypatch, one, many_signs(2000), 1000)


def test_no_added_token_is_cut(monkeypatch):
    text = "<a> x<b c> <a><b c>\ufe52<d" * 100
    cut_everywhere(monkeypatch, like_qwens(["<a>", "x<b"]), text, 200)
    for words, options in [(["<b c>"], {}), (["c>."], {}), (["<a>"], {"rstrip": True}), (["x"], {"single_word": True})]:
        one = like_qwens(words, **options)
        assert list(one.cut(text)) == [text] and one.encode_batch([text])[0].tolist() == one.encode(text)


def test_texts_of_a_tokenizer_with_other_rules_stay_whole(monkeypatch):
    monkeypatch.setattr("llmkit.tokenizer.tokenizer.PIECE", 1)
    one = train_tokenizer([LATIN], vocab_size=300, pattern=r"[a-z]+ [a-z]+|\s+")
    assert list(one.cut("at on in")) == ["at on in"]
    one = train_tokenizer([LATIN], vocab_size=300)
    one.rust.normalizer = normalizers.Prepend("x")
    assert list(one.cut("at on in")) == ["at on in"]


def test_accents_that_are_deleted_may_stand_at_no_cut(monkeypatch):
    text = many_signs(2000)
    for kind in TRAINERS:
        one = train_tokenizer([LATIN], kind, vocab_size=600, normalize=["nfkc", "strip_accents"])
        cut_everywhere(monkeypatch, one, text, 1000 if kind in ("wordpiece", "char") else 0)


def test_source_code_is_read_by_the_fast_encoder():
    one = train_tokenizer([LATIN], vocab_size=300)
    text = "def f(x):\n        return x\n" * 40_000
    assert one.is_fast_for(text) and not one.is_fast_for(text + " " * 30_000)


@pytest.mark.parametrize("is_fast", [True, False])
def test_only_a_part_of_a_long_text_is_with_the_slow_encoder_at_a_time(is_fast, monkeypatch):
    for module in ("fast", "tokenizer"):
        monkeypatch.setattr(f"llmkit.tokenizer.{module}.PIECE", 20_000)
    one, blocks = train_tokenizer([LATIN], vocab_size=300), []
    lines = "def f(x):\n        return x\n" * 10_000
    text = "".join([lines, "e\u0301" * 15_000, " ", lines])
    whole = one.encode(text)
    if not is_fast:
        one.__dict__["fast"] = None
    monkeypatch.setattr(
        "llmkit.tokenizer.tokenizer.in_blocks",
        lambda *args: (blocks.append(block) or block for block in in_blocks(*args)),
    )
    assert one.encode_batch([text])[0].tolist() == whole
    assert len(blocks) == (1 if is_fast else 7) and max(sum(map(len, block)) for block in blocks) < 150_000


# ---- other patterns -------------------------------------------------------------------------------------------------


def test_what_a_pattern_does_not_match_is_kept():
    one = train_tokenizer([LATIN], vocab_size=300, pattern=r"[a-zA-Z]+|\s+")
    assert one.encode_batch(["at 5 \u732b!"])[0].tolist() == one.encode("at 5 \u732b!")


@pytest.mark.parametrize("pattern", [r"\X", r"\s*"])
def test_patterns_that_only_tokenizers_knows(pattern):
    one = train_tokenizer([LATIN], vocab_size=300, pattern=pattern)
    assert one.encode_batch(["at once"])[0].tolist() == one.encode("at once")


def test_added_tokens_that_are_not_special_are_the_same_both_ways():
    one = train_tokenizer([LATIN], vocab_size=300)
    one.rust.add_tokens([AddedToken("<tool_call>", special=False)])
    assert one.encode_batch(["at <tool_call>"])[0].tolist() == one.encode("at <tool_call>")


# ---- extending ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=PATTERNS)
def base(request) -> Tokenizer:
    one = train_tokenizer([LATIN, NUMBERS], vocab_size=500, pattern=request.param, special_tokens=["<tool>"])
    return Tokenizer(one.rust, one.eos_id, "<tool>", "{{ messages }}")


@pytest.fixture(scope="module")
def extended(base) -> Tokenizer:
    return extend_bpe(base, [FOREIGN[: len(FOREIGN) // 2], FOREIGN[len(FOREIGN) // 2 :]], 800)


def infer_merges(one: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(merge) for merge in json.loads(one.rust.to_str())["model"]["merges"]]


def test_old_tokens_keep_their_ids(base, extended):
    old, new = (one.rust.get_vocab(with_added_tokens=True) for one in (base, extended))
    assert old.items() <= new.items() and sorted(new.values()) == list(range(800)) and len(old) == 500
    assert extended.specials == base.specials and infer_merges(extended)[: len(infer_merges(base))] == infer_merges(
        base
    )
    assert (extended.eos_id, extended.bos, extended.chat_template) == (base.eos_id, "<tool>", "{{ messages }}")
    for text in [*HARD, LATIN, FOREIGN]:
        assert extended.decode(base.encode(text)) == text


def test_new_tokens_are_old_ones_joined(base, extended):
    ids = extended.rust.get_vocab()
    joined = {left + right: (left, right) for left, right in infer_merges(extended)[len(infer_merges(base)) :]}
    letters = {letter: byte for byte, letter in enumerate(bytes_to_unicode())}
    for i in range(len(base), len(extended)):
        left, right = joined[extended.rust.id_to_token(i)]
        assert ids[left] < i and ids[right] < i
        assert extended.token_bytes[i] == extended.token_bytes[ids[left]] + extended.token_bytes[ids[right]]
        data = bytes(letters[letter] for letter in left + right)
        assert extended.decode([i]) == data.decode(errors="replace")


def test_text_without_new_pairs_is_encoded_as_before_and_other_text_shorter(base, extended):
    new = set(infer_merges(extended)[len(infer_merges(base)) :])
    words = [*chance(5, 1000), *LATIN.split(), *FOREIGN.split()[:2000]]
    changed = 0
    for word in words:
        found, tokens = False, []
        for piece, _ in base.rust.pre_tokenizer.pre_tokenize_str(word):
            tokens = [token.value for token in base.rust.model.tokenize(piece)]
            found |= any(pair in new for pair in itertools.pairwise(tokens))
        assert (len(extended.encode(word)) < len(base.encode(word))) == found
        assert found or extended.encode(word) == base.encode(word)
        changed += found
    assert 500 < changed < len(words) - 500


def test_the_first_new_pair_is_the_most_frequent(base, extended):
    counts: Counter[tuple[str, str]] = Counter()
    for half in (FOREIGN[: len(FOREIGN) // 2], FOREIGN[len(FOREIGN) // 2 :]):
        for piece, _ in base.rust.pre_tokenizer.pre_tokenize_str(half):
            counts.update(itertools.pairwise(token.value for token in base.rust.model.tokenize(piece)))
    assert counts[infer_merges(extended)[len(infer_merges(base))]] == max(counts.values())


def test_pairs_are_counted_over_all_texts():
    base = train_tokenizer([LATIN], vocab_size=300)
    more = extend_bpe(base, [*["qx"] * 5, "zj zj zj zj"], 301)
    assert more.rust.id_to_token(300) == "qx"


def test_the_new_language_is_compressed_and_nothing_lost(base, extended):
    assert len(extended.encode(FOREIGN)) < 0.6 * len(base.encode(FOREIGN))
    assert len(extended.encode(LATIN)) <= len(base.encode(LATIN))
    for text in [*HARD, *chance(6, 300), LATIN, FOREIGN]:
        ids = extended.encode(text)
        assert extended.decode(ids) == text and not set(ids) & set(extended.specials.values())
        assert extended.token_bytes[ids].sum() == len(text.encode())


def test_the_fast_encoder_agrees_after_extending(base, extended):
    fast_agrees(extended, [*HARD, *chance(7, 1000), LATIN, FOREIGN, NUMBERS])


def test_extending_again_goes_on(extended):
    more = extend_bpe(extended, [prose(9, "xyzqwk")], 900)
    assert len(more) == 900 and extended.rust.get_vocab().items() <= more.rust.get_vocab().items()
    fast_agrees(more, [*HARD, *chance(8, 300), FOREIGN])


def test_extending_on_the_same_text_is_as_good_as_training_longer():
    short, long = (train_tokenizer([LATIN], vocab_size=size) for size in (400, 600))
    tokens = len(extend_bpe(short, [LATIN], 600).encode(LATIN))
    assert tokens == pytest.approx(len(long.encode(LATIN)), rel=0.01)


def test_a_normalizer_goes_along():
    base = train_tokenizer([LATIN], vocab_size=400, normalize=["lowercase"])
    more = extend_bpe(base, [FOREIGN.upper()], 500)
    assert (
        more.sha256 == extend_bpe(base, [FOREIGN.upper().lower()], 500).sha256
        and more.decode(more.encode("\u00c4b")) == "\u00e4b"
    )


@pytest.mark.parametrize("kind, vocab_size, texts, what", [
    ("bpe", 500, [FOREIGN], "already has that size"), ("bpe", 400, [FOREIGN], "already has that size"),
    ("unigram", 900, [FOREIGN], "only a byte-level BPE"), ("wordpiece", 900, [FOREIGN], "only a byte-level BPE"),
    ("bpe", 900, [], "nothing to learn"), ("bpe", 900, ["", "a", "\u732b"], "nothing to learn"),
])  # fmt: skip
def test_what_can_not_be_extended(made, kind, vocab_size, texts, what):
    with pytest.raises(UserError, match=what):
        extend_bpe(made[kind], texts, vocab_size)


def test_a_bpe_with_bytes_to_fall_back_on_is_refused_or_loses_nothing(made):
    try:
        more = extend_bpe(made["char"], ["\u65e5\u672c\u8a9e " * 50], 520)
    except UserError:
        return
    assert more.decode(more.encode("\u65e5\u672c\u8a9e")) == "\u65e5\u672c\u8a9e"


def test_a_bpe_without_a_pre_tokenizer_is_refused():
    rust = Rust(models.BPE(vocab={"a": 0, "b": 1, "</s>": 2}, merges=[]))
    with pytest.raises(UserError):
        extend_bpe(Tokenizer(rust, 2), ["ab ab ab"], 5)


def test_a_large_vocabulary_can_be_extended():
    spec = json.loads(train_tokenizer([LATIN], vocab_size=300).rust.to_str())
    names = ("".join(name) for name in itertools.product(bytes_to_unicode()[40:100], repeat=3))
    spec["model"]["vocab"] |= {name: 300 + i for i, name in enumerate(itertools.islice(names, 140_000))}
    large = Tokenizer(Rust.from_str(json.dumps(spec)), 0)
    assert len(extend_bpe(large, [FOREIGN], len(large) + 10)) == len(large) + 10


@needs_shared
def test_gpt2_learns_japanese():
    gpt2 = load_tokenizer(SHARED / "tokenizers" / "gpt2" / "tokenizer.json")
    text = (SHARED / "pretrain" / "books-ja" / "wagahaiwa_nekodearu.txt").read_text(encoding="utf-8")
    more = extend_bpe(gpt2, [text[:40_000]], 50_757)
    held_out = text[100_000:120_000]
    assert len(more) == 50_757 and len(more.encode(held_out)) < 0.7 * len(gpt2.encode(held_out))
    assert more.decode(more.encode(held_out)) == held_out
    fast_agrees(more, [*HARD, held_out])
    assert more.encode(sentences(1, 50)) == gpt2.encode(sentences(1, 50))


# ---- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "latin.txt").write_text(LATIN)
    (folder / "foreign.jsonl").write_text("".join(json.dumps({"body": line}) + "\n" for line in FOREIGN.splitlines()))
    return folder


def test_train_extend_and_show_through_the_command_line(files):
    llmkit("tokenizer", "train", "latin.txt", "--out", "a", "--vocab-size", 400, "--pattern", "qwen2", cwd=files)
    assert (files / "a" / "tokenizer_config.json").is_file() and len(load_tokenizer(files / "a")) == 400
    done = llmkit(
        "tokenizer", "train", "foreign.jsonl", "--extend", "a", "--out", "b", "--vocab-size", 600, "--text-key", "body",
        "--json", cwd=files,
    )  # fmt: skip
    assert json.loads(done.stdout) == {"written": "b/tokenizer.json", "vocabulary": 600}
    a, b = load_tokenizer(files / "a"), load_tokenizer(files / "b")
    assert a.rust.get_vocab().items() < b.rust.get_vocab().items() and b.eos_id == a.eos_id

    text = "At 12 o'clock \u00e4\u00f6\u00fc"
    shown = llmkit("tokenizer", "show", "a", text, "foreign.jsonl", "--text-key", "body", "--beside", "b", "--json",
                   cwd=files)  # fmt: skip
    shown = json.loads(shown.stdout)
    one, many = shown["sources"]
    assert shown["vocabulary"] == 400 and one["ids"] == a.encode(text) and "ids" not in many
    assert (one["characters"], one["bytes"]) == (len(text), len(text.encode()))
    assert (one["tokens"], one["beside: tokens"]) == (len(a.encode(text)), len(b.encode(text)))
    lines = FOREIGN.splitlines()
    assert many["source"] == "foreign.jsonl" and many["characters"] == sum(map(len, lines))
    assert many["tokens"] == sum(len(a.encode(line)) for line in lines) > many["beside: tokens"]
    assert many["beside: characters a token"] == round(many["characters"] / many["beside: tokens"], 3)

    painted = llmkit("tokenizer", "show", "a", "At 12", "--beside", "b", cwd=files).stdout
    assert "|".join(a.decode([i]) for i in a.encode("At 12")).replace(" ", "\u00b7") in painted
    assert "beside: tokens" in painted and "vocabulary: 400" in painted


@pytest.mark.parametrize("kind", ["unigram", "wordpiece", "char"])
def test_kinds_through_the_command_line(files, kind):
    options = ["--normalize", "nfkc", "--normalize", "lowercase", "--special", "<tool>"]
    llmkit("tokenizer", "train", "latin.txt", "--kind", kind, "--out", kind, "--vocab-size", 400, *options, cwd=files)
    one = load_tokenizer(files / kind)
    spec = json.loads(one.rust.to_str())
    assert spec["model"]["type"].lower() == {"char": "bpe"}.get(kind, kind) and len(one) <= 400
    assert "<tool>" in one.specials and one.encode("\uff21T") == one.encode("at")


def test_an_unknown_kind_is_a_user_error(files):
    done = llmkit("tokenizer", "train", "latin.txt", "--kind", "unigramm", cwd=files, code=2)
    assert "unigram" in done.stderr


def test_options_that_do_nothing_when_extending_are_refused(files):
    train_tokenizer([LATIN], vocab_size=400).save(files / "base")
    llmkit("tokenizer", "train", "latin.txt", "--extend", "base", "--special", "<x>", "--kind", "unigram",
           "--vocab-size", 450, cwd=files, code=2)  # fmt: skip


def test_a_folder_gives_its_own_tokenizer_before_that_of_a_model_in_it(tmp_path):
    own, other = (train_tokenizer(["a cat and a cat"] * 9, vocab_size=size) for size in (264, 266))
    own.save(tmp_path)
    (tmp_path / "model").mkdir()
    assert load_tokenizer(tmp_path).sha256 == own.sha256
    other.save(tmp_path / "model")
    assert load_tokenizer(tmp_path).sha256 == own.sha256
    (tmp_path / "tokenizer.json").unlink()
    assert load_tokenizer(tmp_path).sha256 == other.sha256
