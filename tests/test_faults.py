"""Test faults around a data build: kills, full disks, bad sources, damaged outputs, workers that die."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import llmkit, sentences, tiny_config

from llmkit.commands.app import main
from llmkit.config.data import CorpusData
from llmkit.config.load import load_config
from llmkit.corpus.build import build_corpus, read_manifest
from llmkit.data.tokens import open_split
from llmkit.errors import DATA, ENVIRONMENT, MODEL, UserError
from llmkit.tokenizer.load import load_tokenizer
from llmkit.tokenizer.train import train_tokenizer
from llmkit.training.loop import train

quiet = {"say": lambda line: None}
SMALL = 8000  # bytes of a work unit, so that little text makes many

# The real command line, but for the size of units and, if asked, the look at the free space.
WRAPPER = """
import sys
import llmkit.corpus.build, llmkit.corpus.units
from llmkit.commands.app import main
llmkit.corpus.units.UNIT_BYTES = int(sys.argv[1])
if sys.argv[2] == "any space":
    llmkit.corpus.build.check_space = lambda *_: None
if __name__ == "__main__":
    main(sys.argv[3:])
"""


def place(folder: Path, files: int = 24, **changes) -> Path:
    """Return the config file of a folder of texts."""
    (folder / "text").mkdir(parents=True)
    for i in range(files):
        (folder / "text" / f"{i:02d}.txt").write_text(sentences(i, 120))
    values = tiny_config(folder, run_dir=str(folder / "run"))
    values["data"] |= {"dedup": {"near": {}}, **changes}
    (folder / "c.yaml").write_text(yaml.safe_dump(values))
    return folder / "c.yaml"


def section(config: Path, **changes) -> CorpusData:
    return CorpusData(**yaml.safe_load(config.read_text())["data"] | changes)


def tokens_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in (folder / "tokens").rglob("*") if p.is_file()}


def command(folder: Path, *arguments: object, space: str = "") -> list[str]:
    (folder / "wrapper.py").write_text(WRAPPER)
    return [sys.executable, str(folder / "wrapper.py"), str(SMALL), space, *map(str, arguments)]


def one_block(err: str) -> bool:
    """Return whether standard error holds a single error block, without a traceback or a bug report."""
    lines = [line for line in err.splitlines() if line.strip()]
    starts = [line for line in lines if line.startswith("error: ")]
    rows = all(line.startswith("  ") for line in lines[1:])
    return len(starts) == 1 and lines[0] == starts[0] and rows and "bug in llmkit" not in err


def run_main(capsys, *arguments: object, code: int) -> str:
    """Run the command line in this process. If it fails, standard error must hold one block."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    err = capsys.readouterr().err
    assert stopped.value.code == code, err
    assert code == 0 or one_block(err), err
    return err


# ---- kill -9 --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """Return a folder with a config and its build, in many units."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = place(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmkit.corpus.units.UNIT_BYTES", SMALL)
        build_corpus(section(config), **quiet)
    assert len(list((folder / "data/parts").glob("*.scores.npy"))) == 24
    return folder


def copy_of(folder: Path, to: Path, **changes) -> Path:
    """Write the config of a build of the same text in another folder."""
    values = yaml.safe_load((folder / "c.yaml").read_text())
    values["data"] |= {"dir": str(to / "data"), **changes}
    to.mkdir(exist_ok=True)
    (to / "c.yaml").write_text(yaml.safe_dump(values))
    return to / "c.yaml"


def start(config: Path) -> subprocess.Popen:
    """A build in a session of its own, so that its workers can be killed with it, which hears Ctrl-C: a shell makes
    what it starts in the background deaf to it."""
    arguments = command(config.parent, "data", "build", config)
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    hears = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    return subprocess.Popen(arguments, start_new_session=True, **pipes, **hears)


