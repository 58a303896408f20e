"""Tasks: questions, prompts and scores equal lm-evaluation-harness's, and prefixes that are shared change nothing."""

import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import SHARED, llmkit, needs_shared
from tokenizers.processors import TemplateProcessing

from llmkit.errors import DataError, UserError
from llmkit.intervals import bootstrap, fairness, mean_interval, paired_difference, wilson
from llmkit.models import CONFIGS, build_model
from llmkit.tasks.encode import encode_answers, encode_windows
from llmkit.tasks.likelihood import ROW, Request, best_groups, score_requests
from llmkit.tasks.prompts import Question
from llmkit.tasks.run import prepare, run_task
from llmkit.tasks.task import read_task
from llmkit.tokenizer.train import train_tokenizer

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
DECODERS = [name for name, config in CONFIGS.items() if config(**SHAPE).kind == "causal"]


def sharp_model(family: str = "llama", **options) -> torch.nn.Module:
    """Return a model whose predictions differ clearly, so that no score is near another one."""
    model = build_model(CONFIGS[family](**SHAPE | options), seed=0)
    for p in model.parameters():
        p.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(p.numel()))
    return model


# ---- likelihood -----------------------------------------------------------------------------------------------------


def draw_requests(seed: int) -> tuple[list[Request], list[int]]:
    """Return requests that share examples and questions as those of tasks do, and ones that share nothing."""
    draw = random.Random(seed)

    def tokens(number: int) -> tuple[int, ...]:
        return tuple(draw.choices(range(300), k=number))

    requests, owners = [], []
    for _ in range(3):
        examples = tokens(draw.randint(10, 30))
        for _ in range(draw.randint(1, 5)):
            question = examples + tokens(draw.randint(1, 12))
            for _ in range(4):
                answer = tokens(draw.randint(1, 6))
                requests.append(Request(question + answer, len(answer)))
                owners.append(len(owners) // 4)
    requests += [Request(tokens(9), 8), Request(tokens(2), 1), Request(requests[0].tokens[:5] + tokens(7), 7)]
    owners += [1000, 1001, 1002]
    for i in range(2):  # two contexts, one ending: WinoGrande
        requests.append(Request(requests[0].tokens[:12] + tokens(3 + i) + (5, 6, 7), 3))
        owners.append(2000)
    return requests, owners


@pytest.mark.parametrize("family", DECODERS)
def test_shared_prefixes_change_no_score(family, monkeypatch):
    windows = {"sliding_window": 8} if family in ("mistral", "mixtral") else {}
    model = sharp_model(family, **windows)
    requests, owners = draw_requests(0)
    alone = score_requests(model, requests, share=False)
    for most in (1024, 64, 1):
        monkeypatch.setitem(ROW, "cpu", most)
        together = score_requests(model, requests, owners)
        for one, other in zip(alone, together, strict=True):
            assert one.log_prob == pytest.approx(other.log_prob, abs=2e-4) and one.greedy == other.greedy


def test_a_score_is_the_log_probability_that_the_plain_forward_pass_gives():
    model, (requests, owners) = sharp_model(), draw_requests(1)
    scores = score_requests(model, requests, owners)
    for request, score in zip(requests, scores, strict=True):
        with torch.no_grad():
            log_probs = model(torch.tensor([request.tokens[:-1]]))[0].log_softmax(-1)[-request.scored :]
        targets = torch.tensor(request.tokens[-request.scored :])
        assert score.log_prob == pytest.approx(log_probs.gather(1, targets[:, None]).sum().item(), abs=1e-4)
        assert score.greedy == bool((log_probs.argmax(-1) == targets).all())


def test_what_is_shared_is_read_once():
    model, read = sharp_model(), []
    model.register_forward_pre_hook(lambda module, args: read.append(args[0].numel()))
    examples = tuple(range(100))
    requests = [Request((*examples, q, q + 1, a), 1) for q in range(20) for a in range(4)]
    score_requests(model, requests, [i // 4 for i in range(80)])
    assert sum(read) == 100 + 20 * 2  # the four answers are one token each, which is not read


def test_groups_that_share_save_the_most_tokens():
    assert best_groups([]) == [(0, 1, 0)]
    assert best_groups([50, 0, 50]) == [(0, 2, 50), (2, 4, 50)]
    assert best_groups([40, 50, 40]) == [(0, 4, 40)]
    assert best_groups([3, 3]) == [(0, 1, 0), (1, 2, 0), (2, 3, 0)]  # too short to read alone


# ---- statistics -----------------------------------------------------------------------------------------------------


def test_intervals_have_published_values():
    low, high = wilson(0.5, 100)
    assert (round(low, 4), round(high, 4)) == (0.4038, 0.5962)  # Wilson's interval of 50 in 100
    assert mean_interval([0, 1]) == wilson(0.5, 2)
    low, high = mean_interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 1.959964 / math.sqrt(3), 2 + 1.959964 / math.sqrt(3)), abs=1e-5)
    error, (low, high) = bootstrap([0.0, 1.0] * 50, lambda items: sum(items) / len(items))
    assert error == pytest.approx(0.05, abs=0.005) and low == pytest.approx(0.4, abs=0.03)


def test_a_difference_is_named_only_where_there_is_one():
    draw = random.Random(0)
    right = [draw.random() < 0.5 for _ in range(400)]
    better = [one or draw.random() < 0.2 for one in right]
    assert paired_difference(better, right)["verdict"] == "higher"
    assert paired_difference(right, better)["verdict"] == "lower"
    other = [draw.random() < 0.5 for _ in range(400)]
    assert paired_difference(right, other)["verdict"] == "no clear difference"


def test_fairness_by_hand():
    groups, targets, chosen = ["a", "a", "b", "b"], [1, 0, 1, 0], [1, 1, 1, 0]
    found = fairness(groups, [int(t == c) for t, c in zip(targets, chosen, strict=True)], chosen, targets)
    assert found["accuracy_by_group"] == {"a": 0.5, "b": 1.0}
    assert found["demographic_parity"] == 0.5  # a chooses 1 always, b half of the time
    assert found["equalized_odds"] == 1.0  # of those that are 0, a always says 1 and b never


# ---- task files -----------------------------------------------------------------------------------------------------

QUESTIONS = [
    {"question": f"Is {a} larger than {b}", "answers": ["yes", "not at all"], "right": int(a <= b), "kind": "ab"[a % 2]}
    for a, b in zip(range(12), [5, 3, 9, 1, 7, 2, 8, 4, 6, 11, 0, 10], strict=True)
]
CHOICE = """
task: larger
dataset_path: json
dataset_kwargs: {data_files: {test: q.jsonl, train: q.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}?\\nAnswer:"
doc_to_choice: answers
doc_to_target: right
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    (tmp_path / "choice.yaml").write_text(CHOICE)
    return tmp_path


def change(folder: Path, **values: str) -> Path:
    """Write the task with other keys, and return its file."""
    text = "\n".join(line for line in CHOICE.splitlines() if line.partition(":")[0] not in values)
    (folder / "changed.yaml").write_text(text + "\n" + "\n".join(f"{k}: {v}" for k, v in values.items()) + "\n")
    return folder / "changed.yaml"


def test_prompts_of_a_choice(folder):
    one = prepare(folder / "choice.yaml", shots=0).questions[0]
    assert one.contexts == ["Question: Is 0 larger than 5?\nAnswer:"]
    assert one.answers == [" yes", " not at all"] and one.target == 1


def test_examples_come_before_a_question_and_are_never_the_question(folder):
    for sampler in ("default", "first_n"):
        file = change(folder, fewshot_config=f"{{sampler: {sampler}}}")
        for one in prepare(file, shots=3).questions:
            *examples, last = one.contexts[0].split("\n\n")
            assert len(examples) == 3 and last == f"Question: {one.doc['question']}?\nAnswer:"
            assert not any(example.startswith(last) for example in examples)
    again = [prepare(file, shots=3).questions[i].contexts for i in range(12)]
    assert again == [one.contexts for one in prepare(file, shots=3).questions]


def test_examples_are_of_the_same_group(folder):
    file = change(folder, group_by="kind")
    kinds = {one["question"]: one["kind"] for one in QUESTIONS}
    for one in prepare(file, shots=2).questions:
        examples = [text.partition("?")[0].removeprefix("Question: ") for text in one.contexts[0].split("\n\n")]
        assert {kinds[example] for example in examples} == {one.doc["kind"]}


def test_scores_have_errors_intervals_and_groups(folder):
    model, tokenizer = sharp_model(), train_tokenizer(["yes no larger"] * 20, vocab_size=280)
    choices = '["yes", "not at all"]'
    file = change(folder, group_by="kind", doc_to_choice=choices, fairness="true")
    result = run_task(prepare(file), model, tokenizer)
    figures = result.figures
    assert figures["n"] == 12 and figures["acc"] == sum(result.items["acc"]) / 12
    low, high = figures["acc_interval"]
    assert low < figures["acc"] < high
    assert {group: own["n"] for group, own in figures["groups"].items()} == {"a": 6, "b": 6}
    assert set(figures["fairness"]) >= {"demographic_parity", "equalized_odds", "bias_amplification"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"output_typ": "x"}, "did you mean output_type"),
        ({"fairness": "true"}, "group_by"),
        ({"metric_list": "[{metric: accuracy}]"}, "no such metric"),
        ({"metric_list": "[{metric: bleu}]"}, "does not fit"),
        ({"doc_to_text": "!function mine.text"}, "code of its own"),
        ({"doc_to_text": '"{{nothing}}"'}, "nothing"),
        ({"doc_to_text": '"{{question"'}, "parsed"),
        ({"doc_to_text": "\"{{'a' * 10**9}}\""}, "memory"),
        ({"doc_to_target": "question"}, "none of its choices"),
        ({"doc_to_choice": "question"}, "not a list"),
        ({"doc_to_image": "x"}, "harness"),
        ({"test_split": "validation"}, "no files of the split"),
        ({"dataset_kwargs": "{data_files: {test: other.jsonl}}"}, "no file for the split"),
    ],
)
def test_a_bad_task_is_one_error(folder, values, words):
    with pytest.raises(UserError) as error:
        prepare(change(folder, **values))
    assert words in str(error.value) and len(str(error.value).splitlines()) <= 14


def test_an_empty_file_and_a_broken_record_are_errors(folder):
    (folder / "q.jsonl").write_text("")
    with pytest.raises(DataError):
        prepare(folder / "choice.yaml")
    (folder / "q.jsonl").write_text('{"question": "a"\n')
    with pytest.raises(DataError, match="can't be read"):
        prepare(folder / "choice.yaml")


def test_code_of_a_task_runs_only_if_allowed(folder):
    (folder / "mine.py").write_text("def text(doc):\n    return 'Q ' + doc['question']\n")
    file = change(folder, doc_to_text="!function mine.text")
    assert prepare(file, allow_code=True).questions[0].contexts == ["Q Is 0 larger than 5"]


def test_answers_that_do_not_fit_are_counted_and_prompts_are_cut_on_the_left():
    tokenizer, lost = train_tokenizer(["abc"] * 20, vocab_size=280), Counter()
    long = Question({}, 0, ["x" * 50], ["a" * 30, "b"], 0, ["a", "b"])
    short = Question({}, 1, ["x" * 50], ["yy", "b"], 0, ["a", "b"])
    found = encode_answers([long, short], tokenizer, 20, lost)
    assert found[0] is None and [len(one.tokens) for one in found[1]] == [21, 21] and sum(lost.values()) == 2


def test_windows_score_each_token_once():
    tokenizer = train_tokenizer(["abc"] * 20, vocab_size=280)
    text = "the quick brown fox jumps over the lazy dog" * 3
    ids = tokenizer.encode(text)
    for positions in (7, 64, 1000):
        found = list(encode_windows(text, tokenizer, positions))
        assert [t for one in found for t in one.tokens[-one.scored :]] == ids
        assert max(len(one.tokens) for one in found) <= positions + 1


# ---- beside the harness ---------------------------------------------------------------------------------------------


def harness_scores(file: Path, model, tokenizer, folder: Path, shots: int, limit: int | None = None) -> dict:
    """Return the scores that lm-evaluation-harness computes with its own backend for transformers."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from llmkit.models.folder import save_model

    out = folder / "hf"
    save_model(model, out)
    tokenizer.save(out)
    lm = HFLM(pretrained=str(out), device="cpu", dtype="float32", batch_size=4)
    manager = TaskManager(include_path=str(file.parent), include_defaults=False)
    found = lm_eval.simple_evaluate(
        lm, tasks=[file.stem], task_manager=manager, num_fewshot=shots, limit=limit, bootstrap_iters=0
    )
    return found["results"][file.stem]


HARNESS_TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "Question: {{question}}?\\nAnswer:"
doc_to_choice: answers
doc_to_target: right
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: mcc}, {metric: f1}, {metric: brier_score}]
""",
    "contexts": """
