"""Encode fine-tuning records into a folder: their tokens, one after another, and which of them form a row.

Nothing but a few numbers per example is held in memory. Rows are put together when a batch is read: see
`batches.packed_batches` and `batches.pair_batches`. The files of a folder are
    examples.bin       the tokens of all examples, int32: the id of a target, or ~id (below 0) of any other token
    examples.idx       the ends of the examples in it
    SPLIT-pieces.npy   packed rows: (place in examples.bin, tokens) of every piece, row after row
    SPLIT-rows.npy     packed rows: the ends of the rows among the pieces
    SPLIT-pairs.npy    for an encoder-decoder: (place, tokens before the answer, tokens of the answer)
    quarantine.jsonl   the bad records
    report.json        counts and checksums, written last
"""

import hashlib
import itertools
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.config.data import SftData
from llmkit.data.layouts import Pair, UnknownLayoutError, read_examples, refuse_first
from llmkit.data.tokens import ShardWriter, check_unchanged, describe_file, read_sealed, seal
from llmkit.errors import DataError
from llmkit.files import delete_leftovers, file_sha256, write_atomically
from llmkit.readers.documents import check_file, refuse_zip
from llmkit.readers.records import read_records
from llmkit.readers.tally import BadRecord, Tally
from llmkit.tokenizer.chat_template import (
    Conversation,
    Rendered,
    default_template,
    encode_rendered,
    render_examples,
)
from llmkit.tokenizer.renderer import TemplateLimit
from llmkit.tokenizer.tokenizer import Tokenizer

VERSION = 4  # of the encoding; data of another version is encoded again
TOKENS = np.dtype("<i4")
REPORT, QUARANTINE = "report.json", "quarantine.jsonl"
ENCODE_AGAIN = "delete {} and fine-tune again: the records are then encoded again"
BATCH = 64  # records that are rendered together
MAX_LIMITS = 2  # records in a row that exceed a limit of the template: it is at fault, and each costs seconds
Example = tuple[list[int], list[bool]]  # token ids, which of them are targets


@dataclass
class Found:
    """What is found in the records of some files, besides bad ones."""

    layouts: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)  # fields without a meaning here
    empty: int = 0  # answers without a text, which are no targets
    divided: int = 0  # conversations of which each answer is an example: the template rewrites earlier turns


def encode_records(
    path: Path,
    tokenizer: Tokenizer,
    template: str,
    tally: Tally,
    found: Found,
    quarantine: Callable[[BadRecord], Any] = lambda bad: None,
    *,
    columns: dict[str, str] | None = None,
    train_on: str = "all",
) -> Iterator[Example]:
    """Encode the good records of a JSON, JSONL (.gz, .zst), CSV or Parquet file.

    tally       counts the records, and the bad ones by reason
    found       gets the counts of what else there is
    quarantine  is called with every bad record
    columns     our name of a field -> the file's name; None: the usual names
    train_on    "all" answers of a conversation, or the "last" one

    Raise DataError if the file holds other records, if the template can't be parsed, or if it exceeds its limits for
    MAX_LIMITS records in a row.
    """
    records, size, limits = read_records(path), 1, 0
    first = True
    while batch := list(itertools.islice(records, size)):
        read: list[list[Pair | Conversation] | ValueError | BadRecord] = []
        for line, record, _ in batch:
            try:
                read.append(
                    record
                    if isinstance(record, BadRecord)
                    else read_record(record, f"{path}:{line}", columns or {}, train_on, found)
                )
            except UnknownLayoutError as error:
                if first:
                    raise refuse_first(record, f"{path}:{line}") from None
                read.append(error)
            except ValueError as error:
                read.append(error)
            first = first and isinstance(record, BadRecord)
        chats = [
            one for examples in read if isinstance(examples, list) for one in examples if isinstance(one, Conversation)
        ]
        try:
            rendered = iter(render_examples(tokenizer, template, chats))
        except DataError as error:  # the template can't be parsed, whatever the record
            error.at = f"{path}:{batch[0][0]}"
            raise
        for (line, _, bytes_read), examples in zip(batch, read, strict=True):
            encoded = encode_examples(tokenizer, examples, rendered, found) if isinstance(examples, list) else examples
            limits = limits + 1 if isinstance(encoded, TemplateLimit) else 0
            if limits == MAX_LIMITS:  # each of them takes seconds
                got, fix = f"{limits} such records in a row", "correct the template, or shorten the conversations"
                raise DataError(str(encoded), at=f"{path}:{line}", got=got, fix=fix)
            if isinstance(encoded, list):
                tally.add(bytes_read)
                yield from encoded
            else:
                bad = (
                    encoded
                    if isinstance(encoded, BadRecord)
                    else BadRecord(str(path), line, None, str(encoded), bytes_read)
                )
                tally.add(0, bad)
                quarantine(bad)
        size = 1 if limits else min(2 * size, BATCH)


