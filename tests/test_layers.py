"""The chunked loss and the blocked attention against torch's plain ones, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention

from llmkit.models import CONFIGS, build_model
from llmkit.models.attention import attend, grouped_attention, products_of_one, visible
from llmkit.models.block_mask import make_block_mask
from llmkit.models.blockwise import keys_by_block
from llmkit.models.loss import ChunkLoss, linear_cross_entropy, rows_in_chunk
from llmkit.types import IGNORE_INDEX


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def equal(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# ---- linear_cross_entropy -------------------------------------------------------------------------------------------


def case(ignored: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden (2, 5, 8), weight (13, 8), labels (2, 5): 10 tokens, so that chunks of 3 and 4 have a remainder."""
    labels = torch.randint(13, (2, 5), generator=torch.Generator().manual_seed(1))
    if ignored:
        labels[0, 1] = labels[1, 3:] = IGNORE_INDEX
    return random(2, 5, 8).requires_grad_(), random(13, 8, seed=2).requires_grad_(), labels


def plain(hidden, weight, labels, reduction: str) -> torch.Tensor:
    losses = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction=reduction)
    return losses if reduction == "sum" else losses.view(labels.shape)


def unequal(losses: torch.Tensor) -> torch.Tensor:
    """Return a weighted sum of the losses; one weight is 0 and one is negative."""
    return (losses * torch.linspace(-0.5, 2.0, losses.numel()).view(losses.shape)).sum() * 3.0


@pytest.mark.parametrize("chunk", [3, 4, 5, 10, 64, None])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_losses_and_gradients_equal_cross_entropy(reduction, ignored, chunk):
    hidden, weight, labels = case(ignored)
    ours = linear_cross_entropy(hidden, weight, labels, reduction, chunk)
    theirs = plain(hidden, weight, labels, reduction)
    equal(ours, theirs)
    ours_grads = torch.autograd.grad(unequal(ours), [hidden, weight])
    for a, b in zip(ours_grads, torch.autograd.grad(unequal(theirs), [hidden, weight]), strict=True):
        equal(a, b)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_what_is_frozen_gets_no_gradient_and_the_other_the_same_one(frozen, reduction):
    hidden, weight, labels = case()
    {"weight": weight, "hidden": hidden}[frozen].requires_grad_(False)
    free = hidden if frozen == "weight" else weight
    (wanted,) = torch.autograd.grad(unequal(plain(hidden, weight, labels, reduction)), [free])
    unequal(linear_cross_entropy(hidden, weight, labels, reduction, 3)).backward()
    equal(free.grad, wanted)
    assert (weight if frozen == "weight" else hidden).grad is None


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_without_gradients_the_losses_are_the_same(reduction):
    hidden, weight, labels = case()
    with torch.no_grad():
        ours = linear_cross_entropy(hidden, weight, labels, reduction, 3)
    assert not ours.requires_grad
    equal(ours, plain(hidden, weight, labels, reduction))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_only_ignored_labels_mean_no_loss_and_no_gradient(reduction):
    hidden, weight, labels = case()
    losses = linear_cross_entropy(hidden, weight, torch.full_like(labels, IGNORE_INDEX), reduction, 3)
    losses.sum().backward()
    assert losses.abs().sum() == hidden.grad.abs().sum() == weight.grad.abs().sum() == 0


def test_gradients_add_up_over_two_losses():
    hidden, weight, labels = case()
    (wanted,) = torch.autograd.grad(2 * plain(hidden, weight, labels, "sum"), [weight])
    for _ in range(2):
        linear_cross_entropy(hidden, weight, labels, "sum", 3).backward()
    equal(weight.grad, wanted)


def test_huge_logits_stay_finite():
    hidden, weight, labels = case()
    losses = linear_cross_entropy(hidden * 1e3, weight, labels, "sum", 3)
    losses.backward()
    equal(losses, plain(hidden * 1e3, weight, labels, "sum"))
    assert torch.isfinite(weight.grad).all()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_vocabulary_padded_in_the_products_changes_nothing(reduction):
    results = []
    for multiple in (1, 64):
        hidden, weight, labels = case()
        bias = random(13, seed=3).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_cross_entropy(hidden, weight, labels, reduction, 4, bias=bias, multiple=multiple)
        loss.sum().backward()
        results.append([loss, hidden.grad, weight.grad, bias.grad])
    assert results[1][2].shape == (13, 8)
    for plain_one, padded in zip(*results, strict=True):
        torch.testing.assert_close(plain_one, padded, rtol=1e-2, atol=1e-3)


