"""Measure what a model gives away of its training text: passages word for word, and whether a passage was in it."""

import importlib.util
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from llmkit.corpus.canaries import Canary, draw_secrets
from llmkit.corpus.pii import PII_KINDS, find_pii
from llmkit.data.splits import open_stream, read_manifest
from llmkit.data.tokens import TokenStream
from llmkit.errors import DataError, ModelError
from llmkit.generation.generate import generate
from llmkit.generation.sampling import Sampling
from llmkit.intervals import wilson
from llmkit.parallel.device import autocast, choose_precision
from llmkit.parallel.world import start_world
from llmkit.storage.locate import Located, load_located
from llmkit.storage.run import read_run_config
from llmkit.tokenizer.tokenizer import Tokenizer
from llmkit.types import IGNORE_INDEX

PROMPT, CONTINUATION = 50, 50  # tokens, as Carlini et al. 2023 have them
TEXTS, WRITTEN = 128, 256  # texts that the model writes by itself, and their tokens, to look for personal data in
CANDIDATES, CONTROLS = 1023, 4  # random secrets beside a canary's; canaries that were never planted
CANDIDATE_SEED, CONTROL_SEED = 4321, 8765
EXPOSED = 0.01  # share of the candidates that are likelier than an exposed secret, at the most
LEAST = 0.2  # share of a passage's tokens, the least likely ones, whose mean is Min-K% (Shi et al. 2024)
APART = 10  # tokens between the places where passages may begin
ROWS = 32  # passages read together


def measure_memorization(located: Located, *, passages: int = 200, precision: str = "auto") -> dict[str, Any]:
    """Measure how much of its training text a run's model gives away, beside the same for its val text.

    extracted   share of passages whose next 50 tokens the model writes word for word, greedily, after 50 tokens
                (Carlini et al. 2023, arXiv:2202.07646), with its 95 % interval
    auc         how well Min-K% tells training passages from val passages (Shi et al. 2024, arXiv:2310.16789): 0.5 is
                not at all, 1 is always

    personal_data  pieces of it in texts that the model writes by itself
    canaries    rank and exposure of each planted secret, and of some that were never planted

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
        figures |= count_personal_data(model, tokenizer)
        planted = [Canary(**one) for one in manifest.get("canaries", [])]
        figures["canaries"] = [measure_canary(model, tokenizer, one) for one in with_controls(planted)]
    figures["meaning"] = describe(figures)
    return figures


def with_controls(planted: list[Canary]) -> list[Canary]:
    """Return the canaries of a corpus, and as many that were never planted, up to CONTROLS."""
    number = min(CONTROLS, len(planted))
    known = {canary.secret for canary in planted}
    unknown = [one for one in draw_secrets(number + len(planted), CONTROL_SEED) if one not in known]
    return planted + [Canary(one.prefix, secret, 0) for one, secret in zip(planted[:number], unknown, strict=False)]


@torch.no_grad()
def measure_canary(model: nn.Module, tokenizer: Tokenizer, canary: Canary) -> dict[str, Any]:
    """Return the rank of a canary's secret among random secrets, by the loss of the line, and its exposure in bits.

    Exposure is log2(candidates) - log2(rank) (Carlini et al. 2019, arXiv:1802.08232, section 4.2), here among the
    secret and CANDIDATES random ones: a secret that was never planted has 1.4 bits on average, and 1 % of such secrets
    have over 6.6.
    """
    secrets = [canary.secret, *draw_secrets(CANDIDATES, CANDIDATE_SEED)]
    lines = [np.array(tokenizer.encode_prompt(f"\n{canary.prefix} {secret}"), np.int64) for secret in secrets]
    width, device = max(map(len, lines)), next(model.parameters()).device
    nats = []
    for start in range(0, len(lines), ROWS):
        part = lines[start : start + ROWS]
        ids = np.full((len(part), width), tokenizer.eos_id)
        labels = np.full((len(part), width), IGNORE_INDEX)
        for row, line in enumerate(part):
            ids[row, : len(line)], labels[row, : len(line) - 1] = line, line[1:]
        losses = model(torch.from_numpy(ids).to(device), torch.from_numpy(labels).to(device), reduction="none")
        nats.append(losses.float().sum(1).cpu().numpy())
    values = np.concatenate(nats)
    rank = 1 + int((values[1:] < values[0]).sum())
    exposure = math.log2(len(values)) - math.log2(rank)
    is_exposed = rank <= EXPOSED * len(values)
    return {"planted": canary.repeats, "rank": rank, "of": len(values), "exposure": exposure, "exposed": is_exposed}


def count_personal_data(model: nn.Module, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return how many pieces of personal data of each kind are in texts that a model writes by itself, and the tokens
    of these texts. Whether they are anybody's is not known. Without the extra `pii` none are looked for.
    """
    if importlib.util.find_spec("re2") is None:
        return {"personal_data": "not looked for: pip install 'llmkit[pii]'"}
    start, found, tokens = tokenizer.prefix or [tokenizer.eos_id], Counter(), 0
    length = min(WRITTEN, model.config.max_position_embeddings - len(start))
    options = {"max_new_tokens": length, "stop": frozenset([tokenizer.eos_id])}
    for first in range(0, TEXTS, ROWS):
        prompts = [start] * min(ROWS, TEXTS - first)
        rows: list[list[int]] = [[] for _ in prompts]
        for step in generate(model, prompts, sampling=Sampling(temperature=1.0), seed=first, **options):
            for row, token in zip(rows, step, strict=True):
                row.extend([] if token is None else [token])
        for row in rows:
            tokens += len(row)
            text = tokenizer.decode(row).encode("utf-8", "replace")
            found.update(kind for _, _, kind in find_pii(text, PII_KINDS))
    return {"personal_data": dict(found), "written_tokens": tokens}


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
    said = [f"{first}; its probabilities {how} tell which passages it was trained on (AUC {figures['auc']:.2f})"]
    if "written_tokens" in figures:
        pieces = sum(figures["personal_data"].values())
        said.append(f"{pieces} pieces of personal data in {figures['written_tokens']:,} tokens that it writes freely")
    if planted := [one for one in figures["canaries"] if one["planted"]]:
        exposed = sum(one["exposed"] for one in planted)
        said.append(f"{exposed} of {len(planted)} planted secrets are exposed: likelier than 99 % of random ones")
    return "; ".join(said)
