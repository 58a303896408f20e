"""The defaults of `llmkit finetune`, and the example configs."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmkit.config.defaults import EXAMPLES
from llmkit.config.load import load_config
from llmkit.config.schema import Config
from llmkit.config.yaml import quote, read_yaml
from llmkit.errors import ModelError, UserError, suggest
from llmkit.models.hf_config import read_config
from llmkit.objectives import DATA_OF, HEADS
from llmkit.peft import METHODS
from llmkit.readers.packed import suffix_of
from llmkit.readers.records import DOCUMENT_FORMATS
from llmkit.storage.locate import locate
from llmkit.storage.manifest import list_checkpoints, warn
from llmkit.storage.report import data_name, list_runs
from llmkit.storage.run import read_run_config

LOCAL = Path("llmkit.yaml")
LONGEST = 1024  # data.seq_len at the most, unless the config says otherwise
FULL_LR = 2e-5  # of all weights; an adapter's is its method's
PREFERRING = ("dpo", "kto", "grpo")  # with a twentieth of the rate, and for one epoch: 1e-6 of all weights is trl's
EXAMPLE_NAMES = {"pretrain": "llama-150m", "finetune": "lora"}  # what `init` calls them -> a file in configs/


def example(kind: str) -> str:
    """Return the text of an example config, by kind or by name."""
    names = sorted(path.stem for path in EXAMPLES.glob("*.yaml"))
    name = EXAMPLE_NAMES.get(kind, kind)
    if name not in names:
        known = [*EXAMPLE_NAMES, *names]
        raise UserError("there is no such example", got=kind, fix=suggest(kind, known))
    return (EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8")


def finetune_config(
    path: Path | None,
    methods: list[str],
    *,
    model: str | None,
    data: Path | None,
    columns: dict[str, str] | None,
    rank: int | None,
    objective: str | None = None,
    overrides: list[str],
    say: Callable[[str], None],
) -> Config:
    """Return the config of `llmkit finetune`: flags override the file, which overrides these defaults.

    Without a file: ./llmkit.yaml, else the newest run of a whole model, with its own data.
    """
    if path is None and LOCAL.is_file():
        path = LOCAL
        say(f"config: {LOCAL}")
    own = read_yaml(path)[0] if path else {}
    own_peft, own_objective = (own[key] if isinstance(own.get(key), dict) else {} for key in ("peft", "objective"))
    learnt = objective or own_objective.get("name")
    newest = None
    if path is None and model is None:
        runs = [run for run in list_runs(Path("runs")) if list_checkpoints(run)]
        whole = [run for run in runs if is_whole_model(run)]
        newest = whole[-1] if whole else None
        if newest:
            say(f"model: {newest}, the newest run")
            model = str(newest)
    if data and suffix_of(data) in DOCUMENT_FORMATS and objective not in HEADS:  # it may be a table
        fix = continue_pretraining(model, str(data))
        raise UserError("--data is text, not prompts and answers", got=data, fix=fix)
    if len(methods) > 1:
        raise UserError(
            "finetune takes one method", got=" and ".join(methods), fix="name --lora, --qlora, --full or --method"
        )
    if not methods and not own_peft.get("name"):
        raise UserError("finetune needs a method", fix="add --lora, or --full to train all weights")
    quantized = methods == ["qlora"]
    methods = ["lora"] if quantized else methods
    method = methods[0] if methods else own_peft["name"]
    section = read_run_config(newest)["data"] if newest and data is None else None
    if section:
        say(f"data: {data_name(section)}, what that run trained on")
    if path is None and (model is None or (data is None and section is None)):
        missing = [name for name, there in (("a model", model), ("data", data or section)) if there is None]
        flag = f"--{method}" if method in ("lora", "full") else f"--method {method}"
        raise UserError(
            f"finetune needs {' and '.join(missing)}: there is no {LOCAL} and no run under ./runs",
            fix=f"llmkit finetune {flag} --from MODEL --data pairs.jsonl",
        )

    start = model or own.get("init_from")
    name = f"{Path(start or 'model').name}-{'qlora' if quantized else method}"
    if path not in (None, LOCAL):  # a config names its run as in pretraining, unless the method is another one
        name = path.stem if own_peft.get("name", "full") == method else f"{path.stem}-{method}"
    lr, epochs = (METHODS[method].lr, METHODS[method].epochs) if method in METHODS else (FULL_LR, 3)
    if learnt in PREFERRING:
        lr, epochs = lr / 20, 1
    defaults: dict[str, Any] = {
        "run_dir": f"runs/{name}",
        "optimizer": {"name": "adamw", "lr": lr, "weight_decay": 0.0},
        "schedule": {"name": "cosine"},
        "train": {"epochs": epochs, "global_batch_size": 16},
        "eval": {"every": 50},
        "checkpoint": {"every": 100},
    }
    if method != "full":
        defaults["peft"] = {"name": method}
    if section:
        defaults["data"] = section
    elif data is not None or is_records(own.get("data")):
        defaults["data"] = {"kind": DATA_OF.get(learnt, "sft")}
        if start is not None:
            defaults["data"]["seq_len"] = min(LONGEST, trained_length(start))
    flags = [f"init_from={quote(model)}"] if model else []
    flags += [f"data.path={quote(str(data))}"] if data else []
    flags += [f"data.columns={json.dumps(columns)}"] if columns else []
    if methods:
        flags += ["peft=null" if method == "full" else f"peft.name={method}"]
    flags += [f"peft.r={rank}"] if rank else []
    flags += ["quantize.name=nf4"] if quantized else []
    flags += [f"objective.name={objective}"] if objective else []
    config = load_config(path, [*flags, *overrides], defaults)
    if config.model_dump() != load_config(path, [*flags, *overrides, *flags], defaults).model_dump():
        what, got = "-o contradicts an option of finetune", f"-o {' '.join(overrides)}, against {' '.join(flags)}"
        raise UserError(what, got=got, fix="leave one of them out")
    if (chosen := config.peft.name if config.peft else "full") != method:
        what, fix = "the config trains with another method than the run is named after", "name the method by its option"
        raise config.error("peft.name", what, got=f"{chosen}, and {method}", fix=f"{fix}: --{chosen}")
    return config


def is_records(data: Any) -> bool:
    """Return whether a data section of a YAML file that names no kind is one of records, not of a corpus."""
    return isinstance(data, dict) and not data.keys() & {"dir", "sources"}


def continue_pretraining(model: str | None, path: str) -> str:
    """Return what to do to continue the pretraining of a model on a text: the lines of a config, and the command."""
    name, seq_len = Path(path).stem, min(LONGEST, trained_length(model)) if model else 256
    return f"""to continue the pretraining on this text, save these lines as {name}.yaml:
init_from: {quote(model or "MODEL")}
data: {{dir: {quote(f"data/{name}")}, sources: {quote(path)}, seq_len: {seq_len}}}
optimizer: {{name: adamw, lr: 1.0e-4}}
train: {{epochs: 1}}
and run: llmkit pretrain {shlex.quote(f"{name}.yaml")}"""


def is_whole_model(run: Path) -> bool:
    """Return whether a run trained all weights, as opposed to an adapter. Warn about a damaged run."""
    try:
        return read_run_config(run)["peft"] is None
    except ModelError as error:
        warn(error)
        return False


def trained_length(model: str) -> int:
    """Return the tokens that a model's run read at a time, else its longest position."""
    located = locate(model, check=False)
    if located.run_dir:
        return read_run_config(located.run_dir)["data"]["seq_len"]
    return read_config(located.base).max_position_embeddings