def test_an_outlier_channel_in_fp16_does_not_overflow_the_gradient_of_the_head():
    rows = torch.arange(32_768) % 2
    hidden = torch.cat((torch.full((len(rows), 1), 12.0), random(len(rows), 7)), 1)
    weight, labels = (random(256, 8, seed=2) * 0.02).requires_grad_(), rows
    grads = []
    for dtype in (torch.float16, torch.float32):
        with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float16):
            (linear_cross_entropy(hidden.to(dtype), weight, labels, chunk=2048) * 1.0).backward()
        grads.append(weight.grad)
        weight.grad = None
    assert grads[1].abs().max() > torch.finfo(torch.float16).max
    torch.testing.assert_close(*grads, rtol=2e-2, atol=20.0)


def test_chunks_are_large_on_a_gpu_and_bounded():
    for vocab in (256, 50_257, 128_256, 262_144):
        rows = rows_in_chunk(65_536, vocab, torch.device("cuda"))
        assert rows <= 4096 and (rows >= 2048 or vocab > 131_072) and rows * vocab * 4 <= 2**30
    assert rows_in_chunk(65_536, 50_257, torch.device("cpu")) * 50_257 * 4 <= 96 * 2**20


# ---- attention ------------------------------------------------------------------------------------------------------


def qkv(length: int, kv_heads: int, heads: int = 4, channels: int = 8) -> list[torch.Tensor]:
    sizes = [heads, kv_heads, kv_heads]
    return [random(2, n, length, channels, seed=seed).requires_grad_() for seed, n in enumerate(sizes)]


