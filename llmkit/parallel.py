"""Devices, precision, ranks, recomputation and compilation: the only room that touches them.

What is done to a built model comes in this order: build, load, quantize, peft, checkpointing, compile.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmkit.errors import ENVIRONMENT, INTERRUPTED, UserError
from llmkit.models.attention import recomputed
from llmkit.types import Batch

CPUINFO = Path("/proc/cpuinfo")
# Dense bf16 peak of one GPU in FLOP/s, by a part of its name: the vendors' data sheets, without sparsity.
PEAKS = {"H200": 989.4e12, "H100": 989.4e12, "A100": 312e12, "L40S": 362e12, "A10G": 70e12, "L4": 121e12,
         "RTX 4090": 165.2e12, "RTX 3090": 71e12, "T4": 65e12}  # fmt: skip


@dataclass(frozen=True)
class World:
    """The ranks of a run, one a process, each with a device of its own."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, value: float) -> float:
        """A number added up over all ranks; a plain number without any."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.item()

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Add every gradient up over all ranks, in one message a dtype."""
        if self.size == 1:
            return
        for dtype in {p.grad.dtype for p in parameters if p.grad is not None}:
            grads = [p.grad for p in parameters if p.grad is not None and p.grad.dtype == dtype]
            flat = torch.cat([grad.flatten() for grad in grads])
            dist.all_reduce(flat)
            for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(part.view_as(grad))

    def on_main(self, function: Callable[[], Any]) -> Any:
        """Let rank 0 do what only one may do, while the others wait; its user error is raised in all of them."""
        result, box = None, [None]
        if self.main:
            try:
                result = function()
            except UserError as error:
                box = [error]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        if box[0] is not None:
            raise box[0]
        return result


def start_world() -> World:
    """This process's rank and device; ranks come from torchrun's environment, `--nproc` included."""
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if size > 1 and not dist.is_initialized():
        # Hours: the other ranks wait while rank 0 builds the data.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=24))
    return World(device, rank, size)


def to_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """A batch as the keyword arguments of a model's forward; the copy to a GPU does not wait."""
    tensors = {name: torch.from_numpy(array) for name, array in batch.arrays().items()}
    if device.type == "cuda":
        return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in tensors.items()}
    return tensors


def keep_freed_memory() -> None:
    """Let glibc keep what tensors free, for the next ones: page faults took 5-11 % of a step.

    The numbers are M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD of malloc.h; other C libraries are left alone.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 * 2**20)):
            mallopt(parameter, value)


def launch(function: Callable[..., Any], processes: int, *args: Any, **options: Any) -> Any:
    """Run a function in so many ranks on this machine, through torchrun's own API; returns what rank 0 returned."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0",
        start_method="spawn", max_restarts=0,
    )  # fmt: skip
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    try:
        results = elastic_launch(config, returning_errors)(function, args, options)
    except SignalException as error:
        fix = "type the same command again to go on from the newest checkpoint"
        raise UserError("interrupted", fix=fix, code=INTERRUPTED.get(error.sigval, 143)) from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise UserError(f"rank {rank} died: {failure.message}", code=ENVIRONMENT) from None
    if isinstance(results[0], UserError):
        raise results[0]
    return results[0]


def returning_errors(function: Callable[..., Any], args: tuple, options: dict[str, Any]) -> Any:
    """A rank's user errors go back to the launcher, which prints one block instead of many tracebacks."""
    try:
        return function(*args, **options)
    except UserError as error:
        return error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ---- precision ------------------------------------------------------------------------------------------------------


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = ""
    with contextlib.suppress(OSError), CPUINFO.open(encoding="utf-8") as file:
        flags = next((line for line in file if line.startswith("flags")), "")
    return "avx512_bf16" in flags or "amx_bf16" in flags


def choose_precision(asked: str, device: torch.device) -> str:
    """bf16 where the hardware has it, else fp16 on a GPU and fp32 on a CPU; what was asked for is never changed."""
    if asked not in ("auto", *DTYPES):
        raise UserError("the precision is unknown", got=asked, expected="auto, bf16, fp16 or fp32")
    if asked != "auto":
        return asked
    if has_fast_bf16(device):
        return "bf16"
    return "fp16" if device.type == "cuda" else "fp32"


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def autocast(device: torch.device, precision: str):
    """Matrix products in the precision's dtype; norms, softmax and losses stay in fp32."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def make_deterministic(device: torch.device) -> None:
    """Ask CUDA for the same sums in the same order; CPU runs are so already."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


# ---- what is done to a built model ----------------------------------------------------------------------------------


