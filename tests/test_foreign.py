"""Other people's tokenizer files: the ids that SentencePiece and transformers give, or one error."""

import io
import itertools
import json
import random
import shutil
import sys
import unicodedata
from pathlib import Path

import pytest
from conftest import SHARED, llmkit, needs_shared, sentences
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Rust

from llmkit.errors import ENVIRONMENT, MODEL, ModelError, UserError
from llmkit.tokenizer.chat_template import encode_chat
from llmkit.tokenizer.load import load_tokenizer
from llmkit.tokenizer.tokenizer import Tokenizer
from llmkit.tokenizer.train import CHAT_END, CHAT_START, EOS, train_tokenizer

# ---- texts ----------------------------------------------------------------------------------------------------------


def prose(seed: int, letters: str, space: str = " ") -> str:
    """Return lines in an invented language: words of the letters, some of them frequent."""
    draw = random.Random(seed)
    words = ["".join(draw.choices(letters, k=draw.randint(1, 7))) for _ in range(150)]
    weights = [1 / (i + 1) for i in range(150)]
    return "\n".join(space.join(draw.choices(words, weights, k=8)) + draw.choice(".?!") for _ in range(120))


LANGUAGES = [
    sentences(1, 150),
    prose(2, "aeiourst\u00e4\u00f6\u00fc\u00df"),
    prose(3, "\u0430\u0435\u0438\u043e\u043a\u043d\u0442\u0441"),
    prose(4, "\u306e\u306b\u306f\u3092\u65e5\u672c\u8a9e\u732b\u3067\u3042\u308b", "\u3001"),
]
SIGNS = "< / > [x] 0123456789 ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz ,;:'\"-_"
LINES = [line for text in LANGUAGES for line in text.splitlines()] + [SIGNS] * 3
HARD = [
    "", " ", "   ", "\n", "\n\n", "a", " a", "a ", "  a   b  ", "a\nb", "a\n\nb\n", "\ta\t", "a \n b", "x" * 200,
    "don't", "caf\u00e9 cafe\u0301", "\ufb01nal \ufb02ow o\ufb03ce", "\u2460\u2161 \uff21\uff22 \xbd\xb2 \u2026",
    "\u65e5\u672c\u8a9e\u306f\u3000\u732b", "\u3000a\u3000", "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\xa0a\xa0", "a\u200bb", "\ufeffa", "\u0130i\u0307", "\0\x01\x7f", "\u0e44\u0e17\u0e22", "12345 1,5", "aaaaa aaa",
    "The river  reads.   A token ", "\u0939\u093f\u0928\u094d\u0926\u0940", "".join(map(chr, range(32, 127))),
]  # fmt: skip


def chance(seed: int, number: int) -> list[str]:
    """Return short random texts of pieces from LINES and HARD, with many spaces."""
    draw = random.Random(seed)
    letters = [letter for letter in "".join(HARD) if not unicodedata.combining(letter)]
    parts = [*letters, *" \n.,'aeAE019" * 12, *" ".join(LINES[::40]).split(" ")]
    return ["".join(draw.choice(parts) + draw.choice(["", "", " "]) for _ in range(9)) for _ in range(number)]


TEXTS = [*HARD, *LINES[::9], *chance(1, 250)]


# ---- SentencePiece --------------------------------------------------------------------------------------------------


