"""Methods beside LoRA: the same logits in peft and here, both ways; nothing changes at first; merged if possible."""

import dataclasses

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from llmkit.errors import UserError
from llmkit.generation.generate import Sampling, generate
from llmkit.models import FAMILIES, build_model, folder, gpt2, llama, mixtral
from llmkit.models.heads import HeadConfig, train_head
from llmkit.parallel.compile import compile_blocks
from llmkit.peft import METHODS, adalora, disabled, is_adapted, lora
from llmkit.peft.adapter import cast_adapter, load_adapter, options_to_continue, save_adapter
from llmkit.training.cost import make_plan
from llmkit.training.optim import OPTIMIZERS
from llmkit.training.selection import train_only

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
LONGER = SIZES | {"max_position_embeddings": 48}
CONFIGS = {
    "gpt2": gpt2.Config(**LONGER),
    "llama": llama.Config(**LONGER, num_key_value_heads=2, intermediate_size=48),
    "mixtral": mixtral.Config(**LONGER, num_key_value_heads=2, intermediate_size=48, num_local_experts=4),
}
OPTIONS = {
    "lora": {"r": 4, "rank_pattern": {"gate_up_proj": 3, "q_proj": 2}},
    "adalora": {"r": 2, "init_r": 4},
    "ia3": {},
    "adapter": {"placement": "houlsby", "reduction_factor": 8},
    "prefix": {"num_virtual_tokens": 5},
    "prompt": {"num_virtual_tokens": 5},
    "p_tuning": {"num_virtual_tokens": 5, "encoder_hidden_size": 16},
    "llama_adapter": {"adapter_len": 3},
    "bitfit": {},
}
VIRTUAL = ("prefix", "prompt", "p_tuning")
FAMILY_CASES = [
    (method, name)
    for method in OPTIONS
    for name in ("gpt2", "llama")
    if (method, name) not in (("llama_adapter", "gpt2"), ("bitfit", "llama"), ("lora", "gpt2"), ("lora", "llama"))
] + [("lora", "mixtral")]  # of the others, test_lora.py has more
every_method = pytest.mark.parametrize(("method", "name"), FAMILY_CASES)
in_peft = pytest.mark.parametrize(("method", "name"), [one for one in FAMILY_CASES if METHODS[one[0]].in_peft])
IDS = torch.arange(24).view(2, 12) % 61


@torch.no_grad()
def randomize(parameters, std: float = 0.2, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.add_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))


def base_of(name: str) -> torch.nn.Module:
    model = build_model(CONFIGS[name]).eval()
    randomize(model.parameters())
    return model


def options_of(method: str):
    return METHODS[method].options(**OPTIONS[method])


def adapted_of(method: str, name: str, trained: bool = True) -> torch.nn.Module:
    model = base_of(name)
    METHODS[method].apply(model, options_of(method), 3, [])
    if trained:
        randomize(METHODS[method].tensors(model).values(), seed=5)
    return model.eval()


@pytest.fixture
def base_folder(tmp_path):
    def save(name: str):
        folder.save_model(base_of(name), tmp_path / "base")
        return tmp_path / "base"

    return save