def read_record(
    record: dict[str, Any], at: str, columns: dict[str, str], train_on: str, found: Found
) -> list[Pair | Conversation]:
    """Return the examples of a record, and count them. Raise ValueError if it is bad."""
    examples = []
    for layout, one in read_examples(record, columns, found.unread, at):
        found.layouts[layout] += 1
        examples.append(one)
        if isinstance(one, Conversation):
            found.empty += choose_answers(one, train_on)
    return examples


def choose_answers(one: Conversation, train_on: str) -> int:
    """Choose which answers of a conversation are learnt: none without a text. Return the number of those."""
    empty = 0
    for i, message in enumerate(one.messages):
        if one.learnt[i] and not (message["content"].strip() or message.keys() & {"tool_calls", "reasoning_content"}):
            one.learnt[i], empty = False, empty + 1
    if train_on == "last":
        last = max((i for i, learnt in enumerate(one.learnt) if learnt), default=-1)
        one.learnt[:] = [i == last for i in range(len(one.learnt))]
    return empty


def encode_examples(
    tokenizer: Tokenizer,
    examples: list[Pair | Conversation],
    rendered: Iterator[list[Rendered] | ValueError],
    found: Found,
) -> list[Example] | ValueError:
    """Return the ids and targets of a record's examples; the error of one, if there is any.

    rendered  gives what became of the next conversation
    """
    encoded, error = [], None
    for one in examples:
        if isinstance(one, tuple):
            encoded.append(encode_pair(tokenizer, one))
            continue
        texts = next(rendered)
        if isinstance(texts, ValueError):
            error = texts
        else:
            found.divided += len(texts) > 1
            encoded += [encode_rendered(tokenizer, text) for text in texts]
    return error or encoded


def encode_pair(tokenizer: Tokenizer, pair: Pair) -> Example:
    """Return (ids, targets) of a prompt and its completion. The prompt's ids are those that generation starts from."""
    prompt, completion = tokenizer.encode_prompt(pair[0]), tokenizer.encode_continuation(pair[1])
    return [*prompt, *completion, tokenizer.eos_id], [False] * len(prompt) + [True] * (len(completion) + 1)


def encode_sft(data: SftData, tokenizer: Tokenizer, out: Path, *, seed: int, pairs: bool = False) -> dict[str, Any]:
    """Encode `data` into OUT/<key>/, unless that is done. Return the report, with the folder added.

    The key is a hash of all settings and files, so that the data of other runs is never overwritten.

    pairs  for an encoder-decoder: a row is a prompt and an answer; otherwise it is seq_len + 1 tokens, of several whole
           examples (packing) or of one

    Raise DataError if more records are bad than data.on_error allows, or if a file changed after it was written.
    """
    sources = [Path(data.path), *([Path(data.val_path)] if data.val_path else [])]
    for path in sources:
        check_file(path)
        refuse_zip(path, "fine-tuning records")
    template = default_template(tokenizer)
    settings = [VERSION, pairs, data.model_dump(exclude={"on_error"}), seed, template, tokenizer.sha256]
    key = hashlib.sha256(json.dumps([*settings, *map(file_sha256, sources)]).encode()).hexdigest()[:16]
    folder = out / key
    try:
        report = read_report(folder)
    except DataError:  # there is none yet, or it is damaged
        report = seal(write_examples(data, sources, tokenizer, template, folder, seed, pairs))
        write_atomically(folder / REPORT, json.dumps(report, indent=2))
    check_records(Tally(**report["records"]), data, folder)
    return report | {"key": key, "folder": str(folder)}


def check_records(tally: Tally, data: SftData, folder: Path) -> None:
    """Raise DataError if there are more bad records than the config allows."""
    tally.check(data.on_error.max_fraction, fix=data.on_error.fix, listed_in=folder / QUARANTINE)


