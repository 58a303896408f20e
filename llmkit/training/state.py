"""Make the model of a run, restore what a checkpoint holds, and save it."""

import copy
import hashlib
import math
from functools import partial
from pathlib import Path

import torch
from torch import nn

from llmkit import __version__
from llmkit.errors import ModelError
from llmkit.models import build_model
from llmkit.models.folder import load_model, save_model
from llmkit.models.heads import train_head
from llmkit.models.resize import resize_embeddings
from llmkit.objectives.frozen import set_reference
from llmkit.parallel.device import DTYPES
from llmkit.peft.adapter import base_change, load_adapter, save_adapter, saved_base_sha256
from llmkit.storage import checkpoint
from llmkit.storage.manifest import read_checkpoint_manifest
from llmkit.training.average import averaged
from llmkit.training.evaluation import best_of
from llmkit.training.log import MetricsLogger
from llmkit.training.prepare import PreparedRun
from llmkit.training.progress import Progress
from llmkit.training.selection import train_only

Optimizers = list[torch.optim.Optimizer]


def make_model(run: PreparedRun, resumed: Path | None) -> nn.Module:
    """Make the model as the last checkpoint left it, else as `init_from` has it, else freshly initialised."""
    config, device = run.config, run.world.device
    if config.peft is None:
        folder = resumed / "model" if resumed else run.base
        if folder is None:
            return build_model(run.model_config, device=device, seed=config.seed)
        model = load_model(folder, device=device, head=run.head, seed=config.seed)
        if not resumed and run.new_tokens:
            resize_embeddings(model, run.model_config.vocab_size, run.new_tokens)
        if config.train.only:
            train_only(model, config.train.only)
        return model
    dtype = DTYPES[run.precision]  # what is frozen needs no fp32
    options = {"head": run.head, "seed": config.seed, "quantize": run.quantize}
    model = load_model(run.base, device=device, dtype=dtype, **options)
    if run.keeps_copy:
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        reference = copy.deepcopy(model, shared)
        load_adapter(reference, run.adapter, run.method_options)
        set_reference(model, reference.eval().requires_grad_(False))
    if resumed:
        if change := base_change(saved_base_sha256(resumed / "model") or "", run.base_sha256):
            fix = "name the checkpoint that it began with, or start over with --fresh"
            raise ModelError(f"{change} since this run began", at=config.init_from, fix=fix)
        load_adapter(model, resumed / "model", run.method_options)
        return model
    if run.adapter:
        load_adapter(model, run.adapter, run.method_options)
        return model
    if run.new_tokens:
        resize_embeddings(model, run.model_config.vocab_size, run.new_tokens)
    run.method.apply(model, run.method_options, config.seed, list(run.new_tokens))
    train_head(model)
    return model


def restore(folder: Path, run: PreparedRun, model: nn.Module, optimizers: Optimizers, progress: Progress) -> None:
    """Restore counters and optimizer state, and the weights of the last step if the model has an average of them."""
    tensors, numbers = checkpoint.load_trainer(folder)
    manifest = read_checkpoint_manifest(folder)
    if manifest["data_fingerprint"] != run.data.fingerprint:
        what, fix = "the data has changed since this run's checkpoint was written", "choose another run_dir"
        raise ModelError(what, at=folder, fix=f"{fix}, or start over with --fresh")
    if "reference_sha256" in manifest and manifest["reference_sha256"] != run.start_sha256:
        what, fix = "the model that this run is compared with has changed", "restore it, or start over with --fresh"
        raise ModelError(what, at=run.config.init_from, fix=fix)
    if numbers["step"] > run.max_steps:
        what, fix = "the run is past the length that is asked for", "raise its length, or start over with --fresh"
        got, expected = f"step {numbers['step']}", f"at most {run.max_steps}"
        raise ModelError(what, at=folder, got=got, expected=expected, fix=fix)
    checkpoint.restore_weights(model, tensors)
    checkpoint.restore_optimizers(model, optimizers, tensors)
    for key, value in progress.numbers().items():
        setattr(progress, key, numbers.get(key, value))
    if progress.best != run.config.eval.best:  # it was changed since
        progress.best, progress.best_val, progress.evals_without_gain = run.config.eval.best, math.inf, 0
    for key, tensor in (run.method.state(model) if run.method else {}).items():
        tensor.copy_(tensors[f"peft/{key}"])
    for key in progress.tensors:
        progress.tensors[key] = tensors[f"progress/{key}"].to(run.world.device)


def save(run: PreparedRun, model: nn.Module, optimizers: Optimizers, progress: Progress, logger: MetricsLogger) -> None:
    """Write a checkpoint. The step is logged before, so it is no state that has diverged."""
    evaluated = best_of(run.config.eval.best, logger.pending)
    # Flush before saving: a resumed run does not log the steps before its checkpoint again.
    logger.flush(progress.step)
    tokenizer, config = run.data.tokenizer, run.config

    def write() -> None:
        tensors = {f"progress/{key}": value.detach().cpu() for key, value in progress.tensors.items()}
        tensors |= checkpoint.optimizer_tensors(model, optimizers)
        if run.method:
            tensors |= {f"peft/{key}": one.detach().cpu().contiguous() for key, one in run.method.state(model).items()}
        about = {
            **evaluated,
            "llmkit": __version__,
            "world_size": run.world.size,
            "data_fingerprint": run.data.fingerprint,
            "tokenizer_sha256": tokenizer.sha256,
            "config_sha256": hashlib.sha256(config.dump().encode()).hexdigest(),
        }
        if run.keeps_copy:
            about["reference_sha256"] = run.start_sha256
        numbers = progress.numbers() | {"seconds": progress.seconds + logger.elapsed}
        options = {"about": about, "keep": config.checkpoint.keep}
        if progress.average:
            tensors |= checkpoint.weight_tensors(model)
        write_average = averaged(progress.average)(partial(write_model, run, model))
        checkpoint.save(logger.directory.folder, progress.step, write_average, tensors, numbers, **options)

    with logger.pause():
        run.world.on_main(write)  # the others wait: the run ends on an error, and no rank ends before it is written


def write_model(run: PreparedRun, model: nn.Module, folder: Path) -> None:
    """Write a checkpoint's model, or its adapter, with the tokenizer."""
    config, tokenizer = run.config, run.data.tokenizer
    if config.peft:
        base = {"base": str(run.base.resolve()), "base_sha256": run.base_sha256}
        save_adapter(model, folder, config.peft.name, run.method_options, **base)
    else:
        save_model(model, folder, **tokenizer.config_ids)
    tokenizer.save(folder, token_types=model.config.kind == "masked")
