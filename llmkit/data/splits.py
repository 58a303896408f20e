"""Open the train and val splits of a run's data: token shards of a corpus, or encoded fine-tuning records."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.data.batches import Batches, Mixture, corpus_batches, samples_in
from llmkit.data.labelled import open_labelled_rows
from llmkit.data.preferences import open_pairs, open_trees
from llmkit.data.prompts import open_prompts
from llmkit.data.rows import ANSWERS_LOST, open_rows
from llmkit.data.tokens import TokenStream, open_split, read_sealed
from llmkit.errors import DataError
from llmkit.readers.tally import Tally
from llmkit.screen import format_count
from llmkit.tokenizer.load import load_tokenizer
from llmkit.tokenizer.tokenizer import Tokenizer

SPLITS = ("train", "val")
FOUND_NOTES = {  # of records.encode.Found -> what the header says
    "empty": "answers without a text, not learnt",
    "divided": "conversations with one example for each answer, because the chat template rewrites earlier turns",
    "without_target": "examples without a target, left out",
    "same_answers": "pairs of equal answers, left out",
    "thoughts": "earlier answers are learnt without their thoughts, which the chat template leaves out",
}
MOST_UNREAD = 20  # names of fields in the header
WARN_LOST_FRACTION = 0.1  # of the examples


@dataclass
class Splits:
    """The train and val splits of a run's data.

    batches      (split, global_batch_size, **order) -> Batches
    samples      number of samples by split
    fingerprint  hash that changes with the data
    summary      description of the data for the run's header
    shares       in a mixture: source -> (share of the samples, samples of the source)
    lengths      description of the lengths of fine-tuning examples
    losses       what of the records is not trained on, and why
    warning      that many of the examples are left out
    is_chat      whether the records went through the chat template
    token_bytes  bytes of text per token (V,), see `bytes_per_token`
    labels       names of the labels, in the order of the model's outputs
    multi_label  whether a text has any number of them
    mean_length  tokens of a row on average; None: as many as a row can have
    """

    tokenizer: Tokenizer
    batches: Callable[..., Batches]
    samples: dict[str, int]
    fingerprint: str
    summary: str
    shares: dict[str, tuple[float, int]] = field(default_factory=dict)
    lengths: str = ""
    losses: str = ""
    warning: str = ""
    is_chat: bool = False
    token_bytes: np.ndarray | None = None
    labels: tuple[str, ...] = ()
    multi_label: bool = False
    mean_length: float | None = None


def bytes_per_token(
    tokenizer: Tokenizer, pieces: Iterable[np.ndarray] | None = None, text_bytes: int = 0
) -> np.ndarray:
    """Return the bytes of text that each token stands for, float64 (V,), for bits per byte.

    pieces, text_bytes  the ids of a text, piece by piece, and its size. The result is scaled so that its sum over the
                        ids is that size: unknown tokens and normalization change what the ids spell. None: the text is
                        not known, and the unknown token has NaN bytes
    """
    sizes = tokenizer.token_bytes.astype(np.float64)
    if pieces is not None:
        spelt = sum(sizes @ np.bincount(piece, minlength=len(sizes)) for piece in pieces)
        return sizes * (text_bytes / max(1.0, spelt))
    if tokenizer.unknown_id is not None:
        sizes[tokenizer.unknown_id] = np.nan
    return sizes


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a built corpus."""
    path = folder / "manifest.json"
    try:
        return read_sealed(path)
    except FileNotFoundError:
        fix = "name data.sources, or run `llmkit data build CONFIG`"
        raise DataError("there is no built data", at=folder, fix=fix) from None
    except ValueError as error:
        what, fix = f"the manifest is damaged, or of another version of llmkit: {error}", "delete it and build again"
        raise DataError(what, at=path, fix=fix) from None


def open_stream(folder: Path, manifest: dict[str, Any], split: str, source: str | None = None) -> TokenStream:
    """Open the token shards of a split of a built corpus, or of one of its sources, as one stream."""
    files = [file for file in manifest["splits"][split]["files"] if source in (None, file["source"])]
    return open_split(folder, files, np.dtype(manifest["dtype"]))


