"""Read files, folders, globs and Hugging Face datasets as streams of documents."""

import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from llmkit.errors import DataError, UserError, did_you_mean
from llmkit.readers.packed import READ_ERRORS, may_be_empty, suffix_of
from llmkit.readers.records import (
    DOCUMENT_FORMATS,
    MAX_DOCUMENT_BYTES,
    READERS,
    Record,
    Span,
    read_records,
    read_text,
    read_warc,
)
from llmkit.readers.tally import BadRecord, Tally
from llmkit.types import Document

# ---- files ----------------------------------------------------------------------------------------------------------


LINKS_OUT = "linked from outside the folder"  # a key of what `list_files` skips


def list_files(
    path: str,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    skipped: Counter[str] | None = None,
    *,
    follow_links: bool = False,
) -> list[Path]:
    """List the readable files of a path (a file, folder or glob), sorted. Skip hidden, empty and special files.

    include, exclude  globs for the path below the folder, or for the bare name; `*` also matches slashes
    skipped           counts the selected files that are not listed, by reason
    follow_links      list what symbolic links inside the folder point to outside of it; else they are skipped

    A zip is listed as one file if it is not excluded. `include` selects among its members. An empty file of a format
    that has a header, such as Parquet, is listed, because it is a damaged one. Raise DataError for a dangling link.
    """
    if not path.strip():  # it would mean the working folder
        raise DataError("the path of a file or folder is empty", got=repr(path))
    start, root = Path(path).expanduser(), root_of(path)
    if not start.is_dir() and (start.exists() or start.is_symlink()):
        check_file(start)
    elif not root.is_dir():
        raise DataError("no such file or folder", at=path)
    skipped, found, files = Counter() if skipped is None else skipped, [], []
    try:
        candidates = [start] if start.is_file() else find_files(start, root, follow_links)
    except ValueError as error:  # of Path.glob
        fix = "** stands for any folders, alone between slashes: docs/**/*.txt"
        raise DataError("the glob can't be read", at=path, got=error, fix=fix) from None
    for file in candidates:
        suffix, is_link_out = suffix_of(file), file != start and not follow_links and leaves(file, root)
        found += [file] if file.is_file() and not is_link_out else []
        known, globs = suffix in (*READERS, ".zip"), () if suffix == ".zip" or file.is_dir() else include
        if not is_selected(file.relative_to(root), globs, exclude, file == start):
            continue
        if known and file.is_symlink() and not file.exists():
            check_file(file)
        elif is_link_out and (known or file.is_dir()):
            skipped[LINKS_OUT] += 1
        elif not file.is_file() or is_link_out:
            continue
        elif not known:
            skipped[f"{suffix or 'no suffix'} (unknown type)"] += 1
        elif not file.stat().st_size and may_be_empty(file):
            skipped[f"empty {suffix}"] += 1
        else:
            files.append(file)
    if not files:
        raise no_files_error(path, found, skipped[LINKS_OUT], include, exclude)
    return sorted(files, key=Path.as_posix)


def no_files_error(
    path: str, found: list[Path], links: int, include: Sequence[str], exclude: Sequence[str]
) -> DataError:
    """Return the error for a path without a readable file: which files are there, and what hides them."""
    seen = Counter(suffix_of(file) or "no suffix" for file in found).most_common(8)
    seen += [(LINKS_OUT, links)] if links else []
    globs = "".join(f", {key} {list(value)}" for key, value in [("include", include), ("exclude", exclude)] if value)
    got = ", ".join(f"{n} {suffix}" for suffix, n in seen) or "no files at all"
    expected = f"files with a known suffix, neither empty nor hidden{globs}"
    fix = "name the folder that the links point to, or in a config set follow_links: true" if links else None
    return DataError("no file to read", at=path, got=got, expected=expected, fix=fix)


