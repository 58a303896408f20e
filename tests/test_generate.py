"""Drawing tokens, the cache that they come from, and the text that they make."""

import itertools
import random

import numpy as np
import pytest
import torch
import transformers
from test_families import CAUSAL, OURS, SIZES, equal, made, opened_by_transformers, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from llmkit.errors import DATA, MachineError, UserError
from llmkit.generation.generate import (
    apply_repetition_penalty,
    compile_decoding,
    decode_one_token,
    decode_until_stop,
    generate,
    logits_to_probs,
    prefill,
    sample,
    stream,
)
from llmkit.generation.sampling import Sampling
from llmkit.inference.writer import Writer, open_writer
from llmkit.models import build_model, folder, gpt2, llama
from llmkit.models.attention import KVCache
from llmkit.tokenizer.tokenizer import Tokenizer
from llmkit.tokenizer.train import train_tokenizer

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
        ({"top_p": 1e-9}, [0, 1, 0, 0]),
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
    """Return the probabilities of the four tokens, in the order of their ids."""
    tokens, probs = logits_to_probs(LOGITS[None], Sampling(**NEUTRAL | options))
    return torch.zeros(4).scatter(0, tokens[0], probs[0])


def test_logits_are_left_as_they_were():
    before = LOGITS.clone()
    probabilities(temperature=0.5, top_k=2, top_p=0.5)
    assert torch.equal(LOGITS, before)


PROCESSORS = {
    "repetition_penalty": transformers.RepetitionPenaltyLogitsProcessor,
    "temperature": transformers.TemperatureLogitsWarper,
    "top_k": transformers.TopKLogitsWarper,
    "top_p": transformers.TopPLogitsWarper,
    "min_p": transformers.MinPLogitsWarper,
}
STEPS = [
    {"repetition_penalty": 1.7}, {"repetition_penalty": 0.6}, {"temperature": 0.3}, {"temperature": 3.0}, {"top_k": 1},
    {"top_k": 7}, {"top_p": 0.2}, {"top_p": 0.9}, {"min_p": 0.05}, {"min_p": 0.9}, {"temperature": 2.0, "min_p": 0.3},
    {"top_k": 20, "top_p": 0.7}, {"top_p": 0.8, "min_p": 0.2}, {"repetition_penalty": 1.3, "temperature": 0.7},
    {"repetition_penalty": 1.2, "temperature": 0.8, "top_k": 30, "top_p": 0.95, "min_p": 0.02},
]  # fmt: skip


@pytest.mark.parametrize("options", STEPS, ids=str)
def test_every_step_of_sampling_is_transformers(options):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 60, generator=generator) * 3
    read = torch.randint(60, (5, 12), generator=generator)
    expected = logits.clone()
    for name, processor in PROCESSORS.items():
        if name in options:
            expected = processor(options[name])(read, expected)
    seen = torch.zeros(5, 60, dtype=torch.bool).scatter(1, read, True)
    drawn_from = apply_repetition_penalty(logits, seen, options.get("repetition_penalty", 1.0))
    ids, probs = logits_to_probs(drawn_from, Sampling(**NEUTRAL | options))
    got = torch.zeros(5, 60).scatter(1, ids, probs)
    torch.testing.assert_close(got, expected.softmax(-1), rtol=1e-5, atol=1e-6)


def draws(logits: torch.Tensor) -> list[int]:
    """Draw a token for each row, each with its own seed."""
    generators = [torch.Generator().manual_seed(row) for row in range(len(logits))]
    return sample(logits, Sampling(**NEUTRAL), generators).tolist()


def test_a_draw_does_not_hang_on_the_order_of_tokens_that_are_as_good_as_equal():
    """A batch and a single row round differently, by about a millionth."""
    noise = torch.tensor([1e-7, -1e-7, 0.0, 0.0])
    one, other = (draws((torch.zeros(4) + sign * noise).expand(200, -1)) for sign in (1, -1))
    assert one == other


def test_tokens_are_drawn_as_often_as_their_probability_says():
    drawn = draws(LOGITS.expand(4000, -1))
    shares = torch.tensor(drawn).bincount(minlength=4) / 4000
    assert (shares - LOGITS.exp()).abs().max() < 0.03  # four standard deviations


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
    assert drawn(model, top_k=1) == drawn(model, top_p=1e-9) == ids[3:] != drawn(model, temperature=5.0)


