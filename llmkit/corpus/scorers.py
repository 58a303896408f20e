"""Score texts with resources from disk: a language identifier, a word list, a classifier."""

from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.errors import DataError, MachineError, ModelError, UserError
from llmkit.files import folder_stamps
from llmkit.readers.decode import decode
from llmkit.readers.ngrams import NgramSet, ngrams_of
from llmkit.readers.words import TextFeatures, hash_ngrams, split_words

SAMPLES, SAMPLE_CHARACTERS = 3, 333  # from start, middle and end of a text: enough to identify its language
WINDOW_CHARACTERS = 10_000  # more than 512 tokens
WINDOWS = 4  # windows of a long text that a classifier reads, evenly spread


def sample_pieces(text: str, number: int, size: int) -> list[str]:
    """Return pieces of `size` characters, evenly spread from the start to the end of a text."""
    step = (len(text) - size) // (number - 1)
    return [text[i * step : i * step + size] for i in range(number)]


# ---- language -------------------------------------------------------------------------------------------------------


@cache
def load_language_identifier() -> Any:
    """Load py3langid's model, a numpy file inside its package."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def detect_language(text: str) -> tuple[str, float]:
    """Return (ISO 639-1 code, probability) of the main language of a text.

    >>> detect_language("Die Katze sitzt auf der Matte und schaut aus dem Fenster.")[0]
    'de'
    """
    if len(text) > SAMPLES * SAMPLE_CHARACTERS:
        text = " ".join(sample_pieces(text, SAMPLES, SAMPLE_CHARACTERS))
    code, probability = load_language_identifier().classify(text)
    return code, round(float(probability), 4)


def check_languages(codes: list[str], at: str | None = None) -> None:
    """Raise UserError if `detect_language` can't return some of the codes."""
    known = load_language_identifier().labels
    if unknown := sorted(set(codes) - set(known)):
        short = unknown[0][:2].lower()
        raise UserError(
            "data.filter.language.keep has an unknown language",
            at=at,
            got=", ".join(unknown),
            expected=f"ISO 639-1 codes such as en, de, fr, zh (py3langid knows {len(known)})",
            fix=f"did you mean {short}?" if short in known else None,
        )


# ---- word lists ------------------------------------------------------------------------------------------------------


def load_word_list(path: str) -> dict[int, NgramSet]:
    """Read a file of words and phrases, one per line; return them by length in words. # starts a comment line."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError("no such word list", at=path, expected="a text file with one word or phrase per line")
    try:
        lines = decode(file.read_bytes())[0].splitlines()
    except ValueError as error:
        raise DataError(f"the word list can't be read: {error}", at=path) from None
    entries = [words for line in lines if not line.startswith("#") and (words := split_words(line))]
    if not entries:
        raise DataError("the word list is empty", at=path)
    lengths = sorted({len(words) for words in entries})
    return {n: NgramSet(np.concatenate([ngrams_of(e, n) for e in entries if len(e) == n])) for n in lengths}


def list_matches_per_1k(text: TextFeatures, listed: dict[int, NgramSet]) -> float:
    """Return the number of matches of a word list per thousand words of a text."""
    found = sum(len(grams.find_in(hash_ngrams(text.hashes, n))) for n, grams in listed.items())
    return round(1000 * found / max(1, len(text.hashes)), 4)


# ---- classifier -----------------------------------------------------------------------------------------------------

Classifier = tuple[Any, Any, int]  # model, tokenizer, the label's column in the logits


def load_classifier(path: str, label: str) -> Classifier:
    """Load a local sequence classifier, without running code from its folder."""
    folder = Path(path).expanduser()
    return _load_classifier(folder, label, tuple(folder_stamps(folder)))


@lru_cache(maxsize=1)
def _load_classifier(folder: Path, label: str, stamps: tuple) -> Classifier:
    try:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
    except ImportError:
        fix = "pip install 'llmkit[classifier]'"
        raise MachineError("data.filter.classifier needs the transformers package", fix=fix) from None
    for needed in ("config.json", "tokenizer_config.json"):  # without the latter, transformers makes up a tokenizer
        if not (folder / needed).is_file():
            raise ModelError("no classifier in this folder", at=folder / needed, expected="a Hugging Face folder")
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            str(folder), use_safetensors=True, output_loading_info=True, **local
        )
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **local)
    except Exception as error:  # transformers, safetensors and torch raise many types
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"the classifier can't be loaded: {reason}", at=folder) from None
    if not tokenizer.is_fast:
        raise ModelError("the classifier has no fast tokenizer", at=folder, expected="tokenizer.json")
    if missing := sorted(loading["missing_keys"]):
        raise ModelError("the classifier lacks weights (they would be random)", at=folder, got=missing[0])
    if label not in model.config.label2id:
        labels = ", ".join(model.config.label2id)
        raise UserError("the classifier has no such label", at=folder, got=label, expected=labels)
    return model.eval(), tokenizer, model.config.label2id[label]


def classifier_score(text: str, loaded: Classifier) -> float:
    """Return the highest probability of the label among up to WINDOWS windows of the text.

    A window is as long as the model's context, 512 tokens at most. Single-label models use softmax, multi-label models
    and models with one output use sigmoid.
    """
    import torch

    model, tokenizer, column = loaded
    if not text.strip():
        return 0.0
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512), 512)
    long = len(text) > 4 * WINDOWS * WINDOW_CHARACTERS  # avoid tokenizing a whole book for four windows
    texts = sample_pieces(text, WINDOWS, WINDOW_CHARACTERS) if long else [text]
    windows = tokenizer(texts, truncation=True, max_length=longest, return_overflowing_tokens=True)["input_ids"]
    chosen = sorted({int(i) for i in np.linspace(0, len(windows) - 1, WINDOWS)})
    with torch.inference_mode():  # one by one: lengths differ
        logits = torch.cat([model(torch.tensor([windows[i]])).logits.float() for i in chosen])
    multi_label = model.config.problem_type == "multi_label_classification" or logits.shape[1] == 1
    return round(float((logits.sigmoid() if multi_label else logits.softmax(-1))[:, column].max()), 4)
