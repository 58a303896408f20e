"""Predict the labels of texts with a model that has a head for them."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from llmkit.config.records import LabelledData
from llmkit.data.labelled import pad_batch
from llmkit.data.rows import encode_tokens
from llmkit.errors import DataError, ModelError
from llmkit.models.heads import HeadConfig
from llmkit.parallel.device import autocast, choose_precision, to_device
from llmkit.parallel.world import start_world
from llmkit.readers.listing import check_file
from llmkit.readers.packed import open_bytes, suffix_of
from llmkit.readers.records import DOCUMENT_FORMATS, read_records
from llmkit.readers.tally import BadRecord, Record, Tally
from llmkit.records.label_layouts import NoFieldError, read_labelled, read_rows, unknown_layout
from llmkit.records.labelled import first_tokens, make_encoder, read_source, words_of
from llmkit.storage.locate import Located, choose_dtype, load_located, read_located_head
from llmkit.storage.run import read_run_config
from llmkit.tokenizer.tokenizer import Tokenizer

BATCH_TOKENS = 4096  # in a forward pass, padding included
CHUNK = 4096  # texts that are encoded at a time, and sorted by length


@dataclass
class Classifier:
    """Hold a loaded model with a head for labels."""

    model: nn.Module
    tokenizer: Tokenizer
    head: HeadConfig
    seq_len: int  # tokens of a text at the most
    precision: str
    data: dict[str, Any]  # the data section of its run; {} if it has none

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def load_classifier(located: Located, precision: str = "auto") -> Classifier:
    """Load a model with a head for labels. Raise ModelError if it has none."""
    head = read_located_head(located)
    if head is None:
        fix = f"llmkit finetune --lora --objective classify --from {located.run_dir or located.folder} --data FILE"
        raise ModelError("this model has no head for labels", at=located.folder, fix=fix)
    precision = choose_precision(precision, start_world().device)
    dtype = choose_dtype(located, precision)
    model, tokenizer = load_located(located, device=start_world().device, dtype=dtype, head=head)
    data = read_run_config(located.run_dir)["data"] if located.run_dir else {}
    longest = model.config.max_position_embeddings
    return Classifier(model.eval(), tokenizer, head, min(data.get("seq_len") or longest, longest), precision, data)


def by_length(lengths: list[int]) -> Iterator[list[int]]:
    """Yield the numbers of texts in batches of similar lengths and at most BATCH_TOKENS, or of a single text."""
    batch: list[int] = []
    for i in np.argsort(lengths, kind="stable").tolist():
        if batch and (len(batch) + 1) * lengths[i] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@torch.no_grad()
def run_by_length(
    examples: list[np.ndarray],
    pad_id: int,
    device: torch.device,
    compute: Callable[..., Tensor],
    *,
    types: bool,
    most: int,
) -> list[np.ndarray]:
    """Return what `compute` makes of each example, in order: a row of its result, cut to the example's tokens.

    examples  coded tokens, see `data/labelled.py`
    types, most  see `pad_batch`
    compute   (input_ids, lengths, token_type_ids of an encoder) -> (B, ...), or (B, T, ...) of each token
    """
    results: list[np.ndarray] = [np.empty(0)] * len(examples)
    batches = list(by_length([len(one) for one in examples]))
    for chosen in tqdm(batches, desc="predict", unit="batch", disable=None, leave=False):
        batch = pad_batch(
            [examples[i] for i in chosen], np.zeros(len(chosen), np.int64), pad_id, types=types, most=most
        )
        tensors = to_device(batch, device)
        tensors.pop("labels")
        for i, row in zip(chosen, compute(**tensors).float().cpu().numpy(), strict=True):
            results[i] = row
    return results


def read_texts(
    source: str, task: str, columns: dict[str, str], header: list[str] | None, tally: Tally
) -> Iterator[tuple[dict[str, Any], tuple[str, ...] | list[str]]]:
    """Yield each record of a source with its texts, or its words; no label is needed.

    task, columns, header  see `label_layouts.read_rows` and `read_labelled`. A file that has none of the columns is
                           read by the usual names
    """
    for path, found in text_records(source, task, header):
        is_first, named = True, columns
        for line, record, size in found:
            if is_first and isinstance(record, dict) and not set(named.values()) & record.keys():
                named = {}
            try:
                if isinstance(record, BadRecord):
                    raise ValueError(record.reason)
                example, _ = read_labelled(record, task, named, needs_label=False)
            except ValueError as error:
                if is_first and isinstance(error, NoFieldError):
                    raise unknown_layout(record, f"{path}:{line}", error) from None
                bad = record if isinstance(record, BadRecord) else BadRecord(path, line, None, str(error), size)
                tally.add(0, bad)
                continue
            is_first = False
            tally.add(size)
            yield record, example.texts


def text_records(source: str, task: str, header: list[str] | None) -> Iterator[tuple[str, Iterable[Record]]]:
    """Yield (file, records) of a source. Each line of a file of plain text is a record; of tags, its words are.

    A text file whose first line has as many columns as the header is a table.
    """
    path = Path(source)
    if DOCUMENT_FORMATS.get(suffix_of(path)) == "text":
        check_file(path)
        with open_bytes(path) as file:
            is_table = bool(header) and file.readline(2**20).count(b"\t") == len(header) - 1
        if is_table:
            yield source, read_rows(path, header=header)
            return
        yield source, read_text_lines(path, task == "tag")
        return
    yield from read_source(LabelledData(kind="labelled", path=source).all_sources()[0], task, header)


def read_text_lines(path: Path, words: bool) -> Iterator[Record]:
    """Yield the lines of a text file that are not blank as records, whole or as lists of words."""
    for _, record, size in read_records(path):
        if isinstance(record, BadRecord):
            yield 1, record, size
            continue
        for number, line in enumerate(record["text"].split("\n"), 1):
            if line.strip():
                yield number, {"tokens": line.split()} if words else {"text": line}, len(line.encode()) + 1


def predict_labels(one: Classifier, texts: list[tuple[str, ...] | list[str]]) -> tuple[list[dict[str, Any]], int]:
    """Return a prediction for each text, and how many texts were cut to the model's length.

    classify  {label, probabilities: {label: ...}}; of several labels {labels, probabilities}
    regress   {score}
    tag       {tags, probabilities}: of each word; null for words behind the cut, and those without a token
    """
    encodings = make_encoder(one.tokenizer, one.seq_len)(texts)
    coded = [encode_tokens(e.ids, np.array(e.type_ids) == 0) for e in encodings]
    if empty := [i for i, ids in enumerate(coded) if not len(ids)]:
        raise DataError("a text has no token", got=f"text {empty[0] + 1}")
    types = one.model.config.kind == "masked"
    with autocast(one.device, one.precision):
        outputs = run_by_length(coded, one.tokenizer.pad_id, one.device, one.model, types=types, most=one.seq_len)
    results = []
    for text, encoding, output in zip(texts, encodings, outputs, strict=True):
        if one.head.kind == "tag":
            results.append(tags_of_words(one.head, text, encoding, output))
        elif one.head.kind == "regress":
            results.append({"score": float(output[0])})
        else:
            results.append(describe_output(one.head, output))
    return results, sum(bool(encoding.overflowing) for encoding in encodings)


def describe_output(head: HeadConfig, output: np.ndarray) -> dict[str, Any]:
    """Return the label or the labels of an output (L,), and the probability of each."""
    chances = probabilities(output, head.multi_label)
    named = {name: round(float(chance), 6) for name, chance in zip(head.labels, chances, strict=True)}
    if head.multi_label:
        return {
            "labels": [name for name, value in zip(head.labels, output, strict=True) if value > 0],
            "probabilities": named,
        }
    return {"label": head.labels[int(output.argmax())], "probabilities": named}


def probabilities(outputs: np.ndarray, multi_label: bool) -> np.ndarray:
    """Return the probabilities of outputs (..., L): softmax, or each on its own."""
    if multi_label:
        return 1 / (1 + np.exp(-outputs.astype(np.float64)))
    powers = np.exp(outputs.astype(np.float64) - outputs.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def tags_of_words(head: HeadConfig, words: list[str], encoding: Any, output: np.ndarray) -> dict[str, Any]:
    """Return the tag of each word, that of its first token, and its probability."""
    numbers = words_of(encoding, words)
    is_first = first_tokens(numbers)
    chances = probabilities(output[: len(numbers)], False)
    tags: list[str | None] = [None] * len(words)
    sure: list[float | None] = [None] * len(words)
    for place in np.flatnonzero(is_first):
        best = int(chances[place].argmax())
        tags[numbers[place]], sure[numbers[place]] = head.labels[best], round(float(chances[place, best]), 6)
    return {"tags": tags, "probabilities": sure}


def count_predictions(head: HeadConfig, results: list[dict[str, Any]]) -> dict[str, int]:
    """Return how often each label is predicted, the most frequent first."""
    if head.kind == "regress":
        return {}
    key = "tags" if head.kind == "tag" else "labels"
    found = Counter(
        name for one in results for name in (one[key] if key in one else [one["label"]]) if name is not None
    )
    return dict(found.most_common())
