"""Perplexity: the same number for every batch size, and transformers' own sliding window's."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
import transformers
from conftest import sentences, tiny_config
from tokenizers import Tokenizer as Rust
from tokenizers import processors

from llmkit.config.data import CorpusData
from llmkit.corpus.build import build_corpus
from llmkit.errors import DataError, UserError
from llmkit.evals.perplexity import compare, divide, measure, measure_parts
from llmkit.evals.reading import windows
from llmkit.intervals import ratio_error
from llmkit.models import build_model, folder, llama
from llmkit.objectives.lm import perplexity
from llmkit.storage.locate import locate
from llmkit.tokenizer.load import load_tokenizer
from llmkit.tokenizer.train import train_tokenizer
from llmkit.types import IGNORE_INDEX, Batch

VOCAB, CPU = 61, torch.device("cpu")
CONFIG = llama.Config(
    vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, max_position_embeddings=32,
)  # fmt: skip
STRIDES = [(8, 8), (8, 5), (7, 3), (16, 4)]
LENGTHS = [2, 8, 9, 17, 18, 50]


@pytest.fixture(scope="module")
def model():
    """Return a model whose losses differ from token to token."""
    made = build_model(CONFIG)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0.1, 0.3, generator=generator)
    return made


@pytest.fixture(scope="module")
def theirs(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    folder.save_model(model, path)
    return transformers.AutoModelForCausalLM.from_pretrained(path).eval()


def text(length: int = 50) -> np.ndarray:
    return np.random.default_rng(0).integers(VOCAB, size=length, dtype=np.uint32)


def measured(model, tokens, window: int, stride: int, batch_size: int = 3, **options) -> dict:
    batches = windows(tokens, window, stride, batch_size)
    return perplexity(model, batches, device=CPU, micro_batch_size=batch_size, **options)


# ---- windows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "stride"), STRIDES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_token_but_the_first_is_a_target_exactly_once(length, window, stride, batch_size):
    tokens = np.arange(length)  # every token is its own place
    scored = []
    for batch in windows(tokens, window, stride, batch_size):
        assert batch.input_ids.shape[0] <= batch_size
        assert batch.input_ids.shape[1] <= window
        for inputs, labels in zip(batch.input_ids, batch.labels, strict=True):
            valid = labels != IGNORE_INDEX
            assert (labels[valid] == inputs[valid] + 1).all()
            scored += labels[valid].tolist()
    assert scored == list(range(1, length))


@pytest.mark.parametrize(("window", "stride"), STRIDES)
def test_later_windows_give_every_target_at_least_the_overlap_as_context(window, stride):
    rows = [
        (inputs, labels)
        for batch in windows(np.arange(50), window, stride, 3)
        for inputs, labels in zip(batch.input_ids, batch.labels, strict=True)
    ]
    for inputs, labels in rows[1:]:
        assert labels[labels != IGNORE_INDEX].min() - inputs[0] > window - stride


# ---- the number -----------------------------------------------------------------------------------------------------


def sliding_window(theirs, tokens: np.ndarray, max_length: int, stride: int) -> tuple[float, int]:
    """Compute Hugging Face's loop ("Perplexity of fixed-length models"): window means, weighted by scored tokens."""
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    length, nats, scored, before = ids.shape[1], 0.0, 0, 0
    for begin in range(0, length, stride):
        end = min(begin + max_length, length)
        inputs, targets = ids[:, begin:end], ids[:, begin:end].clone()
        targets[:, : before - begin if begin else 0] = IGNORE_INDEX
        count = int((targets[:, 1:] != IGNORE_INDEX).sum())  # the model shifts labels: the first is never scored
        with torch.no_grad():
            nats += theirs(inputs, labels=targets).loss.item() * count
        scored, before = scored + count, end
        if end == length:
            break
    return nats / scored, scored


