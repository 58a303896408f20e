"""Memory: what is free, what is chosen to fit it, and what happens when it runs out."""

import contextlib
import json
import resource
import subprocess
import sys
from functools import partial

import pytest
import torch
import yaml
from conftest import llmkit, metrics, tiny_config
from test_train import run, steps, weights, worst
from torch import library
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import FlopCounterMode

from llmkit.config.load import load_config
from llmkit.errors import ENVIRONMENT, MachineError, is_out_of_memory
from llmkit.models import CONFIGS, build_model, llama
from llmkit.parallel import memory
from llmkit.parallel.compile import apply_checkpointing, compile_blocks, draws, recomputed
from llmkit.peft import lora
from llmkit.storage import checkpoint
from llmkit.training import cost, simulate
from llmkit.training.cost import simulate_layers
from llmkit.training.fit import cheapest_change, choose_fit, modes_below
from llmkit.training.optim import adamw, sgd
from llmkit.training.prepare import check
from llmkit.training.simulate import simulate_step

CPU_ERROR = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried ..."


def break_beyond(monkeypatch, rows: int, error: Exception) -> list[int]:
    """Let every forward pass of a Llama with more rows fail; return a list of the rows that were tried."""
    tried = []
    forward = llama.Model.forward

    def limited(self, input_ids, *args, **options):
        if isinstance(input_ids, FakeTensor):  # a plan, which takes a step without data
            return forward(self, input_ids, *args, **options)
        tried.append(len(input_ids))
        if len(input_ids) > rows:
            raise error
        return forward(self, input_ids, *args, **options)

    monkeypatch.setattr(llama.Model, "forward", limited)
    return tried


