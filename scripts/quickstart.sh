#!/usr/bin/env bash
# From nothing to a fine-tuned language model in minutes: data, pretraining, LoRA, evaluation, text.
# The text is the Python standard library of this very machine; pip is the only thing that needs a network.
# Run again, it skips what is done and resumes what is not.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh
export PATH="$PWD/.venv/bin:$PATH"

mkdir -p data
ln -sfn "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" data/stdlib
started=$(date +%s)
step() { printf '\n$'; printf ' %q' "$@"; printf '\n'; "$@"; }  # each command as one would type it

step llmkit data build configs/quickstart.yaml
step llmkit pretrain configs/quickstart.yaml
step python scripts/stdlib_pairs.py data/stdlib data/quickstart data/pairs
step llmkit eval runs/quickstart --perplexity --data data/pairs/val.jsonl
step llmkit finetune --lora configs/quickstart-lora.yaml
step llmkit eval runs/quickstart-lora --perplexity --data data/pairs/val.jsonl
step llmkit generate runs/quickstart $'class Reader:\n    def ' --max-new-tokens 150 --temperature 0.6
step llmkit generate runs/quickstart-lora $'def close(self):\n    """Close the connection and the file."""\n' --temperature 0.6
printf '\nall of it took %s s; the loss curve is runs/quickstart/loss.png\n' $(($(date +%s) - started))
