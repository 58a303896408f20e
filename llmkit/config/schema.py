"""Declare the sections of the YAML file, their keys and their defaults.

A "choose one" section is `{name: adamw, lr: 3e-4}`: `name` picks a function, the rest are that function's keyword-only
arguments. `load.check_options` checks them against its signature later, when torch may be imported.
"""

import itertools
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr
from pydantic_core import PydanticCustomError

from llmkit.config.defaults import PATTERN, VOCAB_SIZE
from llmkit.config.yaml import find_origin, key_path
from llmkit.errors import UserError

Count = Annotated[int, Field(ge=1, le=10**9)]
Fewer = Annotated[int, Field(ge=1, le=1000)]
Tokens = Annotated[int, Field(ge=1, le=10**15)]
SeqLen = Annotated[int, Field(ge=2, le=10**9)]  # of one token, nothing would be predicted
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what every random generator accepts
Fraction = Annotated[float, Field(ge=0, le=1)]


def expand_home(path: str) -> str:
    """Replace a leading ~ by the home folder."""
    if not path.strip():
        raise PydanticCustomError("path", "Input should be a path, not empty")
    return f"{Path.home()}{path[1:]}" if path == "~" or path.startswith("~/") else path


PathStr = Annotated[str, AfterValidator(expand_home)]


class Section(BaseModel):
    """A section with fixed keys. Unknown keys are errors; `true`, `10.5` and `"three"` are not integers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Choice(BaseModel):
    """A "choose one" section: a name from a dict in the code, and the options of the function it names."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    name: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


# ---- data -----------------------------------------------------------------------------------------------------------


class Source(Section):
    """A source of documents: `path` (file, folder, glob) or `hf` (a hub id, or a local dataset folder)."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    path: PathStr | None = None
    include: list[str] = []
    exclude: list[str] = []
    hf: PathStr | None = None
    config: str | None = None  # the subset of a Hugging Face dataset
    revision: str | None = None  # a commit or tag of a hub dataset; without one, later commits go unnoticed
    split: str = "train"
    streaming: bool = False
    text_key: str = "text"
    limit: Count | None = None  # documents
    weight: Annotated[float, Field(gt=0)] | None = None  # share of the samples; null for all: by size
    max_epochs: Annotated[float, Field(gt=0)] | None = None  # a run that would exceed this is refused
    profile: Literal["web", "docs", "code", "books", "none"] = "none"


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
    mode: Literal["quarantine", "fail"] = "quarantine"
    max_bad_fraction: Fraction = 0.01


class Clean(Section):
    html: Literal["auto"] | bool = "auto"  # auto: files and records that are HTML
    fix_encoding: bool = True
    unicode: Literal["NFC"] | None = "NFC"
    control: bool = True
    whitespace: bool = True
    # Remove lines of web pages that occur in this many documents of a work unit; null: keep all.
    boilerplate_min_docs: Annotated[int, Field(ge=2, le=10**9)] | None = 20


class Language(Section):
    """Drop documents whose language is not one of these ISO 639-1 codes, or is uncertain."""

    keep: Annotated[list[str], Field(min_length=1)]
    min_score: Fraction = 0.65


class WordList(Section):
    """Drop documents with more than max_per_1k matches of a word list (one entry a line) per 1000 words."""

    path: PathStr
    max_per_1k: Annotated[float, Field(ge=0)] = 5.0


class Classifier(Section):
    """Drop documents for which a local Hugging Face classifier gives `label` a probability above max_score."""

    path: PathStr
    label: str
    max_score: Fraction = 0.5


class Filter(Section):
    """Thresholds by rule, which override the profile's: `{words: {low: 20}}`; `false` turns a rule off."""

    language: Language | None = None
    words: WordList | None = None
    classifier: Classifier | None = None
    rules: dict[str, dict[str, float] | Literal[False]] = {}


class Pii(Section):
    """Find personal data of some kinds (by default none), and replace, tag or drop it."""

    kinds: list[Literal["email", "phone", "ip", "card", "iban", "ssn", "secret"]] = []
    # replace: by values that nobody owns; tag: replace by <EMAIL> etc.; drop: remove the whole document.
    action: Literal["replace", "tag", "drop"] = "replace"
    drop_above: Annotated[int, Field(ge=0, le=10**9)] = (
        50  # drop a document with more findings: it is probably a list of people
    )


class NearDedup(Section):
    ngram: Fewer = 5
    bands: Fewer = 14
    rows: Fewer = 8
    keep: Literal["longest", "all"] = "longest"  # all: drop nothing, but keep each cluster in one split


class Dedup(Section):
    exact: bool = True
    near: NearDedup | Literal[False] = NearDedup()
    paragraphs: Count | Literal[False] = False  # cut out repeated paragraphs of at least this many words


class Decontaminate(Section):
    """Drop documents that share a word n-gram with evaluation files, so that benchmarks do not measure memorization."""

    files: Annotated[list[PathStr], Field(min_length=1)]
    ngram: Fewer = 13
    ignore_if_in_docs: Count = 10  # an n-gram in more documents than this is a common phrase
    action: Literal["drop", "report"] = "drop"


