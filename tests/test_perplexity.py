"""Perplexity: the same number for every batch size, and transformers' own sliding window's."""

import math

import numpy as np
import pytest
import torch
import transformers

from llmkit.evals.perplexity import windows
from llmkit.models import build_model, folder, llama
from llmkit.objectives.lm import perplexity
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
