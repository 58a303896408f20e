"""Test what is lost of damaged files: counted in records and bytes, said, and bounded in every command."""

import gzip
import json
import random
import zipfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from conftest import llmkit, sentences, tiny_config

from llmkit.config.data import CorpusData, OnError
from llmkit.config.records import SftData
from llmkit.corpus.build import build_corpus
from llmkit.corpus.units import make_units
from llmkit.data.inspect import measure_compression
from llmkit.data.splits import open_records
from llmkit.errors import DATA, UserError
from llmkit.readers.decode import parse_json
from llmkit.readers.documents import read_texts
from llmkit.readers.ngrams import read_evaluation_ngrams
from llmkit.readers.records import read_records
from llmkit.readers.tally import BadRecord, Tally
from llmkit.records import encode
from llmkit.records.build import encode_turns
from llmkit.records.encode import Found, encode_records
from llmkit.records.layouts import read_examples
from llmkit.tokenizer.tokenizer import Tokenizer
from llmkit.tokenizer.train import train_tokenizer

PACKERS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([sentences(i, 50) for i in range(5)], vocab_size=320)


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(number: int, bad: dict[int, str] | None = None, **fields: str) -> str:
    """Return lines of records {text}, some of them replaced by bad ones."""
    lines = [(bad or {}).get(i) or json.dumps({"text": sentences(i, 2)} | fields) for i in range(number)]
    return "\n".join(lines) + "\n"


def tally_of(path: Path) -> Tally:
    tally = Tally()
    list(read_texts([str(path)], tally=tally))
    return tally


# ---- what is lost with a bad record ---------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", PACKERS)
def test_good_and_bad_lines_add_up_to_the_bytes_of_the_unpacked_file(tmp_path, packed):
    content = jsonl(300, {7: "{bad json", 100: '{"text": null}', 200: "[1, 2]", 299: '{"text": NaN}'}).encode()
    tally = tally_of(write(tmp_path / f"a.jsonl{packed}", PACKERS[packed](content)))
    assert (tally.rows, tally.bad, tally.bytes) == (300, 4, len(content))
    assert tally.lost == sum(len(line) + 1 for line in (b"{bad json", b'{"text": null}', b"[1, 2]", b'{"text": NaN}'))
    assert tally.reasons == {"bad JSON": 2, "text is null": 1, "an array, not an object": 1}
    assert tally.first.startswith(f"{tmp_path}/a.jsonl{packed}:8 (bad JSON")
    tally.check(0.02, fix="")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".csv.gz"])
def test_a_quote_that_is_never_closed_costs_the_bytes_that_it_swallows(tmp_path, suffix):
    rows = [f"{i},some words" if suffix != ".tsv" else f"{i}\tsome words" for i in range(1000)]
    rows[100] = rows[100].replace("some", '"some')
    content = "\n".join(["n,text" if suffix != ".tsv" else "n\ttext", *rows]).encode()
    tally = tally_of(write(tmp_path / f"a{suffix}", PACKERS[".gz" if suffix.endswith(".gz") else ""](content)))
    assert tally.bad == 1 and tally.rows == 101 and 0.89 < tally.fractions()[1] < 0.91
    with pytest.raises(UserError, match="too many records can't be used") as error:
        tally.check(0.01, fix="")
    assert error.value.code == DATA and "1 of 101 records and 90" in error.value.got


def test_semicolons_separate_columns_where_excel_writes_them(tmp_path):
    rows = 'Frage;Antwort\r\n"Wie viel; genau?";1,5\r\n'
    ((_, record, _),) = read_records(write(tmp_path / "a.csv", rows))
    assert record == {"Frage": "Wie viel; genau?", "Antwort": "1,5"}
    ((_, record, _),) = read_records(write(tmp_path / "b.csv", "text,n;m\na;b,1\n"))
    assert record == {"text": "a;b", "n;m": "1"}


def test_a_torn_csv_header_loses_the_file(tmp_path):
    path = write(tmp_path / "a.csv", '"n"x,"text"\n' + "1,one\n" * 100)
    ((_, bad, _),) = read_records(path)
    assert isinstance(bad, BadRecord) and bad.size == path.stat().st_size and "header" in bad.reason


