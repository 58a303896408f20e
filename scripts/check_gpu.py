"""Check a GPU against the CPU, then measure it: one JSON line for each check, in under ten minutes.

    python scripts/check_gpu.py                        # everything, on the GPU; says "not measured" without one
    python scripts/check_gpu.py --only correctness
    python scripts/check_gpu.py --device cpu --only correctness   # the CPU against itself, to try the script out

Correctness comes first: losses and gradients of small models of every family, plain, packed, recomputed, compiled and
with LoRA, against the CPU in fp32; greedy text; a run repeated bit for bit. A check that fails or breaks is a line with
"ok": false, and the others go on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from llmkit.generation.generate import generate
from llmkit.generation.sampling import Sampling
from llmkit.models import CONFIGS, build_model, family_of
from llmkit.parallel.compile import apply_checkpointing, compile_blocks, compile_obstacle
from llmkit.parallel.device import DTYPES, autocast, device_name, matmul_rate, memory_rate
from llmkit.parallel.memory import total_memory
from llmkit.parallel.world import start_world
from llmkit.peft import lora
from llmkit.training.optim import OPTIMIZERS, clip

SCRIPTS = Path(__file__).parent
SHAPE = {"vocab_size": 1000, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
ROWS, LENGTH = 2, 320  # several blocks of queries
# Kernels of attention depend on the size of a head, and on whether a row fills a block: (what is other, tokens per row)
SHAPES = {
    "head_dim 64": ({"num_attention_heads": 2}, LENGTH),
    "head_dim 128": ({"num_attention_heads": 1}, LENGTH),
    "head_dim 256": ({"hidden_size": 256, "num_attention_heads": 1}, LENGTH),
    "96 tokens": ({}, 96),
    "448 tokens": ({}, 448),  # of which the last 64 fill half a block
}
# Largest difference of the loss per token, and of a gradient relative to its norm. Products of fp32 are not TF32.
TOLERANCES = {"fp32": (1e-4, 1e-3), "bf16": (2e-2, 5e-2)}
VARIANTS = ("plain", "packed", "recomputed", "compiled", "compiled packed", "lora")
ALSO = ("compiled selective", "compiled half", "compiled full")  # recomputed in compiled blocks, one family
Check = Callable[[torch.device], dict[str, Any]]


def small_model(
    family: str, variant: str, device: torch.device, precision: str, shape: str | None = None
) -> torch.nn.Module:
    """Return a small model with the same weights on every device."""
    windows = {"sliding_window": 32} if family in ("mistral", "mixtral") else {}
    other = SHAPES[shape][0] if shape else {}
    config = CONFIGS[family](**SHAPE | windows | other)
    model = build_model(config, seed=0)
    if variant == "lora":
        lora.apply(model, lora.Options(r=4))
        for p in model.parameters():
            if p.requires_grad:
                p.data.normal_(0, 0.02, generator=torch.Generator().manual_seed(p.numel()))
    model = model.to(device)
    mode = {"recomputed": "full", "full": "full", "selective": "selective", "half": 0.5}.get(
        variant.split()[-1], "none"
    )
    apply_checkpointing(model, mode)
    if "compiled" in variant:
        compile_blocks(model, device, precision, mode)
    return model


def loss_and_gradients(
    family: str, variant: str, device: torch.device, precision: str, shape: str | None = None
) -> tuple[float, dict]:
    """Return the loss per token of a small model, and its gradients on the CPU."""
    model = small_model(family, variant, device, precision, shape)
    length = SHAPES[shape][1] if shape else LENGTH
    draw = torch.Generator().manual_seed(1)
    ids, labels = torch.randint(1000, (2, ROWS, length), generator=draw).to(device)
    inputs = {"input_ids": ids, "labels": labels}
    if model.config.kind == "seq2seq":
        inputs["decoder_input_ids"] = ids.flip(1)
    if "packed" in variant:
        columns = torch.arange(length, device=device).expand(ROWS, length)
        inputs |= {"segments": columns // 120, "positions": columns % 120}
    with autocast(device, precision):
        loss = model(**inputs)
    loss.backward()
    grads = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item() / labels.numel(), grads


def equal_to_cpu(
    family: str, variant: str, precision: str, device: torch.device, shape: str | None = None
) -> dict[str, Any]:
    """Compare loss and gradients with those of the plain model on the CPU in fp32."""
    torch._dynamo.reset()  # each check compiles its own blocks
    model_kind = CONFIGS[family](**SHAPE).kind
    if "packed" in variant and model_kind == "seq2seq":
        return {"ok": True, "skipped": "an encoder and a decoder are not packed"}
    plain = next((one for one in ("packed", "lora") if one in variant), "plain")
    if "compiled" in variant and (
        reason := compile_obstacle(small_model(family, "plain", device, precision), device, precision)
    ):
        return {"ok": True, "skipped": reason}
    expected, wanted = loss_and_gradients(family, plain, torch.device("cpu"), "fp32", shape)
    loss, grads = loss_and_gradients(family, variant, device, precision, shape)
    # Relative to its own norm, unless that is next to nothing: the true gradient of keys' biases is 0.
    least = 1e-3 * sum(one.norm() ** 2 for one in wanted.values()) ** 0.5
    off = max(((grads[name] - one).norm() / one.norm().clamp(min=least)).item() for name, one in wanted.items())
    most_loss, most_gradient = TOLERANCES[precision]
    ok = abs(loss - expected) <= most_loss and off <= most_gradient and grads.keys() == wanted.keys()
    return {"ok": ok, "loss": loss, "expected": expected, "gradients_off": off}


def same_text(family: str, device: torch.device) -> dict[str, Any]:
    """Compare greedy text of two ragged prompts with the CPU's, in fp32."""
    prompts, greedy = [[5, 6, 7, 8, 9], [3, 4]], Sampling(temperature=0)
    texts = []
    for one in (torch.device("cpu"), device):
        model = small_model(family, "plain", one, "fp32")
        texts.append(list(generate(model, prompts, max_new_tokens=24, sampling=greedy)))
    return {"ok": texts[0] == texts[1]}


