"""Compute the cost of a run: parameters, FLOPs per token, peak memory. No weights are allocated."""

import re
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from llmkit.models import build_model, family_of
from llmkit.models.family import Config
from llmkit.models.heads import HeadConfig, train_head
from llmkit.models.layers import Head, RMSNorm, block_linears, token_tables
from llmkit.models.loss import rows_in_chunk
from llmkit.models.quantized import quantize_linear
from llmkit.parallel.device import DTYPES
from llmkit.peft import METHODS
from llmkit.training.optim import OPTIMIZERS
from llmkit.training.selection import train_only
from llmkit.training.simulate import simulate_step

KEPT = ("trained weights", "frozen weights", "optimizer", "other models")  # parts of the memory that each step has
# Resident memory on Linux beside tensors, fitted to the runs of scripts/measure_memory.py: of the process, of what
# compiling leaves, and of the gaps between tensors that come and go, as shares of their parts.
RUNTIME_BYTES, COMPILER_BYTES = 440 * 2**20, 80 * 2**20
HEAP_GAPS = {
    False: {"activations": 0.4, "loss": 0.4, "gradients": 1.0},  # eager
    True: {"activations": 0.2, "loss": 0.2},  # compiled
}


@dataclass(frozen=True)
class Plan:
    """Cost of one training configuration; memory is in bytes."""

    parameters: dict[str, int]  # by part
    trainable: int
    flops_per_token: float
    memory: dict[str, int]  # bytes by part, at the peak

    @property
    def total(self) -> int:
        return sum(self.parameters.values())

    @property
    def peak_memory(self) -> int:
        return sum(self.memory.values())


PARTS = ("embeddings", "attention", "mlp", "experts", "norms", "head", "adapter")


def parts_of(model: nn.Module, added: frozenset[str] = frozenset()) -> dict[str, str]:
    """Return the part, one of PARTS, of each parameter by its name.

    added  names of the parameters that a PEFT method added
    """
    in_blocks, parts = {id(p) for p in model.blocks.parameters()}, {}
    for path, module in model.named_modules():
        for last, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{last}" if path else last
            if isinstance(module, nn.Embedding):
                parts[name] = "embeddings"
            elif name in added and not isinstance(module, Head):
                parts[name] = "adapter"
            elif isinstance(module, RMSNorm | nn.LayerNorm):
                parts[name] = "norms"
            elif id(parameter) not in in_blocks:
                parts[name] = "head"
            elif parameter.dim() == 3:
                parts[name] = "experts"
            else:
                parts[name] = "attention" if re.search("attn|attention", path, re.IGNORECASE) else "mlp"
    return parts


def parameters_by_part(model: nn.Module, added: frozenset[str] = frozenset()) -> dict[str, int]:
    """Return the number of parameters in each part of the model, see `parts_of`."""
    parts, numbers = parts_of(model, added), dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        numbers[parts[name]] += parameter.numel()
    return {part: number for part, number in numbers.items() if number}


class Lengths(NamedTuple):
    """Tokens of one row: `source` of an encoder or of a decoder alone, `target` of a decoder with an encoder."""

    source: int
    target: int = 0


def flops_per_row(model: nn.Module, lengths: Lengths) -> float:
    """Return the FLOPs of forward and backward for one row.

    6 for each weight of a matrix product and token, 4 if the weight is frozen. The head counts even if it is tied, the
    embedding's look-up does not. Attention adds 12 L h T per token (Chowdhery et al. 2022, arXiv:2204.02311, appendix
    B). Sliding windows are subtracted, causality is not.
    """
    config, family, parts = model.config, family_of(model.config), parts_of(model)
    decoder_layers = family.decoder_layers(config)
    experts, experts_per_token = family.experts(config) or (1, 1)
    frozen = any(not parameter.requires_grad for parameter in model.parameters())
    tables = {id(parameter) for table in token_tables(model) for parameter in table.parameters()}
    predicted = lengths.target if decoder_layers else lengths.source
    total = (4.0 if frozen else 6.0) * config.vocab_size * config.hidden_size * predicted
    total = 0.0 if hasattr(model, "head") else total  # a head for labels reads a single state, or has few rows
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and parts[name] not in ("embeddings", "norms") and id(parameter) not in tables:
            tokens = lengths.source if family.reads_source(name) else lengths.target
            share = experts_per_token / experts if ".experts." in name else 1
            total += (6 if parameter.requires_grad else 4) * parameter.numel() * tokens * share
    width, source, target = config.num_attention_heads * config.head_dim, lengths.source, lengths.target
    if decoder_layers:
        pairs = config.num_hidden_layers * source**2 + decoder_layers * target * (target + source)
    else:
        pairs = sum(source * min(source, window or source) for window in config.windows)
    return total + 12.0 * width * pairs


