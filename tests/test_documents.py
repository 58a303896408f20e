"""Every format read back, and every class of bad input named with its place."""

import bz2
import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from llmkit.errors import DataError, UserError
from llmkit.readers import documents, records
from llmkit.readers.decode import decode
from llmkit.readers.documents import read_dataset, read_file, read_texts
from llmkit.readers.listing import list_files, root_of
from llmkit.readers.records import read_records
from llmkit.readers.tally import BadRecord
from llmkit.types import Document

LINES = b"".join(b'{"text": "line %d"}\n' % i for i in range(1, 2001))


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path: Path, **options) -> tuple[list[Document], list[BadRecord]]:
    found = list(read_file(path, source="s", root=path.parent, **options))
    good = [one for one in found if isinstance(one, Document)]
    return good, [one for one in found if isinstance(one, BadRecord)]


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    for name in ("a.txt", "b.MD", "sub/c.py", "sub/d.jsonl.gz", "sub/deep/e.py"):
        write(tmp_path / name, "x")
    for name in (".git/f.txt", ".hidden.txt", "__pycache__/g.py", "h.exe", "sub/none"):
        write(tmp_path / name, "x")
    write(tmp_path / "empty.txt", "")
    os.mkfifo(tmp_path / "fifo.txt")
    (tmp_path / ".dangling.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path)
    return tmp_path


def names(root: Path, pattern: str = "", **options) -> list[str]:
    return [path.relative_to(root).as_posix() for path in list_files(str(root / pattern), **options)]


def test_folders_and_globs(tree):
    everything = ["a.txt", "b.MD", "sub/c.py", "sub/d.jsonl.gz", "sub/deep/e.py"]
    assert names(tree) == names(tree, "**") == names(tree, "**/*") == everything
    assert names(tree, "**/*.py") == ["sub/c.py", "sub/deep/e.py"]
    assert names(tree, "sub/*.py") == ["sub/c.py"]
    assert names(tree, include=["*.py"]) == names(tree, include=["**/*.py"]) == ["sub/c.py", "sub/deep/e.py"]
    assert names(tree, exclude=["sub/deep/*", "*.MD"]) == ["a.txt", "sub/c.py", "sub/d.jsonl.gz"]
    assert names(tree, "a.txt") == ["a.txt"]
    assert names(tree, ".hidden.txt") == [".hidden.txt"]  # named by the user


def test_a_dangling_link_in_a_folder_is_an_error_unless_it_is_left_out(tree):
    (tree / "sub" / "gone.jsonl").symlink_to(tree / "nowhere")
    for path in ("", "**/*.jsonl", "sub"):
        with pytest.raises(UserError, match="the link points to a missing file") as error:
            list_files(str(tree / path))
        assert error.value.at == tree / "sub" / "gone.jsonl"
    assert names(tree, "sub", exclude=["gone*"]) == ["sub/c.py", "sub/d.jsonl.gz", "sub/deep/e.py"]


@pytest.mark.parametrize("follow_links", [False, True])
def test_a_link_to_itself_is_a_dangling_one(tmp_path, follow_links):
    write(tmp_path / "a.txt", "a text")
    (tmp_path / "loop").symlink_to("loop")  # a file of unknown type is skipped
    assert names(tmp_path, follow_links=follow_links) == ["a.txt"]
    (tmp_path / "b.jsonl").symlink_to("c.jsonl")
    (tmp_path / "c.jsonl").symlink_to("b.jsonl")
    for path in ("", "*.jsonl", "b.jsonl"):
        with pytest.raises(UserError, match="the link points to a missing file"):
            list_files(str(tmp_path / path), follow_links=follow_links)


def test_links_out_of_a_folder_are_followed_only_on_request(tmp_path):
    for name in ("out/blob", "out/more/b.txt", "out/more/c/d.txt", "in/a.txt"):
        write(tmp_path / name, name)
    (tmp_path / "in" / "file.txt").symlink_to(tmp_path / "out" / "blob")
    (tmp_path / "in" / "folder").symlink_to(tmp_path / "out" / "more")
    (tmp_path / "in" / "inner.txt").symlink_to("a.txt")
    (tmp_path / "out" / "more" / "back").symlink_to(tmp_path / "out")  # a cycle
    skipped = Counter()
    for pattern in ("", "**", "**/*.txt"):
        assert names(tmp_path / "in", pattern) == ["a.txt", "inner.txt"]
    list_files(str(tmp_path / "in"), skipped=skipped)
    assert skipped == {"linked from outside the folder": 2}
    followed = names(tmp_path / "in", follow_links=True)
    assert {"a.txt", "file.txt", "folder/b.txt", "folder/c/d.txt", "inner.txt"} <= set(followed) and len(followed) < 9
    assert names(tmp_path / "in", "folder/*.txt", follow_links=True) == ["folder/b.txt"]
    (tmp_path / "link").symlink_to(tmp_path / "in")  # named by the user
    assert names(tmp_path / "link") == ["a.txt", "inner.txt"] and names(tmp_path, "in/file.txt") == ["in/file.txt"]


def test_a_hub_cache_of_links_names_the_key(tmp_path):
    lines = write(tmp_path / "blobs" / "f00", '{"text": "one"}\n')
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "train.jsonl").symlink_to(lines)
    for pattern in ("snapshot", "snapshot/*.jsonl"):
        with pytest.raises(UserError, match="no file to read") as error:
            list_files(str(tmp_path / pattern), ["*.jsonl"])
        assert "follow_links: true" in error.value.fix and "1 linked from outside the folder" in error.value.got
    root, files = documents.dataset_files(str(tmp_path / "snapshot"), None, "train", follow_links=True)
    assert [one.text for one in read_file(files[0], source="s", root=root)] == ["one"]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.csv.zst", "a.warc", "a.zip", "a.txt.gz"])