def trained(lines: list[str] = LINES, **options) -> bytes:
    """Train a model on the lines with the sentencepiece package, and return its file."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    file = io.BytesIO()
    basic = {"vocab_size": 700, "character_coverage": 1.0, "hard_vocab_limit": False}
    basic |= {"minloglevel": 2, "num_threads": 1, "max_sentence_length": 20_000}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=file, **basic | options)
    return file.getvalue()


class Pair:
    """SentencePiece itself, and what we read from its file."""

    def __init__(self, folder: Path, model: bytes, name: str = "tokenizer.model", **config):
        import sentencepiece

        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(model)
        if config:
            (folder / "tokenizer_config.json").write_text(json.dumps(config))
        self.theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.ours = load_tokenizer(folder)

    def agree(self, texts: list[str]) -> None:
        for text in texts:
            ids = self.theirs.encode(text)
            assert self.ours.encode(text) == ids, (text, self.theirs.encode(text, out_type=str))
            if self.theirs.unk_id() not in ids:
                assert self.ours.decode(ids) == self.theirs.decode(ids), text


KINDS = {
    f"{kind}-{'bytes' if bytes_ else 'unk'}-{normal}-{'prefix' if prefix else 'bare'}-{'one' if collapse else 'all'}": {
        "model_type": kind, "byte_fallback": bytes_, "normalization_rule_name": normal, "add_dummy_prefix": prefix,
        "remove_extra_whitespaces": collapse,
    }
    for kind, bytes_, normal, prefix, collapse in itertools.product(
        ("unigram", "bpe"), (False, True), ("nmt_nfkc", "identity"), (True, False), (True, False)
    )
}  # fmt: skip


@pytest.fixture(scope="module")
def kinds() -> dict[str, bytes]:
    return {name: trained(**options) for name, options in KINDS.items()}


@pytest.mark.parametrize("name", KINDS)
def test_ids_and_texts_are_sentencepieces_own(kinds, name, tmp_path):
    pair = Pair(tmp_path, kinds[name])
    assert len(pair.ours) == pair.theirs.vocab_size() > 300
    assert (pair.ours.eos, pair.ours.bos, pair.ours.prefix) == ("</s>", "<s>", [1])
    pair.agree(TEXTS)


@pytest.mark.parametrize("name", [name for name in KINDS if name.endswith(("prefix-one", "bare-all"))])
def test_saving_changes_nothing(kinds, name, tmp_path):
    one = Pair(tmp_path, kinds[name]).ours
    one.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.prefix == one.prefix == [1] and again.eos_id == one.eos_id == 2 and again.specials == one.specials
    for text in TEXTS:
        assert again.encode(text) == one.encode(text)
        assert again.decode(one.encode(text)) == one.decode(one.encode(text))


def test_bytes_lose_nothing(kinds, tmp_path):
    one = Pair(tmp_path, kinds["bpe-bytes-identity-bare-all"]).ours
    assert all(one.decode(one.encode(text)) == text for text in TEXTS)


SENTINELS = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}  # T5's
SPELT_OUT = ["<s>", "</s>", "a</s>b <s>", "<0x41>", "<0x41>tool<0x0A>", "<pad>", "<ctl>x"]
PLACES = {
    "unigram": {"model_type": "unigram"}, "bpe": {"model_type": "bpe"},
    "unigram-bytes": {"model_type": "unigram", "byte_fallback": True},
    "bpe-bytes": {"model_type": "bpe", "byte_fallback": True}, "t5": {"model_type": "unigram", **SENTINELS},
}  # fmt: skip


@pytest.mark.parametrize("options", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("text", SPELT_OUT)
def test_a_control_token_spelt_out_stays_text(options, text, tmp_path):
    pair = Pair(tmp_path, trained(control_symbols=["<ctl>"], **options))
    assert all(pair.theirs.encode(letter)[-1] != pair.theirs.unk_id() for letter in "<>/spad0x41un")
    pair.agree([text])
    assert not set(pair.ours.encode(text)) & set(pair.ours.specials.values())


@pytest.mark.parametrize("options", PLACES.values(), ids=PLACES)
def test_a_control_token_of_unknown_letters_stays_text(options, tmp_path):
    pair = Pair(tmp_path, trained([line for line in LINES if line != SIGNS], **options))
    assert options.get("byte_fallback") or pair.theirs.unk_id() in pair.theirs.encode("<")
    pair.agree([*SPELT_OUT, "the </s> model", "%<s>", "<s", "s>"])


def of_words() -> Rust:
    rust = Rust(models.WordLevel({"a": 0, "b": 1, "</s>": 2, "<unk>": 3, "<>": 4}, unk_token="<unk>"))
    rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return rust


def without_merges() -> Rust:
    vocab = {token: i for i, token in enumerate(["</s>", "<unk>", *"</s>ab ", "</", "s>"])}
    return Rust(models.BPE(vocab, [("<", "/"), ("s", ">")], unk_token="<unk>", ignore_merges=True))


@pytest.mark.parametrize("make", [of_words, without_merges])
def test_a_control_token_that_a_model_knows_as_a_word_stays_text(make, tmp_path):
    rust = make()
    rust.add_special_tokens(["</s>", "<unk>"])
    rust.save(str(tmp_path / "tokenizer.json"))
    one = load_tokenizer(tmp_path)
    for text in ["</s>", "a </s> b", "a</s>b", "</s></s>"]:
        assert one.eos_id not in one.encode(text)
    for text in ["a b", "<> a", "b / s"]:
        assert one.encode(text) == rust.encode(text, add_special_tokens=False).ids
    one.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").sha256 == one.sha256


@pytest.mark.parametrize("make", [of_words, without_merges])
def test_the_unknown_token_that_a_text_spells_out_is_one_token(make, tmp_path):
    """WikiText and the Penn Treebank have <unk> in their texts, and published perplexities count it as a token."""
    rust = make()
    rust.add_special_tokens(["</s>", "<unk>"])
    rust.save(str(tmp_path / "tokenizer.json"))
    one, unknown = load_tokenizer(tmp_path), rust.token_to_id("<unk>")
    assert one.encode("a <unk> b").count(unknown) == 1 and one.encode("<unk><unk>") == [unknown] * 2
    assert one.specials["<unk>"] == one.unknown_id == unknown and one.token_bytes[unknown] == 0
    one.save(tmp_path / "saved")  # special again there
    saved = Rust.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    assert saved.get_added_tokens_decoder()[unknown].special
    assert load_tokenizer(tmp_path / "saved").encode("a <unk> b") == one.encode("a <unk> b")
    one.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert encode_chat(one, [{"role": "user", "content": "a <unk> </s>"}]).count(one.eos_id) == 0


def test_an_end_token_that_is_the_unknown_one_stays_a_control_token(tmp_path):
    rust = Rust(models.WordLevel({"a": 0, "</s>": 1}, unk_token="</s>"))
    rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    rust.add_special_tokens(["</s>"])
    rust.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).unknown is None


@pytest.mark.parametrize("prefix", [False, True], ids=["bare", "prefix"])
def test_a_control_token_after_a_symbol_stays_text(prefix, tmp_path):
    model = trained(user_defined_symbols=["<tool>"], model_type="bpe", add_dummy_prefix=prefix)
    pair = Pair(tmp_path, model)
    pair.agree(["<tool></s>", "</s>", "a<tool><s>b", "<tool><tool>"])


@pytest.mark.parametrize("letters", ["abs", "abs<>/"])
def test_a_control_token_in_the_best_place_of_a_unigram_stays_text(letters, tmp_path):
    vocab = [("</s>", 0.0), ("<unk>", 0.0), ("<tool>", 0.0), ("\u2581", -2.0), *((letter, -3.0) for letter in letters)]
    rust = Rust(models.Unigram([*vocab, ("\u2581a", -2.5), ("ba", -2.5)], unk_id=1))
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    rust.add_special_tokens(["</s>", "<unk>", "<tool>"])
    rust.save(str(tmp_path / "tokenizer.json"))
    one = load_tokenizer(tmp_path)
    for text in ["a </s>b", "</s>", "a<tool>", "<<tool>>", "ba </s></s>"]:
        assert not {0, 2} & set(one.encode(text))
        assert "<" not in letters or "tool" in text or one.decode(one.encode(text)) == text
    for text in ["a ba", "sab ab</ >", "", " a  b"]:
        assert one.encode(text) == rust.encode(text, add_special_tokens=False).ids
    one.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").sha256 == one.sha256


USER = {"user_defined_symbols": ["<tool>", "[x]"], "control_symbols": ["<ctl>"]}


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("prefix", [False, True], ids=["bare", "prefix"])
@pytest.mark.parametrize("text", ["x<tool>y", "<tool>", "[x]the [x] river [x]", "<tool>[x]  <tool> a", "[x", "x<ctl>"])
def test_user_defined_symbols(kind, prefix, text, tmp_path):
    options = {"model_type": kind, "add_dummy_prefix": prefix, "remove_extra_whitespaces": False}
    pair = Pair(tmp_path, trained(**USER, **options))
    pair.agree([text])
    assert {"<tool>", "[x]"} & set(pair.ours.specials) == set() and "<ctl>" in pair.ours.specials


def test_spaces_beside_user_defined_symbols_are_kept_where_sentencepiece_keeps_them(tmp_path):
    Pair(tmp_path, trained(**USER, add_dummy_prefix=False)).agree(["a [x] b", "[x] [x]", "a  [x]  b "])


def test_user_defined_spaces(tmp_path):
    spaces = {"user_defined_symbols": ["\n", "\u2581\u2581", "\u2581\u2581\u2581"], "add_dummy_prefix": False}
    plain = {"remove_extra_whitespaces": False, "normalization_rule_name": "identity", "byte_fallback": True}
    pair = Pair(tmp_path, trained(model_type="bpe", **spaces, **plain))
    pair.agree(["a  b", "a   b", "a    b", "a     b", "a\n\nb", "a \n b"])


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("options", [
    {"split_by_whitespace": False}, {"treat_whitespace_as_suffix": True}, {"split_digits": True},
    {"allow_whitespace_only_pieces": True, "remove_extra_whitespaces": False}, {"split_by_unicode_script": False},
    {"normalization_rule_name": "nfkc_cf"}, {"bos_id": -1}, {"unk_id": 3, "pad_id": 0}, SENTINELS,
], ids=str)  # fmt: skip
def test_other_options_give_the_same_ids_or_are_refused(kind, options, tmp_path):
    model = trained(model_type=kind, **options)
    try:
        pair = Pair(tmp_path, model)
    except UserError:
        assert options.keys() <= {"split_by_whitespace", "treat_whitespace_as_suffix"}
        return
    pair.agree([*TEXTS, "a    b     c", "the river is small", "12 345"])


@pytest.mark.parametrize("rule", ["nmt_nfkc", "nfkc_cf"])
@pytest.mark.parametrize("text", ["e\u0302\u0301", "a\u0300\u0301\u0302", "B\u0307", "\u1112\u1161\u11ab"])
def test_composed_letters(rule, text, tmp_path):
    options = {"byte_fallback": True, "remove_extra_whitespaces": False, "normalization_rule_name": rule}
    Pair(tmp_path, trained(model_type="bpe", **options)).agree([text])


def test_the_letter_that_stands_for_a_space(kinds, tmp_path):
    for name in ("bpe-bytes-identity-prefix-all", "bpe-bytes-identity-bare-all", "unigram-bytes-identity-bare-all"):
        Pair(tmp_path / name, kinds[name]).agree(["a\u2581b", "\u2581a", "a \u2581", "\u2581", "\u2581\u2581 a"])


@pytest.mark.parametrize("kind", ["word", "char"])
def test_other_kinds_of_models_are_refused(kind, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(trained(model_type=kind))
    refused(tmp_path, "neither a unigram nor a BPE model")


# ---- text of four languages -----------------------------------------------------------------------------------------

T5_LIKE = {"model_type": "unigram", **SENTINELS}
LLAMA_LIKE = {
    "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "split_digits": True,
    "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True,
}  # fmt: skip
BOOKS = {"en": "Doyle_Hound_1902.txt", "de": "kafka_process.txt", "fr": "FRA01301_Flaubert.txt",
         "ja": "wagahaiwa_nekodearu.txt"}  # fmt: skip


def book(language: str) -> str:
    return (SHARED / "pretrain" / f"books-{language}" / BOOKS[language]).read_text(encoding="utf-8")[20_000:70_000]


@pytest.fixture(scope="module")
def of_books() -> dict[str, bytes]:
    lines = [line[:2000] for language in BOOKS for line in book(language)[:20_000].splitlines()]
    made = {"t5": T5_LIKE, "llama": LLAMA_LIKE}
    return {name: trained(lines, **options | {"vocab_size": 3000}) for name, options in made.items()}


@needs_shared
@pytest.mark.parametrize("like", ["t5", "llama"])
@pytest.mark.parametrize("language", BOOKS)
def test_books_are_encoded_as_sentencepiece_does(of_books, like, language, tmp_path):
    text = book(language)[20_000:]
    Pair(tmp_path, of_books[like]).agree([text[i : i + 900] for i in range(0, len(text), 900)])


# ---- folders that transformers reads too ----------------------------------------------------------------------------


def t5_folder(folder: Path, **config) -> Pair:
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100, "eos_token": "</s>", "pad_token": "<pad>"} | config
    return Pair(folder, trained(**T5_LIKE), "spiece.model", **config)


def test_a_folder_like_t5s_is_read_as_transformers_does(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = t5_folder(tmp_path).ours
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(ours) == len(theirs) and ours.eos_id == theirs.eos_token_id == 1 and ours.prefix == []
    for i in (0, 1, 99):
        assert ours.specials[f"<extra_id_{i}>"] == theirs.convert_tokens_to_ids(f"<extra_id_{i}>")
    for text in TEXTS:
        if not any(sign in text for sign in ("<s>", "</s>")):
            assert ours.encode_source(text) == theirs(text)["input_ids"], text


@pytest.mark.parametrize("config, number", [({}, 100), ({"extra_ids": 7}, 7), ({"extra_ids": 0}, 0)], ids=str)
def test_t5s_sentinels_count_down_behind_the_pieces(config, number, tmp_path):
    pair = t5_folder(tmp_path, **config)
    size = pair.theirs.vocab_size()
    assert len(pair.ours) == size + number
    assert [pair.ours.specials.get(f"<extra_id_{i}>") for i in range(number)] == [
        size + number - 1 - i for i in range(number)
    ]


def test_a_folder_like_llamas_is_read_as_transformers_does(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    ours = Pair(tmp_path, trained(**LLAMA_LIKE), add_bos_token=True, add_eos_token=False, **config).ours
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(ours) == len(theirs) and (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    plain = [text for text in TEXTS if text.strip(" ") == text and text and "\u2581" not in text and "<s>" not in text]
    assert len(plain) > 200  # transformers puts no second space before one, SentencePiece does
    for text in plain:
        if "</s>" not in text:
            assert ours.encode_prompt(text) == theirs(text)["input_ids"], text
    for text in ["<unk>", "a <unk>", "the<unk>", "<unk><unk>"]:
        assert ours.encode_prompt(text) == theirs(text)["input_ids"] and ours.unknown_id in ours.encode(text)


def test_a_begin_token_that_the_config_turns_off_is_not_added(tmp_path):
    assert Pair(tmp_path, trained(**LLAMA_LIKE), add_bos_token=False).ours.prefix == []


# ---- vocab.json and merges.txt --------------------------------------------------------------------------------------


def vocab_and_merges(one: Tokenizer, folder: Path, names=("vocab.json", "merges.txt"), **config) -> Path:
    """Write a byte-level BPE as the two files of GPT-2's tokenizer."""
    model = json.loads(one.rust.to_str())["model"]
    folder.mkdir(exist_ok=True)
    (folder / names[0]).write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (folder / names[1]).write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_tokenizer(LANGUAGES, vocab_size=600)


