"""A trained model in other people's formats: a merged Hugging Face folder, a PEFT adapter, or a GGUF file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from llmkit.errors import ModelError, UserError
from llmkit.formats.gguf import TYPES, write_gguf
from llmkit.models.folder import save_model
from llmkit.parallel.device import DTYPES
from llmkit.storage.locate import Located, load_located


def export_hf(located: Located, out: Path, dtype: str) -> None:
    """config.json, model.safetensors and tokenizer.json for transformers; an adapter is merged in fp32 first."""
    model, tokenizer = load_located(located, merge=True)
    save_model(model, out, eos_token_ids=tokenizer.stop_ids, bos_token_id=tokenizer.bos_id, dtype=DTYPES[dtype])
    tokenizer.save(out)


def export_peft(located: Located, out: Path, dtype: str) -> None:
    """adapter_config.json and adapter_model.safetensors for peft, as the training wrote them."""
    if not located.is_adapter:
        raise ModelError("this model has no adapter to export", at=located.folder, fix="use --format hf")
    if dtype != "fp32":
        raise UserError("an adapter is exported as it is, in fp32", got=dtype, fix="leave --dtype out")
    shutil.copytree(located.folder, out, dirs_exist_ok=True)


def export_gguf(located: Located, out: Path, dtype: str) -> None:
    """A file for llama.cpp, OUT itself or OUT/model.gguf; an adapter is merged in fp32 first."""
    model, tokenizer = load_located(located, merge=True)
    file = out if out.suffix == ".gguf" else out / "model.gguf"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(model, tokenizer, file, dtype, name=out.stem)


EXPORTERS: dict[str, tuple[Callable[[Located, Path, str], None], tuple[str, ...]]] = {  # and the dtypes it can be in
    "hf": (export_hf, tuple(DTYPES)),
    "peft": (export_peft, tuple(DTYPES)),
    "gguf": (export_gguf, tuple(TYPES)),
}