def write_examples(
    data: SftData, sources: list[Path], tokenizer: Tokenizer, template: str, folder: Path, seed: int, pairs: bool
) -> dict[str, Any]:
    """Encode the records of the train and val files into a folder. Return the report."""
    folder.mkdir(parents=True, exist_ok=True)
    delete_leftovers(folder)
    tally, found, sizes = Tally(), Found(), []
    answers = array("i")  # example, start and stop of every answer in it
    with (folder / QUARANTINE).open("w", encoding="utf-8") as file, ShardWriter(folder / "examples", TOKENS) as shard:

        def write_bad(bad: BadRecord) -> None:
            file.write(json.dumps(vars(bad)) + "\n")

        for path in sources:
            options = {"columns": data.columns, "train_on": data.train_on}
            for ids, targets in encode_records(path, tokenizer, template, tally, found, write_bad, **options):
                for start, stop in answer_spans(targets):
                    answers.extend((len(shard.ends), start, stop))
                shard.add(np.where(targets, ids, np.invert(ids)))
            sizes.append(len(shard.ends) - sum(sizes))
        file.flush()
        check_records(tally, data, folder)
        ends, spans = np.array(shard.ends, np.int64), np.frombuffer(answers, np.int32).reshape(-1, 3)
        chosen = choose_splits(sizes, data.val_fraction, seed)
        plans = [(plan_pairs if pairs else plan_rows)(ends, spans, examples, data) for examples in chosen]
        splits = dict(zip(("train", "val"), (counts for _, counts in plans), strict=True))
        if not splits["train"]["rows"]:
            raise no_examples_error(data, splits["train"], tally, folder)
        plan_files = []
        for split, (arrays, _) in zip(splits, plans, strict=True):
            for name, values in arrays.items():
                plan_files.append(folder / f"{split}-{name}.npy")
                np.save(plan_files[-1], values, allow_pickle=False)
    return {
        "files": [describe_file(path, folder) for path in (shard.path, shard.index, *plan_files)],
        "records": tally.counts(),
        "found": {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(found).items()},
        "seq_len": data.seq_len,
        "too_long": data.too_long,
        "eos_id": tokenizer.eos_id,
        "splits": splits,
    }


def no_examples_error(data: SftData, counts: dict[str, Any], tally: Tally, folder: Path) -> DataError:
    """Return the error for data of which no example is left."""
    reasons = [f"{counts[name]} {name}" for name in ("examples", "too long", "without a target") if counts.get(name)]
    got = "; ".join([", ".join(reasons) or "no usable record", *filter(None, [tally.describe(folder / QUARANTINE)])])
    return DataError("no example is left to train on", at=data.path, got=got)


def answer_spans(targets: list[bool]) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of each run of targets.

    >>> list(answer_spans([False, True, True, False, True]))
    [(1, 3), (4, 5)]
    """
    start = 0
    for is_target, run in itertools.groupby(targets):
        stop = start + sum(1 for _ in run)
        if is_target:
            yield start, stop
        start = stop


def choose_splits(sizes: list[int], val_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which examples are in train, and which in val, as booleans.

    sizes  number of examples of the train file, and of the val file; without the latter a part of the former is val
    """
    total = sum(sizes)
    if len(sizes) == 2:
        in_val = np.arange(total) >= sizes[0]
    else:
        in_val = np.zeros(total, bool)
        held_out = max(1, round(total * val_fraction)) if total > 1 else 0
        in_val[np.random.default_rng(seed).permutation(total)[:held_out]] = True
    return ~in_val, in_val


# ---- packed rows ----------------------------------------------------------------------------------------------------


