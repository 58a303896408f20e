"""Objectives, by name. A new one is a function that builds it, and a line here with the models and data it fits."""

from llmkit.objectives import distill, grpo, heads, kto, lm, preference, reward
from llmkit.objectives.objective import ObjectiveType

LABELLED, PREFERENCES = (("causal", "labelled"), ("masked", "labelled")), (("causal", "preference"),)
OBJECTIVES: dict[str, ObjectiveType] = {
    "lm": ObjectiveType(lm.lm, (("causal", "corpus"), ("causal", "sft"))),
    "mlm": ObjectiveType(lm.mlm, (("masked", "corpus"),)),
    "span_corruption": ObjectiveType(lm.spans, (("seq2seq", "corpus"),), lm.corrupted_lengths),
    "classify": ObjectiveType(heads.classify, LABELLED),
    "regress": ObjectiveType(heads.regress, LABELLED),
    "tag": ObjectiveType(heads.tag, LABELLED),
    "distill": ObjectiveType(distill.distill, (("causal", "corpus"), ("causal", "sft"))),
    "dpo": ObjectiveType(preference.dpo, PREFERENCES),
    "kto": ObjectiveType(kto.kto, PREFERENCES),
    "reward": ObjectiveType(reward.reward, PREFERENCES),
    "grpo": ObjectiveType(grpo.grpo, (("causal", "prompts"),), grpo.row_lengths, grpo.rows_of_group),
    "seq2seq": ObjectiveType(lm.seq2seq, (("seq2seq", "sft"),), lambda seq_len: (seq_len, seq_len)),
}
HEADS = tuple(name for name, one in OBJECTIVES.items() if one.fits == LABELLED)  # that predict labels
DATA_OF = {name: one.fits[-1][1] for name, one in OBJECTIVES.items()}  # the kind of data that an objective learns from


def fitting_objectives(kind: str, data_kind: str) -> list[str]:
    """Return the names of the objectives for a kind of model and of data; the first one is the default."""
    return [name for name, one in OBJECTIVES.items() if (kind, data_kind) in one.fits]