# ---- when it runs out -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError(CPU_ERROR), torch.OutOfMemoryError("CUDA out of memory")]
)
def test_a_run_without_memory_halves_its_micro_batch_and_trains_the_same_weights(corpus, tmp_path, monkeypatch, error):
    options = {"optimizer": {"lr": 1e-3}, "train": steps(3, micro_batch_size=8)}
    enough, _ = run(corpus, tmp_path / "enough", **options)
    tried = break_beyond(monkeypatch, 2, error)
    short, _ = run(corpus, tmp_path / "short", (said := []).append, **options)
    assert tried[:3] == [8, 4, 2] and set(tried[3:]) == {2}
    assert "out of memory with 4 rows in a micro-batch: again, with 2" in "\n".join(said)
    assert worst(weights(enough, 3), weights(short, 3)) < 1e-5
    losses = [[r.get("loss") for r in metrics(folder)] for folder in (enough, short)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert yaml.safe_load((short / "config.yaml").read_text())["train"]["micro_batch_size"] == 2


def test_memory_that_runs_out_in_the_midst_of_a_step_leaves_no_half_gradient(corpus, tmp_path, monkeypatch):
    options = {"optimizer": {"lr": 1e-3}, "train": steps(3, micro_batch_size=4)}
    enough, _ = run(corpus, tmp_path / "enough", **options)
    calls, forward = [], llama.Model.forward

    def fails_once(self, input_ids, *args, **others):
        if isinstance(input_ids, FakeTensor):  # a plan
            return forward(self, input_ids, *args, **others)
        calls.extend([len(input_ids)] * torch.is_grad_enabled())
        if len(calls) == 4 and torch.is_grad_enabled():  # after the rehearsal, the second micro-batch of the first step
            raise MemoryError
        return forward(self, input_ids, *args, **others)

    monkeypatch.setattr(llama.Model, "forward", fails_once)
    short, _ = run(corpus, tmp_path / "short", **options)
    assert calls[:6] == [4, 4, 4, 4, 2, 2] and worst(weights(enough, 3), weights(short, 3)) < 1e-5


def test_a_single_row_that_does_not_fit_ends_with_the_largest_part_and_the_cheapest_change(
    corpus, tmp_path, monkeypatch
):
    break_beyond(monkeypatch, 0, MemoryError())
    with pytest.raises(MachineError, match="one row in a micro-batch") as caught:
        run(corpus, tmp_path, train=steps(3))
    assert caught.value.code == ENVIRONMENT and "GiB planned" in caught.value.got and caught.value.fix


def test_other_errors_are_not_taken_for_a_lack_of_memory(corpus, tmp_path, monkeypatch):
    tried = break_beyond(monkeypatch, 2, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        run(corpus, tmp_path, train=steps(3))
    assert tried == [8]
    assert not is_out_of_memory(RuntimeError("shapes do not match")) and not is_out_of_memory(OSError())


def test_an_evaluation_is_tried_before_the_first_step(corpus, tmp_path, monkeypatch):
    graded, forward = [], llama.Model.forward

    def watched(self, *args, **options):
        graded.append(torch.is_grad_enabled())
        return forward(self, *args, **options)

    monkeypatch.setattr(llama.Model, "forward", watched)
    run(corpus, tmp_path, train=steps(1, micro_batch_size=8), eval={"every": 1, "max_batches": 2})
    # The plan; a micro-batch and a batch of the evaluation are rehearsed; then evaluation, step, evaluation.
    assert graded == [True, True, False, False, False, True, False, False]


def test_a_save_that_fails_is_noticed_before_the_first_step_and_leaves_nothing(tmp_path):
    def write_half(folder):
        (folder / "half").write_text("x")
        raise OSError("no room")

    with pytest.raises(MachineError, match="the checkpoint can't be written: no room"):
        checkpoint.try_to_save(tmp_path, write_half)
    assert not list((tmp_path / "checkpoints").iterdir())


# ---- what is free ---------------------------------------------------------------------------------------------------


def test_the_peak_of_a_process_is_not_that_of_the_one_that_started_it():
    """Linux keeps the largest resident size over fork and exec, which is what getrusage tells."""
    peak = "from llmkit.parallel.memory import peak_memory; import torch; print(peak_memory(torch.device('cpu')))"
    code = f"import subprocess, sys; a = b'x' * 2**30; subprocess.run([sys.executable, '-c', {peak!r}], check=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2**30


def test_a_ulimit_lowers_what_is_free():
    code = "from llmkit.parallel.memory import free_memory; import torch; print(free_memory(torch.device('cpu')))"

    def free(gib: int) -> int:
        limit = (resource.RLIM_INFINITY,) * 2 if not gib else (gib * 2**30,) * 2
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                              preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limit))  # fmt: skip
        return int(done.stdout)

    assert free(4) < min(4 * 2**30, free(0))


@pytest.mark.parametrize("version", [1, 2])
def test_control_groups_limit_what_is_free_and_their_cache_counts_as_free(tmp_path, monkeypatch, version):
    root = tmp_path / "memory" if version == 1 else tmp_path
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    limit, usage, cache = names if version == 1 else ("memory.max", "memory.current", "inactive_file")
    (root / "job" / "step").mkdir(parents=True)
    (root / "job" / limit).write_text("1000\n")
    (root / "job" / usage).write_text("700\n")
    (root / "job" / "memory.stat").write_text(f"anon 1\n{cache} 50\n")
    (root / "job" / "step" / limit).write_text("max\n")
    own = tmp_path / "own"
    own.write_text("5:cpu:/\n4:memory:/job/step\n" if version == 1 else "0::/job/step\n")
    files = {key: (root, *names) for key, (_, *names) in memory.CGROUP_FILES.items()}
    monkeypatch.setattr(memory, "CGROUP_FILES", files)
    monkeypatch.setattr(memory, "OWN_CGROUPS", own)
    assert memory.cgroup_room() == 350
    own.write_text("0::/elsewhere\n")  # as in a container that does not see its own path
    assert memory.cgroup_room() == float("inf")


# ---- what is chosen -------------------------------------------------------------------------------------------------


