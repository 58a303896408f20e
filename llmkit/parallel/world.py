"""Know this process's rank, sum numbers and gradients over all ranks, and run code on rank 0 alone."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from llmkit.errors import MachineError
from llmkit.parallel.device import keep_freed_memory
from llmkit.parallel.transport import LostRankError, pack, unpack

PATIENCE = timedelta(minutes=5)  # how long a rank waits for the others to reach the same sum
SAVING = timedelta(minutes=30)  # how long they wait for rank 0 while it reads or writes files of the run
BUILDING = timedelta(days=365)  # and while it builds data


@dataclass(frozen=True)
class World:
    """Rank of this process in a run; every rank has its own process and device."""

    device: torch.device
    rank: int = 0
    size: int = 1
    saving: dist.ProcessGroup | None = None  # all ranks, with the timeout SAVING
    building: dist.ProcessGroup | None = None  # all ranks, with the timeout BUILDING

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, value: float) -> float:
        """Return the sum of a number over all ranks."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        with notice_lost_ranks():
            dist.all_reduce(total)
        return total.item()

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Sum every gradient over all ranks, in one all-reduce per dtype."""
        if self.size == 1:
            return
        for dtype in {p.grad.dtype for p in parameters if p.grad is not None}:
            grads = [p.grad for p in parameters if p.grad is not None and p.grad.dtype == dtype]
            flat = torch.cat([grad.flatten() for grad in grads])
            with notice_lost_ranks():
                dist.all_reduce(flat)
            for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(part.view_as(grad))

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
    """Return this process's rank and device, from the environment variables of torchrun, which `launch` sets too."""
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local >= (gpus := torch.cuda.device_count()):
            what, got = "there are fewer GPUs than ranks on this machine", f"{gpus} GPUs, rank {local}"
            raise MachineError(what, got=got, fix=f"--nproc {gpus}")
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if size == 1:
        return World(device)
    backend, rendezvous = "nccl" if device.type == "cuda" else "gloo", os.environ.get("LLMKIT_RENDEZVOUS")
    with notice_lost_ranks():
        dist.init_process_group(backend, rendezvous, timeout=PATIENCE, rank=rank, world_size=size)
        return World(device, rank, size, dist.new_group(timeout=SAVING), dist.new_group(timeout=BUILDING))
