"""Preferences: the layouts of records, trees of a prompt with two answers, and the losses, beside trl."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
import yaml
from conftest import SHARED, llmkit, metrics, needs_shared
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_families import OURS, made

from llmkit.config.records import PreferenceData
from llmkit.data.preferences import must_part, open_trees
from llmkit.errors import MODEL
from llmkit.models import build_model
from llmkit.models.attention import attention_mask
from llmkit.models.block_mask import make_block_mask
from llmkit.models.folder import load_model, save_model
from llmkit.objectives import kto, preference
from llmkit.objectives.objective import Step
from llmkit.parallel.device import to_device
from llmkit.parallel.world import start_world
from llmkit.peft import lora
from llmkit.records.build import encode_turns
from llmkit.records.layouts import OtherKindError, UnknownLayoutError
from llmkit.records.preferences import read_preference
from llmkit.tokenizer.train import train_tokenizer

CPU = torch.device("cpu")
ASKED, GOOD, BAD = "How large is it?", "It is large.", "Ask somebody else."
USER, SAYS = {"role": "user", "content": ASKED}, lambda text: {"role": "assistant", "content": text}
SYSTEM = {"role": "system", "content": "Be brief."}

# ---- layouts --------------------------------------------------------------------------------------------------------

CHATS = {
    "texts": ({"question": ASKED, "chosen": GOOD, "rejected": BAD}, [USER]),
    "instruction": ({"instruction": "How large", "input": "is it?", "output": GOOD, "chosen": GOOD, "rejected": BAD},
                    [{"role": "user", "content": "How large\n\nis it?"}]),
    "system": ({"system": "Be brief.", "question": ASKED, "chosen": GOOD, "rejected": BAD}, [SYSTEM, USER]),
    "paired": ({"question": ASKED, "response_j": GOOD, "response_k": BAD}, [USER]),
    "prompt of turns": ({"prompt": [SYSTEM, USER], "chosen": [SAYS(GOOD)], "rejected": [SAYS(BAD)]}, [SYSTEM, USER]),
    "whole conversations": ({"chosen": [USER, SAYS(GOOD)], "rejected": [USER, SAYS(BAD)]}, [USER]),
    "ultrafeedback": ({"prompt": ASKED, "prompt_id": "1", "chosen": [USER, SAYS(GOOD)], "rejected": [USER, SAYS(BAD)],
                       "messages": None, "score_chosen": 8.0}, [USER]),
    "turns in JSON": ({"chosen": json.dumps([USER, SAYS(GOOD)]), "rejected": json.dumps([USER, SAYS(BAD)])}, [USER]),
    "llama-factory": ({"conversations": [{"from": "human", "value": ASKED}], "chosen": {"from": "gpt", "value": GOOD},
                       "rejected": {"from": "gpt", "value": BAD}}, [USER]),
    "hh-rlhf": ({"chosen": f"\n\nHuman: {ASKED}\n\nAssistant: {GOOD}",
                 "rejected": f"\n\nHuman: {ASKED}\n\nAssistant: {BAD}"}, [USER]),
    "messages": ({"messages": [USER], "chosen": GOOD, "rejected": BAD}, [USER]),
    "ultrafeedback_binarized": ({"prompt": ASKED, "messages": [USER, SAYS(GOOD)], "chosen": [USER, SAYS(GOOD)],
                                 "rejected": [USER, SAYS(BAD)]}, [USER]),
    "messages that are answered": ({"messages": [USER, SAYS(GOOD)], "chosen": GOOD, "rejected": BAD}, [USER]),
}  # fmt: skip


@pytest.mark.parametrize("name", CHATS)
def test_layouts_of_pairs(name):
    record, asked = CHATS[name]
    _, (better, worse), verdict = read_preference(record, {}, Counter())
    assert verdict is None
    for one, text in ((better, GOOD), (worse, BAD)):
        assert one.messages == [*asked, SAYS(text)]
        assert one.learnt == [False] * len(asked) + [True]


def test_the_common_part_of_longer_conversations_is_the_prompt():
    before = [USER, SAYS("Which one?"), {"role": "user", "content": "The river."}]
    after = [{"role": "user", "content": "And why?"}, SAYS("Rain.")]
    record = {"chosen": [*before, SAYS(GOOD), *after], "rejected": [*before, SAYS(BAD)]}
    _, (better, worse), _ = read_preference(record, {}, Counter())
    assert better.learnt == [False] * 3 + [True, False, True] and worse.learnt == [False] * 3 + [True]


def test_a_prompt_and_texts_that_continue_it_are_left_as_they_are():
    layout, pairs, _ = read_preference({"prompt": "The sky is", "chosen": " blue.", "rejected": " up."}, {}, Counter())
    assert pairs == [("The sky is", " blue."), ("The sky is", " up.")] and layout == "prompt/chosen/rejected"


@pytest.mark.parametrize(
    ("record", "verdict"),
    [
        ({"prompt": "The sky is", "completion": " blue.", "label": True}, True),
        ({"prompt": "The sky is", "completion": " up.", "label": "0"}, False),
        ({"instruction": ASKED, "output": BAD, "kto_tag": False}, False),
        ({"messages": [USER, SAYS(GOOD)], "label": 1.0}, True),
        ({"prompt": [USER], "completion": [SAYS(GOOD)], "label": True}, True),
    ],
)
def test_layouts_with_a_verdict(record, verdict):
    _, examples, found = read_preference(record, {}, Counter())
    assert found is verdict and len(examples) == 1


@pytest.mark.parametrize(
    ("record", "kind", "words"),
    [
        ({"question": ASKED, "chosen": GOOD}, ValueError, "no rejected"),
        ({"question": ASKED, "chosen": GOOD, "rejected": " "}, ValueError, "rejected is empty"),
        ({"question": ASKED, "chosen": GOOD, "rejected": 3}, ValueError, "rejected is no answer"),
        ({"question": ASKED, "answer": GOOD}, OtherKindError, "data.kind: sft"),
        ({"text": "The sky is blue."}, UnknownLayoutError, "text"),
        ({"prompt": "a", "completion": "b", "label": "good"}, ValueError, "neither true nor false"),
        ({"chosen": GOOD, "rejected": BAD}, ValueError, "Human"),
        ({"chosen": [USER, SAYS(GOOD)], "rejected": [{**USER, "content": "?"}, SAYS(BAD)]}, ValueError, "in common"),
        ({"question": ASKED, "chosen": GOOD, "rejected": BAD, "images": ["a.png"]}, ValueError, "images"),
    ],
)  # fmt: skip
def test_a_bad_record_says_what_is_wrong(record, kind, words):
    with pytest.raises(kind) as error:
        read_preference(record, {}, Counter())
    assert type(error.value) is kind and words in f"{error.value} {getattr(error.value, 'fix', '')}"


# ---- trees ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Ask how large a river is, or somebody else. It is brief."] * 3, vocab_size=300)


def write_pairs(path, number: int = 12, label: bool = False) -> None:
    """Write pairs whose better answer repeats the question's last word."""
    words = "river code loss model token".split()
    with path.open("w") as file:
        for i in range(number):
            asked = f"Is {i} large, or the {words[i % 5]}?"
            good, bad = f"The {words[i % 5]}" + " is large" * (i % 3), f"Ask {i}" + " somebody" * (i % 4)
            file.write(json.dumps({"question": asked, "chosen": good, "rejected": bad}) + "\n")


