"""Pass A: one unit's documents read, cleaned, scrubbed, measured by every rule, and signed. Nothing is dropped here.

It leaves the clean texts (.jsonl.zst), what was measured of each (.scores.npy), and what finds its like elsewhere:
MinHash keys and sketches (.bands.npy, .sketches.npy), n-grams of evaluation files (.hits.npy) and paragraphs
(.paragraphs.npy).
"""

from __future__ import annotations

import json
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.recfunctions import repack_fields

from llmkit.config.schema import CorpusData, NearDedup
from llmkit.corpus.clean import STEPS, clean, whitespace
from llmkit.corpus.dedup import band_keys, exact_key, minhash, paragraph_hashes, sketch
from llmkit.corpus.filters import measure
from llmkit.corpus.pii import scrub
from llmkit.corpus.scorers import classifier, classifier_score, evaluation_ngrams, language_of, listed_per_1k, word_list
from llmkit.corpus.units import Unit, atomic_zst, measured_rules, read_unit, read_zst, save_array
from llmkit.corpus.words import TextFeatures, hash_ngrams
from llmkit.files import temporary_path, write_atomically
from llmkit.readers.decode import GUESSED_ENCODINGS
from llmkit.readers.records import BadRecord
from llmkit.types import Document

ROWS = 4096  # of scores that are kept as Python objects before they are packed
SHOWN_LINES = 5  # of the boilerplate that was taken out, in the report
FOUND = {  # what is noted of some documents alone
    "hits": np.dtype([("document", "<u4"), ("gram", "<u8")]),  # n-grams of evaluation files
    "paragraphs": np.dtype([("document", "<u4"), ("key", "<u8"), ("bytes", "<u4")]),
}


class Stopwatch:
    """CPU seconds by stage: each lap is put down to what was done since the one before.

    Laps are of wall time, shared out over the CPU time of all: asking for CPU time at every lap cost a fifth of it.
    """

    def __init__(self):
        self.laps: Counter[str] = Counter()
        self.begun = self.last = time.perf_counter()
        self.cpu = time.process_time()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.laps[stage] += now - self.last
        self.last = now

    @property
    def seconds(self) -> Counter[str]:
        rate = (time.process_time() - self.cpu) / max(1e-9, time.perf_counter() - self.begun)
        return Counter({stage: seconds * rate for stage, seconds in self.laps.items()})


def size_of(path: Path) -> int:
    """In bytes; -1 of what is not there."""
    return path.stat().st_size if path.is_file() else -1


def peak_mb() -> float:
    """The most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Column(NamedTuple):
    """Some fields of a document's row, and what fills them."""

    stage: str
    fields: list[tuple]
    measure: Callable[[TextFeatures], Sequence[Any]]


def columns_of(data: CorpusData, profile: str) -> list[Column]:
    """What is measured of every document: its identity, the rules, the scorers that the config asks for, its signature.

    nan says that a rule has nothing to say of such a text.
    """
    rules, filters = measured_rules(data, profile), data.filter
    columns = [
        Column("rules", [("key", "<u8", (2,)), ("bytes", "<u4")], identify),
        Column("rules", [(rule, "<f8") for rule in rules], lambda text: measure(text, rules)),
    ]
    if filters.language:
        fields = [("language", "S3"), ("language_score", "<f8")]
        columns.append(Column("language", fields, lambda text: language_of(text.text)))
    if filters.words:
        listed = word_list(filters.words.path)
        columns.append(Column("word list", [("listed_words", "<f8")], lambda text: [listed_per_1k(text, listed)]))
    if filters.classifier:
        judge = classifier(filters.classifier.path, filters.classifier.label)
        columns.append(Column("classifier", [("classifier", "<f8")], lambda text: [classifier_score(text.text, judge)]))
    if near := data.dedup.near:
        fields = [("bands", "<u8", (near.bands,)), ("sketches", "u1", (near.bands * near.rows,))]
        columns.append(Column("MinHash", fields, lambda text: sign(text, near)))
    return columns