def finish(config: Path) -> None:
    done = subprocess.run(command(config.parent, "data", "build", config), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def wait_for(test, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if test():
            return True
        time.sleep(0.01)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_build_that_is_killed_again_and_again_gives_the_same_bytes(undisturbed, tmp_path, workers):
    draw, interrupted = random.Random(workers), 0
    for attempt in range(2):
        config = copy_of(undisturbed, tmp_path / str(attempt), workers=workers)
        data = config.parent / "data"
        for _ in range(5):
            begun = start(config)
            assert wait_for(lambda: (data / "parts").exists() or begun.poll() is not None)  # noqa: B023
            time.sleep(draw.uniform(0, 0.3 if workers == 1 else 0.8))
            interrupted += begun.poll() is None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(begun.pid, signal.SIGKILL)
            begun.communicate()
        finish(config)
        assert tokens_of(data) == tokens_of(undisturbed / "data")
        assert read_manifest(data)["fingerprint"] == read_manifest(undisturbed / "data")["fingerprint"]
        assert not list(data.rglob("*.tmp"))
    assert interrupted >= 4


def children(pid: int) -> list[int]:
    psutil = pytest.importorskip("psutil")
    with contextlib.suppress(psutil.NoSuchProcess):
        return [p.pid for p in psutil.Process(pid).children() if "resource_tracker" not in " ".join(p.cmdline())]
    return []


def is_alive(pid: int) -> bool:
    psutil = pytest.importorskip("psutil")
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_do_not_outlive_their_build(undisturbed, tmp_path, number):
    config = copy_of(undisturbed, tmp_path / "x", workers=2)
    begun = start(config)
    try:
        assert wait_for(lambda: list((tmp_path / "x/data/parts").glob("*.scores.npy")))
        workers = children(begun.pid)
        begun.send_signal(number)
        begun.wait(timeout=30)  # not for its pipe, which the workers hold too
        assert len(workers) == 2 and wait_for(lambda: not any(map(is_alive, workers)), 3)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(begun.pid, signal.SIGKILL)


def test_a_worker_that_is_killed_is_one_error_and_the_next_build_goes_on(undisturbed, tmp_path):
    config = copy_of(undisturbed, tmp_path / "x", workers=2)
    parts = tmp_path / "x/data/parts"
    begun = start(config)
    assert wait_for(lambda: list(parts.glob("*.json")))
    os.kill(children(begun.pid)[0], signal.SIGKILL)
    _, err = begun.communicate(timeout=60)
    assert begun.returncode == ENVIRONMENT and one_block(err) and "a worker process died" in err
    done = {path: path.stat().st_mtime_ns for path in parts.glob("*.json")}  # written last
    finish(config)
    assert done and all(path.stat().st_mtime_ns == before for path, before in done.items())
    assert tokens_of(tmp_path / "x/data") == tokens_of(undisturbed / "data")


def test_ctrl_c_stops_a_build_which_goes_on_afterwards(undisturbed, tmp_path):
    config = copy_of(undisturbed, tmp_path / "x", workers=1)
    begun = start(config)
    assert wait_for((tmp_path / "x/data/parts").is_dir)
    begun.send_signal(signal.SIGINT)
    _, err = begun.communicate(timeout=60)
    assert begun.returncode == 130 and "Traceback" not in err
    finish(config)
    assert tokens_of(tmp_path / "x/data") == tokens_of(undisturbed / "data")


# ---- full disks -----------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """Mount a disk of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def leave_free(disk: Path, kilobytes: int) -> Path:
    """Fill a disk except for this many kilobytes. Return the file that takes the space."""
    file = disk / "filler"
    file.write_bytes(b"\0" * (shutil.disk_usage(disk).free - 1024 * kilobytes))
    return file


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kilobytes", [0, 4, 40, 100, 200])
def test_a_full_disk_is_one_error_and_costs_nothing_that_was_there(tmp_path, disk, capsys, monkeypatch, kilobytes,
                                                                    workers):  # fmt: skip
    monkeypatch.setattr("llmkit.corpus.units.UNIT_BYTES", 20_000)
    monkeypatch.setattr("llmkit.corpus.build.DISK_BYTES_PER_TEXT_BYTE", 0)
    config = place(tmp_path, dir=str(disk / "data"), workers=workers)
    run_main(capsys, "data", "build", config, code=0)
    before, manifest = tokens_of(disk / "data"), (disk / "data/manifest.json").read_bytes()
    filler = leave_free(disk, kilobytes)
    again = ("data", "build", config, "-o", "data.clean.html=false")
    err = run_main(capsys, *again, code=ENVIRONMENT)
    assert "a disk is full" in err
    assert (free := re.search(rf"([\d,]+) bytes free.* in {disk}/data", err)) and int(free[1].replace(",", "")) < 2**20
    there = tokens_of(disk / "data")
    assert all(there[name] == content for name, content in before.items())
    assert (disk / "data/manifest.json").read_bytes() == manifest
    filler.unlink()
    run_main(capsys, *again, code=0)
    elsewhere = section(config, dir=str(tmp_path / "elsewhere"), clean={"html": False}, workers=1)
    build_corpus(elsewhere, **quiet)
    assert tokens_of(disk / "data") == tokens_of(tmp_path / "elsewhere")


def test_a_full_disk_says_how_much_is_needed_and_where(tmp_path, disk, capsys, monkeypatch):
    monkeypatch.setattr("llmkit.corpus.build.DISK_BYTES_PER_TEXT_BYTE", 0)
    config = place(tmp_path, dir=str(disk / "data"))
    leave_free(disk, 40)
    err = run_main(capsys, "data", "build", config, code=ENVIRONMENT)
    assert str(disk / "data") in err and "bytes free" in err


def test_a_file_that_may_not_grow_is_one_error_and_the_next_build_goes_on(undisturbed, tmp_path):
    config = copy_of(undisturbed, tmp_path / "x", workers=1)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

    done = subprocess.run(command(tmp_path / "x", "data", "build", config), preexec_fn=limit, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == ENVIRONMENT and one_block(done.stderr), done.stderr
    assert "ulimit -f" in done.stderr and "full" not in done.stderr and "free" not in done.stderr
    assert not list((tmp_path / "x").rglob("tokens/*/*/*.bin")) and not (tmp_path / "x/data/manifest.json").exists()
    finish(config)
    assert tokens_of(tmp_path / "x/data") == tokens_of(undisturbed / "data")


def test_too_small_a_disk_is_refused_before_anything_is_written(tmp_path, capsys, monkeypatch):
    config = place(tmp_path)
    monkeypatch.setattr("llmkit.corpus.build.DISK_BYTES_PER_TEXT_BYTE", 1e12)
    err = run_main(capsys, "data", "build", config, code=ENVIRONMENT)
    assert "the disk is too small" in err and err.count("bytes") == 2 and str(tmp_path / "data") in err
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["lock"]


def test_packed_sources_need_more_room_than_they_take(tmp_path, capsys, disk):
    (tmp_path / "text").mkdir()
    text = b"".join(sentences(i, 400).encode() for i in range(60))
    config = place(tmp_path / "p", dir=str(disk / "data"))
    for name, content, code in (("a.txt", text[:1_000_000], 0), ("b.txt.gz", gzip.compress(text), ENVIRONMENT)):
        (tmp_path / "text" / name).write_bytes(content)
        assert len(content) * 0.9 < 2**21 < len(text) * 4
        sources = [{"name": "s", "path": str(tmp_path / "text" / name)}]
        run_main(capsys, "data", "build", config, "-o", f"data.sources={json.dumps(sources)}", code=code)


# ---- bad sources ----------------------------------------------------------------------------------------------------


def make_missing(path: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("path", "make"),
    [
        ("missing.txt", make_missing),
        ("empty.txt", Path.touch),
        ("fifo.txt", os.mkfifo),
        ("dangling.txt", lambda path: path.symlink_to(path.parent / "nowhere")),
        ("loop.txt", lambda path: path.symlink_to(path)),
        ("nothing/*.txt", make_missing),
        ("*.jsonl", make_missing),
        ("a.exe", lambda path: path.write_text("x")),
        ("folder", lambda path: path.mkdir()),
        ("empties", lambda path: [path.mkdir(), (path / "a.txt").touch()]),
    ],
)
def test_a_source_that_is_none_is_one_error_and_nothing_is_written(tmp_path, capsys, path, make):
    config = place(tmp_path, files=2)
    (tmp_path / "bad").mkdir()
    make(tmp_path / "bad" / path)
    sources = [
        {"name": "good", "path": str(tmp_path / "text")}, {"name": "bad", "path": str(tmp_path / "bad" / path)}
    ]  # fmt: skip
    err = run_main(capsys, "data", "build", config, "-o", f"data.sources={json.dumps(sources)}", code=DATA)
    assert str(tmp_path / "bad") in err and not (tmp_path / "data").exists()


BAD_LINES = {
    "truncated": (b'{"text": "the quagga', "bad JSON"),
    "array": (b'[{"text": "the quagga"}]', "an array"),
    "utf-8": (b'{"text": "\xff\xfe\xfd"}', "invalid UTF-8"),
    "nul": (b'\0{"text": "the quagga"}', "bad JSON"),
    "deep": (b'{"text": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "nested too deep"),
    "huge number for text": (b'{"text": ' + b"9" * 5000 + b"}", ""),
    "no text": (b'{"title": "the quagga"}', "missing"),
    "null": (b'{"text": null}', "null"),
    "list": (b'{"text": ["the quagga"]}', "list"),
}
ODD_LINES = {
    "surrogate": (b'{"text": "the odd \\ud800 river"}', "the odd \ufffd river"),
    "huge number": (b'{"text": "the odd river", "n": ' + b"9" * 400 + b"}", "the odd river"),
    "huge exponent": (b'{"text": "the odd river", "n": 1e999}', "the odd river"),
    "nul in text": (b'{"text": "the odd\\u0000 river"}', "the odd river"),
    "separator": ('{"text": "the odd\u2028river"}'.encode(), "the odd\n"),  # the rest is the tail, which val has
    "mark": (b'\xef\xbb\xbf{"text": "the odd river"}', "the odd river"),
    "two texts": (b'{"text": "the even river", "text": "the odd river"}', "the odd river"),
    "control token": (b'{"text": "the odd <|endoftext|> river"}', "the odd <|endoftext|> river"),
}


def build_lines(folder: Path, line: bytes) -> tuple[dict, list[dict], str]:
    """Return the counts, the quarantine and all text of a build of ten good lines around another."""
    good = [json.dumps({"text": sentences(i, 10)}).encode() for i in range(10)]
    (folder / "a.jsonl").write_bytes(b"\n".join([*good[:5], line, *good[5:]]))
    values = tiny_config(folder)["data"] | {"sources": [{"name": "s", "path": str(folder / "a.jsonl")}]}
    manifest = build_corpus(
        CorpusData(**values | {"on_error": {"max_bad_fraction": 1.0}, "split": {"val_fraction": 0.01}}), **quiet
    )
    bad = [json.loads(line) for line in (folder / "data/quarantine.jsonl").read_text().splitlines()]
    tokenizer = load_tokenizer(folder / "data/tokenizer")
    streams = [open_split(folder / "data", manifest["splits"][split]["files"], np.dtype(manifest["dtype"]))
               for split in ("train", "val")]  # fmt: skip
    return manifest["counts"], bad, "".join(tokenizer.decode(one.read(0, len(one))) for one in streams)


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_record_is_quarantined_and_costs_no_other(tmp_path, kind):
    line, reason = BAD_LINES[kind]
    counts, (bad,), text = build_lines(tmp_path, line)
    assert counts == {"read": 11, "quarantined": 1, "kept": 10, "dropped": 0}
    assert (bad["line"], bad["source"]) == (6, "s") and reason in bad["reason"] and "quagga" not in text


@pytest.mark.parametrize("kind", ODD_LINES)
def test_an_odd_record_is_read(tmp_path, kind):
    line, text = ODD_LINES[kind]
    counts, bad, found = build_lines(tmp_path, line)
    assert counts["kept"] == 11 and not bad
    assert text in found


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9, mtime=0)[:-12], "broken"),
        ("a.jsonl.zst", b"not packed at all", "broken"),
        ("a.parquet", b"PAR1 not at all PAR1", "broken"),
        ("a.zip", b"PK\3\4 not at all", "broken"),
        ("a.txt", b"\0\1\2\3" * 100, "binary"),
        ("a.jsonl", '{"text": "x"}\n'.encode("utf-16"), "UTF-16"),
        ("a.json", b"[[[[", "bad JSON"),
        ("a.jsonl", b"\n".join([b'{"text": "fine"}'] * 9 + [b"{"] * 2), "2 of 11 records"),
    ],
)
def test_files_that_cannot_be_read_are_one_error_that_names_them(tmp_path, capsys, name, content, word):
    config = place(tmp_path, files=2)
    (tmp_path / name).write_bytes(content)
    sources = [{"name": "bad", "path": str(tmp_path / name)}]
    err = run_main(capsys, "data", "build", config, "-o", f"data.sources={json.dumps(sources)}", code=DATA)
    assert word in err and str(tmp_path / name) in err and "quarantine.jsonl" in err
    assert not (tmp_path / "data/manifest.json").exists()


