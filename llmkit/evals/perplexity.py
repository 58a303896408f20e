"""Loss, perplexity and bits per byte of a MODEL on a file, or on the val split of its run."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.config.defaults import MAX_BAD_FRACTION
from llmkit.data.batches import open_rows
from llmkit.data.corrupt import shift_right
from llmkit.data.layouts import describe_fields, is_record
from llmkit.data.sft import Example, Found, encode_records, split_into_pairs, truncate_pair
from llmkit.data.splits import bytes_per_token, open_stream, read_manifest
from llmkit.errors import DataError, UserError
from llmkit.models import family_of
from llmkit.objectives import OBJECTIVES, fitting_objectives
from llmkit.objectives.lm import perplexity
from llmkit.parallel.device import autocast, choose_precision
from llmkit.parallel.world import start_world
from llmkit.readers.documents import check_file, keep_documents, read_file
from llmkit.readers.records import read_records
from llmkit.readers.tally import Tally
from llmkit.screen import count
from llmkit.storage.locate import Located, load_located
from llmkit.storage.run import read_about, read_run_config
from llmkit.tokenizer.chat_template import default_template
from llmkit.tokenizer.tokenizer import MAX_VERIFIED_TEXTS, Tokenizer
from llmkit.types import IGNORE_INDEX, Batch


def windows(tokens: np.ndarray, window: int, stride: int, batch_size: int) -> Iterator[Batch]:
    """Yield a text of N tokens as batches of windows, in which every token but the first is a target exactly once.

    window  tokens of input, so of context at the most
    stride  tokens from one window to the next. stride == window reads every token once; a smaller stride gives all
            targets after the first window at least window - stride tokens of context, for window / stride the work

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
    max_bad_fraction: float = MAX_BAD_FRACTION,
) -> dict[str, Any]:
    """Measure loss, perplexity and bits per byte of a MODEL.

    data    a file of texts, read as one stream of documents and end tokens, or of fine-tuning records, each in a row of
            its own with only the answers as targets. None: the val split of the model's run.
            For an encoder the texts are corrupted as its objective does
    window  tokens of context at the most; default: the run's data.seq_len, else the model's longest position
    stride  see `windows`; default: the window
    max_bad_fraction  of the records, and of the bytes, of `data` that may be bad and left out
    """
    device = start_world().device
    precision = choose_precision(precision, device)
    model, tokenizer = load_located(located, device=device)
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
    tally = Tally()
    if data is None:
        if config and config["data"]["kind"] == "sft" and (stride < window or window != config["data"]["seq_len"]):
            raise UserError("fine-tuning rows have data.seq_len tokens", got=f"window {window}, stride {stride}")
        if config is None:
            raise DataError("there is no text to measure on", fix="name a file with --data")
        read = run_val_split(located.run_dir, config["data"], model.config, tokenizer, batch_size)
    else:
        read = read_data(data, model.config, tokenizer, window, stride, batch_size, tally)
        tally.check(max_bad_fraction, fix="repair the file, or raise --max-bad-fraction")
    tokens, batches, what, text_bytes = read
    if kind == "causal" and tokens is not None:
        batches = windows(tokens, window, stride, batch_size)
    elif tokens is not None:
        seed = config["seed"] if config else 0
        batches = corrupted_rows(tokens, model.config, tokenizer, window, batch_size, objective, seed)
        what += ", of which only masked tokens count" if kind == "masked" else ", of which only cut-out spans count"
    token_bytes = None
    if kind == "causal":
        token_bytes = bytes_per_token(tokenizer, None if tokens is None else [tokens], text_bytes)
    with autocast(device, precision):
        result = perplexity(
            model,
            batches,
            device=device,
            token_bytes=token_bytes,
            micro_batch_size=batch_size,
        )
    if not result["val_tokens"]:
        raise DataError("the text is too short to measure on", got=what, fix="add text or lower the window")
    names = {"val_loss": "loss", "val_perplexity": "perplexity", "val_tokens": "tokens"}
    figures = {names.get(key, key): value for key, value in result.items()}
    return {
        "model": str(located.folder),
        "data": what,
        **({"bad_records": tally.describe()} if tally.bad else {}),
        **figures,
        "window": window,
        "stride": stride,
        "precision": precision,
    }


# Tokens of a text, or batches of rows; a description; bytes of the text.
Read = tuple[np.ndarray | None, Iterable[Batch] | None, str, int]


def run_val_split(run_dir: Path, data: dict, model_config: Any, tokenizer: Tokenizer, batch_size: int) -> Read:
    """Read the val split of a run's data; raise a DataError if data.dir holds another build by now."""
    key = read_about(run_dir).get("data_fingerprint")
    if data["kind"] == "sft":
        start_id = family_of(model_config).start_token_id(model_config)
        batches = open_rows(run_dir / "data" / key, "val", batch_size, start_id, seed=0)
        return None, batches.in_order(), f"the val split of {data['path']}", 0
    folder = Path(data["dir"])
    manifest = read_manifest(folder)
    if manifest["fingerprint"] != key or manifest["tokenizer_sha256"] != tokenizer.sha256:
        fix = "build it as it was, or name a file with --data"
        raise DataError("the data was built anew since this run", at=folder, fix=fix)
    stream = open_stream(folder, manifest, "val")
    text_bytes = manifest["splits"]["val"]["bytes"]
    return stream.read(0, len(stream)), None, f"the val split of {folder}, in one stream", text_bytes


