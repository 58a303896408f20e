"""Loss, perplexity and bits per byte, weighted by tokens: the same number for every batch size."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from llmkit import checkpoint
from llmkit.checkpoint import Located
from llmkit.corpus.build import read_manifest
from llmkit.data.batches import packed_batches
from llmkit.data.chat import FORMATS, default_template
from llmkit.data.documents import read_file
from llmkit.data.records import read_records
from llmkit.data.sft import examples
from llmkit.data.tokenizer import CHECKED, Tokenizer
from llmkit.data.tokens import open_split
from llmkit.errors import DATA, UserError
from llmkit.parallel import autocast, choose_precision, start_world, to_device
from llmkit.types import IGNORE_INDEX, Batch, Document


@torch.no_grad()
def perplexity(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    token_bytes: np.ndarray | None = None,
    micro_batch_size: int = 8,
    total: Callable[[float], float] = lambda value: value,
) -> dict[str, Any]:
    """Measure a model on batches, in the autocast context of the caller.

    token_bytes  bytes of text a token stands for (V,): bits per byte needs it
    total        adds a number up over ranks
    Returns val_loss (nats a token), val_perplexity = exp(val_loss), bits_per_byte, and the targets counted.
    """
    training = model.training
    model.eval()
    losses = torch.zeros((), dtype=torch.float64, device=device)
    targets = text_bytes = 0
    for batch in batches:
        for micro in batch.split(micro_batch_size):
            full = fill_up(micro, micro_batch_size)
            losses += model(**to_device(full, device), reduction="none").double().sum()
            scored = micro.labels[micro.labels != IGNORE_INDEX]
            targets += len(scored)
            text_bytes += int(token_bytes[scored].sum()) if token_bytes is not None else 0
    model.train(training)
    nats, targets, text_bytes = total(losses.item()), int(total(targets)), int(total(text_bytes))
    loss = nats / targets if targets else math.nan
    result: dict[str, Any] = {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700)), "val_tokens": targets}
    if text_bytes:
        result["bits_per_byte"] = nats / math.log(2) / text_bytes
    return result


def fill_up(batch: Batch, rows: int) -> Batch:
    """Repeat the last row, without labels, up to `rows`: one shape for compiled blocks, and the same sums."""
    missing = rows - len(batch.input_ids)
    padded = {name: np.concatenate([a, a[-1:].repeat(missing, axis=0)]) for name, a in batch.arrays().items()}
    padded["labels"][rows - missing :] = IGNORE_INDEX
    return Batch(**padded)


def windows(tokens: np.ndarray, window: int, stride: int, batch_size: int) -> Iterator[Batch]:
    """A text of N tokens as batches of windows in which every token but the first is a target exactly once.

    window  tokens of input, so of context at the most
    stride  how far the next window moves on: stride == window reads every token once, a smaller one gives the later
            targets at least window - stride tokens of context, at window / stride times the work

    >>> [batch.labels.tolist() for batch in windows(np.arange(6), window=3, stride=2, batch_size=1)]
    [[[1, 2, 3]], [[-100, 4, 5]]]
    """
    scored, rows = 0, []  # targets 1..scored are done
    for start in range(0, max(1, len(tokens) - 1), stride):
        inputs, labels = tokens[start : start + window], tokens[start + 1 : start + window + 1].astype(np.int64)
        inputs = inputs[: len(labels)].astype(np.int64)
        labels[: max(0, scored - start)] = IGNORE_INDEX
        rows.append((inputs, labels))
        scored = start + len(labels)
        last = scored >= len(tokens) - 1
        ragged = last and len(rows) > 1 and len(labels) < len(rows[0][1])
        if ragged:  # a shorter last window goes alone: padding it would only cost time
            yield stack(rows[:-1])
            yield stack(rows[-1:])
        elif last or len(rows) == batch_size:
            yield stack(rows)
        if last:
            return
        if len(rows) == batch_size:
            rows = []


def stack(rows: list[tuple[np.ndarray, np.ndarray]]) -> Batch:
    return Batch(np.stack([inputs for inputs, _ in rows]), np.stack([labels for _, labels in rows]))


# ---- a model on a file, or on its run's val split -------------------------------------------------------------------


def measure(
    located: Located,
    *,
    data: Path | None = None,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    precision: str = "auto",
) -> dict[str, Any]:
    """Loss, perplexity and bits per byte of a MODEL.

    data    a file of texts, read as one stream of documents and end tokens; or of fine-tuning records, of which only
            the answers count, each record in a row of its own. None: the val split that its run trained with
    window  tokens of context at the most, default the length that the run trained with, else the model's longest
    stride  see `windows`; default: the window
    """
    device = start_world().device
    precision = choose_precision(precision, device)
    model, tokenizer = checkpoint.load(located, device=device)
    longest = model.config.max_position_embeddings
    config = yaml.safe_load((located.run_dir / "config.yaml").read_text()) if located.run_dir else None
    window = window or min(longest, config["data"]["seq_len"] if config else longest)
    stride = stride or window
    if not 0 < stride <= window <= longest:
        raise UserError(
            "stride and window do not fit the model", got=f"stride {stride}, window {window}",
            expected=f"0 < stride <= window <= {longest}",
        )  # fmt: skip
    if data is None:
        if config and config["data"]["kind"] == "sft" and (stride < window or window != config["data"]["seq_len"]):
            raise UserError("fine-tuning rows have a length of their own", got=f"window {window}, stride {stride}")
        if config is None:
            raise UserError("there is no text to measure on", fix="name a file with --data", code=DATA)
        batches, what = run_val_split(located.run_dir, config["data"], tokenizer, window, stride, batch_size)
    else:
        batches, what = file_batches(data, tokenizer, window, stride, batch_size)
    with autocast(device, precision):
        result = perplexity(
            model, batches, device=device, token_bytes=tokenizer.token_bytes, micro_batch_size=batch_size
        )
    names = {"val_loss": "loss", "val_perplexity": "perplexity", "val_tokens": "tokens"}
    figures = {names.get(key, key): value for key, value in result.items()}
    return {"model": str(located.folder), "data": what, **figures, "window": window, "stride": stride,
            "precision": precision}  # fmt: skip


def run_val_split(
    run_dir: Path, data: dict, tokenizer: Tokenizer, window: int, stride: int, batch_size: int
) -> tuple[Iterable[Batch], str]:
    """The val split that a run trained beside; UserError where data.dir holds another build by now."""
    key = json.loads((run_dir / "run.json").read_text())["data_fingerprint"]
    if data["kind"] == "sft":
        batches = packed_batches(run_dir / "data" / key, "val", batch_size, seed=0)
        return batches.in_order(), f"the val split of {data['path']}"
    folder = Path(data["dir"])
    manifest = read_manifest(folder)
    if manifest["fingerprint"] != key or manifest.get("tokenizer_sha256") != tokenizer.sha256:
        raise UserError(
            "the data was built anew since this run", at=folder, fix="build it as it was, or name a file with --data",
            code=DATA,
        )  # fmt: skip
    stream = open_split(folder, manifest["splits"]["val"]["files"], np.dtype(manifest["dtype"]))
    return windows(stream.read(0, len(stream)), window, stride, batch_size), f"the val split of {folder}, in one stream"


def file_batches(
    path: Path, tokenizer: Tokenizer, window: int, stride: int, batch_size: int
) -> tuple[Iterable[Batch], str]:
    """A file of fine-tuning records or of texts; see `measure`."""
    if not path.is_file():
        what = "--data takes a file, and this is a folder" if path.is_dir() else "there is no such data file"
        raise UserError(what, at=path, code=DATA)
    first = next((record for _, record in read_records(path) if isinstance(record, dict)), {})
    records = any(all(field in first for field in fields) for fields in FORMATS.values())
    if records and stride < window:
        raise UserError("records are read whole, so a stride has no meaning", got=f"stride {stride}")
    if records:
        bad: Counter[str] = Counter()
        rows = [
            (ids[: window + 1], targets[: window + 1])
            for _, ids, targets in examples(path, tokenizer, default_template(tokenizer), bad)
        ]
        skipped = f", {sum(bad.values())} bad records left out" if bad else ""
        return answer_rows(rows, tokenizer.eos_id, batch_size), f"the answers in {path} ({len(rows)} records{skipped})"
    documents = [one for one in read_file(path, source="eval", root=path.parent) if isinstance(one, Document)]
    if not documents:
        raise UserError("no text can be read from the file", at=path, code=DATA)
    tokenizer.agrees([one.text[:10_000] for one in documents[:CHECKED]])
    tokens = np.concatenate(list(tokenizer.encode_documents(one.text for one in documents)))
    return windows(tokens, window, stride, batch_size), f"{path} ({len(documents)} documents)"


def answer_rows(rows: list[tuple[list[int], list[bool]]], pad: int, batch_size: int) -> Iterator[Batch]:
    """Records in rows of their own, padded on the right to their batch's longest; only answers are labels."""
    rows = sorted((row for row in rows if len(row[0]) > 1), key=lambda row: len(row[0]))
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        shape = (len(batch), len(batch[-1][0]) - 1)
        inputs, labels = np.full(shape, pad, dtype=np.int64), np.full(shape, IGNORE_INDEX, dtype=np.int64)
        for i, (ids, targets) in enumerate(batch):
            inputs[i, : len(ids) - 1] = ids[:-1]
            labels[i, : len(ids) - 1] = np.where(targets[1:], ids[1:], IGNORE_INDEX)
        yield Batch(inputs, labels)