def find_files(start: Path, root: Path, follow_links: bool) -> set[Path]:
    """Return the files that a folder or glob matches, those in matched folders too, and links of any kind."""
    pattern = start.relative_to(root).as_posix() if start != root else "**"
    matches = root.glob(f"{pattern}/*" if pattern.endswith("**") else pattern)
    recursive = pattern.endswith(("**", "**/*"))
    if not recursive:  # replace folders by their files
        matches = (file for match in matches for file in (match.rglob("*") if is_folder(match) else [match]))
    found, entered = set(), {root.resolve()}
    pending = [match for match in matches if not is_folder(match)]
    while pending:
        match = pending.pop()
        found.add(match)
        if follow_links and match.is_dir() and leaves(match, root) and match.resolve() not in entered:
            entered.add(match.resolve())  # links can form a cycle
            pending += [file for file in match.rglob("*") if not is_folder(file)]
    return found


def leaves(path: Path, root: Path) -> bool:
    """Return whether a path below a folder really lies outside of it, because of a symbolic link."""
    steps = [path, *path.parents][: len(path.relative_to(root).parts)]
    target = Path(os.path.realpath(path))  # path.resolve() raises an error for a link to itself
    return any(step.is_symlink() for step in steps) and not target.is_relative_to(root.resolve())


def root_of(path: str) -> Path:
    """Return the root of the documents' ids: the folder itself, a file's folder, or a glob's fixed part.

    >>> root_of("corpora/docs/**/*.html").as_posix()
    'corpora/docs'
    """
    start = Path(path).expanduser()
    if start.exists() or start.is_symlink():
        return start if start.is_dir() else start.parent
    wildcards = [i for i, part in enumerate(start.parts) if re.search(r"[*?[]", part)]
    return Path(*start.parts[: wildcards[0]]) if wildcards else start


def is_folder(path: Path) -> bool:
    """Return True for a folder, but not for a symbolic link to one, which could form a cycle."""
    return path.is_dir() and not path.is_symlink()


def check_file(path: Path) -> None:
    """Raise DataError if a file that the user named can't be read."""
    problem, got, fix = None, None, None
    if not path.exists():
        problem = "the link points to a missing file" if path.is_symlink() else "no such file"
    elif not path.is_file():
        problem = "not a regular file"
    elif not path.stat().st_size:
        problem = "the file is empty"
    elif (got := suffix_of(path)) not in (*READERS, ".zip"):
        problem, fix = "no reader for files with this suffix", did_you_mean(got, READERS)
    if problem:
        raise DataError(problem, at=path, got=got, fix=fix)


def refuse_zip(path: Path, what: str) -> None:
    """Raise DataError for a zip, where only files of records are read."""
    if path.suffix.lower() == ".zip":
        raise DataError(f"{what} in a zip are not supported", at=path, fix="unpack it")


def is_selected(path: Path, include: Sequence[str], exclude: Sequence[str], hidden: bool = False) -> bool:
    """Match a path below the folder against the globs. Hidden folders and files match only if `hidden`."""
    visible = not any(part.startswith(".") or part in ("__pycache__", "node_modules") for part in path.parts)
    return (visible or hidden) and (not include or matches_any(path, include)) and not matches_any(path, exclude)


def matches_any(path: Path, patterns: Sequence[str]) -> bool:
    """Match a path against globs. The variant with a leading slash lets `**/x` match an x at the top."""
    names = (path.as_posix(), f"/{path.as_posix()}", path.name)
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


# ---- documents ------------------------------------------------------------------------------------------------------


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
                if suffix_of(inside) not in READERS or not is_selected(inside, include, exclude):
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
    sources: list[str], text_key: str = "text", tally: Tally | None = None, skipped: Counter[str] | None = None
) -> Iterator[str]:
    """Yield all texts of files, folders and globs.

    tally    counts the records, and those that can't be read
    skipped  counts the files that are not read: see `list_files`
    """
    for source in sources:
        for path in list_files(source, skipped=skipped):
            found = read_file(path, source="text", root=path.parent, text_key=text_key)
            for document in keep_documents(found, Tally() if tally is None else tally):
                yield document.text


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
    if len(text.encode()) > MAX_DOCUMENT_BYTES:
        raise ValueError(f"{text_key} has over {MAX_DOCUMENT_BYTES:,} bytes")
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
            yield number, row, 0
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().partition("\n")[0][:300]
        raise DataError(
            "the dataset can't be read",
            at=f"{name}, config {config or 'default'}, split {split}",
            got=f"{type(error).__name__}: {reason}",
            fix="check the id, config and split; a gated dataset needs HF_TOKEN; offline, name a local folder",
        ) from error