def equal(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@in_peft
@torch.no_grad()
def test_peft_opens_our_adapter_with_equal_logits(method, name, base_folder, tmp_path):
    base, ours = base_folder(name), adapted_of(method, name)
    save_adapter(ours, tmp_path / "adapter", method, options_of(method), base=str(base), base_sha256="")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    plain = theirs(IDS).logits
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    logits = theirs(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -12:]  # without virtual tokens
    equal(ours(IDS), logits)
    assert (logits - plain).abs().max() > 1e-2


def peft_config(method: str, name: str) -> peft.PeftConfig:
    common = {"task_type": "CAUSAL_LM"}
    virtual = common | {"num_virtual_tokens": 5}
    flipped = {"fan_in_fan_out": name == "gpt2"}
    targets = {"gpt2": ["c_attn", "mlp.c_proj"], "llama": ["k_proj", "v_proj", "down_proj"], "mixtral": ["k_proj"]}[
        name
    ]
    parameters = [f"mlp.experts.{end}" for end in ("gate_up_proj", "down_proj")]
    return {
        "lora": lambda: peft.LoraConfig(
            r=4, target_modules=targets, target_parameters=parameters, rank_pattern={"down_proj": 2}, **common
        ),
        "adalora": lambda: peft.AdaLoraConfig(
            target_r=2, init_r=4, lora_alpha=12, total_step=100, target_modules=targets, **flipped, **common
        ),
        "ia3": lambda: peft.IA3Config(target_modules=targets, feedforward_modules=targets[-1:], **flipped, **common),
        "prefix": lambda: peft.PrefixTuningConfig(**virtual, prefix_projection=True, encoder_hidden_size=16),
        "prompt": lambda: peft.PromptTuningConfig(**virtual),
        "p_tuning": lambda: peft.PromptEncoderConfig(**virtual, encoder_hidden_size=16),
        "llama_adapter": lambda: peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM"),
    }[method]()


@in_peft
@torch.no_grad()
def test_we_open_pefts_adapter_with_equal_logits(method, name, base_folder, tmp_path):
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder(name), attn_implementation="eager")
    theirs = peft.get_peft_model(base, peft_config(method, name)).eval()
    randomize(p for p in theirs.parameters() if p.requires_grad)
    if method == "adalora":  # one linear keeps no rank, as happens in a trained one
        flags = {
            key: [True, False, True, False] for key, _ in theirs.base_model.model.named_parameters() if "lora_E" in key
        }
        flags[next(iter(flags))] = [False] * 4
        theirs.base_model.rankallocator.mask_using_rank_pattern(theirs.base_model.model, flags)
        theirs.peft_config["default"].rank_pattern = flags
    expected = theirs(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -12:]
    theirs.save_pretrained(tmp_path / "adapter")
    ours = base_of(name)
    load_adapter(ours, tmp_path / "adapter")
    equal(ours.eval()(IDS), expected)


@every_method
@torch.no_grad()
def test_an_adapter_survives_saving_and_loading(method, name, tmp_path):
    ours, again = adapted_of(method, name), base_of(name)
    save_adapter(ours, tmp_path, method, options_of(method), base="", base_sha256="")
    load_adapter(again, tmp_path)
    torch.testing.assert_close(again.eval()(IDS), ours(IDS), rtol=0, atol=0)
    mine = METHODS[method].tensors(ours)
    assert METHODS[method].tensors(again).keys() == mine.keys() and is_adapted(again)
    assert all(p.requires_grad for p in mine.values())
    assert sum(p.requires_grad for p in ours.parameters()) == len(mine)


@every_method
@torch.no_grad()
def test_the_base_is_computed_when_disabled_and_at_first(method, name):
    base, ours = base_of(name), adapted_of(method, name)
    with disabled(ours):
        torch.testing.assert_close(ours(IDS), base(IDS), rtol=0, atol=0)
    assert (ours(IDS) - base(IDS)).abs().max() > 1e-2
    if method not in VIRTUAL:
        equal(adapted_of(method, name, trained=False)(IDS), base(IDS))


@every_method
@torch.no_grad()
def test_a_merged_model_computes_the_same_or_says_why_not(method, name):
    ours = adapted_of(method, name)
    expected, merge = ours(IDS), METHODS[method].merge
    if merge is None:
        assert method in ("adapter", "llama_adapter", *VIRTUAL)
        return
    merge(ours)
    equal(ours(IDS), expected, 1e-4)
    assert ours.state_dict().keys() == base_of(name).state_dict().keys() and not is_adapted(ours)


@every_method
def test_gradients_reach_every_parameter(method, name):
    ours = adapted_of(method, name)
    ours.train()
    ours(IDS, IDS.roll(-1, 1)).backward()
    for key, parameter in METHODS[method].tensors(ours).items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize(("method", "name"), [one for one in FAMILY_CASES if one[0] in (*VIRTUAL, "llama_adapter")])
@torch.no_grad()
def test_packed_rows_and_generation_read_the_virtual_tokens(method, name):
    """Each of two packed texts has the logits it has alone; greedy writing with a cache is that of whole texts."""
    ours = adapted_of(method, name)
    positions = torch.tensor([[*range(7), *range(5)]])
    segments = torch.tensor([[0] * 7 + [1] * 5])
    packed = ours(IDS[:1], positions=positions, segments=segments)
    equal(packed[:, :7], ours(IDS[:1, :7]))
    equal(packed[:, 7:], ours(IDS[:1, 7:]))
    prompts = [IDS[0, :7].tolist(), IDS[1, :4].tolist()]
    steps = list(generate(ours, prompts, max_new_tokens=5, sampling=Sampling(temperature=0.0)))
    for row, prompt in enumerate(prompts):
        text = list(prompt)
        for tokens in steps:
            assert tokens[row] == ours(torch.tensor([text]))[0, -1].argmax()
            text.append(tokens[row])