def test_an_empty_json_array_leaves_no_document(tmp_path, capsys):
    config = place(tmp_path, files=2)
    (tmp_path / "a.json").write_text("[]")
    sources = [{"name": "bad", "path": str(tmp_path / "a.json")}]
    err = run_main(capsys, "data", "build", config, "-o", f"data.sources={json.dumps(sources)}", code=DATA)
    assert "the sources hold no document" in err


@pytest.mark.parametrize("profile", ["web", "books"])
def test_everything_filtered_out_shows_by_what(tmp_path, capsys, profile):
    config = place(tmp_path, files=2)
    (tmp_path / "a.jsonl").write_text('{"text": "too short"}\n{"text": ""}\n{"text": "short too"}\n')
    sources = [{"name": "s", "path": str(tmp_path / "a.jsonl"), "profile": profile}]
    err = run_main(capsys, "data", "build", config, "-o", f"data.sources={json.dumps(sources)}", code=DATA)
    assert "no document is left" in err and "2 words, 1 empty" in err and not (tmp_path / "data/tokens").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_misspelt_column_is_one_error_for_any_workers(tmp_path, capsys, monkeypatch, workers):
    monkeypatch.setattr("llmkit.corpus.units.UNIT_BYTES", 50)
    config = place(tmp_path, files=2, workers=workers)
    (tmp_path / "a.jsonl").write_text('{"txt": "the river", "url": "u"}\n' * 9)
    sources = [{"name": "s", "path": str(tmp_path / "a.jsonl")}]
    err = run_main(capsys, "data", "build", config, "-o", f"data.sources={json.dumps(sources)}", code=DATA)
    assert "no field text" in err and "txt, url" in err and "did you mean txt?" in err


