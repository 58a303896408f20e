"""Compare training speed with transformers, peft and litgpt: same shapes, weights, tokens and optimizer.

    python scripts/bench.py                                  # every shape, on the GPU if there is one
    python scripts/bench.py --shape lora --rounds 5 --json out.json
    python scripts/bench.py --shape lora --targets 0.2       # a fifth of the tokens, as in instruction data
    pip install litgpt && python scripts/bench.py            # litgpt too, on the shapes that it has

Every contestant is a process of its own. Each peer is measured in a session with llmkit: both processes stay alive and
take turns (llmkit, peer, peer, llmkit, ...), so that other load on the machine affects both. Each ratio comes from one
session. Only two processes are alive at a time, because more would slow each other down. A contestant that fails is a
row with its error.

Where the time goes. A step of GPT-2 6 x 384 on two cores with avx512_bf16 (1.21 s, 69 % of the matrix rate, profiled
2026-11-27): products of weights 72 % of the time, products of attention 8 %, softmax, norms, activations and their
gradients 15 %, copies and casts 2 %, the optimizer and clipping 1 %. If all but products took no time, 86 % of the rate
would be reached. Products alone, GFLOP/s of 444: forward 423 to 443, gradients of inputs 417 to 446, gradients of
weights 356 to 419, the head with 8192 tokens 324 (64 MB of logits), 408 and 402.

What was tried to train faster, with the ratio of tokens/s that it gave:

    x1.6   kept: bf16 products under autocast
    x1.06 to x1.2  kept: blocks and loss compiled one by one
    x1.10  kept: attention as products for one block of queries after another, and a fused softmax, instead of SDPA
    x1.07  kept: 96 MiB of logits at a time for GPT-2 124M, not 32
    x1.03  kept: tanh of GELU by exp in compiled blocks
    x1.07  tcmalloc preloaded; instead the C library is told to keep freed memory. jemalloc x0.66
    x1.00  fused AdamW
    less   huge pages and mmap thresholds of 8 and 32 MiB: 3 to 40 % slower, or a tenth larger
    --     products alone: gradients of weights as (x^T d)^T instead of d^T x: 356 to 419 against 362 to 419 GFLOP/s;
           from a transposed copy of d: 383 to 434, but the copy takes longer than that saves
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import numpy as np
import torch

from llmkit.models import CONFIGS, build_model
from llmkit.models.folder import load_model, save_model
from llmkit.objectives.lm import sum_of_losses
from llmkit.parallel.compile import apply_checkpointing, compile_blocks, compile_obstacle
from llmkit.parallel.device import (
    DTYPES,
    autocast,
    choose_precision,
    device_name,
    matmul_rate,
    peak_flops,
    to_device,
)
from llmkit.parallel.memory import keep_freed_memory, peak_memory
from llmkit.parallel.world import start_world
from llmkit.peft import lora
from llmkit.peft.adapter import load_adapter, save_adapter
from llmkit.training.cost import Lengths, flops_per_row
from llmkit.training.optim import OPTIMIZERS, clip
from llmkit.types import IGNORE_INDEX, Batch


def shape(hidden: int, layers: int, heads: int, vocab: int, **more: int) -> dict[str, int]:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": vocab}
    return sizes | more


LORA_CPU = shape(768, 12, 12, 32000, num_key_value_heads=4, intermediate_size=2048)
LORA_CUDA = shape(2048, 16, 32, 32000, num_key_value_heads=8, intermediate_size=8192)
# (device, --shape) -> rows of (name, family, config, tokens per row, rows per step)
SHAPES = {
    ("cpu", "small"): [
        ("GPT-2 6 x 384", "gpt2", shape(384, 6, 6, 8192), 256, 16),
        ("Llama 6 x 384", "llama", shape(384, 6, 6, 8192, intermediate_size=1024), 256, 16),
    ],
    ("cpu", "medium"): [("GPT-2 124M", "gpt2", shape(768, 12, 12, 50257), 512, 4)],
    ("cpu", "lora"): [("LoRA on Llama 12 x 768", "llama", LORA_CPU, 512, 4)],
    ("cpu", "qlora"): [("QLoRA on Llama 12 x 768", "llama", LORA_CPU, 512, 4)],  # beside bitsandbytes
    ("cuda", "small"): [
        ("GPT-2 124M", "gpt2", shape(768, 12, 12, 50257), 1024, 16),
        ("Llama 12 x 768", "llama", shape(768, 12, 12, 32000, intermediate_size=2048), 1024, 16),
    ],
    ("cuda", "lora"): [("LoRA on Llama 16 x 2048", "llama", LORA_CUDA, 2048, 4)],
}


def list_contestants(precision: str, is_lora: bool, family: str) -> tuple[dict, list[dict]]:
    """Return llmkit and its peers: in each precision that they have, as they are and compiled."""
    shared = {"precision": precision, "compile": False}
    words = f"{precision} autocast" if precision != "fp32" and not is_lora else precision
    ours = shared | {"name": f"llmkit, {words}, compiled", "who": "llmkit", "compile": True}
    litgpt = shared | {"name": f"litgpt, {words}", "who": "litgpt"}
    if is_lora:
        peft = shared | {"name": f"peft, {words}, fp32 adapters", "who": "transformers", "fp32_adapters": True}
        peers = [peft]  # by default peft makes adapters fp32
        if precision != "fp32":
            peers.append(peft | {"name": f"peft, {words}, {precision} adapters", "fp32_adapters": False})
        peers.append(litgpt)  # whose fine-tuning does not compile
    else:
        plain = shared | {"name": f"transformers, {words}", "who": "transformers"}
        peers = [plain, plain | {"name": f"{plain['name']}, compiled", "compile": True}]
        if precision != "fp32":
            peers.append(plain | {"name": "transformers, fp32", "precision": "fp32"})
        peers.append(litgpt | {"name": f"{litgpt['name']}, compiled", "compile": True})
    has_litgpt = family == "llama" and importlib.util.find_spec("litgpt") is not None
    return ours, [peer for peer in peers if peer["who"] != "litgpt" or has_litgpt]


WARM_UP = 3  # steps that are not measured: compilation, the optimizer's state, then a normal one
BATCHES = 4  # different batches, made before the measurement and used in turn
PARITY = 2e-3  # a larger difference of the first losses means that the models are not the same


# ---- a contestant: one process, controlled over a pipe --------------------------------------------------------------


def worker(spec: dict) -> None:
    """Answer JSON lines with JSON lines: {"steps": n} trains n steps, the end of the input asks for the summary."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps the output of libraries out of the answers

    def answer(**values) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        (write_weights if spec["who"] == "weights" else run_contestant)(spec, answer)
    except Exception as error:
        traceback.print_exc()
        answer(error=f"{type(error).__name__}: {error}")


