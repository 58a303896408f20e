"""Pass D: one unit's kept documents to token shards, what was dropped to a file with the reasons."""

from __future__ import annotations

import itertools
import json
from collections import Counter, deque
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from llmkit.config.schema import CorpusData
from llmkit.corpus.decide import FATES, VAL, reason
from llmkit.corpus.dedup import cut_paragraphs
from llmkit.corpus.measure import Stopwatch, peak_mb
from llmkit.corpus.units import Unit, atomic_zst, load_array, read_zst
from llmkit.data.tokens import ShardWriter, changed, describe, token_dtype
from llmkit.files import write_atomically
from llmkit.tokenizer.tokenizer import CHECKED, Tokenizer, load_tokenizer

EXAMPLES = 3  # of every reason to drop, in the report
CHECKED_CHARACTERS = 500  # of the first CHECKED documents of each unit: the fast encoder must agree on them


@lru_cache(maxsize=1)  # one after another, a tokenizer for each unit made a worker grow by 5 MB a unit
def cached_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a build, whose folder is named after all that made it."""
    return load_tokenizer(folder)


def split_text(text: str, fate: int, val_fraction: float, by_tail: bool) -> tuple[str, str]:
    """(train, val) text of a kept document: whole on one side, or, where documents are too few, its tail to val."""
    if not by_tail:
        return ("", text) if fate == VAL else (text, "")
    cut = round(len(text) * (1 - val_fraction))
    cut = text.rfind("\n", max(0, 2 * cut - len(text)), cut) + 1 or cut  # never twice as much as was asked for
    return text[:cut], text[cut:]


def kept_texts(unit: Unit, data: CorpusData, parts: Path, decided: Path) -> Iterator[tuple[dict[str, Any], int, str]]:
    """(record, fate, text) of every document; the text without what was cut from it, "" of a dropped one."""
    fates = load_array(decided / f"{unit.part}.fate.npy")["fate"]
    cut, cuts = load_array(decided / f"{unit.part}.cut.npy"), None
    if len(cut):
        owner = load_array(parts / f"{unit.part}.paragraphs.npy")["document"]
        cuts = owner.searchsorted(range(len(fates) + 1)) if len(fates) else None
    for number, (record, fate) in enumerate(
        zip(read_zst(parts / f"{unit.part}.jsonl.zst"), fates.tolist(), strict=True)
    ):
        text = record["text"] if fate <= VAL else ""
        if text and cuts is not None:
            text = cut_paragraphs(text, data.dedup.paragraphs, cut[cuts[number] : cuts[number + 1]])
        yield record, fate, text


def encode_unit(
    unit: Unit, data: CorpusData, decided: Path, tokenizer_folder: Path, by_tail: bool, key: str
) -> dict[str, Any]:
    """Encode one unit into a shard of each split; returns files and counts. What is there already is only read."""
    folder = Path(data.dir)
    parts, name = folder / "parts", f"{unit.name}-{key}"
    done = parts / f"{unit.part}.tokens-{key}.json"
    if done.exists():
        result = json.loads(done.read_text(encoding="utf-8"))
        files = [file for split in ("train", "val") for file in result[split]["files"]]
        if not any(changed(folder / one["path"], one) for file in files for one in (file, file["index"])):
            return result | {"seconds": {}, "peak_mb": 0.0}
    watch, profile = Stopwatch(), unit.source["profile"]
    tokenizer = cached_tokenizer(tokenizer_folder)
    scores = load_array(parts / f"{unit.part}.scores.npy")
    held_out: list[str] = []
    examples: dict[str, list] = {}
    splits: deque[int] = deque()  # of the texts that are being encoded, in order
    sizes = [Counter(), Counter()]
    first = (text[:CHECKED_CHARACTERS] for _, _, text in kept_texts(unit, data, parts, decided) if text)
    tokenizer.agrees(list(itertools.islice(first, CHECKED)))

    with (
        ShardWriter(folder / "tokens" / "train" / unit.source["name"] / name, token_dtype(len(tokenizer))) as train,
        ShardWriter(folder / "tokens" / "val" / unit.source["name"] / name, token_dtype(len(tokenizer))) as val,
        atomic_zst(folder / "dropped" / f"{name}.jsonl.zst") as write_dropped,
    ):

        def texts() -> Iterator[str]:
            for number, (record, fate, text) in enumerate(kept_texts(unit, data, parts, decided)):
                if fate > VAL:
                    why = reason(scores[number], fate, data, profile)
                    shown = examples.setdefault(FATES[fate], [])
                    if len(shown) < EXAMPLES:
                        shown.append({"id": record["id"], "why": why, "text": record["text"][:200]})
                    write_dropped({"id": record["id"], "why": why, "text": record["text"]})
                    continue
                for split, piece in enumerate(split_text(text, fate, data.split.val_fraction, by_tail)):
                    if piece:
                        sizes[split].update(bytes=len(piece.encode("utf-8", "replace")), characters=len(piece))
                        held_out.extend([record["id"]] * split)
                        splits.append(split)
                        yield piece

        for ids in tokenizer.encode_documents(texts()):
            (train, val)[splits.popleft()].add(ids)
    result: dict[str, Any] = {"source": unit.source["name"], "held_out": held_out, "examples": examples}
    for split, writer in (("train", train), ("val", val)):
        files = []
        if writer.tokens:
            files = [describe(writer.path, folder) | {"tokens": writer.tokens, "index": describe(writer.index, folder)}]
        sized = {name: sizes[split == "val"][name] for name in ("bytes", "characters")}
        result[split] = {"documents": len(writer.ends), "tokens": writer.tokens, "files": files} | sized
    watch.lap("encoding")
    result |= {"seconds": watch.seconds, "peak_mb": peak_mb()}
    write_atomically(done, json.dumps(result))
    return result
