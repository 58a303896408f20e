"""Declare the section `data` of the YAML file for a corpus; `records.py` has those for records."""

import itertools
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from llmkit.config.defaults import MAX_BAD_FRACTION, PATTERN, VOCAB_SIZE
from llmkit.config.fields import Count, Fewer, Fraction, NonBlank, PathStr, Section, Seed, SeqLen


class SourceFiles(Section):
    """A source: `path` (file, folder, glob) or `hf` (a hub id, or a local dataset folder)."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    """A name of your choice, unique among the sources."""
    path: PathStr | None = None
    """A file, a folder or a glob."""
    include: list[NonBlank] = []
    """Globs: only these files of the folder, or members of a zip, are read."""
    exclude: list[NonBlank] = []
    """Globs: these are left out."""
    hf: PathStr | None = None
    """Instead of path: the id of a dataset on the Hugging Face hub, or a local dataset folder."""
    config: str | None = None
    """The subset of a Hugging Face dataset."""
    revision: str | None = None
    """A commit or tag of a hub dataset; without one, later commits go unnoticed."""
    split: str = "train"
    """The split of a Hugging Face dataset."""
    streaming: bool = False
    """Read a Hugging Face dataset while it is downloaded, instead of storing it first."""
    limit: Count | None = None
    """Read at most this many documents or records."""
    follow_links: bool = False
    """Read what symbolic links inside the folder point to outside of it."""
    weight: Annotated[float, Field(gt=0, le=10**9)] | None = None
    """Share of the samples; null for all: by size."""
    max_epochs: Annotated[float, Field(gt=0)] | None = None
    """A run that would exceed this is refused."""


class Source(SourceFiles):
    """A source of documents."""

    text_key: NonBlank = "text"
    """The field with the text in JSONL, CSV, Parquet and datasets."""
    profile: Literal["web", "docs", "code", "books", "none"] = "none"
    """The set of quality filters for the documents."""


def name_sources(sources: Any) -> Any:
    """Expand the short form of sources, a path or a list of paths, and name each source after its path.

    >>> name_sources("corpora/docs/*.md")
    [{'name': 'docs', 'path': 'corpora/docs/*.md'}]
    """
    if isinstance(sources, str):
        sources = [sources]
    if not isinstance(sources, list):
        return sources
    named, used = [], {one["name"] for one in sources if isinstance(one, dict) and isinstance(one.get("name"), str)}
    for one in sources:
        if isinstance(one, str):
            parts = [part for part in Path(one).parts if not re.search(r"[*?[]", part)]
            stem = (
                re.sub(r"[^\w.-]+", "-", Path(parts[-1]).name.partition(".")[0] if parts else "").strip("-.") or "text"
            )
            name = next(name for i in itertools.count(1) if (name := f"{stem}-{i}" if i > 1 else stem) not in used)
            used.add(name)
            one = {"name": name, "path": one}
        named.append(one)
    return named


class OnError(Section):
    """List bad records in a file and go on, unless more than max_bad_fraction of the records or bytes are lost."""

    mode: Literal["quarantine", "fail"] = "quarantine"
    """Set records that can't be used aside in quarantine.jsonl, or fail if there is any."""
    max_bad_fraction: Fraction = MAX_BAD_FRACTION
    """Fail if more than this share of the records, or of the bytes, is lost."""

    @property
    def max_fraction(self) -> float:
        return 0.0 if self.mode == "fail" else self.max_bad_fraction

    @property
    def fix(self) -> str:
        """Return what to do about too many bad records."""
        key = "set data.on_error.mode: quarantine" if self.mode == "fail" else "raise data.on_error.max_bad_fraction"
        return f"repair the files, or {key}"


