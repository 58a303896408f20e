"""Measure what a model gives away of its training text: passages word for word, and whether a passage was in it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from llmkit.data.splits import open_stream, read_manifest
from llmkit.data.tokens import TokenStream
from llmkit.errors import DataError, ModelError
from llmkit.inference.generate import generate
from llmkit.inference.sampling import Sampling
from llmkit.intervals import wilson
from llmkit.parallel.device import autocast, choose_precision
from llmkit.parallel.world import start_world
from llmkit.storage.locate import Located, load_located
from llmkit.storage.run import read_run_config

PROMPT, CONTINUATION = 50, 50  # tokens, as Carlini et al. 2023 have them
LEAST = 0.2  # share of a passage's tokens, the least likely ones, whose mean is Min-K% (Shi et al. 2024)
APART = 10  # tokens between the places where passages may begin
ROWS = 32  # passages read together


def measure_memorization(located: Located, *, passages: int = 200, precision: str = "auto") -> dict[str, Any]:
    """Measure how much of its training text a run's model gives away, beside the same for its val text.

    extracted   share of passages whose next 50 tokens the model writes word for word, greedily, after 50 tokens
                (Carlini et al. 2023, arXiv:2202.07646), with its 95 % interval
    auc         how well Min-K% tells training passages from val passages (Shi et al. 2024, arXiv:2310.16789): 0.5 is
                not at all, 1 is always

    passages  of each split, drawn with a fixed seed
    """
    if located.run_dir is None or (config := read_run_config(located.run_dir))["data"]["kind"] != "corpus":
        what = "memorization is measured on the text of a pretraining run"
        raise ModelError(what, at=located.folder, fix="name a run that was trained on a corpus")
    device = start_world().device
    precision = choose_precision(precision, device)
    model, tokenizer = load_located(located, device=device, dtype=torch.float32)
    if model.config.kind != "causal":
        raise ModelError(f"{model.config.model_type} writes no text")
    size = PROMPT + CONTINUATION
    if (longest := model.config.max_position_embeddings) < size:
        raise ModelError("the model has too few positions for a passage", got=longest, expected=f"at least {size}")
    path = Path(config["data"]["dir"])
    manifest = read_manifest(path)
    if manifest["tokenizer_sha256"] != tokenizer.sha256:
        raise DataError("the data was built anew since this run, with another tokenizer", at=path)
    figures: dict[str, Any] = {"model": str(located.folder), "data": str(path)}
    scores = {}
    with autocast(device, precision):
        for split in ("train", "val"):
            rows = draw_passages(open_stream(path, manifest, split), passages, tokenizer.eos_id)
            if not len(rows):
                raise DataError(f"the {split} split has no passage of {size} tokens", at=path)
            scores[split] = min_k(model, rows)
            right = extracted(model, rows)
            figures[f"{split}_extracted"] = float(right.mean())
            figures[f"{split}_extracted_interval"] = list(wilson(float(right.mean()), len(right)))
            figures[f"{split}_passages"] = len(rows)
    figures["auc"] = auc(scores["train"], scores["val"])
    figures["meaning"] = describe(figures)
    return figures


def draw_passages(stream: TokenStream, number: int, eos_id: int) -> np.ndarray:
    """Draw passages (N, 100) of a stream, which begin at different places and which no end of a document divides."""
    size, draw = PROMPT + CONTINUATION, np.random.default_rng(0)
    starts = np.arange(0, len(stream) - size + 1, APART)
    rows = []
    for start in draw.permutation(starts):
        row = stream.read(int(start), size).astype(np.int64)
        if not (row == eos_id).any():
            rows.append(row)
        if len(rows) == number:
            break
    return np.array(rows).reshape(-1, size)


def extracted(model: nn.Module, rows: np.ndarray) -> np.ndarray:
    """Return for each passage whether the model writes its second half after the first, token for token."""
    found = []
    for start in range(0, len(rows), ROWS):
        part = rows[start : start + ROWS]
        prompts = part[:, :PROMPT].tolist()
        steps = generate(model, prompts, max_new_tokens=CONTINUATION, sampling=Sampling(temperature=0))
        written = np.array(list(steps)).T  # (rows, tokens)
        found.append((written == part[:, PROMPT:]).all(axis=1))
    return np.concatenate(found)


@torch.no_grad()
def min_k(model: nn.Module, rows: np.ndarray) -> np.ndarray:
    """Return for each passage the mean log-probability of its least likely tokens."""
    model.eval()
    device, found = next(model.parameters()).device, []
    for start in range(0, len(rows), ROWS):
        part = torch.from_numpy(rows[start : start + ROWS]).to(device)
        losses = model(part[:, :-1], part[:, 1:], reduction="none")  # (rows, tokens)
        worst = losses.float().topk(int(LEAST * losses.shape[1]), dim=1).values
        found.append(-worst.mean(1).cpu().numpy())
    return np.concatenate(found)


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """Return how often a member's score is higher than another's; equal scores count half.

    >>> auc(np.array([2.0, 3.0]), np.array([1.0, 2.0]))
    0.875
    """
    higher = (members[:, None] > others).mean()
    return float(higher + (members[:, None] == others).mean() / 2)


def describe(figures: dict[str, Any]) -> str:
    """Say in a line what the figures mean."""
    train, val = figures["train_extracted"], figures["val_extracted"]
    low = figures["train_extracted_interval"][0]
    if low > figures["val_extracted_interval"][1]:
        first = f"the model writes {train:.1%} of training passages word for word, and {val:.1%} of val passages"
    else:
        first = f"training passages ({train:.1%}) are not clearly written word for word more often than val ({val:.1%})"
    how = "can't" if figures["auc"] < 0.55 else "can hardly" if figures["auc"] < 0.65 else "can"
    return f"{first}; its probabilities {how} tell which passages it was trained on (AUC {figures['auc']:.2f})"
