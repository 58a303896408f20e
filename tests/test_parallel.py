"""Test what the machine decides: the precision of "auto", and `deterministic`."""

import pytest
import torch

from llmkit.errors import MachineError
from llmkit.parallel.compile import missing_compiler
from llmkit.parallel.device import choose_precision, describe_precision, make_deterministic
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
