"""Test the scores of a text: language, word lists, n-grams of evaluation files, a classifier."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import sentences

from llmkit.corpus.scorers import (
    check_languages,
    classifier_score,
    detect_language,
    list_matches_per_1k,
    load_classifier,
    load_word_list,
)
from llmkit.errors import UserError
from llmkit.readers.ngrams import NgramSet, ngrams_of, read_evaluation_ngrams
from llmkit.readers.words import TextFeatures, split_words
from llmkit.tokenizer.train import train_tokenizer


def score(text: str, path: str, label: str) -> float:
    return classifier_score(text, load_classifier(path, label))


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


# ---- language -------------------------------------------------------------------------------------------------------

SAID = {
    "en": "The committee will meet again next week to decide whether the bridge should be repaired.",
    "de": "Der Ausschuss trifft sich n\u00e4chste Woche wieder, um \u00fcber die Br\u00fccke zu entscheiden.",
    "fr": "Le comit\u00e9 se r\u00e9unira la semaine prochaine pour d\u00e9cider si le pont doit \u00eatre r"
          "\u00e9par\u00e9.",
    "es": "El comit\u00e9 se reunir\u00e1 la pr\u00f3xima semana para decidir si hay que reparar el puente.",
    "ru": "\u041a\u043e\u043c\u0438\u0442\u0435\u0442 \u0441\u043d\u043e\u0432\u0430 \u0441\u043e\u0431\u0435"
          "\u0440\u0435\u0442\u0441\u044f \u043d\u0430 \u0441\u043b\u0435\u0434\u0443\u044e\u0449\u0435\u0439 "
          "\u043d\u0435\u0434\u0435\u043b\u0435.",
    "zh": "\u59d4\u5458\u4f1a\u5c06\u5728\u4e0b\u5468\u518d\u6b21\u5f00\u4f1a\uff0c\u51b3\u5b9a\u662f\u5426"
          "\u4fee\u7406\u8fd9\u5ea7\u6865\u3002",
    "ja": "\u59d4\u54e1\u4f1a\u306f\u6765\u9031\u3001\u6a4b\u3092\u4fee\u7406\u3059\u308b\u304b\u3069\u3046"
          "\u304b\u3092\u6c7a\u3081\u308b\u305f\u3081\u306b\u518d\u3073\u958b\u304b\u308c\u307e\u3059\u3002",
    "ar": "\u0633\u062a\u062c\u062a\u0645\u0639 \u0627\u0644\u0644\u062c\u0646\u0629 \u0645\u0631\u0629 \u0623"
          "\u062e\u0631\u0649 \u0627\u0644\u0623\u0633\u0628\u0648\u0639 \u0627\u0644\u0645\u0642\u0628\u0644.",
}  # fmt: skip


@pytest.mark.parametrize("code", SAID)
def test_language_of_a_sentence(code):
    found, probability = detect_language(SAID[code])
    assert found == code and 0.5 < probability <= 1


def test_language_of_most_of_a_long_text():
    for first, then in (("de", "fr"), ("en", "ja"), ("zh", "es")):
        assert detect_language(SAID[first] * 3)[0] == first
        assert detect_language(SAID[first] * 3 + SAID[then] * 200)[0] == then
        assert detect_language(SAID[then] * 200 + SAID[first] * 3)[0] == then
    assert detect_language("x = 1\n" * 20 + SAID["ru"] * 200)[0] == "ru"


def test_any_text_has_a_language_and_the_same_one_again():
    for text in ("", " \n", "\0", "1234 5678", "\U0001f600" * 50, "a" * 100_000):
        code, probability = detect_language(text)
        assert 0 < probability <= 1 and detect_language(text) == (code, probability)
        check_languages([code])


def test_unknown_languages_are_named():
    check_languages(["en", "de", "zh"])
    check_languages([])
    with pytest.raises(UserError, match="unknown language") as error:
        check_languages(["en", "english", "xx"])
    assert error.value.got == "english, xx" and "en" in error.value.expected and "did you mean en?" in error.value.fix


# ---- n-grams to look for --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("members, others", [(0, 100), (1, 1000), (500, 0), (3000, 100_000)])
def test_an_ngram_set_is_a_set(members, others):
    draw = np.random.default_rng(members)
    inside = draw.integers(0, 2**64, members, np.uint64)
    near = inside ^ np.uint64(2**63)  # of the same place in the table
    asked = draw.permutation(np.concatenate([inside, inside, near, draw.integers(0, 2**64, others, np.uint64)]))
    wanted = set(inside.tolist())
    found = NgramSet(np.concatenate([inside, inside])).find_in(asked)
    assert found.tolist() == [gram for gram in asked.tolist() if gram in wanted]
    assert len(found) == 2 * members


def test_words_and_phrases_of_a_list_by_length(tmp_path):
    path = write(tmp_path / "list.txt", "# a comment\nDamn\n\nhell\ndamn\n go to   hell!\r\nthe Devil's own\n#hell\n")
    found = load_word_list(path)
    assert {n: len(grams.grams) for n, grams in found.items()} == {1: 2, 3: 1, 4: 1}
    assert len(found[3].find_in(ngrams_of(split_words("Go, to HELL"), 3))) == 1


@pytest.mark.parametrize("content, what", [
    (None, "no such word list"), ("", "is empty"), ("# none\n\n  \n...\n", "is empty"), (b"\0" * 99, "can't be read"),
])  # fmt: skip
def test_bad_word_lists(tmp_path, content, what):
    path = str(tmp_path / "list.txt") if content is None else write(tmp_path / "list.txt", content)
    with pytest.raises(UserError, match=what) as error:
        load_word_list(path)
    assert error.value.code == 3 and error.value.at == path


def test_listed_per_thousand_words_by_hand(tmp_path):
    path = write(tmp_path / "list.txt", "bad\nvery bad\n\u732b\n")
    text = TextFeatures("A bad, BAD day; the next was very bad.")
    assert list_matches_per_1k(text, load_word_list(path)) == round(1000 * (3 + 1) / 9, 4)
    assert list_matches_per_1k(TextFeatures("badly unbad very good"), load_word_list(path)) == 0
    assert all(list_matches_per_1k(TextFeatures(text), load_word_list(path)) == 0 for text in ("", "very"))
    unspaced = TextFeatures("\u732b\u3067\u3059")  # characters for words
    assert list_matches_per_1k(unspaced, load_word_list(path)) == round(1000 / 3, 4)
    assert list_matches_per_1k(TextFeatures("bad " + "good " * 999), load_word_list(path)) == 1


def test_ngrams_of_evaluation_files(tmp_path):
    questions = [
        {"question": "Who wrote the book about the whale?", "n": 5,
         "choices": {"text": ["Herman Melville did", "Jane"]}},
        {"deep": [[{"a": "one two three four"}, None, True]], "answer": "B"},
    ]  # fmt: skip
    write(tmp_path / "q.jsonl", "\n".join(map(json.dumps, questions)) + "\n")
    write(tmp_path / "more.json", json.dumps([{"q": "one two three four five"}]))
    grams, texts, short = read_evaluation_ngrams((str(tmp_path / "*.jsonl"), str(tmp_path / "more.json")), 3)
    assert (texts, short) == (6, 2)  # Jane and B
    strings = ["Who wrote the book about the whale?", "Herman Melville did", "one two three four five"]
    wanted = {gram for string in strings for gram in ngrams_of(split_words(string), 3).tolist()}
    assert set(grams.grams.tolist()) == wanted and len(wanted) == 5 + 1 + 3
    assert len(grams.find_in(ngrams_of(split_words("it was HERMAN, melville did it"), 3))) == 1
    assert not len(grams.find_in(ngrams_of(split_words("whale herman melville jane one two four"), 3)))


def test_an_evaluation_file_that_is_broken_is_a_user_error(tmp_path):
    write(tmp_path / "q.jsonl", '{"q": "one two three"}\n{broken\n')
    with pytest.raises(UserError, match="some records can't be used"):
        read_evaluation_ngrams((str(tmp_path / "q.jsonl"),), 3)


def test_evaluation_files_with_nothing_long_enough(tmp_path):
    grams, texts, short = read_evaluation_ngrams((write(tmp_path / "q.jsonl", '{"q": "too short"}'),), 13)
    assert (texts, short) == (1, 1) and not len(grams.find_in(np.arange(1000, dtype=np.uint64)))


def test_a_missing_evaluation_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_evaluation_ngrams((str(tmp_path / "none.jsonl"),), 13)


def test_evaluation_files_in_a_zip_are_refused(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "q.zip", "w") as archive:
        archive.writestr("q.jsonl", '{"q": "one two three four"}')
    with pytest.raises(UserError, match="in a zip"):
        read_evaluation_ngrams((str(tmp_path / "q.zip"),), 3)


def test_a_text_file_is_one_evaluation_text(tmp_path):
    assert read_evaluation_ngrams((write(tmp_path / "q.txt", "one two three four"),), 3)[1:] == (1, 0)


# ---- classifier -----------------------------------------------------------------------------------------------------

LONGEST = 24  # tokens that the tiny classifier reads
SHORT = "The river reads a small token."
LONG = sentences(3, 40)


def make_classifier(folder: Path, **options) -> str:
    """Save a random sequence classifier with clear preferences."""
    transformers = pytest.importorskip("transformers")
    tokenizer = train_tokenizer([sentences(i, 50) for i in range(5)], "wordpiece", vocab_size=200)
    tokenizer.save(folder)
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=LONGEST, initializer_range=0.5, **options,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).eval().save_pretrained(folder)
    return str(folder)


NAMES = {"id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return make_classifier(tmp_path_factory.mktemp("classifier"), **NAMES)


@pytest.fixture(scope="module")
def multiple(tmp_path_factory) -> str:
    return make_classifier(
        tmp_path_factory.mktemp("multiple"), problem_type="multi_label_classification", **NAMES
    )  # fmt: skip


def windows_of(folder: str, text: str) -> torch.Tensor:
    """Return logits (windows, labels) of a whole text, split by hand and computed by transformers alone."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    begin, *ids, end = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    cuts = [[begin, *ids[i : i + LONGEST - 2], end] for i in range(0, max(1, len(ids)), LONGEST - 2)]
    with torch.inference_mode():
        return torch.cat([model(torch.tensor([cut])).logits for cut in cuts])