def test_virtual_tokens_take_positions_from_texts():
    ours = adapted_of("prefix", "gpt2")
    assert ours.config.max_position_embeddings == 43 and ours(torch.zeros(1, 43, dtype=torch.long)).isfinite().all()


@pytest.mark.parametrize(
    ("method", "config", "words"),
    [
        ("prefix", FAMILIES["bert"].config(**SIZES, intermediate_size=48), "no decoder alone"),
        ("prompt", FAMILIES["mistral"].config(**SIZES, sliding_window=8), "sliding windows"),
        ("llama_adapter", gpt2.Config(**LONGER), "Llama's families"),
        ("adapter", CONFIGS["mixtral"], "experts"),
        ("ia3", CONFIGS["mixtral"], "experts"),
        ("adalora", CONFIGS["mixtral"], "target_modules must be named"),
        ("dora", CONFIGS["mixtral"], "not experts"),
    ],
)
def test_a_model_that_a_method_does_not_fit_is_refused(method, config, words):
    with pytest.raises(UserError) as raised:
        METHODS[method].apply(build_model(config), METHODS[method].options(), 0, [])
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("method", "model_type"),
    [
        *((method, name) for method in ("ia3", "adapter", "adalora") for name in ("bert", "t5", "falcon", "qwen3")),
        ("bitfit", "bert"),  # the others have no biases
    ],
)
def test_other_families_have_the_linears_that_a_method_changes(method, model_type):
    """One change of each kind in every block, and twice as many adapters by Houlsby as by Pfeiffer."""
    config = FAMILIES[model_type].config(**SIZES)
    model = build_model(config, device="meta", seed=None)
    METHODS[method].apply(model, METHODS[method].options(), 0, [])
    names = {key.rpartition(".")[0] for key in METHODS[method].tensors(model)}
    blocks = len(model.blocks)
    if method == "ia3":
        assert len(names) >= (2 if model_type == "falcon" else 3) * blocks
    if method == "adapter":
        assert len(names) == blocks
        other = build_model(config, device="meta", seed=None)
        METHODS[method].apply(other, METHODS[method].options(placement="houlsby"), 0, [])
        more = {key.rpartition(".")[0] for key in METHODS[method].tensors(other)}
        assert names < more and len(more) in (2 * blocks, 5 * blocks // 2)  # a decoder beside an encoder has three


# ---- AdaLoRA --------------------------------------------------------------------------------------------------------


def test_adalora_cuts_ranks_as_peft_does(base_folder):
    """Over a run of plain gradient steps: the same losses with their penalty, and the same ranks at every step."""
    options = adalora.Options(r=2, init_r=4, alpha=12, target_modules=["q_proj", "down_proj"], every=3)
    steps = 30
    ours = base_of("llama").train()
    adalora.apply(ours, options, 0)
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder("llama"))
    config = peft.AdaLoraConfig(
        target_r=2, init_r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM",
        tinit=3, tfinal=9, deltaT=3, total_step=steps, orth_reg_weight=0.5,
    )  # fmt: skip
    theirs = peft.get_peft_model(base, config).train()
    mine = adalora.tensors(ours)
    other = {key: theirs.get_parameter(f"base_model.model.{key}.default") for key in mine}
    with torch.no_grad():
        for key, parameter in mine.items():
            other[key].copy_(parameter)
    labels = IDS.roll(-1, 1).clone()
    labels[:, -1] = -100
    optimizers = [torch.optim.SGD(one.values(), lr=0.5) for one in (mine, other)]
    for step in range(steps):
        loss = ours(IDS, labels) / (labels != -100).sum() + adalora.penalty(ours, options)
        theirs_loss = theirs(input_ids=IDS, labels=IDS).loss
        equal(loss, theirs_loss, 1e-4)
        loss.backward()
        theirs_loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        adalora.after_step(ours, options, step, steps)
        theirs.base_model.update_and_allocate(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        for key, parameter in mine.items():
            equal(parameter, other[key], 1e-4)
    kept = sum(int(parameter.count_nonzero()) for key, parameter in mine.items() if key.endswith("lora_E"))
    assert kept == 2 * 4  # of four linears


def test_a_step_that_is_skipped_leaves_no_nan_in_the_importance():
    ours = adapted_of("adalora", "llama")
    ours(IDS, IDS).backward()
    for parameter in adalora.tensors(ours).values():
        parameter.grad.fill_(torch.nan)
    adalora.after_step(ours, options_of("adalora"), 0, 100)
    assert all(one.isfinite().all() for one in adalora.state(ours).values())


def test_p_tuning_keeps_its_mlp_beside_what_peft_reads(tmp_path):
    ours = adapted_of("p_tuning", "llama")
    save_adapter(ours, tmp_path, "p_tuning", options_of("p_tuning"), base="", base_sha256="")
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved["prompt_embeddings"].shape == (5, 32)
    equal(saved["prompt_embeddings"], ours.prompt_encoder())
    assert "prompt_encoder.mlp_head.4.weight" in saved


def test_every_option_of_every_method_has_a_default():
    """`--method NAME` alone is enough."""
    for method in METHODS.values():
        assert dataclasses.asdict(method.options()).keys() == {one.name for one in dataclasses.fields(method.options)}


# ---- what is beside the factors of LoRA -----------------------------------------------------------------------------

LORA = {"r": 4, "alpha": 12.0}


def lora_of(name: str, **options) -> tuple[torch.nn.Module, lora.Options]:
    model, chosen = base_of(name), lora.Options(**LORA | options)
    lora.apply(model, chosen, 3, [])
    return model.eval(), chosen


@pytest.mark.parametrize("targets", [["down_proj"], ["q_proj", "gate_up_proj"]])
@torch.no_grad()
def test_experts_of_some_layers_are_those_that_peft_updates(targets, base_folder, tmp_path):
    ours, options = lora_of("mixtral", layers=[1], target_modules=targets)
    randomize(METHODS["lora"].tensors(ours).values(), seed=5)
    theirs = opened_by_peft(ours, options, base_folder("mixtral"), tmp_path / "adapter")
    equal(ours(IDS), theirs(input_ids=IDS).logits)
    again = base_of("mixtral")
    load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(again(IDS), ours(IDS), rtol=0, atol=0)
    names = METHODS["lora"].tensors(again).keys()
    assert names == METHODS["lora"].tensors(ours).keys() and not any(".0." in name for name in names)


def opened_by_peft(model, options, base, out):
    save_adapter(model, out, "lora", options, base=str(base), base_sha256="")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    return peft.PeftModel.from_pretrained(theirs, out).eval()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@torch.no_grad()
def test_pissa_begins_as_the_base_and_its_file_is_a_lora_of_it(name, rslora, base_folder, tmp_path):
    """Its factors are those of peft's PiSSA at first; trained, peft, llmkit and a merged model compute the same."""
    ours, options = lora_of(name, init="pissa", rslora=rslora, rank_pattern={r"1\..*": 2})
    base = base_of(name)
    equal(ours(IDS), base(IDS))
    plain = transformers.AutoModelForCausalLM.from_pretrained(base_folder(name))
    targets = {"llama": ["q_proj"], "gpt2": ["c_attn"]}[name]
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=targets, init_lora_weights="pissa", use_rslora=rslora,
        fan_in_fan_out=name == "gpt2", task_type="CAUSAL_LM",
    )  # fmt: skip
    first = dict(peft.get_peft_model(plain, config).named_parameters())
    key = {"llama": "model.layers.0.self_attn.q_proj", "gpt2": "transformer.h.0.attn.c_attn"}[name]
    theirs = [first[f"base_model.model.{key}.lora_{one}.default.weight"] for one in "BA"]
    module = ours.get_submodule(key)
    equal(module.lora_B @ module.lora_A, theirs[0] @ theirs[1])
    randomize([p for p in ours.parameters() if p.requires_grad], 0.05)
    expected = ours(IDS)
    assert (expected - base(IDS)).abs().max() > 1e-2
    equal(opened_by_peft(ours, options, tmp_path / "base", tmp_path / "out")(IDS).logits, expected, 1e-4)
    for given in (None, options):  # to use it, and to go on training
        again = base_of(name)
        load_adapter(again, tmp_path / "out", given)
        equal(again.eval()(IDS), expected, 1e-4)
    mine = [key for key, p in ours.named_parameters() if p.requires_grad]
    assert [key for key, p in again.named_parameters() if p.requires_grad] == mine
    with disabled(ours):
        equal(ours(IDS), base(IDS))
    lora.merge(ours)
    equal(ours(IDS), expected, 1e-4)


