"""Optimizers against torch's own, skipped steps, groups, clipping and schedules against numbers worked out by hand."""

import math
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llmkit.errors import ENVIRONMENT, UserError
from llmkit.models import build_model, gpt2, llama, mixtral, t5
from llmkit.peft import lora
from llmkit.storage.checkpoint import optimizer_tensors, restore_optimizers
from llmkit.training.adamw import AdamW, dequantize, dynamic_map, quantize, round_to_bf16
from llmkit.training.cost import make_plan
from llmkit.training.fit import check_memory
from llmkit.training.optim import (
    Muon,
    adamw,
    adamw8bit,
    clip,
    muon,
    muon_matrices,
    newton_schulz_dtype,
    orthogonalize,
    set_lr,
    sgd,
)
from llmkit.training.schedules import constant, cosine, linear, wsd

SMALL = {"vocab_size": 17, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VARIANTS = {
    "adamw": adamw,
    "adamw-bf16": partial(adamw, state_dtype="bf16"),
    "adamw-cautious": partial(adamw, cautious_weight_decay=True),
    "adamw8bit": adamw8bit,
    "muon": muon,
    "normuon": partial(muon, row_scaling=True, cautious_weight_decay=True),
    "sgd": sgd,
    "sgd-plain": partial(sgd, momentum=0.0),
}
each_optimizer = pytest.mark.parametrize("optimizer", VARIANTS.values(), ids=VARIANTS)
each_family = pytest.mark.parametrize("family", [gpt2, llama], ids=["gpt2", "llama"])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_gradients(params: list[nn.Parameter], step: int = 0) -> None:
    for i, parameter in enumerate(params):
        parameter.grad = random(*parameter.shape, seed=100 * step + i)


# ---- Muon -----------------------------------------------------------------------------------------------------------

SHAPES = [(8, 8), (8, 8), (8, 24), (24, 8), (24, 8), (24, 8), (5, 7), (1, 6)]
LR, STEPS = 0.02, 5


@pytest.mark.parametrize("adjust_lr", ["match_rms_adamw", "original"])
def test_muon_equals_torchs(adjust_lr):
    """Only as far as bf16 goes: where batched and single products round differently, an update's entry, at most about
    1.2 of the scaled rate, is off by an ulp or two (2^-8 each), and STEPS of them add up. On most machines both agree
    to fp32. A slip in momentum, decay or scale would show as a good part of a whole update.
    """
    ours = [nn.Parameter(random(*shape, seed=i)) for i, shape in enumerate(SHAPES)]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    a = Muon(ours, LR, weight_decay=0.1, momentum=0.9, adjust_lr=adjust_lr)
    b = torch.optim.Muon(theirs, LR, weight_decay=0.1, momentum=0.9, adjust_lr_fn=adjust_lr)
    for step in range(STEPS):
        for params, optimizer in ((ours, a), (theirs, b)):
            with_gradients(params, step)
            optimizer.step()
    for mine, yours in zip(ours, theirs, strict=True):
        rows, columns = mine.shape
        scale = 0.2 * math.sqrt(max(rows, columns)) if adjust_lr != "original" else math.sqrt(max(1, rows / columns))
        torch.testing.assert_close(mine, yours, rtol=1e-5, atol=STEPS * LR * scale * 2 * 2**-8)
        torch.testing.assert_close(a.state[mine]["momentum_buffer"], b.state[yours]["momentum_buffer"])


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 32), (2, 32, 8)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    values = torch.linalg.svdvals(orthogonalize(random(*shape)).float())
    assert values.min() > 0.3  # a square random matrix has tiny ones, which five steps lift but not all the way
    assert values.max() < 1.3


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_newton_schulz_runs_in_bf16_only_where_the_device_multiplies_it(monkeypatch, fast, dtype):
    monkeypatch.setattr("llmkit.training.optim.has_fast_bf16", lambda device: fast)
    monkeypatch.setattr("llmkit.training.optim.newton_schulz_dtype", newton_schulz_dtype.__wrapped__)  # not cached
    assert orthogonalize(random(2, 4, 6)).dtype == dtype


def test_orthogonalizing_zero_gives_zero():
    assert (orthogonalize(torch.zeros(2, 4, 6)) == 0).all()


