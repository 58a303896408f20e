"""Tokenizers of older models made into what a tokenizer.json says: SentencePiece files, vocab.json with merges.txt."""

import json
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Rust

from llmkit.errors import MachineError, ModelError

SPACE = "\u2581"  # what SentencePiece writes for a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # kinds of pieces in sentencepiece_model.proto
UNIGRAM, BPE = 1, 2  # its kinds of models
LLAMA2C_CONTROL = ("<unk>", "<s>", "</s>")
EXTRA_IDS = 100  # sentinels that T5's tokenizers have beside the pieces of the file


def find_tokenizer_file(folder: Path) -> Path | None:
    """The file of a folder that `read_foreign_tokenizer` takes, where there is no tokenizer.json."""
    names = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "encoder.json")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_foreign_tokenizer(path: Path, beside: dict[str, Any], qwen2: str) -> Rust:
    """A .model of SentencePiece, or a vocab.json with its merges.txt.

    beside  what config.json and tokenizer_config.json in the same folder say
    qwen2   the regex by which Qwen2 cuts text, which its files do not say
    """
    if ".model" not in path.name and path.suffix != ".json":
        raise ModelError(
            "this is no tokenizer", at=path, expected="tokenizer.json, a .model of SentencePiece, or a vocab.json"
        )
    rust = from_sentencepiece(path, beside) if ".model" in path.name else from_gpt2(path, beside, qwen2)
    add_tokens(rust, path, beside)
    return rust


def from_gpt2(vocab: Path, beside: dict[str, Any], qwen2: str) -> Rust:
    """Byte-level BPE as GPT-2 left it: vocab.json (or encoder.json) and merges.txt (or vocab.bpe)."""
    merges = next((path for name in ("merges.txt", "vocab.bpe") if (path := vocab.with_name(name)).is_file()), None)
    if merges is None:
        raise ModelError("a vocabulary without its merges", at=vocab, fix="put merges.txt beside it")
    try:
        tokens = json.loads(vocab.read_text(encoding="utf-8"))
        lines = merges.read_text(encoding="utf-8").splitlines()
        pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        rust = Rust(models.BPE(vocab=tokens, merges=pairs))
    except Exception as error:  # tokenizers raises bare Exception
        raise ModelError(f"the tokenizer can't be read: {error}", at=vocab) from None
    kind = str(beside.get("tokenizer_class", "GPT2Tokenizer")).removesuffix("Fast")
    bytelevel = pre_tokenizers.ByteLevel(add_prefix_space=bool(beside.get("add_prefix_space")), use_regex=True)
    if kind == "Qwen2Tokenizer":
        rust.normalizer = normalizers.NFC()
        cut = pre_tokenizers.Split(Regex(qwen2), "isolated")
        bytelevel = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    elif kind not in ("GPT2Tokenizer", "PreTrainedTokenizer", "TokenizersBackend"):
        raise ModelError(
            "how this tokenizer cuts text is not in its vocabulary",
            at=vocab,
            got=kind,
            fix="save it with transformers, which writes a tokenizer.json",
        )
    rust.pre_tokenizer, rust.decoder = bytelevel, decoders.ByteLevel()
    rust.add_special_tokens([AddedToken(token, special=True) for token in ("<|endoftext|>",) if token in tokens])
    return rust


# ---- SentencePiece --------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """A token of a SentencePiece model: its text, log-probability or rank, and kind."""

    piece: str
    score: float
    type: int


