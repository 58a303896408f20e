"""Convert older tokenizer files to `tokenizers` objects: SentencePiece files, vocab.json with merges.txt, llama2.c."""

import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Rust

from llmkit.errors import MachineError, ModelError
from llmkit.files import read_json

SPACE = "\u2581"  # SentencePiece's symbol for a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # piece types in sentencepiece_model.proto
UNIGRAM, BPE = 1, 2  # model types in sentencepiece_model.proto
LLAMA2C_CONTROL = ("<unk>", "<s>", "</s>")
SAVE_WITH_TRANSFORMERS = "save it with transformers, which writes a tokenizer.json"
EXTRA_IDS = 100  # sentinels that T5's tokenizers add to the pieces in the file


def find_tokenizer_file(folder: Path) -> Path | None:
    """Return the first file in a folder that `read_foreign_tokenizer` can read, or None."""
    names = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "encoder.json")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_foreign_tokenizer(path: Path, configs: dict[str, Any], qwen2: str) -> Rust:
    """Read a SentencePiece .model, or a vocab.json with its merges.txt.

    configs  merged contents of the config files in the same folder
    qwen2    the split regex of Qwen2, which its files do not contain
    """
    if ".model" not in path.name and path.suffix != ".json":
        expected = "tokenizer.json, a SentencePiece .model, or a vocab.json"
        raise ModelError("this is not a tokenizer", at=path, expected=expected)
    rust = from_sentencepiece(path, configs) if ".model" in path.name else from_gpt2(path, configs, qwen2)
    add_listed_tokens(rust, path, configs)
    return rust


def from_gpt2(vocab: Path, configs: dict[str, Any], qwen2: str) -> Rust:
    """Read GPT-2's byte-level BPE: vocab.json (or encoder.json) and merges.txt (or vocab.bpe)."""
    merges = next((path for name in ("merges.txt", "vocab.bpe") if (path := vocab.with_name(name)).is_file()), None)
    if merges is None:
        raise ModelError("the vocabulary has no merges file", at=vocab, fix="put merges.txt into its folder")
    try:
        tokens = read_json(vocab)
        lines = merges.read_text(encoding="utf-8").splitlines()
        pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        rust = Rust(models.BPE(vocab=tokens, merges=pairs))
    except Exception as error:  # tokenizers raises bare Exception
        raise ModelError(f"the tokenizer can't be read: {error}", at=vocab) from None
    kind = str(configs.get("tokenizer_class", "GPT2Tokenizer")).removesuffix("Fast")
    bytelevel = pre_tokenizers.ByteLevel(add_prefix_space=bool(configs.get("add_prefix_space")), use_regex=True)
    if kind == "Qwen2Tokenizer":
        rust.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(qwen2), "isolated")
        bytelevel = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    elif kind not in ("GPT2Tokenizer", "PreTrainedTokenizer", "TokenizersBackend"):
        what = "the files do not say how this tokenizer splits text"
        raise ModelError(what, at=vocab, got=kind, fix=SAVE_WITH_TRANSFORMERS)
    rust.pre_tokenizer, rust.decoder = bytelevel, decoders.ByteLevel()
    rust.add_special_tokens([AddedToken(token, special=True) for token in ("<|endoftext|>",) if token in tokens])
    return rust


# ---- SentencePiece --------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """A piece of a SentencePiece model: its text, its log-probability or rank, and its type."""

    piece: str
    score: float
    type: int


