"""Encode prompts that a model answers while it is trained; `data/prompts.py` says which files are written."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.config.records import PromptData, RecordSource
from llmkit.data.prompts import FILES
from llmkit.data.rows import QUARANTINE, REPORT, read_report
from llmkit.data.tokens import ShardWriter, describe_file, save_array, seal
from llmkit.errors import DataError
from llmkit.files import file_sha256, open_atomically, write_atomically
from llmkit.readers.ngrams import (
    describe_search,
    evaluation_checksums,
    flag_contaminated,
    read_evaluation_ngrams,
    shared_ngrams,
    strings_in,
)
from llmkit.readers.records import read_records
from llmkit.readers.tally import BadRecord, Tally
from llmkit.records.build import HIT, LENGTHS, VALIDATION, list_record_files
from llmkit.records.layouts import (
    ANSWERS,
    SYSTEM,
    TOOLS,
    TURNS,
    VARIABLES,
    OtherKindError,
    Pair,
    UnknownColumnError,
    UnknownLayoutError,
    as_turns,
    check_media,
    read_layout,
    refuse_first,
    rename_columns,
    use_other_names,
)
from llmkit.records.preferences import without_answer
from llmkit.records.rows import choose_splits
from llmkit.tokenizer.chat_template import Conversation, default_template, encode_chat
from llmkit.tokenizer.messages import split_turns
from llmkit.tokenizer.tokenizer import Tokenizer

VERSION = 1  # of the encoding
TEXT = "prompt"  # the layout of texts to continue, which no chat template touches


def read_prompt(record: dict[str, Any], columns: dict[str, str]) -> tuple[str, Pair | Conversation]:
    """Return (layout, prompt) of a record: a conversation up to the answer, which may be missing, or a pair whose first
    text is to be continued.

    Raise ValueError if the record is bad, UnknownLayoutError if its layout is not known.
    """
    given = rename_columns(record, columns)
    fields = {name: value for name, value in given.items() if value is not None}
    if not columns:
        use_other_names(fields)
    check_media(fields)
    turns = next((name for name in TURNS if name in fields), None)
    if not turns and isinstance(text := as_turns(fields.get("prompt"), "prompt"), str):
        if not text:
            raise ValueError("prompt is empty")
        if beside := [name for name in (*SYSTEM, *TOOLS, "history", *VARIABLES) if fields.get(name)]:
            raise ValueError(f"prompt is a text to continue, which has no place for {beside[0]}")
        return TEXT, (text, "")
    said = split_turns(fields[turns]) if turns else []
    # A text stands in for an answer that is not there, and is cut off again.
    if not any(name in fields for name in ANSWERS) and without_answer(said) is said:
        fields["answer"] = "-"
    _, layout, [example, *others] = read_layout(fields, Counter())
    if others:
        raise ValueError(f"{layout} has several examples, which a prompt can't be")
    last = max(i for i, message in enumerate(example.messages) if message["role"] == "assistant")
    if not example.messages[:last]:
        raise ValueError("there is no turn before the answer")
    asked = turns or layout.partition("/")[0]
    return f"{asked} of a chat", Conversation(
        example.messages[:last], example.learnt[:last], example.tools, example.variables
    )


def encode_prompt(tokenizer: Tokenizer, one: Pair | Conversation) -> list[int]:
    """Return the ids from which the model goes on."""
    if isinstance(one, tuple):
        return tokenizer.encode_prompt(one[0])
    return encode_chat(tokenizer, one.messages, one.tools, one.variables)


def read_ids(
    path: Path, columns: dict[str, str], tokenizer: Tokenizer, tally: Tally, note_bad: Callable[[BadRecord], None]
) -> Iterator[tuple[dict[str, Any], str, list[int]]]:
    """Yield (record, layout, ids of the prompt) of the good records of a file."""
    is_first = True
    for line, record, size in read_records(path):
        try:
            if isinstance(record, BadRecord):
                raise ValueError(record.reason)
            layout, one = read_prompt(record, columns)
            ids = encode_prompt(tokenizer, one)
        except ValueError as error:
            if is_first and isinstance(error, UnknownLayoutError | UnknownColumnError | OtherKindError):
                raise refuse_first(record, f"{path}:{line}", error) from None
            bad = record if isinstance(record, BadRecord) else BadRecord(str(path), line, None, str(error), size)
            note_bad(bad)
            continue
        is_first = False
        tally.add(size)
        yield record, layout, ids


def encode_prompts(
    data: PromptData, tokenizer: Tokenizer, out: Path, *, room: int, seed: int, keep: bool = True
) -> dict[str, Any]:
    """Encode `data` into OUT/<key>/, unless that is done; return the report, with the folder added.

    room  tokens that a prompt may have
    keep  whether the folder stays: only then messages name the list of bad records in it

    Raise DataError if more records are bad than data.on_error allows, or if no prompt is left.
    """
    sources = [*data.all_sources(), *([RecordSource(name="val", path=data.val_path)] if data.val_path else [])]
    files = [list_record_files(one, split=split) for one, split in zip(sources, (None, VALIDATION), strict=False)]
    if None in files:
        raise DataError("prompts are read from files of records", at=data.path, fix="write the data set as JSONL")
    sums = [[file_sha256(path) for path in paths] for paths in files]
    sums.append(evaluation_checksums(data.decontaminate.files) if data.decontaminate else [])
    settings = [VERSION, data.model_dump(exclude={"on_error"}), default_template(tokenizer), room, seed]
    folder = out / hashlib.sha256(json.dumps([*settings, tokenizer.sha256, sums]).encode()).hexdigest()[:16]
    listed_in = folder / QUARANTINE if keep else "quarantine.jsonl of the run, once it is started"
    try:
        report = read_report(folder)
    except DataError:  # there is none yet, or it is damaged
        folder.mkdir(parents=True, exist_ok=True)
        report = write_prompts(data, tokenizer, folder, room, seed, files, listed_in)
        report = seal(report | describe_search(data.decontaminate))
        write_atomically(folder / REPORT, json.dumps(report, indent=2))
    Tally(**report["records"]).check(data.on_error.max_fraction, fix=data.on_error.fix, listed_in=listed_in)
    return report | {"key": folder.name, "folder": str(folder), "listed_in": str(listed_in)}


def write_prompts(
    data: PromptData,
    tokenizer: Tokenizer,
    folder: Path,
    room: int,
    seed: int,
    files: list[list[Path]],
    listed_in: Path | str,
) -> dict[str, Any]:
    """Encode all records, and choose the splits. Return the report.

    files  of data.path, and of data.val_path if there is one
    """
    tally, layouts, too_long, evals = Tally(), Counter(), 0, data.decontaminate
    digests, is_val, hits = [], [], []
    wanted = read_evaluation_ngrams(evals.files, evals.ngram)[0] if evals else None
    with (
        ShardWriter(folder / "tokens", FILES["tokens"]) as tokens,
        ShardWriter(folder / "records", FILES["records"]) as kept,
        open_atomically(folder / QUARANTINE) as listed,
    ):

        def note_bad(bad: BadRecord) -> None:
            tally.add(0, bad)
            listed.write(json.dumps(vars(bad)).encode() + b"\n")

        for number, path in ((number, path) for number, paths in enumerate(files) for path in paths):
            for record, layout, ids in read_ids(path, data.columns, tokenizer, tally, note_bad):
                if not 0 < len(ids) <= room:
                    too_long += 1
                    continue
                layouts[layout] += 1
                tokens.add(np.array(ids))
                kept.add(np.frombuffer(json.dumps(record, default=str).encode(), np.uint8))
                shared = shared_ngrams(tuple(strings_in(record)), wanted, evals.ngram) if evals else ()
                hits += [(len(digests), gram) for gram in shared]
                digests.append(int.from_bytes(hashlib.blake2b(repr(ids).encode(), digest_size=8).digest(), "little"))
                is_val.append(number > 0)
    tally.check(data.on_error.max_fraction, fix=data.on_error.fix, listed_in=listed_in)
    if not digests:
        got = f"{too_long} longer than {room} tokens" if too_long else tally.describe(listed_in)
        raise DataError("no prompt is left to train on", at=data.path, got=got)
    train, val, is_shared = choose_splits(np.array(digests, np.uint64), np.array(is_val), data.val_fraction, seed)
    contaminated = 0
    if evals:
        shared = np.array(hits, HIT)
        flagged = flag_contaminated(shared["record"], shared["gram"], len(digests), evals.ignore_if_in_docs)
        contaminated = int(flagged.sum())
        if evals.action == "drop":
            train, val = train & ~flagged, val & ~flagged
    chosen, lengths = {"train": train, "val": val}, np.diff(np.array(tokens.ends), prepend=0)
    for name, one in chosen.items():
        save_array(folder / f"{name}.npy", np.flatnonzero(one))
    written = [tokens.path, tokens.index, kept.path, kept.index, *(folder / f"{name}.npy" for name in chosen)]
    return {
        "files": [describe_file(path, folder) for path in written],
        "records": tally.counts(),
        "layouts": dict(layouts),
        "found": {"too_long": too_long, "contaminated": contaminated},
        "room": room,
        "lengths": {name: int(np.quantile(lengths, q, method="inverted_cdf")) for name, q in LENGTHS.items()},
        "mean_length": float(lengths.mean()),
        "seq_len": data.seq_len,
        "eos_id": tokenizer.eos_id,
        "splits": {name: {"examples": int(one.sum())} for name, one in chosen.items()},
        "prompts in both": is_shared,
    }
