"""Pass A: read and clean the documents of a unit, replace personal data, measure every rule. Nothing is dropped.

The pass writes the clean texts (.jsonl.zst), their scores (.scores.npy), and data for the comparison of documents:
MinHash keys and sketches (.bands.npy, .sketches.npy), n-grams shared with evaluation files (.hits.npy), and hashes of
long paragraphs (.paragraphs.npy).
"""

import json
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.recfunctions import repack_fields

from llmkit.config.data import Clean, CorpusData, NearDedup
from llmkit.corpus.clean import STEPS, clean, clean_whitespace
from llmkit.corpus.dedup import band_keys, exact_key, minhash, paragraph_hashes, sketch
from llmkit.corpus.filters import measure
from llmkit.corpus.pii import scrub
from llmkit.corpus.scorers import (
    classifier_score,
    detect_language,
    list_matches_per_1k,
    load_classifier,
    load_word_list,
)
from llmkit.corpus.units import Unit, measured_rules, open_zst_writer, read_unit, read_zst
from llmkit.data.tokens import read_sealed, save_array, seal
from llmkit.files import open_atomically, write_atomically
from llmkit.readers.decode import GUESSED_ENCODINGS
from llmkit.readers.documents import keep_documents
from llmkit.readers.ngrams import read_evaluation_ngrams
from llmkit.readers.tally import BadRecord, Tally
from llmkit.readers.words import TextFeatures, hash_ngrams
from llmkit.types import Document

ROWS_PER_BLOCK = 4096  # rows of scores that are collected as Python objects before they become an array
MAX_BOILERPLATE_EXAMPLES = 5  # removed lines that a unit's counts list
HIT_DTYPES = {  # file -> dtype of an array with any number of rows per document
    "hits": np.dtype([("document", "<u4"), ("gram", "<u8")]),  # n-grams shared with evaluation files
    "paragraphs": np.dtype([("document", "<u4"), ("key", "<u8"), ("bytes", "<u4")]),
}


class StageTimer:
    """Measure CPU seconds by stage: each lap adds the time since the last one to a stage.

    Laps measure wall time, and `seconds` scales them so that they add up to the CPU time. Reading the CPU clock at
    every lap would be too slow: it took a fifth of the run time.
    """

    def __init__(self):
        self.laps: Counter[str] = Counter()
        self.start = self.last = time.perf_counter()
        self.cpu_start = time.process_time()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.laps[stage] += now - self.last
        self.last = now

    @property
    def seconds(self) -> Counter[str]:
        rate = (time.process_time() - self.cpu_start) / max(1e-9, time.perf_counter() - self.start)
        return Counter({stage: seconds * rate for stage, seconds in self.laps.items()})


def file_size(path: Path) -> int:
    """Return the size in bytes, -1 if there is no such file."""
    return path.stat().st_size if path.is_file() else -1


def peak_mb() -> float:
    """Return the peak memory of this process so far in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Column(NamedTuple):
    """Some fields of a document's row of scores, and the function that computes them."""

    stage: str
    fields: list[tuple]
    measure: Callable[[TextFeatures], Sequence[Any]]


def make_columns(data: CorpusData, profile: str) -> list[Column]:
    """Return the columns of a document's row: key and size, rules, the config's scorers, and the MinHash signature.

    A rule that does not apply to a text gives nan.
    """
    rules, filters = measured_rules(data, profile), data.filter
    columns = [
        Column("rules", [("key", "<u8", (2,)), ("bytes", "<u4")], key_and_size),
        Column("rules", [(rule, "<f8") for rule in rules], lambda text: measure(text, rules)),
    ]
    if filters.language:
        fields = [("language", "S3"), ("language_score", "<f8")]
        columns.append(Column("language", fields, lambda text: detect_language(text.text)))
    if filters.words:
        listed = load_word_list(filters.words.path)
        columns.append(Column("word list", [("listed_words", "<f8")], lambda text: [list_matches_per_1k(text, listed)]))
    if filters.classifier:
        model = load_classifier(filters.classifier.path, filters.classifier.label)
        columns.append(Column("classifier", [("classifier", "<f8")], lambda text: [classifier_score(text.text, model)]))
    if near := data.dedup.near:
        fields = [("bands", "<u8", (near.bands,)), ("sketches", "u1", (near.bands * near.rows,))]
        columns.append(Column("MinHash", fields, lambda text: make_signature(text, near)))
    return columns


