"""Score answers: what each metric makes of one question, and of all of them."""

import math
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmkit import scores
from llmkit.errors import MachineError, UserError, suggest
from llmkit.tasks.likelihood import Score
from llmkit.tasks.prompts import Question
from llmkit.tasks.task import Filter, Metric, Task

Item = Any  # what a metric keeps of a question: a number, or what its aggregation needs


@dataclass
class Answered:
    """Hold a question with what the model made of it: scores of its answers, or a text."""

    question: Question
    scores: list[Score]
    text: str | None = None


# ---- of one question ------------------------------------------------------------------------------------------------


def log_probs(one: Answered) -> np.ndarray:
    """Return how likely each answer is, in nats."""
    return np.array([score.log_prob for score in one.scores])


def lengths(one: Answered, unit: Callable[[str], Any] = str) -> np.ndarray:
    """Return the length of each choice, in characters or in what `unit` makes of it."""
    return np.array([max(1, len(unit(choice))) for choice in one.question.choices])


def chosen(one: Answered) -> int:
    """Return the number of the likeliest choice."""
    return int(log_probs(one).argmax())


def is_right(one: Answered, choice: int) -> float:
    target = one.question.target
    return float(choice in target if isinstance(target, list) else choice == target)


def acc(one: Answered, metric: Metric) -> Item:
    """Score 1 if the likeliest choice is right; without choices, if each token of the answer is the likeliest."""
    return is_right(one, chosen(one)) if one.question.choices else float(one.scores[0].greedy)


def acc_norm(one: Answered, metric: Metric) -> Item:
    """Score 1 if the choice with the highest log-probability per character is right."""
    return is_right(one, int((log_probs(one) / lengths(one)).argmax()))


def acc_bytes(one: Answered, metric: Metric) -> Item:
    """Score 1 if the choice with the highest log-probability per byte is right."""
    return is_right(one, int((log_probs(one) / lengths(one, str.encode)).argmax()))


def exact_match(one: Answered, metric: Metric) -> Item:
    """Score 1 if the text is an answer, or if all tokens of the right choice are the likeliest."""
    target = one.question.target
    if one.text is None:
        right = target if isinstance(target, list) else [target]
        return float(any(one.scores[i].greedy for i in right))
    answers = target if isinstance(target, list) else [target]
    return float(any(simplify(one.text, metric) == simplify(str(answer), metric) for answer in answers))


def simplify(text: str, metric: Metric) -> str:
    """Return a text without what a comparison ignores."""
    for pattern in metric.regexes_to_ignore:
        text = re.sub(pattern, "", text)
    text = text.lower() if metric.ignore_case else text
    without = (string.punctuation if metric.ignore_punctuation else "") + (
        string.digits if metric.ignore_numbers else ""
    )
    return text.translate(str.maketrans("", "", without))


def target_and_choice(one: Answered, metric: Metric | None = None) -> Item:
    """Return the right choice, the first of several, and the likeliest one."""
    target = one.question.target
    return (target[0] if isinstance(target, list) else target), chosen(one)


def brier(one: Answered, metric: Metric) -> Item:
    """Score the squared distance of the choices' probabilities from the right answer (Brier 1950); 0 is best."""
    logits = log_probs(one)
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    probs[target_and_choice(one, metric)[0]] -= 1
    return float((probs**2).sum())


def difference(one: Answered, metric: Metric) -> Item:
    """Return by how many nats the first of two texts is likelier than the second."""
    first, second = log_probs(one)[:2]
    return float(first - second)


def first_is_likelier(one: Answered, metric: Metric) -> Item:
    """Score 1 if the first of two texts is likelier.

    In percent it is the stereotype score of CrowS-Pairs (Nangia et al. 2020, arXiv:2010.00133): 50 would be fair.
    """
    return float(difference(one, metric) > 0)


def log_prob(one: Answered, metric: Metric) -> Item:
    return one.scores[0].log_prob


