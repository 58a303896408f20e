"""Open files as bytes, packed or not, and measure how much of a damaged one is lost."""

import gzip
import io
import lzma
import os
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

MAX_DOCUMENT_BYTES = 50_000_000  # limit for a text, and for a line of JSON Lines or CSV
# errors that truncated or invalid files raise; RuntimeError: a zip with a password
READ_ERRORS = (EOFError, OSError, zlib.error, lzma.LZMAError, pa.ArrowException, zipfile.BadZipFile, RuntimeError)


def suffix_of(path: Path | os.DirEntry) -> str:
    """Return the key into READERS: `.txt` for `a.b.TXT`, `.jsonl.gz` for `a.b.jsonl.gz`."""
    parts = path.name.lstrip(".").lower().split(".")[1:]  # a hidden file's first dot begins no suffix
    if not parts or not parts[-1]:
        return ""
    return ".".join(["", *(parts[-2:] if parts[-1] in ("gz", "zst") else parts[-1:])])


def open_bytes(path: Path) -> BinaryIO:
    """Open a file, decompressing .gz and .zst on the fly. Reading a truncated file raises one of READ_ERRORS."""
    return unpack(path.open("rb"), path)


def unpack(raw: BinaryIO, path: Path) -> BinaryIO:
    """Return the stream of the unpacked bytes of an open file."""
    if path.suffix.lower() == ".gz":
        return gzip.open(raw)
    if path.suffix.lower() == ".zst":  # not zstandard, which does not notice that a file is truncated
        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw), "zstd"))
    return raw


def stored_size(path: Path) -> int:
    """Return the size of a file in bytes as it is stored, also of a file inside a zip."""
    return path.stat().st_size if isinstance(path, Path) else path.root.getinfo(path.at).file_size


def may_be_empty(path: Path) -> bool:
    """Return False for formats that have a header, so that a file of no bytes is a damaged one."""
    return not suffix_of(path).endswith((".gz", ".zst", ".zip", ".parquet", ".warc", ".wet"))


class ShortReads:
    """An open file that reads few bytes at a time, so that its position tells where decompression fails."""

    def __init__(self, raw: BinaryIO, most: int):
        self.raw, self.most = raw, most

    def read(self, size: int) -> bytes:
        return self.raw.read(min(size, self.most))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


def size_after(path: Path, done: int) -> int:
    """Return how many bytes of a damaged file are lost if only the first `done` ones, unpacked, can be read.

    A packed file is unpacked again up to the damage. Its remaining bytes count as if they had the same ratio.
    """
    size, intact = stored_size(path), 0
    if path.suffix.lower() not in (".gz", ".zst"):
        return max(0, size - done)
    with path.open("rb") as raw, suppress(*READ_ERRORS):
        stream = unpack(ShortReads(raw, max(16, size // 1000)), path)
        while stream.read1(2**16):
            intact = raw.tell()
    return (size - intact) * done // intact if intact and done else size