def identify(text: TextFeatures) -> Sequence[Any]:
    """A text's exact key, in two halves, and its size in bytes."""
    return np.frombuffer(exact_key(text.text), "<u8"), len(text.text.encode("utf-8", "replace"))


def sign(text: TextFeatures, near: NearDedup) -> Sequence[Any]:
    """A text's MinHash keys and its sketch."""
    signature = minhash(text, ngram=near.ngram, bands=near.bands, rows=near.rows)
    return band_keys(signature, near.rows), sketch(signature)


def finders_of(data: CorpusData) -> dict[str, Callable[[TextFeatures], Iterable[tuple]]]:
    """What is noted of some documents alone, by the file that it goes to: see FOUND."""
    finders: dict[str, Callable[[TextFeatures], Iterable[tuple]]] = {}
    if evals := data.decontaminate:
        wanted = evaluation_ngrams(evals.files, evals.ngram)[0]
        finders["hits"] = lambda text: zip(np.unique(wanted.found_in(hash_ngrams(text.hashes, evals.ngram))).tolist())
    if data.dedup.paragraphs:
        finders["paragraphs"] = lambda text: paragraph_hashes(text.text, data.dedup.paragraphs)
    return finders


def measure_unit(unit: Unit, data: CorpusData, parts: Path) -> dict[str, Any]:
    """Take one unit through pass A; returns its counts. What an earlier build has done is only read."""
    done, profile = parts / f"{unit.part}.json", unit.source["profile"]
    if done.exists():
        counts = json.loads(done.read_text(encoding="utf-8"))
        if all(size_of(parts / name) == size for name, size in counts["files"].items()):
            return counts | {"seconds": {}, "peak_mb": 0.0}  # it cost this build nothing
    watch = Stopwatch()
    columns, finders = columns_of(data, profile), finders_of(data)
    dtype = np.dtype([*(field for column in columns for field in column.fields), ("pii", "<f8")])
    kinds = tuple(kind for kind in data.pii.kinds if kind != "phone" or profile != "code")
    tally: dict[str, Any] = {"read": 0, "quarantined": 0, "warnings": Counter(), "bad": Counter(), "pii": Counter()}
    documents = read_clean(unit, data, parts, tally, watch)
    if profile == "web" and data.clean.boilerplate_min_docs:
        least, tidy = data.clean.boilerplate_min_docs, data.clean.whitespace
        documents = without_boilerplate(documents, least, tidy, parts / unit.part, tally, watch)

    blocks, rows = [np.empty(0, dtype)], []
    found: dict[str, list[tuple]] = {name: [] for name in FOUND}
    with atomic_zst(parts / f"{unit.part}.jsonl.zst") as write:
        for number, document in enumerate(documents):
            body, personal = scrub(document.text, kinds, data.pii.action) if kinds else (document.text, Counter())
            tally["pii"].update(personal)
            watch.lap("personal data")
            text, row = TextFeatures(body), []
            for column in columns:
                row += column.measure(text)
                watch.lap(column.stage)
            for name, find in finders.items():
                found[name] += [(number, *one) for one in find(text)]
                watch.lap(name)
            rows.append((*row, personal.total()))
            if len(rows) == ROWS:
                blocks.append(np.array(rows, dtype))
                rows.clear()
            url = {"url": document.meta["url"]} if "url" in document.meta else {}
            write({"id": document.id, "text": body} | url)
            watch.lap("writing")
    table = np.concatenate([*blocks, np.array(rows, dtype)])
    files = {"scores": repack_fields(table[[name for name in dtype.names if name not in ("bands", "sketches")]])}
    if data.dedup.near:  # by band: the search for duplicates reads them one at a time
        files |= {"bands": np.ascontiguousarray(table["bands"].T), "sketches": np.ascontiguousarray(table["sketches"])}
    files |= {name: np.array(found[name], FOUND[name]) for name in FOUND}
    for name, array in files.items():
        save_array(parts / f"{unit.part}.{name}.npy", array)
    left = [parts / f"{unit.part}.{name}" for name in ("jsonl.zst", "bad.jsonl", *(f"{name}.npy" for name in files))]
    languages = Counter(code.decode() for code in table["language"].tolist()) if data.filter.language else {}
    counts = tally | {
        "unit": unit.name,
        "source": unit.source["name"],
        "languages": languages,
        "seconds": watch.seconds,
        "peak_mb": peak_mb(),
        "files": {path.name: size_of(path) for path in left},
    }
    write_atomically(done, json.dumps(counts))
    return json.loads(json.dumps(counts))


