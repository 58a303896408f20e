"""Training speed against transformers and peft: same shapes, weights, tokens and optimizer, measured side by side.

    python scripts/bench.py                                  # every shape, on the GPU if there is one
    python scripts/bench.py --shape lora --rounds 5 --json out.json

Every contestant is a process of its own. A peer is measured in a session with llmkit: both stay alive and take turns
(llmkit, peer, peer, llmkit, ...), so that what else the machine does hits both, and each ratio comes from one session.
Two processes at a time, no more: many live ones slow each other down. A contestant that fails is a row with its error.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# Neither torch nor llmkit is imported up here: on Linux a child's peak memory begins at its parent's, so the parent of
# the contestants must stay small.

GPT2_SMALL = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "vocab_size": 8192}
GPT2_124M = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 50257}
LLAMA_WIDE = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 32000,
}  # fmt: skip
LLAMA_LORA = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_key_value_heads": 4, "vocab_size": 32000,
}  # fmt: skip
# device -> --shape -> name -> (family, config, tokens a row, rows a step)
SHAPES = {
    "cpu": {
        "small": {
            "GPT-2 6 x 384": ("gpt2", GPT2_SMALL, 256, 16),
            "Llama 6 x 384": ("llama", GPT2_SMALL | {"intermediate_size": 1024}, 256, 16),
        },
        "lora": {"LoRA on Llama 12 x 768": ("llama", LLAMA_LORA, 512, 4)},
    },
    "cuda": {
        "small": {
            "GPT-2 124M": ("gpt2", GPT2_124M, 1024, 16),
            "Llama 12 x 768": ("llama", GPT2_124M | {"intermediate_size": 2048, "vocab_size": 32000}, 1024, 16),
        },
        "lora": {"LoRA on Llama 16 x 2048": ("llama", LLAMA_WIDE, 2048, 4)},
    },
}
OURS = {"name": "llmkit, bf16 autocast, compiled", "who": "llmkit", "precision": "bf16", "compile": True}
PEERS = [
    {"name": "transformers, bf16 autocast", "who": "transformers", "precision": "bf16", "compile": False},
    {"name": "transformers, bf16 autocast, compiled", "who": "transformers", "precision": "bf16", "compile": True},
    {"name": "transformers, fp32", "who": "transformers", "precision": "fp32", "compile": False},
]
LORA_PEERS = [  # `autocast` is what Trainer(bf16=True) adds; peft makes adapters fp32 unless told otherwise
    {"name": "peft, bf16, fp32 adapters", "who": "peft", "precision": "bf16", "compile": False, "fp32_adapters": True},
    {"name": "peft, bf16, bf16 adapters", "who": "peft", "precision": "bf16", "compile": False, "fp32_adapters": False},
]
WARM_UP = 3  # steps before the clock: compilation, the optimizer's state, then one like all others
BATCHES = 4  # different ones, made before the clock and taken in turn
PARITY = 2e-3  # first losses further apart than this mean that not the same thing was trained


# ---- a contestant: one process, told over a pipe what to do ---------------------------------------------------------


def worker(spec: dict) -> None:
    """Answer JSON lines with JSON lines: {"steps": n} trains n steps; the end of the input asks for the summary."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not end up among the answers

    def answer(**values) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        {"prepare": prepare, "rates": rates}.get(spec["who"], contestant)(spec, answer)
    except Exception as error:
        traceback.print_exc()
        answer(error=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}")


def prepare(spec: dict, answer) -> None:
    """Write the initial weights that every contestant loads, and count a step's FLOPs."""
    import torch

    from llmkit.models import CONFIGS, build_model
    from llmkit.models.folder import save_model
    from llmkit.peft import lora
    from llmkit.plan import flops_per_token

    options = spec["config"] | {"max_position_embeddings": spec["seq_len"]}
    model = build_model(CONFIGS[spec["family"]](**options), seed=0)
    folder = Path(spec["folder"])
    save_model(model, folder / "base", dtype=torch.bfloat16 if spec["lora"] else torch.float32)
    total = sum(p.numel() for p in model.parameters())
    if spec["lora"]:
        lora.apply(model, r=16, alpha=32.0)
        lora.save_adapter(model, folder / "adapter", base=str(folder / "base"), base_sha256="")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    answer(parameters=total, trained=trained, flops_per_token=flops_per_token(model, spec["seq_len"]))


