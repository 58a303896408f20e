"""Heads for labels: equal to transformers, peft and scikit-learn; files as people have them; the command line."""

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
import yaml
from conftest import llmkit, metrics, tiny_config

from llmkit import scores
from llmkit.config.records import LabelledData
from llmkit.data.labelled import open_labelled_rows, pad_batch
from llmkit.data.rows import encode_tokens
from llmkit.errors import DataError, ModelError
from llmkit.evals.predict import read_texts
from llmkit.models import CONFIGS, build_model
from llmkit.models.folder import load_model, save_model
from llmkit.models.heads import POOLINGS, HeadConfig, hidden_states, pool, train_head
from llmkit.models.hf_config import read_head
from llmkit.objectives import heads
from llmkit.parallel.device import to_device
from llmkit.peft import lora
from llmkit.peft.adapter import load_adapter, read_adapter_head, save_adapter
from llmkit.readers.tally import Tally
from llmkit.records.label_layouts import read_labelled, read_rows
from llmkit.records.labelled import encode_labelled, first_tokens, make_encoder, words_of
from llmkit.tokenizer.load import load_tokenizer
from llmkit.tokenizer.train import train_tokenizer
from llmkit.types import IGNORE_INDEX

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = ("bert", "gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "falcon", "mixtral")
LENGTHS = torch.tensor([9, 5, 7])


def make_config(name: str):
    kv_heads = {} if name in ("bert", "gpt2", "falcon") else {"num_key_value_heads": 2}
    return CONFIGS[name](**SIZES, **kv_heads, max_position_embeddings=32)


def make_head(kind: str, model_kind: str) -> HeadConfig:
    labels = ("LABEL_0",) if kind == "regress" else ("bad", "good", "so so")
    pooling = None if kind == "tag" else POOLINGS[model_kind][0]
    return HeadConfig("classify" if kind == "multi" else kind, labels, pooling, kind == "multi")


def made(name: str, kind: str):
    config = make_config(name)
    model = build_model(config, seed=1, head=make_head(kind, config.kind)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    mask = (torch.arange(9) < LENGTHS[:, None]).long()
    return torch.randint(1, 64, (3, 9), generator=torch.Generator().manual_seed(3)) * mask, mask


def labels_of(kind: str, mask: torch.Tensor) -> torch.Tensor:
    draw = torch.Generator().manual_seed(4)
    return {
        "classify": torch.tensor([0, 2, 1]),
        "multi": torch.randint(0, 2, (3, 3), generator=draw),
        "regress": torch.tensor([0.5, 1.0, -100.0]),  # no number means that there is none
        "tag": torch.randint(0, 3, (3, 9), generator=draw).masked_fill(mask == 0, IGNORE_INDEX),
    }[kind]


def opened(folder: Path, kind: str):
    auto = transformers.AutoModelForTokenClassification
    auto = auto if kind == "tag" else transformers.AutoModelForSequenceClassification
    model, found = auto.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    return model.eval()


# ---- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classify", "multi", "regress", "tag"])
@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_opens_a_head_with_equal_outputs_and_loss(name, kind, tmp_path):
    model = made(name, kind)
    save_model(model, tmp_path, eos_token_ids=[0], pad_token_id=0)
    theirs = opened(tmp_path, kind)
    ids, mask = rows()
    labels = labels_of(kind, mask)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask, labels=labels.float() if kind == "multi" else labels)
        outputs = model(ids, lengths=LENGTHS)
        loss = model(ids, labels, lengths=LENGTHS) / (~labels.isnan() if kind == "regress" else labels != -100).sum()
        again = load_model(tmp_path, head=read_head(tmp_path)).eval()
    chosen = mask.bool() if kind == "tag" else slice(None)
    torch.testing.assert_close(outputs[chosen], expected.logits[chosen], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-5)
    assert read_head(tmp_path) == model.head
    assert torch.equal(again(ids, lengths=LENGTHS), outputs)


@pytest.mark.parametrize("kind", ["classify", "tag"])
@pytest.mark.parametrize("name", ["BertConfig", "GPT2Config", "Qwen2Config"])
def test_a_classifier_of_transformers_opens_here(name, kind, tmp_path):
    options = {"vocab_size": 64, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    options |= {"intermediate_size": 64, "num_labels": 5, "pad_token_id": 0, "max_position_embeddings": 32}
    options |= {"n_embd": 32, "n_layer": 2, "n_head": 4} if name == "GPT2Config" else {}
    options |= {"num_key_value_heads": 4, "tie_word_embeddings": False} if name == "Qwen2Config" else {}
    auto = transformers.AutoModelForTokenClassification
    auto = auto if kind == "tag" else transformers.AutoModelForSequenceClassification
    theirs = auto.from_config(getattr(transformers, name)(**options)).eval()
    theirs.save_pretrained(tmp_path)
    head = read_head(tmp_path)
    assert head.kind == kind and head.labels == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3", "LABEL_4")
    ids, mask = rows()
    with torch.no_grad():
        ours = load_model(tmp_path, head=head).eval()(ids, lengths=LENGTHS)
        expected = theirs(ids, attention_mask=mask).logits
    chosen = mask.bool() if kind == "tag" else slice(None)
    torch.testing.assert_close(ours[chosen], expected[chosen], rtol=1e-5, atol=1e-5)


def test_a_pooling_that_transformers_lacks_does_not_open_there_as_another(tmp_path):
    head = HeadConfig("classify", ("no", "yes"), "mean")
    for name in ("llama", "bert"):
        model = build_model(make_config(name), seed=1, head=head)
        save_model(model, tmp_path / name, pad_token_id=0)
        assert read_head(tmp_path / name) == head
        _, found = transformers.AutoModelForSequenceClassification.from_pretrained(
            tmp_path / name, output_loading_info=True
        )
        assert found["missing_keys"]  # transformers says that it made up the head


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("kind", ["classify", "tag"])
def test_padding_changes_no_output(name, kind):
    model = made(name, kind)
    ids, _ = rows()
    with torch.no_grad():
        together = model(ids, lengths=LENGTHS)
        for row, length in enumerate(LENGTHS.tolist()):
            alone = model(ids[row : row + 1, :length])
            there = together[row : row + 1, :length] if kind == "tag" else together[row : row + 1]
            torch.testing.assert_close(there, alone, rtol=1e-5, atol=1e-5)


def test_the_mean_leaves_out_padding():
    hidden = torch.arange(12.0).view(1, 4, 3)
    assert pool(hidden, "mean", torch.tensor([2])).tolist() == [[1.5, 2.5, 3.5]]
    assert pool(hidden, "last", torch.tensor([2])).tolist() == [[3, 4, 5]]
    assert pool(hidden, "cls", torch.tensor([2])).tolist() == [[0, 1, 2]]


def test_micro_batches_have_the_gradient_of_the_whole_batch():
    model = made("gpt2", "classify")
    ids, _ = rows()
    labels = torch.tensor([0, 2, 1])
    model(ids, labels, lengths=LENGTHS).backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for i in range(3):
        model(ids[i : i + 1], labels[i : i + 1], lengths=LENGTHS[i : i + 1]).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["classify", "multi", "regress", "tag"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_rows_that_are_read_by_length_have_the_loss_and_gradient_of_the_batch(name, kind, monkeypatch):
    monkeypatch.setattr(heads, "PART_TOKENS", 8)
    model = made(name, kind)
    draw = np.random.default_rng(0)
    examples = [encode_tokens(draw.integers(1, 64, n), draw.random(n) < 0.5) for n in (3, 24, 9, 24, 1, 12)]
    labels = {"classify": draw.integers(3, size=6), "multi": draw.integers(2, size=(6, 3)),
              "regress": draw.normal(size=6).astype(np.float32),
              "tag": [draw.integers(-1, 3, len(one)) for one in examples]}[kind]  # fmt: skip
    batch = to_device(pad_batch(examples, labels, 0, types=name == "bert", most=32), torch.device("cpu"))
    parts = list(heads.by_length(batch, tags=kind == "tag"))
    assert len(parts) > 2 and sum(part["input_ids"].numel() for part in parts) < 0.75 * batch["input_ids"].numel()
    model(**batch).backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters()}
    expected = model(**batch)
    model.zero_grad()
    loss, _ = heads.sum_of_losses(model, batch)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], rtol=1e-4, atol=1e-5)


