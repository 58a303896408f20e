"""Write files atomically, lock folders, and fingerprint what is read."""

import fcntl
import hashlib
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from llmkit.errors import LOCKED, MachineError, UserError


def file_sha256(path: Path) -> str:
    """Return the SHA-256 checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_stamps(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Return names, sizes and times of files: another stamp means a changed file."""
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(paths)]


def folder_stamps(folder: Path) -> list[tuple[str, int, int]]:
    """Return the stamps of all files in a folder; [] if it is no folder."""
    return file_stamps(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []


def temporary_path(path: Path) -> Path:
    """Return where to write a file before renaming it: another path in every process on any machine."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that it has its old or its new content at every moment."""
    temporary = temporary_path(path)
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def lock(folder: Path, taken: str, *, fix: str) -> TextIO:
    """Create a folder and lock it until the returned file is closed.

    Raises a UserError that says `taken` if another process holds the lock.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise MachineError(f"the folder can't be made: {error.strerror}", at=folder) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel drops a dead holder's lock
    except OSError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise UserError(taken, at=folder, got=holder, fix=fix, code=LOCKED) from None
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file
