"""Read a task: a YAML file in the format of lm-evaluation-harness, which says what is asked and how it is scored.

The keys, their defaults and their meaning are those of version 0.4 of the harness:
https://github.com/EleutherAI/lm-evaluation-harness/blob/main/docs/task_guide.md. The keys of `Task` that it does not
have are `group_by`, `fairness` and the output type `pairs`; and what `Files` says.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from llmkit.config.data import TableFormat
from llmkit.config.explain import explain_all
from llmkit.config.fields import Count, NonBlank, Section
from llmkit.config.yaml import merge, read_yaml
from llmkit.errors import UserError, raise_all
from llmkit.user_code import load_function

Template = str | Callable  # a field, a Jinja template, or a function of a task's own code

# Keys of the harness that only the harness itself understands.
HARNESS_ONLY = ("custom_dataset", "use_prompt", "doc_to_image", "doc_to_audio", "unsafe_code", "class", "group")
HARNESS_FIX = "pip install 'llmkit[tasks]', and give the name of a task that the harness has"
DEFAULT_METRICS = {
    "multiple_choice": ["acc", "acc_norm"],
    "pairs": ["acc", "difference"],
    "loglikelihood": ["perplexity", "acc"],
    "loglikelihood_rolling": ["word_perplexity", "byte_perplexity", "bits_per_byte"],
    "generate_until": ["exact_match"],
}


class Files(TableFormat):
    """`dataset_kwargs`: the files of each split, and how they are read."""

    data_files: str | list[str] | dict[str, str | list[str]] | None = None
    """Name a file, folder or glob, or one for each split. `--data TASK=PATH` replaces it."""
    labels: str | None = None
    """Name a file with one label a line, which becomes the field `label` of the records."""
    separator: str | None = Field(None, alias="sep")
    """Separate the columns of a CSV file by this text."""
    trust_remote_code: bool = False
    """Read for compatibility: nothing remote is run."""


class Shots(Section):
    """`fewshot_config`: where the examples before a question come from."""

    sampler: Literal["default", "first_n"] = "default"
    """Choose at random, other ones for each question (default), or the first ones (first_n)."""
    split: str | None = None
    """Take the examples from this split; default: fewshot_split."""
    samples: list[dict[str, Any]] | None = None
    """Give the examples themselves."""


class Metric(Section):
    """Hold one of `metric_list`."""

    metric: str | Callable
    """Name the metric, or give a function."""
    aggregation: str | Callable | None = None
    """Put the scores of questions together by the mean, by what the metric needs, or by a function."""
    higher_is_better: bool | None = None
    """Read for compatibility: of its own metrics llmkit knows it, and of a function it is true."""
    ignore_case: bool = False
    """Compare in lower case (exact_match)."""
    ignore_punctuation: bool = False
    """Leave out punctuation (exact_match)."""
    ignore_numbers: bool = False
    """Leave out digits (exact_match)."""
    regexes_to_ignore: list[str] = Field(default_factory=list)
    """Leave out what matches (exact_match)."""

    @property
    def name(self) -> str:
        return self.metric if isinstance(self.metric, str) else self.metric.__name__


class Step(Section):
    """Hold a step of a filter of written text."""

    function: Literal["regex", "take_first", "remove_whitespace", "lowercase", "uppercase"]
    """Choose what is done."""
    regex_pattern: str = r"#### (\-?[0-9\.\,]+)"
    """Find this (regex)."""
    group_select: int = 0
    """Choose one of several matches, -1 for the last (regex)."""
    fallback: str = "[invalid]"
    """Return this text if nothing matches (regex)."""


class Filter(Section):
    """Hold one of `filter_list`, whose scores have its name."""

    name: NonBlank = "none"
    """Name the filter."""
    filter: list[Step] = Field(default_factory=list)
    """Apply these steps, one after the other."""


class Writing(Section):
    """`generation_kwargs`."""

    until: str | list[str] | None = None
    """End an answer at these texts; default: fewshot_delimiter."""
    max_gen_toks: Count = 256
    """Write at most this many tokens."""
    do_sample: bool = False
    """Draw tokens instead of taking the likeliest."""
    temperature: float = Field(0.0, ge=0)
    """Draw tokens at this temperature."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw from the likeliest tokens that reach this probability."""
    top_k: int | None = Field(None, ge=0)
    """Draw from this many of the likeliest tokens."""