def repeats(device: torch.device) -> dict[str, Any]:
    """Train five steps twice in bf16 with deterministic algorithms, and compare all bits."""
    torch.use_deterministic_algorithms(True)
    runs = []
    for _ in range(2):
        model = small_model("llama", "plain", device, "bf16")
        optimizers = OPTIMIZERS["muon"](model)
        ids = torch.randint(1000, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(2)).to(device)
        for _ in range(5):
            with autocast(device, "bf16"):
                loss = model(ids[:, :-1], ids[:, 1:])
            (loss / ids.numel()).backward()
            _, found_inf = clip(list(model.parameters()), 1.0, torch.ones((), device=device))
            for optimizer in optimizers:
                optimizer.found_inf = found_inf
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        runs.append([p.detach().cpu() for p in model.parameters()])
    torch.use_deterministic_algorithms(False)
    return {"ok": all(torch.equal(a, b) for a, b in zip(*runs, strict=True))}


def rates(device: torch.device) -> dict[str, Any]:
    """Measure the device's ceilings: products in TFLOP/s, reading in GB/s."""
    products = {name: round(matmul_rate(device, dtype) / 1e12, 2) for name, dtype in DTYPES.items()}
    return {"ok": True, "tflops": products, "gb_per_second": round(memory_rate(device) / 1e9)}


def run_script(name: str, *arguments: str) -> Check:
    """Return a check that runs another script of this folder, and keeps what it prints."""

    def check(device: torch.device) -> dict[str, Any]:
        command = [sys.executable, str(SCRIPTS / name), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400)
        return {"ok": done.returncode == 0, "printed": done.stdout.splitlines(), "errors": done.stderr[-500:]}

    return check


def list_checks(device: torch.device) -> Iterator[tuple[str, str, Check]]:
    """Yield (group, name, check), in the order in which they are worth knowing."""
    yield "correctness", "rates", rates
    for precision in ("fp32", "bf16"):
        for family in CONFIGS:
            for variant in VARIANTS:
                yield (
                    "correctness",
                    f"{family}, {variant}, {precision}",
                    lambda device, f=family, v=variant, p=precision: equal_to_cpu(f, v, p, device),
                )
    for variant in ALSO:
        yield (
            "correctness",
            f"llama, {variant}, bf16",
            lambda device, v=variant: equal_to_cpu("llama", v, "bf16", device),
        )
    for family, shape in itertools.product(("llama", "mistral"), SHAPES):
        yield (
            "correctness",
            f"{family}, compiled packed, bf16, {shape}",
            lambda device, f=family, s=shape: equal_to_cpu(f, "compiled packed", "bf16", device, s),
        )
    for family in CONFIGS:
        if family_of(CONFIGS[family](**SHAPE)) and CONFIGS[family](**SHAPE).kind != "masked":
            yield "correctness", f"{family}, greedy text", lambda device, f=family: same_text(f, device)
    yield "correctness", "repeated bit for bit", repeats
    yield "speed", "generation", run_script("bench_generate.py", "--rounds", "3")
    yield "speed", "training", run_script("bench.py", "--device", device.type, "--rounds", "2", "--steps", "10")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--only", choices=["correctness", "speed"])
    parser.add_argument("--families", nargs="*", choices=list(CONFIGS), help="only checks of these families")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print(json.dumps({"check": "gpu", "result": "not measured: there is no GPU"}))
        return
    device = start_world().device if args.device == "cuda" else torch.device("cpu")
    about = {"device": device_name(device), "memory": total_memory(device), "torch": torch.__version__}
    print(json.dumps({"check": "machine", **about}), flush=True)
    failed = 0
    for group, name, check in list_checks(device):
        if args.only not in (None, group) or (args.families and name.partition(",")[0] not in args.families):
            continue
        start = time.perf_counter()
        try:
            result = check(device)
        except Exception as error:
            result = {"ok": False, "error": f"{type(error).__name__}: {error}"[:500]}
        failed += not result["ok"]
        print(json.dumps({"check": name, **result, "seconds": round(time.perf_counter() - start, 2)}), flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
