"""Compare learning from answers, preferences and rewards with trl: the same weights, records, LoRA and precision.

    pip install -e . trl && python scripts/bench_finetune.py                # sft, dpo and grpo, minutes
    python scripts/bench_finetune.py --only dpo --shape llama-110m --rounds 2
    python scripts/bench_finetune.py --only sft --records gsm8k.jsonl   # or another file of questions, or instructions

Each contestant is a process of its own, as a user would start it; they take turns (llmkit, trl, trl, llmkit, ...).
Pairs have prompts and answers of different lengths (log-normal, medians 60 and 80 tokens). llmkit packs pairs into
rows and reads a prompt once; trl pads a batch to its longest pair. For sft, answers are packed into rows of 512 tokens;
trl pads batches of 8 examples, its default. For grpo, a model with random weights writes answers
that never end, so that both write and train on the same number of tokens.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np

SHAPES = {
    "llama-18m": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 6,
                  "vocab_size": 8192, "max_position_embeddings": 512},
    "llama-110m": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4,
                   "vocab_size": 32000, "max_position_embeddings": 512},
}  # fmt: skip
PAIRS, LONGEST, RANK = 8, 384, 16  # pairs in a step of trl; tokens of a prompt with an answer; of LoRA
PROMPTS, GROUP, WRITTEN = 4, 8, 64  # prompts in a step, answers to each, tokens of an answer
EXAMPLES, ROW = 8, 512  # examples in a step of trl; tokens of an example, or of a packed row
UNITS = {"sft": "examples/s", "dpo": "pairs/s", "grpo": "prompts/s"}
WARM = 2  # steps that are not timed


def read_examples(path: Path) -> list[dict[str, str]]:
    """Return the records of a JSON or JSON Lines file as prompts and completions."""
    text = path.read_text(encoding="utf-8")
    records = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    found = []
    for one in records:
        prompt = one.get("question") or "\n".join(filter(None, (one.get("instruction"), one.get("input"))))
        found.append({"prompt": f"{prompt}\n", "completion": one.get("answer") or one.get("output") or one["response"]})
    return found


def make_folder(folder: Path, shape: str, records: Path | None) -> None:
    """Write a model with random weights, its tokenizer (of single letters, or trained on the records), and examples,
    pairs and prompts.
    """
    from llmkit.models import CONFIGS, build_model
    from llmkit.models.folder import save_model
    from llmkit.tokenizer.train import train_tokenizer

    letters = [chr(i) for i in (*range(97, 123), *range(0x3B1, 0x3C9))]
    examples = read_examples(records) if records else []
    tokenizer = train_tokenizer(["".join(letters)] * 3, "char")
    if examples:
        tokenizer = train_tokenizer([one["prompt"] + one["completion"] for one in examples], vocab_size=8192)
    model = build_model(CONFIGS["llama"](**SHAPES[shape]), seed=0)
    save_model(model, folder / "base", **tokenizer.config_ids)
    tokenizer.save(folder / "base")
    draw = np.random.default_rng(0)

    def text(middle: float, most: int) -> str:
        length = int(np.clip(np.exp(draw.normal(np.log(middle), 0.6)), 4, most))
        return "".join(draw.choice(letters, length))

    examples = examples or [{"prompt": text(60, 160), "completion": text(80, 340)} for _ in range(1600)]
    (folder / "examples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in examples))
    with (folder / "pairs.jsonl").open("w") as file:
        for _ in range(400):
            pair = {"prompt": text(60, 160), "chosen": text(80, 200), "rejected": text(80, 200)}
            file.write(json.dumps(pair) + "\n")
    with (folder / "prompts.jsonl").open("w") as file:
        for _ in range(400):
            file.write(json.dumps({"prompt": text(30, 60), "answer": "a"}) + "\n")


# ---- the contestants, each in a process of its own ------------------------------------------------------------------


def run_llmkit(kind: str, folder: Path, steps: int) -> dict[str, float]:
    """Train with the command line, and return UNITS of a kind, and the peak of memory in GB."""
    run = folder / f"run-{kind}-{time.time_ns()}"
    data = {"kind": "preference", "path": "pairs.jsonl", "seq_len": LONGEST, "val_fraction": 0.02}
    objective: dict = {"name": "dpo"}
    size = PAIRS // 2  # rows, of about two pairs
    if kind == "sft":
        data |= {"kind": "sft", "path": "examples.jsonl", "seq_len": ROW}
        objective = {"name": "lm"}
    if kind == "grpo":
        data = {"kind": "prompts", "path": "prompts.jsonl", "seq_len": 128, "val_fraction": 0.02}
        objective = {"name": "grpo", "reward": "length", "group_size": GROUP, "max_new_tokens": WRITTEN}
        size = PROMPTS
    config = {
        "run_dir": str(run), "init_from": "base", "data": data, "objective": objective,
        "peft": {"name": "lora", "r": RANK}, "optimizer": {"name": "adamw", "lr": 1e-5},
        "train": {"max_steps": steps, "global_batch_size": size}, "eval": {"every": None}, "log": {"every": 1},
    }  # fmt: skip
    (folder / f"{kind}.yaml").write_text(json.dumps(config))
    subprocess.run([sys.executable, "-m", "llmkit", "finetune", f"{kind}.yaml", "--lora"], cwd=folder, check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = [record for record in records if record["step"] > WARM and "tokens_per_second" in record]
    tokens_a_step = records[-1]["tokens"] / records[-1]["step"]
    rate = median(size * record["tokens_per_second"] / tokens_a_step for record in timed)
    if kind != "grpo":
        report = json.loads(next(run.glob("data/*/report.json")).read_text())["splits"]["train"]
        rate *= report["pairs" if kind == "dpo" else "examples"] / report["rows"]
    return {"rate": rate, "memory": max(record["memory_gb"] for record in timed)}


def run_trl(kind: str, folder: Path, steps: int) -> dict[str, float]:
    """Train with trl's trainer, and return UNITS of a kind, and the peak of memory in GB."""
    import resource

    import datasets
    import peft
    import torch
    import transformers
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            times.append(time.perf_counter())

    shared = {
        "output_dir": str(folder / "trl"), "max_steps": steps, "report_to": [], "learning_rate": 1e-5, "bf16": True,
        "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1000, "gradient_checkpointing": False,
        "use_cpu": not torch.cuda.is_available(),
    }  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    adapter = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    common = {"model": model, "processing_class": transformers.AutoTokenizer.from_pretrained(folder / "base"),
              "peft_config": adapter, "callbacks": [Clock()]}  # fmt: skip
    name = {"sft": "examples", "dpo": "pairs", "grpo": "prompts"}[kind]
    train = datasets.load_dataset("json", data_files=str(folder / f"{name}.jsonl"), split="train")
    if kind == "sft":
        settings = SFTConfig(**shared, per_device_train_batch_size=EXAMPLES, max_length=ROW, dataloader_drop_last=True)
        trainer = SFTTrainer(args=settings, train_dataset=train, **common)
    elif kind == "dpo":
        settings = DPOConfig(**shared, per_device_train_batch_size=PAIRS, max_length=LONGEST)
        trainer = DPOTrainer(args=settings, train_dataset=train, **common)
    else:
        settings = GRPOConfig(**shared, per_device_train_batch_size=PROMPTS * GROUP, num_generations=GROUP,
                              max_completion_length=WRITTEN, beta=0.0)  # fmt: skip
        reward = lambda completions, **_: [float(len(one) < 200) + len(one) % 3 for one in completions]  # noqa: E731
        trainer = GRPOTrainer(args=settings, train_dataset=train, reward_funcs=reward, **common)
    trainer.train()
    seconds = [b - a for a, b in zip(times[WARM - 1 :], times[WARM:], strict=False)]
    size = {"sft": EXAMPLES, "dpo": PAIRS, "grpo": PROMPTS}[kind]
    return {"rate": size / median(seconds), "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=UNITS)
    parser.add_argument("--shape", choices=SHAPES, default="llama-18m")
    parser.add_argument("--records", type=Path, help="real records for sft, instead of random letters")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of turns")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--contestant", nargs=3, metavar=("WHO", "KIND", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        who, kind, folder = options.contestant
        found = (run_llmkit if who == "llmkit" else run_trl)(kind, Path(folder), options.steps)
        print(json.dumps(found))
        return
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "trl"))
    print(f"{options.shape}, LoRA {RANK}, {os.cpu_count()} cores, {libraries}, {datetime.date.today()}")
    print("| | llmkit | trl | ratio (lowest to highest) | memory, GB: llmkit, trl |")
    print("|---|---:|---:|---:|---|")
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder), options.shape, options.records)
        for kind in [options.only] if options.only else UNITS:
            found: dict[str, list[dict[str, float]]] = {"llmkit": [], "trl": []}
            for turn in range(options.rounds):
                for who in ("llmkit", "trl") if turn % 2 == 0 else ("trl", "llmkit"):
                    command = [
                        sys.executable,
                        __file__,
                        "--contestant",
                        who,
                        kind,
                        folder,
                        "--steps",
                        str(options.steps),
                    ]
                    done = subprocess.run(command, check=True, capture_output=True, text=True)
                    found[who].append(json.loads(done.stdout.strip().splitlines()[-1]))
            rates = {who: [one["rate"] for one in each] for who, each in found.items()}
            ratios = sorted(a / b for a, b in zip(*rates.values(), strict=True))
            memory = ", ".join(f"{median(one['memory'] for one in each):.1f}" for each in found.values())
            values = " | ".join(f"{median(each):.2f}" for each in rates.values())
            spread = f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            print(f"| {kind}, {UNITS[kind]} | {values} | {spread} | {memory} |", flush=True)


if __name__ == "__main__":
    main()