def open_corpus(
    folder: Path,
    seq_len: int,
    *,
    weights: dict[str, float] | None = None,
    document_mask: bool = False,
    where: Callable[[str], str | None] = lambda source: None,
) -> Splits:
    """Open the token shards of a built corpus.

    weights        source -> weight in the mixture; None: all samples of all sources are equally likely
    document_mask  see `batches.corpus_batches`
    where          function that returns the file and line of a source in the config, for errors
    """
    manifest = read_manifest(folder)
    tokenizer = load_tokenizer(folder / "tokenizer")
    if tokenizer.sha256 != manifest["tokenizer_sha256"]:
        what, fix = "the tokenizer is not the one that the data was encoded with", f"delete {folder} and build again"
        raise DataError(what, at=folder / "tokenizer", fix=fix)
    weights = weights or {}
    streams = {
        "train": [open_stream(folder, manifest, "train", source) for source in weights or [None]],
        "val": [open_stream(folder, manifest, "val")],
    }
    samples = {split: [samples_in(one, seq_len) for one in streams[split]] for split in SPLITS}
    for name, one, number in zip(weights, streams["train"], samples["train"], strict=False):
        if not number:
            dropped = ", ".join(f"{n} by {rule}" for rule, n in manifest["funnel"][name]["dropped"].items())
            raise DataError(
                f"source {name} has a weight, but no sample",
                at=where(name),
                expected=f"over {seq_len} tokens",
                got=f"{len(one)} tokens; dropped {dropped or 'nothing'}",
                fix=f"look at `llmkit data report {folder}`, or leave the source out",
            )
    mixture = Mixture(samples["train"], list(weights.values())) if weights else None

    def batches(split: str, size: int, **order: Any) -> Batches:
        mixed = mixture if split == "train" else None
        return corpus_batches(streams[split], seq_len, size, mixture=mixed, document_mask=document_mask, **order)

    train, val = (format_count(manifest["splits"][split]["tokens"]) for split in SPLITS)
    stream = streams["val"][0]
    pieces = (stream.read(start, 2**20) for start in range(0, len(stream), 2**20))
    documents = "{kept} of {read} documents kept".format(**manifest["counts"])
    return Splits(
        tokenizer,
        batches,
        {split: sum(numbers) for split, numbers in samples.items()},
        manifest["fingerprint"],
        f"{folder}: {train} train and {val} val tokens, {documents}, vocabulary {len(tokenizer)}",
        shares=dict(zip(weights, zip(mixture.shares(), mixture.samples, strict=True), strict=True)) if mixture else {},
        token_bytes=bytes_per_token(tokenizer, pieces, manifest["splits"]["val"]["bytes"]),
    )