def from_sentencepiece(path: Path, configs: dict[str, Any]) -> Rust:
    """Read a SentencePiece model, unigram or BPE, with its normalization (Kudo and Richardson 2018, 1808.06226)."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        fix = "pip install 'llmkit[sentencepiece]'"
        raise MachineError("a SentencePiece file needs the sentencepiece package", at=path, fix=fix) from None
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
        spec, normal = proto.trainer_spec, proto.normalizer_spec
        if spec.treat_whitespace_as_suffix or (spec.model_type == UNIGRAM and not spec.split_by_whitespace):
            raise ValueError("its treatment of spaces is not supported")
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
    except BaseException as error:  # protobuf's errors, tokenizers' bare Exception, a Rust panic
        what = f"the SentencePiece model can't be read: {error}"
        raise ModelError(what, at=path, fix=SAVE_WITH_TRANSFORMERS) from None
    begin, end = ((pieces[i].piece, i) if i >= 0 else None for i in (spec.bos_id, spec.eos_id))
    if begin and configs.get("add_bos_token", True):
        rust.post_processor = processors.TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    elif end and begin is None:  # T5
        rust.post_processor = processors.TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    if configs.get("model_type") == "t5" or str(configs.get("tokenizer_class", "")).startswith("T5"):
        numbers = reversed(range(configs.get("extra_ids", EXTRA_IDS)))
        rust.add_special_tokens([AddedToken(f"<extra_id_{i}>", special=True) for i in numbers])
    return rust


def from_pieces(
    pieces: list[Piece], kind: int, *, unknown: int, byte_fallback: bool, charsmap: bytes, collapse: bool, prefix: bool
) -> Rust:
    """Build the tokenizer of SentencePiece pieces.

    charsmap  compiled normalization, empty for none
    collapse  remove spaces at both ends and merge repeated ones
    prefix    put a space before every text
    """
    symbols = sorted((piece.piece for piece in pieces if piece.type == USER_DEFINED), key=len, reverse=True)
    splits = [pre_tokenizers.Split(Regex("|".join(map(re.escape, symbols))), "isolated")] if symbols else []
    # Text that spells out a control token or a byte piece must not become that token.
    is_text = [piece.type in (NORMAL, USER_DEFINED) for piece in pieces]
    names = [piece.piece for piece, text in zip(pieces, is_text, strict=True) if not text]
    if kind == UNIGRAM:
        least = min((piece.score for piece in pieces if piece.type == NORMAL), default=0.0)
        vocab = [(piece.piece, piece.score if text else least) for piece, text in zip(pieces, is_text, strict=True)]
        rust = Rust(models.Unigram(vocab, unknown, byte_fallback))
        if any(SPACE in symbol for symbol in symbols):
            raise ValueError("it has user-defined symbols that contain spaces")
        # No piece may cross a word boundary.
        splits += [split_inside_names(names, dict(vocab)), pre_tokenizers.Split(SPACE, "merged_with_next")]
    elif kind == BPE:
        ids = {piece.piece: i for i, piece in enumerate(pieces)}
        bpe = {"unk_token": pieces[unknown].piece, "fuse_unk": True, "byte_fallback": byte_fallback}
        # The text is split at user-defined symbols, which are tokens without merges.
        rust = Rust(models.BPE(vocab=ids, merges=infer_merges(pieces), ignore_merges=bool(symbols), **bpe))
        splits += [split_inside_names(names, ids)] if symbols else []
    else:
        raise ValueError("it is neither a unigram nor a BPE model")
    if splits:
        rust.pre_tokenizer = pre_tokenizers.Sequence(splits)
    steps: list = [normalizers.NFC(), normalizers.Precompiled(charsmap)] if charsmap else []
    decoding = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if collapse:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if prefix:
        steps.append(normalizers.Prepend(SPACE))
        decoding.append(decoders.Strip(content=" ", left=1, right=0))
    rust.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    rust.decoder = decoders.Sequence(decoding)
    control = [piece.piece for piece in pieces if piece.type in (CONTROL, UNKNOWN)]
    rust.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return rust


def prevent_special_token_injection(rust: Rust) -> Rust:
    """Change a tokenizer so that special tokens spelt out in a text are encoded as text. Other texts keep their ids.

    encode_special_tokens alone is not enough if the model itself has special tokens in its vocabulary. Most unigram
    files even give them the best score, since transformers matches special tokens before the model runs.
    """
    rust.encode_special_tokens = True
    vocab = rust.get_vocab(with_added_tokens=False)
    specials = {token.content: i for i, token in rust.get_added_tokens_decoder().items() if token.special}
    found = any(
        i in rust.encode(text, add_special_tokens=False).ids
        for name, i in specials.items()
        if name != getattr(rust.model, "unk_token", None)
        for text in (name, f"a {name}", f"a{name}a")
    )
    always = isinstance(rust.model, models.Unigram) or getattr(rust.model, "ignore_merges", False)
    names = [name for name in specials if name in vocab]
    if not names or not (found or always):
        return rust
    split, steps = split_inside_names(names, vocab), [rust.pre_tokenizer] if rust.pre_tokenizer else []
    if not steps or split.__getstate__() not in steps[0].__getstate__():  # saved files already contain the split
        rust.pre_tokenizer = pre_tokenizers.Sequence([*steps, split])
    return rust


def split_inside_names(names: Iterable[str], vocab: Iterable[Any]) -> pre_tokenizers.PreTokenizer:
    """Return a pre-tokenizer that splits each name in a text in two, so that it never becomes one token.

    If possible, the split is at a place that no other token spans, so that the characters get their usual ids. A model
    fuses adjacent unknown characters to one token, so a place between two of them is avoided.
    """
    names = [name for name in names if len(name) > 1]
    tokens = set(vocab) - set(names)
    spanned = {token[i : i + 2] for token in tokens for i in range(len(token) - 1)}
    found = []
    for name in names:
        known = [character in tokens for character in name]
        costs = [(name[i - 1 : i + 1] in spanned, known[i - 1] == known[i]) for i in range(1, len(name))]
        place = costs.index(min(costs)) + 1
        found.append(f"{re.escape(name[:place])}(?={re.escape(name[place:])})")
    return pre_tokenizers.Split(Regex("|".join(found)), "merged_with_previous")


def from_llama2c(path: Path, size: int) -> Rust:
    """Read the tokenizer.bin of llama2.c: the pieces of a SentencePiece BPE.

    A file holds the length of the longest token (int32), then for each of `size` tokens its score (float32), its length
    in bytes (int32) and its bytes. Spaces are plain spaces. The first three tokens are unknown, begin and end.
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
    """Return all pairs of pieces that form another piece, best score first: the merges of a SentencePiece BPE."""
    scores = {piece.piece: (i, piece.score) for i, piece in enumerate(pieces) if piece.type in (NORMAL, USER_DEFINED)}
    merges = []
    for piece, (_, score) in scores.items():
        pairs = ((piece[:place], piece[place:]) for place in range(1, len(piece)))
        halves = [pair for pair in pairs if pair[0] in scores and pair[1] in scores]
        halves.sort(key=lambda pair: (scores[pair[0]][0], scores[pair[1]][0]))
        merges += [(-score, pair) for pair in halves]
    merges.sort(key=lambda merge: merge[0])
    return [pair for _, pair in merges]


