"""Report what this machine can do, and which packages are missing."""

import importlib.metadata
import importlib.util
import platform
import shutil
from pathlib import Path

import torch

from llmkit.parallel.compile import missing_compiler
from llmkit.parallel.device import DTYPES, choose_precision, device_name, matmul_rate
from llmkit.parallel.memory import total_memory
from llmkit.parallel.world import start_world

EXTRAS = {  # an extra in pyproject.toml -> a module that it installs
    "tensorboard": "tensorboard",
    "pii": "re2",
    "sentencepiece": "sentencepiece",
    "gguf": "gguf",
    "serve": "starlette",
    "classifier": "transformers",
    "fp8": "torchao",
    "cluster": "distributed",
    "tasks": "lm_eval",
}


def examine() -> dict[str, str]:
    """Return the rows of `llmkit doctor`."""
    device = start_world().device
    reason = missing_compiler(device)
    rows = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device_name(device),
        "memory": f"{total_memory(device) / 2**30:.1f} GiB",
        "precision": f"auto means {choose_precision('auto', device)}",
        "compile": "yes" if reason is None else f"no: {reason}; training runs without it",
    }
    for name, dtype in DTYPES.items():
        if name != "fp16" or device.type == "cuda":
            rows[f"{name} products"] = f"{matmul_rate(device, dtype) / 1e12:.3f} TFLOP/s measured"
    rows["disk"] = f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB free here"
    for package in ("tokenizers", "datasets"):
        rows[package] = importlib.metadata.version(package)
    for extra, module in EXTRAS.items():
        rows[f"extra {extra}"] = "installed" if importlib.util.find_spec(module) else f"pip install 'llmkit[{extra}]'"
    return rows
