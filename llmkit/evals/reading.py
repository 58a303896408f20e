"""Read what a model is measured on: texts, answers in fine-tuning records, or a val split."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.corpus.clean import extract_article
from llmkit.data.corrupt import shift_right
from llmkit.data.preferences import open_trees
from llmkit.data.rows import open_rows, token_ids
from llmkit.data.splits import open_stream, read_manifest
from llmkit.errors import DataError, UserError
from llmkit.models import family_of
from llmkit.objectives import OBJECTIVES, fitting_objectives
from llmkit.readers.documents import keep_documents, read_file
from llmkit.readers.listing import list_files
from llmkit.readers.records import read_records
from llmkit.readers.tally import Tally
from llmkit.records.encode import Found, encode_records
from llmkit.records.fit import fit_pairs, fit_row, split_row
from llmkit.records.layouts import describe_fields, is_record, rename_columns
from llmkit.screen import count
from llmkit.storage.report import data_name
from llmkit.storage.run import read_about
from llmkit.tokenizer.chat_template import default_template
from llmkit.tokenizer.tokenizer import MAX_VERIFIED_TEXTS, Tokenizer
from llmkit.types import IGNORE_INDEX, Batch

# Tokens of a text; a description; bytes of the text; batches of rows, which a stream of tokens leaves open.
Read = tuple[np.ndarray | None, str, int, Iterable[Batch] | None]


@dataclass
class Reading:
    """Hold how `read_data` reads; see `measure`."""

    model_config: Any
    tokenizer: Tokenizer
    window: int
    stride: int
    batch_size: int
    each: bool
    columns: dict[str, str]
    train_on: str
    date: str | None

    def batches_of(self, rows: list[np.ndarray]) -> Iterator[Batch]:
        """Yield rows of coded tokens as batches."""
        if self.model_config.kind == "causal":
            return answer_rows(rows, self.tokenizer.eos_id, self.batch_size)
        start_id = family_of(self.model_config).start_token_id(self.model_config)
        return pair_rows(rows, self.tokenizer.eos_id, start_id, self.batch_size)


def run_val_split(
    run_dir: Path, data: dict, model_config: Any, tokenizer: Tokenizer, batch_size: int, source: str | None = None
) -> Read:
    """Read the val split of a run's data, or of one source of a corpus; raise a DataError if data.dir holds another
    build by now.
    """
    key = read_about(run_dir).get("data_fingerprint")
    if data["kind"] == "preference":
        trees = open_trees(run_dir / "data" / key, "val", batch_size, seed=0)
        what = f"the better answers in the val split of {data_name(data)}"
        return None, what, 0, map(better_answers, trees.in_order())
    if data["kind"] == "prompts":
        what, fix = "a run of prompts has no text to measure", "name a file with --data"
        raise DataError(what, at=run_dir, fix=f"{fix}; its rewards are in {run_dir / 'metrics.jsonl'}")
    if data["kind"] == "sft":
        start_id = family_of(model_config).start_token_id(model_config)
        batches = open_rows(run_dir / "data" / key, "val", batch_size, start_id, seed=0)
        return None, f"the val split of {data_name(data)}", 0, batches.in_order()
    folder = Path(data["dir"])
    if read_manifest(folder)["fingerprint"] != key:
        fix = "build it as it was, or name a file with --data"
        raise DataError("the data was built anew since this run", at=folder, fix=fix)
    return (*read_val(folder, tokenizer, source), None)


def better_answers(batch: Batch) -> Batch:
    """Return a batch of trees with the better answers as targets, as language models have them."""
    labels = np.where(batch.answers % 2 == 0, batch.labels, IGNORE_INDEX)
    return replace(batch, labels=labels, answers=None, reference=None, counts=None)


def read_val(folder: Path, tokenizer: Tokenizer, source: str | None = None) -> tuple[np.ndarray, str, int]:
    """Return (tokens, description, bytes) of the val split of a built corpus, which has the model's tokenizer.

    source  only this one; its bytes are those that its tokens stand for
    """
    manifest = read_manifest(folder)
    if manifest["tokenizer_sha256"] != tokenizer.sha256:
        fix = "name files of texts, which are then encoded with the model's"
        raise DataError("the data was built with another tokenizer than the model's", at=folder, fix=fix)
    stream = open_stream(folder, manifest, "val", source)
    what = f"the val split of {folder}, in one stream" if source is None else f"{source} in the val split of {folder}"
    tokens = stream.read(0, len(stream))
    size = manifest["splits"]["val"]["bytes"] if source is None else int(tokenizer.token_bytes[tokens].sum())
    return tokens, what, size


def read_data(path: str, reading: Reading, tally: Tally) -> Read:
    """Read files of fine-tuning records or of texts, or a built corpus, and count the records; see `measure`."""
    folder = Path(path).expanduser()
    if (folder / "manifest.json").is_file():
        return (*read_val(folder, reading.tokenizer), None)
    files = list_files(path)
    first = next((record for _, record, _ in read_records(files[0]) if isinstance(record, dict)), {})
    is_answers = False
    with suppress(ValueError):  # the columns are not there: these are texts
        is_answers = is_record(rename_columns(first, reading.columns))
    if is_answers:
        return read_answers(path, files, reading, tally)
    if first and "text" not in first:
        got, expected = describe_fields(first), "a field text, or the fields of prompts and answers"
        fix = "name the fields of records: --columns question=...,answer=..."
        what = "the records are neither texts nor prompts and answers"
        raise DataError(what, at=files[0], got=got, expected=expected, fix=fix)
    found = (one for file in files for one in read_file(file, source="eval", root=file.parent))
    documents = [extract_article(one).text for one in keep_documents(found, tally)]  # a build reads pages so, too
    if not documents:
        raise DataError("no text can be read from the file", at=path, got=tally.describe() or None)
    tokenizer, number = reading.tokenizer, count(len(documents), "document")
    tokenizer.verify_fast_encoder([text[:10_000] for text in documents[:MAX_VERIFIED_TEXTS]])
    text_bytes = sum(len(text.encode()) for text in documents)
    encoded = list(tokenizer.encode_documents(documents))  # each with an end token
    if not reading.each:
        how = ", in one stream, with an end token after each" if len(documents) > 1 else ""
        return np.concatenate(encoded), f"{path} ({number}{how})", text_bytes, None
    prefix = tokenizer.prefix  # which every text has already
    begin = prefix or [tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id]
    texts = [ids[len(prefix) : -1].astype(np.int32) for ids in encoded]
    begun = (np.concatenate([~np.array(begin, np.int32), ids]) for ids in texts)
    rows = [row for tokens in begun for row in split_row(tokens, reading.window + 1, reading.stride)]
    return (
        np.concatenate(texts).astype(np.uint32),
        f"{path} ({number}, each on its own after a begin token)",
        text_bytes,
        reading.batches_of(rows),
    )


def read_answers(path: str, files: list[Path], reading: Reading, tally: Tally) -> Read:
    """Read the answers in files of records; see `measure`.

    A record that is longer than the window is read in windows that overlap by half, in which each token of an answer is
    scored once. An encoder reads the start of a text that is too long; answers that a decoder has no room for are left
    out.
    """
    tokenizer, kind, window = reading.tokenizer, reading.model_config.kind, reading.window
    if reading.stride < window or reading.each:
        raise UserError("--stride and --each are for texts, and these are records of answers", at=path)
    if kind == "masked":
        raise DataError(f"{reading.model_config.model_type} writes no answers", at=path, fix="name a file of texts")
    template, found, encoded = default_template(tokenizer), Found(), []
    options = {"columns": reading.columns, "train_on": reading.train_on, "date": reading.date}
    for file in files:
        encoded += encode_records(read_records(file), str(file), tokenizer, template, tally, found, **options)
    if kind == "causal":
        rows = [row.tokens for one in encoded for row in fit_row(one, window + 1, "split", None, found)]
    else:
        rows = [row.tokens for one in encoded for row in fit_pairs(one, window, "truncate_prompt", found)]
    notes = [f"{number} longer than {window} tokens: {fate}" for fate, number in found.too_long.items()]
    notes += [f"{found.empty} answers without a text, not scored"] if found.empty else []
    notes += ["fields not read: " + ", ".join(found.unread)] if found.unread else []
    what = f"the answers in {path} ({'; '.join([count(len(encoded), 'example'), *notes])})"
    return None, what, 0, reading.batches_of(rows)


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


def pair_rows(pairs: list[np.ndarray], eos_id: int, start_id: int, batch_size: int) -> Iterator[Batch]:
    """Yield texts, each with an end token, and their answers, padded to the longest of their batch."""
    starts = [int(np.argmax(pair >= 0)) for pair in pairs]
    halves = [(np.append(~pair[:start], eos_id), pair[start:]) for pair, start in zip(pairs, starts, strict=True)]
    halves.sort(key=lambda pair: len(pair[0]))
    for start in range(0, len(halves), batch_size):
        sources, answers = zip(*halves[start : start + batch_size], strict=True)
        ids = np.full((len(sources), max(map(len, sources))), start_id, dtype=np.int64)
        labels = np.full((len(answers), max(map(len, answers))), IGNORE_INDEX, dtype=np.int64)
        segments = np.full(ids.shape, -1, dtype=np.int64)
        for i, (source, answer) in enumerate(zip(sources, answers, strict=True)):
            ids[i, : len(source)], segments[i, : len(source)], labels[i, : len(answer)] = source, 0, answer
        yield Batch(ids, labels, segments=segments, decoder_input_ids=shift_right(labels, start_id))


def answer_rows(rows: list[np.ndarray], pad: int, batch_size: int) -> Iterator[Batch]:
    """Yield records in rows of their own, padded on the right to the longest of their batch; answers are the labels."""
    rows = sorted(rows, key=len)
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        shape = (len(batch), len(batch[-1]) - 1)
        inputs, labels = np.full(shape, pad, dtype=np.int64), np.full(shape, IGNORE_INDEX, dtype=np.int64)
        for i, tokens in enumerate(batch):
            inputs[i, : len(tokens) - 1] = token_ids(tokens[:-1])
            labels[i, : len(tokens) - 1] = np.where(tokens[1:] >= 0, tokens[1:], IGNORE_INDEX)
        yield Batch(inputs, labels)


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
