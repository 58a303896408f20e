"""Compare the speed of writing one text with transformers' generate: same weights, prompt and greedy tokens.

    python scripts/bench_generate.py                    # a Llama of 110M parameters, bf16, 64 + 128 tokens
    python scripts/bench_generate.py --rounds 9 --peers plain

The first call of each contestant, which compiles, is reported apart. Then all take turns, forwards and backwards. The
time is that of the whole call, including the reading of the prompt. Reading alone is measured with a longer prompt,
after which one token is written.

What was tried to write faster. CPU ms of one token of this model, one thread, shared machine, best of 60; 256 slots:

    17.4   blocks and head compiled one by one, a step before all of this
    15.2   kept: x is computed before a product, not in each of its sums with the norm before it (36 -> 21 for two rows,
           65 -> 38 for four)
    14.3   all layers in one graph, blocks as one region of it (torch.compiler.nested_compile_region): guards and
           wrappers of twelve blocks are gone, but each cache size costs 7 s of tracing even with a warm compiler cache,
           which the blocks do in 0.3 s; it pays after 7,000 tokens of one size
    16.9   all layers in one graph without regions, and with the norm in the sums: 33 s of tracing, 107 s in all
    --     rows of a weight in 2, 4 or 8 parts, whose sums are one loop: products alone 5.0 -> 4.8, 5.6 and 7.4
    --     q, k, v in one product, and gate, up: the compiler does so already, one loop has three or two sums

Of a token, blocks are 65 %, the head 18 %, guards and wrappers 14 %, all else (positions, masks, rotary table,
embedding, last norm, argmax) 3 %. For a batch, 28 products of 2, 4 and 8 rows take 7.7, 9.3 and 19 as sums, 16, 12 and
14 as F.linear. With 256, 512 and 1024 slots a token takes 16.9, 18.8 and 23.2 (in one graph without regions), so that
room for all that may be written costs more than a new size does: 0.3 s with a warm compiler cache.
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

from llmkit.generation.generate import compile_decoding, stream
from llmkit.generation.sampling import Sampling
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
Write = Callable[[list[int], int], list[int]]  # (prompt, number of tokens) -> tokens


def build_ours(folder: Path, device: torch.device, compiled: bool) -> Write:
    """Return a function that writes tokens with llmkit."""
    model = load_model(folder, device=device, dtype=torch.bfloat16).eval()
    if compiled:
        compile_decoding(model)
    greedy = Sampling(temperature=0)
    return lambda prompt, new: list(stream(model, prompt, max_new_tokens=new, sampling=greedy, compiled=compiled))


def build_theirs(folder: Path, device: torch.device, compiled: bool) -> Write:
    """Return a function that writes tokens with transformers."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    if compiled:
        options["cache_implementation"] = "static"
        model.forward = torch.compile(model.forward, fullgraph=True)

    def write(prompt: list[int], new: int) -> list[int]:
        ids = torch.tensor([prompt], device=device)
        sizes = {"max_new_tokens": new, "min_new_tokens": new, "attention_mask": torch.ones_like(ids)}
        return model.generate(ids, **sizes, **options)[0, len(prompt) :].tolist()

    return write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant (5)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens that are read (64)")
    parser.add_argument("--long", type=int, default=512, help="tokens of the prompt whose reading is measured (512)")
    parser.add_argument("--new", type=int, default=128, help="tokens that are written (128)")
    parser.add_argument("--peers", choices=["plain", "compiled", "all"], default="all")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    args = parser.parse_args()
    device = start_world().device
    ids = torch.randint(SHAPE["vocab_size"], (args.prompt + args.long,), generator=torch.Generator().manual_seed(0))
    prompt, long = (part.tolist() for part in ids.split([args.prompt, args.long]))
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
            writers[name] = build(Path(folder), device, compiled)
            start = time.perf_counter()
            texts[name] = writers[name](prompt, args.new)
            first[name] = time.perf_counter() - start
            writers[name](long, 1)
    seconds: dict[str, list[float]] = {name: [] for name in writers}
    reading: dict[str, list[float]] = {name: [] for name in writers}
    for turn in range(args.rounds):
        order = list(writers.items())
        for name, write in order if turn % 2 == 0 else reversed(order):
            start = time.perf_counter()
            again = write(prompt, args.new)
            seconds[name].append(time.perf_counter() - start)
            start = time.perf_counter()
            write(long, 1)
            reading[name].append(time.perf_counter() - start)
            assert again == texts[name], f"{name} wrote another text than before"
    reference = "llmkit, compiled"
    print(
        f"{device_name(device)}, {os.cpu_count()} cores; torch {version('torch')}, transformers "
        f"{version('transformers')}; {datetime.date.today()}; {args.prompt} + {args.new} tokens, bf16, batch 1\n"
    )
    print(
        "| contestant | tokens/s, median (min-max) | llmkit, compiled / it | first call | same text "
        f"| reading {args.long} tokens, ms | llmkit, compiled / it |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, took in seconds.items():
        speeds = [args.new / one for one in took]
        ratio = median(theirs / ours for theirs, ours in zip(took, seconds[reference], strict=True))
        reads = [1000 * one for one in reading[name]]
        faster = median(theirs / ours for theirs, ours in zip(reading[name], reading[reference], strict=True))
        agree = sum(a == b for a, b in zip(texts[name], texts[reference], strict=True))
        print(
            f"| {name} | {median(speeds):.1f} ({min(speeds):.1f}-{max(speeds):.1f}) | {ratio:.2f} "
            f"| {first[name]:.1f} s | {agree} of {args.new} "
            f"| {median(reads):.0f} ({min(reads):.0f}-{max(reads):.0f}) | {faster:.2f} |"
        )


if __name__ == "__main__":
    main()
