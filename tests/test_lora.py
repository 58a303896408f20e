"""Adapters: the same in peft and here, merged or not, and refused when they ask for what is not built."""

import json
import os
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from llmkit.config.load import load_config
from llmkit.errors import MODEL, UserError
from llmkit.evals.exported import compare_exported
from llmkit.formats.hf import export_hf, export_peft
from llmkit.models import build_model, folder, gpt2, llama
from llmkit.peft import bitfit, lora
from llmkit.peft.adapter import load_adapter, save_adapter
from llmkit.storage import locate
from llmkit.storage.locate import Located, base_sha256, load_located, weights_sha256
from llmkit.tokenizer.train import train_tokenizer
from llmkit.training.prepare import check

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 32, "num_attention_heads": 4}
CONFIGS = {
    "gpt2": gpt2.Config(**SIZES, vocab_size=61),
    "llama": llama.Config(**SIZES, vocab_size=61, num_key_value_heads=2, intermediate_size=48),
}
TARGETS = {"gpt2": [None, ["mlp.c_proj", "c_attn"]], "llama": [None, ["q_proj", "mlp.up_proj"]]}
CASES = [(name, rslora, targets) for name in CONFIGS for rslora in (False, True) for targets in TARGETS[name]]
every_case = pytest.mark.parametrize(
    ("name", "rslora", "targets"), CASES, ids=lambda v: "+".join(v) if isinstance(v, list) else str(v)
)
each_family = pytest.mark.parametrize("name", CONFIGS)


def tokens() -> torch.Tensor:
    return torch.randint(61, (2, 10), generator=torch.Generator().manual_seed(2))


def equal(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def randomize(parameters, std: float = 0.2, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.normal_(0.0, std, generator=generator)


def base_of(name: str) -> torch.nn.Module:
    model = build_model(CONFIGS[name]).eval()
    randomize(model.parameters())
    return model


def options_of(**options) -> lora.Options:
    return lora.Options(**{"r": 4, "alpha": 12.0} | options)


def adapted_of(name: str, **options) -> torch.nn.Module:
    """Return a base with a trained adapter: B is not zero."""
    model = base_of(name)
    lora.apply(model, options_of(**options))
    randomize((p for p in model.parameters() if p.requires_grad), seed=5)
    return model


@pytest.fixture
def base_folder(tmp_path):
    """Save the base with this name and return its folder."""

    def save(name: str):
        folder.save_model(base_of(name), tmp_path / "base")
        return tmp_path / "base"

    return save


# ---- peft, both ways ------------------------------------------------------------------------------------------------


@every_case
@torch.no_grad()
def test_peft_opens_our_adapter_with_equal_logits(name, rslora, targets, base_folder, tmp_path):
    base = base_folder(name)
    ours = adapted_of(name, rslora=rslora, target_modules=targets)
    options = options_of(rslora=rslora, target_modules=targets)
    save_adapter(ours, tmp_path / "adapter", "lora", options, base=str(base), base_sha256="")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    plain = theirs.eval()(tokens()).logits
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    equal(ours(tokens()), theirs(tokens()).logits)
    assert (ours(tokens()) - plain).abs().max() > 1e-2


def peft_adapter(base, out, name: str, rslora: bool = False, targets: list[str] | None = None, **more):
    """Return an adapter that peft made, with a random B, and its model."""
    everything = {"gpt2": ["c_attn", "c_proj", "c_fc"], "llama": ["q_proj", "o_proj", "gate_proj", "down_proj"]}[name]
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=targets or everything, use_rslora=rslora, fan_in_fan_out=name == "gpt2",
        task_type="CAUSAL_LM", **more,
    )  # fmt: skip
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config).eval()
    randomize(p for key, p in model.named_parameters() if "lora_B" in key)
    model.save_pretrained(out)
    return model


@every_case
@torch.no_grad()
def test_we_open_pefts_adapter_with_equal_logits(name, rslora, targets, base_folder, tmp_path):
    base = base_folder(name)
    theirs = peft_adapter(base, tmp_path / "adapter", name, rslora, targets)
    ours = folder.load_model(base).eval()
    load_adapter(ours, tmp_path / "adapter")
    equal(ours(tokens()), theirs(tokens()).logits)