def noise(number: int, size: int) -> list[dict[str, str]]:
    """Return records that hardly compress."""
    draw = random.Random(0)
    return [{"text": draw.randbytes(size).hex()} for _ in range(number)]


@pytest.mark.parametrize("size", [10, 300])
@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_damage_in_a_packed_file_costs_what_follows(tmp_path, packed, size):
    lines = [json.dumps(record).encode() + b"\n" for record in noise(3000, size)]
    parts = [PACKERS[packed](b"".join(lines[i : i + 100])) for i in range(0, 3000, 100)]
    parts[20] = bytes(9) + parts[20][9:]
    tally = tally_of(write(tmp_path / f"a.jsonl{packed}", b"".join(parts)))
    assert tally.bad == 1 and 1800 < tally.rows <= 2001
    assert tally.fractions()[1] == pytest.approx(1 / 3, abs=0.1)


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_a_cut_packed_file_is_one_bad_record_and_keeps_the_rest(tmp_path, packed):
    data = PACKERS[packed]("".join(json.dumps(record) + "\n" for record in noise(5000, 99)).encode())
    tally = tally_of(write(tmp_path / f"a.jsonl{packed}", data[: len(data) // 2]))
    assert tally.bad == 1 and tally.rows > 1000 and "broken from here on" in tally.first


def test_a_damaged_member_of_a_zip_is_one_bad_record_and_costs_no_other(tmp_path):
    draw = random.Random(0)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a.txt", "b.txt", "c.jsonl"):
            archive.writestr(name, json.dumps({"text": draw.randbytes(1000).hex()}) + "\n")
        middle = archive.getinfo("b.txt").header_offset + 300
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[middle : middle + 100] = bytes(100)
    tally = tally_of(write(tmp_path / "a.zip", bytes(data)))
    assert (tally.rows, tally.bad) == (3, 1) and f"{tmp_path}/a.zip/b.txt:1 (" in tally.first
    assert tally.fractions()[1] == pytest.approx(1 / 3, abs=0.05)


def test_a_damaged_parquet_file_loses_the_rows_of_the_damaged_group(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(noise(1000, 50)), path, row_group_size=100)
    data = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(5).column(0)
    data[column.dictionary_page_offset : column.dictionary_page_offset + 200] = bytes(200)
    tally = tally_of(write(path, bytes(data)))
    assert (tally.rows, tally.bad) == (1000, 100) and tally.fractions() == (0.1, pytest.approx(0.1))
    assert f"{path}:501 (the rest of row group 5 is damaged" in tally.first
    assert tally_of(write(path, bytes(data[:-100]))).fractions() == (1.0, 1.0)


@pytest.mark.parametrize("name, content, problem", [
    ("a.csv", "text,n,text\none,1,two\n", "two columns are named 'text'"),
    ("a.tsv", "text\ttext\none\ttwo\n", "two columns are named 'text'"),
    ("a.csv", ",text,\n1,one,2\n", "two columns are named ''"), ("a.csv", " \none\n", "the columns have no names"),
])  # fmt: skip
def test_columns_that_hide_each_other_are_an_error(tmp_path, name, content, problem):
    with pytest.raises(UserError, match=problem) as error:
        list(read_records(write(tmp_path / name, content)))
    assert error.value.code == DATA and error.value.at == f"{tmp_path / name}:1"


def test_parquet_columns_of_one_name_are_an_error_and_an_index_column_is_none(tmp_path):
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="two columns are named 'text'"):
        list(read_records(tmp_path / "a.parquet"))
    ((_, record, _),) = read_records(write(tmp_path / "pandas.csv", "\n,text\n0,one\n"))
    assert record == {"": "0", "text": "one"}


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_lacks_are_named(number):
    with pytest.raises(ValueError, match=f"{number} is not JSON"):
        parse_json(f'{{"text": "one", "n": [{number}]}}'.encode())


# ---- the bound, in every command ------------------------------------------------------------------------------------


def damaged(folder: Path, bad_lines: int) -> str:
    """Write a.jsonl with 300 records, some of them bad, and return its path."""
    return str(write(folder / "a.jsonl", jsonl(300, dict.fromkeys(range(50, 50 + bad_lines), "{bad"))))


def build(path: str, folder: Path, say=print) -> None:
    config = tiny_config(folder, data={"sources": [{"name": "s", "path": path}]})
    build_corpus(CorpusData(**config["data"]), say=say)


def test_a_build_stops_over_the_bound_and_says_what_it_left_out_below_it(tmp_path):
    said = []
    build(damaged(tmp_path, 2), tmp_path, said.append)
    assert any("left out 2 of 300 records" in line and "a.jsonl:51" in line for line in said)
    assert "quarantined: 2 of 300 records" in (tmp_path / "data" / "report.md").read_text()
    with pytest.raises(UserError, match="too many records can't be used") as error:
        build(damaged(tmp_path, 9), tmp_path)
    assert "a.jsonl:51" in error.value.at and "quarantine.jsonl" in error.value.at


def test_a_build_counts_the_bytes_that_one_row_swallows(tmp_path):
    rows = [f"{i},{sentences(i, 1).strip()}" for i in range(400)]
    rows[200] = '200,"a quote'
    path = write(tmp_path / "a.csv", "\n".join(["n,text", *rows]))
    with pytest.raises(UserError, match="too many records can't be used"):
        build(str(path), tmp_path)


def test_skipped_files_are_in_the_report(tmp_path):
    write(tmp_path / "in" / "a.jsonl", jsonl(50))
    write(tmp_path / "in" / "b.jsonl", "")
    write(tmp_path / "in" / "c.exe", "x")
    (tmp_path / "in" / "d.jsonl").symlink_to(write(tmp_path / "out.jsonl", jsonl(5)))
    build(str(tmp_path / "in"), tmp_path)
    report = (tmp_path / "data" / "report.md").read_text()
    for words in ("1 empty .jsonl", "1 .exe (unknown type)", "1 linked from outside the folder"):
        assert words in report
    source = {"name": "s", "path": str(tmp_path / "in"), "follow_links": True}
    config = tiny_config(tmp_path, data={"sources": [source]})
    assert build_corpus(CorpusData(**config["data"]), say=print)["counts"]["read"] == 55


@pytest.mark.parametrize("on_error", [{}, {"mode": "fail"}, {"max_bad_fraction": 0.1}])
def test_fine_tuning_has_the_bound_of_a_build(tokenizer, tmp_path, on_error):
    record = json.dumps({"prompt": "the ", "completion": "river"})
    lines = [record] * 40 + ["{bad", json.dumps({"prompt": 3, "completion": "x"})] + [record] * 30
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    data = SftData(kind="sft", path=str(path), seq_len=16, on_error=OnError(**on_error))
    if on_error.get("max_bad_fraction"):
        report = encode_turns(data, tokenizer, tmp_path / "out", seed=0)
        folder, first = Path(report["folder"]), report["records"]["first"]
        with pytest.raises(UserError, match="too many"):  # the bound holds for data that is encoded already
            encode_turns(data.model_copy(update={"on_error": OnError()}), tokenizer, tmp_path / "out", seed=0)
    else:
        with pytest.raises(UserError, match="records can't be used") as error:
            encode_turns(data, tokenizer, tmp_path / "out", seed=0)
        assert ("mode: quarantine" if on_error else "max_bad_fraction") in error.value.fix
        (folder,), first = (tmp_path / "out").iterdir(), str(error.value.at)
        assert {file.name for file in folder.iterdir()} == {"quarantine.jsonl", "parts"} and str(folder) in first
    assert f"{path}:41 (bad JSON" in first
    bad = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert [(one["path"], one["line"], one["reason"][:8]) for one in bad] == [
        (str(path), 41, "bad JSON"), (str(path), 42, "prompt i")
    ]  # fmt: skip


@pytest.mark.parametrize("content, got", [
    ("[]", "no record at all"),
    ('[{"prompt": "the ", "completion": null}]', "no usable record; left out 1 of 1 records"),
    (json.dumps([{"prompt": "river " * 50, "completion": "is"}] * 2), "2 examples left out, longer than 16 tokens"),
])  # fmt: skip
@pytest.mark.parametrize("pairs", [False, True])
def test_data_without_an_example_is_an_error_with_the_counts(tokenizer, tmp_path, content, got, pairs):
    path = write(tmp_path / "a.json", content)
    data = SftData(kind="sft", path=str(path), seq_len=16, on_error=OnError(max_bad_fraction=1.0), too_long="drop")
    with pytest.raises(UserError, match="no example is left to train on") as error:
        encode_turns(data, tokenizer, tmp_path / "out", seed=0, form="pairs" if pairs else "rows")
    assert error.value.got.startswith(got) and error.value.code == DATA


@pytest.mark.parametrize("too_long, cut", [("truncate_prompt", "left out"), ("drop", "left out"), ("split", "split")])
def test_the_header_says_what_became_of_long_and_of_bad_records(tokenizer, tmp_path, too_long, cut):
    texts = ["river " * 50, "river", "model", "code"]
    lines = [json.dumps({"prompt": f"the {text[:5]} ", "completion": text}) for text in texts] + ["{bad"]
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    val = write(tmp_path / "val.jsonl", lines[1])
    on_error = OnError(max_bad_fraction=0.5)
    data = SftData(kind="sft", path=str(path), val_path=str(val), seq_len=16, too_long=too_long, on_error=on_error)
    report = encode_turns(data, tokenizer, tmp_path / "out", seed=0)
    losses = open_records(report, data.path, tokenizer).losses
    assert f"1 examples longer than 16 tokens: {cut}" in losses and "left out 1 of 6 records" in losses
    assert f"the first is {path}:5 (bad JSON" in losses and losses.endswith("quarantine.jsonl")
    assert "val has prompts that train has too" in losses


@pytest.mark.parametrize("turn", [
    {"role": ["user"], "content": "x"}, {"role": {}, "content": "x"}, {"role": None, "content": "x"},
    {"from": 3, "value": "x"},
])  # fmt: skip
def test_a_role_of_another_type_is_a_bad_record(turn):
    with pytest.raises(ValueError, match="a turn's role is not a string"):
        list(read_examples({"messages": [turn]}, {}, Counter()))
    with pytest.raises(ValueError, match="input is dict, not text"):
        list(read_examples({"instruction": "x", "input": {"a": 1}, "output": "y"}, {}, Counter()))


LOOP = "{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}"


def test_a_record_that_exceeds_a_limit_of_the_template_is_a_bad_one(tokenizer, tmp_path, monkeypatch):
    chat = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "river"}]
    lines = [json.dumps({"messages": chat * number}) for number in (1, 5, 1)]
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    slow = "{% if messages | length > 2 %}" + LOOP + "{% endif %}{% for one in messages %}{{ one.content }}{% endfor %}"
    tally, bad = Tally(), []
    found = list(encode_records(read_records(path), str(path), tokenizer, slow, tally, Found(), bad.append))
    assert len(found) == 2 and (tally.rows, tally.bad) == (3, 1)
    assert bad[0].line == 2 and "computing time" in bad[0].reason
    for template, what in ((LOOP, "computing time"), ("{% if %}", "can't be parsed")):
        monkeypatch.setattr(encode, "MAX_LIMITS", 1)
        with pytest.raises(UserError, match=what) as error:
            list(encode_records(read_records(path), str(path), tokenizer, template, Tally(), Found()))
        assert error.value.at == f"{path}:1"