def memory(
    config: Config,
    *,
    lengths: Lengths,
    micro_batch_size: int,
    precision: str,
    peft: tuple[str, dict[str, Any]] | None = None,
    new_rows: int = 0,
    only: list[str] | None = None,
    quantize: tuple[str, dict[str, Any]] | None = None,
    head: HeadConfig | None = None,
    optimizer: tuple[str, dict[str, Any]] = ("adamw", {}),
    checkpointing: str | int | float = "none",
    compiled: bool = True,
    packed: bool = False,
    accumulates: bool = False,
    averages: bool = False,
    device: str = "cpu",
) -> dict[str, int]:
    """Return the memory of a training step in bytes, by part, at its peak; see `simulate_step`.

    quantize     how the frozen linears are quantized, and options
    optimizer    name and options
    packed       whether rows hold several documents, which do not see each other
    accumulates  whether a step has several micro-batches
    averages     whether there is an average of the weights
    """
    shapes = {"input_ids": (micro_batch_size, lengths.source), "labels": (micro_batch_size, lengths.source)}
    if lengths.target:
        shapes |= dict.fromkeys(("labels", "decoder_input_ids"), (micro_batch_size, lengths.target))
    if packed and not (device == "cuda" and compiled):  # a block mask takes next to nothing
        shapes |= dict.fromkeys(("segments",) if lengths.target else ("segments", "positions"), shapes["input_ids"])

    if head:
        shapes["lengths"] = (micro_batch_size,)
        shapes["labels"] = shapes["labels"] if head.kind == "tag" else (micro_batch_size,)
        if head.multi_label:
            shapes["labels"] = (micro_batch_size, len(head.labels))

    def change(model: nn.Module) -> None:
        if peft:  # what is frozen is in the dtype of the computation
            for parameter in model.parameters():
                parameter.data = parameter.data.to(DTYPES[precision])
        for linear in block_linears(model).values() if quantize else []:
            quantize_linear(linear, *quantize)
        choose_trained(model, peft=peft, new_rows=new_rows, only=only)

    phases = simulate_layers(
        config,
        head=head,
        period=checkpointing if isinstance(checkpointing, int) else 1,
        # an adapter may change some layers alone
        alike=not only and not (peft and peft[1].get("layers")) and not re.search(r"[^\W\d]\.\d", str(peft)),
        shapes=shapes,
        change=change if peft or only else None,
        # without patterns of names: they change no memory, and some name blocks that a shallow model lacks
        make_optimizers=lambda model: OPTIMIZERS[optimizer[0]](model, **without_patterns(optimizer[1])),
        precision=precision,
        checkpointing=checkpointing,
        compiled=compiled,
        accumulates=accumulates,
        averages=averages,
    )
    if device == "cuda" and not head:
        rows = micro_batch_size * (lengths.target or lengths.source)
        here, there = (rows_in_chunk(rows, config.vocab_size, torch.device(one)) for one in ("cpu", "cuda"))
        phases["loss"]["loss"] += (there - here) * config.vocab_size * (4 if compiled else 14)  # bytes of a logit
    if device == "cuda":
        return max(phases.values(), key=lambda parts: sum(parts.values()))
    frozen = 0 if quantize else phases["loss"].get("frozen weights")
    if frozen:  # a base is copied from a file that is mapped, a quantized one block by block
        phases["load"] = {"frozen weights": frozen, "file of the base": frozen}
    for parts in phases.values():
        gaps = sum(share * parts.get(part, 0) for part, share in HEAP_GAPS[compiled].items())
        parts["gaps of the heap"] = round(gaps)
        parts["python and torch"] = RUNTIME_BYTES + (COMPILER_BYTES if compiled else 0)
    return max(phases.values(), key=lambda parts: sum(parts.values()))


def without_patterns(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of an optimizer without those by name."""
    return {key: value for key, value in options.items() if not key.endswith("_pattern")}


def choose_trained(
    model: nn.Module, *, peft: tuple[str, dict[str, Any]] | None, new_rows: int, only: list[str] | None
) -> None:
    """Apply a PEFT method to a model on the meta device, or freeze all but a part of it."""
    if peft:
        method = METHODS[peft[0]]
        method.apply(model, method.options(**peft[1]), 0, list(range(new_rows)))
        train_head(model)
    elif only:
        train_only(model, only)


def simulate_layers(config: Config, period: int, alike: bool, **step: Any) -> dict[str, dict[str, int]]:
    """Return what `simulate_step` does, computed from two small depths for a deep model: blocks are alike.

    period  of blocks that are alike
    alike   whether all periods are
    """
    depth, shallow, deep = config.num_hidden_layers, 2 * period, 3 * period
    if not alike or depth <= deep or family_of(config).decoder_layers(config):
        return simulate_step(config, **step)
    first, second = (simulate_step(replace(config, num_hidden_layers=n), **step) for n in (shallow, deep))
    periods = (depth - shallow) / period
    return {
        phase: {
            part: round(parts.get(part, 0) + periods * (second[phase].get(part, 0) - parts.get(part, 0)))
            for part in parts | second[phase]
        }
        for phase, parts in first.items()
    }


def make_plan(
    config: Config,
    *,
    seq_len: int,
    lengths: Lengths | None = None,
    peft: tuple[str, dict[str, Any]] | None = None,
    new_rows: int = 0,
    only: list[str] | None = None,
    head: HeadConfig | None = None,
    **options: Any,
) -> Plan:
    """Return the cost of a run of a model's Config; see `memory` for the other options.

    seq_len   tokens per row, to compute FLOPs per token
    lengths   of a row in the encoder and the decoder; None: a decoder reads seq_len tokens
    peft      name and options of a PEFT method
    new_rows  number of embedding rows that an adapter trains
    only      what is trained of a whole model, see `train_only`
    head      for labels, instead of the one for tokens

    >>> from llmkit.models import gpt2
    >>> make_plan(gpt2.Config(vocab_size=50257), seq_len=1024, micro_batch_size=8, precision="bf16").total
    124439808
    """
    model, lengths = build_model(config, device="meta", seed=None, head=head), lengths or Lengths(seq_len)
    base = {name for name, _ in model.named_parameters()}
    choose_trained(model, peft=peft, new_rows=new_rows, only=only)
    added = frozenset(name for name, _ in model.named_parameters()) - base
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    flops = flops_per_row(model, lengths) / seq_len
    peak = memory(config, lengths=lengths, peft=peft, new_rows=new_rows, only=only, head=head, **options)
    return Plan(parameters_by_part(model, added), trainable, flops, {part: n for part, n in peak.items() if n})
