"""Every model family against transformers: weights, config fields, experts, sizes, and who sees whom."""

import itertools
import json
import math
from dataclasses import asdict, fields, replace

import peft
import pytest
import torch
import transformers
from conftest import randomized
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llmkit.errors import MODEL, UserError
from llmkit.models import (
    FAMILIES,
    bert,
    build_model,
    falcon,
    family_of,
    folder,
    gemma,
    gpt2,
    llama,
    mistral,
    mixtral,
    qwen2,
    qwen3,
    shape_problems,
    t5,
)
from llmkit.models.family import MOST, MOST_BY_FIELD
from llmkit.models.layers import rope_table
from llmkit.models.mixtral import balance_loss
from llmkit.objectives.lm import sum_of_losses
from llmkit.parallel.compile import compile_obstacle
from llmkit.peft import lora
from llmkit.peft.adapter import load_adapter, save_adapter
from llmkit.training.cost import Lengths, flops_per_row, parameters_by_part
from llmkit.types import IGNORE_INDEX

LENGTH = 24  # of the texts: over every window, and over the context that rope scaling begins with
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
WIDE_YARN = YARN | {"beta_fast": 4.0, "beta_slow": 0.5, "attention_factor": 1.3}
LINEAR = {"rope_type": "linear", "factor": 3.0}

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
DEEP = SIZES | {"intermediate_size": 48, "max_position_embeddings": 64}
GROUPED = DEEP | {"num_key_value_heads": 2}
T5_SIZES = DEEP | {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}

OURS = {
    "gpt2": gpt2.Config(**SIZES, max_position_embeddings=64, layer_norm_epsilon=1e-3),
    "gpt2_untied": gpt2.Config(**DEEP, tie_word_embeddings=False),
    "llama": llama.Config(**GROUPED, rope_theta=5e5, rms_norm_eps=1e-3),
    "llama_biases": llama.Config(**GROUPED, attention_bias=True, mlp_bias=True, hidden_act="gelu_pytorch_tanh"),
    "llama_relu2": llama.Config(**DEEP, hidden_act="relu2", tie_word_embeddings=True, head_dim=16),
    "llama_llama3": llama.Config(**GROUPED, rope_scaling=LLAMA3, rope_theta=5e5, head_dim=16),
    "llama_yarn": llama.Config(**GROUPED, rope_scaling=YARN, head_dim=16),
    "llama_wide_yarn": llama.Config(**GROUPED, rope_scaling=WIDE_YARN, head_dim=16),
    "llama_linear": llama.Config(**GROUPED, rope_scaling=LINEAR),
    "mistral": mistral.Config(**GROUPED, sliding_window=5, head_dim=16),
    "mistral_no_window": mistral.Config(**GROUPED, sliding_window=None),
    "qwen2": qwen2.Config(**GROUPED, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen2_all_windows": qwen2.Config(**GROUPED, use_sliding_window=True, sliding_window=5, max_window_layers=0),
    "qwen2_no_window": qwen2.Config(**GROUPED, tie_word_embeddings=True, rope_theta=1e6),
    "qwen3": qwen3.Config(**GROUPED, head_dim=16, rms_norm_eps=1e-3),
    "qwen3_biases": qwen3.Config(**GROUPED, attention_bias=True, head_dim=8, use_sliding_window=True, sliding_window=5,
                                 max_window_layers=2),
    "gemma": gemma.Config(**DEEP, num_key_value_heads=1, head_dim=16),
    "gemma_untied": gemma.Config(**DEEP, tie_word_embeddings=False, attention_bias=True),
    "falcon": falcon.Config(**DEEP, rope_theta=500.0),
    "falcon_biases": falcon.Config(**SIZES, max_position_embeddings=64, bias=True, tie_word_embeddings=False),
    "mixtral": mixtral.Config(**GROUPED, num_local_experts=5, num_experts_per_tok=2),
    "mixtral_window": mixtral.Config(**GROUPED, num_local_experts=3, num_experts_per_tok=3, sliding_window=5,
                                     hidden_act="gelu"),
    "bert": bert.Config(**DEEP, layer_norm_eps=1e-3, type_vocab_size=3),
    "bert_relu": bert.Config(**SIZES, max_position_embeddings=64, hidden_act="relu"),
    "t5": t5.Config(**T5_SIZES, feed_forward_proj="relu"),
    "t5_v1.1": t5.Config(**T5_SIZES, tie_word_embeddings=False, num_decoder_layers=2, head_dim=16),
    "t5_silu": t5.Config(**SIZES, feed_forward_proj="gated-silu", layer_norm_epsilon=1e-3),
}  # fmt: skip
CAUSAL = {name: config for name, config in OURS.items() if config.kind == "causal"}
each_config = pytest.mark.parametrize("config", OURS.values(), ids=OURS)
each_decoder = pytest.mark.parametrize("config", CAUSAL.values(), ids=CAUSAL)


def tokens(rows: int = 2, length: int = LENGTH, seed: int = 2) -> torch.Tensor:
    return torch.randint(61, (rows, length), generator=torch.Generator().manual_seed(seed))


def equal(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def made(config) -> torch.nn.Module:
    return randomized(build_model(config))


def decoder_ids(model) -> dict[str, torch.Tensor]:
    """Return the arguments of a forward pass besides input_ids."""
    seq2seq = getattr(model.config, "kind", None) == "seq2seq" or getattr(model.config, "is_encoder_decoder", False)
    return {"decoder_input_ids": tokens(length=11, seed=3)} if seq2seq else {}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    """Return the logits of the texts, by our model or by transformers'."""
    out = model(tokens(), **decoder_ids(model))
    return out if isinstance(out, torch.Tensor) else out.logits


def opened_by_transformers(path) -> torch.nn.Module:
    """Open a folder with transformers, which must find every weight of the model."""
    architecture = transformers.AutoConfig.from_pretrained(path).architectures[0]
    model, info = getattr(transformers, architecture).from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


# ---- what we write --------------------------------------------------------------------------------------------------


@each_config
def test_transformers_opens_what_we_save_with_equal_logits(config, tmp_path):
    ours = made(config)
    folder.save_model(ours, tmp_path)
    equal(logits(opened_by_transformers(tmp_path)), logits(ours))


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_and_we_open_shards_of_ours_with_equal_logits(name, tmp_path, monkeypatch):
    config = OURS[name]
    monkeypatch.setattr(folder, "MAX_SHARD_BYTES", 20_000)
    ours = made(config)
    folder.save_model(ours, tmp_path)
    shards = {path.name for path in tmp_path.glob("*.safetensors")}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(shards) > 2 and set(index["weight_map"].values()) == shards
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in ours.parameters())
    equal(logits(opened_by_transformers(tmp_path)), logits(ours))
    assert torch.equal(logits(folder.load_model(tmp_path).eval()), logits(ours))


@each_config
def test_a_config_survives_saving_and_reading(config, tmp_path):
    folder.save_model(build_model(config), tmp_path)
    assert folder.read_config(tmp_path) == config


# ---- what transformers writes ---------------------------------------------------------------------------------------

QWEN = {"use_sliding_window": True, "sliding_window": 5}
T5_HF = {
    "vocab_size": 61, "d_model": 32, "num_layers": 3, "num_heads": 4, "d_ff": 48, "d_kv": 8,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "decoder_start_token_id": 0,
}  # fmt: skip
GPT2_HF = {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
FALCON_HF = {**SIZES, "max_position_embeddings": 64}
THEIRS = {
    "gpt2": (transformers.GPT2Config, GPT2_HF | {"n_inner": 40, "layer_norm_epsilon": 1e-3}),
    "llama": (transformers.LlamaConfig, GROUPED | {"attention_bias": True, "mlp_bias": True, "hidden_act": "relu"}),
    "llama_wide_heads": (transformers.LlamaConfig, DEEP | {"head_dim": 16, "tie_word_embeddings": True}),
    "llama_llama3": (transformers.LlamaConfig, GROUPED | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}),
    "llama_yarn": (transformers.LlamaConfig, GROUPED | {"rope_parameters": YARN | {"rope_theta": 1e4}}),
    "llama_linear": (transformers.LlamaConfig, GROUPED | {"rope_parameters": LINEAR | {"rope_theta": 1e4}}),
    "mistral": (transformers.MistralConfig, GROUPED | {"sliding_window": 5}),
    "qwen2": (transformers.Qwen2Config, GROUPED | QWEN | {"max_window_layers": 2}),
    "qwen2_no_window": (transformers.Qwen2Config, GROUPED),
    "qwen3": (transformers.Qwen3Config, GROUPED | {"head_dim": 16}),
    "qwen3_window": (transformers.Qwen3Config, GROUPED | QWEN | {"max_window_layers": 1, "attention_bias": True}),
    "gemma": (transformers.GemmaConfig, GROUPED | {"head_dim": 16}),
    "falcon": (transformers.FalconConfig, FALCON_HF | {"bias": True}),
    "falcon_narrow": (transformers.FalconConfig, FALCON_HF | {"ffn_hidden_size": 40, "num_kv_heads": 1}),
    "mixtral": (transformers.MixtralConfig, GROUPED | {"num_local_experts": 5}),
    "mixtral_window": (transformers.MixtralConfig, GROUPED | {"num_local_experts": 3, "sliding_window": 5}),
    "bert": (transformers.BertConfig, DEEP | {"type_vocab_size": 3, "hidden_act": "silu"}),
    "t5": (transformers.T5Config, T5_HF),
    "t5_v1.1": (
        transformers.T5Config,
        T5_HF | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 2},
    ),
}
HEADS = {"bert": transformers.AutoModelForMaskedLM, "t5": transformers.AutoModelForSeq2SeqLM}


