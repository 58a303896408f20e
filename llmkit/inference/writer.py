"""Load a model with its tokenizer and write text with it, for `generate`, `chat` and `serve`."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from llmkit.errors import DataError, MachineError, ModelError, UserError
from llmkit.generation.generate import compile_decoding, count_new_tokens, decode_until_stop, generate
from llmkit.generation.sampling import Sampling
from llmkit.models.layers import FEW_ROWS
from llmkit.parallel.compile import compile_obstacle
from llmkit.parallel.device import DTYPES, choose_precision
from llmkit.parallel.world import start_world
from llmkit.storage.locate import copy_with_adapter, load_located, locate
from llmkit.tokenizer.chat_template import encode_chat
from llmkit.tokenizer.tokenizer import Tokenizer

# Measured with 110M parameters in bf16 on two cores: compiling takes 8 s (3 s with a warm compiler cache). It then
# saves 6 ms a token, and weights are read at 24e9 bytes/s instead of 13e9.
COMPILE_SECONDS, SECONDS_PER_BYTE, SECONDS_PER_TOKEN = 8.0, 1 / 13e9 - 1 / 24e9, 6e-3


@dataclass
class GeneratedText:
    """Hold a text that is being written. `tokens` and `ended` are final once all pieces were read."""

    pieces: Iterator[str] | None = None
    tokens: list[int] = field(default_factory=list)  # drawn so far
    ended: str = "length"  # "stop": by the end token or a stop string

    def __iter__(self) -> Iterator[str]:
        return self.pieces


@dataclass
class Writer:
    """Hold a model that is ready to write, and its tokenizer."""

    model: nn.Module
    tokenizer: Tokenizer
    compiled: bool

    @property
    def max_length(self) -> int:
        """Return the most tokens that a prompt and its continuation may have, or each of them with an encoder."""
        return self.model.config.max_position_embeddings

    @property
    def is_causal(self) -> bool:
        """Return True if the model continues its prompt, False if an encoder reads the prompt."""
        return self.model.config.kind == "causal"

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a prompt."""
        return self.tokenizer.encode_prompt(text) if self.is_causal else self.tokenizer.encode_source(text)

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        variables: dict[str, Any] | None = None,
    ) -> list[int]:
        """Return the token ids of a conversation in the chat template, up to the start of the assistant's answer."""
        try:
            ids = encode_chat(self.tokenizer, messages, tools, variables)
        except ValueError as error:
            raise DataError(f"the chat template can't express this conversation: {error}") from None
        return ids + ([] if self.is_causal else [self.tokenizer.eos_id])

    def encode_recent(self, messages: list[dict[str, str]], reserve: int) -> tuple[list[int], int]:
        """Encode as many messages as leave room for an answer; return their ids and the number of messages left out.

        The answer gets `reserve` tokens, but at most half of the model's positions. The oldest messages are left out in
        pairs of question and answer. The system message and the last message always stay.
        """
        reserve = min(reserve, self.max_length // 2)
        begin = 1 if messages[0]["role"] == "system" else 0
        for dropped in range(0, len(messages) - begin, 2):
            ids = self.encode_chat([*messages[:begin], *messages[begin + dropped :]])
            if len(ids) + reserve <= self.max_length:
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
        """Return a lazy text for each prompt (token ids), which ends at an end token, a stop string, or the length.

        Reading any text advances all of them in one batch. The model stops when no text is read any more.
        """
        if not all(stop):
            raise UserError("a stop string is empty", fix="leave it out")
        stop_ids = frozenset([*self.tokenizer.stop_ids, *([self.tokenizer.end_of_turn_id] if chat else [])])
        steps = generate(
            self.model,
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop_ids,
            seed=seed,
            compiled=self.compiled,
        )
        limits = count_new_tokens(self.model, prompts, max_new_tokens)
        texts = [GeneratedText() for _ in prompts]
        for row, own_steps in enumerate(itertools.tee(steps, len(prompts))):
            prompt = prompts[row] if self.is_causal else []
            pieces = self._write_row(texts[row], row, own_steps, prompt, limits[row], stop)
            texts[row].pieces = drop_first_space(pieces) if chat else pieces
        return texts

    def _write_row(
        self,
        text: GeneratedText,
        row: int,
        steps: Iterator[list[int | None]],
        prompt: list[int],
        limit: int,
        stop: Sequence[str],
    ) -> Iterator[str]:
        """Yield the pieces of one row's text, and record its tokens and how it ended."""
        is_cut = True

        def record() -> Iterator[int]:
            nonlocal is_cut
            for step in steps:
                if step[row] is None:
                    break
                text.tokens.append(step[row])
                yield step[row]
            is_cut = False

        yield from decode_until_stop(self.tokenizer, prompt, record(), stop)
        text.ended = "stop" if is_cut or len(text.tokens) < limit else "length"


def drop_first_space(pieces: Iterator[str]) -> Iterator[str]:
    """Yield an answer without the space before its first word, which is a part of SentencePiece's word tokens."""
    if first := next(pieces, "").removeprefix(" "):
        yield first
    yield from pieces


def open_writer(
    model: str,
    *,
    precision: str = "auto",
    compile: bool | None = None,
    expected_tokens: int = 2000,
    prompts: int = 1,
    say: Callable[[str], None] = print,
) -> Writer:
    """Load a MODEL to write with, an adapter merged into its base; see `open_writers`."""
    options = {"precision": precision, "compile": compile, "expected_tokens": expected_tokens, "prompts": prompts}
    return open_writers(model, {}, **options, say=say)[""]


def open_writers(
    model: str,
    adapters: dict[str, str],
    *,
    precision: str = "auto",
    compile: bool | None = None,
    expected_tokens: int = 2000,
    prompts: int = 1,
    say: Callable[[str], None] = print,
) -> dict[str, Writer]:
    """Load a MODEL to write with, and adapters that share its weights: name -> writer. "" is the MODEL itself.

    adapters   name -> adapter. Without any, a MODEL that is an adapter is merged into its base
    precision  of the weights
    compile    the decoding; None compiles if that saves time over the expected number of tokens
    prompts    texts that are written side by side: only a few are written by compiled blocks
    """
    device = start_world().device
    precision = choose_precision(precision, device)
    located = locate(model)
    say(located.choice)
    if adapters and located.is_adapter:
        raise ModelError(
            "is an adapter, and adapters need a whole model", at=model, fix=f"name its base: {located.base}"
        )
    loaded, tokenizer = load_located(located, device=device, dtype=DTYPES[precision], merge=True)
    if loaded.config.kind == "masked":
        raise ModelError(f"{loaded.config.model_type} reads in both directions, and writes no text", at=model)
    reason = compile_obstacle(loaded, device, precision)
    if prompts > FEW_ROWS or loaded.config.kind != "causal":
        reason = f"only a decoder's texts, at most {FEW_ROWS} at a time, are written by compiled blocks"
    if compile and reason:
        raise MachineError(f"--compile is not possible here: {reason}")
    if compile is None:
        size = sum(p.numel() * p.element_size() for p in loaded.parameters())
        gain = expected_tokens * (size * SECONDS_PER_BYTE + SECONDS_PER_TOKEN)
        compile = reason is None and device.type == "cpu" and precision == "bf16" and gain > COMPILE_SECONDS
    models = {"": (loaded.eval(), tokenizer)}
    for name, adapter in adapters.items():
        models[name] = copy_with_adapter(loaded, located.folder, locate(adapter))
    if compile:
        say("compiling: the first token takes some seconds")
        for one, _ in models.values():
            compile_decoding(one)
    return {name: Writer(*pair, compile) for name, pair in models.items()}