def test_a_stop_token_ends_the_text_and_is_not_in_it(model):
    whole = drawn(model)
    stop = whole[5]
    assert drawn(model, stop=frozenset([stop])) == whole[: whole.index(stop)]
    assert len(whole) == 20 and drawn(model, max_new_tokens=4) == whole[:4]


def test_the_penalty_falls_on_what_was_read_and_on_what_was_drawn(model):
    greedy = drawn(model, temperature=0, max_new_tokens=30)
    assert len(set(greedy)) < 30
    harsh = list(stream(model, [1, 2, 3], max_new_tokens=30, sampling=Sampling(0, repetition_penalty=100)))
    assert len({1, 2, 3, *harsh}) == min(40, 33)


# ---- the cache ------------------------------------------------------------------------------------------------------

DECODERS = CAUSAL | {name: config for name, config in OURS.items() if config.kind == "seq2seq"}
each_decoder = pytest.mark.parametrize("config", DECODERS.values(), ids=DECODERS)
FEW = ["gpt2", "llama_yarn", "mistral", "qwen2", "gemma", "falcon", "mixtral_window", "t5", "t5_v1.1"]
each_kind = pytest.mark.parametrize("config", [DECODERS[name] for name in FEW], ids=FEW)
WRITTEN = tokens(seed=3)  # (2, 24)


def cache_for(model, capacity: int = 32, **more) -> KVCache:
    """Return an empty cache. With an encoder, it holds the encoded texts."""
    config = model.config
    cache = KVCache(config.windows, 2, config.num_key_value_heads, capacity, config.head_dim, **more)
    if config.kind == "seq2seq":
        cache.encoded = model.encode(tokens())
    return cache


def uncached(model) -> torch.Tensor:
    """Return the logits (2, 24, V) of all tokens, from one forward pass."""
    return model(WRITTEN) if model.config.kind == "causal" else model(tokens(), decoder_input_ids=WRITTEN)


PIECES = {"odd": [9, 3, 1, 6, 1, 1, 3], "short": [2, 3, 1, 4, 14], "single": [1] * 24}


@each_decoder
@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
@torch.no_grad()
def test_cached_logits_equal_uncached(config, pieces):
    model = made(config)
    cache = cache_for(model)
    equal(torch.cat([model(piece, cache=cache) for piece in WRITTEN.split(pieces, 1)], dim=1), uncached(model))
    assert cache.length == 24


@each_decoder
@pytest.mark.parametrize("prompt", [1, 13])
@torch.no_grad()
def test_a_cache_of_one_shape_gives_the_same_logits(config, prompt):
    model = made(config)
    cache = cache_for(model)
    found = [model(WRITTEN[:, :prompt], cache=cache)]
    cache.resize(32)
    found += [model(token, cache=cache) for token in WRITTEN[:, prompt:].split(1, 1)]
    equal(torch.cat(found, dim=1), uncached(model))


def test_a_layer_with_a_window_keeps_no_more_than_the_window():
    cache = KVCache(OURS["qwen2"].windows, 1, 2, 32, 8)
    assert [layer.keys.shape[2] for layer in cache.layers] == [32, 5, 5]