@each_family
@torch.no_grad()
def test_an_adapter_survives_saving_and_loading(name, tmp_path):
    ours, again = adapted_of(name, rslora=True), base_of(name)
    save_adapter(ours, tmp_path, "lora", options_of(rslora=True), base="base", base_sha256="")
    load_adapter(again, tmp_path)
    assert torch.equal(ours(tokens()), again(tokens()))
    save_adapter(again, tmp_path / "again", "lora", options_of(rslora=True), base="base", base_sha256="")
    assert (tmp_path / "again" / "adapter_config.json").read_text() == (tmp_path / "adapter_config.json").read_text()


# ---- apply and merge ------------------------------------------------------------------------------------------------


@each_family
@torch.no_grad()
def test_a_fresh_adapter_changes_no_logits(name):
    model = base_of(name)
    before = model(tokens())
    lora.apply(model, lora.Options(r=4))
    assert torch.equal(model(tokens()), before)


@every_case
@torch.no_grad()
def test_merged_logits_equal_the_adapters(name, rslora, targets):
    model = adapted_of(name, rslora=rslora, target_modules=targets)
    before = model(tokens())
    lora.merge(model)
    equal(model(tokens()), before)


@each_family
def test_merging_restores_classes_names_and_gradients(name):
    plain, model = base_of(name), adapted_of(name)
    lora.merge(model)
    assert [(key, type(module)) for key, module in model.named_modules()] == [
        (key, type(module)) for key, module in plain.named_modules()
    ]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(p.requires_grad for p in model.parameters())


@each_family
def test_weight_names_never_change_and_only_the_factors_are_trained(name):
    plain, model = base_of(name), adapted_of(name)
    added = {key for key, _ in model.named_parameters()} - {key for key, _ in plain.named_parameters()}
    assert {key for key, _ in plain.named_parameters()} <= {key for key, _ in model.named_parameters()}
    assert added == {key for key, p in model.named_parameters() if p.requires_grad}
    assert {key.rsplit(".", 1)[-1] for key in added} == {"lora_A", "lora_B"}


@each_family
def test_gradients_reach_every_factor_and_no_base_weight(name):
    model = adapted_of(name)
    model(tokens(), tokens().roll(-1, 1)).backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == ("lora_" in key), key


@each_family
def test_the_head_and_the_embeddings_get_no_adapter(name):
    changed = {key for key, module in adapted_of(name).named_modules() if isinstance(module, lora.LoRA)}
    assert changed == set(lora.block_linears(base_of(name)))


def test_a_target_is_a_whole_name_or_the_whole_end_of_one():
    model = adapted_of("llama", target_modules=["mlp.up_proj", "model.layers.1.self_attn.q_proj"])
    changed = {key for key, module in model.named_modules() if isinstance(module, lora.LoRA)}
    assert changed == {f"model.layers.{i}.mlp.up_proj" for i in (0, 1)} | {"model.layers.1.self_attn.q_proj"}


def test_a_target_that_matches_nothing_is_refused_with_the_candidates():
    with pytest.raises(UserError) as caught:
        lora.apply(base_of("llama"), lora.Options(target_modules=["q_proj", "c_attn", "proj"]))
    assert "c_attn" in str(caught.value)
    assert caught.value.expected == "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    assert [error.got for error in caught.value.others] == ["proj"]


def test_a_seed_fixes_the_factors_and_no_two_layers_share_them():
    def factors(seed: int) -> list[torch.Tensor]:
        model = base_of("llama")
        lora.apply(model, lora.Options(r=4), seed)
        return [module.lora_A for module in model.modules() if isinstance(module, lora.LoRA)]

    first, again, other = factors(0), factors(0), factors(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0], first[1])


@torch.no_grad()
def test_a_disabled_adapter_computes_what_the_base_computes():
    base, model = base_of("llama"), adapted_of("llama")
    before = model(tokens())
    with lora.disabled(model):
        assert torch.equal(model(tokens()), base(tokens()))
    assert torch.equal(model(tokens()), before) and not torch.equal(before, base(tokens()))


