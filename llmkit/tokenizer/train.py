"""Train tokenizers: byte-level BPE, byte-level Unigram, WordPiece and characters. Add tokens to an existing BPE."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Rust

from llmkit.config.defaults import PATTERN, VOCAB_SIZE
from llmkit.errors import DataError, UserError, did_you_mean
from llmkit.screen import replace_surrogates
from llmkit.tokenizer.fast import LINES, PATTERNS, has_only_short_runs
from llmkit.tokenizer.foreign import prevent_special_token_injection
from llmkit.tokenizer.guard import hide_panics, library_errors
from llmkit.tokenizer.tokenizer import CHAT_END, CHAT_START, EOS, Tokenizer

Say = Callable[[str], None]

SPECIALS = (EOS, CHAT_START, CHAT_END)  # with chat markers, so that fine-tuning need not resize the embeddings
PAD = {"pad_token": EOS}  # for transformers; it never ends a turn of a chat
BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # in the order of BERT's own vocabularies
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]  # SentencePiece's names of the tokens for single bytes
LONGEST_WORD = 1000  # letters of a word that training sees whole; in the byte-level kinds a letter is a byte
UTF8_BYTES = 4  # of a character, at most
RUNS = re.compile(r"[^\W_]+|(?:[^\w\s]|_)+|\s+")  # of letters and digits, of other signs, of spaces
# `extend_bpe` maps tokens to the private-use planes 15 and 16. The last two code points of a plane are noncharacters.
PRIVATE_USE_START, MAX_MAPPED_TOKENS = 0xF0000, 65_534 + 2 + 65_534

NORMALIZERS: dict[str, Callable] = {
    "lowercase": normalizers.Lowercase,
    "nfc": normalizers.NFC,
    "nfd": normalizers.NFD,
    "nfkc": normalizers.NFKC,
    "strip_accents": lambda: normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
}


@dataclass(frozen=True)
class Options:
    """What a tokenizer is trained with; `train_tokenizer` says what the fields mean."""

    vocab_size: int
    pattern: str
    steps: list[normalizers.Normalizer]
    specials: Sequence[str]
    say: Say


def train_tokenizer(
    texts: Iterable[str],
    kind: str = "bpe",
    *,
    vocab_size: int = VOCAB_SIZE,
    pattern: str = PATTERN,
    normalize: Sequence[str] = (),
    special_tokens: Sequence[str] = (),
    say: Say = lambda line: None,
) -> Tokenizer:
    """Train a tokenizer of one of the kinds in TRAINERS. Raise DataError if there is no text to learn from.

    vocab_size      counts all tokens: special tokens, 256 bytes and learned tokens
    pattern         a name in PATTERNS or a regex, for bpe and unigram
    normalize       names in NORMALIZERS, applied in order to every text; lossy
    special_tokens  tokens in addition to the built-in ones
    say             gets a line if words were too long to learn from; see `train_on_words`

    bpe and char are deterministic. unigram and wordpiece may differ in a few tokens between runs, because the
    tokenizers library counts in a random order.

    >>> tokenizer = train_tokenizer(["a cat and a cat"] * 9, vocab_size=270)
    >>> tokenizer.decode(tokenizer.encode("a cat"))
    'a cat'
    """
    for what, name, known in [("kind", kind, TRAINERS), *(("normalizer", name, NORMALIZERS) for name in normalize)]:
        if name not in known:
            fix = did_you_mean(name, known) or f"one of: {', '.join(known)}"
            raise UserError(f"the tokenizer's {what} is unknown", got=name, fix=fix)
    if word_like := [token for token in special_tokens if len(token) < 2 or token.isalnum()]:
        what = "a special token must not be a word or a single character"
        raise UserError(what, got=word_like[0], expected="a token such as <so>")
    if kind in ("wordpiece", "char") and pattern != "gpt2":
        raise UserError(f"{kind} takes no pattern", got=pattern, fix="leave it out")
    options = Options(vocab_size, pattern, [NORMALIZERS[name]() for name in normalize], special_tokens, say)
    texts = remove_special_tokens(texts, [*SPECIALS, *special_tokens])
    first = next((text for text in texts if text and not text.isspace()), None)
    if first is None:
        raise DataError("there is no text to train a tokenizer on")
    with hide_panics(), library_errors("the tokenizer can't be trained", UserError):
        tokenizer = TRAINERS[kind](itertools.chain([first], texts), options)
    check_vocab_size(vocab_size, len(tokenizer))
    return tokenizer


def check_vocab_size(vocab_size: int, least: int) -> None:
    """Raise UserError if a vocabulary has no room for the special tokens and the alphabet."""
    if vocab_size < least:
        what, expected = "vocab_size is too small for the special tokens and the alphabet", f"at least {least}"
        raise UserError(what, got=vocab_size, expected=expected, fix="raise vocab_size")


def remove_special_tokens(texts: Iterable[str], specials: Sequence[str]) -> Iterator[str]:
    """Replace special tokens that are spelt out in texts by spaces, so that no merge ever produces one.

    Replace lone surrogates too: the tokenizers library takes none.
    """
    for text in map(replace_surrogates, texts):
        for token in specials:
            if token in text:
                text = text.replace(token, " ")
        yield text


def train_byte_level(
    model: models.Model, trainer: type[trainers.Trainer], texts: Iterable[str], options: Options
) -> Rust:
    """Train a model on bytes, as GPT-2 does, so that it encodes every text without loss."""
    alphabet, special_tokens = pre_tokenizers.ByteLevel.alphabet(), [*SPECIALS, *options.specials]
    check_vocab_size(options.vocab_size, len(alphabet) + len(special_tokens))
    rust, pattern = Rust(model), options.pattern
    if options.steps:
        rust.normalizer = normalizers.Sequence(options.steps)
    bytelevel = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern == "gpt2")
    if pattern != "gpt2":
        with library_errors("data.tokenizer.pattern is not a valid regex", UserError, got=pattern):
            split = pre_tokenizers.Split(Regex(PATTERNS.get(pattern, pattern)), "isolated")
        bytelevel = pre_tokenizers.Sequence([split, bytelevel])
    rust.pre_tokenizer, rust.decoder = bytelevel, decoders.ByteLevel()
    kept = {"special_tokens": special_tokens, "initial_alphabet": alphabet, "show_progress": False}
    learner = trainer(vocab_size=options.vocab_size, **kept)
    train_on_words(rust, texts, learner, options.say, splits_at_signs=pattern in PATTERNS)
    return rust


def train_on_words(
    rust: Rust, texts: Iterable[str], trainer: trainers.Trainer, say: Say, *, splits_at_signs: bool = True
) -> None:
    """Train on the words that the pre-tokenizer finds, and cut those over LONGEST_WORD letters into such parts.

    Training time grows with the square of a word's length, and a file without spaces is one word. Texts have no such
    words, so their tokens stay the same. The tokenizer does not cut words when it encodes.

    say              gets a line if words were cut
    splits_at_signs  a word is letters and digits, signs or spaces, which shows at once that most texts have no long one
    """
    whole, normalizer, cut = rust.pre_tokenizer, rust.normalizer, 0  # read now: training locks `rust`

    def counted() -> Iterator[str]:
        nonlocal cut
        for text in texts:
            if may_have_long_word(text) if splits_at_signs else len(text) > LONGEST_WORD // UTF8_BYTES:
                normal = normalizer.normalize_str(text) if normalizer else text
                cut += sum(len(word) > LONGEST_WORD for word, _ in whole.pre_tokenize_str(normal))
            yield text

    parts = pre_tokenizers.Split(Regex(f".{{{LONGEST_WORD}}}"), "isolated")
    rust.pre_tokenizer = pre_tokenizers.Sequence([whole, parts])
    rust.train_from_iterator(counted(), trainer)
    rust.pre_tokenizer = whole
    if cut:
        say(f"the tokenizer learned from parts of {cut:,} words that are longer than {LONGEST_WORD:,} letters")


def may_have_long_word(text: str) -> bool:
    """Return whether a run of letters and digits, of signs or of spaces can have over LONGEST_WORD bytes."""
    longest = LONGEST_WORD // UTF8_BYTES
    return not has_only_short_runs(text, longest) and any(len(run) > longest for run in RUNS.findall(text))


def train_bpe(texts: Iterable[str], options: Options) -> Tokenizer:
    """Train byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) on bytes, as in GPT-2."""
    rust = train_byte_level(models.BPE(), trainers.BpeTrainer, texts, options)
    return Tokenizer(rust, rust.token_to_id(EOS), role_tokens=PAD)


def train_unigram(texts: Iterable[str], options: Options) -> Tokenizer:
    """Train the unigram language model (Kudo 2018, arXiv:1804.10959) on bytes, so that no text is unknown."""
    rust = train_byte_level(models.Unigram(), trainers.UnigramTrainer, texts, options)
    rust = Rust.from_str(rust.to_str())  # rounds the scores like saving to a file
    return Tokenizer(prevent_special_token_injection(rust), rust.token_to_id(EOS), role_tokens=PAD)


def train_wordpiece(texts: Iterable[str], options: Options) -> Tokenizer:
    """Train BERT's WordPiece (Devlin et al. 2018, arXiv:1810.04805): words and ##parts. White space is lost."""
    rust = Rust(models.WordPiece(unk_token="[UNK]"))
    bert = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    rust.normalizer = normalizers.Sequence([bert, *options.steps])
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=options.vocab_size,
        special_tokens=[*BERT_SPECIALS, *options.specials],
        show_progress=False,
        limit_alphabet=options.vocab_size // 3,  # each letter takes two tokens: at the start and inside a word
    )
    train_on_words(rust, texts, trainer, options.say)
    markers = [(token, rust.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
    rust.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair=pair, special_tokens=markers)
    return Tokenizer(rust, rust.token_to_id("[SEP]"))


def train_char(texts: Iterable[str], options: Options) -> Tokenizer:
    """Make a token for each of the most frequent characters. Other characters are encoded as bytes."""
    normalizer = normalizers.Sequence(options.steps)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normalizer.normalize_str(text) if options.steps else text)
    fixed = [*SPECIALS, *options.specials, *BYTES]
    frequent = sorted(counts, key=lambda char: (-counts[char], char))[: max(0, options.vocab_size - len(fixed))]
    vocab = {token: i for i, token in enumerate([*fixed, *sorted(frequent)])}
    rust = Rust(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    rust.add_special_tokens([AddedToken(token, special=True) for token in (*SPECIALS, *options.specials)])
    if options.steps:
        rust.normalizer = normalizer
    rust.pre_tokenizer = pre_tokenizers.Split(Regex(LINES), "isolated")  # without merges, any split works
    rust.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return Tokenizer(rust, vocab[EOS], role_tokens=PAD)


TRAINERS: dict[str, Callable[[Iterable[str], Options], Tokenizer]] = {
    "bpe": train_bpe,
    "unigram": train_unigram,
    "wordpiece": train_wordpiece,
    "char": train_char,
}


@hide_panics()
@library_errors("the tokenizer can't be extended")
def extend_bpe(base: Tokenizer, texts: Iterable[str], vocab_size: int, *, say: Say = lambda line: None) -> Tokenizer:
    """Extend a byte-level BPE with tokens learned from texts that it compresses badly, e.g. in another language.

    Training continues from the base: each of its tokens counts as one letter, and new merges come after the old ones.
    Old ids keep their meaning, so a model only needs new rows in its embedding.

    vocab_size  size of the result, counting all tokens
    say         gets a line if words were too long to learn from; see `train_on_words`
    """
    spec = json.loads(base.rust.to_str())
    added = vocab_size - len(base)
    if spec["model"]["type"] != "BPE" or "ByteLevel" not in json.dumps([spec["pre_tokenizer"], spec["decoder"]]):
        raise UserError("only a byte-level BPE can be extended", got=f"{spec['model']['type']} of another kind")
    if added < 1:
        what, expected = "the vocabulary already has that size", f"a vocab_size above {len(base)}"
        raise UserError(what, got=f"{len(base)} tokens", expected=expected)
    names = {i: token for token, i in spec["model"]["vocab"].items()}
    words: Counter[tuple[int, ...]] = Counter()
    for text in remove_special_tokens(texts, list(base.specials)):
        text = base.rust.normalizer.normalize_str(text) if base.rust.normalizer else text
        pieces = Counter(piece for piece, _ in base.rust.pre_tokenizer.pre_tokenize_str(text))
        for piece, number in pieces.items():
            words[tuple(token.id for token in base.rust.model.tokenize(piece))] += number
    seen = sorted({i for word in words for i in word})
    if len(seen) > MAX_MAPPED_TOKENS:
        what, most = "the texts use too many different tokens of the base", f"at most {MAX_MAPPED_TOKENS}"
        raise UserError(what, got=len(seen), expected=most)
    letters = {i: chr(PRIVATE_USE_START + place) for place, i in enumerate(seen)}
    learner = Rust(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=len(seen) + added, show_progress=False, min_frequency=2)
    spelled = ("".join(letters[i] for i in word) for word in words)
    repeated = itertools.chain.from_iterable(
        itertools.repeat(word, number) for word, number in zip(spelled, words.values(), strict=True)
    )
    train_on_words(learner, repeated, trainer, say)
    merges = json.loads(learner.to_str())["model"]["merges"]
    if not merges:
        raise DataError("there is nothing to learn from these texts: no pair of tokens occurs twice")
    base_tokens = {letter: names[i] for i, letter in letters.items()}
    vocab, next_id = spec["model"]["vocab"], len(base)
    for left, right in merges:
        left, right = ("".join(base_tokens[letter] for letter in side) for side in (left, right))
        if left + right not in vocab:
            vocab[left + right] = next_id
            next_id += 1
        spec["model"]["merges"].append([left, right])
    return replace(base, rust=Rust.from_str(json.dumps(spec)))
