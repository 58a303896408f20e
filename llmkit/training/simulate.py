"""Count the memory of a training step by taking one on tensors without data: their shapes and lifetimes are the same.

What a family, an adapter or an optimizer allocates is counted, not computed by a formula that must be kept up to date.
"""

import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmkit.models import family_of
from llmkit.models.family import Config
from llmkit.models.heads import HeadConfig, add_head
from llmkit.objectives.lm import sum_of_losses
from llmkit.parallel.compile import PRODUCTS, apply_checkpointing
from llmkit.parallel.device import DTYPES
from llmkit.training.average import start_average
from llmkit.training.optim import clip, make_state

Parts = dict[str, int]  # what made tensors -> their bytes


class Ledger(TorchDispatchMode):
    """Count the bytes of the tensors that are alive, as operations run in this mode.

    part   name for what is made now
    phase  name for the time, whose peak is kept
    fused  whether what is made now is inside a compiled program: only results of PRODUCTS are in memory there, and any
           other tensor keeps those alive that it is computed from
    """

    def __init__(self) -> None:
        super().__init__()
        self.part, self.phase, self.fused = "", "", False
        self.now: Counter[str] = Counter()
        self.peaks: dict[str, tuple[int, Parts]] = {}  # phase -> bytes at its peak, in all and by part
        self.counted: set[int] = set()  # storages
        self.sources: dict[int, dict[int, Tensor]] = {}  # fused storage -> the counted tensors it is computed from

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            result = grouped_result(*args[:3])  # torch computes it, but without data it takes bf16 alone
        else:
            result = function(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if self.fused and not function.__name__.startswith(PRODUCTS):
            sources: dict[int, Tensor] = {}
            for t in tree_leaves((args, kwargs)):
                if isinstance(t, Tensor):
                    key = t.untyped_storage()._cdata
                    sources |= self.sources.get(key, {key: t})
            for t in made:
                self.hide(t, sources)
        else:
            for t in made:
                self.count(t)
        return result

    def hide(self, t: Tensor, sources: dict[int, Tensor]) -> None:
        """Note a new tensor that takes no memory of its own."""
        storage = t.untyped_storage()
        key = storage._cdata
        if key not in self.counted and key not in self.sources:
            self.sources[key] = sources
            weakref.finalize(storage, self.sources.pop, key, None)

    def count(self, t: Tensor) -> None:
        """Count a tensor that is new, or has been fused so far."""
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.counted:
            self.sources.pop(key, None)
            self.counted.add(key)
            self.now[self.part] += size
            weakref.finalize(storage, self.forget, key, self.part, size)
            total = self.now.total()
            if total > self.peaks.get(self.phase, (0,))[0]:
                self.peaks[self.phase] = (total, dict(self.now))

    def forget(self, key: int, part: str, size: int) -> None:
        """Count a tensor no longer."""
        self.counted.discard(key)
        self.now[part] -= size

    def enter(self, part: str, phase: str, fused: bool = False) -> None:
        """Name what comes next."""
        self.part, self.phase, self.fused = part, phase, fused


def grouped_result(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Return an empty result of torch._grouped_mm, for the rows of a or, if b is a matrix too, for its columns."""
    if b.dim() == 3:
        return a.new_empty(a.shape[0], b.shape[2])
    return a.new_empty(len(ends), a.shape[0], b.shape[1])


def watch(ledger: Ledger, model: nn.Module, compiled: bool) -> None:
    """Make a model tell the ledger where a step is: in which block, forward or backward, or in the loss."""
    blocks = list(model.blocks)

    def begin(module: nn.Module, args: tuple) -> None:
        ledger.enter("activations", "forward", compiled)

    def end(module: nn.Module, args: tuple, output: Any, number: int) -> None:
        ledger.fused = False
        for t in tree_leaves(output):
            ledger.count(t)
        ledger.enter("loss", "loss")
        x = output[0] if isinstance(output, tuple) else output
        phase = {0: "backward, first block", len(blocks) - 1: "backward, last block"}.get(number, "backward")
        if x.requires_grad:
            x.register_hook(lambda gradient: ledger.enter("gradients", phase, compiled))
        if number == 0 and args[0].requires_grad:
            args[0].register_hook(lambda gradient: ledger.enter("gradients", "backward, embedding"))

    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(begin)
        block.register_forward_hook(partial(end, number=number))

    def begin_chunk(module: nn.Module, args: tuple) -> None:
        ledger.fused = compiled

    def end_chunk(module: nn.Module, args: tuple, output: tuple[Tensor, ...]) -> None:
        ledger.fused = False
        for t in output:
            ledger.count(t)

    model.chunk_loss.register_forward_pre_hook(begin_chunk)
    model.chunk_loss.register_forward_hook(end_chunk)


def simulate_step(
    config: Config,
    *,
    shapes: dict[str, tuple[int, ...]],
    head: HeadConfig | None = None,
    change: Callable[[nn.Module], None] | None,
    make_optimizers: Callable[[nn.Module], list[torch.optim.Optimizer]],
    precision: str,
    checkpointing: str | int | float,
    compiled: bool,
    accumulates: bool,
    averages: bool,
) -> dict[str, Parts]:
    """Return the bytes by part at the peak of each phase of a step.

    config           of a model
    shapes           name -> shape of the model's inputs and labels for one micro-batch
    head             for labels, None: for tokens
    change           chooses what is trained: applies an adapter, and changes what is frozen
    make_optimizers  for the model
    checkpointing    train.gradient_checkpointing
    accumulates      whether a micro-batch finds the gradients of another one
    averages         whether there is an average of the weights
    """
    ledger, dtype = Ledger(), DTYPES[precision]
    with FakeTensorMode(allow_non_fake_inputs=True):  # constants of a module have data
        model = family_of(config).build(config)
        if head:
            add_head(model, family_of(config), head)
        if change:
            change(model)
        apply_checkpointing(model, checkpointing)
        watch(ledger, model, compiled)
        trained = [p for p in model.parameters() if p.requires_grad]
        for part, wanted in (("trained weights", True), ("frozen weights", False)):
            ledger.enter(part, "start")
            for p in model.parameters():
                if p.requires_grad is wanted:
                    ledger.count(p)
        for buffer in model.buffers():  # quantized weights
            ledger.count(buffer)
        batch = {name: torch.zeros(shape, dtype=torch.int64) for name, shape in shapes.items()}
        with ledger:
            ledger.enter("average of weights", "start")
            average = start_average(trained) if averages else {}
            ledger.enter("optimizer", "state of the optimizer")
            optimizers = make_optimizers(model)
            make_state(model, optimizers)
            for p in trained if accumulates else []:
                ledger.enter("gradients", "forward")
                p.grad = torch.zeros_like(p)
            ledger.enter("activations", "forward")
            with torch.autocast("cpu", dtype, enabled=precision != "fp32"):
                loss = model(**batch, reduction="sum") if head else sum_of_losses(model, batch)[0]
            loss.backward()
            del loss
            ledger.enter("optimizer", "step")
            _, found_inf = clip(trained, 1.0, torch.ones(()))
            for optimizer in optimizers:
                optimizer.found_inf = found_inf
                optimizer.step()
        del average
    return {phase: parts for phase, (_, parts) in ledger.peaks.items()}