def speaking(config) -> torch.nn.Module:
    """Return a model that does not repeat one token forever."""
    model = build_model(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = parameter.dim() == 1 and "bias" not in name
            parameter.normal_(1.0 if is_norm else 0.0, 0.3, generator=generator)
    return model.eval()


# ---- several prompts ------------------------------------------------------------------------------------------------

PROMPTS = [tokens(1, length, seed=length)[0].tolist() for length in (3, 14, 1, 8)]  # over every window, and under
GREEDY = Sampling(temperature=0)


@each_decoder
@torch.no_grad()
def test_prompts_of_different_lengths_have_their_own_logits(config):
    model = made(config)
    plain, one_shape, *alone = (
        prefill(model, prompts, 32, torch.float32) for prompts in (PROMPTS, PROMPTS, *([prompt] for prompt in PROMPTS))
    )
    one_shape[0].resize(32)
    for token in range(10):
        expected = torch.cat([logits for _, logits in alone])
        equal(plain[1], expected)
        equal(one_shape[1], expected)
        following = torch.tensor([token * 3 + row for row in range(4)])
        plain, one_shape = ((cache, decode_one_token(model, following, cache)) for cache in (plain[0], one_shape[0]))
        alone = [(own, decode_one_token(model, one[None], own)) for (own, _), one in zip(alone, following, strict=True)]


@each_kind
@torch.no_grad()
def test_what_prompts_share_is_read_once(config, monkeypatch):
    """Eight prompts begin with the same tokens, and half of them are copies: as in groups of answers, or examples."""
    model, read = made(config), []
    stack = model.encoder if config.kind == "seq2seq" else model
    stack.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[:2].numel()))
    common = tokens(1, 6, seed=5)[0].tolist()
    prompts = [common + prompt for prompt in PROMPTS for _ in range(2)]
    alone = [prefill(model, [prompt], 32, torch.float32) for prompt in prompts]
    read.clear()
    monkeypatch.setattr("llmkit.generation.generate.SHARED_TOKENS", 4)
    cache, logits = prefill(model, prompts, 32, torch.float32)
    is_shared = config.kind == "causal" and not any(config.windows)
    assert sum(read) == (6 + 4 * 14 if is_shared else 4 * 20)
    for token in range(4):
        equal(logits, torch.cat([own for _, own in alone]))
        following = torch.tensor([token * 3 + row for row in range(8)])
        logits = decode_one_token(model, following, cache)
        alone = [(own, decode_one_token(model, one[None], own)) for (own, _), one in zip(alone, following, strict=True)]


@each_kind
@pytest.mark.parametrize("drawing", [{"temperature": 0}, {"repetition_penalty": 1.2}], ids=["greedy", "drawn"])
def test_a_prompt_has_the_same_text_alone_and_beside_others(config, drawing):
    model = speaking(config)
    options = {"sampling": Sampling(**{"temperature": 1.0, "top_k": None} | drawing), "max_new_tokens": 12}
    together = list(zip(*generate(model, PROMPTS, seed=7, **options), strict=True))
    assert len(together) == 4 and all(len(row) == 12 for row in together)
    for row, (prompt, text) in enumerate(zip(PROMPTS, together, strict=True)):
        assert list(text) == list(stream(model, prompt, seed=7 + row, **options))


def test_a_row_that_has_ended_gives_nothing_more_and_the_others_go_on():
    model = speaking(OURS["mistral"])
    options = {"sampling": Sampling(1.0, top_k=None), "max_new_tokens": 12}
    alone = [list(stream(model, prompt, seed=row, **options)) for row, prompt in enumerate(PROMPTS)]
    stop = frozenset([alone[0][4], alone[2][7]])
    expected = [list(itertools.takewhile(lambda token: token not in stop, text)) for text in alone]
    assert len({len(text) for text in expected}) > 1
    together = list(zip(*generate(model, PROMPTS, stop=stop, **options), strict=True))
    for text, row in zip(expected, together, strict=True):
        assert list(row) == text + [None] * (len(row) - len(text))
    assert len(together[0]) == max(map(len, expected))


def test_a_prompt_that_fills_all_positions_is_refused_and_others_end_where_they_end():
    model = made(gpt2.Config(**SIZES, max_position_embeddings=16))
    with pytest.raises(UserError) as caught:
        next(stream(model, list(range(16))))
    assert caught.value.code == DATA
    text = list(stream(model, list(range(12)), max_new_tokens=50, sampling=GREEDY))
    with torch.no_grad():
        assert text[-1] == model(torch.tensor([[*range(12), *text[:-1]]]))[0, -1].argmax()
    assert len(text) == 5  # the last one is read at no position


# ---- transformers ---------------------------------------------------------------------------------------------------


@each_kind
@torch.no_grad()
def test_greedy_text_equals_transformers(config, tmp_path):
    model = speaking(config)
    folder.save_model(model, tmp_path)
    theirs = opened_by_transformers(tmp_path)
    theirs.generation_config.update(eos_token_id=None, pad_token_id=0, bos_token_id=None, decoder_start_token_id=0)
    expected = theirs.generate(tokens(4, 9), do_sample=False, max_new_tokens=20, attention_mask=torch.ones(4, 9).long())
    ours = torch.tensor(list(generate(model, tokens(4, 9).tolist(), max_new_tokens=20, sampling=GREEDY))).T
    assert torch.equal(ours, expected[:, -20:])
    assert len(ours.unique()) > 4