def test_an_empty_file_of_a_format_with_a_header_is_a_damaged_one(tmp_path, name):
    write(tmp_path / "b.txt", "text")
    assert names(tmp_path) == ["b.txt"]
    write(tmp_path / "c.jsonl", "")
    write(tmp_path / name, "")
    skipped = Counter()
    assert [path.name for path in list_files(str(tmp_path), skipped=skipped)] == [name, "b.txt"]
    assert skipped == {"empty .jsonl": 1}
    good, (bad,) = read(tmp_path / name)
    assert (not good and "empty" in bad.reason) or "broken" in bad.reason


def test_root(tree):
    assert root_of(str(tree)) == root_of(str(tree / "*.txt")) == root_of(str(tree / "a.txt")) == tree
    assert root_of(str(tree / "sub" / "**" / "*.py")) == tree / "sub"


@pytest.mark.parametrize("path, what", [
    ("missing.txt", "no such file"), (".dangling.txt", "the link points to a missing file"),
    ("empty.txt", "the file is empty"), ("fifo.txt", "not a regular file"), ("h.exe", "no reader"),
    ("missing/*.txt", "no such file or folder"), ("*.rs", "no file to read"),
])  # fmt: skip
def test_bad_paths(tree, path, what):
    with pytest.raises(UserError, match=what) as error:
        list_files(str(tree / path))
    assert error.value.code == 3


def test_a_folder_without_anything_says_what_it_holds(tmp_path):
    write(tmp_path / "a.exe", "x")
    with pytest.raises(UserError) as error:
        list_files(str(tmp_path))
    assert error.value.got == "1 .exe"


# ---- formats --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, form", [
    ("a.txt", "text"), ("a.md", "text"), ("a.html", "html"), ("a.py", "code"), ("a.YAML", "code"), ("a.txt.gz", "text"),
    ("a.xhtml.zst", "html"),
])  # fmt: skip
def test_whole_files(tmp_path, name, form):
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    path = write(tmp_path / "in" / name, pack(b"  caf\xc3\xa9\r\n\r"))
    (one,) = read_file(path, source="s", root=tmp_path, text_key="body")  # text_key is for records
    assert (one.id, one.text, one.source) == (f"s/in/{name}", "  caf\u00e9\n\n", "s")
    assert one.meta == {"format": form, "encoding": "utf-8"}


