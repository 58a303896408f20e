"""Find what training starts from: the base that init_from names, and the adapter on it."""

from pathlib import Path

from llmkit.config.schema import Config
from llmkit.files import delete, file_sha256, write_atomically
from llmkit.formats.hf import export_hf
from llmkit.models.hf_config import read_head
from llmkit.peft.adapter import CONFIG, WEIGHTS, saved_base_sha256
from llmkit.storage.locate import Located, locate


def find_base(config: Config) -> tuple[Path | None, Path | None]:
    """Return the folder of the model that init_from names, and that of the adapter, if it names one."""
    if config.init_from is None:
        return None, None
    located = locate(config.init_from)
    if located.is_adapter and not config.peft:
        fix = f"--lora trains it further; or start from: llmkit export {config.init_from} merged"
        what = "is an adapter, and all weights are trained"
        raise config.error("init_from", what, got=config.init_from, fix=fix)
    if config.stack and not located.is_adapter:
        raise config.error("stack", "needs an adapter to stack on", got=config.init_from, fix="delete it")
    if located.folder.resolve().is_relative_to(Path(config.run_dir).resolve()):  # --fresh would delete it
        what, got = "lies in run_dir, where the run would write", f"{config.init_from}, run_dir: {config.run_dir}"
        raise config.error("init_from", what, got=got, fix="name another run_dir")
    return located.base, located.folder if located.is_adapter else None


def with_labels(config: Config, adapter: Path) -> Config:
    """Return the config with the labels of an adapter that is trained further, in their order, if it names them.

    Raises a UserError if data.labels names others: the outputs of its head would get another meaning.
    """
    head = read_head(adapter) if (adapter / "config.json").is_file() else None  # peft saves no names
    labels = None if head is None or head.kind == "regress" else list(head.labels)
    if config.data.kind != "labelled" or labels in (None, config.data.labels):
        return config
    if config.data.labels:
        what, fix = "are others than the adapter's, or in another order", f"data.labels: [{', '.join(labels)}]"
        raise config.error("data.labels", what, got=", ".join(config.data.labels), fix=fix)
    return config.model_copy(update={"data": config.data.model_copy(update={"labels": labels})})


def stacked_base(run_dir: Path, adapter: Path) -> Path:
    """Return the folder of an adapter's base with the adapter merged into it, which is written if it is not there.

    run_dir  of the run that trains a second adapter on it
    """
    out = run_dir / "base"
    digest = " ".join((str(saved_base_sha256(adapter)), *(file_sha256(adapter / name) for name in (WEIGHTS, CONFIG))))
    mark = out / "merged_from.txt"
    if not (mark.is_file() and mark.read_text(encoding="utf-8") == digest):
        delete(out)
        export_hf(Located(adapter), out, "fp32")
        write_atomically(mark, digest)
    return out.resolve()
