"""Measure a model while it trains: the val split, further texts, tasks, a sample, and what it forgets."""

import itertools
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from llmkit.config.schema import Config, EvalTask
from llmkit.data.splits import bytes_per_token
from llmkit.errors import DataError, UserError, is_out_of_memory
from llmkit.evals.perplexity import divide, loss_difference, note_targets
from llmkit.evals.reading import Reading, corrupted_rows, read_data, windows
from llmkit.files import write_atomically
from llmkit.generation.generate import stream
from llmkit.objectives.lm import perplexity
from llmkit.parallel.device import autocast
from llmkit.parallel.world import World
from llmkit.readers.tally import Tally
from llmkit.tasks.evaluate import prepare_tasks
from llmkit.tasks.harness import HarnessTask
from llmkit.tasks.metrics import METRICS
from llmkit.tasks.run import Prepared
from llmkit.tokenizer.tokenizer import Tokenizer
from llmkit.training.held_out import measure_answers
from llmkit.types import Batch

GENERAL = "general"  # the set of `eval.general`
FORGOTTEN = "general.json"  # in a run directory: the losses on it of the base, and of the last evaluation


@dataclass
class TextSet:
    """Hold a text or records to measure, which were read once."""

    batches: Callable[[], Iterable[Batch]]
    tokens: np.ndarray | None  # of a stream of documents
    token_bytes: np.ndarray | None
    window: int
    eos_id: int


@dataclass
class Extras:
    """Hold what is measured beside the val split."""

    sets: dict[str, TextSet] = field(default_factory=dict)
    tasks: list[Prepared | HarnessTask] = field(default_factory=list)


# ---- before the run -------------------------------------------------------------------------------------------------


def open_extras(config: Config, model_config: Any, tokenizer: Tokenizer) -> Extras:
    """Read the sets and the tasks of a config. Raise UserError for one that can't be read, or does not fit."""
    names = dict(config.eval.sets)
    if config.eval.general and names.setdefault(GENERAL, config.eval.general) != config.eval.general:
        raise config.error("eval.sets.general", "has the name of the text of eval.general", fix="rename it")
    sets = {name: open_set(config, model_config, tokenizer, name, path) for name, path in names.items()}
    if config.eval.tasks and model_config.kind == "masked":
        raise config.error("eval.tasks", f"need a decoder, not {model_config.model_type}")
    tasks = []
    for one in config.eval.tasks:
        one = EvalTask(task=one) if isinstance(one, str) else one
        data = {one.task: Path(one.data)} if one.data else {}
        tasks += prepare_tasks([one.task], data, shots=one.shots, limit=one.limit, chat=False, metrics=[])
    names = [task.name for task in tasks]
    if repeated := [name for name in names if names.count(name) > 1]:
        fix = "copy the task's file, and give the copy another name"
        raise config.error("eval.tasks", "has two tasks of one name", got=repeated[0], fix=fix)
    return Extras(sets, tasks)


def open_set(config: Config, model_config: Any, tokenizer: Tokenizer, name: str, path: str) -> TextSet:
    """Read a file of texts or of records."""
    data, size, tally = config.data, config.train.global_batch_size, Tally()
    rules = {"columns": getattr(data, "columns", {}), "train_on": getattr(data, "train_on", "all")}
    reading = Reading(
        model_config, tokenizer, data.seq_len, data.seq_len, size, False, **rules, date=getattr(data, "date", None)
    )
    tokens, what, text_bytes, batches = read_data(path, reading, tally)
    tally.check(data.on_error.max_bad_fraction, fix="repair the file, or raise data.on_error.max_bad_fraction")
    most, token_bytes = config.eval.max_batches, None
    if batches is not None:
        kept = list(itertools.islice(batches, most))
    elif model_config.kind == "causal":
        token_bytes = bytes_per_token(tokenizer, [tokens], text_bytes)
        rows = (len(tokens) - 1) // data.seq_len  # whole windows alone, if there are some
        rows = min(rows, most * size) if most else rows
        tokens = tokens[: rows * data.seq_len + 1] if rows else tokens
        kept = list(windows(tokens, data.seq_len, data.seq_len, size))
    else:
        objective = config.objective and {"name": config.objective.name, **config.objective.options}
        rows = corrupted_rows(tokens, model_config, tokenizer, data.seq_len, size, objective, config.seed)
        kept, tokens = list(itertools.islice(rows, most)), None
    if not any(batch.count for batch in kept):
        raise DataError(f"eval: the set {name} has nothing to measure", at=path, got=what)
    return TextSet(lambda: kept, tokens, token_bytes, data.seq_len, tokenizer.eos_id)