# ---- added tokens ---------------------------------------------------------------------------------------------------

TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token


def add_listed_tokens(rust: Rust, path: Path, configs: dict[str, Any]) -> None:
    """Add the tokens that added_tokens_decoder of tokenizer_config.json or added_tokens.json list."""
    added = {int(i): token for i, token in (configs.get("added_tokens_decoder") or {}).items()}
    file = path.with_name("added_tokens.json")
    if file.is_file():
        named = read_json(file)
        added |= {i: {"content": token, "special": True} for token, i in named.items() if i not in added}
    known = rust.get_vocab(with_added_tokens=True)
    for i, token in sorted(added.items()):
        if token["content"] in known and known[token["content"]] != i:
            got, expected = f"{token['content']}: {i}", known[token["content"]]
            raise ModelError("an added token has another id in the vocabulary", at=path, got=got, expected=expected)
        added_token = AddedToken(token["content"], **{key: token[key] for key in TOKEN_FLAGS if key in token})
        (rust.add_special_tokens if token.get("special") else rust.add_tokens)([added_token])
        if rust.token_to_id(token["content"]) != i:
            got, expected = f"{token['content']}: {i}", rust.token_to_id(token["content"])
            raise ModelError("an added token does not follow the vocabulary", at=path, got=got, expected=expected)
