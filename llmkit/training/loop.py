"""The training loop, `take_steps`, shared by pretraining and fine-tuning, with or without PEFT."""

import contextlib
import gc
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmkit.config.data import CorpusData
from llmkit.config.schema import Config
from llmkit.corpus.build import needs_build
from llmkit.errors import INTERRUPTED, UserError
from llmkit.parallel.compile import apply_checkpointing, compile_blocks, describe_checkpointing
from llmkit.parallel.device import DTYPES, autocast, device_name, make_deterministic, matmul_rate, peak_flops, to_device
from llmkit.parallel.fp8 import apply_fp8
from llmkit.parallel.signals import Signals
from llmkit.parallel.world import World, start_world
from llmkit.screen import format_duration
from llmkit.storage import checkpoint
from llmkit.storage.curves import describe_curves
from llmkit.storage.locate import locate
from llmkit.storage.manifest import (
    add_dependent_run,
    best_checkpoint,
    newest_intact_checkpoint,
    step_of,
)
from llmkit.storage.plot import plot_runs
from llmkit.storage.report import is_score, write_report
from llmkit.storage.run import RunDirectory, check_can_open, open_run, without_secrets
from llmkit.tasks.questions import name_question_files
from llmkit.training.average import averaged, start_average, update_average
from llmkit.training.evaluation import best_of, describe_forgetting, measure, score_of
from llmkit.training.fit import with_train
from llmkit.training.header import describe, next_commands
from llmkit.training.held_out import describe_answers
from llmkit.training.log import Interval, MetricsLogger
from llmkit.training.objective import folders_beside
from llmkit.training.optim import OPTIMIZERS, clip, set_lr
from llmkit.training.plan import plan_config, plan_rows
from llmkit.training.prepare import PreparedRun, prepare
from llmkit.training.profile import TABLE, TRACE, start_profiler
from llmkit.training.progress import Progress, early_stop, initial_counters, stop_if_diverged, update_loss_scale
from llmkit.training.reference import attach_reference, keep_references
from llmkit.training.retry import retry_smaller
from llmkit.training.state import make_model, restore, save, write_model
from llmkit.training.warmup import choose_compile, prepare_batch, rehearse
from llmkit.types import Batch