def check_best(config: Config, extras: Extras, own_scores: Iterable[str] = ()) -> None:
    """Raise UserError if eval.best is no figure of an evaluation.

    own_scores  of the val split, besides its loss
    """
    known = ["val_loss", *own_scores, *(f"{name}/val_loss" for name in extras.sets)]
    own = [task for task in extras.tasks if isinstance(task, Prepared)]
    known += [f"{task.name}/{name}" for task in own for name in task.task.score_names]
    theirs = tuple(f"{task.name}/" for task in extras.tasks if task not in own)  # the harness knows their scores
    if config.eval.best not in known and not (theirs and config.eval.best.startswith(theirs)):
        raise config.error("eval.best", "is not measured", got=config.eval.best, expected=" or ".join(known))
    is_of_task = "/" in config.eval.best and not config.eval.best.endswith("/val_loss")
    if is_of_task and config.eval.tasks_every:
        raise config.error("eval.tasks_every", "must be null, since eval.best is the score of a task", fix="delete it")


def score_of(name: str, figures: dict[str, Any]) -> float:
    """Return a figure of an evaluation so that lower is better; infinity if it was not measured."""
    if name not in figures:
        return math.inf
    metric = name.rpartition("/")[2].partition(",")[0]
    is_lower_better = metric in ("val_loss", "val_mse") or (metric in METRICS and not METRICS[metric][2])
    return figures[name] if is_lower_better else -figures[name]