@each_family
def test_muon_gets_exactly_the_matrices_of_the_blocks(family):
    model = build_model(family.Config(**SMALL))
    first, second = muon(model, lr=0.01)
    names = {id(p): name for name, p in model.named_parameters()}
    got = {names[id(p)] for group in first.param_groups for p in group["params"]}
    rest = {names[id(p)] for group in second.param_groups for p in group["params"]}
    prefix = "transformer.h." if family is gpt2 else "model.layers."
    assert got == {name for name, p in model.named_parameters() if name.startswith(prefix) and p.dim() == 2}
    assert rest == set(names.values()) - got
    assert isinstance(first, Muon)
    assert isinstance(second, torch.optim.AdamW)


def test_muon_takes_experts_and_routers_but_no_tables():
    sizes = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for config in (mixtral.Config(**sizes), t5.Config(**sizes)):
        model = build_model(config)
        named = dict(model.named_parameters())
        taken = {id(p) for p in muon_matrices(model)}
        rest = {name.split(".")[-2] for name, p in named.items() if id(p) not in taken and p.dim() >= 2}
        tables = {"mixtral": {"embed_tokens", "lm_head"}, "t5": {"shared", "relative_attention_bias"}}
        assert rest == tables[config.model_type]


def test_muon_takes_none_of_loras_factors():
    model = build_model(llama.Config(**SMALL))
    lora.apply(model, lora.Options(r=2))
    assert any(p.requires_grad for p in model.blocks.parameters()) and not muon_matrices(model)


def test_a_model_beyond_the_memory_is_refused_before_it_is_built():
    config = llama.Config(vocab_size=1000, hidden_size=2**15, num_attention_heads=64, num_hidden_layers=1000)
    options = {"seq_len": 8, "micro_batch_size": 1, "precision": "fp32"}
    check_memory(make_plan(llama.Config(**SMALL), **options), 2**40, "")
    for peft in (None, ("lora", {"r": 8})):
        with pytest.raises(UserError, match="do not fit") as caught:
            check_memory(make_plan(config, peft=peft, **options), 2**40, "")
        assert caught.value.code == ENVIRONMENT


def test_muons_adamw_takes_its_own_lr_or_muons():
    model = build_model(llama.Config(**SMALL))
    assert [optimizer.param_groups[0]["lr"] for optimizer in muon(model, lr=0.01)] == [0.01, 0.01]
    assert [optimizer.param_groups[0]["lr"] for optimizer in muon(model, lr=0.01, adamw_lr=0.5)] == [0.01, 0.5]


# ---- AdamW ----------------------------------------------------------------------------------------------------------


@each_family
@pytest.mark.parametrize("optimizer", [adamw, muon], ids=["adamw", "muon"])
def test_only_matrices_decay_and_every_parameter_is_trained_once(family, optimizer):
    model = build_model(family.Config(**SMALL))
    groups = [group for one in optimizer(model, weight_decay=0.3) for group in one.param_groups]
    for group in groups:
        assert all(group["weight_decay"] == (0.3 if p.dim() == 2 else 0.0) for p in group["params"])
    trained = [id(p) for group in groups for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in model.parameters())


def test_frozen_parameters_are_in_no_group():
    model = build_model(llama.Config(**SMALL)).requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    (optimizer,) = adamw(model)
    assert [p for group in optimizer.param_groups for p in group["params"]] == [model.model.norm.weight]


def test_adamw_is_the_papers_step():
    model = nn.Linear(3, 2)
    (optimizer,) = adamw(model, lr=0.1, betas=[0.8, 0.9], eps=1e-3, weight_decay=0.5)
    before = {p: p.detach().clone() for p in model.parameters()}
    with_gradients(list(model.parameters()))
    optimizer.step()
    for p, old in before.items():  # both bias corrections cancel (1 - beta) at the first step
        decay = 1 - 0.1 * 0.5 if p.dim() == 2 else 1.0
        torch.testing.assert_close(p.detach(), old * decay - 0.1 * p.grad / (p.grad.abs() + 1e-3))


def one_step(optimizer: torch.optim.Optimizer, p: nn.Parameter, grad: torch.Tensor) -> torch.Tensor:
    p.grad = grad
    optimizer.step()
    return p.detach()


