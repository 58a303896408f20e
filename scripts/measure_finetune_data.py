"""Measure the time and memory of encoding fine-tuning records, for several numbers of records.

    python scripts/measure_finetune_data.py                    # 10,000 and 100,000 chats
    python scripts/measure_finetune_data.py 1000000 --workers 2
    python scripts/measure_finetune_data.py 10000 --pairs      # prompts and completions instead

Each number runs in its own process. A chat has four turns of 20 to 120 words, which a BPE of 2000 tokens makes 380
tokens. Memory is the peak of the main process, and that of the largest worker.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = (
    "the a one model token reads writes learns small large river of in under over code and but it is loss people "
    "because through another question answered without international between company government different sometimes"
).split()


def write_records(path: Path, number: int, pairs: bool) -> None:
    draw = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    with path.open("w") as file:
        for _ in range(number):
            if pairs:
                record = {"prompt": text(10, 60), "completion": text(10, 60)}
            else:
                turns = [("user", 20, 80), ("assistant", 40, 120)] * 2
                record = {"messages": [{"role": role, "content": text(*sizes)} for role, *sizes in turns]}
            file.write(json.dumps(record) + "\n")


def used(who: int) -> tuple[float, float]:
    """Return (CPU seconds, peak memory in MB) of this process or of its children."""
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def measure(number: int, batches: int, workers: int, pairs: bool) -> None:
    """Encode `number` records and read some batches. Print one line of figures."""
    from llmkit.config.data import SftData
    from llmkit.data.rows import packed_batches
    from llmkit.records.build import encode_sft
    from llmkit.tokenizer.renderer import renderer
    from llmkit.tokenizer.train import train_tokenizer

    tokenizer = train_tokenizer([" ".join(WORDS)] * 10, vocab_size=2000)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.jsonl"
        write_records(path, number, pairs)
        before = used(resource.RUSAGE_SELF)[0] + used(resource.RUSAGE_CHILDREN)[0]
        started = time.perf_counter()
        data = SftData(kind="sft", path=str(path), workers=workers)
        report = encode_sft(data, tokenizer, Path(folder) / "out", seed=0)
        seconds = time.perf_counter() - started
        if renderer(os.getpid()).process:
            renderer(os.getpid()).stop()  # only of a process that has ended the time is known
        (own, peak), (others, largest) = used(resource.RUSAGE_SELF), used(resource.RUSAGE_CHILDREN)
        cpu = own + others - before
        order, started = packed_batches(Path(report["folder"]), "train", 32, seed=0), time.perf_counter()
        for step in range(batches):
            order.batch_at(step)
        batch_ms = 1000 * (time.perf_counter() - started) / batches
        size = path.stat().st_size / 1e6
        tokens = sum(part["tokens"] for part in report["splits"].values()) / number
    print(
        f"{number:>10,} records, {size:.0f} MB, {tokens:.0f} tokens each: {seconds:.1f} s with {workers} worker(s), "
        f"{cpu:.1f} CPU-s, {1000 * cpu / number:.3f} ms a record; peak {peak:.0f} MB, of another process "
        f"{largest:.0f} MB; {batch_ms:.1f} ms for a batch of 32 rows"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int, default=[10_000, 100_000])
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--pairs", action="store_true", help="prompts and completions instead of chats")
    options = parser.parse_args()
    if len(options.numbers) == 1:
        measure(options.numbers[0], options.batches, options.workers, options.pairs)
    for number in options.numbers if len(options.numbers) > 1 else []:
        flags = ["--batches", str(options.batches), "--workers", str(options.workers)]
        flags += ["--pairs"] if options.pairs else []
        subprocess.run([sys.executable, __file__, str(number), *flags], check=True)
