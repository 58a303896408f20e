"""Run tasks of lm-evaluation-harness by their names: its prompts, filters and metrics, and our model."""

import hashlib
import importlib.util
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

from torch import nn

from llmkit.errors import DataError, MachineError, UserError, did_you_mean, is_out_of_memory
from llmkit.intervals import Z
from llmkit.tasks.run import Result
from llmkit.tokenizer.tokenizer import Tokenizer


@dataclass
class HarnessTask:
    """Hold the name of a task of the harness, and how it is asked."""

    name: str
    shots: int | None
    limit: int | None
    chat: bool
    about: dict[str, Any]

    def run(self, model: nn.Module, tokenizer: Tokenizer, progress: Callable[[Iterable], Iterable] = iter) -> Result:
        """Ask a model; see `Prepared.run`."""
        import lm_eval

        from llmkit.tasks.adapter import Adapter

        adapter = Adapter(model, tokenizer, self.chat, progress)
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        try:
            with redirect_stdout(StringIO()):
                found = lm_eval.simple_evaluate(
                    adapter,
                    tasks=[self.name],
                    num_fewshot=self.shots,
                    limit=self.limit,
                    apply_chat_template=self.chat,
                    bootstrap_iters=1000,
                )
        except Exception as error:  # a task may bring any code, and need any package
            if is_out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
            fix = "the harness loads its data from the hub; offline, copy the task file and name your files in it"
            raise DataError(f"the task {self.name} of lm-evaluation-harness fails", got=reason, fix=fix) from error
        return self.to_result(found, adapter.lost)

    def to_result(self, found: dict[str, Any], lost: Counter[str]) -> Result:
        """Convert what the harness returns. A group has the scores of the whole, but none of single questions."""
        is_group = self.name not in found["samples"]
        scores = found["groups"][self.name] if is_group else found["results"][self.name]
        samples = [] if is_group else found["samples"][self.name]
        every = [one for own in found["samples"].values() for one in own]
        asked = sorted({one["doc_id"] for one in samples})
        figures, items = {}, {}
        for key, value in scores.items():
            name, comma, filtered = key.partition(",")
            if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            label = name if filtered == "none" else key
            error = scores.get(f"{name}_stderr,{filtered}")
            error = error if isinstance(error, int | float) else math.nan
            figures |= {label: value, f"{label}_stderr": error}
            figures[f"{label}_interval"] = [value - Z * error, value + Z * error]
            own = {one["doc_id"]: one[name] for one in samples if one["filter"] == filtered and name in one}
            if own and own.keys() == set(asked) and all(isinstance(one, int | float) for one in own.values()):
                items[label] = [own[i] for i in asked]
        number = sum(len({one["doc_id"] for one in own}) for own in found["samples"].values())
        prompts = json.dumps(sorted(one["prompt_hash"] for one in every))
        self.about |= {
            "version": found["versions"].get(self.name),
            "shots": found["n-shot"].get(self.name, self.shots),
            "questions": number,
            "prompts_sha256": hashlib.sha256(prompts.encode()).hexdigest(),
        }
        return Result(self.name, figures | {"n": number}, items, asked, +lost)


def harness_task(name: str, known: Sequence[str], *, shots: int | None, limit: int | None, chat: bool) -> HarnessTask:
    """Return a task of the harness. Raise MachineError if it is not installed, UserError if it has no such task.

    known  names of llmkit's own tasks, for a hint
    """
    if importlib.util.find_spec("lm_eval") is None:
        fix = did_you_mean(name, known) or "name a YAML file; for the tasks of lm-evaluation-harness: pip install "
        fix += "'llmkit[tasks]'" if fix.endswith("install ") else ""
        raise MachineError(f"llmkit has no task {name} of its own", expected=", ".join(known), fix=fix)
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    names = [*manager.all_subtasks, *manager.all_groups]
    if name in manager.all_tags:
        fix = "name its tasks: lm_eval ls tasks"
        raise UserError(f"{name} is a collection of tasks without a score of its own", fix=fix)
    if name not in names:
        raise UserError(f"there is no task {name}", fix=did_you_mean(name, [*known, *names]) or "lm_eval ls tasks")
    about = {"task": name, "source": "lm-evaluation-harness", "shots": shots, "limit": limit, "chat": chat}
    return HarnessTask(name, shots, limit, chat, about)