def read_data(
    path: Path, model_config: Any, tokenizer: Tokenizer, window: int, stride: int, batch_size: int, tally: Tally
) -> Read:
    """Read a file of fine-tuning records or of texts, and count them; see `measure`."""
    if path.is_dir():
        raise DataError("--data takes a file, and this is a folder", at=path, fix="name one of its files")
    check_file(path)
    first = next((record for _, record, _ in read_records(path) if isinstance(record, dict)), {})
    records = "text" not in first and is_record(first)
    if records and stride < window:
        raise UserError("--stride does not apply to fine-tuning records", got=f"stride {stride}")
    if records and model_config.kind == "masked":
        raise DataError(f"{model_config.model_type} writes no answers", at=path, fix="name a file of texts")
    if records:
        rows = list(encode_records(path, tokenizer, default_template(tokenizer), tally, Found()))
        what = f"the answers in {path} ({len(rows)} records{describe_cuts(rows, window)})"
        if model_config.kind == "causal":
            cut = [(ids[: window + 1], targets[: window + 1]) for ids, targets in rows]
            batches = answer_rows(cut, tokenizer.eos_id, batch_size)
        else:
            pairs = [pair for ids, targets in rows for pair in split_into_pairs(ids, targets, tokenizer.eos_id)]
            start_id = family_of(model_config).start_token_id(model_config)
            batches = pair_rows(pairs, window, start_id, batch_size)
        return None, batches, what, 0
    if first and "text" not in first:
        got, expected = describe_fields(first), "a field text, or the fields of prompts and answers"
        raise DataError("the records are neither texts nor prompts and answers", at=path, got=got, expected=expected)
    documents = list(keep_documents(read_file(path, source="eval", root=path.parent), tally))
    if not documents:
        raise DataError("no text can be read from the file", at=path, got=tally.describe() or None)
    tokenizer.verify_fast_encoder([one.text[:10_000] for one in documents[:MAX_VERIFIED_TEXTS]])
    tokens = np.concatenate(list(tokenizer.encode_documents(one.text for one in documents)))
    return (
        tokens,
        None,
        f"{path} ({count(len(documents), 'document')})",
        sum(len(one.text.encode()) for one in documents),
    )


def describe_cuts(rows: list[Example], window: int) -> str:
    """Return how many records are longer than the window, and how many of them lose all of their answers."""
    long = [targets for ids, targets in rows if len(ids) > window + 1]
    lost = sum(not any(targets[1 : window + 1]) for targets in long)
    left_out = f", {lost} of them left out, because their answers come later" if lost else ""
    return f"; {len(long)} are cut to {window} tokens{left_out}" if long else ""


def corrupted_rows(
    tokens: np.ndarray,
    model_config: Any,
    tokenizer: Tokenizer,
    window: int,
    batch_size: int,
    objective: dict | None,
    seed: int,
) -> Iterator[Batch]:
    """Yield rows of `window` tokens, the same and corrupted in the same way as the evaluations of a training run do.

    objective  of the run; if it does not fit texts, the default for this model kind
    seed       of the run
    """
    fitting = fitting_objectives(model_config.kind, "corpus")
    choice = dict(objective) if objective and objective["name"] in fitting else {"name": fitting[0]}
    start_id = family_of(model_config).start_token_id(model_config)
    corrupt = OBJECTIVES[choice.pop("name")].build(tokenizer, seed, start_id, **choice).corrupt
    number = (len(tokens) - 1) // window  # as `samples_in` counts them
    rows = tokens[: number * window].reshape(-1, window).astype(np.int64)
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        yield corrupt(Batch(part, part), range(start, start + len(part)))


def pair_rows(pairs: list[tuple[list[int], list[int]]], window: int, start_id: int, batch_size: int) -> Iterator[Batch]:
    """Yield texts and answers of at most `window` tokens each, padded to the longest of their batch."""
    pairs = sorted((truncate_pair(source, answer, window) for source, answer in pairs), key=lambda pair: len(pair[0]))
    for start in range(0, len(pairs), batch_size):
        sources, answers = zip(*pairs[start : start + batch_size], strict=True)
        ids = np.full((len(sources), max(map(len, sources))), start_id, dtype=np.int64)
        labels = np.full((len(answers), max(map(len, answers))), IGNORE_INDEX, dtype=np.int64)
        segments = np.full(ids.shape, -1, dtype=np.int64)
        for i, (source, answer) in enumerate(zip(sources, answers, strict=True)):
            ids[i, : len(source)], segments[i, : len(source)], labels[i, : len(answer)] = source, 0, answer
        yield Batch(ids, labels, segments=segments, decoder_input_ids=shift_right(labels, start_id))


def answer_rows(rows: list[tuple[list[int], list[bool]]], pad: int, batch_size: int) -> Iterator[Batch]:
    """Yield records in rows of their own, padded on the right to the longest of their batch; answers are the labels."""
    rows = sorted((row for row in rows if len(row[0]) > 1), key=lambda row: len(row[0]))
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        shape = (len(batch), len(batch[-1][0]) - 1)
        inputs, labels = np.full(shape, pad, dtype=np.int64), np.full(shape, IGNORE_INDEX, dtype=np.int64)
        for i, (ids, targets) in enumerate(batch):
            inputs[i, : len(ids) - 1] = ids[:-1]
            labels[i, : len(ids) - 1] = np.where(targets[1:], ids[1:], IGNORE_INDEX)
        yield Batch(inputs, labels)