@torch.no_grad()
def test_modules_that_are_saved_are_trained_as_a_whole_and_open_in_peft(base_folder, tmp_path):
    base = base_folder("llama")
    ours, options = lora_of("llama", modules_to_save=["embed_tokens", "lm_head", "model.norm"])
    trained = {key for key, p in ours.named_parameters() if p.requires_grad and "lora" not in key}
    assert trained == {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
    randomize([p for p in ours.parameters() if p.requires_grad])
    expected = ours(IDS)
    equal(opened_by_peft(ours, options, base, tmp_path / "out")(IDS).logits, expected)
    for given in (None, options):
        again = base_of("llama")
        load_adapter(again, tmp_path / "out", given)
        equal(again.eval()(IDS), expected)
    with disabled(again):
        equal(again(IDS), base_of("llama")(IDS))
    equal(again(IDS), expected)
    lora.merge(again)
    equal(again(IDS), expected, 1e-4)
    assert again.state_dict().keys() == base_of("llama").state_dict().keys()


@torch.no_grad()
def test_a_saved_module_is_trained_in_fp32_over_a_base_in_16_bits(tmp_path):
    """A change that bf16 can't hold is there again after loading, to go on training; the merged model is in bf16."""
    ours = base_of("llama").bfloat16()
    lora.apply(ours, options := lora.Options(**LORA, modules_to_save=["lm_head"]), 0)
    ours.lm_head.weight.add_(1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(IDS).dtype == torch.bfloat16
    save_adapter(ours, tmp_path, "lora", options, base="", base_sha256="")
    again = base_of("llama").bfloat16()
    load_adapter(again, tmp_path, options)
    torch.testing.assert_close(again.lm_head.weight, ours.lm_head.weight, rtol=0, atol=0)
    lora.merge(again)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("gpt2", {"modules_to_save": ["wte"]}, "the head of this model too"),
        ("llama", {"modules_to_save": ["embedding"]}, "matches no module"),
        ("llama", {"init": "pissa", "dora": True}, "choose one"),
        ("mixtral", {"init": "pissa"}, "not experts"),
        ("mixtral", {"modules_to_save": ["experts"]}, "has an update already"),
    ],
)
def test_options_that_do_not_fit_are_refused(name, options, words):
    with pytest.raises(UserError) as raised:
        lora_of(name, **options)
    assert words in str(raised.value)