def per_word(one: Answered, metric: Metric) -> Item:
    return log_prob(one, metric), len(re.split(r"\s+", one.question.answers[0]))


def per_byte(one: Answered, metric: Metric) -> Item:
    return log_prob(one, metric), len(one.question.answers[0].encode())


def text_and_targets(one: Answered, metric: Metric) -> Item:
    target = one.question.target
    return one.text or "", [str(t) for t in target or [""]] if isinstance(target, list) else [str(target)]


def squad_f1(one: Answered, metric: Metric) -> Item:
    """Score the words that a text shares with the answer that fits best (Rajpurkar et al. 2016, arXiv:1606.05250)."""
    text, answers = text_and_targets(one, metric)
    return max(shared_words(text, answer) for answer in answers)


def shared_words(text: str, answer: str) -> float:
    """Return the F1 of the words of two texts, without case, punctuation and articles."""
    ours, theirs = words_of(text), words_of(answer)
    if not ours or not theirs:
        return float(ours == theirs)
    left, same = list(theirs), 0
    for word in ours:
        if word in left:
            left.remove(word)
            same += 1
    return 2 * same / (len(ours) + len(theirs))


def words_of(text: str) -> list[str]:
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


# ---- of all questions -----------------------------------------------------------------------------------------------


def mean(items: Sequence[float]) -> float:
    return float(np.mean(items))


def percentage(items: Sequence[float]) -> float:
    return 100 * mean(items)


def perplexity(items: Sequence[float]) -> float:
    return math.exp(min(-mean(items), 700))


def weighted_perplexity(items: Sequence[tuple[float, int]]) -> float:
    return math.exp(min(-sum(nats for nats, _ in items) / max(1, sum(units for _, units in items)), 700))


def bits_per_byte(items: Sequence[tuple[float, int]]) -> float:
    return -sum(nats for nats, _ in items) / max(1, sum(size for _, size in items)) / math.log(2)


def of_classes(score: Callable[[np.ndarray, np.ndarray], float]) -> Callable[[Sequence[tuple[int, int]]], float]:
    """Return a score of pairs of the right choice and the likeliest one."""
    return lambda items: score(*np.array(items).T)


f1, matthews = of_classes(scores.f1), of_classes(scores.matthews)


def corpus_score(name: str) -> Callable[[Sequence[Item]], float]:
    """Return a score of the sacrebleu library for all texts together."""

    def score(items: Sequence[Item]) -> float:
        sacrebleu = library("sacrebleu")
        texts = [text for text, _ in items]
        most = max(len(answers) for _, answers in items)
        references = [[answers[i] if i < len(answers) else None for _, answers in items] for i in range(most)]
        return float(getattr(sacrebleu, name)(texts, references).score)

    return score


def rouge(kind: str) -> Callable[[Answered, Metric], Item]:
    """Return the F-measure of the rouge-score library, for the answer that fits best."""

    def score(one: Answered, metric: Metric) -> Item:
        scorer = library("rouge_score.rouge_scorer").RougeScorer([kind], use_stemmer=False)
        text, answers = text_and_targets(one, metric)
        return max(scorer.score(answer, text)[kind].fmeasure for answer in answers)

    return score