def from_sentencepiece(path: Path, beside: dict[str, Any]) -> Rust:
    """A SentencePiece model, unigram or BPE, with its own normalization (Kudo and Richardson 2018, 1808.06226)."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise MachineError(
            "a SentencePiece file needs the sentencepiece package", at=path, fix="pip install 'llmkit[sentencepiece]'"
        ) from None
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
        spec, normal = proto.trainer_spec, proto.normalizer_spec
        if spec.treat_whitespace_as_suffix or (spec.model_type == UNIGRAM and not spec.split_by_whitespace):
            raise ValueError("it treats spaces in a way that is not built here")
        pieces = [Piece(piece.piece, piece.score, piece.type) for piece in proto.pieces]
        rust = from_pieces(
            pieces,
            spec.model_type,
            unknown=spec.unk_id,
            byte_fallback=spec.byte_fallback,
            charsmap=normal.precompiled_charsmap,
            collapse=normal.remove_extra_whitespaces,
            prefix=normal.add_dummy_prefix,
        )
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # protobuf's own, tokenizers' bare Exception, a panic of its Rust
        raise ModelError(
            f"the SentencePiece model can't be read: {error}",
            at=path,
            fix="save it with transformers, which writes a tokenizer.json",
        ) from None
    begin, end = ((pieces[i].piece, i) if i >= 0 else None for i in (spec.bos_id, spec.eos_id))
    if begin and beside.get("add_bos_token", True):
        rust.post_processor = processors.TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    elif end and begin is None:  # T5: no token begins a text, one ends it
        rust.post_processor = processors.TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    if beside.get("model_type") == "t5" or str(beside.get("tokenizer_class", "")).startswith("T5"):
        number = beside.get("extra_ids", EXTRA_IDS)
        sentinels = [AddedToken(f"<extra_id_{i}>", special=True) for i in reversed(range(number))]
        rust.add_special_tokens(sentinels)
    return rust


def from_pieces(
    pieces: list[Piece], kind: int, *, unknown: int, byte_fallback: bool, charsmap: bytes, collapse: bool, prefix: bool
) -> Rust:
    """What SentencePiece does with such pieces.

    charsmap  its compiled normalization, empty for none
    collapse  spaces at the ends go, and several count as one
    prefix    every text begins with a space
    """
    symbols = sorted((piece.piece for piece in pieces if piece.type == USER_DEFINED), key=len, reverse=True)
    cuts = [pre_tokenizers.Split(Regex("|".join(map(re.escape, symbols))), "isolated")] if symbols else []
    # What is no text (control tokens, bytes) must not be found in a text that spells it out.
    is_text = [piece.type in (NORMAL, USER_DEFINED) for piece in pieces]
    names = [piece.piece for piece, text in zip(pieces, is_text, strict=True) if not text]
    if kind == UNIGRAM:
        least = min((piece.score for piece in pieces if piece.type == NORMAL), default=0.0)
        vocab = [(piece.piece, piece.score if text else least) for piece, text in zip(pieces, is_text, strict=True)]
        rust = Rust(models.Unigram(vocab, unknown, byte_fallback))
        if any(SPACE in symbol for symbol in symbols):
            raise ValueError("it has symbols with spaces of their own")
        cuts += [
            split_inside_names(names, dict(vocab)),
            pre_tokenizers.Split(SPACE, "merged_with_next"),
        ]  # no piece goes over a word's end
    elif kind == BPE:
        ids = {piece.piece: i for i, piece in enumerate(pieces)}
        bpe = {"unk_token": pieces[unknown].piece, "fuse_unk": True, "byte_fallback": byte_fallback}
        # With symbols of its own the text is cut at them, and they are what they are without any merges.
        rust = Rust(models.BPE(vocab=ids, merges=infer_merges(pieces), ignore_merges=bool(symbols), **bpe))
        cuts += [split_inside_names(names, ids)] if symbols else []
    else:
        raise ValueError("it is neither a unigram nor a BPE model")
    if cuts:
        rust.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    steps: list = [normalizers.NFC(), normalizers.Precompiled(charsmap)] if charsmap else []
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if collapse:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if prefix:
        steps.append(normalizers.Prepend(SPACE))
        back.append(decoders.Strip(content=" ", left=1, right=0))
    rust.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    rust.decoder = decoders.Sequence(back)
    control = [piece.piece for piece in pieces if piece.type in (CONTROL, UNKNOWN)]
    rust.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return rust


def prevent_special_token_injection(rust: Rust) -> Rust:
    """The same tokenizer, in which a text that spells out a control token stays text; for other texts nothing changes.

    transformers' own tokenizers never look for one there, since they take it for the token itself; so most files of
    unigram models give control tokens the best score of all, and other kinds of models may know them as words.
    """
    rust.encode_special_tokens = True
    own = rust.get_vocab(with_added_tokens=False)
    controls = {token.content: i for i, token in rust.get_added_tokens_decoder().items() if token.special}
    found = any(
        i in rust.encode(text, add_special_tokens=False).ids
        for name, i in controls.items()
        if name != getattr(rust.model, "unk_token", None)
        for text in (name, f"a {name}", f"a{name}a")
    )
    always = isinstance(rust.model, models.Unigram) or getattr(rust.model, "ignore_merges", False)
    names = [name for name in controls if name in own]
    if not names or not (found or always):
        return rust
    cut, steps = split_inside_names(names, own), [rust.pre_tokenizer] if rust.pre_tokenizer else []
    if not steps or cut.__getstate__() not in steps[0].__getstate__():  # else it was saved so
        rust.pre_tokenizer = pre_tokenizers.Sequence([*steps, cut])
    return rust


def split_inside_names(names: Iterable[str], vocab: Iterable[Any]) -> pre_tokenizers.PreTokenizer:
    """A cut inside each name where a text spells it out, so that no token is the whole of it.

    The place is one over which no other token reaches, if there is one: its letters then make what they always make.
    Unknown letters that stand together are one token, so a place between two of them is the last choice.
    """
    names = [name for name in names if len(name) > 1]
    tokens = set(vocab) - set(names)
    reached = {token[i : i + 2] for token in tokens for i in range(len(token) - 1)}
    found = []
    for name in names:
        known = [letter in tokens for letter in name]
        worth = lambda i, name=name, known=known: (name[i - 1 : i + 1] in reached, known[i - 1] == known[i])  # noqa: E731
        place = min(range(1, len(name)), key=worth)
        found.append(f"{re.escape(name[:place])}(?={re.escape(name[place:])})")
    return pre_tokenizers.Split(Regex("|".join(found)), "merged_with_previous")


def from_llama2c(path: Path, size: int) -> Rust:
    """The tokenizer.bin of llama2.c: a SentencePiece BPE without what does not concern it.

    A file is the longest token's bytes (int32), then for each of `size` tokens its score (float32), its bytes (int32)
    and those; a space is written as such, and the first three tokens are unknown, begin and end.
    """
    raw, at, pieces = path.read_bytes(), 4, []
    try:
        for i in range(size):
            score, length = struct.unpack_from("<fi", raw, at)
            text = raw[at + 8 : at + 8 + length].decode("utf-8")
            at += 8 + length
            if i < len(LLAMA2C_CONTROL):
                pieces.append(Piece(LLAMA2C_CONTROL[i], score, CONTROL if i else UNKNOWN))
            else:
                kind = BYTE if re.fullmatch("<0x[0-9A-F]{2}>", text) else NORMAL
                pieces.append(Piece(text.replace(" ", SPACE), score, kind))
        if at != len(raw):
            raise ValueError(f"{len(raw) - at} bytes are left over after {size} tokens")
    except (struct.error, ValueError) as error:
        raise ModelError(f"the tokenizer does not fit the model: {error}", at=path, expected=f"{size} tokens") from None
    rust = from_pieces(pieces, BPE, unknown=0, byte_fallback=True, charsmap=b"", collapse=False, prefix=True)
    begin = (pieces[1].piece, 1)
    rust.post_processor = processors.TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    return rust


def infer_merges(pieces: Iterable[Piece]) -> list[tuple[str, str]]:
    """The merges that a BPE model's scores stand for: every way to make a piece of two, the best scores first."""
    scores = {piece.piece: (i, piece.score) for i, piece in enumerate(pieces) if piece.type in (NORMAL, USER_DEFINED)}
    found = []
    for piece, (_, score) in scores.items():
        cuts = ((piece[:place], piece[place:]) for place in range(1, len(piece)))
        halves = [cut for cut in cuts if cut[0] in scores and cut[1] in scores]
        halves.sort(key=lambda cut: (scores[cut[0]][0], scores[cut[1]][0]))
        found += [(-score, cut) for cut in halves]
    found.sort(key=lambda one: one[0])
    return [cut for _, cut in found]


