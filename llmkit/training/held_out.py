"""Let a fine-tuned model answer held-out prompts, before and after training: do its answers end by themselves?"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from llmkit.data.batches import Batches
from llmkit.data.inspect import format_example, inspect_rows
from llmkit.files import write_atomically
from llmkit.generation.answers import write_tokens
from llmkit.generation.sampling import Sampling
from llmkit.tokenizer.tokenizer import Tokenizer
from llmkit.types import Batch

ANSWERS, SHOWN = 24, 3  # answers that are written, and samples that the report has
MOST_TOKENS = 128  # of an answer; else twice the longest of the references
FILE = "answers.json"  # in the run directory: "before" and "after"


def first_answers(batch: Batch) -> Iterator[tuple[list[int], list[int]]]:
    """Yield prompt and first answer of each example in a batch of rows, as token ids."""
    for number, (inputs, labels) in enumerate(zip(batch.input_ids, batch.labels, strict=True)):
        segments = np.zeros(len(inputs)) if batch.segments is None else batch.segments[number]
        is_target = batch.is_target[number]
        for segment in np.unique(segments[is_target]):
            places = np.flatnonzero(segments == segment)
            targets = places[is_target[places]]
            first = targets[0]
            gaps = np.flatnonzero(np.diff(targets) > 1)  # a further turn
            last = targets[gaps[0]] if len(gaps) else targets[-1]
            yield inputs[places[0] : first + 1].tolist(), labels[first : last + 1].tolist()


def measure_answers(run: Any, model: nn.Module, step: int, folder: Path | None) -> dict[str, float]:
    """Write answers to held-out prompts greedily, keep them in the run directory, and return the share that ends.

    run  a PreparedRun of prompts and answers, whose model is a decoder
    """
    tokenizer, longest = run.data.tokenizer, model.config.max_position_embeddings
    batches: Batches = run.batches("val", run.micro_batch_size)
    pairs: list[tuple[list[int], list[int]]] = []
    for batch in batches.in_order(ANSWERS):
        pairs += first_answers(batch)
        if len(pairs) >= ANSWERS:
            break
    room = min(MOST_TOKENS, 2 * max((len(answer) for _, answer in pairs[:ANSWERS]), default=0))
    pairs = [(prompt, answer) for prompt, answer in pairs[:ANSWERS] if len(prompt) + room <= longest]
    if not pairs:  # no prompt leaves room for an answer
        return {}
    prompts, stop = [prompt for prompt, _ in pairs], frozenset(tokenizer.stop_ids)
    options = {"max_new_tokens": room, "sampling": Sampling(temperature=0.0), "stop": stop}
    options["rows"] = run.micro_batch_size
    written = write_tokens(model, prompts, **options)
    ended = sum(bool(answer) and answer[-1] in stop for answer in written) / len(pairs)
    if folder is not None:
        path = folder / FILE
        kept = json.loads(path.read_text(encoding="utf-8")) if step and path.is_file() else {}
        samples = [
            {"prompt": tokenizer.decode(prompt), "reference": tokenizer.decode(answer), "answer": tokenizer.decode(new)}
            for (prompt, answer), new in zip(pairs[:SHOWN], written, strict=False)
        ]
        kept["after" if step else "before"] = {"step": step, "ended": ended, "of": len(pairs), "samples": samples}
        write_atomically(path, json.dumps(kept, ensure_ascii=False))
    return {"answers_ended": ended}


def describe_answers(folder: Path, batches: Batches, tokenizer: Tokenizer) -> list[str]:
    """Return the lines of a report: how many answers end by themselves, samples, and the targets of a training row."""
    path = folder / FILE
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    lines = ["## Answers", ""]
    for when, one in kept.items():
        share, step = f"{one['ended'] * one['of']:.0f} of {one['of']}", one["step"]
        lines.append(f"- {when} (step {step}): {share} held-out answers end by themselves")
    samples = [(when, one["samples"]) for when, one in kept.items()]
    for i in range(len(samples[0][1]) if samples else 0):
        first = samples[0][1][i]
        texts = [("prompt", first["prompt"]), ("reference", first["reference"])]
        texts += [(when, found[i]["answer"]) for when, found in samples if i < len(found)]
        lines += ["", f"### Sample {i + 1}"]
        for name, text in texts:
            lines += ["", f"{name}:", "", *(f"    {line}" for line in text.splitlines() or [""])]
    row = inspect_rows(next(batches.in_order(1)), tokenizer, "causal")[0]
    example = [token for token in row if token.get("example") == row[0].get("example")]
    shown = format_example(example, tokenizer, colour=False)
    lines += ["", "### Targets", "", "A training example; the tokens in [[ ]] are learnt:", ""]
    return [*lines, *(f"    {line}" for line in shown.splitlines()), ""]
