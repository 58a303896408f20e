"""A small corpus, a tiny config, and a way to run the real command line."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

# Tiny tensors: two threads only wait for each other, most of all on a busy machine. Read when torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

SHARED = Path(__file__).parents[2] / "shared" / "data"  # real public text, where a machine has it
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")

WORDS = "the a one model token reads writes learns small large river of in under over code and but it is loss".split()


def sentences(seed: int, number: int) -> str:
    """Return text with some structure to learn, the same for every run."""
    draw = random.Random(seed)
    lines = [" ".join(draw.choices(WORDS, k=draw.randint(5, 12))).capitalize() + "." for _ in range(number)]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Return a folder with text/*.txt, and a corpus built from it in data/."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text").mkdir()
    for i in range(40):
        (folder / "text" / f"{i:02d}.txt").write_text(sentences(i, 60))
    (folder / "build.yaml").write_text(yaml.safe_dump(tiny_config(folder)))
    llmkit("data", "build", "build.yaml", cwd=folder)
    return folder


def tiny_config(folder: Path, **sections) -> dict:
    """Return the config of a model that trains in a second; sections replace or extend the defaults."""
    config = {
        "model": {
            "name": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "max_position_embeddings": 64,
        },
        "data": {
            "kind": "corpus", "dir": str(folder / "data"), "seq_len": 32, "split": {"val_fraction": 0.2},
            "sources": [{"name": "text", "path": str(folder / "text")}],
            "tokenizer": {"train": "bpe", "vocab_size": 300}, "workers": 1,
            "dedup": {"near": False},
        },
        "optimizer": {"name": "adamw", "lr": 1e-2},
        "schedule": {"name": "cosine"},
        "train": {"max_steps": 20, "global_batch_size": 8, "compile": False, "precision": "fp32"},
        "eval": {"every": 10, "max_batches": 4},
        "checkpoint": {"every": 10},
        "log": {"every": 5},
    }  # fmt: skip
    return {key: {**config.get(key, {}), **value} if isinstance(value, dict) else value
            for key, value in (config | sections).items()}  # fmt: skip


def llmkit(*arguments: object, cwd: Path, code: int | None = 0, **environment: str) -> subprocess.CompletedProcess:
    """Run the real command line; assert its exit code, and that no traceback and no bare Python object is printed."""
    command = [sys.executable, "-m", "llmkit", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )
    assert code in (None, done.returncode), f"{arguments}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr and " object at 0x" not in done.stdout + done.stderr
    return done


def encode_chat_example(tokenizer, template: str, messages: list[dict], tools: list[dict] | None = None):
    """Return (ids, targets) of a conversation of which every answer is learnt. Raise the error of the template."""
    from llmkit.tokenizer.answers import render_examples
    from llmkit.tokenizer.chat_template import Conversation, encode_rendered

    one = Conversation(messages, [message["role"] == "assistant" for message in messages], tools)
    [found] = render_examples(tokenizer, template, [one])
    if isinstance(found, ValueError):
        raise found
    [rendered] = found
    ids, targets = encode_rendered(tokenizer, rendered)
    return ids.tolist(), targets.tolist()


def randomized(model):
    """Set weights large enough that every part of the model, biases and norms too, moves the logits."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.3, generator=generator)
    return model.eval()


def metrics(run: Path) -> list[dict]:
    """Return a run's metrics without the values that depend on clocks and memory."""
    clocks = {"tokens_per_second", "mfu", "memory_gb", "eta_seconds", "tasks_seconds"}
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in clocks} for line in lines]