def test_ours_equals_torchs_adamw():
    mine, theirs = (nn.Parameter(random(3, 64, 64)) for _ in range(2))
    shared = {"lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.2}
    ours = AdamW([mine], **shared, state_dtype="fp32", cautious=False)
    torchs = torch.optim.AdamW([theirs], **shared)
    for step in range(6):
        one_step(ours, mine, random(3, 64, 64, seed=step))
        one_step(torchs, theirs, random(3, 64, 64, seed=step))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("state_dtype", "most"), [("bf16", 0.005), ("int8", 0.05)])
def test_fewer_bits_stay_close_to_fp32(state_dtype, most, monkeypatch):
    """Relative to the way that the weights went. Parts of a tensor are updated as the whole is."""
    start, shared, made = random(64, 64), {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "cautious": False}, {}
    for dtype, part in (("fp32", 2**26), (state_dtype, 2**26), (state_dtype, 1024)):
        monkeypatch.setattr("llmkit.training.adamw.PART", part)
        p = nn.Parameter(start.clone())
        optimizer = AdamW([p], **shared, state_dtype=dtype)
        for step in range(50):
            one_step(optimizer, p, random(64, 64, seed=step) + 0.5 * random(64, 64, seed=1000))
        made[dtype, part] = p.detach() - start
    reference, whole, parts = made.values()
    assert 0 < (whole - reference).norm() / reference.norm() < most
    assert (parts - reference).norm() / reference.norm() < most


def test_state_of_8_bits_takes_a_byte_for_an_element_and_small_tensors_keep_fp32():
    matrix, small = nn.Parameter(random(64, 64)), nn.Parameter(random(63, 65))
    optimizer = AdamW([matrix, small], 0.1, (0.9, 0.95), 1e-8, state_dtype="int8", cautious=False)
    matrix.grad, small.grad = torch.ones(64, 64), torch.ones(63, 65)
    optimizer.step()
    state = optimizer.state[matrix]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.uint8
    assert state["exp_avg_scale"].shape == state["exp_avg_sq_scale"].shape == (16,)
    assert optimizer.state[small]["exp_avg"].dtype == torch.float32


def test_the_maps_of_8_bits_are_the_papers():
    """2^i fractions of a decade, doubled without a sign; one and zero. The numbers are bitsandbytes'."""
    cpu = torch.device("cpu")
    signed, unsigned = dynamic_map(True, cpu), dynamic_map(False, cpu)
    assert len(signed.unique()) == len(unsigned.unique()) == 256
    assert signed[-1] == unsigned[-1] == 1 and signed[127] == unsigned[0] == 0
    torch.testing.assert_close(signed[128:131], torch.tensor([5.5e-7, 3.25e-6, 7.75e-6]))
    torch.testing.assert_close(unsigned[1:4], torch.tensor([3.25e-7, 7.75e-7, 2.125e-6]))
    torch.testing.assert_close(signed[[0, -2]], torch.tensor([-0.99296875, 0.99296875]))
    torch.testing.assert_close(unsigned[-2], torch.tensor(0.996484375))


@pytest.mark.parametrize("signed", [True, False])
def test_quantizing_takes_the_nearest_value_of_the_map(signed):
    x = random(512) if signed else random(512).square()
    x[256:] = 0  # a block of zeros
    codes, scale = quantize(x, signed)
    back, values = dequantize(codes, scale, signed), dynamic_map(signed, x.device)
    nearest = (x[:256, None] / scale[0] - values).abs().min(1).values * scale[0]
    torch.testing.assert_close((back[:256] - x[:256]).abs(), nearest, rtol=1e-4, atol=1e-7)
    assert (back[256:] == 0).all() and scale[0] == x.abs().max()


def test_bf16_is_rounded_without_bias_over_the_steps_and_what_fits_stays():
    x = torch.full((1000,), 1 + 2**-7 / 8)  # an eighth of the way to the next bf16
    rounded = torch.stack([round_to_bf16(x, torch.tensor(float(step))) for step in range(1, 801)]).float()
    assert set(rounded.flatten().tolist()) == {1.0, 1 + 2**-7}
    assert ((rounded.mean(0) - 1) / 2**-7 - 1 / 8).abs().max() < 0.01  # every element, over the steps
    fits = random(1000).bfloat16()
    assert torch.equal(round_to_bf16(fits.float(), torch.tensor(3.0)), fits)


