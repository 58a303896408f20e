"""Declare the sampling options and their defaults. Nothing here imports torch, so that `llmkit --help` is quick."""

from dataclasses import dataclass

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


DEFAULT_SAMPLING = Sampling()
