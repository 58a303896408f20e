"""Encode texts with labels, pairs of texts, or words with tags; `data/labelled.py` says which files are written."""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding
from tokenizers import Tokenizer as Rust

from llmkit.config.records import LabelledData, RecordSource
from llmkit.data.labelled import FILES
from llmkit.data.rows import QUARANTINE, REPORT, encode_tokens, read_report
from llmkit.data.tokens import ShardWriter, describe_file, save_array, seal
from llmkit.errors import DataError
from llmkit.files import file_sha256, folder_stamps, open_atomically, write_atomically
from llmkit.readers.documents import is_saved_dataset, load_dataset_rows
from llmkit.readers.listing import check_file
from llmkit.readers.ngrams import (
    describe_search,
    evaluation_checksums,
    flag_contaminated,
    read_evaluation_ngrams,
    shared_ngrams,
)
from llmkit.readers.tally import BadRecord, Record, Tally
from llmkit.records.build import HIT, LENGTHS, VALIDATION, list_record_files
from llmkit.records.label_layouts import (
    Labelled,
    NoFieldError,
    parse_label,
    read_labelled,
    read_rows,
    unknown_layout,
)
from llmkit.records.labels import MOST_ABSENT, Labels, check_labels, count_labels, stored_names
from llmkit.records.rows import choose_splits
from llmkit.screen import replace_surrogates
from llmkit.tokenizer.guard import library_errors
from llmkit.tokenizer.tokenizer import Tokenizer

VERSION = 1  # of the encoding
BATCH = 512  # examples that are encoded together


@dataclass
class Found:
    """Count what is found in records, besides bad ones."""

    unlabelled: int = 0
    truncated: int = 0
    too_long: int = 0
    without_token: int = 0
    words_without_token: int = 0
    contaminated: int = 0
    fields: Counter[str] = field(default_factory=Counter)


class Encoded(NamedTuple):
    """Hold the coded tokens of an example, its label or tags as numbers, its texts or words, and its record."""

    tokens: np.ndarray
    label: Any
    texts: tuple[str, ...] | list[str]
    record: dict[str, Any]


# ---- tokens ---------------------------------------------------------------------------------------------------------


def make_encoder(tokenizer: Tokenizer, seq_len: int) -> Callable[[list[tuple[str, ...] | list[str]]], list[Encoding]]:
    """Return a function that encodes texts as transformers does: with the tokens that begin, part and end them, cut to
    seq_len tokens. Words are joined with spaces. Special tokens that a text spells out are text.
    """
    rust = Rust.from_str(tokenizer.rust.to_str())
    rust.encode_special_tokens = True
    rust.no_padding()
    rust.enable_truncation(seq_len, strategy="longest_first")

    def encode(examples: list[tuple[str, ...] | list[str]]) -> list[Encoding]:
        texts = [(" ".join(one),) if isinstance(one, list) else one for one in examples]
        inputs = [replace_surrogates(one[0]) if len(one) == 1 else tuple(map(replace_surrogates, one)) for one in texts]
        with library_errors("the tokenizer can't encode a text"):
            return rust.encode_batch(inputs, add_special_tokens=True)

    return encode


def words_of(encoding: Encoding, words: list[str]) -> np.ndarray:
    """Return the number of the word that each token of `make_encoder` belongs to; -1 of a special one.

    It is the word of the token's last character: a token may begin with the space before its word.
    """
    ends = np.cumsum([len(word) + 1 for word in words])  # the place after the space behind each word
    places = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    numbers = np.searchsorted(ends, places[:, 1] - 1, side="right")
    return np.where((places[:, 1] > places[:, 0]) & (numbers < len(words)), numbers, -1)


def first_tokens(numbers: np.ndarray) -> np.ndarray:
    """Return which tokens are the first of their word, given the word of each; see `words_of`."""
    _, first = np.unique(numbers, return_index=True)
    is_first = np.zeros(len(numbers), bool)
    is_first[first] = True
    return is_first & (numbers >= 0)


# ---- all records ----------------------------------------------------------------------------------------------------


