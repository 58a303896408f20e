"""Define layers and rotary positions of several families, and initialise weights.

Shapes: B rows, T tokens, H heads, D channels per head, h hidden, V vocabulary.
"""

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Collection, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.models.family import MOST, Family, Problem

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # by Hugging Face's names
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),  # So et al. 2021, arXiv:2109.08668
    "silu": F.silu,
}


class MultiHeadSizes:
    """Mixin for a Config: sizes of multi-head attention over all keys, and of an MLP with four times the width."""

    def __post_init__(self):
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size

    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def windows(self) -> list[None]:
        return [None] * self.num_hidden_layers


class RMSNorm(nn.Module):
    """Compute x / rms(x) * weight over the last dimension, in fp32 (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = x.float()
        normed = normed * torch.rsqrt(normed.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


FEW_ROWS = 4  # with 8, F.linear is faster than sums


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute F.linear. When compiled for a CPU, a few rows are sums that share one reading of the weights.

    Measured in bf16 with one thread, weights from memory: twice as fast as F.linear with one or two rows, 1.3 times
    with four.
    """
    if torch.compiler.is_compiling() and x.device.type == "cpu" and x.numel() <= FEW_ROWS * x.shape[-1]:
        rows = x.reshape(-1, x.shape[-1])
        rows = rows.as_strided(rows.shape, rows.stride())  # else each sum computes x anew, with the norm before it
        y = torch.stack([(weight * row).sum(-1) for row in rows])
        return (y if bias is None else y + bias).unflatten(0, x.shape[:-1])
    return F.linear(x, weight, bias)


class FewRows:
    """Mixin for Linears in decoding, see `swap_class`: multiply a few rows with `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class TokenEmbedding(nn.Embedding):
    """Hold the token embedding, one row per token."""

    def rows(self) -> Tensor:
        """Return the matrix (V, h) that a tied head multiplies by."""
        return self.weight


class Head(nn.Linear):
    """Hold the matrix of an untied head. It is never called: the loss multiplies by `rows` in chunks."""

    def __init__(self, hidden_size: int, vocab_size: int):
        super().__init__(hidden_size, vocab_size, bias=False)

    def rows(self) -> Tensor:
        """Return the matrix (V, h)."""
        return self.weight


def token_tables(model: nn.Module) -> list[TokenEmbedding | Head]:
    """Return the modules with one row per token: the embedding, and the head if it is untied."""
    return [model.wte] if model.lm_head is None else [model.wte, model.lm_head]


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return every linear inside the blocks by its full name. The head is none of them: the loss multiplies with it."""
    return {
        f"{prefix}.{name}": module
        for prefix, block in model.named_modules()
        if any(block is one for one in model.blocks)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }


def swap_class(module: nn.Module, mixin: type) -> None:
    """Put a mixin in front of a module's class. The parameters keep their names."""
    module.__class__ = class_with_mixin(mixin, type(module))


def restore_class(module: nn.Module) -> None:
    """Undo the last `swap_class`."""
    module.__class__ = type(module).original_class


@contextlib.contextmanager
def original_classes(model: nn.Module, mixins: tuple[type, ...]) -> Iterator[None]:
    """Remove the last of these mixins from every module of a model inside a `with` block."""
    classes = {module: type(module) for module in model.modules() if isinstance(module, mixins)}
    for module in classes:
        restore_class(module)
    try:
        yield
    finally:
        for module, original in classes.items():
            module.__class__ = original


@functools.cache
def class_with_mixin(mixin: type, original: type) -> type:
    """Return the class of a pair, always the same object: torch.compile and isinstance compare classes."""
    return type(f"{mixin.__name__}{original.__name__}", (mixin, original), {"original_class": original})


# ---- rotary positions -----------------------------------------------------------------------------------------------


def rope_frequencies(
    head_dim: int, theta: float, scaling: dict | None = None, device: torch.device | str = "cpu"
) -> tuple[Tensor, float]:
    """Return radians per position for each channel pair, fp32 (D/2,), and the gain of cos and sin."""
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    frequencies = 1.0 / theta**exponents
    if not scaling:
        return frequencies, 1.0
    options = {key: value for key, value in scaling.items() if key != "rope_type"}
    return ROPE_SCALING[scaling["rope_type"]](frequencies, theta, **options)


def rope_table(positions: Tensor, head_dim: int, theta: float, scaling: dict | None = None) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the angles of positions (T,) or (B, T), fp32, (T, D) or (B, 1, T, D), for all blocks.

    Angles are position * theta^(-2i/D), i < D/2, repeated twice: Hugging Face's layout of the rotary embedding
    (Su et al. 2021, arXiv:2104.09864), which rotates channel i together with channel i + D/2.

    scaling  {"rope_type": one of ROPE_SCALING, ...its options}, for a longer context than the pretrained one
    """
    frequencies, gain = rope_frequencies(head_dim, theta, scaling, positions.device)
    angles = positions.float()[..., None] * frequencies  # (..., T, D/2)
    angles = torch.cat((angles, angles), dim=-1)
    angles = angles[:, None] if positions.dim() == 2 else angles
    return angles.cos() * gain, angles.sin() * gain


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channel pairs of x (B, H, T, D) by their position's angle."""
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)


def linear_rope(frequencies: Tensor, theta: float, *, factor: float) -> tuple[Tensor, float]:
    """Divide all positions by a factor (Chen et al. 2023, arXiv:2306.15595)."""
    return frequencies / factor, 1.0


