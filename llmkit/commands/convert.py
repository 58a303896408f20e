"""Define the commands `export`, `import`, `merge` and `average`."""

from pathlib import Path
from typing import Annotated

import typer

from llmkit.commands.show import AsJson, ModelArg, check_is_new, show, to_stderr


def export(
    model: ModelArg,
    out: Annotated[Path, typer.Argument(help="The folder to write, or a file that ends in .gguf.")],
    format: Annotated[str, typer.Option(help="hf: a merged folder; peft: an adapter; gguf: for llama.cpp.")] = "hf",
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16, or q8_0 in GGUF.")] = "fp32",
    check: Annotated[bool, typer.Option(help="Compare what was written with the model; it is read twice more.")] = True,
    as_json: AsJson = False,
) -> None:
    """Write a model for transformers, vLLM, peft or llama.cpp, and compare it with the model."""
    from llmkit.errors import UserError, suggest
    from llmkit.formats.hf import EXPORTERS
    from llmkit.storage.locate import locate

    if format not in EXPORTERS:
        raise UserError("--format is unknown", got=format, fix=suggest(format, EXPORTERS))
    write, dtypes = EXPORTERS[format]
    if dtype not in dtypes:
        fix = suggest(dtype, dtypes)
        if format == "gguf":
            fix = "export bf16 or q8_0, then convert it with llama.cpp's llama-quantize"
        raise UserError(f"--dtype is unknown to --format {format}", got=dtype, expected=" or ".join(dtypes), fix=fix)
    check_is_new(out)
    located = locate(model)
    to_stderr(located.choice)
    write(located, out, dtype)
    compared = {}
    if check and format != "peft":  # which copies files
        from llmkit.evals.exported import compare_exported

        compared = compare_exported(located, out, format, dtype)
    show_written(out, as_json, compared)


def merge(
    models: Annotated[list[str], typer.Argument(help="MODEL or MODEL=WEIGHT, several; then the folder to write.")],
    by: Annotated[str, typer.Option(help="linear: the sum of the changes; ties or dare: of parts of them.")] = "linear",
    density: Annotated[float, typer.Option(min=0.001, max=1, help="Share of a change that ties and dare keep.")] = 0.2,
    base: Annotated[str | None, typer.Option(help="What whole models were trained from; adapters name theirs.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of what dare keeps.")] = 0,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    as_json: AsJson = False,
) -> None:
    """Merge adapters or models of one base into a whole model, each with a weight."""
    from llmkit.errors import UserError, suggest
    from llmkit.formats.merge import MERGES, merge_models

    if by not in MERGES:
        raise UserError("--by is unknown", got=by, fix=suggest(by, MERGES))
    *names, out = models
    pairs = []
    for one in names:
        name, _, weight = one.rpartition("=") if "=" in one else (one, "", "1")
        try:
            pairs.append((name, float(weight)))
        except ValueError:
            raise UserError("a weight is no number", got=one, expected="MODEL=0.5") from None
    options = {"by": by, "density": density, "base": base, "seed": seed, "dtype": known_dtype(dtype)}
    check_out(names, out)
    merge_models(pairs, Path(out), **options)
    show_written(Path(out), as_json)


def average(
    models: Annotated[list[str], typer.Argument(help="Checkpoints or other models; then the folder to write.")],
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    as_json: AsJson = False,
) -> None:
    """Average the weights of whole models, for example the last checkpoints of a run."""
    from llmkit.formats.merge import average_models

    *names, out = models
    check_out(names, out)
    average_models(names, Path(out), known_dtype(dtype))
    show_written(Path(out), as_json)


def check_out(names: list[str], out: str) -> None:
    """Raise a UserError without a model before the folder to write, or if that is there."""
    from llmkit.errors import UserError

    if not names:
        raise UserError("models and a folder to write are needed", got=out, fix="llmkit average A B OUT")
    check_is_new(Path(out))


def known_dtype(name: str):
    """Return the dtype of a name."""
    from llmkit.errors import UserError, suggest
    from llmkit.parallel.device import DTYPES

    if name not in DTYPES:
        raise UserError("--dtype is unknown", got=name, fix=suggest(name, DTYPES))
    return DTYPES[name]


def import_(
    file: Annotated[Path, typer.Argument(help="A .bin checkpoint of llama2.c.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    tokenizer: Annotated[Path, typer.Option(help="The checkpoint's tokenizer.bin, or a tokenizer.json or .model.")],
    as_json: AsJson = False,
) -> None:
    """Convert a llama2.c checkpoint to a Hugging Face folder, which every command accepts."""
    from llmkit.errors import UserError
    from llmkit.formats.llama2c import import_llama2c

    for path in (file, tokenizer):
        if not path.exists():
            raise UserError("there is no such file", at=path)
    check_is_new(out)
    import_llama2c(file, tokenizer, out)
    show_written(out, as_json)


def show_written(out: Path, as_json: bool, compared: dict[str, str] | None = None) -> None:
    """Print the names of the files that were written, and how they compare with the model."""
    files = [out] if out.is_file() else sorted(out.iterdir())
    show({"written": str(out), "files": ", ".join(path.name for path in files)} | (compared or {}), as_json)