def test_a_config_whose_head_is_not_built_is_refused(tmp_path):
    save_model(made("gpt2", "classify"), tmp_path, pad_token_id=0)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    for change in ({"id2label": {"0": "a", "2": "b"}}, {"problem_type": "ranking"}, {"classifier_pooling": "max"},
                   {"problem_type": "regression"}, {"id2label": {"0": "a", "1": "a"}}):  # fmt: skip
        path.write_text(json.dumps(fields | change))
        with pytest.raises(ModelError) as caught:
            read_head(tmp_path)
        assert str(caught.value.at) == str(path)


# ---- adapters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classify", "tag"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@torch.no_grad()
def test_peft_opens_an_adapter_with_its_head(name, kind, tmp_path):
    config = make_config(name)
    save_model(build_model(config, seed=1), tmp_path / "base", pad_token_id=0)
    head = make_head(kind, config.kind)
    ours = load_model(tmp_path / "base", head=head, seed=3).eval()
    options = lora.Options(r=4, alpha=8.0)
    lora.apply(ours, options)
    train_head(ours)
    generator = torch.Generator().manual_seed(5)
    for parameter in (p for p in ours.parameters() if p.requires_grad):
        parameter.normal_(0.0, 0.2, generator=generator)
    save_adapter(ours, tmp_path / "adapter", "lora", options, base=str(tmp_path / "base"), base_sha256="")
    auto = transformers.AutoModelForTokenClassification
    auto = auto if kind == "tag" else transformers.AutoModelForSequenceClassification
    base = auto.from_pretrained(tmp_path / "base", num_labels=3, pad_token_id=0)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids, mask = rows()
    chosen = mask.bool() if kind == "tag" else slice(None)
    outputs = ours(ids, lengths=LENGTHS)
    torch.testing.assert_close(theirs(ids, attention_mask=mask).logits[chosen], outputs[chosen], rtol=1e-5, atol=1e-5)
    assert read_head(tmp_path / "adapter") == head
    again = load_model(tmp_path / "base", head=head).eval()
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(ids, lengths=LENGTHS), outputs)


def test_an_adapter_that_peft_trained_for_a_number_opens_as_one(tmp_path):
    save_model(build_model(make_config("llama"), seed=1), tmp_path / "base", pad_token_id=0)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", r=4)).save_pretrained(tmp_path / "adapter")
    assert read_adapter_head(tmp_path / "adapter", tmp_path / "base").kind == "regress"


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_an_adapter_that_peft_trained_with_a_head_opens_here(task, tmp_path):
    save_model(build_model(make_config("llama"), seed=1), tmp_path / "base", pad_token_id=0)
    auto = transformers.AutoModelForTokenClassification
    auto = auto if task == "TOKEN_CLS" else transformers.AutoModelForSequenceClassification
    base = auto.from_pretrained(tmp_path / "base", num_labels=4, pad_token_id=0)
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type=task, r=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    theirs.eval().save_pretrained(tmp_path / "adapter")
    head = read_adapter_head(tmp_path / "adapter", tmp_path / "base")
    assert head.labels == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")
    ours = load_model(tmp_path / "base", head=head).eval()
    load_adapter(ours, tmp_path / "adapter")
    ids, mask = rows()
    chosen = mask.bool() if task == "TOKEN_CLS" else slice(None)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask).logits
        torch.testing.assert_close(ours(ids, lengths=LENGTHS)[chosen], expected[chosen], rtol=1e-5, atol=1e-5)


