"""Search training data for the questions of tasks, and say which were not searched."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import SHARED, llmkit, needs_shared

from llmkit.config.data import EvaluationFile
from llmkit.readers.ngrams import flag_contaminated, list_evaluation_files, read_evaluation_ngrams

WORDS = "river model token reads writes learns small large under over code and but it is loss a the in of".split()
QUESTION = "a man walks slowly across the old wooden bridge and looks down at seven grey ducks in the water"
TASK = """
task: ducks
dataset_path: csv
dataset_kwargs: {column_names: [question, a, b, answer], data_files: {test: "*.csv"}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: "{{[a, b]}}"
doc_to_target: answer
"""


def prose(seed: int, words: int) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choices(WORDS, k=words))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ducks")
    (folder / "ducks.yaml").write_text(TASK)
    (folder / "questions.csv").write_text(
        f"{QUESTION}.,left,right,0\nIs it?,yes,no,1\n"
    )  # the first line is a question
    documents = [prose(i, 60) for i in range(40)]
    documents[7] += f" {QUESTION.title()}!"
    (folder / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    records = [{"prompt": prose(i, 20), "completion": prose(100 + i, 9)} for i in range(40)]
    records[5]["completion"] += f" {QUESTION}"
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    chats = [{"messages": [{"role": "user", "content": prose(i, 20)}, {"role": "assistant", "content": prose(i, 5)}]}
             for i in range(40)]  # fmt: skip
    chats[3]["messages"][0]["content"] += f" {QUESTION}"
    (folder / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in chats))
    rows = [{"text": prose(i, 20), "label": i % 2} for i in range(40)]
    rows[9]["text"] += f" {QUESTION}"
    (folder / "labels.jsonl").write_text("".join(json.dumps(record) + "\n" for record in rows))
    config = {
        "data": {"dir": "data/c", "sources": "docs.jsonl", "seq_len": 32, "dedup": {"near": False},
                 "tokenizer": {"train": "bpe", "vocab_size": 400}, "split": {"val_fraction": 0.1},
                 "decontaminate": {"tasks": [{"task": "ducks.yaml", "data": "questions.csv"}]}},
        "model": {"name": "gpt2", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        "train": {"max_steps": 2, "global_batch_size": 4}, "schedule": {"name": "constant"},
    }  # fmt: skip
    (folder / "base.yaml").write_text(yaml.safe_dump(config))
    llmkit("pretrain", "base.yaml", cwd=folder)
    return folder


def test_a_planted_question_is_found_in_a_corpus(folder):
    report = (folder / "data/c/report.md").read_text()
    assert "1 contaminated documents" in report and "docs.jsonl:8" in report
    found = llmkit("data", "inspect", "base.yaml", "--id", "docs/docs.jsonl:8", cwd=folder).stdout
    assert "a man walks slowly across the old wooden bridge and looks down" in found


@pytest.mark.parametrize(
    ("kind", "file"), [("sft", "pairs.jsonl"), ("sft", "chats.jsonl"), ("labelled", "labels.jsonl")]
)
@pytest.mark.parametrize("action", ["drop", "report"])
def test_a_planted_question_is_found_in_fine_tuning_files(folder, kind, file, action):
    evals = {"tasks": [{"task": "ducks.yaml", "data": "questions.csv"}], "action": action}
    config = {
        "init_from": "runs/base", "data": {"kind": kind, "path": file, "seq_len": 128, "decontaminate": evals},
        "train": {"max_steps": 2, "global_batch_size": 4}, "schedule": {"name": "constant"},
    }  # fmt: skip
    name = f"{Path(file).stem}-{action}"
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    said = llmkit("pretrain", f"{name}.yaml", cwd=folder).stdout
    assert "1 examples share a text with evaluation files" in said
    [report] = (folder / f"runs/{name}/data").glob("*/report.json")
    examples = sum(part["examples"] for part in json.loads(report.read_text())["splits"].values())
    assert examples == (39 if action == "drop" else 40)


def test_the_windows_of_a_long_record_count_as_one(folder):
    """Else a question in each of many windows would be a common phrase."""
    records = [{"prompt": prose(i, 20), "completion": prose(100 + i, 9)} for i in range(40)]
    records[5]["completion"] = f"{QUESTION} {prose(7, 900)}"
    (folder / "long.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    evals = {"tasks": [{"task": "ducks.yaml", "data": "questions.csv"}]}
    config = {
        "init_from": "runs/base",
        "data": {"kind": "sft", "path": "long.jsonl", "seq_len": 64, "too_long": "split", "decontaminate": evals},
        "train": {"max_steps": 2, "global_batch_size": 4}, "schedule": {"name": "constant"},
    }  # fmt: skip
    (folder / "long.yaml").write_text(yaml.safe_dump(config))
    said = llmkit("pretrain", "long.yaml", cwd=folder).stdout
    [number] = re.findall(r"(\d+) examples share a text", said)
    assert int(number) > 10


def test_a_phrase_of_many_examples_is_no_contamination():
    owners, grams = np.array([0, 1, 2, 2]), np.array([7, 7, 7, 9], np.uint64)
    assert flag_contaminated(owners, grams, 4, most=2).tolist() == [False, False, True, False]
    assert flag_contaminated(owners, grams, 4, most=3).tolist() == [True, True, True, False]
    assert flag_contaminated(owners[:0], grams[:0], 2, most=1).tolist() == [False, False]


def test_eval_says_which_data_were_not_searched(folder):
    said = llmkit("eval", "runs/base", "--tasks", "ducks.yaml", "--data", "ducks.yaml=questions.csv", cwd=folder)
    assert "not searched" not in said.stderr
    (folder / "other.csv").write_text("Another question,yes,no,0\nIs it?,yes,no,1\n")
    said = llmkit("eval", "runs/base", "--tasks", "ducks.yaml", "--data", "ducks.yaml=other.csv", cwd=folder)
    assert "runs/base were not searched for the questions of ducks" in said.stderr
    # a fine-tuned model has seen what its base saw: a copy of the searched file is as good as the file
    config = {"init_from": "runs/base", "data": {"kind": "sft", "path": "pairs.jsonl", "seq_len": 128},
              "train": {"max_steps": 2, "global_batch_size": 4}, "schedule": {"name": "constant"}}  # fmt: skip
    (folder / "tuned.yaml").write_text(yaml.safe_dump(config))
    llmkit("pretrain", "tuned.yaml", cwd=folder)
    (folder / "copy.csv").write_bytes((folder / "questions.csv").read_bytes())
    said = llmkit("eval", "runs/tuned", "--tasks", "ducks.yaml", "--data", "ducks.yaml=copy.csv", cwd=folder).stderr
    assert "runs/tuned were not searched" in said and "runs/base were not searched" not in said


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("{tasks: [mmlu]}", "there is no file for the split test"),
        ("{tasks: [arc_nothing]}", "questions are no files here"),
        ("{tasks: []}", "names nothing to look for"),
        ("{tasks: [{task: ducks.yaml, data: none.csv}]}", "no such file or folder"),
    ],
)
def test_tasks_whose_questions_are_not_there(folder, section, said):
    done = llmkit("data", "build", "base.yaml", "-o", f"data.decontaminate={section}", cwd=folder, code=None)
    assert done.returncode and said in done.stderr and done.stderr.count("error:") == 1


@needs_shared
def test_the_first_line_of_a_table_without_a_header_is_searched_for_too():
    columns = ["question", "A", "B", "C", "D", "answer"]
    named = EvaluationFile(path=str(SHARED / "eval/mmlu/test/*.csv"), column_names=columns)
    assert len(list_evaluation_files([named])) == 8
    _, texts, _ = read_evaluation_ngrams([named], 13)
    rows = sum(len(path.read_text().splitlines()) for path in (SHARED / "eval/mmlu/test").glob("*.csv"))
    assert texts >= 6 * rows * 0.9