def library(name: str) -> Any:
    """Import a library of the extra `tasks`."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        what = f"the metric needs the package {name.partition('.')[0].replace('_', '-')}"
        raise MachineError(what, fix="pip install 'llmkit[tasks]'") from None


Scorer = Callable[[Answered, Metric], Item]
CHOICES, SCORED, ROLLING, WRITTEN = (
    {"multiple_choice", "pairs"},
    {"loglikelihood"},
    {"loglikelihood_rolling"},
    {"generate_until"},
)
# name -> (of one question, of all, whether higher is better, output types)
METRICS: dict[str, tuple[Scorer, Callable[[Sequence[Item]], float], bool, set[str]]] = {
    "acc": (acc, mean, True, CHOICES | SCORED),
    "acc_norm": (acc_norm, mean, True, CHOICES),
    "acc_bytes": (acc_bytes, mean, True, CHOICES),
    "exact_match": (exact_match, mean, True, CHOICES | WRITTEN),
    "f1": (target_and_choice, f1, True, CHOICES),
    "mcc": (target_and_choice, matthews, True, CHOICES),
    "brier_score": (brier, mean, False, CHOICES),
    "difference": (difference, mean, True, {"pairs"}),
    "stereotype_score": (first_is_likelier, percentage, False, {"pairs"}),
    "perplexity": (log_prob, perplexity, False, SCORED),
    "word_perplexity": (per_word, weighted_perplexity, False, ROLLING),
    "byte_perplexity": (per_byte, weighted_perplexity, False, ROLLING),
    "bits_per_byte": (per_byte, bits_per_byte, False, ROLLING),
    "squad_f1": (squad_f1, mean, True, WRITTEN),
    "bleu": (text_and_targets, corpus_score("corpus_bleu"), True, WRITTEN),
    "chrf": (text_and_targets, corpus_score("corpus_chrf"), True, WRITTEN),
    "rouge1": (rouge("rouge1"), mean, True, WRITTEN),
    "rouge2": (rouge("rouge2"), mean, True, WRITTEN),
    "rougeL": (rouge("rougeL"), mean, True, WRITTEN),
}


AGGREGATIONS: dict[str, Callable[[Sequence[Item]], float]] = {  # the harness's names
    "mean": mean,
    "nanmean": mean,
    "perplexity": perplexity,
    "weighted_perplexity": weighted_perplexity,
    "bits_per_byte": bits_per_byte,
    "f1": f1,
    "matthews_corrcoef": matthews,
    "brier_score": mean,  # of squared distances
    "bleu": METRICS["bleu"][1],
    "chrf": METRICS["chrf"][1],
}
SLOW = (METRICS["bleu"][1], METRICS["chrf"][1])  # that are resampled less often
SLOW_RESAMPLES = 100


def aggregation_of(metric: Metric | None) -> Callable[[Sequence[Item]], float]:
    """Return how the scores of questions are put together; None: of a score that no metric names."""
    if metric is None or (metric.aggregation is None and metric.name not in METRICS):
        return mean
    if callable(metric.aggregation):
        return metric.aggregation
    if metric.name in METRICS and metric.aggregation in (None, "mean"):
        return METRICS[metric.name][1]
    return AGGREGATIONS[metric.aggregation]


def check_metrics(task: Task) -> list[UserError]:
    """Return an error for each metric that a task names and that does not exist or does not fit."""
    found = []
    for metric in task.metrics:
        if isinstance(metric.aggregation, str) and metric.aggregation not in AGGREGATIONS:
            fix = suggest(metric.aggregation, AGGREGATIONS)
            found.append(UserError(f"{task.task}: no such aggregation: {metric.aggregation}", fix=fix))
        if callable(metric.metric) or task.process_results is not None:
            continue
        if metric.name not in METRICS:
            found.append(UserError(f"{task.task}: no such metric: {metric.name}", fix=suggest(metric.name, METRICS)))
        elif task.output_type not in METRICS[metric.name][3]:
            fitting = ", ".join(name for name, one in METRICS.items() if task.output_type in one[3])
            what = f"{task.task}: {metric.name} does not fit {task.output_type}"
            found.append(UserError(what, expected=fitting))
    return found


# ---- filters of written text ----------------------------------------------------------------------------------------


def apply_filter(one: Filter, text: str) -> str:
    """Return what a filter leaves of a text."""
    for step in one.filter:
        if step.function == "regex":
            matches = re.findall(step.regex_pattern, text)
            match: Any = matches[step.group_select] if matches else step.fallback
            match = next((part for part in match if part), step.fallback) if isinstance(match, tuple) else match
            text = match.strip()
        elif step.function == "remove_whitespace":
            text = text.strip()
        elif step.function in ("lowercase", "uppercase"):
            text = text.lower() if step.function == "lowercase" else text.upper()
    return text
