"""Declare the section `data` of the YAML file for records: prompts and answers, preferences, or texts with labels."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from llmkit.config.data import Decontaminate, OnError, SourceFiles, name_sources
from llmkit.config.fields import Count, Date, NonBlank, PathStr, Section, SeqLen


class RecordSource(SourceFiles):
    """A source of fine-tuning records: JSONL, JSON, CSV, Parquet or a saved dataset."""

    columns: dict[str, NonBlank] | None = None
    """Names of the fields in this source; null: data.columns."""


class RecordData(Section):
    """Hold what all kinds of records share."""

    path: PathStr | None = None
    """A file, folder or glob of records: JSONL, JSON, CSV or Parquet; or the folder of a saved dataset."""
    columns: dict[str, NonBlank] = {}
    """Names of the fields, if they are others: {question: Frage, answer: Antwort}, or {text: Satz, label: Klasse}. Then
    no other field is read."""
    val_path: PathStr | None = None
    """Records for validation, named as in path; null: a part of the records."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """The share of the records that is held out for validation, if there is no val_path."""
    seq_len: SeqLen = 1024
    """Tokens in a row."""
    on_error: OnError = OnError()
    """Say what to do with bad records."""
    decontaminate: Decontaminate | None = None
    """Leave out records that contain texts of evaluation files."""

    @property
    def row_len(self) -> int:
        """Return the tokens that a row reads."""
        return self.seq_len


class TurnData(RecordData):
    """Hold what records of prompts and answers share: turns, which a chat template joins."""

    sources: Annotated[list[RecordSource], BeforeValidator(name_sources)] = []
    """Instead of path: several sources, with weights if some are to be read more often."""
    packing: bool | None = None
    """Put several examples into a row; null: true unless the model has an encoder."""
    chat_template: PathStr | None = None
    """A Jinja file; default: the tokenizer's own, else a plain one."""
    date: Date | None = None
    """The day that chat templates with a date show, as 2026-01-31; null: the day of the run's first start."""
    special_tokens: list[str] = []
    """Special tokens to add to the model's tokenizer; see resize_embeddings."""
    workers: Count | Literal["auto"] = "auto"
    """Processes that encode the records; auto: one per core."""

    def all_sources(self) -> list[RecordSource]:
        """Return the sources; a path is one of them."""
        return self.sources or [RecordSource(**source) for source in name_sources(self.path)]


class SftData(TurnData):
    """Prompts and answers. Only answers are targets. In an encoder-decoder the encoder reads the prompt."""

    kind: Literal["sft"]
    """sft: prompts and answers for fine-tuning."""
    train_on: Literal["all", "last"] = "all"
    """Learn all answers of a conversation, or the last one."""
    too_long: Literal["drop", "truncate_prompt", "split"] = "drop"
    """Treat examples longer than seq_len so that no answer is cut: drop them, leave out the start of the prompt, or
    split them into windows that overlap by half, in which each token of an answer is learnt once."""


class PreferenceData(TurnData):
    """Prompts with a better and a worse answer, or with one answer that is good or bad."""

    kind: Literal["preference"]
    """preference: prompts with two answers, or with one and a verdict, for dpo, kto and reward."""
    too_long: Literal["drop", "truncate_prompt"] = "drop"
    """Treat pairs of which a prompt with its answer is longer than seq_len: drop them, or leave out the start of the
    prompt, of both alike. No answer is cut."""
    seq_len: SeqLen = 1024
    """Tokens of a prompt with an answer at the most; a row holds twice as many, for a pair."""

    @property
    def row_len(self) -> int:
        """Return the tokens that a row reads."""
        return 2 * self.seq_len


class FileData(RecordData):
    """Hold what records of a single path share."""

    @property
    def sources(self) -> list[RecordSource]:
        """Return no source: path names all records."""
        return []

    def all_sources(self) -> list[RecordSource]:
        """Return the source that path is."""
        return [RecordSource(**source) for source in name_sources(self.path)]


class PromptData(FileData):
    """Prompts that the model answers while it is trained, with whatever a reward needs to judge the answers."""

    kind: Literal["prompts"]
    """prompts: for grpo, which rewards the model's own answers."""
    chat_template: PathStr | None = None
    """A Jinja file; default: the tokenizer's own, else a plain one."""
    special_tokens: list[str] = []
    """Special tokens to add to the model's tokenizer; see resize_embeddings."""
    seq_len: SeqLen = 1024
    """Tokens of a prompt with an answer at the most. Prompts that leave no room for an answer are left out."""


class LabelledData(FileData):
    """Texts with a label, pairs of texts, or words with a tag each; for the objectives classify, regress and tag."""

    kind: Literal["labelled"]
    """labelled: texts with labels, for a head that predicts them."""
    header: list[NonBlank] | None = None
    """Names of the columns of CSV and TSV files that have no line with them."""
    labels: Annotated[list[NonBlank], Field(min_length=1)] | None = None
    """The labels in the order of the model's outputs; null: those of the records, in order."""
    multi_label: bool | None = None
    """Several labels of a text, or none, are possible; null: if the first record has a list."""
    label_separator: NonBlank | None = None
    """Splits the label of a text file into several: "|" for "sport|news"."""
    too_long: Literal["truncate", "drop"] = "truncate"
    """Cut texts that are longer than seq_len, the longer one of a pair first; or drop them."""
    seq_len: SeqLen = 512
    """Tokens of a text at the most; rows are as long as the longest of their batch."""
