"""Fit a run into the memory: choose its micro-batch and recomputed blocks, or name the cheapest change that would."""

import bisect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from llmkit.config.fields import Choice
from llmkit.config.schema import Config
from llmkit.errors import MachineError
from llmkit.models.heads import HeadConfig
from llmkit.objectives import OBJECTIVES
from llmkit.objectives.heads import make_head
from llmkit.peft import METHODS
from llmkit.training.cost import KEPT, Lengths, Plan, make_plan
from llmkit.training.objective import memory_beside

CPU_MICRO_TOKENS, GPU_MICRO_TOKENS = 8192, 65_536  # more tokens in a forward bring no more speed
MEMORY_SHARE = 0.85  # of the memory that what is chosen may plan to fill: the rest is for what the plan gets wrong
RECOMPUTED = ("none", "selective", 0.5, "full")  # values of gradient_checkpointing, from the fastest to the smallest
SHORTEST = 128  # tokens of a row, below which a shorter row is no help worth naming

Options = dict[str, dict[str, Any]]


def plan_run(
    config: Config, options: Options, ranks: int, model_config: Any, device: str, precision: str, new_rows: int = 0
) -> Plan:
    """Return the cost of a run whose micro_batch_size and gradient_checkpointing are known.

    device  "cpu" or "cuda"
    """
    train, data, head = config.train, config.data, head_of(config, options, model_config.kind)
    is_packed = data.kind in ("sft", "preference") or (data.kind == "corpus" and data.document_mask)
    plan = make_plan(
        model_config,
        head=head,
        peft=(config.peft.name, options["peft"]) if config.peft else None,
        new_rows=new_rows,
        quantize=(config.quantize.name, options["quantize"]) if config.quantize else None,
        only=train.only,
        seq_len=row_len(config, options),
        lengths=Lengths(*OBJECTIVES[config.objective.name].lengths(data.row_len, **options["objective"])),
        micro_batch_size=train.micro_batch_size,
        precision=precision,
        optimizer=(config.optimizer.name, options["optimizer"]),
        checkpointing=train.gradient_checkpointing,
        compiled=train.compile is True,
        packed=(is_packed and head is None) or options["objective"].get("answers_per_row", 1) > 1,
        accumulates=rows_in_step(config, options, ranks) > train.micro_batch_size,
        averages=config.checkpoint.average == "tail",
        device=device,
    )
    return replace(plan, memory=plan.memory | memory_beside(config, options, precision, plan.memory))


def rows_in_step(config: Config, options: Options, ranks: int) -> int:
    """Return the rows that a rank trains on in a step: those of the batch, or of answers to its prompts."""
    return config.train.global_batch_size // ranks * OBJECTIVES[config.objective.name].rows(**options["objective"])


def row_len(config: Config, options: Options) -> int:
    """Return the tokens of a row that is trained on, at the most: of the data, or of answers to a prompt."""
    if config.data.kind != "prompts":
        return config.data.row_len
    return OBJECTIVES[config.objective.name].lengths(config.data.row_len, **options["objective"])[0]


def head_of(config: Config, options: Options, kind: str) -> HeadConfig | None:
    """Return the head for labels that a config trains on a model of this kind, None if it trains none. Without
    data.labels it has as many labels as a yes or no.
    """
    if config.objective.name == "reward":
        return make_head("regress", options["objective"], kind, None, None)
    if config.data.kind != "labelled":
        return None
    return make_head(config.objective.name, options["objective"], kind, config.data.labels, config.data.multi_label)


def with_train(config: Config, **values: Any) -> Config:
    """Return a config with other values in its section `train`."""
    return config.model_copy(update={"train": config.train.model_copy(update=values)})


def smaller_micro_batches(rows: int, most: int) -> list[int]:
    """Return the divisors of a rank's rows up to `most`, the largest first.

    >>> smaller_micro_batches(12, 8)
    [6, 4, 3, 2, 1]
    """
    return [micro for micro in range(min(rows, most), 0, -1) if rows % micro == 0]