def encode_labelled(
    data: LabelledData, tokenizer: Tokenizer, out: Path, *, task: str, seed: int, keep: bool = True
) -> dict[str, Any]:
    """Encode `data` into OUT/<key>/, unless that is done; return the report, with the folder added.

    task  classify, regress or tag
    keep  whether the folder stays: only then messages name the list of bad records in it

    Raise DataError if more records are bad than data.on_error allows, or if there are no labels to learn.
    """
    sources = [*data.all_sources(), *([RecordSource(name="val", path=data.val_path)] if data.val_path else [])]
    splits = [None, VALIDATION][: len(sources)]
    files = [list_labelled_files(one, task, data.header, split) for one, split in zip(sources, splits, strict=True)]
    contents = [
        [file_sha256(path) for path in paths] if paths else folder_stamps(Path(source.path).expanduser())
        for source, paths in zip(sources, files, strict=True)
    ]
    if data.labels is None and task != "regress" and (names := stored_names(sources[0], files[0], data, task)):
        data = data.model_copy(update={"labels": names})
    searched = evaluation_checksums(data.decontaminate.files) if data.decontaminate else []
    settings = [VERSION, task, data.model_dump(exclude={"on_error"}), seed, tokenizer.sha256, contents, searched]
    folder = out / hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    listed_in = folder / QUARANTINE if keep else "quarantine.jsonl of the run, once it is started"
    try:
        report = read_report(folder)
    except DataError:  # there is none yet, or it is damaged
        folder.mkdir(parents=True, exist_ok=True)
        rows = [read_source(one, task, data.header, split) for one, split in zip(sources, splits, strict=True)]
        report = write_examples(data, tokenizer, folder, task, seed, rows, listed_in)
        report = seal(report | describe_search(data.decontaminate))
        write_atomically(folder / REPORT, json.dumps(report, indent=2))
    check_records(Tally(**report["records"]), data, listed_in)
    return report | {"key": folder.name, "folder": str(folder), "listed_in": str(listed_in)}


def check_records(tally: Tally, data: LabelledData, listed_in: Path | str) -> None:
    """Raise DataError if there are more bad records than the config allows."""
    tally.check(data.on_error.max_fraction, fix=data.on_error.fix, listed_in=listed_in)


def list_labelled_files(
    source: RecordSource, task: str, header: list[str] | None, split: str | None = None
) -> list[Path] | None:
    """Return the files of a source, or None if `datasets` reads it. Raise DataError for what can't be read.

    split  of a folder with several, instead of the source's
    """
    path = Path(source.path).expanduser()
    if path.is_file() and (task == "tag" or header):  # as train.conll, or SMSSpamCollection, which has no suffix
        check_file(path, any_suffix=True)
        return [path]
    return list_record_files(source, split=split)


def read_source(
    source: RecordSource, task: str, header: list[str] | None, split: str | None = None
) -> Iterator[tuple[str, Iterator[Record]]]:
    """Yield (file, records) of a source; see `list_labelled_files`."""
    files = list_labelled_files(source, task, header, split)
    for path in files or []:
        yield str(path), read_rows(path, task == "tag", header)
    if not files:
        saved = is_saved_dataset(Path(source.path).expanduser())
        yield source.path, load_dataset_rows(source.path, None, source.split, False, saved, "", None)


def write_examples(
    data: LabelledData,
    tokenizer: Tokenizer,
    folder: Path,
    task: str,
    seed: int,
    sources: list[Iterable[tuple[str, Iterable[Record]]]],
    listed_in: Path | str,
) -> dict[str, Any]:
    """Encode all records, number their labels, and choose the splits. Return the report."""
    tally, found, labels = Tally(), Found(), Labels(task, data.labels, data.multi_label)
    kept, digests, is_val, hits, evals = [], [], [], [], data.decontaminate
    wanted = read_evaluation_ngrams(evals.files, evals.ngram)[0] if evals else None
    with (
        ShardWriter(folder / "tokens", FILES["tokens"]) as tokens,
        ShardWriter(folder / "tags", FILES["tags"]) as tags,
        open_atomically(folder / QUARANTINE) as listed,
    ):

        def note_bad(bad: BadRecord) -> None:
            tally.add(0, bad)
            listed.write(json.dumps(vars(bad)).encode() + b"\n")

        for number, files in enumerate(sources):
            for path, records in files:
                examples = read_examples(path, records, data, labels, tally, found, note_bad)
                for one in encode_examples(examples, data, tokenizer, task, found):
                    tokens.add(one.tokens)
                    tags.add(one.label) if task == "tag" else kept.append(one.label)
                    texts = (" ".join(one.texts),) if isinstance(one.texts, list) else one.texts
                    shared = shared_ngrams(texts, wanted, evals.ngram) if evals else ()
                    hits += [(len(digests), gram) for gram in shared]
                    digest = hashlib.blake2b(repr(texts).encode("utf-8", "replace"), digest_size=8).digest()
                    digests.append(int.from_bytes(digest, "little"))
                    is_val.append(number > 0)
    check_records(tally, data, listed_in)
    if not digests:
        raise nothing_left(data, tally, found, listed_in)
    train, val, is_shared = choose_splits(np.array(digests, np.uint64), np.array(is_val), data.val_fraction, seed)
    if (number := labels.absent(kept, MOST_ABSENT)) is not None:
        is_absent = np.array(kept) == number
        train, val, found.unlabelled = train & ~is_absent, val & ~is_absent, found.unlabelled + int(is_absent.sum())
        kept = [0 if one == number else one - (one > number) for one in kept]
        labels.forget("-1")
    if evals:
        shared = np.array(hits, HIT)
        flagged = flag_contaminated(shared["record"], shared["gram"], len(digests), evals.ignore_if_in_docs)
        found.contaminated = int(flagged.sum())
        if evals.action == "drop":
            train, val = train & ~flagged, val & ~flagged
    if not train.any():
        raise nothing_left(data, tally, found, listed_in)
    names, places = labels.in_order()
    if task == "tag":
        coded = np.memmap(tags.path, FILES["tags"], "r+")
        coded[coded >= 0] = places[coded[coded >= 0]]
        coded.flush()
        counts = count_labels(task, names, coded[np.repeat(train, np.diff(tokens.ends, prepend=0))])
    else:
        array = labels.as_array(kept)
        save_array(folder / "labels.npy", array)
        counts = count_labels(task, names, array[train])
    check_labels(data, task, labels.multi_label, counts, len(digests))
    splits, lengths = {"train": train, "val": val}, np.diff(np.array(tokens.ends), prepend=0)
    for name, chosen in splits.items():
        save_array(folder / f"{name}.npy", np.flatnonzero(chosen))
    own = [tags.path] if task == "tag" else [folder / "labels.npy"]
    written = [tokens.path, tokens.index, *own, *(folder / f"{name}.npy" for name in splits)]
    return {
        "files": [describe_file(path, folder) for path in written],
        "records": tally.counts(),
        "found": vars(found) | {"fields": dict(found.fields)},
        "lengths": {name: int(np.quantile(lengths, q, method="inverted_cdf")) for name, q in LENGTHS.items()},
        "seq_len": data.seq_len,
        "task": task,
        "labels": names,
        "multi_label": bool(labels.multi_label),
        "counts": counts,
        "pad_id": tokenizer.pad_id,
        "pairs": bool((np.memmap(tokens.path, FILES["tokens"], "r") < 0).any()),
        "splits": {
            name: {"examples": int(one.sum()), "tokens": int(lengths[one].sum())} for name, one in splits.items()
        },
        "texts in both": is_shared,
    }


