"""List the checkpoints of a run, verify them by checksums, and choose one. Nothing here imports torch."""

import hashlib
import json
import math
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NotRequired

from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from llmkit.errors import ModelError, UserError
from llmkit.files import file_sha256
from llmkit.screen import printable

MANIFEST = "MANIFEST.json"
DEPENDENTS = "HELD_BY"  # lists the runs that started from a checkpoint and need it to go on


class FileEntry(TypedDict):
    """A file of a checkpoint: its path in the folder, its bytes, and its checksum."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)
    file: str
    size: int
    sha256: str


class Best(TypedDict):
    """Hold a figure by which the best checkpoint is chosen in the place of the val loss."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    name: str
    score: float | None  # lower is better: a score of which more is better has its sign changed


class Manifest(TypedDict):
    """The content of a MANIFEST.json. Any other key or type in it means that the file is damaged."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    step: int
    val_loss: float | None  # None: not measured, or not finite
    best: NotRequired[Best]
    llmkit: str
    world_size: int
    data_fingerprint: str
    tokenizer_sha256: str
    config_sha256: str
    reference_sha256: NotRequired[str]  # of the model that the run is compared with, if it has a copy of that
    files: list[FileEntry]
    sha256: NotRequired[str]  # of all other entries; early versions did not write it


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first. `verify` checks whether they are still intact."""
    found = (run_dir / "checkpoints").glob("step-*")
    return sorted((path for path in found if path.name.removeprefix("step-").isdecimal()), key=step_of)


def step_of(folder: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(folder.name.removeprefix("step-"))


def manifest_sha256(manifest: dict[str, Any]) -> str:
    """Return the checksum of a manifest's other entries."""
    others = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def read_checkpoint_manifest(folder: Path) -> Manifest:
    """Return the manifest; raise a ModelError if it is missing or damaged."""
    path = folder / MANIFEST
    try:
        manifest = TypeAdapter(Manifest).validate_json(path.read_bytes())
    except OSError as error:
        raise ModelError(f"the checkpoint's manifest can't be read: {error.strerror}", at=path) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        got = ".".join(map(str, first["loc"])) or None
        raise ModelError(f"the checkpoint's manifest is damaged: {first['msg']}", at=path, got=got) from None
    if manifest.get("sha256", manifest_sha256(manifest)) != manifest_sha256(manifest):
        raise ModelError("the checkpoint's manifest has changed since it was written", at=path)
    return manifest


def verify(folder: Path, part: str = "") -> None:
    """Raise a ModelError with the first file of a checkpoint that is missing or changed.

    part  model or trainer: check only the files of this folder in it
    """
    for entry in read_checkpoint_manifest(folder)["files"]:
        if not entry["file"].startswith(part):
            continue
        path = folder / entry["file"]
        if not path.is_file():
            raise ModelError("a file of the checkpoint is missing", at=path)
        if path.stat().st_size != entry["size"] or file_sha256(path) != entry["sha256"]:
            raise ModelError("a file of the checkpoint has changed since it was written", at=path)


def warn(error: UserError) -> None:
    """Print a problem that does not end the command."""
    print(printable(f"warning: {error.what}: {error.at}"), file=sys.stderr)


def newest_intact_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest intact checkpoint, None if there are none at all; warn about damaged ones."""
    found = list_checkpoints(run_dir)
    for folder in reversed(found):
        try:
            verify(folder)
            return folder
        except UserError as error:
            warn(error)
    if found:
        fix = "restore a good copy, or start over with --fresh"
        raise ModelError("every checkpoint of this run is damaged", at=run_dir / "checkpoints", got=len(found), fix=fix)
    return None


def best_checkpoint(run_dir: Path) -> Path | None:
    """Return the checkpoint with the lowest val loss, or the best by `eval.best`, else the newest; warn about damaged
    manifests.
    """
    found = []
    for folder in list_checkpoints(run_dir):
        try:
            found.append((folder, read_checkpoint_manifest(folder)))
        except UserError as error:
            warn(error)
    if not found:
        return None
    name = found[-1][1].get("best", {}).get("name")  # of the newest: earlier ones may have been chosen by another
    scored = []
    for folder, manifest in found:
        own = manifest.get("best", {"name": None, "score": None})
        score = (own["score"] if own["name"] == name else None) if name else manifest["val_loss"]
        scored.append((math.inf if score is None else score, -step_of(folder), folder))
    return min(scored)[2]


def add_dependent_run(model: Path, run_dir: Path) -> None:
    """Keep the checkpoint that a run starts from as long as its run directory exists."""
    if (model.parent / MANIFEST).is_file():
        with suppress(OSError), (model.parent / DEPENDENTS).open("a+", encoding="utf-8") as file:
            file.seek(0)
            if str(run_dir.resolve()) not in file.read().splitlines():
                file.write(f"{run_dir.resolve()}\n")


def dependent_runs(folder: Path) -> list[str]:
    """Return the runs that started from this checkpoint and still exist."""
    names = folder / DEPENDENTS
    lines = names.read_text(encoding="utf-8", errors="replace").splitlines() if names.is_file() else []
    return [name for name in lines if Path(name).is_dir()]
