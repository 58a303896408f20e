"""A trained model in other people's formats: a merged Hugging Face folder, or a PEFT adapter."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from llmkit.checkpoint import Located, load
from llmkit.errors import MODEL, UserError
from llmkit.models.folder import save_model


def export_hf(located: Located, out: Path, dtype: torch.dtype) -> None:
    """config.json, model.safetensors and tokenizer.json for transformers; an adapter is merged in fp32 first."""
    model, tokenizer = load(located, merge=True)
    save_model(model, out, eos_token_id=tokenizer.eos_id, bos_token_id=tokenizer.bos_id, dtype=dtype)
    tokenizer.save(out)


def export_peft(located: Located, out: Path, dtype: torch.dtype) -> None:
    """adapter_config.json and adapter_model.safetensors for peft, as the training wrote them."""
    if not located.is_adapter:
        raise UserError("this model has no adapter to export", at=located.folder, fix="use --format hf", code=MODEL)
    if dtype != torch.float32:
        raise UserError("an adapter is exported as it is, in fp32", got=str(dtype), fix="leave --dtype out")
    shutil.copytree(located.folder, out, dirs_exist_ok=True)


FORMATS: dict[str, Callable[[Located, Path, torch.dtype], None]] = {"hf": export_hf, "peft": export_peft}
