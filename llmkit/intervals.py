"""Say how sure a figure is: standard errors, intervals, and whether two models differ.

All resampling is seeded, so that the same answers give the same figures.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

Z = NormalDist().inv_cdf(0.975)  # of a 95 % interval
RESAMPLES = 1000
SEED = 1234


def mean_error(values: Sequence[float]) -> float:
    """Return the standard error of a mean, from the sample's standard deviation; NaN for a single value.

    >>> round(mean_error([0, 1, 1, 1]), 4)
    0.25
    """
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def wilson(share: float, number: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of so many answers (Wilson 1927). Unlike share +- 1.96 errors it stays in
    [0, 1], and is wider than nothing if all answers are right.

    >>> [round(edge, 3) for edge in wilson(1.0, 10)]
    [0.722, 1.0]
    """
    weight = Z**2 / number
    middle = (share + weight / 2) / (1 + weight)
    half = Z / (1 + weight) * math.sqrt(share * (1 - share) / number + weight / (4 * number))
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of a mean: Wilson's if all values are 0 or 1, else by its standard error."""
    mean = float(np.mean(values))
    if all(value in (0, 1) for value in values):
        return wilson(mean, len(values))
    error = mean_error(values)
    return mean - Z * error, mean + Z * error


def ratio_error(sums: np.ndarray, counts: np.ndarray) -> float:
    """Return the standard error of sum(sums) / sum(counts), where each pair is of an independent unit, as a document.

    It is that of a ratio estimator (Cochran 1977, Sampling Techniques, 6.4); NaN for a single unit.

    >>> ratio_error(np.array([2.0, 2.0, 4.0]), np.array([1, 1, 2]))
    0.0
    """
    units = len(sums)
    if units < 2:
        return math.nan
    rest = sums - counts * (sums.sum() / counts.sum())
    return float(math.sqrt(units / (units - 1) * (rest**2).sum()) / counts.sum())


def bootstrap(
    items: Sequence[Any], statistic: Callable[[Sequence[Any]], float], resamples: int = RESAMPLES
) -> tuple[float, tuple[float, float]]:
    """Return the standard error and the 95 % interval of a statistic of all items, by drawing them again with
    replacement (Efron 1979).
    """
    if len(items) < 2:
        return math.nan, (math.nan, math.nan)
    draw = np.random.default_rng(SEED)
    found = []
    for _ in range(resamples):
        drawn = draw.integers(len(items), size=len(items))
        found.append(statistic([items[i] for i in drawn]))
    finite = [value for value in found if math.isfinite(value)]
    if len(finite) < 2:
        return math.nan, (math.nan, math.nan)
    low, high = np.quantile(finite, [0.025, 0.975])
    return float(np.std(finite, ddof=1)), (float(low), float(high))


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Compare the scores of two models on the same questions.

    Return the mean difference, its standard error and 95 % interval, and in words whether there is one.

    >>> paired_difference([1, 1, 1, 1], [1, 1, 1, 1])["verdict"]
    'no difference'
    """
    apart = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    mean, error = float(apart.mean()), mean_error(apart)
    return describe(mean, error, (mean - Z * error, mean + Z * error), len(apart))


def bootstrap_difference(
    ours: Sequence[Any], theirs: Sequence[Any], statistic: Callable[[Sequence[Any]], float], resamples: int = RESAMPLES
) -> dict[str, Any]:
    """Compare a statistic of two models' answers to the same questions, as `paired_difference` compares means."""

    def apart(pairs: Sequence[Any]) -> float:
        return statistic([one for one, _ in pairs]) - statistic([other for _, other in pairs])

    pairs = list(zip(ours, theirs, strict=True))
    error, interval = bootstrap(pairs, apart, resamples)
    return describe(apart(pairs), error, interval, len(pairs))


def describe(difference: float, error: float, interval: tuple[float, float], number: int) -> dict[str, Any]:
    """Return a difference as a dictionary, with a verdict in words."""
    low, high = interval
    if difference == 0 and not error > 0:
        verdict = "no difference"
    elif low > 0 or high < 0:
        verdict = "higher" if difference > 0 else "lower"
    else:
        verdict = "no clear difference"
    return {"difference": difference, "stderr": error, "interval": [low, high], "n": number, "verdict": verdict}


# ---- fairness -------------------------------------------------------------------------------------------------------


def fairness(groups: Sequence[str], right: Sequence[int], chosen: Sequence[int], targets: Sequence[int]) -> dict:
    """Return how a model's choices differ between groups of records.

    accuracy_by_group       share of right answers in each group
    demographic_parity      largest difference between groups in how often a choice is made (Dwork et al. 2012)
    equalized_odds          the same among the records for which a choice is right, or is wrong (Hardt et al. 2016,
                            arXiv:1610.02413)
    bias_amplification      how much more often than in the labels a choice is made for the groups in which it is
                            already frequent, summed over these and divided by the number of choices (Zhao et al. 2017,
                            arXiv:1707.09457)
    """
    groups, right, chosen, targets = map(np.asarray, (groups, right, chosen, targets))
    names, choices = sorted(set(groups.tolist())), sorted({*chosen.tolist(), *targets.tolist()})

    def largest_gap(mask: np.ndarray, choice: int) -> float:
        rates = [
            np.mean(chosen[mask & (groups == name)] == choice) for name in names if (mask & (groups == name)).any()
        ]
        return float(max(rates) - min(rates)) if len(rates) > 1 else 0.0

    everyone = np.ones(len(groups), dtype=bool)
    odds = [largest_gap(targets == one, choice) for choice in choices for one in choices]
    amplified = []
    for choice in choices:
        labelled, predicted = targets == choice, chosen == choice
        if not labelled.any() or not predicted.any():
            continue
        for name in names:
            before, after = np.mean(groups[labelled] == name), np.mean(groups[predicted] == name)
            if before > 1 / len(names):
                amplified.append(after - before)
    return {
        "accuracy_by_group": {name: float(np.mean(right[groups == name])) for name in names},
        "demographic_parity": max(largest_gap(everyone, choice) for choice in choices),
        "equalized_odds": max(odds),
        "bias_amplification": sum(amplified) / len(choices),
    }
