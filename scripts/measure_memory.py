"""Compare the peak memory that `llmkit plan` predicts with what training takes, over many configurations.

    python scripts/measure_memory.py                       # every row, on the GPU if there is one
    python scripts/measure_memory.py --only t5 lora --json out.json
    python scripts/measure_memory.py --held-out            # the rows that the rule was not made on

Each row is a run of three steps, an evaluation and a checkpoint, in a process of its own and on a tiny corpus: what
`llmkit pretrain` does, with more embeddings than the tokenizer has tokens. On a CPU the peak is the resident memory of
the process, on CUDA what torch allocated.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

from llmkit.config.load import load_config
from llmkit.config.yaml import dump_yaml
from llmkit.corpus.build import build_corpus
from llmkit.models import CONFIGS, build_model
from llmkit.models.folder import save_model
from llmkit.parallel.memory import peak_memory
from llmkit.parallel.world import start_world
from llmkit.tokenizer.load import load_tokenizer
from llmkit.training.loop import train
from llmkit.training.plan import plan_config

TOKENIZERS = {
    "causal": {"train": "bpe", "vocab_size": 300},
    "masked": {"train": "wordpiece", "vocab_size": 300},
    "seq2seq": {"train": "bpe", "vocab_size": 400, "extra_ids": 100},
}
LARGE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
BASE = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8}
SMALL = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
ONE_B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
SIZES = {"12 x 768": LARGE, "8 x 512": BASE, "4 x 256": SMALL, "16 x 2048": ONE_B}
# family, size, vocabulary, micro-batch x tokens, and what differs from AdamW in bf16, eager:
# fp32, muon, compiled, lora, recomputed, documents (attention stays inside of one)
ROWS = [
    "gpt2, 4 x 256, 2048, 16 x 256",
    "gpt2, 4 x 256, 2048, 16 x 256, compiled",
    "gpt2, 12 x 768, 32000, 4 x 512",
    "gpt2, 12 x 768, 32000, 4 x 512, compiled",
    "gpt2, 12 x 768, 50257, 8 x 512, recomputed",
    "llama, 4 x 256, 2048, 16 x 256, muon",
    "llama, 4 x 256, 128000, 16 x 128",
    "llama, 4 x 256, 128000, 16 x 128, fp32",
    "llama, 4 x 256, 2048, 2 x 4096",
    "llama, 4 x 256, 2048, 2 x 4096, compiled",
    "llama, 12 x 768, 32000, 4 x 512, muon",
    "llama, 12 x 768, 32000, 4 x 512, fp32",
    "llama, 12 x 768, 32000, 4 x 512, compiled",
    "llama, 12 x 768, 32000, 8 x 512, compiled, documents",
    "llama, 12 x 768, 32000, 8 x 512, documents",
    "llama, 12 x 768, 32000, 4 x 512, lora",
    "llama, 12 x 768, 32000, 4 x 512, lora, compiled",
    "llama, 12 x 768, 32000, 8 x 512, compiled, recomputed",
    "llama, 16 x 2048, 128000, 1 x 512, lora",
    "mistral, 8 x 512, 8192, 4 x 1024, lora",
    "qwen2, 8 x 512, 8192, 4 x 512, compiled",
    "qwen3, 8 x 512, 8192, 4 x 512, muon",
    "qwen3, 12 x 768, 8192, 8 x 512, recomputed, fp32",
    "gemma, 8 x 512, 64000, 4 x 512",
    "gemma, 4 x 256, 2048, 8 x 1024, compiled",
    "falcon, 8 x 512, 8192, 8 x 512",
    "falcon, 8 x 512, 8192, 8 x 512, lora",
    "mixtral, 4 x 256, 2048, 16 x 256",
    "mixtral, 8 x 512, 8192, 4 x 512",
    "mixtral, 8 x 512, 8192, 4 x 512, compiled",
    "bert, 8 x 512, 8192, 8 x 512",
    "bert, 12 x 768, 30000, 8 x 256, compiled",
    "t5, 8 x 512, 8192, 4 x 512",
    "t5, 8 x 512, 8192, 4 x 512, compiled",
]
HELD_OUT = [
    "gpt2, 8 x 512, 8192, 8 x 256",
    "mixtral, 4 x 256, 8192, 8 x 128, lora",
    "qwen2, 4 x 256, 16000, 4 x 1024",
    "llama, 8 x 512, 32000, 4 x 512, lora",
    "falcon, 4 x 256, 30000, 8 x 256, fp32",
    "mistral, 12 x 768, 8192, 2 x 1024, recomputed",
    "bert, 4 x 256, 8192, 16 x 128, muon",
    "t5, 4 x 256, 8192, 8 x 256",
    "llama, 8 x 512, 32000, 4 x 512, compiled",
    "gemma, 8 x 512, 32000, 2 x 512, lora, compiled",
]


# ---- one row --------------------------------------------------------------------------------------------------------


def model_config(row: str) -> tuple[str, dict[str, Any]]:
    """Return the family of a row, and the options of its model."""
    family, size, vocab, shape, *_ = row.split(", ")
    sizes = SIZES[size] | {"vocab_size": int(vocab), "max_position_embeddings": int(shape.split(" x ")[1])}
    if family in ("mistral", "qwen2", "qwen3", "mixtral"):
        sizes["num_key_value_heads"] = sizes["num_attention_heads"] // 2
    return family, sizes


def run_config(row: str, folder: Path) -> dict[str, Any]:
    """Return the config of a row as YAML has it."""
    family, sizes = model_config(row)
    rows, seq_len = map(int, row.split(", ")[3].split(" x "))
    flags = set(row.split(", ")[4:])
    start = {"init_from": str(folder / "base"), "peft": {"name": "lora", "r": 16}}
    return {
        "run_dir": str(folder / "run"),
        **(start if "lora" in flags else {"model": {"name": family, **sizes}}),
        "data": {
            "dir": str(folder / CONFIGS[family].kind),
            "seq_len": seq_len,
            "document_mask": "documents" in flags,
        },
        "optimizer": {"name": "muon" if "muon" in flags else "adamw"},
        "schedule": {"name": "cosine"},
        "train": {
            "max_steps": 3,
            "global_batch_size": rows,
            "micro_batch_size": rows,
            "precision": "fp32" if "fp32" in flags else "bf16",
            "compile": "compiled" in flags,
            "gradient_checkpointing": "full" if "recomputed" in flags else "none",
        },
        "eval": {"every": 3, "max_batches": 1},
    }


def build_data(folder: Path) -> None:
    """Build a corpus of invented words for every kind of model, with a tokenizer of its own."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(2000)]
    texts = [" ".join(rng.choices(words, k=rng.randint(50, 500))) for _ in range(2000)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for kind, tokenizer in TOKENIZERS.items():
        data = {"dir": str(folder / kind), "sources": str(folder / "texts.jsonl"), "tokenizer": tokenizer}
        data |= {"filter": {"rules": {}}, "dedup": {"near": False}, "split": {"val_fraction": 0.1}, "workers": 1}
        (folder / "data.yaml").write_text(dump_yaml({"data": data, "model": {"name": "gpt2"}}))
        build_corpus(load_config(folder / "data.yaml", for_training=False).data)


def worker(row: str, folder: Path) -> None:
    """Train a row and print its peak memory; what LoRA starts from is written by a process of its own."""
    if row.startswith("base of "):
        family, sizes = model_config(row.removeprefix("base of "))
        save_model(build_model(CONFIGS[family](**sizes)), folder / "base", dtype=torch.bfloat16)
        load_tokenizer(folder / CONFIGS[family].kind / "tokenizer").save(folder / "base")
        return
    train(load_config(folder / "run.yaml"), fresh=True)
    print(f"\n{peak_memory(start_world().device)}")


def run_worker(row: str, folder: Path) -> str:
    """Return what the worker of a row prints."""
    # A compiler cache for each row, so that compiling is part of what is measured.
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / f"inductor-{row}".replace(" ", ""))}
    command = [sys.executable, __file__, "--folder", str(folder), "--worker", row]
    process = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    if process.returncode:
        sys.exit(f"{row}: failed with exit status {process.returncode}\n{process.stdout[-3000:]}")
    return process.stdout


