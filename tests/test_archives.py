"""Web archives, zips, and large files in pieces: every record once, wherever it lies, and what is broken named."""

import gzip
import io
import json
import random
import re
import time
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from conftest import SHARED, needs_shared

from llmkit.errors import UserError
from llmkit.readers.documents import read_file, read_texts
from llmkit.readers.listing import list_files
from llmkit.readers.records import count_lines_before, read_records, spans_of
from llmkit.readers.tally import BadRecord, Tally
from llmkit.readers.warc import decode_body
from llmkit.types import Document

ZIPPED, CHUNKED = "Content-Encoding: gzip\r\n", "Transfer-Encoding: chunked\r\n"


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def read(path: Path, **options) -> tuple[list[Document], list[BadRecord]]:
    found = list(read_file(path, source="s", root=path.parent, **options))
    return [one for one in found if isinstance(one, Document)], [one for one in found if isinstance(one, BadRecord)]


# ---- web archives ---------------------------------------------------------------------------------------------------


def warc(kind: str, url: str, block: bytes, media: str = "text/plain", length: int | None = None) -> bytes:
    """Return a WARC record as ISO 28500 defines it; `length` overrides the size of its block."""
    head = [
        "WARC/1.0", f"WARC-Type: {kind}", f"WARC-Target-URI: {url}", "WARC-Date: 2024-01-01T00:00:00Z",
        "WARC-Record-ID: <urn:uuid:00000000-0000-0000-0000-000000000000>", f"Content-Type: {media}",
        f"Content-Length: {len(block) if length is None else length}", "", "",
    ]  # fmt: skip
    return "\r\n".join(head).encode() + block + b"\r\n\r\n"


def page(
    url: str, body: bytes, media: str = "text/html", status: str = "200 OK", headers: str = "", lie: int = 0
) -> bytes:
    block = f"HTTP/1.1 {status}\r\nContent-Type: {media}\r\n{headers}\r\n".encode() + body
    return warc("response", url, block, "application/http; msgtype=response", len(block) + lie)


def chunks(body: bytes, size: int) -> bytes:
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in [*pieces, b""])


NOISE = bytes(random.Random(0).choices(b"abcdefghijklmnopqrstuvwxyz \n", k=5000))
A, B = page("http://a/", b"<p>one"), page("http://b/", b"<p>two")


@pytest.mark.parametrize("name", ["a.wet", "a.wet.gz", "a.wet.zst"])
def test_wet_files_are_read_plain_and_packed(tmp_path, name):
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    text = warc("conversion", "http://w/", b"a text")
    (one,), bad = read(write(tmp_path / name, pack(text)))
    assert not bad and one.text == "a text" and one.meta["url"] == "http://w/"


@pytest.mark.parametrize("name, pack", [
    ("a.warc", b"".join), ("a.warc.gz", lambda all: b"".join(map(gzip.compress, all))),
    ("a.warc.gz", lambda all: gzip.compress(b"".join(all))),
    ("a.warc.zst", lambda all: b"".join(map(zstandard.compress, all))),
])  # fmt: skip
def test_pages_of_an_archive(tmp_path, name, pack):
    everything = [warc("warcinfo", "", b"software: x"), A, page("http://b/?q=1", b"two", "text/plain")]
    good, bad = read(write(tmp_path / "in" / name, pack(everything)), text_key="body")  # text_key is for records
    assert not bad and [(one.id, one.text) for one in good] == [(f"s/{name}:2", "<p>one"), (f"s/{name}:3", "two")]
    assert good[0].meta == {"format": "html", "encoding": "utf-8", "url": "http://a/"}
    assert good[1].meta == {"format": "text", "encoding": "utf-8", "url": "http://b/?q=1"}


PRIVET = "<p>\u043f\u0440\u0438\u0432\u0435\u0442"


