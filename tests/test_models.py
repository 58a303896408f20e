"""The model families against transformers, published sizes, and what a causal, cached, packed model must obey."""

import json
import os
import struct

import pytest
import torch
import transformers
import yaml
from conftest import randomized
from safetensors.torch import load_file, save_file

from llmkit.config.load import load_config
from llmkit.errors import MODEL, UserError
from llmkit.models import build_model, folder, gpt2, llama
from llmkit.models.attention import KVCache
from llmkit.training.prepare import check

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 32}
GPT2 = gpt2.Config(**SIZES, num_attention_heads=4)
GQA = llama.Config(**SIZES, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)
TIED = llama.Config(**SIZES, num_attention_heads=4, intermediate_size=48, tie_word_embeddings=True, rope_theta=5e5)
UNTIED_GPT2 = gpt2.Config(**SIZES, num_attention_heads=2, intermediate_size=40, tie_word_embeddings=False)
WIDE_HEADS = llama.Config(**SIZES, num_attention_heads=4, num_key_value_heads=1, head_dim=16, rms_norm_eps=1e-3)
CONFIGS = {"gpt2": GPT2, "gpt2_untied": UNTIED_GPT2, "gqa": GQA, "tied": TIED, "wide_heads": WIDE_HEADS}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
each_family = pytest.mark.parametrize("config", [GPT2, GQA], ids=["gpt2", "llama"])