@pytest.mark.parametrize("words", [None, "", "# only a comment\n", "a folder"])
def test_a_word_list_that_is_none_is_one_error_and_nothing_is_written(tmp_path, capsys, words):
    config = place(tmp_path, files=2)
    if words == "a folder":
        (tmp_path / "words").mkdir()
    elif words is not None:
        (tmp_path / "words").write_text(words)
    run_main(capsys, "data", "build", config, "-o", f"data.filter.words.path={tmp_path / 'words'}", code=DATA)
    assert not (tmp_path / "data").exists()


def test_evaluation_files_that_are_not_there_are_one_error(tmp_path, capsys):
    config = place(tmp_path, files=2)
    run_main(capsys, "data", "build", config, "-o", f"data.decontaminate.files=[{tmp_path}/no.jsonl]", code=DATA)
    assert not (tmp_path / "data").exists()


def test_evaluation_files_that_cannot_be_read_are_noticed(tmp_path, capsys):
    config = place(tmp_path, files=2)
    (tmp_path / "evals.jsonl.gz").write_bytes(gzip.compress(b'{"question": "the river"}\n' * 9)[:-12])
    run_main(capsys, "data", "build", config, "-o", f"data.decontaminate.files=[{tmp_path}/evals.jsonl.gz]", code=DATA)


