"""Measure the data pipeline: against datatrove, by workers, by size of the input, and on planted duplicates.

    pip install "datatrove[processing]==0.10.0" orjson spacy          # the peer; without it, its row is an error
    python scripts/bench_data.py                                      # documents: docstrings of this Python's library
    python scripts/bench_data.py TEXTS... --tokenizer tokenizer.json  # or files, folders and globs
    python scripts/bench_data.py TEXTS... --only memory --sizes 200 2000
    python scripts/bench_data.py --only web --pages FOLDER   # of HTML files, also compressed with gzip

chain    llmkit and datatrove read the same documents (about 3,000 characters each, 3 % of them copies), apply the
         rules of Gopher, C4 and FineWeb, remove personal data, drop near duplicates (5-grams, 14 x 8) and write
         token shards. Each runs in its own process, in turns. The result is the median of the CPU seconds, with
         imports.
web      the same chain from HTML: first both extract the article of each page (datatrove with trafilatura)
workers  wall time with one worker and with two
memory   the highest peak memory of a process, for inputs enlarged by copies with a quarter of their words changed
dedup    recall and precision for near duplicates, on planted copies whose true similarity is computed
"""

from __future__ import annotations

import argparse
import ast
import gzip
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

DOCUMENT_CHARACTERS = 3000  # roughly
COPIES = 0.03  # of the documents, half of them with one word in 200 changed
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("RAYON", "OMP", "OPENBLAS", "MKL")}


# ---- documents ------------------------------------------------------------------------------------------------------


def read_sources(sources: list[str]) -> Iterator[str]:
    """Yield the texts of the given files, or else the docstrings of each module of this Python's library."""
    if sources:
        from llmkit.readers.documents import read_texts

        yield from read_texts(sources)
        return
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            continue
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
        yield "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def make_documents(sources: list[str], megabytes: float) -> list[str]:
    """Return shuffled documents: the texts, split between paragraphs, and some copies."""
    pieces, size = [], 0
    for text in read_sources(sources):
        paragraph = "\n\n" if text.count("\n\n") * 8 > text.count("\n") else "\n"
        piece: list[str] = []
        for part in [*text.split(paragraph), None]:
            if part is None or sum(map(len, piece)) > DOCUMENT_CHARACTERS:
                pieces.append(paragraph.join(piece))
                piece = []
            if part and part.strip():
                piece.append(part)
    pieces = [piece for piece in pieces if piece]
    draw = random.Random(0)
    for number, text in enumerate(draw.sample(pieces, int(len(pieces) * COPIES))):
        pieces.append(change_words(text, 200, draw) if number % 2 else text)
    draw.shuffle(pieces)
    documents = []
    for piece in pieces:
        size += len(piece.encode())
        if size > megabytes * 1e6:
            break
        documents.append(piece)
    return documents


def read_pages(folder: Path) -> list[str]:
    """Return the HTML of a folder's files that are named *.html or *.html.gz."""
    raw = [path.read_bytes() for path in sorted(folder.rglob("*.html*"))]
    return [(gzip.decompress(page) if page[:2] == b"\x1f\x8b" else page).decode("utf-8", "replace") for page in raw]


def change_words(text: str, every: int, draw: random.Random) -> str:
    """Return the text with one word in `every` changed."""
    words = text.split(" ")
    for start in range(0, len(words), every):
        words[draw.randrange(start, min(start + every, len(words)))] = "changed"
    return " ".join(words)


def write_jsonl(path: Path, documents: list[str], megabytes: float | None = None) -> float:
    """Write documents as JSON Lines and return their megabytes. Add changed copies up to a size, if one is given."""
    size = 0
    with path.open("w", encoding="utf-8") as file:
        for turn in itertools.count():
            for number, text in enumerate(documents):
                if turn:  # change every fourth word, so that no copy is a near duplicate
                    words = text.split(" ")
                    words[turn % 4 :: 4] = [f"{word}{turn}" for word in words[turn % 4 :: 4]]
                    text = " ".join(words)
                file.write(json.dumps({"id": f"{turn}-{number}", "text": text}, ensure_ascii=False) + "\n")
                size += len(text.encode())
                if megabytes and size > megabytes * 1e6:
                    return size / 1e6
            if not megabytes:
                return size / 1e6


