"""Write checkpoints atomically, verify them by checksums, and read them without pickle.

checkpoints/step-000500/
    model/         a Hugging Face folder, or a PEFT adapter
    trainer/       tensors.safetensors (optimizer state by parameter name) and state.json (counters)
    MANIFEST.json  size and sha256 of every file, written last
"""

import errno
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NotRequired

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typing_extensions import TypedDict

from llmkit.errors import MachineError, ModelError, UserError
from llmkit.files import delete, file_sha256, sync
from llmkit.screen import printable

MANIFEST = "MANIFEST.json"
DEPENDENTS = "HELD_BY"  # lists the runs that started from a checkpoint and need it to go on


class FileEntry(TypedDict):
    """A file of a checkpoint: its path in the folder, its bytes, and its checksum."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)
    file: str
    size: int
    sha256: str


class Manifest(TypedDict):
    """The content of a MANIFEST.json. Any other key or type in it means that the file is damaged."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    step: int
    val_loss: float | None  # None: not measured, or not finite
    llmkit: str
    world_size: int
    data_fingerprint: str
    tokenizer_sha256: str
    config_sha256: str
    files: list[FileEntry]
    sha256: NotRequired[str]  # of all other entries; early versions did not write it


def save(
    run_dir: Path,
    step: int,
    write_model: Callable[[Path], None],
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    *,
    about: dict[str, Any],
    keep: int,
) -> Path:
    """Write checkpoints/step-N, then delete older ones.

    write_model  writes the model into a folder
    about        further entries of the `Manifest`: val_loss (the lowest is the best), hashes, world size
    keep         number of the newest to keep; the best by val loss and those that other runs need are kept too
    """
    folder = run_dir / "checkpoints" / f"step-{step:06d}"
    temporary = folder.with_name(folder.name + ".tmp")
    try:
        for leftover in folder.parent.glob("*.tmp"):  # of a process that was killed while it saved or deleted
            delete(leftover)
        (temporary / "trainer").mkdir(parents=True)
        write_model(temporary / "model")
        (temporary / "trainer" / "state.json").write_text(json.dumps(state), encoding="utf-8")
        save_file(tensors, temporary / "trainer" / "tensors.safetensors")
        shutil.copymode(temporary / "trainer" / "state.json", temporary / "trainer" / "tensors.safetensors")
        entries = []
        for path in sorted(path for path in temporary.rglob("*") if path.is_file()):
            sync(path)
            name = str(path.relative_to(temporary))
            entries.append({"file": name, "size": path.stat().st_size, "sha256": file_sha256(path)})
        manifest = {"step": step, **about, "files": entries}
        manifest["sha256"] = manifest_sha256(manifest)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for path in (temporary / MANIFEST, temporary / "model", temporary / "trainer", temporary):
            sync(path)
        old = move_aside(folder) if folder.exists() else None  # damaged, or saved before its evaluation
        temporary.rename(folder)
        sync(folder.parent)
        if old:
            delete(old)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        details = {}
        if getattr(error, "errno", None) == errno.ENOSPC or "No space" in str(error):
            details["got"] = f"{shutil.disk_usage(run_dir).free / 2**20:.0f} MiB free"
            details["fix"] = "free some space and run the same command again: older checkpoints are intact"
        raise MachineError(f"the checkpoint can't be written: {error}", at=folder, **details) from None
    for abandoned in list_checkpoints(run_dir):
        if step_of(abandoned) > step:  # damaged: the resumed run skipped it
            delete(move_aside(abandoned))
    best = best_checkpoint(run_dir)
    for old in list_checkpoints(run_dir)[:-keep]:
        if old != best and not dependent_runs(old):
            delete(move_aside(old))
    return folder


def move_aside(folder: Path) -> Path:
    """Rename a checkpoint that is to be deleted, so that a kill in between leaves no half of one under its name."""
    return folder.rename(folder.with_name(f"{folder.name}.old.tmp"))


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


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first. `verify` checks whether they are still intact."""
    found = (run_dir / "checkpoints").glob("step-*")
    return sorted((path for path in found if path.name.removeprefix("step-").isdigit()), key=step_of)


def step_of(folder: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(folder.name.removeprefix("step-"))


def manifest_sha256(manifest: dict[str, Any]) -> str:
    """Return the checksum of a manifest's other entries."""
    others = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
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
    for entry in read_manifest(folder)["files"]:
        if not entry["file"].startswith(part):
            continue
        path = folder / entry["file"]
        if not path.is_file():
            raise ModelError("a file of the checkpoint is missing", at=path)
        if path.stat().st_size != entry["size"] or file_sha256(path) != entry["sha256"]:
            raise ModelError("a file of the checkpoint has changed since it was written", at=path)


def newest_intact_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest intact checkpoint, None if there are none at all; warn about damaged ones."""
    found = list_checkpoints(run_dir)
    for folder in reversed(found):
        try:
            verify(folder)
            return folder
        except UserError as error:
            print(printable(f"warning: {error.what}: {error.at}"), file=sys.stderr)
    if found:
        fix = "restore a good copy, or start over with --fresh"
        raise ModelError("every checkpoint of this run is damaged", at=run_dir / "checkpoints", got=len(found), fix=fix)
    return None


def best_checkpoint(run_dir: Path) -> Path | None:
    """Return the checkpoint with the lowest val loss, else the newest; warn about damaged manifests."""
    scored = []
    for folder in list_checkpoints(run_dir):
        try:
            loss = read_manifest(folder)["val_loss"]
            scored.append((math.inf if loss is None else loss, -step_of(folder), folder))
        except UserError as error:
            print(f"warning: {error.what}: {error.at}", file=sys.stderr)
    return min(scored)[2] if scored else None


def load_trainer(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the state that `save` wrote."""
    tensors = load_file(folder / "trainer" / "tensors.safetensors")
    return tensors, json.loads((folder / "trainer" / "state.json").read_text(encoding="utf-8"))


# ---- optimizer state as named tensors -------------------------------------------------------------------------------


def optimizer_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Return the state of all optimizers, named optimizer/<parameter name>/<state name>."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"optimizer/{names[parameter]}/{key}": value.detach().cpu().contiguous()
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore_optimizers(model: nn.Module, optimizers: list[torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    """Restore the optimizer state of every parameter; raise a ModelError for a parameter without one."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, name, part = key.split("/")
            by_name.setdefault(name, {})[part] = value
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names[parameter]
                if name not in by_name:
                    raise ModelError("the checkpoint has no optimizer state for a parameter", got=name)
                optimizer.state[parameter] = {part: value.to(parameter.device) for part, value in by_name[name].items()}
