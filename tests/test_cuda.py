"""What CUDA does otherwise than a CPU, emulated: its autocast lists, its operations that are not deterministic."""

from collections import Counter

import numpy as np
import pytest
import torch
from conftest import randomized
from test_families import CAUSAL, decoder_ids, each_config, tokens
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from llmkit.data.batches import Batches
from llmkit.generation.generate import logits_to_probs, stream
from llmkit.generation.sampling import Sampling
from llmkit.models import build_model
from llmkit.objectives.lm import pad_rows, sum_of_losses
from llmkit.training.optim import adamw, adamw8bit, clip, muon, sgd
from llmkit.types import Batch

# ---- autocast -------------------------------------------------------------------------------------------------------

# ATen/autocast_mode.h: AT_FORALL_FP32, and AT_FORALL_FP32_SET_OPT_DTYPE, which gives way to a dtype that is said.
FP32 = set("acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow softplus".split())
FP32 |= set(
    "__pow__ __rpow__ layer_norm rms_norm group_norm cosine_similarity nll_loss cross_entropy logsumexp".split()
)
FP32_UNLESS_SAID = set("prod softmax log_softmax cumprod cumsum sum norm vector_norm".split())


class CudaAutocast(TorchFunctionMode):
    """Run the operations that autocast makes fp32 on CUDA in fp32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        half = isinstance(args[0] if args else None, torch.Tensor) and args[0].dtype == torch.bfloat16
        if half and (name in FP32 or (name in FP32_UNLESS_SAID and kwargs.get("dtype") is None)):
            args, kwargs = tree_map_only(
                torch.Tensor, lambda t: t.float() if t.is_floating_point() else t, (args, kwargs)
            )
        return func(*args, **kwargs)


@each_config
def test_a_block_keeps_the_dtype_of_the_residual_stream_under_cudas_autocast(config):
    model, seen = randomized(build_model(config)).to(torch.bfloat16), []

    def note(block: torch.nn.Module, inputs: tuple, output: object) -> None:
        seen.append((inputs[0].dtype, (output[0] if isinstance(output, tuple) else output).dtype))

    for block in model.blocks:
        block.register_forward_hook(note)
    with torch.autocast("cpu", torch.bfloat16), CudaAutocast():
        model(tokens(), **decoder_ids(model), labels=decoder_ids(model).get("decoder_input_ids", tokens()))
    assert seen == [(torch.bfloat16, torch.bfloat16)] * len(model.blocks)


def test_the_emulated_autocast_makes_sums_fp32_but_those_that_say_a_dtype():
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    with CudaAutocast():
        dtypes = [y.dtype for y in (x.sum(1), x.softmax(-1), torch.nn.functional.layer_norm(x, (3,)), x * 2)]
        assert dtypes == [torch.float32] * 3 + [torch.bfloat16]
        assert x.sum(1, dtype=torch.bfloat16).dtype == torch.bfloat16


# ---- deterministic algorithms ---------------------------------------------------------------------------------------

# Of the lists in torch.use_deterministic_algorithms: on CUDA, RAISES raise an error unless they add whole numbers, and
# SLOWER have a deterministic kernel, which the mode chooses.
RAISES = set("cumsum put_ put histc bincount median nanmedian nll_loss2d_forward _ctc_loss _embedding_bag".split())
RAISES |= set("grid_sampler_2d scatter_reduce reflection_pad1d_backward max_unpool2d".split())
SLOWER = set("scatter_add scatter_add_ index_add index_add_ index_copy index_select index_put index_put_".split())
SLOWER |= set("_index_put_impl_ scatter scatter_ gather repeat_interleave embedding_dense_backward".split())


class Operations(TorchDispatchMode):
    """Count the operations of the lists."""

    def __init__(self):
        super().__init__()
        self.raising, self.slower = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        floats = isinstance(args[0] if args else None, torch.Tensor) and args[0].is_floating_point()
        self.raising[name] += name in RAISES and floats
        self.slower[name] += name in SLOWER
        return func(*args, **kwargs or {})


def normuon(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    return muon(model, row_scaling=True, cautious_weight_decay=True)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@each_config
@pytest.mark.parametrize("optimizer", [adamw, adamw8bit, muon, normuon, sgd], ids=lambda chosen: chosen.__name__)
def test_a_training_step_has_a_deterministic_kernel_for_every_operation(config, optimizer, deterministic):
    model = randomized(build_model(config)).train()
    batch = {"input_ids": tokens(), **decoder_ids(model)}
    batch["labels"] = batch.get("decoder_input_ids", tokens())
    with Operations() as operations:
        loss, _ = sum_of_losses(model, batch)
        loss.backward()
        _, found_inf = clip(list(model.parameters()), 1.0, torch.ones(()))
        for one in optimizer(model):
            one.found_inf = found_inf
            one.step()
    assert not +operations.raising
    known = "embedding_dense_backward gather scatter scatter_ index_put"  # embeddings and labels; routing of experts
    assert set(+operations.slower) <= set(known.split())


@pytest.mark.parametrize(
    "sampling", [Sampling(top_p=0.7), Sampling(top_k=None, min_p=0.1), Sampling(repetition_penalty=2)]
)
def test_sampling_has_a_deterministic_kernel_for_every_operation(sampling, deterministic):
    model = randomized(build_model(CAUSAL["mixtral"]))
    with Operations() as operations:
        assert len(list(stream(model, [1, 2, 3], max_new_tokens=5, sampling=sampling))) == 5
    assert not +operations.raising
    with Operations() as operations:
        torch.rand(3).cumsum(0), torch.arange(3).cumsum(0)
    assert +operations.raising == {"cumsum": 1}  # the test can fail


@pytest.mark.parametrize("top_p", [1e-20, 0.3, 0.5, 0.95, 1.0])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p):
    logits = torch.randn(4, 50_000, generator=torch.Generator().manual_seed(0)) * 3
    _, probs = logits_to_probs(logits, Sampling(temperature=1.0, top_k=None, top_p=top_p))
    for row, kept in zip(logits.double().softmax(-1).numpy(), (probs > 0).numpy(), strict=True):
        mass = np.cumsum(np.sort(row)[::-1])
        fewest = 1 + int((mass < top_p).sum())
        assert abs(kept.sum() - min(fewest, len(row))) <= 2
        assert row[kept].min() >= row[~kept].max(initial=0)


# ---- batches --------------------------------------------------------------------------------------------------------


def test_arrays_of_a_batch_and_its_parts_are_contiguous():
    """Pinned memory and copies to a GPU want it. Inputs and labels are views of one array of tokens."""
    rows = np.arange(60).reshape(4, 15)
    strided = Batch(rows[:, :-1], rows[:, 1:], rows[:, ::2], rows[:, 1::2], rows.T)
    batches = Batches(4, lambda samples: Batch(rows[samples, :-1], rows[samples, 1:]), 4, seed=0)
    for batch in (strided, *strided.split(3), pad_rows(strided, 6), batches.batch_at(0), *batches.in_order()):
        assert all(array.flags.c_contiguous for array in batch.arrays().values())
    assert (strided.labels == rows[:, 1:]).all()