def test_an_average_of_squares_in_bf16_follows_a_beta_of_0999():
    p = nn.Parameter(torch.zeros(8, 8))
    optimizer = AdamW([p], 1e-3, (0.9, 0.999), 1e-8, state_dtype="bf16", cautious=False)
    one_step(optimizer, p, torch.ones(8, 8))
    for _ in range(700):
        one_step(optimizer, p, torch.zeros(8, 8))
    got = optimizer.state[p]["exp_avg_sq"].float() / (1e-3 * 0.999**700)  # to the nearest, it would be 2.01
    assert got.min() > 0.9 and got.max() < 1.1


def test_cautious_decay_by_hand():
    """The first update of AdamW is the gradient's sign; the first two weights have it too, and only they decay."""
    weights, grad = torch.tensor([[2.0, -3.0, 4.0, -5.0]]), torch.tensor([[1.0, -1.0, -1.0, 1.0]])
    decayed = torch.tensor([[0.9, 0.9, 1.0, 1.0]])  # 1 - lr * weight_decay
    shared = {"lr": 0.1, "weight_decay": 1.0}
    p = nn.Parameter(weights.clone())
    one_step(AdamW([p], betas=(0.9, 0.95), eps=1e-12, state_dtype="fp32", cautious=True, **shared), p, grad)
    torch.testing.assert_close(p.detach(), weights * decayed - 0.1 * grad)
    p = nn.Parameter(weights.clone())
    one_step(Muon([p], momentum=0.0, adjust_lr="original", cautious=True, **shared), p, grad)
    torch.testing.assert_close(p.detach(), weights * decayed - 0.1 * orthogonalize(grad[None])[0].float())


def test_row_scaling_by_hand():
    """Two steps of NorMuon: v = 0.95 v + 0.05 mean(O^2) in each row, O / sqrt(v), with the norm that O had."""
    p, squares = nn.Parameter(torch.zeros(2, 4, 6)), torch.zeros(2, 4, 1)
    optimizer = Muon([p], 0.1, weight_decay=0.0, momentum=0.0, adjust_lr="original", row_scaling=True)
    plain = nn.Parameter(torch.zeros(2, 4, 6))
    muon_ = Muon([plain], 0.1, weight_decay=0.0, momentum=0.0, adjust_lr="original")
    for step in range(2):
        grad, before, plain_before = random(2, 4, 6, seed=step), p.detach().clone(), plain.detach().clone()
        o = orthogonalize(grad).float()
        squares = 0.95 * squares + 0.05 * o.square().mean(-1, keepdim=True)
        scaled = o / squares.sqrt()
        scaled *= (o.square().sum((1, 2)) / scaled.square().sum((1, 2))).sqrt()[:, None, None]
        moved, plainly = one_step(optimizer, p, grad) - before, one_step(muon_, plain, grad) - plain_before
        torch.testing.assert_close(moved, -0.1 * scaled)
        torch.testing.assert_close(moved.norm(dim=(1, 2)), plainly.norm(dim=(1, 2)))
        assert not torch.allclose(moved, plainly, rtol=0.01)
    torch.testing.assert_close(optimizer.state[p]["row_squares"], squares)


# ---- SGD ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"momentum": 0.0}, {"nesterov": True}, {"momentum": 0.0, "nesterov": True}])
def test_sgd_equals_torchs(options):
    ours, theirs = (build_model(llama.Config(**SMALL), seed=1) for _ in range(2))
    (a,) = sgd(ours, lr=0.1, weight_decay=0.3, **options)
    matrices, vectors = [p for p in theirs.parameters() if p.dim() > 1], [p for p in theirs.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors}]
    momentum = options.get("momentum", 0.9)
    b = torch.optim.SGD(groups, lr=0.1, momentum=momentum, nesterov=bool(options.get("nesterov") and momentum))
    for step in range(3):
        for model, optimizer in ((ours, a), (theirs, b)):
            with_gradients(list(model.parameters()), step)
            optimizer.step()
    assert all(torch.allclose(x, y) for x, y in zip(ours.parameters(), theirs.parameters(), strict=True))


# ---- learning rates of groups ---------------------------------------------------------------------------------------

RATES = {"embedding_lr": 1.0, "head_lr": 2.0, "scalar_lr": 3.0}