@pytest.mark.parametrize("text", [SHORT])
def test_the_score_of_a_short_text_is_its_softmax(folder, text):
    logits = windows_of(folder, text)
    assert len(logits) == 1
    for column, label in enumerate(NAMES["label2id"]):
        expected = float(logits.softmax(-1)[0, column])
        assert score(text, folder, label) == pytest.approx(expected, abs=1e-4)


def test_the_score_of_a_long_text_is_the_highest_of_its_windows(folder):
    logits = windows_of(folder, LONG)
    assert len(logits) > 10
    read = [0, (len(logits) - 1) // 3, 2 * (len(logits) - 1) // 3, len(logits) - 1]  # four of them, evenly spread
    for column, label in enumerate(NAMES["label2id"]):
        each = logits.softmax(-1)[:, column]
        assert score(LONG, folder, label) == pytest.approx(float(each[read].max()), abs=1e-4)
        assert each[read].max() > each[read].min() + 0.05  # windows differ, so the highest says something


def test_a_text_of_two_or_three_windows_is_read_whole(folder):
    lines = LONG.splitlines()
    for number in (4, 6):
        text = " ".join(lines[:number])
        logits = windows_of(folder, text)
        assert len(logits) in (2, 3, 4)
        expected = float(logits.softmax(-1)[:, 2].max())
        assert score(text, folder, "good") == pytest.approx(expected, abs=1e-4)


def test_labels_of_a_multi_label_model_stand_each_for_itself(multiple):
    logits = windows_of(multiple, SHORT)
    scores = [score(SHORT, multiple, label) for label in NAMES["label2id"]]
    assert scores == pytest.approx(logits.sigmoid()[0].tolist(), abs=1e-4) and abs(sum(scores) - 1) > 0.05


def test_one_label_alone_is_a_sigmoid(tmp_path):
    path = make_classifier(tmp_path, num_labels=1)
    expected = float(windows_of(path, SHORT).sigmoid())
    assert 0 < expected < 1 and score(SHORT, path, "LABEL_0") == pytest.approx(expected, abs=1e-4)


def test_unknown_labels_and_missing_folders(folder, tmp_path):
    with pytest.raises(UserError, match="no such label") as error:
        score(SHORT, folder, "great")
    assert (error.value.got, error.value.expected) == ("great", "bad, fair, good")
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match="no classifier in this folder") as error:
            score(SHORT, str(path), "good")
        assert error.value.code == 4


