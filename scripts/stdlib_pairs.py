"""Instruction pairs from Python sources: a function's signature and docstring -> its body.

    python scripts/stdlib_pairs.py data/stdlib data/quickstart data/pairs

The val pairs come from the files alone that the corpus build held out (val_documents.txt), so that fine-tuning is
measured on code which neither training has seen. Writes OUT/train.jsonl and OUT/val.jsonl.
"""

from __future__ import annotations

import ast
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import yaml

from llmkit.readers.documents import list_files

EXCLUDED = next(iter(yaml.safe_load(Path("configs/quickstart.yaml").read_text())["data"]["sources"]))["exclude"]
LONGEST = 700  # characters of prompt and body together: they fit the 256 tokens that the model reads


def pairs(source: str) -> Iterator[dict[str, str]]:
    """{prompt, completion} of every documented function: "def f(x):" with its docstring, and the lines below it."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or not ast.get_docstring(node) or len(node.body) < 2:
            continue
        body = node.body[1:]
        prompt = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.body[0].end_lineno]))
        completion = "\n".join(lines[body[0].lineno - 1 : node.end_lineno])
        indent = node.col_offset
        completion = "\n".join(line[indent:] if line[:indent].isspace() else line for line in completion.splitlines())
        if body[0].lineno > node.body[0].end_lineno and len(prompt) + len(completion) <= LONGEST:
            yield {"prompt": prompt + "\n", "completion": completion + "\n"}


def main(stdlib: Path, corpus: Path, out: Path) -> None:
    held_out = set((corpus / "val_documents.txt").read_text().splitlines())
    out.mkdir(parents=True, exist_ok=True)
    made: dict[str, list[dict[str, str]]] = {"train": [], "val": []}
    for path in list_files(str(stdlib), ["*.py"], EXCLUDED):
        split = "val" if f"stdlib/{path.relative_to(stdlib)}" in held_out else "train"
        try:
            made[split] += pairs(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
    for split, records in made.items():
        (out / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        print(f"{out}/{split}.jsonl: {len(records)} pairs")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