def measure(row: str, folder: Path) -> dict[str, Any]:
    """Return the predicted and the measured peak of a row, in bytes, and the parts of the prediction."""
    if "lora" in row:
        run_worker(f"base of {row}", folder)
    (folder / "run.yaml").write_text(dump_yaml(run_config(row, folder)))
    figures = plan_config(load_config(folder / "run.yaml"))
    measured = int(run_worker(row, folder).split()[-1])
    predicted = figures["peak_memory"]
    error = predicted / measured - 1
    return {
        "row": row,
        "predicted": predicted,
        "measured": measured,
        "error": error,
        "parts": figures["memory_by_part"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="rows that contain one of these texts")
    parser.add_argument("--row", action="append", help="measure this row, written like those of the file")
    parser.add_argument("--held-out", action="store_true", help="the rows that the rule was not made on")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON, too")
    parser.add_argument("--folder", type=Path, help="keep data and runs here; default: a temporary folder")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args.folder)
    rows = args.row or [
        row for row in (HELD_OUT if args.held_out else ROWS) if not args.only or any(text in row for text in args.only)
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "seq2seq").is_dir():
            folder.mkdir(exist_ok=True)
            build_data(folder)
        results = []
        print("| configuration | predicted MiB | measured MiB | error |\n|---|---:|---:|---:|")
        for row in rows:
            results.append(measure(row, folder))
            predicted, measured = (f"{results[-1][key] / 2**20:,.0f}" for key in ("predicted", "measured"))
            print(f"| {row} | {predicted} | {measured} | {results[-1]['error']:+.1%} |", flush=True)
            if args.json:
                args.json.write_text(json.dumps(results, indent=2) + "\n")
    errors = [abs(result["error"]) for result in results]
    print(f"\nmedian error {median(errors):.1%}, worst {max(errors):.1%}, of {len(errors)}")


if __name__ == "__main__":
    main()
