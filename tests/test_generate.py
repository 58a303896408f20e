"""Drawing tokens: the distribution by hand, and what seeds and stop tokens do to the text."""

import pytest
import torch

from llmkit.generate import Sampling, logits_to_probs, stream
from llmkit.models import build_model, llama

# ---- probabilities --------------------------------------------------------------------------------------------------

NEUTRAL = {"temperature": 1.0, "top_k": None}
LOGITS = torch.tensor([0.15, 0.5, 0.1, 0.25]).log()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.15, 0.5, 0.1, 0.25]),
        ({"temperature": 0.5}, [0.0225 / 0.345, 0.25 / 0.345, 0.01 / 0.345, 0.0625 / 0.345]),  # squares, normalized
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_k": 9}, [0.15, 0.5, 0.1, 0.25]),
        ({"top_p": 0.0}, [0, 1, 0, 0]),
        ({"top_p": 0.45}, [0, 1, 0, 0]),
        ({"top_p": 0.7}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_p": 0.8}, [0.15 / 0.9, 0.5 / 0.9, 0, 0.25 / 0.9]),
        ({"top_k": 2, "top_p": 0.6}, [0, 1, 0, 0]),  # top_p is a share of what top_k left
        ({"temperature": 0.5, "top_p": 0.7}, [0, 1, 0, 0]),
    ],
    ids=str,
)
def test_probabilities_by_hand(options, expected):
    torch.testing.assert_close(probabilities(**options), torch.tensor(expected, dtype=torch.float32))


def probabilities(**options) -> torch.Tensor:
    """Of the four tokens, in their own order."""
    tokens, probs = logits_to_probs(LOGITS[None], Sampling(**NEUTRAL | options))
    return torch.zeros(4).scatter(0, tokens[0], probs[0])


def test_logits_are_left_as_they_were():
    before = LOGITS.clone()
    probabilities(temperature=0.5, top_k=2, top_p=0.5)
    assert torch.equal(LOGITS, before)


# ---- text -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    config = llama.Config(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32
    )
    return build_model(config, device=torch.device("cpu"), seed=0)


def drawn(model, **options) -> list[int]:
    how = {key: options.pop(key) for key in ("temperature", "top_k", "top_p") if key in options}
    return list(stream(model, [1, 2, 3], sampling=Sampling(**how), **{"max_new_tokens": 20} | options))


def test_a_seed_fixes_the_text_and_the_global_rng_stands_still(model):
    torch.manual_seed(1)
    one = drawn(model, seed=7)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert drawn(model, seed=7) == one != drawn(model, seed=8)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_temperature_zero_is_the_likeliest_token_of_the_whole_text(model):
    ids = [1, 2, 3, *drawn(model, temperature=0)]
    with torch.no_grad():
        likeliest = model(torch.tensor([ids]))[0].argmax(-1).tolist()
    assert ids[3:] == likeliest[2:-1]
    assert drawn(model, top_k=1) == drawn(model, top_p=0.0) == ids[3:] != drawn(model, temperature=5.0)


def test_a_stop_token_ends_the_text_and_is_not_in_it(model):
    whole = drawn(model)
    stop = whole[5]
    assert drawn(model, stop=frozenset([stop])) == whole[: whole.index(stop)]
    assert len(whole) == 20 and drawn(model, max_new_tokens=4) == whole[:4]
