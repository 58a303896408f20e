"""Find and load the model of a MODEL argument: a run, a checkpoint, an adapter or a Hugging Face folder."""

import copy
import difflib
import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import nn

from llmkit.errors import ModelError
from llmkit.files import file_sha256
from llmkit.models.folder import load_model, weight_files
from llmkit.models.heads import HeadConfig
from llmkit.models.hf_config import read_config, read_head
from llmkit.parallel.device import DTYPES
from llmkit.peft.adapter import (
    base_change,
    cast_adapter,
    load_adapter,
    read_adapter_config,
    read_adapter_head,
    saved_base_sha256,
)
from llmkit.storage.manifest import MANIFEST, best_checkpoint, read_checkpoint_manifest, verify
from llmkit.storage.run import is_run
from llmkit.tokenizer.load import has_tokenizer, load_tokenizer, set_extra_stop_ids
from llmkit.tokenizer.tokenizer import Tokenizer


@dataclass
class Located:
    """Model of a MODEL argument."""

    folder: Path  # a Hugging Face folder, or an adapter
    run_dir: Path | None = None  # the run it belongs to
    choice: str = ""  # which checkpoint of a run it is, and why, if the argument named a run

    @property
    def is_adapter(self) -> bool:
        return (self.folder / "adapter_config.json").is_file()

    @property
    def base(self) -> Path:
        """Return the folder of the whole model: the adapter's base, or the folder itself."""
        if not self.is_adapter:
            return self.folder
        base = Path(read_adapter_config(self.folder)[0].get("base_model_name_or_path") or "")
        if not (base / "config.json").is_file():
            at, fix = self.folder / "adapter_config.json", "restore the base, or correct base_model_name_or_path"
            raise ModelError("the adapter's base model is missing", at=at, got=base, fix=fix)
        return base


def locate(model: str | Path, *, check: bool = True) -> Located:
    """Find a run's best checkpoint, a checkpoint, an adapter or a Hugging Face folder.

    check  compare a checkpoint's files with their checksums
    """
    path = Path(model)
    if not str(model).strip():
        raise ModelError("no model is named", expected="a run, a checkpoint, an adapter or a Hugging Face folder")
    checkpoint = best_checkpoint(path) if is_run(path) else path if (path / MANIFEST).is_file() else None
    if checkpoint:
        if check:
            verify(checkpoint, "model/")
        if checkpoint == path:
            return Located(checkpoint / "model", run_of(path))
        manifest = read_checkpoint_manifest(checkpoint)
        name, value = "val loss", manifest["val_loss"]
        if "best" in manifest:
            name, value = manifest["best"]["name"], manifest["best"]["score"]
        why = "the newest checkpoint" if value is None else f"the checkpoint with the best {name}, {abs(value):.4f}"
        return Located(checkpoint / "model", path, f"model: {checkpoint}, {why}")
    if is_run(path):
        raise ModelError("this run has no checkpoint yet", at=path)
    if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        parent = path.resolve().parent
        in_checkpoint = path.resolve().name == "model" and (parent / MANIFEST).is_file()
        if in_checkpoint and check:
            verify(parent, "model/")
        return Located(path.resolve(), run_of(parent) if in_checkpoint else None)
    if path.suffix == ".gguf":
        raise ModelError("GGUF can be written, but not read", at=path, fix="give the folder that it was exported from")
    on_hub = str(model).count("/") == 1 and not path.exists() and not str(model).startswith((".", "runs/"))
    beside = [one.name for one in path.parent.iterdir() if one.is_dir()] if path.parent.is_dir() else []
    if path.exists():
        fix = f"name the run: {path.parent}" if is_run(path.parent) else None
    elif close := difflib.get_close_matches(path.name, beside, n=1):
        fix = f"did you mean {path.parent / close[0]}?"
    else:
        fix = f"if it is on the hub: hf download {model} --local-dir {path.name}" if on_hub else None
    expected = "a run, a checkpoint, an adapter or a Hugging Face folder"
    raise ModelError(f"there is no model at {path}", expected=expected, fix=fix)