def write_weights(spec: dict, answer) -> None:
    """Write the initial weights that every contestant loads. The parent's own peak memory must stay small."""
    model = build_model(CONFIGS[spec["family"]](**spec["config"]), seed=0)
    folder = Path(spec["folder"])
    save_model(model, folder / "base", dtype=DTYPES[spec["precision"]] if spec["lora"] else torch.float32)
    if spec["lora"]:
        lora.apply(model, lora.Options(r=16, alpha=32.0))
        save_adapter(model, folder / "adapter", "lora", lora.Options(), base=str(folder / "base"), base_sha256="")
    answer(written=True)


def run_contestant(spec: dict, answer) -> None:
    """Warm up, train as many steps as each line of standard input asks for, then answer with the summary."""
    device = torch.device(spec["device"])
    if spec["who"] == "llmkit":
        device = start_world().device
    elif spec["same_malloc"] and device.type == "cpu":
        keep_freed_memory()
    batches = make_batches(spec)
    step = BUILD[spec["who"]](spec, device)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    losses = []

    def run(steps: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            losses.append(step(to_device(batches[len(losses) % BATCHES], device)))
        synchronize()
        return (time.perf_counter() - start) / steps

    warm_up = [run(1) for _ in range(WARM_UP)]
    gc.collect()
    gc.freeze()
    gc.disable()  # as llmkit's training loop does, here for every contestant
    answer(ready=True)
    for line in sys.stdin:
        steps = json.loads(line)["steps"]
        # On a GPU a whole turn is one measurement, because synchronizing after each step costs time.
        answer(seconds=[run(1) for _ in range(steps)] if device.type == "cpu" else [run(steps)])
    answer(
        losses=[losses[0].item(), losses[-1].item()],
        memory=peak_memory(device),
        compile_seconds=warm_up[0] - warm_up[-1] if spec["compile"] else None,
    )


def make_batches(spec: dict) -> list[Batch]:
    """Return the same batches for every contestant: half noise, half a rule that a few steps can begin to learn."""
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(BATCHES):
        tokens = rng.integers(spec["config"]["vocab_size"], size=(spec["rows"], spec["seq_len"] + 1))
        follows = rng.random(tokens[:, 1:].shape) < 0.5
        tokens[:, 1:] = np.where(follows, (tokens[:, :-1] * 7 + 3) % 257, tokens[:, 1:])
        labels = tokens[:, 1:].copy()
        labels[:, : spec["seq_len"] - spec["targets"]] = IGNORE_INDEX
        batches.append(Batch(tokens[:, :-1].copy(), labels))
    return batches


def build_our_step(spec: dict, device: torch.device):
    """Return a function that trains on a batch with the same calls as `llmkit.training.loop.train`."""
    precision, folder = spec["precision"], Path(spec["folder"])
    options = {"quantize": ("nf4", {}) if spec["quantized"] else None}
    dtype = DTYPES[precision] if spec["lora"] else torch.float32
    model = load_model(folder / "base", device=device, dtype=dtype, **options)
    if spec["lora"]:
        load_adapter(model, folder / "adapter")
    apply_checkpointing(model, "none")
    if spec["compile"] and not compile_obstacle(model, device, precision):
        compile_blocks(model, device, precision)
    optimizers = OPTIMIZERS["adamw"](model)
    trained = [p for p in model.parameters() if p.requires_grad]
    scale, targets = torch.ones((), device=device), spec["rows"] * spec["targets"]

    def step(batch: dict):
        with autocast(device, precision):
            loss, _ = sum_of_losses(model, batch)
        (loss * (scale / targets)).backward()
        _, found_inf = clip(trained, 1.0, scale)
        for optimizer in optimizers:
            optimizer.found_inf = found_inf
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach() / targets

    return step


def build_peer_step(spec: dict, device: torch.device):
    """Return a function that trains transformers' model on a batch, in the usual way and with the same AdamW."""
    import transformers

    folder, dtype = Path(spec["folder"]), DTYPES[spec["precision"]] if spec["lora"] else torch.float32
    options = {"dtype": dtype, "attn_implementation": "sdpa", "use_cache": False}
    if spec["quantized"]:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", **options).to(device)
    if spec["lora"]:
        import peft

        model = peft.PeftModel.from_pretrained(
            model, folder / "adapter", is_trainable=True, autocast_adapter_dtype=spec["fp32_adapters"]
        )
        expected = torch.float32 if spec["fp32_adapters"] else dtype
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {expected}
    model.train()
    forward = torch.compile(model, dynamic=False) if spec["compile"] else model
    cast = spec["precision"] == "bf16" and not spec["lora"]  # a bf16 base needs no autocast

    def compute_loss(batch: dict) -> torch.Tensor:
        labels = batch["labels"]
        with torch.autocast(device.type, torch.bfloat16, enabled=cast):
            # transformers shifts `labels` itself, unless they are given as `shift_labels`
            return forward(input_ids=batch["input_ids"], labels=labels, shift_labels=labels).loss

    return make_step(model, compute_loss)


def make_step(model: torch.nn.Module, compute_loss):
    """Return a function that trains a peer's model on a batch, in the usual way and with the same AdamW."""
    optimizers = OPTIMIZERS["adamw"](model)
    trained = [p for p in model.parameters() if p.requires_grad]

    def step(batch: dict) -> torch.Tensor:
        loss = compute_loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def build_litgpt_step(spec: dict, device: torch.device):
    """Return a function that trains litgpt's model, as its `pretrain` (bf16-mixed) and `finetune_lora` do."""
    import litgpt
    from litgpt import lora as litgpt_lora
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.utils import chunked_cross_entropy
    from safetensors.torch import load_file

    sizes = spec["config"]
    options = {
        "block_size": sizes["max_position_embeddings"],
        "vocab_size": sizes["vocab_size"],
        "padded_vocab_size": sizes["vocab_size"],
        "n_layer": sizes["num_hidden_layers"],
        "n_head": sizes["num_attention_heads"],
        "n_query_groups": sizes.get("num_key_value_heads", sizes["num_attention_heads"]),
        "n_embd": sizes["hidden_size"],
        "intermediate_size": sizes["intermediate_size"],
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "bias": False,
        "norm_class_name": "RMSNorm",
        "norm_eps": 1e-5,
        "mlp_class_name": "LLaMAMLP",
    }
    package = litgpt_lora if spec["lora"] else litgpt
    if spec["lora"]:
        names = ("query", "key", "value", "projection", "mlp", "head")
        options |= {"lora_r": 16, "lora_alpha": 32} | {f"lora_{name}": name != "head" for name in names}
    config = package.Config(**options)
    dtype = DTYPES[spec["precision"]] if spec["lora"] else torch.float32
    model, weights = package.GPT(config).to(dtype), {}
    hf = {}
    for file in sorted((Path(spec["folder"]) / "base").glob("*.safetensors")):
        hf |= load_file(file)
    copy_weights_hf_llama(config, {}, weights, hf)
    if spec["lora"]:
        weights = {to: weights[name] for name, to in plain_names(model, weights).items()}
        missing, _ = model.load_state_dict(weights, strict=False)
        assert all("lora_" in name for name in missing)
        litgpt_lora.mark_only_lora_as_trainable(model)
    else:
        model.load_state_dict(weights)
    model = model.to(device)
    model.max_seq_length = spec["seq_len"]
    forward = torch.compile(model) if spec["compile"] else model
    head = {"lm_head_chunk_size": 128} if spec["lora"] else {}

    def compute_loss(batch: dict) -> torch.Tensor:
        with autocast(device, "fp32" if spec["lora"] else spec["precision"]):
            return chunked_cross_entropy(forward(batch["input_ids"], **head), batch["labels"])

    return make_step(model, compute_loss)


def plain_names(model: torch.nn.Module, weights: dict) -> dict[str, str]:
    """Return the names of weights in litgpt's GPT -> those in its GPT with LoRA, where linears are inside of others."""
    there = set(model.state_dict())
    inner = {name: f"{name.removesuffix('.weight')}.linear.weight" for name in weights}
    return {name: inner[name] if inner[name] in there else name for name in weights}


BUILD = {"llmkit": build_our_step, "transformers": build_peer_step, "litgpt": build_litgpt_step}


# ---- the parent: sessions and the table -----------------------------------------------------------------------------


class Process:
    """A contestant's process. After its first error it answers nothing more."""

    def __init__(self, spec: dict):
        # A compiler cache for this run alone, so that the first session compiles with a cold cache.
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{spec['folder']}/inductor", "HF_HUB_OFFLINE": "1"}
        if spec["who"] == "llmkit":
            env.setdefault("GOMP_SPINCOUNT", "5000")  # as `llmkit` does
        if spec["device"] == "cpu":
            env["CUDA_VISIBLE_DEVICES"] = ""
        self.error: str | None = None
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=env,
        )

    def read(self) -> dict:
        """Return the next answer, {} after an error."""
        if self.error:
            return {}
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"died with exit status {self.process.wait()}"}
        self.error = answer.get("error")
        return {} if self.error else answer

    def ask(self, **values) -> dict:
        """Send a line and return the answer to it."""
        with contextlib.suppress(BrokenPipeError):  # if the process died, `read` finds out why
            if not self.error:
                print(json.dumps(values), file=self.process.stdin, flush=True)
        return self.read()

    def finish(self) -> dict:
        """End the process and return its last answer. If it failed, print its output."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        answer = self.read()
        self.process.wait()
        if self.error:
            self.log.seek(0)
            print(self.log.read()[-3000:], file=sys.stderr)
        return answer


def run_session(specs: list[dict], rounds: int, steps: int) -> list[dict]:
    """Return the contestants' results. They start one after the other and then take turns: A B, B A, A B, ..."""
    processes = []
    for spec in specs:
        processes.append(Process(spec))
        processes[-1].read()
    turns = [[] for _ in specs]
    for turn in range(rounds):
        order = range(len(specs))
        for i in order if turn % 2 == 0 else reversed(order):
            turns[i].append(processes[i].ask(steps=steps).get("seconds"))
    results = []
    for spec, process, seconds in zip(specs, processes, turns, strict=True):
        summary = process.finish()
        result = {"precision": spec["precision"], "turns": seconds, **summary}
        results.append({"name": spec["name"], **({"error": process.error} if process.error else result)})
    return results