# ---- BitFit, the second method --------------------------------------------------------------------------------------


def bitfit_of() -> torch.nn.Module:
    model = base_of("gpt2")
    bitfit.apply(model, bitfit.Options())
    randomize((p for p in model.parameters() if p.requires_grad), seed=5)
    return model


def test_bitfit_trains_every_bias_and_nothing_else():
    trained = {name for name, p in bitfit_of().named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in base_of("gpt2").named_parameters() if name.endswith("bias")}
    with pytest.raises(UserError, match="has none"):
        bitfit.apply(base_of("llama"), bitfit.Options())


@torch.no_grad()
def test_bitfit_is_disabled_merged_saved_and_loaded_as_lora_is(tmp_path):
    base, model = base_of("gpt2"), bitfit_of()
    before = model(tokens())
    with bitfit.disabled(model):
        assert torch.equal(model(tokens()), base(tokens()))
    assert torch.equal(model(tokens()), before) and not torch.equal(before, base(tokens()))
    save_adapter(model, tmp_path, "bitfit", bitfit.Options(), base="base", base_sha256="")
    again = base_of("gpt2")
    method = load_adapter(again, tmp_path)
    assert torch.equal(again(tokens()), before)
    method.merge(again)
    assert torch.equal(again(tokens()), before) and list(again.state_dict()) == list(base.state_dict())
    assert all(p.requires_grad for p in again.parameters())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merged_bitfit_has_the_dtype_of_its_base(dtype):
    base, model = base_of("gpt2").to(dtype), base_of("gpt2").to(dtype)
    bitfit.apply(model, bitfit.Options())
    bitfit.merge(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.equal(model(tokens()), base(tokens()))


@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_muon_is_refused_beside_a_method_that_trains_no_whole_matrix(method, base_folder, tmp_path):
    options = ["data.kind=sft", "data.path=x", "data.seq_len=32", "train.max_steps=1", f"peft.name={method}"]
    options += [f"init_from={base_folder('gpt2')}", f"run_dir={tmp_path / 'run'}"]
    check(load_config(None, options))
    with pytest.raises(UserError, match=f"optimizer.name has nothing to train beside peft.name {method}") as caught:
        check(load_config(None, [*options, "optimizer.name=muon"]))
    assert caught.value.at == "-o optimizer.name=muon"


def test_a_rank_that_no_matrix_can_have_is_refused_before_it_is_allocated():
    lora.apply(base_of("llama"), options_of(r=32))
    lora.apply(base_of("llama"), options_of(r=32, target_modules=["k_proj", "up_proj"]))  # k_proj: at most 16
    for rank, targets, most in ((33, None, 32), (10**12, None, 32), (17, ["k_proj"], 16)):
        with pytest.raises(UserError, match=r"peft\.r is over") as caught:
            lora.apply(base_of("llama"), options_of(r=rank, target_modules=targets))
        assert caught.value.expected == f"at most {most}"


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    save_adapter(adapted_of("llama"), tmp_path, "lora", options_of(), base="base", base_sha256="")
    return tmp_path


def rewrite(path, **changes) -> None:
    path = path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(path, *words: str, name: str = "llama") -> None:
    with pytest.raises(UserError) as caught:
        load_adapter(base_of(name), path)
    assert caught.value.code == MODEL
    assert all(word in str(caught.value) for word in words), str(caught.value)


FLAGS = {
    "use_dora": True, "rank_pattern": {"q_proj": 0}, "alpha_pattern": {"(a+)+q_proj": 1}, "bias": "all",
    "lora_bias": True, "modules_to_save": ["lm_head"], "layers_to_transform": [0], "exclude_modules": ["v_proj"],
    "peft_type": "LOHA", "init_lora_weights": "pissa", "target_modules": 3,
}  # fmt: skip


@pytest.mark.parametrize("flag", FLAGS)
def test_an_adapter_of_another_kind_is_refused(saved, flag):
    rewrite(saved, **{flag: FLAGS[flag]})
    refused(saved)


def test_all_that_is_unsupported_is_told_at_once(saved):
    rewrite(saved, use_bdlora=True, lora_bias=True)
    refused(saved, "use_bdlora", "lora_bias")


@torch.no_grad()
def test_pissa_adapters_are_refused_because_peft_changes_the_base_for_them(base_folder, tmp_path):
    peft_adapter(base_folder("llama"), tmp_path / "adapter", "llama", init_lora_weights="pissa")
    refused(tmp_path / "adapter", "init_lora_weights")


@pytest.mark.parametrize("name", ["lora", "bitfit"])
@pytest.mark.parametrize("value", [0.5, True, {"x": 1}, "on", [1]], ids=str)
def test_a_field_that_nobody_knows_is_refused_by_name_unless_it_is_off(name, value, tmp_path):
    model = adapted_of("gpt2") if name == "lora" else bitfit_of()
    options = options_of() if name == "lora" else bitfit.Options()
    save_adapter(model, tmp_path, name, options, base="base", base_sha256="")
    rewrite(tmp_path, new_mathematics=value)
    refused(tmp_path, "new_mathematics", name="gpt2")
    rewrite(tmp_path, new_mathematics=None, other=False, empty={}, none=[])
    load_adapter(base_of("gpt2"), tmp_path)


HARMLESS = {
    "auto_mapping": {"base_model_class": "LlamaForCausalLM"}, "peft_version": "0.9.0", "revision": "main",
    "task_type": "CAUSAL_LM", "inference_mode": False, "fan_in_fan_out": True, "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 2.0}, "corda_config": {"corda_method": "ipm"}, "lora_ga_config": {"direction": "x"},
    "qalora_group_size": 16, "megatron_core": "megatron.core", "runtime_config": {"ephemeral_gpu_offload": True},
}  # fmt: skip


def test_fields_of_peft_that_change_nothing_are_accepted(saved):
    rewrite(saved, **HARMLESS)
    load_adapter(base_of("llama"), saved)


def test_layer_zero_is_a_layer(saved):
    rewrite(saved, layers_to_transform=0)
    refused(saved, "no place", "layers.1")


PEFT_FORMS = {
    "regex": {"targets": r".*\.(q_proj|up_proj)"},
    "all_linear": {"targets": "all-linear"},
    "excluded": {"targets": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.v_proj"]},
    "one_layer": {"targets": ["q_proj"], "layers_to_transform": 1},
    "ranks": {"targets": ["q_proj", "up_proj"], "rank_pattern": {"q_proj": 2},
              "alpha_pattern": {r"model.layers.1.self_attn.q_proj": 3, "^model.*up_proj": 9}},
    "dora": {"targets": "all-linear", "use_dora": True},
    "dora_ranks": {"targets": ["q_proj", "up_proj"], "use_dora": True, "rank_pattern": {"q_proj": 2}, "rslora": True},
    "rank_regex": {"targets": ["q_proj"], "rank_pattern": {r"layers\.0\..*": 1}, "rslora": True},
}  # fmt: skip


@pytest.mark.parametrize("form", PEFT_FORMS)
@torch.no_grad()
def test_adapters_with_patterns_compute_what_peft_does(base_folder, tmp_path, form):
    theirs = peft_adapter(base_folder("llama"), tmp_path / "adapter", "llama", **PEFT_FORMS[form])
    ours = folder.load_model(base_folder("llama"))
    load_adapter(ours, tmp_path / "adapter")
    ids = torch.arange(12)[None]
    torch.testing.assert_close(ours.eval()(ids), theirs.eval()(ids).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_our_patterns_are_those_of_peft(base_folder, tmp_path):
    options = options_of(rank_pattern={"q_proj": 2}, alpha_pattern={r"layers\.1\..*": 5.0})
    model = base_of("llama")
    lora.apply(model, options, 0)
    for parameter in lora.tensors(model).values():
        parameter.copy_(0.1 * torch.randn(parameter.shape))
    save_adapter(model, tmp_path, "lora", options, base=str(base_folder("llama")), base_sha256="")
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base_folder("llama")), tmp_path
    ).eval()
    again = base_of("llama")
    load_adapter(again, tmp_path)
    ids = torch.arange(12)[None]
    for one in (model, again):
        torch.testing.assert_close(one.eval()(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)


@each_family
@torch.no_grad()
def test_dora_and_layers_are_those_of_peft_and_merge(base_folder, tmp_path, name):
    """It begins as the base, opens in peft, and a merged model computes the same, with a bias and without."""
    options = options_of(dora=True, layers=[1])
    model, base = base_of(name), base_of(name).eval()
    lora.apply(model, options, 0)
    ids = torch.arange(12)[None]
    torch.testing.assert_close(model.eval()(ids), base(ids), rtol=1e-5, atol=1e-5)
    assert all(".1." in key for key in lora.tensors(model))
    for parameter in lora.tensors(model).values():
        parameter.add_(0.1 * torch.randn(parameter.shape))
    save_adapter(model, tmp_path, "lora", options, base=str(base_folder(name)), base_sha256="")
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base_folder(name)), tmp_path
    ).eval()
    again = base_of(name)
    load_adapter(again, tmp_path)
    expected = theirs(ids).logits
    for one in (model, again):
        torch.testing.assert_close(one.eval()(ids), expected, rtol=1e-5, atol=1e-5)
    with lora.disabled(model):
        torch.testing.assert_close(model(ids), base(ids))
    lora.merge(model)
    torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-4)
    assert not any("lora" in key for key in model.state_dict())


