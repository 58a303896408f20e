"""Compare the speed of writing one text with transformers' generate: same weights, prompt and greedy tokens.

    python scripts/bench_generate.py                    # a Llama of 110M parameters, bf16, 64 + 128 tokens
    python scripts/bench_generate.py --rounds 9 --peers plain

The first call of each contestant, which compiles, is reported apart. Then all take turns, forwards and backwards. The
time is that of the whole call, including the reading of the prompt.
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

from llmkit.inference.generate import compile_decoding, stream
from llmkit.inference.sampling import Sampling
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


def build_ours(folder: Path, prompt: list[int], new: int, device: torch.device, compiled: bool) -> Write:
    """Return a function that writes `new` tokens with llmkit."""
    model = load_model(folder, device=device, dtype=torch.bfloat16).eval()
    if compiled:
        compile_decoding(model)
    greedy = Sampling(temperature=0)
    return lambda: list(stream(model, prompt, max_new_tokens=new, sampling=greedy, compiled=compiled))


def build_theirs(folder: Path, prompt: list[int], new: int, device: torch.device, compiled: bool) -> Write:
    """Return a function that writes `new` tokens with transformers."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    options["eos_token_id"] = None
    if compiled:
        options["cache_implementation"] = "static"
        model.forward = torch.compile(model.forward, fullgraph=True)
    ids = torch.tensor([prompt], device=device)
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


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
    contestants = {"llmkit, compiled": (build_ours, True), "llmkit": (build_ours, False)}
    if args.peers in ("plain", "all"):
        contestants["transformers"] = (build_theirs, False)
    if args.peers in ("compiled", "all"):
        contestants["transformers, static cache, compiled"] = (build_theirs, True)
    writers: dict[str, Write] = {}
    first: dict[str, float] = {}
    texts: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory(prefix="llmkit-bench-") as folder:
        config = CONFIGS["llama"](**SHAPE | {"num_hidden_layers": args.layers})
        save_model(build_model(config), Path(folder), dtype=torch.bfloat16)
        for name, (build, compiled) in contestants.items():
            writers[name] = build(Path(folder), prompt, args.new, device, compiled)
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
    reference = "llmkit, compiled"
    print(
        f"{device_name(device)}, {os.cpu_count()} cores; torch {version('torch')}, transformers "
        f"{version('transformers')}; {datetime.date.today()}; {args.prompt} + {args.new} tokens, bf16, batch 1\n"
    )
    print("| contestant | tokens/s, median (min-max) | llmkit, compiled / it | first call | same text |")
    print("|---|---|---|---|---|")
    for name, took in seconds.items():
        speeds = [args.new / one for one in took]
        ratio = median(theirs / ours for theirs, ours in zip(took, seconds[reference], strict=True))
        agree = sum(a == b for a, b in zip(texts[name], texts[reference], strict=True))
        print(
            f"| {name} | {median(speeds):.1f} ({min(speeds):.1f}-{max(speeds):.1f}) | {ratio:.2f} "
            f"| {first[name]:.1f} s | {agree} of {args.new} |"
        )


if __name__ == "__main__":
    main()
