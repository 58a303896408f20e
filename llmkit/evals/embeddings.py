"""Embed texts as vectors, and find what lies near a text, or near a word in a model's embedding."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from llmkit.errors import DataError, UserError
from llmkit.evals.predict import CHUNK, run_by_length
from llmkit.files import open_atomically
from llmkit.models.heads import hidden_states, pool
from llmkit.parallel.device import autocast
from llmkit.records.labelled import make_encoder
from llmkit.tokenizer.tokenizer import Tokenizer

POOLINGS = {"causal": ("mean", "last"), "masked": ("mean", "cls"), "seq2seq": ("mean",)}  # by kind; the first: default


def embed(
    model: nn.Module, tokenizer: Tokenizer, texts: list[str], *, pooling: str | None = None, precision: str = "fp32"
) -> tuple[np.ndarray, int]:
    """Return a vector for each text, fp32 (N, hidden), and how many texts were cut to the model's longest position.

    pooling  of the states of the last block: their mean, that of the last token, or of the first (cls, an encoder's);
             None: the mean. Raise UserError for one that does not fit the model
    """
    known, longest = POOLINGS[model.config.kind], model.config.max_position_embeddings
    pooling = pooling or known[0]
    if pooling not in known:
        expected = " or ".join(known)
        raise UserError(f"--pooling does not fit {model.config.model_type}", got=pooling, expected=expected)
    encode, coded, cut = make_encoder(tokenizer, longest), [], 0
    for start in range(0, len(texts), CHUNK):
        for number, one in enumerate(encode([(text,) for text in texts[start : start + CHUNK]]), start + 1):
            if not one.ids:
                raise DataError("a text has no token", got=f"text {number}")
            coded.append(np.array(one.ids, np.int32))
            cut += bool(one.overflowing)

    def compute(input_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return pool(hidden_states(model, input_ids, lengths).float(), pooling, lengths)

    device = next(model.parameters()).device
    with autocast(device, precision):
        rows = run_by_length(coded, tokenizer.pad_id, device, compute, types=False, most=longest)
    return np.stack(rows).astype(np.float32), cut


def nearest(vectors: np.ndarray, query: np.ndarray, number: int) -> list[tuple[int, float]]:
    """Return (row, cosine similarity) of the vectors (N, D) that are nearest to one (D,), the nearest first."""
    norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(query)
    similarity = vectors @ query / np.maximum(norms, np.finfo(np.float32).tiny)
    return [(int(i), float(similarity[i])) for i in np.argsort(-similarity, kind="stable")[:number]]


def vector_files(out: Path) -> list[Path]:
    """Return the files that `write_vectors` writes."""
    return [out.with_name(out.name + end) for end in (".npy", ".jsonl")]


def write_vectors(out: Path, texts: list[str], vectors: np.ndarray) -> list[Path]:
    """Write OUT.npy, fp32 (N, hidden), and OUT.jsonl with a text and its vector on each line."""
    paths = vector_files(out)
    with open_atomically(paths[0]) as file:
        np.save(file, vectors, allow_pickle=False)
    with open_atomically(paths[1]) as file:
        for text, vector in zip(texts, vectors, strict=True):
            row = {"text": text, "vector": [float(f"{value:.7g}") for value in vector.tolist()]}
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    return paths


@torch.no_grad()
def nearest_tokens(model: nn.Module, tokenizer: Tokenizer, word: str, number: int) -> dict[str, Any]:
    """Return the tokens whose rows of a model's embedding are nearest to a word's.

    The word is a token as it is, or with the space before it that it has inside a text; of a word of several tokens,
    the mean of their rows counts.
    """
    spellings = [tokenizer.encode_continuation(f" {word}"), tokenizer.encode(word), tokenizer.encode_continuation(word)]
    ids = next((one for one in spellings if len(one) == 1), spellings[0]) or spellings[1]
    if not ids:
        raise UserError("the word has no token", got=repr(word))
    table = model.wte.weight.float().cpu().numpy()[: len(tokenizer)]
    found = nearest(table, table[ids].mean(0), number + len(ids))
    rows = [
        {"token": tokenizer.decode([i]), "id": i, "similarity": round(value, 4)} for i, value in found if i not in ids
    ]
    return {"word": [tokenizer.decode([i]) for i in ids], "nearest": rows[:number]}
