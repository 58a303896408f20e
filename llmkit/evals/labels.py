"""Measure how often a model with a head for labels is right."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from llmkit import scores
from llmkit.config.defaults import MAX_BAD_FRACTION
from llmkit.config.records import LabelledData
from llmkit.data.labelled import open_labelled_rows, pad_batch
from llmkit.data.rows import count_up, read_report
from llmkit.errors import DataError, UserError
from llmkit.evals.predict import Classifier, by_length, load_classifier
from llmkit.intervals import SEED, fairness, mean_error, mean_interval
from llmkit.models.heads import HeadConfig
from llmkit.objectives import heads
from llmkit.parallel.device import autocast
from llmkit.readers.tally import Tally
from llmkit.records.labelled import Encoded, Found, Labels, encode_examples, read_examples, read_source
from llmkit.storage.locate import Located
from llmkit.storage.report import data_name
from llmkit.storage.run import read_about
from llmkit.types import Batch

RESAMPLES = 200  # of examples, for intervals
MOST_GROUPS = 100  # that predictions are compared for
SHOWN_LABELS = 30  # of which precision and recall are shown


def measure_labels(
    located: Located,
    *,
    data: str | None = None,
    columns: dict[str, str] | None = None,
    group_by: str | None = None,
    precision: str = "auto",
    max_bad_fraction: float = MAX_BAD_FRACTION,
) -> dict[str, Any]:
    """Measure how well a model with a head predicts the labels of a file, or of the val split of its run.

    columns   our name of a field -> the file's; None: those of the run
    group_by  a field of the records of `data`: how predictions of a label differ between its values, see `fairness`
    Returns loss, each score with a standard error and a 95 % interval, and of up to SHOWN_LABELS classes precision,
    recall and F1.
    """
    one, tally, found, groups = load_classifier(located, precision), Tally(), Found(), None
    if group_by is not None and (data is None or one.head.kind != "classify" or one.head.multi_label):
        what = "--group-by compares predictions of one label a text"
        raise UserError(what, fix="name records with --data, and a model with the objective classify")
    if data is None:
        if located.run_dir is None:
            raise DataError("there is nothing to measure on", fix="name a file with --data")
        what = one.data.get("val_path") or f"the val split of {data_name(one.data)}"
        batches = val_batches(one, located.run_dir)
    else:
        examples, labels = read_file(one, data, columns, tally, found)
        tally.check(max_bad_fraction, fix="repair the file, or raise --max-bad-fraction")
        if not examples:
            raise DataError("there is no record with a label", at=data, got=f"{found.unlabelled} without one")
        what = f"{data}, {len(examples):,} examples"
        order = list(by_length([len(example.tokens) for example in examples]))
        batches = sorted_batches(one, examples, labels, order)
        if group_by is not None:
            groups = groups_of([examples[i] for chosen in order for i in chosen], group_by, data)
    kept: list[np.ndarray] = []
    with autocast(one.device, one.precision):
        options = {"device": one.device, "micro_batch_size": 2**30, "keep": lambda *arrays: kept.extend(arrays)}
        result = heads.evaluate(
            one.model, tqdm(batches, desc="measure", unit="batch", disable=None, leave=False), **options
        )
    losses, rows = kept
    cut = {"texts_cut": f"{found.truncated} of them, to {one.seq_len} tokens"} if found.truncated else {}
    return {
        "model": str(located.folder),
        "data": what,
        **({"bad_records": tally.describe()} if tally.bad else {}),
        **({"without_label": found.unlabelled} if found.unlabelled else {}),
        **cut,
        "loss": result["val_loss"],
        "loss_stderr": mean_error(losses),
        **with_intervals(one.head, rows),
        ("words" if one.head.kind == "tag" else "examples"): len(rows),
        "precision": one.precision,
        **({} if one.head.kind == "regress" else {"labels": by_label(one.head, rows)}),
        **(compare_groups(groups, rows) if groups else {}),
    }


def groups_of(examples: list[Encoded], field: str, data: str) -> list[str]:
    """Return the group of each example, the value of a field of its record."""
    lacking = next((one for one in examples if one.record.get(field) is None), None)
    if lacking is not None:
        raise DataError(f"a record has no field {field}", at=data, got=", ".join(map(str, lacking.record)))
    groups = [str(one.record[field]) for one in examples]
    if not 1 < len(set(groups)) <= MOST_GROUPS:
        got, expected = f"{len(set(groups))} values", f"2 to {MOST_GROUPS}"
        raise DataError(
            f"the field {field} does not divide the records into groups", at=data, got=got, expected=expected
        )
    return groups


def compare_groups(groups: list[str], rows: np.ndarray) -> dict[str, Any]:
    """Return `intervals.fairness` of rows (target, prediction), with the number of examples in each group."""
    targets, found = rows.astype(np.int64).T
    about = fairness(groups, (targets == found).astype(int).tolist(), found.tolist(), targets.tolist())
    return about | {"examples_by_group": dict(sorted(Counter(groups).items()))}


def val_batches(one: Classifier, run_dir: Path) -> Iterable[Batch]:
    """Return the batches of the val split that a run was measured on."""
    folder = run_dir / "data" / read_about(run_dir).get("data_fingerprint")
    types = one.model.config.kind == "masked" and read_report(folder)["pairs"]
    return open_labelled_rows(folder, "val", 16, types=types, seed=0).in_order()


def read_file(
    one: Classifier, path: str, columns: dict[str, str] | None, tally: Tally, found: Found
) -> tuple[list[Encoded], Labels]:
    """Return the examples of files, their labels numbered as the model's outputs are."""
    options = {key: one.data.get(key) for key in ("header", "label_separator")}
    options |= {"columns": (one.data.get("columns") or {}) if columns is None else columns, "seq_len": one.seq_len}
    names = None if one.head.kind == "regress" else list(one.head.labels)
    data = LabelledData(kind="labelled", path=path, labels=names, **options)
    labels = Labels(one.head.kind, names, one.head.multi_label)
    examples: list[Encoded] = []
    for name, records in read_source(data.all_sources()[0], one.head.kind, data.header):
        good = read_examples(name, records, data, labels, tally, found, lambda bad: tally.add(0, bad))
        examples += encode_examples(good, data, one.tokenizer, one.head.kind, found)
    return examples, labels


