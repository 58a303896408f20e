"""Measure loss, perplexity and bits per byte of a MODEL on files, or on the val split of its run."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm

from llmkit.config.defaults import MAX_BAD_FRACTION
from llmkit.corpus.scorers import detect_language
from llmkit.data.splits import bytes_per_token, read_manifest
from llmkit.errors import DataError, UserError
from llmkit.evals.reading import Reading, corrupted_rows, read_data, run_val_split, windows
from llmkit.intervals import Z, describe, ratio_error
from llmkit.objectives.lm import perplexity
from llmkit.parallel.device import autocast, choose_precision
from llmkit.parallel.world import start_world
from llmkit.readers.tally import Tally
from llmkit.screen import count
from llmkit.storage.locate import Located, choose_dtype, load_located
from llmkit.storage.run import read_run_config
from llmkit.tokenizer.tokenizer import Tokenizer
from llmkit.types import IGNORE_INDEX, Batch

FEWEST_DOCUMENTS = 10  # whose spread says how sure a loss is; of fewer, that of windows does


@dataclass
class Measured:
    """Hold the figures of a model on a text, and the losses of its parts, which tell how sure they are."""

    figures: dict[str, Any]
    part: str  # document, window or example
    nats: np.ndarray  # the sum of the losses of each part
    targets: np.ndarray  # their number
    tokenizer: Tokenizer
    tokens: np.ndarray | None = None  # of a stream of documents


def measure(located: Located, **options: Any) -> dict[str, Any]:
    """Measure loss, perplexity and bits per byte of a MODEL; see `measure_parts`."""
    return measure_parts(located, **options).figures


def measure_by_source(located: Located, **options: Any) -> dict[str, dict[str, Any]]:
    """Measure each source in the val split of a run's corpus; see `measure_parts`."""
    config = read_run_config(located.run_dir) if located.run_dir else None
    if config is None or config["data"]["kind"] != "corpus":
        raise UserError("sources are those of a run's corpus", at=located.folder, fix="name a run of `llmkit pretrain`")
    files = read_manifest(Path(config["data"]["dir"]))["splits"]["val"]["files"]
    names = list(dict.fromkeys(file["source"] for file in files))
    loaded = load_to_measure(located, options.get("precision", "auto"))
    return {name: measure(located, source=name, loaded=loaded, **options) for name in names}


def measure_by_language(located: Located, **options: Any) -> dict[str, dict[str, Any]]:
    """Measure the documents of each language on their own, the language with most tokens first; see `measure_parts`."""
    measured = measure_parts(located, **options)
    if measured.tokens is None or measured.part != "document":
        what, expected = "languages are told apart by documents", f"at least {FEWEST_DOCUMENTS} of them in one stream"
        fix = "name files of more documents with --data: each file or record is one"
        raise UserError(what, got=measured.figures["parts"], expected=expected, fix=fix)
    ends = np.flatnonzero(measured.tokens == measured.tokenizer.eos_id)
    documents = np.split(measured.tokens, ends + 1)[: len(measured.nats)]
    texts = [measured.tokenizer.decode(ids[ids != measured.tokenizer.eos_id].tolist()) for ids in documents]
    names = np.array([detect_language(text)[0] for text in texts])
    sizes, found = np.array([len(text.encode()) for text in texts]), {}
    for name in np.unique(names):
        nats, targets = measured.nats[names == name], measured.targets[names == name]
        loss = float(nats.sum() / targets.sum())
        found[str(name)] = {
            "documents": len(nats),
            "tokens": int(targets.sum()),
            "loss": loss,
            "loss_stderr": ratio_error(nats, targets),
            "perplexity": math.exp(min(loss, 700)),
            "bits_per_byte": float(nats.sum() / math.log(2) / max(1, sizes[names == name].sum())),
        }
    return dict(sorted(found.items(), key=lambda item: -item[1]["tokens"]))


def load_to_measure(located: Located, precision: str) -> tuple[nn.Module, Tokenizer, str]:
    """Load a MODEL to measure it. Return it with its tokenizer and the precision to compute in."""
    device = start_world().device
    precision = choose_precision(precision, device)
    return *load_located(located, device=device, dtype=choose_dtype(located, precision)), precision


