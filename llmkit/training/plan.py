"""Plan a config: what it will cost, here or on a GPU that is not here, from the config and a tokenizer alone."""

import math
import re
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from llmkit.config.schema import Config
from llmkit.errors import ModelError
from llmkit.models import build_model
from llmkit.parallel.catalog import CONTEXT_BYTES, choose_gpu
from llmkit.parallel.compile import describe_checkpointing
from llmkit.parallel.device import DTYPES, choose_precision, device_name, matmul_rate, memory_rate
from llmkit.parallel.memory import free_memory
from llmkit.parallel.world import start_world
from llmkit.screen import format_count, format_duration
from llmkit.storage.run import read_about
from llmkit.tokenizer.load import load_tokenizer
from llmkit.training.fit import plan_run, row_len, rows_in_step, with_train
from llmkit.training.prepare import CheckedConfig, check, derive, resolve
from llmkit.training.resolve import describe_choice

EXPECTED_MFU = 0.5  # of the matrix rate measured here: what steps on CPUs reach, give or take a fifth
SHEET_MFU = 0.4  # of a data sheet's peak, which no product reaches: published trainers reach 0.33 to 0.54 on an H100
WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "q8_0": 34 / 32}  # a weight in a Hugging Face folder, and in GGUF
SERVED_LENGTHS, SERVED_BATCHES = (1024, 4096, 16_384, 65_536), (1, 8, 32)


class Machine(NamedTuple):
    """What a plan is for: this machine's device, or one of a GPU that is not here."""

    name: str
    kind: str  # cpu or cuda
    precision: str
    memory: int  # bytes that a run may use
    flops: float  # per second, that a step may reach
    bandwidth: float  # bytes per second
    rate: str  # where flops come from
    watts: float | None = None


def this_machine(precision: str) -> Machine:
    """Return this machine, its rates measured now."""
    device = start_world().device
    precision = choose_precision(precision, device)
    rate, bandwidth = matmul_rate(device, DTYPES[precision]), memory_rate(device)
    source = f"{EXPECTED_MFU:.0%} of {rate / 1e12:.3g} TFLOP/s, this device's matrix rate as measured now"
    flops = EXPECTED_MFU * rate
    return Machine(device_name(device), device.type, precision, free_memory(device), flops, bandwidth, source)


def other_machine(asked: str, precision: str) -> Machine:
    """Return a machine with the GPU that a user names."""
    name, gpu = choose_gpu(asked)
    precision = precision if precision != "auto" else "fp16" if name == "T4" else "bf16"
    source = f"{SHEET_MFU:.0%} of {gpu.flops / 1e12:.4g} TFLOP/s, the data sheet's"
    memory = round(gpu.memory - CONTEXT_BYTES)
    return Machine(name, "cuda", precision, memory, SHEET_MFU * gpu.flops, gpu.bandwidth, source, gpu.watts)


def check_and_size(config: Config, ranks: int) -> CheckedConfig:
    """Check a config, and complete its vocabulary size without its data."""
    checked = check(config, ranks)
    if checked.model_config.vocab_size is None:
        section, built = checked.config.data.tokenizer, Path(checked.config.data.dir) / "tokenizer"
        folder = Path(section.path) if section.path else built if built.is_dir() else None
        size = len(load_tokenizer(folder)) if folder else section.vocab_size
        if checked.config.data.sources and folder == built:  # which may be of other settings, with more tokens
            size = min(size, section.vocab_size)
        checked.model_config.vocab_size = size
    return checked