output_type: multiple_choice
doc_to_text: "{{right}}"
doc_to_choice: "{{['The ' ~ answers[0] ~ ' ', 'A ' ~ answers[1]]}}"
doc_to_target: question
metric_list: [{metric: acc}]
""",
    "last_word": """
output_type: loglikelihood
doc_to_text: "{{question.split(' ')[:-1] | join(' ')}}"
doc_to_target: "{{' ' ~ question.split(' ')[-1]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "whole": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question ~ ' ' ~ answers | join(', ') ~ question * 3}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "written": """
output_type: generate_until
doc_to_text: "{{question}}?"
doc_to_target: "{{answers[right]}}"
generation_kwargs: {until: ["e", "\\n"], max_gen_toks: 12, do_sample: false}
filter_list:
  - {name: first, filter: [{function: regex, regex_pattern: "[a-z]", group_select: 0}, {function: take_first}]}
metric_list: [{metric: exact_match, ignore_case: true, regexes_to_ignore: ["[^y]"]}]
""",
}


KINDS = [(name, shots) for name in HARNESS_TASKS for shots in (0, 2) if not (name == "whole" and shots)]


def write_harness_task(folder: Path, name: str, test: list[dict], train: list[dict]) -> Path:
    """Write a task of HARNESS_TASKS with its records, and return its file."""
    files = {"test": str(folder / "test.jsonl"), "train": str(folder / "train.jsonl")}
    for split, own in (("test", test), ("train", train)):
        Path(files[split]).write_text("".join(json.dumps(one) + "\n" for one in own))
    head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {json.dumps(files)}}}\n"
    head += "test_split: test\ntraining_split: train\nfewshot_split: train\nmetadata: {version: 1}\n"
    file = folder / f"{name}.yaml"
    file.write_text(head + HARNESS_TASKS[name])
    return file


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shots"), KINDS)  # whole texts have no examples
def test_scores_equal_the_harness(name, shots, tmp_path):
    records = [one | {"question": one["question"] + " ".join("xyz"[: i % 3])} for i, one in enumerate(QUESTIONS * 2)]
    file = write_harness_task(tmp_path, name, records[:14], records[14:])
    tokenizer = train_tokenizer([json.dumps(one) for one in records], vocab_size=300)
    model = sharp_model(vocab_size=len(tokenizer), max_position_embeddings=96)
    theirs = harness_scores(file, model, tokenizer, tmp_path, shots)
    ours = run_task(prepare(file, shots=shots), model, tokenizer).figures
    for key, value in theirs.items():
        metric, _, filtered = key.partition(",")
        own = metric if filtered == "none" else f"{metric},{filtered}"
        if own in ours and isinstance(value, int | float):  # the errors of some scores are "N/A"
            assert ours[own] == pytest.approx(value, rel=1e-4), key
    assert theirs.keys() & {"acc,none", "byte_perplexity,none", "exact_match,first"}


@pytest.mark.slow
@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize("name", ["choice", "last_word", "written"])
def test_scores_of_an_encoder_and_a_decoder_equal_the_harness(name, shots, tmp_path):
    file = write_harness_task(tmp_path, name, QUESTIONS[:10], QUESTIONS[10:])
    tokenizer = train_tokenizer([json.dumps(one) for one in QUESTIONS], "unigram", vocab_size=280)
    end = (tokenizer.eos, tokenizer.eos_id)
    tokenizer.rust.post_processor = TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    model = sharp_model("t5", vocab_size=len(tokenizer), max_position_embeddings=128)
    theirs = harness_scores(file, model, tokenizer, tmp_path, shots)
    ours = run_task(prepare(file, shots=shots), model, tokenizer).figures
    named = {key: key.removesuffix(",none") for key, value in theirs.items() if isinstance(value, int | float)}
    shared = [key for key, own in named.items() if own in ours]
    assert shared
    for key in shared:
        assert ours[named[key]] == pytest.approx(theirs[key], rel=1e-3), key


@pytest.mark.slow
def test_the_harness_asks_our_model_through_its_interface(tmp_path, monkeypatch):
    """A task by its name: its prompts and metrics, and scores equal those of its own backend."""
    lm_eval_tasks = pytest.importorskip("lm_eval.tasks")
    from llmkit.tasks.harness import harness_task
    from llmkit.tasks.results import compare

    for name in ("choice", "whole", "written", "last_word"):
        for split in ("test", "train"):
            own = QUESTIONS[:8] if split == "test" else QUESTIONS[8:]
            (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in own))
        files = {split: str(tmp_path / f"{split}.jsonl") for split in ("test", "train")}
        head = f"task: own_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {json.dumps(files)}}}\n"
        head += "test_split: test\ntraining_split: train\nfewshot_split: train\nmetadata: {version: 1}\n"
        (tmp_path / f"own_{name}.yaml").write_text(head + HARNESS_TASKS[name])
    (tmp_path / "both.yaml").write_text(
        "group: both\ntask: [own_choice, own_last_word]\n"
        "aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]\nmetadata: {version: 1}\n"
    )
    (tmp_path / "tagged.yaml").write_text((tmp_path / "own_choice.yaml").read_text() + "tag: collection\n")
    real = lm_eval_tasks.TaskManager
    monkeypatch.setattr(lm_eval_tasks, "TaskManager", lambda *a, **k: real(include_path=str(tmp_path)))
    monkeypatch.setattr(
        "lm_eval.evaluator.TaskManager", lambda *a, **k: real(include_path=str(tmp_path)), raising=False
    )
    tokenizer = train_tokenizer([json.dumps(one) for one in QUESTIONS], vocab_size=300)
    model = sharp_model(vocab_size=len(tokenizer), max_position_embeddings=96)
    for name in ("choice", "whole", "written", "last_word"):
        shots = 0 if name == "whole" else 1
        found = harness_task(f"own_{name}", [], shots=shots, limit=None, chat=False).run(model, tokenizer)
        ours = run_task(prepare(tmp_path / f"own_{name}.yaml", shots=shots), model, tokenizer)
        for metric in ours.items:
            if metric in found.figures:
                assert found.figures[metric] == pytest.approx(ours.figures[metric], rel=1e-4), metric
        assert found.figures["n"] == 8 and ours.items.keys() & found.figures.keys()
        if name == "choice":
            assert compare([found], [found])["own_choice"]["acc"]["verdict"] == "no difference"
    group = harness_task("both", [], shots=0, limit=None, chat=False).run(model, tokenizer)
    assert group.figures["n"] == 16 and not group.items
    with pytest.raises(UserError, match="collection"):
        harness_task("collection", [], shots=0, limit=None, chat=False)
    with pytest.raises(UserError, match="no task"):
        harness_task("own_choise", [], shots=0, limit=None, chat=False)


CODE = """
def prepare(dataset):
    return dataset.map(lambda doc: {"question": doc["question"].upper()})


