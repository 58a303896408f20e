"""Token shards: raw little-endian integers and an index of document ends, written once, memory-mapped ever after."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from llmkit.errors import DATA, UserError


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 holds ids of up to 65,536 tokens, uint32 the rest."""
    return np.dtype("<u2" if vocab_size <= 65_536 else "<u4")


def write_shard(path: Path, documents: Iterable[np.ndarray], dtype: np.dtype) -> tuple[int, int]:
    """Write documents (ids, each with its end token) to PATH.bin and their ends to PATH.idx.

    Returns (documents, tokens). Both files appear whole or not at all; no documents, no files.
    """
    ends, total = [], 0
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".tmp")
    with half.open("wb") as file:
        for ids in documents:
            file.write(ids.astype(dtype).tobytes())
            total += len(ids)
            ends.append(total)
        file.flush()
        os.fsync(file.fileno())
    if not ends:
        half.unlink()
        return 0, 0
    index = path.with_suffix(".idx.tmp")
    index.write_bytes(np.array(ends, dtype="<i8").tobytes())
    index.replace(path.with_suffix(".idx"))
    half.replace(path.with_suffix(".bin"))
    return len(ends), total


class TokenStream:
    """The shards of a split as one long array of tokens.

    >>> TokenStream([], np.dtype("<u2")).read(0, 4)
    array([], dtype=uint16)
    """

    def __init__(self, shards: list[Path], dtype: np.dtype):
        self.dtype = dtype
        self.shards = [np.memmap(path, dtype=dtype, mode="r") for path in shards]
        self.starts = np.cumsum([0, *map(len, self.shards)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length), copied; across shard borders too, shorter at the end."""
        pieces, stop = [], min(start + length, len(self))
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < stop:
            offset = start - self.starts[shard]
            piece = self.shards[shard][offset : offset + stop - start]
            pieces.append(piece)
            start += len(piece)
            shard += 1
        return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)


def open_split(folder: Path, files: list[dict], dtype: np.dtype) -> TokenStream:
    """The shards of one split as the manifest lists them: {path, bytes}; a changed file is noticed by its size."""
    paths = []
    for entry in files:
        path = folder / entry["path"]
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise UserError(
                "a token shard is not what was built", at=path, expected=f"{entry['bytes']} bytes",
                got=f"{path.stat().st_size} bytes" if path.is_file() else "no such file",
                fix=f"delete {folder} and build again", code=DATA,
            )  # fmt: skip
        paths.append(path)
    return TokenStream(paths, dtype)
