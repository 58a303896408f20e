"""The two splits of a run's data, opened for its batches: a corpus that was built, or examples that were encoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.config.schema import Config
from llmkit.corpus import build
from llmkit.corpus.units import VERSION
from llmkit.data.batches import Batches, Mixture, corpus_batches, open_rows, samples_in
from llmkit.data.sft import encode_sft
from llmkit.data.tokens import open_split
from llmkit.errors import DataError
from llmkit.parallel.world import World
from llmkit.screen import count
from llmkit.tokenizer.chat_template import default_template
from llmkit.tokenizer.tokenizer import Tokenizer, load_tokenizer


@dataclass
class Data:
    """The two splits, ready for batches, and what the header says of them."""

    tokenizer: Tokenizer
    open: Callable[..., Batches]  # (split, global_batch_size, **order) -> Batches
    samples: dict[str, int]  # by split
    fingerprint: str
    about: str
    shares: dict[str, tuple[float, int]] = field(default_factory=dict)  # of a mixture: source -> (share, samples)
    chats: bool = False  # its records went through the chat template

    @property
    def token_bytes(self) -> np.ndarray:
        return self.tokenizer.token_bytes


def open_corpus(config: Config, world: World, say: Callable[[str], None]) -> Data:
    """The token shards of data.dir, built first when they are not there and the config names sources."""
    folder = Path(config.data.dir)
    if config.data.sources:
        world.on_main(lambda: build.build_corpus(config.data, say=say, where=config.where))
    manifest = build.read_manifest(folder)
    if manifest["version"] != VERSION:
        raise DataError("the data was built by another version of llmkit", at=folder, fix="build it again")
    tokenizer = load_tokenizer(folder / "tokenizer")
    if tokenizer.sha256 != manifest.get("tokenizer_sha256"):
        raise DataError(
            "the tokenizer is not the one that the data was encoded with",
            at=folder / "tokenizer",
            fix=f"delete {folder} and build again",
        )
    dtype, seq_len, splits = np.dtype(manifest["dtype"]), config.data.seq_len, manifest["splits"]
    weights = {source.name: source.weight for source in config.data.sources if source.weight}
    train = splits["train"]["files"]
    by_source = [[file for file in train if file["source"] == name] for name in weights] or [train]
    streams = {
        "train": [open_split(folder, files, dtype) for files in by_source],
        "val": [open_split(folder, splits["val"]["files"], dtype)],
    }
    for name, stream in zip(weights, streams["train"], strict=False):
        if not samples_in(stream, seq_len):
            gone = ", ".join(f"{n} by {rule}" for rule, n in manifest["funnel"][name]["dropped"].items())
            place = [source.name for source in config.data.sources].index(name)
            raise DataError(
                f"source {name} has a weight, but not one sample",
                at=config.where(f"data.sources.{place}"),
                expected=f"over {seq_len} tokens",
                got=f"{len(stream)} tokens; dropped {gone or 'nothing'}",
                fix=f"look at `llmkit data report {folder}`, or leave the source out",
            )
    mixture = Mixture([samples_in(s, seq_len) for s in streams["train"]], list(weights.values())) if weights else None
    samples = {split: sum(samples_in(stream, seq_len) for stream in parts) for split, parts in streams.items()}

    def open_batches(split: str, size: int, **order: Any) -> Batches:
        mixed = mixture if split == "train" else None
        masked = config.data.document_mask
        return corpus_batches(streams[split], seq_len, size, mixture=mixed, document_mask=masked, **order)

    return Data(
        tokenizer,
        open_batches,
        samples,
        manifest["fingerprint"],
        f"{folder}: {count(splits['train']['tokens'])} train and {count(splits['val']['tokens'])} val tokens, "
        f"{manifest['counts']['kept']} of {manifest['counts']['read']} documents kept, vocabulary {len(tokenizer)}",
        dict(zip(weights, zip(mixture.shares(), mixture.samples, strict=True), strict=True)) if mixture else {},
    )


def open_sft(config: Config, world: World, base: Path, start_id: int | None = None) -> Data:
    """Prompts and answers, encoded once into the run directory with the base model's tokenizer.

    start_id  what a decoder reads first, where an encoder reads the prompts; None: the model is a decoder alone
    """
    tokenizer = load_tokenizer(base)
    tokenizer.add_specials(config.data.special_tokens)
    if config.data.chat_template:
        try:
            tokenizer.chat_template = Path(config.data.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            at = config.where("data.chat_template")
            raise DataError(f"the chat template can't be read: {error}", at=at) from None
    out = Path(config.run_dir) / "data"
    how = {"seed": config.seed, "pairs": start_id is not None}
    world.on_main(lambda: encode_sft(config.data, tokenizer, out, **how))
    report = encode_sft(config.data, tokenizer, out, **how)  # reads what is there
    folder = Path(report["folder"])
    splits = report["splits"]
    forms = report.get("formats", ["records"])
    chats = forms != ["prompt/completion"]
    if chats:  # it goes into every checkpoint: what answers must be what was trained
        tokenizer.chat_template = default_template(tokenizer)
    how_read = f"{' and '.join(forms)} {'through the chat template' if chats else 'as they are, no chat template'}"
    lost = [f"{splits['train'][why]} {why}" for why in ("too long", "without a target") if why in splits["train"]]
    lost += [f"{number} bad: {reason}" for reason, number in report["bad"].items()]
    return Data(
        tokenizer,
        lambda split, size, **order: open_rows(folder, split, size, start_id, **order),
        {split: part["rows"] for split, part in splits.items()},
        report["key"],
        f"{config.data.path}: {how_read}; {splits['train']['examples']} train and {splits['val']['examples']} val "
        f"examples in {splits['train']['rows']} rows, {count(splits['train']['targets'])} targets"
        + (f" ({'; '.join(lost)})" if lost else ""),
        chats=chats,
    )
