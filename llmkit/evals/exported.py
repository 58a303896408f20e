"""Compare a model with what was exported of it: its logits, its greedy tokens, its perplexity."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llmkit.errors import DataError, ModelError
from llmkit.evals.reading import run_val_split, windows
from llmkit.formats.gguf import fill_from_gguf
from llmkit.formats.hf import gguf_file
from llmkit.models.folder import load_model
from llmkit.models.hf_config import read_head
from llmkit.storage.locate import Located, load_located, read_located_head
from llmkit.storage.run import read_run_config
from llmkit.tokenizer.tokenizer import Tokenizer
from llmkit.types import Batch

ROWS, LONGEST = 4, 512  # of text that is compared, and the tokens of a row
# How far a logit may be off, as a share of their standard deviation, by the type of the written weights. fp32 is off by
# the order of sums alone, the others by the rounding of weights.
TOLERANCES = {"fp32": 0.001, "fp16": 0.1, "bf16": 0.5, "q8_0": 0.5}


def compare_exported(located: Located, out: Path, format: str, dtype: str) -> dict[str, Any]:
    """Return how an exported folder or GGUF file differs from its MODEL, in fp32: of an adapter, from base and adapter
    apart.

    largest_logit_difference  also as a share_of_deviation: of the standard deviation of all logits
    equal_greedy_tokens       share of the positions at which both have the same likeliest token

    Of a run, the first rows of its val split are read, else tokens at random. Raises ModelError if they differ more
    than merging and rounding explain. The two are in memory one after the other. Of a GGUF file it is the weights that
    are compared: llama.cpp's own computation is not run.
    """
    head = read_located_head(located)
    model, tokenizer = load_located(located, head=head)
    batch, what = rows_to_compare(located, model.config, tokenizer, predicts_tokens=head is None)
    ours = read_logits(model.eval(), batch)
    del model
    if format == "gguf":
        written, _ = load_located(located, merge=True)
        fill_from_gguf(written, gguf_file(out))
        what += ", with the file's weights in llmkit's computation"
    else:
        written = load_model(out, head=head and read_head(out))
    theirs = read_logits(written.eval(), batch)
    apart = ((ours - theirs).abs().max() / ours.std()).item()
    if not apart <= TOLERANCES[dtype]:
        what = "what was exported does not compute what the model does"
        got, expected = f"{apart:.2%} of the logits' deviation", f"at most {TOLERANCES[dtype]:.1%} in {dtype}"
        raise ModelError(what, at=out, got=got, expected=expected, fix="--dtype fp32" if dtype != "fp32" else None)
    found = {
        "compared_on": what,
        "largest_logit_difference": (ours - theirs).abs().max().item(),
        "share_of_deviation": apart,
        "equal_greedy_tokens": (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
    }
    if head is None and batch.count:
        found |= {"perplexity_before": perplexity_of(ours, batch), "perplexity_after": perplexity_of(theirs, batch)}
    return found


def rows_to_compare(located: Located, config: Any, tokenizer: Tokenizer, *, predicts_tokens: bool) -> tuple[Batch, str]:
    """Return a few rows that a model can read, and what they are."""
    length = min(LONGEST, config.max_position_embeddings)
    data = read_run_config(located.run_dir)["data"] if located.run_dir else None
    if data and predicts_tokens and config.kind == "causal" and data["kind"] in ("corpus", "sft", "preference"):
        try:
            tokens, what, _, batches = run_val_split(located.run_dir, data, config, tokenizer, ROWS)
            size = min(length, data["seq_len"])
            batch = next(iter(batches or windows(tokens[: ROWS * size + 1], size, size, ROWS)))
            return cut(batch, length), f"{len(batch.input_ids)} rows of {what}"
        except (DataError, OSError):  # it is not there any more
            pass
    ids = np.random.default_rng(0).integers(config.vocab_size, size=(ROWS, min(length, 64)))
    labels = np.full_like(ids, -100)
    decoder = {"decoder_input_ids": ids} if config.kind == "seq2seq" else {}
    return Batch(ids, labels, **decoder), f"{ids.size} tokens at random: no val split is at hand"


def cut(batch: Batch, length: int) -> Batch:
    """Return the first tokens of the rows of a batch, as far as a model reads them, without what is not read."""
    names = ("input_ids", "labels", "positions", "segments", "branches")
    return Batch(**{name: one[:, :length] for name, one in batch.arrays().items() if name in names})


@torch.no_grad()
def read_logits(model: torch.nn.Module, batch: Batch) -> Tensor:
    """Return a model's logits for the rows of a batch."""
    inputs = {name: torch.from_numpy(one) for name, one in batch.arrays().items() if name != "labels"}
    return model(**inputs).float()


def perplexity_of(logits: Tensor, batch: Batch) -> float:
    """Return the perplexity of the targets of a batch."""
    loss = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch.labels).flatten())
    return math.exp(min(loss.item(), 700))