def test_a_step_of_dora_is_that_of_peft(base_folder):
    """The same gradients, with dropout off: none goes through the length of W + B A."""
    ours = base_of("llama").train()
    lora.apply(ours, options_of(dora=True), 0)
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM")
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder("llama"))
    theirs = peft.get_peft_model(base, config).train()
    mine, other = lora.tensors(ours), dict(theirs.named_parameters())
    names = {key: f"base_model.model.{key}".replace(".weight", ".default.weight") for key in mine}
    names |= {key: f"{names[key]}.default.weight" for key in mine if key.endswith("magnitude_vector")}
    with torch.no_grad():
        for key, parameter in mine.items():
            parameter.add_(0.1 * torch.randn(parameter.shape))
            other[names[key]].copy_(parameter)
    ids = torch.arange(12)[None]
    for logits in (ours(ids), theirs(ids).logits):
        logits.float().log_softmax(-1)[0, :-1, :][torch.arange(11), ids[0, 1:]].sum().backward()
    for key, parameter in mine.items():
        torch.testing.assert_close(parameter.grad, other[names[key]].grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("layers", "chosen"), [("first 1", {0}), ("last 1", {1}), ([0, 1], {0, 1})])
def test_only_some_layers_are_adapted(layers, chosen):
    model = base_of("llama")
    lora.apply(model, options_of(layers=layers), 0)
    assert {lora.block_of(key) for key in lora.tensors(model)} == chosen


