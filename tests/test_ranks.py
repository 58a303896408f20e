"""Test how ranks end: with the error of one of them, by a signal, by a death, and with their launcher."""

import errno
import itertools
import math
import os
import resource
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import llmkit, metrics, tiny_config
from torch import nn

from llmkit.errors import DATA, ENVIRONMENT, DataError, MachineError, UserError
from llmkit.parallel import world as world_module
from llmkit.parallel.launch import count_gpus, launch
from llmkit.parallel.transport import LostRankError, pack, unpack
from llmkit.parallel.world import BUCKET_BYTES, make_buckets, start_world
from llmkit.storage.manifest import newest_intact_checkpoint, step_of
from llmkit.training import optim

NO_SPACE = "No space left on device"


def is_alive(pid: int) -> bool:
    psutil = pytest.importorskip("psutil")
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait_for(test, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if test():
            return True
        time.sleep(0.02)
    return False


# ---- what ranks run: a spawned process imports it from here ---------------------------------------------------------


def meet(folder: Path) -> dict:
    """Write this process's id, and sum over the ranks until something happens."""
    world = start_world()
    (folder / str(world.rank)).write_text(str(os.getpid()))
    while True:
        world.sum(1.0)


def fail(folder: Path, rank: int, how: object) -> dict:
    """Fail on one rank, in mid-run, while the other waits for it."""
    if how == signal.SIGSTOP:
        world_module.PATIENCE = timedelta(seconds=8)
    world = start_world()
    (folder / str(world.rank)).write_text(str(os.getpid()))
    world.sum(1.0)
    if world.rank == rank:
        if isinstance(how, signal.Signals):
            os.kill(os.getpid(), how)
        if isinstance(how, int):
            os._exit(how)
        raise how
    return meet(folder)


def fail_on_main(errors: list[Exception]) -> dict:
    """Raise errors on rank 0, one after the other, and return how many ranks got each of them."""

    def fail_there() -> None:
        raise error

    world, counts = start_world(), {}
    for error in errors:
        try:
            world.on_main(fail_there)
        except Exception as got:
            counts[str(got)] = world.sum(type(got) is type(error) and str(got) == str(error))
    return counts


def describe() -> dict:
    """Print a line, and return where this rank listens."""
    import psutil

    world = start_world()
    print("the same line", file=sys.stderr)
    print(f"{world.rank} of {world.size}", file=sys.stderr)
    sockets = psutil.Process().net_connections("inet")
    return {
        "main": world.on_main(lambda: "from rank 0"),
        "listening": sorted({s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN}),
    }


def sum_gradients() -> dict:
    """Sum the gradients of two micro-batches over the ranks, in buckets of a few parameters; rank 1 lacks one."""
    world_module.BUCKET_BYTES = 600
    world = start_world()
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    extra = nn.Parameter(torch.ones(3))
    parameters = [extra, *model.parameters()]
    batches = torch.randn(2, 2, 4, 8)[world.rank]

    def backward(batch: torch.Tensor, *, alone: bool) -> None:
        (model(batch).square().sum() + (extra.sum() if alone or world.rank == 0 else 0)).backward()

    backward(batches[0], alone=False)
    with world.sum_gradients(parameters):
        backward(batches[1], alone=False)
        last, local = parameters[-1], 2 * (model(batches.flatten(0, 1))).sum(0).detach()
        early = wait_for(lambda: not torch.allclose(last.grad, local), 20)  # summed before the block's end
    summed = [p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    for other in world.gather(batches[None]).flatten(0, 1):
        backward(other, alone=True)
    expected = [2 * torch.ones(3), *(p.grad for p in model.parameters())]  # rank 0 had two gradients of `extra`
    return {
        "early": world.sum(early),
        "right": world.sum(
            all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(summed, expected, strict=True))
        ),
        "same": [torch.equal(*world.gather(grad[None])) for grad in summed],
        "buckets": len(make_buckets(parameters)),
    }


def step_with_muon(shapes: list[tuple[int, ...]], skip: bool, slice_elements: int, row_scaling: bool) -> list:
    """Return the weights and the momentum after two steps, the second one skipped if asked for: [all agree, values]."""
    optim.SLICE, world = slice_elements, start_world()
    parameters = [nn.Parameter(torch.linspace(-1, 1, math.prod(shape)).view(shape)) for shape in shapes]
    options = {"momentum": 0.9, "row_scaling": row_scaling, "cautious": row_scaling}
    optimizer = optim.Muon(parameters, 0.02, weight_decay=0.1, world=world, **options)
    for step in range(2):
        optimizer.found_inf = torch.tensor(float(skip and step == 1))
        for i, p in enumerate(parameters):
            gradient = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
            p.grad = gradient * math.nan if skip and step == 1 else gradient
        optimizer.step()
    tensors = [t.detach() for p in parameters for t in (p, *optimizer.state[p].values())]
    agree = all((world.gather(t[None]) == t).all() for t in tensors)
    return [agree, [t.tolist() for t in tensors]]


def step_with_muon_each_way(shapes: list[tuple[int, ...]]) -> list:
    ways = itertools.product((False, True), (2**26, 1), (False, True))
    return [step_with_muon(shapes, *way) for way in ways]


# ---- the launcher ---------------------------------------------------------------------------------------------------


def test_ranks_listen_on_loopback_only_and_what_they_print_is_labelled(capfd):
    pytest.importorskip("psutil")
    assert launch(describe, 3) == {"main": "from rank 0", "listening": ["127.0.0.1"]}
    lines = capfd.readouterr().err.splitlines()
    assert {"the same line", "0 of 3", "rank 1: 1 of 3", "rank 2: 2 of 3"} <= set(lines)
    assert sum("the same line" in line for line in lines) == 2 and len(lines) == 5  # rank 0's, and once of the others


USER = DataError("bad records", at="x.jsonl:7", got=3, fix="mend it", others=[DataError("more")])


@pytest.mark.parametrize(
    ("rank", "how", "words"),
    [
        (1, USER, str(USER)),
        (0, OSError(errno.ENOSPC, NO_SPACE, "/x"), f"[Errno {errno.ENOSPC}] {NO_SPACE}: '/x'"),
        (1, KeyError("a bug"), "KeyError: 'a bug'"),
        (0, 3, "died (exit code 3)"),
        (1, signal.SIGSEGV, "died (SIGSEGV)"),
        (0, signal.SIGKILL, "was killed (SIGKILL)"),
        (1, signal.SIGSTOP, "does not answer"),
    ],
    ids=["user", "disk", "bug", "exit", "segfault", "kill", "stop"],
)
def test_a_failure_on_one_rank_ends_all_with_its_cause(tmp_path, capfd, rank, how, words):
    with pytest.raises(Exception) as caught:
        launch(fail, 2, tmp_path, rank, how)
    pids = [int((tmp_path / name).read_text()) for name in "01"]
    error, is_death = caught.value, isinstance(how, int)
    assert words in str(error) and not any(map(is_alive, pids))
    if is_death:
        assert str(error).startswith(f"error: rank {rank} (process {pids[rank]}) ") and error.code == ENVIRONMENT
    elif isinstance(how, UserError):
        assert type(error) is DataError and error.code == DATA and str(error) == words
    elif isinstance(how, OSError):
        assert (error.errno, error.filename) == (errno.ENOSPC, "/x")
    else:
        assert "raise how" in error.__notes__[0]  # --debug shows the traceback of the rank
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("stopped", [False, True])
def test_no_rank_outlives_a_killed_launcher(tmp_path, stopped):
    code = "import sys, test_ranks as t; t.launch(t.meet, 2, t.Path(sys.argv[1]))"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parent)
    names = [tmp_path / "0", tmp_path / "1"]
    try:
        assert wait_for(lambda: all(name.exists() and name.read_text() for name in names))
        pids = [int(name.read_text()) for name in names]
        if stopped:
            os.kill(pids[1], signal.SIGSTOP)
    finally:
        process.kill()
        process.wait()
    assert wait_for(lambda: not any(map(is_alive, pids)), 20)


