"""Declare the sections of the YAML file, their keys and their defaults; `data` has a file of its own.

A "choose one" section is `{name: adamw, lr: 3e-4}`: `name` picks a function, the rest are that function's keyword-only
arguments. `load.check_options` checks them against its signature later, when torch may be imported.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr

from llmkit.config.data import CorpusData, TaskData
from llmkit.config.fields import Choice, Count, NonBlank, PathStr, Regex, Section, Seed, Tokens
from llmkit.config.records import LabelledData, PreferenceData, PromptData, SftData
from llmkit.config.yaml import dump_yaml, find_origin, key_path
from llmkit.errors import UserError


class Train(Section):
    max_steps: Count | None = None
    """Length of the run in optimizer steps."""
    max_tokens: Tokens | None = None
    """Length of the run in tokens."""
    epochs: Annotated[float, Field(gt=0, le=10**6)] | None = None
    """Length of the run in passes over the data."""
    global_batch_size: Annotated[int, Field(ge=1, le=10**6)] = 32
    """Sequences in one optimizer step."""
    micro_batch_size: Count | Literal["auto"] = "auto"
    """Sequences in one forward pass; auto: as many as fit. The rest of the batch is accumulated."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients with a larger norm are scaled down to it; null: never."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 where the device is fast with it, else fp32."""
    fp8: bool = False
    """Compute the products of large linear layers in fp8 (torchao), on a GPU that can; the rest in bf16."""
    gradient_checkpointing: (
        Literal["auto", "none", "selective", "full"] | Count | Annotated[float, Field(gt=0, lt=1)]
    ) = "auto"
    """Save memory by computing parts of blocks twice. selective: all but matrix products; 0.5: also half of these;
    k: all of every k-th block; full: all of every block; auto: as little as fits. In compiled blocks torch chooses what
    to keep, within that share of the memory; on a CPU it is selective there by itself."""
    compile: Literal["auto"] | bool = "auto"
    """Compile the model with torch.compile; auto: where it pays."""
    deterministic: bool = False
    """Use only deterministic kernels, so that a run can be repeated bit for bit on CUDA."""
    early_stopping_patience: Count | None = None
    """Evaluations in a row without a lower val loss."""
    only: list[Regex] | None = None
    """Train these weights alone: first 2, last 2 (blocks), head, or a regex that is found in their names."""
    max_bad_steps: Count = 5
    """Non-finite steps in a row, all skipped, before the run stops."""


class EvalTask(TaskData):
    shots: Annotated[int, Field(ge=0, le=1000)] | None = None
    """Examples before each question; null: the task's."""
    limit: Count | None = None
    """Ask only the first questions, of each group."""


class Eval(Section):
    every: Count | None = 250
    """Steps between evaluations; null: never."""
    max_batches: Count | None = 50
    """Measure at most this many batches of the val split; null: all."""
    sample_prompt: str | None = None
    """Text to continue at every evaluation."""
    sample_tokens: Count = 64
    """Tokens to write after sample_prompt."""
    sets: dict[NonBlank, PathStr] = Field(default_factory=dict)
    """Names of further files to measure at every evaluation: {wiki: wiki.txt, code: code.jsonl}."""
    general: PathStr | None = None
    """A file of general text, for fine-tuning: how much of it the model forgets."""
    tasks: list[NonBlank | EvalTask] = Field(default_factory=list)
    """Tasks to ask, see `llmkit eval --tasks`: [{task: hellaswag, data: hellaswag.jsonl, limit: 200}]."""
    tasks_every: Count | None = None
    """Ask the tasks at the evaluations of every so many steps, and at the last; null: at each."""
    best: NonBlank = "val_loss"
    """The figure that chooses the best checkpoint and stops early: val_loss, wiki/val_loss, hellaswag/acc; of a
    head for labels: val_accuracy, val_f1, val_spearman."""


class Checkpoint(Section):
    every: Count = 500
    """Steps between checkpoints."""
    keep: Count = 2
    """The newest ones; the best by val loss is kept too."""
    average: Literal["none", "tail"] = "none"
    """tail: evaluate and keep the average of the last weights; for schedule constant."""
    average_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the steps so far that the average is of."""


class Log(Section):
    every: Count = 10
    """Steps between lines of the log."""
    tensorboard: bool = False
    """Also write TensorBoard files."""


ADAMW_COSINE = {"optimizer": {"name": "adamw", "lr": 6e-4}, "schedule": {"name": "cosine", "warmup_steps": 100}}
# Defaults that `recipe` sets in other sections. Values in the config win.
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    # The fewest tokens to a loss, in small runs: query and key norms, blocks that start as the identity, Muon. See
    # scripts/measure_recipe.py.
    "modern": {
        "model": {"name": "qwen3", "init": "zero"},
        "optimizer": {"name": "muon", "lr": 5e-3, "momentum": 0.9},
        "schedule": {"name": "wsd", "decay_fraction": 0.6},
    },
    "llama": {"model": {"name": "llama"}} | ADAMW_COSINE,
    "gpt2": {"model": {"name": "gpt2"}} | ADAMW_COSINE,
}


class Config(Section):
    """The config of a run. `where("train.max_steps")` returns the file and line of a key."""

    run_dir: PathStr = "runs/default"
    """The folder of the run; default: runs/NAME OF THE CONFIG."""
    recipe: Literal["modern", "llama", "gpt2"] | None = None
    """Sets defaults for the model, the optimizer and the schedule. modern: the fewest tokens to a loss."""
    seed: Seed = 1337
    """Seed of the weights, the order of the data and dropout."""
    init_from: PathStr | None = None
    """Start from this model: a run, a checkpoint, a Hugging Face folder, or an adapter."""
    stack: bool = False
    """If init_from is an adapter: merge it into its base, and train a second one on that; false: train it further."""
    resize_embeddings: bool = False
    """Add embedding rows for tokens that the model of init_from lacks."""
    model: Choice | None = None
    """The architecture and its sizes, for a model that starts from random weights."""
    data: Annotated[CorpusData | SftData | PreferenceData | PromptData | LabelledData, Field(discriminator="kind")]
    """What to train on."""
    objective: Choice | None = None
    """Null: the default for the model and the data."""
    peft: Choice | None = None
    """The parameter-efficient method; null: train all weights."""
    quantize: Choice | None = None
    """Keep the frozen linears of an adapter's base in fewer bits: nf4 (QLoRA) or int8; null: in 16."""
    optimizer: Choice = Choice(name="adamw")
    """How weights are updated."""
    schedule: Choice = Choice(name="cosine")
    """How the learning rate changes during the run."""
    train: Train = Train()
    """The length of the run, and how a step is computed."""
    eval: Eval = Eval()
    """When and how the model is measured."""
    checkpoint: Checkpoint = Checkpoint()
    """When the state of the run is saved."""
    log: Log = Log()
    """What is logged."""

    _origins: dict[tuple, str] = PrivateAttr(default_factory=dict)

    def where(self, key: str) -> str:
        """Return the file and line of a dotted key, or of the innermost section that contains it."""
        return find_origin(self._origins, key_path(key))

    def error(self, key: str, problem: str, *, kind: type[UserError] = UserError, **details: Any) -> UserError:
        """Return an error about a dotted key, with its file and line."""
        return kind(f"{key} {problem}", at=self.where(key), **details)

    def dump(self) -> str:
        """Return the whole config as YAML, every default written out."""
        return dump_yaml(self.model_dump())