def open_records(
    report: dict[str, Any],
    where: str,
    tokenizer: Tokenizer,
    start_id: int | None = None,
    *,
    form: str = "",
    weights: dict[str, float] | None = None,
    apart: bool = False,
) -> Splits:
    """Open the fine-tuning records that `records.build.encode_turns` encoded, given its report.

    where     the files, for the header
    start_id  the decoder's first input token in an encoder-decoder; None for a decoder-only model
    form      the template of chats; "" if the records are continued text
    weights   source -> weight in the mixture, in the order of the report; None: all rows are equally likely
    apart     read the answers of preferences as sequences of their own, as a reward model does
    """
    splits, train, val = report["splits"], report["splits"]["train"], report["splits"]["val"]
    mixture = Mixture(list(report["sources"].values()), list(weights.values())) if weights else None

    def batches(split: str, size: int, **order: Any) -> Batches:
        mixed = mixture if split == "train" else None
        if report["form"] == "trees":
            open_split = open_pairs if apart else open_trees
            return open_split(Path(report["folder"]), split, size, mixture=mixed, **order)
        return open_rows(Path(report["folder"]), split, size, start_id, mixture=mixed, **order)

    layouts = report["found"]["layouts"]
    names = ", ".join(f"{number:,} of {name}" for name, number in layouts.items())
    names = (
        f"{sum(layouts.values()):,} records ({names})" if len(layouts) > 1 else names.replace(" of ", " records of ", 1)
    )
    how = f"through {form}" if form else "as they are, no chat template"
    if pairs := report["found"]["pairs"]:
        how += f", the better answer is the longer one in {report['found']['better_is_longer'] / pairs:.0%}"
    return Splits(
        tokenizer,
        batches,
        {split: part["rows"] for split, part in splits.items()},
        report["key"],
        f"{where}: {names} {how}; {train['examples']} train and {val['examples']} val examples in {train['rows']} "
        f"rows{describe_filling(report)}, {format_count(train['targets'])} targets",
        shares=dict(zip(weights, zip(mixture.shares(), mixture.samples, strict=True), strict=True)) if mixture else {},
        lengths=", ".join(f"{name} {length:,}" for name, length in report["lengths"].items()) + " tokens an example",
        losses="; ".join(describe_losses(report)),
        warning=warn_of_few(report),
        is_chat=bool(form),
        token_bytes=bytes_per_token(tokenizer),
        mean_length=train["tokens"] / max(1, train["rows"]) if apart else None,
    )


def describe_filling(report: dict[str, Any]) -> str:
    """Return how full the rows of the train split are, if examples share them."""
    train, size = report["splits"]["train"], report["seq_len"] + 1
    if train["rows"] == train["examples"] or report["form"] == "trees":
        return ""
    return f" ({train['tokens'] / (train['rows'] * size):.1%} filled)"


def open_prompt_splits(report: dict[str, Any], where: str, tokenizer: Tokenizer, *, form: str) -> Splits:
    """Open the prompts that `records.prompts.encode_prompts` encoded, given its report.

    where  the files, for the header
    form   the template of chats; "" if the prompts are texts to continue
    """
    splits = report["splits"]
    number = report["found"]["too_long"]
    losses = [f"{number:,} prompts over {report['room']} tokens, left out: raise data.seq_len"] if number else []
    losses += describe_contamination(report)
    losses += ["val has prompts that train has too, so its reward is too good"] if report["prompts in both"] else []
    losses += filter(None, [Tally(**report["records"]).describe(report["listed_in"])])
    how = f"through {form}" if form else "as they are, no chat template"
    names = ", ".join(f"{number:,} of {name}" for name, number in report["layouts"].items())
    return Splits(
        tokenizer,
        lambda split, size, **order: open_prompts(Path(report["folder"]), split, size, **order),
        {split: part["examples"] for split, part in splits.items()},
        report["key"],
        f"{where}: prompts ({names}) {how}; {splits['train']['examples']:,} train, {splits['val']['examples']:,} val",
        lengths=", ".join(f"{name} {length:,}" for name, length in report["lengths"].items()) + " tokens a prompt",
        losses="; ".join(losses),
        is_chat=bool(form),
        mean_length=report["mean_length"] + report["seq_len"] - report["room"],  # of the longest answers
    )


def warn_of_untrained(report: dict[str, Any]) -> str:
    """Return a warning if labels have no example to train on; "" otherwise."""
    if report["task"] == "regress":
        return ""
    never = [name for name, number in report["counts"].items() if not number]
    names = ", ".join(never[:5]) + (" ..." if len(never) > 5 else "")
    return f"no example to train on has the label {names}" if never else ""


def describe_contamination(report: dict[str, Any]) -> Iterator[str]:
    """Yield what data.decontaminate found among records, and what it did not look for."""
    if not (about := report.get("decontaminated")):
        return
    fate = "left out" if about["action"] == "drop" else "kept, as data.decontaminate.action says"
    number = report["found"]["contaminated"]
    yield f"{number:,} examples share a text with evaluation files, {fate}"
    size = f"under {about['ngram']} words"
    yield f"{about['short']:,} of {about['texts']:,} evaluation texts have {size} and are not searched for"