@pytest.mark.parametrize("layers", [[2], "last 3", []])
def test_a_layer_that_is_not_there_is_refused(layers):
    with pytest.raises(UserError, match="names no block"):
        lora.apply(base_of("llama"), options_of(layers=layers), 0)


WRONG = {
    "r": ["4", 0, None, 4.0, True, 10**12], "lora_alpha": [None, "big", 0, -1.0, 10**400],
    "lora_dropout": ["x", 1.0, 2], "target_modules": [[1], 3], "use_rslora": [1, "yes"],
    "base_model_name_or_path": [3, ["base"]], "peft_type": [None, ["LORA"], 1],
    "trainable_token_indices": [[1], {"embed_tokens": [10**12]}, {"embed_tokens": [-1]}, {"embed_tokens": 3}],
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_senseless_values_are_refused(saved, key, value):
    rewrite(saved, **{key: value})
    refused(saved)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"r": NaN}', '{"peft_type": "LORA", "peft_type": "LORA"}'])
def test_an_adapter_config_that_is_none_is_refused(saved, text):
    (saved / "adapter_config.json").write_text(text)
    refused(saved, "can't be read")


@pytest.mark.parametrize("key", ["peft_type", "r", "lora_alpha"])
def test_a_config_that_lacks_a_necessary_key_is_refused(saved, key):
    path = saved / "adapter_config.json"
    config = json.loads(path.read_text())
    del config[key]
    path.write_text(json.dumps(config))
    refused(saved)