def test_a_folder_that_cannot_be_made_is_one_error(tmp_path, capsys):
    config = place(tmp_path, files=2)
    (tmp_path / "taken").write_text("x")
    for folder in (tmp_path / "taken", tmp_path / "taken/below", "/proc/none/here"):
        run_main(capsys, "data", "build", config, "-o", f"data.dir={folder}", code=ENVIRONMENT)


def test_a_build_does_not_read_what_it_wrote(tmp_path, capsys):
    config = place(tmp_path)
    sources = [{"name": "s", "path": str(tmp_path)}]
    arguments = ("data", "build", config, "-o", f"data.sources={json.dumps(sources)}")
    run_main(capsys, *arguments, code=0)
    before = tokens_of(tmp_path / "data")
    run_main(capsys, *arguments, code=0)
    assert tokens_of(tmp_path / "data") == before


def test_too_few_tokens_for_a_sample_are_one_error(tmp_path, capsys):
    config = place(tmp_path, files=2)
    (tmp_path / "a.txt").write_text("The model reads a token.")
    sources = [{"name": "s", "path": str(tmp_path / "a.txt")}]
    err = run_main(capsys, "pretrain", config, "-o", f"data.sources={json.dumps(sources)}", code=DATA)
    assert "the train split is shorter than one sample" in err and not (tmp_path / "run/checkpoints").exists()
    assert "val_fraction" not in err  # val is too short, too


