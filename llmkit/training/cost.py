"""What a run costs, in closed form: parameters, FLOPs a token, peak memory. No weights are made."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from llmkit.models import build_model
from llmkit.models.loss import CHUNK_BYTES
from llmkit.peft import METHODS

RUNTIME_BYTES = 520 * 2**20  # resident in a process that has compiled and run small models, measured on Linux


@dataclass(frozen=True)
class Plan:
    """Figures of one training configuration; bytes and FLOPs are plain numbers."""

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


PARTS = (  # a part, and what is in the names of its parameters: the first that fits counts
    ("adapter", re.compile(r"\.lora_[AB]$")),
    ("norms", re.compile(r"(norm|LayerNorm|\bln_\w+)\.(weight|bias)$")),
    ("head", re.compile(r"^(lm_head|cls)\.")),
    ("embeddings", re.compile(r"\b(wte|wpe|embed_tokens|\w+_embeddings|shared|relative_attention_bias)\.")),
    ("attention", re.compile(r"attn|attention|Attention")),
    ("experts", re.compile(r"\bexperts\.")),
    ("mlp", re.compile(r"")),
)


def part_of(name: str) -> str:
    """The part of a model that a parameter belongs to."""
    return next(part for part, pattern in PARTS if pattern.search(name))


def parameters_by_part(model: nn.Module) -> dict[str, int]:
    """Parameters of embeddings, attention, MLPs, experts, norms, head, and what a PEFT method added."""
    parts = dict.fromkeys(("embeddings", "attention", "mlp", "experts", "norms", "head", "adapter"), 0)
    for name, parameter in model.named_parameters():
        parts[part_of(name)] += parameter.numel()
    return {part: number for part, number in parts.items() if number}


@dataclass(frozen=True)
class Lengths:
    """Tokens of one row: what is read, and what a decoder beside an encoder writes."""

    source: int
    target: int = 0

    def through(self, name: str, config: Any) -> float:
        """How many of a row's tokens go through a matrix."""
        if part_of(name) == "experts":
            return self.source * config.num_experts_per_tok / config.num_local_experts
        reads = name.startswith("encoder.") or name.endswith(("EncDecAttention.k.weight", "EncDecAttention.v.weight"))
        return self.source if reads or config.kind != "seq2seq" else self.target


def flops_per_row(model: nn.Module, lengths: Lengths) -> float:
    """FLOPs of forward and backward for one row: 6 for each weight of a matrix product and token, and attention.

    4 where the weight is frozen, 6 for an adapter's. The head counts even when it is tied, the embedding's look-up
    not; attention adds 12 L h T a token (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), causality not
    subtracted, but windows are.
    """
    config = model.config
    seq2seq = config.kind == "seq2seq"
    frozen = any(part_of(name) == "adapter" for name, _ in model.named_parameters())
    predicted = lengths.target if seq2seq else lengths.source
    total = (4.0 if frozen else 6.0) * config.vocab_size * config.hidden_size * predicted
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and part_of(name) not in ("embeddings", "norms") and not name.startswith("lm_head."):
            times = 4 if frozen and not parameter.requires_grad else 6
            total += times * parameter.numel() * lengths.through(name, config)
    width, source, target = config.num_attention_heads * config.head_dim, lengths.source, lengths.target
    if seq2seq:
        pairs = config.num_hidden_layers * source**2 + config.num_decoder_layers * target * (target + source)
    else:
        windows = getattr(config, "windows", [None] * config.num_hidden_layers)
        pairs = sum(source * min(source, window or source) for window in windows)
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
    """Bytes at the peak of a training step, by part.

    Static: fp32 weight, gradient and optimizer state of what is trained (AdamW 16 B, Muon 12 B on block matrices),
    2 B (bf16, fp16) or 4 B of what is frozen. Activations, bytes a token and layer, h hidden, f MLP width (of all the
    experts that a token takes), kv key and value width: 12h + 4kv + 6f for a compiled SwiGLU (8f eager), 12h + 4kv +
    4f for GELU, 8h + 4kv more for a decoder's view of an encoder; a recomputed block keeps its input (2h) and needs
    one block at a time. In fp32 activations weigh double. The loss holds one chunk of logits.
    """
    config = model.config
    h, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    taken = getattr(config, "num_experts_per_tok", 1)
    wide = 2 if precision == "fp32" else 1
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    matrices = {id(p) for p in model.blocks.parameters() if p.dim() >= 2} if optimizer == "muon" else set()
    state = sum(p.numel() * (12 if id(p) in matrices else 16) for p in trained)
    per_layer = 12 * h + 4 * kv + ((6 if compiled else 8) if config.gated else 4) * config.intermediate_size * taken
    per_layer += 4 * h * taken if taken > 1 else 0  # each expert has rows of its own
    stacks = [(config.num_hidden_layers, lengths.source, per_layer)]
    if config.kind == "seq2seq":
        stacks += [(config.num_decoder_layers, lengths.target, per_layer + 8 * h)]
        stacks += [(config.num_decoder_layers, lengths.source, 4 * kv)]
    layers = sum(depth for depth, _, _ in stacks[:2])
    share = (layers - checkpointed) / layers  # of the blocks that keep all
    kept = sum(depth * tokens * size for depth, tokens, size in stacks)
    again = sum(depth * tokens * 2 * h for depth, tokens, _ in stacks[:2])
    one = max(tokens * size for _, tokens, size in stacks) if checkpointed else 0
    longest = max(lengths.source, lengths.target)
    activations = micro_batch_size * wide * (share * kept + (1 - share) * again + one + longest * 6 * h)
    copies = sum(p.numel() for p in model.parameters() if p.dim() >= 2) * 2 if precision != "fp32" else 0
    result = {
        "python and torch": RUNTIME_BYTES if device == "cpu" else 0,
        "trained weights, gradients, optimizer": state,
        "frozen weights": frozen * 2 * wide,
        "low-precision copies of weights": copies if not frozen else 0,
        "activations": round(activations),
        "loss": 3 * CHUNK_BYTES,
    }
    return {part: size for part, size in result.items() if size}


def make_plan(
    config: Any,
    *,
    seq_len: int,
    lengths: Lengths | None = None,
    peft: dict[str, Any] | None = None,
    new_rows: int = 0,
    **options: Any,
) -> Plan:
    """Plan a run of a model's Config; see `memory` for the options.

    seq_len   tokens of a row; FLOPs are given for one of them
    lengths   what an encoder and a decoder make of such a row
    new_rows  of the embedding that an adapter trains

    >>> from llmkit.models import gpt2
    >>> make_plan(gpt2.Config(vocab_size=50257), seq_len=1024, micro_batch_size=8, precision="bf16").total
    124439808
    """
    model = build_model(config, device="meta", seed=None)
    model.new_tokens = list(range(new_rows))
    if peft:
        METHODS[peft["name"]](model, **{key: value for key, value in peft.items() if key != "name"})
    parts, lengths = parameters_by_part(model), lengths or Lengths(seq_len)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    flops = flops_per_row(model, lengths) / seq_len
    return Plan(parts, trainable, flops, memory(model, lengths=lengths, **options))
