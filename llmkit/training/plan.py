"""What a config will cost on this device, and the micro-batch that fits it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from llmkit.config.schema import Config
from llmkit.data.corrupt import span_lengths
from llmkit.errors import raise_all
from llmkit.parallel.device import DTYPES, choose_precision, device_name, matmul_rate, total_memory
from llmkit.parallel.world import World, start_world
from llmkit.screen import clock, count
from llmkit.tokenizer.tokenizer import load_tokenizer
from llmkit.training.cost import Lengths, make_plan
from llmkit.training.resolve import check_choices, choose_objective, describe_choice, model_problems, read_model_config

CPU_MICRO_TOKENS, GPU_MICRO_TOKENS = 8192, 65_536  # more tokens in a forward bring no more speed
EXPECTED_MFU = 0.5  # of the matrix rate, in `plan`: what steps on CPUs and GPUs reach, give or take a fifth
MEMORY_SHARE = 0.85  # of the device that a derived micro-batch may plan to fill


def plan_config(config: Config) -> dict[str, Any]:
    """The figures of `llmkit plan`: plain numbers, bytes and FLOPs. Of files only configs and a tokenizer are read."""
    world = World(start_world().device)
    options = check_choices(config)
    model_config = read_model_config(config, options)
    _, options["objective"] = choose_objective(config, model_config)
    if model_config.vocab_size is None:
        section = config.data.tokenizer
        built = Path(config.data.dir) / "tokenizer"
        named = Path(section.path) if section.path else built if built.is_dir() else None
        model_config.vocab_size = len(load_tokenizer(named)) if named else section.vocab_size
    raise_all(model_problems(config, model_config))
    precision = choose_precision(config.train.precision, world.device)
    planned = plan_options(config, options, model_config, precision, world.device)
    rows, micro = config.train.global_batch_size, config.train.micro_batch_size
    if micro == "auto":
        micro = largest_micro_batch(model_config, rows, world, planned)
    plan = make_plan(model_config, micro_batch_size=micro, **planned)
    figures = {
        "parameters": plan.total,
        "trained": plan.trainable,
        "parameters_by_part": plan.parameters,
        "flops_per_token": plan.flops_per_token,
        "micro_batch_size": micro,
        "seq_len": config.data.seq_len,
        "precision": precision,
        "device": device_name(world.device),
        "device_memory": total_memory(world.device),
        "optimizer": describe_choice(config.optimizer.name, options["optimizer"]),
        "schedule": describe_choice(config.schedule.name, options["schedule"]),
        "peak_memory": plan.peak_memory,
        "memory_by_part": plan.memory,
        "fits": plan.peak_memory <= total_memory(world.device),
    }
    if config.train.max_tokens or config.train.max_steps:
        tokens = config.train.max_tokens or config.train.max_steps * rows * config.data.seq_len
        rate = matmul_rate(world.device, DTYPES[precision])
        seconds = tokens * plan.flops_per_token / (EXPECTED_MFU * rate)
        figures |= {"tokens": tokens, "flops": tokens * plan.flops_per_token, "seconds": seconds}
    return figures


def plan_rows(figures: dict[str, Any]) -> dict[str, str]:
    """The figures of `plan_config` as people read them."""
    memory = {f"  {part}": f"{size / 2**30:.3f} GiB" for part, size in figures["memory_by_part"].items()}
    rows = {
        "parameters": f"{figures['parameters']:,}",
        "trained": f"{figures['trained']:,}",
        **{f"  {part}": f"{number:,}" for part, number in figures["parameters_by_part"].items()},
        "FLOPs per token": count(figures["flops_per_token"]),
        "micro-batch": f"{figures['micro_batch_size']} x {figures['seq_len']} tokens, {figures['precision']}",
        "peak memory": f"{figures['peak_memory'] / 2**30:.2f} GiB of {figures['device_memory'] / 2**30:.1f}",
        **memory,
        "device": figures["device"],
        "optimizer": figures["optimizer"],
        "schedule": figures["schedule"],
    }
    if not figures["fits"]:
        rows["fits"] = "no: lower train.micro_batch_size or data.seq_len, or train.gradient_checkpointing: full"
    if "tokens" in figures:
        rows["FLOPs in all"] = f"{figures['flops']:.3g} for {count(figures['tokens'])} tokens"
        rows["time"] = f"{clock(figures['seconds'])} at {EXPECTED_MFU:.0%} of this device's measured matrix rate"
    return rows


def plan_options(
    config: Config, options: dict, model_config: Any, precision: str, device: torch.device, new_rows: int = 0
) -> dict[str, Any]:
    """What `plan.make_plan` needs besides the micro-batch."""
    seq_len = config.data.seq_len
    lengths = Lengths(seq_len, seq_len) if model_config.kind == "seq2seq" else None
    if lengths and config.data.kind == "corpus":
        noise, spans = span_lengths(seq_len, **options["objective"])
        lengths = Lengths(seq_len - noise + spans + 1, noise + spans + 1)
    return {
        "peft": {"name": config.peft.name, **options["peft"], "new_tokens": bool(new_rows)} if config.peft else None,
        "new_rows": new_rows,
        "lengths": lengths,
        "seq_len": seq_len,
        "precision": precision,
        "optimizer": config.optimizer.name,
        "checkpointed": checkpointed_blocks(
            config.train.gradient_checkpointing,
            model_config.num_hidden_layers + getattr(model_config, "num_decoder_layers", 0),
        ),
        "compiled": config.train.compile is not False,
        "device": device.type,
    }


def checkpointed_blocks(mode: str | int, layers: int) -> int:
    """How many blocks `gradient_checkpointing` recomputes."""
    every = {"none": 0, "full": 1}.get(mode, mode)
    return math.ceil(layers / every) if every else 0


def largest_micro_batch(model_config: Any, rows: int, world: World, planned: dict[str, Any]) -> int:
    """The largest divisor of a rank's rows whose planned peak fits the device and which still pays."""
    most_tokens = GPU_MICRO_TOKENS if world.device.type == "cuda" else CPU_MICRO_TOKENS
    room = MEMORY_SHARE * total_memory(world.device)
    for micro in range(max(1, min(rows, most_tokens // planned["seq_len"])), 1, -1):
        if rows % micro == 0 and make_plan(model_config, micro_batch_size=micro, **planned).peak_memory <= room:
            return micro
    return 1