def test_learning_rates_and_decay_by_pattern():
    """LoRA+ gives B a rate of its own, as peft's optimizer does; a pattern that matches nothing is refused."""
    model, _ = lora_of("llama")
    [optimizer] = OPTIMIZERS["adamw"](model, lr=1e-3, lr_pattern={r"\.lora_B$": 1.6e-2}, weight_decay=0.1)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for key, p in lora.tensors(model).items():
        assert rates[p] == (1.6e-2 if "lora_B" in key else 1e-3)
    whole = build_model(CONFIGS["llama"])
    patterns = {"lr_pattern": {r"layers\.0\.": 1e-4}, "weight_decay_pattern": {"o_proj": 0.0, "norm": 0.2}}
    for name in ("adamw", "muon", "sgd"):
        optimizers = OPTIMIZERS[name](whole, lr=1e-3, weight_decay=0.1, **patterns)
        groups = {p: group for one in optimizers for group in one.param_groups for p in group["params"]}
        assert len(groups) == len(list(whole.parameters()))
        for key, p in whole.named_parameters():
            assert groups[p]["lr"] == (1e-4 if "layers.0." in key else 1e-3), (name, key)
            decay = 0.0 if "o_proj" in key else 0.2 if "norm" in key else 0.1
            assert groups[p]["weight_decay"] == decay, (name, key)
    with pytest.raises(UserError, match="matches no trained parameter"):
        OPTIMIZERS["adamw"](whole, lr_pattern={"lora": 1.0})


