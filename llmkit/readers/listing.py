"""Find the files of a source: a file, a folder, a glob, or what is inside a zip."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from operator import itemgetter
from pathlib import Path
from typing import Any

from llmkit.errors import DataError, did_you_mean
from llmkit.readers.packed import may_be_empty, suffix_of
from llmkit.readers.records import READERS

HIDDEN = re.compile(r"(?:^|/)(?:\.|(?:__pycache__|node_modules)(?:/|$))")
LINKS_OUT = "linked from outside the folder"  # a key of what `list_files` skips
Stamp = tuple[int, int]  # the size and modification time of a file


def list_files(path: str, *args: Any, **options: Any) -> list[Path]:
    """List the readable files of a path; see `find_stamps`."""
    return [Path(file) for file in find_stamps(path, *args, **options)]


def find_stamps(
    path: str,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    skipped: Counter[str] | None = None,
    *,
    follow_links: bool = False,
) -> dict[str, Stamp]:
    """Find the readable files of a path (a file, folder or glob), sorted. Skip hidden, empty and special files.

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
    skipped, found, files = Counter() if skipped is None else skipped, [], {}
    try:
        candidates = [(str(start), start)] if start.is_file() else find_files(start, root, follow_links)
    except ValueError as error:  # of Path.glob
        fix = "** stands for any folders, alone between slashes: docs/**/*.txt"
        raise DataError("the glob can't be read", at=path, got=error, fix=fix) from None
    below = start_below(root)
    for name, file in candidates:
        suffix, is_file = suffix_of(file), file.is_file()
        is_link_out = not follow_links and file != start and leaves(file, root)
        found += [file] if is_file and not is_link_out else []
        is_zip = suffix == ".zip"
        known = is_zip or suffix in READERS
        globs = () if is_zip or (include and file.is_dir()) else include
        if not is_selected(name[below:], globs, exclude, file == start):
            continue
        if known and file.is_symlink() and not Path(file).exists():
            check_file(Path(file))
        elif is_link_out and (known or file.is_dir()):
            skipped[LINKS_OUT] += 1
        elif not is_file or is_link_out:
            continue
        elif not known:
            skipped[f"{suffix or 'no suffix'} (unknown type)"] += 1
        elif not (stat := file.stat()).st_size and may_be_empty(file):
            skipped[f"empty {suffix}"] += 1
        else:
            files[name] = (stat.st_size, stat.st_mtime_ns)
    if not files:
        raise no_files_error(path, found, skipped[LINKS_OUT], include, exclude)
    return files


def no_files_error(
    path: str, found: list[Path | os.DirEntry], links: int, include: Sequence[str], exclude: Sequence[str]
) -> DataError:
    """Return the error for a path without a readable file: which files are there, and what hides them."""
    seen = Counter(suffix_of(file) or "no suffix" for file in found).most_common(8)
    seen += [(LINKS_OUT, links)] if links else []
    globs = "".join(f", {key} {list(value)}" for key, value in [("include", include), ("exclude", exclude)] if value)
    got = ", ".join(f"{n} {suffix}" for suffix, n in seen) or "no files at all"
    expected = f"files with a known suffix, neither empty nor hidden{globs}"
    fix = "name the folder that the links point to, or in a config set follow_links: true" if links else None
    return DataError("no file to read", at=path, got=got, expected=expected, fix=fix)


def find_files(start: Path, root: Path, follow_links: bool) -> list[tuple[str, Path | os.DirEntry]]:
    """Return (path, file) of what a folder or glob matches, sorted: files, those in matched folders, and any links."""
    pattern = start.relative_to(root).as_posix() if start != root else "**"
    if pattern in ("**", "**/*"):
        matches = walk(root)
    else:
        matches = root.glob(f"{pattern}/*" if pattern.endswith("**") else pattern)
        if not pattern.endswith(("**", "**/*")):  # replace folders by their files
            matches = (Path(file) for match in matches for file in (walk(match) if is_folder(match) else [match]))
        matches = (match for match in matches if not is_folder(match))
    found, entered, pending = {}, {root.resolve()}, list(matches)
    while pending:
        match = pending.pop()
        found[os.fspath(match).removeprefix("./")] = match  # of a scan of the working folder
        if follow_links and match.is_dir() and leaves(match, root) and (target := Path(match).resolve()) not in entered:
            entered.add(target)  # links can form a cycle
            pending += map(Path, walk(match))
    return sorted(found.items(), key=itemgetter(0))


def walk(folder: Path) -> Iterator[Path | os.DirEntry]:
    """Yield all that lies in a folder and below it but folders; links as paths. Links to folders are not entered."""
    pending: list[Any] = [folder]
    while pending:
        with suppress(PermissionError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry)
                else:
                    yield Path(entry) if entry.is_symlink() else entry


def leaves(path: Path | os.DirEntry, root: Path) -> bool:
    """Return whether a path below a folder really lies outside of it, because of a symbolic link."""
    if isinstance(path, os.DirEntry):  # of `walk`: it is no link, nor below one
        return False
    steps = [path, *path.parents][: len(path.relative_to(root).parts)]
    target = Path(os.path.realpath(path))  # path.resolve() raises an error for a link to itself
    return any(step.is_symlink() for step in steps) and not target.is_relative_to(root.resolve())


def start_below(root: Path) -> int:
    """Return where the part below a folder begins in the path of a file in it.

    >>> start_below(Path("corpora")), start_below(Path()), start_below(Path("/"))
    (8, 0, 1)
    """
    return len(str(root / "x")) - 1


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


def check_file(path: Path, any_suffix: bool = False) -> None:
    """Raise DataError if a file that the user named can't be read.

    any_suffix  its format is known from elsewhere
    """
    problem, got, fix = None, None, None
    if not path.exists():
        problem = "the link points to a missing file" if path.is_symlink() else "no such file"
    elif not path.is_file():
        problem = "not a regular file"
    elif not path.stat().st_size:
        problem = "the file is empty"
    elif not any_suffix and (got := suffix_of(path)) not in (*READERS, ".zip"):
        problem, fix = "no reader for files with this suffix", did_you_mean(got, READERS)
    if problem:
        raise DataError(problem, at=path, got=got, fix=fix)


def refuse_zip(path: Path, what: str) -> None:
    """Raise DataError for a zip, where only files of records are read."""
    if path.suffix.lower() == ".zip":
        raise DataError(f"{what} in a zip are not supported", at=path, fix="unpack it")


def is_selected(path: str, include: Sequence[str], exclude: Sequence[str], hidden: bool = False) -> bool:
    """Match a path below the folder against the globs. Hidden folders and files match only if `hidden`."""
    if not hidden and HIDDEN.search(path):
        return False
    return not (include and not matches_any(path, include)) and not (exclude and matches_any(path, exclude))


def matches_any(path: str, patterns: Sequence[str]) -> bool:
    """Match a path against globs. The variant with a leading slash lets `**/x` match an x at the top."""
    names = (path, f"/{path}", path.rpartition("/")[2])
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