def test_an_adapter_for_another_model_is_refused(saved):
    refused(saved, name="gpt2")


def test_a_missing_factor_and_one_without_a_place_are_refused_by_name(saved):
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"base_model.model.lm_head.lora_A.weight": torch.ones(1)}, path)
    refused(saved, "lm_head")
    del tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"]
    save_file(tensors, path)
    refused(saved, "model.layers.1.self_attn.v_proj.lora_B")


def test_truncated_factors_are_refused(saved):
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(saved, "can't be read")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_factors_in_floats_of_every_width_are_read(saved, dtype):
    path = saved / "adapter_model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    model = base_of("llama")
    read = load_adapter(model, saved).tensors(model)
    assert all(torch.equal(parameter, tensors[f"base_model.model.{name}"].float()) for name, parameter in read.items())


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_factors_that_are_no_floats_are_refused_by_name(saved, dtype):
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    name = max(tensors)
    save_file(tensors | {name: tensors[name].to(dtype)}, path)
    refused(saved, name, "type that is not supported")


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e300])  # the last one is infinite in fp32
def test_factors_that_are_not_finite_are_refused_by_name(saved, value):
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    name = max(tensors)
    tensors[name] = tensors[name].double()
    tensors[name][0, 0] = value
    save_file(tensors, path)
    refused(saved, name.removeprefix("base_model.model."), "not finite")


def test_a_tensor_without_elements_is_one_error(saved):
    path = saved / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.x": torch.empty(0)}, path)
    refused(saved, "no place", "base_model.model.x")


# ---- files ----------------------------------------------------------------------------------------------------------

SAVE = """
import sys
from pathlib import Path
from llmkit.models import build_model, folder, gpt2
from llmkit.peft import METHODS
from llmkit.peft.adapter import save_adapter

out = Path(sys.argv[1])
for i in range(6):
    model = build_model(gpt2.Config(vocab_size=61, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    folder.save_model(model, out / "whole", eos_token_ids=[1, 2])
    name = ["lora", "bitfit"][i % 2]
    METHODS[name].apply(model, METHODS[name].options(), 0, [])
    save_adapter(model, out / f"{name}{i}", name, METHODS[name].options(), base="base", base_sha256="a-b")
"""


