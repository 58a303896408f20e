"""Examine what this machine can do, and what is missing."""

import importlib.metadata
import importlib.util
import platform
import shutil
from pathlib import Path

import torch

from llmkit.parallel.compile import missing_compiler
from llmkit.parallel.device import DTYPES, choose_precision, device_name, matmul_rate, total_memory
from llmkit.parallel.world import start_world

EXTRAS = {  # of pyproject.toml, and a module that each brings
    "tensorboard": "tensorboard",
    "pii": "re2",
    "sentencepiece": "sentencepiece",
    "gguf": "gguf",
    "serve": "starlette",
    "classifier": "transformers",
    "cluster": "distributed",
}


def examine() -> dict[str, str]:
    """Return the rows of `llmkit doctor`."""
    device = start_world().device
    reason = missing_compiler(device)
    figures = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device_name(device),
        "memory": f"{total_memory(device) / 2**30:.1f} GiB",
        "precision": f"auto means {choose_precision('auto', device)}",
        "compile": "yes" if reason is None else f"no: {reason}; training runs eager",
    }
    for name, dtype in DTYPES.items():
        if name != "fp16" or device.type == "cuda":
            figures[f"{name} products"] = f"{matmul_rate(device, dtype) / 1e12:.3f} TFLOP/s measured"
    free = shutil.disk_usage(Path.cwd()).free
    figures["disk"] = f"{free / 2**30:.1f} GiB free here"
    for package in ("tokenizers", "datasets"):
        figures[package] = importlib.metadata.version(package)
    for extra, module in EXTRAS.items():
        there = importlib.util.find_spec(module) is not None
        figures[f"extra {extra}"] = "installed" if there else f"pip install 'llmkit[{extra}]'"
    return figures
