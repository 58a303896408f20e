"""Write checkpoints atomically, verify them by checksums, and read them without pickle.

checkpoints/step-000500/
    model/         a Hugging Face folder, or a PEFT adapter
    trainer/       tensors.safetensors (optimizer state by parameter name, and the weights of the last step if model/
                   holds an average) and state.json (counters)
    MANIFEST.json  size and sha256 of every file, written last
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmkit.errors import MachineError, ModelError
from llmkit.files import delete, file_sha256, free_space, sync, write_atomically
from llmkit.storage.manifest import (
    MANIFEST,
    best_checkpoint,
    dependent_runs,
    list_checkpoints,
    manifest_sha256,
    read_checkpoint_manifest,
    step_of,
)


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
    with temporary_folder(folder) as temporary:
        for leftover in folder.parent.glob("step-*.tmp"):  # of a process that was killed while it saved or deleted
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
        if folder.exists():  # damaged: the resumed run skipped it
            delete(move_aside(folder))
        temporary.rename(folder)
        sync(folder.parent)
    for abandoned in list_checkpoints(run_dir):
        if step_of(abandoned) > step:  # damaged: the resumed run skipped it
            delete(move_aside(abandoned))
    best = best_checkpoint(run_dir)
    for old in list_checkpoints(run_dir)[:-keep]:
        if old != best and not dependent_runs(old):
            delete(move_aside(old))
    return folder


def try_to_save(run_dir: Path, write_model: Callable[[Path], None]) -> None:
    """Write the model of a checkpoint and delete it: a run that can't save ends before its first step."""
    with temporary_folder(run_dir / "checkpoints" / "step-000000") as temporary:
        delete(temporary)
        temporary.mkdir(parents=True)
        write_model(temporary)
        delete(temporary)


@contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """Give the temporary folder of a checkpoint, which is deleted if it can't be written."""
    temporary = folder.with_name(folder.name + ".tmp")
    try:
        yield temporary
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        got = free_space(folder.parent) if os.strerror(errno.ENOSPC) in str(error) else None
        fix = "run the same command again when it can: older checkpoints are intact"
        raise MachineError(f"the checkpoint can't be written: {error}", at=folder, got=got, fix=fix) from None


def move_aside(folder: Path) -> Path:
    """Rename a checkpoint that is to be deleted, so that a kill in between leaves no half of one under its name."""
    return folder.rename(folder.with_name(f"{folder.name}.old.tmp"))


def record_evaluation(folder: Path, about: dict[str, Any]) -> None:
    """Add val_loss, and `best`, to the manifest of a checkpoint that was saved before its evaluation."""
    manifest = read_checkpoint_manifest(folder) | about
    manifest["sha256"] = manifest_sha256(manifest)
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def load_trainer(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the state that `save` wrote."""
    tensors = load_file(folder / "trainer" / "tensors.safetensors")
    return tensors, json.loads((folder / "trainer" / "state.json").read_text(encoding="utf-8"))


# ---- weights and optimizer state as named tensors -------------------------------------------------------------------


def weight_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained weights, named weights/<parameter name>."""
    return {f"weights/{name}": p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def restore_weights(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Overwrite the weights by those that `weight_tensors` returned, if there are any."""
    for name, parameter in model.named_parameters():
        if f"weights/{name}" in tensors:
            parameter.copy_(tensors[f"weights/{name}"])


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
    """Restore the optimizer state of every parameter; raise a ModelError for a parameter without one.

    All are without one after SGD without momentum.
    """
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
                if by_name and name not in by_name:
                    raise ModelError("the checkpoint has no optimizer state for a parameter", got=name)
                optimizer.state[parameter] = {
                    part: value.to(parameter.device) for part, value in by_name.get(name, {}).items()
                }
