"""Model families, by Hugging Face's model_type. A new one is a file that fills `family.Family`, and a line here."""

import torch
from torch import nn

from llmkit.models import bert, falcon, family, gemma, gpt2, llama, mistral, mixtral, qwen2, qwen3, t5
from llmkit.models.family import Config, Family, Problem
from llmkit.models.heads import HeadConfig, add_head
from llmkit.models.layers import init_weights

FAMILIES: dict[str, Family] = {
    one.FAMILY.config.model_type: one.FAMILY
    for one in (gpt2, llama, mistral, qwen2, qwen3, gemma, falcon, mixtral, bert, t5)
}
CONFIGS = {name: one.config for name, one in FAMILIES.items()}


def family_of(config: Config) -> Family:
    """Return the family of a Config."""
    return FAMILIES[config.model_type]


def shape_problems(config: Config) -> list[Problem]:
    """Return every value of a config that can't be built, as (key, reason); [] if the shapes fit."""
    return family.shape_problems(family_of(config), config)


def build_model(
    config: Config, *, device: torch.device | str = "cpu", seed: int | None = 0, head: HeadConfig | None = None
) -> nn.Module:
    """Build a model of the config's family, in fp32.

    seed  initialise with it (see `init_weights`); None leaves the weights empty, to be loaded
    head  predicts labels instead of tokens

    >>> sum(p.numel() for p in build_model(gpt2.Config(vocab_size=50257), device="meta", seed=None).parameters())
    124439808
    """
    with torch.device("meta"):
        model = family_of(config).build(config)
        if head:
            add_head(model, family_of(config), head)
    if torch.device(device).type == "meta":
        return model
    model = model.to_empty(device=device)
    if seed is not None:
        init_weights(model, family_of(config), torch.Generator(device).manual_seed(seed))
    return model