# ---- what stands beside ---------------------------------------------------------------------------------------------


def add_tokens(rust: Rust, path: Path, beside: dict[str, Any]) -> None:
    """Tokens that were added later: added_tokens_decoder of tokenizer_config.json, or added_tokens.json."""
    added = {int(i): token for i, token in (beside.get("added_tokens_decoder") or {}).items()}
    file = path.with_name("added_tokens.json")
    if file.is_file():
        named = json.loads(file.read_text(encoding="utf-8"))
        added |= {i: {"content": token, "special": True} for token, i in named.items() if i not in added}
    known = rust.get_vocab(with_added_tokens=True)
    for i, token in sorted(added.items()):
        if token["content"] in known and known[token["content"]] != i:
            raise ModelError(
                "an added token has another id in the vocabulary",
                at=path,
                got=f"{token['content']}: {i}",
                expected=known[token["content"]],
            )
        keys = ("single_word", "lstrip", "rstrip", "normalized", "special")
        made = AddedToken(token["content"], **{key: token[key] for key in keys if key in token})
        (rust.add_special_tokens if token.get("special") else rust.add_tokens)([made])
        if rust.token_to_id(token["content"]) != i:
            raise ModelError(
                "an added token does not follow the vocabulary",
                at=path,
                got=f"{token['content']}: {i}",
                expected=rust.token_to_id(token["content"]),
            )