def run_of(folder: Path) -> Path | None:
    """Return the run that a checkpoint lies in; None if it was copied elsewhere."""
    run_dir = folder.resolve().parent.parent
    return run_dir if is_run(run_dir) else None


def weights_sha256(folder: Path) -> str:
    """Return one checksum of a folder's weight files."""
    return hashlib.sha256("".join(file_sha256(path) for path in weight_files(folder)).encode()).hexdigest()


def base_sha256(folder: Path) -> str:
    """Return the checksum of an adapter's base: of its weights, and of the options of its Config; see `base_change`.

    Options at their default do not count, so that a new one does not change the checksum.
    """
    config = read_config(folder)
    changed = {one.name: value for one in fields(config) if (value := getattr(config, one.name)) != one.default}
    text = json.dumps({"model_type": config.model_type} | changed, sort_keys=True)
    return f"{weights_sha256(folder)}-{hashlib.sha256(text.encode()).hexdigest()}"


def read_located_head(located: Located) -> HeadConfig | None:
    """Return the head for labels of a model or an adapter, None if it predicts tokens."""
    if (located.folder / "config.json").is_file():
        return read_head(located.folder)
    return read_adapter_head(located.folder, located.base) if located.is_adapter else None


def choose_dtype(located: Located, precision: str) -> torch.dtype:
    """Return the dtype of a MODEL's weights for measuring, as in training: an adapter's base was frozen in 16 bits, and
    weights that were all trained were in fp32.
    """
    return DTYPES[precision] if located.is_adapter else torch.float32


def copy_with_adapter(model: nn.Module, base: Path, adapter: Located) -> tuple[nn.Module, Tokenizer]:
    """Return a model that shares the weights of a loaded base and has an adapter on it, and its tokenizer.

    base  the folder of the loaded model. Raises ModelError if the adapter was trained on another one
    """
    if not adapter.is_adapter:
        raise ModelError("is a whole model, not an adapter", at=adapter.folder, fix="name it as the MODEL")
    saved = saved_base_sha256(adapter.folder)
    if saved and (change := base_change(saved, base_sha256(base))):
        what = f"the adapter was trained on another base: {change}"
        raise ModelError(what, at=adapter.folder, got=base, expected=adapter.base)
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, shared)
    load_adapter(copied, adapter.folder)
    tokenizer = load_tokenizer(adapter.folder if has_tokenizer(adapter.folder) else base)
    set_extra_stop_ids(tokenizer, base)
    cast_adapter(copied, model.wte.weight.dtype)
    return copied.eval(), tokenizer


def load_located(
    located: Located,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    merge: bool = False,
    head: HeadConfig | None = None,
) -> tuple[nn.Module, Tokenizer]:
    """Load a model and its tokenizer, and an adapter on its base.

    merge  fold the adapter into the base if its method changes weights, one matrix after the other in fp32. The whole
           base is never in fp32 unless `dtype` is: it was frozen in 16 bits in training, and memory may hold no more
    head   of the model, see `read_located_head`; None: predict tokens. Raise ModelError if the model has a head for
           labels instead
    """
    if head is None and read_located_head(located):
        fix = f"llmkit classify {located.folder} FILE"
        raise ModelError("this model predicts labels, not tokens", at=located.folder, fix=fix)
    brings_own = not located.is_adapter or has_tokenizer(located.folder)
    tokenizer = load_tokenizer(located.folder if brings_own else located.base)
    if not located.is_adapter:
        if len(tokenizer) > (size := read_config(located.folder).vocab_size):
            what = "the tokenizer has more tokens than the model"
            raise ModelError(what, at=located.folder, got=len(tokenizer), expected=size)
        return load_model(located.folder, device=device, dtype=dtype, head=head), tokenizer
    base = located.base
    set_extra_stop_ids(tokenizer, base)
    saved = saved_base_sha256(located.folder)
    if saved and (change := base_change(saved, base_sha256(base))):
        raise ModelError(f"{change} since the adapter was trained", at=base)
    model = load_model(base, device=device, dtype=dtype, head=head)
    method = load_adapter(model, located.folder)
    if merge:
        if method.merge:
            method.merge(model)
        model = model.to(dtype)
    return model, tokenizer