def encoded(tokenizer, folder, seq_len: int = 48, **options):
    folder.mkdir(parents=True, exist_ok=True)
    write_pairs(folder / "pairs.jsonl")
    settings = {"kind": "preference", "path": str(folder / "pairs.jsonl"), "seq_len": seq_len, "workers": 1}
    data = PreferenceData(**settings | options.pop("data", {}))
    return encode_turns(data, tokenizer, folder / "out", seed=0, form="trees", **options)


def sequences(batch) -> list[tuple[list[int], list[int]]]:
    """Return (inputs, labels) of every answer of a batch of trees, each with its prompt, in the order of the rows."""
    found = []
    for row in range(len(batch.input_ids)):
        for answer in range(batch.answers[row].max() + 1):
            if not (batch.answers[row] == answer).any():
                continue
            segment = batch.segments[row][batch.answers[row] == answer][0]
            mine = batch.segments[row] == segment
            if batch.branches is not None:
                branch = batch.branches[row][batch.answers[row] == answer][0]
                mine &= (batch.branches[row] == 0) | (batch.branches[row] == branch)
            found.append((batch.input_ids[row][mine].tolist(), batch.labels[row][mine].tolist()))
    return found


def test_a_row_has_whole_trees_with_the_prompt_once(tokenizer, tmp_path):
    report = encoded(tokenizer, tmp_path, seq_len=120)
    batch = open_trees(tmp_path / "out" / report["key"], "train", 1, seed=0).rows([0])
    assert batch.input_ids.shape == (1, 240) and batch.count > 2  # several trees share the row
    texts = [tokenizer.decode([*inputs[:1], *[i for i in labels if i >= 0]]) for inputs, labels in sequences(batch)]
    read = [tokenizer.decode(inputs) for inputs, _ in sequences(batch)]
    assert len(texts) == 2 * batch.count
    for better, worse in zip(read[::2], read[1::2], strict=True):
        assert better.split("?")[0] == worse.split("?")[0]
    inputs = batch.input_ids[batch.segments >= 0]
    assert len(inputs) < sum(len(one) for one, _ in sequences(batch)) - 20 * batch.count  # prompts are there once
    first, start = batch.positions[0][batch.branches[0] == 1][0], batch.positions[0][batch.branches[0] == 2][0]
    assert first == start  # both answers go on from the same place