@pytest.mark.parametrize("media, markup, codec, encoding", [
    ("text/html; charset=windows-1251", "", "cp1251", "windows-1251"),
    ("Text/HTML;Charset=KOI8-R", "", "koi8-r", "koi8-r"),
    ("text/html", '<meta charset="windows-1251">', "cp1251", "windows-1251"),
    ("text/html", '<meta http-equiv="Content-Type" content="text/html; charset=koi8-r">', "koi8-r", "koi8-r"),
    ("text/html", "<meta name=x data-charset=utf-16><meta charset=none><meta charset=koi8-r>", "koi8-r", "koi8-r"),
    ("text/html", "<meta charset=KOI8-R>", "koi8-r", "koi8-r"),
    pytest.param("text/html", "<META CHARSET=koi8-r>", "koi8-r", "koi8-r"),
    pytest.param("text/html; charset=none", "<meta charset=koi8-r>", "koi8-r", "koi8-r"),
    pytest.param("text/html; charset=iso-2022-jp", "", "iso-2022-jp", "iso-2022-jp"),
    ("text/html; charset=koi8-r", "<meta charset=windows-1251>", "koi8-r", "koi8-r"),  # who sends it knows better
    ("text/html; charset=windows-1251", "", "utf-8", "utf-8"),  # but what is UTF-8 is UTF-8
    ("application/xhtml+xml; charset=iso-8859-5", "", "iso-8859-5", "iso-8859-5"),
])  # fmt: skip
def test_charsets_of_pages(tmp_path, media, markup, codec, encoding):
    path = write(tmp_path / "a.warc", page("http://a/", (markup + PRIVET).encode(codec), media) + B)
    (one, other), _ = read(path)
    assert (one.text, one.meta["encoding"], one.meta["format"]) == (markup + PRIVET, encoding, "html")
    assert other.text == "<p>two"


@pytest.mark.parametrize("headers, pack", [
    (ZIPPED, gzip.compress), (CHUNKED, lambda body: chunks(body, 7)), (CHUNKED, lambda body: chunks(body, 10_000)),
    pytest.param(ZIPPED + CHUNKED, lambda body: chunks(gzip.compress(body), 50)),
])  # fmt: skip
def test_content_codings(tmp_path, headers, pack):
    path = write(tmp_path / "a.warc", A + page("http://c/", pack(NOISE), headers=headers) + B)
    good, bad = read(path)
    assert not bad and [one.text for one in good] == ["<p>one", NOISE.decode(), "<p>two"]


def test_what_is_no_page_is_neither_read_nor_bad(tmp_path):
    others = [
        page("http://n/", b"<p>none", status="404 Not Found"), page("http://m/", b"<p>gone", status="301 Moved"),
        page("http://p/", b"\x89PNG\0\0", "image/png"), page("http://j/", b"{}", "application/json"),
        warc("request", "http://a/", b"GET / HTTP/1.1\r\n\r\n", "application/http; msgtype=request"),
        warc("metadata", "http://a/", b"fetchTimeMs: 5", "application/warc-fields"),
        warc("resource", "metadata://gnu.org/wget", b"log of wget"),
    ]  # fmt: skip
    good, bad = read(write(tmp_path / "a.warc", b"".join(others) + B))
    assert not bad and [(one.text, one.id) for one in good] == [("<p>two", f"s/a.warc:{len(others) + 1}")]


def test_texts_of_a_wet_file_and_resources(tmp_path):
    wet = warc("conversion", "http://w/", "plain \u0442\u0435\u043a\u0441\u0442".encode())
    (one,), _ = read(write(tmp_path / "a.wet.gz", gzip.compress(wet)))
    assert one.text == "plain \u0442\u0435\u043a\u0441\u0442"
    assert one.meta == {"format": "text", "encoding": "utf-8", "url": "http://w/"}
    (one,), _ = read(write(tmp_path / "b.warc", warc("resource", "<file:///r.html>", b"<p>r", "text/html")))
    assert (one.text, one.meta["url"], one.meta["format"]) == ("<p>r", "file:///r.html", "html")


