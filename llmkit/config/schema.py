"""Declare the sections of the YAML file, their keys and their defaults.

A "choose one" section is `{name: adamw, lr: 3e-4}`: `name` picks a function, the rest are that function's keyword-only
arguments. `load.check_options` checks them against its signature later, when torch may be imported.
"""

import itertools
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr
from pydantic_core import PydanticCustomError

from llmkit.config.defaults import MAX_BAD_FRACTION, PATTERN, VOCAB_SIZE
from llmkit.config.yaml import dump_yaml, find_origin, key_path
from llmkit.errors import UserError

Count = Annotated[int, Field(ge=1, le=10**9)]
Fewer = Annotated[int, Field(ge=1, le=1000)]
Tokens = Annotated[int, Field(ge=1, le=10**15)]
SeqLen = Annotated[int, Field(ge=2, le=10**9)]  # of one token, nothing would be predicted
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what every random generator accepts
Fraction = Annotated[float, Field(ge=0, le=1)]
NonBlank = Annotated[str, Field(pattern=r"\S")]  # "" as a path would mean the working folder


def expand_home(path: str) -> str:
    """Replace a leading ~ by the home folder."""
    if not path.strip():
        raise PydanticCustomError("path", "Input should be a path, not empty")
    return f"{Path.home()}{path[1:]}" if path == "~" or path.startswith("~/") else path


PathStr = Annotated[str, AfterValidator(expand_home)]


class Section(BaseModel):
    """A section with fixed keys. Unknown keys are errors; `true`, `10.5` and `"three"` are not integers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Choice(BaseModel):
    """A "choose one" section: a name from a dict in the code, and the options of the function it names."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)
    name: str
    """Which one."""

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


# ---- data -----------------------------------------------------------------------------------------------------------


class Source(Section):
    """A source of documents: `path` (file, folder, glob) or `hf` (a hub id, or a local dataset folder)."""

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
    text_key: NonBlank = "text"
    """The field with the text in JSONL, CSV, Parquet and datasets."""
    limit: Count | None = None
    """Read at most this many documents."""
    follow_links: bool = False
    """Read what symbolic links inside the folder point to outside of it."""
    weight: Annotated[float, Field(gt=0, le=10**9)] | None = None
    """Share of the samples; null for all: by size."""
    max_epochs: Annotated[float, Field(gt=0)] | None = None
    """A run that would exceed this is refused."""
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
    """What to do with records that can't be used: set them aside in quarantine.jsonl, or fail if there is any."""
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
    html: Literal["auto"] | bool = "auto"
    """Extract the text of web pages. auto: of files and records that are HTML."""
    fix_encoding: bool = True
    """Repair text that was decoded with the wrong encoding."""
    unicode: Literal["NFC"] | None = "NFC"
    """The Unicode normal form of all text; null: as it is."""
    control: bool = True
    """Remove control characters."""
    whitespace: bool = True
    """Collapse runs of spaces and of empty lines."""
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


class Decontaminate(Section):
    """Drop documents that share a word n-gram with evaluation files, so that benchmarks do not measure memorization."""

    files: Annotated[list[PathStr], Field(min_length=1)]
    """The evaluation files: paths or globs."""
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
    """corpus: documents for pretraining. It is the default."""
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
    """What to do with records that can't be read."""
    clean: Clean = Clean()
    """How texts are cleaned."""
    filter: Filter = Filter()
    """Which documents are dropped."""
    pii: Pii = Pii()
    """What to do with personal data."""
    dedup: Dedup = Dedup()
    """Which duplicates are dropped."""
    decontaminate: Decontaminate | None = None
    """Drop documents that contain texts of evaluation files."""
    split: Split = Split()
    """How much is held out for validation."""
    tokenizer: TokenizerSection = TokenizerSection(train="bpe")
    """The tokenizer: trained, given or extended. With init_from: the model's."""
    seq_len: SeqLen = 1024
    """Tokens in a sample."""
    document_mask: bool = False
    """Attention stays inside a document; positions restart in each."""


class SftData(Section):
    """Prompts and answers. Only answers are targets. In an encoder-decoder the encoder reads the prompt.

    Records are {prompt, completion}, {instruction, input, output}, {messages: [{role, content}]} or
    {conversations: [{from, value}]}; the first record decides.
    """

    kind: Literal["sft"]
    """sft: prompts and answers for fine-tuning."""
    path: PathStr
    """A file of records: JSONL, JSON, CSV or Parquet."""
    val_path: PathStr | None = None
    """A file of records for validation; null: a part of path."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """The share of path that is held out for validation, if there is no val_path."""
    seq_len: SeqLen = 1024
    """Tokens in a row."""
    packing: bool | None = None
    """Put several examples into a row; null: true unless the model has an encoder."""
    too_long: Literal["truncate", "drop"] = "truncate"
    """What to do with examples longer than seq_len."""
    chat_template: PathStr | None = None
    """A Jinja file; default: the tokenizer's own, else a plain one."""
    special_tokens: list[str] = []
    """Special tokens to add to the model's tokenizer; see resize_embeddings."""
    on_error: OnError = OnError()
    """What to do with bad records."""


