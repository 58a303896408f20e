"""Write checkpoints atomically, verify them by checksums, and read them without pickle.

checkpoints/step-000500/
    model/         a Hugging Face folder, or a PEFT adapter
    trainer/       tensors.safetensors (optimizer state by parameter name) and state.json (counters)
    MANIFEST.json  size and sha256 of every file, written last
"""

import contextlib
import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmkit.errors import MachineError, ModelError, UserError
from llmkit.files import file_sha256, free_space

MANIFEST = "MANIFEST.json"
DEPENDENTS = "HELD_BY"  # lists the runs whose adapters need a checkpoint as their base


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to disk, so that they survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
    about        further entries of the manifest: val_loss (the lowest is the best), hashes, world size
    keep         number of the newest to keep; the best by val loss and the bases of adapters are kept too
    """
    folder = run_dir / "checkpoints" / f"step-{step:06d}"
    temporary = folder.with_name(folder.name + ".tmp")
    try:
        if temporary.exists():
            shutil.rmtree(temporary)
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
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for path in (temporary / MANIFEST, temporary / "model", temporary / "trainer", temporary):
            sync(path)
        if folder.exists():  # damaged: the resumed run skipped it
            shutil.rmtree(folder)
        temporary.rename(folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        details = {}
        if getattr(error, "errno", None) == errno.ENOSPC or "No space" in str(error):
            details["got"] = free_space(run_dir)
            details["fix"] = "free some space and run the same command again: older checkpoints are intact"
        raise MachineError(f"the checkpoint can't be written: {error}", at=folder, **details) from None
    for abandoned in list_checkpoints(run_dir):
        if step_of(abandoned) > step:  # damaged: the resumed run skipped it
            shutil.rmtree(abandoned)
    best = best_checkpoint(run_dir)
    for old in list_checkpoints(run_dir)[:-keep]:
        if old != best and not has_dependent_runs(old):
            shutil.rmtree(old)
    return folder


def add_dependent_run(model: Path, run_dir: Path) -> None:
    """Keep the checkpoint of a base model as long as the run directory of an adapter on it exists."""
    if (model.parent / MANIFEST).is_file():
        with contextlib.suppress(OSError), (model.parent / DEPENDENTS).open("a+", encoding="utf-8") as file:
            file.seek(0)
            if str(run_dir.resolve()) not in file.read().splitlines():
                file.write(f"{run_dir.resolve()}\n")


def has_dependent_runs(folder: Path) -> bool:
    """Return whether a run still needs this checkpoint as its base."""
    names = folder / DEPENDENTS
    return names.is_file() and any(Path(name).is_dir() for name in names.read_text(encoding="utf-8").splitlines())


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first. `verify` checks whether they are still intact."""
    found = (run_dir / "checkpoints").glob("step-*")
    return sorted((path for path in found if path.name.removeprefix("step-").isdigit()), key=step_of)


def step_of(folder: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(folder.name.removeprefix("step-"))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest; raise a ModelError if it can't be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return manifest | {"files": list(manifest["files"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"the checkpoint's manifest can't be read: {error}", at=folder / MANIFEST) from None


def verify(folder: Path) -> None:
    """Raise a ModelError with the first file of a checkpoint that is missing or changed."""
    for entry in read_manifest(folder)["files"]:
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
            print(f"warning: {error.what}: {error.at}", file=sys.stderr)
    if found:
        fix = "restore a good copy, or start over with --fresh"
        raise ModelError("every checkpoint of this run is damaged", at=run_dir / "checkpoints", got=len(found), fix=fix)
    return None


def best_checkpoint(run_dir: Path) -> Path | None:
    """Return the checkpoint with the lowest val loss, else the newest."""
    scored = []
    for folder in list_checkpoints(run_dir):
        with contextlib.suppress(UserError):
            loss = read_manifest(folder).get("val_loss")
            scored.append((float("inf") if loss is None else loss, -step_of(folder), folder))
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