def key_and_size(text: TextFeatures) -> Sequence[Any]:
    """Return a text's exact key, in two halves, and its size in bytes."""
    return np.frombuffer(exact_key(text.text), "<u8"), len(text.text.encode("utf-8", "replace"))


def make_signature(text: TextFeatures, near: NearDedup) -> Sequence[Any]:
    """Return a text's MinHash band keys and its sketch."""
    signature = minhash(text, ngram=near.ngram, bands=near.bands, rows=near.rows)
    return band_keys(signature, near.rows), sketch(signature)


def make_finders(data: CorpusData) -> dict[str, Callable[[TextFeatures], Iterable[tuple]]]:
    """Return the functions that find a text's rows for the arrays in HIT_DTYPES, those that the config asks for."""
    finders: dict[str, Callable[[TextFeatures], Iterable[tuple]]] = {}
    if evals := data.decontaminate:
        wanted = read_evaluation_ngrams(evals.files, evals.ngram)[0]
        finders["hits"] = lambda text: zip(np.unique(wanted.find_in(hash_ngrams(text.hashes, evals.ngram))).tolist())
    if data.dedup.paragraphs:
        finders["paragraphs"] = lambda text: paragraph_hashes(text.text, data.dedup.paragraphs)
    return finders


def measure_unit(unit: Unit, data: CorpusData, parts: Path) -> dict[str, Any]:
    """Run pass A on one unit, unless an earlier build has done it, and return the unit's counts."""
    done, profile = parts / f"{unit.part}.json", unit.source["profile"]
    with suppress(FileNotFoundError, ValueError):  # a damaged file is measured again
        counts = read_sealed(done)
        if all(file_size(parts / name) == size for name, size in counts["files"].items()):
            return counts | {"seconds": {}, "peak_mb": 0.0}  # this build spent no time on it
    timer = StageTimer()
    columns, finders = make_columns(data, profile), make_finders(data)
    dtype = np.dtype([*(field for column in columns for field in column.fields), ("pii", "<f8")])
    kinds = tuple(kind for kind in data.pii.kinds if kind != "phone" or profile != "code")
    records, tally = Tally(), {"warnings": Counter(), "pii": Counter()}
    documents = read_clean(unit, data, parts, records, tally["warnings"], timer)
    if profile == "web" and data.clean.boilerplate_min_docs:
        spool = parts / f"{unit.part}.cleaned.jsonl.zst"
        documents = remove_boilerplate(documents, data.clean, spool, tally, timer)

    blocks, rows = [np.empty(0, dtype)], []
    found: dict[str, list[tuple]] = {name: [] for name in HIT_DTYPES}
    with open_zst_writer(parts / f"{unit.part}.jsonl.zst") as write:
        for number, document in enumerate(documents):
            body, pii = scrub(document.text, kinds, data.pii.action) if kinds else (document.text, Counter())
            tally["pii"].update(pii)
            timer.lap("personal data")
            text, row = TextFeatures(body), []
            for column in columns:
                row += column.measure(text)
                timer.lap(column.stage)
            for name, find in finders.items():
                found[name] += [(number, *one) for one in find(text)]
                timer.lap(name)
            rows.append((*row, pii.total()))
            if len(rows) == ROWS_PER_BLOCK:
                blocks.append(np.array(rows, dtype))
                rows.clear()
            url = {"url": document.meta["url"]} if "url" in document.meta else {}
            write({"id": document.id, "text": body} | url)
            timer.lap("writing")
    table = np.concatenate([*blocks, np.array(rows, dtype)])
    files = {"scores": repack_fields(table[[name for name in dtype.names if name not in ("bands", "sketches")]])}
    if data.dedup.near:  # transposed, since the search for duplicates reads one band at a time
        files |= {"bands": np.ascontiguousarray(table["bands"].T), "sketches": np.ascontiguousarray(table["sketches"])}
    files |= {name: np.array(found[name], dtype) for name, dtype in HIT_DTYPES.items()}
    for name, array in files.items():
        save_array(parts / f"{unit.part}.{name}.npy", array)
    written = [f"{unit.part}.{name}" for name in ("jsonl.zst", "bad.jsonl", *(f"{name}.npy" for name in files))]
    languages = Counter(code.decode() for code in table["language"].tolist()) if data.filter.language else {}
    counts = tally | {
        "records": records.counts(),
        "unit": unit.part,
        "source": unit.source["name"],
        "languages": languages,
        "seconds": timer.seconds,
        "peak_mb": peak_mb(),
        "files": {name: file_size(parts / name) for name in written},
    }
    counts = seal(json.loads(json.dumps(counts)))
    write_atomically(done, json.dumps(counts))
    return counts


