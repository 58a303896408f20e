"""THE loop. Pretraining, fine-tuning, with LoRA or without, differ in data, objective and peft: never in here."""

from __future__ import annotations

import gc
import hashlib
import itertools
import math
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmkit import __version__
from llmkit.config.schema import Config, CorpusData
from llmkit.corpus.build import needs_build
from llmkit.errors import DIVERGED, INTERRUPTED, ModelError, UserError
from llmkit.evals.perplexity import perplexity
from llmkit.inference.generate import stream
from llmkit.models import build_model
from llmkit.models.folder import load_model, save_model
from llmkit.models.resize import resize_embeddings
from llmkit.parallel.compile import apply_checkpointing, compile_blocks
from llmkit.parallel.device import DTYPES, autocast, make_deterministic, matmul_rate, peak_flops, to_device
from llmkit.parallel.world import start_world
from llmkit.peft import METHODS, lora
from llmkit.screen import clock
from llmkit.storage import checkpoint
from llmkit.storage.run import Run, open_run, plot_runs, refuse_another, write_report
from llmkit.training.log import MetricsLogger
from llmkit.training.optim import OPTIMIZERS, clip, set_lr
from llmkit.training.plan import plan_config, plan_rows
from llmkit.training.prepare import Job, prepare
from llmkit.training.signals import Signals

FIRST_SCALE, SCALE_GROWTH = 2.0**16, 2000  # fp16 loss scale: its start; good steps before it doubles (apex, torch)


@dataclass
class Progress:
    """What a run has done so far: with weights, optimizer and RNG, all that a resumed one needs."""

    step: int = 0
    best_val: float = math.inf
    evals_without_gain: int = 0
    interval_targets: float = 0  # targets since the last log
    seconds: float = 0.0  # that earlier processes of this run took
    # On the device, so that a step never waits for the host:
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def numbers(self) -> dict[str, float]:
        return {key: value for key, value in vars(self).items() if key != "tensors"}


def initial_counters(device: torch.device, precision: str) -> dict[str, Tensor]:
    """Counters that live on the device."""
    names = ("interval_loss", "skipped", "bad_in_a_row", "good_in_a_row")
    tensors = {name: torch.zeros((), dtype=torch.float64, device=device) for name in names}
    return tensors | {"scale": torch.tensor(FIRST_SCALE if precision == "fp16" else 1.0, device=device)}