def planned(tmp_path, **train):
    """Return the arguments of `choose_fit` for a model of 4 x 256 and rows of 1024 tokens."""
    sections = {"model": {"hidden_size": 256, "num_hidden_layers": 4, "max_position_embeddings": 1024,
                          "vocab_size": 2000}, "train": {"global_batch_size": 8, **train}}  # fmt: skip
    config = tiny_config(tmp_path, **sections)
    config["data"]["seq_len"] = 1024
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    checked = check(load_config(tmp_path / "c.yaml"))
    return checked.config, checked.options, checked.model_config


def test_less_memory_means_smaller_micro_batches_and_only_then_recomputed_blocks(tmp_path):
    config, options, model = planned(tmp_path)
    found = []
    for tenths in range(30, 4, -1):
        chosen, plan = choose_fit(config, 1, round(tenths * 1e8), options, model, "cuda", "bf16")
        found.append((chosen.train.micro_batch_size, chosen.train.gradient_checkpointing))
        smallest = found[-1] == (1, "full")
        assert plan.peak_memory <= 0.85 * tenths * 1e8 or smallest
    micros = [micro for micro, _ in found]
    assert micros == sorted(micros, reverse=True) and micros[0] == 8
    assert {mode for micro, mode in found if micro > 1} == {"none"}


def test_the_cheapest_change_is_a_smaller_micro_batch_then_recomputation_then_shorter_rows(tmp_path):
    config, options, model = planned(tmp_path, micro_batch_size=8, gradient_checkpointing="none")
    rooms = [round(3e9 * 0.85**n) for n in range(30)]
    fixes = [cheapest_change(config, options, 1, room, model, "cuda", "bf16") for room in rooms]
    words = ("smaller model", "seq_len", "checkpointing", "micro_batch")
    kinds = [next(i for i, word in enumerate(words) if word in fix) for fix in fixes]
    assert kinds == sorted(kinds, reverse=True) and {0, 3} <= set(kinds)


# ---- a step without data ---------------------------------------------------------------------------------------------

STEP = {
    "change": None, "make_optimizers": adamw, "precision": "bf16", "checkpointing": "none", "compiled": False,
    "accumulates": False, "averages": False,
}  # fmt: skip
ROWS = {"input_ids": (4, 64), "labels": (4, 64)}
SHAPE = {"vocab_size": 500, "hidden_size": 64, "num_attention_heads": 4}


def biggest(phases: dict[str, dict[str, int]]) -> dict[str, int]:
    """Return the parts of the phase that takes most."""
    return max(phases.values(), key=lambda parts: sum(parts.values()))


def test_weights_and_state_are_counted_to_the_byte():
    model = build_model(llama.Config(**SHAPE, num_hidden_layers=2), device="meta", seed=None)
    weights = 4 * sum(p.numel() for p in model.parameters())
    for optimizer, state in ((adamw, 2 * weights), (sgd, weights), (partial(sgd, momentum=0.0), 0)):
        phases = simulate_step(model.config, shapes=ROWS, **STEP | {"make_optimizers": optimizer, "averages": True})
        parts = biggest(phases)
        assert parts["trained weights"] == parts["average of weights"] == weights
        assert parts.get("optimizer", 0) == pytest.approx(state, abs=4 * 200)  # and a number of steps for each weight


def test_a_step_without_data_takes_what_a_step_with_data_takes(monkeypatch):
    config = llama.Config(**SHAPE, num_hidden_layers=3)
    for options in ({}, {"precision": "fp32"}, {"checkpointing": "full"}, {"accumulates": True}):
        planned = simulate_step(config, shapes=ROWS, **STEP | options)
        with monkeypatch.context() as real:
            real.setattr(simulate, "FakeTensorMode", lambda **_: contextlib.nullcontext())
            assert simulate_step(config, shapes=ROWS, **STEP | options) == planned


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "bert"])
@pytest.mark.parametrize("options", [{}, {"checkpointing": "full"}, {"checkpointing": 2}, {"compiled": True}])
def test_a_deep_model_is_planned_from_two_small_depths(family, options):
    config = CONFIGS[family](**SHAPE, num_hidden_layers=12)
    options = STEP | options
    whole = simulate_step(config, shapes=ROWS, **options)
    period = options["checkpointing"] if isinstance(options["checkpointing"], int) else 1
    quick = simulate_layers(config, period, True, shapes=ROWS, **options)
    assert sum(biggest(quick).values()) == pytest.approx(sum(biggest(whole).values()), rel=0.02)


