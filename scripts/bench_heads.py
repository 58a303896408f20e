"""Compare a training step of a head for labels with transformers': same weights, batches, optimizer and precision.

    pip install -e . transformers && python scripts/bench_heads.py
    python scripts/bench_heads.py --steps 60 --rows 32

Both read batches padded to their longest text, as transformers' collator does; llmkit then reads rows of similar
lengths together. Texts have the lengths of short questions (log-normal: median 30, mean 40, at most 256 tokens). Steps
alternate (llmkit, transformers, transformers, llmkit, ...); dropout is 0, so that the losses can be compared too.
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from llmkit.data.labelled import pad_batch
from llmkit.models import CONFIGS, build_model
from llmkit.models.folder import load_model, save_model
from llmkit.models.heads import POOLINGS, HeadConfig
from llmkit.objectives import heads
from llmkit.parallel.device import autocast, choose_precision, device_name, synchronize, to_device

SHAPES = {"bert": {"num_attention_heads": 6}, "llama": {"num_attention_heads": 6, "num_key_value_heads": 6}}
LABELS, LONGEST, VOCAB = ("a", "b", "c", "d"), 256, 8192


def make_batches(number: int, rows: int, device: torch.device) -> list[dict[str, Tensor]]:
    """Return batches of random tokens, padded to their longest text."""
    draw, found = np.random.default_rng(0), []
    for _ in range(number):
        lengths = np.clip(np.exp(draw.normal(np.log(30), 0.75, rows)), 4, LONGEST).astype(int)
        texts = [draw.integers(1, VOCAB, length).astype(np.int32) for length in lengths]
        found.append(
            to_device(pad_batch(texts, draw.integers(len(LABELS), size=rows), 0, types=False, most=LONGEST), device)
        )
    return found


def ours(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return heads.sum_of_losses(model, batch)[0] / len(batch["labels"])


def theirs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    columns = torch.arange(batch["input_ids"].shape[1], device=batch["input_ids"].device)
    mask = (columns < batch["lengths"][:, None]).long()
    return model(input_ids=batch["input_ids"], attention_mask=mask, labels=batch["labels"]).loss


def step(loss_of, model: nn.Module, optimizer: torch.optim.Optimizer, batch, precision: str) -> tuple[float, float]:
    """Take a step, and return its seconds and its loss."""
    device = batch["input_ids"].device
    synchronize(device)
    start = time.perf_counter()
    with autocast(device, precision):
        loss = loss_of(model, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    synchronize(device)
    return time.perf_counter() - start, loss.item()


def compare(name: str, options: argparse.Namespace, device: torch.device, precision: str) -> None:
    """Time both on one shape, and print a line of a table."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 384, "num_hidden_layers": 6, "max_position_embeddings": LONGEST}
    config = CONFIGS[name](**sizes, **SHAPES[name])
    head = HeadConfig("classify", LABELS, POOLINGS[config.kind][0], dropout=0.0)
    with tempfile.TemporaryDirectory() as folder:
        save_model(build_model(config, head=head), Path(folder), pad_token_id=0)
        mine = load_model(Path(folder), device=device, head=head).train()
        other = transformers.AutoModelForSequenceClassification.from_pretrained(folder).to(device).train()
    runs = [(ours, mine), (theirs, other)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True) for _, model in runs]
    batches, times, apart = make_batches(options.steps + 3, options.rows, device), ([], []), 0.0
    for number, batch in enumerate(batches):
        losses = [0.0, 0.0]
        for side in (0, 1) if number % 2 else (1, 0):
            seconds, losses[side] = step(*runs[side], optimizers[side], batch, precision)
            if number >= 3:
                times[side].append(seconds)
        apart = max(apart, abs(losses[0] - losses[1]))
    ratios = sorted(b / a for a, b in zip(*times, strict=True))
    low, high = (ratios[int(len(ratios) * share)] for share in (0.25, 0.75))
    tokens = sum(int(batch["lengths"].sum()) for batch in batches) / sum(b["input_ids"].numel() for b in batches)
    mine_ms, other_ms = (1000 * median(one) for one in times)
    spread = f"{median(ratios):.2f} ({low:.2f} to {high:.2f})"
    print(f"| {name}, 6 x 384 | {mine_ms:.0f} | {other_ms:.0f} | {spread} | {apart:.4f} | {tokens:.0%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=16)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = choose_precision("auto", device)
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    print(f"{device_name(device)}, {precision}, {options.rows} texts, {libraries}, {datetime.date.today()}")
    print("| model | llmkit, ms | transformers, ms | ratio (quartiles) | losses apart at most | of a batch tokens |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in SHAPES:
        compare(name, options, device, precision)


if __name__ == "__main__":
    main()