def choose_fit(
    config: Config, ranks: int, room: int, options: Options, model_config: Any, device: str, *planned: Any
) -> tuple[Config, Plan]:
    """Return the config with "auto" micro-batch and recomputed blocks resolved, and its plan.

    The micro-batch is the largest divisor of a rank's rows whose planned peak fits and whose tokens are within
    CPU_MICRO_TOKENS or GPU_MICRO_TOKENS. Blocks are recomputed only if not a single row fits without.

    room     bytes of memory, of which MEMORY_SHARE may be planned
    planned  precision and new_rows for `plan_run`
    """
    asked, rows = config.train.micro_batch_size, rows_in_step(config, options, ranks)
    if asked != "auto" and rows % asked:
        got = f"{asked}, and {rows} rows a rank"
        raise config.error("train.micro_batch_size", "does not divide a rank's share of the batch", got=got)
    most_tokens = GPU_MICRO_TOKENS if device == "cuda" else CPU_MICRO_TOKENS
    most_rows = max(1, most_tokens // row_len(config, options))
    micros = [asked] if asked != "auto" else smaller_micro_batches(rows, most_rows)
    mode = config.train.gradient_checkpointing
    for recomputed in RECOMPUTED if mode == "auto" else [mode]:
        each = [with_train(config, micro_batch_size=micro, gradient_checkpointing=recomputed) for micro in micros]
        number, plan = first_that_fits(each, MEMORY_SHARE * room, options, ranks, model_config, device, *planned)
        chosen = each[number]
        if plan.peak_memory <= MEMORY_SHARE * room:
            break
    return chosen, plan


def first_that_fits(configs: list[Config], room: float, options: Options, *planned: Any) -> tuple[int, Plan]:
    """Return the number and the plan of the first config that fits, else of the last.

    configs  each of which takes less memory than the one before
    planned  ranks, model_config, device, precision and new_rows for `plan_run`
    """
    plans: dict[int, Plan] = {}

    def fits(number: int) -> bool:
        plans[number] = plan_run(configs[number], options, *planned)
        return plans[number].peak_memory <= room

    last = len(configs) - 1
    chosen = 0 if fits(0) or last == 0 else bisect.bisect_left(range(1, last), True, key=fits) + 1
    return chosen, plans.get(chosen) or plan_run(configs[chosen], options, *planned)


def modes_below(mode: str | int | float) -> tuple[str | float, ...]:
    """Return the values of RECOMPUTED that keep less than this one.

    >>> modes_below(0.7)
    (0.5, 'full')
    """
    if isinstance(mode, float):
        return (0.5, "full") if mode > 0.5 else ("full",)
    if isinstance(mode, int):
        return ("full",) if mode > 1 else ()
    return RECOMPUTED[RECOMPUTED.index(mode) + 1 :]


def changes(config: Config, options: Options, ranks: int) -> Iterator[tuple[str, Config]]:
    """Yield changes of a config that make it smaller, the cheapest first: (what to set, the changed config)."""
    rows = rows_in_step(config, options, ranks)
    for micro in smaller_micro_batches(rows, config.train.micro_batch_size - 1):
        yield f"train.micro_batch_size: {micro}", with_train(config, micro_batch_size=micro)
    smallest, said = (
        with_train(config, micro_batch_size=1),
        "" if config.train.micro_batch_size == 1 else ("train.micro_batch_size: 1 and "),
    )
    for mode in modes_below(config.train.gradient_checkpointing):
        smallest = with_train(smallest, gradient_checkpointing=mode)
        yield f"{said}train.gradient_checkpointing: {mode}", smallest
    said += "train.gradient_checkpointing: full and "
    if config.init_from and config.peft is None:
        yield f"{said}peft: {{name: lora}}", smallest.model_copy(update={"peft": Choice(name="lora")})
    length = config.data.seq_len
    while length // 2 >= SHORTEST:
        length //= 2
        data = config.data.model_copy(update={"seq_len": length})
        yield f"{said}data.seq_len: {length}", smallest.model_copy(update={"data": data})


def cheapest_change(config: Config, options: Options, ranks: int, room: float, *planned: Any) -> str:
    """Return the cheapest of `changes` with which the planned peak is within `room` bytes, in words for a fix.

    planned  model_config, device, precision and new_rows for `plan_run`
    """
    said, one_row = "", with_train(config, micro_batch_size=1)
    shares = options["objective"].get("answers_per_row", 1) > 1
    if shares and plan_run(one_row, options, ranks, *planned).peak_memory > room:
        said = "" if config.train.micro_batch_size == 1 else "train.micro_batch_size: 1 and "
        said, config = f"{said}objective.answers_per_row: 1", one_row
        options = options | {"objective": options["objective"] | {"answers_per_row": 1}}
        if (peak := plan_run(config, options, ranks, *planned).peak_memory) <= room:
            return f"{said} ({peak / 2**30:.1f} GiB)"
    smaller = [(f"{said} and {what}" if said else what, changed) for what, changed in changes(config, options, ranks)]
    if smaller:
        lora = {} if config.peft else {"peft": vars(METHODS["lora"].options())}
        number, plan = first_that_fits([changed for _, changed in smaller], room, options | lora, ranks, *planned)
        if plan.peak_memory <= room:
            return f"{smaller[number][0]} ({plan.peak_memory / 2**30:.1f} GiB)"
    return "a smaller model, or one for which an adapter is trained" if config.peft is None else "a smaller model"


def largest_part(plan: Plan) -> str:
    """Return the part of the planned memory that takes most, and its size."""
    part = max(plan.memory, key=plan.memory.get)
    return f"{part} {plan.memory[part] / 2**30:.1f} of {plan.peak_memory / 2**30:.1f} GiB planned"


def check_memory(plan: Plan, there: int, fix: str) -> None:
    """Raise a MachineError if the weights and the optimizer's state are more than the memory there is."""
    needed = sum(plan.memory.get(part, 0) for part in KEPT)
    if needed > there:
        largest = max(KEPT, key=lambda part: plan.memory.get(part, 0))
        most = f"{largest.replace('_', ' ')} {plan.memory[largest] / 2**30:.1f}"
        got, expected = f"{needed / 2**30:.1f} GiB, the most of them {most}", f"at most {there / 2**30:.1f} GiB"
        raise MachineError("the weights and the optimizer's state do not fit", got=got, expected=expected, fix=fix)