def theirs_of(name: str) -> torch.nn.Module:
    made_by, options = THEIRS[name]
    head = HEADS.get(made_by.model_type, transformers.AutoModelForCausalLM)
    return randomized(head.from_config(made_by(**options)))


@pytest.mark.parametrize("shards", ["5GB", "20KB"])
@pytest.mark.parametrize("name", THEIRS)
def test_we_open_what_transformers_saves_with_equal_logits(name, shards, tmp_path):
    theirs = theirs_of(name)
    theirs.save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "20KB")
    equal(logits(folder.load_model(tmp_path).eval()), logits(theirs))


@pytest.mark.parametrize("name", [name for name in THEIRS if not name.startswith("mixtral")])  # which are further down
def test_gradients_equal_transformers(name, tmp_path):
    theirs = theirs_of(name)
    theirs.save_pretrained(tmp_path)
    ours, theirs = folder.load_model(tmp_path).eval().double(), theirs.double()
    out = theirs(tokens(), **decoder_ids(theirs)).logits
    labels = tokens(length=out.shape[1], seed=5)
    labels[:, ::3] = IGNORE_INDEX
    torch.nn.functional.cross_entropy(out.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    ours(tokens(), labels, **decoder_ids(ours)).backward()
    wanted = {path: parameter.grad for path, parameter in theirs.named_parameters()}
    if name == "t5_v1.1":  # transformers has but one matrix, until it reads files with two
        ours.shared.weight.grad += ours.lm_head.weight.grad
        ours.lm_head = None
    near = 2e-4 if name == "t5" else 1e-5  # older transformers have float32 in a T5's softmax
    for path, parameter in ours.named_parameters():
        for disk, grad in family_of(ours.config).disk_views(path, parameter.grad).items():
            nothing = near * wanted[disk].abs().max().item() + 1e-12  # a BERT's key biases have no gradient at all
            torch.testing.assert_close(grad, wanted[disk], rtol=1e-4, atol=nothing, msg=disk)


@torch.no_grad()
def test_windows_that_are_shorter_than_the_text_change_the_logits():
    for name in ("mistral", "qwen2", "mixtral_window"):
        wide = replace(OURS[name], sliding_window=None) if name != "qwen2" else OURS["qwen2_no_window"]
        wide = replace(wide, tie_word_embeddings=False, rope_theta=OURS[name].rope_theta)
        narrow_logits, wide_logits = logits(made(OURS[name])), logits(made(wide))
        torch.testing.assert_close(narrow_logits[:, :5], wide_logits[:, :5], rtol=1e-5, atol=1e-5)
        assert (narrow_logits[:, 5:] - wide_logits[:, 5:]).abs().amax(-1).min() > 1e-4


# ---- padding and token types ----------------------------------------------------------------------------------------

REAL = torch.arange(LENGTH) < torch.tensor([[LENGTH - 9], [LENGTH]])  # (2, LENGTH) which tokens are not padding
SEGMENTS = REAL.long() - 1  # 0, and -1 where padded
TYPES = (torch.arange(LENGTH) >= 7).long().expand(2, -1) + (torch.arange(LENGTH) >= 12).long()  # 0, 1, 2


@pytest.mark.parametrize("types", [None, TYPES], ids=["no_types", "types"])
@torch.no_grad()
def test_bert_beside_padding_and_with_token_types_equals_transformers(types, tmp_path):
    theirs = theirs_of("bert")
    theirs.save_pretrained(tmp_path)
    ours = folder.load_model(tmp_path).eval()
    expected = theirs(tokens(), attention_mask=REAL.long(), token_type_ids=types).logits
    got = ours(tokens(), segments=SEGMENTS, token_type_ids=types)
    equal(got[REAL], expected[REAL])
    assert (got - ours(tokens()))[0, : LENGTH - 9].abs().max() > 1e-3  # padding, or types, that are no tokens


@pytest.mark.parametrize("name", ["t5", "t5_v1.1"])
@torch.no_grad()
def test_t5_beside_padding_equals_transformers(name, tmp_path):
    theirs = theirs_of(name)
    theirs.save_pretrained(tmp_path)
    ours = folder.load_model(tmp_path).eval()
    expected = theirs(tokens(), attention_mask=REAL.long(), **decoder_ids(theirs)).logits
    got = ours(tokens(), segments=SEGMENTS, **decoder_ids(ours))
    equal(got, expected)
    equal(ours.encode(tokens()[:1, : LENGTH - 9])[0], ours.encode(tokens(), SEGMENTS)[0, : LENGTH - 9])
    assert (got - ours(tokens(), **decoder_ids(ours)))[0].abs().max() > 1e-4


@pytest.mark.parametrize("name", ["bert", "t5", "t5_v1.1"])
def test_losses_equal_transformers(name, tmp_path):
    theirs = theirs_of(name)
    theirs.save_pretrained(tmp_path)
    ours = folder.load_model(tmp_path).eval()
    labels = tokens(seed=5)[:, : logits(ours).shape[1]].clone()
    labels[:, ::3] = IGNORE_INDEX
    expected = theirs(tokens(), labels=labels, **decoder_ids(theirs)).loss
    got = ours(tokens(), labels, **decoder_ids(ours)) / (labels != IGNORE_INDEX).sum()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# ---- spellings of a config.json -------------------------------------------------------------------------------------


def write_config(path, **fields) -> None:
    """Write a config.json with these fields; None is written as null."""
    (path / "config.json").write_text(json.dumps(fields))


BASE = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 64}  # fmt: skip
OLD_LLAMA3 = {key: value for key, value in LLAMA3.items() if key != "rope_type"} | {"type": "llama3"}
ROPES = {
    "nothing": {},
    "old": {"rope_theta": 123.0},
    "old_null": {"rope_theta": 123.0, "rope_scaling": None},
    "old_linear": {"rope_theta": 123.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "old_whole_factor": {"rope_scaling": {"type": "linear", "factor": 2}},
    "old_both_names": {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}},
    "old_default": {"rope_theta": 123.0, "rope_scaling": {"rope_type": "default"}},
    "old_llama3": {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    "old_type_llama3": {"rope_theta": 5e5, "rope_scaling": OLD_LLAMA3},
    "old_yarn": {"rope_theta": 123.0, "rope_scaling": YARN},
    "old_yarn_of_all_positions": {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    "yarn_of_its_authors": {"rope_scaling": {"type": "yarn", "factor": 4.0, "finetuned": True}},
    "yarn_like_deepseeks": {"rope_scaling": YARN | {"mscale": 0.8, "mscale_all_dim": 1.2}},
    "yarn_of_parts": {"rope_scaling": YARN | {"truncate": False}},
    "yarn_with_the_length_beside_it": {"rope_scaling": YARN, "original_max_position_embeddings": 32},
    "llama3_with_the_length_beside_it": {"rope_scaling": LLAMA3, "original_max_position_embeddings": 32},
    "default_of_yarns_authors": {"rope_scaling": {"type": "default", "finetuned": True}},
    "new": {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}},
    "new_no_theta": {"rope_parameters": {"rope_type": "default"}},
    "new_linear": {"rope_parameters": LINEAR | {"rope_theta": 123.0}},
    "new_llama3": {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
    "new_yarn": {"rope_parameters": WIDE_YARN | {"rope_theta": 123.0}},
    "new_null": {"rope_parameters": None},
    "both": {"rope_theta": 123.0, "rope_scaling": LINEAR, "rope_parameters": LINEAR | {"rope_theta": 123.0}},
    "theta_twice": {"rope_theta": 77.0, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
}
ROTARY = {
    "llama": transformers.models.llama.modeling_llama.LlamaRotaryEmbedding,
    "qwen2": transformers.models.qwen2.modeling_qwen2.Qwen2RotaryEmbedding,
    "gemma": transformers.models.gemma.modeling_gemma.GemmaRotaryEmbedding,
    "falcon": transformers.models.falcon.modeling_falcon.FalconRotaryEmbedding,
    "mixtral": transformers.models.mixtral.modeling_mixtral.MixtralRotaryEmbedding,
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize("family", ROTARY)
def test_every_spelling_of_rotary_positions_means_what_transformers_means(family, rope, tmp_path):
    known = {field.name for field in fields(FAMILIES[family].config)}
    size = {key: value for key, value in BASE.items() if key in known}
    write_config(tmp_path, model_type=family, **size, **rope)
    ours = folder.read_config(tmp_path)
    positions = torch.arange(64)
    theirs = ROTARY[family](transformers.AutoConfig.from_pretrained(tmp_path))(torch.zeros(1), positions[None])
    table = rope_table(positions, ours.head_dim, ours.rope_theta, ours.rope_scaling)
    for one, other in zip(table, theirs, strict=True):
        torch.testing.assert_close(one, other[0], rtol=1e-5, atol=1e-5)


GEMMA_ACTS = [{}, {"hidden_act": "gelu"}, {"hidden_act": "gelu", "hidden_activation": None},
              {"hidden_act": "gelu_pytorch_tanh"}, {"hidden_activation": "gelu_pytorch_tanh"},
              {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}]  # fmt: skip


@pytest.mark.parametrize("fields", GEMMA_ACTS, ids=str)
def test_gemmas_gelu_is_the_one_by_tanh_however_it_is_spelt(fields, tmp_path):
    write_config(tmp_path, model_type="gemma", **BASE, **fields)
    assert folder.read_config(tmp_path).hidden_act == "gelu_pytorch_tanh"
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    exact = [int(part) for part in transformers.__version__.split(".")[:2]] < [5, 18]  # it left "gelu" as it was
    assert theirs.hidden_act == "gelu_pytorch_tanh" or (exact and theirs.hidden_act == "gelu")


FULL, SLIDING = "full_attention", "sliding_attention"
WINDOWS = {
    "nothing": {},
    "off": {"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 0},
    "off_null": {"use_sliding_window": False, "sliding_window": None, "layer_types": [FULL] * 4},
    "on": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "on_over_all": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 9},
    "on_at_no_layer": {"use_sliding_window": True, "sliding_window": 5, "layer_types": [FULL] * 4},
    "on_null": {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
    "types": {"use_sliding_window": True, "sliding_window": 5, "layer_types": [FULL, SLIDING, SLIDING, SLIDING]},
    "types_repeat": {
        "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3, "layer_types": [FULL] * 3 + [SLIDING],
    },
    "types_null": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3, "layer_types": None},
}  # fmt: skip


def windows_of(theirs) -> list[int | None]:
    """Return the window of each layer, as transformers' models read their config."""
    return [theirs.sliding_window if kind == SLIDING else None for kind in theirs.layer_types]


@pytest.mark.parametrize("fields", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwens_windows_are_those_that_transformers_reads(family, fields, tmp_path):
    write_config(tmp_path, model_type=family, **BASE, **fields)
    assert folder.read_config(tmp_path).windows == windows_of(transformers.AutoConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize("name", ["t5", "t5_v1.1"])
@pytest.mark.parametrize("silent", [["scale_decoder_outputs"], ["scale_decoder_outputs", "pad_token_id"]], ids=str)
def test_t5_opens_as_transformers_4_wrote_it(name, silent, tmp_path):
    ours = made(OURS[name])
    folder.save_model(ours, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    write_config(tmp_path, **{key: value for key, value in config.items() if key not in silent})
    assert torch.equal(logits(folder.load_model(tmp_path).eval()), logits(ours))
    equal(logits(opened_by_transformers(tmp_path)), logits(ours))


# ---- absent fields --------------------------------------------------------------------------------------------------

SPELT = {  # a config.json of each family with all that it may say, and no value that is the default
    "gpt2": {
        "vocab_size": 61, "n_positions": 64, "n_embd": 384, "n_layer": 3, "n_head": 64, "n_inner": 40,
        "resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3, "layer_norm_epsilon": 1e-3,
        "initializer_range": 0.03, "tie_word_embeddings": False,
    },
    "bert": {
        "vocab_size": 61, "hidden_size": 384, "num_hidden_layers": 3, "num_attention_heads": 64,
        "intermediate_size": 40, "hidden_act": "relu", "hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3,
        "max_position_embeddings": 64, "type_vocab_size": 3, "initializer_range": 0.03, "layer_norm_eps": 1e-3,
    },
    "t5": {
        "vocab_size": 61, "d_model": 384, "d_kv": 6, "d_ff": 40, "num_layers": 3, "num_decoder_layers": 2,
        "num_heads": 4, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20,
        "dropout_rate": 0.3, "layer_norm_epsilon": 1e-3, "feed_forward_proj": "gated-silu",
        "tie_word_embeddings": False, "decoder_start_token_id": 0,
    },
    "falcon": {
        "vocab_size": 61, "hidden_size": 9088, "num_hidden_layers": 3, "num_attention_heads": 142,
        "layer_norm_epsilon": 1e-3, "initializer_range": 0.03, "hidden_dropout": 0.3, "attention_dropout": 0.3,
        "max_position_embeddings": 64, "rope_theta": 123.0, "ffn_hidden_size": 40, "tie_word_embeddings": False,
        "bias": True,
    },
}  # fmt: skip
KIN = {
    "vocab_size": 61, "hidden_size": 384, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 64,
    "num_key_value_heads": 16, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.03,
    "rms_norm_eps": 1e-3, "rope_theta": 123.0, "attention_dropout": 0.3, "hidden_act": "relu",
    "tie_word_embeddings": True,
}  # fmt: skip
SPELT |= {
    "llama": KIN | {"attention_bias": True, "mlp_bias": True},
    "mistral": KIN | {"sliding_window": 5},
    "qwen2": {key: value for key, value in KIN.items() if key != "head_dim"} | QWEN | {"max_window_layers": 1},
    "qwen3": KIN | QWEN | {"max_window_layers": 1, "attention_bias": True},
    "gemma": KIN | {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": False, "attention_bias": True},
    "mixtral": KIN | {
        "sliding_window": 5, "num_local_experts": 5, "num_experts_per_tok": 3, "router_aux_loss_coef": 0.3,
    },
}  # fmt: skip
THEIR_NAMES = {  # of fields that are called otherwise there
    "gpt2": {"intermediate_size": "n_inner"},
    "falcon": {"intermediate_size": "ffn_hidden_size"},
    "t5": {"intermediate_size": "d_ff", "tie_word_embeddings": "scale_decoder_outputs"},
}
NOT_THEIRS = {  # fields of ours that have none there, or are compared as windows
    "init", "rope_theta", "rope_scaling", "use_sliding_window", "sliding_window", "max_window_layers",
}  # fmt: skip
NOT_THEIRS_IN = {"t5": {"max_position_embeddings", "initializer_range", "decoder_start_token_id"}}


def differing(ours, theirs) -> dict[str, tuple]:
    """Return the values of a config.json that we and transformers read differently."""
    family = ours.model_type
    names = {name: THEIR_NAMES.get(family, {}).get(name, name) for name in asdict(ours)}
    skipped = NOT_THEIRS | NOT_THEIRS_IN.get(family, set())
    pairs = {
        name: (getattr(ours, name), getattr(theirs, there, None))
        for name, there in names.items()
        if name not in skipped
    }
    if family == "gpt2" and theirs.n_inner is None:
        pairs["intermediate_size"] = (ours.intermediate_size, 4 * theirs.n_embd)
    if pairs.get("head_dim", (None, 0))[1] is None:
        pairs["head_dim"] = (ours.head_dim, theirs.hidden_size // theirs.num_attention_heads)
    if hasattr(ours, "rope_theta"):
        pairs["rope_theta"] = (ours.rope_theta, theirs.rope_parameters["rope_theta"])
    if family in ("qwen2", "qwen3"):
        pairs["windows"] = (ours.windows, windows_of(theirs))
    elif hasattr(ours, "sliding_window"):
        pairs["windows"] = (ours.windows, [theirs.sliding_window] * theirs.num_hidden_layers)
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


@pytest.mark.parametrize("family", SPELT)
def test_what_a_config_says_is_read_as_transformers_reads_it(family, tmp_path):
    write_config(tmp_path, model_type=family, **SPELT[family])
    assert differing(folder.read_config(tmp_path), transformers.AutoConfig.from_pretrained(tmp_path)) == {}


@pytest.mark.parametrize(("family", "field"), [(family, field) for family in SPELT for field in SPELT[family]])
def test_an_absent_field_means_what_transformers_means(family, field, tmp_path):
    write_config(tmp_path, model_type=family, **{k: v for k, v in SPELT[family].items() if k != field})
    if field == "vocab_size" and family != "bert":  # no size that one could guess
        refused(tmp_path, "vocab_size")
    else:
        assert differing(folder.read_config(tmp_path), transformers.AutoConfig.from_pretrained(tmp_path)) == {}


# ---- what is refused ------------------------------------------------------------------------------------------------


def refused(path, *words: str) -> None:
    """Assert that reading the folder's config raises a UserError with the right code that contains all `words`."""
    with pytest.raises(UserError) as caught:
        folder.read_config(path)
    assert caught.value.code == MODEL
    assert all(word in str(caught.value) for word in words), str(caught.value)


LONGROPE = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
REFUSED = {
    "gpt2_scaled_by_layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    "gpt2_unscaled": ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
    "gpt2_upcast": ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn"),
    "gpt2_cross": ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    "gpt2_activation": ("gpt2", {"activation_function": "relu"}, "activation_function"),
    "llama_dynamic": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    "llama_longrope": ("llama", {"rope_scaling": LONGROPE}, "longrope"),
    "llama_part": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "mistral_dynamic": ("mistral", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    "mistral_layers": ("mistral", {"layer_types": [FULL, SLIDING, FULL]}, "layer_types"),
    "qwen2_longrope": ("qwen2", {"rope_scaling": LONGROPE}, "longrope"),
    "qwen2_mixed": ("qwen2", QWEN | {"layer_types": [SLIDING, FULL, SLIDING]}, "layer_types"),
    "qwen3_mixed": ("qwen3", QWEN | {"layer_types": [FULL, SLIDING, FULL]}, "layer_types"),
    "qwen3_chunks": ("qwen3", {"layer_types": ["chunked_attention"] * 3}, "layer_types"),
    "gemma_both_ways": ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    "gemma_relu": ("gemma", {"hidden_act": "relu"}, "hidden_act"),
    "falcon_alibi": ("falcon", {"alibi": True}, "alibi"),
    "falcon_new": ("falcon", {"new_decoder_architecture": True}, "new_decoder_architecture"),
    "falcon_many_keys": ("falcon", {"multi_query": False}, "multi_query"),
    "falcon_serial": ("falcon", {"parallel_attn": False}, "parallel_attn"),
    "falcon_two_norms": ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn"),
    "falcon_activation": ("falcon", {"activation": "relu"}, "activation"),
    "mixtral_jitter": ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
    "bert_relative": ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
    "bert_decoder": ("bert", {"is_decoder": True}, "is_decoder"),
    "bert_cross": ("bert", {"add_cross_attention": True}, "add_cross_attention"),
    "bert_untied": ("bert", {"tie_word_embeddings": False}, "tie_word_embeddings"),
    "t5_activation": ("t5", {"feed_forward_proj": "gated-relu"}, "feed_forward_proj"),
    "t5_encoder_alone": ("t5", {"is_encoder_decoder": False}, "is_encoder_decoder"),
    "llama_experts": ("llama", {"num_local_experts": 4}, "num_local_experts"),
}  # fmt: skip


@pytest.mark.parametrize(("family", "fields", "name"), REFUSED.values(), ids=REFUSED)
def test_what_changes_the_mathematics_and_is_not_built_is_refused_by_name(family, fields, name, tmp_path):
    write_config(tmp_path, model_type=family, **SPELT[family])
    folder.read_config(tmp_path)
    write_config(tmp_path, model_type=family, **SPELT[family] | fields)
    refused(tmp_path, name)


TWICE = {  # a field in two spellings that disagree
    "width": ("gpt2", {"hidden_size": 32}, ("n_embd and hidden_size", "384 and 32")),
    "positions": ("gpt2", {"max_position_embeddings": 65}, ("n_positions and max_position_embeddings", "64 and 65")),
    "heads": ("t5", {"num_attention_heads": 8}, ("num_heads and num_attention_heads", "4 and 8")),
    "gate": ("t5", {"is_gated_act": False}, ("feed_forward_proj and is_gated_act",)),
    "t5_activation": ("t5", {"dense_act_fn": "relu"}, ("feed_forward_proj and dense_act_fn", "silu and relu")),
    "falcons_mlp": ("falcon", {"intermediate_size": 44}, ("ffn_hidden_size and intermediate_size", "40 and 44")),
    "gemmas_activation": ("gemma", {"hidden_activation": "silu"}, ("hidden_act and hidden_activation",)),
    "theta": ("llama", {"rope_parameters": {"rope_theta": 77.0}}, ("rope_theta and rope_parameters", "77.0")),
    "old_theta": ("mistral", {"rope_scaling": LINEAR | {"rope_theta": 9.0}}, ("rope_theta and rope_scaling",)),
    "factor": ("llama", {"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"factor": 4.0}}, ("3.0 and 4.0",)),
    "kind": ("qwen3", {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default"}}, ("linear and default",)),
    "kind_in_one": ("llama", {"rope_scaling": LINEAR | {"type": "yarn"}}, ("rope_scaling.type", "linear and yarn")),
    "windows": ("qwen2", {"layer_types": [FULL, FULL, SLIDING]}, ("max_window_layers and layer_types", "1, and 2 of")),
    "no_windows": (
        "qwen2", {"use_sliding_window": False, "layer_types": [FULL, SLIDING, SLIDING]},
        ("use_sliding_window and layer_types",),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("family", "fields", "words"), TWICE.values(), ids=TWICE)
def test_two_spellings_of_a_field_that_disagree_are_refused_by_name(family, fields, words, tmp_path):
    write_config(tmp_path, model_type=family, **SPELT[family] | fields)
    refused(tmp_path, "disagree", str(tmp_path / "config.json"), *words)


def test_two_spellings_of_a_field_that_agree_are_accepted(tmp_path):
    write_config(tmp_path, model_type="gpt2", **SPELT["gpt2"], hidden_size=384, num_hidden_layers=None)
    assert folder.read_config(tmp_path).hidden_size == 384
    repeated = {"num_layers": 3, "num_hidden_layers": 3, "dense_act_fn": "silu", "is_gated_act": True}
    write_config(tmp_path, model_type="t5", **SPELT["t5"] | repeated)
    assert folder.read_config(tmp_path).num_hidden_layers == 3


SENSELESS = {
    "types_of_fewer_layers": ("qwen2", QWEN | {"layer_types": [FULL, SLIDING]}, "layer_types"),
    "types_of_more_layers": ("qwen3", {"layer_types": [FULL] * 4}, "layer_types"),
    "one_bucket_a_direction": ("t5", {"relative_attention_num_buckets": 2}, "relative_attention_num_buckets"),
    "distances_below_the_exact_ones": ("t5", {"relative_attention_max_distance": 2}, "relative_attention_max_distance"),
    "no_base": ("llama", {"rope_theta": 0.0}, "rope_theta"),
    "more_taken_than_there_are": ("mixtral", {"num_experts_per_tok": 6}, "num_experts_per_tok"),
    "no_window": ("mistral", {"sliding_window": 0}, "sliding_window"),
    "window_below_zero": ("qwen2", {"sliding_window": -1}, "sliding_window"),
    "types_for_text": ("qwen2", {"layer_types": [FULL] * 3, "num_hidden_layers": "3"}, "layer_types"),
    "base_below_zero": ("falcon", {"rope_theta": -1e4}, "rope_theta"),
    "base_of_nan": ("llama", {"rope_theta": math.nan}, "NaN is not a finite number"),
    "base_without_end": ("llama", {"rope_theta": 10**400}, "rope_theta"),
    "factor_without_end": ("llama", {"rope_scaling": {"type": "linear", "factor": 10**400}}, "factor"),
    "factors_crossed": ("llama", {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "high_freq_factor"),
    "kind_of_rope_list": ("llama", {"rope_scaling": {"type": ["linear"]}}, "rope_type"),
    "odd_heads": ("gemma", {"head_dim": 9}, "head_dim"),
    "no_head": ("mistral", {"head_dim": 0}, "head_dim"),
    "no_eps": ("gemma", {"rms_norm_eps": 0.0}, "rms_norm_eps"),
    "eps_below_zero": ("bert", {"layer_norm_eps": -1e-5}, "layer_norm_eps"),
    "eps_zero_of_gpt2": ("gpt2", {"layer_norm_epsilon": 0}, "layer_norm_epsilon"),
    "range_below_zero": ("llama", {"initializer_range": -0.02}, "initializer_range"),
    "dropout_over_one": ("falcon", {"attention_dropout": 1.5}, "attention_dropout"),
    "all_dropped": ("t5", {"dropout_rate": 1.0}, "dropout_rate"),
    "id_below_zero": ("t5", {"decoder_start_token_id": -1}, "decoder_start_token_id"),
    "id_over_the_vocabulary": ("t5", {"decoder_start_token_id": 61}, "decoder_start_token_id"),
    "coefficient": ("mixtral", {"router_aux_loss_coef": -1.0}, "router_aux_loss_coef"),
}


@pytest.mark.parametrize(("family", "fields", "name"), SENSELESS.values(), ids=SENSELESS)
def test_senseless_values_are_refused_by_name(family, fields, name, tmp_path):
    write_config(tmp_path, model_type=family, **SPELT[family] | fields)
    refused(tmp_path, name)


SIZES_OF = {  # every family's fields that are sizes
    family: [key for key, value in fields.items() if isinstance(value, int) and not isinstance(value, bool)]
    for family, fields in SPELT.items()
}


@pytest.mark.parametrize("family", SIZES_OF)
def test_sizes_beyond_any_model_are_refused_before_a_module_is_built(family, tmp_path):
    built = []
    hook = torch.nn.modules.module.register_module_module_registration_hook(lambda *names: built.append(names))
    with hook:
        for field, size in itertools.product(SIZES_OF[family], [10**8, 2**63, 10**100]):
            write_config(tmp_path, model_type=family, **SPELT[family] | {field: size})
            with pytest.raises(UserError, match=r"config.json: \w+ (is|makes)") as caught:
                folder.load_model(tmp_path)
            assert caught.value.code == MODEL and not built, (field, size)


def test_experts_in_many_layers_are_counted_together(tmp_path):
    write_config(
        tmp_path, model_type="mixtral", **SPELT["mixtral"] | {"num_local_experts": 4096, "num_hidden_layers": 999}
    )
    refused(tmp_path, "num_local_experts", str(4096 * 999))


def test_the_largest_sizes_that_are_allowed_can_be_planned():
    """No tensor has so many elements that torch can't count them."""
    largest = {field: MOST_BY_FIELD.get(field, MOST) for field in SIZES_OF["mixtral"]} | {"num_hidden_layers": 1}
    config = mixtral.Config(**largest | {"num_experts_per_tok": 2})
    assert not shape_problems(config)
    assert sum(p.numel() for p in build_model(config, device="meta", seed=None).parameters()) > 2**50


def test_what_says_nothing_of_a_bert_without_a_pooler_is_passed_over(tmp_path):
    pooler = {"pooler_fc_size": 768, "pooler_num_attention_heads": 12, "pooler_num_fc_layers": 3,
              "pooler_size_per_head": 128, "pooler_type": "first_token_transform"}  # fmt: skip
    write_config(tmp_path, model_type="bert", **SPELT["bert"])
    plain = folder.read_config(tmp_path)
    write_config(tmp_path, model_type="bert", **SPELT["bert"], **pooler, directionality="bidi", classifier_dropout=None)
    assert folder.read_config(tmp_path) == plain


@pytest.mark.parametrize("name", ["gpt2", "llama", "falcon", "mixtral", "bert", "t5"])
def test_code_beside_a_known_family_is_never_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = made(OURS[name])
    folder.save_model(model, tmp_path)
    marker = tmp_path / "marker"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    config = json.loads((tmp_path / "config.json").read_text())
    classes = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForCausalLM": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": classes}))
    assert torch.equal(logits(folder.load_model(tmp_path).eval()), logits(model))
    assert not marker.exists()


# ---- files that lack or repeat weights ------------------------------------------------------------------------------


@torch.no_grad()
def test_a_bare_bert_gets_a_new_head_and_keeps_its_encoder(tmp_path, capsys):
    theirs = theirs_of("bert")
    theirs.save_pretrained(tmp_path)
    theirs.bert.save_pretrained(tmp_path)  # without the prefix, and without a head
    assert not any(name.startswith(("bert.", "cls.")) for name in load_file(tmp_path / "model.safetensors"))
    ours = folder.load_model(tmp_path).eval()
    equal(ours.encode(tokens()), theirs.bert(tokens()).last_hidden_state)
    assert "initialised" in capsys.readouterr().err
    head = ours.cls["predictions"]
    assert head.bias.abs().max() == 0 and (head.transform.LayerNorm.weight == 1).all()


def test_berts_old_names_of_norms_open(tmp_path):
    ours = made(OURS["bert"])
    folder.save_model(ours, tmp_path)
    path = tmp_path / "model.safetensors"
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {next((name.replace(new, o) for new, o in old.items() if name.endswith(new)), name): tensor
               for name, tensor in load_file(path).items()}  # fmt: skip
    assert renamed.keys() != load_file(path).keys()
    save_file(renamed | {"bert.pooler.dense.bias": torch.ones(32)}, path)
    assert torch.equal(logits(folder.load_model(tmp_path).eval()), logits(ours))


@pytest.mark.parametrize("name", ["gpt2", "llama_relu2", "gemma", "falcon", "t5"])
def test_a_tied_head_that_files_repeat_is_passed_over(name, tmp_path):
    ours = made(OURS[name])
    folder.save_model(ours, tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    copies = {"lm_head.weight": ours.wte.weight.detach().clone()}
    if name == "t5":
        copies |= {f"{side}.embed_tokens.weight": ours.wte.weight.detach().clone() for side in ("encoder", "decoder")}
    assert not copies.keys() & weights.keys()
    save_file(weights | copies, path)
    assert torch.equal(logits(folder.load_model(tmp_path).eval()), logits(ours))


# ---- experts --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["mixtral", "mixtral_window"])
def experts(request, tmp_path) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return the same Mixtral twice, ours and transformers'."""
    ours = made(OURS[request.param])
    folder.save_model(ours, tmp_path)
    return ours, opened_by_transformers(tmp_path)


def test_the_balance_loss_equals_transformers(experts):
    ours, theirs = experts
    expected = theirs(tokens(), output_router_logits=True).aux_loss
    equal(balance_loss(ours(tokens(), with_balance=True)[1]), expected)


def test_loss_and_gradients_of_experts_and_routers_equal_transformers(experts):
    ours, theirs = experts
    for model in (ours, theirs):
        model.config.router_aux_loss_coef = 0.5  # enough to be seen beside the loss
        model.train()
    theirs.router_aux_loss_coef = 0.5
    expected = theirs(tokens(), labels=tokens(), output_router_logits=True).loss
    labels = tokens().roll(-1, 1)
    labels[:, -1] = IGNORE_INDEX
    total, metrics = sum_of_losses(ours, {"input_ids": tokens(), "labels": labels})
    loss = total / (labels != IGNORE_INDEX).sum()
    equal(loss, expected)
    assert metrics["balance"] > 0 and loss - (total - 0.5 * 46 * metrics["balance"]) / 46 > 0.1
    loss.backward()
    expected.backward()
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        scale = wanted[name].abs().max()
        torch.testing.assert_close(parameter.grad / scale, wanted[name] / scale, rtol=1e-4, atol=1e-5, msg=name)


@torch.no_grad()
def test_a_text_has_the_same_logits_alone_and_beside_others(experts):
    ours = experts[0]
    together = ours(tokens(rows=5))
    for row, alone in zip(together, tokens(rows=5), strict=True):
        equal(row, ours(alone[None])[0])


def test_experts_that_no_token_takes_have_no_gradient_and_do_no_harm():
    config = mixtral.Config(**GROUPED, num_local_experts=5, num_experts_per_tok=1)
    model = made(config)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.gate.weight.zero_()  # all alike: the first one is taken by all
    model(tokens(), tokens()).backward()
    used = [block.mlp.experts.down_proj.grad.abs().amax((1, 2)) > 0 for block in model.blocks]
    assert all(layer.sum() == 1 for layer in used)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_experts_compile_in_bf16_and_run_eager_otherwise():
    """`train.compile: auto` does the same. Tracing is enough, so no compiler back end is needed."""
    model = made(OURS["mixtral"])
    mlp, x = model.blocks[0].mlp, torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        expected = mlp(x)[0]
        torch.testing.assert_close(torch.compile(mlp, fullgraph=True, backend="aot_eager")(x)[0], expected)
    assert "bf16" in compile_obstacle(model, torch.device("cpu"), "fp32")
    assert "bf16" not in (compile_obstacle(model, torch.device("cpu"), "bf16") or "")
    one = made(mixtral.Config(**GROUPED, num_local_experts=1, num_experts_per_tok=1))
    assert "bf16" in compile_obstacle(one, torch.device("cpu"), "fp32")


# ---- published sizes ------------------------------------------------------------------------------------------------

MISTRAL_7B = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 8}  # fmt: skip
QWEN2_HALF = {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
              "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True}  # fmt: skip
QWEN3_SIX = {"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
             "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
             "tie_word_embeddings": True}  # fmt: skip
GEMMA_2B = {"vocab_size": 256000, "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18,
            "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256}  # fmt: skip
FALCON_7B = {"vocab_size": 65024, "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71}
BERT_BASE = {"vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
             "intermediate_size": 3072, "max_position_embeddings": 512, "type_vocab_size": 2}  # fmt: skip
T5_SMALL = {"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}
T5_BASE = {"vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
T5_NEW = {"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_decoder_layers": 8,
          "num_heads": 6, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}  # fmt: skip
PUBLISHED = {
    "bert-base-uncased": ("bert", BERT_BASE, 109_514_298),
    "t5-small": ("t5", T5_SMALL, 60_506_624),
    "t5-base": ("t5", T5_BASE, 222_903_552),
    "t5-v1_1-small": ("t5", T5_NEW, 76_961_152),
    "Qwen2.5-0.5B": ("qwen2", QWEN2_HALF, 494_032_768),
    "Qwen3-0.6B": ("qwen3", QWEN3_SIX, 596_049_920),
    "gemma-2b": ("gemma", GEMMA_2B, 2_506_172_416),
    "falcon-7b": ("falcon", FALCON_7B, 6_921_720_704),
    "Mixtral-8x7B": ("mixtral", MISTRAL_7B, 46_702_792_704),
    "Mistral-7B": ("mistral", MISTRAL_7B, 7_241_732_096),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones_and_transformers(name, tmp_path):
    family, fields, published = PUBLISHED[name]
    write_config(tmp_path, model_type=family, **fields)
    config = folder.read_config(tmp_path)
    ours = build_model(config, device="meta", seed=None)
    assert sum(parameter.numel() for parameter in ours.parameters()) == published
    with torch.device("meta"):
        theirs = getattr(transformers, family_of(config).architecture)(
            transformers.AutoConfig.from_pretrained(tmp_path)
        )
    counted = sum(parameter.numel() for parameter in theirs.parameters())
    untied = name == "t5-v1_1-small"  # whose head transformers 5 ties, until it finds another one in the files
    assert counted + untied * 32128 * 512 == published


@each_config
def test_planned_flops_and_parts_are_those_of_the_model(config):
    """torch's counter includes what windows save, and no products of experts."""

    def twice_the_forward(d_out, q, k, *args, out_shape=None, **kwargs) -> int:  # without the scores' recomputation
        return 8 * math.prod(q) * k[1]

    model, target = build_model(config), {}
    lengths, labels = Lengths(LENGTH), tokens(1)
    if config.kind == "seq2seq":
        lengths, labels, target = Lengths(LENGTH, 11), tokens(1, 11), {"decoder_input_ids": tokens(1, 11)}
    mapping = {torch.ops.llmkit.block_attention_backward: twice_the_forward}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens(1), labels, **target).backward()
    parts = parameters_by_part(model)
    assert sum(parts.values()) == sum(parameter.numel() for parameter in model.parameters())
    counted = counter.get_total_flops()
    if experts := parts.get("experts"):
        counted += 6 * experts * LENGTH * config.num_experts_per_tok // config.num_local_experts
    windows = [window for window in getattr(config, "windows", []) if window]
    spared = sum(12 * config.num_attention_heads * config.head_dim * LENGTH * (LENGTH - window) for window in windows)
    assert flops_per_row(model, lengths) == counted - spared


# ---- who sees whom --------------------------------------------------------------------------------------------------


@torch.no_grad()
def changed_by(model, t: int) -> torch.Tensor:
    """Return how much another token at place t changes the logits at each place, (T,)."""
    ids, other = tokens(), tokens()
    other[:, t] = (other[:, t] + 1) % 61
    return (model(ids) - model(other)).abs().amax((0, 2))


@each_decoder
@pytest.mark.parametrize("t", [0, 5, LENGTH - 1])
def test_a_token_changes_the_logits_from_itself_on_as_far_as_windows_reach_and_none_before(config, t):
    changed = changed_by(made(config), t)
    reach = sum(LENGTH if window is None else window - 1 for window in config.windows)
    outside = torch.cat((changed[:t], changed[t + reach + 1 :]))
    assert (outside < (1e-5 if config.model_type == "mixtral" else 1e-30)).all()  # experts' products have other rows
    assert changed[t : t + reach + 1].min() > 1e-4


@pytest.mark.parametrize("name", ["bert", "bert_relu"])
@pytest.mark.parametrize("t", [0, 5, LENGTH - 1])
def test_bert_sees_both_ways(name, t):
    assert changed_by(made(OURS[name]), t).min() > 1e-5


@pytest.mark.parametrize("name", ["t5", "t5_v1.1", "t5_silu"])
@torch.no_grad()
def test_t5s_decoder_sees_what_it_wrote_and_all_that_is_read(name):
    model, written, read = made(OURS[name]), tokens(length=11, seed=3), tokens()
    before = model(read, decoder_input_ids=written)
    for t in (0, 5, 10):
        other = written.clone()
        other[:, t] = (other[:, t] + 1) % 61
        changed = (model(read, decoder_input_ids=other) - before).abs().amax((0, 2))
        assert changed[:t].sum() == 0 and changed[t:].min() > 1e-5
        other = read.clone()
        other[:, t] = (other[:, t] + 1) % 61
        assert (model(other, decoder_input_ids=written) - before).abs().amax((0, 2)).min() > 1e-5
        assert (model.encode(other) - model.encode(read)).abs().amax((0, 2)).min() > 1e-5


@pytest.mark.parametrize("name", [name for name, config in OURS.items() if config.kind != "seq2seq"])
@torch.no_grad()
def test_packed_documents_equal_each_document_alone(name):
    model, lengths = made(OURS[name]), [[9, 6, 9], [1, 21, 2]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    segments = torch.stack([torch.arange(3).repeat_interleave(torch.tensor(row)) for row in lengths])
    packed = model(tokens(), positions=positions, segments=segments)
    for b, row in enumerate(lengths):
        for document, part in zip(tokens()[b].split(row), packed[b].split(row), strict=True):
            equal(part, model(document[None])[0])


# ---- adapters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3", "gemma", "falcon", "mixtral", "t5", "t5_v1.1", "bert"])
@torch.no_grad()
def test_peft_opens_our_adapter_with_equal_logits(name, tmp_path):
    ours = made(OURS[name])
    folder.save_model(ours, tmp_path / "base")
    plain = logits(ours)
    targets = ["q_proj", "v_proj"] if name == "mixtral" else None  # its experts are no linears
    options = lora.Options(r=4, alpha=8.0, target_modules=targets)
    lora.apply(ours, options)
    generator = torch.Generator().manual_seed(5)
    for parameter in (p for p in ours.parameters() if p.requires_grad):
        parameter.normal_(0.0, 0.2, generator=generator)
    save_adapter(ours, tmp_path / "adapter", "lora", options, base=str(tmp_path / "base"), base_sha256="")
    theirs = peft.PeftModel.from_pretrained(opened_by_transformers(tmp_path / "base"), tmp_path / "adapter").eval()
    kinds = {"causal": peft.PeftModelForCausalLM, "seq2seq": peft.PeftModelForSeq2SeqLM, "masked": peft.PeftModel}
    assert isinstance(theirs, kinds[ours.config.kind])
    equal(logits(theirs), logits(ours))
    assert (logits(ours) - plain).abs().max() > 1e-2
    again = folder.load_model(tmp_path / "base").eval()
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(ours))


def test_a_section_that_names_no_kind_of_scaling_contradicts_none(tmp_path):
    config = llama.Config(vocab_size=16, hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    folder.save_model(build_model(config), tmp_path)
    path = tmp_path / "config.json"
    hf = json.loads(path.read_text())
    del hf["rope_theta"]
    hf |= {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 500.0}}
    path.write_text(json.dumps(hf))
    read = folder.read_config(tmp_path)
    assert read.rope_scaling == {"rope_type": "linear", "factor": 2.0} and read.rope_theta == 500.0
