"""Compare predictions with what is right: accuracy, F1, correlations, and F1 of named entities."""

import math
from collections.abc import Iterator, Sequence

import numpy as np


def accuracy(targets: np.ndarray, found: np.ndarray) -> float:
    """Return the share of predictions that are right; of rows of several labels, those in which all are."""
    same = targets == found
    return float((same.all(-1) if same.ndim > 1 else same).mean())


def f1_of(targets: np.ndarray, found: np.ndarray) -> float:
    """Return 2 x hits / (targets + predictions) of booleans; 0 if there are neither."""
    both = int(targets.sum() + found.sum())
    return 2 * int((targets & found).sum()) / both if both else 0.0


def macro_f1(targets: np.ndarray, found: np.ndarray) -> float:
    """Return the mean F1 of the classes that occur in either (van Rijsbergen 1979)."""
    classes = int(max(targets.max(), found.max())) + 1
    hits, true, made = (np.bincount(one, minlength=classes) for one in (targets[targets == found], targets, found))
    both = true + made
    return float((2 * hits[both > 0] / both[both > 0]).mean())


def f1(targets: np.ndarray, found: np.ndarray) -> float:
    """Return the F1 of class 1 if there are the classes 0 and 1 alone, else `macro_f1`."""
    if set(np.union1d(targets, found)) <= {0, 1}:
        return f1_of(targets == 1, found == 1)
    return macro_f1(targets, found)


def matthews(targets: np.ndarray, found: np.ndarray) -> float:
    """Return the correlation of classes and labels (Matthews 1975; for many classes: Gorodkin 2004); 0 if undefined."""
    classes = int(max(targets.max(), found.max())) + 1
    true, made = (np.bincount(one, minlength=classes).astype(float) for one in (targets, found))
    total, right = float(len(targets)), float((targets == found).sum())
    spread = (total**2 - (true**2).sum()) * (total**2 - (made**2).sum())
    return float((right * total - true @ made) / math.sqrt(spread)) if spread else 0.0


def pearson(targets: np.ndarray, found: np.ndarray) -> float:
    """Return the linear correlation of two series; 0 if one of them is constant."""
    a, b = targets - targets.mean(), found - found.mean()
    spread = math.sqrt(float((a * a).sum()) * float((b * b).sum()))
    return float((a * b).sum()) / spread if spread else 0.0


def spearman(targets: np.ndarray, found: np.ndarray) -> float:
    """Return the correlation of the ranks of two series (Spearman 1904); equal values share their mean rank."""
    return pearson(mean_ranks(targets), mean_ranks(found))


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value, from 0 on; equal values have the mean of theirs.

    >>> mean_ranks(np.array([3.0, 1.0, 3.0])).tolist()
    [1.5, 0.0, 1.5]
    """
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes + 1) / 2)[group]


# ---- named entities -------------------------------------------------------------------------------------------------


def marks_entities(labels: Sequence[str]) -> bool:
    """Return whether tags mark the parts of entities: O, B-PER, I-PER, E-PER, S-PER (Ramshaw and Marcus 1995)."""
    return "O" in labels and all(label == "O" or label[:2] in ("B-", "I-", "E-", "S-") for label in labels)


def entities(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Yield (kind, first, last) of the entities in the tags of a sentence, as conlleval (Tjong Kim Sang 2000) has them.

    >>> list(entities(["B-PER", "I-PER", "O", "I-LOC"]))
    [('PER', 0, 1), ('LOC', 3, 3)]
    """
    first, kind, before = 0, "", ("O", "")  # of the entity that is open, and of the tag before
    for i, tag in enumerate([*tags, "O"]):
        place, _, name = tag.partition("-")
        goes_on = place in ("I", "E") and before[0] in ("B", "I") and name == before[1]
        if kind and not goes_on:
            yield kind, first, i - 1
            kind = ""
        if place != "O" and not goes_on:
            first, kind = i, name
        before = (place, name)


def entity_f1(targets: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> float:
    """Return the F1 of entities, which are right if their kind and both ends are."""
    ours = {(i, *one) for i, tags in enumerate(found) for one in entities(tags)}
    theirs = {(i, *one) for i, tags in enumerate(targets) for one in entities(tags)}
    both = len(ours) + len(theirs)
    return 2 * len(ours & theirs) / both if both else 0.0
