"""Model families, by Hugging Face's model_type. A new one is a file and a line in FAMILIES.

A Config's `kind` is causal (a decoder), masked (an encoder) or seq2seq (both).

Such a file holds Config, Model, from_hf and to_hf (our options <-> a config.json), FIXED (fields of a config.json that
change the mathematics, and the one value that is built), DEFAULTS (what transformers takes where a file is silent),
RESIDUAL and init_stds (see `init_weights`), UNUSED (names in files that are not read), and, where files differ, on_disk
and from_disk_name.
"""

from __future__ import annotations

from dataclasses import asdict
from types import ModuleType

import torch
from torch import nn

from llmkit.models import bert, falcon, gemma, gpt2, llama, mistral, mixtral, qwen2, qwen3, t5
from llmkit.models.layers import init_weights, rope_problem

FAMILIES: dict[str, ModuleType] = {
    family.Config.model_type: family
    for family in (gpt2, llama, mistral, qwen2, qwen3, gemma, falcon, mixtral, bert, t5)
}
CONFIGS = {name: family.Config for name, family in FAMILIES.items()}
MAX_LAYERS = 10_000  # more is a mistake or a bomb: even empty ones take memory
MAY_BE_ZERO = ("max_window_layers", "decoder_start_token_id")


def family_of(config) -> ModuleType:
    """The module that a Config was defined in."""
    return FAMILIES[config.model_type]


def shape_problems(config) -> list[tuple[str, str]]:
    """What can't be built, as (key, reason), all at once; empty when the shapes fit."""
    found = []
    if config.num_hidden_layers > MAX_LAYERS:
        found.append(("num_hidden_layers", f"is {config.num_hidden_layers}, over {MAX_LAYERS}"))
    for key, value in asdict(config).items():
        if isinstance(value, int) and not isinstance(value, bool) and value < (key not in MAY_BE_ZERO):
            found.append((key, f"is {value}, but must be at least {int(key not in MAY_BE_ZERO)}"))
        if isinstance(value, float) and (value < 0 or ("drop" in key and value >= 1)):
            found.append((key, f"is {value}, but must be {'in [0, 1)' if 'drop' in key else 'positive'}"))
    if found:
        return found
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if config.hidden_size % heads and config.head_dim == config.hidden_size // heads:
        found.append(("hidden_size", f"is {config.hidden_size}, which {heads} heads do not divide"))
    if heads % kv_heads:
        found.append(("num_key_value_heads", f"is {kv_heads}, which does not divide {heads} heads"))
    if config.head_dim % 2 and hasattr(config, "rope_theta"):
        found.append(("head_dim", f"is {config.head_dim}, but rotary positions turn pairs of channels"))
    if getattr(config, "rope_theta", 2.0) <= 1.0:
        found.append(("rope_theta", f"is {config.rope_theta}, but must be over 1"))
    if (buckets := getattr(config, "relative_attention_num_buckets", 4)) < 4:
        found.append(("relative_attention_num_buckets", f"is {buckets}, but must be at least 4"))
    elif getattr(config, "relative_attention_max_distance", buckets) <= buckets // 2:
        found.append(("relative_attention_max_distance", f"must be over half of {buckets} buckets"))
    if config.vocab_size is not None and getattr(config, "decoder_start_token_id", 0) >= config.vocab_size:
        found.append(("decoder_start_token_id", f"is {config.decoder_start_token_id}, no id of {config.vocab_size}"))
    if scaling := getattr(config, "rope_scaling", None):
        found += [("rope_scaling", problem)] if (problem := rope_problem(scaling)) else []
    if getattr(config, "num_decoder_layers", 0) > MAX_LAYERS:
        found.append(("num_decoder_layers", f"is {config.num_decoder_layers}, over {MAX_LAYERS}"))
    experts = getattr(config, "num_local_experts", 1)
    if getattr(config, "num_experts_per_tok", 1) > experts:
        found.append(("num_experts_per_tok", f"is {config.num_experts_per_tok}, more than {experts} experts"))
    return found


def build_model(config, *, device: torch.device | str = "cpu", seed: int | None = 0) -> nn.Module:
    """A model of the config's family, in fp32.

    seed  initialise with it (see `init_weights`); None leaves the weights empty, to be loaded

    >>> sum(p.numel() for p in build_model(gpt2.Config(vocab_size=50257), device="meta", seed=None).parameters())
    124439808
    """
    family = family_of(config)
    with torch.device("meta"):
        model = family.Model(config)
    if torch.device(device).type == "meta":
        return model
    model = model.to_empty(device=device)
    if seed is not None:
        generator = torch.Generator(device).manual_seed(seed)
        own = family.init_stds(config) if hasattr(family, "init_stds") else {}
        depth = config.num_hidden_layers
        init_weights(model, config.init, config.initializer_range, family.RESIDUAL, depth, generator, own)
    return model