@pytest.mark.parametrize("name, content", [
    ("config.json", b"{"), ("model.safetensors", None), ("tokenizer.json", b"{"), ("tokenizer.json", None),
    pytest.param("model.safetensors", b"torn"),
])  # fmt: skip
def test_broken_classifiers_are_user_errors(tmp_path, name, content):
    path = make_classifier(tmp_path, **NAMES)
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="can't be loaded") as error:
        score(SHORT, path, "good")
    assert error.value.code == 4


def test_a_classifier_without_a_tokenizer_is_a_user_error(tmp_path):
    path = make_classifier(tmp_path, **NAMES)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError):
        score(SHORT, path, "good")


def test_a_model_without_a_classifiers_head_is_a_user_error(tmp_path):
    from transformers import BertForSequenceClassification

    path = make_classifier(tmp_path, **NAMES)
    BertForSequenceClassification.from_pretrained(path).bert.save_pretrained(path)
    with pytest.raises(UserError):
        score(SHORT, path, "good")


@pytest.mark.parametrize("kind", ["bert", "mystery"])
def test_code_in_a_classifiers_folder_never_runs(tmp_path, kind):
    path = make_classifier(tmp_path / "model", **NAMES)
    ran = tmp_path / "ran"
    (tmp_path / "model" / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Config: ...\nModel = Config\n")
    for name, wanted in (
        ("config.json", {"model_type": kind, "auto_map": {
            "AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "evil.Model"]}}),
    ):  # fmt: skip
        file = tmp_path / "model" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | wanted))
    if kind == "mystery":
        with pytest.raises(UserError, match="can't be loaded"):
            score(SHORT, path, "good")
    else:
        assert 0 < score(SHORT, path, "good") < 1  # by transformers' own class
    assert not ran.exists()


def test_a_classifier_is_loaded_once_and_again_when_its_folder_changes(folder):
    one = load_classifier(folder, "good")
    assert load_classifier(folder, "good") is one
    (Path(folder) / "note.txt").write_text("changed")
    assert load_classifier(folder, "good") is not one


def test_the_same_score_in_any_order(folder):
    texts = [SHORT, LONG, "", "token " * 100]
    first = [score(text, folder, "fair") for text in texts]
    random.Random(0).shuffle(order := list(range(len(texts))))
    assert [score(texts[i], folder, "fair") for i in order] == [first[i] for i in order]
