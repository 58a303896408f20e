"""Choose a precision, and measure the speed and memory of a device."""

import contextlib
import os
import time
from pathlib import Path

import torch
from torch import Tensor

from llmkit.errors import UserError
from llmkit.parallel.catalog import find_gpu
from llmkit.screen import count
from llmkit.types import Batch

CPUINFO = Path("/proc/cpuinfo")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def to_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Return a batch as the keyword arguments of a model's forward; copies to a GPU are asynchronous."""
    tensors = {name: torch.from_numpy(array) for name, array in batch.arrays().items()}
    if device.type == "cuda":
        return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in tensors.items()}
    return tensors


# ---- precision ------------------------------------------------------------------------------------------------------


def has_fast_bf16(device: torch.device) -> bool:
    """Return whether the device multiplies bf16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = read_cpuinfo("flags")
    return "avx512_bf16" in flags or "amx_bf16" in flags


def read_cpuinfo(field: str) -> str:
    """Return the first value of a field in /proc/cpuinfo, "" if there is none."""
    with contextlib.suppress(OSError), CPUINFO.open(encoding="utf-8") as file:
        return next((line.partition(":")[2].strip() for line in file if line.startswith(field)), "")
    return ""


def choose_precision(asked: str, device: torch.device) -> str:
    """Resolve "auto" to bf16 if the hardware has it, else to fp16 on a GPU and fp32 on a CPU."""
    if asked not in ("auto", *DTYPES):
        raise UserError("this precision is unknown", got=asked, expected="auto, bf16, fp16 or fp32")
    if asked != "auto":
        return asked
    if has_fast_bf16(device):
        return "bf16"
    return "fp16" if device.type == "cuda" else "fp32"


def describe_precision(device: torch.device, precision: str) -> str:
    """Return a precision for the header; in fp32 on a GPU, with what its products use: see `start_world`."""
    return "fp32 (products too, not TF32)" if device.type == "cuda" and precision == "fp32" else precision


def autocast(device: torch.device, precision: str):
    """Compute matrix products in the precision's dtype; norms, softmax and losses stay in fp32."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def make_deterministic(device: torch.device) -> None:
    """Ask CUDA for deterministic algorithms; CPU runs are deterministic already."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


# ---- speed and memory -----------------------------------------------------------------------------------------------


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Measure the FLOP/s of a large matrix product, an upper bound for a training step."""
    size = 8192 if device.type == "cuda" else 256 if dtype == torch.float16 else 1024  # CPUs are slow in fp16
    # Its own generator, so that the global one keeps its state for a resumed run.
    generator = torch.Generator(device).manual_seed(0)
    a, b = torch.randn(2, size, size, device=device, generator=generator).to(dtype)
    best = 0.0
    for _ in range(2):
        a @ b
    synchronize(device)
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        for _ in range(4):
            a @ b
        synchronize(device)
        best = max(best, 4 * 2 * size**3 / (time.perf_counter() - start))
    if device.type == "cuda":
        del a, b
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)  # the matrices are no part of a run
    return best


def memory_rate(device: torch.device, seconds: float = 0.3) -> float:
    """Measure the bytes per second at which the device reads memory, an upper bound for writing token by token."""
    numbers, best = torch.zeros(2**28 // (1 if device.type == "cuda" else 4), device=device), 0.0
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        synchronize(device)
        start = time.perf_counter()
        numbers.sum()
        synchronize(device)
        best = max(best, numbers.nbytes / (time.perf_counter() - start))
    return best


def peak_flops(device: torch.device, precision: str, rate: float | None = None) -> tuple[float, str]:
    """Return the peak FLOP/s that MFU refers to, and the source of the number.

    rate  of `matmul_rate`, if it has been measured already
    """
    if device.type == "cuda" and precision != "fp32":
        name = torch.cuda.get_device_name(device)
        if known := find_gpu(name):
            return known.flops, f"{name}'s data sheet"
    return rate or matmul_rate(device, DTYPES[precision]), "measured matrix product"


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{read_cpuinfo('model name') or 'CPU'}, {count(torch.get_num_threads(), 'thread')}"


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was asked; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