@pytest.mark.parametrize(
    "error", [USER, OSError(errno.ENOSPC, NO_SPACE, "/x"), LostRankError("another rank ended", got="x")]
)
def test_an_error_travels_unchanged(error):
    assert (type(unpack(pack(error))), str(unpack(pack(error)))) == (type(error), str(error))


def test_memory_that_runs_out_is_no_bug():
    assert unpack(pack(MemoryError())).code == ENVIRONMENT


def test_an_error_of_rank_0_is_raised_on_every_rank():
    errors = [USER, PermissionError(errno.EACCES, "Permission denied", "/x")]
    assert launch(fail_on_main, 2, errors) == {str(error): 2.0 for error in errors}


@pytest.mark.parametrize("gpus", [0, 1, 3])
def test_more_ranks_than_gpus_are_one_error_before_any_starts(monkeypatch, gpus):
    started = []

    def start(number: int, *rest: object) -> None:
        started.append(number)
        raise RuntimeError("started")

    monkeypatch.setattr("llmkit.parallel.launch.count_gpus", lambda: gpus)
    monkeypatch.setattr("llmkit.parallel.launch.start_rank", start)
    with pytest.raises(MachineError if gpus == 1 else RuntimeError) as caught:
        launch(describe, 2)
    assert started == ([] if gpus == 1 else [0])
    assert gpus != 1 or "1 GPU, 2 ranks" in str(caught.value)


