"""Commands between formats: export and import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmkit.commands.show import AsJson, show


def export(
    model: Annotated[str, typer.Argument(help="A run, checkpoint, adapter or Hugging Face folder.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; for GGUF a file if it ends in .gguf.")],
    format: Annotated[str, typer.Option(help="hf: a merged folder; peft: an adapter; gguf: for llama.cpp.")] = "hf",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16; q8_0 in GGUF.")] = "fp32",
    as_json: AsJson = False,
) -> None:
    """Write a model for transformers, vLLM, peft or llama.cpp."""
    from llmkit.errors import UserError
    from llmkit.formats.hf import EXPORTERS
    from llmkit.storage.locate import locate

    if format not in EXPORTERS:
        raise UserError("--format is unknown", got=format, expected=" or ".join(EXPORTERS))
    write, dtypes = EXPORTERS[format]
    if dtype not in dtypes:
        fix = "export q8_0 or bf16: llama.cpp's llama-quantize makes others of it" if format == "gguf" else None
        raise UserError(f"--dtype is unknown to {format}", got=dtype, expected=" or ".join(dtypes), fix=fix)
    refuse_to_mix(out)
    write(locate(model), out, dtype)
    show_written(out, as_json)


def import_(
    file: Annotated[Path, typer.Argument(help="A .bin checkpoint of llama2.c.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    tokenizer: Annotated[Path, typer.Option(help="Its tokenizer.bin, or a tokenizer.json or .model.")],
    as_json: AsJson = False,
) -> None:
    """Make somebody else's checkpoint into a Hugging Face folder, which every command takes."""
    from llmkit.errors import UserError
    from llmkit.formats.llama2c import import_llama2c

    for path in (file, tokenizer):
        if not path.exists():
            raise UserError("there is no such file", at=path)
    refuse_to_mix(out)
    import_llama2c(file, tokenizer, out)
    show_written(out, as_json)


def refuse_to_mix(out: Path) -> None:
    from llmkit.errors import UserError

    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError("the folder to write is not empty", at=out, fix="name a new one")


def show_written(out: Path, as_json: bool) -> None:
    files = [out] if out.is_file() else sorted(out.iterdir())
    show({"written": str(out), "files": ", ".join(path.name for path in files)}, as_json)
