"""Write and memory-map token shards: raw little-endian integers, and an index of the documents' ends."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.errors import DataError
from llmkit.files import file_sha256, open_atomically, temporary_path, write_atomically


def token_dtype(vocab_size: int) -> np.dtype:
    """Return uint16 for up to 65,536 tokens, else uint32, both little-endian."""
    return np.dtype("<u2" if vocab_size <= 65_536 else "<u4")


class ShardWriter:
    """Write documents (ids with an end token each) to PATH.bin, and the positions of their ends to PATH.idx.

    The files are created when the block ends without an error, unless there are no documents.

    >>> with ShardWriter(folder / "a", np.dtype("<u2")) as shard:     # doctest: +SKIP
    ...     shard.add(np.array([5, 6, 0]))
    """

    def __init__(self, path: Path, dtype: np.dtype):
        self.path, self.dtype = path.with_name(path.name + ".bin"), dtype
        self.index = path.with_name(path.name + ".idx")
        self.ends: list[int] = []
        self.tokens = 0

    def __enter__(self) -> "ShardWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = temporary_path(self.path)
        self.file = self.temporary.open("wb")
        return self

    def add(self, ids: np.ndarray) -> None:
        self.file.write(ids.astype(self.dtype).tobytes())
        self.tokens += len(ids)
        self.ends.append(self.tokens)

    def __exit__(self, kind, *_) -> None:
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
        finally:
            self.file.close()
        if kind is None and self.ends:
            write_atomically(self.index, np.array(self.ends, dtype="<i8").tobytes())
            self.temporary.replace(self.path)
        else:
            self.temporary.unlink()


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file atomically."""
    with open_atomically(path) as file:
        np.save(file, array, allow_pickle=False)


def load_array(path: Path, **options: Any) -> np.ndarray:
    """Load a .npy file of a build. Raise DataError if it is damaged."""
    try:
        return np.load(path, allow_pickle=False, **options)
    except (ValueError, EOFError, FileNotFoundError) as error:
        fix = "delete the folder it is in and build again"
        raise DataError(f"a file of this build is damaged: {error}", at=path, fix=fix) from None


class TokenStream:
    """Read the shards of a split, or of one of its sources, as one long array of tokens.

    >>> TokenStream([], np.dtype("<u2")).read(0, 4)
    array([], dtype=uint16)
    """

    def __init__(self, shards: list[Path], dtype: np.dtype):
        self.dtype = dtype
        self.shards = [np.memmap(path, dtype=dtype, mode="r") for path in shards]
        self.ends = [np.memmap(path.with_suffix(".idx"), dtype="<i8", mode="r") for path in shards]
        self.starts = np.cumsum([0, *map(len, self.shards)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def pieces(self, start: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Yield (shard, start, stop) for each shard that holds some of the tokens [start, start + length)."""
        stop = min(start + length, len(self))
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < stop:
            end = min(stop, int(self.starts[shard + 1]))
            yield shard, start - int(self.starts[shard]), end - int(self.starts[shard])
            start, shard = end, shard + 1

    def read(self, start: int, length: int) -> np.ndarray:
        """Return a copy of tokens [start, start + length), or fewer at the end of the stream. They may span shards."""
        pieces = [self.shards[shard][begin:end] for shard, begin, end in self.pieces(start, length)]
        return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)

    def document_starts(self, start: int, length: int) -> np.ndarray:
        """Return the positions in (start, start + length) at which a document begins."""
        found = [np.empty(0, np.int64)]
        for shard, begin, end in self.pieces(start, length):
            ends = self.ends[shard]
            inside = ends[np.searchsorted(ends, begin, side="right") : np.searchsorted(ends, end)]
            first = [0] if begin == 0 and shard > 0 else []
            found.append(np.array([*first, *inside], np.int64) + int(self.starts[shard]))
        positions = np.concatenate(found)
        return positions[positions > start]


def open_split(folder: Path, files: list[dict], dtype: np.dtype) -> TokenStream:
    """Open the shards of a split as the manifest lists them. Raise DataError if one or its index has changed."""
    entries = [one for entry in files for one in (entry, entry["index"])]
    what, fix = "a token shard changed after the build", f"delete {folder} and build again"
    check_unchanged(folder, entries, what, fix=fix)
    return TokenStream([folder / entry["path"] for entry in files], dtype)


def check_unchanged(folder: Path, entries: list[dict], what: str, *, fix: str) -> None:
    """Raise a DataError with this message if a file in the folder is not as its entry says; see `describe_file`."""
    for entry in entries:
        path = folder / entry["path"]
        if (problem := find_change(path, entry)) is None and path.stat().st_mtime_ns != entry["mtime_ns"]:
            # A copied file has a new time, so compare the contents.
            problem = "another checksum" if file_sha256(path) != entry["sha256"] else None
        if problem:
            expected = f"{entry['bytes']} bytes, as they were written"
            raise DataError(what, at=path, expected=expected, got=problem, fix=fix)


def describe_file(path: Path, folder: Path) -> dict[str, Any]:
    """Return a file's entry in the manifest: {path, bytes, mtime_ns, sha256}."""
    name, stat = str(path.relative_to(folder)), path.stat()
    return {"path": name, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": file_sha256(path)}


def find_change(path: Path, entry: dict[str, Any]) -> str | None:
    """Compare a file's size with its entry in the manifest. Return the difference, or None if there is none."""
    if not path.is_file():
        return "no such file"
    size = path.stat().st_size
    return f"{size} bytes" if size != entry["bytes"] else None


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """Add the checksum of a report to it, so that `read_sealed` notices any change."""
    return content | {"checksum": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def read_sealed(path: Path) -> dict[str, Any]:
    """Read a report that was written as JSON by `seal`. Raise ValueError if it is not as it was written."""
    try:
        content = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict) or seal({k: v for k, v in content.items() if k != "checksum"}) != content:
        raise ValueError("it is not as it was written")
    return content
