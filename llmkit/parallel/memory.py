"""Know how much memory there is, has been used and may still be used."""

import contextlib
import ctypes
import math
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Version of Linux's control groups -> root of those for memory, names of limit and usage, and of cache in memory.stat.
CGROUP_FILES = {
    2: (CGROUPS, "memory.max", "memory.current", "inactive_file"),
    1: (CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next tensors: page faults took 5-11 % of a step.

    The numbers are M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD of malloc.h. Do nothing with other C libraries.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 * 2**20)):
            mallopt(parameter, value)


def bound_program_caches() -> None:
    """Make oneDNN, and torch's wrapper of it, keep the programs of 128 matrix shapes, unless the environment says else.

    Experts see other numbers of rows in each step. With the default, 1024, training a Mixtral of 4 x 256 came to 490 MB
    more on two CPU cores than with 128, at the same speed.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "128")


def total_memory(device: torch.device) -> int:
    """Return the total memory of the device in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory(device: torch.device) -> int:
    """Return the peak memory so far in bytes: allocated on a GPU, or resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # whose ru_maxrss is at least that of the process that started this one
        return read_sizes(Path("/proc/self/status"))["VmHWM"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory(device: torch.device) -> int:
    """Return the most bytes that this process may come to use, including what it uses now.

    On a GPU that is what no other process has taken. On a CPU it is what Linux calls available, within the limits of
    the control group (containers, Slurm) and of ulimit.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if sys.platform != "linux":
        return total_memory(device)
    status, system = read_sizes(Path("/proc/self/status")), read_sizes(Path("/proc/meminfo"))
    rooms = [system["MemAvailable"], cgroup_room()]
    for limit, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        soft = resource.getrlimit(limit)[0]
        rooms += [] if soft == resource.RLIM_INFINITY else [soft - status[used]]
    return round(status["VmRSS"] + max(0, min(rooms)))


def read_sizes(path: Path) -> dict[str, int]:
    """Return the sizes in a file of /proc in bytes."""
    fields = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in fields if words[-1:] == ["kB"]}


def cgroup_room() -> float:
    """Return the bytes that this process's control groups leave, inf without a limit. A cache of files counts as free.

    A container may not see its own path below CGROUPS, but only its groups at the root.
    """
    rooms = [math.inf]
    for folder, limit, usage, cache in list_cgroups():
        with contextlib.suppress(OSError, ValueError):  # "max" means no limit
            most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            rooms.append(most - used + int(stat.get(cache, 0)))
    return min(rooms)


def list_cgroups() -> Iterator[tuple[Path, str, str, str]]:
    """Yield the folders of this process's control groups for memory, innermost first, and the names in CGROUP_FILES."""
    with contextlib.suppress(OSError):
        for line in OWN_CGROUPS.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            version = 1 if "memory" in controllers.split(",") else 2 if not controllers else None
            if version:
                root, *names = CGROUP_FILES[version]
                inside = root / path.lstrip("/")
                yield from ((folder, *names) for folder in (inside, *inside.parents) if folder.is_relative_to(root))


def fail_before_killed() -> None:
    """Make allocations fail where the control group would kill the process, which could save and say nothing then."""
    if sys.platform == "linux" and (room := cgroup_room()) < total_memory(torch.device("cpu")):
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        most = read_sizes(Path("/proc/self/status"))["VmData"] + max(0, round(room))
        limits = [one for one in (soft, hard, most) if one != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