def sorted_batches(one: Classifier, examples: list[Encoded], labels: Labels, order: list[list[int]]) -> Iterator[Batch]:
    """Yield examples as batches, whose numbers `order` has."""
    array = None if one.head.kind == "tag" else labels.as_array([example.label for example in examples])
    types = one.model.config.kind == "masked"
    for chosen in order:
        right = [examples[i].label for i in chosen] if array is None else array[chosen]
        yield pad_batch(
            [examples[i].tokens for i in chosen], right, one.tokenizer.pad_id, types=types, most=one.seq_len
        )


def with_intervals(head: HeadConfig, rows: np.ndarray) -> dict[str, Any]:
    """Return the scores of rows, see `heads.score`, each with its standard error and 95 % interval.

    Examples are drawn again, of tags sentences (Efron 1979); the interval of a share of right ones is Wilson's.
    """
    ends = np.flatnonzero(rows[:, 2]) + 1 if head.kind == "tag" else np.arange(1, len(rows) + 1)
    sizes, starts = np.diff(ends, prepend=0), np.append(0, ends[:-1])
    draw, drawn_scores = np.random.default_rng(SEED), []
    for _ in range(RESAMPLES if len(ends) > 1 else 0):
        chosen = draw.integers(len(ends), size=len(ends))
        places = np.repeat(starts[chosen], sizes[chosen]) + count_up(sizes[chosen])
        drawn_scores.append(heads.score(head, rows[places]))
    found: dict[str, Any] = {}
    for name, value in heads.score(head, rows).items():
        values = [one[name] for one in drawn_scores]
        error, interval = math.nan, (math.nan, math.nan)
        if values:
            error, interval = float(np.std(values, ddof=1)), np.quantile(values, [0.025, 0.975]).tolist()
        if name == "accuracy" and head.kind != "tag":
            half = rows.shape[1] // 2
            right = (rows[:, :half] == rows[:, half:]).all(1).astype(float)
            error, interval = mean_error(right), mean_interval(right)
        found |= {name: value, f"{name}_stderr": error, f"{name}_interval": list(interval)}
    return found


def by_label(head: HeadConfig, rows: np.ndarray) -> list[dict[str, Any]]:
    """Return precision, recall and F1 of each label, the first SHOWN_LABELS of them."""
    rows, table = rows.astype(np.int64), []
    for i, name in enumerate(head.labels[:SHOWN_LABELS]):
        if head.multi_label:
            targets, found = rows[:, i] == 1, rows[:, len(head.labels) + i] == 1
        else:
            targets, found = rows[:, 0] == i, rows[:, 1] == i
        hits = int((targets & found).sum())
        precision, recall = hits / max(1, int(found.sum())), hits / max(1, int(targets.sum()))
        row = {"label": name, "precision": precision, "recall": recall, "f1": scores.f1_of(targets, found)}
        table.append(row | {"words" if head.kind == "tag" else "examples": int(targets.sum())})
    return table