def plan_config(
    config: Config, *, gpu: str | None = None, devices: int = 1, price: float | None = None
) -> dict[str, Any]:
    """Return the figures of `llmkit plan`: plain numbers, bytes and FLOPs. No data and no weights are read.

    gpu      name of a GPU that is not here; None: this machine's device
    devices  ranks, each with the whole model
    price    of one device for an hour
    """
    checked = check_and_size(config, devices)
    asked = config.train.precision
    machine = other_machine(gpu, asked) if gpu else this_machine(asked)
    derived = derive(checked, machine.kind, machine.precision, machine.memory, devices)
    config, options = resolve(checked, derived), checked.options
    plan, length = derived.plan, row_len(config, options)
    planned = (options, devices, checked.model_config, machine.kind, machine.precision)
    figures = {
        "parameters": plan.total,
        "trained": plan.trainable,
        "parameters_by_part": plan.parameters,
        "flops_per_token": plan.flops_per_token,
        "micro_batch_size": derived.micro_batch_size,
        "largest_micro_batch_size": largest_micro_batch(config, machine.memory, *planned),
        "gradient_checkpointing": derived.gradient_checkpointing,
        "row_len": length,
        "precision": derived.precision,
        "device": machine.name,
        "devices": devices,
        "device_memory": machine.memory,
        "optimizer": describe_choice(config.optimizer.name, options["optimizer"]),
        "schedule": describe_choice(config.schedule.name, options["schedule"]),
        "peak_memory": plan.peak_memory,
        "memory_by_part": plan.memory,
        "fits": plan.peak_memory <= machine.memory,
        "smaller": derived.smaller,
        "measured_before": measured_before(Path(config.run_dir).parent, machine.name),
    }
    if derived.max_steps:
        tokens = config.train.max_tokens or derived.max_steps * rows_in_step(config, options, 1) * length
        flops = tokens * plan.flops_per_token
        seconds = flops / machine.flops / devices
        figures |= {"tokens": tokens, "flops": flops, "rate": machine.rate, "seconds": seconds}
        if price is not None:
            figures["cost"] = seconds / 3600 * price * devices
        if machine.watts:
            figures["kilowatt_hours"] = seconds / 3.6e6 * machine.watts * devices
    return figures


def largest_micro_batch(config: Config, room: int, *planned: Any) -> int:
    """Return about the most rows of a micro-batch whose planned peak is within `room` bytes, never more; 0 for none."""

    def peak(rows: int) -> int:
        train = {"micro_batch_size": rows, "global_batch_size": 2**20 * rows}  # gradients of other micro-batches wait
        return plan_run(with_train(config, **train), *planned).peak_memory

    first = peak(1)
    if first > room:
        return 0
    fits, too_many, guess = 1, 2**16, 2
    while too_many - fits > 1 and guess > fits + fits // 16:  # the peak grows about linearly
        guess = min(guess, too_many - 1, 8 * fits)  # more rows take longer to plan
        planned_peak = peak(guess)
        fits, too_many = (guess, too_many) if planned_peak <= room else (fits, guess)
        guess = 1 + (room - first) * (guess - 1) // max(1, planned_peak - first)
    return fits