def apply_checkpointing(model: nn.Module, mode: str | int) -> int:
    """Recompute blocks in the backward instead of keeping their activations; returns how many.

    mode  none, full (every block), or k (every k-th block)
    """
    every = {"none": 0, "full": 1}.get(mode, mode)
    chosen = [block for i, block in enumerate(model.blocks) if every and i % every == 0]
    for block in chosen:
        block.forward = recomputed(block.forward)
    return len(chosen)


def can_compile(device: torch.device) -> str | None:
    """None, or the reason why torch.compile has nothing to work with here."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "no triton"
    language, names = ("C", ("gcc", "clang", "cc")) if device.type == "cuda" else ("C++", ("g++", "clang++", "c++"))
    return None if any(shutil.which(name) for name in names) else f"no {language} compiler"


def why_eager(model: nn.Module, device: torch.device, precision: str) -> str | None:
    """None, or the reason why this model can't be compiled here."""
    if hasattr(model.config, "num_local_experts") and precision != "bf16":
        return "products of experts compile in bf16 only"
    return can_compile(device)


def compile_blocks(model: nn.Module, asked: str | bool, device: torch.device, precision: str) -> str:
    """Compile the loss, and every block on its own: they share one program. Returns what the header says."""
    reason = why_eager(model, device, precision)
    if asked is False:
        return "off"
    if reason and asked is True:
        raise UserError(
            f"train.compile: true can't be done: {reason}", fix="install it, or compile: auto", code=ENVIRONMENT
        )
    if reason:
        return f"off ({reason})"
    if device.type == "cpu":
        # Make again what is cheap (norms, activations) instead of keeping it: an eighth less memory in pretraining
        # and more with LoRA, at the same speed. What it does on a GPU has not been measured.
        torch._functorch.config.activation_memory_budget = 0.9
    for part in (*model.blocks, model.chunk_loss):
        part.compile(fullgraph=True, dynamic=False)
    return "every block, and the loss"


# ---- what the machine can do ----------------------------------------------------------------------------------------


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of one large matrix product, measured: the ceiling that a training step is compared with."""
    size = 8192 if device.type == "cuda" else 256 if dtype == torch.float16 else 1024  # CPUs crawl in fp16
    # A generator of its own: a resumed run must not find the global one moved.
    generator = torch.Generator(device).manual_seed(0)
    a, b = torch.randn(2, size, size, device=device, generator=generator).to(dtype)
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    best = 0.0
    for _ in range(2):
        a @ b
    wait()
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        for _ in range(4):
            a @ b
        wait()
        best = max(best, 4 * 2 * size**3 / (time.perf_counter() - start))
    return best


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """The FLOP/s that MFU is a share of, and where the figure comes from."""
    if device.type == "cuda" and precision != "fp32":
        name = torch.cuda.get_device_name(device)
        known = next((peak for part, peak in PEAKS.items() if part in name), None)
        if known:
            return known, f"{name}'s data sheet"
    return matmul_rate(device, DTYPES[precision]), "measured matrix product"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError), CPUINFO.open(encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {torch.get_num_threads()} threads"
    return f"CPU, {torch.get_num_threads()} threads"


def total_memory(device: torch.device) -> int:
    """Bytes of memory that the device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory(device: torch.device) -> int:
    """Bytes at the highest point so far: allocated on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


EXTRAS = {  # of pyproject.toml, and a module that each brings
    "tensorboard": "tensorboard", "pii": "re2", "sentencepiece": "sentencepiece", "gguf": "gguf",
    "serve": "starlette", "classifier": "transformers", "cluster": "distributed",
}  # fmt: skip


def examine() -> dict[str, str]:
    """What `llmkit doctor` prints: what this machine can do, and what is missing."""
    device = start_world().device
    reason = can_compile(device)
    figures = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device_name(device),
        "memory": f"{total_memory(device) / 2**30:.1f} GiB",
        "precision": f"auto means {choose_precision('auto', device)}",
        "compile": "yes" if reason is None else f"no: {reason}; training runs eager",
    }
    for name, dtype in DTYPES.items():
        if name != "fp16" or device.type == "cuda":
            figures[f"{name} products"] = f"{matmul_rate(device, dtype) / 1e12:.3f} TFLOP/s measured"
    free = shutil.disk_usage(Path.cwd()).free
    figures["disk"] = f"{free / 2**30:.1f} GiB free here"
    for package in ("tokenizers", "datasets"):
        figures[package] = importlib.metadata.version(package)
    for extra, module in EXTRAS.items():
        there = importlib.util.find_spec(module) is not None
        figures[f"extra {extra}"] = "installed" if there else f"pip install 'llmkit[{extra}]'"
    return figures
