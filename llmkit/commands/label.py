"""Define the commands `classify` and `embed`."""

from pathlib import Path
from typing import Annotated

import typer

from llmkit.commands.show import (
    MOST,
    AsJson,
    Columns,
    MaxBadFraction,
    ModelArg,
    Precision,
    check_is_new,
    parse_columns,
    show,
    terminal_text,
    to_stderr,
)
from llmkit.config.defaults import MAX_BAD_FRACTION

Source = Annotated[
    str, typer.Argument(metavar="TEXT|FILE", help="A text, a file with one on each line but blank ones, or records.")
]
AsLines = Annotated[bool, typer.Option("--json", help="Print a JSON object for each text, for scripts.")]
SHOWN_CHARACTERS = 80  # of a text on a terminal


def classify(
    model: ModelArg,
    source: Source,
    out: Annotated[Path | None, typer.Option(help="Write the records with the predictions, as JSONL.")] = None,
    columns: Columns = None,
    precision: Precision = "auto",
    max_bad_fraction: MaxBadFraction = MAX_BAD_FRACTION,
    as_json: AsLines = False,
) -> None:
    """Predict labels with a model that was trained to: of texts, of pairs of texts, or of words."""
    import itertools
    import json
    from collections import Counter
    from contextlib import nullcontext

    from llmkit.data.inspect import is_path
    from llmkit.errors import DataError
    from llmkit.evals.predict import CHUNK, count_predictions, load_classifier, predict_labels, read_texts
    from llmkit.files import open_atomically
    from llmkit.readers.tally import Tally
    from llmkit.storage.locate import locate

    if out is not None:
        check_is_new(out)
        out.parent.mkdir(parents=True, exist_ok=True)
    located = locate(model)
    to_stderr(located.choice)
    one, tally = load_classifier(located, precision), Tally()
    is_tagged = one.head.kind == "tag"
    if is_path(source):
        named = parse_columns(columns) or one.data.get("columns") or {}
        found = read_texts(source, one.head.kind, named, one.data.get("header"), tally)
    else:
        text = source.split() if is_tagged else (source,)
        found = iter([({"tokens": text} if is_tagged else {"text": source}, text)])
    counts: Counter[str] = Counter()
    number = cut = 0
    with open_atomically(out) if out else nullcontext() as file:
        while chunk := list(itertools.islice(found, CHUNK)):
            predictions, shortened = predict_labels(one, [text for _, text in chunk])
            counts.update(count_predictions(one.head, predictions))
            number, cut = number + len(chunk), cut + shortened
            for (record, text), prediction in zip(chunk, predictions, strict=True):
                line = {**record, "prediction": prediction}
                if file:
                    file.write(json.dumps(line, ensure_ascii=False, default=str).encode() + b"\n")
                else:
                    print(json.dumps(line, default=str) if as_json else terminal_text(describe(text, prediction)))
        tally.check(max_bad_fraction, fix="repair the file, or raise --max-bad-fraction")
        if not number:
            raise DataError("there is no text", at=source)
    to_stderr(tally.describe())
    to_stderr(f"{cut} of {number} texts were cut to {one.seq_len} tokens" if cut else "")
    if out is not None:
        show({"written": str(out), "texts": number, **dict(counts.most_common())}, as_json)


def describe(text: tuple[str, ...] | list[str], found: dict) -> str:
    """Return a prediction as a line: the label, its probability, and the text."""
    if "tags" in found:
        return " ".join(f"{word}/{tag}" for word, tag in zip(text, found["tags"], strict=True))
    shown = " | ".join(" ".join(one.split()) for one in text)
    shown = shown if len(shown) <= SHOWN_CHARACTERS else shown[: SHOWN_CHARACTERS - 3] + "..."
    if "score" in found:
        return f"{found['score']:.4f}  {shown}"
    names = found["labels"] if "labels" in found else [found["label"]]
    labels = ", ".join(f"{name} {found['probabilities'][name]:.1%}" for name in names) or "no label"
    return f"{labels}  {shown}"


def embed(
    model: ModelArg,
    source: Source,
    out: Annotated[Path | None, typer.Option(help="Write OUT.npy, and OUT.jsonl with the texts.")] = None,
    near: Annotated[str | None, typer.Option(help="Print the texts that are nearest to this one.")] = None,
    top: Annotated[int, typer.Option(min=1, max=MOST, help="How many of the nearest texts.")] = 10,
    pooling: Annotated[str | None, typer.Option(help="mean, last (of a decoder) or cls (of an encoder).")] = None,
    columns: Columns = None,
    precision: Precision = "fp32",
    max_bad_fraction: MaxBadFraction = MAX_BAD_FRACTION,
    as_json: AsJson = False,
) -> None:
    """Turn texts into vectors: the pooled states of a model's last block."""
    from llmkit.data.inspect import is_path
    from llmkit.errors import DataError, UserError
    from llmkit.evals import embeddings
    from llmkit.evals.predict import read_texts
    from llmkit.parallel.device import DTYPES, choose_precision
    from llmkit.parallel.world import start_world
    from llmkit.readers.tally import Tally
    from llmkit.screen import format_table
    from llmkit.storage.locate import load_located, locate, read_located_head

    if out is None and near is None:
        raise UserError("embed needs --out or --near", fix="--out vectors writes vectors.npy and vectors.jsonl")
    if out is not None:
        for path in embeddings.vector_files(out):
            check_is_new(path)
        out.parent.mkdir(parents=True, exist_ok=True)
    texts = [source]
    if is_path(source):
        tally = Tally()
        found = read_texts(source, "classify", parse_columns(columns) or {}, None, tally)
        texts = ["\n".join(one) for _, one in found]
        tally.check(max_bad_fraction, fix="repair the file, or raise --max-bad-fraction")
        to_stderr(tally.describe())
    if not texts:
        raise DataError("there is no text", at=source)
    located = locate(model)
    to_stderr(located.choice)
    device = start_world().device
    precision = choose_precision(precision, device)
    options = {"device": device, "dtype": DTYPES[precision], "merge": True}
    loaded, tokenizer = load_located(located, head=read_located_head(located), **options)
    queries = [] if near is None else [near]
    vectors, cut = embeddings.embed(loaded.eval(), tokenizer, texts + queries, pooling=pooling, precision=precision)
    to_stderr(f"{cut} texts were cut to {loaded.config.max_position_embeddings} tokens" if cut else "")
    figures = {"texts": len(texts), "dimensions": vectors.shape[1]}
    if out is not None:
        written = embeddings.write_vectors(out, texts, vectors[: len(texts)])
        figures["written"] = ", ".join(map(str, written))
    if near is not None:
        found = embeddings.nearest(vectors[: len(texts)], vectors[-1], top)
        rows = [{"similarity": round(value, 4), "text": texts[i]} for i, value in found]
        if not as_json:
            short = [row | {"text": " ".join(row["text"].split())[:SHOWN_CHARACTERS]} for row in rows]
            print(terminal_text(format_table(short)))
            figures = figures if out else {}
        else:
            figures["nearest"] = rows
    if figures:
        show(figures, as_json)
