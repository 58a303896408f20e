"""Declare the sampling options and their defaults. Nothing here imports torch, so that `llmkit --help` is quick."""

import math
from dataclasses import dataclass

from llmkit.errors import UserError, raise_all

GENERATE_MAX_NEW_TOKENS = 200
CHAT_MAX_NEW_TOKENS = 500


@dataclass(frozen=True)
class Sampling:
    """Hold the options for drawing a token from the model's logits. They apply in this order:

    repetition_penalty  divides positive logits and multiplies negative logits of tokens that were read or drawn before
                        (Keskar et al. 2019, arXiv:1909.05858)
    temperature         divides the logits; 0 always selects the likeliest token
    top_k               keeps only the k likeliest tokens; None or 0 keeps all
    top_p               keeps only the likeliest tokens that together reach this probability
                        (Holtzman et al. 2019, arXiv:1904.09751)
    min_p               keeps only tokens with at least this fraction of the likeliest token's probability
                        (arXiv:2407.01082)
    """

    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Raise UserError if an option is out of its range. NaN is in no range."""
        allowed = {
            "temperature": (0 <= self.temperature < math.inf, "a finite number, at least 0"),
            "top_k": (self.top_k is None or self.top_k >= 0, "at least 0; 0 keeps all tokens"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "repetition_penalty": (0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100"),
        }
        wrong = {name: expected for name, (fits, expected) in allowed.items() if not fits}
        raise_all([UserError(f"{k} is out of range", got=getattr(self, k), expected=v) for k, v in wrong.items()])


DEFAULT_SAMPLING = Sampling()
