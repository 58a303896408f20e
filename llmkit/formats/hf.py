"""Export a trained model as a merged Hugging Face folder, a PEFT adapter, or a GGUF file."""

import shutil
from collections.abc import Callable
from pathlib import Path

from llmkit.errors import ModelError, UserError
from llmkit.files import write_beside
from llmkit.formats.gguf import TYPES, write_gguf
from llmkit.models.folder import save_model
from llmkit.models.heads import POOLINGS
from llmkit.parallel.device import DTYPES
from llmkit.peft.adapter import read_adapter_config
from llmkit.screen import warn
from llmkit.storage.locate import Located, load_located, read_located_head


def export_hf(located: Located, out: Path, dtype: str) -> None:
    """Write config.json, model.safetensors and tokenizer.json for transformers. An adapter is merged in fp32 first."""
    check_merges(located)
    model, tokenizer = load_located(located, merge=True, head=read_located_head(located))
    if (head := getattr(model, "head", None)) and head.pooling not in (None, POOLINGS[model.config.kind][0]):
        warn(f"transformers has no pooling {head.pooling} for this model: the folder opens in llmkit alone")
    with write_beside(out) as folder:
        save_model(model, folder, **tokenizer.config_ids, dtype=DTYPES[dtype])
        tokenizer.save(folder, token_types=model.config.kind == "masked")


def check_merges(located: Located) -> None:
    """Raise a ModelError for an adapter that is no change of weights."""
    if located.is_adapter and read_adapter_config(located.folder)[1].merge is None:
        what = "an adapter of this method is no change of weights, and can't be merged"
        config, method = read_adapter_config(located.folder)
        fix = "use --format peft" if method.in_peft else "use it as it is: llmkit chat, serve and eval read it"
        raise ModelError(what, at=located.folder, got=config["peft_type"], fix=fix)


def export_peft(located: Located, out: Path, dtype: str) -> None:
    """Copy adapter_config.json and adapter_model.safetensors for peft, as the training wrote them."""
    if not located.is_adapter:
        raise ModelError("this model has no adapter to export", at=located.folder, fix="use --format hf")
    if dtype != "fp32":
        raise UserError("an adapter can only be exported in fp32", got=dtype, fix="leave --dtype out")
    if not read_adapter_config(located.folder)[1].in_peft:
        raise ModelError("peft does not have this adapter's method", at=located.folder, fix="use --format hf")
    with write_beside(out) as folder:
        shutil.copytree(located.folder, folder)


def export_gguf(located: Located, out: Path, dtype: str) -> None:
    """Write a file for llama.cpp: OUT itself if it ends in .gguf, else OUT/model.gguf. An adapter is merged first."""
    check_merges(located)
    model, tokenizer = load_located(located, merge=True)
    write_gguf(model, tokenizer, gguf_file(out), dtype, name=out.stem)


def gguf_file(out: Path) -> Path:
    """Return the file that an export as GGUF writes."""
    return out if out.suffix == ".gguf" else out / "model.gguf"


# --format -> its function, and the values of --dtype that it takes
EXPORTERS: dict[str, tuple[Callable[[Located, Path, str], None], tuple[str, ...]]] = {
    "hf": (export_hf, tuple(DTYPES)),
    "peft": (export_peft, tuple(DTYPES)),
    "gguf": (export_gguf, tuple(TYPES)),
}