def flatten_steps(result: dict) -> list[float]:
    """Return the seconds of every measured step."""
    return [second for turn in result["turns"] for second in turn]


def compare(row: tuple, args: argparse.Namespace, folder: Path, measure_rates) -> dict:
    """Run a session of every peer with llmkit on one shape, and measure the machine's rates before each session."""
    name, family, config, seq_len, rows = row
    is_lora, is_quantized = "LoRA" in name, name.startswith("QLoRA")
    common = {
        "device": args.device,
        "same_malloc": args.same_malloc,
        "family": family,
        "seq_len": seq_len,
        "rows": rows,
        "targets": round(args.targets * seq_len),
        "config": config | {"max_position_embeddings": seq_len},
        "lora": is_lora,
        "quantized": is_quantized,
        "folder": str(folder),
    }
    preparation = Process(common | {"who": "weights", "precision": args.precision})
    preparation.finish()
    if preparation.error:
        sys.exit(f"the initial weights can't be written: {preparation.error}")
    model = build_model(CONFIGS[family](**common["config"]), device="meta", seed=None)
    parameters = sum(p.numel() for p in model.parameters())
    if is_lora:
        lora.apply(model, lora.Options(r=16))
    us, peers = list_contestants(args.precision, is_lora, family)
    peers = [peer for peer in peers if not is_quantized or peer["who"] == "transformers"]
    ours, theirs, number = [], [], len(peers)
    for peer in peers:  # the loop appends to it
        print(f"{name}: {peer['name']} ...", file=sys.stderr, flush=True)
        measure_rates()
        first, second = run_session([common | us, common | peer], args.rounds, args.steps)
        ours.append(first)
        theirs.append(second)
        if "turns" in first and "turns" in second:
            pairs = zip(first["turns"], second["turns"], strict=True)
            second["ratio"] = median(median(b) / median(a) for a, b in pairs)
        done = [
            (median(flatten_steps(one)), spec)
            for one, spec in zip(theirs, peers, strict=False)
            if "turns" in one and spec["who"] == "transformers"
        ]
        if is_lora and len(theirs) == number and done:  # measure the fastest again, compiled
            fastest = min(done, key=lambda pair: pair[0])[1]
            peers.append(fastest | {"name": f"{fastest['name']}, compiled", "compile": True})
    done = [result for result in ours if "turns" in result]
    if done:
        merged = done[0] | {"turns": [turn for result in done for turn in result["turns"]]}
        for key in ("memory", "compile_seconds"):  # the first compilation has a cold cache and takes longest
            merged[key] = max(result[key] for result in done)
        ours = [merged]
    return {
        "name": name,
        "lora": is_lora,
        "parameters": parameters,
        "flops_per_token": flops_per_row(model, Lengths(seq_len)) / seq_len,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seq_len": seq_len,
        "rows": rows,
        "targets": common["targets"],
        "contestants": [ours[0], *theirs],
    }