def read_clean(unit: Unit, data: CorpusData, parts: Path, tally: dict, watch: Stopwatch) -> Iterator[Document]:
    """A unit's documents, cleaned; bad records go to .bad.jsonl with their file, line and offset."""
    wanted = {
        "html": data.clean.html,
        "encoding": data.clean.fix_encoding,
        "unicode": data.clean.unicode,
        "control": data.clean.control,
        "whitespace": data.clean.whitespace,
    }
    steps = [step for step in STEPS if wanted[step]]
    half = temporary_path(parts / f"{unit.part}.bad.jsonl")
    with half.open("w", encoding="utf-8") as quarantine:
        for one in read_unit(unit):
            watch.lap("reading")
            tally["read"] += 1
            if isinstance(one, BadRecord):
                tally["quarantined"] += 1
                tally["bad"][one.reason.partition(":")[0][:60]] += 1
                quarantine.write(json.dumps(vars(one) | {"source": unit.source["name"]}) + "\n")
                continue
            if one.meta.get("encoding") in GUESSED_ENCODINGS:
                tally["warnings"][f"decoded as {one.meta['encoding']}"] += 1
            if data.clean.html is True:
                one.meta["format"] = "html"
            one = clean(one, steps)
            watch.lap("cleaning")
            yield one
    half.replace(parts / f"{unit.part}.bad.jsonl")


# ---- lines that stand on many pages ---------------------------------------------------------------------------------


def line_key(line: str) -> int | None:
    """What tells lines that may be boilerplate apart; None for what never is: indented, short, or a single word."""
    if len(line) < 10 or line[0].isspace() or " " not in line:
        return None
    return hash(line) & 0xFFFFFFFFFFFFFFFF  # another in every process, but equal for equal lines is all that counts


def without_boilerplate(
    documents: Iterator[Document], least: int, tidy: bool, part: Path, tally: dict, watch: Stopwatch
) -> Iterator[Document]:
    """The documents of a unit without the lines that stand in at least so many of them: menus, notices, buttons.

    Reads all of them before it gives the first, which is why they wait on disk. tidy: clean white space after it.
    """
    spool, keys = part.with_name(part.name + ".cleaned.jsonl.zst"), []
    with atomic_zst(spool) as write:
        for document in documents:
            found = {key for line in document.text.split("\n") if (key := line_key(line)) is not None}
            keys.append(np.fromiter(found, np.uint64, len(found)))
            write({"id": document.id, "text": document.text, "meta": document.meta})
            watch.lap("boilerplate")
    unique, counts = np.unique(np.concatenate([np.empty(0, np.uint64), *keys]), return_counts=True)
    frequent = dict(zip(unique[counts >= least].tolist(), counts[counts >= least].tolist(), strict=True))
    del keys, unique, counts
    shown: dict[str, int] = {}
    removed = 0
    for record in read_zst(spool):
        kept = []
        for line in record["text"].split("\n") if frequent else ():
            key = line_key(line)
            if key in frequent:
                removed += 1
                shown.setdefault(line[:200], frequent[key])
            else:
                kept.append(line)
        document = Document(record["id"], "\n".join(kept) if frequent else record["text"], "", record["meta"])
        watch.lap("boilerplate")
        yield whitespace(document) if frequent and tidy else document
    spool.unlink()
    tally["boilerplate"] = {
        "lines": removed,
        "most": dict(sorted(shown.items(), key=lambda item: -item[1])[:SHOWN_LINES]),
    }
