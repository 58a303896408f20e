"""Reinforcement from rewards: prompts, rewards, advantages, and the losses beside trl and by hand."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
import yaml
from conftest import SHARED, llmkit, metrics, needs_shared
from safetensors.torch import load_file, save_file
from test_families import OURS, made

from llmkit.config.records import PromptData
from llmkit.data.prompts import open_prompts
from llmkit.errors import UserError
from llmkit.generation.answers import write_tokens
from llmkit.generation.sampling import Sampling
from llmkit.models import build_model
from llmkit.models.folder import save_model
from llmkit.models.heads import HeadConfig, head_parameters
from llmkit.objectives import grpo
from llmkit.objectives.objective import Step
from llmkit.objectives.rewards import RewardConfig, Written, load_rewards
from llmkit.parallel.device import to_device
from llmkit.parallel.world import start_world
from llmkit.records.layouts import UnknownLayoutError
from llmkit.records.prompts import encode_prompt, encode_prompts, read_prompt
from llmkit.tokenizer.chat_template import encode_chat
from llmkit.tokenizer.train import train_tokenizer
from llmkit.training.objective import share_rows
from llmkit.types import Batch

CPU = torch.device("cpu")
USER, ANSWER = {"role": "user", "content": "How large?"}, {"role": "assistant", "content": "Very."}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["How large is the river in 12 + 34 = 46, or somebody else? It is."] * 3, vocab_size=300)


# ---- prompts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record",
    [
        {"question": "How large?", "answer": "Very. #### 12"},
        {"problem": "How large?", "solution": "12"},
        {"instruction": "How", "input": "large?"},
        {"messages": [USER]},
        {"messages": [USER, ANSWER]},
        {"prompt": [USER], "answer": "12", "level": 3},
        {"conversations": [{"from": "human", "value": "How large?"}, {"from": "gpt", "value": "Very."}]},
        {"messages": [USER, {"role": "model", "content": "Very."}]},
    ],
)
def test_a_prompt_is_what_comes_before_the_answer(record, tokenizer):
    _, one = read_prompt(record, {})
    asked = [{"role": "user", "content": "How\n\nlarge?" if "input" in record else "How large?"}]
    assert encode_prompt(tokenizer, one) == encode_chat(tokenizer, asked)


def test_a_prompt_that_is_a_text_is_continued(tokenizer):
    for record in ({"prompt": "12 + 34 ="}, {"prompt": "12 + 34 =", "answer": "46"}):
        assert encode_prompt(tokenizer, read_prompt(record, {})[1]) == tokenizer.encode_prompt("12 + 34 =")


@pytest.mark.parametrize(
    ("record", "kind"),
    [({"text": "a"}, UnknownLayoutError), ({"prompt": ""}, ValueError), ({"messages": []}, ValueError)],
)
def test_a_record_without_a_prompt_is_bad(record, kind):
    with pytest.raises(kind):
        read_prompt(record, {})


def test_prompts_come_with_their_records(tokenizer, tmp_path):
    lines = [{"prompt": f"{i} + 34 =", "answer": str(i + 34), "more": [i, "\u00e9"]} for i in range(20)]
    lines.append({"prompt": "large " * 60, "answer": "0"})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "no JSON\n")
    data = {"kind": "prompts", "path": str(tmp_path / "a.jsonl"), "on_error": {"max_bad_fraction": 0.2}}
    report = encode_prompts(PromptData(**data), tokenizer, tmp_path / "out", room=40, seed=0)
    assert report["found"]["too_long"] == 1 and report["records"]["bad"] == 1
    rows = open_prompts(tmp_path / "out" / report["key"], "train", 4, seed=0)
    found = [
        one for batch in rows.in_order() for one in zip(batch.input_ids, batch.lengths, batch.records, strict=True)
    ]
    assert len(found) == 19  # and one for val
    for ids, length, record in found:
        assert ids[:length].tolist() == tokenizer.encode_prompt(record["prompt"]) and record in lines
    assert encode_prompts(PromptData(**data), tokenizer, tmp_path / "out", room=40, seed=0)["key"] == report["key"]


@needs_shared
def test_the_problems_of_gsm8k_are_prompts(tokenizer, tmp_path):
    path = SHARED / "sft" / "gsm8k_test.jsonl"
    data = PromptData(kind="prompts", path=str(path), seq_len=4096)
    report = encode_prompts(data, tokenizer, tmp_path, room=4000, seed=0)
    number = sum(1 for line in path.open() if line.strip())
    assert sum(part["examples"] for part in report["splits"].values()) == number and not report["records"]["bad"]


# ---- rewards --------------------------------------------------------------------------------------------------------

RECORD = {"answer": "She has 3 * 4 = 12. #### 1,200", "name": "twelve"}


@pytest.mark.parametrize(
    ("options", "answer", "expected"),
    [
        ({"name": "exact"}, " 1,200\n", 1),
        ({"name": "exact"}, "1200", 0),
        ({"name": "number"}, "so 3 times 400 is 1200.", 1),
        ({"name": "number"}, "it is 1200, or 7", 0),
        ({"name": "number"}, "no", 0),
        ({"name": "exact", "field": "name"}, "twelve", 1),
        ({"name": "regex", "pattern": r"<a>(.*?)</a>", "field": "name"}, "I say <a>twelve</a>", 1),
        ({"name": "regex", "pattern": r"<a>(.*?)</a>", "field": "name"}, "twelve", 0),
        ({"name": "format", "pattern": r"(?s)<think>.*</think>\d+"}, "<think>\n</think>12", 1),
        ({"name": "format", "pattern": r"\d+"}, "12 ", 0),
        ({"name": "length", "most": 4}, "abcdef", 0.5),
        ({"name": "length", "most": 4}, "abc", 1),
    ],
)
def test_ready_rewards(options, answer, expected):
    [(weight, reward)] = load_rewards([RewardConfig(**options)]).values()
    assert reward(written(["?"], [answer], [RECORD])) == [expected] and weight == 1.0


def test_rewards_are_added_up_by_their_weights_whatever_their_names(tokenizer, tmp_path):
    (tmp_path / "my.py").write_text("def reward(completions, **_):\n    return [float(len(c)) for c in completions]\n")
    configs = [RewardConfig(name=f"{tmp_path}/my.py:reward", weight=0.1), RewardConfig(name="exact", weight=5.0)]
    prompts = Batch(np.array([[5, 6]]), np.zeros(1), lengths=np.array([2]))
    prompts.records = np.array([{"answer": tokenizer.decode([9])}], object)
    found = grpo.add_rewards(load_rewards(configs), tokenizer, prompts, [[9], [9, 9]], 2, device=CPU, rows=1)
    lengths = [len(tokenizer.decode([9])), len(tokenizer.decode([9, 9]))]
    assert found["reward_reward"].tolist() == lengths and found["reward_exact"].tolist() == [1, 0]
    np.testing.assert_allclose(found["reward"], [0.1 * lengths[0] + 5, 0.1 * lengths[1]])


def test_probabilities_are_those_at_the_temperature(tokenizer):
    model = speaking(tokenizer)
    ids = torch.tensor([[5, 6, 7, 8]])
    labels = torch.tensor([[-100, 7, 8, 9]])
    found = grpo.log_probs(model, {"input_ids": ids, "labels": labels}, 0.5)
    expected = (model(ids) / 0.5).log_softmax(-1)[0, [1, 2, 3], [7, 8, 9]]
    torch.testing.assert_close(found[0, 1:], expected)
    assert found[0, 0] == 0


def written(prompts, answers, records, tokens=()) -> Written:
    return Written(prompts, answers, records, [*tokens], CPU, 2)


def judge_folder(tokenizer, folder):
    """Write a reward model with random weights that reads as many tokens as the model that writes."""
    model = build_model(speaking(tokenizer).config, seed=5, head=HeadConfig("regress", ("reward",), "last"))
    for parameter in head_parameters(model).values():
        parameter.data *= 50.0  # at first they are next to 0
    save_model(model, folder, **tokenizer.config_ids)
    tokenizer.save(folder)
    return folder


def test_a_reward_model_rewards_as_transformers_does(tokenizer, tmp_path):
    rows = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 2, 1] * 3, [11]]
    [(_, reward)] = load_rewards([RewardConfig(name="model", path=str(judge_folder(tokenizer, tmp_path)))]).values()
    found = reward(written([""] * 3, [""] * 3, [{}] * 3, rows))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert found == pytest.approx([theirs(torch.tensor([row])).logits.item() for row in rows], abs=1e-5)


def test_a_reward_model_that_gives_no_number_ends_the_run(tokenizer, tmp_path):
    folder = judge_folder(tokenizer, tmp_path)
    tensors = {key: tensor * torch.inf for key, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    [(_, reward)] = load_rewards([RewardConfig(name="model", path=str(folder))]).values()
    with pytest.raises(UserError, match="not finite"):
        reward(written(["a"], ["first"], [{}], [[5, 6]]))


@pytest.mark.parametrize(
    ("window", "asked", "found"), [(None, None, 8), (8192, None, 8), (640, None, 3), (600, 3, None), (None, 5, 5)]
)
def test_rows_of_answers_fit_into_the_windows(window, asked, found):
    """512 tokens of prompt and answer, and 64 for each further answer."""
    config = SimpleNamespace(data=SimpleNamespace(seq_len=512))
    config.error = lambda key, what, **more: UserError(f"{key} {what}", **more)
    options = {"group_size": 8, "max_new_tokens": 64, "answers_per_row": asked}
    windows = SimpleNamespace(windows=[None, window])
    if found:
        assert share_rows(config, options, windows) == found
        return
    with pytest.raises(UserError, match="a window would hide"):
        share_rows(config, options, windows)


def own(folder, body: str):
    (folder / "my.py").write_text(body)
    return load_rewards([RewardConfig(name=f"{folder}/my.py:score")])["score"][1]


def test_a_function_of_the_user_is_called_as_trl_calls_it(tmp_path):
    reward = own(tmp_path, "def score(prompts, completions, level, **kwargs):\n"
                           "    assert kwargs['other'] == [None, 1]\n"
                           "    return [len(c) + l for c, l in zip(completions, level)]\n")  # fmt: skip
    assert reward(written(["a", "b"], ["xx", ""], [{"level": 1}, {"level": 2, "other": 1}])) == [3, 2]
    few = own(tmp_path, "def score(completions):\n    return [0.5] * len(completions)\n")
    assert few(written(["a"], ["x"], [{"level": 1}])) == [0.5]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("def score(completions, **_):\n    return [float('nan') for _ in completions]\n", "not finite"),
        ("def score(completions, **_):\n    return [1.0]\n", "another number"),
        ("def score(completions, **_):\n    return None\n", "no list of numbers"),
        ("def score(completions, **_):\n    x = 1\n    return [1 / 0]\n", "my.py:3"),
    ],
)
def test_a_bad_reward_ends_with_the_sample_and_the_line(body, words, tmp_path):
    with pytest.raises(UserError) as error:
        own(tmp_path, body)(written(["a", "b"], ["first", "second"], [{}, {}]))
    assert words in str(error.value) and (words != "my.py:3" or "first" in str(error.value))


@pytest.mark.parametrize(
    ("name", "words"),
    [("exakt", "no such reward"), ("none.py:f", "no such Python file"), ("rewards.txt:f", "my.py:function")],
)
def test_a_reward_that_is_not_there_is_named(name, words):
    with pytest.raises(UserError, match=words):
        load_rewards([RewardConfig(name=name)])


# ---- answers --------------------------------------------------------------------------------------------------------


def speaking(tokenizer):
    config = made(OURS["llama"]).config
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 128
    return build_model(config, device="cpu", seed=3)


def test_an_answer_has_the_token_that_ends_it(tokenizer):
    model, prompts = speaking(tokenizer), [[5, 6], [7], [5, 6]]
    options = {"max_new_tokens": 40, "sampling": Sampling(temperature=1.0, top_k=None), "seed": 2}
    whole = write_tokens(model, prompts, stop=frozenset(), **options)
    assert [len(one) for one in whole] == [40, 40, 40] and whole[0] != whole[2]
    stop = frozenset([whole[0][3], whole[1][10]])
    cut = write_tokens(model, prompts, stop=stop, **options)
    for one, answer in zip(whole, cut, strict=True):
        first = next((i for i, token in enumerate(one) if token in stop), 39)
        assert answer == one[: first + 1]
    assert write_tokens(model, prompts, stop=stop, rows=1, **options) == cut  # in parts, the same draws


def test_advantages_by_hand():
    rewards = np.array([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5]])
    assert grpo.group_advantages(rewards, scaled=False).tolist() == [[0.75, -0.25, -0.25, -0.25], [0.0] * 4]
    np.testing.assert_allclose(grpo.group_advantages(rewards, scaled=True)[0, 0], 0.75 / (0.5 + 1e-4))


def rollout(tokenizer, model, folder, *, step: int = 0, **options):
    """Return the objective, and what it makes of two prompts."""
    settings = {"reward": "length", "group_size": 3, "max_new_tokens": 6} | options
    objective = grpo.grpo(tokenizer, 0, None, **settings)
    prompts = Batch(np.array([[5, 6, 7], [8, 0, 0]]), np.zeros(2), lengths=np.array([3, 1]))
    prompts.records = np.array([{}, {}], object)
    about = Step(step, 7 + step, start_world(), 4, folder)
    return objective, *objective.prepare(model, prompts, about)


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo", "cispo", "gspo"])
def test_the_ratio_is_one_before_the_first_update(loss, tokenizer, tmp_path):
    """With several updates, log-probabilities are kept: of two answers in a row, they are those of each text alone."""
    model, options = speaking(tokenizer), {"loss": loss, "updates": 2, "answers_per_row": 2}
    _, kept, figures = rollout(tokenizer, model, tmp_path, **options)
    assert kept.old is not None and figures["answer_tokens"] > 0 and len(kept.labels) == 4
    for row, prompt in enumerate([[5, 6, 7], [5, 6, 7], [8], [8]]):
        for number in range(kept.answers[row].max() + 1):
            cells = kept.answers[row] == number
            answer = kept.labels[row, cells].tolist()
            ours = model(torch.tensor([prompt + answer])).log_softmax(-1)[0, len(prompt) - 1 : -1]
            ours = ours.gather(1, torch.tensor(answer)[:, None])[:, 0].detach().numpy()
            assert np.abs(np.exp(ours - kept.old[row, cells]) - 1).max() < 1e-5
    _, again, same = rollout(tokenizer, model, tmp_path, step=1, **options)
    assert same == figures and all(np.array_equal(again.arrays()[key], kept.arrays()[key]) for key in kept.arrays())


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo", "cispo", "gspo"])
def test_answers_that_share_a_row_have_the_gradient_of_rows_of_their_own(loss, tokenizer):
    found = []
    for most in (1, 2, 3):
        model = speaking(tokenizer)
        objective, rows, _ = rollout(tokenizer, model, None, loss=loss, temperature=0.7, answers_per_row=most)
        parts, advantages = grpo.slices_of_rows(6, 3, most), np.array([0.5, -1.0, 2.0, 0.3, -0.2, -0.7], np.float32)
        assert len(parts) == len(rows.labels) and rows.advantages.shape == (len(parts), most)
        for row, part in zip(rows.advantages, parts, strict=True):
            row[: part.stop - part.start] = advantages[part]
        total, metrics = objective.loss(model, to_device(rows, CPU))
        total.backward()
        weights = [p.grad for p in model.parameters()]
        found.append([torch.tensor(rows.count), total.detach(), *metrics.values(), *weights])
    for other in found[1:]:
        for mine, theirs in zip(found[0], other, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


TRL = {
    "grpo": {"loss_type": "grpo"},
    "dapo": {"loss_type": "dapo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.28},  # trl's is the bound of the ratio itself
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
}


@pytest.mark.parametrize("loss", TRL)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_losses_equal_those_of_trl(loss, beta, tokenizer, monkeypatch):
    """The same answers, old log-probabilities and advantages, after an update that has moved the ratios."""
    from trl import GRPOConfig, GRPOTrainer

    torch.manual_seed(0)
    rows, length = 6, 9
    labels = torch.randint(0, 50, (rows, length))
    ends = torch.tensor([9, 4, 7, 1, 9, 3])
    mask = torch.arange(length) < ends[:, None]
    ours = torch.randn(rows, length).mul(0.4).sub(2.0).requires_grad_()
    old, theirs = ours.detach() + 0.4 * torch.randn(rows, length), ours.detach() + 0.2 * torch.randn(rows, length)
    advantages = torch.randn(rows)
    in_pairs = lambda x, empty: torch.where(mask, x, empty).view(rows // 2, 2 * length)  # noqa: E731 (two in a row)
    monkeypatch.setattr(grpo, "log_probs", lambda model, batch, _: in_pairs(ours, 0.0))
    monkeypatch.setattr(grpo, "reference_log_probs", lambda model, batch, _: in_pairs(theirs, 0.0))
    counts = {"grpo": 1, "gspo": 1, "dr_grpo": 12}.get(loss)
    counts = ends if counts is None else torch.full((rows,), counts)
    batch = {"labels": in_pairs(labels, -100), "old": in_pairs(old, 0.0), "advantages": advantages.view(-1, 2)}
    batch |= {"counts": counts.view(-1, 2).sum(1), "answers": in_pairs(torch.arange(rows)[:, None] % 2, -1)}
    options = {"loss": loss, "epsilon": 0.2, "epsilon_high": 0.28, "beta": beta, "temperature": 1.0}
    found, figures = grpo.sum_of_losses(None, batch, **options)
    (found / counts.sum()).backward()
    mine, ours.grad = ours.grad, None

    settings = {"epsilon": 0.2, "epsilon_high": 0.28, "beta": beta, "max_completion_length": 12, "report_to": []}
    settings |= {"use_cpu": True, "bf16": False, "num_generations": 2, "per_device_train_batch_size": 2} | TRL[loss]
    trainer = GRPOTrainer.__new__(GRPOTrainer)
    args = GRPOConfig(output_dir="unused", **settings)
    vars(trainer).update(bare_trainer(args, loss))
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (ours, torch.zeros_like(ours), None)
    inputs = {
        "prompt_ids": torch.zeros(rows, 1, dtype=torch.long), "prompt_mask": torch.ones(rows, 1, dtype=torch.long),
        "completion_ids": labels, "completion_mask": mask.long(), "advantages": advantages,
        "old_per_token_logps": old, "ref_per_token_logps": theirs, "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    expected = trainer._compute_loss(None, inputs)
    expected.backward()
    torch.testing.assert_close(found.detach() / counts.sum(), expected.detach())
    torch.testing.assert_close(mine, ours.grad)
    assert (figures["clipped"] > 0) and ("kl" in figures) == bool(beta)


def bare_trainer(args, loss: str) -> dict:
    """Return the attributes of trl's trainer that its loss reads."""
    from collections import defaultdict
    from types import SimpleNamespace

    accelerator = SimpleNamespace(
        device=CPU, num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction=None: x, unwrap_model=lambda x: x,
    )  # fmt: skip
    return {
        "args": args, "beta": args.beta, "loss_type": args.loss_type, "epsilon_low": args.epsilon,
        "epsilon_high": args.epsilon_high, "importance_sampling_level": args.importance_sampling_level,
        "max_completion_length": args.max_completion_length, "top_entropy_quantile": 1.0, "accelerator": accelerator,
        "model": SimpleNamespace(training=True), "current_gradient_accumulation_steps": 1, "use_vllm": False,
        "off_policy_mask_threshold": None, "_metrics": {"train": defaultdict(list)}, "entropy_coef": 0.0,
        "use_bias_correction_kl": False, "num_iterations": 2, "_entropy_bonus_enabled": False, "temperature": 1.0,
        "aux_loss_enabled": False, "tools": None, "vllm_importance_sampling_correction": False,
    }  # fmt: skip


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tokenizer, tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("grpo"), speaking(tokenizer)
    model.lm_head.weight.data *= 10.0  # at first an adapter would hardly change what it says
    save_model(model, folder / "base", **tokenizer.config_ids)
    tokenizer.save(folder / "base")
    lines = [{"prompt": f"{i} + 34 =", "letter": "aeiou"[i % 5]} for i in range(24)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    share = "sum(map(str.isalpha, c)) / max(1, len(c))"
    judge_folder(tokenizer, folder / "judge")
    (folder / "mine.py").write_text(f"def share(completions, **_):\n    return [{share} for c in completions]\n")
    return folder


def write_run(folder, name: str, objective: dict, **sections) -> str:
    config = {
        "init_from": "base",
        "data": {"kind": "prompts", "path": "prompts.jsonl", "seq_len": 40, "val_fraction": 0.2},
        "objective": {"name": "grpo", "reward": "mine.py:share", "group_size": 8, "max_new_tokens": 8} | objective,
        "optimizer": {"name": "adamw", "lr": 2e-3, "weight_decay": 0.0},
        "schedule": {"name": "constant"},
        "train": {"max_steps": 24, "global_batch_size": 8, "precision": "fp32"},
        "eval": {"every": 6},
        "checkpoint": {"every": 8},
        "log": {"every": 1},
    } | sections
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return f"{name}.yaml"


RUNS = {
    "full": ({}, {}),
    "lora": ({"beta": 0.01}, {"peft": {"name": "lora", "r": 8}, "optimizer": {"name": "adamw", "lr": 1e-2}}),
    "full_beta": ({"beta": 0.1}, {}),
    "judged": ({"reward": {"name": "model", "path": "judge"}}, {}),
    "again": ({"updates": 2, "loss": "gspo"}, {}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_rewarded_and_goes_on_with_the_same_bits(name, workplace):
    objective, sections = RUNS[name]
    config, how = write_run(workplace, name, objective, **sections), "--lora" if "peft" in sections else "--full"
    said = llmkit("finetune", config, how, "-o", f"run_dir=runs/{name}", cwd=workplace).stdout
    assert "8 x 1 rows of up to 8 answers = 8 micro x 1 accumulated x 1 rank, up to 96 tokens each" in said
    found = metrics(workplace / "runs" / name)
    assert found[-1]["tokens"] / (24 * 8) > 8 * 8  # a row has eight answers
    rewards = [record["reward"] for record in found if "reward" in record]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.02
    own_name = "reward_model" if name == "judged" else "reward_share"
    assert {own_name, "answer_tokens", "equal_groups", "clipped"} <= found[-1].keys()
    if "beta" in objective:  # what training started from says the same before the first step
        kls = [record["kl"] for record in found if "kl" in record]
        assert kls[0] == pytest.approx(0, abs=1e-6) and kls[-1] > 1e-3
    for steps in (3, 24):  # with two updates, it stops between them
        printed = llmkit("finetune", config, how, "-o", f"run_dir=runs/{name}-2", "-o", f"train.max_steps={steps}",
                         cwd=workplace).stdout  # fmt: skip
    assert "resumed" in printed
    once, twice = (
        load_file(next((workplace / f"runs/{run}/checkpoints/step-000024/model").glob("*model.safetensors")))
        for run in (name, f"{name}-2")
    )
    assert all(torch.equal(once[key], twice[key]) for key in once)
    again = [record["reward"] for record in metrics(workplace / "runs" / f"{name}-2") if "reward" in record]
    assert again == rewards


def test_a_step_does_not_depend_on_its_micro_batches(workplace):
    found = []
    for size in (1, 8):
        config = write_run(workplace, f"micro-{size}", {})
        llmkit("finetune", config, "--full", "-o", f"run_dir=runs/micro-{size}", "-o", f"train.micro_batch_size={size}",
               "-o", "train.max_steps=2", cwd=workplace)  # fmt: skip
        found.append(load_file(workplace / f"runs/micro-{size}/checkpoints/step-000002/model/model.safetensors"))
    assert max((found[0][key] - found[1][key]).abs().max() for key in found[0]) < 1e-3


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("objective.max_new_tokens=40", "leaves no room"),
        ("objective.reward=none.py:f", "no such Python file"),
        ("objective.reward={name: model, path: base}", "has no head that gives a number"),
        ("objective.reward=model", "needs a path"),
        ("train.compile=true", "differ in length"),
        ("objective.group_size=1", "group_size"),
        ("objective.answers_per_row=9", "is over objective.group_size"),
        ("objective.name=dpo", "grpo"),
        ("objective.reward={name: exact, fild: a}", "fild"),
        ("objective.reward={name: exact, most: 3}", "has no most"),
        ("objective.reward=format", "needs a pattern"),
        ("objective.reward=[]", "names no reward"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_trained(override, words, workplace):
    config = write_run(workplace, "bad", {})
    done = llmkit("finetune", config, "--full", "-o", "run_dir=runs/bad", "-o", override, cwd=workplace, code=2)
    assert words in done.stderr and not (workplace / "runs/bad/checkpoints").exists()
