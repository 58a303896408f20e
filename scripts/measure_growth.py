"""Measure what grows with the size of the input: CPU time and memory, each in a process of its own.

    python scripts/measure_growth.py                  # all rows
    python scripts/measure_growth.py encode runs      # some, by their names in ROWS
    python scripts/measure_growth.py files --small    # small inputs, to try a row out

A row is a function that writes its inputs to a folder, measures commands with `measure` and yields lines of the table.
CPU seconds are those of the process and its workers, with its start, but for steps and tokens: these are timed alone,
when all is compiled. Memory is the peak of the largest process. Linux counts the memory of this process, too, until it
has become the other one: functions keep no large inputs.
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
    """Run Python with some arguments in a folder, and return what it took. Raise RuntimeError if it fails.

    It sees no GPU. Programs are compiled in the process itself, and kept in the folder: a new folder has none.
    """
    own = {
        "CUDA_VISIBLE_DEVICES": "",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    with (folder / "output.txt").open("w+") as output:
        process = subprocess.Popen([sys.executable, *arguments], cwd=folder, stdout=output, env=os.environ | own)
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


STEPS = """
import sys, time
from statistics import median
import torch
from llmkit.models import CONFIGS, build_model
from llmkit.parallel.compile import compile_blocks
from llmkit.parallel.device import autocast, choose_precision
from llmkit.parallel.world import start_world
length, window, compiled, steps, width = (int(argument) for argument in sys.argv[1:])
device = start_world().device
precision = choose_precision("auto", device)
model = build_model(CONFIGS["mistral"](
    vocab_size=2048, hidden_size=width, num_hidden_layers=4, num_attention_heads=width // 64,
    max_position_embeddings=length, sliding_window=window or None), device=device)
if compiled:
    compile_blocks(model, device, precision)
ids = torch.randint(2048, (1, length + 1), device=device)
seconds = []
for _ in range(steps):
    start = time.process_time()
    with autocast(device, precision):
        loss = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    seconds.append(time.process_time() - start)
print(median(seconds))
"""


def compilation(folder: Path, small: bool) -> Iterator[Row]:
    """Compile a model of four blocks with an empty cache, and take one step."""
    for length in [64] if small else [256, 1024, 4096]:
        (folder / str(length)).mkdir()
        yield (
            "a first step, compiled with an empty cache",
            f"T {length}",
            measure(["-c", STEPS, str(length), "0", "1", "1", "256"], folder / str(length)),
        )


def windows(folder: Path, small: bool) -> Iterator[Row]:
    """Take steps with and without a sliding window."""
    sizes, steps, width = ([128], "2", "64") if small else ([2048, 4096], "5", "512")
    for length, compiled in itertools.product(sizes, [0] if small else [0, 1]):
        for window in (0, length // 8):
            cost = measure(["-c", STEPS, str(length), str(window), str(compiled), steps, width], folder)
            what = f"a step, {'compiled' if compiled else 'eager'}, {f'window {window}' if window else 'no window'}"
            yield what, f"T {length}", cost._replace(seconds=float(cost.output))


WRITE = """
import sys, time
import torch
from llmkit.generation.generate import compile_decoding, generate
from llmkit.generation.sampling import Sampling
from llmkit.models import CONFIGS, build_model
from llmkit.parallel.device import DTYPES, choose_precision
from llmkit.parallel.world import start_world
prompt, batch, width = (int(argument) for argument in sys.argv[1:])
device = start_world().device
model = build_model(CONFIGS["llama"](
    vocab_size=8192, hidden_size=width, num_hidden_layers=6, num_attention_heads=width // 64), device=device)
model = model.to(DTYPES[choose_precision("auto", device)]).eval()
compile_decoding(model)
ids = torch.randint(8192, (batch, prompt)).tolist()
def write(new):
    start = time.process_time()
    list(generate(model, ids, max_new_tokens=new, sampling=Sampling(temperature=0), compiled=True))
    return time.process_time() - start
write(40)
one = min(write(1) for _ in range(3))
print((min(write(40) for _ in range(3)) - one) / 39 * 1000)
"""


def writing(folder: Path, small: bool) -> Iterator[Row]:
    """Write 40 tokens after prompts of several lengths, compiled; seconds are of a thousand tokens."""
    for prompt, batch in [(8, 1)] if small else [(64, 1), (440, 1), (480, 1), (960, 1), (64, 4)]:
        cost = measure(["-c", WRITE, str(prompt), str(batch), "64" if small else "768"], folder)
        yield f"1000 tokens written, batch {batch}", f"after {prompt}", cost._replace(seconds=float(cost.output))


ROWS: dict[str, Callable[[Path, bool], Iterator[Row]]] = {
    "encode": encode,
    "files": files,
    "runs": runs,
    "compilation": compilation,
    "windows": windows,
    "writing": writing,
}


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
