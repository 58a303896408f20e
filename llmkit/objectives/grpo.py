"""Reinforce answers that are better than others to the same prompt: GRPO and its relatives.

Each step writes a group of answers to every prompt with the very weights that it trains, rewards them, and makes those
above their group's average likelier (Shao et al. 2024, DeepSeekMath, arXiv:2402.03300).
"""

import json
import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor, nn

from llmkit.data.trees import rows_of_trees
from llmkit.errors import DataError, UserError
from llmkit.files import write_atomically
from llmkit.generation.answers import write_tokens
from llmkit.generation.sampling import Sampling
from llmkit.models.layers import token_tables
from llmkit.models.loss import linear_cross_entropy
from llmkit.objectives.frozen import reference_of
from llmkit.objectives.objective import Objective, Step
from llmkit.objectives.rewards import Reward, RewardConfig, Written, load_rewards
from llmkit.parallel.device import to_device
from llmkit.parallel.world import World
from llmkit.tokenizer.tokenizer import Tokenizer
from llmkit.types import IGNORE_INDEX, Batch

Loss = Literal["grpo", "dapo", "dr_grpo", "cispo", "gspo"]
BY_TOKENS, BY_ROWS = ("dapo", "cispo"), ("grpo", "gspo")  # what the sum of losses is divided by; dr_grpo: a constant
CLIPS = {  # the papers' epsilons, below and above 1
    "dapo": (0.2, 0.28),
    "grpo": (0.2, 0.2),
    "dr_grpo": (0.2, 0.2),
    "cispo": (0.2, 0.28),
    "gspo": (3e-4, 4e-4),  # of whole answers
}
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)]
ANSWERS_PER_ANSWER = 4  # that are written together for each in a micro-batch: no activations are kept
ROW_TOKENS = 1024  # of a row of answers, up to which a longer row costs next to nothing
EPSILON = 1e-4  # beside the deviation of a group's rewards, as in trl


# ---- the answers ----------------------------------------------------------------------------------------------------


def group_advantages(rewards: np.ndarray, scaled: bool) -> np.ndarray:
    """Return how far rewards (groups, G) are above the average of their group, in its deviations if they are scaled.

    >>> group_advantages(np.array([[1.0, 0.0, 0.0, 1.0]]), scaled=False).tolist()
    [[0.5, -0.5, -0.5, 0.5]]
    """
    apart = rewards - rewards.mean(1, keepdims=True)
    return apart / (rewards.std(1, ddof=1, keepdims=True) + EPSILON) if scaled else apart


def prompt_ids(batch: Batch) -> list[list[int]]:
    """Return the tokens of the prompts of a batch."""
    return [ids[:n].tolist() for ids, n in zip(batch.input_ids, batch.lengths, strict=True)]


def add_rewards(
    rewards: dict[str, tuple[float, Reward]],
    tokenizer: Tokenizer,
    batch: Batch,
    answers: list[list[int]],
    size: int,
    **where: Any,
) -> dict[str, np.ndarray]:
    """Return the rewards (answers,) of `size` answers to each prompt: `reward`, their weighted sum, and reward_NAME.

    where  device and rows, see `Written`
    """
    ids, records = ([one for one in each for _ in range(size)] for each in (prompt_ids(batch), batch.records))
    prompts = [text for text in map(tokenizer.decode, prompt_ids(batch)) for _ in range(size)]
    texts = [tokenizer.decode([i for i in answer if i not in tokenizer.stop_ids]) for answer in answers]
    tokens = [[*prompt, *answer] for prompt, answer in zip(ids, answers, strict=True)]
    written = Written(prompts, texts, records, tokens, **where)
    found = {name: np.array(reward(written)) for name, (_, reward) in rewards.items()}
    total = sum(weight * found[name] for name, (weight, _) in rewards.items())
    return {"reward": total} | {f"reward_{name}": values for name, values in found.items()}


def log_probs(model: nn.Module, batch: dict[str, Tensor], temperature: float = 1.0) -> Tensor:
    """Return the log-probabilities (B, T) of the targets at a temperature, 0 elsewhere.

    Logits are products with the hidden states, which are divided in their place.
    """
    inputs = {name: batch[name] for name in ("input_ids", "positions", "segments", "branches") if name in batch}
    hidden, weight = model.encode(**inputs) / temperature, token_tables(model)[-1].rows()
    return -linear_cross_entropy(hidden, weight, batch["labels"], "none", chunk_loss=model.chunk_loss)