@pytest.mark.parametrize(
    ("only", "names"),
    [
        (["last 1"], "layers.1."),
        (["first 1"], "layers.0."),
        (["head"], "lm_head"),
        ([r"\.down_proj\."], "down_proj"),
        (["last 1", "head"], "layers.1. lm_head"),
    ],
)
def test_a_part_of_a_model_is_trained(only, names):
    model = build_model(CONFIGS["llama"])
    train_only(model, only)
    for key, p in model.named_parameters():
        assert p.requires_grad == any(one in key for one in names.split())
    model(IDS, IDS.roll(-1, 1)).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_a_part_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="names no parameter"):
        train_only(build_model(CONFIGS["gpt2"]), ["head"])


def test_patterns_name_blocks_of_a_deep_model_and_muon_trains_parts():
    """The planner, which takes a step of fewer blocks, refuses none of them; Muon alone, and without matrices."""
    config = llama.Config(**LONGER | {"num_hidden_layers": 8})
    options = {"lr_pattern": {r"layers\.7\.": 1e-4}}
    sizes = {"seq_len": 16, "micro_batch_size": 1, "precision": "fp32"}
    assert make_plan(config, optimizer=("adamw", options), **sizes).peak_memory > 0
    model = build_model(CONFIGS["llama"])
    train_only(model, ["up_proj"])
    assert len(OPTIMIZERS["muon"](model)) == 1
    train_only(model, ["head"])
    with pytest.raises(UserError, match="nothing to train"):
        OPTIMIZERS["muon"](model)


def test_virtual_tokens_take_no_block_masks():
    """On a GPU, compiled packed rows have block masks, to which no columns can be added."""
    model = adapted_of("prefix", "llama")
    model.block_masks = True
    compile_blocks(model, torch.device("cpu"), "fp32")
    assert not model.block_masks


def test_a_head_and_modules_that_are_saved_are_both_named(base_folder, tmp_path):
    """An adapter with a head for labels and a norm of its own is opened, and trained further with the same modules."""
    head = HeadConfig("classify", ("no", "yes"), "last")
    base = base_folder("llama")
    ours = folder.load_model(base, head=head)
    lora.apply(ours, options := lora.Options(**LORA, modules_to_save=["model.norm"]), 0)
    train_head(ours)
    randomize([p for p in ours.parameters() if p.requires_grad])
    save_adapter(ours, tmp_path / "out", "lora", options, base=str(base), base_sha256="")
    kept = options_to_continue(tmp_path / "out", base, "lora", {"dropout": 0.1})
    assert kept["modules_to_save"] == ["model.norm"] and kept["r"] == 4 and kept["dropout"] == 0.1
    for given in (None, lora.Options(**kept | {"dropout": 0.0})):
        again = folder.load_model(base, head=head)
        load_adapter(again, tmp_path / "out", given)
        equal(again.eval()(IDS), ours.eval()(IDS))
    ia3 = METHODS["ia3"].options()
    other = folder.load_model(base, head=head)
    METHODS["ia3"].apply(other, ia3, 0, [])
    train_head(other)
    save_adapter(other, tmp_path / "ia3", "ia3", ia3, base=str(base), base_sha256="")
    assert METHODS["ia3"].options(**options_to_continue(tmp_path / "ia3", base, "ia3", {}))


@pytest.mark.parametrize("saved", [["q_proj"], ["down_proj"]])
def test_a_linear_is_not_trained_twice_or_in_parts(saved, base_folder):
    model = folder.load_model(base_folder("llama"), quantize=("nf4", {}))
    with pytest.raises(UserError, match="quantized, or that has an update"):
        lora.apply(model, lora.Options(**LORA, target_modules=["q_proj"], modules_to_save=saved), 0)


def test_factors_of_about_one_stay_in_fp32_beside_a_base_in_16_bits():
    model = adapted_of("ia3", "llama").bfloat16()
    with torch.no_grad():
        for p in METHODS["ia3"].tensors(model).values():
            p.data = torch.full(p.shape, 1.001)
    cast_adapter(model, torch.bfloat16)
    assert all((p == torch.tensor(1.001)).all() for p in METHODS["ia3"].tensors(model).values())
    assert model(IDS).dtype == torch.bfloat16


@pytest.mark.parametrize(("warmup", "final"), [(0.75, 0.3), (0.5, 0.5)])
def test_adalora_needs_steps_to_cut_ranks_in(warmup, final):
    with pytest.raises(UserError, match="leave no steps"):
        adalora.apply(base_of("llama"), adalora.Options(warmup=warmup, final=final), 0)
    assert adalora.budget(adalora.Options(warmup=0.3, final=0.3), 1, 1, 1) == 8  # however few steps there are
