"""A config made ready to train: every option checked, the data opened, and all that is derived settled, once."""

from __future__ import annotations

import importlib.util
import math
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from llmkit.config.schema import Choice, Config, CorpusData, Train
from llmkit.data.batches import GOLDEN, MASK, Batches, mix
from llmkit.errors import DataError, MachineError, UserError, raise_all
from llmkit.objectives import OBJECTIVES, Objective
from llmkit.parallel.device import choose_precision, device_name
from llmkit.parallel.world import World
from llmkit.screen import count
from llmkit.storage import checkpoint
from llmkit.storage.locate import locate, weights_sha256
from llmkit.tokenizer.tokenizer import Tokenizer, load_tokenizer
from llmkit.training.cost import Plan, make_plan
from llmkit.training.data import Data, open_corpus, open_sft
from llmkit.training.plan import largest_micro_batch, plan_options
from llmkit.training.resolve import (
    check_choices,
    choose_objective,
    choose_packing,
    describe_choice,
    model_problems,
    read_model_config,
)
from llmkit.training.schedules import SCHEDULES


@dataclass
class Job:
    """What `train` needs: nothing in it is still "auto"."""

    config: Config  # resolved: training it again repeats the run
    world: World
    model_config: Any
    base: Path | None  # folder of the weights to begin with
    new_tokens: dict[int, list[int]]  # that it has no rows for yet: see `resize_embeddings`
    data: Data
    objective: Objective
    options: dict[str, dict[str, Any]]  # of the "choose one" sections
    plan: Plan
    max_steps: int
    precision: str
    micro_batch_size: int

    @property
    def seq_len(self) -> int:
        return self.config.data.seq_len

    @cached_property
    def base_sha256(self) -> str:
        """What an adapter remembers of the weights that it was trained on."""
        return weights_sha256(self.base)

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.global_batch_size * self.seq_len

    def batches(self, split: str, global_batch_size: int) -> Batches:
        """The batches of a split as the objective wants them; in training, this rank's."""
        mine = {"rank": self.world.rank, "world": self.world.size} if split == "train" else {}
        corrupt = self.objective.corrupt
        return self.data.open(split, global_batch_size, seed=self.config.seed, corrupt=corrupt, **mine)

    @property
    def text_bytes(self) -> np.ndarray | None:
        """Bytes that each token stands for, where all tokens of a text are predicted: bits per byte needs that."""
        return self.data.token_bytes if self.model_config.kind == "causal" else None

    def seed_at(self, step: int) -> int:
        """Of the RNG that dropout draws from, in this step and on this rank."""
        return mix((self.config.seed * GOLDEN + step * self.world.size + self.world.rank) & MASK) >> 1

    def factor(self, step: int) -> float:
        """The schedule: step -> share of the learning rate."""
        return SCHEDULES[self.config.schedule.name](step, self.max_steps, **self.options["schedule"])

    def epochs_of(self, source: str) -> float:
        """How often the run reads a source of its data."""
        share, samples = self.data.shares.get(source, (1.0, self.data.samples["train"]))
        return share * self.max_steps * self.config.train.global_batch_size / samples

    def mixture(self) -> list[str]:
        """Each source's share of the samples and how often it is read."""
        return [f"{name} {share:.1%} x {self.epochs_of(name):.2f}" for name, (share, _) in self.data.shares.items()]

    def next_commands(self) -> list[str]:
        """Commands that one may type after the run."""
        run, kind, is_sft = self.config.run_dir, self.model_config.kind, self.config.data.kind == "sft"
        prompt = shlex.quote(self.config.eval.sample_prompt or "Once upon a time")
        write = [f"llmkit generate {run} {prompt}"]
        if is_sft:
            write = [f"llmkit chat {run}" if self.data.chats else f"llmkit generate {run} 'a prompt as in the data'"]
        elif kind != "causal":
            write = []  # an encoder writes nothing, and a decoder beside it nothing yet but cut-out spans
        return [f"llmkit eval {run} --perplexity", *write]

    def evaluated(self) -> str:
        """When the val split is measured, and how much of it."""
        every, most, rows = self.config.eval.every, self.config.eval.max_batches, self.data.samples["val"]
        if not every:
            return "never"
        read = min(rows, most * self.config.train.global_batch_size) if most else rows
        part = "" if read == rows else "; `llmkit eval` reads all"
        return f"every {every} steps and at checkpoints, {read} of {rows} val rows{part}"

    def note(self) -> str | None:
        """What a run may not be meant to be."""
        rows, size = self.data.samples["train"], self.config.train.global_batch_size
        if size > rows:
            return (
                f"a batch of {size} rows is more than the {count(rows)} there are: a step reads each {size / rows:.1f} "
                "times. Lower train.global_batch_size"
            )
        return None

    def header(self) -> dict[str, str]:
        """What a run is, for the screen and the report."""
        config, plan = self.config, self.plan
        per_rank = config.train.global_batch_size // self.world.size
        accumulation = math.ceil(per_rank / self.micro_batch_size)
        trained = "" if plan.trainable == plan.total else f", {count(plan.trainable)} trained"
        return {
            "run": config.run_dir,
            "model": f"{config.model.name if config.model else self.base}: {count(plan.total)} parameters{trained}",
            "data": self.data.about,
            **({"mixture": ", ".join(self.mixture())} if self.data.shares else {}),
            "device": f"{device_name(self.world.device)}, {self.precision}, {self.world.size} rank(s)",
            "batch": f"{config.train.global_batch_size} = {self.micro_batch_size} micro x {accumulation} accumulated "
            f"x {self.world.size} rank(s), {self.seq_len} tokens each",
            "length": f"{self.max_steps} steps, {count(self.max_steps * self.tokens_per_step)} tokens, "
            f"{self.max_steps * config.train.global_batch_size / self.data.samples['train']:.2f} epochs",
            **(
                {"objective": describe_choice(config.objective.name, self.options["objective"])}
                if self.options["objective"]
                else {}
            ),
            "optimizer": describe_choice(config.optimizer.name, self.options["optimizer"]),
            **({"peft": describe_choice(config.peft.name, self.options["peft"])} if config.peft else {}),
            "schedule": describe_choice(config.schedule.name, self.options["schedule"]),
            "compute": f"{count(plan.flops_per_token)} FLOPs a token, "
            f"{plan.flops_per_token * self.max_steps * self.tokens_per_step:.1e} in all",
            "eval": self.evaluated(),
            **({"note": note} if (note := self.note()) else {}),
            "memory": f"{plan.peak_memory / 2**30:.2f} GiB estimated at the peak",
        }


