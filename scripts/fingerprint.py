"""Fingerprint training runs, to show that a change of the code leaves every trained bit the same.

    python scripts/fingerprint.py before.json                        # on the old code
    python scripts/fingerprint.py after.json --against before.json   # on the new one, on the same machine

Trains small models of all families with fixed seeds through the command line: eager and compiled, fp32 and bf16, one
rank and two, killed and resumed, with LoRA and without. The fingerprint of a run is its metrics (without clocks and
memory) and a checksum of the tensors of every checkpoint. It differs between machines and between versions of torch.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import yaml
from safetensors import safe_open

WORDS = "the a one model token reads writes learns small large river of in under over code and but it is loss".split()
CLOCKS = {"tokens_per_second", "mfu", "memory_gb", "eta_seconds"}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
T5 = {"name": "t5", **SHAPE, "head_dim": 16, "dropout_rate": 0.1}
LONG = {"train": {"max_steps": 20, "global_batch_size": 8, "micro_batch_size": 4}}


def sentences(seed: int, number: int) -> str:
    """Return lines with some structure to learn, the same for every run."""
    draw = random.Random(seed)
    return "".join(" ".join(draw.choices(WORDS, k=draw.randint(5, 12))).capitalize() + ".\n" for _ in range(number))


def write_data(folder: Path) -> None:
    """Write two folders of texts, and prompts with answers."""
    for source, files in (("text", 30), ("more", 10)):
        (folder / source).mkdir()
        for i in range(files):
            (folder / source / f"{i:02d}.txt").write_text(sentences(i + files, 60))
    pairs = [{"prompt": sentences(i, 1), "completion": sentences(i + 500, 1)} for i in range(60)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def corpus(name: str, **options) -> dict:
    """Return the data section of a corpus that is built in its own folder."""
    tokenizer = {"train": "bpe", "vocab_size": 300} | options.pop("tokenizer", {})
    sources = [{"name": "text", "path": "text", "weight": 3}, {"name": "more", "path": "more", "weight": 1}]
    return {
        "kind": "corpus",
        "dir": f"data-{name}",
        "seq_len": 32,
        "split": {"val_fraction": 0.2},
        "sources": sources,
        "tokenizer": tokenizer,
        "workers": 1,
        "dedup": {"near": False, "exact": False},
        **options,
    }


def pretraining(model: dict, data: dict | None = None, **sections) -> dict:
    """Return a config of 20 steps. `sections` extend or override the default ones."""
    defaults = {
        "model": model,
        "data": data or corpus("bpe"),
        "optimizer": {"name": "adamw", "lr": 1e-2},
        "train": {"max_steps": 20, "global_batch_size": 8, "compile": False, "precision": "fp32"},
        "eval": {"every": 10, "max_batches": 4, "sample_prompt": "The river", "sample_tokens": 8},
        "checkpoint": {"every": 10},
        "log": {"every": 5},
    }
    return {key: defaults.get(key, {}) | sections.get(key, {}) for key in defaults | sections}


def finetuning(base: str, peft: dict | None, data: dict | None = None, **sections) -> dict:
    """Return a config that fine-tunes the model of another run."""
    section = {"kind": "sft", "path": "pairs.jsonl", "seq_len": 48} | (data or {})
    config = pretraining({}, section, **sections)
    del config["model"], config["eval"]["sample_prompt"]
    return config | {"init_from": f"runs/{base}", "peft": peft}


RUNS = {
    "llama": pretraining({"name": "llama", **SHAPE, "num_key_value_heads": 1, "attention_dropout": 0.1}, **LONG),
    "llama-compiled": pretraining({"name": "llama", **SHAPE}, train={"compile": True, "precision": "bf16"}),
    "llama-masked": pretraining({"name": "llama", **SHAPE}, corpus("bpe", document_mask=True)),
    "gpt2": pretraining({"name": "gpt2", **SHAPE, "resid_pdrop": 0.1}, train={"gradient_checkpointing": "full"}),
    "mistral": pretraining({"name": "mistral", **SHAPE, "sliding_window": 8}),
    "qwen2": pretraining({"name": "qwen2", **SHAPE}, train={"precision": "bf16"}),
    "modern": pretraining({"name": "qwen3", "init": "zero", **SHAPE}, optimizer={"name": "muon", "lr": 5e-3}),
    "gemma": pretraining({"name": "gemma", **SHAPE}),
    "falcon": pretraining({"name": "falcon", **SHAPE}),
    "mixtral": pretraining({"name": "mixtral", **SHAPE, "num_local_experts": 4}, schedule={"name": "wsd"}),
    "bert": pretraining(
        {"name": "bert", **SHAPE}, corpus("words", tokenizer={"train": "wordpiece"}), eval={"sample_prompt": None}
    ),
    "t5": pretraining(T5, corpus("spans", tokenizer={"extra_ids": 20})),
    "two-ranks": pretraining({"name": "llama", **SHAPE}),
    "resumed": pretraining({"name": "llama", **SHAPE, "attention_dropout": 0.1}),
    "lora": finetuning("llama", {"name": "lora", "r": 4, "dropout": 0.1}),
    "lora-bf16": finetuning("gpt2", {"name": "lora", "rslora": True}, train={"precision": "bf16"}),
    "lora-tokens": finetuning("llama", {"name": "lora", "new_tokens": True}, {"special_tokens": ["<new>", "<other>"]})
    | {"resize_embeddings": True},
    "full": finetuning("mixtral", None, {"packing": False}),
    "t5-answers": finetuning("t5", None),
}


def llmkit(*arguments: str, cwd: Path) -> str:
    """Run a command of the llmkit that is installed beside this Python, and return what it printed."""
    program = shutil.which("llmkit", path=str(Path(sys.executable).parent))
    done = subprocess.run(
        [program, *arguments], cwd=cwd, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        sys.exit(f"llmkit {' '.join(arguments)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def tensors_sha256(path: Path) -> str:
    """Return a checksum of a safetensors file's names, types and values, independent of their order in the file."""
    digest = hashlib.sha256()
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprint(run: Path) -> dict:
    """Return the metrics of a run without clocks, and a checksum of each of its tensor files."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    metrics = [{key: value for key, value in line.items() if key not in CLOCKS} for line in lines]
    files = sorted((run / "checkpoints").rglob("*.safetensors"))
    return {"metrics": metrics, "tensors": {str(path.relative_to(run)): tensors_sha256(path) for path in files}}


def train(name: str, folder: Path) -> dict:
    """Train one of RUNS in the folder with the data, and return its fingerprint."""
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(RUNS[name] | {"run_dir": f"runs/{name}"}))
    if name == "resumed":  # from its first checkpoint: the metrics after it are written again
        llmkit("pretrain", config.name, "-o", "checkpoint.keep=2", cwd=folder)
        shutil.rmtree(folder / "runs" / name / "checkpoints" / "step-000020")
    llmkit("pretrain", config.name, *(["--nproc", "2"] if name == "two-ranks" else []), cwd=folder)
    print(f"{name}: trained", file=sys.stderr)
    return fingerprint(folder / "runs" / name)


def list_differences(before: dict, after: dict) -> list[str]:
    """Return the names of the runs, steps and files in which two sets of fingerprints differ."""
    found = [f"{name}: only in one of the two" for name in sorted(before.keys() ^ after.keys())]
    for name in sorted(before.keys() & after.keys()):
        old, new = before[name], after[name]
        found += [
            f"{name}: metrics of step {a['step']}"
            for a, b in zip(old["metrics"], new["metrics"], strict=False)
            if a != b
        ]
        found += [f"{name}: number of metrics"] if len(old["metrics"]) != len(new["metrics"]) else []
        paths = old["tensors"].keys() | new["tensors"].keys()
        found += [f"{name}: {p}" for p in sorted(paths) if old["tensors"].get(p) != new["tensors"].get(p)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the fingerprints, as JSON")
    parser.add_argument("--against", type=Path, help="earlier fingerprints, which these must equal")
    parser.add_argument("--only", nargs="*", default=list(RUNS), choices=list(RUNS), help="the runs to train")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_data(folder)
        found = {}
        for is_finetuning in (False, True):  # pretraining first: fine-tuning needs its runs
            names = [name for name in arguments.only if ("init_from" in RUNS[name]) == is_finetuning]
            for first in names[:1]:  # alone, because it builds the data that the others read
                found[first] = train(first, folder)
            with ThreadPoolExecutor(2) as pool:
                found |= zip(names[1:], pool.map(lambda name: train(name, folder), names[1:]), strict=True)
    arguments.out.write_text(json.dumps(found, indent=1))
    steps = sum(len(one["metrics"]) for one in found.values())
    files = sum(len(one["tensors"]) for one in found.values())
    print(f"{len(found)} runs, {steps} lines of metrics, {files} files of tensors: {arguments.out}")
    if arguments.against:
        if wrong := list_differences(json.loads(arguments.against.read_text()), found):
            sys.exit("\n".join(["these differ:", *wrong]))
        print(f"all equal to {arguments.against}")


if __name__ == "__main__":
    main()
