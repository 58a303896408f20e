"""Compare `eval --tasks` with lm-evaluation-harness's backend for transformers: same weights, tasks and prompts.

    pip install 'llmkit[tasks]' transformers accelerate && python scripts/bench_tasks.py
    python scripts/bench_tasks.py --questions 100 --rounds 3

Six tasks are made from the standard library of Python: 5 examples before a choice of letters, four endings, the last
word, pairs, whole texts, and written answers. The model is a Llama of 110M parameters with random weights, in fp32.
Each contestant is a process of its own, which loads the model once; they take turns with each task (llmkit, harness,
harness, llmkit, ...). The time is that of a task from its questions to its scores.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import os
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

SHAPE = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
HEAD = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl, dev: {folder}/dev.jsonl}}}}
test_split: test
fewshot_split: dev
fewshot_config: {{sampler: first_n}}
task: {name}
metadata: {{version: 1}}
"""
CHOICE = """
output_type: multiple_choice
metric_list: [{metric: acc}]
"""
TASKS = {  # name -> (examples, keys)
    "letters": (5, CHOICE + """
doc_to_text: "{{text}}\\nA. {{endings[0]}}\\nB. {{endings[1]}}\\nC. {{endings[2]}}\\nD. {{endings[3]}}\\nAnswer:"
doc_to_choice: [A, B, C, D]
doc_to_target: label
"""),
    "endings": (0, CHOICE + """
doc_to_text: "{{text}}"
doc_to_choice: endings
doc_to_target: label
"""),
    "last_word": (0, """
output_type: loglikelihood
doc_to_text: "{{text}}"
doc_to_target: "{{' ' ~ endings[label].split()[0]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
"""),
    "pairs": (0, CHOICE + """
doc_to_text: ""
doc_to_choice: "{{[text ~ ' ' ~ endings[0], text ~ ' ' ~ endings[1]]}}"
doc_to_target: 0
"""),
    "whole_texts": (0, """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{long}}"
metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]
"""),
    "written": (3, """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{endings[label]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
"""),
}  # fmt: skip