# ---- scores ---------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_scikit_learn_and_scipy():
    metrics_module = pytest.importorskip("sklearn.metrics")
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(0)
    for classes in (2, 3, 7):
        targets, found = draw.integers(classes, size=200), draw.integers(classes, size=200)
        found = np.where(draw.random(200) < 0.5, targets, found)
        assert scores.macro_f1(targets, found) == pytest.approx(
            metrics_module.f1_score(targets, found, average="macro")
        )
        assert scores.matthews(targets, found) == pytest.approx(metrics_module.matthews_corrcoef(targets, found))
        assert scores.accuracy(targets, found) == metrics_module.accuracy_score(targets, found)
    assert scores.f1(targets % 2, found % 2) == pytest.approx(metrics_module.f1_score(targets % 2, found % 2))
    a, b = draw.normal(size=100).round(1), draw.normal(size=100)
    b[:60] += a[:60]
    assert scores.pearson(a, b) == pytest.approx(stats.pearsonr(a, b)[0])
    assert scores.spearman(a, b.round(1)) == pytest.approx(stats.spearmanr(a, b.round(1))[0])
    several, found = draw.integers(2, size=(50, 4)), draw.integers(2, size=(50, 4))
    head = HeadConfig("classify", ("a", "b", "c", "d"), "last", multi_label=True)
    ours = heads.score(head, np.concatenate([several, found], axis=1))
    for average in ("macro", "micro"):
        assert ours[f"f1_{average}"] == pytest.approx(metrics_module.f1_score(several, found, average=average))
    assert ours["accuracy"] == metrics_module.accuracy_score(several, found)


def test_entities_are_counted_as_seqeval_does():
    seqeval = pytest.importorskip("seqeval.metrics")
    draw = np.random.default_rng(1)
    tags = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    targets, found = ([[tags[i] for i in draw.integers(5, size=12)] for _ in range(60)] for _ in range(2))
    found = [
        [a if draw.random() < 0.7 else b for a, b in zip(*pair, strict=True)]
        for pair in zip(targets, found, strict=True)
    ]
    assert scores.entity_f1(targets, found) == pytest.approx(seqeval.f1_score(targets, found))


# ---- files as people have them --------------------------------------------------------------------------------------

GLUE = {  # the first lines of GLUE's files, as they are laid out
    "CoLA": ("gj04\t1\t\tOur friends won't buy this analysis.\n", ("Our friends won't buy this analysis.",), "1"),
    "SST-2": ("sentence\tlabel\nhide new secretions \t0\n", ("hide new secretions ",), "0"),
    "MRPC": (
        '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t702\t709\tHe called him " the witness " , he said .\t'
        'He "did .\n',
        ('He called him " the witness " , he said .', 'He "did .'), "1",
    ),
    "STS-B": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tmain\tMSRvid\t2012\t1\tnone\tnone\tA plane.\tAn air plane.\t5.000\n",
        ("A plane.", "An air plane."), "5.000",
    ),
    "QQP": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tHow?\tWhy?\t0\n", ("How?", "Why?"), "0"
    ),
    "MNLI": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label\n0\t1\t1n\tfiction\t( a )\t( b )\t(R)\t(R)\tA.\tB.\t"
        "neutral\tneutral\n",
        ("A.", "B."), "neutral",
    ),
    "QNLI": ("index\tquestion\tsentence\tlabel\n0\tWhen?\tThen.\tentailment\n", ("When?", "Then."), "entailment"),
    "RTE": ("index\tsentence1\tsentence2\tlabel\n0\tNo.\tYes.\tnot_entailment\n", ("No.", "Yes."), "not_entailment"),
}  # fmt: skip


@pytest.mark.parametrize("name", GLUE)
def test_the_files_of_glue_are_read_as_they_are(name, tmp_path):
    text, texts, label = GLUE[name]
    (tmp_path / "train.tsv").write_text(text, encoding="utf-8")
    [(_, record, _)] = read_rows(tmp_path / "train.tsv")
    found, _ = read_labelled(record, "classify", {})
    assert (found.texts, found.label) == (texts, label)


@pytest.mark.parametrize(
    ("file", "text", "options", "texts", "label"),
    [
        ("boolq.jsonl", '{"question": "q", "passage": "p", "label": true}\n', {}, ("q", "p"), True),
        ("news.csv", '"3","A title","A text"\n', {"header": ["label", "title", "text"]}, ("A text",), "3"),
        ("sms", 'ham\tHe said "ok\n', {"header": ["label", "text"]}, ('He said "ok',), "ham"),
        ("excel.tsv", 'text\tlabel\n"a ""b"" c"\tx\n', {}, ('a "b" c',), "x"),
        ("pandas.tsv", 'text\tlabel\n"two\nlines, ""a""\tb"\tx\n', {}, ('two\nlines, "a"\tb',), "x"),
        ("own.csv", "Satz,Klasse\nEin,gut\n", {"columns": {"text": "Satz", "label": "Klasse"}}, ("Ein",), "gut"),
        ("yelp.jsonl", '{"stars": 4.0, "text": "good", "user_id": "u"}\n', {}, ("good",), 4.0),
        ("jigsaw.csv", "id,comment_text,rude,mean\n1,hey,1,0\n", {"labels": ["rude", "mean"]}, ("hey",), ["rude"]),
    ],
)  # fmt: skip
def test_layouts_of_other_files(file, text, options, texts, label, tmp_path):
    (tmp_path / file).write_text(text)
    [(_, record, _)] = read_rows(tmp_path / file, header=options.get("header"))
    found, _ = read_labelled(record, "classify", options.get("columns", {}), options.get("labels"))
    assert (found.texts, found.label) == (texts, label)