def results(doc, results):
    best = max(range(len(results)), key=lambda i: results[i][0])
    return {"own": float(best == doc["right"]), "pair": (doc["right"], best)}


def same(predictions, references):
    return {"same": predictions[0] == references[0]}
"""


def test_code_of_a_task_prepares_records_and_scores_results(folder):
    (folder / "mine.py").write_text(CODE)
    file = change(
        folder,
        process_docs="!function mine.prepare",
        process_results="!function mine.results",
        metric_list="[{metric: own, aggregation: mean}, {metric: pair, aggregation: matthews_corrcoef}]",
    )
    model, tokenizer = sharp_model(), train_tokenizer(["yes no larger"] * 20, vocab_size=280)
    prepared = prepare(file, allow_code=True)
    assert "IS 0 LARGER THAN 5" in prepared.questions[0].contexts[0]
    figures = run_task(prepared, model, tokenizer).figures
    plain = run_task(prepare(change(folder, process_docs="!function mine.prepare"), allow_code=True), model, tokenizer)
    assert figures["own"] == plain.figures["acc"] and -1 <= figures["pair"] <= 1
    with pytest.raises(UserError, match="no such aggregation"):
        prepare(change(folder, metric_list="[{metric: acc, aggregation: nonsense}]"))


def test_a_metric_of_the_user_gets_the_answer_and_the_right_one(folder):
    (folder / "mine.py").write_text(CODE)
    model, tokenizer = sharp_model(), train_tokenizer(["yes no larger"] * 20, vocab_size=280)
    result = run_task(prepare(folder / "choice.yaml", metrics=[f"{folder / 'mine.py'}:same"]), model, tokenizer)
    assert result.figures["same"] == result.figures["acc"]
    with pytest.raises(UserError, match=r"my.py:function"):
        prepare(folder / "choice.yaml", metrics=["mine.same"])


def test_several_right_answers_and_equal_records(folder):
    records = [{"question": f"Q{i % 3}", "answers": ["yes", "no", "both"], "right": [0, 2]} for i in range(9)]
    (folder / "q.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    for one in prepare(folder / "choice.yaml", shots=4).questions:
        *examples, last = one.contexts[0].split("\n\n")
        assert all(example.endswith("Answer: yes") for example in examples) and one.target == [0, 2]
        assert not any(example.startswith(last) for example in examples)


def test_labels_of_a_csv_file_are_numbers(folder):
    (folder / "q.csv").write_text("question,right\nIs it,1\nWas it,0\n")
    file = change(
        folder, dataset_path="csv", dataset_kwargs="{data_files: {test: q.csv}}", doc_to_choice='["no", "yes"]'
    )
    assert [one.target for one in prepare(file).questions] == [1, 0]


def test_a_chat_asks_in_the_template_of_the_model(folder):
    """The question is the user's turn, and the answer begins the assistant's: no second begin token, no end mark."""
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    tokenizer = train_tokenizer(["yes no larger"] * 20, vocab_size=280)
    tokenizer.chat_template = template
    prepared = prepare(folder / "choice.yaml", shots=1, chat=True)
    [requests] = encode_answers(prepared.questions[:1], tokenizer, 1000, Counter())
    texts = [tokenizer.decode(one.tokens) for one in requests]
    assert all(text.count("<user>") == 2 and text.count("</assistant>") == 1 for text in texts)
    assert [text.rpartition("<assistant>")[2] for text in texts] == ["yes", "not at all"]
    with pytest.raises(UserError, match="gen_prefix"):
        prepare(change(folder, gen_prefix='"Answer:"'), chat=True)


def test_the_command_compares_models(folder):
    from llmkit.models.folder import save_model

    tokenizer = train_tokenizer(["yes no larger"] * 20, vocab_size=280)
    for seed, name in enumerate(("a", "b")):
        model = sharp_model(vocab_size=len(tokenizer))
        for p in model.parameters():
            p.data.add_(seed * 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(9)))
        save_model(model, folder / name)
        tokenizer.save(folder / name)
    done = llmkit("eval", "a", "b", "--tasks", "choice.yaml", "--show", "1", "--out", "r.json", cwd=folder)
    assert "Question: Is 0 larger than 5?" in done.stdout and "nats" in done.stdout
    assert any(words in done.stdout for words in ("the same as b", "different from b", "higher than b", "lower than b"))
    saved = json.loads((folder / "r.json").read_text())
    assert len(saved) == 2 and (folder / "r.png").stat().st_size > 1000
    about = saved[0]["tasks"]["larger"]
    assert about["questions"] == 12 and len(about["prompts_sha256"]) == 64 and len(saved[0]["model_sha256"]) == 64
    printed = json.loads(llmkit("eval", "a", "--tasks", "choice.yaml", "--json", cwd=folder).stdout)
    own = printed["results"]["larger"]
    assert own["acc"] == saved[0]["results"]["larger"]["acc"] and own["n"] == 12 and len(own["acc_interval"]) == 2
    for arguments, words in {
        ("--tasks", "choise.yaml"): "no such task file",
        ("--tasks", ","): "names no task",
        ("--tasks", "choice.yaml", "--window", "5"): "--window has no effect with --tasks",
        ("--shots", "5"): "--shots has no effect without --tasks",
        ("--tasks", "choice.yaml", "--data", "q.jsonl"): "NAME=PATH",
        ("--tasks", "choice.yaml", "--data", "other=q.jsonl"): "not asked",
    }.items():
        assert words in llmkit("eval", "a", *arguments, cwd=folder, code=2).stderr


PUBLIC = {
    "mmlu": "mmlu",
    "arc_challenge": "ARC-Challenge-Dev.jsonl",
    "hellaswag": "hellaswag_val_slice.jsonl",
    "winogrande": "winogrande_dev.jsonl",
    "piqa": ".",
    "lambada": "lambada_openai_test.jsonl",
    "truthfulqa_mc1": "TruthfulQA.csv",
    "bbh": "bbh/bbh",
    "blimp": "blimp",
    "crows_pairs": "crows-pairs",
    "winobias": "winobias",
}


@needs_shared
@pytest.mark.parametrize("name", PUBLIC)
def test_public_files_are_read_as_they_are(name):
    from llmkit.tasks.evaluate import TASKS

    found = prepare(TASKS / f"{name}.yaml", data=SHARED / "eval" / PUBLIC[name], limit=30)
    assert found.questions
    for one in found.questions:
        assert all(one.contexts) or found.task.output_type == "pairs"


def test_every_task_that_comes_along_can_be_read():
    from llmkit.tasks.evaluate import TASKS

    files = sorted(TASKS.glob("*.yaml"))
    assert len(files) >= 25
    for file in files:
        assert read_task(file).task == file.stem
