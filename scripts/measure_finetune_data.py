"""Measure the time and memory of encoding fine-tuning records, for several numbers of records.

    python scripts/measure_finetune_data.py                    # 10,000 and 100,000 chats
    python scripts/measure_finetune_data.py 1000000 --workers 2
    python scripts/measure_finetune_data.py 10000 --pairs      # prompts and completions instead
    python scripts/measure_finetune_data.py 10000 --no-marks   # a template without {% generation %}, as most are
    python scripts/measure_finetune_data.py 10000 --peer       # chats, beside transformers, in turns

Each number runs in its own process. A chat has four turns of 20 to 120 words, which a BPE of 2000 tokens makes 310
tokens. Memory is the peak of the main process, and that of the largest worker.

The peer does what TRL's SFTTrainer does before it packs: `datasets.map` over `apply_chat_template` with a mask of the
assistant's tokens, which a template with generation marks gives.
"""

import argparse
import json
import os
import random
import re
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


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
)


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


def measure_transformers(number: int) -> None:
    """Encode `number` chats as TRL does, with one process. Print one line of figures."""
    import datasets
    from transformers import AutoTokenizer

    from llmkit.tokenizer.train import train_tokenizer

    tokenizer = train_tokenizer([" ".join(WORDS)] * 10, vocab_size=2000)
    tokenizer.chat_template = TEMPLATE
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.jsonl"
        write_records(path, number, pairs=False)
        tokenizer.save(Path(folder) / "tokenizer")
        theirs = AutoTokenizer.from_pretrained(Path(folder) / "tokenizer")

        def encode(record: dict) -> dict:
            options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
            found = theirs.apply_chat_template(record["messages"], **options)
            return {"input_ids": found["input_ids"], "assistant_masks": found["assistant_masks"]}

        before = used(resource.RUSAGE_SELF)[0]
        records = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=folder)
        encoded = records.map(encode, remove_columns=records.column_names)
        cpu, targets = used(resource.RUSAGE_SELF)[0] - before, sum(encoded[0]["assistant_masks"])
    print(
        f"{number:>10,} records by transformers: {cpu:.1f} CPU-s, {1000 * cpu / number:.3f} ms a record; "
        f"{targets} targets in the first"
    )


def used(who: int) -> tuple[float, float]:
    """Return (CPU seconds, peak memory in MB) of this process or of its children."""
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def measure(number: int, batches: int, workers: int, pairs: bool, marks: bool) -> None:
    """Encode `number` records and read some batches. Print one line of figures."""
    from llmkit.config.records import SftData
    from llmkit.data.rows import packed_batches
    from llmkit.records.build import encode_turns
    from llmkit.tokenizer.renderer import renderer
    from llmkit.tokenizer.train import train_tokenizer

    tokenizer = train_tokenizer([" ".join(WORDS)] * 10, vocab_size=2000)
    tokenizer.chat_template = TEMPLATE if marks else re.sub(r"{% (end)?generation %}", "", TEMPLATE)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.jsonl"
        write_records(path, number, pairs)
        before = used(resource.RUSAGE_SELF)[0] + used(resource.RUSAGE_CHILDREN)[0]
        started = time.perf_counter()
        data = SftData(kind="sft", path=str(path), workers=workers)
        report = encode_turns(data, tokenizer, Path(folder) / "out", seed=0)
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
    parser.add_argument("--no-marks", action="store_true", help="a template that does not mark the answers itself")
    parser.add_argument("--peer", action="store_true", help="measure transformers too, three times in turns")
    parser.add_argument("--transformers", action="store_true", help=argparse.SUPPRESS)  # one turn of the peer
    options = parser.parse_args()
    if options.transformers:
        measure_transformers(options.numbers[0])
    elif options.peer:
        for flags in [[], ["--transformers"], ["--transformers"], [], [], ["--transformers"]]:
            subprocess.run([sys.executable, __file__, str(options.numbers[0]), *flags], check=True)
    elif len(options.numbers) == 1:
        measure(options.numbers[0], options.batches, options.workers, options.pairs, not options.no_marks)
    else:
        flags = ["--batches", str(options.batches), "--workers", str(options.workers)]
        flags += [flag for flag in ("--pairs", "--no-marks") if flag in sys.argv]
        for number in options.numbers:
            subprocess.run([sys.executable, __file__, str(number), *flags], check=True)