@pytest.mark.parametrize("suffix", ".jsonl .jsonl.gz .jsonl.zst .json .json.gz .csv .tsv .parquet".split())
def test_record_formats_agree(tmp_path, suffix):
    records = [{"body": f'a, "b"\tc\n\u2028{i}', "url": f"u{i}", "n": i} for i in range(3)]
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif suffix in (".csv", ".tsv"):
        mark = "," if suffix == ".csv" else "\t"
        quoted = ['"' + record["body"].replace('"', '""') + '"' for record in records]
        rows = [("body", "url", "n")] + [(body, f"u{i}", str(i)) for i, body in enumerate(quoted)]
        write(path, "\r\n".join(mark.join(row) for row in rows))
    else:
        lines = json.dumps(records) if suffix == ".json" else "\n".join(map(json.dumps, records))
        write(path, {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)(lines.encode()))
    good, bad = read(path, text_key="body")
    assert not bad and [one.text for one in good] == [record["body"] for record in records]
    assert len({one.id for one in good}) == 3 and good[0].id.startswith(f"s/a{suffix}:")


def test_a_record_can_not_speak_for_our_readers(tmp_path):
    record = {"text": "<html>x", "title": "t", "format": "code", "encoding": "cp1252"}
    (one,), _ = read(write(tmp_path / "a.jsonl", json.dumps(record)))
    assert one.meta == {} and one.text == "<html>x"


def test_dates_that_python_can_not_hold_cost_their_row_alone(tmp_path):
    days = pa.array([0, 10**8, 1], pa.int32()).cast(pa.date32())
    pq.write_table(pa.table({"text": ["a", "b", "c"], "when": days}), tmp_path / "a.parquet")
    good, (bad,) = read(tmp_path / "a.parquet")
    assert [one.text for one in good] == ["a", "c"] and bad.line == 2 and "can't hold" in bad.reason


def test_a_line_too_long_costs_itself_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("llmkit.readers.packed.MAX_DOCUMENT_BYTES", 100)
    good, (bad,) = read(write(tmp_path / "a.csv", "text\none\n" + "x" * 200 + "\ntwo\n"))
    assert [one.text for one in good] == ["one", "two"] and bad.line == 3


def test_names_that_are_no_utf8_give_ids_that_are(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("x")
    (one,), _ = read(next(tmp_path.iterdir()))
    assert one.id.encode() == "s/caf\ufffd.txt".encode()


def test_json_that_is_one_record_or_lines(tmp_path):
    one = read(write(tmp_path / "a.json", json.dumps({"text": "x"}, indent=2)))[0]
    assert [(doc.text, doc.id) for doc in one] == [("x", "s/a.json:1")]
    assert [doc.text for doc in read(write(tmp_path / "b.json", LINES))[0]][:2] == ["line 1", "line 2"]
    marked = b"\xef\xbb\xbf" + (LINES if isinstance(LINES, bytes) else LINES.encode())
    assert [doc.text for doc in read(write(tmp_path / "c.json", marked))[0]][:2] == ["line 1", "line 2"]


def test_all_texts_of_files_folders_and_globs(tmp_path):
    write(tmp_path / "a" / "x.jsonl", '{"text": "one"}\nbad\n')
    write(tmp_path / "b.txt", "two")
    assert list(read_texts([str(tmp_path / "a"), str(tmp_path / "*.txt")])) == ["one", "two"]


def test_a_file_of_unknown_kind_read_by_name_is_text(tmp_path):
    assert read(write(tmp_path / "LICENSE", "x"), text_key="body")[0][0].meta["format"] == "text"


# ---- encodings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data, text, encoding", [
    (b"caf\xc3\xa9", "caf\u00e9", "utf-8"),
    (b"\xef\xbb\xbfa", "a", "utf-8"),
    ("a\u00e9".encode("utf-16"), "a\u00e9", "utf-16"),
    (b"\xfe\xff\x00a", "a", "utf-16"),
    ("a".encode("utf-32"), "a", "utf-32"),
    (b"caf\xe9 \x93x\x94", "caf\u00e9 \u201cx\u201d", "cp1252"),
    (b"<meta charset=windows-1251>\xcf", "<meta charset=windows-1251>\u041f", "windows-1251"),
    (b"<meta charset=utf-16>ab", "<meta charset=utf-16>ab", "utf-8"),  # bytes that can be read prove it wrong
    (b"<meta charset=utf-16>\xe9", "<meta charset=utf-16>\u00e9", "cp1252"),
    (b"<meta charset=rot13>\xe9", "<meta charset=rot13>\u00e9", "cp1252"),
    ("\u201cd\u00e9j\u00e0\u201d".encode() + b"\xff", "\u201cd\u00e9j\u00e0\u201d\ufffd", "utf-8 (damaged)"),
    (b"", "", "utf-8"),
    (b"a" * 200 + b"\0", "a" * 200 + "\0", "utf-8"),  # one stray NUL: for `clean` to remove
])  # fmt: skip
def test_decode(data, text, encoding):
    assert decode(data, html=True) == (text, encoding)