def train(
    config: Config,
    *,
    fresh: bool = False,
    dry_run: bool = False,
    profiled: int = 0,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train what the config says, from its newest intact checkpoint if the run directory has one.

    fresh    delete what an earlier run left in the run directory
    dry_run  check the config, and the data if it is built, print the header, and stop; no weights are loaded
    profiled  number of steps to profile, see `profile`
    Returns the summary on rank 0. Raises UserError for bad input, divergence, and an interruption after a checkpoint.
    """
    world, config = start_world(), name_question_files(config)
    say = say if world.main else (lambda line: None)
    if config.train.deterministic:
        make_deterministic(world.device)
    if dry_run and isinstance(config.data, CorpusData) and needs_build(config.data):
        say(f"{config.data.dir} is not built, or with other settings (llmkit data build): this is all that is known")
        figures = plan_config(config)
        for key, value in plan_rows(figures).items():
            say(f"{key:>16}  {value}")
        return figures
    run = prepare(config, world, fresh=fresh, keep=not dry_run, say=say)
    folder, resolved, header = Path(run.config.run_dir), without_secrets(run.config.model_dump()), describe(run)
    config_file = Path(config.where(""))
    for key, value in header.items():
        say(f"{key:>10}  {value}")
    if dry_run:
        check_can_open(folder, resolved, config_file, fresh=fresh)
        return header

    info = {"device": device_name(world.device), "ranks": world.size}
    info |= {"torch": torch.__version__, "data_fingerprint": run.data.fingerprint}
    directory = world.on_main(lambda: open_run(folder, resolved, config_file, fresh=fresh, info=info))
    try:
        resumed = None if fresh else newest_intact_checkpoint(folder)
        return take_steps(run, directory, resumed, header, profiled, say)
    finally:
        if directory:
            directory.close()


def take_steps(
    run: PreparedRun,
    directory: RunDirectory | None,
    resumed: Path | None,
    header: dict[str, str],
    profiled: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Make the model, restore the checkpoint `resumed`, and train to the last step. The order is important."""
    config, world, device, method = run.config, run.world, run.world.device, run.method
    world.on_main(partial(keep_references, run, say), builds_data=True)
    model = make_model(run, resumed)
    attach_reference(run, model)
    if config.train.fp8:
        if not (number := apply_fp8(model)):
            what = "changes nothing: no linear layer of the blocks is large enough"
            raise config.error("train.fp8", what, fix="delete it")
        say(f"{'fp8':>10}  the products of {number} linear layers")
    apply_checkpointing(model, config.train.gradient_checkpointing)
    within_memory = partial(retry_smaller, run, model, directory, say)
    batches = run.batches("train", config.train.global_batch_size)
    done = step_of(resumed) if resumed else 0
    compiled, reason = within_memory(partial(choose_compile, run, model, batches, done))
    run.config = config = with_train(run.config, compile=compiled)
    if compiled:
        compile_blocks(model, device, run.precision, config.train.gradient_checkpointing)
    how = f"compiled: {'every block, and the loss' if compiled else 'no'} ({reason})"
    say(f"{'blocks':>10}  {len(model.blocks)}, {describe_checkpointing(config.train.gradient_checkpointing)}, {how}")

    optimizers = OPTIMIZERS[config.optimizer.name](model, world, **run.optimizer_options)
    trained = [p for p in model.parameters() if p.requires_grad]
    progress = Progress(best=config.eval.best, tensors=initial_counters(device, run.precision))
    if config.checkpoint.average == "tail":  # of a checkpoint, model/ is the average
        progress.average = start_average(trained)
        say(f"{'average':>10}  of the last weights: what val_loss measures, and what a checkpoint's model/ holds")
    if resumed:
        restore(resumed, run, model, optimizers, progress)
        say(f"{'resumed':>10}  {resumed}")
    if directory:
        directory.config["train"]["compile"] = compiled
        for change in directory.changes if resumed else []:
            say(f"{'changed':>10}  {change}")
        directory.begin(progress.step if resumed else None)
        needed = [folder for _, folder in folders_beside(run.options["objective"])]
        if config.init_from:  # a base, and an adapter on it
            needed += [run.base, locate(config.init_from, check=False).folder]
        for folder in dict.fromkeys(needed):
            add_dependent_run(folder, directory.folder)
    if progress.step >= run.max_steps:
        say(f"{'complete':>10}  all {run.max_steps} steps are done; raise the length in train to go on, or use --fresh")
    rate = matmul_rate(device, DTYPES[run.precision])
    peak, source = peak_flops(device, run.precision, rate)
    say(f"{'peak':>10}  {peak / 1e12:.3g} TFLOP/s ({source}); matrix products reach {rate / 1e12:.3g}")
    say("")

    logger, interval = MetricsLogger(run, directory, peak, progress.step, say), Interval()
    if progress.step < run.max_steps:
        with logger.pause():
            if compiled:
                say("compiling ...")
            seconds = within_memory(partial(rehearse, run, model, batches, optimizers))
            if compiled:
                say(f"compiled in {seconds:.0f} s")
            if directory and progress.step == 0:
                checkpoint.try_to_save(directory.folder, partial(write_model, run, model))
    signals = Signals()
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection in mid-step stalls every rank
    try:
        stop = early_stop(run, progress)
        if config.eval.every and progress.step == 0:
            evaluate(run, model, progress, logger)
            logger.flush(progress.step)
        if config.eval.every and progress.step == run.max_steps and lacks_evaluation(resumed, directory, world):
            evaluate(run, model, progress, logger)
            complete_last_step(run, resumed, directory, logger)
        profiler = start_profiler(directory.folder / "profile", profiled, device) if directory and profiled else None
        while progress.step < run.max_steps and not stop:
            # One step: the gradient of (sum of losses / targets of the whole step), however it is cut up.
            step = progress.step
            lr = set_lr(optimizers, run.lr_factor(step))
            batch, figures = within_memory(partial(prepare_batch, run, model, batches, step, Path(config.run_dir)))
            targets = world.sum(batch.count)
            scale = progress.tensors["scale"]
            attempt = partial(add_gradients, run, model, trained, batch, step, scale / targets)
            interval.add(**within_memory(attempt))
            if method and method.penalty:
                (method.penalty(model, run.method_options) * scale).backward()
            norm, found_inf = clip(trained, config.train.max_grad_norm, scale)
            for optimizer in optimizers:
                optimizer.found_inf = found_inf  # not finite: change nothing, decided on the device
                optimizer.step()
            if method and method.after_step:
                method.after_step(model, run.method_options, step, run.max_steps)
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            update_loss_scale(progress.tensors, found_inf, run.precision)
            progress.step += 1
            if progress.average:
                update_average(progress.average, progress.step, config.checkpoint.average_fraction)
            interval.targets += targets
            interval.add(**{name: torch.tensor(value * targets / world.size) for name, value in figures.items()})
            if profiler:
                profiler.step()

            # After the step: evaluate, log, save, as often as the config says.
            done = progress.step
            last = done == run.max_steps
            saving = last or done % config.checkpoint.every == 0
            if world.sum(signals.signal or 0):
                stop = "interrupted"
            # Every checkpoint has a val loss, by which the best is known, unless a signal leaves no time for it.
            elif config.eval.every and (saving or done % config.eval.every == 0):
                stop = evaluate(run, model, progress, logger)
            if stop or saving or done % config.log.every == 0:
                log_step(run, progress, logger, interval, lr, norm)
            if stop or saving:
                save(run, model, optimizers, progress, logger)
            logger.flush(progress.step)
    finally:
        gc.enable()
        gc.unfreeze()
        logger.close()
        signals.release()
    if stop == "interrupted":
        what = f"interrupted at step {progress.step}; a checkpoint is saved"
        fix = "run the same command again to continue"
        raise UserError(what, fix=fix, code=INTERRUPTED[signals.signal or signal.SIGTERM])
    return world.on_main(lambda: finish(run, directory, header, progress, logger, stop, profiled, say))


def add_gradients(
    run: PreparedRun, model: nn.Module, trained: list[nn.Parameter], batch: Batch, step: int, factor: Tensor
) -> dict[str, Tensor]:
    """Add up the gradients of (sum of losses * factor) over the micro-batches of a batch, and over all ranks.

    Return this rank's sums of the loss and the metrics.
    """
    torch.manual_seed(run.seed_at(step))  # dropout is a function of the step too: no state to save
    device, sums = run.world.device, Interval()
    micros = list(batch.split(run.micro_batch_size))
    for micro in micros:
        with autocast(device, run.precision):
            loss, metrics = run.objective.loss(model, to_device(micro, device))
        with run.world.sum_gradients(trained) if micro is micros[-1] else contextlib.nullcontext():
            (loss * factor).backward()
        sums.add(loss=loss - metrics.pop("added", 0.0), **metrics)
    return sums.sums


def lacks_evaluation(resumed: Path, directory: RunDirectory | None, world: World) -> bool:
    """Return whether a signal left no time to evaluate the last step of a run."""
    records = directory.metrics() if directory else []
    return not world.sum(sum(record["step"] == step_of(resumed) and "val_loss" in record for record in records))


def complete_last_step(run: PreparedRun, resumed: Path, directory: RunDirectory | None, logger: MetricsLogger) -> None:
    """Add a late evaluation to the record and the checkpoint of the last step."""
    if directory:
        directory.complete(logger.pending)
        checkpoint.record_evaluation(resumed, best_of(run.config.eval.best, logger.pending))
    logger.pending = {}


# ---- around the steps -----------------------------------------------------------------------------------------------


def log_step(
    run: PreparedRun, progress: Progress, logger: MetricsLogger, interval: Interval, lr: float, norm: Tensor
) -> None:
    """Log the averages of the interval, for which the host waits for the device. End a run that has diverged."""
    logger.log(
        step=progress.step,
        tokens=progress.step * run.tokens_per_step,
        **interval.take_averages(run.world),
        lr=lr,
        grad_norm=norm.item(),
        skipped=int(progress.tensors["skipped"].item()),
        **logger.speed(progress.step),
    )
    try:
        stop_if_diverged(run, progress)
    except UserError:
        logger.flush(progress.step)
        raise


def evaluate(run: PreparedRun, model: nn.Module, progress: Progress, logger: MetricsLogger) -> str | None:
    """Measure the val split, write a sample, and return the reason to stop early, None without one."""
    folder = logger.directory.folder if logger.directory else None
    attempt = partial(measure, run, model, progress.step, folder, logger.say)
    with logger.pause(), averaged(progress.average):
        result = retry_smaller(run, model, logger.directory, logger.say, attempt)
    logger.log(step=progress.step, tokens=progress.step * run.tokens_per_step, **result)
    score = score_of(run.config.eval.best, result)
    if score < progress.best_val:
        progress.best_val, progress.evals_without_gain = score, 0
    else:
        progress.evals_without_gain += 1
    return early_stop(run, progress)


def finish(
    run: PreparedRun,
    directory: RunDirectory,
    header: dict[str, str],
    progress: Progress,
    logger: MetricsLogger,
    stop: str | None,
    profiled: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Plot a finished run, write its report, and return the summary."""
    folder, records = directory.folder, directory.metrics()
    try:
        plot_runs([folder], folder / "loss.png")
    except (ImportError, MemoryError) as error:  # the limit of memory that the run fitted into may leave no room
        say(f"no plot: {error}; `llmkit runs {folder} --plot loss.png` draws it")
    kept = best_checkpoint(folder)  # of all evaluations the best one that has a checkpoint
    best = next((r for r in records if kept and r.get("val_loss") is not None and r["step"] == step_of(kept)), {})
    speeds = sorted(r["tokens_per_second"] for r in records if "tokens_per_second" in r)
    memory = max((r["memory_gb"] for r in records if "memory_gb" in r), default=0.0)
    summary = {"steps": progress.step, "tokens": progress.step * run.tokens_per_step}
    if best:
        summary["best_val_loss"] = round(best["val_loss"], 4)
        names = {"val_perplexity": ("perplexity", 3), "bits_per_byte": ("bits_per_byte", 4)}
        summary |= {name: round(best[key], digits) for key, (name, digits) in names.items() if key in best}
        summary |= {"best_checkpoint": str(kept)}
        summary |= {key: round(value, 4) for key, value in best.items() if is_score(key)}
        lowest = min((r for r in records if r.get("val_loss") is not None), key=lambda r: r["val_loss"])
        if lowest["val_loss"] < best["val_loss"] and run.config.eval.best == "val_loss":
            what = f"{lowest['val_loss']:.4f} at step {lowest['step']}, of which no checkpoint is kept"
            summary["lower_val_loss"] = f"{what}: lower checkpoint.every"
    if speeds:
        summary["tokens_per_second"] = round(speeds[len(speeds) // 2])
    summary |= {
        "time": format_duration(progress.seconds + logger.elapsed),
        "peak_memory_gib": round(memory, 2),
        "estimated_memory_gib": round(run.plan.peak_memory / 2**30, 2),
        "skipped_steps": int(progress.tensors["skipped"].item()),
        **({"general_text": forgotten} if (forgotten := describe_forgetting(folder)) else {}),
        **(
            {"profile": f"{folder}/profile: {TABLE}, {TRACE}"}
            if profiled and (folder / "profile" / TABLE).is_file()
            else {}
        ),
        "ended": stop or "at its full length",
        **({"val_loss_is": describe_curves(records)} if run.config.eval.every else {}),
        "files": f"{folder}/: checkpoints/, metrics.jsonl, loss.png, report.md",
    }
    directory.write_about(planned_memory=run.plan.peak_memory, peak_memory=round(memory * 2**30))
    answers = []
    if run.config.data.kind == "sft" and run.model_config.kind == "causal":
        answers = describe_answers(folder, run.batches("train", 1), run.data.tokenizer)
    write_report(directory, header, summary, answers)
    return summary | {"next": next_commands(run)}
