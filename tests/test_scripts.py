"""The quickstart's own scripts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import sentences, tiny_config

from llmkit.config.schema import Config
from llmkit.corpus.build import build_corpus

ROOT = Path(__file__).parents[1]
MODULE = '''
def add_{i}(x):
    """Add {i}."""
    return x + {i}


def silent(x):
    x = x + 1
    return x


def empty(x):
    """Nothing below."""


def long(x):
    """Too long."""
    return "{a}"


class Box:
    def get_{i}(self):
        """The number.

        And more.
        """
        number = {i}
        return number
'''


def pairs_of(i: int) -> list[tuple[str, str]]:
    return [
        (f'def add_{i}(x):\n    """Add {i}."""\n', f"    return x + {i}\n"),
        (
            f'def get_{i}(self):\n    """The number.\n\n    And more.\n    """\n',
            f"    number = {i}\n    return number\n",
        ),
    ]


def test_stdlib_pairs_are_bodies_of_documented_functions_and_val_is_what_the_corpus_held_out(tmp_path):
    stdlib = tmp_path / "lib"
    for i in range(12):
        path = stdlib / ("sub" if i % 2 else ".") / f"m{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(MODULE.format(i=i, a="a" * 800))
    (stdlib / "broken.py").write_text("def (:\n")
    (stdlib / "test").mkdir()
    (stdlib / "test" / "m99.py").write_text(MODULE.format(i=99, a=""))
    config = tiny_config(tmp_path)
    config["data"] |= {"sources": [{"name": "stdlib", "path": str(stdlib), "profile": "none"}],
                       "split": {"val_fraction": 0.4}}  # fmt: skip
    build_corpus(Config.model_validate(config).data, say=print)
    script = [sys.executable, ROOT / "scripts" / "stdlib_pairs.py", stdlib, tmp_path / "data", tmp_path / "pairs"]
    subprocess.run(script, cwd=ROOT, check=True)

    held_out = (tmp_path / "data" / "val_documents.txt").read_text()
    val = {i for i in range(12) if f"/m{i}.py\n" in held_out}
    assert 0 < len(val) < 12
    for split, modules in (("train", set(range(12)) - val), ("val", val)):
        lines = (tmp_path / "pairs" / f"{split}.jsonl").read_text().splitlines()
        made = [(pair["prompt"], pair["completion"]) for pair in map(json.loads, lines)]
        assert sorted(made) == sorted(pair for i in modules for pair in pairs_of(i))


def test_the_data_benchmark_measures_and_names_a_peer_that_is_missing(tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(sentences(i, 12) for i in range(60)))
    script, out = ROOT / "scripts" / "bench_data.py", tmp_path / "out.json"
    arguments = ["--mb", "0.05", "--rounds", "1", "--only", "chain", "dedup", "--pairs", "30", "--json", str(out)]
    subprocess.run([sys.executable, str(script), str(tmp_path / "text.txt"), *arguments], check=True, timeout=200)
    rows = json.loads(out.read_text())
    assert rows["chain"]["MB per CPU-second"]["llmkit"] > 0 and rows["chain"]["kept"]["llmkit"] > 0
    assert "datatrove" in rows["chain"]["errors"]["datatrove"] or rows["chain"]["ratio"] > 1
    assert rows["dedup"]["recall above .8"] > 0.9 and rows["dedup"]["precision at .5"] > 0.9


def test_the_encoding_of_fine_tuning_records_is_measured():
    command = [sys.executable, str(ROOT / "scripts/measure_finetune_data.py"), "60", "--batches", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    assert "60 records" in done.stdout and "ms a record" in done.stdout


def test_what_grows_is_measured_in_a_table():
    command = [sys.executable, str(ROOT / "scripts/measure_growth.py"), "encode", "files", "runs", "windows", "--small"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()[2:]]
    assert len(rows) == 10 and all(float(peak) > 20 for *_, peak in rows)
    assert all(float(seconds) > (0 if "a step" in what else 0.05) for what, _, seconds, _ in rows)
    assert any("one file changed: 1 of" in what for what, *_ in rows)


@pytest.mark.slow
def test_the_benchmark_of_writing_compares_equal_texts():
    options = ["--layers", "1", "--prompt", "4", "--new", "3", "--rounds", "1", "--peers", "plain"]
    command = [sys.executable, str(ROOT / "scripts/bench_generate.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| llmkit", "| transformers"))]
    assert len(rows) == 3 and all("| 3 of 3 |" in row for row in rows), done.stdout


def test_the_gpu_is_compared_with_the_cpu_or_not_measured():
    command = [sys.executable, str(ROOT / "scripts/check_gpu.py")]
    out = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    )
    assert json.loads(out.stdout) == {"check": "gpu", "result": "not measured: there is no GPU"}
    code = "import check_gpu, json, torch; cpu = torch.device('cpu'); print(json.dumps(["
    code += "check_gpu.equal_to_cpu('mistral', 'packed', 'bf16', cpu), check_gpu.same_text('llama', cpu),"
    code += "check_gpu.equal_to_cpu('llama', 'lora', 'fp32', cpu), check_gpu.repeats(cpu)]))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT / "scripts")
    results = json.loads(out.stdout)
    assert all(result["ok"] for result in results) and 0 < results[0]["gradients_off"] < 5e-2
