"""Optimizers against torch's own, skipped steps, groups, clipping and schedules against numbers worked out by hand."""

import math

import pytest
import torch
from torch import nn

from llmkit.errors import ENVIRONMENT, UserError
from llmkit.models import build_model, gpt2, llama, mixtral, t5
from llmkit.peft import lora
from llmkit.training.cost import make_plan
from llmkit.training.fit import check_memory
from llmkit.training.optim import Muon, adamw, clip, muon, muon_matrices, orthogonalize, set_lr
from llmkit.training.schedules import constant, cosine, linear, wsd

SMALL = {"vocab_size": 17, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
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


# ---- a step that is not finite --------------------------------------------------------------------------------------


def state_of(optimizers: list, model: nn.Module) -> list[torch.Tensor]:
    """Return copies of the weights and the optimizer state."""
    states = [v for one in optimizers for state in one.state.values() for v in state.values()]
    return [tensor.detach().clone() for tensor in (*model.parameters(), *states)]


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("optimizer", [adamw, muon], ids=["adamw", "muon"])
def test_a_step_with_found_inf_changes_neither_weights_nor_state(optimizer, bad):
    model = build_model(gpt2.Config(**SMALL))
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
    assert len(before) > len(params)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("optimizer", [adamw, muon], ids=["adamw", "muon"])
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


@pytest.mark.parametrize("optimizer", [adamw, muon], ids=["adamw", "muon"])
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