def measure_parts(
    located: Located,
    *,
    data: str | None = None,
    source: str | None = None,
    columns: dict[str, str] | None = None,
    each: bool = False,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    precision: str = "auto",
    loaded: tuple[nn.Module, Tokenizer, str] | None = None,
    max_bad_fraction: float = MAX_BAD_FRACTION,
) -> Measured:
    """Measure loss, perplexity and bits per byte of a MODEL.

    data    files of texts (a file, folder or glob), read as one stream of documents and end tokens; or of fine-tuning
            records, each in a row of its own with only the answers as targets; or a built corpus, of which the val
            split is read. None: the val split of the model's run.
            For an encoder the texts are corrupted as its objective does
    source  of the run's corpus: only its part of the val split
    columns  our name of a field of records -> the file's name; None: the run's data.columns
    each    score each text on its own, after a begin token, as published figures do
    window  tokens of context at the most; default: the run's data.seq_len, else the model's longest position
    stride  see `windows`; default: the window
    loaded  the model, if it is loaded already, see `load_to_measure`
    max_bad_fraction  of the records, and of the bytes, of `data` that may be bad and left out
    """
    device = start_world().device
    model, tokenizer, precision = loaded or load_to_measure(located, precision)
    longest = model.config.max_position_embeddings
    config = read_run_config(located.run_dir) if located.run_dir else None
    window = window or min(longest, config["data"]["seq_len"] if config else longest)
    stride = stride or window
    if not 0 < stride <= window <= longest:
        got, expected = f"stride {stride}, window {window}", f"0 < stride <= window <= {longest}"
        raise UserError("stride and window do not fit the model", got=got, expected=expected)
    kind, objective = model.config.kind, (config or {}).get("objective")
    if kind != "causal" and stride != window:
        raise UserError(f"{model.config.model_type} needs stride equal to window", got=f"{stride}, window {window}")
    if each and kind != "causal":
        raise UserError(f"--each is for models that predict all tokens of a text, not {model.config.model_type}")
    tally, trained = Tally(), (config or {}).get("data") or {}
    if data is None:
        if (
            config
            and config["data"]["kind"] in ("sft", "preference")
            and (stride < window or window != config["data"]["seq_len"])
        ):
            raise UserError("fine-tuning rows have data.seq_len tokens", got=f"window {window}, stride {stride}")
        if config is None:
            raise DataError("there is no text to measure on", fix="name a file with --data")
        read = run_val_split(located.run_dir, config["data"], model.config, tokenizer, batch_size, source)
    else:
        named = trained.get("columns") or {} if columns is None else columns
        how = {"train_on": trained.get("train_on", "all"), "date": trained.get("date")}
        reading = Reading(model.config, tokenizer, window, stride, batch_size, each, named, **how)
        read = read_data(data, reading, tally)
        tally.check(max_bad_fraction, fix="repair the file, or raise --max-bad-fraction")
    tokens, what, text_bytes, batches = read
    if batches is None and kind == "causal":
        batches = windows(tokens, window, stride, batch_size)
    elif batches is None:
        seed = config["seed"] if config else 0
        batches = corrupted_rows(tokens, model.config, tokenizer, window, batch_size, objective, seed)
        what += ", of which only masked tokens count" if kind == "masked" else ", of which only cut-out spans count"
    token_bytes = None
    if kind == "causal":
        token_bytes = bytes_per_token(tokenizer, None if tokens is None else [tokens], text_bytes)
    losses: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    with autocast(device, precision):
        result = perplexity(
            model,
            tqdm(note_targets(batches, masks), desc="measure", unit="batch", disable=None, leave=False),
            device=device,
            token_bytes=token_bytes,
            micro_batch_size=batch_size,
            losses=losses,
        )
    if not result["val_tokens"]:
        raise DataError("the text is too short to measure on", got=what, fix="add text or lower the window")
    is_stream = kind == "causal" and tokens is not None and not each
    part, nats, targets = divide(losses, masks, tokens if is_stream else None, tokenizer.eos_id, window)
    error = ratio_error(nats, targets)
    figures = {
        "model": str(located.folder),
        "data": what,
        **({"bad_records": tally.describe()} if tally.bad else {}),
        "loss": result["val_loss"],
        "loss_stderr": error,
        "perplexity": result["val_perplexity"],
        "perplexity_interval": [math.exp(min(result["val_loss"] + sign * Z * error, 700)) for sign in (-1, 1)],
        "tokens": result["val_tokens"],
        "parts": count(len(nats), part),
        **{key: result[key] for key in ("bits_per_byte",) if key in result},
        "window": window,
        "stride": stride,
        "precision": precision,
    }
    return Measured(figures, part, nats, targets, tokenizer, tokens if is_stream else None)


def note_targets(batches: Iterable[Batch], masks: list[np.ndarray]) -> Iterator[Batch]:
    """Yield batches, and append to `masks` where they have targets, (B, T)."""
    for batch in batches:
        masks.append(batch.labels != IGNORE_INDEX)
        yield batch


def divide(
    losses: list[np.ndarray], masks: list[np.ndarray], tokens: np.ndarray | None, eos_id: int, window: int
) -> tuple[str, np.ndarray, np.ndarray]:
    """Return what independent parts are called, and the sum of the losses and the number of targets of each.

    tokens  of a stream of documents, each with an end token, all but the first of which are targets in this order: its
            documents are the parts, or windows if they are few. None: each row is a part
    """
    masks = [mask for batch in masks for mask in batch]
    rows = [row for micro in losses for row in micro]
    if tokens is None:
        nats = np.array([row.sum(dtype=np.float64) for row in rows])
        targets = np.array([mask.sum() for mask in masks])
        return "example", nats[targets > 0], targets[targets > 0]
    values = np.concatenate([row[mask] for row, mask in zip(rows, masks, strict=True)]).astype(np.float64)
    document = np.cumsum(tokens[:-1] == eos_id)[: len(values)]
    few = len(np.unique(document)) < FEWEST_DOCUMENTS
    owner = np.arange(len(values)) // window if few else document
    _, owner = np.unique(owner, return_inverse=True)
    return "window" if few else "document", np.bincount(owner, weights=values), np.bincount(owner)


def compare(ours: Measured, theirs: Measured) -> dict[str, Any]:
    """Return by how much one model's loss is higher than another's on the same text, part by part.

    Raise UserError if they read the text as other tokens.
    """
    if ours.tokenizer.sha256 != theirs.tokenizer.sha256 or not np.array_equal(ours.targets, theirs.targets):
        what = "the losses can't be compared: the models read the text as other tokens, or in other windows"
        fix = "give both the same --window; models with other tokenizers: compare bits per byte"
        raise UserError(what, got=f"{ours.figures['tokens']} and {theirs.figures['tokens']} tokens", fix=fix)
    return loss_difference(ours.nats, theirs.nats, ours.targets)


def loss_difference(ours: np.ndarray, theirs: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """Return by how much the loss of a token is higher in `ours` than in `theirs`, given the sums of losses of the same
    parts of a text, and the number of targets in each.
    """
    apart = ours - theirs
    difference, error = float(apart.sum() / targets.sum()), ratio_error(apart, targets)
    return describe(difference, error, (difference - Z * error, difference + Z * error), len(apart))