@pytest.mark.parametrize(("built", "code", "number"), [(True, 0, 4), (True, 100, 0), (False, 0, 0)])
def test_gpus_are_counted_by_the_driver_if_torch_uses_it(tmp_path, monkeypatch, built, code, number):
    class Driver:
        def cuInit(self, flags: int) -> int:
            return code

        def cuDeviceGetCount(self, number: object) -> int:
            number._obj.value = 4
            return 0

    (tmp_path / "lib").mkdir()
    if built:
        (tmp_path / "lib/libtorch_cuda.so").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    monkeypatch.setattr("ctypes.CDLL", lambda name: Driver())
    assert count_gpus() == number


# ---- sums and shares -------------------------------------------------------------------------------------------------


def test_gradients_are_summed_in_the_midst_of_the_last_backward():
    made = launch(sum_gradients, 2)
    assert made == {"early": 2.0, "right": 2.0, "same": [True] * 13, "buckets": 3}


@pytest.mark.parametrize("limit", [BUCKET_BYTES, 1])
def test_a_bucket_holds_gradients_of_one_dtype_and_bounded_size(monkeypatch, limit):
    monkeypatch.setattr(world_module, "BUCKET_BYTES", limit)
    shapes = [(torch.float32, 3), (torch.bfloat16, 5), (torch.float32, 2), (torch.float32, 2**24)]
    parameters = [nn.Parameter(torch.empty(n, dtype=dtype, device="meta")) for dtype, n in shapes]
    sizes = [[len(p) for p in bucket] for bucket in make_buckets(parameters)]
    assert sizes == ([[2**24], [2, 3], [5]] if limit > 1 else [[2**24], [2], [3], [5]])


def test_muon_on_ranks_that_share_the_matrices_is_muon_on_one(monkeypatch):
    """As far as bf16 goes: products may round differently in batches of another size."""
    monkeypatch.setattr(optim, "SLICE", optim.SLICE)
    shapes = [(6, 8), (6, 8), (3, 6, 8), (8, 6), (4, 4)]
    alone, shared = step_with_muon_each_way(shapes), launch(step_with_muon_each_way, 2, shapes)
    for (_, one), (agree, two) in zip(alone, shared, strict=True):
        assert agree
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-5, atol=2 * 0.02 * 0.6 * 2**-7)


