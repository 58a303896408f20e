"""The sections of the YAML file with their defaults, which live here and nowhere else.

A "choose one" section is `{name: adamw, lr: 3e-4}`: `name` picks a function, the rest are that function's keyword-only
arguments, checked against its signature by `config.check_options` once torch may be imported.
"""

from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from llmkit.config.defaults import PATTERN, VOCAB_SIZE
from llmkit.config.yaml import nearest
from llmkit.errors import UserError

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A fixed section: unknown keys are errors, and `true`, `10.5` or `"three"` are no integers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Choice(BaseModel):
    """A "choose one" section: a name from a dict in the code, and the options of what it names."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    name: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


# ---- data -----------------------------------------------------------------------------------------------------------


class Source(Section):
    """Where documents come from: `path` (file, folder, glob) or `hf` (a hub id, or a local dataset folder)."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    path: str | None = None
    include: list[str] = []
    exclude: list[str] = []
    hf: str | None = None
    config: str | None = None  # the subset of a Hugging Face dataset
    revision: str | None = None  # a commit or tag of a hub dataset: without one, a later commit is not noticed
    split: str = "train"
    streaming: bool = False
    text_key: str = "text"
    limit: Count | None = None  # documents
    weight: Annotated[float, Field(gt=0)] | None = None  # share of the samples; without any, as the sizes are
    max_epochs: Annotated[float, Field(gt=0)] | None = None  # a run that would read the source oftener is refused
    profile: Literal["web", "docs", "code", "books", "none"] = "none"


class OnError(Section):
    mode: Literal["quarantine", "fail"] = "quarantine"
    max_bad_fraction: Fraction = 0.01


class Clean(Section):
    html: Literal["auto"] | bool = "auto"  # auto: files and records that are HTML
    fix_encoding: bool = True
    unicode: Literal["NFC"] | None = "NFC"
    control: bool = True
    whitespace: bool = True
    # Lines of web pages that stand in so many documents of a work unit are taken out; null: none.
    boilerplate_min_docs: Annotated[int, Field(ge=2)] | None = 20


class Language(Section):
    """Documents whose language is none of these ISO 639-1 codes, or unsure, are dropped."""

    keep: Annotated[list[str], Field(min_length=1)]
    min_score: Fraction = 0.65


class WordList(Section):
    """A file of words and phrases, one a line: documents with more of them in a thousand words are dropped."""

    path: str
    max_per_1k: Annotated[float, Field(ge=0)] = 5.0


class Classifier(Section):
    """A local Hugging Face sequence classifier: documents whose probability of the label is higher are dropped."""

    path: str
    label: str
    max_score: Fraction = 0.5


class Filter(Section):
    """Thresholds by rule, over the profile's: `{words: {low: 20}}`; `false` turns a rule off."""

    language: Language | None = None
    words: WordList | None = None
    classifier: Classifier | None = None
    rules: dict[str, dict[str, float] | Literal[False]] = {}


class Pii(Section):
    """Personal data: which kinds are looked for (none by default), and what happens to them."""

    kinds: list[Literal["email", "phone", "ip", "card", "iban", "ssn", "secret"]] = []
    action: Literal["replace", "tag", "drop"] = "replace"  # by values nobody owns; by <EMAIL>; the whole document
    drop_above: Annotated[int, Field(ge=0)] = 50  # findings in one document, from which it is a list of people


class NearDedup(Section):
    ngram: Count = 5
    bands: Count = 14
    rows: Count = 8
    keep: Literal["longest", "all"] = "longest"  # all: nothing is dropped, but a cluster stays in one split


class Dedup(Section):
    exact: bool = True
    near: NearDedup | Literal[False] = NearDedup()
    paragraphs: Count | Literal[False] = False  # of so many words and more: those that stood before are cut out


class Decontaminate(Section):
    """Documents that share an n-gram of words with evaluation files, which would then measure memory."""

    files: Annotated[list[str], Field(min_length=1)]
    ngram: Count = 13
    ignore_if_in_docs: Count = 10  # an n-gram in more documents than this is a common phrase
    action: Literal["drop", "report"] = "drop"


class Split(Section):
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.005


