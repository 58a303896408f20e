"""Write files atomically, lock folders, and fingerprint input files."""

import errno
import fcntl
import hashlib
import os
import socket
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from llmkit.errors import LOCKED, MachineError, UserError

NO_SPACE = {
    errno.ENOSPC: "a disk is full",
    errno.EDQUOT: "the quota of disk space is used up",
    errno.EFBIG: "a file would be larger than is allowed here (ulimit -f)",
}


def file_sha256(path: Path) -> str:
    """Return the SHA-256 checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_stamps(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Return the name, size and modification time of each file. A file whose stamp differs has changed."""
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(paths)]


def folder_stamps(folder: Path) -> list[tuple[str, int, int]]:
    """Return the stamps of all files in a folder; [] if it is not a folder."""
    return file_stamps(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []


def temporary_path(path: Path) -> Path:
    """Return a path to write a file to before renaming it. It is unique to this process on this machine."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that readers see either its old or its new content, never a part of it."""
    temporary = temporary_path(path)
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


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