@pytest.mark.parametrize("optimizer", [adamw, adamw8bit, muon], ids=["adamw", "adamw8bit", "muon"])
@pytest.mark.parametrize("rates", [{}, RATES])
def test_each_group_has_its_own_rate_or_lr(optimizer, rates):
    for family, tied in ((llama, False), (llama, True), (gpt2, True)):
        model = build_model(family.Config(**SMALL, tie_word_embeddings=tied))
        groups = [group for one in optimizer(model, lr=0.5, **rates) for group in one.param_groups]
        got = {id(p): group["lr"] for group in groups for p in group["params"]}
        assert len(got) == len(list(model.parameters()))
        for name, p in model.named_parameters():
            kind = "scalar_lr" if p.dim() < 2 else "head_lr" if "lm_head" in name else "embedding_lr"
            table = any(part in name for part in ("embed_tokens", "wte", "wpe", "lm_head"))
            assert got[id(p)] == (rates.get(kind, 0.5) if p.dim() < 2 or table else 0.5), name


def test_the_rates_of_muons_adamw_fall_back_to_adamw_lr():
    _, second = muon(build_model(llama.Config(**SMALL)), lr=0.5, adamw_lr=0.1, head_lr=2.0)
    assert sorted(group["lr"] for group in second.param_groups) == [0.1, 0.1, 2.0]


# ---- a step that is not finite --------------------------------------------------------------------------------------


def state_of(optimizers: list, model: nn.Module) -> list[torch.Tensor]:
    """Return copies of the weights and the optimizer state."""
    states = [v for one in optimizers for state in one.state.values() for v in state.values()]
    return [tensor.detach().clone() for tensor in (*model.parameters(), *states)]


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@each_optimizer
def test_a_step_with_found_inf_changes_neither_weights_nor_state(optimizer, bad):
    model = build_model(gpt2.Config(**SMALL | {"hidden_size": 32}))  # the MLP's matrices are stored in 8 bits
    optimizers = optimizer(model)
    params = list(model.parameters())

    def step(found: float) -> None:
        for one in optimizers:
            one.found_inf = torch.tensor(found)
            one.step()

    with_gradients(params)
    step(0.0)
    before = state_of(optimizers, model)
    for parameter in params:
        parameter.grad.fill_(bad)
    step(1.0)
    after = state_of(optimizers, model)
    assert (len(before) > len(params)) is (optimizer is not VARIANTS["sgd-plain"])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@each_optimizer
def test_a_first_step_with_found_inf_leaves_the_weights_alone(optimizer):
    model = build_model(gpt2.Config(**SMALL))
    before = [p.detach().clone() for p in model.parameters()]
    for one in optimizer(model):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, math.nan)
        one.found_inf = torch.tensor(1.0)
        one.step()
        assert all(torch.isfinite(v).all() for state in one.state.values() for v in state.values())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@each_optimizer
def test_found_inf_of_zero_is_an_ordinary_step(optimizer):
    results = []
    for found in (None, torch.tensor(0.0)):
        model = build_model(gpt2.Config(**SMALL))
        for one in optimizer(model):
            with_gradients(list(model.parameters()))
            if found is not None:
                one.found_inf = found
            one.step()
        results.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- state that is saved --------------------------------------------------------------------------------------------


@each_optimizer
def test_saved_and_restored_state_goes_on_bit_for_bit(optimizer, tmp_path):
    """Steps 3 and 4 after steps 1 and 2 and a checkpoint, against four steps in one go."""

    def steps(model: nn.Module, optimizers: list, numbers: range) -> None:
        for step in numbers:
            with_gradients(list(model.parameters()), step)
            for one in optimizers:
                one.step()

    once, twice = (build_model(gpt2.Config(**SMALL | {"hidden_size": 32}), seed=1) for _ in range(2))
    all_at_once, before, after = optimizer(once), optimizer(twice), optimizer(twice)
    steps(once, all_at_once, range(4))
    steps(twice, before, range(2))
    save_file(optimizer_tensors(twice, before), tmp_path / "state.safetensors")
    restore_optimizers(twice, after, load_file(tmp_path / "state.safetensors"))
    steps(twice, after, range(2, 4))
    expected, got = optimizer_tensors(once, all_at_once), optimizer_tensors(twice, after)
    assert expected.keys() == got.keys() and all(torch.equal(expected[key], got[key]) for key in expected)
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), twice.parameters(), strict=True))


