"""Speed of writing one text against transformers' generate: same weights, prompt and greedy tokens, in turns.

    python scripts/bench_generate.py                    # a Llama of 110M parameters, bf16, 64 + 128 tokens
    python scripts/bench_generate.py --rounds 9 --peers plain

Each contestant writes once before the clock (what compiles does so there, and says how long), then all take turns,
forwards and backwards. The time is that of the whole call, reading the prompt included.
"""

from __future__ import annotations

import argparse
import datetime
import os
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

from llmkit.inference.generate import Sampling, compile_decoding, stream
from llmkit.models import CONFIGS, build_model
from llmkit.models.folder import load_model, save_model
from llmkit.parallel.device import device_name
from llmkit.parallel.world import start_world

SHAPE = {  # llama2.c's stories110M
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
Write = Callable[[], list[int]]


def ours(folder: Path, prompt: list[int], new: int, device: torch.device, compiled: bool) -> Write:
    model = load_model(folder, device=device, dtype=torch.bfloat16).eval()
    if compiled:
        compile_decoding(model)
    greedy = Sampling(temperature=0)
    return lambda: list(stream(model, prompt, max_new_tokens=new, sampling=greedy, compiled=compiled))


def theirs(folder: Path, prompt: list[int], new: int, device: torch.device, compiled: bool) -> Write:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    how = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    if compiled:
        how["cache_implementation"] = "static"
        model.forward = torch.compile(model.forward, fullgraph=True)
    ids = torch.tensor([prompt], device=device)
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **how)[0, len(prompt) :].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant (5)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens that are read (64)")
    parser.add_argument("--new", type=int, default=128, help="tokens that are written (128)")
    parser.add_argument("--peers", choices=["plain", "compiled", "all"], default="all")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    args = parser.parse_args()
    device = start_world().device
    prompt = torch.randint(SHAPE["vocab_size"], (args.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    made = {"llmkit, compiled": (ours, True), "llmkit": (ours, False)}
    if args.peers in ("plain", "all"):
        made["transformers"] = (theirs, False)
    if args.peers in ("compiled", "all"):
        made["transformers, static cache, compiled"] = (theirs, True)
    writers: dict[str, Write] = {}
    first: dict[str, float] = {}
    texts: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory(prefix="llmkit-bench-") as folder:
        config = CONFIGS["llama"](**SHAPE | {"num_hidden_layers": args.layers})
        save_model(build_model(config), Path(folder), dtype=torch.bfloat16)
        for name, (make, compiled) in made.items():
            writers[name] = make(Path(folder), prompt, args.new, device, compiled)
            start = time.perf_counter()
            texts[name] = writers[name]()
            first[name] = time.perf_counter() - start
    seconds: dict[str, list[float]] = {name: [] for name in writers}
    for turn in range(args.rounds):
        order = list(writers.items())
        for name, write in order if turn % 2 == 0 else reversed(order):
            start = time.perf_counter()
            again = write()
            seconds[name].append(time.perf_counter() - start)
            assert again == texts[name], f"{name} wrote another text than before"
    best = next(iter(writers))
    print(
        f"{device_name(device)}, {os.cpu_count()} cores; torch {version('torch')}, transformers "
        f"{version('transformers')}; {datetime.date.today()}; {args.prompt} + {args.new} tokens, bf16, batch 1\n"
    )
    print("| contestant | tokens/s, median (min-max) | llmkit, compiled / it | first call | same text |")
    print("|---|---|---|---|---|")
    for name, took in seconds.items():
        speeds = [args.new / one for one in took]
        ratio = median(theirs / mine for theirs, mine in zip(took, seconds[best], strict=True))
        agree = sum(a == b for a, b in zip(texts[name], texts[best], strict=True))
        print(
            f"| {name} | {median(speeds):.1f} ({min(speeds):.1f}-{max(speeds):.1f}) | {ratio:.2f} "
            f"| {first[name]:.1f} s | {agree} of {args.new} |"
        )


if __name__ == "__main__":
    main()