@pytest.mark.parametrize("data", [b"\0" * 100, b"a\0b\0c\0", b"\xff\xd8\xff\xe0\0\x10JFIF", bz2.compress(b"x" * 999),
                                  "\u732b\u3067\u3059\u3002".encode("shift-jis"), b"\xff\xfea"])  # fmt: skip
def test_binary_and_unknown_encodings_are_bad(tmp_path, data):
    good, (bad,) = read(write(tmp_path / "a.txt", data))
    assert not good and bad.line == 1 and bad.reason


# ---- bad records ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line, reason", [
    (b'{"text": ', "bad JSON"), (b'["text"]', "an array, not an object"), (b"7", "a number, not an object"),
    (b"null", "null, not an object"), (b'{"test": "x"}', "text is missing"), (b'{"text": null}', "text is null"),
    (b'{"text": 5}', "text is int, not text"), (b'{"text": ["x"]}', "text is list, not text"),
    (b'{"text": "\xff"}', "invalid UTF-8"), (b"[" * 100_000, "nested too deep"), (b"\0" * 50, "bad JSON"),
])  # fmt: skip
def test_bad_lines_have_a_place_and_a_reason_and_cost_no_other(tmp_path, line, reason):
    good, (bad,) = read(write(tmp_path / "a.jsonl", b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}'))
    assert [one.text for one in good] == ["a", "b"] and good[1].id == "s/a.jsonl:4"
    assert bad.path.endswith("a.jsonl") and bad.line == 3 and bad.offset in (15, None) and reason in bad.reason


def test_a_line_of_json_that_ends_too_early_says_where_and_how(tmp_path):
    _, (bad,) = read(write(tmp_path / "a.jsonl", b'{"text": "a model\n'))
    assert bad.reason == "bad JSON: Unterminated string starting at column 10"


def test_json_oddities_that_are_fine(tmp_path):
    lines = [rb'{"text": "a\ud800b"}', rb'{"text": "\ud83d\ude00"}', b'{"text": "d"}\r']
    good, bad = read(write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + b"\n".join(lines)))
    assert not bad and [one.text for one in good] == ["a\ufffdb", "\U0001f600", "d"]


def test_utf16_lines_say_so(tmp_path):
    good, (bad,) = read(write(tmp_path / "a.jsonl", '{"text": "a"}\n'.encode("utf-16")))
    assert not good and "UTF-16" in bad.reason


