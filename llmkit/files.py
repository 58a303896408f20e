"""Write files atomically, lock folders, and fingerprint input files."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from llmkit.errors import LOCKED, MachineError, UserError

NO_SPACE = {
    errno.ENOSPC: "a disk is full",
    errno.EDQUOT: "the quota of disk space is used up",
    errno.EFBIG: "a file would be larger than is allowed here (ulimit -f)",
}
MAX_JSON_BYTES = 2**25  # of one file: the largest published vocabularies and weight indexes have 10 MB


def read_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Return the value in a JSON file. What Python's json accepts beyond the standard is refused.

    Raises ValueError with the reason for a file over max_bytes, bytes that are not UTF-8, bad syntax, deep nesting, a
    key that an object has twice, NaN and infinite numbers, and lone surrogates. Raises OSError if it can't be read.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is not a file")
    if (size := path.stat().st_size) > max_bytes:
        raise ValueError(f"it has {size} bytes, over {max_bytes}")
    text = path.read_text(encoding="utf-8")
    try:
        value = json.loads(text, object_pairs_hook=unique_keys, parse_float=finite, parse_constant=finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if "\\u" in text:  # only an escape can spell a lone surrogate
        json.dumps(value, ensure_ascii=False).encode()
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a dict; raise ValueError if a key is there twice."""
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the key {name!r} is there twice")
        result[name] = value
    return result


def finite(text: str) -> float:
    """Return the number that a text spells; raise ValueError for NaN and infinite numbers, such as 1e999."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return number


def file_sha256(path: Path) -> str:
    """Return the SHA-256 checksum of a file. A file is read again only if its size or time has changed."""
    stat = path.stat()
    return sha256_of(path.absolute(), stat.st_ino, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def sha256_of(path: Path, *stamp: int) -> str:
    """Return the checksum of a file; `stamp` tells its versions apart."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_stamps(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Return the name, size and modification time of each file. A file whose stamp differs has changed."""
    stats = ((str(path), path.stat()) for path in sorted(paths))
    return [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def folder_stamps(folder: Path) -> list[tuple[str, int, int]]:
    """Return the stamps of all files in a folder; [] if it is not a folder."""
    return file_stamps(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []


def temporary_path(path: Path) -> Path:
    """Return a path to write a file to before renaming it. It is unique to this process on this machine."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")


@contextlib.contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file for writing, and rename it to `path` if the block ends without an error."""
    temporary = temporary_path(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # after an error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that readers see either its old or its new content, never a part of it."""
    with open_atomically(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def free_space(folder: Path) -> str:
    """Say how much room is left in a folder and in those for temporary files, one of which an error ENOSPC is about.

    A disk that has room for bytes may have none for further files.
    """
    rooms = []
    for place in (folder, Path(tempfile.gettempdir()), Path("/dev/shm")):
        if place.is_dir():
            disk = os.statvfs(place)
            files = f" and {disk.f_favail:,} files" if disk.f_files else ""
            rooms.append(f"{disk.f_bavail * disk.f_frsize:,} bytes free{files} in {place}")
    return "; ".join(rooms)


@contextlib.contextmanager
def write_beside(out: Path) -> Iterator[Path]:
    """Give a path to write a file or folder to, which gets its final name when the block ends without an error.

    Whoever finds the final name finds all of it. An empty folder of that name is replaced. What earlier processes on
    this machine left behind when they were killed is deleted.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    delete_leftovers(out.parent, out.name)
    temporary = temporary_path(out)
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        temporary.replace(out)
        sync(out.parent)
    except Exception as error:  # safetensors has errors of its own
        reason = next((reason for number, reason in NO_SPACE.items() if os.strerror(number) in str(error)), None)
        if reason is None:
            raise
        raise MachineError(reason, at=out, got=free_space(out.parent), fix="make room, and try again") from None
    finally:
        delete(temporary)


def delete_leftovers(folder: Path, name: str | None = None) -> None:
    """Delete what killed processes of this machine left at a `temporary_path` in a folder.

    name  of the file that they were writing; None: of any
    """
    for path in folder.glob(f"{glob.escape(name) if name else '*'}.{glob.escape(socket.gethostname())}-*.tmp"):
        pid = path.name.removesuffix(".tmp").rpartition("-")[2]
        if pid.isdecimal() and not is_running(int(pid)):
            delete(path)


def is_running(pid: int) -> bool:
    """Return whether a process with this id runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to disk, so that they survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def delete(path: Path) -> None:
    """Delete a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def lock(folder: Path, message: str, *, fix: str) -> TextIO:
    """Create a folder and lock it until the returned file is closed.

    Raise a UserError with this message if another process holds the lock.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise MachineError(f"the folder can't be created: {error.strerror}", at=folder) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel releases the lock if its holder dies
    except OSError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise UserError(message, at=folder, got=holder, fix=fix, code=LOCKED) from None
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file