# ---- the run --------------------------------------------------------------------------------------------------------


class Train(Section):
    max_steps: Count | None = None
    """Length of the run in optimizer steps."""
    max_tokens: Tokens | None = None
    """Length of the run in tokens."""
    epochs: Annotated[float, Field(gt=0, le=10**6)] | None = None
    """Length of the run in passes over the data."""
    global_batch_size: Annotated[int, Field(ge=1, le=10**6)] = 32
    """Sequences in one optimizer step."""
    micro_batch_size: Count | Literal["auto"] = "auto"
    """Sequences in one forward pass; auto: as many as fit. The rest of the batch is accumulated."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients with a larger norm are scaled down to it; null: never."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 where the device is fast with it, else fp32."""
    gradient_checkpointing: Literal["none", "full"] | Count = "none"
    """Save memory by computing blocks twice: none, full, or k: every k-th block."""
    compile: Literal["auto"] | bool = "auto"
    """Compile the model with torch.compile; auto: where it pays."""
    deterministic: bool = False
    """Use only deterministic kernels, so that a run can be repeated bit for bit on CUDA."""
    early_stopping_patience: Count | None = None
    """Evaluations in a row without a lower val loss."""
    max_bad_steps: Count = 5
    """Non-finite steps in a row, all skipped, before the run stops."""


class Eval(Section):
    every: Count | None = 250
    """Steps between evaluations; null: never."""
    max_batches: Count | None = 50
    """Measure at most this many batches of the val split; null: all."""
    sample_prompt: str | None = None
    """Text to continue at every evaluation."""
    sample_tokens: Count = 64
    """Tokens to write after sample_prompt."""


class Checkpoint(Section):
    every: Count = 500
    """Steps between checkpoints."""
    keep: Count = 2
    """The newest ones; the best by val loss is kept too."""


class Log(Section):
    every: Count = 10
    """Steps between lines of the log."""
    tensorboard: bool = False
    """Also write TensorBoard files."""


ADAMW_COSINE = {"optimizer": {"name": "adamw", "lr": 6e-4}, "schedule": {"name": "cosine", "warmup_steps": 100}}
# Defaults that `recipe` sets in other sections. Values in the config win.
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    # Lowest loss after an hour of training: query and key norms, blocks that start as the identity, Muon.
    "modern": {
        "model": {"name": "qwen3", "init": "zero"},
        "optimizer": {"name": "muon", "lr": 5e-3},
        "schedule": {"name": "wsd", "decay_fraction": 0.6},
    },
    "llama": {"model": {"name": "llama"}} | ADAMW_COSINE,
    "gpt2": {"model": {"name": "gpt2"}} | ADAMW_COSINE,
}


class Config(Section):
    """The config of a run. `where("train.max_steps")` returns the file and line of a key."""

    run_dir: PathStr = "runs/default"
    """The folder of the run; default: runs/NAME OF THE CONFIG."""
    recipe: Literal["modern", "llama", "gpt2"] | None = None
    """Sets defaults for the model, the optimizer and the schedule. modern: lowest loss after an hour."""
    seed: Seed = 1337
    """Seed of the weights, the order of the data and dropout."""
    init_from: PathStr | None = None
    """Start from this model: a run, a checkpoint or a Hugging Face folder."""
    resize_embeddings: bool = False
    """Add embedding rows for tokens that the model of init_from lacks."""
    model: Choice | None = None
    """The architecture and its sizes, for a model that starts from random weights."""
    data: Annotated[CorpusData | SftData, Field(discriminator="kind")]
    """What to train on."""
    objective: Choice | None = None
    """Null: the default for the model and the data."""
    peft: Choice | None = None
    """The parameter-efficient method; null: train all weights."""
    optimizer: Choice = Choice(name="adamw")
    """How weights are updated."""
    schedule: Choice = Choice(name="cosine")
    """How the learning rate changes during the run."""
    train: Train = Train()
    """The length of the run, and how a step is computed."""
    eval: Eval = Eval()
    """When and how the model is measured."""
    checkpoint: Checkpoint = Checkpoint()
    """When the state of the run is saved."""
    log: Log = Log()
    """What is logged."""

    _origins: dict[tuple, str] = PrivateAttr(default_factory=dict)

    def where(self, key: str) -> str:
        """Return the file and line of a dotted key, or of the innermost section that contains it."""
        return find_origin(self._origins, key_path(key))

    def error(self, key: str, problem: str, *, kind: type[UserError] = UserError, **details: Any) -> UserError:
        """Return an error about a dotted key, with its file and line."""
        return kind(f"{key} {problem}", at=self.where(key), **details)

    def dump(self) -> str:
        """Return the whole config as YAML, every default written out."""
        return dump_yaml(self.model_dump())
