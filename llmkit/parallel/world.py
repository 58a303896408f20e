"""Start ranks, sum numbers and gradients over them, and run code on rank 0 alone."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from llmkit.errors import INTERRUPTED, MachineError, UserError
from llmkit.parallel.device import keep_freed_memory


@dataclass(frozen=True)
class World:
    """Rank of this process in a run; every rank has its own process and device."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, value: float) -> float:
        """Return the sum of a number over all ranks."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.item()

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Sum every gradient over all ranks, in one all-reduce per dtype."""
        if self.size == 1:
            return
        for dtype in {p.grad.dtype for p in parameters if p.grad is not None}:
            grads = [p.grad for p in parameters if p.grad is not None and p.grad.dtype == dtype]
            flat = torch.cat([grad.flatten() for grad in grads])
            dist.all_reduce(flat)
            for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(part.view_as(grad))

    def on_main(self, function: Callable[[], Any]) -> Any:
        """Call a function on rank 0 while the others wait, and return its result there; raise its UserError on all."""
        result, errors = None, [None]
        if self.main:
            try:
                result = function()
            except UserError as error:
                errors = [error]
        if self.size > 1:
            dist.broadcast_object_list(errors, src=0)
        if errors[0] is not None:
            raise errors[0]
        return result


def start_world() -> World:
    """Return this process's rank and device, from the environment variables of torchrun, which `--nproc` sets too."""
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if size > 1 and not dist.is_initialized():
        # A long timeout, because the other ranks wait while rank 0 builds the data.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=24))
    return World(device, rank, size)


def launch(function: Callable[..., Any], processes: int, *args: Any, **options: Any) -> Any:
    """Run a function in several ranks on this machine through torchrun's API; return rank 0's result."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        start_method="spawn",
        max_restarts=0,
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    try:
        results = elastic_launch(config, run_rank)(function, args, options)
    except SignalException as error:
        fix = "run the same command again to continue from the newest checkpoint"
        raise UserError("interrupted", fix=fix, code=INTERRUPTED.get(error.sigval, 143)) from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise MachineError(f"rank {rank} died: {failure.message}") from None
    if isinstance(results[0], UserError):
        raise results[0]
    return results[0]


def run_rank(function: Callable[..., Any], args: tuple, options: dict[str, Any]) -> Any:
    """Return a rank's result, or its UserError, so that the launcher prints it once instead of many tracebacks."""
    try:
        return function(*args, **options)
    except UserError as error:
        return error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
