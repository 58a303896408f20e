"""Scores that need something loaded first: a language model, a list of words, a classifier, evaluation files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.corpus.words import TextFeatures, hash_ngrams, hash_words, split_words
from llmkit.errors import DataError, MachineError, ModelError, UserError
from llmkit.files import file_stamps, folder_stamps
from llmkit.readers.decode import decode
from llmkit.readers.documents import list_files
from llmkit.readers.records import READERS, BadRecord, read_records, read_text, suffix_of

SLICES, SLICE = 3, 333  # a text's language shows in a few hundred characters from its start, middle and end
WINDOW_CHARACTERS = 10_000  # more than a window of 512 tokens holds
WINDOWS = 4  # of a long text that a classifier reads, evenly spread
TABLE_BITS = 24  # of the table that tells in one look that an n-gram is none of those looked for


# ---- language -------------------------------------------------------------------------------------------------------


@cache
def identifier() -> Any:
    """py3langid's model, a numpy file inside its package."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def language_of(text: str) -> tuple[str, float]:
    """(ISO 639-1 code, probability) of the language that most of a text is in.

    >>> language_of("Die Katze sitzt auf der Matte und schaut aus dem Fenster.")[0]
    'de'
    """
    if len(text) > SLICES * SLICE:
        step = (len(text) - SLICE) // (SLICES - 1)
        text = " ".join(text[i * step : i * step + SLICE] for i in range(SLICES))
    code, probability = identifier().classify(text)
    return code, round(float(probability), 4)


def check_languages(codes: list[str], at: str | None = None) -> None:
    """Refuse codes that no text would ever get."""
    unknown = sorted(set(codes) - set(identifier().labels))
    if unknown:
        short = unknown[0][:2].lower()
        raise UserError(
            "data.filter.language.keep has an unknown language",
            at=at,
            got=", ".join(unknown),
            expected=f"codes as en, de, fr, zh: py3langid knows {len(identifier().labels)}",
            fix=f"did you mean {short}?" if short in identifier().labels else None,
        )


# ---- n-grams to look for --------------------------------------------------------------------------------------------


class NgramSet:
    """A set of hashed n-grams that finds its members among millions quickly."""

    def __init__(self, grams: np.ndarray):
        self.grams = np.unique(grams)
        self.table = np.zeros(2**TABLE_BITS if len(grams) else 1, bool)
        self.table[self.places(self.grams)] = True

    def places(self, grams: np.ndarray) -> np.ndarray:
        return (grams & np.uint64(len(self.table) - 1)).astype(np.int64)

    def found_in(self, grams: np.ndarray) -> np.ndarray:
        """The members among some n-grams, as often as they are there."""
        maybe = grams[self.table[self.places(grams)]]
        places = np.searchsorted(self.grams, maybe)  # np.isin would sort all of them again
        return maybe[self.grams[np.minimum(places, len(self.grams) - 1)] == maybe] if len(maybe) else maybe


