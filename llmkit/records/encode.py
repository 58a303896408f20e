"""Encode fine-tuning records: their tokens, and which of them are targets."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from llmkit.data.rows import encode_tokens
from llmkit.errors import DataError
from llmkit.readers.ngrams import strings_in
from llmkit.readers.tally import BadRecord, Record, Tally
from llmkit.records.layouts import (
    OtherKindError,
    Pair,
    UnknownColumnError,
    UnknownLayoutError,
    read_examples,
    refuse_first,
)
from llmkit.records.preferences import read_preference
from llmkit.tokenizer.answers import render_examples
from llmkit.tokenizer.chat_template import Conversation, Rendered, count_lost_thoughts, encode_rendered
from llmkit.tokenizer.renderer import TemplateLimit
from llmkit.tokenizer.tokenizer import Tokenizer

BATCH, BATCH_BYTES = 64, 2 * 2**20  # records that are rendered together
MAX_LIMITS = 2  # records in a row that exceed a limit of the template: it is at fault, and each costs seconds


class Example(NamedTuple):
    """Hold the tokens of an example, as in `data/rows.py`, a hash of its prompt (see `prompt_hash`), and its texts.

    parts  of a preference: how many of the tokens are the prompt, then the better, then the worse answer; a verdict
           about one answer leaves the other one empty
    """

    tokens: np.ndarray
    prompt: int
    texts: tuple[str, ...] = ()
    parts: tuple[int, int, int] = (0, 0, 0)


@dataclass
class Found:
    """Count what is found in some records, besides bad ones."""

    layouts: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)  # fields without a meaning here
    too_long: Counter[str] = field(default_factory=Counter)  # what became of examples longer than a row
    empty: int = 0  # answers without a text, which are no targets
    divided: int = 0  # conversations of which each answer is an example: the template rewrites earlier turns
    without_target: int = 0  # examples in which nothing is learnt
    thoughts: int = 0  # answers whose thoughts the template leaves out
    contaminated: int = 0  # examples that share an n-gram with evaluation files
    same_answers: int = 0  # pairs of equal answers, of which nothing is learnt
    pairs: int = 0  # of a better and a worse answer
    better_is_longer: int = 0  # of them

    def merge(self, other: "Found") -> None:
        """Add what is found in other records."""
        for name, value in vars(other).items():
            if isinstance(value, Counter):
                getattr(self, name).update(value)
            elif value:
                setattr(self, name, getattr(self, name) + value)

    def counts(self) -> dict[str, Any]:
        """Return the fields as a JSON object, the most frequent layouts and fields first. `from_counts` restores it."""
        return {
            name: dict(sorted(value.items(), key=lambda item: (-item[1], item[0])))
            if isinstance(value, Counter)
            else value
            for name, value in vars(self).items()
        }

    @classmethod
    def from_counts(cls, counts: dict[str, Any]) -> "Found":
        return cls(**{name: Counter(value) if isinstance(value, dict) else value for name, value in counts.items()})


def encode_records(
    records: Iterable[Record],
    at: str,
    tokenizer: Tokenizer,
    template: str,
    tally: Tally,
    found: Found,
    quarantine: Callable[[BadRecord], Any] = lambda bad: None,
    *,
    columns: dict[str, str] | None = None,
    train_on: str = "all",
    date: str | None = None,
    strict: bool = True,
    preferences: bool = False,
) -> Iterator[Example]:
    """Encode the good ones of some records.

    at          the file that they are from
    tally       counts the records, and the bad ones by reason
    found       gets the counts of what else there is
    quarantine  is called with every bad record
    columns     our name of a field -> the file's name; None: the usual names
    train_on    "all" answers of a conversation, or the "last" one
    date        what the template takes for today, as 2026-01-31; None: today
    strict      raise DataError if the first record has no known layout; False: treat it like any other bad record
    preferences  read them as preferences, see `preferences.read_preference`

    Raise DataError if the file holds other records, if the template can't be parsed, or if it exceeds its limits for
    MAX_LIMITS records in a row.
    """
    records, size, limits = iter(records), 1, 0
    options = {"columns": columns or {}, "train_on": train_on, "preferences": preferences}
    while batch := take_batch(records, size):
        read = [read_record(record, **options) for _, record, _ in batch]
        for (line, record, _), one in zip(batch, read, strict=True):
            if strict and isinstance(one, UnknownLayoutError | UnknownColumnError | OtherKindError):
                raise refuse_first(record, f"{at}:{line}", one)
            strict = strict and isinstance(record, BadRecord)
        chats = [e for one in read if isinstance(one, ReadRecord) for e in one.examples if isinstance(e, Conversation)]
        try:
            rendered = iter(render_examples(tokenizer, template, chats, date))
        except DataError as error:  # the template can't be parsed, whatever the record
            error.at = f"{at}:{batch[0][0]}"
            raise
        for (line, _, bytes_read), one in zip(batch, read, strict=True):
            encoded = encode_examples(tokenizer, one, rendered) if isinstance(one, ReadRecord) else one
            limits = limits + 1 if isinstance(encoded, TemplateLimit) else 0
            if limits == MAX_LIMITS:  # each of them takes seconds
                got, fix = f"{limits} such records in a row", "correct the template, or shorten the conversations"
                raise DataError(str(encoded), at=f"{at}:{line}", got=got, fix=fix)
            if isinstance(encoded, list):
                tally.add(bytes_read)
                found.merge(one.found)
                yield from encoded
                continue
            bad = encoded
            if not isinstance(bad, BadRecord):
                bad = BadRecord(at, line, None, str(encoded), bytes_read)
            tally.add(0, bad)
            quarantine(bad)
        size = 1 if limits else min(2 * size, BATCH)


def take_batch(records: Iterator[Record], size: int) -> list[Record]:
    """Return the next records: at most `size`, or fewer if they are large."""
    batch, total = [], 0
    for record in itertools.islice(records, size):
        batch.append(record)
        total += record[2]
        if total > BATCH_BYTES:
            break
    return batch


@dataclass
class ReadRecord:
    """Hold the examples of a good record, and what is found in it.

    verdict  of a preference: whether its answer is good; None for a better and a worse one
    """

    examples: list[Pair | Conversation]
    found: Found
    preferences: bool = False
    verdict: bool | None = None


def read_record(
    record: dict[str, Any] | BadRecord, columns: dict[str, str], train_on: str, preferences: bool
) -> ReadRecord | ValueError | BadRecord:
    """Return a record's examples, or the error that says why it is bad."""
    if isinstance(record, BadRecord):
        return record
    examples, found = [], Found()
    try:
        if preferences:
            layout, examples, verdict = read_preference(record, columns, found.unread)
            found.layouts[layout] += 1
            return ReadRecord(examples, found, True, verdict)
        for layout, one in read_examples(record, columns, found.unread):
            found.layouts[layout] += 1
            examples.append(one)
            if isinstance(one, Conversation):
                found.empty += choose_answers(one, train_on)
    except ValueError as error:
        return error
    return ReadRecord(examples, found)