@pytest.mark.parametrize("name", ["t5", "t5_v1.1"])
@torch.no_grad()
def test_t5s_answers_beside_longer_prompts_equal_transformers(name, tmp_path):
    model = speaking(OURS[name])
    folder.save_model(model, tmp_path)
    theirs = opened_by_transformers(tmp_path)
    theirs.generation_config.update(eos_token_id=None, pad_token_id=0, decoder_start_token_id=0)
    padded = torch.tensor([prompt + [0] * (14 - len(prompt)) for prompt in PROMPTS])
    mask = torch.tensor([[1] * len(prompt) + [0] * (14 - len(prompt)) for prompt in PROMPTS])
    expected = theirs.generate(padded, attention_mask=mask, do_sample=False, max_new_tokens=20)
    ours = torch.tensor(list(generate(model, PROMPTS, max_new_tokens=20, sampling=GREEDY))).T
    assert torch.equal(ours, expected[:, 1:])


# ---- compiled -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "four"])
@pytest.mark.parametrize("slots", [4, 256], ids=["growing", "large"])
def test_compiled_decoding_gives_the_same_tokens(monkeypatch, prompts, slots):
    monkeypatch.setattr("llmkit.generation.generate.STATIC_SLOTS", slots)
    config = llama.Config(**SIZES | {"num_hidden_layers": 1}, num_key_value_heads=2, max_position_embeddings=600)
    plain, compiled = speaking(config), speaking(config)
    compile_decoding(compiled)
    options = {"max_new_tokens": 30, "sampling": GREEDY}
    text = list(generate(compiled, prompts, compiled=True, **options))
    assert text == list(generate(plain, prompts, **options)) and len({row[0] for row in text}) > 4


# ---- what a GPU needs -----------------------------------------------------------------------------------------------


class HostReads(TorchDispatchMode):
    """Count the times that the host reads a number, for which it would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return func(*args, **kwargs or {})


@each_kind
@torch.no_grad()
def test_a_static_cache_stays_where_it_is_and_the_host_reads_nothing_of_it(config):
    model = speaking(config)
    cache, _ = prefill(model, PROMPTS, 32, torch.float32)
    cache.resize(32)
    held = [(layer.keys, layer.values) for layer in cache.layers]
    places = []
    for token in range(6):
        with HostReads() as reads:
            decode_one_token(model, torch.tensor([token] * 4), cache)
        assert reads.count == 0 or config.model_type == "mixtral"  # a product of experts reads on a CPU
        pairs = [(layer.keys, layer.values) for layer in cache.layers]
        places.append([(x.shape, x.data_ptr()) for x in (*itertools.chain(*pairs), cache.length)])
    assert all(place == places[0] for place in places) and len(held) == len(cache.layers)
    assert cache.length.item() == (1 if config.kind == "seq2seq" else 14) + 6


def test_a_growing_static_cache_writes_the_same_text(monkeypatch):
    """Sizes double under a window's ring, rows of different lengths, and layers without a window."""
    monkeypatch.setattr("llmkit.generation.generate.STATIC_SLOTS", 4)
    for config in (OURS["qwen2"], OURS["mistral"], DECODERS["gpt2"]):
        model = speaking(config)
        options = {"sampling": GREEDY, "max_new_tokens": 30}
        expected = list(generate(model, PROMPTS, **options))
        assert list(generate(model, PROMPTS, compiled=True, **options)) == expected  # blocks that nobody compiled


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, top_k=20, top_p=0.9, min_p=0.01)], ids=["greedy", "drawn"])
def test_a_draw_never_waits_and_its_tokens_are_those_at_a_uniform_number(sampling):
    logits = torch.randn(4, 60, generator=torch.Generator().manual_seed(3)) * 3
    generators = [[torch.Generator().manual_seed(row) for row in range(4)] for _ in range(2)]
    with HostReads() as reads:
        drawn = sample(logits, sampling, generators[0])
    assert reads.count == 0
    if sampling is not GREEDY:
        tokens, probs = logits_to_probs(logits, sampling)
        uniform = [torch.rand(1, generator=one, dtype=torch.float64).item() for one in generators[1]]
        places = [np.searchsorted(row.double().cumsum(0), u) for row, u in zip(probs, uniform, strict=True)]
        assert drawn.tolist() == [row[place] for row, place in zip(tokens.tolist(), places, strict=True)]


