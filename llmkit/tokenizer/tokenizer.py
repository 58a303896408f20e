"""Apply and save a tokenizer of any kind. Special tokens that are spelt out in a text stay plain text."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Rust
from tokenizers import models

from llmkit.screen import replace_surrogates
from llmkit.tokenizer.fast import PIECE, build_fast_encoder, cut_text, flatten_steps, has_only_short_runs, may_be_cut
from llmkit.tokenizer.guard import library_errors

EOS, CHAT_START, CHAT_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONFIG = "tokenizer_config.json"  # of transformers
EOS_NAMES = (EOS, "</s>", "<|end_of_text|>", "<eos>", "<|eot_id|>", CHAT_END, "[SEP]")  # in order of preference
BOS_NAMES = ("<s>", "<bos>")
ROLES = {  # role in transformers' tokenizer_config.json -> usual tokens for it, if the file names none
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "mask_token": ("[MASK]", "<mask>"),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
}
MAX_VERIFIED_TEXTS = 1000  # texts on which the fast encoder is verified
WITH_SPECIALS = ("with_specials", "strips", "token_lengths")  # cached properties about special tokens
BLOCK = 256  # documents encoded together


@dataclass
class Tokenizer:
    """Hold a tokenizer of the tokenizers library (`rust`) together with its special tokens and its chat template."""

    rust: Rust
    eos_id: int
    bos: str | None = None  # the token that begins a text, if the tokenizer has one
    chat_template: str | None = None
    extra_stop_ids: list[int] = field(default_factory=list)  # more stop tokens, which a model's config files name
    role_tokens: dict[str, str] = field(default_factory=dict)  # tokens of ROLES that a config file names
    # The token for text that the vocabulary can't express, if it is a special one in tokenizer.json. Texts that spell
    # it out, as WikiText and the Penn Treebank do, mean it: here it is none, so that it is found in a text.
    unknown: str | None = field(default=None, init=False)

    def __post_init__(self):
        name, added = unknown_token(self.rust), self.rust.get_added_tokens_decoder()
        is_special = any(token.special and token.content == name for token in added.values())
        if is_special and name not in (self.eos, self.bos):
            self.unknown, self.rust = name, set_special(self.rust, name, False)

    def __len__(self) -> int:
        """Return the highest id plus one. This exceeds the number of tokens if ids have gaps."""
        return self.size

    @cached_property
    def size(self) -> int:
        return max(self.rust.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def specials(self) -> dict[str, int]:
        """Map special tokens to their ids."""
        added = self.rust.get_added_tokens_decoder().items()
        return {token.content: i for i, token in added if token.special or token.content == self.unknown}

    @cached_property
    def added_words(self) -> set[str]:
        """Return the added tokens that a text may spell out: those that are not special, and the unknown one."""
        return {token.content for token in self.rust.get_added_tokens_decoder().values() if not token.special}

    @cached_property
    def controls(self) -> list[str]:
        """Return the special tokens that stay text where a text spells them out: all but the unknown one."""
        return [name for name in self.specials if name != self.unknown]

    @property
    def roles(self) -> dict[str, str]:
        """Map each role in ROLES that the tokenizer fills to its token."""
        usual = {role: next((name for name in names if name in self.specials), None) for role, names in ROLES.items()}
        return {role: token for role, token in (usual | self.role_tokens).items() if token}

    @cached_property
    def sha256(self) -> str:
        """Return a checksum of all that affects ids: tokenizer.json and the tokens that begin and end a text."""
        return hashlib.sha256(f"{self.eos_id} {self.bos} {self.rust.to_str()}".encode()).hexdigest()

    @cached_property
    def prefix(self) -> list[int]:
        """Return the ids that the post-processor puts before a text: Llama's <s>, nothing for GPT-2."""
        plain = self.encode("a")
        with library_errors("the tokenizer can't encode a text"):
            with_specials = self.rust.encode("a", add_special_tokens=True).ids
        starts = [i for i in range(len(with_specials)) if with_specials[i : i + len(plain)] == plain]
        return with_specials[: starts[0]] if starts else []

    @property
    def eos(self) -> str:
        added = self.rust.get_added_tokens_decoder()  # for a normalized token, id_to_token gives its normal form
        return added[self.eos_id].content if self.eos_id in added else self.rust.id_to_token(self.eos_id)

    @property
    def bos_id(self) -> int | None:
        return self.rust.token_to_id(self.bos) if self.bos else None

    @property
    def end_of_turn_id(self) -> int:
        """Return the id of the token that ends a turn in ChatML, or of the end token if there is none."""
        return self.specials.get(CHAT_END, self.eos_id)

    @property
    def stop_ids(self) -> list[int]:
        """Return the ids that stop generation: end token, end of turn (with a chat template), and `extra_stop_ids`."""
        turn = [self.end_of_turn_id] if self.chat_template else []
        return list(dict.fromkeys([self.eos_id, *turn, *self.extra_stop_ids]))

    @property
    def pad_id(self) -> int:
        """Return the id that fills rows: that of the padding token, else of the end token."""
        name = self.roles.get("pad_token")
        return self.rust.token_to_id(name) if name else self.eos_id

    @property
    def config_ids(self) -> dict[str, Any]:
        """Return the ids that a model's config.json names, as `folder.save_model` takes them.

        There is no padding token if it also ends each text: transformers would take the end of a text for padding.
        """
        with library_errors("the tokenizer can't encode a text"):
            ends_with_pad = self.rust.encode("a", add_special_tokens=True).ids[-1:] == [self.pad_id]
        pad_id = None if ends_with_pad else self.pad_id
        return {"eos_token_ids": self.stop_ids, "bos_token_id": self.bos_id, "pad_token_id": pad_id}

    def add_specials(self, tokens: list[str]) -> None:
        """Append special tokens to the vocabulary."""
        self.rust.add_special_tokens([token for token in tokens if token not in self.specials])
        for cached in (
            "specials",
            "controls",
            "added_words",
            "size",
            "sha256",
            "prefix",
            "continuation",
            "fast",
            "may_be_cut",
            "token_bytes",
            "unknown_id",
            *WITH_SPECIALS,
        ):
            self.__dict__.pop(cached, None)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text. Special tokens spelt out in it are encoded as text."""
        return encode_text(self.rust, text)

    @cached_property
    def continuation(self) -> Rust:
        """Return the tokenizer for text that follows other text: it adds no space that belongs before a first text."""
        spec = json.loads(self.rust.to_str())
        steps = [step for step in flatten_steps(spec["pre_tokenizer"] or {}) if "prepend_scheme" in step]
        for step in steps:
            step["prepend_scheme"] = "never"
        normalizer = spec["normalizer"] or {}
        before = normalizer.get("normalizers", [normalizer])
        after = [step for step in before if step.get("type") != "Prepend"]  # of Llama 1 and 2
        if len(after) < len(before):
            spec["normalizer"] = {"type": "Sequence", "normalizers": after} if after else None
        return Rust.from_str(json.dumps(spec)) if steps or len(after) < len(before) else self.rust

    def encode_continuation(self, text: str) -> list[int]:
        """Return the ids of a text that follows a special token."""
        return encode_text(self.continuation, text)

    @cached_property
    def with_specials(self) -> Rust:
        """Return the tokenizer that finds special tokens in a text, as transformers does."""
        rust = Rust.from_str(self.rust.to_str())
        rust.encode_special_tokens = False
        return rust

    @cached_property
    def strips(self) -> bool:
        """Return whether an added token takes in the spaces beside it, or is found as a whole word only."""
        added = self.rust.get_added_tokens_decoder().values()
        return any(token.lstrip or token.rstrip or token.single_word for token in added)

    def encode_with_specials(self, text: str, spans: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of a text in which special tokens have a meaning, and which lie in a span, as booleans.

        spans  (start, stop) in characters, in order; a token is in one if any of its characters is
        """
        text = replace_surrogates(text)
        if not self.strips and self.is_fast_for(text):
            ids = self.fast.encode_to_numpy(text, allowed_special="all")
            ends = np.cumsum(self.token_lengths[ids])
            starts = ends - self.token_lengths[ids]
            at, byte_spans = [0, 0], []
            for start, stop in spans:
                edges = []
                for edge in (start, stop):
                    at = [edge, at[1] + len(text[at[0] : edge].encode())]
                    edges.append(at[1])
                byte_spans.append(edges)
            spans = byte_spans
        else:
            with library_errors("the tokenizer can't encode a text"):
                encoded = self.with_specials.encode(text, add_special_tokens=False)
            ids = np.array(encoded.ids, dtype=np.uint32)
            starts, ends = np.array(encoded.offsets, dtype=np.int64).reshape(-1, 2).T
        inside = np.zeros(len(ids), dtype=bool)
        for start, stop in spans:
            inside[np.searchsorted(ends, start, "right") : np.searchsorted(starts, stop)] = True
        return ids, inside

    @cached_property
    def token_lengths(self) -> np.ndarray:
        """Return the bytes of each token in a text, int32 (V,), special tokens by their names."""
        sizes = self.token_bytes.copy()
        for name, i in self.specials.items():
            sizes[i] = len(name.encode())
        return sizes

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a text to continue: `prefix` and the text, or the end token if both are empty."""
        return self.prefix + self.encode(text) or [self.eos_id]

    def encode_source(self, text: str) -> list[int]:
        """Return the ids of an encoder's input in an encoder-decoder: `prefix`, the text and the end token."""
        return [*self.prefix, *self.encode(text), self.eos_id]

    def encode_documents(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """Yield the ids of documents, each with `prefix` and the end token. Memory holds at most BLOCK of them."""
        before, after = np.array(self.prefix, dtype=np.uint32), np.array([self.eos_id], dtype=np.uint32)
        for block in in_blocks(texts, BLOCK):
            yield from (np.concatenate((before, ids, after)) for ids in self.encode_batch(block))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, with special tokens spelt out."""
        return self.rust.decode(list(ids), skip_special_tokens=False)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of many texts, uint32. Use tiktoken where it gives the same ids: it is 4-5 times as fast."""
        pieces = [[(piece, self.is_fast_for(piece)) for piece in self.cut(text)] for text in texts]
        slow = self.encode_slowly(piece for one in pieces for piece, is_fast in one if not is_fast)
        return [
            np.concatenate([self.encode_fast(piece) if is_fast else next(slow) for piece, is_fast in one])
            for one in pieces
        ]

    def cut(self, text: str) -> Iterable[str]:
        """Return the pieces of a long text whose ids, one after the other, are its own; or the text as it is."""
        return cut_text(text) if len(text) > PIECE and self.may_be_cut else [text]

    def encode_slowly(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """Yield the ids of many texts, uint32. Use the tokenizers library, never tiktoken."""
        for block in in_blocks(map(replace_surrogates, texts), BLOCK):
            self.rust.encode_special_tokens = True
            with library_errors("the tokenizer can't encode a text"):
                encoded = self.rust.encode_batch_fast(block, add_special_tokens=False)
            yield from [np.array(one.ids, dtype=np.uint32) for one in encoded]

    def verify_fast_encoder(self, texts: list[str]) -> bool:
        """Check that the fast encoder gives the same ids as tokenizers on these texts. Disable it if it does not."""
        if self.fast is None:
            return False
        same = all(self.encode(text) == self.encode_fast(text).tolist() for text in texts if self.is_fast_for(text))
        if not same:
            self.__dict__["fast"] = None
        return same

    def is_fast_for(self, text: str) -> bool:
        """Return whether the fast encoder reads a text, and gives the same ids."""
        if self.fast is None or not has_only_short_runs(text):
            return False
        return not self.normalizes or unicodedata.is_normalized("NFC", text)

    @cached_property
    def normalizes(self) -> bool:
        """Return whether the tokenizer changes a text before it splits it."""
        return self.rust.normalizer is not None

    def encode_fast(self, text: str) -> np.ndarray:
        """Return the ids of a text for which `is_fast_for` is true, uint32."""
        text = replace_surrogates(text)
        return self.fast.encode_to_numpy(text, allowed_special=self.added_words, disallowed_special=())

    @cached_property
    def may_be_cut(self) -> bool:
        """Return whether a long text has the ids of its pieces."""
        return not (self.added_words and self.strips) and may_be_cut(self.rust, self.added_words)

    @cached_property
    def fast(self):
        """Return the BPE as a tiktoken encoding, or None if tiktoken lacks a feature that tokenizer.json uses."""
        return build_fast_encoder(self.rust, self.added_words, self.strips)

    @cached_property
    def unknown_id(self) -> int | None:
        """Return the id of the token for text that the vocabulary can't express, None if there is none."""
        return self.rust.token_to_id(unknown_token(self.rust) or "")

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """Return how many bytes of text each token stands for, int32 (V,): 0 for special and unknown tokens."""
        sizes = np.zeros(len(self), dtype=np.int32)
        spec = json.loads(self.rust.to_str())
        bytelevel = "ByteLevel" in json.dumps(spec["decoder"])
        prefix = spec["model"].get("continuing_subword_prefix") if spec["model"]["type"] == "WordPiece" else None
        for token, i in self.rust.get_vocab(with_added_tokens=True).items():
            if token in self.specials or i == self.unknown_id:
                continue
            if token in self.added_words:
                sizes[i] = len(token.encode())
            elif bytelevel:  # one letter of a byte-level token is one byte
                sizes[i] = len(token)
            elif re.fullmatch("<0x[0-9A-F]{2}>", token):  # SentencePiece's name for a byte
                sizes[i] = 1
            else:  # in SentencePiece's tokens a space is U+2581
                sizes[i] = len(token.removeprefix(prefix or "").replace("\u2581", " ").encode())
        return sizes

    def save(self, folder: Path, *, token_types: bool = False) -> None:
        """Write tokenizer.json, and the tokenizer_config.json that transformers reads with it.

        token_types  whether the model is told which tokens are of a second text
        """
        folder.mkdir(parents=True, exist_ok=True)
        rust = self.rust if self.unknown is None else set_special(self.rust, self.unknown, True)
        (folder / "tokenizer.json").write_text(rust.to_str(pretty=True), encoding="utf-8")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.eos, **self.roles}
        if self.bos:
            config["bos_token"] = self.bos
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        if token_types:
            config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def unknown_token(rust: Rust) -> str | None:
    """Return the token for text that the vocabulary can't express, None if there is none."""
    if not isinstance(rust.model, models.Unigram):
        return getattr(rust.model, "unk_token", None) or None
    model = json.loads(rust.to_str())["model"]
    return None if model["unk_id"] is None else model["vocab"][model["unk_id"]][0]


def set_special(rust: Rust, name: str, special: bool) -> Rust:
    """Return the tokenizer with an added token that is special, or is not."""
    spec = json.loads(rust.to_str())
    for token in spec["added_tokens"]:
        if token["content"] == name:
            token["special"] = special
    changed = Rust.from_str(json.dumps(spec))
    changed.encode_special_tokens = rust.encode_special_tokens
    return changed


def encode_text(rust: Rust, text: str) -> list[int]:
    """Return the ids of a text without special tokens. Raise ModelError if the tokenizer's own rules fail."""
    rust.encode_special_tokens = True
    with library_errors("the tokenizer can't encode a text"):
        return rust.encode(replace_surrogates(text), add_special_tokens=False).ids


def in_blocks(texts: Iterable[str], number: int) -> Iterator[list[str]]:
    """Yield the texts in lists of a number of them, which end earlier at 4 * PIECE characters."""
    block, size = [], 0
    for text in texts:
        block.append(text)
        size += len(text)
        if len(block) == number or size >= 4 * PIECE:
            yield block
            block, size = [], 0
    if block:
        yield block
