"""Write instruction pairs from Python sources: a function's signature and docstring -> its body.

    python scripts/stdlib_pairs.py data/stdlib data/quickstart data/pairs

The val pairs come only from files that the corpus build held out (val_documents.txt). Fine-tuning is thus measured on
code that neither training run has seen. Writes OUT/train.jsonl and OUT/val.jsonl.
"""

from __future__ import annotations

import ast
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import yaml

from llmkit.readers.listing import list_files

EXCLUDED = yaml.safe_load(Path("configs/quickstart.yaml").read_text())["data"]["sources"][0]["exclude"]
MAX_CHARACTERS = 700  # of prompt and body together, to fit into the model's 256 positions


def extract_pairs(source: str) -> Iterator[dict[str, str]]:
    """Yield {prompt, completion} for every documented function: "def f(x):" with its docstring, and its body."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or not ast.get_docstring(node) or len(node.body) < 2:
            continue
        body = node.body[1:]
        prompt = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.body[0].end_lineno]))
        completion = "\n".join(lines[body[0].lineno - 1 : node.end_lineno])
        indent = node.col_offset
        completion = "\n".join(line[indent:] if line[:indent].isspace() else line for line in completion.splitlines())
        if body[0].lineno > node.body[0].end_lineno and len(prompt) + len(completion) <= MAX_CHARACTERS:
            yield {"prompt": prompt + "\n", "completion": completion + "\n"}


def main(stdlib: Path, corpus: Path, out: Path) -> None:
    held_out = set((corpus / "val_documents.txt").read_text().splitlines())
    out.mkdir(parents=True, exist_ok=True)
    splits: dict[str, list[dict[str, str]]] = {"train": [], "val": []}
    for path in list_files(str(stdlib), ["*.py"], EXCLUDED):
        split = "val" if f"stdlib/{path.relative_to(stdlib)}" in held_out else "train"
        try:
            splits[split] += extract_pairs(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
    for split, records in splits.items():
        (out / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        print(f"{out}/{split}.jsonl: {len(records)} pairs")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
