"""Give lm-evaluation-harness a model of llmkit: its interface `LM`, computed by ours."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.model import LM
from torch import nn

from llmkit.generation.answers import write_answers
from llmkit.generation.sampling import Sampling
from llmkit.tasks.encode import encode_pairs, encode_prompt_texts, encode_windows, fit_answers
from llmkit.tasks.likelihood import Score, score_requests
from llmkit.tokenizer.chat_template import render_chat
from llmkit.tokenizer.tokenizer import Tokenizer

MAX_NEW_TOKENS = 256  # of an answer, if the task does not say: the harness's default
UNSCORED = Score(-float("inf"), False)  # of an answer that does not fit the model


class Adapter(LM):
    """Give the harness a model of llmkit."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, chat: bool, progress: Callable):
        super().__init__()
        self.model, self.tokenizer, self.chat, self.progress = model, tokenizer, chat, progress
        self.lost: Counter[str] = Counter()

    @property
    def positions(self) -> int:
        return self.model.config.max_position_embeddings

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.sha256

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.tokenizer.chat_template or ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a chat, whose special tokens have a meaning. Without a new answer, it ends with the last content."""
        text = render_chat(self.tokenizer, chat_history, starts_answer=add_generation_prompt)
        if add_generation_prompt:
            return text
        content = chat_history[-1]["content"].rstrip()
        return text[: text.rindex(content) + len(content)]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Score (context, answer) pairs. Those with the same context are taken for one question."""
        pairs = [one.args for one in requests]
        ids = encode_pairs(set(pairs), self.tokenizer, specials=self.chat)
        fitted = [fit_answers([ids[pair]], self.positions, self.lost) for pair in pairs]
        kept = [i for i, one in enumerate(fitted) if one]
        contexts = {context: i for i, (context, _) in enumerate(pairs) if context}
        owners = [contexts.get(pairs[i][0], i) for i in kept]  # what follows no context shares none
        scores = score_requests(self.model, [fitted[i][0] for i in kept], owners, progress=self.progress)
        found = dict(zip(kept, scores, strict=True))
        return [(one.log_prob, one.greedy) for one in (found.get(i, UNSCORED) for i in range(len(pairs)))]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Score whole texts."""
        windows = [list(encode_windows(one.args[0], self.tokenizer, self.positions)) for one in requests]
        scores = iter(score_requests(self.model, [one for own in windows for one in own], progress=self.progress))
        return [sum(next(scores).log_prob for _ in own) for own in windows]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Write answers; those with the same options together."""
        by_options: dict[str, list[int]] = {}
        for i, one in enumerate(requests):
            by_options.setdefault(json.dumps(one.args[1], sort_keys=True, default=str), []).append(i)
        found: dict[int, str] = {}
        for numbers in by_options.values():
            options = dict(requests[numbers[0]].args[1])
            until = options.get("until") or []
            until = [until] if isinstance(until, str) else until
            most = options.get("max_gen_toks") or options.get("max_new_tokens") or MAX_NEW_TOKENS
            temperature = options.get("temperature") or 0.0
            drawn = options.get("do_sample", temperature > 0) and temperature > 0
            sampling = Sampling(temperature if drawn else 0.0, options.get("top_k"), options.get("top_p") or 1.0)
            texts = [requests[i].args[0] for i in numbers]
            prompts = encode_prompt_texts(texts, self.tokenizer, self.positions, most, self.lost, specials=self.chat)
            answers = write_answers(
                self.model,
                self.tokenizer,
                prompts,
                until=until,
                max_new_tokens=most,
                sampling=sampling,
                progress=self.progress,
            )
            found |= dict(zip(numbers, answers, strict=True))
        return [found[i] for i in range(len(requests))]
