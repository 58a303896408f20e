"""Compile the blocks of a built model, and make them recompute activations."""

import importlib.util
import shutil
import sysconfig
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch._functorch.config
import torch._inductor.config
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from llmkit.errors import MachineError
from llmkit.models import family_of
from llmkit.models.family import Config

# Operations whose results take long to compute again. A compiled program keeps them, and recomputes all others in the
# backward pass, as torch decides with the budget that `compile_blocks` sets: compared for GPT-2, Llama and LoRA.
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "embedding", "_scaled_dot_product", "block_attention")

SELECTIVE = 0.9  # share of its activations that a compiled block keeps if it recomputes what is cheap


def apply_checkpointing(model: nn.Module, mode: str | int | float) -> None:
    """Make blocks recompute their activations in the backward pass.

    mode  none; selective: all but the results of products; a number below 1: also some of these, so that this share of
          them is kept; k: every k-th block, all of it; full: all of every block
    """
    if mode == "none":
        return
    every = mode if isinstance(mode, int) else 1
    kept = 1.0 if mode == "selective" else mode if isinstance(mode, float) else 0.0
    for block in list(model.blocks)[::every]:
        block.forward = recomputed(block.forward, kept)


def describe_checkpointing(mode: str | int | float) -> str:
    """Return in words what the backward pass recomputes, see `apply_checkpointing`."""
    if isinstance(mode, float):
        return f"all but {mode:.0%} of the matrix products recomputed"
    if isinstance(mode, int):
        return f"one in {mode} recomputed"
    return {"none": "none", "selective": "all but matrix products", "full": "all"}[mode] + " recomputed"


def recomputed(function: Callable[..., Tensor], kept: float = 0.0) -> Callable[..., Tensor]:
    """Wrap a function so that the backward pass recomputes its activations (Chen et al. 2016, arXiv:1604.06174).

    kept  share of the results of PRODUCTS that stay in memory (selective recomputation: Korthikanti et al. 2022,
          arXiv:2205.05198)
    """

    def contexts():
        calls: Counter[bool] = Counter()  # of products, in the forward pass and (in some versions of torch) again

        def policy(context, operation, *args, **kwargs):
            # What draws random numbers is repeated, since what comes after it must draw the same ones again.
            if not operation.__name__.startswith(PRODUCTS) or draws(operation, args, kwargs):
                return CheckpointPolicy.PREFER_RECOMPUTE
            calls[context.is_recompute] += 1
            number = calls[context.is_recompute]
            keep = int(number * kept) > int((number - 1) * kept)  # evenly spread over the block
            return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)

    def wrapper(*args):  # not a functools.partial, which torch.compile does not trace
        if kept:
            return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)
        return checkpoint(function, *args, use_reentrant=False)

    return wrapper


def draws(operation: torch._ops.OpOverload, args: tuple, kwargs: dict) -> bool:
    """Return whether an operation drops elements at random."""
    names = (argument.name for argument in operation._schema.arguments)
    return bool((dict(zip(names, args, strict=False)) | kwargs).get("dropout_p"))


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


def compile_blocks(
    model: nn.Module, device: torch.device, precision: str, checkpointing: str | int | float = "none"
) -> None:
    """Compile the loss, and each block by itself, so that blocks share one program.

    checkpointing  the mode of `apply_checkpointing`; torch's partitioner chooses what it keeps of a block by itself
    """
    if reason := compile_obstacle(model, device, precision):
        fix = "install what is missing, or set train.compile to auto"
        raise MachineError(f"train.compile: true is not possible: {reason}", fix=fix)
    budget = 1.0
    if device.type == "cpu":
        # Recompute cheap operations (norms, activations): this saves an eighth of the memory in pretraining, and more
        # with LoRA, at the same speed. Not measured on a GPU.
        budget = SELECTIVE
        # tanh by exp: GELU takes half of the time, a step of GPT-2 6 x 384 3 % less.
        torch._inductor.config.cpp.use_decompose_tanh = True
    if checkpointing == "selective" or isinstance(checkpointing, float):
        budget = SELECTIVE if checkpointing == "selective" else min(checkpointing, SELECTIVE)
        for block in model.blocks:
            vars(block).pop("forward", None)  # the wrapper of `apply_checkpointing`
    torch._functorch.config.activation_memory_budget = budget
    # T5 takes none: its masks are added biases. Virtual tokens are columns before the others, which have no blocks.
    has_virtual = hasattr(model, "number_of_virtual_tokens")
    model.block_masks = takes_block_masks(model.config, device, precision) and not has_virtual
    for part in (*model.blocks, model.chunk_loss):
        part.compile(fullgraph=True, dynamic=False)


def takes_block_masks(config: Config, device: torch.device, precision: str) -> bool:
    """Return whether FlexAttention has a kernel for a model, and a fast one: it drops no weights of attention."""
    drops = any(value for name, value in vars(config).items() if name.startswith("att") and "drop" in name)
    if device.type != "cuda" or drops or precision == "fp32" or config.head_dim < 16:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