def rates(spec: dict, answer) -> None:
    """What the machine can do now: the rate of plain matrix products, and the peak that MFU is a share of."""
    import torch

    from llmkit.parallel import DTYPES, device_name, matmul_rate, peak_flops

    device = torch.device(spec["device"])
    measured = {precision: matmul_rate(device, DTYPES[precision], seconds=1.0) for precision in ("bf16", "fp32")}
    _, source = peak_flops(device, "bf16")
    known = None if device.type == "cpu" or "data sheet" not in source else peak_flops(device, "bf16")[0]
    machine = device_name(device)
    if device.type == "cuda":
        machine += f", {torch.get_num_threads()} CPU threads"
    answer(measured=measured, peak=known, machine=machine)


def contestant(spec: dict, answer) -> None:
    import torch

    from llmkit.parallel import keep_freed_memory, peak_memory, start_world, to_device

    device = torch.device(spec["device"])
    if spec["who"] == "llmkit":
        device = start_world().device
    elif spec["same_malloc"] and device.type == "cpu":
        keep_freed_memory()
    batches = make_batches(spec)
    step = (our_step if spec["who"] == "llmkit" else their_step)(spec, device)
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    losses = []

    def run(steps: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(steps):
            losses.append(step(to_device(batches[len(losses) % BATCHES], device)))
        wait()
        return (time.perf_counter() - start) / steps

    first = run(1)
    warm = [run(1) for _ in range(WARM_UP - 1)]
    gc.collect()
    gc.freeze()
    gc.disable()  # as llmkit's loop does, for everybody
    answer(ready=True)
    for line in sys.stdin:
        asked = json.loads(line)["steps"]
        # On a CPU every step is a measurement; on a GPU a visit is one, because waiting after each step would cost.
        answer(seconds=[run(1) for _ in range(asked)] if device.type == "cpu" else [run(asked)])
    answer(
        losses=[losses[0].item(), losses[-1].item()], steps=len(losses), memory=peak_memory(device),
        compile_seconds=first - min(warm) if spec["compile"] else None,
    )  # fmt: skip


def make_batches(spec: dict) -> list:
    """The same tokens for everybody: half noise, half a rule that a few steps can begin to learn."""
    import numpy as np

    from llmkit.types import Batch

    rng = np.random.default_rng(0)
    made = []
    for _ in range(BATCHES):
        tokens = rng.integers(spec["config"]["vocab_size"], size=(spec["rows"], spec["seq_len"] + 1))
        follows = rng.random(tokens[:, 1:].shape) < 0.5
        tokens[:, 1:] = np.where(follows, (tokens[:, :-1] * 7 + 3) % 257, tokens[:, 1:])
        made.append(Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy()))
    return made


def our_step(spec: dict, device):
    """One step, call by call what `llmkit.train.train` does between two batches."""
    import torch

    from llmkit.models.folder import load_model
    from llmkit.objectives import OBJECTIVES
    from llmkit.optim import OPTIMIZERS, clip
    from llmkit.parallel import DTYPES, apply_checkpointing, autocast, compile_blocks
    from llmkit.peft import lora

    precision, folder = spec["precision"], Path(spec["folder"])
    model = load_model(folder / "base", device=device, dtype=DTYPES[precision] if spec["lora"] else torch.float32)
    if spec["lora"]:
        lora.load_adapter(model, folder / "adapter")
    apply_checkpointing(model, "none")
    compile_blocks(model, "auto" if spec["compile"] else False, device)
    optimizers = OPTIMIZERS["adamw"](model)
    objective = OBJECTIVES["lm"]
    trained = [p for p in model.parameters() if p.requires_grad]
    scale = torch.ones((), device=device)
    targets = spec["rows"] * spec["seq_len"]

    def step(batch: dict):
        with autocast(device, precision):
            loss, _ = objective(model, batch)
        (loss * (scale / targets)).backward()
        _, found_inf = clip(trained, 1.0, scale)
        for optimizer in optimizers:
            optimizer.found_inf = found_inf
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach() / targets

    return step