def test_an_archive_that_ends_too_early_keeps_what_came_before(tmp_path):
    long = page("http://long/", NOISE)
    packed = gzip.compress(long)
    for name, data, start in (
        ("a.warc", A + long[:-4000], len(A)),
        ("a.warc.gz", gzip.compress(A) + packed[: len(packed) // 2], len(gzip.compress(A))),
    ):
        (one,), (bad,) = read(write(tmp_path / name, data))
        assert one.text == "<p>one" and (bad.line, bad.offset) == (2, start) and "cut short" in bad.reason
    (one,), (bad,) = read(write(tmp_path / "a.warc.zst", zstandard.compress(A) + zstandard.compress(long)[:-1000]))
    assert one.text == "<p>one" and bad.line == 2 and "broken" in bad.reason


PACKS = {
    "a.warc": b"".join, "a.wet.gz": lambda all: gzip.compress(b"".join(all)),
    "a.warc.gz": lambda all: b"".join(map(gzip.compress, all)),
    "a.warc.zst": lambda all: b"".join(map(zstandard.compress, all)),
}  # fmt: skip


@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("kind", ["page", "request"])
def test_an_archive_cut_anywhere_in_its_last_record_has_a_bad_one(tmp_path, name, kind):
    last = page("http://c/", NOISE[:300]) if kind == "page" else warc("request", "http://c/", NOISE[:300])
    whole = PACKS[name]([A, B, last])
    start = len(PACKS[name]([A, B])) if name != "a.wet.gz" else len(whole) - 150
    good, bad = read(write(tmp_path / name, whole))
    assert len(good) == 2 + (kind == "page") and not bad
    for size in range(start + 1, len(whole) - 4, 3):
        good, bad = read(write(tmp_path / name, whole[:size]))
        assert len(bad) == 1 and [one.text for one in good][:2] == ["<p>one", "<p>two"][: len(good)], size


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz", "a.warc.zst"])
def test_a_bad_header_costs_what_follows_it_and_not_what_is_no_page(tmp_path, name):
    image = page("http://i/", NOISE, "image/png")
    pages = [image, page("http://a/", NOISE[:200])] * 50
    pages[90] = pages[90].replace(b"WARC/1.0", b"WORC/1.0")
    tally = Tally()
    texts = list(read_texts([str(write(tmp_path / name, PACKS[name](pages)))], tally=tally))
    assert len(texts) == 45 and tally.bad == 1 and "broken from here on" in tally.first
    assert tally.fractions()[1] == pytest.approx(0.1, abs=0.02)


def test_a_page_without_text_costs_no_other(tmp_path, monkeypatch):
    binary, large = page("http://x/", b"\0" * 50), page("http://y/", NOISE)
    monkeypatch.setattr("llmkit.readers.packed.MAX_DOCUMENT_BYTES", 1000)
    packed = list(map(gzip.compress, (A, binary, large, B)))
    good, bad = read(write(tmp_path / "a.warc.gz", b"".join(packed)))
    assert [one.text for one in good] == ["<p>one", "<p>two"]
    assert [(one.line, one.offset) for one in bad] == [(2, len(packed[0])), (3, len(packed[0]) + len(packed[1]))]
    assert "binary" in bad[0].reason and "over 1,000 bytes" in bad[1].reason


def test_a_page_that_is_cut_short_is_named(tmp_path):
    """FastWARC reads into the next member of the .gz, so that page is lost too. Both are reported."""
    pages = (A, page("http://t/", b"<p>short", lie=1000), B, B)
    good, (bad,) = read(write(tmp_path / "a.warc.gz", b"".join(map(gzip.compress, pages))))
    assert good[0].text == "<p>one" and bad.line == 2 and "cut short" in bad.reason


def test_a_body_that_is_not_packed_as_its_header_says_is_taken_as_it_is(tmp_path):
    good, bad = read(write(tmp_path / "a.warc", A + page("http://t/", b"<p>no gzip", headers=ZIPPED) + B))
    assert [one.text for one in good] == ["<p>one", "<p>no gzip", "<p>two"] and not bad


@pytest.mark.parametrize("line", ["HTTP/1.1 OK", "HTTP/1.1"])
def test_a_page_without_a_status_is_named(tmp_path, line):
    block = f"{line}\r\nContent-Type: text/html\r\n\r\n<p>x".encode()
    broken = warc("response", "http://c/", block, "application/http; msgtype=response")
    good, (bad,) = read(write(tmp_path / "a.warc", A + broken + B))
    assert len(good) == 2 and bad.line == 2 and bad.reason == "a response without a status"


@pytest.mark.parametrize("headers, body", [
    (ZIPPED, gzip.compress(NOISE, mtime=0)[:1000]), (CHUNKED, chunks(NOISE, 500)[:1000]),
])  # fmt: skip
def test_half_of_a_packed_page_is_bad(tmp_path, headers, body):
    good, (bad,) = read(write(tmp_path / "a.warc", page("http://t/", body, headers=headers)))
    assert not good and bad.line == 1


@pytest.mark.parametrize("body, text", [
    (b"3\r\none\r\n0;a=b\r\n\r\n", "one"), (b"3 ;x\r\none\r\n00\r\n\r\n", "one"),
    (b"3\r\none\r\n-2\r\n" * 5, None), (b"3\r\none\r\nffffffffff\r\n", None),
])  # fmt: skip
def test_chunks_end_as_they_should_or_the_page_is_bad(tmp_path, body, text):
    good, bad = read(write(tmp_path / "a.warc", page("http://t/", body, headers=CHUNKED)))
    assert [one.text for one in good] == ([text] if text else []) and len(bad) == (text is None)


def test_a_million_chunks_take_no_time():
    started = time.process_time()
    body = b"1\r\nx\r\n" * 300_000 + b"0\r\n\r\n"
    assert decode_body(body, [("Transfer-Encoding", "chunked")]) == b"x" * 300_000
    assert time.process_time() - started < 5


@pytest.mark.parametrize("content, reason", [
    (b"", "no WARC|empty"), (b"no archive\n" * 50, "broken"), (b"\0" * 5000, "broken"), (NOISE, "broken"),
])  # fmt: skip
@pytest.mark.parametrize("name, pack", [("a.warc", bytes), ("a.warc.gz", gzip.compress), ("a.warc.gz", bytes)])
def test_what_is_no_archive_is_one_bad_record(tmp_path, name, pack, content, reason):
    ((number, bad, _),) = read_records(write(tmp_path / name, pack(content)))
    assert isinstance(bad, BadRecord) and number == bad.line == 1 and re.search(reason, bad.reason)


def test_garbage_after_the_last_page_is_named(tmp_path):
    (one,), (bad,) = read(write(tmp_path / "a.warc", A + b"garbage that follows\n" * 20))
    assert one.text == "<p>one" and bad.line == 2 and "broken" in bad.reason


@needs_shared
@pytest.mark.parametrize("name, number, reasons", [
    ("cc-sample-0000.warc.gz", 22, []), ("warcfile.warc.gz", 16, []), ("warcio/example.warc.gz", 1, []),
    ("clipped.warc.gz", 0, ["cut short: 74,970 of 88,038 bytes"]),
    ("warcio/example-trunc.warc", 0,
     ["cut short inside its gzip", "the file is broken from here on: Invalid WARC header"]),
])  # fmt: skip
def test_real_archives(name, number, reasons):
    good, bad = read(SHARED / "web" / "warc" / name)
    assert len(good) == len({one.id for one in good}) == number and [one.reason for one in bad] == reasons
    assert all(one.meta["url"].startswith("http") and one.meta["format"] in ("html", "text") for one in good)
    assert not number or sum(len(one.text) for one in good) > 1000 * number


# ---- zips -----------------------------------------------------------------------------------------------------------


def parquet(rows: list[dict], **options) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, **options)
    return buffer.getvalue()


def zipped(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


MEMBERS = {
    "z.txt": b"last", "a/deep/er/b.md": b"deep", "a/lines.jsonl": b'{"text": "l1"}\n\n{"text": "l3", "n": 3}\n',
    "table.parquet": parquet([{"text": "p1"}, {"text": "p2"}]), "packed.txt.gz": gzip.compress(b"unpacked"),
    "page.html": b"<p>caf\xe9", "pages.warc.gz": gzip.compress(A), "sheet.csv": b"text,n\nc1,1\n",
    "list.json": b'[{"text": "j1"}]',
}  # fmt: skip


def texts_in(path: Path, **options) -> list[str]:
    good, bad = read(path, **options)
    assert not bad
    return [one.text for one in good]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_files_of_every_kind_in_a_zip(tmp_path, method):
    good, bad = read(zipped(tmp_path / "a.zip", MEMBERS, method))
    assert not bad and [(one.id.removeprefix("s/a.zip/"), one.text) for one in good] == [
        ("a/deep/er/b.md", "deep"), ("a/lines.jsonl:1", "l1"), ("a/lines.jsonl:3", "l3"), ("list.json:1", "j1"),
        ("packed.txt.gz", "unpacked"), ("page.html", "<p>caf\u00e9"), ("pages.warc.gz:1", "<p>one"),
        ("sheet.csv:2", "c1"), ("table.parquet:1", "p1"), ("table.parquet:2", "p2"), ("z.txt", "last"),
    ]  # fmt: skip
    meta = {one.id.removeprefix("s/a.zip/"): one.meta for one in good}
    assert meta["page.html"] == {"format": "html", "encoding": "cp1252"} and meta["a/lines.jsonl:3"] == {}
    assert meta["pages.warc.gz:1"]["url"] == "http://a/"


def test_the_id_of_a_zip_is_relative_to_the_source(tmp_path):
    (tmp_path / "sub").mkdir()
    (one,) = read_file(zipped(tmp_path / "sub" / "a.zip", {"b.txt": b"x"}), source="s", root=tmp_path)
    assert one.id == "s/sub/a.zip/b.txt"


@pytest.mark.parametrize("globs, texts", [
    ({"include": ["*.md"]}, ["deep"]), ({"include": ["a/*"]}, ["deep", "l1", "l3"]), ({"include": ["b.md"]}, ["deep"]),
    ({"include": ["**/*.txt"]}, ["last"]), ({"include": ["*.txt", "*.txt.gz"]}, ["unpacked", "last"]),
    ({"include": ["a/*"], "exclude": ["*.jsonl"]}, ["deep"]), ({"include": ["*.rs"]}, []),
    ({"exclude": ["a/*", "*.parquet", "*.gz", "*.csv", "*.html", "*.json"]}, ["last"]),
])  # fmt: skip
def test_globs_pick_among_what_is_in_a_zip(tmp_path, globs, texts):
    assert texts_in(zipped(tmp_path / "a.zip", MEMBERS), **globs) == texts


def test_hidden_empty_and_unknown_members_are_passed_over(tmp_path):
    names = [".a.txt", ".git/b.txt", "x/.c/d.txt", "__MACOSX/._e.txt", "__pycache__/f.py", "g.exe", "none", "k.zip"]
    members = dict.fromkeys(names, b"x") | {"empty.txt": b"", "folder/": b"", "folder/h.txt": b"seen"}
    assert texts_in(zipped(tmp_path / "a.zip", members)) == ["seen"]
    good, (bad,) = read(zipped(tmp_path / "b.zip", {}))
    assert not good and "nothing to read" in bad.reason


@pytest.fixture
def stored(tmp_path) -> bytearray:
    """Return the bytes of a zip with three uncompressed texts, which tests damage by hand."""
    members = {f"{name}.txt": f"text {name} ".encode() * 20 for name in "abc"}
    return bytearray(zipped(tmp_path / "stored.zip", members, zipfile.ZIP_STORED).read_bytes())


def damage_is_one_bad_record(path: Path, data: bytes, reason: str) -> None:
    good, (bad,) = read(write(path, data))
    assert [one.id[-5:] for one in good] == ["a.txt", "c.txt"] and bad.path == f"{path}/b.txt"
    assert bad.line == 1 and reason in bad.reason


def headers_of(data: bytes, name: bytes) -> tuple[int, int]:
    """Return the offsets of a member's local and central headers."""
    return data.index(name) - 30, data.rindex(name) - 46


def test_a_damaged_member_costs_no_other(tmp_path, stored):
    stored[stored.index(b"text b") + 5] ^= 1
    damage_is_one_bad_record(tmp_path / "a.zip", stored, "CRC")


def test_an_encrypted_member_costs_no_other(tmp_path, stored):
    local, central = headers_of(stored, b"b.txt")
    stored[local + 6] |= 1
    stored[central + 8] |= 1
    damage_is_one_bad_record(tmp_path / "a.zip", stored, "encrypted")


def test_an_unknown_compression_costs_no_other(tmp_path, stored):
    local, central = headers_of(stored, b"b.txt")
    stored[local + 8] = stored[central + 10] = 99
    damage_is_one_bad_record(tmp_path / "a.zip", stored, "not supported")


@pytest.mark.parametrize("compress", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damaged_compression_costs_no_other(tmp_path, compress):
    path = zipped(tmp_path / "a.zip", {f"{name}.txt": NOISE + name.encode() for name in "abc"}, compress)
    data = bytearray(path.read_bytes())
    start = data.index(b"b.txt") + 200
    data[start : start + 50] = b"\xff" * 50
    good, (bad,) = read(write(path, data))
    assert [one.id[-5:] for one in good] == ["a.txt", "c.txt"] and bad.path.endswith("b.txt") and "broken" in bad.reason


@pytest.mark.parametrize("central", [False, True])
def test_names_that_are_no_utf8_are_bad_records(tmp_path, central):
    path = zipped(tmp_path / "a.zip", {"a.txt": b"x", "\u00e9.txt": b"y"})
    data = bytearray(path.read_bytes())
    place = (data.rindex if central else data.index)(b"\xc3\xa9.txt")
    data[place : place + 2] = b"\xff\xff"
    good, (bad,) = read(write(path, data))
    assert len(good) == (0 if central else 1) and "broken" in bad.reason


def test_a_torn_start_of_a_zip_is_bad_records(tmp_path, stored):
    good, bad = read(write(tmp_path / "a.zip", stored[10:]))
    assert bad and all(one.id.startswith("s/a.zip/") for one in good)


@pytest.mark.parametrize("data", [b"no zip" * 100, b"PK\x03\x04", b"PK\x05\x06" + b"\xff" * 18, b"\0" * 100])
def test_what_is_no_zip_is_one_bad_record(tmp_path, data):
    good, (bad,) = read(write(tmp_path / "a.zip", data))
    assert not good and bad.path == str(tmp_path / "a.zip") and bad.line == 1 and "zip is broken" in bad.reason


def test_a_zip_that_ends_too_early_is_one_bad_record(tmp_path, stored):
    good, (bad,) = read(write(tmp_path / "a.zip", stored[:-30]))
    assert not good and "zip is broken" in bad.reason


def test_broken_files_in_a_zip_are_bad_records_with_their_place(tmp_path):
    members = {
        "a.parquet": b"no parquet", "b.jsonl": b'{"text": "b1"}\n{bad\n{"text": "b3"}', "c.txt": b"\0" * 99,
        "d.txt.gz": b"no gzip", "e.warc": b"no archive\n", "f.json": b"[", "g.csv": b"text,n\nx,1\nshort\n",
        "h.txt": b"x" * 2000, "i.txt": b"fine",
    }  # fmt: skip
    path = zipped(tmp_path / "a.zip", members)
    good, bad = read(path)
    assert [one.text for one in good] == ["b1", "b3", "x", "x" * 2000, "fine"]
    places = [(one.path.removeprefix(f"{path}/"), one.line) for one in bad]
    assert places == [("a.parquet", 1), ("b.jsonl", 2), ("c.txt", 1), ("d.txt.gz", 1), ("e.warc", 1), ("f.json", 1),
                      ("g.csv", 3)]  # fmt: skip
    assert bad[1].offset == 15


def test_sizes_in_a_zip_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("llmkit.readers.packed.MAX_DOCUMENT_BYTES", 1000)
    path = zipped(tmp_path / "a.zip", {"bomb.txt": b"x" * 10_000_000, "b.txt": b"fine"})
    good, (bad,) = read(path)
    assert [one.text for one in good] == ["fine"] and "over 1,000 bytes" in bad.reason


def test_a_misspelt_column_in_a_zip_stops_and_names_the_member(tmp_path):
    with pytest.raises(UserError, match="no field text") as error:
        read(zipped(tmp_path / "a.zip", {"sub/x.jsonl": b'{"txt": "x"}'}))
    assert error.value.at == f"{tmp_path / 'a.zip'}/sub/x.jsonl:1"
    assert texts_in(zipped(tmp_path / "b.zip", {"x.jsonl": b'{"txt": "x"}'}), text_key="txt") == ["x"]


@needs_shared
def test_a_real_zip(tmp_path):
    good, bad = read(SHARED / "pretrain" / "nltk" / "udhr2.zip", include=["udhr2/*.txt"])
    assert not bad and len(good) == len({one.id for one in good}) > 300
    texts = {one.id.rsplit("/", 1)[1]: one.text for one in good}
    assert "All human beings are born free" in texts["eng.txt"] and "\u6743\u5229" in texts["cmn_hans.txt"]


# ---- pieces of files ------------------------------------------------------------------------------------------------

LINES = (
    b'{"text": "one"}\n\n   \r\n{"text": "two", "n": 2}\r\n{bad\n{"text": "caf\xc3\xa9 \xf0\x9f\x98\x80"}\n'
    b'["no object"]\n'
    b'{"text": "a line longer than most pieces of the file, so that some pieces begin and end in it"}\n\n\n\xff\n'
    b'{"text": "last, without an end"}'
)
FILES = {
    "lines": LINES, "closed": LINES + b"\n", "blank end": LINES + b"\n\n \n", "blank start": b"\n\n" + LINES,
    "one": b'{"text": "one"}', "marked": b"\xef\xbb\xbf" + LINES, "ends": b"\n" * 20,
}  # fmt: skip


def absolute(path: Path, spans: list) -> list[tuple[int, object]]:
    """Return (line from the start of the file, record) of every piece, as a build's report counts them."""
    before = count_lines_before(path, [span[0] for span in spans if span])
    found = []
    for span in spans:
        for number, record, _ in read_records(path, span):
            line = number + (before[span[0]] if span else 0)
            found.append((line, (line, record.offset, record.reason) if isinstance(record, BadRecord) else record))
    return found


@pytest.mark.parametrize("name", FILES)
def test_pieces_of_any_size_hold_every_line_once(tmp_path, name):
    path = write(tmp_path / "a.jsonl", FILES[name])
    whole = absolute(path, [None])
    assert [bad for _, bad in whole if isinstance(bad, tuple)] or name in ("one", "ends")
    for size in range(1, len(FILES[name]) + 3):
        spans = spans_of(path, size)
        assert spans == [None] if size >= len(FILES[name]) else len(spans) > 1
        assert absolute(path, spans) == whole, size


def test_bad_lines_are_found_at_their_offset(tmp_path):
    path = write(tmp_path / "a.ndjson", LINES)
    bad = [found for _, found in absolute(path, spans_of(path, 10)) if isinstance(found, tuple)]
    lines = LINES.split(b"\n")
    assert [lines[line - 1] for line, _, _ in bad] == [b"{bad", b'["no object"]', b"\xff"]
    assert all(LINES[offset:].startswith(lines[line - 1]) for line, offset, _ in bad)
    assert [reason.partition(":")[0] for _, _, reason in bad] == [
        "bad JSON",
        "an array, not an object",
        "invalid UTF-8",
    ]


def test_lines_before_any_place(tmp_path):
    path = write(tmp_path / "a.jsonl", LINES)
    places = list(range(len(LINES) + 1))
    random.Random(0).shuffle(places)  # in any order
    begun = {at: LINES[:at].count(b"\n") + (at > 0 and LINES[at - 1 : at] != b"\n") for at in places}
    assert count_lines_before(path, places) == begun
    assert count_lines_before(path, []) == {}


def test_too_long_a_line_is_bad_once_whatever_the_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("llmkit.readers.packed.MAX_DOCUMENT_BYTES", 30)
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "%s"}\n{"text": "b"}\n' % (b"x" * 200))
    whole = absolute(path, [None])
    assert whole[1][1] == (2, 14, "a line over 30 bytes") and len(whole) == 3
    assert all(absolute(path, spans_of(path, size)) == whole for size in (1, 7, 29, 30, 31, 100, 230))


def test_ids_of_pieces_differ_and_lead_back_to_their_line(tmp_path):
    path = write(tmp_path / "a.jsonl", b"".join(b'{"text": "%d"}\n' % (i % 3) for i in range(50)))
    spans = spans_of(path, 100)
    found = [one for span in spans for one in read_file(path, source="s", root=tmp_path, span=span)]
    assert [one.text for one in found] == texts_in(path) and len({one.id for one in found}) == 50
    before = count_lines_before(path, [span[0] for span in spans])
    for line, one in enumerate(found, 1):
        place, number = one.id.removeprefix("s/a.jsonl").rsplit(":", 1)
        assert before[int(place[1:] or 0)] + int(number) == line and (place == "") == (line < 9)


def test_one_record_without_text_is_bad_wherever_the_pieces_begin(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n{"text": "c"}\n')
    for size in (14, 1000):
        found = [one for span in spans_of(path, size) for one in read_file(path, source="s", root=tmp_path, span=span)]
        assert [type(one) for one in found] == [Document, BadRecord, Document]


def test_row_groups_hold_every_row_once(tmp_path):
    rows = [{"text": f"row {i} " * (i % 7), "n": i} for i in range(700)]
    path = write(tmp_path / "a.parquet", parquet(rows, row_group_size=100))
    whole = list(read_records(path))
    assert [record for _, record, _ in whole] == rows and [number for number, *_ in whole] == list(range(1, 701))
    ids = [one.id for one in read(path)[0]]
    for size in (1, 500, 2000, 3000, path.stat().st_size - 1, path.stat().st_size):
        spans = spans_of(path, size)
        assert len(spans) == 7 if size == 1 else len(spans) < 8
        assert [found for span in spans for found in read_records(path, span)] == whole
        assert [one.id for span in spans for one in read_file(path, source="s", root=tmp_path, span=span)] == ids
    assert spans == [None]


def test_a_bad_row_has_its_number_in_the_file(tmp_path):
    offsets, letters = pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb")
    table = pa.table({"text": pa.StringArray.from_buffers(3, offsets, letters)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    spans = spans_of(tmp_path / "a.parquet", 1)
    found = [found for span in spans for found in read_records(tmp_path / "a.parquet", span)]
    assert len(spans) == 3 and [number for number, *_ in found] == [1, 2, 3]
    assert (found[1][1].line, found[1][1].reason) == (2, "invalid UTF-8") and found[2][1] == {"text": "b"}


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json", "a.csv", "a.txt", "a.warc", "a.zip", "a.parquet"])
def test_what_can_not_be_cut_stays_whole(tmp_path, name):
    path = write(tmp_path / name, LINES)  # the .parquet is broken, and its reader will say so
    assert spans_of(path, 1) == [None]


# ---- which files ----------------------------------------------------------------------------------------------------


def names(root: Path, pattern: str, **options) -> list[str]:
    return [path.relative_to(root).as_posix() for path in list_files(str(root / pattern), **options)]


@pytest.fixture
def tree(tmp_path) -> Path:
    for name in ("a1/x.txt", "a1/sub/y.txt", "a1/sub/deep/z.md", "a2/x.txt", "b/x.txt", "top.txt", "a1/.git/h.txt"):
        write(tmp_path / name, b"x")
    zipped(tmp_path / "a1" / "sub" / "books.zip", MEMBERS)
    zipped(tmp_path / "more.zip", MEMBERS)
    write(tmp_path / "a2" / "none.zip", b"")
    return tmp_path


def test_folders_that_a_glob_names_stand_for_what_is_in_them(tree):
    inside = ["a1/sub/books.zip", "a1/sub/deep/z.md", "a1/sub/y.txt"]
    assert names(tree, "a*") == [*inside, "a1/x.txt", "a2/none.zip", "a2/x.txt"]
    assert names(tree, "a1/s*") == names(tree, "*/sub") == inside
    assert names(tree, "[ab]*/x.txt") == ["a1/x.txt", "a2/x.txt", "b/x.txt"]
    others = "a1/x.txt a2/none.zip a2/x.txt b/x.txt more.zip top.txt"
    assert names(tree, "*") == names(tree, "**") == [*inside, *others.split()]


def test_a_zip_is_listed_as_a_file(tree):
    assert names(tree, "more.zip") == ["more.zip"]
    assert names(tree, "**/*.zip") == ["a1/sub/books.zip", "a2/none.zip", "more.zip"]
    some = {"include": ["*.md"], "exclude": ["none.zip"]}  # a zip may hold some
    assert names(tree, "", **some) == ["a1/sub/books.zip", "a1/sub/deep/z.md", "more.zip"]
    some["exclude"] += ["a1/sub/*.zip"]
    assert names(tree, "", **some) == ["a1/sub/deep/z.md", "more.zip"]
    with pytest.raises(UserError, match="the file is empty"):
        list_files(str(tree / "a2" / "none.zip"))


def test_texts_of_zips_and_archives(tree):
    write(tree / "b" / "pages.warc.gz", gzip.compress(A + B))
    assert list(read_texts([str(tree / "b" / "*.gz")])) == ["<p>one", "<p>two"]
    assert sorted(read_texts([str(tree / "more.zip")])) == sorted(texts_in(tree / "more.zip"))
    assert len(texts_in(tree / "more.zip")) == 11


def test_a_json_line_of_records_in_a_zip_is_the_same_as_beside_it(tmp_path):
    lines = b"".join(json.dumps({"text": f"line {i}", "n": i}).encode() + b"\n" for i in range(500))
    path = zipped(tmp_path / "a.zip", {"a.jsonl": lines})
    beside = read(write(tmp_path / "a.jsonl", lines))[0]
    assert [(one.text, one.meta) for one in read(path)[0]] == [(one.text, one.meta) for one in beside]