# ---- contestants ----------------------------------------------------------------------------------------------------


def write_config(place: Path, source: Path, tokenizer: Path, workers: int) -> Path:
    """Write the config of the chain to a folder, and return its path."""
    config = {
        "data": {
            "kind": "corpus",
            "dir": str(place / "data"),
            "workers": workers,
            "sources": [{"name": "web", "path": str(source), "profile": "web"}],
            "pii": {"kinds": ["email", "phone", "ip", "card", "iban", "ssn", "secret"]},
            "tokenizer": {"path": str(tokenizer)},
        },
        "model": {"name": "gpt2"},
        "train": {"max_steps": 1},
    }
    path = place / "config.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is valid YAML
    return path


def time_command(command: list[str]) -> tuple[float, float, str]:
    """Return the (wall, CPU) seconds of a command with its children, and the last line that it printed."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, env=os.environ | ONE_THREAD, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1])
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu, done.stdout.strip().splitlines()[-1]


def time_llmkit(source: Path, tokenizer: Path, workers: int = 1) -> tuple[float, float, dict]:
    """Return the (wall, CPU) seconds and the manifest of `llmkit data build`."""
    with tempfile.TemporaryDirectory() as place:
        config = write_config(Path(place), source, tokenizer, workers)
        wall, cpu, last = time_command([sys.executable, "-m", "llmkit", "data", "build", str(config), "--json"])
        return wall, cpu, json.loads(last)


def time_datatrove(source: Path, tokenizer: Path, python: str, stages: str) -> tuple[float, float, dict]:
    """Return the (wall, CPU) seconds of the same chain in datatrove, and its counts."""
    with tempfile.TemporaryDirectory() as place:
        wall, cpu, last = time_command([python, __file__, "--peer", str(source), place, str(tokenizer), stages])
        return wall, cpu, json.loads(last)


def run_datatrove(source: Path, place: Path, tokenizer: Path, stages: str) -> None:
    """Run the stages of datatrove's own examples/fineweb.py that need no download, in the peer's process."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline import filters
    from datatrove.pipeline.dedup import MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets
    from datatrove.pipeline.extractors import Trafilatura
    from datatrove.pipeline.formatters import PIIFormatter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.hashing import HashConfig

    def run(*steps: object, tasks: int = 1) -> list[dict]:
        logs = str(place / "logs" / type(steps[-1]).__name__)
        done = LocalPipelineExecutor(list(steps), tasks=tasks, workers=1, logging_dir=logs, skip_completed=False).run()
        return [{name: value.total for name, value in step.stats.items()} for step in done.stats]

    def at(name: str) -> str:
        return str(place / name)

    hashes = HashConfig(hash_fc="sha1", precision=64)
    minhash = MinhashConfig(hash_config=hashes, n_grams=5, num_buckets=14, hashes_per_bucket=8)
    run(
        JsonlReader(str(source.parent), glob_pattern=source.name, recursive=False),
        *([Trafilatura(favour_precision=True, timeout=10)] if stages == "web" else []),
        filters.GopherRepetitionFilter(),
        filters.GopherQualityFilter(),
        filters.C4QualityFilter(filter_no_terminal_punct=False),
        filters.FineWebQualityFilter(),
        PIIFormatter(),
        JsonlWriter(at("filtered")),
    )
    run(JsonlReader(at("filtered")), MinhashDedupSignature(at("signatures"), config=minhash))
    run(MinhashDedupBuckets(at("signatures"), at("buckets"), config=minhash), tasks=minhash.num_buckets)
    run(MinhashDedupCluster(at("buckets"), at("removed"), config=minhash))
    run(JsonlReader(at("filtered")), MinhashDedupFilter(at("removed")), JsonlWriter(at("deduped")))
    tokens = DocumentTokenizer(
        at("tokens"), str(tokenizer), local_working_dir=at("work"), save_filename="peer", eos_token="<|endoftext|>"
    )
    counts = run(JsonlReader(at("deduped")), tokens)
    print(json.dumps({"documents": counts[0].get("documents", 0), "tokens": counts[-1].get("tokens", 0)}))