def segments_mask(length: int) -> torch.Tensor:
    """Return (B, 1, T, T), True where a query may see a key: three documents in one row, two in the other."""
    at = torch.arange(length)
    segments = torch.stack([at * 3 // length, (at > 5).long()])
    return torch.ones(length, length).tril().bool() & (segments[:, None, :, None] == segments[:, None, None, :])


def assert_attention_equals_sdpa(length: int, kv_heads: int, mask: torch.Tensor | None, window: int | None = None):
    q, k, v = qkv(length, kv_heads)
    ours = grouped_attention(q, k, v, mask, True, window, None, False)
    if window:
        columns = torch.arange(length)
        within = visible(columns[:, None], columns, window)
        mask = within if mask is None else mask & within
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    theirs = theirs.transpose(1, 2).flatten(2)
    equal(ours, theirs)
    upstream = random(*theirs.shape, seed=9)
    ours_grads = torch.autograd.grad(ours, [q, k, v], upstream)
    for a, b in zip(ours_grads, torch.autograd.grad(theirs, [q, k, v], upstream), strict=True):
        equal(a, b)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("mask", [None, "padding", "added"])
def test_one_query_in_16_bits_sees_what_sdpa_sees(kv_heads, mask):
    """Its result is as near to fp32 as SDPA's own in 16 bits; a part of a cache is no contiguous memory."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 6, 1, 16), *(torch.randn(3, kv_heads, 30, 16)[:, :, :21] for _ in range(2))
    masks = {"padding": torch.arange(21) >= torch.tensor([0, 4, 20])[:, None, None, None]}
    mask = masks.get(mask, torch.randn(1, 6, 1, 21) if mask else None)
    half = None if mask is None or mask.dtype == torch.bool else mask.bfloat16()
    low = (q.bfloat16(), k.bfloat16(), v.bfloat16(), mask if half is None else half)
    exact = F.scaled_dot_product_attention(*(x.float() for x in low[:3]), mask, enable_gqa=True)
    theirs = F.scaled_dot_product_attention(*low, enable_gqa=True).float()
    ours = products_of_one(*low).flatten(1, 2).float()[:, :, None]
    assert (ours - exact).abs().max() < 1.5 * (theirs - exact).abs().max() + 0.01
    torch.testing.assert_close(attend(*low), ours.transpose(1, 2).flatten(2).bfloat16())


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 7, 128, 300])
def test_attention_by_blocks_equals_sdpa(length, kv_heads):
    assert_attention_equals_sdpa(length, kv_heads, None)


@pytest.mark.parametrize("mask, window", [(None, None), (True, None), (None, 8)])
def test_grouped_keys_are_repeated_beside_a_mask_on_a_gpu(monkeypatch, mask, window):
    """SDPA's fast kernels take no mask together with grouped keys: it would compute all scores in fp32."""
    seen = []

    def spy(q, k, v, mask=None, *args, enable_gqa=False, **options):
        seen.append((mask is not None, enable_gqa, k.shape[1]))
        return q

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    q, k, v = (one.to("meta") for one in qkv(16, 2))  # any device but a CPU
    attend(q, k, v, None if mask is None else torch.ones(16, 16, dtype=torch.bool, device="meta"), window=window)
    assert seen == [(False, True, 2) if mask is None and window is None else (True, False, 4)]


@pytest.mark.parametrize("window", [1, 50, 128, 299])
def test_attention_by_blocks_within_a_window_equals_sdpa(window):
    assert_attention_equals_sdpa(300, 2, None, window)


def test_keys_before_the_window_and_after_the_block_are_skipped():
    read = {i: range(keys.start, keys.stop) for i, keys in keys_by_block(8, 128, 1024, True, 64)}
    assert read == {i: range(max(0, 128 * i - 63), 128 * (i + 1)) for i in range(8)}


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_by_blocks_learns_what_is_added_to_the_scores(heads):
    q, k, v = qkv(140, 4)
    bias = random(1 if heads == 4 else 2, heads, 140, 140, seed=7).requires_grad_()
    ours = grouped_attention(q, k, v, bias, False, None, None, False)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
    upstream = random(*theirs.shape, seed=9)
    for a, b in zip(*(torch.autograd.grad(one, [q, k, v, bias], upstream) for one in (ours, theirs)), strict=True):
        equal(a, b)


# ---- block masks, which a GPU reads ---------------------------------------------------------------------------------


@pytest.fixture
def flex_on_cpu(monkeypatch):
    """Let FlexAttention compute gradients on a CPU: its plain implementation can, but torch refuses."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)


def documents(length: int, padding: int = 0, seed: int = 3) -> torch.Tensor:
    """Return segments (2, T): documents of random lengths, then padding."""
    segments = (torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) < 0.01).cumsum(1)
    segments[:, length - padding :] = -1
    return segments


@pytest.mark.parametrize("window", [None, 1, 100, 300])
@pytest.mark.parametrize("length", [5, 128, 700])
def test_block_masks_list_the_blocks_that_torch_finds_in_the_whole_mask(length, window):
    for segments in (None, documents(length)):
        mask = make_block_mask(segments, length, window, torch.device("cpu"))
        rows = None if segments is None else 2
        theirs = flex_attention.create_block_mask(mask.mask_mod, rows, None, length, length, device="cpu")
        assert mask.shape == theirs.shape and torch.equal(mask.to_dense(), theirs.to_dense())
        whole = theirs.full_kv_num_blocks.sum() if length > 128 else 0
        assert mask.full_kv_num_blocks.sum() == whole


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.usefixtures("flex_on_cpu")
def test_attention_with_block_masks_equals_sdpa(kv_heads, window):
    q, k, v = qkv(700, kv_heads)
    segments, columns = documents(700, padding=90), torch.arange(700)
    dense = visible(columns[:, None], columns, window) & (segments[:, None, :, None] == segments[:, None, None])
    mask = make_block_mask(segments, 700, window, q.device)
    ours = attend(q, k, v, mask, window=window)
    theirs = F.scaled_dot_product_attention(q, k, v, dense, enable_gqa=True).transpose(1, 2).flatten(2)
    equal(ours, theirs)
    upstream = random(*theirs.shape, seed=9)
    for a, b in zip(*(torch.autograd.grad(one, [q, k, v], upstream) for one in (ours, theirs)), strict=True):
        equal(a, b)


@pytest.mark.parametrize("family", ["gpt2", "mistral", "gemma", "bert", "qwen3"])
@pytest.mark.usefixtures("flex_on_cpu")
def test_models_read_block_masks_and_compile_once_for_all_of_them(family):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    windows = {"sliding_window": 60} if family == "mistral" else {}
    plain, ours = (build_model(CONFIGS[family](**sizes, **windows, max_position_embeddings=300), seed=0) for _ in "ab")
    ours.block_masks, counter = True, CompileCounterWithBackend("aot_eager")
    for block in ours.blocks:
        block.compile(backend=counter, fullgraph=True, dynamic=False)
    for seed in range(2):
        ids = torch.randint(50, (2, 300), generator=torch.Generator().manual_seed(seed))
        inputs = {"input_ids": ids, "labels": ids.flip(1), "segments": documents(300, seed=seed)}
        losses = [model(**inputs) for model in (plain, ours)]
        equal(*losses)
        for a, b in zip(*(torch.autograd.grad(loss, one.blocks.parameters()) for loss, one in
                          zip(losses, (plain, ours), strict=True)), strict=True):  # fmt: skip
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1  # blocks share a program


# ---- attention in blocks of queries, on a CPU -----------------------------------------------------------------------


@pytest.mark.parametrize("length", [12, 130, 512])
def test_attention_within_segments_equals_sdpa(length):
    assert_attention_equals_sdpa(length, 2, segments_mask(length))


def test_long_ragged_rows_equal_sdpa():
    assert_attention_equals_sdpa(513, 2, None)


@pytest.mark.slow
@pytest.mark.parametrize("length, window", [(40, None), (300, None), (300, 60)], ids=["segments", "blocks", "window"])
def test_compiled_attention_equals_eager_and_keeps_no_scores(length, window):
    mask = segments_mask(length) if length == 40 else None
    q, k, v = qkv(length, 2)
    upstream = random(2, length, 32, seed=9)
    results, kept = [], []
    for function in (attend, torch.compile(attend, dynamic=False)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            out = function(q, k, v, mask, window=window)
        results.append([out, *torch.autograd.grad(out, [q, k, v], upstream)])
    for eager, compiled in zip(*results, strict=True):
        equal(eager, compiled)
    assert max(kept) <= max(q.numel(), length * length if length == 40 else 0) * 2


@pytest.mark.slow
def test_compiled_chunks_equal_cross_entropy():
    hidden, weight, labels = case()
    compiled = ChunkLoss()
    compiled.compile(fullgraph=True, dynamic=False)
    ours = linear_cross_entropy(hidden, weight, labels, "sum", 4, compiled)
    theirs = plain(hidden, weight, labels, "sum")
    equal(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(loss * 3.0, [hidden, weight]) for loss in (ours, theirs)), strict=True):
        equal(a, b)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("compiled", [False, True])
def test_few_targets_are_read_alone_with_equal_losses_and_gradients(reduction, compiled):
    """One row in ten is a target: the head reads these alone, and values and gradients are torch's. None may be one."""
    generator = torch.Generator().manual_seed(4)
    chunk_loss = ChunkLoss()
    if compiled:
        chunk_loss.compile(fullgraph=True, dynamic=False)
    read = []
    chunk_loss.register_forward_pre_hook(lambda module, args: read.append(len(args[0])))
    for share in (0.1, 0.3, 0.0):
        hidden = torch.randn(3, 700, 16, generator=generator, requires_grad=True)
        weight = torch.randn(50, 16, generator=generator, requires_grad=True)
        labels = torch.randint(50, (3, 700), generator=generator)
        labels[torch.rand(3, 700, generator=generator) >= share] = IGNORE_INDEX
        found = linear_cross_entropy(hidden, weight, labels, reduction, chunk_loss=chunk_loss)
        expected = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction=reduction)
        expected = expected if reduction == "sum" else expected.view(3, 700)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        upstream = torch.rand(found.shape, generator=generator)
        gradients = [torch.autograd.grad((one * upstream).sum(), (hidden, weight)) for one in (found, expected)]
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert set(read) == {256} and len(read) <= 4
