"""Say what a run is: its header, and the commands to type after it."""

import math
import shlex

from llmkit.parallel.device import describe_precision, device_name
from llmkit.screen import count, format_count
from llmkit.training.fit import row_len, rows_in_step
from llmkit.training.prepare import PreparedRun, epochs_by_source
from llmkit.training.resolve import describe_choice

FEW_VAL_ROWS = 20  # below that, the val loss says little


def evaluation_share(run: PreparedRun, rows: int) -> float:
    """Return the share of a run's time in which it measures `rows` of the val split, the first and last time included.

    A row takes a forward pass: a third of a training row's time, or half with frozen weights.
    """
    config, steps = run.config, run.max_steps
    times = {0, steps, *range(0, steps, config.eval.every), *range(0, steps, config.checkpoint.every)}
    forward = len(times) * rows * (1 / 2 if run.plan.trainable < run.plan.total else 1 / 3)
    return forward / (forward + steps * config.train.global_batch_size)


def describe_evaluation(run: PreparedRun) -> str:
    """Return when the val split is measured, and how much of it."""
    is_corpus = run.config.data.kind == "corpus"
    every, most, rows = run.config.eval.every, run.config.eval.max_batches, run.data.samples["val"]
    if not every:
        return "never"
    read = min(rows, most * run.config.train.global_batch_size) if most else rows
    part = "" if read == rows else "; `llmkit eval` reads all"
    part += f"; about {evaluation_share(run, read):.0%} of the time"
    part += ", too few to tell models apart: raise data.split.val_fraction" if rows < FEW_VAL_ROWS and is_corpus else ""
    return f"every {every} steps and at checkpoints, {read} of {rows} val rows{part}"


def describe(run: PreparedRun) -> dict[str, str]:
    """Return the header of a run, for the screen and the report."""
    config, plan, options, rows = run.config, run.plan, run.options, run.data.samples["train"]
    size, epochs = config.train.global_batch_size, epochs_by_source(run)
    own = rows_in_step(config, options, run.world.size)
    answers = ""
    if config.data.kind == "prompts":
        rows_each = own * run.world.size // size
        answers = f" x {rows_each} rows of up to {options['objective']['answers_per_row']} answers"
    accumulation = math.ceil(own / run.micro_batch_size)
    trained = "" if plan.trainable == plan.total else f", {format_count(plan.trainable)} trained"
    mixture = [f"{name} {share:.1%} x {epochs[name]:.2f}" for name, (share, _) in run.data.shares.items()]
    available = format_count(rows)
    often = f"a batch of {size} rows is more than the {available} there are: a step reads each {size / rows:.1f} times"
    notes = [f"{often}. Lower train.global_batch_size" if size > rows else "", run.data.warning]
    ranks = count(run.world.size, "rank")
    header = {
        "run": config.run_dir,
        "model": f"{config.model.name if config.model else run.base}: {format_count(plan.total)} parameters{trained}",
        "data": run.data.summary,
        "lengths": run.data.lengths,
        "records": run.data.losses,
        "mixture": ", ".join(mixture),
        "device": f"{device_name(run.world.device)}, {describe_precision(run.world.device, run.precision)}, {ranks}",
        "batch": f"{size}{answers} = {run.micro_batch_size} micro x {accumulation} accumulated x {ranks}, "
        f"{'up to ' if run.head or answers else ''}{row_len(config, options)} tokens each",
        "length": f"{run.max_steps} steps, {format_count(run.max_steps * run.tokens_per_step)} tokens, "
        f"{run.max_steps * size / run.objective.updates / rows:.2f} epochs",
        "objective": describe_choice(config.objective.name, options["objective"]) if options["objective"] else "",
        "optimizer": describe_choice(config.optimizer.name, options["optimizer"]),
        "adapter": f"{run.adapter}, which is trained further" if run.adapter else "",
        "peft": describe_choice(config.peft.name, options["peft"]) if config.peft else "",
        "quantize": describe_choice(config.quantize.name, options["quantize"]) if config.quantize else "",
        "schedule": describe_choice(config.schedule.name, options["schedule"]),
        "compute": f"{format_count(plan.flops_per_token)} FLOPs a token, "
        f"{plan.flops_per_token * run.max_steps * run.tokens_per_step:.1e} in all",
        "eval": describe_evaluation(run),
        "beside": ", ".join([*run.extras.sets, *(task.name for task in run.extras.tasks)]),
        "note": "; ".join(filter(None, notes)),
        "memory": f"{plan.peak_memory / 2**30:.2f} GiB estimated at the peak"
        + (f", more than is free; the cheapest change: {run.smaller}" if run.smaller else ""),
    }
    return {key: value for key, value in header.items() if value}


def next_commands(run: PreparedRun) -> list[str]:
    """Return the commands to type after the run."""
    folder, kind = run.config.run_dir, run.model_config.kind
    if run.config.objective.name == "reward":
        return [f"llmkit score {folder} FILE", f"llmkit eval {folder}"]
    if run.config.data.kind == "prompts":
        return [f"llmkit chat {folder}" if run.data.is_chat else f"llmkit generate {folder} 'a prompt as in the data'"]
    if run.head:
        return [f"llmkit eval {folder}", f"llmkit classify {folder} FILE"]
    prompt = shlex.quote(run.config.eval.sample_prompt or "Once upon a time")
    write = [f"llmkit generate {folder} {prompt}"]
    if run.config.data.kind not in ("corpus", "labelled"):
        prompt = "'a prompt as in the data'"
        write = [f"llmkit chat {folder}" if run.data.is_chat else f"llmkit generate {folder} {prompt}"]
    elif kind != "causal":  # an encoder writes nothing, its decoder only the spans that were cut out
        write = []
    return [f"llmkit eval {folder} --perplexity", *write]
