"""The parts that several families share. Shapes: B rows, T tokens, H heads, D channels a head, V vocabulary."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # by Hugging Face's names
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),  # So et al. 2021, arXiv:2109.08668
    "silu": F.silu,
}


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in fp32 (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear. Compiled for a CPU, a single row is a sum instead, which reads weights at up to twice the speed."""
    if torch.compiler.is_compiling() and x.device.type == "cpu" and x.numel() == x.shape[-1]:
        y = (weight * x.flatten()).sum(-1)
        return (y if bias is None else y + bias).view(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


class RowLinear(nn.Linear):
    """A Linear that goes through `linear`: what decoding swaps in, one row being all it ever sees."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def token_tables(model: nn.Module) -> list[nn.Module]:
    """The modules whose rows stand for tokens: the embedding, and the head where it has a matrix of its own."""
    return [model.wte] if getattr(model, "lm_head", None) is None else [model.wte, model.lm_head]


def table_rows(table: nn.Module) -> Tensor:
    """The rows (V, h) of an embedding or a head; those that are trained apart are put in."""
    return table.all_rows() if hasattr(table, "all_rows") else table.weight


# ---- rotary positions -----------------------------------------------------------------------------------------------


def rope_frequencies(
    head_dim: int, theta: float, scaling: dict | None = None, device: torch.device | str = "cpu"
) -> tuple[Tensor, float]:
    """Radians a position for each pair of channels, fp32 (D/2,), and the gain of cos and sin; see `rope_table`."""
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    frequencies = 1.0 / theta**exponents
    if not scaling:
        return frequencies, 1.0
    options = {key: value for key, value in scaling.items() if key != "rope_type"}
    return ROPE_SCALING[scaling["rope_type"]](frequencies, theta, **options)


def rope_table(positions: Tensor, head_dim: int, theta: float, scaling: dict | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles of positions (T,) or (B, T), fp32, (T, D) or (B, 1, T, D); shared by the blocks.

    Angles are position * theta^(-2i/D), i < D/2, written twice side by side: Hugging Face's layout of the
    rotary embedding (Su et al. 2021, arXiv:2104.09864), in which channel i turns together with channel i + D/2.

    scaling  {"rope_type": one of ROPE_SCALING, ...its options}: frequencies of a longer context than the trained one
    """
    frequencies, gain = rope_frequencies(head_dim, theta, scaling, positions.device)
    angles = positions.float()[..., None] * frequencies  # (..., T, D/2)
    angles = torch.cat((angles, angles), dim=-1)
    angles = angles[:, None] if positions.dim() == 2 else angles
    return angles.cos() * gain, angles.sin() * gain


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs of x (B, H, T, D) by their position's angle."""
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)


def linear_rope(frequencies: Tensor, theta: float, *, factor: float) -> tuple[Tensor, float]:
    """All positions closer together (Chen et al. 2023, arXiv:2306.15595)."""
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
    """Only slow channels, those that turn less than low_freq_factor times in the old context, are slowed down.

    Between low_freq_factor and high_freq_factor turns the factor fades out (Llama 3.1's model card and code, 2024).
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
) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): as Llama 3's, faded over channel numbers; scores grow sharper too."""
    pairs = len(frequencies)

    def channel(turns: float) -> float:
        """The pair of channels that turns so often in the old context."""
        return pairs * math.log(original_max_position_embeddings / (turns * 2 * math.pi)) / math.log(theta)

    low, high = max(math.floor(channel(beta_fast)), 0), min(math.ceil(channel(beta_slow)), 2 * pairs - 1)
    high = high + 0.001 if high == low else high  # no division by nothing
    slow = ((torch.arange(pairs, device=frequencies.device) - low) / (high - low)).clamp(0, 1)
    gain = (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0) if attention_factor is None else attention_factor
    return frequencies * (1 - slow + slow / factor), gain


ROPE_SCALING: dict[str, Callable[..., tuple[Tensor, float]]] = {
    "linear": linear_rope,
    "llama3": llama3_rope,
    "yarn": yarn_rope,
}


def rope_problem(scaling: dict) -> str | None:
    """Why a `rope_scaling` can't be built, or None."""
    kind, options = scaling.get("rope_type"), {key: value for key, value in scaling.items() if key != "rope_type"}
    if kind not in ROPE_SCALING:
        return f"has the rope_type {kind!r}, not one of {', '.join(ROPE_SCALING)}"
    known = list(inspect.signature(ROPE_SCALING[kind]).parameters.values())[2:]
    missing = [p.name for p in known if p.default is p.empty and p.name not in options]
    if unknown := options.keys() - {p.name for p in known}:
        return f"of type {kind} does not know {', '.join(sorted(unknown))}"
    if missing:
        return f"of type {kind} lacks {', '.join(missing)}"
    wrong = [key for key, x in options.items() if isinstance(x, bool) or not isinstance(x, int | float) or x <= 0]
    return f"of type {kind} needs a positive {wrong[0]}" if wrong else None


# ---- initialisation -------------------------------------------------------------------------------------------------


@torch.no_grad()
def init_weights(
    model: nn.Module,
    scheme: str,
    std: float,
    residual: Iterable[str],
    depth: int,
    generator: torch.Generator,
    own: dict[str, float],
) -> None:
    """Fill every parameter of a fresh model; the one place where weights begin.

    scheme    normal  matrices ~ N(0, std^2) (GPT-2, Radford et al. 2019)
              zero    as normal, but the residual linears and an untied head are 0: blocks begin as the identity
                      (Zhang et al. 2019, arXiv:1901.09321; the head: Yang et al. 2022, arXiv:2203.03466)
              xavier  matrices ~ N(0, 2 / (fan_in + fan_out)) (Glorot and Bengio 2010)
              he      matrices ~ N(0, 2 / fan_in) (He et al. 2015, arXiv:1502.01852)
    residual  names of the matrices that write into the residual stream: scaled by 1 / sqrt(2 * depth), so that the
              stream's variance does not grow with depth (GPT-2; each block writes twice)
    own       spreads that the family has instead in "normal" and "zero", by the matrices' names
    Embeddings are N(0, std^2) in every scheme, norms begin as 1, biases as 0.
    """
    for path, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            name = path.rsplit(".", 1)[-1] if kind in ("weight", "bias") else kind
            if kind == "bias":
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(getattr(module, "neutral", 1.0))
            elif scheme == "zero" and (name in residual or name == "lm_head"):
                parameter.zero_()
            else:
                fan_out, fan_in = parameter.shape[-2:]
                spread = {"xavier": math.sqrt(2 / (fan_in + fan_out)), "he": math.sqrt(2 / fan_in)}
                sigma = std if isinstance(module, nn.Embedding) else spread.get(scheme, std)
                if name in own and scheme not in spread:
                    sigma = own[name]
                elif name in residual:
                    sigma /= math.sqrt(2 * depth)
                parameter.normal_(0.0, sigma, generator=generator)