def measured_before(runs: Path, device: str) -> dict[str, float] | None:
    """Return how far plans were off in the runs beside this one on the same device; None without such runs.

    {"runs": n, "median": measured / planned, "lowest": ..., "highest": ...}
    """
    ratios = []
    for path in runs.glob("*/run.json"):
        with suppress(ModelError):
            about = read_about(path.parent)
            if about.get("device") == device and about.get("planned_memory") and about.get("peak_memory"):
                ratios.append(about["peak_memory"] / about["planned_memory"])
    if not ratios:
        return None
    return {"runs": len(ratios), "median": median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def plan_rows(figures: dict[str, Any]) -> dict[str, str]:
    """Return the figures of `plan_config` as people read them."""
    gib, devices = 2**30, figures["devices"]
    each = " on each of them" if devices > 1 else ""
    rows = {
        "parameters": f"{figures['parameters']:,}",
        "trained": f"{figures['trained']:,}",
        **{f"  {part}": f"{number:,}" for part, number in figures["parameters_by_part"].items()},
        "FLOPs per token": format_count(figures["flops_per_token"]),
        "device": f"{devices} x {figures['device']}" if devices > 1 else figures["device"],
        "micro-batch": f"{figures['micro_batch_size']} x {figures['row_len']} tokens, {figures['precision']}",
        "blocks": describe_checkpointing(figures["gradient_checkpointing"]),
        "largest": f"{figures['largest_micro_batch_size']} rows would fit",
        "peak memory": f"{figures['peak_memory'] / gib:.2f} of {figures['device_memory'] / gib:.1f} GiB free{each}",
        **{f"  {part}": f"{size / gib:.3f} GiB" for part, size in figures["memory_by_part"].items()},
    }
    if before := figures["measured_before"]:
        rows["measured"] = (
            f"{before['median']:.2f} times what was planned in {before['runs']} runs here "
            f"({before['lowest']:.2f} to {before['highest']:.2f})"
        )
    if not figures["fits"]:
        rows["fits"] = f"no; the cheapest change: {figures['smaller']}"
    rows |= {key: figures[key] for key in ("optimizer", "schedule")}
    if "tokens" in figures:
        rows["FLOPs in all"] = f"{figures['flops']:.3g} for {format_count(figures['tokens'])} tokens"
        rows["time"] = f"{format_duration(figures['seconds'])} at {figures['rate']}"
    if "cost" in figures:
        rows["cost"] = f"{figures['cost']:,.2f}"
    if "kilowatt_hours" in figures:
        rows["energy"] = f"{figures['kilowatt_hours']:,.1f} kWh at full load, without the rest of the machine"
    return rows


# ---- serving, and layer by layer ------------------------------------------------------------------------------------


def plan_inference(config: Config, gpu: str | None = None) -> dict[str, Any]:
    """Return what serving a config's model takes: weights by format, the cache, and tokens per second.

    Writing a token reads all weights and the cache of every row once, which bandwidth bounds: `tokens_per_second` is
    that bound, by format, length and batch. All experts count, because several rows together need nearly all.
    """
    checked = check_and_size(config, 1)
    machine, model_config = other_machine(gpu, "bf16") if gpu else this_machine("bf16"), checked.model_config
    model = build_model(model_config, device="meta", seed=None)
    weights = sum(p.numel() for p in model.parameters())
    head_bytes = 4 * model_config.num_key_value_heads * model_config.head_dim  # keys and values of a token in bf16
    windows = getattr(model_config, "windows", [None] * model_config.num_hidden_layers)
    longest = model_config.max_position_embeddings
    lengths = [length for length in SERVED_LENGTHS if length < longest] + [longest]
    cache = {n: sum(head_bytes * min(n, window or n) for window in windows) for n in lengths}
    figures = {
        "parameters": weights,
        "device": machine.name,
        "device_memory": machine.memory,
        "bandwidth": machine.bandwidth,
        "weights": {name: round(weights * size) for name, size in WEIGHT_BYTES.items()},
        "cache": cache,
    }
    figures["tokens_per_second"] = {
        name: {
            length: {
                batch: batch * machine.bandwidth / read
                for batch in SERVED_BATCHES
                if (read := size + batch * cache[length]) <= machine.memory
            }
            for length in lengths
        }
        for name, size in figures["weights"].items()
    }
    return figures


def inference_rows(figures: dict[str, Any]) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Return the figures of `plan_inference` as people read them: the first ones, and a table of speeds."""
    gib = 2**30
    rows = {
        "parameters": f"{figures['parameters']:,}",
        "device": f"{figures['device']}, {figures['bandwidth'] / 1e9:,.0f} GB/s",
        "memory": f"{figures['device_memory'] / gib:.1f} GiB free",
        "tokens/s": "at most, as the bandwidth allows; no figure: it does not fit",
    }
    speeds = figures["tokens_per_second"]
    table = [
        {
            "weights": f"{name}, {size / gib:.2f} GiB",
            "tokens a row": f"{length:,}",
            "cache a row": f"{cache / gib:.3f} GiB",
            **{
                f"batch {batch}": f"{speeds[name][length][batch]:,.0f}" if batch in speeds[name][length] else ""
                for batch in SERVED_BATCHES
            },
        }
        for name, size in figures["weights"].items()
        for length, cache in figures["cache"].items()
    ]
    return rows, table


def list_layers(config: Config) -> list[dict[str, Any]]:
    """Return the parameters of a config's model, one row for all layers alike: name, shape, layers, number, share."""
    checked = check_and_size(config, 1)
    model = build_model(checked.model_config, device="meta", seed=None)
    total = sum(p.numel() for p in model.parameters())
    alike: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, parameter in model.named_parameters():
        alike.setdefault((re.sub(r"\.\d+\.", ".*.", name, count=1), tuple(parameter.shape)), []).append(name)
    rows = []
    for (name, shape), names in alike.items():
        number = len(names) * math.prod(shape)
        layers, share = len(names) if "*" in name else 1, number / total
        rows.append({"name": name, "shape": list(shape), "layers": layers, "parameters": number, "share": share})
    return rows


def layer_rows(layers: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return the rows of `list_layers` as people read them."""
    return [
        {
            "name": row["name"],
            "shape": " x ".join(map(str, row["shape"])),
            "layers": str(row["layers"]),
            "parameters": f"{row['parameters']:,}",
            "share": f"{row['share']:.1%}",
        }
        for row in layers
    ]