@pytest.mark.parametrize("key", ["path", "val_path"])
def test_fine_tuning_records_in_a_zip_are_refused_by_name(tokenizer, tmp_path, key):
    record = json.dumps({"prompt": "the ", "completion": "river"})
    paths = {"path": str(write(tmp_path / "a.jsonl", record)), key: str(tmp_path / "b.zip")}
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("a.jsonl", record)
    with pytest.raises(UserError, match="fine-tuning records in a zip are not supported") as error:
        encode_turns(SftData(kind="sft", seq_len=16, **paths), tokenizer, tmp_path / "out", seed=0)
    assert error.value.at == tmp_path / "b.zip" and not (tmp_path / "out").exists()


def test_lone_surrogates_of_fine_tuning_records_become_replacement_characters(tokenizer, tmp_path):
    lines = r'{"prompt": "the \ud800 ", "completion": "river \udfff"}' + "\n"
    data = SftData(kind="sft", path=str(write(tmp_path / "a.jsonl", lines * 2)), seq_len=64)
    report = encode_turns(data, tokenizer, tmp_path / "out", seed=0)
    assert report["records"]["bad"] == 0 and report["splits"]["train"]["examples"] == 1


def test_evaluation_files_and_compared_texts_are_counted_too(tokenizer, tmp_path):
    path = damaged(tmp_path, 2)
    with pytest.raises(UserError, match="some records can't be used") as error:
        read_evaluation_ngrams((path,), 5)
    assert "a.jsonl:51" in error.value.at
    (row,) = measure_compression(tokenizer, None, [path], "text")
    assert "left out 2 of 300 records" in row["bad records"] and "a.jsonl:51" in row["bad records"]
    with pytest.raises(UserError, match="too many"):
        measure_compression(tokenizer, None, [damaged(tmp_path, 9)], "text")


