"""Training tokenizers: byte-level BPE and Unigram, WordPiece, characters; and new tokens for an existing BPE."""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Rust

from llmkit.config.defaults import PATTERN, VOCAB_SIZE
from llmkit.errors import DataError, UserError, did_you_mean
from llmkit.tokenizer.foreign import prevent_special_token_injection
from llmkit.tokenizer.tokenizer import CHAT_END, CHAT_START, EOS, PATTERNS, Tokenizer

SPECIALS = (EOS, CHAT_START, CHAT_END)  # the chat markers are reserved, so that fine-tuning need not grow the model
PAD = {"pad_token": EOS}  # for transformers; it ends no turn of a chat
BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # in the order of Devlin et al.'s vocabularies
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]  # SentencePiece's names for what no other token stands for
# Private code points, which stand in for the tokens of a BPE that is extended; the two planes' last are no characters.
PRIVATE, MOST_LETTERS = 0xF0000, 65_534 + 2 + 65_534

NORMALIZERS: dict[str, Callable] = {
    "lowercase": normalizers.Lowercase,
    "nfc": normalizers.NFC,
    "nfd": normalizers.NFD,
    "nfkc": normalizers.NFKC,
    "strip_accents": lambda: normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
}


def train_tokenizer(
    texts: Iterable[str],
    kind: str = "bpe",
    *,
    vocab_size: int = VOCAB_SIZE,
    pattern: str = PATTERN,
    normalize: Sequence[str] = (),
    special_tokens: Sequence[str] = (),
) -> Tokenizer:
    """A tokenizer of one of KINDS, trained on texts.

    vocab_size      counts everything: special tokens, 256 bytes, and what is learnt
    pattern         a name of PATTERNS or a regex, for bpe and unigram
    normalize       names of NORMALIZERS, in order; whatever they change is lost to the model

    bpe and char give the same for the same texts; unigram and wordpiece may differ in a few tokens, since tokenizers
    counts in an order of its own every time.

    >>> made = train_tokenizer(["a cat and a cat"] * 9, vocab_size=270)
    >>> made.decode(made.encode("a cat"))
    'a cat'
    """
    for what, name, known in [("kind", kind, TRAINERS), *(("normalizer", name, NORMALIZERS) for name in normalize)]:
        if name not in known:
            fix = did_you_mean(name, known) or f"one of: {', '.join(known)}"
            raise UserError(f"the tokenizer's {what} is unknown", got=name, fix=fix)
    if plain_ones := [token for token in special_tokens if len(token) < 2 or token.isalnum()]:
        raise UserError("a special token must not be a word or a letter of texts", got=plain_ones[0], expected="<so>")
    if kind in ("wordpiece", "char") and pattern != "gpt2":
        raise UserError(f"a pattern means nothing to {kind}", got=pattern, fix="leave it out")
    steps = [NORMALIZERS[name]() for name in normalize]
    made = TRAINERS[kind](
        without_special_tokens(texts, [*SPECIALS, *special_tokens]), vocab_size, pattern, steps, special_tokens
    )
    if len(made) > vocab_size:
        raise UserError(
            "vocab_size is too small for what every text needs",
            got=vocab_size,
            expected=f"at least {len(made)}",
            fix="raise vocab_size",
        )
    return made


def without_special_tokens(texts: Iterable[str], specials: Sequence[str]) -> Iterator[str]:
    """Texts without control tokens that are spelt out in them: no merge must ever make one."""
    for text in texts:
        for token in specials:
            if token in text:
                text = text.replace(token, " ")
        yield text


def train_bytes(
    model: models.Model,
    trainer: type[trainers.Trainer],
    texts: Iterator[str],
    vocab_size: int,
    pattern: str,
    steps: list,
    specials: Sequence[str],
) -> Rust:
    """A model trained under the pre-tokenizer of GPT-2 and its heirs: no text is unknown, and none is changed."""
    rust = Rust(model)
    if steps:
        rust.normalizer = normalizers.Sequence(steps)
    bytelevel = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern == "gpt2")
    if pattern != "gpt2":
        try:
            cut = pre_tokenizers.Split(Regex(PATTERNS.get(pattern, pattern)), "isolated")
        except Exception as error:  # tokenizers raises bare Exception
            reason = str(error).partition("\n")[0]
            raise UserError(f"data.tokenizer.pattern is no regex: {reason}", got=pattern) from None
        bytelevel = pre_tokenizers.Sequence([cut, bytelevel])
    rust.pre_tokenizer, rust.decoder = bytelevel, decoders.ByteLevel()
    alphabet, first = pre_tokenizers.ByteLevel.alphabet(), [*SPECIALS, *specials]
    options = {"vocab_size": vocab_size, "special_tokens": first, "initial_alphabet": alphabet, "show_progress": False}
    rust.train_from_iterator(texts, trainer(**options))
    return rust


def train_bpe(texts: Iterator[str], vocab_size: int, pattern: str, steps: list, specials: Sequence[str]) -> Tokenizer:
    """Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) of bytes, as GPT-2's."""
    rust = train_bytes(models.BPE(), trainers.BpeTrainer, texts, vocab_size, pattern, steps, specials)
    return Tokenizer(rust, rust.token_to_id(EOS), named=PAD)


