"""Measure the time and memory of encoding fine-tuning records, for several numbers of records.

    python scripts/measure_finetune_data.py                    # 10,000 and 100,000 records
    python scripts/measure_finetune_data.py 1000000 --batches 100

Each number runs in its own process: the records are prompts and answers of 10 to 60 words, the tokenizer is a BPE that
is trained on some of them.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = "the a one model token reads writes learns small large river of in under over code and but it is loss".split()


def write_records(path: Path, number: int) -> None:
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(number):
            prompt, completion = (" ".join(draw.choices(WORDS, k=draw.randint(10, 60))) for _ in range(2))
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")


def measure(number: int, batches: int) -> None:
    """Encode `number` records and read some batches. Print one line of figures."""
    from llmkit.config.data import SftData
    from llmkit.data.batches import packed_batches
    from llmkit.data.sft import encode_sft
    from llmkit.tokenizer.train import train_tokenizer

    tokenizer = train_tokenizer([" ".join(WORDS)] * 10, vocab_size=400)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.jsonl"
        write_records(path, number)
        base, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, time.perf_counter()
        report = encode_sft(SftData(kind="sft", path=str(path)), tokenizer, Path(folder) / "out", seed=0)
        seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        order, started = packed_batches(Path(report["folder"]), "train", 32, seed=0), time.perf_counter()
        for step in range(batches):
            order.batch_at(step)
        batch_ms = 1000 * (time.perf_counter() - started) / batches
        size = path.stat().st_size / 1e6
    print(
        f"{number:>10,} records, {size:.0f} MB: {seconds:.1f} s, peak {peak:.0f} MB ({peak - base:.0f} MB over the "
        f"imports), {batch_ms:.1f} ms for a batch of 32 rows"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int, default=[10_000, 100_000])
    parser.add_argument("--batches", type=int, default=20)
    options = parser.parse_args()
    if len(options.numbers) == 1:
        measure(options.numbers[0], options.batches)
    for number in options.numbers if len(options.numbers) > 1 else []:
        subprocess.run([sys.executable, __file__, str(number), "--batches", str(options.batches)], check=True)
