"""Merge models of one base into one: weighted sums of their changes, TIES, DARE; and averages of checkpoints."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from llmkit.errors import ModelError, UserError
from llmkit.files import write_beside
from llmkit.models.folder import load_model, save_model
from llmkit.peft.adapter import read_adapter_config
from llmkit.storage.locate import Located, load_located, locate
from llmkit.tokenizer.tokenizer import Tokenizer

# (changes (N, size) of one tensor, weights (N, 1), density, generator) -> a change (size,)
Combine = Callable[[Tensor, Tensor, float, torch.Generator], Tensor]


def linear(changes: Tensor, weights: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Return the sum (task arithmetic, Ilharco et al. 2022, arXiv:2212.04089)."""
    return (changes * weights).sum(0)


def ties(changes: Tensor, weights: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Return the mean of what agrees: trim each change to its largest elements, and drop those of the weaker sign.

    Yadav et al. 2023 (arXiv:2306.01708). An element's mean is over the models that are left there.
    """
    kept = max(1, round(density * changes.shape[1]))
    borders = changes.abs().kthvalue(changes.shape[1] - kept + 1, dim=1, keepdim=True).values
    trimmed = torch.where(changes.abs() >= borders, changes, 0.0)
    agrees = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
    return torch.where(agrees, trimmed * weights, 0.0).sum(0) / agrees.sum(0).clamp(min=1)


def dare(changes: Tensor, weights: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Return the sum of randomly thinned changes, scaled up for it (Yu et al. 2023, arXiv:2311.03099)."""
    kept = torch.rand(changes.shape, generator=generator) < density
    return torch.where(kept, changes / density * weights, 0.0).sum(0)


MERGES: dict[str, Combine] = {"linear": linear, "ties": ties, "dare": dare}


@torch.no_grad()
def merge_models(
    models: list[tuple[str, float]],
    out: Path,
    *,
    by: str,
    density: float,
    base: str | None,
    seed: int,
    dtype: torch.dtype,
) -> None:
    """Write the base plus a combination of what models changed of it, each times its weight.

    models   MODEL arguments and weights: adapters, or whole models that were trained from `base`
    density  share of each change that TIES and DARE keep
    Raises ModelError if the models have different bases or shapes. All changes of one tensor are in memory at a time,
    and the weights of all models.
    """
    located = [locate(name) for name, _ in models]
    start = locate(base).folder if base else common_base(located)
    loaded = [load_whole(one) for one in located]
    model, tokenizer = load_model(start), loaded[0][1]
    shapes = shapes_of(model)
    for one, (other, _) in zip(located, loaded, strict=True):
        if shapes_of(other) != shapes:
            raise ModelError("the models differ in their weights", at=one.folder, expected=f"those of {start}")
    generator, weights = torch.Generator().manual_seed(seed), torch.tensor([[weight] for _, weight in models])
    parameters = [dict(one.named_parameters()) for one, _ in loaded]
    for name, p in model.named_parameters():
        changes = torch.stack([(own[name] - p).flatten() for own in parameters])
        p.add_(MERGES[by](changes, weights, density, generator).view_as(p))
    write(model, tokenizer, out, dtype)


@torch.no_grad()
def average_models(models: list[str], out: Path, dtype: torch.dtype) -> None:
    """Write the average of the weights of whole models, one read after the other (model soups, arXiv:2203.05482)."""
    located = [locate(name) for name in models]
    for one in located:
        if one.is_adapter:
            fix = "llmkit merge A=0.5 B=0.5 OUT: the average of their factors is none of their updates"
            raise ModelError("this is an adapter", at=one.folder, fix=fix)
    model, tokenizer = load_whole(located[0])
    parameters = dict(model.named_parameters())
    for number, one in enumerate(located[1:], 2):
        other = load_whole(one)[0]
        if shapes_of(other) != shapes_of(model):
            expected = f"those of {located[0].folder}"
            raise ModelError("the models differ in their weights", at=one.folder, expected=expected)
        weights = dict(other.named_parameters())
        for name, p in parameters.items():
            p.lerp_(weights[name], 1 / number)
    write(model, tokenizer, out, dtype)


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of a model's weights by their names."""
    return {name: p.shape for name, p in model.named_parameters()}


def common_base(located: list[Located]) -> Path:
    """Return the folder of the base that all adapters have. Raise a UserError if there is none."""
    bases = {one.base.resolve() for one in located if one.is_adapter}
    if len(bases) != 1 or not all(one.is_adapter for one in located):
        got = ", ".join(map(str, sorted(bases))) or "whole models"
        raise UserError("the models name no base that they have in common", got=got, fix="name it with --base")
    return bases.pop()


def load_whole(located: Located) -> tuple[nn.Module, Tokenizer]:
    """Load a model in fp32, an adapter merged into its base."""
    if located.is_adapter and read_adapter_config(located.folder)[1].merge is None:
        raise ModelError("an adapter of this method is no change of weights, and can't be merged", at=located.folder)
    return load_located(located, merge=True)


def write(model: nn.Module, tokenizer: Tokenizer, out: Path, dtype: torch.dtype) -> None:
    """Write a Hugging Face folder."""
    with write_beside(out) as folder:
        save_model(model, folder, **tokenizer.config_ids, dtype=dtype)
        tokenizer.save(folder, token_types=model.config.kind == "masked")