def format_table(result: dict, rates: dict[str, float], peak: float) -> str:
    """Return the results for one shape as a Markdown table."""
    tokens = result["rows"] * result["seq_len"]
    formula = "4 N + 6 N_lora + 12 L h T" if result["lora"] else "6 N + 12 L h T"
    lines = [
        f"\n### {result['name']}\n\n{result['parameters'] / 1e6:.1f}M parameters, {result['trained'] / 1e6:.1f}M "
        f"trained. A step has {result['rows']} rows of {result['seq_len']} tokens, {result['targets']} targets. "
        f"A token takes {result['flops_per_token'] / 1e9:.3f} GFLOP ({formula}, `training.cost.flops_per_row`).\n",
        "| contestant | tokens/s, median (min-max) | llmkit / it | MFU | share of matrix rate | peak MiB "
        "| loss: first, last step | compiled in |",
        "|---|---|---|---|---|---|---|---|",
    ]
    expected = result["contestants"][0].get("losses", [None])[0]
    for one in result["contestants"]:
        if "error" in one:
            error = " ".join(one["error"].split())[:200].replace("|", "/")
            lines.append(f"| {one['name']} | failed: {error} | | | | | | |")
            continue
        speed, slowest, fastest = (tokens / statistic(flatten_steps(one)) for statistic in (median, max, min))
        flops = speed * result["flops_per_token"]
        first, last = one["losses"]
        parity = "" if expected is None or abs(first - expected) <= PARITY else " (DIFFERS from llmkit's)"
        ratio = f"{one['ratio']:.2f}" if "ratio" in one else ""
        compiled = "" if one["compile_seconds"] is None else f"{one['compile_seconds']:.0f} s"
        lines.append(
            f"| {one['name']} | {speed:.0f} ({slowest:.0f}-{fastest:.0f}) | {ratio} | {flops / peak:.0%} "
            f"| {flops / rates[one['precision']]:.0%} | {one['memory'] / 2**20:.0f} | {first:.4f}{parity}, {last:.4f} "
            f"| {compiled} |"
        )
    return "\n".join(lines)