def make_inputs(folder: Path, questions: int) -> None:
    """Write the records and the files of the tasks, and a model with its tokenizer."""
    from llmkit.models import CONFIGS, build_model
    from llmkit.models.folder import save_model
    from llmkit.tokenizer.train import train_tokenizer

    texts = [path.read_text(errors="replace") for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    found = [re.sub(r"\s+", " ", one) for text in texts for one in re.findall(r'"""(.{150,1500}?)"""', text, re.DOTALL)]
    draw = random.Random(0)
    draw.shuffle(found)

    def record(text: str, i: int) -> dict:
        words = text.split()
        half = min(len(words) // 2, 60)
        ends = [" ".join(words[half : half + 12]) or "none"]
        ends += [" ".join(draw.choice(found).split()[-12:]) for _ in range(3)]
        label = draw.randrange(4)
        ends[0], ends[label] = ends[label], ends[0]
        return {"text": " ".join(words[:half]), "endings": ends, "label": label, "long": text * 4}

    records = [record(text, i) for i, text in enumerate(found[: questions + 8])]
    for name, (_, keys) in TASKS.items():
        few = records[8:] if name not in ("whole_texts", "written") else records[8 : 8 + max(8, questions // 4)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in few))
        (folder / f"{name}.yaml").write_text(HEAD.format(folder=folder, name=name) + keys)
    (folder / "dev.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records[:8]))
    tokenizer = train_tokenizer(texts[:200], vocab_size=8192)
    model = build_model(CONFIGS["llama"](vocab_size=len(tokenizer), **SHAPE), seed=0)
    for p in model.parameters():
        p.data.mul_(4 if p.dim() > 1 else 1)  # sharper predictions, so that no score is decided by a rounding
    save_model(model, folder / "model")
    tokenizer.save(folder / "model")


# ---- a contestant ---------------------------------------------------------------------------------------------------


def ask_llmkit(folder: Path):
    """Return a function that runs a task with llmkit and returns its scores."""
    from llmkit.parallel.world import start_world
    from llmkit.storage.locate import load_located, locate
    from llmkit.tasks.run import prepare

    start_world()
    model, tokenizer = load_located(locate(folder / "model"))
    return lambda name, shots: prepare(folder / f"{name}.yaml", shots=shots).run(model, tokenizer).figures


def ask_harness(folder: Path):
    """Return a function that runs a task with the harness and returns its scores."""
    import logging

    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.disable(logging.WARNING)
    lm = HFLM(pretrained=str(folder / "model"), device="cpu", dtype="float32", batch_size=8)
    manager = TaskManager(include_path=str(folder), include_defaults=False)

    def ask(name: str, shots: int) -> dict:
        found = lm_eval.simple_evaluate(
            lm, tasks=[name], task_manager=manager, num_fewshot=shots, bootstrap_iters=0, log_samples=False
        )
        return {key.partition(",")[0]: value for key, value in found["results"][name].items()}

    return ask


def worker(who: str, folder: Path) -> None:
    """Answer lines of task names with lines of JSON: seconds, scores, peak memory."""
    import resource

    with contextlib.redirect_stdout(io.StringIO()):
        ask = {"llmkit": ask_llmkit, "lm_eval": ask_harness}[who](folder)
    print("ready", flush=True)
    for line in sys.stdin:
        name = line.strip()
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            scores = ask(name, TASKS[name][0])
        scores = {key: value for key, value in scores.items() if isinstance(value, int | float)}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": time.perf_counter() - start, "scores": scores, "peak": peak}), flush=True)


def start(who: str, folder: Path) -> subprocess.Popen:
    command = [sys.executable, __file__, "--worker", who, "--folder", str(folder)]
    quiet = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "TQDM_DISABLE": "1"}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=quiet
    )
    if process.stdout.readline().strip() != "ready":
        raise RuntimeError(f"{who} does not start: run {' '.join(command)}")
    return process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=100, help="of each task (100); a fourth of long ones")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contestant with each task (3)")
    parser.add_argument("--tasks", nargs="*", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_inputs(folder, args.questions)
        both = {who: start(who, folder) for who in ("llmkit", "lm_eval")}

        def ask(who: str, name: str) -> dict:
            both[who].stdin.write(name + "\n")
            both[who].stdin.flush()
            return json.loads(both[who].stdout.readline())

        today = datetime.date.today()
        print(f"{os.cpu_count()} cores; lm_eval {version('lm_eval')}, torch {version('torch')}; {today}\n")
        print("| task | llmkit, s | harness, s | ratio, median (min-max) | scores | peak MiB, both |")
        print("|---|---:|---:|---:|---|---:|", flush=True)
        total = {"llmkit": 0.0, "lm_eval": 0.0}
        for name in args.tasks:
            turns = {"llmkit": [], "lm_eval": []}
            for i in range(args.rounds + 1):  # the first one is not counted: the harness converts the files then
                for who in ("llmkit", "lm_eval") if i % 2 == 0 else ("lm_eval", "llmkit"):
                    turns[who].append(ask(who, name))
            seconds = {who: [one["seconds"] for one in found[1:]] for who, found in turns.items()}
            ratios = [theirs / ours for ours, theirs in zip(seconds["llmkit"], seconds["lm_eval"], strict=True)]
            ours, theirs = turns["llmkit"][-1]["scores"], turns["lm_eval"][-1]["scores"]
            shared = [key for key in theirs if key in ours and not key.endswith("_stderr")]
            same = all(abs(ours[key] - theirs[key]) <= 1e-4 * abs(theirs[key]) for key in shared)
            for who in total:
                total[who] += median(seconds[who])
            print(
                f"| {name} | {median(seconds['llmkit']):.2f} | {median(seconds['lm_eval']):.2f} "
                f"| {median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) "
                f"| {', '.join(f'{key} {ours[key]:.4g}' for key in shared)}{'' if same else ' DIFFER: '}"
                f"{'' if same else str({key: theirs[key] for key in shared})} "
                f"| {turns['llmkit'][-1]['peak']:.0f}, {turns['lm_eval'][-1]['peak']:.0f} |",
                flush=True,
            )
        print(
            f"| all | {total['llmkit']:.1f} | {total['lm_eval']:.1f} | {total['lm_eval'] / total['llmkit']:.2f} | | |"
        )
        for process in both.values():
            process.stdin.close()
            process.wait()


if __name__ == "__main__":
    main()