def their_step(spec: dict, device):
    """A step of transformers' model, with the usual loop around it and the same AdamW."""
    import torch
    import transformers

    from llmkit.optim import OPTIMIZERS

    folder = Path(spec["folder"])
    dtype = torch.bfloat16 if spec["lora"] else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "base", dtype=dtype, attn_implementation="sdpa", use_cache=False
    ).to(device)
    if spec["who"] == "peft":
        import peft

        model = peft.PeftModel.from_pretrained(
            model, folder / "adapter", is_trainable=True, autocast_adapter_dtype=spec["fp32_adapters"]
        )
        wanted = torch.float32 if spec["fp32_adapters"] else torch.bfloat16
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {wanted}
    model.train()
    optimizers = OPTIMIZERS["adamw"](model)
    trained = [p for p in model.parameters() if p.requires_grad]
    forward = torch.compile(model, dynamic=False) if spec["compile"] else model
    cast = spec["precision"] == "bf16" and not spec["lora"]  # a bf16 base needs no autocast

    def step(batch: dict):
        labels = batch["labels"]
        with torch.autocast(device.type, torch.bfloat16, enabled=cast):
            # transformers shifts `labels` itself; `shift_labels` says that these are shifted already
            loss = forward(input_ids=batch["input_ids"], labels=labels, shift_labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


# ---- the parent: sessions, ratios, the table ------------------------------------------------------------------------


class Process:
    """A contestant's process; the first error ends what can be asked of it."""

    def __init__(self, spec: dict, folder: Path):
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if spec["device"] == "cpu" else {}
        # A compiler cache of this run alone, so that the first session's compile time is a cold one.
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "HF_HUB_OFFLINE": "1", **hidden}
        self.log = tempfile.TemporaryFile("w+", dir=folder)
        self.error: str | None = None
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps(spec)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=env,
        )  # fmt: skip

    def read(self) -> dict:
        """The next answer; empty after an error."""
        if self.error:
            return {}
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"died with exit status {self.process.wait()}"}
        self.error = answer.get("error")
        return {} if self.error else answer

    def ask(self, **values) -> dict:
        with contextlib.suppress(BrokenPipeError):  # a dead process: `read` says so
            if not self.error:
                print(json.dumps(values), file=self.process.stdin, flush=True)
        return self.read()

    def finish(self) -> dict:
        """The process's last answer; its output is shown when it failed."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        answer = self.read()
        self.process.wait()
        if self.error:
            self.log.seek(0)
            print(self.log.read()[-2000:], file=sys.stderr)
        self.log.close()
        return answer


def ask_once(spec: dict, folder: Path) -> dict:
    process = Process(spec, folder)
    answer = process.finish()
    if process.error:
        sys.exit(f"{spec['who']}: {process.error}")
    return answer


def session(specs: list[dict], folder: Path, rounds: int, steps: int) -> list[dict]:
    """The contestants' results; they begin one after the other and then take turns: A B, B A, A B, ..."""
    processes, seconds = [], [[] for _ in specs]
    for spec in specs:
        processes.append(Process(spec, folder))
        processes[-1].read()
    for turn in range(rounds):
        for i in range(len(specs)) if turn % 2 == 0 else reversed(range(len(specs))):
            seconds[i] += processes[i].ask(steps=steps).get("seconds", [])
    ends = [process.finish() for process in processes]
    return [
        {"name": spec["name"], "error": process.error} if process.error else
        {"name": spec["name"], "precision": spec["precision"], "seconds": times, **end}
        for spec, process, times, end in zip(specs, processes, seconds, ends, strict=True)
    ]  # fmt: skip


def compare(shape: tuple[str, str, dict, int, int], peers: list[dict], args, folder: Path, measured: list) -> dict:
    """Every peer's session with llmkit on one shape. Rates of the machine, taken before each, go to `measured`."""
    name, family, config, seq_len, rows = shape
    folder = folder / name.replace(" ", "-")
    folder.mkdir()
    common = {
        "device": args.device, "family": family, "config": config, "seq_len": seq_len, "rows": rows,
        "lora": peers is LORA_PEERS, "folder": str(folder), "same_malloc": args.same_malloc,
    }  # fmt: skip
    about = ask_once(common | {"who": "prepare"}, folder)
    ours, theirs, waiting = [], [], list(peers)
    while waiting:
        peer = waiting.pop(0)
        print(f"{name}: {peer['name']} ...", file=sys.stderr, flush=True)
        measured.append(ask_once(common | {"who": "rates"}, folder))
        first, second = session([common | OURS, common | peer], folder, args.rounds, args.steps)
        ours.append(first)
        theirs.append(second)
        if "seconds" in first and "seconds" in second:
            second["ratio"] = statistics.median(second["seconds"]) / statistics.median(first["seconds"])
        alive = [result for result in theirs if "seconds" in result]
        if peers is LORA_PEERS and not waiting and not peer["compile"] and alive:  # the fastest once more, compiled
            fastest = min(alive, key=lambda result: statistics.median(result["seconds"]))["name"]
            best = next(peer for peer in peers if peer["name"] == fastest)
            waiting.append(best | {"name": f"{fastest}, compiled", "compile": True})
    good = [result for result in ours if "seconds" in result]
    pooled = ours[0]
    if good:
        pooled = good[0] | {
            "seconds": [second for result in good for second in result["seconds"]],
            "memory": max(result["memory"] for result in good),
            "compile_seconds": max(result["compile_seconds"] for result in good),  # the first is the cold one
        }
    about |= {"lora": common["lora"], "tokens_per_step": seq_len * rows, "seq_len": seq_len, "rows": rows}
    return {"shape": name, **about, "contestants": [pooled, *theirs], "sessions_of_ours": ours}


