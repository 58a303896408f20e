"""Test what the machine decides: the precision of "auto", fp8, and `deterministic`."""

import pytest
import torch

from llmkit.errors import MachineError
from llmkit.models import CONFIGS, build_model
from llmkit.parallel.compile import missing_compiler, takes_block_masks
from llmkit.parallel.device import choose_precision, describe_precision, make_deterministic
from llmkit.parallel.fp8 import apply_fp8, fp8_obstacle
from llmkit.parallel.world import start_world

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("flags", "auto"),
    [("fpu avx512_bf16 amx_tile", "bf16"), ("fpu amx_bf16", "bf16"), ("fpu avx2 avx512f", "fp32"), (None, "fp32")],
)
def test_auto_is_bf16_where_the_cpu_multiplies_it(tmp_path, monkeypatch, flags, auto):
    if flags:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nbugs\t\t: avx512_bf16\nflags\t\t: {flags}\n")
    monkeypatch.setattr("llmkit.parallel.device.CPUINFO", tmp_path / "cpuinfo")
    assert choose_precision("auto", CPU) == auto
    assert [choose_precision(asked, CPU) for asked in ("bf16", "fp16", "fp32")] == ["bf16", "fp16", "fp32"]


@pytest.mark.parametrize(("supported", "auto"), [(True, "bf16"), (False, "fp16")])
def test_auto_on_a_gpu_is_fp16_without_bf16_in_hardware(monkeypatch, supported, auto):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or supported)
    assert choose_precision("auto", torch.device("cuda")) == auto


def test_deterministic_asks_cuda_and_leaves_a_cpu_alone(monkeypatch):
    asked, environment = [], {}
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setattr("os.environ", environment)
    make_deterministic(CPU)
    assert not asked and not environment
    make_deterministic(torch.device("cuda"))
    assert asked == [True] and environment == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def test_each_rank_needs_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(MachineError, match="fewer GPUs than ranks"):
        start_world.__wrapped__()


@pytest.mark.parametrize(("device", "lacks"), [("cuda", "no Python.h"), ("cpu", None)])
def test_compiling_for_a_gpu_needs_pythons_headers(tmp_path, monkeypatch, device, lacks):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    missing = missing_compiler(torch.device(device))
    assert missing.startswith(lacks) if lacks else missing is None
    (tmp_path / "Python.h").touch()
    assert missing_compiler(torch.device(device)) is None


@pytest.mark.parametrize(
    ("device", "precision", "said"),
    [("cuda", "fp32", "fp32 (products too, not TF32)"), ("cuda", "bf16", "bf16"), ("cpu", "fp32", "fp32")],
)
def test_the_header_says_what_fp32_products_use_on_a_gpu_alone(device, precision, said):
    assert describe_precision(torch.device(device), precision) == said


def test_fp32_products_on_a_gpu_are_fp32_whatever_was_set_before(monkeypatch):
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    try:
        torch.set_float32_matmul_precision("high")
        start_world.__wrapped__()
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


# ---- fp8 ------------------------------------------------------------------------------------------------------------


def test_fp8_is_for_large_linears_of_the_blocks_and_close_to_bf16(monkeypatch):
    """Rounded to fp8, and multiplied in bf16: what a GPU computes, but for the order of its sums."""
    monkeypatch.setattr("llmkit.parallel.fp8.LARGE", 64)
    config = CONFIGS["llama"](vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                              num_key_value_heads=2)  # fmt: skip
    plain, ours = (build_model(config, seed=0) for _ in range(2))
    assert apply_fp8(ours, emulate=True) == 2 * 5  # not the keys and values, which are 32 wide
    assert type(ours.lm_head) is type(plain.lm_head) and ours.state_dict().keys() == plain.state_dict().keys()
    ids = torch.randint(128, (4, 64), generator=torch.Generator().manual_seed(0))
    losses = []
    for model in (plain, ours):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model(ids, ids.flip(1)))
        losses[-1].backward()
    assert losses[0].item() != losses[1].item() and losses[0].item() == pytest.approx(losses[1].item(), rel=1e-3)
    for a, b in zip(plain.parameters(), ours.parameters(), strict=True):
        assert (a.grad - b.grad).norm() < 0.15 * a.grad.norm()


@pytest.mark.parametrize(
    ("device", "capability", "precision", "reason"),
    [
        ("cpu", None, "bf16", "compute capability 8.9"),
        ("cuda", (8, 0), "bf16", "compute capability 8.9"),
        ("cuda", (9, 0), "fp32", "precision: bf16"),
        ("cuda", (8, 9), "bf16", None),
    ],
)
def test_fp8_needs_a_gpu_that_multiplies_it(monkeypatch, device, capability, precision, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = fp8_obstacle(torch.device(device), precision)
    assert found is None if reason is None else reason in found


# ---- block masks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "precision", "options", "takes"),
    [
        ((9, 0), "bf16", {}, True),
        ((8, 0), "fp16", {}, True),
        ((7, 5), "fp16", {}, False),  # a T4: its shared memory is too small
        ((9, 0), "fp32", {}, False),
        ((9, 0), "bf16", {"attention_dropout": 0.1}, False),
        ((9, 0), "bf16", {"head_dim": 8}, False),
    ],
)
def test_block_masks_are_for_models_and_gpus_that_flexattention_has_kernels_for(
    monkeypatch, capability, precision, options, takes
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config = CONFIGS["llama"](vocab_size=8, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, **options)
    assert takes_block_masks(config, torch.device("cuda"), precision) is takes
    assert not takes_block_masks(config, CPU, precision)
