"""List what GPUs can do, by their vendors' data sheets, for planning and for MFU."""

import re
from typing import NamedTuple

from llmkit.errors import UserError, did_you_mean


class Gpu(NamedTuple):
    """Dense bf16 FLOP/s (fp16 on a T4), bytes of memory, bytes per second that it reads, and watts at full load."""

    flops: float
    memory: float
    bandwidth: float
    watts: float


GPUS = {  # by whole words of the device's name; of two that fit, the first one counts
    "B200": Gpu(2250e12, 180e9, 8.0e12, 1000),
    "H200": Gpu(989.4e12, 141e9, 4.8e12, 700),
    "H100 PCIe": Gpu(756e12, 80e9, 2.0e12, 350),
    "H100 NVL": Gpu(835e12, 94e9, 3.9e12, 400),
    "H100": Gpu(989.4e12, 80e9, 3.35e12, 700),
    "A100 40GB": Gpu(312e12, 40e9, 1.555e12, 400),
    "A100": Gpu(312e12, 80e9, 2.039e12, 400),
    "L40S": Gpu(362e12, 48e9, 0.864e12, 350),
    "L40": Gpu(181e12, 48e9, 0.864e12, 300),
    "A10G": Gpu(70e12, 24e9, 0.6e12, 300),
    "L4": Gpu(121e12, 24e9, 0.3e12, 72),
    "RTX 4090": Gpu(165.2e12, 24e9, 1.008e12, 450),
    "RTX 3090": Gpu(71e12, 24e9, 0.936e12, 350),
    "T4": Gpu(65e12, 16e9, 0.32e12, 70),
}
CONTEXT_BYTES = 500 * 2**20  # of a GPU's memory that CUDA itself takes; not measured yet


def find_gpu(name: str) -> Gpu | None:
    """Return a GPU by the name that CUDA gives it; None for an unknown one, a part of one (MIG), or a laptop's.

    >>> find_gpu("NVIDIA L4").watts, find_gpu("NVIDIA L40").watts, find_gpu("NVIDIA L400")
    (72, 300, None)
    """
    if re.search(r"\b(MIG|Laptop|D)\b", name):
        return None
    name = re.sub(r"-(\d+GB)\b", r" \1", name)
    return next((gpu for part, gpu in GPUS.items() if has_words(name, part)), None)


def has_words(name: str, words: str) -> bool:
    """Return whether a name has all these words, such as those of A100 40GB in NVIDIA A100-SXM4-40GB."""
    return all(re.search(rf"\b{word}\b", name) for word in words.split())


def choose_gpu(asked: str) -> tuple[str, Gpu]:
    """Return the GPU that a user names, such as h100, h100-pcie or "RTX 4090", with its name in GPUS."""
    names = {re.sub(r"[\s_-]", "", name).lower(): name for name in GPUS}
    key = re.sub(r"[\s_-]|nvidia", "", asked.lower())
    key = key if key in names else f"rtx{key}"
    if key not in names:
        fix = did_you_mean(asked.upper(), GPUS)
        raise UserError("this GPU is not in the list", got=asked, expected=", ".join(GPUS), fix=fix)
    return names[key], GPUS[names[key]]
