"""Model families: each a file with Config, Model, from_hf, to_hf. A new one is a file and a line in FAMILIES."""

from __future__ import annotations

from dataclasses import asdict
from types import ModuleType

import torch
from torch import nn

from llmkit.models import gpt2, llama
from llmkit.models.layers import init_weights

FAMILIES: dict[str, ModuleType] = {"gpt2": gpt2, "llama": llama}
MAX_LAYERS = 10_000  # more is a mistake or a bomb: even empty ones take memory
CONFIGS = {name: family.Config for name, family in FAMILIES.items()}


def family_of(config) -> ModuleType:
    """The module that a Config or a Model's config was defined in."""
    return next(family for family in FAMILIES.values() if isinstance(config, family.Config))


def shape_problems(config) -> list[tuple[str, str]]:
    """What can't be built, as (key, reason), all at once; empty when the shapes fit."""
    found = []
    if config.num_hidden_layers > MAX_LAYERS:
        found.append(("num_hidden_layers", f"is {config.num_hidden_layers}, over {MAX_LAYERS}"))
    for key, value in asdict(config).items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            found.append((key, f"is {value}, but must be at least 1"))
        if isinstance(value, float) and (value < 0 or (("pdrop" in key or "dropout" in key) and value >= 1)):
            found.append((key, f"is {value}, but must be {'in [0, 1)' if 'drop' in key else 'positive'}"))
    if found:
        return found
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if config.hidden_size % heads and config.head_dim * heads != config.hidden_size:
        found.append(("hidden_size", f"is {config.hidden_size}, which {heads} heads do not divide"))
    if heads % kv_heads:
        found.append(("num_key_value_heads", f"is {kv_heads}, which does not divide {heads} heads"))
    if config.head_dim % 2 and hasattr(config, "rope_theta"):
        found.append(("head_dim", f"is {config.head_dim}, but rotary positions turn pairs of channels"))
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
        init_weights(model, config.init, config.initializer_range, family.RESIDUAL, config.num_hidden_layers, generator)
    return model