class Clean(Section):
    html: Literal["article", "all", False] = "article"
    """Replace files and records that are HTML by their text: the article, or all that is visible; false: keep HTML."""
    fix_encoding: bool = True
    """Repair text that was decoded with the wrong encoding."""
    unicode: Literal["NFC"] | None = "NFC"
    """The Unicode normal form of all text; null: as it is."""
    control: bool = True
    """Remove control characters."""
    whitespace: bool = True
    """Remove spaces at the ends of lines, and more than two empty lines in a row."""
    boilerplate_min_docs: Annotated[int, Field(ge=2, le=10**9)] | None = 20
    """Remove lines of web pages that occur in this many documents of a work unit; null: keep all."""


class Language(Section):
    """Drop documents whose language is not one of these ISO 639-1 codes, or is uncertain."""

    keep: Annotated[list[str], Field(min_length=1)]
    """ISO 639-1 codes of the languages to keep; put no (Norwegian) in quotes."""
    min_score: Fraction = 0.65
    """Drop documents whose language is less certain than this."""


class WordList(Section):
    """Drop documents with more than max_per_1k matches of a word list (one entry a line) per 1000 words."""

    path: PathStr
    """The word list: a word or phrase a line."""
    max_per_1k: Annotated[float, Field(ge=0)] = 5.0
    """Drop documents with more matches per 1000 words."""


class Classifier(Section):
    """Drop documents for which a local Hugging Face classifier gives `label` a probability above max_score."""

    path: PathStr
    """The folder of a Hugging Face sequence classifier."""
    label: str
    """The label whose probability counts."""
    max_score: Fraction = 0.5
    """Drop documents for which the probability is higher."""


class Filter(Section):
    """Thresholds by rule, which override the profile's: `{words: {low: 20}}`; `false` turns a rule off."""

    language: Language | None = None
    """Keep only some languages; null: all."""
    words: WordList | None = None
    """Drop documents with many words of a list."""
    classifier: Classifier | None = None
    """Drop documents that a classifier dislikes."""
    rules: dict[str, dict[str, float] | Literal[False]] = {}
    """Thresholds that override the profile's: {words: {low: 20}}; false turns a rule off."""


class Pii(Section):
    """Find personal data of some kinds (by default none), and replace, tag or drop it."""

    kinds: list[Literal["email", "phone", "ip", "card", "iban", "ssn", "secret"]] = []
    """Which kinds of personal data to look for; none by default."""
    action: Literal["replace", "tag", "drop"] = "replace"
    """replace: by values that nobody owns; tag: replace by <EMAIL> etc.; drop: remove the document."""
    drop_above: Annotated[int, Field(ge=0, le=10**9)] = 50
    """Drop a document with more findings: it is probably a list of people."""


class NearDedup(Section):
    ngram: Fewer = 5
    """Words in a shingle of MinHash."""
    bands: Fewer = 14
    """Bands of MinHash: more bands find less similar documents."""
    rows: Fewer = 8
    """Hashes in a band: more rows find only more similar documents."""
    keep: Literal["longest", "all"] = "longest"
    """What to keep of near duplicates. all: drop nothing, but keep them together in one split."""


class Dedup(Section):
    exact: bool = True
    """Drop documents with the same text as an earlier one."""
    near: NearDedup | Literal[False] = NearDedup()
    """Drop near duplicates, found by MinHash; false: keep them."""
    paragraphs: Count | Literal[False] = False
    """Cut out repeated paragraphs of at least this many words."""


class TableFormat(Section):
    """Say how records are read from files that do not say it themselves."""

    column_names: list[str] | None = None
    """Names of the columns of CSV files without a header."""
    separator: str | None = None
    """Separator of the columns of a CSV file."""
    quoting: Literal[0, 3] = 0
    """3: quotes in a CSV file are plain characters."""
    field: str | None = None
    """The field of a JSON file that holds the list of records."""


class EvaluationFile(TableFormat):
    """Name evaluation files that are not read by their suffix alone."""

    path: PathStr
    """A path or glob."""


class TaskData(Section):
    """Name a task of `llmkit eval --tasks`, and its records."""

    task: NonBlank
    """Its name, or a YAML file."""
    data: PathStr | None = None
    """File or folder of its records."""