# ---- measurements ---------------------------------------------------------------------------------------------------


def measure_chain(source: Path, size: float, tokenizer: Path, rounds: int, python: str, stages: str = "chain") -> dict:
    """Run both chains in turns, and return their MB of input per CPU-second."""
    times: dict[str, list[float]] = {"llmkit": [], "datatrove": []}
    kept, errors = {}, {}
    for turn in range(rounds):
        for name in ("llmkit", "datatrove") if turn % 2 == 0 else ("datatrove", "llmkit"):
            try:
                if name == "llmkit":
                    _, cpu, manifest = time_llmkit(source, tokenizer)
                    kept[name] = manifest["counts"]["kept"]
                else:
                    _, cpu, counts = time_datatrove(source, tokenizer, python, stages)
                    kept[name] = counts["documents"]
                times[name].append(cpu)
            except RuntimeError as error:
                errors[name] = str(error)
    row = {"MB": size, "kept": kept, "errors": errors, "CPU seconds": times}
    speeds = {name: size / median(found) for name, found in times.items() if found}
    row["MB per CPU-second"] = speeds
    if len(speeds) == 2:
        row["ratio"] = speeds["llmkit"] / speeds["datatrove"]
    return row


def measure_web(folder: Path, source: Path, tokenizer: Path, rounds: int, python: str) -> dict:
    """Run both chains on HTML pages in turns, and return their MB of HTML per CPU-second."""
    pages = read_pages(folder)
    size = write_jsonl(source, pages)
    return {"pages": len(pages)} | measure_chain(source, size, tokenizer, rounds, python, "web")


def measure_workers(source: Path, size: float, tokenizer: Path, rounds: int) -> dict:
    """Return the wall seconds with one worker and with two, measured in turns."""
    walls: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(rounds):
        for workers in (1, 2) if turn % 2 == 0 else (2, 1):
            walls[workers].append(time_llmkit(source, tokenizer, workers)[0])
    return {"MB": size, "wall seconds": walls, "ratio": median(walls[1]) / median(walls[2])}


def measure_memory(documents: list[str], sizes: list[float], tokenizer: Path, place: Path) -> list[dict]:
    """Return the highest peak memory of a process in a build with two workers, for each size of the input."""
    rows = []
    for megabytes in sizes:
        source = place / "large.jsonl"
        size = write_jsonl(source, documents, megabytes)
        wall, cpu, manifest = time_llmkit(source, tokenizer, workers=2)
        source.unlink()
        rows.append(
            {
                "MB": size,
                "peak MB": manifest["peak_mb"],
                "wall seconds": wall,
                "MB per CPU-second": size / cpu,
                "documents": manifest["counts"]["read"],
            }
        )
    return rows


