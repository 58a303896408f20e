"""Measure loss, perplexity and bits per byte of a MODEL on files, or on the val split of its run."""

from typing import Any

import torch
from tqdm import tqdm

from llmkit.config.defaults import MAX_BAD_FRACTION
from llmkit.data.splits import bytes_per_token
from llmkit.errors import DataError, UserError
from llmkit.evals.reading import Reading, corrupted_rows, read_data, run_val_split, windows
from llmkit.objectives.lm import perplexity
from llmkit.parallel.device import DTYPES, autocast, choose_precision
from llmkit.parallel.world import start_world
from llmkit.readers.tally import Tally
from llmkit.storage.locate import Located, load_located
from llmkit.storage.run import read_run_config


def measure(
    located: Located,
    *,
    data: str | None = None,
    columns: dict[str, str] | None = None,
    each: bool = False,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    precision: str = "auto",
    max_bad_fraction: float = MAX_BAD_FRACTION,
) -> dict[str, Any]:
    """Measure loss, perplexity and bits per byte of a MODEL.

    data    files of texts (a file, folder or glob), read as one stream of documents and end tokens; or of fine-tuning
            records, each in a row of its own with only the answers as targets; or a built corpus, of which the val
            split is read. None: the val split of the model's run.
            For an encoder the texts are corrupted as its objective does
    columns  our name of a field of records -> the file's name; None: the run's data.columns
    each    score each text on its own, after a begin token, as published figures do
    window  tokens of context at the most; default: the run's data.seq_len, else the model's longest position
    stride  see `windows`; default: the window
    max_bad_fraction  of the records, and of the bytes, of `data` that may be bad and left out
    """
    device = start_world().device
    precision = choose_precision(precision, device)
    # As in training: an adapter's base was frozen in 16 bits, and weights that were all trained were in fp32.
    dtype = DTYPES[precision] if located.is_adapter else torch.float32
    model, tokenizer = load_located(located, device=device, dtype=dtype)
    longest = model.config.max_position_embeddings
    config = read_run_config(located.run_dir) if located.run_dir else None
    window = window or min(longest, config["data"]["seq_len"] if config else longest)
    stride = stride or window
    if not 0 < stride <= window <= longest:
        got, expected = f"stride {stride}, window {window}", f"0 < stride <= window <= {longest}"
        raise UserError("stride and window do not fit the model", got=got, expected=expected)
    kind, objective = model.config.kind, (config or {}).get("objective")
    if kind != "causal" and stride != window:
        raise UserError(f"{model.config.model_type} needs stride equal to window", got=f"{stride}, window {window}")
    if each and kind != "causal":
        raise UserError(f"--each is for models that predict all tokens of a text, not {model.config.model_type}")
    tally, trained = Tally(), (config or {}).get("data") or {}
    if data is None:
        if config and config["data"]["kind"] == "sft" and (stride < window or window != config["data"]["seq_len"]):
            raise UserError("fine-tuning rows have data.seq_len tokens", got=f"window {window}, stride {stride}")
        if config is None:
            raise DataError("there is no text to measure on", fix="name a file with --data")
        read = run_val_split(located.run_dir, config["data"], model.config, tokenizer, batch_size)
    else:
        named = trained.get("columns") or {} if columns is None else columns
        how = {"train_on": trained.get("train_on", "all"), "date": trained.get("date")}
        reading = Reading(model.config, tokenizer, window, stride, batch_size, each, named, **how)
        read = read_data(data, reading, tally)
        tally.check(max_bad_fraction, fix="repair the file, or raise --max-bad-fraction")
    tokens, what, text_bytes, batches = read
    if batches is None and kind == "causal":
        batches = windows(tokens, window, stride, batch_size)
    elif batches is None:
        seed = config["seed"] if config else 0
        batches = corrupted_rows(tokens, model.config, tokenizer, window, batch_size, objective, seed)
        what += ", of which only masked tokens count" if kind == "masked" else ", of which only cut-out spans count"
    token_bytes = None
    if kind == "causal":
        token_bytes = bytes_per_token(tokenizer, None if tokens is None else [tokens], text_bytes)
    with autocast(device, precision):
        result = perplexity(
            model,
            tqdm(batches, desc="measure", unit="batch", disable=None, leave=False),
            device=device,
            token_bytes=token_bytes,
            micro_batch_size=batch_size,
        )
    if not result["val_tokens"]:
        raise DataError("the text is too short to measure on", got=what, fix="add text or lower the window")
    names = {"val_loss": "loss", "val_perplexity": "perplexity", "val_tokens": "tokens"}
    figures = {names.get(key, key): value for key, value in result.items()}
    return {
        "model": str(located.folder),
        "data": what,
        **({"bad_records": tally.describe()} if tally.bad else {}),
        **figures,
        "window": window,
        "stride": stride,
        "precision": precision,
    }
