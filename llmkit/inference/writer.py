"""A model and its tokenizer made ready to write: what `generate`, `chat` and `serve` share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from llmkit.errors import DataError, MachineError, ModelError, UserError
from llmkit.inference.generate import Sampling, compile_decoding, generate, text_pieces, tokens_left
from llmkit.parallel.compile import compile_obstacle
from llmkit.parallel.device import DTYPES, choose_precision
from llmkit.parallel.world import start_world
from llmkit.storage.locate import load_located, locate
from llmkit.tokenizer.chat_template import encode_chat
from llmkit.tokenizer.tokenizer import Tokenizer

# Compiling took 8 s on two cores (3 s when the compiler's cache knows the shapes), and then a token of a model of B
# bytes takes B / 24e9 s instead of B / 13e9 and 6 ms: what both figures were for 110M parameters in bf16.
COMPILE_SECONDS, SECONDS_PER_BYTE, SECONDS_PER_TOKEN = 8.0, 1 / 13e9 - 1 / 24e9, 6e-3


@dataclass
class GeneratedText:
    """What a model writes, in pieces, as it is written; how it ended is known once all of it was read."""

    pieces: Iterator[str] | None = None
    tokens: list[int] = field(default_factory=list)  # drawn so far
    ended: str = "length"  # "stop": by the end token or a stop string

    def __iter__(self) -> Iterator[str]:
        return self.pieces


@dataclass
class Writer:
    """A model ready to write."""

    model: nn.Module
    tokenizer: Tokenizer
    compiled: bool

    @property
    def longest(self) -> int:
        """Tokens of a prompt and what follows it, or of either with an encoder."""
        return self.model.config.max_position_embeddings

    @property
    def continues(self) -> bool:
        """Whether the model goes on with a prompt, as decoders do; an encoder's decoder answers it."""
        return self.model.config.kind == "causal"

    def encode(self, text: str) -> list[int]:
        """Ids of a text to go on with, or to answer."""
        return self.tokenizer.encode_prompt(text) if self.continues else self.tokenizer.encode_source(text)

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Ids of a conversation through the chat template, ready for the assistant's answer."""
        try:
            ids = encode_chat(self.tokenizer, messages)
        except ValueError as error:
            raise DataError(f"the chat template can't express this conversation: {error}") from None
        return ids + ([] if self.continues else [self.tokenizer.eos_id])

    def encode_recent(self, messages: list[dict[str, str]], room: int) -> tuple[list[int], int]:
        """`encode_chat` of as much as leaves `room` tokens for an answer, or half of all; and how many are left out.

        The system's message and the last one stay; the oldest others go, a question with its answer.
        """
        room = min(room, self.longest // 2)
        begin = 1 if messages[0]["role"] == "system" else 0
        for dropped in range(0, len(messages) - begin, 2):
            ids = self.encode_chat([*messages[:begin], *messages[begin + dropped :]])
            if len(ids) + room <= self.longest:
                break
        return ids, dropped

    def write(
        self,
        prompts: list[list[int]],
        *,
        sampling: Sampling,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        seed: int = 0,
        chat: bool = False,
    ) -> list[GeneratedText]:
        """What follows each prompt (ids), up to the end token, a stop string, or the length.

        All are written side by side, while any of them is read; where no one reads on, none is written further.
        """
        if not all(stop):
            raise UserError("a stop string is empty", fix="leave it out")
        ends = frozenset([*self.tokenizer.stop_ids, *([self.tokenizer.end_of_turn_id] if chat else [])])
        steps = generate(
            self.model,
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=ends,
            seed=seed,
            compiled=self.compiled,
        )
        drawn = [row_of(number, some) for number, some in enumerate(itertools.tee(steps, len(prompts)))]
        texts = [GeneratedText() for _ in prompts]
        rooms = tokens_left(self.model, prompts, max_new_tokens)
        for text, prompt, tokens, room in zip(texts, prompts, drawn, rooms, strict=True):
            text.pieces = self.pieces(text, prompt if self.continues else [], tokens, room, stop)
        return texts

    def pieces(
        self, text: GeneratedText, prompt: list[int], tokens: Iterator[int], room: int, stop: Sequence[str]
    ) -> Iterator[str]:
        """The printable pieces of a text, which notes its tokens and how it ended."""
        cut = True

        def noted() -> Iterator[int]:
            nonlocal cut
            for token in tokens:
                text.tokens.append(token)
                yield token
            cut = False

        yield from text_pieces(self.tokenizer, prompt, noted(), stop)
        text.ended = "stop" if cut or len(text.tokens) < room else "length"


def row_of(number: int, steps: Iterable[list[int | None]]) -> Iterator[int]:
    """The tokens of one row, up to its end."""
    return itertools.takewhile(lambda token: token is not None, (step[number] for step in steps))


def open_writer(
    model: str,
    *,
    precision: str = "auto",
    compile: bool | None = None,
    tokens: int = 2000,
    say: Callable[[str], None] = print,
) -> Writer:
    """Load a MODEL to write with, an adapter merged into its base.

    precision  of the weights
    compile    the decoding; None: when it pays for so many `tokens`
    """
    device = start_world().device
    precision = choose_precision(precision, device)
    loaded, tokenizer = load_located(locate(model), device=device, dtype=DTYPES[precision], merge=True)
    if loaded.config.kind == "masked":
        raise ModelError(f"{loaded.config.model_type} reads in both directions, and writes no text", at=model)
    reason = compile_obstacle(loaded, device, precision)
    if compile and reason:
        raise MachineError(f"--compile can't be done: {reason}")
    if compile is None:
        size = sum(p.numel() * p.element_size() for p in loaded.parameters())
        gain = tokens * (size * SECONDS_PER_BYTE + SECONDS_PER_TOKEN)
        compile = reason is None and device.type == "cpu" and precision == "bf16" and gain > COMPILE_SECONDS
    if compile:
        say("compiling: the first token takes some seconds")
        compile_decoding(loaded)
    return Writer(loaded.eval(), tokenizer, compile)
