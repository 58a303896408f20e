"""What a step minimises, by name; each is made from a tokenizer, a seed and its options: see `lm.Objective`."""

from collections.abc import Callable

from llmkit.objectives.lm import Objective, lm, mlm, seq2seq, spans

OBJECTIVES: dict[str, Callable[..., Objective]] = {"lm": lm, "mlm": mlm, "span_corruption": spans, "seq2seq": seq2seq}
FITTING = {  # (a model's kind, data.kind) -> the objective that it has there
    ("causal", "corpus"): "lm",
    ("causal", "sft"): "lm",
    ("masked", "corpus"): "mlm",
    ("seq2seq", "corpus"): "span_corruption",
    ("seq2seq", "sft"): "seq2seq",
}