@pytest.mark.parametrize(("window", "stride"), STRIDES)
@pytest.mark.parametrize("length", [9, 50])
def test_the_loss_equals_transformers_sliding_window(model, theirs, length, window, stride):
    tokens = text(length)
    loss, scored = sliding_window(theirs, tokens, window + 1, stride)
    ours = measured(model, tokens, window, stride)
    assert ours["val_tokens"] == scored == length - 1
    assert ours["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert ours["val_perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


@pytest.mark.parametrize(("window", "stride"), STRIDES)
def test_the_loss_is_the_same_for_every_batch_size(model, window, stride):
    one, three, eight = (measured(model, text(), window, stride, batch_size) for batch_size in (1, 3, 8))
    assert one == pytest.approx(three, rel=1e-6)
    assert one == pytest.approx(eight, rel=1e-6)


def test_the_loss_is_the_same_for_every_micro_batch_size(model):
    one, three, eight = (
        perplexity(model, windows(text(), 8, 8, 5), device=CPU, micro_batch_size=size) for size in (1, 3, 8)
    )
    assert one == pytest.approx(three, rel=1e-6)
    assert one == pytest.approx(eight, rel=1e-6)


def test_bits_per_byte_by_hand(model):
    tokens, token_bytes = text(), np.arange(VOCAB, dtype=np.int32) % 4  # some tokens stand for no text
    result = measured(model, tokens, 8, 8, token_bytes=token_bytes)
    text_bytes = sum(int(token) % 4 for token in tokens[1:])
    assert result["bits_per_byte"] == pytest.approx(result["val_loss"] * 49 / math.log(2) / text_bytes)


def test_without_token_bytes_there_are_no_bits_per_byte(model):
    assert "bits_per_byte" not in measured(model, text(), 8, 8)


def test_ignored_labels_are_not_counted(model):
    ids = text(18).astype(np.int64).reshape(2, 9)
    inputs, labels = ids[:, :-1], ids[:, 1:].copy()
    labels[0, 2:5] = labels[1, :7] = IGNORE_INDEX
    token_bytes = np.full(VOCAB, 2, dtype=np.int32)
    result = perplexity(model, [Batch(inputs, labels)], device=CPU, token_bytes=token_bytes)
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(
            model(torch.from_numpy(inputs)).transpose(1, 2), torch.from_numpy(labels), reduction="none"
        )
    assert result["val_tokens"] == 16 - 3 - 7
    assert result["val_loss"] == pytest.approx(losses.sum().item() / 6, rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(losses.sum().item() / math.log(2) / 12, rel=1e-5)


def test_batches_are_weighted_by_their_targets(model):
    short, long = list(windows(text(4), 8, 8, 1)), list(windows(text(9)[::-1], 8, 8, 1))
    parts = [perplexity(model, batches, device=CPU) for batches in (short, long)]
    whole = perplexity(model, short + long, device=CPU)
    assert whole["val_loss"] == pytest.approx((3 * parts[0]["val_loss"] + 8 * parts[1]["val_loss"]) / 11, rel=1e-6)


@pytest.mark.parametrize("length", [0, 1])
def test_a_text_without_a_target_has_no_loss(model, length):
    result = measured(model, text(length), 8, 8)
    assert result["val_tokens"] == 0
    assert math.isnan(result["val_loss"])


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_the_mode_as_it_was(model, training):
    measured(model.train(training), text(9), 8, 8)
    assert model.training is training


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a model of a small vocabulary, and texts of several lengths."""
    path = tmp_path_factory.mktemp("place")
    tokenizer = train_tokenizer([sentences(i, 40) for i in range(3)], vocab_size=300)
    made = build_model(dataclasses.replace(CONFIG, vocab_size=len(tokenizer)), seed=3)
    folder.save_model(made, path / "model")
    tokenizer.save(path / "model")
    (path / "texts").mkdir()
    for i, words in enumerate((3, 30, 90)):
        (path / "texts" / f"{i}.txt").write_text(" ".join(sentences(i, 90).split()[:words]))
    (path / "faq.jsonl").write_text(
        "".join(json.dumps({"Frage": f"the {i}", "Antwort": "river"}) + "\n" for i in range(3))
    )
    return path


@pytest.mark.parametrize("stride", [32, 11])
def test_each_text_on_its_own_is_transformers_with_a_begin_token(place, stride):
    found = measure(locate(str(place / "model")), data=str(place / "texts"), each=True, stride=stride, precision="fp32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(place / "model").eval()
    words = transformers.AutoTokenizer.from_pretrained(place / "model")
    nats, targets, size = 0.0, 0, 0
    for file in sorted((place / "texts").iterdir()):
        ids = torch.tensor([[words.eos_token_id, *words(file.read_text()).input_ids]])
        size += len(file.read_bytes())
        scored = 1
        for start in range(0, ids.shape[1] - 1, stride):
            part = ids[:, start : start + 33]
            with torch.no_grad():
                losses = -theirs(part[:, :-1]).logits.log_softmax(-1)[0].gather(1, part[0, 1:, None])[:, 0]
            nats += losses[scored - start - 1 :].sum().item()
            targets += part.shape[1] - (scored - start)
            scored = start + part.shape[1]
            if scored == ids.shape[1]:
                break
    assert found["tokens"] == targets and found["loss"] == pytest.approx(nats / targets, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert "3 documents, each on its own after a begin token" in found["data"]


def test_a_begin_token_that_the_tokenizer_adds_is_not_added_twice(place, tmp_path):
    shutil.copytree(place / "model", tmp_path / "model")
    rust = Rust.from_file(str(tmp_path / "model" / "tokenizer.json"))
    begin = ("<|im_start|>", rust.token_to_id("<|im_start|>"))
    rust.post_processor = processors.TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    rust.save(str(tmp_path / "model" / "tokenizer.json"))
    found = measure(locate(str(tmp_path / "model")), data=str(place / "texts"), each=True)
    assert found["tokens"] == measure(locate(str(place / "model")), data=str(place / "texts"), each=True)["tokens"]


def test_pages_are_measured_as_a_build_reads_them_without_markup(place, tmp_path):
    text = "The river was high after the rain and the small boat could not cross it."
    (tmp_path / "page.html").write_text(f"<html><nav>Menu</nav><body><article><p>{text}</p></article></body></html>")
    (tmp_path / "page.txt").write_text(text)
    page, plain = (
        measure(locate(str(place / "model")), data=str(tmp_path / name)) for name in ("page.html", "page.txt")
    )
    assert page["loss"] == plain["loss"] and page["tokens"] == plain["tokens"]


def test_columns_of_a_run_do_not_keep_it_from_reading_texts(place):
    found = measure(locate(str(place / "model")), data=str(place / "texts"), columns={"question": "a", "answer": "b"})
    assert "3 documents" in found["data"]


def test_several_texts_are_one_stream_and_it_says_so(place):
    located = locate(str(place / "model"))
    whole = measure(located, data=str(place / "texts"), precision="fp32")
    assert "3 documents, in one stream, with an end token after each" in whole["data"]
    assert (
        whole["tokens"] == measure(located, data=str(place / "texts/*.txt"), each=True, precision="fp32")["tokens"] + 2
    )


def test_columns_name_the_fields_of_records_to_measure(place):
    located = locate(str(place / "model"))
    with pytest.raises(DataError, match="neither texts nor prompts") as error:
        measure(located, data=str(place / "faq.jsonl"))
    assert "--columns" in error.value.fix
    found = measure(located, data=str(place / "faq.jsonl"), columns={"question": "Frage", "answer": "Antwort"})
    assert found["tokens"] > 3 and "3 examples" in found["data"]
    for wrong in ({"each": True}, {"stride": 8}):
        with pytest.raises(UserError, match="these are records of answers"):
            measure(located, data=str(place / "faq.jsonl"), columns={"question": "Frage", "answer": "Antwort"}, **wrong)


def test_a_built_corpus_gives_its_val_split_if_the_tokenizer_is_the_models(corpus, tmp_path):
    config = tiny_config(corpus, data={"dir": str(tmp_path / "data")})
    manifest = build_corpus(CorpusData(**config["data"]))
    folder.save_model(build_model(dataclasses.replace(CONFIG, vocab_size=manifest["vocab_size"])), tmp_path / "m")
    load_tokenizer(tmp_path / "data" / "tokenizer").save(tmp_path / "m")
    found = measure(locate(str(tmp_path / "m")), data=str(tmp_path / "data"))
    assert found["tokens"] == manifest["splits"]["val"]["tokens"] - 1
    other = train_tokenizer([sentences(9, 40)], vocab_size=280)
    other.save(tmp_path / "m")
    with pytest.raises(UserError):
        measure(locate(str(tmp_path / "m")), data=str(tmp_path / "data"))


def test_the_error_of_a_loss_is_that_of_its_documents():
    """Documents of very different losses: the error equals that of the ratio of sums, computed by hand."""
    eos, tokens = 0, np.array([5, 6, 0, 7, 0] * 6 + [8, 8, 8, 0])
    losses = [np.arange(1, len(tokens), dtype=np.float32)[None]]
    masks = [np.ones((1, len(tokens) - 1), dtype=bool)]
    part, nats, targets = divide(losses, masks, tokens, eos, window=4)
    assert part == "document" and targets.tolist() == [2, *[2, 3] * 5, 2, 4]
    assert nats.sum() == losses[0].sum()
    ratio = nats.sum() / targets.sum()
    spread = ((nats - ratio * targets) ** 2).sum() * len(nats) / (len(nats) - 1)
    assert ratio_error(nats, targets) == pytest.approx(spread**0.5 / targets.sum())


def test_few_documents_are_divided_into_windows():
    tokens = np.arange(1, 21)
    part, nats, targets = divide([np.ones((1, 19), np.float32)], [np.ones((1, 19), bool)], tokens, 0, window=8)
    assert (part, nats.tolist(), targets.tolist()) == ("window", [8, 8, 3], [8, 8, 3])


def test_a_baseline_is_compared_part_by_part(corpus, tmp_path):
    """The same model has no difference; a damaged copy is worse, with an interval that says so."""
    from safetensors.torch import load_file, save_file

    tokenizer = load_tokenizer(corpus / "data" / "tokenizer")
    model = build_model(dataclasses.replace(CONFIG, vocab_size=len(tokenizer)), seed=0)
    for name in ("good", "bad"):
        folder.save_model(model, tmp_path / name)
        tokenizer.save(tmp_path / name)
    weights = load_file(tmp_path / "bad" / "model.safetensors")
    save_file({key: value * 3 for key, value in weights.items()}, tmp_path / "bad" / "model.safetensors")
    text = str(corpus / "text")
    good, again, bad = (measure_parts(locate(tmp_path / name), data=text) for name in ("good", "good", "bad"))
    assert compare(good, again)["verdict"] == "no difference"
    assert compare(bad, good)["verdict"] == "higher" and good.part == "document"
    assert good.figures["loss"] == pytest.approx(good.nats.sum() / good.targets.sum(), rel=1e-5)