def test_a_text_file_with_the_columns_of_the_header_is_a_table(tmp_path):
    (tmp_path / "SMSSpamCollection.txt").write_text("ham\tOk lar\nspam\tWin a prize\n")
    (tmp_path / "lines.txt").write_text("Ok lar\n\nWin a prize\n")
    for name in ("SMSSpamCollection.txt", "lines.txt"):
        found = read_texts(str(tmp_path / name), "classify", {}, ["label", "text"], Tally())
        assert [texts for _, texts in found] == [("Ok lar",), ("Win a prize",)]


def test_columns_of_conll(tmp_path):
    text = "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\n\nPeter NNP B-NP B-PER"
    (tmp_path / "eng.train").write_text(text)
    found = [record for _, record, _ in read_rows(tmp_path / "eng.train", tags=True)]
    assert found == [
        {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]},
        {"tokens": ["Peter"], "tags": ["B-PER"]},
    ]
    (tmp_path / "wnut.conll").write_text("@user\tO\n#tag one\tB-x\n")  # a word may begin with #, and tabs part columns
    [(_, record, _)] = read_rows(tmp_path / "wnut.conll", tags=True)
    assert record["tokens"] == ["@user", "#tag one"]


# ---- tokens ---------------------------------------------------------------------------------------------------------

TEXTS = ["The river is large.", "a model reads code", "one token, and another one: under the river"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    found = {}
    for kind in ("bpe", "wordpiece"):
        folder = tmp_path_factory.mktemp(kind)
        train_tokenizer(TEXTS * 20, kind, vocab_size=300, say=lambda line: None).save(folder)
        found[kind] = folder
    return found


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_texts_and_pairs_have_the_tokens_that_transformers_gives_them(kind, tokenizers):
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizers[kind])
    ours = make_encoder(load_tokenizer(tokenizers[kind]), 12)
    for texts in [(TEXTS[0],), (TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[0])]:
        expected = theirs(*texts, truncation=True, max_length=12)
        [found] = ours([texts])
        assert found.ids == expected["input_ids"] and len(found.ids) <= 12
        if "token_type_ids" in expected:
            assert found.type_ids == expected["token_type_ids"]


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_the_first_token_of_each_word_has_its_tag(kind, tokenizers):
    words = "The river , reads un der the coded riverbank".split()
    [encoding] = make_encoder(load_tokenizer(tokenizers[kind]), 64)([words])
    numbers = words_of(encoding, words)
    first = first_tokens(numbers)
    assert sorted(numbers[first].tolist()) == list(range(len(words)))
    spelt = [encoding.tokens[i].replace("Ġ", "").replace("##", "") for i in np.flatnonzero(first)]
    assert all(
        word.lower().startswith(token.lower()) or token == "[UNK]" for word, token in zip(words, spelt, strict=True)
    )


def encode(folder: Path, task: str, tokenizer, **options) -> tuple[dict, list]:
    data = LabelledData(kind="labelled", **options)
    report = encode_labelled(data, tokenizer, folder / "out", task=task, seed=1)
    batches = [
        list(open_labelled_rows(Path(report["folder"]), split, 4, types=True, seed=0).in_order())
        for split in ("train", "val")
    ]
    return report, batches


def test_labels_are_numbered_in_order_and_records_without_one_are_counted(tokenizers, tmp_path):
    tokenizer = load_tokenizer(tokenizers["wordpiece"])
    texts = [("the river", "river " * i + "is") for i in range(30)]
    labels = "b a -".split() * 10
    rows = [{"premise": a, "hypothesis": b, "gold_label": c} for (a, b), c in zip(texts, labels, strict=True)]
    (tmp_path / "nli.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report, (train, val) = encode(tmp_path, "classify", tokenizer, path=str(tmp_path / "nli.jsonl"), val_fraction=0.2)
    assert report["labels"] == ["a", "b"] and report["found"]["unlabelled"] == 10
    assert report["splits"]["train"]["examples"] + report["splits"]["val"]["examples"] == 20
    assert train[0].token_type_ids.any() and val[0].labels.shape == (4,)
    number = {"a": 0, "b": 1}
    seen = {}
    for batch in [*train, *val]:
        for ids, label, length in zip(batch.input_ids, batch.labels, batch.lengths, strict=True):
            seen[tokenizer.decode(ids[:length])] = int(label)
    for row in rows:
        if row["gold_label"] != "-":
            key = tokenizer.decode(make_encoder(tokenizer, 64)([(row["premise"], row["hypothesis"])])[0].ids)
            assert seen[key] == number[row["gold_label"]]


def test_numbers_of_labels_mean_those_that_the_config_names(tokenizers, tmp_path):
    tokenizer = load_tokenizer(tokenizers["bpe"])
    lines = [f"text number {i},{i % 3}" for i in range(30)] + ["other,7"]
    (tmp_path / "a.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    options = {"path": str(tmp_path / "a.csv"), "on_error": {"max_bad_fraction": 0.1}}
    report, _ = encode(tmp_path, "classify", tokenizer, labels=["low", "middle", "high"], **options)
    assert report["labels"] == ["low", "middle", "high"] and report["records"]["bad"] == 1
    assert (
        "there is no such label: 7, but low, middle, high" in (Path(report["folder"]) / "quarantine.jsonl").read_text()
    )
    report, _ = encode(tmp_path, "classify", tokenizer, **options)
    assert report["labels"] == ["0", "1", "2", "7"]


def test_long_texts_are_cut_and_counted_or_left_out(tokenizers, tmp_path):
    tokenizer = load_tokenizer(tokenizers["bpe"])
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"{'river ' * (i + 1)},{i % 2}\n" for i in range(20)))
    options = {"path": str(tmp_path / "a.csv"), "seq_len": 10}
    report, (train, _) = encode(tmp_path, "classify", tokenizer, **options)
    assert report["found"]["truncated"] > 0 and max(batch.lengths.max() for batch in train) == 10
    dropped, _ = encode(tmp_path, "classify", tokenizer, too_long="drop", **options)
    assert dropped["found"]["too_long"] == report["found"]["truncated"]