@pytest.mark.parametrize("name, pack", [("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstandard.compress)])
def test_torn_and_wrong_archives(tmp_path, name, pack):
    whole = pack(os.urandom(100_000).hex().encode() + b"\n" + LINES)  # over one block, so that half of it can be read
    good, bad = read(write(tmp_path / name, pack(LINES) * 2))  # joined archives are one
    assert len(good) == 4000 and not bad
    _, bad = read(write(tmp_path / name, whole[:-2000]))
    assert "broken" in bad[-1].reason
    good, (bad,) = read(write(tmp_path / name, b"no archive\n" * 10))
    assert not good and "broken" in bad.reason


def test_what_came_before_the_break_is_kept(tmp_path):
    lines = b"".join(b'{"text": "%s"}\n' % os.urandom(50).hex().encode() for _ in range(5000))
    for name, packed in (("a.jsonl.gz", gzip.compress(lines)), ("a.jsonl.zst", zstandard.compress(lines))):
        good, bad = read(write(tmp_path / name, packed[: len(packed) * 3 // 4]))
        assert 2000 < len(good) < 4000 and len(bad) == 1 and bad[0].line == len(good) + 1, name


def test_parquet_that_is_torn_or_wrong(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [os.urandom(20).hex() for _ in range(3000)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=1000, use_dictionary=False)
    raw = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    raw[start : start + 3000] = b"\xff" * 3000
    good, (bad,) = read(write(path, bytes(raw)))
    assert [one.text for one in good] == texts[: len(good)] and 1500 < len(good) <= 2000
    assert bad.line == len(good) + 1
    for data in (raw[:1000], b"no parquet"):
        good, (bad,) = read(write(path, bytes(data)))
        assert not good and "broken" in bad.reason


def test_invalid_utf8_in_parquet_costs_one_row(tmp_path):
    offsets, letters = pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb")
    pq.write_table(pa.table({"text": pa.StringArray.from_buffers(3, offsets, letters)}), tmp_path / "a.parquet")
    good, (bad,) = read(tmp_path / "a.parquet")
    assert [one.text for one in good] == ["a", "b"] and (bad.line, bad.reason) == (2, "invalid UTF-8")


def test_bad_csv_rows(tmp_path):
    good, bad = read(write(tmp_path / "a.csv", b'text,n\na,1\nb\n"c\nc",3\ncaf\xe9,4\nd,5,6\n"e"e,7\nf,8\n"open,9'))
    assert [one.text for one in good] == ["a", "c\nc", "caf\u00e9", "f"]
    assert [one.line for one in bad] == [3, 7, 8, 10] and "1 fields, but the header has 2" in bad[0].reason


def test_csv_lines_in_no_known_encoding_are_bad(tmp_path):
    good, (bad,) = read(write(tmp_path / "a.csv", b"text,n\na,1\n" + "\u30ab\u30fc,2\n".encode("shift-jis")))
    assert [one.text for one in good] == ["a"] and bad.line == 3 and bad.reason == "bad CSV: neither UTF-8 nor cp1252"
    good, (bad,) = read(write(tmp_path / "b.csv", b'text,n\na,1\n"b\n\x81",2\nc,3\n'))  # in a quoted field
    assert [one.text for one in good] == ["a", "c"] and bad.line == 3
    good, (bad,) = read(write(tmp_path / "c.csv", b"te\x81xt,text\na,1\nb,2\n"))  # no row becomes the header
    assert not good and "bad CSV header: neither UTF-8" in bad.reason


@pytest.mark.parametrize("glob", ["**x", "a/***", "**.txt/b"])
def test_a_glob_that_can_not_be_read(tmp_path, glob):
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match="the glob can't be read") as error:
        list_files(f"{tmp_path}/{glob}")
    assert "docs/**/*.txt" in error.value.fix


def test_sizes_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("llmkit.readers.packed.MAX_DOCUMENT_BYTES", 100)
    good, (bad,) = read(write(tmp_path / "a.jsonl", '{"text": "%s"}\n{"text": "b"}\n' % ("a" * 500)))
    assert [one.text for one in good] == ["b"] and bad.line == 1 and "100 bytes" in bad.reason
    assert not read(write(tmp_path / "a.txt", "a" * 100))[1]
    assert "100 bytes" in read(write(tmp_path / "a.txt", "a" * 101))[1][0].reason
    assert "100 bytes" in read(write(tmp_path / "a.txt.gz", gzip.compress(b"a" * 10_000_000)))[1][0].reason
    monkeypatch.setattr(records, "MAX_JSON_BYTES", 100)
    with pytest.raises(UserError, match="too large"):
        read(write(tmp_path / "a.json", json.dumps([{"text": "a" * 100}])))


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(b"a" * 300_000_000, 1))  # a bomb: one line of 300 MB
    code = (
        "import resource, sys; from pathlib import Path; from llmkit.readers.documents import read_records;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "print(*(r.reason for _, r, _ in read_records(Path(sys.argv[1]))));"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    reason, grown = done.stdout.splitlines()
    assert reason == "a line over 50,000,000 bytes" and int(grown) < 200_000  # KB


@pytest.mark.parametrize("name, data", [
    ("a.jsonl", '{"txt": "x", "url": "u"}'), ("a.json", '[{"txt": "x", "url": "u"}]'), ("a.csv", "txt,url\nx,u"),
])  # fmt: skip
def test_a_misspelt_column_stops_and_lists_those_that_exist(tmp_path, name, data):
    with pytest.raises(UserError, match="no field text") as error:
        read(write(tmp_path / name, data))
    assert (error.value.got, error.value.fix, error.value.code) == ("txt, url", "did you mean txt?", 3)


def test_a_file_that_is_gone_is_an_error_of_the_environment(tmp_path):
    with pytest.raises(UserError, match="can't read the file") as error:
        list(read_records(tmp_path / "gone.txt"))
    assert error.value.code == 5


# ---- datasets -------------------------------------------------------------------------------------------------------


def test_saved_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_dict({"text": ["a", None, "c"], "n": [1, 2, 3], "vector": [[0.0]] * 3})
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([2])}).save_to_disk(tmp_path / "two")
    good, (bad,) = partition(read_dataset(str(tmp_path / "one"), source="s"))
    assert [(one.id, one.text) for one in good] == [("s/train:1", "a"), ("s/train:3", "c")]
    assert good[0].meta == {}
    assert (bad.line, bad.reason) == (2, "text is null")
    assert [one.text for one in read_dataset(str(tmp_path / "two"), source="s", split="test")] == ["c"]
    with pytest.raises(UserError, match="can't be read") as error:
        list(read_dataset(str(tmp_path / "two"), source="s", split="val"))
    assert "train, test" in error.value.got
    with pytest.raises(UserError, match="no field body"):
        list(read_dataset(str(tmp_path / "one"), source="s", text_key="body"))


def partition(found) -> tuple[list, list]:
    found = list(found)
    return [x for x in found if isinstance(x, Document)], [x for x in found if isinstance(x, BadRecord)]


def test_folders_of_data_files_and_their_splits(tmp_path):
    write(tmp_path / "README.md", "# card")
    write(tmp_path / "evil.py", "raise SystemExit")
    write(tmp_path / "data" / "train-00000.jsonl", '{"text": "a"}')
    write(tmp_path / "data" / "test-00000.jsonl", '{"text": "b"}')
    for split, text in (("train", "a"), ("test", "b")):
        assert [d.text for d in read_dataset(str(tmp_path), source="s", split=split)] == [text]
    assert [d.text for d in read_dataset(str(tmp_path), source="s", config="data")] == ["a"]
    with pytest.raises(UserError, match="no data file for the split dev"):
        list(read_dataset(str(tmp_path), source="s", split="dev"))
    write(tmp_path / "plain" / "x.csv", "text\na")
    assert [d.text for d in read_dataset(str(tmp_path / "plain"), source="s")] == ["a"]


@pytest.mark.parametrize("name", ["./missing", "/no/such/folder"])
def test_missing_local_datasets_never_touch_the_network(name):
    with pytest.raises(UserError, match="a local dataset must be a folder"):
        list(read_dataset(name, source="s"))


def test_the_hub_offline_is_one_clear_error():
    code = "from llmkit.readers.documents import read_dataset as r; list(r('no/where', source='s', streaming=True))"
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "llmkit.errors.DataError: error: the dataset can't be read" in done.stderr


def test_the_charset_of_a_script_is_not_that_of_the_page():
    page = '<head><script src="a.js" charset="utf-8"></script><meta charset="gb2312"></head>\u65b0\u534e'
    assert decode(page.encode("gb2312"), html=True) == (page, "gb2312")
