"""Fine-tune a base with every method on the same records, and print a table: what each trains, costs, learns, forgets.

    python scripts/compare_methods.py runs/base records.json general.txt --steps 100

All runs read the same rows in the same order, one after the other. Each has the learning rate of `llmkit finetune`;
those of methods that change weights are multiplied by --lr-scale, since the defaults are for models of billions.
"""

import argparse
import json
import re
import subprocess
from pathlib import Path

from llmkit.peft import METHODS
from llmkit.screen import format_table
from llmkit.training.presets import FULL_LR

RUNS: dict[str, list[str]] = {  # name -> options of llmkit finetune
    "full": ["--full"],
    "last 2 blocks": ["--full", "-o", "train.only=[last 2]"],
    "lora": ["--lora"],
    "lora, lr_ratio 16": ["--lora", "-o", "peft.lr_ratio=16"],
    "lora, pissa": ["--lora", "-o", "peft.init=pissa"],
    "dora": ["--method", "dora"],
    "qlora": ["--qlora"],
    **{name: ["--method", name] for name in METHODS if name not in ("lora", "dora", "bitfit")},
}
UNSCALED = ("ia3", "prefix", "prompt", "p_tuning", "llama_adapter")


def finetune(name: str, args: argparse.Namespace) -> dict[str, str]:
    """Train with one method, and return its row of the table."""
    run = args.out / re.sub(r"\W+", "-", name)
    method = next((word for word in name.split(", ")[:1] if word in METHODS), "lora")
    lr = FULL_LR if "--full" in RUNS[name] else METHODS[method].lr
    options = {
        "run_dir": run,
        "optimizer.lr": lr * (1 if method in UNSCALED else args.lr_scale),
        "train.max_steps": args.steps,
        "train.epochs": "null",
        "train.global_batch_size": args.batch,
        "train.compile": "false",
        "data.seq_len": args.seq_len,
        "eval.every": args.steps,
        "eval.max_batches": "null",
        "eval.general": args.general,
    }
    overrides = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
    command = ["llmkit", "finetune", *RUNS[name], "--from", args.base, "--data", args.records, *overrides, "--fresh"]
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, last = records[0], records[-1]
    speeds = sorted(one["tokens_per_second"] for one in records if "tokens_per_second" in one)
    trained = re.search(r"parameters, (\S+) trained", (run / "report.md").read_text())

    def change(key: str, form: str) -> str:
        return f"{first[key]:{form}} -> {last[key]:{form}}"

    return {
        "method": name,
        "trained": trained[1] if trained else "all",
        "lr": f"{options['optimizer.lr']:g}",
        "tokens/s": f"{speeds[len(speeds) // 2] / 1e3:.2f}k",
        "peak GiB": f"{max(one['memory_gb'] for one in records if 'memory_gb' in one):.2f}",
        "val loss": change("val_loss", ".3f"),
        "general text": change("general/val_loss", ".3f"),
        "ends by itself": change("answers_ended", ".0%"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="a run or a Hugging Face folder")
    parser.add_argument("records", help="prompts and answers")
    parser.add_argument("general", help="a text of which the model should forget nothing")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--lr-scale", type=float, default=10.0)
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--only", nargs="*", help=f"some of: {', '.join(RUNS)}")
    args = parser.parse_args()
    rows = [finetune(name, args) for name in args.only or RUNS]
    print(format_table(rows))
    print("\n| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(row.values()).replace("->", "→") + " |")


if __name__ == "__main__":
    main()