@pytest.mark.parametrize(
    ("text", "task", "options", "what"),
    [
        ("text,label\na,x\nb,x\nc,x\n", "classify", {}, "the same label"),
        ("txt,lable\na,x\n", "classify", {}, "no field with a text"),
        ("text,note\na,x\n", "classify", {}, "no field with a label"),
        ("text,score\na,0.25\nb,1.75\nc,3.5\n", "classify", {}, "the labels are numbers"),
        ("text,score\na,much\nb,1.75\n", "regress", {}, "too many records can't be used"),
        ("text,label\na,-\nb,-\n", "classify", {}, "no example is left"),
        ("text,label\na,x\nb,y\n", "classify", {"labels": ["p", "q"]}, "too many records can't be used"),
    ],
)
def test_labels_that_can_not_be_learnt_are_refused(text, task, options, what, tokenizers, tmp_path):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=what):
        encode(tmp_path, task, load_tokenizer(tokenizers["bpe"]), path=str(tmp_path / "a.csv"), **options)


@pytest.mark.parametrize(
    ("values", "labels", "expected", "unlabelled"),
    [
        ([-1, 0, 1] * 20, None, ["-1", "0", "1"], 0),  # sentiment
        ([0, 1] * 30 + [-1], None, ["0", "1"], 1),  # a few that are not known
        ([-1, 0, 1] * 20, ["-1", "0", "1"], ["-1", "0", "1"], 0),
        ([-1, 0, 1] * 20, ["no", "yes"], ["no", "yes"], 20),
    ],
)
def test_a_label_of_minus_one(values, labels, expected, unlabelled, tokenizers, tmp_path):
    rows = "".join(f"river {'large ' * i},{value}\n" for i, value in enumerate(values))
    (tmp_path / "a.csv").write_text(f"text,label\n{rows}")
    tokenizer = load_tokenizer(tokenizers["bpe"])
    report, (train, val) = encode(tmp_path, "classify", tokenizer, path=str(tmp_path / "a.csv"), labels=labels)
    assert report["labels"] == expected and report["found"]["unlabelled"] == unlabelled
    seen = np.concatenate([batch.labels for batch in [*train, *val]])
    number = {name: i for i, name in enumerate(report["labels"])} | (
        {"0": 0, "1": 1} if labels == ["no", "yes"] else {}
    )
    known = [str(value) for value in values if str(value) in number]
    assert sorted(seen.tolist()) == sorted(number[value] for value in known)


def test_several_labels_as_lists_as_columns_and_as_one_text(tokenizers, tmp_path):
    tokenizer, names = load_tokenizer(tokenizers["bpe"]), ["wet", "large", "old"]
    wanted = [[i % 2, i % 3 == 0, i % 5 == 0] for i in range(30)]
    texts = [f"river {'large ' * i}" for i in range(30)]
    lists = [{"text": t, "labels": list(map(int, one))} for t, one in zip(texts, wanted, strict=True)]
    named = [{"text": t, "labels": [n for n, is_there in zip(names, one, strict=True) if is_there]}
             for t, one in zip(texts, wanted, strict=True)]  # fmt: skip
    columns = [{"text": t} | dict(zip(names, ["TRUE" if v else "0" for v in one], strict=True))
               for t, one in zip(texts, wanted, strict=True)]  # fmt: skip
    joined = [{"text": one["text"], "labels": "|".join(one["labels"])} for one in named]
    for kind, rows in {"lists": lists, "named": named, "columns": columns, "joined": joined}.items():
        path = tmp_path / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        more = {"label_separator": "|", "multi_label": True} if kind == "joined" else {}
        report, (train, val) = encode(tmp_path, "classify", tokenizer, path=str(path), labels=names, **more)
        seen = np.concatenate([batch.labels for batch in [*train, *val]])
        assert report["multi_label"] and seen.shape == (30, 3), kind
        assert seen.sum(0).tolist() == [15, 10, 6], kind
    with pytest.raises(DataError, match="lists of 0 and 1"):
        encode(tmp_path, "classify", tokenizer, path=str(tmp_path / "lists.jsonl"))


def test_the_fields_of_a_file_are_those_of_its_first_record(tokenizers, tmp_path):
    rows = [{"text": f"river {i}", "label": "ab"[i % 2], "rating": i} for i in range(40)]
    rows[7] = {"text": "river", "label": None, "rating": 3}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report, _ = encode(tmp_path, "classify", load_tokenizer(tokenizers["bpe"]), path=str(tmp_path / "a.jsonl"))
    assert report["labels"] == ["a", "b"] and report["found"]["unlabelled"] == 1


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("task", ["classify", "tag"])
def test_the_names_of_classes_that_a_data_set_stores_are_read(task, saved, tokenizers, tmp_path):
    datasets = pytest.importorskip("datasets")
    names = datasets.ClassLabel(names=["O", "B-RIVER"] if task == "tag" else ["dry", "wet"])
    rows = {"text": [f"river {i}" for i in range(20)], "label": [i % 2 for i in range(20)]}
    features = {"text": datasets.Value("string"), "label": names}
    if task == "tag":
        rows = {"tokens": [["the", "river"]] * 10 + [["a", "model"]] * 10, "ner_tags": [[0, 1]] * 10 + [[0, 0]] * 10}
        features = {"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(names)}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    path = tmp_path / ("saved" if saved else "a.parquet")
    data.save_to_disk(str(path)) if saved else data.to_parquet(str(path))
    report, _ = encode(tmp_path, task, load_tokenizer(tokenizers["bpe"]), path=str(path))
    assert report["labels"] == names.names


def test_conll_with_a_word_that_is_a_sign_and_in_tsv_and_with_numbers(tmp_path):
    (tmp_path / "a.conll").write_text("# sent_id = 1\nThe DT O\n\n# CD O\nriver NN B-X\n")
    assert [record["tokens"] for _, record, _ in read_rows(tmp_path / "a.conll", tags=True)] == [
        ["The"],
        ["#", "river"],
    ]
    (tmp_path / "a.tsv").write_text("The\tO\nriver\tB-X\n")
    [(_, record, _)] = read_rows(tmp_path / "a.tsv", tags=True)
    assert record == {"tokens": ["The", "river"], "tags": ["O", "B-X"]}
    (tmp_path / "a.conllu").write_text("1\tThe\tDET\n2\triver\tNOUN\n\n")
    with pytest.raises(DataError, match="numbers the words"):
        list(read_rows(tmp_path / "a.conllu", tags=True))


def test_rows_end_at_the_last_position():
    batch = pad_batch([encode_tokens(range(1, 51), [True] * 50)], np.array([0]), 0, types=False, most=50)
    assert batch.input_ids.shape == (1, 50)
    assert (
        pad_batch([encode_tokens([1] * 9, [True] * 9)], np.array([0]), 0, types=False, most=50).input_ids.shape[1] == 16
    )


def test_a_damaged_file_of_encoded_labels_is_noticed(tokenizers, tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"river {i},{i % 2}\n" for i in range(20)))
    report, _ = encode(tmp_path, "classify", load_tokenizer(tokenizers["bpe"]), path=str(tmp_path / "a.csv"))
    path = Path(report["folder"]) / "labels.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    with pytest.raises(DataError, match="the encoded records changed"):
        open_labelled_rows(Path(report["folder"]), "train", 4, types=False, seed=0)


