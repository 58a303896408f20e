"""Start ranks on this machine, end them together, and say which one failed and why. Imports no torch."""

import contextlib
import ctypes
import importlib.util
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from llmkit.errors import INTERRUPTED, MachineError, UserError
from llmkit.parallel.signals import Signals
from llmkit.parallel.transport import LostRankError, unpack
from llmkit.screen import count, for_stream

GRACE = 2.0  # seconds in which the other ranks may report their error too, after the first one failed
MOST_LINES = 1000  # that are remembered, so that each is printed for one rank only
AGAIN = "run the same command again to continue"


@dataclass
class Rank:
    """One process of a run, as its launcher sees it."""

    number: int
    process: subprocess.Popen
    connection: Connection
    printer: threading.Thread | None  # prints what this rank prints; rank 0 needs none
    report: dict[str, Any] | None = None  # {"result": ...} or {"error": ...}
    ended: bool = False

    def __str__(self) -> str:
        return f"rank {self.number} (process {self.process.pid})"

    def poll(self) -> None:
        """Notice a report, and the end of the process."""
        self.ended = self.process.poll() is not None  # asked first: a report may come just before the end
        with contextlib.suppress(EOFError, OSError):  # it died before its report, or in the midst of it
            if self.report is None and self.connection.poll():
                self.report = json.loads(self.connection.recv_bytes())

    def stop(self) -> None:
        """End the process if it has not ended yet, and print the rest of its output."""
        self.process.kill()
        self.process.wait()
        if self.printer:
            self.printer.join(timeout=1)  # a process that it started may hold the pipe

    @property
    def failed(self) -> bool:
        return self.ended if self.report is None else "error" in self.report

    def failure(self) -> Exception:
        """Return why this rank has no result."""
        if self.report:
            return unpack(self.report["error"])
        if not self.ended:
            return MachineError(f"{self} does not answer: it was stopped, or it hangs", fix=AGAIN)
        code = self.process.returncode
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if code == -signal.SIGKILL:
            fix = f"if memory ran out (see dmesg), lower train.micro_batch_size; {AGAIN}"
            return MachineError(f"{self} was killed ({how})", fix=fix)
        return MachineError(f"{self} died ({how})", fix=AGAIN)


def launch(function: Callable[..., Any], processes: int, *args: Any, **options: Any) -> Any:
    """Run a function in several ranks on this machine; return rank 0's result, which JSON must be able to hold.

    Rank 0 has this process's output. What the others print goes to standard error, labelled.
    SIGINT and SIGTERM are passed on to all ranks as SIGTERM. All ranks end when one fails, or when this process ends.
    Raises the error of a rank, or MachineError for one that died or does not answer, or if there are too few GPUs.
    """
    if 0 < (gpus := count_gpus()) < processes:
        what, got = "there are fewer GPUs than ranks on this machine", f"{count(gpus, 'GPU')}, {processes} ranks"
        raise MachineError(what, got=got, fix=f"--nproc {gpus}")
    signals, ranks, printed = Signals(), [], {}
    with tempfile.TemporaryDirectory(prefix="llmkit-") as folder:
        try:
            for number in range(processes):
                ranks.append(start_rank(number, processes, f"file://{folder}/store", printed))
                with contextlib.suppress(ConnectionError):  # a rank that died is noticed below
                    ranks[-1].connection.send((function, args, options))
            wait_for_ranks(ranks, signals)
        finally:
            for rank in ranks:
                rank.stop()
            signals.release()
    unsuccessful = [rank for rank in ranks if "result" not in (rank.report or {})]
    if unsuccessful:
        raise choose_failure(unsuccessful, signals.signal)
    return ranks[0].report["result"]


def count_gpus() -> int:
    """Return how many GPUs torch will see in a rank: 0 if it was built for CPUs. CUDA_VISIBLE_DEVICES is obeyed."""
    spec, number = importlib.util.find_spec("torch"), ctypes.c_int(0)
    if spec and (Path(spec.origin).parent / "lib/libtorch_cuda.so").exists():
        with contextlib.suppress(OSError):  # no driver
            driver = ctypes.CDLL("libcuda.so.1")
            if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(number)):  # an error code: no GPU
                return 0
    return number.value


def start_rank(number: int, processes: int, rendezvous: str, printed: dict[str, int]) -> Rank:
    """Start a process in a group of its own, so that a terminal's Ctrl-C reaches it through the launcher alone."""
    ours, theirs = multiprocessing.Pipe()
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    environment = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(processes),
        "LLMKIT_RENDEZVOUS": rendezvous,
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
    }
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "llmkit.parallel.rank", str(theirs.fileno())],
        env=environment,
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        process_group=0,
        **(output if number else {}),
    )
    theirs.close()
    printer = None
    if number:
        printer = threading.Thread(target=print_labelled, args=(number, process.stdout, printed), daemon=True)
        printer.start()
    return Rank(number, process, ours, printer)


def print_labelled(number: int, lines: Any, printed: dict[str, int]) -> None:
    """Print what a rank prints, with its number, but for lines that another rank has printed.

    printed  the lines so far -> the rank that printed them first
    """
    for line in lines:
        if printed.setdefault(line, number) == number:
            print(for_stream(f"rank {number}: {line}", sys.stderr), end="", file=sys.stderr, flush=True)
        if len(printed) > MOST_LINES:
            printed.clear()


def wait_for_ranks(ranks: list[Rank], signals: Signals) -> None:
    """Wait until all ranks have ended, or until GRACE seconds after the first failure. Pass on the first signal."""
    passed_on, deadline = False, float("inf")
    while not all(rank.ended for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
        if signals.signal and not passed_on:
            passed_on = True
            for rank in ranks:
                rank.process.terminate()
        for rank in ranks:
            rank.poll()
        if any(rank.failed for rank in ranks):
            deadline = min(deadline, time.monotonic() + GRACE)


def choose_failure(ranks: list[Rank], interrupted_by: int | None) -> Exception:
    """Return the cause among the failures of ranks that have no result.

    A rank's own error explains most, then a death, then silence. That a rank lost the others is a consequence.
    """
    failures = [(rank, rank.failure()) for rank in ranks]
    own = [error for rank, error in failures if rank.report and not isinstance(error, LostRankError)]
    if interrupted_by and all(getattr(error, "code", None) in INTERRUPTED.values() for error in own):
        what = own[0].what if own else "interrupted"
        return UserError(what, fix=AGAIN, code=INTERRUPTED[interrupted_by])
    died = [error for rank, error in failures if rank.ended and not rank.report]
    silent = [error for rank, error in failures if not rank.ended and not rank.report]
    return [*own, *died, *silent, *(error for _, error in failures)][0]