def pack(lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose which examples share a row of `size` tokens: best-fit decreasing (Ding et al. 2024, arXiv:2404.10830).

    Return (members, ends): row r holds the examples members[ends[r - 1] : ends[r]].

    >>> [array.tolist() for array in pack(np.array([3, 5, 2, 6]), 8)]
    [[3, 2, 1, 0], [2, 4]]
    """
    order = np.argsort(-lengths, kind="stable")
    row_of, rows = np.empty(len(order), np.int64), 0
    by_room: list[list[int]] = [[] for _ in range(size + 1)]  # free tokens -> rows with exactly that many
    rooms = 0  # bit r is set if by_room[r] has a row: the lowest bit from `need` on is the best fit
    for place, need in enumerate(lengths[order].tolist()):
        fitting = rooms >> need
        if fitting:
            room = need + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            row, room, rows = rows, size, rows + 1
        row_of[place] = row
        by_room[room - need].append(row)
        rooms |= 1 << (room - need)
    return order[np.argsort(row_of, kind="stable")], np.cumsum(np.bincount(row_of, minlength=rows))


def plan_rows(
    ends: np.ndarray, answers: np.ndarray, chosen: np.ndarray, data: SftData
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Choose the pieces of each row of a split. Return the arrays `pieces` and `rows`, and the split's counts.

    ends     ends of all examples in the tokens
    answers  (example, start, stop) of all answers
    chosen   which examples are in the split
    """
    size, lengths = data.seq_len + 1, np.diff(ends, prepend=0)
    # No token precedes the first one, so it can't be predicted.
    kept = np.clip(np.minimum(answers[:, 2], size) - np.maximum(answers[:, 1], 1), 0, None)
    targets = np.bincount(answers[:, 0], weights=kept, minlength=len(ends)).astype(np.int64)
    too_long = chosen & (lengths > size)
    fitting = chosen & ~too_long if data.too_long == "drop" else chosen
    without = fitting & (targets == 0)  # the answer is empty or was cut away
    counts = {"examples": chosen.sum(), "too long": too_long.sum(), "without a target": without.sum()}
    examples = np.flatnonzero(fitting & (targets > 0))
    taken = np.minimum(lengths[examples], size)
    alone = np.arange(len(examples))
    members, rows = pack(taken, size) if data.packing is not False else (alone, alone + 1)
    pieces = np.stack([(ends - lengths)[examples], taken], axis=1)[members]
    counts |= {"rows": len(rows), "tokens": taken.sum(), "targets": targets[examples].sum()}
    return {"pieces": pieces, "rows": rows}, {name: int(number) for name, number in counts.items()}


# ---- pairs for an encoder-decoder -----------------------------------------------------------------------------------


def split_into_pairs(ids: list[int], targets: list[bool], eos_id: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield a pair for each answer of an example: (all that precedes it and an end token, answer).

    >>> list(split_into_pairs([5, 6, 7, 1], [False, False, True, True], 1))
    [([5, 6, 1], [7, 1])]
    """
    for start, stop in answer_spans(targets):
        yield [*ids[:start], eos_id], ids[start:stop]


def truncate_pair(source: list[int], answer: list[int], size: int) -> tuple[list[int], list[int]]:
    """Truncate source and answer to `size` tokens each. The source keeps its end token."""
    return (source if len(source) <= size else [*source[: size - 1], source[-1]]), answer[:size]


def plan_pairs(
    ends: np.ndarray, answers: np.ndarray, chosen: np.ndarray, data: SftData
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Choose the pairs of a split, as `split_into_pairs` and `truncate_pair` make them; see `plan_rows`.

    The counts have "longest": the tokens of the longest prompt, end token included, and of the longest answer.
    """
    examples, starts, stops = answers[chosen[answers[:, 0]]].astype(np.int64).T
    sources, answered = starts + 1, stops - starts
    too_long = np.maximum(sources, answered) > data.seq_len
    counts = {"examples": int(chosen.sum()), "too long": int(too_long.sum())}
    fitting = ~too_long if data.too_long == "drop" else np.ones(len(examples), bool)
    sources, answered = (np.minimum(one[fitting], data.seq_len) for one in (sources, answered))
    places = np.concatenate([[0], ends])[examples[fitting]]
    pairs = np.stack([places, starts[fitting], answered], axis=1)
    counts |= {"rows": len(pairs), "tokens": int(sources.sum()), "targets": int(answered.sum())}
    return {"pairs": pairs}, counts | {"longest": [int(one.max(initial=0)) for one in (sources, answered)]}


# ---- read it back ---------------------------------------------------------------------------------------------------


def read_report(folder: Path) -> dict[str, Any]:
    """Return the report of a folder of encoded records. Raise DataError if it is missing or not as it was written."""
    path, fix = folder / REPORT, ENCODE_AGAIN.format(folder)
    try:
        return read_sealed(path)
    except FileNotFoundError:
        raise DataError("there are no encoded records", at=folder, fix=fix) from None
    except ValueError:
        what = "the report of the encoded records is damaged, or of another version of llmkit"
        raise DataError(what, at=path, fix=fix) from None


def open_encoded(folder: Path, split: str, *names: str) -> tuple[dict[str, Any], np.ndarray, list[np.ndarray]]:
    """Return (report, tokens, the split's arrays of these names), memory-mapped.

    Raise DataError if a file changed after it was written.
    """
    report = read_report(folder)
    check_unchanged(folder, report["files"], "the encoded records changed", fix=ENCODE_AGAIN.format(folder))
    arrays = [np.load(folder / f"{split}-{name}.npy", mmap_mode="r", allow_pickle=False) for name in names]
    return report, np.memmap(folder / "examples.bin", TOKENS, "r"), arrays