def choose_answers(one: Conversation, train_on: str) -> int:
    """Choose which answers of a conversation are learnt: none without a text. Return the number of those."""
    empty = 0
    for i, message in enumerate(one.messages):
        if one.learnt[i] and not (message["content"].strip() or message.keys() & {"tool_calls", "reasoning_content"}):
            one.learnt[i], empty = False, empty + 1
    if train_on == "last":
        last = max((i for i, learnt in enumerate(one.learnt) if learnt), default=-1)
        one.learnt[:] = [i == last for i in range(len(one.learnt))]
    return empty


def prompt_hash(one: Pair | Conversation) -> int:
    """Return a 64-bit hash of what is asked: the prompt, or all that others say up to the first answer to a user.

    A conversation without a user has a hash of the whole.
    """
    if isinstance(one, tuple):
        asked: Any = one[0]
    else:
        roles = [message["role"] for message in one.messages]
        user = roles.index("user") if "user" in roles else len(roles)
        stop = roles.index("assistant", user) if "assistant" in roles[user:] else len(roles)
        is_asked = [role != "assistant" or user == len(roles) for role in roles[:stop]]
        asked = [(m["role"], m["content"]) for m in itertools.compress(one.messages, is_asked)]
    return int.from_bytes(hashlib.blake2b(repr(asked).encode("utf-8", "replace"), digest_size=8).digest(), "little")


def encode_examples(
    tokenizer: Tokenizer, record: ReadRecord, rendered: Iterator[list[Rendered] | ValueError]
) -> list[Example] | ValueError:
    """Return the ids and targets of a record's examples; the error of one, if there is any.

    rendered  gives what became of the next conversation
    """
    encoded, error = [], None
    for one in record.examples:
        prompt = prompt_hash(one)
        if isinstance(one, tuple):
            encoded.append(Example(encode_pair(tokenizer, one), prompt, one))
            continue
        texts = next(rendered)
        if isinstance(texts, ValueError):
            error = texts
            continue
        if len(texts) > 1:
            record.found.divided += 1
        else:
            record.found.thoughts += count_lost_thoughts(one, texts[0].text)
        said = tuple(strings_in(one.messages))
        encoded += [Example(encode_tokens(*encode_rendered(tokenizer, text)), prompt, said) for text in texts]
    return error or (join_answers(encoded, record) if record.preferences else encoded)


def join_answers(answers: list[Example], record: ReadRecord) -> list[Example] | ValueError:
    """Return a preference as one example, whose prompt is there once; none if both answers are the same."""
    if len(answers) != (2 if record.verdict is None else 1):
        return ValueError("the chat template makes several examples of a preference")
    ends = [int(np.flatnonzero(one.tokens >= 0)[-1]) + 1 if (one.tokens >= 0).any() else 0 for one in answers]
    if not all(ends):
        return ValueError("an answer has no token")
    first, *other = (one.tokens[:end] for one, end in zip(answers, ends, strict=True))
    shared = int(np.argmax(first >= 0))
    for tokens in other:
        both = min(shared, len(tokens))
        differ = (first[:both] != tokens[:both]) | (tokens[:both] >= 0)
        shared = int(np.argmax(differ)) if differ.any() else both
        if np.array_equal(first, tokens):
            record.found.same_answers += 1
            return []
        record.found.pairs += 1
        record.found.better_is_longer += len(first) > len(tokens)
    lengths = [len(tokens) - shared for tokens in (first, *other)]
    better, worse = lengths if other else (lengths[0], 0) if record.verdict else (0, lengths[0])
    texts = tuple(dict.fromkeys(text for one in answers for text in one.texts))
    tokens = np.concatenate([first, *(tokens[shared:] for tokens in other)])
    return [Example(tokens, answers[0].prompt, texts, (shared, better, worse))]


def encode_pair(tokenizer: Tokenizer, pair: Pair) -> np.ndarray:
    """Return a prompt and its completion as coded tokens. The prompt's ids are those that generation starts from."""
    prompt, completion = tokenizer.encode_prompt(pair[0]), tokenizer.encode_continuation(pair[1])
    learnt = [*completion, tokenizer.eos_id]
    return encode_tokens(prompt + learnt, [False] * len(prompt) + [True] * len(learnt))
