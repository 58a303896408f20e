"""Read files, folders, globs and Hugging Face datasets as streams of documents."""

import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llmkit.errors import DataError, UserError, did_you_mean
from llmkit.readers import packed
from llmkit.readers.listing import is_selected, list_files
from llmkit.readers.packed import READ_ERRORS, may_be_empty, suffix_of
from llmkit.readers.records import (
    DOCUMENT_FORMATS,
    READERS,
    Span,
    drop_absent,
    read_records,
    read_text,
)
from llmkit.readers.tally import BadRecord, Record, Tally
from llmkit.readers.warc import read_warc
from llmkit.types import Document


def read_file(
    path: Path,
    *,
    source: str,
    root: Path,
    text_key: str = "text",
    span: Span | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Iterator[Document | BadRecord]:
    """Yield the documents of one file, with ids "SOURCE/PATH BELOW ROOT[:line or row]", in constant memory.

    span              part of the file (see `spans_of`); ids then are PATH@BYTE:LINE, with lines counted from BYTE
    include, exclude  globs for the members of a zip

    meta holds "format" (text, html, code) and "encoding" for files that are one document and for web pages, and "url"
    for web pages. Raises DataError if the first record lacks the text column.
    """
    relative = os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "replace")  # names can be any bytes
    prefix = f"{source}/{relative}"
    if suffix_of(path) == ".zip":
        yield from read_zip(path, prefix, source, text_key, include, exclude)
        return
    if span and span[0] and suffix_of(path) != ".parquet":
        prefix += f"@{span[0]}"
    yield from read_single_file(path, prefix, source, text_key, span)


def read_single_file(
    path: Path, prefix: str, source: str, text_key: str, span: Span | None = None
) -> Iterator[Document | BadRecord]:
    """Yield the documents of a file on disk or in a zip."""
    strict = span is None or span[0] == 0  # the first record of a later span may be a bad one
    reader = READERS.get(suffix_of(path), read_text)
    yield from to_documents(read_records(path, span), source, prefix, str(path), text_key, reader, strict)


def read_zip(
    path: Path, prefix: str, source: str, text_key: str, include: Sequence[str], exclude: Sequence[str]
) -> Iterator[Document | BadRecord]:
    """Yield the documents of the files in a zip, in order of their names, without unpacking to disk."""
    seen = set()
    try:
        with zipfile.ZipFile(path) as archive:
            for info in sorted(archive.infolist(), key=lambda info: info.filename):
                inside = Path(info.filename)
                if suffix_of(inside) not in READERS or not is_selected(inside.as_posix(), include, exclude):
                    continue
                if not info.file_size and may_be_empty(inside):
                    continue
                if info.filename in seen:
                    reason = "the zip has two files of this name"
                    yield BadRecord(f"{path}/{info.filename}", 1, None, reason, info.file_size)
                    continue
                seen.add(info.filename)
                member = zipfile.Path(archive, info.filename)
                yield from read_single_file(member, f"{prefix}/{inside.as_posix()}", source, text_key)
    except (*READ_ERRORS, UnicodeDecodeError) as error:
        yield BadRecord(str(path), 1, None, f"the zip is broken: {error}", path.stat().st_size)
    else:
        if not (seen or include or exclude):
            reason = "nothing to read in the zip: no file with a known suffix"
            yield BadRecord(str(path), 1, None, reason, path.stat().st_size)


def read_texts(
    sources: list[str],
    text_key: str = "text",
    tally: Tally | None = None,
    skipped: Counter[str] | None = None,
    convert: Callable[[Document], Document] = lambda document: document,
) -> Iterator[str]:
    """Yield all texts of files, folders and globs.

    tally    counts the records, and those that can't be read
    skipped  counts the files that are not read: see `list_files`
    convert  changes each document, such as `corpus.clean.extract_article`, which makes text of HTML
    """
    for source in sources:
        for path in list_files(source, skipped=skipped):
            found = read_file(path, source="text", root=path.parent, text_key=text_key)
            for document in keep_documents(found, Tally() if tally is None else tally):
                yield convert(document).text


def keep_documents(
    found: Iterable[Document | BadRecord], tally: Tally, quarantine: Callable[[BadRecord], Any] = lambda bad: None
) -> Iterator[Document]:
    """Yield the documents, count them and the bad records, and pass each bad record to `quarantine`."""
    for one in found:
        if isinstance(one, BadRecord):
            tally.add(0, one)
            quarantine(one)
        else:
            tally.add(one.size)
            yield one


def to_documents(
    records: Iterator[Record],
    source: str,
    prefix: str,
    path: str,
    text_key: str,
    reader: Callable | None = None,
    strict: bool = True,
) -> Iterator[Document | BadRecord]:
    """Turn records into documents.

    reader  the function that read the records; for `read_text` the file is one document, whose id is `prefix`
    strict  raise DataError if the first record lacks the text column; False: treat it like any other bad record
    """
    decoded = reader in (read_text, read_warc)  # these return text, format and encoding
    text_key, check_key = "text" if decoded else text_key, strict
    for number, record, size in records:
        if isinstance(record, BadRecord):
            yield record
            continue
        if check_key and text_key not in record:
            got = ", ".join(str(key)[:50] for key in list(record)[:30])
            fix = did_you_mean(text_key, map(str, record)) or "set text_key to one of these, or exclude the file"
            raise DataError(f"the records have no field {text_key}", at=f"{path}:{number}", got=got, fix=fix)
        check_key = False
        try:
            text = extract_text(record, text_key)
        except ValueError as error:
            yield BadRecord(path, number, None, str(error), size)
            continue
        meta = {key: value for key, value in record.items() if key != "text"} if decoded else {}
        yield Document(prefix if reader is read_text else f"{prefix}:{number}", text, source, meta, size)