def test_equal_models_and_adapters_are_equal_bytes_in_every_process(tmp_path):
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", SAVE, tmp_path / seed], check=True, env=environment)
    files = {path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*.*")}
    assert len(files) == 3 + 6 * 2
    assert all((tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes() for name in files)


# ---- export ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a few words to learn from"], vocab_size=262)


@pytest.fixture(params=CONFIGS)
def trained(request, tokenizer, tmp_path):
    """Return a base and an adapter as training leaves them: (adapter's folder, the adapted model)."""
    config = type(CONFIGS[request.param])(**vars(CONFIGS[request.param]) | {"vocab_size": len(tokenizer)})
    model = build_model(config).eval()
    randomize(model.parameters())
    folder.save_model(model, tmp_path / "base", eos_token_ids=[tokenizer.eos_id])
    tokenizer.save(tmp_path / "base")
    options = lora.Options(r=4, rslora=True)
    lora.apply(model, options)
    randomize((p for p in model.parameters() if p.requires_grad), seed=5)
    digest = base_sha256(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter", "lora", options, base=str(tmp_path / "base"), base_sha256=digest)
    tokenizer.save(tmp_path / "adapter")
    return tmp_path / "adapter", model


@torch.no_grad()
def test_an_exported_adapter_opens_in_transformers_with_equal_logits(trained, tokenizer, tmp_path):
    adapter, model = trained
    export_hf(Located(adapter), tmp_path / "out", "fp32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "words to learn, a few"
    ids = their_tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    assert ids[0].tolist() == tokenizer.encode(text)
    equal(model(ids), theirs(ids).logits)
    assert theirs.config.eos_token_id == their_tokenizer.eos_token_id == tokenizer.eos_id


def test_an_adapter_ends_its_answers_as_its_base_does(trained, tokenizer, tmp_path):
    ends = [tokenizer.eos_id, tokenizer.end_of_turn_id]
    assert load_located(Located(trained[0]))[1].stop_ids == ends[:1] != ends
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    assert load_located(Located(trained[0]))[1].stop_ids == ends


@torch.no_grad()
def test_an_adapter_exported_for_peft_opens_there_with_equal_logits(trained, tmp_path):
    adapter, model = trained
    export_peft(Located(adapter), tmp_path / "out", "fp32")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    equal(model(tokens()), peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()(tokens()).logits)


def test_a_full_model_can_not_be_exported_for_peft(tmp_path):
    folder.save_model(base_of("llama"), tmp_path / "base")
    with pytest.raises(UserError) as caught:
        export_peft(Located(tmp_path / "base"), tmp_path / "out", "fp32")
    assert caught.value.code == MODEL


def test_an_adapter_on_a_base_that_changed_is_refused(trained, tmp_path):
    adapter, _ = trained
    path = tmp_path / "base" / "model.safetensors"
    weights = load_file(path)
    next(iter(weights.values())).add_(1.0)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="weights of the base have changed") as caught:
        export_hf(Located(adapter), tmp_path / "out", "fp32")
    assert caught.value.code == MODEL


def change_base(path, **changes) -> None:
    path = path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_adapter_on_a_base_whose_mathematics_changed_is_refused(trained, tmp_path):
    adapter, model = trained
    same = {"_name_or_path": "elsewhere", "transformers_version": "9", "dtype": "bfloat16", "use_cache": False}
    change_base(tmp_path, **same)
    load_located(Located(adapter))
    change_base(tmp_path, **{{"gpt2": "layer_norm_epsilon", "llama": "rms_norm_eps"}[model.config.model_type]: 1e-2})
    with pytest.raises(UserError, match=r"config\.json of the base has changed") as caught:
        load_located(Located(adapter))
    assert caught.value.code == MODEL


def test_adapters_that_remember_only_the_weights_still_open(trained, tmp_path):
    adapter, model = trained
    path = adapter / "adapter_model.safetensors"
    metadata = {"format": "pt", "base_sha256": weights_sha256(tmp_path / "base")}
    save_file(load_file(path), path, metadata=metadata)
    torch.testing.assert_close(load_located(Located(adapter))[0](tokens()), model(tokens()))


@torch.no_grad()
def test_a_base_in_16_bits_is_merged_matrix_by_matrix_and_never_in_fp32(trained, monkeypatch):
    adapter, _ = trained
    dtypes = []
    load = locate.load_model
    monkeypatch.setattr(
        locate, "load_model", lambda *args, **options: dtypes.append(options["dtype"]) or load(*args, **options)
    )
    apart, _ = load_located(Located(adapter), dtype=torch.bfloat16)
    updates = {
        name: part.lora_B.float() @ part.lora_A.float() * part.lora_scale
        for name, part in apart.named_modules()
        if isinstance(part, lora.LoRA)
    }
    merged, _ = load_located(Located(adapter), dtype=torch.bfloat16, merge=True)
    assert dtypes == [torch.bfloat16] * 2 and updates
    for name, update in updates.items():
        expected = (apart.get_submodule(name).weight.float() + update).bfloat16()
        assert torch.equal(merged.get_submodule(name).weight, expected)


def test_an_export_is_compared_with_the_model(trained, tmp_path):
    """The merge equals the adapter; a folder that was damaged after is told, and its tolerance is that of its type."""
    located = Located(trained[0])
    export_hf(located, tmp_path / "merged", "fp32")
    found = compare_exported(located, tmp_path / "merged", "hf", "fp32")
    assert found["equal_greedy_tokens"] == 1 and found["share_of_deviation"] < 1e-4
    path = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "q_proj" in key or "c_attn" in key)
    save_file(tensors | {key: tensors[key] * 1.5}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="does not compute what the model does"):
        compare_exported(located, tmp_path / "merged", "hf", "fp32")
