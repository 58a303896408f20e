"""Know this process's rank, sum numbers and gradients over all ranks, and run code on rank 0 alone."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmkit.errors import MachineError
from llmkit.parallel.memory import bound_program_caches, fail_before_killed, keep_freed_memory
from llmkit.parallel.transport import LostRankError, pack, unpack
from llmkit.screen import count

PATIENCE = timedelta(minutes=5)  # how long a rank waits for the others to reach the same sum
SAVING = timedelta(minutes=30)  # how long they wait for rank 0 while it reads or writes files of the run
BUILDING = timedelta(days=365)  # and while it builds data
BUCKET_BYTES = 64 * 2**20  # of gradients that are summed at once; a larger gradient is summed by itself


@dataclass(frozen=True)
class World:
    """Rank of this process in a run; every rank has its own process and device."""

    device: torch.device
    rank: int = 0
    size: int = 1
    saving: dist.ProcessGroup | None = None  # all ranks, gloo alone, with the timeout SAVING
    building: dist.ProcessGroup | None = None  # all ranks, gloo alone, with the timeout BUILDING

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, value: float) -> float:
        """Return the sum of a number over all ranks. It goes from CPU to CPU: no rank waits for a device."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        with notice_lost_ranks():
            dist.all_reduce(total)
        return total.item()

    @contextlib.contextmanager
    def sum_gradients(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """Sum the gradients over all ranks, in place, while the backward pass inside this `with` block goes on.

        The sum of a bucket of gradients starts when all of them are there. Buckets start in the same order on all
        ranks, as NCCL asks for. If a rank has no gradient of a parameter, it counts as zeros there.
        """
        if self.size == 1:
            yield
            return
        buckets, sums = make_buckets(parameters), []
        missing = [len(bucket) for bucket in buckets]

        def start_sums() -> None:
            while len(sums) < len(buckets) and not missing[len(sums)]:
                with notice_lost_ranks():
                    sums.append(dist.group.WORLD.allreduce_coalesced([p.grad for p in buckets[len(sums)]]))

        def count_gradient(number: int, parameter: nn.Parameter) -> None:
            missing[number] -= 1
            start_sums()

        numbered = [(number, p) for number, bucket in enumerate(buckets) for p in bucket]
        hooks = [p.register_post_accumulate_grad_hook(partial(count_gradient, number)) for number, p in numbered]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        missing = [0] * len(buckets)
        start_sums()
        with notice_lost_ranks():
            for one in sums:
                one.wait()

    def gather(self, part: Tensor) -> Tensor:
        """Return the parts (n, ...) of all ranks, which have one shape, as (size * n, ...) in the order of ranks."""
        if self.size == 1:
            return part
        parts = part.new_empty(self.size * len(part), *part.shape[1:])
        with notice_lost_ranks():
            dist.all_gather(list(parts.chunk(self.size)), part)
        return parts

    def concatenate(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows of all ranks, in the order of ranks; each may have another number of them."""
        if self.size == 1:
            return rows
        counts = self.gather(torch.tensor([len(rows)])).tolist()
        padded = torch.zeros(max(counts), *rows.shape[1:], dtype=torch.float64)
        padded[: len(rows)] = torch.from_numpy(rows)
        parts = self.gather(padded).split(max(counts))
        return np.concatenate([part[:number].numpy() for part, number in zip(parts, counts, strict=True)])

    def on_main(self, function: Callable[[], Any], *, builds_data: bool = False) -> Any:
        """Call a function on rank 0 while the others wait; return its result there, and raise its error on all.

        builds_data  wait for days, not for minutes
        """
        if self.size == 1:
            return function()
        result, error, packed = None, None, [None]
        if self.main:
            try:
                result = function()
            except Exception as raised:
                error, packed = raised, [pack(raised)]
        with notice_lost_ranks():
            dist.broadcast_object_list(packed, src=0, group=self.building if builds_data else self.saving)
        if packed[0] is not None:
            raise error or unpack(packed[0])
        return result

    def from_main(self, value: Any) -> Any:
        """Return rank 0's value on all ranks."""
        if self.size == 1:
            return value
        shared = [value if self.main else None]
        with notice_lost_ranks():
            dist.broadcast_object_list(shared, src=0, group=self.saving)
        return shared[0]


def make_buckets(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Group parameters of one dtype by BUCKET_BYTES, the last ones first: backward passes begin with the last layer."""
    buckets, filled = [], 0
    for p in sorted(parameters, key=lambda p: str(p.dtype))[::-1]:
        filled += p.nbytes
        if not buckets or filled > BUCKET_BYTES or buckets[-1][0].dtype != p.dtype:
            buckets.append([])
            filled = p.nbytes
        buckets[-1].append(p)
    return buckets


@contextlib.contextmanager
def notice_lost_ranks() -> Iterator[None]:
    """Raise LostRankError where torch says that a connection broke, or that a rank did not come in time."""
    try:
        yield
    except RuntimeError as error:
        fix = "look for the error of that rank"
        raise LostRankError("another rank ended or does not answer", got=str(error)[:200], fix=fix) from None


@cache
def start_world() -> World:
    """Return this process's rank and device, from the environment variables of torchrun, which `launch` sets too.

    On a GPU, products of fp32 matrices are fp32 and not TF32. This is torch's default, set here because some containers
    change it (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE). nanoGPT and litgpt choose TF32. Here `auto` never means fp32 on a GPU:
    who asks for it compares with another machine or looks for a fault, and who wants speed takes bf16.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local >= (gpus := torch.cuda.device_count()):
            what, got = "there are fewer GPUs than ranks on this machine", f"{count(gpus, 'GPU')}, rank {local}"
            raise MachineError(what, got=got, fix=f"--nproc {gpus}")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("highest")
    else:
        keep_freed_memory()
        bound_program_caches()
        fail_before_killed()
    if size == 1:
        return World(device)
    # Numbers, errors and waiting for rank 0 go over gloo, gradients of GPUs over NCCL. NCCL's watchdog ends a process
    # (SIGABRT) when a sum on a GPU takes longer than PATIENCE. It times only work that was given to NCCL, and its
    # heartbeat, which must come every 8 minutes, is a loop of its own that beats without work too: so a rank may wait
    # for hours in gloo. With device_id the communicator is made here, not in the first step, and its errors are raised.
    gpu = {"backend": "cpu:gloo,cuda:nccl", "device_id": device} if device.type == "cuda" else {"backend": "gloo"}
    rendezvous = os.environ.get("LLMKIT_RENDEZVOUS")
    with notice_lost_ranks():
        dist.init_process_group(init_method=rendezvous, timeout=PATIENCE, rank=rank, world_size=size, **gpu)
        saving, building = (dist.new_group(backend="gloo", timeout=timeout) for timeout in (SAVING, BUILDING))
    return World(device, rank, size, saving, building)