def read_clean(
    unit: Unit, data: CorpusData, parts: Path, records: Tally, warnings: Counter[str], timer: StageTimer
) -> Iterator[Document]:
    """Yield a unit's cleaned documents; write bad records to .bad.jsonl with their file, line and offset."""
    enabled = data.clean.model_dump() | {"encoding": data.clean.fix_encoding}
    enabled |= {"html": data.clean.html == "article", "html_all": data.clean.html == "all"}
    steps = [step for step in STEPS if enabled[step]]
    with open_atomically(parts / f"{unit.part}.bad.jsonl") as quarantine:

        def write_bad(bad: BadRecord) -> None:
            quarantine.write(json.dumps(vars(bad) | {"source": unit.source["name"]}).encode() + b"\n")

        for one in keep_documents(read_unit(unit), records, write_bad):
            timer.lap("reading")
            if one.meta.get("encoding") in GUESSED_ENCODINGS:
                warnings[f"decoded as {one.meta['encoding']}"] += 1
            if data.clean.html is True:
                one.meta["format"] = "html"
            one = clean(one, steps)
            timer.lap("cleaning")
            yield one


# ---- boilerplate: lines that many pages of a unit share -------------------------------------------------------------


def hash_line(line: str) -> int | None:
    """Hash a line that may be boilerplate. Return None for an indented line, a short line or a single word."""
    if len(line) < 10 or line[0].isspace() or " " not in line:
        return None
    return hash(line) & 0xFFFFFFFFFFFFFFFF  # differs between processes, but is only compared within this one


def remove_boilerplate(
    documents: Iterator[Document], options: Clean, spool: Path, tally: dict, timer: StageTimer
) -> Iterator[Document]:
    """Yield a unit's documents without the lines that at least `boilerplate_min_docs` of them share: menus, notices.

    All documents are read before the first one is yielded. The temporary file `spool` holds them.
    """
    keys = []
    with open_zst_writer(spool) as write:
        for document in documents:
            found = {key for line in document.text.split("\n") if (key := hash_line(line)) is not None}
            keys.append(np.fromiter(found, np.uint64, len(found)))
            write({"id": document.id, "text": document.text, "meta": document.meta})
            timer.lap("boilerplate")
    unique, counts = np.unique(np.concatenate([np.empty(0, np.uint64), *keys]), return_counts=True)
    shared = counts >= options.boilerplate_min_docs
    frequent = dict(zip(unique[shared].tolist(), counts[shared].tolist(), strict=True))
    del keys, unique, counts
    examples: dict[str, int] = {}
    removed = 0
    for record in read_zst(spool):
        kept = []
        for line in record["text"].split("\n") if frequent else ():
            key = hash_line(line)
            if key in frequent:
                removed += 1
                examples.setdefault(line[:200], frequent[key])
            else:
                kept.append(line)
        document = Document(record["id"], "\n".join(kept) if frequent else record["text"], "", record["meta"])
        timer.lap("boilerplate")
        yield clean_whitespace(document) if frequent and options.whitespace else document
    spool.unlink()
    most = dict(Counter(examples).most_common(MAX_BOILERPLATE_EXAMPLES))
    tally["boilerplate"] = {"lines": removed, "most": most}