def warn_of_few(report: dict[str, Any]) -> str:
    """Return a warning if over a tenth of the examples are too long to be trained on; "" otherwise."""
    kept, lost = (
        sum(part["examples"] for part in report["splits"].values()),
        report["found"]["too_long"].get("left out", 0),
    )
    few = lost > (kept + lost) * WARN_LOST_FRACTION
    return f"only {kept:,} of {kept + lost:,} examples are short enough for data.seq_len" if few else ""


def describe_losses(report: dict[str, Any]) -> Iterator[str]:
    """Yield what of fine-tuning records is not trained on, as the header says it."""
    found, size = report["found"], f"longer than {report['seq_len']} tokens"
    other = "truncate_prompt" if report["form"] == "trees" else "split"
    for fate, number in found["too_long"].items():
        what = "answers before the kept prompt, not learnt" if fate == ANSWERS_LOST else f"examples {size}: {fate}"
        yield f"{number:,} {what}" + (
            f" (raise data.seq_len, or set data.too_long: {other})" if fate == "left out" else ""
        )
    yield from (f"{number:,} {what}" for key, what in FOUND_NOTES.items() if (number := found[key]))
    yield from describe_contamination(report)
    if number := report["val prompts in train"]:
        yield f"{number:,} val examples with a prompt of train, left out"
    if report["prompts in both"]:
        yield "val has prompts that train has too, so its loss is too good"
    if found["unread"]:
        yield "fields not read: " + ", ".join(list(found["unread"])[:MOST_UNREAD])
    yield from (f"{number} files skipped, {reason}" for reason, number in report["skipped"].items())
    yield from filter(None, [Tally(**report["records"]).describe(report["listed_in"])])


def open_labelled(report: dict[str, Any], where: str, tokenizer: Tokenizer, *, types: bool) -> Splits:
    """Open the texts with labels that `records.labelled.encode_labelled` encoded, given its report.

    where  the files, for the header
    types  see `labelled.pad_batch`
    """
    splits, found, counts = report["splits"], report["found"], report["counts"]

    def batches(split: str, size: int, **order: Any) -> Batches:
        return open_labelled_rows(Path(report["folder"]), split, size, types=types and report["pairs"], **order)

    if report["task"] == "regress":
        labels = ", ".join(f"{name} {value:.4g}" for name, value in counts.items())
    else:
        total = sum(counts.values()) if not report["multi_label"] else splits["train"]["examples"]
        often = sorted(counts.items(), key=lambda item: -item[1])
        labels = ", ".join(f"{name} {number / total:.1%}" for name, number in often[:MOST_UNREAD])
        labels = f"{len(counts)} labels: {labels}" + (" ..." if len(often) > MOST_UNREAD else "")
    notes = {
        "truncated": f"texts cut to {report['seq_len']} tokens",
        "too_long": f"texts over {report['seq_len']} tokens, left out",
        "unlabelled": "records without a label, left out",
        "without_token": "texts without a token, left out",
        "words_without_token": "words without a token of their own, not learnt",
    }
    losses = [f"{number:,} {notes[key]}" for key in notes if (number := found[key])]
    losses += describe_contamination(report)
    losses += ["val has texts that train has too, so its scores are too good"] if report["texts in both"] else []
    losses += filter(None, [Tally(**report["records"]).describe(report["listed_in"])])
    return Splits(
        tokenizer,
        batches,
        {split: part["examples"] for split, part in splits.items()},
        report["key"],
        f"{where}: {splits['train']['examples']:,} train and {splits['val']['examples']:,} val examples of "
        f"{', '.join(found['fields'])}; {labels}",
        lengths=", ".join(f"{name} {length:,}" for name, length in report["lengths"].items()) + " tokens an example",
        losses="; ".join(losses),
        warning=warn_of_untrained(report),
        labels=tuple(report["labels"]),
        multi_label=report["multi_label"],
        mean_length=splits["train"]["tokens"] / max(1, splits["train"]["examples"]),
    )