def prepare(config: Config, world: World, *, fresh: bool = False, say: Callable[[str], None] = print) -> Job:
    """Check and derive everything. The only thing it writes is data: a corpus that is not built yet, encoded examples.

    fresh  what an earlier start in the run directory settled does not count

    Raises UserError with all that is wrong with the options and shapes, before anything is written.
    """
    options = check_choices(config)
    base = None
    if config.init_from is not None:
        located = locate(config.init_from)
        if located.is_adapter:
            raise UserError(
                "init_from is an adapter, but training starts from a whole model",
                at=config.where("init_from"),
                got=config.init_from,
                fix=f"llmkit export {config.init_from} merged --format hf, and start from that",
            )
        base = located.folder
        if base.resolve().is_relative_to(Path(config.run_dir).resolve()):  # --fresh would delete it
            raise UserError(
                "the run would write where the model lies that it begins with",
                at=config.where("init_from"),
                got=f"run_dir: {config.run_dir}, init_from: {config.init_from}",
                fix="name another run_dir",
            )
    model_config = read_model_config(config, options)
    objective, options["objective"] = choose_objective(config, model_config)
    config = choose_packing(config.model_copy(update={"objective": objective}), model_config)
    errors = model_problems(config, model_config)
    warmup, fixed = options["schedule"].get("warmup_steps", 0), config.train.max_steps
    if fixed and warmup >= fixed:
        errors.append(
            UserError(
                "schedule.warmup_steps leaves no step to train",
                at=config.where("schedule.warmup_steps"),
                got=warmup,
                expected=f"less than {fixed} (train.max_steps)",
            )
        )
    if config.train.global_batch_size % world.size:
        errors.append(
            UserError(
                "train.global_batch_size is not a multiple of the number of ranks",
                at=config.where("train.global_batch_size"),
                got=f"{config.train.global_batch_size}, {world.size}",
            )
        )
    if config.log.tensorboard and importlib.util.find_spec("tensorboard") is None:
        errors.append(
            MachineError(
                "log.tensorboard needs the tensorboard package",
                at=config.where("log.tensorboard"),
                fix="pip install 'llmkit[tensorboard]'",
            )
        )
    raise_all(errors)

    if isinstance(config.data, CorpusData):
        data = open_corpus(config, world, say)
    else:
        data = open_sft(config, world, base, start_id=getattr(model_config, "decoder_start_token_id", None))
    new_tokens = added_tokens(config, base, data.tokenizer) if base else {}
    if config.peft and bool(new_tokens) != options["peft"].get("new_tokens", False):
        raise UserError(
            "peft.new_tokens is for tokens that are added, and they are learnt with it alone",
            at=config.where("peft"),
            got=f"{len(new_tokens)} new tokens, new_tokens: {not new_tokens}",
            fix=f"peft.new_tokens: {bool(new_tokens)}".lower(),
        )
    if model_config.vocab_size is None or (new_tokens and model_config.vocab_size < len(data.tokenizer)):
        model_config.vocab_size = len(data.tokenizer)
    if model_config.vocab_size < len(data.tokenizer):
        raise UserError(
            "the tokenizer has more tokens than the model",
            at=config.where("model.vocab_size"),
            got=f"{len(data.tokenizer)} tokens, {model_config.vocab_size} embeddings",
        )
    for split, samples in data.samples.items():
        if samples < 1:
            raise DataError(
                f"the {split} split is shorter than one sample",
                at=config.where("data"),
                fix="lower data.seq_len, add text, or raise the val fraction",
            )

    train = config.train if fresh else reuse_resolved_values(config)
    if train.max_steps:
        max_steps = train.max_steps
    elif train.max_tokens:
        max_steps = math.ceil(train.max_tokens / (train.global_batch_size * config.data.seq_len))
    else:
        max_steps = math.ceil(train.epochs * data.samples["train"] / train.global_batch_size)
    if warmup >= max_steps:
        raise UserError(
            "schedule.warmup_steps leaves no step to train",
            at=config.where("schedule.warmup_steps"),
            got=warmup,
            expected=f"less than {max_steps} steps, the length of this run",
        )
    objective = OBJECTIVES[config.objective.name](
        data.tokenizer, config.seed, getattr(model_config, "decoder_start_token_id", 0), **options["objective"]
    )
    precision = choose_precision(train.precision, world.device)
    planned = plan_options(config, options, model_config, precision, world.device, len(new_tokens))
    micro, rows = config.train.micro_batch_size, train.global_batch_size // world.size
    if micro != "auto" and rows % micro:
        raise UserError(
            "train.micro_batch_size does not divide a rank's share of the batch",
            at=config.where("train.micro_batch_size"),
            got=f"{micro}, and {rows} rows a rank",
        )
    if micro == "auto":
        before = train.micro_batch_size  # another number of ranks may not be able to keep it
        fits = before != "auto" and rows % before == 0
        micro = before if fits else largest_micro_batch(model_config, rows, world, planned)
    plan = make_plan(model_config, micro_batch_size=micro, **planned)
    resolved = config.model_copy(
        update={
            name: Choice(name=getattr(config, name).name, **chosen)
            for name, chosen in options.items()
            if name != "model"
        }
        | {"train": train.model_copy(update={"precision": precision, "micro_batch_size": micro})}
        | ({"model": Choice(name=config.model.name, **vars(model_config))} if config.model else {})
    )
    job = Job(
        resolved, world, model_config, base, new_tokens, data, objective, options, plan, max_steps, precision, micro
    )
    raise_all(list(check_max_epochs(job)))
    return job