def table(result: dict, rate: dict[str, float], peak: float) -> str:
    """A shape's results in Markdown."""
    formula = "4 N + 6 N_lora + 12 L h T" if result["lora"] else "6 N + 12 L h T"
    lines = [
        f"### {result['shape']}: {result['parameters'] / 1e6:.1f}M parameters, {result['trained'] / 1e6:.1f}M trained, "
        f"{result['rows']} x {result['seq_len']} tokens a step, "
        f"{result['flops_per_token'] / 1e9:.3f} GFLOP a token ({formula})",
        "",
        "| contestant | tokens/s, median (min-max) | llmkit / it | MFU | share of its matrix rate | peak memory "
        "| loss, first, last step | compilation |",
        "|---|---|---|---|---|---|---|---|",
    ]
    expected = result["contestants"][0].get("losses", [None])[0]
    for one in result["contestants"]:
        if "error" in one:
            lines.append(f"| {one['name']} | failed: {one['error'][:200].replace('|', '/')} | | | | | | |")
            continue
        tokens = result["tokens_per_step"]
        speed = tokens / statistics.median(one["seconds"])
        flops = speed * result["flops_per_token"]
        first, last = one["losses"]
        parity = "" if expected is None or abs(first - expected) <= PARITY else f" (NOT within {PARITY} of llmkit)"
        ratio = f"{one['ratio']:.2f}x" if "ratio" in one else ""
        compilation = "" if one["compile_seconds"] is None else f"{one['compile_seconds']:.0f} s"
        lines.append(
            f"| {one['name']} | {speed:.0f} ({tokens / max(one['seconds']):.0f}-{tokens / min(one['seconds']):.0f}) "
            f"| {ratio} | {flops / peak:.0%} | {flops / rate[one['precision']]:.0%} | {one['memory'] / 2**20:.0f} MiB "
            f"| {first:.4f}{parity}, {last:.4f} | {compilation} |"
        )
    return "\n".join(lines)


def installed(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} not installed"


def has_cuda() -> bool:
    """Asked in a process of its own: see the imports."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code]).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--shape", choices=["small", "lora", "all"], default="all")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contestant in a session (3)")
    parser.add_argument("--steps", type=int, default=4, help="steps a turn (4)")
    parser.add_argument(
        "--same-malloc", action="store_true",
        help="on a CPU llmkit tells glibc to keep freed memory (parallel.keep_freed_memory); let the peers do so too",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    args = parser.parse_args()
    args.device = args.device or ("cuda" if has_cuda() else "cpu")

    measured: list[dict] = []
    results = []
    with tempfile.TemporaryDirectory(prefix="llmkit-bench-") as folder:
        for kind, shapes in SHAPES[args.device].items():
            if args.shape in (kind, "all"):
                for name, shape in shapes.items():
                    peers = LORA_PEERS if kind == "lora" else PEERS
                    results.append(compare((name, *shape), peers, args, Path(folder), measured))

    rate = {key: statistics.median(one["measured"][key] for one in measured) for key in ("bf16", "fp32")}
    peak = measured[0]["peak"] or rate["bf16"]
    spread = {key: [one["measured"][key] / 1e12 for one in measured] for key in rate}
    packages = ", ".join(installed(name) for name in ("torch", "transformers", "peft"))
    rates_line = ", ".join(
        f"{key} {rate[key] / 1e12:.3g} ({min(spread[key]):.3g}-{max(spread[key]):.3g})" for key in rate
    )
    malloc = "kept by llmkit and by the peers" if args.same_malloc else "kept by llmkit, glibc's default for the peers"
    header = [
        f"{measured[0]['machine']}; {packages}; {datetime.date.today()}; {args.rounds} turns of {args.steps} steps",
        f"Matrix products, TFLOP/s: {rates_line}. MFU is against "
        + (f"the data sheet's {peak / 1e12:.4g} in bf16." if measured[0]["peak"] else "the measured bf16 rate.")
        + (f" Freed memory: {malloc}." if args.device == "cpu" else ""),
    ]
    print("\n".join([*header, *(f"\n{table(result, rate, peak)}" for result in results)]))
    if args.json:
        record = {"header": header, "rate": rate, "peak": peak, "options": vars(args), "results": results}
        args.json.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--worker":
        worker(json.loads(sys.argv[2]))
    else:
        main()