def slices_of_rows(number: int, group_size: int, most: int) -> list[slice]:
    """Return the answers of each row: parts of groups, of at most so many answers.

    >>> slices_of_rows(6, 3, 2)
    [slice(0, 2, None), slice(2, 3, None), slice(3, 5, None), slice(5, 6, None)]
    """
    return [
        slice(at, min(at + most, first + group_size))
        for first in range(0, number, group_size)
        for at in range(first, first + group_size, most)
    ]


def write_batch(
    model: nn.Module,
    batch: Batch,
    step: Step,
    *,
    tokenizer: Tokenizer,
    rewards: dict[str, tuple[float, Reward]],
    loss: Loss,
    group_size: int,
    max_new_tokens: int,
    sampling: Sampling,
    scaled: bool,
    updates: int,
    answers_per_row: int,
) -> tuple[Batch, dict[str, float]]:
    """Return the answers to a batch of prompts as rows to train on, and figures about them.

    With several updates to the same answers, the first one keeps them in a file, and later ones read that.
    """
    first = step.number - step.number % updates
    ranks = f"rank-{step.world.rank}-of-{step.world.size}"
    path = step.folder / f"answers/step-{first:06d}-{ranks}.safetensors" if step.folder else None
    if path and first < step.number:
        return read_answers(path)
    prompts = [prompt for prompt in prompt_ids(batch) for _ in range(group_size)]
    options = {"max_new_tokens": max_new_tokens, "sampling": sampling, "stop": frozenset(tokenizer.stop_ids)}
    rows = step.micro_batch_size * answers_per_row
    answers = write_tokens(model, prompts, seed=step.seed, rows=ANSWERS_PER_ANSWER * rows, **options)
    found = add_rewards(rewards, tokenizer, batch, answers, group_size, device=step.world.device, rows=rows)
    grouped = found["reward"].reshape(-1, group_size)
    lengths, parts = np.array([len(one) for one in answers]), slices_of_rows(len(answers), group_size, answers_per_row)
    rows = rows_of_trees([(prompts[part.start], answers[part]) for part in parts], tokenizer.eos_id)
    each = lengths if loss in BY_TOKENS else np.full(len(answers), 1 if loss in BY_ROWS else max_new_tokens)
    rows.counts = np.array([each[part].sum() for part in parts])
    advantages = group_advantages(grouped, scaled).ravel()
    rows.advantages = np.zeros((len(parts), answers_per_row), np.float32)
    for row, part in zip(rows.advantages, parts, strict=True):
        row[: part.stop - part.start] = advantages[part]
    figures = {name: float(values.mean()) for name, values in found.items()}
    figures |= {
        "reward_deviation": float(grouped.std(1).mean()),
        "equal_groups": float((np.ptp(grouped, axis=1) == 0).mean()),
        "answer_tokens": float(lengths.mean()),
        "ended": float(np.mean([answer[-1] in options["stop"] for answer in answers])),
    }
    if updates > 1:
        rows.old = old_log_probs(model, rows, step, sampling.temperature)
        if path:
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, save(rows.arrays(), {"figures": json.dumps(figures)}))
    return rows, figures


