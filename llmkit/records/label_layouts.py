"""Read texts with labels, pairs of texts, and words with tags, in the layouts that files have."""

import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmkit.errors import DataError, did_you_mean
from llmkit.readers.packed import open_bytes, suffix_of
from llmkit.readers.records import DOCUMENT_FORMATS, READERS, read_csv, read_records
from llmkit.readers.tally import BadRecord, Record
from llmkit.records.layouts import describe_fields

PAIRS = (  # names of the fields of two texts, those of GLUE and SuperGLUE first
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("#1 String", "#2 String"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question", "passage"),
    ("text_a", "text_b"),
    ("text", "text_pair"),
)
TEXTS = ("text", "sentence", "content", "review", "tweet", "comment_text", "comment", "document")
LABELS = (
    *("label", "labels", "gold_label", "is_duplicate", "Quality", "score", "class", "category", "sentiment"),
    *("target", "rating", "stars"),
)
WORDS, TAGS = ("tokens", "words"), ("ner_tags", "tags", "pos_tags", "labels")
FIELDS = tuple(dict.fromkeys([name for pair in PAIRS for name in pair] + [*TEXTS, *LABELS, *WORDS, *TAGS]))
OURS = ("text", "text_pair", "label", "tokens", "tags")  # that data.columns may name
NO_LABEL = ("", "-")  # the latter is SNLI's for "the annotators do not agree"
YES, NO = ("1", "1.0", "true"), ("0", "0.0", "false")  # in a column of 0 and 1
TRIED_ROWS = 1000  # of a TSV file, from which it is told whether quotes have a meaning
COLA = ["source", "label", "star", "sentence"]  # GLUE's CoLA has no line with the names of its columns


class Labelled(NamedTuple):
    """A text, two, or words, and what is right: a label or tags as they are in the file; None if it is not known."""

    texts: tuple[str, ...] | list[str]  # a tuple of one or two texts, or a list of words
    label: Any
    record: dict[str, Any]  # that it is from


class NoFieldError(ValueError):
    """Raised for a record without a field that is needed: at the first record of a file, its layout is unknown."""


def read_rows(path: Path, tags: bool = False, header: list[str] | None = None) -> Iterator[Record]:
    """Yield the records of a file: JSONL, JSON, CSV, Parquet; TSV, without quotes as GLUE has it or with them; CoNLL.

    tags    whether words have tags: a file of no other format is one of CoNLL
    header  names of the columns of a CSV or TSV file that has no line with them
    """
    kind = suffix_of(path)
    is_table = any(end in kind for end in (".csv", ".tsv"))
    if tags and (kind not in READERS or kind in DOCUMENT_FORMATS or (".tsv" in kind and not header and is_conll(path))):
        yield from read_conll(path)
    elif is_table or (header and kind in (*DOCUMENT_FORMATS, "")):
        with open_bytes(path) as file:
            first = file.readline(2**20).decode("utf-8-sig", "replace")
        if not first.strip():
            yield 1, BadRecord(str(path), 1, 0, "the file is empty"), 0
            return
        is_tsv = ".tsv" in kind or (".csv" not in kind and "\t" in first)
        cells = first.rstrip("\r\n").split("\t")
        if header is None and len(cells) == len(COLA) and cells[1] in ("0", "1") and cells[2] in ("", "*"):
            header = COLA
        if not is_tsv or count_bad(path, header, quoted=True) < count_bad(path, header, quoted=False):
            yield from read_csv(path, header, "\t" if is_tsv else None)
            return
        rows = read_csv(path, header, "\t", quoted=False)
        yield from ((line, unquote(row) if isinstance(row, dict) else row, size) for line, row, size in rows)
    else:
        yield from read_records(path)


def count_bad(path: Path, header: list[str] | None, *, quoted: bool) -> int:
    """Count the bad ones of a TSV file's first rows, with quotes that have a meaning or not.

    GLUE's files have single quotes in their fields; pandas puts quotes around a field with a line break or a tab.
    """
    rows = itertools.islice(read_csv(path, header, "\t", quoted), TRIED_ROWS)
    return sum(isinstance(row, BadRecord) for _, row, _ in rows)


def unquote(row: dict[str, str]) -> dict[str, str]:
    """Return the fields of a TSV row without the quotes that a spreadsheet puts around a field with quotes.

    >>> unquote({"a": '"a ""b"" c"', "b": '"He left."'})
    {'a': 'a "b" c', 'b': '"He left."'}
    """
    is_quoted = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"').fullmatch
    return {key: value[1:-1].replace('""', '"') if is_quoted(value) else value for key, value in row.items()}


def is_conll(path: Path) -> bool:
    """Return whether a TSV file has no line with names of its columns, but a word and its tag on each line."""
    with open_bytes(path) as file:
        first = file.readline(2**20).decode("utf-8-sig", "replace").rstrip("\r\n").split("\t")
    return not {*WORDS, *TAGS} & set(first)


def read_conll(path: Path) -> Iterator[Record]:
    """Yield the sentences of a file with a word and its tag, the last column, on each line, and blank lines between.

    Lines that begin with -DOCSTART-, and comments before a sentence (# and a space), are no words. Raises DataError for
    CoNLL-U and other files whose first column numbers the words.
    """
    words: list[str] = []
    tags: list[str] = []
    first = size = number = 0
    columns: int | None = None  # of the lines before
    with open_bytes(path) as file:
        for number, raw in enumerate(file, 1):
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8", "replace").rstrip("\r\n")
            size += len(raw)
            cells = line.split("\t") if "\t" in line else line.split()
            is_comment = line.startswith("# ") and not words and len(cells) != columns
            if not line.strip() or line.startswith("-DOCSTART-") or is_comment:
                if words:
                    if len(words) > 1 and words == [str(i + 1) for i in range(len(words))]:
                        what, fix = "the first column numbers the words", "cut it off: cut -f2,4 FILE"
                        raise DataError(what, at=f"{path}:{first}", got=" ".join(words[:5]), fix=fix)
                    yield first, {"tokens": words, "tags": tags}, size
                    words, tags, size = [], [], 0
                continue
            if len(cells) < 2:
                yield number, BadRecord(str(path), number, None, "a line without a tag", len(raw)), len(raw)
                continue
            first, columns = first if words else number, len(cells)
            words.append(cells[0])
            tags.append(cells[-1].strip())
    if words:
        yield first, {"tokens": words, "tags": tags}, size
    elif not number:
        yield 1, BadRecord(str(path), 1, 0, "the file is empty"), 0


def read_labelled(
    record: dict[str, Any],
    task: str,
    columns: dict[str, str],
    labels: list[str] | None = None,
    needs_label: bool = True,
) -> tuple[Labelled, dict[str, str]]:
    """Return the example of a record, and the fields that were read: our name, one of OURS -> the file's.

    task         classify, regress or tag
    columns      our name of a field -> the file's
    labels       of data.labels: a record with a field of each is one of several labels, 1 or 0
    needs_label  False: a record without one will do

    Raise NoFieldError if a field is missing, and ValueError if one has no text.
    """

    def choose(ours: str, names: Iterable[str]) -> str | None:
        if columns:
            if ours in columns and columns[ours] not in record and (needs_label or ours not in ("label", "tags")):
                raise NoFieldError(f"no field {columns[ours]}, which data.columns names")
            names = [columns[ours]] if ours in columns else []
        return next((name for name in names if name in record), None)

    if task == "tag":
        words = choose("tokens", WORDS)
        if words is None:
            raise NoFieldError("no field with the words of a sentence")
        texts, read = record[words], {"tokens": words}
        if not isinstance(texts, list) or not texts or not all(isinstance(one, str) for one in texts):
            raise ValueError(f"{words} is no list of words")
        ours, key = "tags", choose("tags", [name for name in TAGS if name != words])
    else:
        pair = None if columns else next((pair for pair in PAIRS if all(name in record for name in pair)), None)
        names = pair or (choose("text", TEXTS), choose("text_pair", ()))
        if names[0] is None:
            raise NoFieldError("no field with a text")
        read = {ours: name for ours, name in zip(("text", "text_pair"), names, strict=True) if name}
        texts = tuple(record[name] for name in read.values())
        if not all(isinstance(one, str) for one in texts):
            raise ValueError(f"{' or '.join(read.values())} is no text")
        if not any(one.strip() for one in texts):
            raise ValueError(f"{' and '.join(read.values())} is empty")
        ours, key = "label", choose("label", LABELS)
        if key is None and labels and "label" not in columns and all(name in record for name in labels):
            return Labelled(texts, read_columns(record, labels), record), read
    if key is None and needs_label:
        raise NoFieldError("no field with a label" if task != "tag" else "no field with the tags of the words")
    return Labelled(texts, None if key is None else record[key], record), read | ({ours: key} if key else {})


def read_columns(record: dict[str, Any], labels: list[str]) -> list[str] | None:
    """Return the labels whose column says yes; None if one is empty or -1: it is not known."""
    values = {name: str(record[name]).strip().lower() for name in labels}
    if any(value in ("", "none", "-1", "-1.0") for value in values.values()):
        return None
    if wrong := next((name for name, value in values.items() if value not in (*YES, *NO)), None):
        raise ValueError(f"{wrong} is neither 1 nor 0: {values[wrong][:40]}")
    return [name for name, value in values.items() if value in YES]


def parse_label(value: Any, task: str, separator: str | None = None, names: list[str] | None = None) -> Any:
    """Return a label as text, several as a list, a number for `regress`; None if the record has none.

    names  of data.labels: a list of as many 0 and 1 says which of them are there

    Raise ValueError for what can't be one.

    >>> parse_label(1.0, "classify"), parse_label("a|b", "classify", "|"), parse_label("3.8", "regress")
    ('1', ['a', 'b'], 3.8)
    """
    if isinstance(value, str) and separator and not value.strip():
        return []
    if value is None or (isinstance(value, str) and value.strip() in NO_LABEL and value.strip() not in (names or ())):
        return None
    if task == "classify" and names and "-1" not in names and str(value).strip() in ("-1", "-1.0"):
        return None
    if task == "regress":
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"the label is no number, and the objective is regress: {str(value)[:40]}") from None
        if not np.isfinite(number):
            raise ValueError("the label is not finite")
        return number
    if isinstance(value, str) and separator:
        return [part.strip() for part in value.split(separator) if part.strip()]
    if isinstance(value, list):
        if task == "classify" and names and len(value) == len(names) > 1 and all(one in (0, 1) for one in value):
            return [name for name, is_there in zip(names, value, strict=True) if is_there]
        return [name_of(one) for one in value]
    return name_of(value)