class Decontaminate(Section):
    """Drop documents that share a word n-gram with evaluation files, so that benchmarks do not measure memorization."""

    files: list[PathStr | EvaluationFile] = []
    """The evaluation files: paths or globs."""
    tasks: list[NonBlank | TaskData] = []
    """Tasks whose questions are searched for, as in eval.tasks: [{task: mmlu, data: mmlu/}]."""
    ngram: Fewer = 13
    """Words that a document and an evaluation text must share in a row."""
    ignore_if_in_docs: Count = 10
    """An n-gram in more documents than this is a common phrase."""
    action: Literal["drop", "report"] = "drop"
    """drop the documents, or only report them."""


class Split(Section):
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.005
    """The share of the documents that is held out for validation."""


class TokenizerSection(Section):
    """Train a tokenizer (`train: bpe`), use an existing one (`path`), or add tokens to a BPE (`extend`)."""

    train: Literal["bpe", "unigram", "wordpiece", "char"] | None = None
    """Train a new tokenizer of this kind."""
    path: PathStr | None = None
    """Use this tokenizer: a tokenizer.json, or the folder of a tokenizer, a model or a run."""
    extend: PathStr | None = None
    """Add tokens to this BPE, which is named as in path."""
    vocab_size: Annotated[int, Field(ge=259, le=2**24)] = VOCAB_SIZE
    """Tokens of the result, special tokens included."""
    pattern: str = PATTERN
    """How text is split before merging: gpt2, llama3, qwen2 or a regex; for bpe and unigram."""
    normalize: list[Literal["lowercase", "nfc", "nfd", "nfkc", "strip_accents"]] = []
    """Steps that change the text before it is split."""
    special_tokens: list[str] = []
    """Special tokens to add to <|endoftext|> and the chat markers."""
    extra_ids: Annotated[int, Field(ge=0, le=1000)] = 0
    """Sentinels <extra_id_0> ... for span corruption; T5 has 100."""
    sample_mb: Annotated[float, Field(gt=0, le=10**9)] = 64.0
    """Megabytes of text that the training reads."""


class CorpusData(Section):
    """Documents joined into one stream of tokens and cut into samples of `seq_len`."""

    kind: Literal["corpus"]
    """corpus: documents for pretraining; may be left out."""
    dir: PathStr
    """The folder of the built data."""
    seed: Seed = 1234
    """Seed of the split and of the sample for tokenizer training."""
    sources: Annotated[list[Source], BeforeValidator(name_sources)] = []
    """Empty: `dir` is already built."""
    workers: Count | Literal["auto"] = "auto"
    """Processes that build the data; auto: one per core."""
    cluster: NonBlank | None = None
    """Address of a Dask scheduler whose workers see the same files: tcp://host:8786."""
    on_error: OnError = OnError()
    """Say what to do with records that can't be read."""
    clean: Clean = Clean()
    """How texts are cleaned."""
    filter: Filter = Filter()
    """Which documents are dropped."""
    pii: Pii = Pii()
    """Say what to do with personal data."""
    dedup: Dedup = Dedup()
    """Which duplicates are dropped."""
    decontaminate: Decontaminate | None = None
    """Drop documents that contain texts of evaluation files."""
    canaries: Annotated[int, Field(ge=0, le=1000)] = 0
    """Secrets to plant 1, 4, 16 or 64 times, for `llmkit eval --memorization`."""
    split: Split = Split()
    """How much is held out for validation."""
    tokenizer: TokenizerSection = TokenizerSection(train="bpe")
    """The tokenizer: trained, given or extended. With init_from: the model's."""
    seq_len: SeqLen = 1024
    """Tokens in a sample."""
    document_mask: bool = False
    """Attention stays inside a document; positions restart in each."""

    @property
    def row_len(self) -> int:
        """Return the tokens that a row reads."""
        return self.seq_len