@pytest.mark.parametrize("name", ["gpt2", "llama_yarn", "qwen2", "gemma", "falcon", "mistral", "mixtral"])
@torch.no_grad()
def test_a_tree_has_the_log_probabilities_of_its_answers_alone(name, tokenizer, tmp_path):
    config = OURS[name]
    if name == "mistral":  # a window that holds each answer with its prompt, but not both answers
        config = replace(config, sliding_window=35)
    model = made(config)
    apart = must_part(config.windows, 60)
    report = encoded(tokenizer, tmp_path, seq_len=30, apart=apart, data={"too_long": "truncate_prompt"})
    rows = open_trees(tmp_path / "out" / report["key"], "train", 2, seed=0)
    batch = rows.rows(list(range(rows.samples)))
    batch.input_ids %= config.vocab_size
    batch.labels[batch.labels >= 0] %= config.vocab_size
    sums, lengths, _ = preference.answer_log_probs(model, to_device(batch, torch.device("cpu")))
    alone = []
    for inputs, labels in sequences(batch):
        losses = model(torch.tensor([inputs]), torch.tensor([labels]), reduction="none")
        alone.append(-losses.sum())
    there = lengths > 0
    assert there.sum() == len(alone) == 2 * batch.count
    torch.testing.assert_close(sums[there], torch.stack(alone), rtol=1e-4, atol=1e-4)