@pytest.mark.parametrize(("fraction", "short", "way"), [(0.0001, "val", "raise"), (0.98, "train", "lower")])
def test_a_split_that_is_too_short_names_the_fraction_that_makes_it_longer(tmp_path, capsys, fraction, short, way):
    config = place(tmp_path)
    changes = [f"data.split.val_fraction={fraction}", "data.seq_len=8192", "model.max_position_embeddings=8192"]
    err = run_main(capsys, "pretrain", config, *(one for change in changes for one in ("-o", change)), code=DATA)
    assert f"the {short} split is shorter than one sample" in err and f"{way} data.split.val_fraction" in err


def test_a_train_split_without_a_text_is_one_error(tmp_path, capsys):
    err = run_main(capsys, "pretrain", place(tmp_path), "-o", "data.split.val_fraction=0.9999", code=DATA)
    assert "there is no text to train a tokenizer on" in err and "lower data.split.val_fraction" in err


# ---- what is damaged between the build and the training -------------------------------------------------------------


@pytest.fixture
def built(tmp_path) -> Path:
    """Return a config that names a finished build, but no sources."""
    config = place(tmp_path, files=12)
    build_corpus(section(config), **quiet)
    values = yaml.safe_load(config.read_text())
    values["data"]["sources"] = []
    config.with_name("built.yaml").write_text(yaml.safe_dump(values))
    return config.with_name("built.yaml")


def flip(path: Path, at: float = 0.5) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("split", ["train", "val"])
def test_one_bit_of_a_shard_is_noticed(built, capsys, split):
    flip(next((built.parent / "data/tokens" / split).rglob("*.bin")))
    for arguments in (("pretrain", built), ("data", "inspect", built)):
        err = run_main(capsys, *arguments, code=DATA)
        assert "a token shard changed after the build" in err and "another checksum" in err
    assert not (built.parent / "run/checkpoints").exists()


def test_a_copy_of_a_build_is_the_build(built, tmp_path):
    shutil.copytree(built.parent / "data", tmp_path / "copy")
    summary = train(load_config(built, [f"data.dir={tmp_path / 'copy'}", "train.max_steps=2"]), **quiet)
    assert summary["steps"] == 2


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "gone"])
def test_a_damaged_index_of_documents_is_noticed(built, capsys, damage):
    index = next((built.parent / "data/tokens/train").rglob("*.idx"))
    content = index.read_bytes()
    index.unlink()
    if damage == "bit":
        index.write_bytes(content)
        flip(index)
    elif damage != "gone":
        index.write_bytes(content[:-3] if damage == "cut" else b"")
    err = run_main(capsys, "pretrain", built, "-o", "data.document_mask=true", code=DATA)
    assert str(index) in err


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"recipe": 1}', "\0", "key"])
@pytest.mark.parametrize("sources", [True, False])
def test_a_damaged_manifest_is_one_error_or_built_anew(built, content, sources, capsys):
    manifest = built.parent / "data/manifest.json"
    manifest.write_text(manifest.read_text().replace('"dtype"', '"dtypd"') if content == "key" else content)
    config = built.with_name("c.yaml" if sources else "built.yaml")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["pretrain", str(config), "-o", "train.max_steps=1"])
    err = capsys.readouterr().err
    assert stopped.value.code in ((0, DATA) if sources else (DATA,)), err
    assert stopped.value.code == 0 or one_block(err)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": 3}', "key"])
def test_damaged_counts_of_a_unit_are_counted_again(tmp_path, content):
    config = place(tmp_path, files=12)
    before = build_corpus(section(config), **quiet)
    (tmp_path / "data/manifest.json").unlink()
    for path in (tmp_path / "data/parts").glob("*.json"):
        path.write_text(path.read_text().replace('"files"', '"filez"') if content == "key" else content)
    assert build_corpus(section(config), **quiet)["fingerprint"] == before["fingerprint"]


def test_one_bit_of_the_tokenizer_is_noticed(built, capsys):
    path = built.parent / "data/tokenizer/tokenizer.json"
    spec = json.loads(path.read_text())
    one, other = list(spec["model"]["vocab"].items())[-2:]
    spec["model"]["vocab"] |= {one[0]: other[1], other[0]: one[1]}
    path.write_text(json.dumps(spec))
    assert "not the one that the data was encoded with" in run_main(capsys, "pretrain", built, code=DATA)
    path.write_text(path.read_text()[:-20])
    assert str(path) in run_main(capsys, "pretrain", built, code=MODEL)