def measure_dedup(documents: list[str], pairs: int) -> dict:
    """Return recall and precision on copies with a random share of changed words, by their true Jaccard similarity."""
    import numpy as np

    from llmkit.corpus.dedup import band_keys, min_agreement, minhash, near_clusters, sketch
    from llmkit.readers.words import TextFeatures, hash_ngrams

    draw = random.Random(1)
    originals = [text for text in documents if len(text.split()) > 100]
    texts: list[TextFeatures] = []
    for _ in range(pairs):
        text = draw.choice(originals)
        words = [f"{word}{draw.randrange(30)}" for word in text.split()]  # makes each original unique
        copy = [
            f"other{draw.randrange(10**6)}" if draw.random() < share else word
            for share in [draw.uniform(0, 0.15)]
            for word in words
        ]
        texts += [TextFeatures(" ".join(words)), TextFeatures(" ".join(copy))]
    signatures = [minhash(text) for text in texts]
    bands = np.array([band_keys(signature, 8) for signature in signatures]).T.copy()
    sketches = np.array([sketch(signature) for signature in signatures])
    clusters = near_clusters(
        len(texts), bands, lambda one, other: (sketches[one] == sketches[other]).mean(axis=1) >= min_agreement(14, 8)
    )
    joined = similar = hits = correct = 0
    for i in range(0, len(texts), 2):
        one, other = (set(hash_ngrams(text.hashes, 5).tolist()) for text in texts[i : i + 2])
        similarity, is_joined = len(one & other) / len(one | other), bool(clusters[i] == clusters[i + 1])
        similar, hits = similar + (similarity > 0.8), hits + (similarity > 0.8 and is_joined)
        joined, correct = joined + is_joined, correct + (is_joined and similarity > 0.5)
    joined += sum(int(clusters[i] != i) for i in range(0, len(texts), 2))  # originals joined to an earlier text
    return {
        "pairs": pairs,
        "above .8": similar,
        "recall above .8": hits / similar,
        "joined": joined,
        "precision at .5": correct / joined,
    }


def main() -> None:
    if sys.argv[1:2] == ["--peer"]:
        run_datatrove(*(Path(argument) for argument in sys.argv[2:5]), stages=sys.argv[5])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", help="files, folders or globs")
    parser.add_argument("--tokenizer", type=Path, help="a byte-level BPE; default: one trained on the documents")
    parser.add_argument("--mb", type=float, default=15, help="megabytes of documents")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=["chain", "web", "workers", "memory", "dedup"])
    parser.add_argument("--pages", type=Path, help="a folder of HTML files, for web")
    parser.add_argument("--sizes", nargs="*", type=float, default=[200, 2000], help="megabytes, for memory")
    parser.add_argument("--pairs", type=int, default=2000, help="number of planted copies, for dedup")
    parser.add_argument("--peer-python", default=sys.executable, help="a Python interpreter that has datatrove")
    parser.add_argument("--json", type=Path, help="write the rows to a file too")
    args = parser.parse_args()
    documents = make_documents(args.texts, args.mb)
    rows: dict[str, object] = {"versions": {name: package_version(name) for name in ("llmkit", "numpy", "tokenizers")}}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        tokenizer = save_tokenizer(args.tokenizer, documents, place)
        source, large = place / "input.jsonl", place / "workers.jsonl"
        size = write_jsonl(source, documents)
        print(f"{len(documents)} documents, {size:.1f} MB of text", flush=True)
        measurements = {
            "chain": lambda: measure_chain(source, size, tokenizer, args.rounds, args.peer_python),
            "web": lambda: measure_web(args.pages, place / "pages.jsonl", tokenizer, args.rounds, args.peer_python),
            "workers": lambda: measure_workers(large, write_jsonl(large, documents, 200), tokenizer, args.rounds),
            "memory": lambda: measure_memory(documents, args.sizes, tokenizer, place),
            "dedup": lambda: measure_dedup(documents, args.pairs),
        }
        for name, measure in measurements.items():
            if name in (args.only or measurements) and (name != "web" or args.pages):
                rows[name] = measure()
                print(json.dumps({name: rows[name]}, indent=1), flush=True)
                large.unlink(missing_ok=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def save_tokenizer(given: Path | None, documents: list[str], place: Path) -> Path:
    """Write a tokenizer.json for both contestants: the given one without its truncation option, or a new one."""
    from llmkit.tokenizer.load import load_tokenizer
    from llmkit.tokenizer.train import train_tokenizer

    tokenizer = load_tokenizer(given) if given else train_tokenizer(documents)
    tokenizer.save(place / "tokenizer")
    return place / "tokenizer" / "tokenizer.json"


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


if __name__ == "__main__":
    main()