def word_list(path: str) -> dict[int, NgramSet]:
    """Words and phrases of a file, one a line, by their length in words; # begins a comment."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError("there is no such word list", at=path, fix="a text file with a word or phrase a line")
    try:
        lines = decode(file.read_bytes())[0].splitlines()
    except ValueError as error:
        raise DataError(f"the word list can't be read: {error}", at=path) from None
    entries = [words for line in lines if not line.startswith("#") and (words := split_words(line))]
    if not entries:
        raise DataError("the word list is empty", at=path)
    lengths = sorted({len(words) for words in entries})
    return {n: NgramSet(np.concatenate([ngrams_of(e, n) for e in entries if len(e) == n])) for n in lengths}


def ngrams_of(words: list[bytes], n: int) -> np.ndarray:
    return hash_ngrams(hash_words(words), n)


def listed_per_1k(text: TextFeatures, listed: dict[int, NgramSet]) -> float:
    """How many words and phrases of a list stand in a thousand words."""
    found = sum(len(grams.found_in(hash_ngrams(text.hashes, n))) for n, grams in listed.items())
    return round(1000 * found / max(1, len(text.hashes)), 4)


def evaluation_files(patterns: Sequence[str]) -> list[Path]:
    """The files that decontamination looks at."""
    files = [file for pattern in patterns for file in list_files(pattern)]
    if zips := [file for file in files if file.suffix.lower() == ".zip"]:
        raise DataError("evaluation files in a zip are not read", at=zips[0], fix="unpack it")
    return files


def evaluation_ngrams(patterns: Sequence[str], n: int) -> tuple[NgramSet, int, int]:
    """(n-grams, texts, texts that are shorter and can't be looked for) of all strings in the evaluation files.

    Questions, choices and answers are looked for one by one: no corpus has them joined as a benchmark joins them.
    """
    return read_evaluation(tuple(file_stamps(evaluation_files(patterns))), n)


@lru_cache(maxsize=1)  # a worker takes many units
def read_evaluation(stamps: tuple[tuple[str, int, int], ...], n: int) -> tuple[NgramSet, int, int]:
    grams, texts, short = [np.empty(0, np.uint64)], 0, 0
    for file in (Path(name) for name, _, _ in stamps):
        for line, record in read_records(file):
            if isinstance(record, BadRecord):  # what can't be read can't be looked for
                raise DataError("an evaluation file can't be read", at=f"{file}:{line}", got=record.reason)
            whole = READERS.get(suffix_of(file), read_text) is read_text
            for string in strings_in([record["text"]] if whole else record.values()):
                words = split_words(string)
                if len(words) >= n:
                    grams.append(ngrams_of(words, n))
                texts, short = texts + 1, short + (len(words) < n)
    return NgramSet(np.concatenate(grams)), texts, short


def strings_in(values: Any) -> Iterator[str]:
    """Every string in nested lists and objects."""
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from strings_in(value.values())
        elif isinstance(value, list):
            yield from strings_in(value)


# ---- classifier -----------------------------------------------------------------------------------------------------


Classifier = tuple[Any, Any, int]  # model, tokenizer, the label's column


def classifier(path: str, label: str) -> Classifier:
    """A local sequence classifier; no code of the folder's ever runs."""
    folder = Path(path).expanduser()
    return load_classifier(folder, label, tuple(folder_stamps(folder)))


@lru_cache(maxsize=1)
def load_classifier(folder: Path, label: str, stamps: tuple) -> Classifier:
    try:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
    except ImportError:
        fix = "pip install 'llmkit[classifier]'"
        raise MachineError("data.filter.classifier needs the transformers package", fix=fix) from None
    for needed in ("config.json", "tokenizer_config.json"):  # without the latter transformers makes one up
        if not (folder / needed).is_file():
            raise ModelError("there is no classifier", at=folder / needed, expected="a Hugging Face folder")
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            str(folder), use_safetensors=True, output_loading_info=True, **local
        )
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **local)
    except Exception as error:  # transformers, safetensors and torch raise all kinds
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"the classifier can't be loaded: {reason}", at=folder) from None
    if not tokenizer.is_fast:
        raise ModelError("the classifier has no fast tokenizer", at=folder, expected="tokenizer.json")
    if missing := sorted(loading["missing_keys"]):
        raise ModelError("the classifier lacks weights, which would be random", at=folder, got=missing[0])
    if label not in model.config.label2id:
        raise UserError(
            "the classifier has no such label", at=folder, got=label, expected=", ".join(model.config.label2id)
        )
    return model.eval(), tokenizer, model.config.label2id[label]


def classifier_score(text: str, loaded: Classifier) -> float:
    """The highest probability of the label among a few windows of the text, each as long as the model reads.

    One label of many: softmax; a multi-label model's labels each for itself: sigmoid.
    """
    import torch

    model, tokenizer, column = loaded
    if not text.strip():
        return 0.0
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512), 512)
    if len(text) > 4 * WINDOWS * WINDOW_CHARACTERS:  # no need to tokenize a book to read four pages of it
        step = (len(text) - WINDOW_CHARACTERS) // (WINDOWS - 1)
        texts = [text[i * step : i * step + WINDOW_CHARACTERS] for i in range(WINDOWS)]
    else:
        texts = [text]
    cut = tokenizer(texts, truncation=True, max_length=longest, return_overflowing_tokens=True)["input_ids"]
    chosen = sorted({int(i) for i in np.linspace(0, len(cut) - 1, WINDOWS)})
    with torch.inference_mode():  # one by one: the last window is shorter
        logits = torch.cat([model(torch.tensor([cut[i]])).logits.float() for i in chosen])
    multiple = model.config.problem_type == "multi_label_classification" or logits.shape[1] == 1
    return round(float((logits.sigmoid() if multiple else logits.softmax(-1))[:, column].max()), 4)