class Split(Section):
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.005


class TokenizerSection(Section):
    """Train a tokenizer (`train: bpe`), use an existing one (`path`), or add tokens to a BPE (`extend`)."""

    train: Literal["bpe", "unigram", "wordpiece", "char"] | None = None
    path: PathStr | None = None
    extend: PathStr | None = None
    vocab_size: Annotated[int, Field(ge=259, le=2**24)] = VOCAB_SIZE  # of the result, special tokens included
    pattern: str = PATTERN  # how text is split before merging: gpt2, llama3, qwen2 or a regex; for bpe and unigram
    normalize: list[Literal["lowercase", "nfc", "nfd", "nfkc", "strip_accents"]] = []
    special_tokens: list[str] = []  # in addition to <|endoftext|> and the chat markers
    extra_ids: Annotated[int, Field(ge=0, le=1000)] = 0  # sentinels <extra_id_0> ... for span corruption; T5 has 100
    sample_mb: Annotated[float, Field(gt=0)] = 64.0  # megabytes of text that the training reads


class CorpusData(Section):
    """Documents joined into one stream of tokens and cut into samples of `seq_len`."""

    kind: Literal["corpus"]
    dir: PathStr
    seed: Seed = 1234  # of the split and the sample for tokenizer training
    sources: Annotated[list[Source], BeforeValidator(name_sources)] = []  # empty: `dir` is already built
    workers: Count | Literal["auto"] = "auto"
    cluster: str | None = None  # address of a Dask scheduler whose workers see the same files: tcp://host:8786
    on_error: OnError = OnError()
    clean: Clean = Clean()
    filter: Filter = Filter()
    pii: Pii = Pii()
    dedup: Dedup = Dedup()
    decontaminate: Decontaminate | None = None
    split: Split = Split()
    tokenizer: TokenizerSection = TokenizerSection(train="bpe")
    seq_len: SeqLen = 1024
    document_mask: bool = False  # attention stays inside a document; positions restart in each


class SftData(Section):
    """Prompts and answers. Only answers are targets. In an encoder-decoder the encoder reads the prompt.

    Records are {prompt, completion}, {instruction, input, output}, {messages: [{role, content}]} or
    {conversations: [{from, value}]}; the first record decides.
    """

    kind: Literal["sft"]
    path: PathStr
    val_path: PathStr | None = None
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05  # of `path`, if there is no val_path
    seq_len: SeqLen = 1024
    packing: bool | None = None  # put several examples into a row; null: true unless the model has an encoder
    too_long: Literal["truncate", "drop"] = "truncate"
    chat_template: PathStr | None = None  # a Jinja file; default: the tokenizer's own, else a plain one
    special_tokens: list[str] = []  # to add to the model's tokenizer; see resize_embeddings


# ---- the run --------------------------------------------------------------------------------------------------------


class Train(Section):
    max_steps: Count | None = None
    max_tokens: Tokens | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    global_batch_size: Annotated[int, Field(ge=1, le=10**6)] = 32  # sequences in one optimizer step
    micro_batch_size: Count | Literal["auto"] = "auto"  # sequences in one forward
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    gradient_checkpointing: Literal["none", "full"] | Count = "none"  # k: every k-th block
    compile: Literal["auto"] | bool = "auto"
    deterministic: bool = False
    early_stopping_patience: Count | None = None  # evaluations in a row without a lower val loss
    max_bad_steps: Count = 5  # non-finite steps in a row, all skipped, before the run stops


class Eval(Section):
    every: Count | None = 250
    max_batches: Count | None = 50  # of global_batch_size sequences of the val split; null: all
    sample_prompt: str | None = None  # text to continue at every evaluation
    sample_tokens: Count = 64


class Checkpoint(Section):
    every: Count = 500
    keep: Count = 2  # the newest ones; the best by val loss is kept too


class Log(Section):
    every: Count = 10
    tensorboard: bool = False


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
    recipe: Literal["modern", "llama", "gpt2"] | None = None  # see RECIPES
    seed: Seed = 1337
    init_from: PathStr | None = None
    resize_embeddings: bool = False  # add embedding rows for tokens that the model of init_from lacks
    model: Choice | None = None
    data: Annotated[CorpusData | SftData, Field(discriminator="kind")]
    objective: Choice | None = None  # null: the default for the model and the data
    peft: Choice | None = None
    optimizer: Choice = Choice(name="adamw")
    schedule: Choice = Choice(name="cosine")
    train: Train = Train()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()

    _origins: dict[tuple, str] = PrivateAttr(default_factory=dict)

    def where(self, key: str) -> str:
        """Return the file and line of a dotted key, or of the innermost section that contains it."""
        return find_origin(self._origins, key_path(key))

    def error(self, key: str, problem: str, *, kind: type[UserError] = UserError, **details: Any) -> UserError:
        """Return an error about a dotted key, with its file and line."""
        return kind(f"{key} {problem}", at=self.where(key), **details)

    def dump(self) -> str:
        """Return the whole config as YAML, every default written out."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)
