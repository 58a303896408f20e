"""Keep what an objective compares a model with: the one that training starts from, or what that says of the answers."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from llmkit.data.batches import Batches
from llmkit.data.tokens import save_array
from llmkit.files import file_sha256, write_atomically
from llmkit.objectives.frozen import set_reference
from llmkit.objectives.preference import answer_log_probs
from llmkit.parallel.device import autocast, to_device
from llmkit.training.prepare import PreparedRun
from llmkit.training.state import make_model

KEPT = "reference.json"  # says whose log-probabilities are kept, and has their checksums


def keep_references(run: PreparedRun, say: Callable[[str], None]) -> None:
    """Write SPLIT-reference.npy for each split beside the run's encoded preferences, unless that is done.

    It is for runs that train all weights, or an adapter further: with a new adapter the same model says it without.
    """
    folder = Path(run.config.run_dir) / "data" / run.data.fingerprint
    paths = {split: folder / f"{split}-reference.npy" for split in ("train", "val")}
    if (run.config.peft and not run.adapter) or not run.objective.needs_reference:
        for path in paths.values():  # of an earlier run in this directory
            path.unlink(missing_ok=True)
        return
    about = {"start_sha256": run.start_sha256, "precision": run.precision}
    kept = folder / KEPT
    known = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    if {key: known.get(key) for key in about} == about and all(
        path.is_file() and file_sha256(path) == known.get(path.name) for path in paths.values()
    ):
        return
    say(f"{'reference':>10}  computing what {run.base} says of {run.data.samples['train']} rows, once")
    for path in paths.values():
        path.unlink(missing_ok=True)
    model = make_model(run, None).eval()
    for split, path in paths.items():
        found = log_probs(run, model, run.batches(split, run.micro_batch_size))
        save_array(path, found)
    write_atomically(kept, json.dumps(about | {path.name: file_sha256(path) for path in paths.values()}))


def attach_reference(run: PreparedRun, model: nn.Module) -> None:
    """Give a model the one that it is compared with, unless that is the model without its new adapter.

    The copy of a further adapter shares its base, and was made with the model.
    """
    if run.keeps_copy and not run.adapter:
        set_reference(model, make_model(run, None).eval().requires_grad_(False))
    elif run.adapter and run.objective.needs_reference:
        set_reference(model, None)
    if run.keeps_copy:
        run.start_sha256  # noqa: B018 (of what is in memory now: the files may change until a checkpoint is written)


@torch.no_grad()
def log_probs(run: PreparedRun, model: nn.Module, batches: Batches) -> np.ndarray:
    """Return the log-probabilities (N, 2) of the answers of all trees, in their stored order."""
    device, rows = run.world.device, []
    number = -(-batches.samples // batches.global_batch_size)
    for batch in tqdm(batches.in_order(), total=number, desc="reference", unit="batch", disable=None, leave=False):
        with autocast(device, run.precision):
            sums, lengths, _ = answer_log_probs(model, to_device(batch, device))
        sums, there = (x.view(len(x), -1, 2).cpu().numpy() for x in (sums, lengths))
        rows += [pairs[is_there.any(1)] for pairs, is_there in zip(sums, there > 0, strict=True)]
    return np.concatenate(rows).astype(np.float32)