def test_a_block_mask_shows_what_the_mask_of_numbers_shows():
    torch.manual_seed(0)
    segments = torch.randint(0, 3, (2, 300)).sort().values
    numbers = [0] * 40 + [1] * 70 + [2] * 50 + [0] * 60 + [1] * 40 + [2] * 40
    branches = torch.tensor([numbers, numbers[::-1]])
    blocks = make_block_mask(segments, 300, None, torch.device("cpu"), branches=branches)
    plain = attention_mask(segments, 300, None, torch.device("cpu"), branches=branches)
    grid = torch.arange(300)
    seen = blocks.mask_mod(torch.tensor([0, 1])[:, None, None], 0, grid[:, None], grid)
    assert torch.equal(seen[:, None], plain)
    listed = blocks.to_dense().bool()  # (B, H, 3, 3)
    needed = F.pad(plain, (0, 84, 0, 84)).unflatten(2, (3, 128)).unflatten(4, (3, 128)).any(5).any(3)
    assert not (needed & ~listed).any()
    full = torch.zeros_like(listed)
    for row in range(2):
        for query in range(3):
            for key in blocks.full_kv_indices[row, 0, query, : blocks.full_kv_num_blocks[row, 0, query]]:
                full[row, 0, query, key] = True
    everything = F.pad(plain, (0, 84, 0, 84)).unflatten(2, (3, 128)).unflatten(4, (3, 128)).all(5).all(3)
    assert not (full & ~everything).any()


def test_a_prompt_is_cut_for_both_answers_and_no_answer_is(tokenizer, tmp_path):
    whole = encoded(tokenizer, tmp_path / "a", seq_len=120, data={"packing": False})
    cut = encoded(tokenizer, tmp_path / "b", seq_len=30, data={"packing": False, "too_long": "truncate_prompt"})
    dropped = encoded(tokenizer, tmp_path / "c", seq_len=46, data={"packing": False})
    assert cut["found"]["too_long"]["prompt truncated"] > 0 and dropped["found"]["too_long"]["left out"] > 0
    answers = {}
    for name, report in (("a", whole), ("b", cut)):
        batches = open_trees(tmp_path / name / "out" / report["key"], "train", 1, seed=0)
        answers[name] = set()
        for row in range(batches.samples):
            pair = sequences(batches.rows([row]))
            answers[name].add(tuple(tuple(i for i in labels if i >= 0) for _, labels in pair))
            assert len({tuple(inputs[: len(inputs) - sum(i >= 0 for i in labels)]) for inputs, labels in pair}) == 1
    assert answers["b"] <= answers["a"] and answers["b"]