def test_a_target_that_is_missing_has_no_loss():
    model = made("gpt2", "regress")
    batch = pad_batch(
        [encode_tokens([5, 6, 7], [True] * 3)] * 2, np.array([1.0, np.nan], np.float32), 0, types=False, most=8
    )
    assert batch.count == 1
    tensors = to_device(batch, torch.device("cpu"))
    losses = model(**tensors, reduction="none")
    assert losses[1] == 0 and losses[0] > 0
    model(**tensors).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# ---- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory) -> Path:
    """Return a folder with the runs `llama` and `bert`, and files with labels that a text's words decide."""
    folder = tmp_path_factory.mktemp("labels")
    for name, tokenizer in (("llama", "bpe"), ("bert", "wordpiece")):
        config = tiny_config(corpus, train={"max_steps": 4, "global_batch_size": 8, "compile": False})
        config["model"]["name"] = name
        config["data"] |= {"dir": str(folder / f"data-{name}"), "tokenizer": {"train": tokenizer, "vocab_size": 400}}
        config["data"]["sources"] = [{"name": "text", "path": str(corpus / "text")}]
        if name == "bert":
            del config["model"]["num_key_value_heads"]
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
        llmkit("pretrain", f"{name}.yaml", cwd=folder)
    lines = [
        f"the {'river' if i % 2 else 'model'} is {'large small in the of'.split()[i % 5]}\t{'wet' if i % 2 else 'dry'}"
        for i in range(120)
    ]
    (folder / "train.tsv").write_text("text\tlabel\n" + "\n".join(f"{i} {line}" for i, line in enumerate(lines)) + "\n")
    words = [("the O", "river B-RIVER", "is O", "large O"), ("a O", "model O", "reads O")]
    (folder / "train.conll").write_text("\n\n".join(f"{i} O\n" + "\n".join(words[i % 2]) for i in range(60)) + "\n")
    (folder / "lines.txt").write_text("the river is large\n\na model reads code\nthe river is small\n")
    return folder


def write_config(folder: Path, name: str, init_from: str, **sections) -> str:
    config = {
        "init_from": init_from,
        "data": {"kind": "labelled", "path": "train.tsv", "seq_len": 32, "val_fraction": 0.2},
        "train": {"max_steps": 20, "global_batch_size": 16, "precision": "fp32"},
        "optimizer": {"name": "adamw", "lr": 1e-2},
        "schedule": {"name": "constant"},
        "eval": {"every": 10},
        "checkpoint": {"every": 10},
        "log": {"every": 5},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config | sections))
    return f"{name}.yaml"


