"""Turn questions into token ids, as lm-evaluation-harness does."""

from collections import Counter
from collections.abc import Iterator, Sequence

from llmkit.errors import DataError
from llmkit.tasks.likelihood import Request
from llmkit.tasks.prompts import Question
from llmkit.tokenizer.chat_template import Rendered, encode_chat, encode_rendered
from llmkit.tokenizer.tokenizer import Tokenizer

CUT = "prompts that were cut on the left: longer than the model's positions"
EMPTY = "questions left out: an answer is empty"
TOO_LONG = "questions left out: an answer is longer than the model's positions"


def begin_token(tokenizer: Tokenizer) -> int:
    """Return what an answer without a context follows."""
    return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id


def encode_answers(
    questions: Sequence[Question], tokenizer: Tokenizer, positions: int, lost: Counter[str]
) -> list[list[Request] | None]:
    """Return a request for each answer of each question; None for a question with an answer that does not fit.

    positions  of the model
    lost       counts what is cut or left out
    """
    texts = {pair for one in questions if not one.messages for pair in pairs_of(one)}
    ids, found = encode_pairs(texts, tokenizer), []
    for question in questions:
        if question.messages:
            chats = repeat(question.messages, question)
            encoded = [
                (encode_chat(tokenizer, chat), tokenizer.encode_continuation(answer))
                for chat, answer in zip(chats, question.answers, strict=True)
            ]
        else:
            encoded = [ids[pair] for pair in pairs_of(question)]
        found.append(fit_answers(encoded, positions, lost))
    return found


def fit_answers(
    encoded: Sequence[tuple[list[int], list[int]]], positions: int, lost: Counter[str]
) -> list[Request] | None:
    """Return requests of contexts and answers. A prompt that is too long loses its first tokens; None if an answer is
    longer than the model's positions.
    """
    if any(not 0 < len(answer) <= positions for _, answer in encoded):
        lost[TOO_LONG if all(answer for _, answer in encoded) else EMPTY] += 1
        return None
    lost[CUT] += any(len(context) + len(answer) > positions + 1 for context, answer in encoded)
    return [Request((*context, *answer)[-positions - 1 :], len(answer)) for context, answer in encoded]


def encode_sources(
    questions: Sequence[Question], tokenizer: Tokenizer, positions: int, lost: Counter[str]
) -> list[list[Request] | None]:
    """Return a request for each answer, as `encode_answers`, for an encoder that reads the context and a decoder that
    writes the answer: the context has its end token, and each of them all positions.
    """
    found: list[list[Request] | None] = []
    for question in questions:
        encoded = []
        for context, answer in pairs_of(question):
            kept = context.rstrip()
            encoded.append((tokenizer.encode_source(kept), tokenizer.encode(context[len(kept) :] + answer)))
        if any(not 0 < len(answer) <= positions for _, answer in encoded):
            lost[TOO_LONG if all(answer for _, answer in encoded) else EMPTY] += 1
            found.append(None)
            continue
        lost[CUT] += any(len(source) > positions for source, _ in encoded)
        found.append([Request((*source[-positions:], *answer), len(answer)) for source, answer in encoded])
    return found


def repeat(contexts: list, question: Question) -> list:
    """Return the context of each answer."""
    return contexts * (len(question.answers) if len(contexts) == 1 else 1)


def pairs_of(question: Question) -> list[tuple[str, str]]:
    """Return the context and the text of each answer."""
    return list(zip(repeat(question.contexts, question), question.answers, strict=True))


def encode_pairs(
    pairs: set[tuple[str, str]], tokenizer: Tokenizer, *, specials: bool = False
) -> dict[tuple[str, str], tuple[list[int], list[int]]]:
    """Return the ids of each context and of the answer after it.

    They are encoded together, and what is over the context's own ids is the answer. White space at the end of a context
    belongs to the answer.

    specials  whether special tokens in a context have a meaning: it is a rendered chat. The answer is then encoded
              alone
    """
    if specials:
        return {
            pair: (encode_text_of_chat(pair[0], tokenizer), tokenizer.encode_continuation(pair[1])) for pair in pairs
        }
    moved = {}
    for context, answer in pairs:
        kept = context.rstrip()
        moved[context, answer] = (kept, context[len(kept) :] + answer) if context else ("", answer)
    texts = list(dict.fromkeys(text for context, answer in moved.values() for text in (context, context + answer)))
    ids = dict(zip(texts, (one.tolist() for one in tokenizer.encode_batch(texts)), strict=True))
    prefix, begin, found = tokenizer.prefix, begin_token(tokenizer), {}
    for pair, (context, answer) in moved.items():
        before, whole = prefix + ids[context], prefix + ids[context + answer]
        if not pair[0] or not before:
            before = [begin]
            whole = ids[context + answer] if ids[context + answer][:1] == before else before + ids[context + answer]
        found[pair] = before, whole[len(before) :]
    return found


def encode_windows(text: str, tokenizer: Tokenizer, positions: int) -> Iterator[Request]:
    """Yield requests that score each token of a text once, in windows of all positions.

    The first window begins after a begin token. The last one is moved back, so that it is as long as the others.

    >>> [(len(one.tokens), one.scored) for one in encode_windows("abcde", tokenizer, 3)]   # doctest: +SKIP
    [(4, 3), (4, 2)]
    """
    ids = tokenizer.encode(text)
    tokens = [begin_token(tokenizer), *ids]
    for start in range(0, len(ids), positions):
        stop = min(start + positions, len(ids))  # tokens[start + 1 : stop + 1] are scored
        first = max(0, stop - positions)
        yield Request(tuple(tokens[first : stop + 1]), stop - start)


def encode_prompts(
    questions: Sequence[Question], tokenizer: Tokenizer, positions: int, written: int, lost: Counter[str]
) -> list[list[int]]:
    """Return the ids of each prompt after which an answer of so many tokens is written; it loses what has no room."""
    texts = [one.contexts[0] for one in questions]
    if any(one.messages for one in questions):
        chats = [encode_chat(tokenizer, one.messages[0]) for one in questions]
        return [cut_left(ids, positions, written, lost) for ids in chats]
    return encode_prompt_texts(texts, tokenizer, positions, written, lost)


def encode_prompt_texts(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    positions: int,
    written: int,
    lost: Counter[str],
    *,
    specials: bool = False,
) -> list[list[int]]:
    """Return the ids of prompts; see `encode_prompts` and, for `specials`, `encode_pairs`."""
    if specials:
        found = [encode_text_of_chat(text, tokenizer) for text in texts]
    else:
        found = [tokenizer.prefix + ids.tolist() or [tokenizer.eos_id] for ids in tokenizer.encode_batch(list(texts))]
    return [cut_left(ids, positions, written, lost) for ids in found]


def encode_text_of_chat(text: str, tokenizer: Tokenizer) -> list[int]:
    return encode_rendered(tokenizer, Rendered(text, []))[0].tolist()


def cut_left(ids: list[int], positions: int, written: int, lost: Counter[str]) -> list[int]:
    """Return the last ids of a prompt, so that an answer has room."""
    most = positions - written
    if most < 1:
        got, expected = f"max_gen_toks {written}", f"at most {positions - 1}, as the model has {positions} positions"
        raise DataError("there is no room for a prompt", got=got, expected=expected)
    lost[CUT] += len(ids) > most
    return ids[-most:]
