"""Read encoded prompts, which `records.prompts.encode_prompts` writes, as batches. The files are

tokens.bin, tokens.idx    the ids of all prompts, and their ends
records.bin, records.idx  the records that they are from, as JSON, and their ends
train.npy, val.npy        the numbers of the prompts of each split
report.json               counts and checksums, written last
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.data.batches import Batches
from llmkit.data.labelled import pad_batch
from llmkit.data.rows import ENCODE_AGAIN, TOKENS, read_report
from llmkit.data.tokens import check_unchanged
from llmkit.types import Batch

FILES = {"tokens": TOKENS, "records": np.dtype("u1")}


def open_prompts(folder: Path, split: str, global_batch_size: int, **order: Any) -> Batches:
    """Return the batches of a split: prompts, padded on the right, and their records; there are no labels.

    Raise DataError if a file changed after it was written.
    """
    report = read_report(folder)
    check_unchanged(folder, report["files"], "the encoded prompts changed", fix=ENCODE_AGAIN.format(folder))
    arrays = {name: np.memmap(folder / f"{name}.bin", dtype, "r") for name, dtype in FILES.items()}
    ends = {name: np.fromfile(folder / f"{name}.idx", "<i8") for name in FILES}
    chosen = np.load(folder / f"{split}.npy", allow_pickle=False)

    def part(name: str, number: int) -> np.ndarray:
        return arrays[name][ends[name][number - 1] if number else 0 : ends[name][number]]

    def rows(indices: list[int]) -> Batch:
        numbers = chosen[indices].tolist()
        records = np.empty(len(numbers), object)
        records[:] = [json.loads(part("records", i).tobytes()) for i in numbers]
        prompts = [part("tokens", i) for i in numbers]
        batch = pad_batch(prompts, np.zeros(len(prompts)), report["eos_id"], types=False, most=report["seq_len"])
        batch.records = records
        return batch

    return Batches(len(chosen), rows, global_batch_size, **order)
