"""Compute the cost of a run in closed form: parameters, FLOPs per token, peak memory. No weights are allocated."""

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from llmkit.models import build_model, family_of
from llmkit.models.family import Config
from llmkit.models.layers import Head, RMSNorm, token_tables
from llmkit.models.loss import CHUNK_BYTES
from llmkit.peft import METHODS
from llmkit.training.optim import muon_matrices

TRAINED, FROZEN = "trained weights, gradients, optimizer", "frozen weights"  # parts of the memory that are exact
RUNTIME_BYTES = 520 * 2**20  # resident memory of a process that compiled and ran small models, measured on Linux


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
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and parts[name] not in ("embeddings", "norms") and id(parameter) not in tables:
            tokens = lengths.source if family.reads_source(name) else lengths.target
            share = experts_per_token / experts if parts[name] == "experts" else 1
            total += (6 if parameter.requires_grad else 4) * parameter.numel() * tokens * share
    width, source, target = config.num_attention_heads * config.head_dim, lengths.source, lengths.target
    if decoder_layers:
        pairs = config.num_hidden_layers * source**2 + decoder_layers * target * (target + source)
    else:
        pairs = sum(source * min(source, window or source) for window in config.windows)
    return total + 12.0 * width * pairs


def memory(
    model: nn.Module,
    *,
    lengths: Lengths,
    micro_batch_size: int,
    precision: str,
    checkpointed: int = 0,
    compiled: bool = True,
    optimizer: str = "adamw",
    device: str = "cpu",
) -> dict[str, int]:
    """Return the peak memory of a training step in bytes, by part.

    A trained weight takes 16 B with AdamW (fp32 weight, gradient and state), 12 B with Muon on block matrices;
    a frozen weight 2 B (bf16, fp16) or 4 B.
    Activations take bytes per token and layer, with h hidden, f the MLP's width (of all experts that a token takes), kv
    the width of keys and values: 12h + 4kv + 6f for a compiled gated MLP (8f eager), 12h + 4kv + 4f for a plain one,
    8h + 4kv more for cross-attention. A recomputed block keeps its input (2h), and one such block is live at a time. In
    fp32 activations take double. The loss holds one chunk of logits.
    """
    config, family = model.config, family_of(model.config)
    h, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    experts_per_token, decoder_layers = (family.experts(config) or (1, 1))[1], family.decoder_layers(config)
    fp32_factor = 2 if precision == "fp32" else 1
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    matrices = {id(p) for p in muon_matrices(model)} if optimizer == "muon" else set()
    state = sum(p.numel() * (12 if id(p) in matrices else 16) for p in trained)
    per_width = (6 if compiled else 8) if family.gated(config) else 4
    per_layer = 12 * h + 4 * kv + per_width * config.intermediate_size * experts_per_token
    per_layer += 4 * h * experts_per_token if experts_per_token > 1 else 0  # each expert has its own rows
    stacks = [(config.num_hidden_layers, lengths.source, per_layer)]
    if decoder_layers:
        stacks += [(decoder_layers, lengths.target, per_layer + 8 * h), (decoder_layers, lengths.source, 4 * kv)]
    layers = sum(depth for depth, _, _ in stacks[:2])
    share = (layers - checkpointed) / layers  # of the blocks that keep all activations
    kept = sum(depth * tokens * size for depth, tokens, size in stacks)
    inputs = sum(depth * tokens * 2 * h for depth, tokens, _ in stacks[:2])
    live = max(tokens * size for _, tokens, size in stacks) if checkpointed else 0  # the block being recomputed
    longest = max(lengths.source, lengths.target)
    activations = micro_batch_size * fp32_factor * (share * kept + (1 - share) * inputs + live + longest * 6 * h)
    copies = sum(p.numel() for p in model.parameters() if p.dim() >= 2) * 2 if precision != "fp32" else 0
    result = {
        "python and torch": RUNTIME_BYTES if device == "cpu" else 0,
        TRAINED: state,
        FROZEN: frozen * 2 * fp32_factor,
        "low-precision copies of weights": copies if not frozen else 0,
        "activations": round(activations),
        "loss": 3 * CHUNK_BYTES,
    }
    return {part: size for part, size in result.items() if size}


def make_plan(
    config: Config,
    *,
    seq_len: int,
    lengths: Lengths | None = None,
    peft: tuple[str, dict[str, Any]] | None = None,
    new_rows: int = 0,
    **options: Any,
) -> Plan:
    """Return the cost of a run of a model's Config; see `memory` for the other options.

    seq_len   tokens per row, to compute FLOPs per token
    lengths   of a row in the encoder and the decoder; None: a decoder reads seq_len tokens
    peft      name and options of a PEFT method
    new_rows  number of embedding rows that an adapter trains

    >>> from llmkit.models import gpt2
    >>> make_plan(gpt2.Config(vocab_size=50257), seq_len=1024, micro_batch_size=8, precision="bf16").total
    124439808
    """
    model, lengths = build_model(config, device="meta", seed=None), lengths or Lengths(seq_len)
    base = {name for name, _ in model.named_parameters()}
    if peft:
        method = METHODS[peft[0]]
        method.apply(model, method.options(**peft[1]), 0, list(range(new_rows)))
    added = frozenset(name for name, _ in model.named_parameters()) - base
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    flops = flops_per_row(model, lengths) / seq_len
    return Plan(parameters_by_part(model, added), trainable, flops, memory(model, lengths=lengths, **options))