def test_numbers_and_errors_go_over_gloo_and_gradients_over_nccl(monkeypatch):
    made, groups = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda **options: made.append(options))
    monkeypatch.setattr("torch.distributed.new_group", lambda **options: groups.append(options))
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    world = start_world.__wrapped__()
    assert (made[0]["backend"], made[0]["device_id"]) == ("cpu:gloo,cuda:nccl", torch.device("cuda", 1))
    assert made[0]["timeout"] <= timedelta(minutes=10)  # a sum on a GPU that hangs ends the run
    assert [group["backend"] for group in groups] == ["gloo", "gloo"]
    devices = []
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: devices.append(tensor.device.type))
    assert world.sum(3) == 3 and devices == ["cpu"]


# ---- the command line -----------------------------------------------------------------------------------------------


def write_config(corpus: Path, folder: Path, steps: int) -> None:
    config = tiny_config(corpus, train={"max_steps": steps}, checkpoint={"every": 10}, eval={"every": 1000})
    (folder / "c.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.parametrize(("number", "group", "code"), [(signal.SIGTERM, False, 143), (signal.SIGINT, True, 130)])
def test_a_signal_saves_and_ends_all_ranks_at_once(corpus, tmp_path, number, group, code):
    psutil = pytest.importorskip("psutil")
    write_config(corpus, tmp_path, 100_000)
    command = [sys.executable, "-m", "llmkit", "pretrain", "c.yaml", "-o", "run_dir=r", "--nproc", "2"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    hears = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **pipes, **hears)
    try:
        assert wait_for(lambda: (tmp_path / "r/checkpoints/step-000020").exists())
        ranks = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        (os.killpg if group else os.kill)(process.pid, number)
        start = time.monotonic()
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert time.monotonic() - start < 5 and process.returncode == code
    assert len(ranks) == 2 and not any(map(is_alive, ranks))
    step = step_of(newest_intact_checkpoint(tmp_path / "r"))
    assert errors.splitlines() == [
        f"error: interrupted at step {step}; a checkpoint is saved",
        "  fix: run the same command again to continue",
    ]
    assert metrics(tmp_path / "r")[-1]["step"] == step


def test_a_save_that_fails_on_rank_0_is_one_error(corpus, tmp_path):
    write_config(corpus, tmp_path, 10)
    command = [sys.executable, "-m", "llmkit", "pretrain", "c.yaml", "-o", "run_dir=r", "--nproc", "2"]
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, **limit)
    assert done.returncode == ENVIRONMENT and "File too large" in done.stderr
    lines = done.stderr.splitlines()
    assert lines[0].startswith("error: the checkpoint can't be written") and len(lines) == 3


def test_more_ranks_than_rows_are_refused_before_they_start(corpus, tmp_path):
    write_config(corpus, tmp_path, 10)
    assert "8 rows, --nproc 1000" in llmkit("pretrain", "c.yaml", "--nproc", 1000, cwd=tmp_path, code=2).stderr


@pytest.mark.slow
def test_torchrun_starts_ranks_too(corpus, tmp_path):
    write_config(corpus, tmp_path, 10)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "llmkit", "pretrain", "c.yaml", "-o", "run_dir=r"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("best val loss") == 1
    llmkit("pretrain", "c.yaml", "-o", "run_dir=two", "--nproc", 2, cwd=tmp_path)
    assert metrics(tmp_path / "r") == metrics(tmp_path / "two")


def test_a_rank_of_torchrun_ends_without_a_regular_exit():
    """torch 2.13 aborts in one of three regular exits, with "terminate called without an active exception"."""
    code = "import atexit, llmkit.commands.app as app; atexit.register(print, 'exits'); app.main(['--version'])"
    for size, exits in (("1", True), ("2", False)):
        environment = os.environ | {"RANK": "1", "WORLD_SIZE": size}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.startswith("llmkit") and ("exits" in done.stdout) == exits