def train_unigram(
    texts: Iterator[str], vocab_size: int, pattern: str, steps: list, specials: Sequence[str]
) -> Tokenizer:
    """The unigram language model (Kudo 2018, arXiv:1804.10959), over bytes, so that nothing is unknown."""
    rust = train_bytes(models.Unigram(), trainers.UnigramTrainer, texts, vocab_size, pattern, steps, specials)
    rust = Rust.from_str(rust.to_str())  # the scores as a file will have them, to the last bit
    return Tokenizer(prevent_special_token_injection(rust), rust.token_to_id(EOS), named=PAD)


def train_wordpiece(
    texts: Iterator[str], vocab_size: int, pattern: str, steps: list, specials: Sequence[str]
) -> Tokenizer:
    """BERT's WordPiece (Devlin et al. 2018, arXiv:1810.04805): words and ##parts; white space is lost."""
    rust = Rust(models.WordPiece(unk_token="[UNK]"))
    bert = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    rust.normalizer = normalizers.Sequence([bert, *steps])
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*BERT_SPECIALS, *specials],
        show_progress=False,
        limit_alphabet=vocab_size // 3,  # each letter counts twice, alone and as a part
    )
    rust.train_from_iterator(texts, trainer)
    ends = [(token, rust.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    rust.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return Tokenizer(rust, rust.token_to_id("[SEP]"))


def train_char(texts: Iterator[str], vocab_size: int, pattern: str, steps: list, specials: Sequence[str]) -> Tokenizer:
    """The characters of the texts, the frequent ones if there are too many; any other is its bytes."""
    normalizer = normalizers.Sequence(steps)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normalizer.normalize_str(text) if steps else text)
    first = [*SPECIALS, *specials, *BYTES]
    most = sorted(counts, key=lambda char: (-counts[char], char))[: max(0, vocab_size - len(first))]
    vocab = {token: i for i, token in enumerate([*first, *sorted(most)])}
    rust = Rust(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    rust.add_special_tokens([AddedToken(token, special=True) for token in (*SPECIALS, *specials)])
    if steps:
        rust.normalizer = normalizer
    rust.pre_tokenizer = pre_tokenizers.Split(Regex("[^\n]*\n|[^\n]+"), "isolated")  # a line is as good as any piece
    rust.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return Tokenizer(rust, vocab[EOS], named=PAD)


TRAINERS: dict[str, Callable[..., Tokenizer]] = {
    "bpe": train_bpe,
    "unigram": train_unigram,
    "wordpiece": train_wordpiece,
    "char": train_char,
}


def extend_bpe(base: Tokenizer, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with more tokens, learnt from texts it compresses badly: another language, a trade's words.

    The merging goes on where it stopped: each base token counts as one letter, and new merges come after the old.
    Old ids keep their meaning, so a model only needs new rows in its embedding; what was encoded before decodes the
    same.

    vocab_size  of the result, everything counted
    """
    spec = json.loads(base.rust.to_str())
    new = vocab_size - len(base)
    if spec["model"]["type"] != "BPE" or "ByteLevel" not in json.dumps([spec["pre_tokenizer"], spec["decoder"]]):
        raise UserError("only a byte-level BPE can be extended", got=f"a {spec['model']['type']} of another kind")
    if new < 1:
        raise UserError(
            "the vocabulary is that large already", got=f"{len(base)} tokens", expected=f"vocab_size over {len(base)}"
        )
    names = {i: token for token, i in spec["model"]["vocab"].items()}
    words: Counter[tuple[int, ...]] = Counter()
    for text in without_special_tokens(texts, list(base.specials)):
        text = base.rust.normalizer.normalize_str(text) if base.rust.normalizer else text
        pieces = Counter(piece for piece, _ in base.rust.pre_tokenizer.pre_tokenize_str(text))
        for piece, number in pieces.items():
            words[tuple(token.id for token in base.rust.model.tokenize(piece))] += number
    seen = sorted({i for word in words for i in word})
    if len(seen) > MOST_LETTERS:
        raise UserError("the texts use too many of the tokenizer's tokens to learn from", got=f"{len(seen)} of them")
    letters = {i: chr(PRIVATE + place) for place, i in enumerate(seen)}
    further = Rust(models.BPE())
    further.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=len(seen) + new, show_progress=False, min_frequency=2)
    spelt = ("".join(letters[i] for i in word) for word in words)
    repeated = itertools.chain.from_iterable(
        itertools.repeat(word, number) for word, number in zip(spelt, words.values(), strict=True)
    )
    further.train_from_iterator(repeated, trainer)
    merges = json.loads(further.to_str())["model"]["merges"]
    if not merges:
        raise DataError("there is nothing to learn in these texts: no two tokens stand together twice")
    named = {letter: names[i] for i, letter in letters.items()}
    vocab, last = spec["model"]["vocab"], len(base)
    for left, right in merges:
        left, right = ("".join(named[letter] for letter in side) for side in (left, right))
        if left + right not in vocab:
            vocab[left + right] = last
            last += 1
        spec["model"]["merges"].append([left, right])
    return Tokenizer(Rust.from_str(json.dumps(spec)), base.eos_id, base.bos, base.chat_template, base.ends, base.named)