def test_linked_evaluation_files_are_read_and_linked_texts_are_said(tokenizer, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").symlink_to(write(tmp_path / "out" / "f00", jsonl(20)))
    assert read_evaluation_ngrams((str(tmp_path / "in"),), 5)[1] == 20
    write(tmp_path / "in" / "b.jsonl", jsonl(5))
    (row,) = measure_compression(tokenizer, None, [str(tmp_path / "in")], "text")
    assert row["skipped files"] == "1 linked from outside the folder" and "bad records" not in row


def test_the_units_of_a_build_come_with_the_files_that_were_skipped_for_them(tmp_path):
    write(tmp_path / "in" / "a.jsonl", jsonl(5))
    write(tmp_path / "in" / "b.csv", "")
    config = tiny_config(tmp_path, data={"sources": [{"name": "s", "path": str(tmp_path / "in")}]})
    units, skipped = make_units(CorpusData(**config["data"]))
    assert len(units) == 1 and skipped == {"s": {"empty .csv": 1}}


def units_of(path: str, built: str) -> list[str]:
    config = tiny_config(Path(), data={"dir": built, "sources": [{"name": "s", "path": path}]})
    return [name for unit in make_units(CorpusData(**config["data"]))[0] for name, _ in unit.pieces]


def test_a_build_is_no_source_of_itself_however_paths_are_written(tmp_path, monkeypatch):
    for name in ("in/a.txt", "in/out/b.txt", "in/outer/c.txt"):
        write(tmp_path / name, "text")
    monkeypatch.chdir(tmp_path)
    for path in ("in", str(tmp_path / "in"), "in/**/*.txt"):
        for built in ("in/out", str(tmp_path / "in/out")):
            assert [Path(name).name for name in units_of(path, built)] == ["a.txt", "c.txt"]
    monkeypatch.chdir(tmp_path / "in")
    assert units_of(".", "out") == ["a.txt", "outer/c.txt"] and units_of("outer", "out") == ["outer/c.txt"]
    for path, built in ((".", "."), ("out", "out"), ("out", "."), (str(tmp_path / "in"), str(tmp_path))):
        with pytest.raises(UserError, match=r"in data\.dir itself"):
            units_of(path, built)


def test_unchanged_files_are_looked_up_once(tmp_path, monkeypatch):
    for i in range(300):
        write(tmp_path / "in" / f"{i % 7}" / f"{i}.txt", "text")
    looked, stat = [], Path.stat
    monkeypatch.setattr(Path, "stat", lambda path, **options: looked.append(path) or stat(path, **options))
    assert len(units_of(str(tmp_path / "in"), str(tmp_path / "data"))) == 300
    assert len(looked) < 100  # the files of a folder are looked up as it is listed


def test_tokenizer_train_stops_over_the_bound_and_writes_nothing(tmp_path):
    damaged(tmp_path, 9)
    train = ("tokenizer", "train", "a.jsonl", "--vocab-size", 300)
    done = llmkit(*train, cwd=tmp_path, code=DATA)
    assert all(words in done.stderr for words in ("too many records", "--max-bad-fraction", "a.jsonl:51"))
    assert not (tmp_path / "tokenizer").exists()
    done = llmkit(*train, "--max-bad-fraction", 0.1, cwd=tmp_path)
    assert "left out 9 of 300 records" in done.stdout and (tmp_path / "tokenizer").exists()