def test_equal_answers_are_left_out_and_counted(tokenizer, tmp_path):
    record = {"question": ASKED, "chosen": GOOD}
    lines = [record | {"rejected": BAD}, record | {"rejected": GOOD}, record | {"rejected": "No."}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    data = PreferenceData(kind="preference", path=str(tmp_path / "a.jsonl"), workers=1, val_fraction=0.4)
    report = encode_turns(data, tokenizer, tmp_path / "out", seed=0, form="trees")
    assert report["found"]["same_answers"] == 1
    assert sum(part["examples"] for part in report["splits"].values()) == 2


@needs_shared
@pytest.mark.parametrize("file", ["dpo_en_demo.json", "instruction-data-with-preference.json"])
def test_public_preferences_are_read_whole(file, tokenizer, tmp_path):
    path = SHARED / "preference" / file
    number = len(json.loads(path.read_text()))
    data = PreferenceData(kind="preference", path=str(path), seq_len=16384, workers=1)
    report = encode_turns(data, tokenizer, tmp_path, seed=0, form="trees")
    assert not report["records"]["bad"] and not report["found"]["too_long"]
    examples = sum(part["examples"] for part in report["splits"].values())
    assert examples + report["found"]["same_answers"] == number


# ---- losses ---------------------------------------------------------------------------------------------------------


def base_folder(tokenizer, folder, seed: int = 3):
    """Save a tiny model that both sides open."""
    config = made(OURS["llama"]).config
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 128
    model = build_model(config, device="cpu", seed=seed)
    save_model(model, folder, **tokenizer.config_ids)
    tokenizer.save(folder)
    return folder


TRL = {  # ours -> (trl's trainer and options)
    "sigmoid": ({"loss": "sigmoid"}, "dpo", {"loss_type": "sigmoid"}),
    "sigmoid_norm": ({"loss": "sigmoid", "length_normalize": True}, "dpo", {"loss_type": "sigmoid_norm"}),
    "hinge": ({"loss": "hinge", "beta": 0.3}, "dpo", {"loss_type": "hinge", "beta": 0.3}),
    "ipo": ({"loss": "ipo"}, "dpo", {"loss_type": "ipo"}),
    "simpo": ({"loss": "simpo", "beta": 2.0}, "cpo", {"loss_type": "simpo", "beta": 2.0, "cpo_alpha": 0.0}),
    "orpo": ({"loss": "orpo"}, "orpo", {}),
}


@pytest.mark.parametrize(
    ("name", "adapted"),
    [*((name, False) for name in TRL), ("sigmoid", True), ("ipo", True)],  # about the reference
)
def test_twenty_steps_have_the_losses_of_trl(name, adapted, tokenizer, tmp_path):
    """The same weights, pairs and optimizer, in fp32: two pairs a step."""
    ours, trainer, theirs = TRL[name]
    base = base_folder(tokenizer, tmp_path / "base")
    records = [
        {"prompt": f"Is {i} large", "chosen": " is it" * (1 + i % 3), "rejected": " or somebody" * (1 + i % 4)}
        for i in range(40)
    ]
    expected = losses_of_trl(trainer, theirs, base, records, tmp_path, adapted)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    data = PreferenceData(kind="preference", path=str(tmp_path / "pairs.jsonl"), packing=False, seq_len=64, workers=1,
                          val_path=str(tmp_path / "pairs.jsonl"))  # fmt: skip
    report = encode_turns(data, tokenizer, tmp_path / "out", seed=0, form="trees")
    folder = tmp_path / "out" / report["key"]
    model = adapted_model(base, tmp_path / "theirs") if adapted else load_model(base)
    batches = open_trees(folder, "train", 2, seed=0)
    objective = preference.dpo(tokenizer, 0, None, **ours)
    if not adapted:
        with torch.no_grad():
            sums = [preference.answer_log_probs(model, to_device(one, CPU))[0] for one in batches.in_order()]
        np.save(folder / "train-reference.npy", torch.cat(sums).numpy())
        batches = open_trees(folder, "train", 2, seed=0)
    found = take_steps(objective, model, batches)
    assert len(found) == 20 and abs(found[0] - found[-1]) > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_twenty_steps_of_kto_have_the_losses_of_trl(tokenizer, tmp_path):
    base = base_folder(tokenizer, tmp_path / "base")
    records = [
        {"prompt": f"Is {i} large", "completion": " is it" * (1 + i % 3), "label": i % 3 != 1} for i in range(80)
    ]
    options = {"beta": 0.2, "desirable_weight": 0.7, "train_sampling_strategy": "sequential"}
    expected = losses_of_trl("kto", options, base, records, tmp_path, True, size=4)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    data = PreferenceData(kind="preference", path=str(tmp_path / "a.jsonl"), packing=False, seq_len=64, workers=1,
                          val_path=str(tmp_path / "a.jsonl"))  # fmt: skip
    report = encode_turns(data, tokenizer, tmp_path / "out", seed=0, form="trees", single=True)
    model = adapted_model(base, tmp_path / "theirs")
    batches = open_trees(tmp_path / "out" / report["key"], "train", 4, seed=0)
    objective = kto.kto(tokenizer, 0, None, beta=0.2, desirable_weight=0.7)
    found = take_steps(objective, model, batches)
    assert len(found) == 20 and abs(found[0] - found[-1]) > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def adapted_model(base, folder):
    """Return a model with the adapter that peft has saved in a folder, to be trained."""
    model = load_model(base)
    lora.apply(model, lora.Options(r=4, alpha=8.0), seed=1)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        for key, tensor in lora.METHOD.tensors(model).items():
            tensor.data.copy_(file.get_tensor(f"base_model.model.{key}"))
    return model


def take_steps(objective, model, batches) -> list[float]:
    """Return the losses of a step on each batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    found = []
    for number, batch in enumerate(batches.in_order()):
        if objective.prepare:
            batch, _ = objective.prepare(model, batch, Step(number, 0, start_world(), 2, None))
        loss, _ = objective.loss(model, to_device(batch, CPU))
        (loss / batch.count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item() / batch.count)
    return found


def losses_of_trl(
    trainer: str, options: dict, base, records: list[dict], folder, adapted: bool, size: int = 2
) -> list[float]:
    """Return the losses of 20 steps of a trainer of trl, which reads the records in order."""
    import datasets
    import peft
    from torch.utils.data import SequentialSampler

    if trainer == "dpo":
        from trl import DPOConfig as Settings
        from trl import DPOTrainer as Trainer
    elif trainer == "cpo":
        from trl.experimental.cpo import CPOConfig as Settings
        from trl.experimental.cpo import CPOTrainer as Trainer
    elif trainer == "kto":
        from trl import KTOConfig as Settings
        from trl import KTOTrainer as Trainer
    else:
        from trl.experimental.orpo import ORPOConfig as Settings
        from trl.experimental.orpo import ORPOTrainer as Trainer

    class InOrder(Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return SequentialSampler(self.train_dataset)

        def concatenated_forward(self, *args):
            """Let trl's ORPO learn the answers alone, as the paper's equation has it; it learns the prompts too."""
            chosen, *others = super().concatenated_forward(*args)
            return (chosen, *others[:3], -chosen.mean()) if trainer == "orpo" else (chosen, *others)

    settings = Settings(
        output_dir=str(folder / "trl"), per_device_train_batch_size=size, max_steps=20, logging_steps=1, report_to=[],
        learning_rate=1e-3, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, save_strategy="no",
        use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, max_length=64, **options,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    more = {}
    if adapted:
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        torch.manual_seed(0)
        model = peft.get_peft_model(model, config)
        model.save_pretrained(folder / "theirs")
    elif trainer == "dpo":
        more["ref_model"] = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    read = transformers.AutoTokenizer.from_pretrained(base)
    train = datasets.Dataset.from_list(records)
    made = InOrder(model=model, args=settings, processing_class=read, train_dataset=train, **more)
    made.train()
    return [line["loss"] for line in made.state.log_history if "loss" in line]


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tokenizer, tmp_path_factory):
    """Return a folder with a base, pairs, and verdicts."""
    folder = tmp_path_factory.mktemp("preference")
    base_folder(tokenizer, folder / "base")
    write_pairs(folder / "pairs.jsonl", 40)
    return folder


def write_run(folder, name: str, objective: dict, **sections):
    config = {
        "init_from": "base",
        "data": {"kind": "preference", "path": "pairs.jsonl", "seq_len": 64, "val_fraction": 0.2},
        "objective": objective,
        "optimizer": {"name": "adamw", "lr": 5e-3},
        "schedule": {"name": "constant"},
        "train": {"max_steps": 6, "global_batch_size": 4, "precision": "fp32", "compile": False},
        "eval": {"every": 3},
        "checkpoint": {"every": 3},
        "log": {"every": 1},
    } | sections
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return f"{name}.yaml"


LORA = {"name": "lora", "r": 4, "dropout": 0.1}
RUNS = {
    "lora": ({"name": "dpo"}, {"peft": LORA}),
    "full": ({"name": "dpo", "loss": "ipo"}, {}),
    "kto": ({"name": "kto"}, {"peft": LORA}),
    "kto_full": ({"name": "kto"}, {}),
    "reward": ({"name": "reward"}, {}),
    "without_reference": ({"name": "dpo", "loss": "simpo", "beta": 2.0}, {}),
}


def trained(folder, step: int) -> dict[str, torch.Tensor]:
    return load_file(next((folder / f"checkpoints/step-{step:06d}/model").glob("*model.safetensors")))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_learns_the_preference_and_goes_on_with_the_same_bits(name, workplace):
    objective, sections = RUNS[name]
    config = write_run(workplace, name, objective, **sections)
    printed = llmkit("finetune", config, "--lora" if "peft" in sections else "--full", "-o", f"run_dir=runs/{name}",
                     cwd=workplace).stdout  # fmt: skip
    run, found = workplace / "runs" / name, metrics(workplace / "runs" / name)
    evaluated = [record for record in found if "val_loss" in record]
    assert evaluated[-1]["val_loss"] < evaluated[0]["val_loss"] and evaluated[-1]["val_accuracy"] > 0.9
    if name not in ("without_reference", "reward"):  # nothing is preferred before the first step
        estimate = "val_kl" if name.startswith("kto") else "val_kl_estimate"
        assert evaluated[0][estimate] == pytest.approx(0, abs=1e-4)
        assert evaluated[0]["val_margin"] == pytest.approx(0, abs=1e-4)
        assert ("computing what" in printed) == (name == "full")
    options = ["--lora" if "peft" in sections else "--full", "-o", f"run_dir=runs/{name}-again"]
    for steps in (3, 6):
        again = llmkit("finetune", config, *options, "-o", f"train.max_steps={steps}", cwd=workplace)
    assert "resumed" in again.stdout and "computing what" not in again.stdout
    once, twice = trained(run, 6), trained(workplace / "runs" / f"{name}-again", 6)
    assert all(torch.equal(once[key], twice[key]) for key in once)


def test_a_copy_of_the_start_is_planned_and_must_stay_as_it_was(workplace):
    shutil.copytree(workplace / "base", workplace / "base-copy")
    config = write_run(workplace, "copied", {"name": "kto"}, init_from="base-copy")
    planned = [json.loads(llmkit("plan", config, "--json", *more, cwd=workplace).stdout)["memory_by_part"]
               for more in ([], ["-o", "peft={name: lora}"])]  # fmt: skip
    assert planned[0]["other models"] == planned[0]["trained weights"] and "other models" not in planned[1]
    args = ["finetune", config, "--full", "-o", "run_dir=runs/copied"]
    llmkit(*args, "-o", "train.max_steps=3", cwd=workplace)
    weights = workplace / "base-copy/model.safetensors"
    tensors = {key: tensor + 0.01 for key, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    assert "is compared with has changed" in llmkit(*args, cwd=workplace, code=MODEL).stderr


@pytest.mark.parametrize("objective", ["dpo", "kto", "reward"])
def test_a_step_does_not_depend_on_its_micro_batches(objective, workplace):
    name = f"micro-{objective}"
    config = write_run(workplace, name, {"name": objective}, peft=LORA | {"dropout": 0.0})
    for size in (1, 4):
        llmkit("finetune", config, "--lora", "-o", f"run_dir=runs/{name}-{size}",
               "-o", f"train.micro_batch_size={size}", cwd=workplace)  # fmt: skip
    one, four = (trained(workplace / f"runs/{name}-{size}", 6) for size in (1, 4))
    assert max((one[key] - four[key]).abs().max() for key in one) < 1e-4
    found = [metrics(workplace / f"runs/{name}-{size}") for size in (1, 4)]
    losses = [[record["loss"] for record in one if "loss" in record] for one in found]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


def test_the_answers_of_a_run_are_shown_and_measured(workplace):
    config = write_run(workplace, "shown", {"name": "dpo"}, peft=LORA)
    shown = json.loads(llmkit("data", "inspect", config, "--rows", "1", "--json", cwd=workplace).stdout)
    tree = shown["rows"][0][0]
    texts = {part: "".join(token["text"] for token in tokens) for part, tokens in tree.items()}
    assert "large, or the" in texts["prompt"] and texts["better"].startswith("The") and texts["worse"].startswith("Ask")
    assert "[[+The" in llmkit("data", "inspect", config, "--rows", "1", cwd=workplace).stdout
    llmkit("finetune", config, "--lora", "-o", "run_dir=runs/shown", cwd=workplace)
    measured = json.loads(llmkit("eval", "runs/shown", "--json", cwd=workplace).stdout)
    assert "better answers" in measured["data"] and measured["loss"] > 0


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_a_reward_model_tells_the_better_answer_as_transformers_does(adapted, workplace):
    """It opens as a classifier with one output, whose numbers are those of `llmkit score`."""
    how = "--lora" if adapted else "--full"
    sections = {"peft": {"name": "lora", "r": 4}} if adapted else {}
    config = write_run(workplace, f"reward{how}", {"name": "reward"}, **sections, train={
        "max_steps": 30, "global_batch_size": 8, "precision": "fp32"}, eval={"every": 10})  # fmt: skip
    run = f"runs/reward{how}"
    printed = llmkit("finetune", config, how, "-o", f"run_dir={run}", cwd=workplace).stdout
    assert "llmkit score" in printed
    measured = json.loads(llmkit("eval", run, "--precision", "fp32", "--json", cwd=workplace).stdout)
    best = min((r for r in metrics(workplace / run) if "val_loss" in r), key=lambda r: r["val_loss"])
    assert measured["accuracy"] > 0.9 and measured["loss"] == pytest.approx(best["val_loss"], abs=1e-4)
    on_file = json.loads(llmkit("eval", run, "--data", "pairs.jsonl", "--json", cwd=workplace).stdout)
    assert on_file["pairs"] == 40 and on_file["accuracy"] > 0.9
    rows = json.loads(llmkit("score", run, "pairs.jsonl", "--json", cwd=workplace).stdout)
    merged = workplace / f"merged{how}"
    llmkit("export", run, merged, cwd=workplace)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(merged, dtype=torch.float32)
    read = transformers.AutoTokenizer.from_pretrained(merged)
    first = json.loads((workplace / "pairs.jsonl").read_text().splitlines()[0])
    asked = [{"role": "user", "content": first["question"]}]
    for name in ("chosen", "rejected"):
        chat = [*asked, {"role": "assistant", "content": first[name]}]
        text = read.apply_chat_template(chat, tokenize=False).rstrip("\n")
        ids = torch.tensor([read(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            assert theirs(ids).logits.item() == pytest.approx(rows[0][name], abs=1e-4)
    shown = llmkit("data", "inspect", config, "--rows", "1", cwd=workplace).stdout
    assert shown.count("large,·or·the") == 2 and "[[+" in shown and "[[-" in shown  # each with its prompt


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("objective.label_smoothing=0.1", "has no effect on this loss"),
        ("objective.loss=kl", "sigmoid"),
        ("data.too_long=split", "too_long"),
        ("objective.name=lm", "dpo"),
        ("data.columns={chosn: a}", "chosen"),
        ("data.path=answers.jsonl", "data.kind: sft"),
        ("data.path=verdicts.jsonl", "--objective kto"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_trained(override, words, workplace):
    (workplace / "answers.jsonl").write_text(json.dumps({"question": ASKED, "answer": GOOD}) + "\n")
    record = {"prompt": "Is it", "completion": " large", "label": True}
    (workplace / "verdicts.jsonl").write_text("".join(json.dumps(record) + "\n" for _ in range(4)))
    config = write_run(workplace, "bad", {"name": "dpo", "loss": "hinge"}, peft=LORA)
    done = llmkit("finetune", config, "--lora", "-o", "run_dir=runs/bad", "-o", override, cwd=workplace, code=None)
    assert done.returncode in (2, 3) and words in done.stderr and not (workplace / "runs/bad/checkpoints").exists()