@pytest.mark.parametrize("peft_section", [{}, {"peft": {"name": "lora", "r": 4}}], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_classifier_from_the_command_line(name, peft_section, base):
    learns = name == "llama" or not peft_section  # a frozen BERT of four steps knows too little
    slow = {"optimizer": {"name": "adamw", "lr": 3e-3}} if name == "bert" else {}
    config = write_config(base, f"cls-{name}-{len(peft_section)}", f"runs/{name}", **peft_section, **slow)
    run = f"runs/{Path(config).stem}"
    llmkit("pretrain", config, "-o", f"train.max_steps={60 if slow and learns else 40}", cwd=base)
    found = [record for record in metrics(base / run) if "val_loss" in record]
    assert not learns or (found[-1]["val_accuracy"] > 0.8 and found[-1]["val_loss"] < found[0]["val_loss"] - 0.1)
    measured = json.loads(llmkit("eval", run, "--precision", "fp32", "--json", cwd=base).stdout)
    best = min(found, key=lambda record: record["val_loss"])
    assert measured["accuracy"] == pytest.approx(best["val_accuracy"])
    assert measured["loss"] == pytest.approx(best["val_loss"], abs=1e-3 if peft_section else 1e-5)
    low, high = measured["accuracy_interval"]
    assert low <= measured["accuracy"] <= high and measured["examples"] == found[-1]["val_examples"]
    done = llmkit("classify", run, "train.tsv", "--out", f"{config}.jsonl", cwd=base)
    assert "written" in done.stdout
    lines = [json.loads(line) for line in (base / f"{config}.jsonl").read_text().splitlines()]
    right = np.mean([one["label"] == one["prediction"]["label"] for one in lines])
    assert len(lines) == 120 and (right > 0.8 or not learns)
    assert all(sum(one["prediction"]["probabilities"].values()) == pytest.approx(1, abs=1e-4) for one in lines)
    # what another classifier's user would do: transformers opens the merged folder, and says the same of a text
    llmkit("export", run, f"out-{Path(config).stem}", cwd=base)
    theirs = transformers.pipeline("text-classification", str(base / f"out-{Path(config).stem}"), top_k=None)
    text = "the river is large"
    expected = {one["label"]: one["score"] for one in theirs([text])[0]}
    ours = json.loads(llmkit("classify", run, text, "--precision", "fp32", "--json", cwd=base).stdout)
    assert ours["prediction"]["probabilities"] == pytest.approx(expected, abs=1e-4)


def test_tags_from_the_command_line(base):
    data = {"kind": "labelled", "path": "train.conll", "seq_len": 32, "val_fraction": 0.2}
    config = write_config(base, "tags", "runs/llama", data=data, objective={"name": "tag"})
    llmkit("pretrain", config, "-o", "train.max_steps=40", cwd=base)
    assert [one for one in metrics(base / "runs/tags") if "val_loss" in one][-1]["val_f1"] > 0.8
    said = llmkit("classify", "runs/tags", "the river is large", cwd=base).stdout
    assert said == "the/O river/B-RIVER is/O large/O\n"
    assert llmkit("classify", "runs/tags", "lines.txt", cwd=base).stdout.splitlines()[0] == said.strip()
    assert "[B-RIVER]" in llmkit("data", "inspect", config, "--rows", 8, cwd=base).stdout


@pytest.mark.parametrize("peft_section", [{}, {"peft": {"name": "lora", "r": 4, "dropout": 0.1}}], ids=["full", "lora"])
def test_a_resumed_head_has_the_same_bits(peft_section, base):
    from safetensors.torch import load_file

    name = f"bits-{len(peft_section)}"
    config = write_config(base, name, "runs/llama", **peft_section)
    for run, lengths in (("once", (20,)), ("twice", (10, 20))):
        for length in lengths:
            llmkit("pretrain", config, "-o", f"run_dir=runs/{name}-{run}", "-o", f"train.max_steps={length}", cwd=base)
    file = "adapter_model.safetensors" if peft_section else "model.safetensors"
    one, two = (
        load_file(base / f"runs/{name}-{run}/checkpoints/step-000020/model/{file}") for run in ("once", "twice")
    )
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert any("score" in key for key in one)


def test_a_run_goes_on_from_the_config_that_it_resolved(base):
    config = write_config(base, "own", "runs/llama")
    llmkit("pretrain", config, "-o", "train.max_steps=10", cwd=base)
    (base / "copy.yaml").write_bytes((base / "runs/own/config.yaml").read_bytes())
    said = llmkit("pretrain", "copy.yaml", "-o", "train.max_steps=20", cwd=base).stdout
    assert "resumed" in said and len(list((base / "runs/own/data").iterdir())) == 1


def test_a_classifier_of_pairs_says_in_transformers_what_it_says_here(base):
    rows = "".join(f"the river {i}\tis {'large' if i % 2 else 'small'}\t{i % 2}\n" for i in range(60))
    (base / "pairs.tsv").write_text(f"sentence1\tsentence2\tlabel\n{rows}")
    data = {"kind": "labelled", "path": "pairs.tsv", "seq_len": 32, "val_fraction": 0.2}
    llmkit("pretrain", write_config(base, "pairs", "runs/bert", data=data), cwd=base)
    folder = next((base / "runs/pairs/checkpoints").glob("*20")) / "model"
    (base / "one.tsv").write_text("sentence1\tsentence2\nthe river\tis large\n")
    line = llmkit("classify", "runs/pairs", "one.tsv", "--precision", "fp32", "--json", cwd=base).stdout
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    inputs = transformers.AutoTokenizer.from_pretrained(folder)("the river", "is large", return_tensors="pt")
    assert inputs["token_type_ids"].any()
    with torch.no_grad():
        expected = theirs(**inputs).logits.softmax(-1)[0].tolist()
    found = json.loads(line)["prediction"]["probabilities"]
    assert list(found.values()) == pytest.approx(expected, abs=1e-4)


def test_two_ranks_learn_and_measure_what_one_does(base):
    config = write_config(base, "ranks", "runs/llama", objective={"name": "classify", "dropout": 0.0})
    for nproc in (1, 2):
        llmkit("pretrain", config, "--nproc", nproc, "-o", f"run_dir=runs/ranks-{nproc}", cwd=base)
    one, two = ([r for r in metrics(base / f"runs/ranks-{n}") if "val_loss" in r] for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert a["val_examples"] == b["val_examples"]
        assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-4)
        assert a["val_accuracy"] == pytest.approx(b["val_accuracy"], abs=0.05)


def test_predictions_are_compared_between_groups(base):
    if not (base / "runs/groups").is_dir():
        llmkit("pretrain", write_config(base, "groups", "runs/llama"), cwd=base)
    rows = [
        {"text": f"{i} the {'river' if i % 2 else 'model'} is", "label": "wet" if i % 3 else "dry", "who": "ab"[i % 2]}
        for i in range(60)
    ]
    (base / "groups.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--data", "groups.jsonl", "--group-by", "who"]
    found = json.loads(llmkit("eval", "runs/groups", *options, "--json", cwd=base).stdout)
    lines = llmkit("classify", "runs/groups", "groups.jsonl", "--json", cwd=base).stdout.splitlines()
    said = [json.loads(line) for line in lines]
    for group in "ab":
        own = [one for one in said if one["who"] == group]
        right = np.mean([one["prediction"]["label"] == one["label"] for one in own])
        assert found["accuracy_by_group"][group] == pytest.approx(right)
    wet = [np.mean([one["prediction"]["label"] == "wet" for one in said if one["who"] == group]) for group in "ab"]
    assert found["demographic_parity"] == pytest.approx(abs(wet[0] - wet[1]))
    assert found["examples_by_group"] == {"a": 30, "b": 30}
    assert "group" in llmkit("eval", "runs/groups", *options, cwd=base).stdout
    said = llmkit("eval", "runs/groups", "--data", "groups.jsonl", "--group-by", "none", cwd=base, code=None).stderr
    assert "no field none" in said


def test_finetune_takes_an_objective(base):
    options = ["--from", "runs/llama", "--data", "train.tsv", "-o", "train.max_steps=3", "-o", "train.epochs=null"]
    llmkit("finetune", "--lora", "--objective", "classify", *options, cwd=base)
    assert read_head(next((base / "runs/llama-lora/checkpoints").glob("*3")) / "model").labels == ("dry", "wet")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("objective.name=lm", "does not fit llama"),
        ("objective.pooling=cls", "last or mean"),
        ("train.compile=true", "rows differ in length"),
        ("eval.sets={a: train.tsv}", "needs a head for tokens"),
        ("eval.best=val_spearman", "val_accuracy"),
        ("data.columns={txt: text}", "which is no field of a record"),
        ("data.path=none.tsv", "no such file"),
        ("data.label=x", "did you mean labels?"),
    ],
)
def test_what_does_not_fit_a_head_is_one_error(override, said, base):
    config = write_config(base, "wrong", "runs/llama", objective={"name": "classify"})
    done = llmkit("pretrain", config, "--dry-run", "-o", override, cwd=base, code=None)
    assert done.returncode and done.stderr.count("error:") == 1 and said in done.stderr