class Task(Section):
    """Hold a task."""

    task: NonBlank
    """Name the task."""
    task_alias: str | None = None
    """Read for compatibility: tables show the name."""
    tag: str | list[str] | None = None
    """Read for compatibility: the collections that it is in."""
    include: str | None = None
    """Name a task file whose keys this one replaces."""
    dataset_path: NonBlank = "json"
    """Read files (json, csv, parquet or text), a local folder, or a data set on the hub."""
    dataset_name: str | None = None
    """Name the configuration of a data set on the hub."""
    dataset_kwargs: Files = Files()
    """Name the files."""
    training_split: str | None = None
    """Name the split for examples."""
    validation_split: str | None = None
    """Name the split that is asked if there is no test split."""
    test_split: str | None = None
    """Name the split that is asked."""
    fewshot_split: str | None = None
    """Name the split of the examples; default: the training split, the validation split, the one that is asked."""
    fewshot_config: Shots = Shots()
    """Choose how examples are taken."""
    num_fewshot: int | None = Field(None, ge=0)
    """Put this many examples before a question; `--shots` replaces it."""
    process_docs: Callable | None = None
    """Prepare the records by a function of the data set."""
    output_type: Literal["multiple_choice", "pairs", "loglikelihood", "loglikelihood_rolling", "generate_until"] = (
        "generate_until"
    )
    """Choose what is asked; pairs: which of two texts is likelier."""
    description: str = ""
    """Begin each prompt with this template."""
    doc_to_text: Template | int | None = None
    """Make the question: a field, a template or a function."""
    doc_to_target: Template | int | list[str] | None = None
    """Make the right answer, or the number of the right choice; several are a list."""
    doc_to_choice: Template | list[str] | dict[str, str] | None = None
    """Make the choices."""
    gen_prefix: str | None = None
    """Begin each answer with this text."""
    target_delimiter: str = " "
    """Put this between a question and its answer."""
    fewshot_delimiter: str = "\n\n"
    """Put this after each example."""
    generation_kwargs: Writing = Writing()
    """Choose how an answer is written."""
    repeats: Literal[1] = 1
    """Ask each question so often."""
    filter_list: list[Filter] | None = None
    """Filter a written answer before it is scored."""
    metric_list: list[Metric] | None = None
    """Compute these scores; default: those that are usual for the output type."""
    process_results: Callable | None = None
    """Compute scores by a function of a record and the results."""
    should_decontaminate: bool = False
    """Read for compatibility; see data.decontaminate."""
    doc_to_decontamination_query: str | None = None
    """Read for compatibility: what of a record is looked for in training data."""
    group_by: str | None = None
    """Give the score for each value of this field or template too, and take examples from the same one."""
    fairness: bool = False
    """Measure how a model's choices differ between the groups, which are people."""
    metadata: dict[str, Any] = Field(default_factory=dict)
    """Note the `version`, and what else its author notes."""

    @property
    def asked_split(self) -> str:
        """Return the name of the split whose records are asked."""
        return self.test_split or self.validation_split or "test"

    @property
    def shots_split(self) -> str | None:
        """Return the name of the split that examples come from, if one is named."""
        return self.fewshot_config.split or self.fewshot_split

    @property
    def metrics(self) -> list[Metric]:
        names = DEFAULT_METRICS[self.output_type]
        return self.metric_list or [Metric(metric=name) for name in names]

    @property
    def score_names(self) -> list[str]:
        """Return the names of the scores: those of the metrics, for written answers with the filter's."""
        filters = [one.name for one in self.filter_list or [Filter()]]
        suffixes = ["" if name == "none" else f",{name}" for name in filters]
        return [metric.name + suffix for metric in self.metrics for suffix in suffixes]

    @property
    def until(self) -> list[str]:
        """Return the texts that end an answer."""
        until = self.generation_kwargs.until
        until = [self.fewshot_delimiter] if until is None else [until] if isinstance(until, str) else until
        return [text for text in until if text]


def read_task(path: Path, *, allow_code: bool = False) -> Task:
    """Read a task file. Raise UserError if it is not one, or if it brings code and `allow_code` is false."""
    values, origins = read_values(path, allow_code)
    values.pop("include", None)
    for key in HARNESS_ONLY:
        if key in values:
            raise UserError(f"{key} is understood by the harness alone", at=origins[(key,)], fix=HARNESS_FIX)
    if "task" not in values:
        values["task"] = path.stem
    try:
        task = Task.model_validate(values)
    except ValidationError as error:
        raise_all(explain_all(error, Task, origins))
    raise_all(conflicts(task, path))
    return task


def read_values(path: Path, allow_code: bool, depth: int = 0) -> tuple[dict[str, Any], dict[tuple, str]]:
    """Read the keys of a task file, and those of a file that it includes."""

    def load(value: str, at: str) -> Callable:
        if not allow_code:
            fix = "read it, and give `llmkit eval --allow-code` if you trust it"
            raise UserError("the task runs code of its own", at=at, got=f"!function {value}", fix=fix)
        module, _, function = value.rpartition(".")
        return load_function(path.parent / f"{module.replace('.', '/')}.py", function, at)

    values, origins = read_yaml(path, {"!function": load})
    if "include" in values:
        at, file = origins[("include",)], path.parent / str(values["include"])
        if depth > 8 or not file.is_file():
            raise UserError("the included task file is not there", at=at, got=values["include"])
        included, places = read_values(file, allow_code, depth + 1)
        values, origins = merge(included, values), places | origins
    return values, origins


def conflicts(task: Task, path: Path) -> list[UserError]:
    """Return what a task lacks."""
    found, needs_choices = [], task.output_type in ("multiple_choice", "pairs")
    if needs_choices and task.doc_to_choice is None:
        found.append(UserError(f"{task.task}: doc_to_choice is missing", at=path, fix="name the field of the choices"))
    if task.doc_to_target is None and task.process_results is None and task.output_type != "pairs":
        found.append(UserError(f"{task.task}: doc_to_target is missing", at=path, fix="name the field of the answer"))
    if task.doc_to_text is None and task.output_type not in ("pairs", "loglikelihood_rolling"):
        found.append(UserError(f"{task.task}: doc_to_text is missing", at=path, fix="name the field of the question"))
    for one in (step for each in task.filter_list or [] for step in each.filter):
        try:
            re.compile(one.regex_pattern)
        except re.error as error:
            found.append(UserError(f"{task.task}: a filter is no regular expression: {error}", got=one.regex_pattern))
    if task.fairness and (task.group_by is None or task.output_type != "multiple_choice"):
        found.append(UserError(f"{task.task}: fairness needs choices, and group_by for the groups", at=path))
    return found


def find_task(name: str, folder: Path) -> Path | None:
    """Return the file of a task: a path, or the name of one that comes with llmkit; None if there is none.

    folder  of the task files that come with llmkit
    """
    given = Path(name).expanduser()
    if given.suffix in (".yaml", ".yml") or given.is_file():
        if not given.is_file():
            raise UserError("there is no such task file", at=given)
        return given
    return path if (path := folder / f"{name}.yaml").is_file() else None