def package_version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=["small", "medium", "lora", "qlora", "all"], default="all")
    precision_help = "auto: bf16 where the device multiplies it, else fp32"
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto", help=precision_help)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contestant in a session (3)")
    parser.add_argument("--steps", type=int, default=4, help="steps in a turn (4)")
    parser.add_argument("--targets", type=float, default=1.0, help="share of the tokens that have a loss (1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements to a file")
    malloc_help = "let the peers keep freed memory on a CPU, as llmkit does (parallel.device.keep_freed_memory)"
    parser.add_argument("--same-malloc", action="store_true", help=malloc_help)
    args = parser.parse_args()
    device = torch.device(args.device)
    args.precision = choose_precision(args.precision, device)
    if args.precision == "fp16":  # of a GPU without bf16: the steps here have no loss scale
        args.precision = "fp32"
    measured: dict[str, list[float]] = {"bf16": [], "fp32": []}

    def measure_rates() -> None:
        for precision, found in measured.items():
            found.append(matmul_rate(device, DTYPES[precision]))

    results = []
    for (kind, name), rows in SHAPES.items():
        if kind == args.device and args.shape in (name, "all"):
            for row in rows:
                with tempfile.TemporaryDirectory(prefix="llmkit-bench-") as folder:
                    results.append(compare(row, args, Path(folder), measure_rates))

    rates = {precision: max(found) for precision, found in measured.items()}  # other load can only lower them
    at_best = (rates[args.precision], "the best of these")
    peak, source = peak_flops(device, args.precision) if args.device == "cuda" else at_best
    packages = ", ".join(package_version(name) for name in ("torch", "transformers", "peft", "litgpt"))
    threads = f", {torch.get_num_threads()} threads" if args.device == "cuda" else ""  # a CPU's name includes them
    spread = "; ".join(f"{key} {min(all_) / 1e12:.3g}-{max(all_) / 1e12:.3g}" for key, all_ in measured.items())
    malloc = "llmkit's and the peers' processes" if args.same_malloc else "llmkit's processes alone"
    header = [
        f"{device_name(device)}{threads}; {packages}; {datetime.date.today()}; "
        f"{args.rounds} turns of {args.steps} steps per session\n",
        f"Matrix products in TFLOP/s, before each session: {spread}. MFU is relative to {peak / 1e12:.4g} ({source}). "
        + (f"Freed memory is kept in {malloc}." if args.device == "cpu" else ""),
    ]
    print("\n".join(header + [format_table(result, rates, peak) for result in results]))
    if args.json:
        record = {"header": header, "options": vars(args), "rates": measured, "peak": peak, "results": results}
        args.json.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(json.loads(sys.argv[2]))
    else:
        main()