def test_tokens_are_drawn_as_often_as_their_probabilities_say():
    logits = torch.tensor([4.0, 3.0, 2.5, 0.0, -30.0]).expand(20_000, 5)
    generators = [torch.Generator().manual_seed(row) for row in range(len(logits))]
    drawn = sample(logits, Sampling(1.0, top_k=None), generators).bincount(minlength=5) / len(logits)
    torch.testing.assert_close(drawn, logits[0].softmax(-1), rtol=0, atol=0.01)


def test_logits_that_are_not_finite_are_refused():
    model = speaking(DECODERS["gpt2"])
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        next(stream(model, [1, 2, 3]))


# ---- pieces of text -------------------------------------------------------------------------------------------------

TEXT = "Hello wörld, naïve café 日本語 🎉👩‍👧 the river. It's a model; tokens!  two\n\nñandú Ωμέγα \ufffd end"
EVERYDAY = "the a one model token reads the river, it's a model"


@pytest.fixture(scope="module", params=["bpe", "unigram", "char"])
def tokenizer(request) -> Tokenizer:
    """Return a tokenizer with few tokens besides the bytes: most characters of TEXT are several tokens."""
    return train_tokenizer([EVERYDAY] * 50, request.param, vocab_size=300)


def test_pieces_are_whole_characters_and_make_the_text(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert len(ids) > len(EVERYDAY)
    pieces = list(decode_until_stop(tokenizer, [], ids))
    assert "".join(pieces) == TEXT == tokenizer.decode(ids)
    assert len(pieces) > 40 and "\ufffd" not in "".join(pieces).replace(" \ufffd ", "")


@pytest.mark.parametrize("begin", [0, 1, 9, 24, 33, 60])
def test_pieces_go_on_where_the_prompt_ends(tokenizer, begin):
    prompt, ids = tokenizer.encode(TEXT[:begin]), tokenizer.encode(TEXT[begin:])
    assert "".join(decode_until_stop(tokenizer, prompt, ids)) == TEXT[begin:]


def test_a_text_that_ends_in_half_a_character_ends_before_it(tokenizer):
    ids = tokenizer.encode("ab🎉")
    assert "".join(decode_until_stop(tokenizer, [], ids[:-1])) == "ab"


def test_bytes_that_are_no_character_stop_nothing(tokenizer):
    [newline], party, rest = tokenizer.encode("\t"), tokenizer.encode("🎉"), tokenizer.encode("river")
    text = "".join(decode_until_stop(tokenizer, [], [*rest, newline, party[0], *rest]))
    assert text.startswith("river") and text.endswith("river")


def test_any_tokens_have_a_text(tokenizer):
    draw, late = random.Random(5), "ByteFallback" in tokenizer.rust.to_str()
    for _ in range(200):
        ids = draw.choices(range(len(tokenizer)), k=12)
        whole, pieces = tokenizer.decode(ids), "".join(decode_until_stop(tokenizer, [], ids))
        assert whole.startswith(pieces) or (late and "\ufffd" in whole)  # a byte may take back those before it


STOPS = [
    ["river"], ["r. It"], [" "], ["naïve café"], ["👧"], ["\n\n"], ["nowhere"], ["ver. I", "nowhere"], ["l;", "two"],
    ["lo wx", "lo wör"], ["  two", " model"], ["e 日"], ["end"], ["end of all"], ["d", "e"],
]  # fmt: skip


@pytest.mark.parametrize("stop", STOPS, ids=str)
def test_a_text_ends_before_the_first_stop_string_however_tokens_cut_it(tokenizer, stop):
    places = [place for word in stop if (place := TEXT.find(word)) >= 0]
    expected = TEXT[: min(places)] if places else TEXT
    assert "".join(decode_until_stop(tokenizer, [], tokenizer.encode(TEXT), stop)) == expected


def test_what_may_begin_a_stop_string_waits_and_comes_when_it_does_not():
    letters = train_tokenizer(["abc"], "char", vocab_size=270)
    draw = random.Random(6)
    for _ in range(300):
        text, stop = ("".join(draw.choices("ab", k=k)) for k in (12, draw.randint(1, 5)))
        expected = text[: text.find(stop)] if stop in text else text
        assert "".join(decode_until_stop(letters, [], letters.encode(text), [stop])) == expected
    assert list(decode_until_stop(letters, [], letters.encode("abaca"), ["abc"])) == ["ab", "ac", "a"]


def test_no_token_is_drawn_after_a_stop_string():
    letters = train_tokenizer(["abc"], "char", vocab_size=270)
    drawn = iter(letters.encode("aabbabcc"))
    assert "".join(decode_until_stop(letters, [], drawn, ["bb"])) == "aa"
    assert letters.decode(drawn) == "abcc"


# ---- a writer -------------------------------------------------------------------------------------------------------


def writer_of(config_type=llama.Config, **options) -> Writer:
    tokenizer = train_tokenizer([EVERYDAY] * 50, vocab_size=270)
    sizes = SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": 64} | options
    return Writer(speaking(config_type(**sizes)), tokenizer, compiled=False)


QUESTIONS = ["the river", "a", "it's a model"]
DRAWN = Sampling(1.0, top_k=None)


@pytest.mark.parametrize("config_type", [llama.Config, type(OURS["t5"])], ids=["llama", "t5"])
@pytest.mark.parametrize("stop", [[], ["e"], ["o", "<|im_start|>"]], ids=str)
def test_several_texts_are_each_what_they_are_alone(config_type, stop):
    writer = writer_of(config_type)
    prompts = [writer.encode(text) for text in QUESTIONS]
    options = {"sampling": DRAWN, "max_new_tokens": 30, "stop": stop}
    together = writer.write(prompts, seed=4, **options)
    for row, (prompt, text) in enumerate(zip(prompts, together, strict=True)):
        [alone] = writer.write([prompt], seed=4 + row, **options)
        assert list(text) == list(alone)
        assert (text.tokens, text.ended) == (alone.tokens, alone.ended)


@pytest.mark.parametrize("config_type", [llama.Config, type(OURS["t5"])], ids=["llama", "t5"])
def test_decoding_is_compiled_only_where_compiled_blocks_write(tmp_path, config_type):
    writer = writer_of(config_type)
    folder.save_model(writer.model, tmp_path)
    writer.tokenizer.save(tmp_path)
    is_decoder = config_type is llama.Config
    for prompts, compiled in ((1, is_decoder), (4, is_decoder), (5, False)):
        options = {"precision": "bf16", "prompts": prompts, "say": [].append}
        assert open_writer(str(tmp_path), expected_tokens=10**9, **options).compiled is compiled
        if not compiled:
            with pytest.raises(MachineError, match="only a decoder's texts, at most 4"):
                open_writer(str(tmp_path), compile=True, **options)


def test_a_text_says_how_it_ended_and_what_was_drawn():
    writer = writer_of()
    prompt, options = writer.encode("the river"), {"sampling": DRAWN, "max_new_tokens": 30}
    [whole] = writer.write([prompt], **options)
    said = "".join(whole)
    assert whole.ended == "length" and len(whole.tokens) == 30
    assert said == writer.tokenizer.decode(prompt + whole.tokens)[len("the river") :].rstrip("\ufffd")
    [cut] = writer.write([prompt], stop=[said[5]], **options)
    assert "".join(cut) == said[: said.find(said[5])] and cut.ended == "stop"
    assert cut.tokens == whole.tokens[: len(cut.tokens)] and len(cut.tokens) < 30
    last = next(i for i in range(29, 0, -1) if whole.tokens[i] not in whole.tokens[:i])
    writer.tokenizer.eos_id = whole.tokens[last]
    [ended] = writer.write([prompt], **options)
    until = writer.tokenizer.decode(prompt + whole.tokens[:last])[len("the river") :]
    assert "".join(ended) == until.rstrip("\ufffd")
    assert ended.ended == "stop" and ended.tokens == whole.tokens[:last]


@pytest.mark.parametrize("at", range(5))
def test_an_end_token_is_seen_up_to_the_last_position(at):
    writer = writer_of(max_position_embeddings=16)
    prompt, options = writer.encode("river " * 12)[:12], {"sampling": DRAWN, "max_new_tokens": 30}
    writer.tokenizer.eos_id = -1  # nothing ends it
    [whole] = writer.write([prompt], **options)
    list(whole)
    assert whole.ended == "length" and len(whole.tokens) == 5 == len(set(whole.tokens))
    writer.tokenizer.eos_id = whole.tokens[at]
    [ended] = writer.write([prompt], **options)
    list(ended)
    assert (ended.ended, ended.tokens) == ("stop", whole.tokens[:at])