# ---- clipping -------------------------------------------------------------------------------------------------------


def clip_case(scale: float = 1.0) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.zeros(shape)) for shape in [(3, 4), (5,), (2, 2)]]
    with_gradients(params)
    for parameter in params:
        parameter.grad *= scale
    return [*params, nn.Parameter(torch.zeros(2))]  # the last has no gradient


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("max_norm", [0.5, 1.0, 100.0])
def test_clipping_equals_torchs_once_the_loss_scale_is_undone(max_norm, scale):
    ours, theirs = clip_case(scale), clip_case()
    norm, found_inf = clip(ours, max_norm, torch.tensor(scale))
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs, max_norm))
    assert found_inf == 0
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_without_a_limit_only_the_loss_scale_is_undone():
    ours, plain = clip_case(8.0), clip_case()
    norm, _ = clip(ours, None, torch.tensor(8.0))
    torch.testing.assert_close(norm, torch.cat([p.grad.flatten() for p in plain[:3]]).norm())
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours[:3], plain[:3], strict=True))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_one_gradient_that_is_not_finite_is_found(bad):
    params = clip_case()
    params[1].grad[2] = bad
    _, found_inf = clip(params, 1.0, torch.tensor(1.0))
    assert found_inf == 1


# ---- schedules ------------------------------------------------------------------------------------------------------


def assert_factors(schedule, max_steps: int, expected: dict[int, float], **options) -> None:
    assert {step: schedule(step, max_steps, **options) for step in expected} == pytest.approx(expected)


def test_constant_by_hand():
    assert_factors(constant, 100, {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 50: 1.0, 99: 1.0}, warmup_steps=4)
    assert_factors(constant, 100, {0: 1.0, 50: 1.0, 99: 1.0})


def test_linear_by_hand():
    assert_factors(linear, 100, {0: 1.0, 25: 0.75, 50: 0.5, 99: 0.01})
    # the line begins at step 20, 80 steps from the end
    warm = {0: 0.05, 9: 0.5, 19: 1.0, 20: 1.0, 60: 0.6, 99: 0.21}
    assert_factors(linear, 100, warm, warmup_steps=20, min_lr_ratio=0.2)


def test_cosine_by_hand():
    assert_factors(cosine, 100, {0: 1.0, 50: 0.55, 75: 0.1 + 0.45 * (1 - 0.5**0.5)})
    # thirds of the way: the cosine of 60 and 120 degrees is +-1/2, so three and one quarters of the height are left
    warm = {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 40: 0.75, 55: 0.5, 70: 0.25}
    assert_factors(cosine, 100, warm, warmup_steps=10, min_lr_ratio=0.0)


def test_wsd_by_hand():
    # stable until step 61 (102 * 0.6 = 61.2, rounded), then 41 steps down to the end
    expected = {0: 0.1, 9: 1.0, 10: 1.0, 50: 1.0, 61: 1.0, 62: 40 / 41, 101: 1 / 41}
    assert_factors(wsd, 102, expected, warmup_steps=10)
    assert_factors(wsd, 100, {0: 1.0, 20: 1.0, 60: 0.75, 80: 0.625}, decay_fraction=0.8, min_lr_ratio=0.5)


@pytest.mark.parametrize("schedule", [constant, linear, cosine, wsd])
def test_factors_stay_between_zero_and_one_for_every_length(schedule):
    for max_steps in (1, 2, 3, 17):
        for warmup_steps in (0, 1, 5, 40):
            factors = [schedule(step, max_steps, warmup_steps=warmup_steps) for step in range(max_steps + 3)]
            assert all(0 <= factor <= 1 for factor in factors)


@pytest.mark.parametrize("schedule", [linear, cosine, wsd])
def test_beyond_the_last_step_the_factor_stays_at_the_least(schedule):
    assert schedule(200, 100, min_lr_ratio=0.1) == pytest.approx(0.1)


def test_factors_multiply_the_first_lr_however_often_they_are_set():
    optimizers = muon(build_model(llama.Config(**SMALL)), lr=0.1, adamw_lr=0.4)
    assert set_lr(optimizers, 0.5) == pytest.approx(0.05)
    assert set_lr(optimizers, 0.25) == pytest.approx(0.025)
    assert optimizers[1].param_groups[0]["lr"] == pytest.approx(0.1)
