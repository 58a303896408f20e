"""Put a head for labels on a model, in the place of its head for tokens: for a class, a number, or tags of tokens.

Names and values are those of transformers' ...ForSequenceClassification and ...ForTokenClassification.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.errors import ModelError
from llmkit.models.family import Config, Family
from llmkit.models.layers import swap_class
from llmkit.types import IGNORE_INDEX

Pooling = Literal["cls", "last", "mean"]
POOLINGS = {"causal": ("last", "mean"), "masked": ("cls", "mean")}  # by kind of model; the first is transformers'
SEQUENCE, TOKEN = "ForSequenceClassification", "ForTokenClassification"  # ends of the names of architectures
PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")


@dataclass(frozen=True)
class HeadConfig:
    """Hold what a head predicts, and from what.

    kind         classify: one or several labels of a text; regress: a number; tag: a label of each token
    labels       names in the order of the outputs; of regress a single one
    pooling      of which hidden state: of the first token, of the last one, or the mean of all; tag has none
    multi_label  whether each label is there or not, independently of the others
    dropout      on the pooled state while training
    """

    kind: Literal["classify", "regress", "tag"]
    labels: tuple[str, ...]
    pooling: Pooling | None = None
    multi_label: bool = False
    dropout: float = 0.1


# ---- the model ------------------------------------------------------------------------------------------------------


class LabelHead:
    """Predict labels from the hidden states of a model: a mixin, see `add_head`."""

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        reduction: str = "sum",
        lengths: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the outputs (B, L), of tags (B, T, L), in fp32; with labels the losses, see `label_losses`.

        lengths         (B,), tokens of each row without its padding, which is on the right; None: there is none
        token_type_ids  (B, T), for an encoder: 1 for the tokens of a second text
        """
        hidden = hidden_states(self, input_ids, lengths, token_type_ids)
        if self.head.kind != "tag":
            hidden = pool(hidden, self.head.pooling, lengths)
            if self.pooler is not None:
                hidden = torch.tanh(self.pooler(hidden))
        hidden = F.dropout(hidden, self.head.dropout, self.training)
        outputs = self.get_submodule(self.head_names[-1])(hidden).float()
        if labels is None:
            return outputs
        losses = label_losses(self.head, outputs, labels)
        return losses.sum() if reduction == "sum" else losses

    @property
    def pooler(self) -> nn.Linear | None:
        """Return the linear between the first token's state and the head, None if the family has none."""
        return self.get_submodule(self.head_names[0]) if len(self.head_names) > 1 else None


def hidden_states(
    model: nn.Module, input_ids: Tensor, lengths: Tensor | None = None, token_type_ids: Tensor | None = None
) -> Tensor:
    """Return the hidden states (B, T, hidden) of the last block, normed; of an encoder with a decoder, the encoder's.

    lengths, token_type_ids  see `LabelHead.forward`
    """
    if model.config.kind == "causal":  # no token sees the padding after it
        return model.encode(input_ids)
    types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
    if lengths is None:
        return model.encode(input_ids, **types)
    is_pad = torch.arange(input_ids.shape[1], device=input_ids.device) >= lengths[:, None]
    return model.encode(input_ids, segments=-is_pad.long(), **types)


def pool(hidden: Tensor, pooling: Pooling, lengths: Tensor | None) -> Tensor:
    """Return one state (B, hidden) for each row of hidden states (B, T, hidden)."""
    if pooling == "cls":
        return hidden[:, 0]
    if lengths is None:
        return hidden[:, -1] if pooling == "last" else hidden.mean(1)
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
    is_token = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
    return (hidden * is_token[..., None]).sum(1) / lengths[:, None]