def read_answers(path: Path) -> tuple[Batch, dict[str, float]]:
    """Return the rows and the figures that an earlier step has kept. Raise DataError if they are not there."""
    try:
        with safe_open(path, "np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
            return Batch(**arrays), json.loads(file.metadata()["figures"])
    except (OSError, SafetensorError) as error:
        fix = "go on from an earlier checkpoint, or start over with --fresh"
        raise DataError(f"the answers of an earlier step can't be read: {error}", at=path, fix=fix) from None


@torch.no_grad()
def old_log_probs(model: nn.Module, rows: Batch, step: Step, temperature: float) -> np.ndarray:
    """Return the log-probabilities (B, T) of the targets under the weights that wrote them, before any update."""
    training = model.training
    model.eval()
    parts = [
        log_probs(model, to_device(micro, step.world.device), temperature).float().cpu().numpy()
        for micro in rows.split(step.micro_batch_size)
    ]
    model.train(training)
    return np.concatenate(parts)


# ---- the loss -------------------------------------------------------------------------------------------------------


def sum_of_losses(
    model: nn.Module,
    batch: dict[str, Tensor],
    *,
    loss: Loss,
    epsilon: float,
    epsilon_high: float,
    beta: float,
    temperature: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum of losses of answers, and sums of metrics: over the targets, each as its answer counts.

    batch  rows of one prompt with `answers` to it, whose `advantages` are (B, A)

    ratio        of the probability of a token now and when it was written, of gspo of the answer's tokens on average
    grpo         clipped ratio * advantage (Schulman et al. 2017, PPO, arXiv:1707.06347), averaged over each answer
    dapo         the same, averaged over all tokens (Yu et al. 2025, arXiv:2503.14476)
    dr_grpo      the same, divided by a constant; advantages are not scaled (Liu et al. 2025, arXiv:2503.20783)
    cispo        clipped ratio * advantage * log-probability, no token without a gradient (Chen et al. 2025,
                 MiniMax-M1, arXiv:2506.13585)
    gspo         the clipped ratio of whole answers (Zheng et al. 2025, arXiv:2507.18071)
    """
    ours, number = log_probs(model, batch, temperature), batch["advantages"].shape[1]
    is_target, place = batch["labels"] != IGNORE_INDEX, batch["answers"].clamp(min=0)
    old = batch["old"] if "old" in batch else ours.detach()
    advantages, ratio = batch["advantages"].gather(1, place), ours - old
    lengths = sums_of_answers(is_target.float(), place, number).clamp(min=1)
    if loss == "gspo":  # the gradient goes through the average
        ratio = sums_of_answers(ratio * is_target, place, number) / lengths
    ratio = ratio.exp()
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    if loss == "cispo":
        losses = -ratio.clamp(max=1 + epsilon_high).detach() * advantages * ours
    else:
        losses = -torch.minimum(ratio * advantages, clipped * advantages)
    is_low = (ratio < 1 - epsilon) & (advantages < 0) & (loss != "cispo")
    is_clipped = is_low | ((ratio > 1 + epsilon_high) & (advantages > 0))
    kl = torch.zeros_like(ours)
    if beta:
        kl = k3(ours, reference_log_probs(model, batch, temperature))
        losses = losses + beta * kl * ratio  # whose gradient is then that of the KL (DeepSeek 2025, arXiv:2512.02556)
    per_answer = is_target / lengths if loss in BY_ROWS else is_target.float()
    # Metrics are averages over the tokens of an answer, summed with what the answer counts.
    each = batch["counts"] / (batch["answers"].amax(1) + 1)  # of an answer in the row, if all count alike
    share = per_answer if loss in (*BY_TOKENS, *BY_ROWS) else is_target / lengths * each[:, None]
    metrics = {"clipped": (is_clipped * share).sum(), "entropy_estimate": -(ours.detach() * share).sum()}
    if beta:
        metrics["kl"] = (kl.detach() * share).sum()
    return (losses * per_answer).sum(), metrics


def sums_of_answers(values: Tensor, place: Tensor, number: int) -> Tensor:
    """Return for each token (B, T) the sum over its answer, number `place` of those in its row, of values that are 0
    for all but targets.
    """
    sums = values.new_zeros(len(values), number).scatter_add(1, place, values)
    return sums.gather(1, place)


def k3(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return an estimate of KL(ours || theirs) for each token that ours has drawn (Schulman 2020, "k3")."""
    return (theirs - ours).exp() - (theirs - ours) - 1


@torch.no_grad()
def reference_log_probs(model: nn.Module, batch: dict[str, Tensor], temperature: float) -> Tensor:
    """Return the log-probabilities (B, T) of the targets under the model that training started from."""
    with reference_of(model) as reference:
        return log_probs(reference, batch, temperature)


# ---- evaluation -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    tokenizer: Tokenizer,
    rewards: dict[str, tuple[float, Reward]],
    max_new_tokens: int,
    micro_batch_size: int = 8,
    world: World | None = None,
    token_bytes: None = None,
) -> dict[str, Any]:
    """Reward the likeliest answer to each prompt.

    Returns val_reward, val_loss = -val_reward, the average of each reward, and of the tokens of an answer.
    """
    rows = [np.empty((0, len(rewards) + 2))]
    for batch in batches:
        answers = write_tokens(
            model,
            prompt_ids(batch),
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature=0.0),
            stop=frozenset(tokenizer.stop_ids),
        )
        found = add_rewards(rewards, tokenizer, batch, answers, 1, device=device, rows=micro_batch_size)
        lengths = np.array([len(answer) for answer in answers])
        rows.append(np.stack([*found.values(), lengths], axis=1))
    means = (world.concatenate if world else np.asarray)(np.concatenate(rows))
    names = ["reward", *(f"reward_{name}" for name in rewards), "answer_tokens"]
    figures = dict(zip(names, means.mean(0).tolist(), strict=True)) if len(means) else {"reward": float("nan")}
    named = {f"val_{name}": value for name, value in figures.items()}
    return {"val_loss": -figures["reward"], **named, "val_examples": len(means)}


