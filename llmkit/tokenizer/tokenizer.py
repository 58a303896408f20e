"""A tokenizer.json of any kind: load it, encode fast, decode. Text never becomes a control token by itself."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Rust

from llmkit.errors import ModelError, UserError
from llmkit.tokenizer.foreign import find_tokenizer_file, prevent_special_token_injection, read_foreign_tokenizer

EOS, CHAT_START, CHAT_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
EOS_NAMES = (EOS, "</s>", "<|end_of_text|>", "<eos>", "<|eot_id|>", CHAT_END, "[SEP]")  # of other people's tokenizers
BOS_NAMES = ("<s>", "<bos>")
ROLES = {  # what transformers asks a tokenizer for, and what it is called where no file names it
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "mask_token": ("[MASK]", "<mask>"),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
}
# How GPT-2 cuts text before merging; tokenizers knows it as ByteLevel(use_regex=True).
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_AFTER = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {  # how text is cut before merging; each matches all of any text
    "gpt2": GPT2_PATTERN,
    "llama3": rf"{_WORDS}|\p{{N}}{{1,3}}|{_AFTER}",  # GPT-4's too, up to spaces at the end; numbers in threes
    "qwen2": rf"{_WORDS}|\p{{N}}|{_AFTER}",  # digits one by one
}
CHECKED = 1000  # texts on which the fast encoder must agree before it is trusted
BLOCK = 256  # documents that are encoded together
LONGEST_RUN = 20_000  # letters or spaces in a row: tiktoken overflows its stack on megabytes, and is slow before


@dataclass
class Tokenizer:
    """A tokenizer.json with what training needs to know of it."""

    rust: Rust
    eos_id: int
    bos: str | None = None  # the token that begins a text, where the tokenizer has one
    chat_template: str | None = None
    ends: list[int] = field(default_factory=list)  # further tokens that end an answer, as generation_config.json says
    named: dict[str, str] = field(default_factory=dict)  # some of ROLES, as the files beside it name them

    def __len__(self) -> int:
        """How many ids there may be: one more than the highest, for some vocabularies have holes."""
        return self.size

    @cached_property
    def size(self) -> int:
        return max(self.rust.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def specials(self) -> dict[str, int]:
        """Control tokens and their ids."""
        return {token.content: i for i, token in self.rust.get_added_tokens_decoder().items() if token.special}

    @property
    def roles(self) -> dict[str, str]:
        """The control tokens of ROLES that there are."""
        usual = {role: next((name for name in names if name in self.specials), None) for role, names in ROLES.items()}
        return {role: token for role, token in (usual | self.named).items() if token}

    @cached_property
    def sha256(self) -> str:
        """A checksum of all that ids depend on: the tokenizer.json that `save` writes, and which token ends a text."""
        return hashlib.sha256(f"{self.eos_id} {self.bos} {self.rust.to_str()}".encode()).hexdigest()

    @cached_property
    def prefix(self) -> list[int]:
        """What the tokenizer's own post-processor puts before a text: Llama's <s>, nothing for GPT-2."""
        with_specials = self.rust.encode("a", add_special_tokens=True).ids
        plain = self.rust.encode("a", add_special_tokens=False).ids
        starts = [i for i in range(len(with_specials)) if with_specials[i : i + len(plain)] == plain]
        return with_specials[: starts[0]] if starts else []

    @property
    def eos(self) -> str:
        return self.rust.id_to_token(self.eos_id)

    @property
    def bos_id(self) -> int | None:
        return self.rust.token_to_id(self.bos) if self.bos else None

    @property
    def end_of_turn_id(self) -> int:
        """The token that ends a turn in ChatML, else the end of text."""
        return self.specials.get(CHAT_END, self.eos_id)

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: the end of text, what ends a turn where there is a chat template, and `ends`."""
        turn = [self.end_of_turn_id] if self.chat_template else []
        return list(dict.fromkeys([self.eos_id, *turn, *self.ends]))

    def set_extra_stop_ids(self, beside: dict) -> None:
        """Take up the `ends` that the files beside a model name: an id or several."""
        ends = beside.get("eos_token_id")
        self.ends = [i for i in (ends if isinstance(ends, list) else [ends]) if i in self.specials.values()]

    def add_specials(self, tokens: list[str]) -> None:
        """More control tokens, at the end of the vocabulary."""
        self.rust.add_special_tokens([token for token in tokens if token not in self.specials])
        for known in ("specials", "size", "sha256", "prefix", "inside", "fast", "token_bytes"):
            self.__dict__.pop(known, None)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: a control token spelt out in it stays text."""
        self.rust.encode_special_tokens = True
        return self.rust.encode(text, add_special_tokens=False).ids

    @cached_property
    def inside(self) -> Rust:
        """The tokenizer for text that follows other text: some put a space before what begins one, and only there."""
        spec = json.loads(self.rust.to_str())
        first = [step for step in flatten_steps(spec["pre_tokenizer"] or {}) if step.get("prepend_scheme") == "first"]
        for step in first:
            step["prepend_scheme"] = "never"
        return Rust.from_str(json.dumps(spec)) if first else self.rust

    def encode_inside(self, text: str) -> list[int]:
        """`encode` of a text that follows a control token."""
        self.inside.encode_special_tokens = True
        return self.inside.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text that a model is to go on with: `prefix` and the text, or the end token where both are empty."""
        return self.prefix + self.encode(text) or [self.eos_id]

    def encode_source(self, text: str) -> list[int]:
        """Ids of a text for an encoder whose decoder answers it: `prefix`, the text and the end token."""
        return [*self.prefix, *self.encode(text), self.eos_id]

    def encode_documents(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """Ids of whole documents, each from `prefix` to the end token; memory holds a block of them."""
        texts = iter(texts)
        before, after = np.array(self.prefix, dtype=np.uint32), np.array([self.eos_id], dtype=np.uint32)
        while block := list(itertools.islice(texts, BLOCK)):
            yield from (np.concatenate((before, ids, after)) for ids in self.encode_batch(block))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, control tokens spelt out."""
        return self.rust.decode(list(ids), skip_special_tokens=False)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of many texts, uint32, by tiktoken where it was found to agree: 4-5 times as fast."""
        if self.fast is not None:
            fits = [has_breaks(text) for text in texts]
            slow = iter(self.encode_slowly([text for text, fit in zip(texts, fits, strict=True) if not fit]))
            quick = (
                self.fast.encode_ordinary(text) if fit else next(slow) for text, fit in zip(texts, fits, strict=True)
            )
            return [np.array(ids, dtype=np.uint32) for ids in quick]
        return [np.array(ids, dtype=np.uint32) for ids in self.encode_slowly(texts)]

    def encode_slowly(self, texts: list[str]) -> list[list[int]]:
        """Ids by tokenizers itself."""
        self.rust.encode_special_tokens = True
        return [one.ids for one in self.rust.encode_batch_fast(texts, add_special_tokens=False)] if texts else []

    def agrees(self, texts: list[str]) -> bool:
        """Whether the fast encoder gives tokenizers' ids on these texts; where it does not, it is given up."""
        if self.fast is None:
            return False
        same = all(self.encode(text) == self.fast.encode_ordinary(text) for text in texts if has_breaks(text))
        if not same:
            self.__dict__["fast"] = None
        return same

    @cached_property
    def fast(self):
        """The same BPE as a tiktoken encoding, or None where tokenizer.json asks for more than tiktoken can do."""
        import tiktoken

        spec = json.loads(self.rust.to_str())
        pattern = split_pattern(spec["pre_tokenizer"] or {})
        plain = spec["normalizer"] is None and spec["model"]["type"] == "BPE" and not spec["model"].get("byte_fallback")
        mere_text = any(not token.special for token in self.rust.get_added_tokens_decoder().values())
        if not plain or mere_text or pattern not in PATTERNS.values():  # tiktoken passes over what a pattern misses
            return None
        letters = {letter: byte for byte, letter in enumerate(byte_letters())}
        plain_tokens = {token: i for token, i in spec["model"]["vocab"].items() if token not in self.specials}
        if not set().union(*plain_tokens) <= set(letters):
            return None
        ranks = {bytes(letters[c] for c in token): i for token, i in plain_tokens.items()}
        return tiktoken.Encoding("llmkit", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.specials)

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """Bytes of text that each token stands for, int32 (V,); 0 for control tokens."""
        sizes = np.zeros(len(self), dtype=np.int32)
        spec = json.loads(self.rust.to_str())
        bytelevel = "ByteLevel" in json.dumps(spec["decoder"])
        parts = spec["model"].get("continuing_subword_prefix") if spec["model"]["type"] == "WordPiece" else None
        for token, i in self.rust.get_vocab(with_added_tokens=True).items():
            if token in self.specials:
                continue
            if bytelevel:  # one letter of a byte-level token is one byte
                sizes[i] = len(token)
            elif re.fullmatch("<0x[0-9A-F]{2}>", token):  # SentencePiece's name for a byte
                sizes[i] = 1
            else:  # in SentencePiece's tokens a space is U+2581
                sizes[i] = len(token.removeprefix(parts or "").replace("\u2581", " ").encode())
        return sizes

    def save(self, folder: Path) -> None:
        """tokenizer.json and the tokenizer_config.json that transformers looks for beside it."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self.rust.to_str(pretty=True), encoding="utf-8")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.eos, **self.roles}
        if self.bos:
            config["bos_token"] = self.bos
        if self.chat_template:
            config["chat_template"] = self.chat_template
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def flatten_steps(spec: dict) -> Iterator[dict]:
    """The steps of a tokenizer.json's pre-tokenizer, sequences within sequences flattened."""
    for step in spec.get("pretokenizers", [spec]):
        yield from flatten_steps(step) if "pretokenizers" in step else [step]


def split_pattern(spec: dict) -> str | None:
    """The regex by which a byte-level pre-tokenizer of a tokenizer.json cuts text, or None where it does more."""
    steps = spec.get("pretokenizers", [spec])
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    if len(steps) == 1:
        return GPT2_PATTERN if last["use_regex"] else None
    cut, cuts = steps[0], steps[0].get("type") == "Split" and steps[0]["behavior"] == "Isolated"
    simple = len(steps) == 2 and not last["use_regex"] and cuts and not cut["invert"]
    return cut["pattern"].get("Regex") if simple else None


def has_breaks(text: str) -> bool:
    """Whether no run of letters, nor of spaces, is very long. Counts spaces as if all stood in one place."""
    if len(text) < LONGEST_RUN:
        return True
    words = [len(word) for word in text.split()]
    return max(words, default=0) < LONGEST_RUN and len(text) - sum(words) - len(words) < LONGEST_RUN


def byte_letters() -> list[str]:
    """GPT-2's printable letter for each of the 256 bytes: itself where printable, else the next free one from U+0100.

    >>> byte_letters()[ord("a")], byte_letters()[ord(" ")]
    ('a', '\\u0120')
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def fetch_tokenizer(name: str) -> Tokenizer:
    """A path as `load_tokenizer` takes it, or a hub id, which is downloaded."""
    if Path(name).exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
        return load_tokenizer(Path(name).expanduser())
    try:
        rust = prevent_special_token_injection(Rust.from_pretrained(name))
    except Exception as error:  # tokenizers raises bare Exception
        reason = str(error).partition("\n")[0][:200]
        raise ModelError(
            "neither a file nor a tokenizer on the hub", at=name, got=reason, fix="name a tokenizer.json"
        ) from None
    eos_id = next((i for name in EOS_NAMES if (i := rust.token_to_id(name)) is not None), 0)
    return Tokenizer(rust, eos_id)


def read_tokenizer_configs(path: Path) -> dict:
    """What the JSON files beside a tokenizer say of it."""
    beside: dict = {}
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):  # the latter wins
        file = path.with_name(name)
        if file.is_file():
            try:
                says = json.loads(file.read_text(encoding="utf-8"))
                if not isinstance(says, dict):
                    raise ValueError("not an object")
                beside |= says
            except (ValueError, RecursionError) as error:
                raise ModelError(f"{name} can't be read: {error}", at=file) from None
    return beside


def load_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json, a SentencePiece .model or a vocab.json with merges.txt, or a folder that holds one of them.

    The end token and the chat template come from the files beside it.
    """
    if path.is_dir():
        path = path / "tokenizer.json" if (path / "tokenizer.json").is_file() else find_tokenizer_file(path) or path
    if not path.is_file():
        raise ModelError("there is no tokenizer", at=path, fix="name a tokenizer.json, or a folder with one")
    beside = read_tokenizer_configs(path)
    try:
        is_json = path.suffix == ".json" and path.name not in ("vocab.json", "encoder.json")
        rust = Rust.from_file(str(path)) if is_json else read_foreign_tokenizer(path, beside, PATTERNS["qwen2"])
    except UserError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise ModelError(f"the tokenizer can't be read: {error}", at=path) from None
    rust.no_truncation()  # some files carry the settings of whoever saved them, and would cut every text
    rust.no_padding()
    rust = prevent_special_token_injection(rust) if is_json else rust
    says = {role: beside.get(role) for role in ("eos_token", "bos_token", *ROLES)}
    says = {role: token.get("content") if isinstance(token, dict) else token for role, token in says.items()}
    known = rust.get_vocab(with_added_tokens=True)
    named = {role: token for role, token in says.items() if isinstance(token, str) and token in known}
    candidates = [rust.token_to_id(name) for name in (named.pop("eos_token", None), *EOS_NAMES) if name]
    eos_id = next((i for i in candidates if i is not None), None)
    if eos_id is None:
        raise ModelError(
            "the tokenizer has no end-of-text token",
            at=path,
            expected=" or ".join(EOS_NAMES),
            fix="name it as eos_token in tokenizer_config.json beside it",
        )
    template = beside.get("chat_template")
    beside_template = path.with_name("chat_template.jinja")
    if template is None and beside_template.is_file():
        template = beside_template.read_text(encoding="utf-8")
    begins = BOS_NAMES if ".model" in path.name else ()  # what such a file calls it, nothing else says
    usual = next((name for name in begins if rust.token_to_id(name) is not None), None)
    bos = named.pop("bos_token", usual)
    made = Tokenizer(rust, eos_id, bos, template if isinstance(template, str) else None, named=named)
    made.set_extra_stop_ids(beside)
    return made
