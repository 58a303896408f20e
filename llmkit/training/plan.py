"""Plan a config: what it will cost on this device, from the config and a tokenizer alone."""

from pathlib import Path
from typing import Any

from llmkit.config.schema import Config
from llmkit.parallel.device import DTYPES, device_name, matmul_rate, total_memory
from llmkit.parallel.world import start_world
from llmkit.screen import format_count, format_duration
from llmkit.tokenizer.load import load_tokenizer
from llmkit.training.prepare import check, derive
from llmkit.training.resolve import describe_choice

EXPECTED_MFU = 0.5  # of the matrix rate: what steps on CPUs and GPUs reach, give or take a fifth


def plan_config(config: Config) -> dict[str, Any]:
    """Return the figures of `llmkit plan`: plain numbers, bytes and FLOPs. No data and no weights are read."""
    checked, device = check(config), start_world().device
    config, options, model_config = checked.config, checked.options, checked.model_config
    if model_config.vocab_size is None:
        section, built = config.data.tokenizer, Path(config.data.dir) / "tokenizer"
        folder = Path(section.path) if section.path else built if built.is_dir() else None
        model_config.vocab_size = len(load_tokenizer(folder)) if folder else section.vocab_size
    derived = derive(checked, device, 1)
    plan, seq_len, memory = derived.plan, config.data.seq_len, total_memory(device)
    figures = {
        "parameters": plan.total,
        "trained": plan.trainable,
        "parameters_by_part": plan.parameters,
        "flops_per_token": plan.flops_per_token,
        "micro_batch_size": derived.micro_batch_size,
        "seq_len": seq_len,
        "precision": derived.precision,
        "device": device_name(device),
        "device_memory": memory,
        "optimizer": describe_choice(config.optimizer.name, options["optimizer"]),
        "schedule": describe_choice(config.schedule.name, options["schedule"]),
        "peak_memory": plan.peak_memory,
        "memory_by_part": plan.memory,
        "fits": plan.peak_memory <= memory,
    }
    if derived.max_steps:
        tokens = config.train.max_tokens or derived.max_steps * config.train.global_batch_size * seq_len
        flops = tokens * plan.flops_per_token
        rate = matmul_rate(device, DTYPES[derived.precision])
        figures |= {"tokens": tokens, "flops": flops, "flops_per_second": rate, "seconds": flops / rate / EXPECTED_MFU}
    return figures


def plan_rows(figures: dict[str, Any]) -> dict[str, str]:
    """Return the figures of `plan_config` as people read them."""
    rows = {
        "parameters": f"{figures['parameters']:,}",
        "trained": f"{figures['trained']:,}",
        **{f"  {part}": f"{number:,}" for part, number in figures["parameters_by_part"].items()},
        "FLOPs per token": format_count(figures["flops_per_token"]),
        "micro-batch": f"{figures['micro_batch_size']} x {figures['seq_len']} tokens, {figures['precision']}",
        "peak memory": f"{figures['peak_memory'] / 2**30:.2f} GiB of {figures['device_memory'] / 2**30:.1f}",
        **{f"  {part}": f"{size / 2**30:.3f} GiB" for part, size in figures["memory_by_part"].items()},
        **{key: figures[key] for key in ("device", "optimizer", "schedule")},
    }
    if not figures["fits"]:
        rows["fits"] = "no: lower train.micro_batch_size or data.seq_len, or train.gradient_checkpointing: full"
    if "tokens" in figures:
        rows["FLOPs in all"] = f"{figures['flops']:.3g} for {format_count(figures['tokens'])} tokens"
        time = format_duration(figures["seconds"])
        rate = f"{figures['flops_per_second'] / 1e12:.3g} TFLOP/s"
        rows["time"] = f"{time} at {EXPECTED_MFU:.0%} of {rate}, this device's matrix rate as measured now"
    return rows