def label_losses(head: HeadConfig, outputs: Tensor, labels: Tensor) -> Tensor:
    """Return fp32 losses in the shape of the labels, 0 where there is no target.

    classify, tag  cross-entropy; labels (B,) or (B, T), or IGNORE_INDEX
    multi_label    binary cross-entropy of each label; labels (B, L), 0 or 1, or IGNORE_INDEX
    regress        squared error; labels (B,), or NaN
    """
    if head.kind == "regress":
        is_target = ~labels.isnan()
        return torch.where(is_target, outputs[:, 0] - labels.float().nan_to_num(), 0.0).square()
    if head.multi_label:
        is_target = labels != IGNORE_INDEX
        losses = F.binary_cross_entropy_with_logits(outputs, labels.clamp(min=0).float(), reduction="none")
        return torch.where(is_target, losses, 0.0)
    losses = F.cross_entropy(outputs.flatten(0, -2), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return losses.view(labels.shape)


def add_head(model: nn.Module, family: Family, head: HeadConfig) -> None:
    """Replace the head for tokens of a built model by one for labels; its weights are not initialised.

    A pooling that transformers does not have for this family gives the head another name, so that it does not open
    such a folder as if it had its own pooling.
    """
    for name in family.token_heads:
        setattr(model, name, None)
    size, names = model.config.hidden_size, []
    name, has_bias = family.tag_head if head.kind == "tag" else family.text_head
    if head.kind != "tag" and head.pooling != POOLINGS[model.config.kind][0]:
        name = f"{head.pooling}_{name}"
    elif head.kind != "tag" and family.pooler:
        parent, child, last = family.pooler.rsplit(".", 2)
        model.get_submodule(parent).add_module(child, nn.ModuleDict({last: nn.Linear(size, size)}))
        names.append(family.pooler)
    model.add_module(name, nn.Linear(size, len(head.labels), bias=has_bias))
    model.head, model.head_names = head, [*names, name]
    swap_class(model, LabelHead)


def train_head(model: nn.Module) -> None:
    """Train the head for labels, if the model has one, in fp32: it is new, whatever else of the model is frozen."""
    for parameter in head_parameters(model).values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a model's head for labels by their full names; of a model without one, none."""
    names = getattr(model, "head_names", [])
    return {f"{name}.{key}": p for name in names for key, p in model.get_submodule(name).named_parameters()}


# ---- config.json ----------------------------------------------------------------------------------------------------


def head_fields(config: Config, family: Family, head: HeadConfig) -> dict[str, Any]:
    """Return the fields of a config.json that describe a head."""
    name = family.architecture
    for end in ("LMHeadModel", "ForCausalLM", "ForMaskedLM"):
        name = name.removesuffix(end)
    fields: dict[str, Any] = {
        "architectures": [name + (TOKEN if head.kind == "tag" else SEQUENCE)],
        "id2label": {str(i): label for i, label in enumerate(head.labels)},
        "label2id": {label: i for i, label in enumerate(head.labels)},
        "classifier_dropout": head.dropout,
    }
    if head.kind != "tag":
        fields["problem_type"] = PROBLEMS[2 if head.kind == "regress" else int(head.multi_label)]
        if head.pooling != POOLINGS[config.kind][0]:
            fields["classifier_pooling"] = head.pooling
    return fields


def parse_head(hf: dict[str, Any], kind: str) -> HeadConfig | None:
    """Return the head that a config.json describes, None if it has none for labels.

    kind  of the model: causal or masked. Raises ModelError for labels that are not numbered from 0 on
    """
    names = hf.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    if not name.endswith((SEQUENCE, TOKEN)) or kind not in POOLINGS:
        return None
    labels = hf.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # as transformers assumes
    expected = "names of labels by their numbers, 0 to n - 1"
    if not isinstance(labels, dict) or set(labels) != {str(i) for i in range(len(labels))}:
        raise ModelError("config.json: id2label can't be read", got=str(labels)[:100], expected=expected)
    ordered = tuple(labels[str(i)] for i in range(len(labels)))
    if not all(isinstance(label, str) for label in ordered) or len(set(ordered)) < len(ordered):
        raise ModelError("config.json: id2label has names that are no texts, or that repeat", got=str(labels)[:100])
    dropout = hf.get("classifier_dropout")
    dropout = float(dropout) if isinstance(dropout, int | float) and 0 <= dropout < 1 else HeadConfig.dropout
    if name.endswith(TOKEN):
        return HeadConfig("tag", ordered, dropout=dropout)
    problem, pooling = hf.get("problem_type"), hf.get("classifier_pooling") or POOLINGS[kind][0]
    if problem not in (None, *PROBLEMS) or pooling not in POOLINGS[kind]:
        what, got = "the head of this model is not supported", f"{problem}, pooling {pooling}"
        raise ModelError(what, got=got, expected=f"{' or '.join(PROBLEMS)}, {' or '.join(POOLINGS[kind])}")
    if problem == PROBLEMS[2] and len(ordered) > 1:
        raise ModelError("a head for several numbers is not supported", got=f"{len(ordered)} outputs", expected="1")
    is_number = problem == PROBLEMS[2] or (problem is None and len(ordered) == 1)
    return HeadConfig("regress" if is_number else "classify", ordered, pooling, problem == PROBLEMS[1], dropout)
