"""Pass D: encode the kept documents of a unit into token shards, and list the dropped ones with the reasons."""

import itertools
import json
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from llmkit.config.data import CorpusData
from llmkit.corpus.decide import FATES, VAL, explain_fate
from llmkit.corpus.dedup import cut_paragraphs
from llmkit.corpus.measure import StageTimer, peak_mb
from llmkit.corpus.units import Unit, open_zst_writer, read_zst
from llmkit.data.tokens import ShardWriter, describe_file, find_change, load_array, read_sealed, seal, token_dtype
from llmkit.files import write_atomically
from llmkit.tokenizer.load import load_tokenizer
from llmkit.tokenizer.tokenizer import MAX_VERIFIED_TEXTS, Tokenizer

MAX_EXAMPLES = 3  # dropped documents that the report shows for each reason
CHECKED_CHARACTERS = 500  # characters of a document on which the fast encoder is verified


@lru_cache(maxsize=1)  # without the cache, a worker's memory grew by 5 MB a unit
def cached_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of a build. Its folder is named after a hash of its inputs, so the cache is never stale."""
    return load_tokenizer(folder)


def split_text(text: str, fate: int, val_fraction: float, by_tail: bool) -> tuple[str, str]:
    """Split a kept document into (train, val) texts: the whole in one of them or, if by_tail, its tail in val."""
    if not by_tail:
        return ("", text) if fate == VAL else (text, "")
    cut = round(len(text) * (1 - val_fraction))
    # Cut after a line break, unless val would get more than twice its share.
    cut = text.rfind("\n", max(0, 2 * cut - len(text)), cut) + 1 or cut
    return text[:cut], text[cut:]


def read_decided(unit: Unit, data: CorpusData, parts: Path, decided: Path) -> Iterator[tuple[dict[str, Any], int, str]]:
    """Yield (record, fate, text) of every document. Repeated paragraphs are cut; the text of a dropped one is ""."""
    fates = load_array(decided / f"{unit.part}.fate.npy")["fate"]
    cut, bounds = load_array(decided / f"{unit.part}.cut.npy"), None
    if len(cut):
        owner = load_array(parts / f"{unit.part}.paragraphs.npy")["document"]
        bounds = owner.searchsorted(range(len(fates) + 1)) if len(fates) else None
    records = read_zst(parts / f"{unit.part}.jsonl.zst")
    for number, (record, fate) in enumerate(zip(records, fates.tolist(), strict=True)):
        text = record["text"] if fate <= VAL else ""
        if text and bounds is not None:
            text = cut_paragraphs(text, data.dedup.paragraphs, cut[bounds[number] : bounds[number + 1]])
        yield record, fate, text


def encode_unit(
    unit: Unit,
    data: CorpusData,
    decided: Path,
    tokenizer_folder: Path,
    by_tail: bool,
    key: str,
    planted: dict[int, str],
) -> dict[str, Any]:
    """Encode a unit into one shard per split, unless an earlier build has done it; return files and counts.

    planted  lines to append to train documents, by their number in the unit, see `place_canaries`
    """
    folder = Path(data.dir)
    parts, name = folder / "parts", f"{unit.source['name']}-{key}"
    done = parts / f"{unit.part}.tokens-{key}.json"
    with suppress(FileNotFoundError, ValueError):  # a damaged file is encoded again
        result = read_sealed(done)
        files = [file for split in ("train", "val") for file in result[split]["files"]]
        if not any(find_change(folder / one["path"], one) for file in files for one in (file, file["index"])):
            return result | {"seconds": {}, "peak_mb": 0.0}
    timer, profile = StageTimer(), unit.source["profile"]
    tokenizer = cached_tokenizer(tokenizer_folder)
    scores = load_array(parts / f"{unit.part}.scores.npy")
    held_out: list[str] = []
    examples: dict[str, list] = {}
    splits: deque[int] = deque()  # splits (0 train, 1 val) of the texts that are being encoded, in order
    sizes = [Counter(), Counter()]
    first_texts = (text[:CHECKED_CHARACTERS] for _, _, text in read_decided(unit, data, parts, decided) if text)
    tokenizer.verify_fast_encoder(list(itertools.islice(first_texts, MAX_VERIFIED_TEXTS)))

    with (
        ShardWriter(folder / "tokens" / "train" / unit.source["name"] / name, token_dtype(len(tokenizer))) as train,
        ShardWriter(folder / "tokens" / "val" / unit.source["name"] / name, token_dtype(len(tokenizer))) as val,
        open_zst_writer(folder / "dropped" / f"{name}.jsonl.zst") as write_dropped,
    ):

        def texts() -> Iterator[str]:
            trained = itertools.count()
            for number, (record, fate, text) in enumerate(read_decided(unit, data, parts, decided)):
                if fate > VAL:
                    why = explain_fate(scores[number], fate, data, profile)
                    shown = examples.setdefault(FATES[fate], [])
                    if len(shown) < MAX_EXAMPLES:
                        shown.append({"id": record["id"], "why": why, "text": record["text"][:200]})
                    write_dropped({"id": record["id"], "why": why, "text": record["text"]})
                    continue
                for split, piece in enumerate(split_text(text, fate, data.split.val_fraction, by_tail)):
                    piece += planted.get(next(trained), "") if fate != VAL and split == 0 else ""
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
            index = describe_file(writer.index, folder)
            files = [describe_file(writer.path, folder) | {"tokens": writer.tokens, "index": index}]
        text_sizes = {name: sizes[split == "val"][name] for name in ("bytes", "characters")}
        result[split] = {"documents": len(writer.ends), "tokens": writer.tokens, "files": files} | text_sizes
    timer.lap("encoding")
    result |= {"seconds": timer.seconds, "peak_mb": peak_mb()}
    write_atomically(done, json.dumps(seal(result)))
    return result
