"""Read a byte-level BPE as a tiktoken encoding, which gives the same ids 4-5 times as fast."""

import itertools
import json
import re
import unicodedata
from collections.abc import Iterator

from tokenizers import Tokenizer as Rust

# The split of GPT-2; tokenizers knows it as ByteLevel(use_regex=True).
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_AFTER = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {  # regexes that split text before merging; each matches all of any text
    "gpt2": GPT2_PATTERN,
    "llama3": rf"{_WORDS}|\p{{N}}{{1,3}}|{_AFTER}",  # at most three digits; GPT-4 differs in trailing spaces
    "qwen2": rf"{_WORDS}|\p{{N}}|{_AFTER}",  # digits one by one
}
LONGEST_RUN = 20_000  # of a word or spaces: tiktoken is slow on longer runs, and its stack overflows on megabytes
PIECE = 2**18  # characters of a long text that are encoded at a time: tokenizers takes 120 bytes of memory for each
LINES = "[^\n]*\n|[^\n]+"  # the split of the kind char, which has no merges
# Places where every regex in PATTERNS, and BERT's, ends a word, whatever follows. No normalizer joins these signs to a
# letter before them. Letters of other scripts are left out: to a library that does not know a new one it is a sign.
CUT = re.compile(r"\S(?= )|[0-9A-Za-z\u4e00-\u9fa5](?=[\n,.\u3001\u3002\uff0c])")
CUT_SIGNS = set(" \n,.\u3001\u3002\uff0c")  # one of them follows each cut
KEEPING = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase"}  # normalizers that leave something of every word
DELETING = {"StripAccents", "BertNormalizer"}  # an accent or a control character between spaces may go


def build_fast_encoder(rust: Rust, added_words: set[str], strips: bool):
    """Return a BPE as a tiktoken encoding, or None if tiktoken lacks a feature that its tokenizer.json uses.

    added_words  the added tokens that a text may spell out
    strips       whether added tokens take in spaces, or stand for whole words only
    """
    import tiktoken

    spec = json.loads(rust.to_str())
    pattern = find_split_pattern(spec["pre_tokenizer"] or {})
    plain = spec["model"]["type"] == "BPE" and not spec["model"].get("byte_fallback")
    plain = plain and spec["normalizer"] in (None, {"type": "NFC"})
    if not plain or pattern not in PATTERNS.values():  # tiktoken drops unmatched text
        return None
    added = {token.content: i for i, token in rust.get_added_tokens_decoder().items()}
    # tiktoken knows no tokens that take in spaces, and does not normalize them.
    if added_words and (strips or not all(unicodedata.is_normalized("NFC", word) for word in added)):
        return None
    # Of two that begin in one place it may find either. In order, such two stand side by side.
    if any(long.startswith(short) for short, long in itertools.pairwise(sorted(added))):
        return None
    letters = {letter: byte for byte, letter in enumerate(bytes_to_unicode())}
    plain_tokens = {token: i for token, i in spec["model"]["vocab"].items() if token not in added}
    if not set().union(*plain_tokens) <= set(letters):
        return None
    ranks = {bytes(letters[c] for c in token): i for token, i in plain_tokens.items()}
    return tiktoken.Encoding("llmkit", pat_str=pattern, mergeable_ranks=ranks, special_tokens=added)


def find_split_pattern(spec: dict) -> str | None:
    """Return the split regex of a byte-level pre-tokenizer in tokenizer.json, or None if it does anything else."""
    steps = spec.get("pretokenizers", [spec])
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    if len(steps) == 1:
        return GPT2_PATTERN if last["use_regex"] else None
    split = steps[0]
    if len(steps) > 2 or last["use_regex"] or split.get("type") != "Split":
        return None
    return split["pattern"].get("Regex") if split["behavior"] == "Isolated" and not split["invert"] else None


def flatten_steps(spec: dict) -> Iterator[dict]:
    """Yield the steps of a pre-tokenizer in tokenizer.json. Nested sequences are flattened."""
    for step in spec.get("pretokenizers", [spec]):
        yield from flatten_steps(step) if "pretokenizers" in step else [step]


def may_be_cut(rust: Rust, added_words: set[str]) -> bool:
    """Return whether the ids of a text are those of the pieces of `cut_text`, one after the other.

    added_words  the added tokens that a text may spell out, none of which may lie across a cut
    """
    spec = json.loads(rust.to_str())
    model, normalizer = spec["model"], spec["normalizer"] or {"normalizers": []}
    if model.get("dropout") or any(CUT_SIGNS & set(unicodedata.normalize("NFKC", word)) for word in added_words):
        return False
    changes = {step["type"] for step in normalizer.get("normalizers", [normalizer])}
    steps = list(flatten_steps(spec["pre_tokenizer"] or {"type": None}))
    kinds = {step["type"] for step in steps}
    is_char = steps[0].get("pattern") == {"Regex": LINES} and model.get("merges") == [] and model["byte_fallback"]
    if is_char or kinds == {"BertPreTokenizer"}:
        return changes <= KEEPING | DELETING
    splits = {find_split_pattern({"pretokenizers": steps[:number]}) for number in (1, 2)}  # later ones cut words
    return changes <= KEEPING and kinds <= {"ByteLevel", "Split"} and not splits.isdisjoint(PATTERNS.values())


def cut_text(text: str) -> Iterator[str]:
    """Yield the pieces of a text, of about PIECE characters, that a tokenizer encodes as it does the whole text."""
    start = 0
    while found := CUT.search(text, start + PIECE):
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]


def has_only_short_runs(text: str, longest: int = LONGEST_RUN) -> bool:
    """Return whether all words and all runs of spaces are shorter, which is sure only if they are half as long.

    A longer one fills one of the windows of half that size.
    """
    half = longest // 2
    windows = (text[at : at + half] for at in range(0, len(text) - half + 1, half))
    return all(window.split(maxsplit=1) not in ([], [window]) for window in windows)


def bytes_to_unicode() -> list[str]:
    """Return GPT-2's letter for each of the 256 bytes: itself if printable, else the next unused one from U+0100.

    >>> bytes_to_unicode()[ord("a")], bytes_to_unicode()[ord(" ")]
    ('a', '\\u0120')
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]
