"""Compile the blocks of a built model, and make them recompute activations."""

import importlib.util
import shutil
import sysconfig
from pathlib import Path

import torch
import torch._functorch.config
import torch._inductor.config
from torch import nn

from llmkit.errors import MachineError
from llmkit.models import family_of
from llmkit.models.attention import recomputed


def apply_checkpointing(model: nn.Module, mode: str | int) -> int:
    """Make blocks recompute their activations in the backward pass; return how many do so.

    mode  none, full (every block), or k (every k-th block)
    """
    every = {"none": 0, "full": 1}.get(mode, mode)
    chosen = [block for i, block in enumerate(model.blocks) if every and i % every == 0]
    for block in chosen:
        block.forward = recomputed(block.forward)
    return len(chosen)


def missing_compiler(device: torch.device) -> str | None:
    """Return what torch.compile lacks on this machine, None if it works.

    For a GPU, triton compiles an extension of Python in C, which needs Python's own headers too.
    """
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "no triton"
        if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
            return "no Python.h: the package python3-dev has it"
    language, names = ("C", ("gcc", "clang", "cc")) if device.type == "cuda" else ("C++", ("g++", "clang++", "c++"))
    return None if any(shutil.which(name) for name in names) else f"no {language} compiler"


def compile_obstacle(model: nn.Module, device: torch.device, precision: str) -> str | None:
    """Return why this model can't be compiled on this machine, or None."""
    if family_of(model.config).experts(model.config) and precision != "bf16":
        return "matrix products of experts compile in bf16 only"
    return missing_compiler(device)


def compile_blocks(model: nn.Module, device: torch.device, precision: str) -> None:
    """Compile the loss, and each block by itself, so that blocks share one program."""
    if reason := compile_obstacle(model, device, precision):
        fix = "install what is missing, or set train.compile to auto"
        raise MachineError(f"train.compile: true is not possible: {reason}", fix=fix)
    if device.type == "cpu":
        # Recompute cheap operations (norms, activations): this saves an eighth of the memory in pretraining, and more
        # with LoRA, at the same speed. Not measured on a GPU.
        torch._functorch.config.activation_memory_budget = 0.9
        # tanh by exp: GELU takes half of the time, a step of GPT-2 6 x 384 3 % less.
        torch._inductor.config.cpp.use_decompose_tanh = True
    model.block_masks = device.type == "cuda"  # T5 does not read it: its masks are sums with biases of distances
    for part in (*model.blocks, model.chunk_loss):
        part.compile(fullgraph=True, dynamic=False)
