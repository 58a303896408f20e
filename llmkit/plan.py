"""What a run costs, in closed form: parameters, FLOPs a token, peak memory. No weights are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from llmkit.models import build_model
from llmkit.models.loss import CHUNK_BYTES
from llmkit.peft import METHODS

RUNTIME_BYTES = 350 * 2**20  # resident in a process that has imported torch and its compiler, measured on Linux


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


def parameters_by_part(model: nn.Module) -> dict[str, int]:
    """Parameters of embeddings, attention, MLPs, norms, head, and what a PEFT method added."""
    parts = dict.fromkeys(("embeddings", "attention", "mlp", "norms", "head", "adapter"), 0)
    for name, parameter in model.named_parameters():
        words = name.split(".")
        if words[-1].startswith("lora_"):
            parts["adapter"] += parameter.numel()
        elif words[0] == "lm_head":
            parts["head"] += parameter.numel()
        elif any(word in ("wte", "wpe", "embed_tokens") for word in words):
            parts["embeddings"] += parameter.numel()
        elif any(word in ("attn", "self_attn") for word in words):
            parts["attention"] += parameter.numel()
        elif "mlp" in words:
            parts["mlp"] += parameter.numel()
        else:
            parts["norms"] += parameter.numel()
    return {part: number for part, number in parts.items() if number}


def flops_per_token(model: nn.Module, seq_len: int) -> float:
    """FLOPs of forward and backward for one trained token: 6 N + 12 L h T, or 4 N + 6 N_lora + 12 L h T with LoRA.

    N counts the weights of matrix products, the head's included even when it is tied, the embedding's look-up not;
    the last term is attention (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), causality not subtracted.
    """
    config = model.config
    parts = parameters_by_part(model)
    head = config.vocab_size * config.hidden_size
    products = parts["attention"] + parts["mlp"] + head
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * seq_len
    if "adapter" in parts:
        return 4 * products + 6 * parts["adapter"] + attention
    return 6 * products + attention


def memory(
    model: nn.Module,
    *,
    seq_len: int,
    micro_batch_size: int,
    precision: str,
    checkpointed: int = 0,
    compiled: bool = True,
    optimizer: str = "adamw",
    device: str = "cpu",
) -> dict[str, int]:
    """Bytes at the peak of a training step, by part.

    Static: fp32 weight, gradient and optimizer state of what is trained (AdamW 16 B, Muon 12 B on block matrices),
    2 B (bf16, fp16) or 4 B of what is frozen. Activations, bytes a token and layer, h hidden, f MLP width, kv key and
    value width: 12h + 4kv + 6f for a compiled SwiGLU (8f eager), 12h + 4kv + 4f for GELU; a recomputed block keeps
    its input (2h) and needs one block at a time. In fp32 activations weigh double. The loss holds one chunk of logits.
    """
    config = model.config
    h, f, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    wide = 2 if precision == "fp32" else 1
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    matrices = {id(p) for p in model.blocks.parameters() if p.dim() == 2} if optimizer == "muon" else set()
    state = sum(p.numel() * (12 if id(p) in matrices else 16) for p in trained)
    per_layer = 12 * h + 4 * kv + ((6 if compiled else 8) if config.gated else 4) * f
    tokens = seq_len * micro_batch_size
    kept = config.num_hidden_layers - checkpointed
    activations = tokens * wide * (kept * per_layer + checkpointed * 2 * h + (per_layer if checkpointed else 0) + 6 * h)
    copies = sum(p.numel() for p in model.parameters() if p.dim() == 2) * 2 if precision != "fp32" else 0
    result = {
        "python and torch": RUNTIME_BYTES if device == "cpu" else 0,
        "trained weights, gradients, optimizer": state,
        "frozen weights": frozen * 2 * wide,
        "low-precision copies of weights": copies if not frozen else 0,
        "activations": activations,
        "loss": 3 * CHUNK_BYTES,
    }
    return {part: size for part, size in result.items() if size}


def make_plan(config: Any, *, peft: dict[str, Any] | None = None, **options: Any) -> Plan:
    """Plan a run of a model's Config; see `memory` for the options.

    >>> from llmkit.models import gpt2
    >>> make_plan(gpt2.Config(vocab_size=50257), seq_len=1024, micro_batch_size=8, precision="bf16").total
    124439808
    """
    model = build_model(config, device="meta", seed=None)
    if peft:
        METHODS[peft["name"]](model, **{key: value for key, value in peft.items() if key != "name"})
    parts = parameters_by_part(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Plan(parts, trainable, flops_per_token(model, options["seq_len"]), memory(model, **options))