def llama3_rope(
    frequencies: Tensor,
    theta: float,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> tuple[Tensor, float]:
    """Slow down the channels that turn fewer than low_freq_factor times in the original context.

    Between low_freq_factor and high_freq_factor turns, interpolate (Llama 3.1's model card and code, 2024).
    """
    turns = original_max_position_embeddings * frequencies / (2 * math.pi)
    keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / factor), 1.0


def yarn_rope(
    frequencies: Tensor,
    theta: float,
    *,
    factor: float,
    original_max_position_embeddings: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    attention_factor: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    truncate: bool = True,
) -> tuple[Tensor, float]:
    """Divide low frequencies by `factor` along a ramp, and sharpen the scores (YaRN, Peng et al. 2023, 2309.00071).

    mscale, mscale_all_dim  both: the scores are sharpened by a ratio, as in DeepSeek-V2 (2405.04434)
    truncate                the ramp begins and ends at whole channels
    """
    pairs = len(frequencies)

    def channel(turns: float) -> float:
        """Return the channel pair that makes this many turns in the original context."""
        return pairs * math.log(original_max_position_embeddings / (turns * 2 * math.pi)) / math.log(theta)

    def sharpening(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    low, high = channel(beta_fast), channel(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    high = high + 0.001 if high == low else high  # avoid a division by zero
    slow = ((torch.arange(pairs, device=frequencies.device) - low) / (high - low)).clamp(0, 1)
    gain = attention_factor
    if gain is None:
        gain = sharpening(mscale) / sharpening(mscale_all_dim) if mscale and mscale_all_dim else sharpening(1.0)
    return frequencies * (1 - slow + slow / factor), gain


ROPE_SCALING = {"linear": linear_rope, "llama3": llama3_rope, "yarn": yarn_rope}


def rope_problems(config) -> Iterator[Problem]:
    """Yield the problems of a config's rotary positions."""
    if config.head_dim % 2:
        yield "head_dim", f"is {config.head_dim}, but must be even for rotary positions"
    if config.rope_theta <= 1.0:
        yield "rope_theta", f"is {config.rope_theta}, but must be over 1"
    if config.rope_scaling and (problem := scaling_problem(config.rope_scaling)):
        yield "rope_scaling", problem


def scaling_problem(scaling: dict) -> str | None:
    """Return why a `rope_scaling` can't be built, None if it can."""
    kind, options = scaling.get("rope_type"), {key: value for key, value in scaling.items() if key != "rope_type"}
    if not isinstance(kind, str) or kind not in ROPE_SCALING:
        return f"has the rope_type {kind!r}, not one of {', '.join(ROPE_SCALING)}"
    known = list(inspect.signature(ROPE_SCALING[kind]).parameters.values())[2:]
    missing = [p.name for p in known if p.default is p.empty and p.name not in options]
    if unknown := options.keys() - {p.name for p in known}:
        return f"of type {kind} has no option {', '.join(sorted(unknown))}"
    if missing:
        return f"of type {kind} needs {', '.join(missing)}"
    if not isinstance(options.pop("truncate", True), bool):
        return f"of type {kind} needs a truncate that is true or false"
    numbers = {key: x for key, x in options.items() if isinstance(x, int | float) and not isinstance(x, bool)}
    if wrong := [key for key in options if not 0 < numbers.get(key, 0) <= MOST]:
        return f"of type {kind} needs a positive {wrong[0]}, at most {MOST}"
    if kind == "llama3" and numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
        return "of type llama3 needs a high_freq_factor over its low_freq_factor"
    return None


# ---- initialisation -------------------------------------------------------------------------------------------------


@torch.no_grad()
def init_weights(
    model: nn.Module, family: Family, generator: torch.Generator, names: Collection[str] | None = None
) -> None:
    """Initialise every parameter of a new model, or those with these full names.

    config.init is the scheme, config.initializer_range is std:
        normal  matrices ~ N(0, std^2) (GPT-2, Radford et al. 2019)
        zero    as normal, but the residual matrices and an untied head are 0: blocks start as the identity
                (Zhang et al. 2019, arXiv:1901.09321; the head: Yang et al. 2022, arXiv:2203.03466)
        xavier  matrices ~ N(0, 2 / (fan_in + fan_out)) (Glorot and Bengio 2010)
        he      matrices ~ N(0, 2 / fan_in) (He et al. 2015, arXiv:1502.01852)
    Residual matrices are scaled by 1 / sqrt(2 * depth), so that the variance of the residual stream does not grow
    with depth (GPT-2; each block writes twice). A family's own standard deviations replace std in "normal" and "zero".
    Embeddings are N(0, std^2) in every scheme, biases 0, norms `family.norm_init`.
    """
    config, own_stds = model.config, family.init_stds(model.config)
    for path, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            if names is not None and f"{path}.{kind}" not in names:
                continue
            name = path.rsplit(".", 1)[-1] if kind in ("weight", "bias") else kind
            if kind == "bias":
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(family.norm_init)
            elif config.init == "zero" and (name in family.residual or name == "lm_head"):
                parameter.zero_()
            else:
                fan_out, fan_in = parameter.shape[-2:]
                stds = {"xavier": math.sqrt(2 / (fan_in + fan_out)), "he": math.sqrt(2 / fan_in)}
                std = config.initializer_range
                std = std if isinstance(module, nn.Embedding) else stds.get(config.init, std)
                if name in own_stds and config.init not in stds:
                    std = own_stds[name]
                elif name in family.residual:
                    std /= math.sqrt(2 * config.num_hidden_layers)
                parameter.normal_(0.0, std, generator=generator)