@pytest.fixture(scope="module")
def digits() -> Tokenizer:
    """Return a tokenizer that splits text as Qwen2's."""
    return train_tokenizer([*LANGUAGES, SIGNS], vocab_size=600, pattern="qwen2")


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")], ids=str)
def test_a_vocabulary_with_merges_is_the_tokenizer_it_came_from(bpe, names, tmp_path):
    one = load_tokenizer(vocab_and_merges(bpe, tmp_path, names))
    assert one.rust.get_vocab() == bpe.rust.get_vocab() and one.eos_id == bpe.eos_id and one.prefix == []
    for text in [*TEXTS, "<|endoftext|>"]:
        assert one.encode(text) == bpe.encode(text) and one.decode(one.encode(text)) == text
    assert load_tokenizer(tmp_path / names[0]).sha256 == one.sha256


def test_the_fast_encoder_reads_it_too(bpe, tmp_path):
    one = load_tokenizer(vocab_and_merges(bpe, tmp_path))
    assert one.fast is not None and one.verify_fast_encoder(TEXTS)
    one.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").sha256 == one.sha256


def test_a_prefix_space_is_added_where_the_config_says_so(bpe, tmp_path):
    one = load_tokenizer(vocab_and_merges(bpe, tmp_path, add_prefix_space=True))
    assert one.encode("river") == bpe.encode(" river") != bpe.encode("river")


