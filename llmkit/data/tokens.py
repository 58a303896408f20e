"""Token shards: raw little-endian integers and an index of document ends, written once, memory-mapped ever after."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.errors import DataError
from llmkit.files import file_sha256, temporary_path, write_atomically


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 holds ids of up to 65,536 tokens, uint32 the rest."""
    return np.dtype("<u2" if vocab_size <= 65_536 else "<u4")


class ShardWriter:
    """Writes documents (ids, each with its end token) to PATH.bin and their ends to PATH.idx.

    Both files appear whole, when the block ends well, or not at all; no documents, no files.

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
        self.half = temporary_path(self.path)
        self.file = self.half.open("wb")
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
            self.half.replace(self.path)
        else:
            self.half.unlink()


class TokenStream:
    """The shards of a split, or of one of its sources, as one long array of tokens.

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
        """(shard, start, stop) inside each shard that tokens [start, start + length) lie in."""
        stop = min(start + length, len(self))
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < stop:
            end = min(stop, int(self.starts[shard + 1]))
            yield shard, start - int(self.starts[shard]), end - int(self.starts[shard])
            start, shard = end, shard + 1

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length), copied; across shard borders too, shorter at the end."""
        pieces = [self.shards[shard][begin:end] for shard, begin, end in self.pieces(start, length)]
        return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)

    def document_starts(self, start: int, length: int) -> np.ndarray:
        """Places in (start, start + length) at which a document begins."""
        found = [np.empty(0, np.int64)]
        for shard, begin, end in self.pieces(start, length):
            ends = self.ends[shard]
            inside = ends[np.searchsorted(ends, begin, side="right") : np.searchsorted(ends, end)]
            first = [0] if begin == 0 and shard > 0 else []
            found.append(np.array([*first, *inside], np.int64) + int(self.starts[shard]))
        places = np.concatenate(found)
        return places[places > start]


def open_split(folder: Path, files: list[dict], dtype: np.dtype) -> TokenStream:
    """The shards of one split, and their indices, as the manifest lists them; a changed file is noticed."""
    for entry in files:
        for one in (entry, entry["index"]):
            path = folder / one["path"]
            if (problem := changed(path, one)) is None and path.stat().st_mtime_ns != one["mtime_ns"]:
                problem = "another checksum" if file_sha256(path) != one["sha256"] else None  # a copy keeps its content
            if problem:
                raise DataError(
                    "a token shard is not what was built",
                    at=path,
                    expected=f"{one['bytes']} bytes as in the manifest",
                    got=problem,
                    fix=f"delete {folder} and build again",
                )
    return TokenStream([folder / entry["path"] for entry in files], dtype)


def describe(path: Path, folder: Path) -> dict[str, Any]:
    """What the manifest says of a file: {path, bytes, mtime_ns, sha256}."""
    stamp = path.stat()
    sizes = {"bytes": stamp.st_size, "mtime_ns": stamp.st_mtime_ns}
    return {"path": str(path.relative_to(folder))} | sizes | {"sha256": file_sha256(path)}


def changed(path: Path, entry: dict[str, Any]) -> str | None:
    """What shows at a glance that a file is not the described one, if anything does."""
    if not path.is_file():
        return "no such file"
    return f"{path.stat().st_size} bytes" if path.stat().st_size != entry["bytes"] else None