def train(
    config: Config, *, fresh: bool = False, dry_run: bool = False, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Train what the config says, from its newest good checkpoint if the run directory has one.

    fresh    delete what an earlier run left in the run directory
    dry_run  check everything, print the header, and stop
    Returns the summary. Raises UserError for bad input, divergence, and for an interruption after a checkpoint.
    """
    world = start_world()
    say = say if world.main else (lambda line: None)
    if config.train.deterministic:
        make_deterministic(world.device)
    if dry_run and isinstance(config.data, CorpusData) and needs_build(config.data):
        say(f"{config.data.dir} is not built, or with other settings (llmkit data build): this is all that is known")
        figures = plan_config(config)
        for key, value in plan_rows(figures).items():
            say(f"{key:>16}  {value}")
        return figures
    job = prepare(config, world, fresh=fresh, say=say)
    config = job.config
    header = job.header()
    for key, value in header.items():
        say(f"{key:>10}  {value}")
    if dry_run:
        if not fresh:
            refuse_another(Path(config.run_dir), config.model_dump())
        return header

    info = {"device": header["device"], "torch": torch.__version__, "data_fingerprint": job.data.fingerprint}
    run = world.on_main(lambda: open_run(Path(config.run_dir), config.model_dump(), fresh=fresh, info=info))
    try:
        return take_steps(job, run, header, say)
    finally:
        if run:
            run.close()


def take_steps(job: Job, run: Run | None, header: dict[str, str], say: Callable[[str], None]) -> dict[str, Any]:
    """Make the model, take up the newest good checkpoint, and go on to the last step; the order is important."""
    config, world, device = job.config, job.world, job.world.device
    resumed = checkpoint.newest_intact_checkpoint(Path(config.run_dir))
    model = make_model(job, resumed)
    recomputed = apply_checkpointing(model, config.train.gradient_checkpointing)
    compiled = compile_blocks(model, config.train.compile, device, job.precision)
    say(f"{'blocks':>10}  {len(model.blocks)}, {recomputed} recomputed in the backward, compiled: {compiled}")

    optimizers = OPTIMIZERS[config.optimizer.name](model, **job.options["optimizer"])
    trained = [p for p in model.parameters() if p.requires_grad]
    progress = Progress(tensors=initial_counters(device, job.precision))
    if resumed:
        restore(resumed, job, model, optimizers, progress)
        say(f"{'resumed':>10}  {resumed}")
    if run:
        run.begin(progress.step if resumed else None)
        if config.peft:
            checkpoint.add_dependent_run(job.base, run.folder)
    peak, source = peak_flops(device, job.precision)
    rate = matmul_rate(device, DTYPES[job.precision])
    say(f"{'peak':>10}  {peak / 1e12:.3g} TFLOP/s ({source}); matrix products reach {rate / 1e12:.3g}")
    say("")

    batches = job.batches("train", config.train.global_batch_size)
    watch = MetricsLogger(job, run, peak, progress.step, say)
    signals = Signals()
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection in mid-step stalls every rank
    try:
        if progress.step == 0 and config.eval.every:
            evaluate(job, model, progress, watch)
            watch.flush(progress.step)
        stop = early_stop(job, progress)
        while progress.step < job.max_steps and not stop:
            # One step: the gradient of (sum of losses / targets of the whole step), however it is cut up.
            step = progress.step
            torch.manual_seed(job.seed_at(step))  # dropout is a function of the step too: no state to save
            lr = set_lr(optimizers, job.factor(step))
            batch = batches.batch_at(step)
            targets = world.sum(batch.count)
            scale = progress.tensors["scale"]
            for micro in batch.split(job.micro_batch_size):
                with autocast(device, job.precision):
                    loss, metrics = job.objective.loss(model, to_device(micro, device))
                (loss * (scale / targets)).backward()
                progress.tensors["interval_loss"] += loss.detach() - metrics.pop("added", 0.0)
            world.sum_gradients(trained)
            norm, found_inf = clip(trained, config.train.max_grad_norm, scale)
            for optimizer in optimizers:
                optimizer.found_inf = found_inf  # not finite: change nothing, decided on the device
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            update_loss_scale(progress.tensors, found_inf, job.precision)
            progress.step += 1
            progress.interval_targets += targets

            # What happens around steps.
            done = progress.step
            if world.sum(signals.signal or 0):
                stop = "interrupted"
            last = done == job.max_steps or stop is not None
            saving = done % config.checkpoint.every == 0 or last
            if done % config.log.every == 0 or last:
                log_step(job, progress, watch, lr, norm, metrics)
            # Every checkpoint has a val loss, so that the best is known, but for one made in haste after a signal.
            if config.eval.every and (done % config.eval.every == 0 or (saving and stop is None)):
                stop = evaluate(job, model, progress, watch) or stop
            if saving or stop:
                save(job, model, optimizers, progress, watch)
            watch.flush(progress.step)
    finally:
        gc.enable()
        gc.unfreeze()
        watch.close()
        signals.release()
    if stop == "interrupted" and progress.step < job.max_steps:
        raise UserError(
            f"interrupted at step {progress.step}; a checkpoint is saved",
            fix="type the same command again to go on",
            code=INTERRUPTED[signals.signal or signal.SIGTERM],
        )
    return finish(job, run, header, progress, watch, stop) if run else {}


def make_model(job: Job, resumed: Path | None) -> nn.Module:
    """The model as the last checkpoint left it, else as `init_from` gives it, else freshly initialised."""
    config, device = job.config, job.world.device
    if config.peft is None:
        folder = resumed / "model" if resumed else job.base
        if folder is None:
            return build_model(job.model_config, device=device, seed=config.seed)
        model = load_model(folder, device=device)
        if not resumed and job.new_tokens:
            resize_embeddings(model, job.model_config.vocab_size, job.new_tokens)
        return model
    frozen = DTYPES[job.precision]
    model = load_model(job.base, device=device, dtype=frozen)
    if resumed:
        if lora.base_sha256(resumed / "model") != job.base_sha256:
            raise ModelError(
                "init_from has other weights now than when this run began",
                at=config.init_from,
                fix="name the checkpoint that it began with, or start over with --fresh",
            )
        lora.load_adapter(model, resumed / "model")
    else:
        if job.new_tokens:
            resize_embeddings(model, job.model_config.vocab_size, job.new_tokens)
            model.new_tokens = list(job.new_tokens)
        METHODS[config.peft.name](model, config.seed, **job.options["peft"])
    return model


def restore(
    folder: Path, job: Job, model: nn.Module, optimizers: list[torch.optim.Optimizer], progress: Progress
) -> None:
    """Take up counters, optimizer state and RNG from a checkpoint; the weights are in the model already."""
    tensors, numbers = checkpoint.load_trainer(folder)
    about = checkpoint.read_manifest(folder)
    if about["data_fingerprint"] != job.data.fingerprint:
        raise ModelError(
            "the data has changed since this run's checkpoint was written",
            at=folder,
            fix="choose another run_dir, or start over with --fresh",
        )
    if numbers["step"] > job.max_steps:
        raise ModelError(
            "the run is past the length that is asked for",
            at=folder,
            got=f"step {numbers['step']}",
            expected=f"at most {job.max_steps}",
            fix="raise its length, or start over with --fresh",
        )
    checkpoint.restore_optimizers(model, optimizers, tensors)
    for key, value in numbers.items():
        setattr(progress, key, value)
    for key in progress.tensors:
        progress.tensors[key] = tensors[f"progress/{key}"].to(job.world.device)
    if not job.world.main:
        progress.tensors["interval_loss"].zero_()  # rank 0 took up the sum over all ranks


def update_loss_scale(tensors: dict[str, Tensor], found_inf: Tensor, precision: str) -> None:
    """Count skipped steps, and move fp16's loss scale: half after a bad step, double after enough good ones."""
    tensors["skipped"] += found_inf
    tensors["bad_in_a_row"] = (tensors["bad_in_a_row"] + found_inf) * found_inf
    tensors["good_in_a_row"] = (tensors["good_in_a_row"] + 1) * (1 - found_inf)
    if precision == "fp16":
        grow = (tensors["good_in_a_row"] > 0) & (tensors["good_in_a_row"] % SCALE_GROWTH == 0)
        factor = torch.where(found_inf > 0, 0.5, torch.where(grow, 2.0, 1.0))
        tensors["scale"] = (tensors["scale"] * factor).float()


def stop_if_diverged(job: Job, progress: Progress) -> None:
    """End a run whose steps are not finite again and again; its weights are those of the last good step."""
    bad = int(progress.tensors["bad_in_a_row"].item())
    # fp16 may need 16 steps in which its scale is halved from 2^16 to 1: no sign of divergence.
    allowed = job.config.train.max_bad_steps + (int(math.log2(FIRST_SCALE)) if job.precision == "fp16" else 0)
    if bad >= allowed:
        first = progress.step - bad
        raise UserError(
            f"the gradients were not finite in {bad} steps in a row",
            at=f"steps {first} to {progress.step - 1}",
            got=f"lr {job.options['optimizer']['lr']}; the weights were left as before step {first}",
            fix="lower optimizer.lr, lengthen schedule.warmup_steps, or look at the data of "
            f"batch_at({first}); checkpoints hold the last finite weights",
            code=DIVERGED,
        )


# ---- around the steps -----------------------------------------------------------------------------------------------


def log_step(
    job: Job, progress: Progress, watch: MetricsLogger, lr: float, norm: Tensor, metrics: dict[str, Tensor]
) -> None:
    """Read the interval's loss from the device, the only wait for it, and log it."""
    tensors, world = progress.tensors, job.world
    loss = world.sum(tensors["interval_loss"].item()) / progress.interval_targets
    tensors["interval_loss"].zero_()
    progress.interval_targets = 0
    watch.log(
        step=progress.step,
        tokens=progress.step * job.tokens_per_step,
        loss=loss,
        lr=lr,
        grad_norm=norm.item(),
        skipped=int(tensors["skipped"].item()),
        **{key: value.item() for key, value in metrics.items()},
        **watch.speed(progress.step),
    )
    stop_if_diverged(job, progress)


def evaluate(job: Job, model: nn.Module, progress: Progress, watch: MetricsLogger) -> str | None:
    """Measure the val split, write a sample, and say whether to stop early (the reason) or not (None)."""
    config, device, world = job.config, job.world.device, job.world
    with watch.pause():
        size = job.micro_batch_size
        limit = config.eval.max_batches and config.eval.max_batches * config.train.global_batch_size
        batches = job.batches("val", size).in_order(limit)
        mine = itertools.islice(batches, world.rank, None, world.size)
        with autocast(device, job.precision):
            result = perplexity(
                model, mine, device=device, token_bytes=job.text_bytes, micro_batch_size=size, total=world.sum
            )
            if config.eval.sample_prompt is not None:
                result["sample"] = sample(job, model)
    watch.log(step=progress.step, tokens=progress.step * job.tokens_per_step, **result)
    if result["val_loss"] < progress.best_val:
        progress.best_val, progress.evals_without_gain = result["val_loss"], 0
    else:
        progress.evals_without_gain += 1
    return early_stop(job, progress)


def early_stop(job: Job, progress: Progress) -> str | None:
    """Why to stop before the full length, if patience has run out."""
    patience = job.config.train.early_stopping_patience
    if patience and progress.evals_without_gain >= patience:
        return f"stopped early: {patience} evaluations without a lower val loss"
    return None


def sample(job: Job, model: nn.Module) -> str:
    """The continuation of eval.sample_prompt, with a generator of its own: the run's RNG does not move."""
    tokenizer = job.data.tokenizer
    text = job.config.eval.sample_prompt
    prompt = tokenizer.encode_source(text) if job.model_config.kind == "seq2seq" else tokenizer.encode_prompt(text)
    new = stream(
        model,
        prompt,
        max_new_tokens=job.config.eval.sample_tokens,
        stop=frozenset([tokenizer.eos_id]),
        seed=job.config.seed,
    )
    return tokenizer.decode(new if job.model_config.kind == "seq2seq" else [*prompt, *new])


def save(
    job: Job, model: nn.Module, optimizers: list[torch.optim.Optimizer], progress: Progress, watch: MetricsLogger
) -> None:
    """Write a checkpoint, but never a diverged state."""
    stop_if_diverged(job, progress)
    val_loss = watch.pending.get("val_loss")
    # Before the checkpoint: a kill in between must not lose what the resumed run will not log again.
    watch.flush(progress.step)
    interval_loss = job.world.sum(progress.tensors["interval_loss"].item())
    if watch.run is None:
        return
    tokenizer, config = job.data.tokenizer, job.config

    def write_model(folder: Path) -> None:
        if config.peft:
            lora.save_adapter(model, folder, base=str(job.base.resolve()), base_sha256=job.base_sha256)
        else:
            save_model(model, folder, eos_token_ids=tokenizer.stop_ids, bos_token_id=tokenizer.bos_id)
        tokenizer.save(folder)

    with watch.pause():
        tensors = {f"progress/{key}": value.detach().cpu() for key, value in progress.tensors.items()}
        tensors["progress/interval_loss"] = torch.tensor(interval_loss, dtype=torch.float64)
        tensors |= checkpoint.optimizer_tensors(model, optimizers)
        about = {
            "val_loss": val_loss,
            "llmkit": __version__,
            "world_size": job.world.size,
            "data_fingerprint": job.data.fingerprint,
            "tokenizer_sha256": tokenizer.sha256,
            "config_sha256": hashlib.sha256(config.dump().encode()).hexdigest(),
        }
        checkpoint.save(
            watch.run.folder,
            progress.step,
            write_model,
            tensors,
            progress.numbers() | {"seconds": progress.seconds + watch.elapsed},
            about=about,
            keep=config.checkpoint.keep,
        )


def finish(
    job: Job, run: Run, header: dict, progress: Progress, watch: MetricsLogger, stop: str | None
) -> dict[str, Any]:
    """The picture, the report and the summary of a run that is done."""
    plot_runs([run.folder], run.folder / "loss.png")
    records = run.metrics()
    kept = checkpoint.best_checkpoint(run.folder)  # of all evaluations the best one that has a checkpoint
    best = next((r for r in records if kept and "val_loss" in r and r["step"] == checkpoint.step_of(kept)), {})
    speeds = sorted(r["tokens_per_second"] for r in records if "tokens_per_second" in r)
    summary = {"steps": progress.step, "tokens": progress.step * job.tokens_per_step}
    if best:
        summary |= {"best_val_loss": round(best["val_loss"], 4), "perplexity": round(best["val_perplexity"], 3)}
        summary |= {"bits_per_byte": round(best["bits_per_byte"], 4)} if "bits_per_byte" in best else {}
        summary |= {"best_checkpoint": str(kept)}
    if speeds:
        summary["tokens_per_second"] = round(speeds[len(speeds) // 2])
    memory = max((r["memory_gb"] for r in records if "memory_gb" in r), default=0.0)
    summary |= {
        "time": clock(progress.seconds + watch.elapsed),
        "peak_memory_gib": round(memory, 2),
        "estimated_memory_gib": round(job.plan.peak_memory / 2**30, 2),
        "skipped_steps": int(progress.tensors["skipped"].item()),
        "ended": stop or "at its full length",
        "files": f"{run.folder}/: checkpoints/, metrics.jsonl, loss.png, report.md",
    }
    write_report(run, header, summary)
    return summary | {"next": job.next_commands()}