def added_tokens(config: Config, base: Path, tokenizer: Tokenizer) -> dict[int, list[int]]:
    """Tokens that the model of init_from does not have yet: new id -> the ids that spelt it so far.

    UserError where the data's tokenizer is not the model's, or is more than that and nobody asked for more rows.
    """
    old = load_tokenizer(base)
    ids = tokenizer.rust.get_vocab(with_added_tokens=True)
    known = old.rust.get_vocab(with_added_tokens=True)
    if any(ids.get(token) != i for token, i in known.items()):
        raise UserError(
            "the data was encoded with another tokenizer than the model's",
            at=config.where("data.tokenizer"),
            fix=f"data.tokenizer: {{path: {base / 'tokenizer.json'}}}, and another data.dir",
        )
    new = {i: token for token, i in ids.items() if token not in known}
    if new and not config.resize_embeddings:
        raise UserError(
            "the tokenizer has tokens that the model does not have",
            at=config.where("init_from"),
            got=f"{len(new)} of them, {new[min(new)]} first",
            fix="resize_embeddings: true",
        )
    return {i: [] if token in tokenizer.specials else old.encode(tokenizer.decode([i])) for i, token in new.items()}


def check_max_epochs(job: Job) -> Iterator[UserError]:
    """Sources that the run would read for more epochs than the config allows."""
    sources = job.config.data.sources if isinstance(job.config.data, CorpusData) else []
    for i, source in enumerate(sources):
        if source.max_epochs and (epochs := job.epochs_of(source.name)) > source.max_epochs + 1e-9:
            most = source.max_epochs / epochs
            share = job.data.shares.get(source.name, (1.0, 0))[0] * most
            lower = f"give it at most {share:.3g} of all weights, or " if job.data.shares else ""
            yield DataError(
                f"source {source.name} would be read for more epochs than its max_epochs",
                at=job.config.where(f"data.sources.{i}.max_epochs"),
                got=f"{epochs:.2f} epochs",
                expected=f"at most {source.max_epochs:g}",
                fix=f"{lower}train at most {math.floor(job.max_steps * most)} steps",
            )


def reuse_resolved_values(config: Config) -> Train:
    """The train section, with what is "auto" in it as this run resolved it before its checkpoints."""
    saved = Path(config.run_dir) / "config.yaml"
    if not saved.is_file() or not checkpoint.list_checkpoints(Path(config.run_dir)):
        return config.train
    before = (yaml.safe_load(saved.read_text(encoding="utf-8")) or {}).get("train", {})
    same = {
        key: before[key]
        for key in ("precision", "micro_batch_size")
        if getattr(config.train, key) == "auto" and key in before
    }
    return config.train.model_copy(update=same)