def extract_text(record: dict[str, Any], text_key: str) -> str:
    """Return the text of a record. Raise ValueError if there is none or it is too large."""
    text = record.get(text_key)
    if not isinstance(text, str):
        empty = "null" if text_key in record else "missing"
        raise ValueError(f"{text_key} is " + (empty if text is None else f"{type(text).__name__}, not text"))
    if len(text.encode()) > packed.MAX_DOCUMENT_BYTES:
        raise ValueError(f"{text_key} has over {packed.MAX_DOCUMENT_BYTES:,} bytes")
    return text


# ---- Hugging Face datasets ------------------------------------------------------------------------------------------


def dataset_files(
    name: str, config: str | None, split: str, skipped: Counter[str] | None = None, *, follow_links: bool = False
) -> tuple[Path, list[Path]] | None:
    """Return (root, data files) of a local folder of data files, or None for a hub id or a save_to_disk folder."""
    folder = Path(name).expanduser()
    if not folder.is_dir() and (folder.exists() or name.startswith(("/", ".", "~"))):
        raise DataError("a local dataset must be a folder", at=name, fix="use `path` for files and globs")
    if not folder.is_dir() or is_saved_dataset(folder):
        return None
    folder = folder / config if config else folder
    return folder, split_files(folder, split, skipped, follow_links)


def is_saved_dataset(folder: Path) -> bool:
    return any((folder / file).is_file() for file in ("dataset_dict.json", "state.json"))


def read_dataset(
    name: str,
    *,
    source: str,
    config: str | None = None,
    split: str = "train",
    streaming: bool = False,
    text_key: str = "text",
    revision: str | None = None,
) -> Iterator[Document | BadRecord]:
    """Yield the documents of a hub id, a save_to_disk folder, or a local folder of data files.

    Loading scripts never run. Only hub ids use the network. Local data is memory-mapped or streamed in any case.
    """
    if found := dataset_files(name, config, split):
        for file in found[1]:
            yield from read_file(file, source=source, root=found[0], text_key=text_key)
        return
    saved = is_saved_dataset(Path(name).expanduser())
    if saved and (config or streaming or revision):
        raise UserError("config, revision and streaming do not apply to a saved dataset", at=name, fix="delete them")
    rows = load_dataset_rows(name, config, split, streaming, saved, text_key, revision)
    yield from to_documents(rows, source, f"{source}/{split}", name, text_key)


def split_files(
    folder: Path, split: str, skipped: Counter[str] | None = None, follow_links: bool = False
) -> list[Path]:
    """Return the data files whose path names the split (train-00000.parquet, test/a.jsonl), or all files as train."""
    kinds = [f"*{suffix}" for suffix in READERS if suffix not in DOCUMENT_FORMATS]
    exclude = ["dataset_info.json", "dataset_infos.json"]
    files = list_files(str(folder), kinds, exclude, skipped, follow_links=follow_links)
    words = {file: set(re.split(r"[^a-z0-9]+", file.relative_to(folder).as_posix().lower())) for file in files}
    known = {"train", "test", "validation", "valid", "val", "dev", "eval"}
    wanted = {"validation", "valid", "val", "dev"} if split == "validation" else {split.lower()}
    named = [file for file in files if wanted & words[file]]
    if skipped is not None and named and (others := len(files) - len(named)):
        skipped["of another split, by their names"] += others
    if named or (split in ("train", "validation") and not any(known & names for names in words.values())):
        return named or files
    names = ", ".join(file.name for file in files[:8])
    raise DataError(f"no data file for the split {split}", at=folder, got=names)


def load_dataset_rows(
    name: str, config: str | None, split: str, streaming: bool, saved: bool, text_key: str, revision: str | None
) -> Iterator[Record]:
    """Yield (number from 1, row, 0) from the `datasets` library, with its various errors converted to DataError."""
    import datasets

    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False  # before version 4 it would ask on the terminal
    try:
        if saved:
            data = datasets.load_from_disk(str(Path(name).expanduser()))
            if isinstance(data, dict):
                if split not in data:
                    raise ValueError(f"no split {split}; the dataset has {', '.join(data)}")
                data = data[split]
        else:
            data = datasets.load_dataset(name, config, split=split, streaming=streaming, revision=revision)
        simple = [key for key, kind in (data.features or {}).items() if isinstance(kind, datasets.Value)]
        if text_key in simple:
            data = data.select_columns(simple)  # do not decode images and audio
        for number, row in enumerate(data, 1):
            yield number, {name: drop_absent(value) for name, value in row.items()}, 0
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().partition("\n")[0][:300]
        raise DataError(
            "the dataset can't be read",
            at=f"{name}, config {config or 'default'}, split {split}",
            got=f"{type(error).__name__}: {reason}",
            fix="check the id, config and split; a gated dataset needs HF_TOKEN; offline, name a local folder",
        ) from error