def read_examples(
    path: str,
    records: Iterable[Record],
    data: LabelledData,
    labels: Labels,
    tally: Tally,
    found: Found,
    note_bad: Callable[[BadRecord], None],
) -> Iterator[Labelled]:
    """Yield the good records of a file that have a label, which becomes numbers."""
    is_first, columns = True, data.columns
    for line, record, size in records:
        if isinstance(record, BadRecord):
            note_bad(record)
            continue
        try:
            one, fields = read_labelled(record, labels.task, columns, data.labels)
            label = parse_label(one.label, labels.task, data.label_separator, data.labels)
            is_tagged = isinstance(label, list) and len(label) == len(one.texts)
            if labels.task == "tag" and label is not None and not is_tagged:
                raise ValueError("there is not one tag for each word")
            label = None if label is None else labels.encode(label)
        except ValueError as error:
            if is_first and isinstance(error, NoFieldError):
                raise unknown_layout(record, f"{path}:{line}", error) from None
            note_bad(BadRecord(path, line, None, str(error), size))
            continue
        if is_first:  # the fields of a file are those of its first record: another one with a label is no other name
            is_first, columns = False, fields
        tally.add(size)
        if label is None:
            found.unlabelled += 1
            continue
        found.fields.update(fields.values())
        yield one._replace(label=label)


def encode_examples(
    examples: Iterator[Labelled], data: LabelledData, tokenizer: Tokenizer, task: str, found: Found
) -> Iterator[Encoded]:
    """Yield examples as tokens."""
    encode = make_encoder(tokenizer, data.seq_len)
    while batch := list(itertools.islice(examples, BATCH)):
        for one, encoding in zip(batch, encode([one.texts for one in batch]), strict=True):
            if encoding.overflowing and data.too_long == "drop":
                found.too_long += 1
                continue
            if not encoding.ids:
                found.without_token += 1
                continue
            found.truncated += bool(encoding.overflowing)
            label = one.label
            if task == "tag":
                numbers = words_of(encoding, one.texts)
                is_first = first_tokens(numbers)
                found.words_without_token += len(one.texts) - int(is_first.sum())
                label = np.where(is_first, np.array(label)[numbers], -1)
            coded = encode_tokens(encoding.ids, np.array(encoding.type_ids) == 0)
            yield Encoded(coded, label, one.texts, one.record)


def nothing_left(data: LabelledData, tally: Tally, found: Found, listed_in: Path | str) -> DataError:
    """Return the error for data of which no example is left."""
    reasons = [f"{found.unlabelled} records without a label"] if found.unlabelled else []
    reasons += [f"{found.contaminated} share a text with evaluation files"] if found.contaminated else []
    reasons += [f"{found.too_long} longer than {data.seq_len} tokens"] if found.too_long else []
    got = "; ".join(filter(None, [", ".join(reasons), tally.describe(listed_in)])) or "no record at all"
    return DataError("no example is left to train on", at=data.path, got=got)