@pytest.mark.parametrize("target, depths", [(None, {2, 3}), (["layers.0.self_attn.q_proj"], {12})])
def test_an_adapter_of_single_layers_is_planned_whole(monkeypatch, target, depths):
    seen = set()
    step = simulate.simulate_step
    monkeypatch.setattr(
        cost, "simulate_step", lambda config, **o: seen.add(config.num_hidden_layers) or step(config, **o)
    )
    peft = ("lora", vars(lora.Options(target_modules=target)))
    options = {"lengths": cost.Lengths(64), "micro_batch_size": 2, "precision": "bf16"}
    assert cost.memory(llama.Config(**SHAPE, num_hidden_layers=12), peft=peft, **options)["frozen weights"] > 0
    assert seen == depths


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_compiled_block_keeps_what_the_plan_says(family):
    """The kept bytes of four blocks more: what torch saves for the backward pass, against the plan."""
    kept, planned = [], []
    for depth in (2, 6):
        config = CONFIGS[family](**SHAPE, num_hidden_layers=depth)
        planned.append(simulate_step(config, shapes=ROWS, **STEP | {"compiled": True})["loss"]["activations"])
        model, saved = build_model(config), {}
        compile_blocks(model, torch.device("cpu"), "bf16")
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def note(t, own=own, saved=saved):
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = (storage.nbytes(), t)
            return t

        ids = torch.zeros(ROWS["labels"], dtype=torch.int64)
        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda t: t)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            model(ids, labels=ids)
        kept.append(sum(size for size, _ in saved.values()))
    assert planned[1] - planned[0] == pytest.approx(kept[1] - kept[0], rel=0.1)


# ---- llmkit plan ----------------------------------------------------------------------------------------------------


def test_plan_prices_a_gpu_that_is_not_here(tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tiny_config(tmp_path)))
    options = ("c.yaml", "--device", "h100-pcie", "--devices", 4, "--price", 2.5, "--json")
    figures = json.loads(llmkit("plan", *options, cwd=tmp_path).stdout)
    assert figures["device"] == "H100 PCIe" and figures["devices"] == 4 and figures["fits"]
    hours = figures["flops"] / (0.4 * 756e12 * 4) / 3600
    assert figures["cost"] == pytest.approx(hours * 2.5 * 4)
    assert figures["kilowatt_hours"] == pytest.approx(hours * 0.350 * 4)
    assert "python and torch" not in figures["memory_by_part"]
    refused = llmkit("plan", "c.yaml", "--device", "h10", cwd=tmp_path, code=2).stderr
    assert "did you mean H100?" in refused
    assert "no effect" in llmkit("plan", "c.yaml", "--layers", "--price", 1, cwd=tmp_path, code=2).stderr


def test_plan_lists_every_parameter_once(tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tiny_config(tmp_path)))
    layers = json.loads(llmkit("plan", "c.yaml", "--layers", "--json", cwd=tmp_path).stdout)["layers"]
    total = json.loads(llmkit("plan", "c.yaml", "--json", cwd=tmp_path).stdout)["parameters"]
    assert sum(row["parameters"] for row in layers) == total
    row = next(row for row in layers if row["name"].endswith("k_proj.weight"))
    assert row["shape"] == [16, 32] and row["layers"] == 2 and row["parameters"] == 2 * 16 * 32


def test_plan_bounds_serving_by_bandwidth(tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tiny_config(tmp_path)))
    figures = json.loads(llmkit("plan", "c.yaml", "--inference", "--device", "L4", "--json", cwd=tmp_path).stdout)
    assert figures["cache"] == {"64": 2 * 2 * 16 * 2 * 64}  # keys and values, 2 layers, 16 channels, bf16
    read = figures["parameters"] * 2 + 8 * figures["cache"]["64"]
    assert figures["tokens_per_second"]["bf16"]["64"]["8"] == pytest.approx(8 * 0.3e12 / read)


