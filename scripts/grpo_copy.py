"""Let a model of 3.3M parameters learn to copy numbers by GRPO, from the command line, and draw its rewards.

    python scripts/grpo_copy.py work && open work/runs/grpo/loss.png

A base is trained on 1500 lines, taught the form of an answer until it copies about seven numbers in ten, and then
rewarded for its own answers to other numbers. About twelve minutes on two cores.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

SEEN, PROMPTS, HELD_OUT = 1500, 3000, 200  # numbers
BASE = """
run_dir: runs/base
model: {name: llama, hidden_size: 256, num_hidden_layers: 4, num_attention_heads: 4, max_position_embeddings: 64,
        tie_word_embeddings: true}
data: {kind: corpus, dir: data, sources: [{name: copy, path: corpus.jsonl, profile: none}], dedup: {near: false},
       tokenizer: {train: bpe, vocab_size: 280}, seq_len: 64, split: {val_fraction: 0.1}}
optimizer: {name: adamw, lr: 1.0e-3}
train: {max_steps: 60, global_batch_size: 16}
eval: {every: 60}
"""
TAUGHT = """
run_dir: runs/taught
init_from: runs/base
data: {kind: sft, path: pairs.jsonl, seq_len: 64}
optimizer: {name: adamw, lr: 1.0e-3, weight_decay: 0.0}
train: {max_steps: 165, global_batch_size: 32}
eval: {every: 165}
"""
GRPO = """
run_dir: runs/grpo
init_from: runs/taught
data: {kind: prompts, path: prompts.jsonl, val_path: val.jsonl, seq_len: 64}
objective: {name: grpo, loss: dapo, reward: exact, group_size: 8, max_new_tokens: 16}
optimizer: {name: adamw, lr: 1.0e-4, weight_decay: 0.0}
schedule: {name: constant, warmup_steps: 10}
train: {max_steps: 240, global_batch_size: 64, precision: fp32}
eval: {every: 25, best: val_reward}
checkpoint: {every: 25}
"""


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "grpo")
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    numbers = [str(draw.randrange(10 ** draw.randrange(3, 7))) for _ in range(SEEN)]
    seen = set(numbers)
    while len(numbers) < SEEN + PROMPTS + HELD_OUT:
        number = str(draw.randrange(10 ** draw.randrange(3, 7)))
        numbers += [number] if number not in seen else []
        seen.add(number)
    spelt = [" ".join(number) for number in numbers]
    lines = [f"copy {one} : {one}" for one in spelt[:SEEN]]
    records = {
        "corpus": [{"text": "\n".join(lines[i : i + 10])} for i in range(0, SEEN, 10)],
        "pairs": [{"prompt": f"copy {one} :", "completion": f" {one}"} for one in spelt[:SEEN]],
        "prompts": [{"prompt": f"copy {one} :", "answer": one} for one in spelt[SEEN:-HELD_OUT]],
        "val": [{"prompt": f"copy {one} :", "answer": one} for one in spelt[-HELD_OUT:]],
    }
    for name, rows in records.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("base", BASE), ("taught", TAUGHT), ("grpo", GRPO)):
        (folder / f"{name}.yaml").write_text(text)
        command = ["pretrain", f"{name}.yaml"] if name == "base" else ["finetune", "--full", f"{name}.yaml"]
        subprocess.run(["llmkit", *command], cwd=folder, check=True)


if __name__ == "__main__":
    main()
