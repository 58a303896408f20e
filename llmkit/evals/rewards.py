"""Reward answers with a reward model: those of a file, or of the pairs that a run has held out."""

from pathlib import Path
from typing import Any

import numpy as np

from llmkit.config.defaults import MAX_BAD_FRACTION
from llmkit.data.inspect import is_path
from llmkit.data.preferences import open_pairs
from llmkit.data.rows import encode_tokens
from llmkit.errors import DataError
from llmkit.evals.predict import Classifier, load_classifier, run_by_length
from llmkit.intervals import mean_error, mean_interval
from llmkit.parallel.device import autocast
from llmkit.readers.listing import check_file
from llmkit.readers.records import read_records
from llmkit.readers.tally import Tally
from llmkit.records.encode import Found, encode_records
from llmkit.records.preferences import CHOSEN, REJECTED
from llmkit.storage.locate import Located
from llmkit.storage.report import data_name
from llmkit.storage.run import read_about, read_run_config
from llmkit.tokenizer.chat_template import default_template


def is_reward_model(located: Located) -> bool:
    """Return whether a model is of a run that learnt rewards from preferences."""
    config = read_run_config(located.run_dir) if located.run_dir else {}
    return (config.get("objective") or {}).get("name") == "reward"


def reward_all(one: Classifier, sequences: list[np.ndarray]) -> np.ndarray:
    """Return the rewards of sequences of coded tokens, fp32 (N,). The start of one that is too long is left out."""
    most = one.model.config.max_position_embeddings
    with autocast(one.device, one.precision):
        cut = [tokens[-most:] for tokens in sequences]
        outputs = run_by_length(cut, one.tokenizer.pad_id, one.device, one.model, types=False, most=most)
    return np.array([output[0] for output in outputs], np.float32)


def read_answers(one: Classifier, path: str, max_bad_fraction: float) -> tuple[list[np.ndarray], bool, Tally]:
    """Return the answers of a file with their prompts, as coded tokens, and whether two at a time are a pair, the
    better one first.
    """
    file, tally = Path(path).expanduser(), Tally()
    check_file(file)
    first = next((record for _, record, _ in read_records(file) if isinstance(record, dict)), {})
    columns = one.data.get("columns") or {}
    columns = columns if set(columns.values()) & first.keys() else {}
    known = {ours for ours, name in columns.items() if name in first} if columns else first
    are_pairs = any(name in known for name in (*CHOSEN, *REJECTED))
    options = {"columns": columns, "train_on": "last", "preferences": are_pairs}
    found = encode_records(
        read_records(file), path, one.tokenizer, default_template(one.tokenizer), tally, Found(), **options
    )
    sequences = []
    for example in found:
        tokens = example.tokens
        if not are_pairs:
            targets = np.flatnonzero(tokens >= 0)
            sequences += [tokens[: targets[-1] + 1]] if len(targets) else []
            continue
        shared, better, worse = example.parts
        if not (better and worse):
            raise DataError("a record has a verdict about one answer, and no pair", at=path)
        sequences += [tokens[: shared + better], np.concatenate([tokens[:shared], tokens[shared + better :]])]
    tally.check(max_bad_fraction, fix="repair the file, or raise --max-bad-fraction")
    if not sequences:
        raise DataError("there is no answer to reward", at=path)
    return sequences, are_pairs, tally


def measure_rewards(
    located: Located, *, data: str | None, precision: str = "auto", max_bad_fraction: float = MAX_BAD_FRACTION
) -> dict[str, Any]:
    """Measure how often a reward model finds the better answer of pairs: of a file, or of its run's val split."""
    one, tally = load_classifier(located, precision), Tally()
    if data is None:
        folder = located.run_dir / "data" / read_about(located.run_dir)["data_fingerprint"]
        batches, what = open_pairs(folder, "val", 16, seed=0).in_order(), f"the val split of {data_name(one.data)}"
        flat = ((ids, n) for b in batches for ids, n in zip(b.input_ids, b.lengths, strict=True))
        sequences = [ids[:n] for pair in flat for ids, n in zip(*pair, strict=True)]
    else:
        sequences, are_pairs, tally = read_answers(one, data, max_bad_fraction)
        what = data
        if not are_pairs:
            fix = f"llmkit score {located.run_dir or located.folder} {data}"
            raise DataError("there are no pairs of answers to compare", at=data, fix=fix)
    rewards = reward_all(one, sequences).reshape(-1, 2).astype(np.float64)
    margin = rewards[:, 0] - rewards[:, 1]
    right = (margin > 0).astype(float)
    return {
        "model": str(located.folder),
        "data": what,
        **({"bad_records": tally.describe()} if tally.bad else {}),
        "pairs": len(margin),
        "loss": float(np.logaddexp(0, -margin).mean()),
        "accuracy": float(right.mean()),
        "accuracy_stderr": mean_error(right),
        "accuracy_interval": list(mean_interval(right)),
        "margin": float(margin.mean()),
        "chosen_reward": float(rewards[:, 0].mean()),
        "rejected_reward": float(rewards[:, 1].mean()),
        "precision": one.precision,
    }


def reward_texts(located: Located, source: str, precision: str) -> tuple[list[dict[str, Any]], str]:
    """Return the rewards of the answers of a file of records, or of a text as it is; and what of the file is bad."""
    one = load_classifier(located, precision)
    if not is_path(source):
        ids = [*one.tokenizer.encode_prompt(source), one.tokenizer.eos_id]
        return [{"reward": float(reward_all(one, [encode_tokens(ids, np.ones(len(ids), bool))])[0])}], ""
    sequences, are_pairs, tally = read_answers(one, source, MAX_BAD_FRACTION)
    rewards = reward_all(one, sequences).tolist()
    if not are_pairs:
        return [{"answer": i, "reward": value} for i, value in enumerate(rewards, 1)], tally.describe()
    pairs = zip(rewards[::2], rewards[1::2], strict=True)
    rows = [{"pair": i, "chosen": a, "rejected": b, "margin": a - b} for i, (a, b) in enumerate(pairs, 1)]
    return rows, tally.describe()
