"""Bases in 4 and 8 bits: their size and error, the same training as on the dequantized weights, and merging."""

import json

import pytest
import torch
from conftest import llmkit
from torch import nn

from llmkit.config.load import load_config
from llmkit.errors import UserError
from llmkit.models import FAMILIES, build_model, folder, gpt2, llama
from llmkit.models.layers import block_linears
from llmkit.models.quantized import LEVELS, PARTS, QUANTIZERS, dequantize, is_quantized, quantize_linear
from llmkit.peft import METHODS, lora
from llmkit.tokenizer.train import train_tokenizer
from llmkit.training.prepare import check

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
IDS = torch.arange(24).view(2, 12)


def quantized_of(weight: torch.Tensor, name: str, **options) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        module.weight.copy_(weight)
    quantize_linear(module, name, options)
    return module


@pytest.mark.parametrize(("name", "most"), [("nf4", 0.55), ("int8", 1.01)])
def test_bytes_a_weight(name, most):
    module = quantized_of(torch.randn(256, 768), name)
    assert sum(one.nbytes for one in module.buffers()) / (256 * 768) <= most
    assert [key for key, _ in module.named_parameters()] == ["bias"]


def test_levels_are_kept_exactly_and_others_go_to_the_nearest():
    """A block whose largest weight is s holds s times a level; by hand for a second block with a weight between two."""
    levels = torch.tensor(LEVELS)
    weight = torch.zeros(2, 64)
    weight[0, :16] = 3 * levels
    weight[1, :3] = torch.tensor([0.5, 0.5 * 0.2, -0.5 * 0.95])
    found = quantized_of(weight, "nf4", double_quantization=False).weight
    torch.testing.assert_close(found[0], weight[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1, :3], 0.5 * torch.tensor([1.0, LEVELS[9], -1.0]))


@pytest.mark.parametrize(("name", "error"), [("nf4", 0.0925), ("int8", 0.0085)])
def test_the_error_of_normal_weights(name, error):
    """NF4 of normal weights in blocks of 64 errs by 9.1 % of their norm; double quantization adds next to nothing."""
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    found = quantized_of(weight, name).weight
    assert 0.7 * error < (found - weight).norm() / weight.norm() < error
    if name == "nf4":
        single = quantized_of(weight, name, double_quantization=False).weight
        assert (found - single).norm() / weight.norm() < 0.003


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("shape", [(96, 64), (5, 7), (1, 200)])
def test_a_product_and_its_gradient_are_those_of_the_matrix(name, shape):
    module = quantized_of(torch.randn(shape), name)
    weight = module.weight.clone()
    x = torch.randn(3, 4, shape[1], requires_grad=True)
    again = x.detach().clone().requires_grad_()
    for y in (module(x), nn.functional.linear(again, weight, module.bias)):
        (y**2).sum().backward()
    torch.testing.assert_close(x.grad, again.grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    zeros = quantized_of(torch.zeros(shape), name)
    assert not zeros.weight.any() and zeros.weight.isfinite().all()


def test_nothing_of_the_matrix_is_kept_for_the_backward_pass():
    module = quantized_of(torch.randn(256, 256), "nf4")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(torch.randn(2, 256, requires_grad=True))
    assert kept and all(one.numel() <= 256 * 128 for one in kept)


@pytest.fixture
def base(tmp_path):
    def save(config):
        model = build_model(config)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.05)
        folder.save_model(model, tmp_path / "base")
        return tmp_path / "base"

    return save


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "falcon", "bert", "t5"])
@torch.no_grad()
def test_a_folder_is_quantized_as_it_is_read(model_type, base):
    """Every linear of the blocks, also of layouts that files store otherwise; all else as it is."""
    config = FAMILIES[model_type].config(**SIZES, vocab_size=61)
    plain = folder.load_model(base(config))
    model = folder.load_model(base(config), quantize=("nf4", {}))
    linears = block_linears(plain)
    assert is_quantized(model) and block_linears(model).keys() == linears.keys()
    for name, module in block_linears(model).items():
        torch.testing.assert_close(module.weight, dequantize_as(linears[name].weight))
    other = {key: p for key, p in plain.named_parameters() if key.removesuffix(".weight") not in linears}
    for key, p in model.named_parameters():
        torch.testing.assert_close(p, other.pop(key))
    assert not other