def test_a_head_filters_a_corpus(base):
    """The folder of a classifier is one of transformers, which data.filter.classifier reads."""
    if not (base / "runs/filter").is_dir():
        llmkit("pretrain", write_config(base, "filter", "runs/llama"), cwd=base)
    rows = [{"text": f"{i} the {'river' if i % 2 else 'model'} is large"} for i in range(40)]
    (base / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    classifier = {"path": str(next((base / "runs/filter/checkpoints").glob("*20")) / "model"), "label": "wet"}
    config = tiny_config(base)
    config["data"] |= {"sources": "docs.jsonl", "dir": "data-filter", "filter": {"classifier": classifier}}
    (base / "filtered.yaml").write_text(yaml.safe_dump(config))
    llmkit("data", "build", "filtered.yaml", cwd=base)
    funnel = json.loads((base / "data-filter/manifest.json").read_text())["funnel"]
    assert 18 <= funnel["docs"]["dropped"]["classifier"] <= 22


def test_a_model_without_a_head_and_a_head_for_tokens_are_told_apart(base):
    assert "no head for labels" in llmkit("classify", "runs/llama", "hi", cwd=base, code=None).stderr
    if not (base / "runs/cls-llama-0").is_dir():
        llmkit("pretrain", write_config(base, "cls-llama-0", "runs/llama"), cwd=base)
    said = llmkit("generate", "runs/cls-llama-0", "hi", cwd=base, code=None).stderr
    assert "predicts labels, not tokens" in said and "llmkit classify" in said


# ---- vectors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_vectors_are_the_mean_of_the_last_states_of_transformers(name, base):
    llmkit("embed", f"runs/{name}", "lines.txt", "--out", f"vec-{name}", cwd=base)
    ours = np.load(base / f"vec-{name}.npy")
    rows = [json.loads(line) for line in (base / f"vec-{name}.jsonl").read_text().splitlines()]
    folder = next((base / f"runs/{name}/checkpoints").glob("*4")) / "model"
    theirs, tokenizer = (
        transformers.AutoModel.from_pretrained(folder).eval(),
        transformers.AutoTokenizer.from_pretrained(folder),
    )
    with torch.no_grad():
        for vector, row in zip(ours, rows, strict=True):
            ids = tokenizer(row["text"], return_tensors="pt")["input_ids"]
            expected = theirs(ids).last_hidden_state[0].mean(0).numpy()
            np.testing.assert_allclose(vector, expected, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(row["vector"], vector, rtol=1e-5, atol=1e-6)


def test_no_file_of_the_user_is_overwritten(base):
    (base / "mine.npy").write_text("my own")
    said = llmkit("embed", "runs/llama", "lines.txt", "--out", "mine", cwd=base, code=None).stderr
    assert "exists already" in said and (base / "mine.npy").read_text() == "my own"
    said = llmkit("classify", "runs/llama", "lines.txt", "--out", "lines.txt", cwd=base, code=None).stderr
    assert "exists already" in said
    llmkit("embed", "runs/llama", "lines.txt", "--out", "new/folder/vectors", cwd=base)
    assert np.load(base / "new/folder/vectors.npy").shape == (3, 32)


def test_the_nearest_texts_and_tokens_are_those_with_the_highest_cosine(base):
    found = json.loads(
        llmkit("embed", "runs/llama", "lines.txt", "--near", "the river is large", "--json", cwd=base).stdout
    )
    assert found["nearest"][0]["text"] == "the river is large" and found["nearest"][0]["similarity"] == pytest.approx(1)
    found = json.loads(llmkit("tokenizer", "show", "runs/llama", "--near", "river", "--json", cwd=base).stdout)
    folder = next((base / "runs/llama/checkpoints").glob("*4")) / "model"
    table = load_model(folder).wte.weight.detach().numpy()
    word = load_tokenizer(folder).encode_continuation(" river")
    assert len(word) == 1
    cosine = table @ table[word[0]] / np.linalg.norm(table, axis=1) / np.linalg.norm(table[word[0]])
    assert [one["id"] for one in found["nearest"]] == np.argsort(-cosine, kind="stable")[1:11].tolist()


def test_the_hidden_states_of_a_head_are_those_of_the_model_without_it():
    config = make_config("qwen3")
    plain, with_head = (
        build_model(config, seed=1).eval(),
        build_model(config, seed=1, head=make_head("classify", "causal")).eval(),
    )
    with_head.load_state_dict(plain.state_dict(), strict=False)
    ids, _ = rows()
    with torch.no_grad():
        assert torch.equal(hidden_states(plain, ids), hidden_states(with_head, ids))
    assert set(plain.state_dict()) - set(with_head.state_dict()) <= {"lm_head.weight"}