# ---- objectives: see `ObjectiveType.build` ---------------------------------------------------------------------------


def grpo(
    tokenizer: Tokenizer,
    seed: int,
    start_id: None,
    *,
    reward: str | RewardConfig | list[str | RewardConfig],
    loss: Loss = "dapo",
    group_size: Annotated[int, Field(ge=2, le=4096)] = 8,
    max_new_tokens: Annotated[int, Field(ge=1, le=10**6)] = 128,
    temperature: Positive = 1.0,
    epsilon: Fraction | None = None,
    epsilon_high: Fraction | None = None,
    beta: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0,
    updates: Annotated[int, Field(ge=1, le=1000)] = 1,
    answers_per_row: Annotated[int, Field(ge=1, le=4096)] | None = None,
) -> Objective:
    """Make answers likelier that a reward finds better than others to the same prompt.

    reward          one or several: ready ones (exact, number, regex, format, length) or my_rewards.py:function, by
                    name, or with options: {name: exact, field: answer, weight: 1.0}; or a reward model with the same
                    tokens: {name: model, path: runs/reward}
    loss            see `sum_of_losses`
    group_size      answers to each prompt
    max_new_tokens  of an answer
    temperature     of the probabilities that answers are drawn from, and that the loss is about
    epsilon, epsilon_high  how far the ratio may fall and rise before it is clipped; null: see CLIPS. The ratio of a
                    first update is 1
    beta            weight of the distance from the model that training started from, see `reference_of`
    updates         steps that learn from the same answers
    answers_per_row  answers that share a row of training, so that their prompt is read once; null: as many as fit into
                    twice data.seq_len, or 1024 tokens, and into the model's windows
    """
    rewards = load_rewards(as_configs(reward))
    if not rewards:
        raise UserError("objective.reward names no reward", fix="reward: exact, or my_rewards.py:function")
    if loss == "cispo" and epsilon is not None:
        raise UserError("objective.epsilon has no effect on cispo, which clips from above", fix="delete it")
    low, high = CLIPS[loss]
    clips = {"loss": loss, "epsilon": epsilon or low, "epsilon_high": epsilon_high or high}
    options = {"tokenizer": tokenizer, "rewards": rewards, "max_new_tokens": max_new_tokens}
    prepare = partial(
        write_batch,
        **options,
        loss=loss,
        group_size=group_size,
        sampling=Sampling(temperature=temperature, top_k=None),
        scaled=loss != "dr_grpo",
        updates=updates,
        answers_per_row=answers_per_row or 1,
    )
    return Objective(
        partial(sum_of_losses, **clips, beta=beta, temperature=temperature),
        partial(evaluate, **options),
        prepare=prepare,
        updates=updates,
        scores=("val_reward", *(f"val_reward_{name}" for name in rewards)),
    )


def row_lengths(seq_len: int, *, max_new_tokens: int, answers_per_row: int, **_: Any) -> tuple[int, int]:
    """Return the tokens of a row of training at the most; see `ObjectiveType.lengths`."""
    return seq_len + (answers_per_row - 1) * max_new_tokens, 0


def rows_of_group(*, group_size: int, answers_per_row: int, **_: Any) -> int:
    """Return the rows of training that the answers to a prompt take."""
    return math.ceil(group_size / answers_per_row)


def choose_answers_per_row(seq_len: int, group_size: int, max_new_tokens: int) -> int:
    """Return how many answers share a row if the config leaves it open: rows of a group are alike.

    >>> choose_answers_per_row(1024, 8, 256), choose_answers_per_row(512, 4, 500)
    (4, 2)
    """
    room = max(ROW_TOKENS, 2 * seq_len) - seq_len
    most = min(group_size, 1 + room // max_new_tokens)
    return math.ceil(group_size / math.ceil(group_size / most))


def as_configs(reward: Any) -> list[RewardConfig]:
    """Return the rewards that the option names, which may have been checked and dumped before."""
    given = reward if isinstance(reward, list) else [reward]
    dumped = [{"name": one} if isinstance(one, str) else one for one in given]
    return [one if isinstance(one, RewardConfig) else RewardConfig(**one) for one in dumped]