def test_a_source_that_changed_since_the_build_is_built_anew_and_no_run_goes_on_with_it(tmp_path):
    config = place(tmp_path, files=12)
    before = build_corpus(section(config), **quiet)["fingerprint"]
    train(load_config(config, ["train.max_steps=2"]), **quiet)
    (tmp_path / "text/03.txt").write_text(sentences(77, 120))
    with pytest.raises(UserError) as caught:
        train(load_config(config, ["train.max_steps=4"]), **quiet)
    assert "data" in str(caught.value)
    assert read_manifest(tmp_path / "data")["fingerprint"] != before
    train(load_config(config, ["train.max_steps=4"]), fresh=True, **quiet)


def test_a_named_tokenizer_that_changed_since_the_build_is_built_with_anew(tmp_path, capsys):
    train_tokenizer([sentences(1, 50)], vocab_size=290).save(tmp_path / "named")
    config = place(tmp_path / "p", files=12, tokenizer={"path": str(tmp_path / "named")})
    build_corpus(section(config), **quiet)
    train_tokenizer([sentences(2, 50)], vocab_size=285).save(tmp_path / "named")
    run_main(capsys, "pretrain", config, "-o", "train.max_steps=1", code=0)
    assert read_manifest(tmp_path / "p/data")["tokenizer_sha256"] == load_tokenizer(tmp_path / "named").sha256


@pytest.mark.parametrize("damage", ["cut", "gone"])
@pytest.mark.parametrize("kind", ["jsonl.zst", "scores.npy"])
def test_a_damaged_part_is_made_again_or_one_error_that_says_what_to_do(tmp_path, capsys, damage, kind):
    config = place(tmp_path, files=12)
    build_corpus(section(config), **quiet)
    for path in (tmp_path / "data/parts").glob(f"*.{kind}"):
        content = path.read_bytes()
        path.unlink()
        if damage == "cut":
            path.write_bytes(content[:-50])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["data", "build", str(config), "-o", "data.split.val_fraction=0.3"])
    err = capsys.readouterr().err
    assert stopped.value.code == 0 or (one_block(err) and "fix:" in err)


# ---- a cluster ------------------------------------------------------------------------------------------------------


def test_two_dask_workers_give_the_same_bytes(undisturbed, tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr("llmkit.corpus.units.UNIT_BYTES", SMALL)
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster:
        data = section(undisturbed / "c.yaml", dir=str(tmp_path / "data"), workers="auto",
                       cluster=cluster.scheduler_address)  # fmt: skip
        manifest = build_corpus(data, **quiet)
        (tmp_path / "bad.jsonl").write_text('{"txt": "the river"}\n')
        bad = data.model_copy(update={"sources": [data.sources[0].model_copy(update={
            "path": str(tmp_path / "bad.jsonl")})], "dir": str(tmp_path / "bad")})  # fmt: skip
        with pytest.raises(UserError, match="no field text") as caught:
            build_corpus(bad, **quiet)
    assert tokens_of(tmp_path / "data") == tokens_of(undisturbed / "data") and manifest["workers"] == 2
    assert (caught.value.code, caught.value.fix) == (DATA, "did you mean txt?")


def test_a_cluster_without_workers_is_one_error(tmp_path):
    distributed = pytest.importorskip("distributed")
    config = place(tmp_path, files=2)
    with distributed.LocalCluster(n_workers=0, dashboard_address=":0") as cluster:
        address = f"data.cluster={cluster.scheduler_address}"
        done = llmkit("data", "build", config, "-o", "data.workers=auto", "-o", address, cwd=tmp_path, code=ENVIRONMENT)
    assert one_block(done.stderr) and "the cluster has no workers" in done.stderr


@pytest.mark.parametrize(
    "address",
    ["nowhere", "foo://x:1", pytest.param("tcp://127.0.0.1:1", marks=pytest.mark.slow)],  # 30 s are given to the last
)
def test_a_dead_address_is_one_error(tmp_path, address):
    pytest.importorskip("distributed")
    config = place(tmp_path, files=2)
    cluster = f"data.cluster={address}"
    done = llmkit("data", "build", config, "-o", "data.workers=auto", "-o", cluster, cwd=tmp_path, code=ENVIRONMENT)
    assert one_block(done.stderr) and "no Dask scheduler answers" in done.stderr and address in done.stderr
