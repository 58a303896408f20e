"""Profile some steps of a run: a trace to look at, and a table of where a step's time went."""

import re
from collections import Counter
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from llmkit.files import write_atomically
from llmkit.screen import format_table

TRACE, TABLE, LONGEST = "trace.json", "profile.txt", 20  # rows of single operations
SKIPPED = 2  # steps before the profiled ones, which allocate memory
KINDS = {  # kind of work -> names of torch's operations and of kernels
    "matrix products": r"aten::_?(mm|addmm|bmm|baddbmm|linear|_?grouped_mm|_scaled_mm)|gemm|cutlass|cublas|nvjet",
    "attention": r"attention|flash|fmha|softmax",
    "fused by the compiler": r"CompiledFxGraph|graph_\d+_cpp|triton",
    "optimizer": r"_fused_adam|_foreach|lerp|Optimizer|linalg_vector_norm",
    "elementwise": r"aten::(mul|add|sub|div|neg|pow|exp|silu|gelu|tanh|where|sum|mean|rsqrt|rsub)|norm",
    "copies and fills": r"copy_|_to_copy|fill_|zero_|cat|Memcpy|Memset|contiguous|empty",
    "sums over ranks": r"nccl|gloo|c10d",
}


def start_profiler(folder: Path, steps: int, device: torch.device) -> profile:
    """Start a profiler whose `step` is called after each training step; it writes TRACE and TABLE into a folder.

    steps  to profile, after SKIPPED ones
    """
    folder.mkdir(parents=True, exist_ok=True)
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]

    def write(profiler: profile) -> None:
        times = {event.key: (event.count, own_microseconds(event, on_gpu)) for event in profiler.key_averages()}
        write_atomically(folder / TABLE, tables(times, steps))
        profiler.export_chrome_trace(str(folder / TRACE))

    wanted = schedule(wait=SKIPPED - 1, warmup=1, active=steps, repeat=1)
    profiler = profile(activities=activities, schedule=wanted, on_trace_ready=write)
    profiler.start()
    return profiler


def own_microseconds(event, on_gpu: bool) -> float:
    """Return the time of an operation without that of the operations that it calls."""
    return event.self_device_time_total if on_gpu else event.self_cpu_time_total


def kind_of(name: str) -> str:
    """Return the kind of work of an operation, "other" for none of KINDS.

    >>> kind_of("aten::addmm"), kind_of("aten::index")
    ('matrix products', 'other')
    """
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "other")


def tables(times: dict[str, tuple[int, float]], steps: int) -> str:
    """Return two tables: the share of each kind of work, and the longest operations.

    times  operation -> (calls, microseconds in all) of the profiled steps
    """
    times = {name: one for name, one in times.items() if not name.startswith("ProfilerStep")}
    total, kinds = sum(time for _, time in times.values()) or 1.0, Counter()
    for name, (_, time) in times.items():
        kinds[kind_of(name)] += time
    by_kind = [
        {"kind": k, "ms a step": f"{t / steps / 1e3:.2f}", "share": f"{t / total:.1%}"} for k, t in kinds.most_common()
    ]
    longest = sorted(times.items(), key=lambda item: -item[1][1])[:LONGEST]
    by_name = [
        {
            "operation": name[:60],
            "calls a step": f"{calls / steps:g}",
            "ms a step": f"{time / steps / 1e3:.2f}",
            "share": f"{time / total:.1%}",
        }
        for name, (calls, time) in longest
    ]
    return f"{format_table(by_kind)}\n\n{format_table(by_name)}\n"