def test_plan_tells_how_far_it_was_off_before(corpus, tmp_path):
    where, _ = run(corpus, tmp_path, train=steps(1))
    about = json.loads((where / "run.json").read_text())
    assert about["planned_memory"] > 0
    figures = json.loads(
        llmkit("plan", tmp_path / "c.yaml", "-o", f"run_dir={tmp_path}/next", "--json", cwd=tmp_path,
               OMP_NUM_THREADS=str(torch.get_num_threads())).stdout
    )  # fmt: skip
    ratio = about["peak_memory"] / about["planned_memory"]
    assert figures["measured_before"] == {"runs": 1, "median": ratio, "lowest": ratio, "highest": ratio}


def test_an_allocation_fails_before_a_control_group_would_kill():
    code = """
import torch
from llmkit.errors import is_out_of_memory
from llmkit.parallel import memory
memory.cgroup_room = lambda: 300 * 2**20
memory.fail_before_killed()
small = torch.ones(2**24)
try:
    torch.ones(2**28)
except Exception as error:
    print(is_out_of_memory(error))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


# ---- blocks that are computed twice ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_selective_recomputation_repeats_no_product_and_keeps_less(family):
    """The FLOPs of the backward pass tell what it computes again: FlopCounterMode counts products and attention."""
    config = CONFIGS[family](vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    ids = torch.randint(64, (2, 48), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids.flip(1)} | ({"decoder_input_ids": ids} if family == "t5" else {})
    flops, grads = {}, {}
    for mode in ("none", "selective", 0.5, "full"):
        model = build_model(config, seed=0)
        apply_checkpointing(model, mode)
        with FlopCounterMode(display=False) as counter:
            model(**batch).backward()
        flops[mode] = counter.get_total_flops()
        grads[mode] = [p.grad for p in model.parameters() if p.grad is not None]
    for mode in ("selective", 0.5, "full"):
        for a, b in zip(grads["none"], grads[mode], strict=True):
            torch.testing.assert_close(a, b)
    assert flops["none"] == flops["selective"] < flops[0.5] < flops["full"]
    planned = {
        mode: cost.memory(
            config,
            lengths=cost.Lengths(48, 48 if family == "t5" else 0),
            micro_batch_size=2,
            precision="fp32",
            checkpointing=mode,
            compiled=False,
        )["activations"]
        for mode in flops
    }
    assert planned["none"] > planned["selective"] > planned[0.5]


def test_random_numbers_that_a_kept_product_drew_are_drawn_again():
    """On CUDA, attention with dropout is one operation. What it draws shifts what comes after it."""

    @library.custom_op("llmkit_test::_scaled_dot_product_test", mutates_args=())
    def drop(x: torch.Tensor, dropout_p: float) -> torch.Tensor:
        return x * (torch.rand_like(x) > dropout_p)

    drop.register_autograd(lambda context, gradient: (gradient, None))
    x, masks = torch.ones(64, requires_grad=True), []

    def block(x: torch.Tensor) -> torch.Tensor:
        mask = torch.rand_like(drop(x, 0.5))
        masks.append(mask)
        return (x * mask).square()

    recomputed(block, 1.0)(x).sum().backward()
    assert len(masks) == 2 and torch.equal(*masks)
    flash = torch.ops.aten._scaled_dot_product_flash_attention.default
    assert draws(flash, (x, x, x, 0.1), {}) and draws(flash, (x, x, x), {"dropout_p": 0.1})
    assert not draws(flash, (x, x, x), {}) and not draws(torch.ops.aten.mm.default, (x, x), {})


def test_changes_to_what_is_recomputed_keep_less_and_less():
    assert modes_below("none") == ("selective", 0.5, "full") and modes_below("selective") == (0.5, "full")
    assert modes_below(0.7) == (0.5, "full") and modes_below(0.3) == ("full",) == modes_below(2)
    assert modes_below("full") == () == modes_below(1)
