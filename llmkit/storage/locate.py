"""Find and load what a MODEL argument names: a run, a checkpoint, an adapter or a Hugging Face folder."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from llmkit.errors import ModelError
from llmkit.files import file_sha256
from llmkit.models.folder import load_model, read_config, weight_files
from llmkit.peft import lora
from llmkit.storage.checkpoint import MANIFEST, best_checkpoint, verify
from llmkit.tokenizer.tokenizer import Tokenizer, load_tokenizer, read_tokenizer_configs

# ---- MODEL: what the commands take ----------------------------------------------------------------------------------


@dataclass
class Located:
    """What a MODEL argument turned out to be."""

    folder: Path  # a Hugging Face folder, or an adapter
    run_dir: Path | None = None  # the run it belongs to

    @property
    def is_adapter(self) -> bool:
        return (self.folder / "adapter_config.json").is_file()

    @property
    def base(self) -> Path:
        """The folder of the full model: of the adapter's base, or itself."""
        if not self.is_adapter:
            return self.folder
        base = Path(lora.read_adapter_config(self.folder).get("base_model_name_or_path") or "")
        if not (base / "config.json").is_file():
            raise ModelError(
                "the adapter's base model is not there",
                at=self.folder / "adapter_config.json",
                got=base,
                fix="put the base back, or correct base_model_name_or_path",
            )
        return base


def locate(model: str | Path) -> Located:
    """A run (its best checkpoint), a checkpoint, an adapter or a Hugging Face folder."""
    path = Path(model)
    if (path / "config.yaml").is_file() and not (path / "config.json").is_file():
        chosen = best_checkpoint(path)
        if chosen is None:
            raise ModelError("this run has no checkpoint yet", at=path)
        verify(chosen)
        return Located(chosen / "model", path)
    if (path / MANIFEST).is_file():
        verify(path)
        return Located(path / "model", run_of(path))
    if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        in_checkpoint = path.name == "model" and (path.parent / MANIFEST).is_file()
        return Located(path.resolve(), run_of(path.resolve().parent) if in_checkpoint else None)
    if path.suffix == ".gguf":
        raise ModelError("GGUF is written, not read", at=path, fix="name the folder that it was made from")
    on_hub = str(model).count("/") == 1 and not path.exists() and not str(model).startswith((".", "runs/"))
    raise ModelError(
        f"there is no model at {path}",
        expected="a run, a checkpoint, an adapter or a Hugging Face folder",
        fix=f"if it is on the hub: hf download {model} --local-dir {path.name}" if on_hub else None,
    )


def run_of(folder: Path) -> Path | None:
    """The run that a checkpoint lies in; None for one that was copied elsewhere."""
    run_dir = folder.resolve().parent.parent
    return run_dir if (run_dir / "config.yaml").is_file() else None


def weights_sha256(folder: Path) -> str:
    """One checksum over a folder's weight files: what an adapter remembers of its base."""
    return hashlib.sha256("".join(file_sha256(path) for path in weight_files(folder)).encode()).hexdigest()


def load_located(
    located: Located, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, merge: bool = False
) -> tuple[nn.Module, Tokenizer]:
    """The model and its tokenizer, an adapter's base included; `merge` folds the adapter in, in fp32."""
    tokenizer = load_tokenizer(located.folder)
    if not located.is_adapter:
        if len(tokenizer) > (size := read_config(located.folder).vocab_size):
            raise ModelError(
                "the tokenizer has more tokens than the model", at=located.folder, got=len(tokenizer), expected=size
            )
        return load_model(located.folder, device=device, dtype=dtype), tokenizer
    base = located.base
    tokenizer.set_extra_stop_ids(read_tokenizer_configs(base / "tokenizer.json"))
    expected = lora.base_sha256(located.folder)
    if expected and weights_sha256(base) != expected:
        raise ModelError("the adapter was trained on other weights than its base has now", at=base)
    model = load_model(base, device=device, dtype=torch.float32 if merge else dtype)
    lora.load_adapter(model, located.folder)
    if merge:
        lora.merge(model)
        model = model.to(dtype)
    return model, tokenizer


def model_config(located: Located):
    """The architecture's Config, without reading weights."""
    return read_config(located.base)
