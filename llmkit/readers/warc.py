"""Read web archives: the pages of WARC files, the texts of WET files."""

import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmkit.readers import packed
from llmkit.readers.decode import decode
from llmkit.readers.packed import size_after, stored_size, unpack
from llmkit.readers.tally import BadRecord, Record

MIME_FORMATS = {"text/html": "html", "application/xhtml+xml": "html", "text/plain": "text"}
CHUNK_HEADER = re.compile(rb"([0-9a-fA-F]{1,8})[ \t]*(?:;[^\r\n]*)?\r\n")  # the size in hex
NEXT_RECORD = re.compile(rb"\r\n\r\nWARC/1\.[01]\r\nWARC-")


def decode_body(data: bytes, headers: Any) -> bytes:
    """Undo the chunked transfer encoding and the compression of an HTTP body. Raise ValueError if it is truncated.

    Crawlers often decode a body but keep its headers. A body that is not encoded as its headers say is returned as is.
    """
    headers = {name.lower(): value.lower() for name, value in headers}
    if "chunked" in headers.get("transfer-encoding", "") and CHUNK_HEADER.match(data):
        pieces, at = [], 0
        while True:
            head = CHUNK_HEADER.match(data, at)
            if head is None:
                raise ValueError("cut short between its chunks")
            size, at = int(head[1], 16), head.end()
            if size == 0:
                break
            if at + size > len(data):
                raise ValueError("cut short inside a chunk")
            pieces.append(data[at : at + size])
            at += size + 2
        data = b"".join(pieces)
    if data.startswith(b"\x1f\x8b") and "gzip" in headers.get("content-encoding", ""):
        stream = zlib.decompressobj(31)
        try:
            data = stream.decompress(data, packed.MAX_DOCUMENT_BYTES + 1)
        except zlib.error as error:
            raise ValueError(f"broken gzip: {error}") from None
        if len(data) > packed.MAX_DOCUMENT_BYTES:
            raise ValueError(f"over {packed.MAX_DOCUMENT_BYTES:,} bytes")
        if not stream.eof:
            raise ValueError("cut short inside its gzip")
    elif (coding := headers.get("content-encoding")) in ("br", "zstd"):
        raise ValueError(f"compressed with {coding}, which is not supported")
    return data


def read_warc(path: Path) -> Iterator[Record]:
    """Read the pages of a web archive (ISO 28500) or the texts of a WET file: {text, format, encoding, url}.

    Requests, pictures, redirects and error pages are skipped. A record's number is its position in the archive, from 1.
    Its offset is that of its (compressed) start.
    """
    from fastwarc.warc import ArchiveIterator, WarcRecordType

    wanted = WarcRecordType.response | WarcRecordType.resource | WarcRecordType.conversion
    number, start, done, is_bad = 0, 0, 0, False
    try:
        with path.open("rb") as raw:
            for number, record in enumerate(ArchiveIterator(raw), 1):
                start, size, data, is_bad = record.stream_pos, record.content_length, b"", False
                mime = record.http_content_type if record.is_http else record.headers.get("Content-Type")
                doc_format = MIME_FORMATS.get((mime or "").partition(";")[0].strip().lower())
                url = (record.headers.get("WARC-Target-URI") or "").strip("<>")
                is_page = doc_format and record.record_type & wanted and not url.startswith("metadata:")  # wget's log
                is_page = is_page and (not record.is_http or record.http_headers.status_code == 200)
                try:
                    if not record.headers.get("Content-Length"):
                        raise ValueError("a header without Content-Length: damaged, or cut short")
                    data = record.reader.read(packed.MAX_DOCUMENT_BYTES + 1) if is_page else b""
                    if len(data) > packed.MAX_DOCUMENT_BYTES:
                        raise ValueError(f"over {packed.MAX_DOCUMENT_BYTES:,} bytes")
                    if (found := len(data) + record.reader.consume()) < size:
                        raise ValueError(f"cut short: {found:,} of {size:,} bytes")
                    if record.is_http and doc_format and record.http_headers.status_code is None:
                        raise ValueError("a response without a status")
                    if not is_page:
                        continue
                    if NEXT_RECORD.search(data):
                        raise ValueError("cut short: it runs on into the next record")
                    body = decode_body(data, record.http_headers) if record.is_http else data
                    text, encoding = decode(body, html=doc_format == "html", declared=record.http_charset)
                except (ValueError, OSError) as error:
                    is_bad = True
                    yield number, BadRecord(str(path), number, start, str(error), len(data)), len(data)
                    continue
                done += size
                yield number, {"text": text, "format": doc_format, "encoding": encoding, "url": url}, size
        if path.suffix.lower() == ".gz" and not is_bad:  # else the end is reported already
            check_gzip_end(path, start)
    except (OSError, EOFError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # from the system
            raise
        rest = stored_size(path) - start  # counts as if its share of pages were that of what precedes it
        lost = rest * done // start if start and done else rest
        reason = f"the file is broken from here on: {error}"
        yield number + 1, BadRecord(str(path), number + 1, None, reason, lost), lost
        return
    if not number:
        yield 1, BadRecord(str(path), 1, 0, "no WARC record in the file", size_after(path, 0)), 0


def check_gzip_end(path: Path, start: int) -> None:
    """Raise EOFError if a .gz ends inside a member, which FastWARC takes for the end of the archive.

    start  where the last member begins. If none begins there, the file is a single member and is unpacked as a whole.
    """
    with path.open("rb") as raw:
        raw.seek(start)
        is_member = raw.read(3) == b"\x1f\x8b\x08"
        raw.seek(start if is_member else 0)
        stream = unpack(raw, path)
        while stream.read(2**20):
            pass