def name_of(value: Any) -> str:
    """Return the name of a label."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int) or not str(value).strip():
        raise ValueError(f"the label is no name, and the objective is not regress: {str(value)[:40]}")
    return str(value).strip()


def unknown_layout(record: dict[str, Any], at: str, error: NoFieldError) -> DataError:
    """Return the error for a file whose first record has no field that is known."""
    if record.keys() == {"text", "format", "encoding"}:
        fix = "if it is a table: data.header: [label, text]; records have a field with the label"
        return DataError("a file of plain text has no labels", at=at, fix=fix)
    hints = [hint for key in record if key not in FIELDS and (hint := did_you_mean(str(key), FIELDS))]
    fix = "name the fields: data.columns: {text: ..., label: ...}"
    if "no field with a text" in str(error) and not any(isinstance(key, str) and key in FIELDS for key in record):
        fix += "; if the file has no line with the names of its columns, give them as data.header: [label, text]"
    expected = "text, sentence1 and sentence2, premise and hypothesis or similar, with label, class or similar"
    if "words" in str(error) or "tags" in str(error):
        expected, fix = "tokens and ner_tags, tags or labels", "name the fields: data.columns: {tokens: ..., tags: ...}"
    what = f"the first record of the file has {error}"
    return DataError(what, at=at, got=describe_fields(record), expected=expected, fix=hints[0] if hints else fix)