def dequantize_as(weight: torch.Tensor) -> torch.Tensor:
    parts = QUANTIZERS["nf4"](weight)
    return dequantize(list(weight.shape), weight.dtype, *(parts.get(name) for name in PARTS))


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"layers": "last 1"}])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_training_equals_that_on_the_dequantized_weights(name, options, base):
    """LoRA and DoRA: the losses of 20 steps within 1e-3, and disabled, the quantized base is computed."""
    where = base(llama.Config(**SIZES, vocab_size=61))
    ours = folder.load_model(where, quantize=(name, {}))
    theirs = folder.load_model(where)
    with torch.no_grad():
        for key, module in block_linears(ours).items():
            theirs.get_submodule(key).weight.copy_(module.weight)
    logits = ours(IDS)
    torch.testing.assert_close(logits, theirs(IDS), rtol=1e-4, atol=1e-4)
    losses = []
    for model in (ours, theirs):
        lora.apply(model, lora.Options(r=4, **options), 3)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for _ in range(20):
            loss = model(IDS, IDS.roll(-1, 1)) / IDS.numel()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0] - 0.1
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=0, atol=1e-3)
    with lora.disabled(ours):
        torch.testing.assert_close(ours(IDS), logits)


@pytest.mark.parametrize("method", ["ia3", "adapter", "prefix", "adalora", "llama_adapter"])
def test_other_methods_train_over_a_quantized_base(method, base):
    model = folder.load_model(base(llama.Config(**SIZES, vocab_size=61)), quantize=("nf4", {}))
    METHODS[method].apply(model, METHODS[method].options(), 0, [])
    model(IDS, IDS).backward()
    assert any(p.grad is not None and p.grad.any() for p in METHODS[method].tensors(model).values())


def test_a_run_from_the_command_line(base, tmp_path):
    """--qlora trains, and exports the merge into the base that is not quantized."""
    words = "copy this line and then the next line please".split()
    start = base(llama.Config(**SIZES, vocab_size=400))
    train_tokenizer([" ".join(words)] * 20, vocab_size=300).save(start)
    rows = [{"prompt": f"copy {a} {b}", "completion": f"{a} {b}"} for a in words for b in words]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["-o", "train.epochs=null", "-o", "train.max_steps=4", "-o", "eval.every=2", "-o", "checkpoint.every=2"]
    args = ["finetune", "--qlora", "--from", start, "--data", tmp_path / "rows.jsonl", *flags]
    out = llmkit(*args, cwd=tmp_path).stdout
    assert "nf4, double_quantization True" in out
    config = (tmp_path / "runs/base-qlora/config.yaml").read_text()
    assert "quantize:" in config and "name: nf4" in config
    merged = tmp_path / "merged"
    llmkit("export", tmp_path / "runs/base-qlora", merged, cwd=tmp_path)
    plain, found = folder.load_model(start), folder.load_model(merged)
    adapter = next((tmp_path / "runs/base-qlora/checkpoints").glob("step-000004/model"))
    from llmkit.peft.adapter import load_adapter

    load_adapter(plain, adapter)
    torch.testing.assert_close(found(IDS), plain.eval()(IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["quantize: {name: nf4}"], "all of them are trained"),
        (["quantize: {name: int3}", "peft: {name: lora}"], "quantize.name is unknown"),
        (["quantize: {name: int8, double_quantization: true}", "peft: {name: lora}"], "double_quantization"),
    ],
)
def test_what_does_not_fit_is_refused(lines, words, base, tmp_path):
    start = base(gpt2.Config(**SIZES, vocab_size=400))
    (tmp_path / "c.yaml").write_text(
        "\n".join(
            [f"init_from: {start}", "data: {kind: sft, path: x.jsonl, seq_len: 32}", "train: {max_steps: 1}", *lines]
        )
    )
    with pytest.raises(UserError) as raised:
        check(load_config(tmp_path / "c.yaml", []))
    assert any(words in str(one) for one in (raised.value, *raised.value.others))
