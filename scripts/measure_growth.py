"""Measure what grows with the size of the input: CPU time and memory, each in a process of its own.

    python scripts/measure_growth.py                  # all rows
    python scripts/measure_growth.py encode runs      # some, by their names in ROWS
    python scripts/measure_growth.py files --small    # small inputs, to try a row out

A row is a function that writes its inputs to a folder, measures commands with `measure` and yields lines of the table.
CPU seconds are those of the process and its workers, with its start; memory is the peak of the largest of them. Linux
counts the memory of this process, too, until it has become the other one: functions keep no large inputs.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple


class Cost(NamedTuple):
    """What a process took, and what it printed."""

    seconds: float
    peak_mb: float
    output: str


Row = tuple[str, str, Cost]  # what is measured, the size of its input, its cost


def measure(arguments: list[str], folder: Path) -> Cost:
    """Run Python with some arguments in a folder, and return what it took. Raise RuntimeError if it fails."""
    with (folder / "output.txt").open("w+") as output:
        process = subprocess.Popen([sys.executable, *arguments], cwd=folder, stdout=output)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        printed = output.read()
    if process.returncode:
        raise RuntimeError(f"exit status {process.returncode}: {arguments[-1]}")
    return Cost(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, printed)


# ---- rows -----------------------------------------------------------------------------------------------------------

TRAIN = """
import sys
from pathlib import Path
from llmkit.tokenizer.train import train_tokenizer
text = Path("source.txt").read_text()[:2_000_000]
train_tokenizer(text.splitlines(keepends=True), vocab_size=4000).save(Path("tokenizer"))
"""
ENCODE = """
import sys
from pathlib import Path
from llmkit.tokenizer.load import load_tokenizer
text = Path("source.txt").read_text()[: int(sys.argv[1])]
(ids,) = load_tokenizer(Path("tokenizer")).encode_documents([text])
print(len(ids))
"""


def encode(folder: Path, small: bool) -> Iterator[Row]:
    """Encode one document of Python's own library."""
    sizes = [10_000, 50_000] if small else [0, 5_000_000, 20_000_000]
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py"))
    with (folder / "source.txt").open("wb") as joined:
        for file in itertools.cycle(library):
            joined.write(file.read_text(errors="replace").encode("ascii", "replace"))
            if joined.tell() >= max(sizes):
                break
    measure(["-c", TRAIN], folder)
    for size in sizes:
        cost = measure(["-c", ENCODE, str(size)], folder)
        yield f"a document of source code -> {int(cost.output):,} tokens", f"{size / 1e6:g} MB", cost


LOOK_UP = """
import json
from llmkit.config.data import CorpusData
from llmkit.corpus import build, units
units.UNIT_BYTES = 2**18
sources = [{"name": "text", "path": "text"}]
data = CorpusData(kind="corpus", dir="data", sources=sources, tokenizer={"train": "bpe", "vocab_size": 300})
print(json.dumps([unit.part for unit in build.make_recipe(data)[0]]))
"""


def files(folder: Path, small: bool) -> Iterator[Row]:
    """Look up the files of a build, as is done before it is said that the data is already built."""
    number = 500 if small else 50_000

    def write(i: int, extra: str = "") -> None:
        path = folder / "text" / f"{i // 1000:02d}" / f"{i // 100:03d}" / f"{i:05d}{extra}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"The file {i} of {number}. " * 20 + extra)

    write(0)
    yield "files looked up", "1 file", measure(["-c", LOOK_UP], folder)
    for i in range(number):
        write(i)
    cost = measure(["-c", LOOK_UP], folder)
    yield "files looked up", f"{number:,} files", cost
    changes = {"one file changed": (number // 2, ""), "one file added early": (3, "a")}
    for what, (i, extra) in changes.items():
        before = json.loads(cost.output)
        write(i, extra)
        cost = measure(["-c", LOOK_UP], folder)
        redone = len(set(json.loads(cost.output)) - set(before))
        yield f"{what}: {redone} of {len(before)} units to measure again", f"{number:,} files", cost


RUNS = """
model: {name: llama, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, max_position_embeddings: 64}
data: {kind: corpus, dir: data, seq_len: 32, sources: [{name: text, path: text}], tokenizer: {path: tokenizer}}
train: {max_steps: 20, global_batch_size: 8}
"""
WRITE_RUNS = """
import json, sys
from pathlib import Path
from llmkit.config.load import load_config
Path("c.yaml").write_text(sys.argv[2])
config = load_config(Path("c.yaml")).dump()
for i in range(int(sys.argv[1])):
    run = Path(f"runs/{i:03d}")
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(config)
    lines = [json.dumps({"step": step, "loss": 3.5, "tokens": 1000 * step}) for step in range(20)]
    (run / "metrics.jsonl").write_text("\\n".join(lines))
"""


def runs(folder: Path, small: bool) -> Iterator[Row]:
    """List the runs in a folder with `llmkit runs`."""
    for number in (1, 10 if small else 300):
        measure(["-c", WRITE_RUNS, str(number), RUNS], folder)
        yield "llmkit runs", f"{number} run folders", measure(["-m", "llmkit", "runs"], folder)


ROWS: dict[str, Callable[[Path, bool], Iterator[Row]]] = {"encode": encode, "files": files, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(ROWS)}; default: all")
    parser.add_argument("--small", action="store_true", help="small inputs, to try a row out")
    chosen = parser.parse_args()
    if unknown := set(chosen.rows) - set(ROWS):
        parser.error(f"no such row: {', '.join(unknown)}")
    print("| what | size | CPU-s | peak MB |\n|---|---:|---:|---:|", flush=True)
    for name in chosen.rows or ROWS:
        with tempfile.TemporaryDirectory() as folder:
            for what, size, cost in ROWS[name](Path(folder), chosen.small):
                print(f"| {what} | {size} | {cost.seconds:.2f} | {cost.peak_mb:.0f} |", flush=True)


if __name__ == "__main__":
    main()