class TokenizerSection(Section):
    """Train one (`train: bpe`), take an existing tokenizer.json (`path`), or give a BPE more tokens (`extend`)."""

    train: Literal["bpe", "unigram", "wordpiece", "char"] | None = None
    path: str | None = None
    extend: str | None = None
    vocab_size: Annotated[int, Field(ge=259)] = VOCAB_SIZE  # of the result, everything counted
    pattern: str = PATTERN  # how text is cut before merging: gpt2, llama3, qwen2 or a regex; for bpe and unigram
    normalize: list[Literal["lowercase", "nfc", "nfd", "nfkc", "strip_accents"]] = []
    special_tokens: list[str] = []  # beside <|endoftext|> and the chat markers
    extra_ids: Annotated[int, Field(ge=0, le=1000)] = 0  # sentinels <extra_id_0> ... for span corruption; T5 has 100
    sample_mb: Annotated[float, Field(gt=0)] = 64.0  # megabytes of text that the training reads


class CorpusData(Section):
    """Documents joined into one stream of tokens and cut into samples of `seq_len`."""

    kind: Literal["corpus"]
    dir: str
    seed: Annotated[int, Field(ge=0, le=2**32)] = 1234  # of the split, and of the sample that the tokenizer sees
    sources: list[Source] = []  # empty: `dir` was built before
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
    seq_len: Count = 1024
    document_mask: bool = False  # attention stays inside a document, and positions begin anew with each


class SftData(Section):
    """Prompts and answers: only the answers are targets. For T5 the prompt is the encoder's, and nothing is packed.

    Records are {prompt, completion}, {instruction, input, output}, {messages: [{role, content}]} or
    {conversations: [{from, value}]}; the first record decides.
    """

    kind: Literal["sft"]
    path: str
    val_path: str | None = None
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05  # held out of `path` when there is no val_path
    seq_len: Count = 1024
    packing: bool | None = None  # several examples in a row; None: yes, but for an encoder and a decoder
    too_long: Literal["truncate", "drop"] = "truncate"
    chat_template: str | None = None  # a Jinja file; default: the tokenizer's own, else a plain one
    special_tokens: list[str] = []  # that the model's tokenizer is given; see resize_embeddings


# ---- the run --------------------------------------------------------------------------------------------------------


class Train(Section):
    max_steps: Count | None = None
    max_tokens: Count | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    global_batch_size: Count = 32  # sequences in one optimizer step
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
    max_batches: Count | None = 50  # of global_batch_size sequences of the val split; null: all of it
    sample_prompt: str | None = None  # text to continue at every evaluation
    sample_tokens: Count = 64


class Checkpoint(Section):
    every: Count = 500
    keep: Count = 2  # the newest ones; the best by val loss is kept beside them


class Log(Section):
    every: Count = 10
    tensorboard: bool = False


# What `recipe` stands for: defaults of other sections, under all that a config says itself.
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    # The lowest loss for an hour of training: norms on queries and keys, blocks that begin as the identity, Muon.
    "modern": {
        "model": {"name": "qwen3", "init": "zero"},
        "optimizer": {"name": "muon", "lr": 5e-3},
        "schedule": {"name": "wsd", "decay_fraction": 0.6},
    },
    "llama": {
        "model": {"name": "llama"},
        "optimizer": {"name": "adamw", "lr": 6e-4},
        "schedule": {"name": "cosine", "warmup_steps": 100},
    },
    "gpt2": {
        "model": {"name": "gpt2"},
        "optimizer": {"name": "adamw", "lr": 6e-4},
        "schedule": {"name": "cosine", "warmup_steps": 100},
    },
}


class Config(Section):
    """One run. `where("train.max_steps")` says which file and line a value came from."""

    run_dir: str = "runs/default"
    recipe: Literal["modern", "llama", "gpt2"] | None = None  # see RECIPES
    seed: Annotated[int, Field(ge=0)] = 1337
    init_from: str | None = None
    resize_embeddings: bool = False  # give the model of init_from rows for tokens that it did not have
    model: Choice | None = None
    data: Annotated[CorpusData | SftData, Field(discriminator="kind")]
    objective: Choice | None = None  # None: what the model and the data are for
    peft: Choice | None = None
    optimizer: Choice = Choice(name="adamw")
    schedule: Choice = Choice(name="cosine")
    train: Train = Train()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()

    _origins: dict[tuple, str] = PrivateAttr(default_factory=dict)

    def where(self, key: str) -> str:
        """The file and line of a dotted key, or of the nearest section that holds it."""
        return nearest(self._origins, tuple(key.split(".")))

    def error(self, key: str, problem: str, *, kind: type[UserError] = UserError, **details: Any) -> UserError:
        """Return an error that names a dotted key, what is wrong with it, and where it was written."""
        return kind(f"{key} {problem}", at=self.where(key), **details)

    def dump(self) -> str:
        """The whole config as YAML, every default written out."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)