def tokens(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(61, (rows, length), generator=torch.Generator().manual_seed(2))


def equal(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# ---- transformers, both ways ----------------------------------------------------------------------------------------


@every_config
@torch.no_grad()
def test_transformers_opens_what_we_save_with_equal_logits(config, tmp_path):
    ours = randomized(build_model(config))
    folder.save_model(ours, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    equal(ours(tokens()), theirs(tokens()).logits)


def hf_configs() -> dict:
    shape = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    wide = {"intermediate_size": 48, "max_position_embeddings": 32}
    small = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    rope = {"rope_type": "default", "rope_theta": 123.0}
    return {
        "gpt2": transformers.GPT2Config(**small),
        "gpt2_untied": transformers.GPT2Config(**small, n_inner=40, tie_word_embeddings=False),
        "llama_defaults": transformers.LlamaConfig(**shape, **wide),
        "llama_gqa": transformers.LlamaConfig(**shape, **wide, num_key_value_heads=2, rms_norm_eps=1e-3),
        "llama_tied": transformers.LlamaConfig(**shape, **wide, tie_word_embeddings=True, rope_parameters=rope),
    }


@pytest.mark.parametrize("name", ["gpt2", "gpt2_untied", "llama_defaults", "llama_gqa", "llama_tied"])
@torch.no_grad()
def test_we_open_what_transformers_saves_with_equal_logits(name, tmp_path):
    theirs = randomized(transformers.AutoModelForCausalLM.from_config(hf_configs()[name]))
    theirs.save_pretrained(tmp_path)
    equal(folder.load_model(tmp_path).eval()(tokens()), theirs(tokens()).logits)


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa"])
@torch.no_grad()
def test_sharded_folders_open_with_equal_logits(name, tmp_path):
    theirs = randomized(transformers.AutoModelForCausalLM.from_config(hf_configs()[name]))
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    equal(folder.load_model(tmp_path).eval()(tokens()), theirs(tokens()).logits)


@torch.no_grad()
def test_gpt2_files_without_the_prefix_and_with_mask_buffers_open(tmp_path):
    ours = randomized(build_model(GPT2))
    folder.save_model(ours, tmp_path)
    path = tmp_path / "model.safetensors"
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    save_file(bare | {"h.0.attn.bias": torch.ones(1, 1, 32, 32).tril()}, path)
    equal(folder.load_model(tmp_path)(tokens()), ours(tokens()))


@torch.no_grad()
def test_an_absent_rms_norm_eps_means_what_transformers_means(tmp_path):
    folder.save_model(randomized(build_model(GQA)), tmp_path)
    rewrite(tmp_path / "config.json", lambda config: config.pop("rms_norm_eps"))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert folder.read_config(tmp_path).rms_norm_eps == theirs.rms_norm_eps


def test_weights_keep_their_dtype_or_take_the_one_named(tmp_path):
    folder.save_model(build_model(GQA), tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert {p.dtype for p in folder.load_model(tmp_path).parameters()} == {torch.float32}


# ---- published sizes ------------------------------------------------------------------------------------------------


def gpt2_size(width: int, layers: int, heads: int) -> gpt2.Config:
    return gpt2.Config(vocab_size=50257, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads)


def llama_size(vocab: int, width: int, layers: int, heads: int, kv_heads: int, inner: int, **more) -> llama.Config:
    return llama.Config(
        vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=inner, **more,
    )  # fmt: skip


PUBLISHED = {
    "gpt2": (gpt2_size(768, 12, 12), 124_439_808),
    "gpt2-medium": (gpt2_size(1024, 24, 16), 354_823_168),
    "gpt2-large": (gpt2_size(1280, 36, 20), 774_030_080),
    "gpt2-xl": (gpt2_size(1600, 48, 25), 1_557_611_200),
    "llama-2-7b": (llama_size(32000, 4096, 32, 32, 32, 11008), 6_738_415_616),
    "llama-2-13b": (llama_size(32000, 5120, 40, 40, 40, 13824), 13_015_864_320),
    "llama-2-70b": (llama_size(32000, 8192, 80, 64, 8, 28672), 68_976_648_192),
    "llama-3.2-1b": (llama_size(128256, 2048, 16, 32, 8, 8192, tie_word_embeddings=True), 1_235_814_400),
    "mistral-7b": (llama_size(32000, 4096, 32, 32, 8, 14336), 7_241_732_096),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    config, published = PUBLISHED[name]
    model = build_model(config, device="meta", seed=None)
    assert sum(parameter.numel() for parameter in model.parameters()) == published


# ---- causality, cache, packing --------------------------------------------------------------------------------------


@each_family
@pytest.mark.parametrize("t", [0, 5, 11])
@torch.no_grad()
def test_a_token_changes_the_logits_from_itself_on_and_none_before(config, t):
    model, ids = randomized(build_model(config)), tokens()
    other = ids.clone()
    other[:, t] = (other[:, t] + 1) % 61
    changed = (model(ids) - model(other)).abs().amax(-1)  # (B, T)
    assert changed[:, :t].sum() == 0
    assert (changed[:, t:] > 1e-4).all()


@every_config
@torch.no_grad()
def test_cached_logits_equal_uncached(config):
    model, ids = randomized(build_model(config)), tokens()
    cache = KVCache(config.windows, 2, config.num_key_value_heads, 16, config.head_dim)
    pieces = [ids[:, :4], ids[:, 4:7], *ids[:, 7:].split(1, dim=1)]  # a prompt in two pieces, then token by token
    equal(torch.cat([model(piece, cache=cache) for piece in pieces], dim=1), model(ids))
    assert cache.length == ids.shape[1]


@each_family
@torch.no_grad()
def test_packed_documents_equal_each_document_alone(config):
    model = randomized(build_model(config))
    lengths = [[5, 3, 4], [1, 9, 2]]
    ids = tokens()
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    segments = torch.stack([torch.arange(3).repeat_interleave(torch.tensor(row)) for row in lengths])
    packed = model(ids, positions=positions, segments=segments)
    for b, row in enumerate(lengths):
        for document, logits in zip(ids[b].split(row), packed[b].split(row), strict=True):
            equal(logits, model(document[None])[0])


@each_family
@torch.no_grad()
def test_losses_are_the_cross_entropy_of_the_logits(config):
    model, ids = randomized(build_model(config)), tokens()
    labels = ids.roll(-1, 1)
    expected = torch.nn.functional.cross_entropy(model(ids).transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(model(ids, labels, reduction="none"), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(ids, labels), expected.sum(), rtol=1e-5, atol=1e-4)


# ---- initialisation -------------------------------------------------------------------------------------------------

WIDE = {"vocab_size": 300, "hidden_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4}


def close(tensor: torch.Tensor, std: float) -> None:
    assert tensor.std().item() == pytest.approx(std, rel=0.04)  # over 16k draws: the std of the std is 0.6 %
    assert abs(tensor.mean().item()) < 0.04 * std


@pytest.mark.parametrize(("family", "residual"), [(gpt2, "attn.c_proj"), (llama, "self_attn.o_proj")])
def test_residual_projections_begin_smaller_by_the_root_of_twice_the_depth(family, residual):
    block = build_model(family.Config(**WIDE)).blocks[3]
    close(block.get_submodule(residual).weight, 0.02 / 4)  # sqrt(2 * 8) = 4
    inner = block.mlp.c_fc if family is gpt2 else block.mlp.up_proj
    close(inner.weight, 0.02)


def test_xavier_and_he_begin_at_their_spread():
    for scheme, variance in [("xavier", 2 / (128 + 512)), ("he", 2 / 128)]:
        model = build_model(llama.Config(**WIDE, intermediate_size=512, init=scheme))
        close(model.blocks[0].mlp.up_proj.weight, variance**0.5)
        down = 2 / (128 + 512) if scheme == "xavier" else 2 / 512
        close(model.blocks[0].mlp.down_proj.weight, down**0.5 / 4)
        close(model.model.embed_tokens.weight, 0.02)


def test_norms_begin_at_one_and_biases_at_zero():
    for name, parameter in build_model(GPT2).named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name


def test_a_seed_fixes_the_weights():
    first, again, other = (build_model(GQA, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


# ---- what is refused ------------------------------------------------------------------------------------------------


def rewrite(path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture
def saved(tmp_path):
    folder.save_model(build_model(GQA), tmp_path)
    return tmp_path


def refused(path, *words: str) -> None:
    """Assert that loading raises a UserError with the right code that contains all `words`."""
    with pytest.raises(UserError) as caught:
        folder.load_model(path)
    assert caught.value.code == MODEL
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_an_unknown_family_is_refused(saved):
    rewrite(saved / "config.json", lambda config: config.update(model_type="lama"))
    refused(saved, "lama", "did you mean llama?")


ROPES = [
    {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}},
    {"rope_parameters": {"type": "linear", "rope_theta": 1e4, "factor": 2.0, "mscale": 1.0}},
    {"rope_parameters": {"type": "linear", "rope_theta": 1e4, "factor": -2.0}},
]


@pytest.mark.parametrize("rope", ROPES, ids=["dynamic", "lacking", "unknown", "negative"])
def test_rotary_scaling_that_is_not_built_is_refused(saved, rope):
    rewrite(saved / "config.json", lambda config: config.update(rope))
    refused(saved, "rope_scaling")


def test_a_field_that_changes_the_mathematics_is_refused(saved):
    rewrite(saved / "config.json", lambda config: config.update(pretraining_tp=2, rope_interleaved=True))
    refused(saved, "pretraining_tp", "rope_interleaved")


def test_an_unknown_activation_is_refused_by_name(saved):
    rewrite(saved / "config.json", lambda config: config.update(hidden_act="quick_gelu"))
    refused(saved, "hidden_act", "quick_gelu")


WRONG = {
    "no_vocabulary": {"vocab_size": None},
    "broken_width": {"hidden_size": 32.5},
    "text_for_a_number": {"hidden_size": "32"},
    "list_width": {"intermediate_size": [48]},
    "no_heads": {"num_attention_heads": 0},
    "odd_kv_heads": {"num_key_value_heads": 3},
    "text_eps": {"rms_norm_eps": "small"},
    "list_of_families": {"model_type": ["llama"]},
    "rope_list": {"rope_parameters": [1]},
    "rope_text": {"rope_parameters": {"rope_theta": "big"}},
    "no_theta": {"rope_theta": None, "rope_parameters": None},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_senseless_values_are_refused(saved, wrong):
    rewrite(saved / "config.json", lambda config: config.update(wrong))
    refused(saved)


BROKEN = {
    "empty": "", "list": "[]", "open": "{", "null": "null", "nan": '{"model_type": "llama", "rope_theta": NaN}',
    "infinite": '{"rope_theta": -Infinity}', "over_the_range": '{"rope_theta": 1e999}',
    "key_twice": '{"model_type": "gpt2", "model_type": "llama"}', "nested": "[" * 100_000,
    "surrogate": '{"model_type": "llama", "name": "\\ud800"}', "long_number": f'{{"hidden_size": {"9" * 5000}}}',
}  # fmt: skip


HUGE = {  # options of a YAML model section, and what the only error is about
    "width": ({"hidden_size": 10**9}, "hidden_size"),
    "depth": ({"num_hidden_layers": 10**7}, "num_hidden_layers"),
    "vocabulary": ({"vocab_size": 10**12}, "vocab_size"),
    "heads": ({"num_attention_heads": 10**20}, "num_attention_heads"),
    "positions": ({"max_position_embeddings": 10**18}, "max_position_embeddings"),
    "derived": ({"hidden_size": 2**16, "num_attention_heads": 1}, "head_dim"),
    "experts": ({"name": "mixtral", "num_local_experts": 10**9}, "num_local_experts"),
    "decoder": ({"name": "t5", "num_decoder_layers": 10**9}, "num_decoder_layers"),
    "no_eps": ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
    "endless_rope": ({"rope_scaling": {"rope_type": "linear", "factor": float("inf")}}, "rope_scaling"),
    "list_of_ropes": ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_scaling"),
}


@pytest.mark.parametrize(("options", "key"), HUGE.values(), ids=HUGE)
def test_one_error_names_what_a_config_can_not_mean(options, key, tmp_path):
    section = {"name": "llama"} | options
    data = {"kind": "corpus", "dir": "data", "seq_len": 8}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"model": section, "data": data, "train": {"max_steps": 1}}))
    with pytest.raises(UserError) as caught:
        check(load_config(tmp_path / "a.yaml"))
    assert caught.value.what.startswith(f"model.{key} ") and not caught.value.others


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_config_that_is_no_object_is_refused(saved, text):
    (saved / "config.json").write_text(text)
    refused(saved, "config.json")


def test_a_folder_without_a_config_is_refused(tmp_path):
    refused(tmp_path, "not a model")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b.safetensors", "..", "", 7, None])
def test_a_shard_outside_the_folder_is_refused(saved, name):
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    refused(saved)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": ["b"]}}', '{"weight_map": {"a": 1, "a": 1}}']
)
def test_an_index_that_is_none_is_refused(saved, text):
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text(text)
    refused(saved, "index")


def test_a_pipe_in_place_of_a_file_is_refused_at_once(saved):
    (saved / "model.safetensors").unlink()
    os.mkfifo(saved / "model.safetensors.index.json")
    refused(saved, "index", "not a file")


def sharded(saved) -> dict[str, str]:
    """Split the saved weights into two files with an index; return its map."""
    weights = list(load_file(saved / "model.safetensors").items())
    (saved / "model.safetensors").unlink()
    where = {}
    for name, part in (("one.safetensors", weights[:5]), ("two.safetensors", weights[5:])):
        save_file(dict(part), saved / name)
        where |= {tensor: name for tensor, _ in part}
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return where


def test_a_tensor_in_two_shards_is_refused_by_name(saved):
    name = next(iter(sharded(saved)))
    save_file(
        load_file(saved / "two.safetensors") | {name: load_file(saved / "one.safetensors")[name]},
        saved / "two.safetensors",
    )
    refused(saved, name, "two.safetensors", "twice")


def test_a_stale_index_is_no_reason_to_refuse(saved):
    expected = folder.load_model(saved).state_dict()

    def same() -> bool:
        return all(
            torch.equal(tensor, expected[name]) for name, tensor in folder.load_model(saved).state_dict().items()
        )

    index = saved / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model-00001-of-00009.safetensors"}}))
    assert same()  # transformers takes the whole file too
    where = sharded(saved)
    name = next(iter(where))
    for stale in (where | {name: "two.safetensors"}, {key: value for key, value in where.items() if key != name}):
        index.write_text(json.dumps({"weight_map": stale}))
        assert same()


def test_a_weight_under_two_names_is_refused(tmp_path):
    folder.save_model(build_model(GPT2), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "transformer.h.0.ln_1.weight"
    save_file(weights | {name.removeprefix("transformer."): weights[name] + 1}, tmp_path / "model.safetensors")
    refused(tmp_path, name, "twice")


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
def test_weights_that_are_no_floats_are_refused_by_name(saved, dtype):
    weights = load_file(saved / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(dtype)
    save_file(weights, saved / "model.safetensors")
    refused(saved, "model.norm.weight", "quantized")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_floats_of_every_width_are_read(saved, dtype):
    weights = {name: tensor.to(dtype) for name, tensor in load_file(saved / "model.safetensors").items()}
    save_file(weights, saved / "model.safetensors")
    assert all(torch.equal(p, weights[name].float()) for name, p in folder.load_model(saved).named_parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(saved, value):
    weights = load_file(saved / "model.safetensors")
    weights["lm_head.weight"][3, 4] = value
    save_file(weights, saved / "model.safetensors")
    refused(saved, "lm_head.weight", "not finite")


def test_weights_beyond_the_range_of_fp16_are_refused_in_it(saved, tmp_path):
    weights = load_file(saved / "model.safetensors")
    weights["lm_head.weight"][3, 4] = 1e5
    save_file(weights, saved / "model.safetensors")
    model = folder.load_model(saved)
    with pytest.raises(UserError, match="not finite"):
        folder.load_model(saved, dtype=torch.float16)
    with pytest.raises(UserError, match="not finite"):
        folder.save_model(model, tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()


def test_a_missing_shard_is_refused(saved):
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(saved, "missing")


def test_a_missing_tensor_is_refused_by_name(saved):
    weights = load_file(saved / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, saved / "model.safetensors")
    refused(saved, "model.layers.1.mlp.up_proj.weight")


def test_a_tensor_without_a_place_is_named_and_one_of_a_further_layer_refused(saved, capsys):
    weights = load_file(saved / "model.safetensors")
    save_file(weights | {"v_head.summary.weight": torch.ones(1)}, saved / "model.safetensors")
    folder.load_model(saved)
    assert "does not use: v_head.summary.weight" in capsys.readouterr().err
    further = {"model.layers.9.mlp.up_proj.weight": weights["model.layers.1.mlp.up_proj.weight"].clone()}
    save_file(weights | further, saved / "model.safetensors")
    refused(saved, "model.layers.9.mlp.up_proj.weight", "number of layers")


def test_a_wrong_shape_is_refused_with_both_shapes(saved):
    rewrite(saved / "config.json", lambda config: config.update(intermediate_size=50))
    refused(saved, "wrong shape", "(32, 48)", "(32, 50)", "gate_proj.weight has the wrong shape")


@pytest.mark.parametrize("keep", [0, 4, 200, -100])
def test_truncated_weights_are_refused(saved, keep):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(saved, "can't be read")


def header(shape: list[int], *ends: int) -> dict:
    return {str(i): {"dtype": "F32", "shape": shape, "data_offsets": [0, end]} for i, end in enumerate(ends)}


LIES = {"shape": header([10**9, 10**9], 16), "overflow": header([2**62, 8], 16), "overlap": header([4], 16, 16),
        "too_little": header([5], 20), "negative": header([-4], 16)}  # fmt: skip


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_headers_that_lie_about_sizes_are_refused(saved, lie):
    text = json.dumps(lie).encode()
    (saved / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    refused(saved, "can't be read")


def test_a_header_beyond_any_size_is_refused(saved):
    (saved / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    refused(saved, "can't be read")