MARKS = {str(i): {"content": content, "special": True} for i, content in enumerate((EOS, CHAT_START, CHAT_END))}


def like_berts(cased: bool) -> Rust:
    rust = Rust(models.WordPiece(unk_token="[UNK]"))
    rust.normalizer, rust.pre_tokenizer = (
        normalizers.BertNormalizer(lowercase=not cased),
        pre_tokenizers.BertPreTokenizer(),
    )
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    rust.train_from_iterator(LINES, trainers.WordPieceTrainer(vocab_size=900, special_tokens=special))
    return rust


def like_gpt2s() -> Rust:
    return train_tokenizer(LINES, vocab_size=600).rust


def like_llamas() -> Rust:
    rust = Rust(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    rust.pre_tokenizer = pre_tokenizers.Metaspace()  # for training: no piece crosses a space
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    rust.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=900, special_tokens=special))
    state = json.loads(rust.to_str())
    state["added_tokens"] = state["added_tokens"][:3]
    rust = Rust.from_str(json.dumps(state))
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    rust.pre_tokenizer = None
    return rust


BERT_TOKENS = {"sep_token": "[SEP]", "cls_token": "[CLS]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
MADE_LIKE = {  # name -> function that makes a tokenizer, and its tokens
    "cased bert": (lambda: like_berts(cased=True), BERT_TOKENS),
    "bert": (lambda: like_berts(cased=False), BERT_TOKENS),
    "gpt2": (like_gpt2s, dict.fromkeys(["bos_token", "eos_token", "unk_token"], EOS)),
    "llama": (like_llamas, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
}
OVERRIDES = [
    ("cased bert", "BertTokenizer", {}),
    ("cased bert", "BertTokenizer", {"do_lower_case": True}),
    ("cased bert", "BertTokenizer", {"do_lower_case": False}),
    ("cased bert", "BertTokenizer", {"strip_accents": False}),
    ("cased bert", "BertTokenizer", {"tokenize_chinese_chars": False, "do_lower_case": False}),
    ("cased bert", None, {"do_lower_case": True}),  # the class of the model is taken
    ("cased bert", "PreTrainedTokenizerFast", {"do_lower_case": True}),
    ("bert", "BertTokenizerFast", {"do_lower_case": False}),
    ("gpt2", "GPT2Tokenizer", {}),
    ("gpt2", "GPT2Tokenizer", {"add_prefix_space": True}),
    ("gpt2", "GPT2TokenizerFast", {"add_prefix_space": False}),
    ("llama", "LlamaTokenizerFast", {"add_prefix_space": False}),
    ("llama", "PreTrainedTokenizerFast", {"add_prefix_space": False}),
    ("llama", "LlamaTokenizer", {}),
    ("llama", "LlamaTokenizer", {"legacy": True}),
    ("llama", "LlamaTokenizerFast", {"legacy": False, "add_prefix_space": True}),
    ("like llama mistral", "LlamaTokenizer", {"add_prefix_space": False}),  # the class is not taken for this model
    ("like llama phi3", "LlamaTokenizer", {"legacy": False}),  # nor for this one
]


@pytest.mark.parametrize("like, name, options", OVERRIDES, ids=str)
def test_a_config_changes_a_tokenizer_as_in_transformers(like, name, options, tmp_path):
    make, tokens = MADE_LIKE[" ".join(like.split()[:2]).removeprefix("like ")]
    make().save(str(tmp_path / "tokenizer.json"))
    config = tokens | options | ({"tokenizer_class": name} if name else {})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": like.split()[-1]}))
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    for text in ["Hello World", "Caf\u00e9 \u65e5\u672c", "THE River", "a\nb", " a  b ", "a \u2581 b", *LINES[::40]]:
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids, text


def test_tokens_that_only_the_configs_make_special_are_special(tmp_path):
    """Old folders list special tokens in special_tokens_map.json alone, and some are only words of the vocabulary."""
    make, tokens = MADE_LIKE["gpt2"]
    rust = make()
    words = [word for word in rust.get_vocab() if word.isalpha()][:3]
    rust.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    old = tokens | {"additional_special_tokens": words[:2], "pad_token": {"content": words[2]}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(old))
    ours = load_tokenizer(tmp_path)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    assert ours.eos_id == theirs.eos_token_id
    assert set(ours.specials) == set(theirs.all_special_tokens) | {CHAT_START, CHAT_END}


SPECIAL_X = {"content": "<x>", "special": True}
ADDED = {  # files beside a tokenizer.json of N tokens that ends with the added ones "    " and "<x>" -> their contents
    "again": {"added_tokens.json": lambda n: {"    ": n - 2, "<x>": n - 1}},
    "made_special": {"tokenizer_config.json": lambda n: {"added_tokens_decoder": {str(n - 1): SPECIAL_X}}},
    "with_another_id": {"tokenizer_config.json": lambda n: {"added_tokens_decoder": {"5": SPECIAL_X}}},
    "with_a_gap": {"added_tokens.json": lambda n: {"[PAD]": n + 300}},
    "at_the_end": {"tokenizer_config.json": lambda n: {"added_tokens_decoder": {str(n): {"content": "[PAD]"}}}},
    "stale_end": {"special_tokens_map.json": lambda n: {"pad_token": "[PAD]"}},
}


@pytest.mark.parametrize("files", ADDED.values(), ids=ADDED)
def test_tokens_listed_beside_a_tokenizer_json_are_read_as_transformers_does(files, tmp_path):
    rust = like_gpt2s()
    rust.add_tokens([AddedToken("    ", normalized=False), AddedToken("<x>", normalized=False)])
    rust.save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": EOS, "tokenizer_class": "PreTrainedTokenizerFast"}
    for name in ("tokenizer_config.json", *files):
        given = files[name](rust.get_vocab_size()) if name in files else {}
        (tmp_path / name).write_text(json.dumps(config | given if name == "tokenizer_config.json" else given))
    ours = load_tokenizer(tmp_path)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    special = {one.content for one in theirs.added_tokens_decoder.values() if one.special}
    assert set(ours.specials) == special & ours.rust.get_vocab().keys()
    for text in ["if a:\n    b", "[PAD]", "a<x>b"]:
        if not any(token in text for token in special):  # these are text here, and special tokens there
            assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids


def test_an_end_token_that_the_vocabulary_lacks_is_refused(tmp_path):
    MADE_LIKE["gpt2"][0]().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|missing|>"}))
    with pytest.raises(ModelError, match="does not have the eos_token"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "Qwen2TokenizerFast"])
def test_qwens_files_are_read_as_transformers_does(digits, name, tmp_path):
    config = {"tokenizer_class": name, "eos_token": CHAT_END, "added_tokens_decoder": MARKS}
    one = load_tokenizer(vocab_and_merges(digits, tmp_path, **config))
    assert one.eos == CHAT_END and set(one.specials) == {EOS, CHAT_START, CHAT_END}
    composed = [text for text in TEXTS if "\u0301" not in text and "\u0307" not in text]
    for text in composed:
        assert one.encode(text) == digits.encode(text)
    assert one.encode("cafe\u0301") == one.encode("caf\u00e9")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert one.encode(text) == theirs(text)["input_ids"], text


def test_gpt2s_files_are_read_as_transformers_does(bpe, tmp_path):
    transformers = pytest.importorskip("transformers")
    one = load_tokenizer(vocab_and_merges(bpe, tmp_path, tokenizer_class="GPT2Tokenizer", eos_token=EOS, bos_token=EOS))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(one) == len(theirs) and one.eos_id == theirs.eos_token_id and one.bos_id == theirs.bos_token_id
    for text in TEXTS:
        assert one.encode_prompt(text or "a") == theirs(text or "a")["input_ids"]


@needs_shared
def test_gpt2s_own_files_give_the_ids_of_its_tokenizer_json(tmp_path):
    folder = SHARED / "tokenizers" / "gpt2"
    texts = [*TEXTS, *(book(language)[:8000] for language in BOOKS)]
    whole, parts = load_tokenizer(folder), load_tokenizer(folder / "encoder.json")
    assert len(whole) == len(parts) == 50257 and whole.eos_id == parts.eos_id == 50256
    assert [parts.encode(text) for text in texts] == [whole.encode(text) for text in texts]
    transformers = pytest.importorskip("transformers")
    shutil.copy(folder / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(folder / "vocab.bpe", tmp_path / "merges.txt")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    assert [ours.encode(text) for text in texts] == [theirs(text)["input_ids"] for text in texts]


# ---- tokens added later ---------------------------------------------------------------------------------------------


def test_added_tokens_follow_the_vocabulary(bpe, tmp_path):
    size = len(bpe)
    folder = vocab_and_merges(bpe, tmp_path, added_tokens_decoder={
        str(size + 1): {"content": "<tool>", "special": False, "lstrip": True},
        str(size): {"content": "<x>", "special": True},
    })  # fmt: skip
    (folder / "added_tokens.json").write_text(json.dumps({"<y>": size + 2, "<x>": size}))
    one = load_tokenizer(folder)
    assert len(one) == size + 3 and one.specials == {EOS: bpe.eos_id, "<x>": size, "<y>": size + 2}
    assert one.encode("a <tool>b") == [
        *bpe.encode("a"),
        size + 1,
        *bpe.encode("b"),
    ]  # it may be typed
    assert one.encode("a<x><y>") == bpe.encode("a<x><y>")
    assert one.decode([size, size + 1, size + 2]) == "<x><tool><y>"


def test_added_tokens_of_a_sentencepiece_model(tmp_path):
    model = trained(**LLAMA_LIKE)
    size = len(Pair(tmp_path / "plain", model).ours)
    (tmp_path / "added").mkdir()
    (tmp_path / "added" / "added_tokens.json").write_text(json.dumps({CHAT_START: size, CHAT_END: size + 1}))
    pair = Pair(tmp_path / "added", model)
    assert pair.ours.specials[CHAT_END] == pair.ours.end_of_turn_id == size + 1
    pair.agree([*TEXTS, "<|im_start|>a<|im_end|>"])


def test_a_token_that_is_known_already_may_be_named_again(bpe, tmp_path):
    named = {str(bpe.eos_id): {"content": EOS, "special": True}}
    assert len(load_tokenizer(vocab_and_merges(bpe, tmp_path, added_tokens_decoder=named))) == len(bpe)


ADDED = {
    "a_gap": {"<x>": 601}, "too_low": {"<x>": 5}, "another_id": {EOS: 7}, "text_for_an_id": {"<x>": "600"},
    "list": ["<x>"], "negative": {"<x>": -1},
}  # fmt: skip
DECODERS = {
    "no_number": {"x": {"content": "<x>"}}, "no_content": {"600": {}}, "no_object": {"600": "<x>"}, "list": ["<x>"],
    "number": {"600": {"content": 5}}, "empty": {"600": {"content": ""}},
    "no_flag": {"600": {"content": "a", "lstrip": 3}},
}  # fmt: skip


@pytest.mark.parametrize("added", ADDED.values(), ids=ADDED)
def test_added_tokens_at_a_wrong_place_are_refused(bpe, added, tmp_path):
    (vocab_and_merges(bpe, tmp_path) / "added_tokens.json").write_text(json.dumps(added))
    refused(tmp_path)


@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS)
def test_a_nonsense_table_of_added_tokens_is_refused(bpe, decoder, tmp_path):
    refused(vocab_and_merges(bpe, tmp_path, added_tokens_decoder=decoder))


# ---- what is refused ------------------------------------------------------------------------------------------------


def refused(path: Path, *words: str, code: int = MODEL) -> None:
    """Assert that loading raises a UserError with the right code that contains all `words`."""
    with pytest.raises(UserError) as caught:
        load_tokenizer(path)
    assert caught.value.code == code
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_vocabulary_without_merges_is_refused(bpe, tmp_path):
    (vocab_and_merges(bpe, tmp_path) / "merges.txt").unlink()
    refused(tmp_path, "the vocabulary has no merges file", "merges.txt")


@pytest.mark.parametrize("name", ["RobertaTokenizer", "CLIPTokenizerFast", "BloomTokenizer"])
def test_a_tokenizer_whose_way_of_cutting_is_not_known_is_refused(bpe, name, tmp_path):
    refused(vocab_and_merges(bpe, tmp_path, tokenizer_class=name), name.removesuffix("Fast"), "tokenizer.json")


BROKEN = {
    "truncated_vocabulary": ("vocab.json", lambda text: text[:-50]),
    "list": ("vocab.json", lambda text: "[1, 2]"),
    "negative_id": ("vocab.json", lambda text: '{"a": -1}'),
    "text_for_an_id": ("vocab.json", lambda text: '{"a": "0"}'),
    "empty_vocabulary": ("vocab.json", lambda text: ""),
    "truncated_merges": ("merges.txt", lambda text: text[: text.rindex(" ")]),
    "three_parts": ("merges.txt", lambda text: text + "a b c\n"),
    "unknown_parts": ("merges.txt", lambda text: text + "zqx qqq\n"),
    "broken_config": ("tokenizer_config.json", lambda text: "{"),
    "no_object": ("tokenizer_config.json", lambda text: "null"),
    "number": ("tokenizer_config.json", lambda text: "5"),
    "broken_added": ("added_tokens.json", lambda text: '{"<x>": '),
}


@pytest.mark.parametrize("name, change", BROKEN.values(), ids=BROKEN)
def test_broken_files_are_refused(bpe, name, change, tmp_path):
    file = vocab_and_merges(bpe, tmp_path) / name
    file.write_text(change(file.read_text(encoding="utf-8") if file.exists() else ""), encoding="utf-8")
    refused(tmp_path)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json"])
def test_files_that_are_no_text_are_refused(bpe, name, tmp_path):
    (vocab_and_merges(bpe, tmp_path) / name).write_bytes(b"\xff\xfe\x00")
    refused(tmp_path)


@pytest.fixture(scope="module")
def proto() -> bytes:
    return trained(model_type="unigram", byte_fallback=True)


@pytest.mark.parametrize("keep", [0, 1, 10, 1000, -1000, -1])
def test_a_truncated_model_is_refused(proto, keep, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(proto[:keep])
    refused(tmp_path, "can't be read", "tokenizer.model")


@pytest.mark.parametrize(
    "data", [b"\xff" * 500, b"not a model at all", bytes(range(256)) * 9], ids=["ff", "text", "all"]
)
def test_what_is_no_model_is_refused(data, tmp_path):
    pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    (tmp_path / "tokenizer.model").write_bytes(data)
    refused(tmp_path, "can't be read")


LIES = {
    "unk": lambda proto: setattr(proto.trainer_spec, "unk_id", 99_999),
    "no_unk": lambda proto: setattr(proto.trainer_spec, "unk_id", -1),
    "bos": lambda proto: setattr(proto.trainer_spec, "bos_id", 99_999),
    "eos": lambda proto: setattr(proto.trainer_spec, "eos_id", 99_999),
    "pieces": lambda proto: proto.ClearField("pieces"),
    "kind": lambda proto: setattr(proto.trainer_spec, "model_type", 3),
    "normalization": lambda proto: setattr(proto.normalizer_spec, "precompiled_charsmap", b"\xff\xff\xff\x7fabc"),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_model_that_contradicts_itself_is_refused(proto, lie, tmp_path):
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(proto)
    lie(model)
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    refused(tmp_path)


@pytest.mark.parametrize("number", ["many", 2.5, None])
def test_a_nonsense_number_of_sentinels_is_refused(number, tmp_path):
    with pytest.raises(UserError):
        t5_folder(tmp_path, extra_ids=number)


def test_without_the_package_there_is_one_error_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"whatever it holds")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    refused(tmp_path, "sentencepiece package", "llmkit[sentencepiece]", code=ENVIRONMENT)


def test_a_folder_without_any_of_these_files_is_refused(tmp_path):
    refused(tmp_path, "there is no tokenizer")


def test_a_file_of_another_kind_is_not_called_a_vocabulary(tmp_path):
    (tmp_path / "tokenizer.model.v3").write_bytes(b"\x0a\x0e")
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path / "tokenizer.model.v3")
    assert "merges" not in str(caught.value)


def test_the_command_line_reads_and_refuses_them(proto, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(proto)
    shown = llmkit("tokenizer", "show", "tokenizer.model", "the river", "--json", cwd=tmp_path)
    assert json.loads(shown.stdout)["sources"][0]["ids"] == Pair(tmp_path, proto).theirs.encode("the river")
    (tmp_path / "tokenizer.model").write_bytes(proto[:-1])
    assert "can't be read" in llmkit("tokenizer", "show", "tokenizer.model", "a", cwd=tmp_path, code=MODEL).stderr