def best_of(name: str, figures: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a checkpoint's manifest about its evaluation: val_loss, and `best` if that is another."""

    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    found: dict[str, Any] = {"val_loss": finite(figures.get("val_loss", math.nan))}
    return found if name == "val_loss" else found | {"best": {"name": name, "score": finite(score_of(name, figures))}}


# ---- during the run -------------------------------------------------------------------------------------------------


def measure(run: Any, model: nn.Module, step: int, folder: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the figures of an evaluation: val_loss and what belongs to it, SET/val_loss, TASK/SCORE, a sample.

    run     a PreparedRun
    folder  of the run, on rank 0
    """
    config, world, size = run.config, run.world, run.micro_batch_size
    limit = config.eval.max_batches and config.eval.max_batches * config.train.global_batch_size
    batches = itertools.islice(run.batches("val", size).in_order(limit), world.rank, None, world.size)
    with autocast(world.device, run.precision):
        options = {"device": world.device, "micro_batch_size": size, "world": world}
        result = run.objective.evaluate(model, batches, token_bytes=run.token_bytes, **options)
        with torch.compiler.set_stance("force_eager"):  # rows of other lengths, of which each would be compiled
            for name, one in run.extras.sets.items():
                result |= on_main(run.world, partial(measure_set, run, model, name, one, step, folder))
            every = config.eval.tasks_every
            if run.extras.tasks and (not every or step % every == 0 or step == run.max_steps):
                result |= on_main(run.world, partial(measure_tasks, run, model, say))
            if step in (0, run.max_steps) and config.data.kind == "sft" and run.model_config.kind == "causal":
                result |= on_main(run.world, partial(try_answers, run, model, step, folder, say))
            if config.eval.sample_prompt is not None:
                result["sample"] = sample(run, model)
    return result


def on_main(world: World, function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a function returns on rank 0, on all ranks: they decide by the same figures."""
    return world.from_main(world.on_main(function))


def measure_set(
    run: Any, model: nn.Module, name: str, one: TextSet, step: int, folder: Path | None
) -> dict[str, float]:
    """Measure a set, and return its figures. The losses of the set `general` are kept."""
    losses: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    options = {"device": run.world.device, "micro_batch_size": run.micro_batch_size, "losses": losses}
    found = perplexity(model, note_targets(one.batches(), masks), token_bytes=one.token_bytes, **options)
    if name == GENERAL and folder is not None:
        _, nats, targets = divide(losses, masks, one.tokens, one.eos_id, one.window)
        keep_losses(folder / FORGOTTEN, step, nats, targets)
    return {f"{name}/{key}": value for key, value in found.items() if key != "val_tokens"}


def measure_tasks(run: Any, model: nn.Module, say: Callable[[str], None]) -> dict[str, float]:
    """Ask the tasks, and return their scores. A task that fails is said, and has none."""
    found, start = {}, time.perf_counter()
    for task in run.extras.tasks:
        try:
            figures = task.run(model, run.data.tokenizer).figures
        except Exception as error:
            if not isinstance(error, UserError) and not is_out_of_memory(error):  # a smaller micro-batch is no help
                raise
            reason = error.what if isinstance(error, UserError) else "out of memory"
            say(f"warning: the task {task.name} fails, and the run goes on: {reason}")
            continue
        scores = {key: value for key, value in figures.items() if f"{key}_stderr" in figures}
        found |= {f"{task.name}/{key}": value for key, value in scores.items()}
        found |= {f"{task.name}/{key}_stderr": figures[f"{key}_stderr"] for key in scores}
    return found | {"tasks_seconds": round(time.perf_counter() - start, 2)}


def try_answers(
    run: Any, model: nn.Module, step: int, folder: Path | None, say: Callable[[str], None]
) -> dict[str, float]:
    """Return what `measure_answers` does, or nothing if there is no memory for it: the run goes on."""
    try:
        return measure_answers(run, model, step, folder)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        say("warning: no held-out answers are written: out of memory")
        return {}


def sample(run: Any, model: nn.Module) -> str:
    """Continue eval.sample_prompt, with a generator of its own: the run's RNG does not move."""
    tokenizer, text = run.data.tokenizer, run.config.eval.sample_prompt
    seq2seq = run.model_config.kind == "seq2seq"
    prompt = tokenizer.encode_source(text) if seq2seq else tokenizer.encode_prompt(text)
    options = {"max_new_tokens": run.config.eval.sample_tokens, "stop": frozenset([tokenizer.eos_id])}
    new = stream(model, prompt, seed=run.config.seed, **options)
    return tokenizer.decode(new if seq2seq else [*prompt, *new])


# ---- what is forgotten ----------------------------------------------------------------------------------------------


def keep_losses(path: Path, step: int, nats: np.ndarray, targets: np.ndarray) -> None:
    """Keep the losses of the parts of a text: those of step 0, which are the base's, and the newest."""
    kept = json.loads(path.read_text(encoding="utf-8")) if step and path.is_file() else {}
    kept["base" if step == 0 else "last"] = {"step": step, "nats": nats.tolist(), "targets": targets.tolist()}
    write_atomically(path, json.dumps(kept))


def describe_forgetting(folder: Path) -> str:
    """Return in words how much worse a run's model became at the text of eval.general; "" if it was not measured."""
    path = folder / FORGOTTEN
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not {"base", "last"} <= kept.keys():
        return ""
    parts = [(np.array(kept[key]["nats"]), np.array(kept[key]["targets"])) for key in ("last", "base")]
    (last, targets), (base, base_targets) = parts
    if not np.array_equal(targets, base_targets):
        return ""
    found = loss_difference(last, base, targets)
    words = {
        "higher": "worse than the base: it forgot",
        "lower": "better than the base",
        "no difference": "as the base",
    }
    before, after = base.sum() / targets.sum(), last.sum() / targets.sum()
    low, high = found["interval"]
    verdict = words.get(found["verdict"], "not clearly other than the base")
    change = f"{found['difference']:+.4f} ({low:+.4f} to {high:+.4f}) nats a token"
    return f"loss {before:.4f} -> {after:.4f}, {change}: {verdict}"
