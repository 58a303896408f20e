"""Test encoders' objectives, their prompts and answers, and whole runs of a BERT and a T5."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from conftest import llmkit, metrics, sentences, tiny_config
from safetensors.torch import load_file

from llmkit.commands import app as cli
from llmkit.config.load import load_config
from llmkit.config.records import SftData
from llmkit.data.batches import Batches
from llmkit.data.corrupt import masking, span_corruption, span_lengths
from llmkit.data.inspect import format_rows, inspect_rows
from llmkit.data.rows import encode_tokens, pair_batches
from llmkit.errors import DATA, MODEL, USAGE, UserError
from llmkit.evals.reading import Reading, read_data
from llmkit.models import t5
from llmkit.parallel.world import start_world
from llmkit.readers.tally import Tally
from llmkit.records.build import encode_turns
from llmkit.records.encode import Example, Found
from llmkit.records.fit import fit_pairs
from llmkit.storage.locate import load_located, locate
from llmkit.tokenizer.load import load_tokenizer
from llmkit.tokenizer.tokenizer import Tokenizer
from llmkit.tokenizer.train import train_tokenizer
from llmkit.training.loop import train
from llmkit.training.prepare import prepare
from llmkit.types import IGNORE_INDEX, Batch

TEXT = sentences(0, 200)
SHARES = {"mask_fraction": 0.15, "random_fraction": 0.1, "keep_fraction": 0.1}
SPANS = {"noise_fraction": 0.15, "mean_span": 3.0}


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    """Return a WordPiece tokenizer, which has a [MASK]."""
    return train_tokenizer([TEXT], "wordpiece", vocab_size=300)


@pytest.fixture(scope="module")
def sentinels() -> Tokenizer:
    """Return a BPE tokenizer with 100 sentinels."""
    return train_tokenizer([TEXT], vocab_size=400, special_tokens=[f"<extra_id_{i}>" for i in range(100)])


def table_rows(tokenizer: Tokenizer, rows: int, length: int, seed: int = 0) -> Batch:
    """Return rows of plain tokens, with labels that no objective of an encoder keeps."""
    plain = sorted(set(range(len(tokenizer))) - set(tokenizer.specials.values()))
    ids = np.random.default_rng(seed).choice(plain, (rows, length))
    return Batch(ids, np.zeros_like(ids))


def same(one: Batch, other: Batch) -> bool:
    return all(np.array_equal(array, other.arrays()[name]) for name, array in one.arrays().items())


# ---- masked tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3, 10, 97, 512])
@pytest.mark.parametrize("fraction", [0.01, 0.15, 0.5, 0.99])
def test_the_exact_share_of_a_row_is_a_label_and_says_what_stood_there(words, length, fraction):
    batch = table_rows(words, 20, length)
    masked = masking(words, 1, **SHARES | {"mask_fraction": fraction})(batch, range(20))
    chosen = masked.labels != IGNORE_INDEX
    assert set(chosen.sum(1)) == {max(1, round(fraction * length))}
    assert (masked.labels[chosen] == batch.input_ids[chosen]).all()
    assert (masked.input_ids[~chosen] == batch.input_ids[~chosen]).all()


def test_control_tokens_are_never_masked_nor_put_in(words):
    batch = table_rows(words, 50, 40)
    control = sorted(words.specials.values())
    batch.input_ids[:, ::4] = np.resize(control, (50, 10))
    batch.input_ids[7] = words.specials["[SEP]"]  # nothing else: nothing to tell
    masked = masking(words, 1, **SHARES | {"random_fraction": 0.9, "mask_fraction": 0.5})(batch, range(50))
    chosen = masked.labels != IGNORE_INDEX
    assert not np.isin(masked.labels[chosen], control).any()
    assert set(chosen.sum(1)) == {0, 15} and chosen[7].sum() == 0
    put_in = set(masked.input_ids[chosen].tolist()) & set(control)
    assert put_in <= {words.specials["[MASK]"]}


@pytest.mark.parametrize(("random", "keep"), [(0.1, 0.1), (0.0, 0.0), (0.5, 0.5), (1.0, 0.0), (0.0, 1.0), (0.2, 0.3)])
def test_chosen_tokens_become_the_mask_any_token_or_stay_in_these_shares(words, random, keep):
    batch = table_rows(words, 400, 100)
    options = {"mask_fraction": 0.5, "random_fraction": random, "keep_fraction": keep}
    masked = masking(words, 1, **options)(batch, range(400))
    chosen = masked.labels != IGNORE_INDEX  # 20,000 of them: a share's standard deviation is under 0.004
    now, before = masked.input_ids[chosen], batch.input_ids[chosen]
    masks, stays = (now == words.specials["[MASK]"]).mean(), (now == before).mean()
    assert masks == pytest.approx(1 - random - keep, abs=0.015)
    plain = len(words) - len(words.specials)
    assert stays == pytest.approx(keep + random / plain, abs=0.015)  # any of the words, itself too
    others = now[(now != before) & (now != words.specials["[MASK]"])]
    assert len(set(others.tolist())) == (plain if random else 0)


def test_another_kind_of_tokenizer_may_have_a_mask_token():
    made = train_tokenizer([TEXT], vocab_size=300, special_tokens=["<mask>"])
    masked = masking(made, 1, mask_fraction=0.5, random_fraction=0.0, keep_fraction=0.0)(
        table_rows(made, 2, 10), [0, 1]
    )
    assert (masked.input_ids == made.specials["<mask>"]).sum(1).tolist() == [5, 5]


def test_without_a_mask_token_there_is_nothing_to_mask_with(sentinels):
    with pytest.raises(UserError, match="no mask token") as caught:
        masking(sentinels, 1, **SHARES)
    assert caught.value.code == DATA


def test_packed_rows_keep_their_documents(words):
    batch = table_rows(words, 2, 6)
    batch.positions, batch.segments = np.arange(12).reshape(2, 6), np.arange(12).reshape(2, 6) // 4
    masked = masking(words, 1, **SHARES)(batch, [0, 1])
    assert (masked.positions == batch.positions).all() and (masked.segments == batch.segments).all()


# ---- a function of the row's number ---------------------------------------------------------------------------------


@pytest.fixture(params=["masking", "span_corruption"])
def corruption(request, words, sentinels):
    """Return (tokenizer, function: seed -> corruption)."""
    if request.param == "masking":
        return words, lambda seed: masking(words, seed, **SHARES)
    return sentinels, lambda seed: span_corruption(sentinels, seed, **SPANS)


def test_a_row_is_corrupted_alike_however_the_batch_is_cut(corruption):
    tokenizer, made = corruption
    batch, corrupt = table_rows(tokenizer, 8, 40), made(3)
    whole = corrupt(batch, range(8))
    for size in (1, 3):
        parts = [corrupt(part, range(8)[i * size : (i + 1) * size]) for i, part in enumerate(batch.split(size))]
        assert same(whole, Batch(**{name: np.concatenate([part.arrays()[name] for part in parts])
                                    for name in whole.arrays()}))  # fmt: skip
    backwards = corrupt(Batch(batch.input_ids[::-1], batch.labels), range(7, -1, -1))
    assert (backwards.labels[::-1] == whole.labels).all()


def test_another_number_or_seed_corrupts_otherwise_and_the_batch_given_is_left_as_it_was(corruption):
    tokenizer, made = corruption
    batch = table_rows(tokenizer, 8, 40)
    before = batch.input_ids.copy()
    found = [made(seed)(batch, range(first, first + 8)).labels for seed, first in [(3, 0), (3, 8), (4, 0)]]
    assert all((one != other).any(1).all() for one, other in [(found[0], found[1]), (found[0], found[2])])
    assert (made(3)(batch, [5] * 8).labels[5] == found[0][5]).all()
    assert (batch.input_ids == before).all()


def test_ranks_together_corrupt_the_global_batch(corruption):
    tokenizer, made = corruption
    data = table_rows(tokenizer, 50, 40).input_ids
    options = {"seed": 1, "corrupt": made(3)}

    def rows(samples: list[int]) -> Batch:
        return Batch(data[samples], data[samples])

    whole = Batches(50, rows, 8, **options).batch_at(4)
    for rank in range(2):
        mine = Batches(50, rows, 8, rank=rank, world=2, **options).batch_at(4)
        assert (mine.labels == whole.labels[rank::2]).all() and (mine.input_ids == whole.input_ids[rank::2]).all()
    epochs = [Batches(50, rows, 50, **options).batch_at(step) for step in (0, 1)]
    assert sorted(map(tuple, epochs[0].labels)) != sorted(map(tuple, epochs[1].labels))  # each reads it otherwise


# ---- spans cut out --------------------------------------------------------------------------------------------------


def corrupted_rows(inputs: list[int], labels: list[int], sentinels: list[int], eos: int) -> list[int]:
    """Restore the row that was corrupted: replace each sentinel by the span in the labels."""
    assert inputs[-1] == labels[-1] == eos
    spans: dict[int, list[int]] = {}
    for token in labels[:-1]:
        if token in sentinels:
            spans[token] = []
        else:
            spans[next(reversed(spans))].append(token)
    return [one for token in inputs[:-1] for one in (spans.pop(token) if token in sentinels else [token])]


@pytest.mark.parametrize("length", [2, 3, 4, 5, 10, 31, 32, 100, 512])
@pytest.mark.parametrize(("noise_fraction", "mean_span"), [(0.15, 3.0), (0.5, 3.0), (0.15, 1.0), (0.9, 2.0)])
def test_mending_gives_the_row_again_and_counts_are_t5s(sentinels, length, noise_fraction, mean_span):
    ids = [sentinels.rust.token_to_id(f"<extra_id_{i}>") for i in range(100)]
    noise = min(max(int(np.round(length * noise_fraction)), 1), length - 1)
    spans = min(max(int(np.round(noise / mean_span)), 1), length - noise)
    assert span_lengths(length, noise_fraction, mean_span) == (noise, spans)
    batch, first = table_rows(sentinels, 10, length, seed=length), 1000 * length
    options = {"noise_fraction": noise_fraction, "mean_span": mean_span}
    cut = span_corruption(sentinels, 1, **options, start_id=7)(batch, range(first, first + 10))
    assert cut.input_ids.shape == (10, length - noise + spans + 1) and cut.labels.shape == (10, noise + spans + 1)
    for row, inputs, labels in zip(batch.input_ids, cut.input_ids.tolist(), cut.labels.tolist(), strict=True):
        assert corrupted_rows(inputs, labels, ids, sentinels.eos_id) == row.tolist()
        for side in (inputs, labels):
            assert [token for token in side if token in ids] == ids[:spans]
        places = [place for place, token in enumerate(inputs) if token in ids]
        assert all(b - a > 1 for a, b in zip([-1, *places], places, strict=False))  # something stands between
        assert all(a not in ids or b not in ids for a, b in itertools.pairwise(labels))  # no span is empty
    assert (cut.decoder_input_ids[:, 1:] == cut.labels[:, :-1]).all() and (cut.decoder_input_ids[:, 0] == 7).all()
    assert cut.segments is None and cut.positions is None


def test_spans_are_as_long_as_asked_on_average_and_of_all_lengths(sentinels):
    cut = span_corruption(sentinels, 1, **SPANS)(table_rows(sentinels, 200, 512), range(200))
    marks = {sentinels.rust.token_to_id(f"<extra_id_{i}>") for i in range(100)}
    lengths = [len(span) for row in cut.labels.tolist() for span in split_at(row[:-1], marks)]
    assert np.mean(lengths) == pytest.approx(77 / 26) and {1, 2, 3, 4, 5, 6, 7, 8} <= set(lengths)


def split_at(row: list[int], marks: set[int]) -> list[list[int]]:
    """Return the tokens after each mark."""
    spans: list[list[int]] = []
    for token in row:
        spans.append([]) if token in marks else spans[-1].append(token)
    return spans


def test_too_few_sentinels_are_refused_with_both_numbers(words):
    few = train_tokenizer([TEXT], vocab_size=300, special_tokens=["<extra_id_0>", "<extra_id_1>", "<extra_id_3>"])
    corrupt = span_corruption(few, 1, **SPANS)
    corrupt(table_rows(few, 1, 40), [0])  # two spans
    with pytest.raises(UserError, match="too few sentinels") as caught:
        corrupt(table_rows(few, 1, 64), [0])
    assert (caught.value.code, caught.value.got) == (DATA, "2 <extra_id_...>")
    with pytest.raises(UserError, match="too few sentinels"):
        span_corruption(words, 1, **SPANS)(table_rows(words, 1, 20), [0])


# ---- prompts and answers --------------------------------------------------------------------------------------------

PAIRS = {
    "one": ([5, 6, 7, 1], "..xx", [([5, 6], [7, 1])]),
    "two": ([5, 6, 7, 8, 9], ".x.xx", [([5], [6]), ([5, 6, 7], [8, 9])]),
    "at_once": ([5, 6, 7], "xx.", [([], [5, 6])]),
    "all": ([5, 6], "xx", [([], [5, 6])]),
    "none": ([5, 6], "..", []),
    "nothing": ([], "", []),
}


@pytest.mark.parametrize(("ids", "targets", "expected"), PAIRS.values(), ids=PAIRS)
def test_every_answer_is_asked_for_by_all_that_stands_before_it(ids, targets, expected):
    tokens = encode_tokens(np.array(ids, np.int32), [letter == "x" for letter in targets])
    pairs = fit_pairs(Example(tokens, 0), 9, "drop", Found())
    assert [pair.tokens.tolist() for pair in pairs] == [[*(~i for i in text), *answer] for text, answer in expected]


CHAT = [{"role": "user", "content": "the one"}, {"role": "assistant", "content": "river"},
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "model"}]  # fmt: skip


def encoded(tokenizer, folder: Path, records: list[dict], **options) -> tuple[dict, dict[str, Batch]]:
    """Return the report of records that are encoded as pairs, and all rows of each split."""
    for name, lines in (("train", records), ("val", [{"prompt": "loss ", "completion": "loss"}])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = {"path": str(folder / "train.jsonl"), "val_path": str(folder / "val.jsonl")}
    data = SftData(kind="sft", **{"seq_len": 64} | files | options)
    report = encode_turns(data, tokenizer, folder / "out", seed=0, form="pairs")
    batches = {
        split: next(pair_batches(Path(report["folder"]), split, 99, start_id=3, seed=0).in_order())
        for split in ("train", "val")
    }
    return report, batches


def describe_choice(tokenizer, batch: Batch) -> list[tuple[str, str]]:
    """Return each row's prompt and answer, without the padding."""
    return [(tokenizer.decode(ids[seen == 0]), tokenizer.decode(labels[labels != IGNORE_INDEX]))
            for ids, seen, labels in zip(batch.input_ids, batch.segments, batch.labels, strict=True)]  # fmt: skip


def test_prompts_are_the_encoders_and_answers_the_decoders(sentinels, tmp_path):
    records = [
        {"prompt": "the ", "completion": "river of tokens"},
        {"prompt": "a large one ", "completion": "is"},
    ]
    report, batches = encoded(sentinels, tmp_path, records)
    end = sentinels.eos
    assert describe_choice(sentinels, batches["train"]) == [
        (f"the {end}", f"river of tokens{end}"), (f"a large one {end}", f"is{end}"),
    ]  # fmt: skip
    assert describe_choice(sentinels, batches["val"]) == [(f"loss {end}", f"loss{end}")]
    train = batches["train"]
    assert set(train.segments.ravel()) == {0, -1} and train.positions is None
    assert (np.diff(train.segments, axis=1) <= 0).all()  # padding stands behind
    shifted = np.where(train.labels == IGNORE_INDEX, 3, train.labels)
    assert (train.decoder_input_ids[:, 1:] == shifted[:, :-1]).all() and (train.decoder_input_ids[:, 0] == 3).all()
    counts = report["splits"]["train"]
    assert (counts["examples"], counts["rows"], counts["targets"]) == (2, 2, train.count)
    assert counts["tokens"] == (train.segments == 0).sum()


def test_every_answer_of_a_conversation_has_a_row(sentinels, tmp_path):
    rows = describe_choice(sentinels, encoded(sentinels, tmp_path, [{"messages": CHAT}])[1]["train"])
    begin = "<|im_start|>user\nthe one<|im_end|>\n<|im_start|>assistant\n"
    assert [prompt for prompt, _ in rows] == [
        f"{begin}<|endoftext|>",
        f"{begin}river<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<|endoftext|>",
    ]
    assert [answer.strip() for _, answer in rows] == ["river<|im_end|>", "model<|im_end|>"]


def test_a_too_long_prompt_is_cut_and_a_too_long_answer_left_out(sentinels, tmp_path):
    records = [{"prompt": "the ", "completion": "river " * 30}, {"prompt": "river " * 30, "completion": "is"},
               {"prompt": "a ", "completion": "one"}]  # fmt: skip
    report, batches = encoded(sentinels, tmp_path, records, seq_len=16, too_long="truncate_prompt")
    assert report["found"]["too_long"] == {"left out": 1, "prompt truncated": 1}
    (long_prompt, answer), _ = describe_choice(sentinels, batches["train"])
    assert long_prompt.endswith(sentinels.eos) and (batches["train"].segments[0] == 0).sum() == 16
    assert ("river " * 30).startswith(long_prompt.removesuffix(sentinels.eos))
    assert answer == f"is{sentinels.eos}"
    report, batches = encoded(sentinels, tmp_path, records, seq_len=16, too_long="drop")
    assert report["found"]["too_long"] == {"left out": 2}
    assert describe_choice(sentinels, batches["train"]) == [(f"a {sentinels.eos}", f"one{sentinels.eos}")]


def test_records_are_measured_in_the_rows_that_they_are_trained_in(sentinels, tmp_path):
    records = [{"prompt": "the ", "completion": "river " * 30}, {"prompt": "river " * 30, "completion": "is"},
               {"prompt": "a ", "completion": "one"}]  # fmt: skip
    rows = encoded(sentinels, tmp_path, records, seq_len=16, too_long="truncate_prompt")[1]["train"]
    trained = describe_choice(sentinels, rows)
    config, tally = t5.Config(decoder_start_token_id=3), Tally()
    reading = Reading(config, sentinels, 16, 16, 2, False, {}, "all", None)
    _, what, _, batches = read_data(str(tmp_path / "train.jsonl"), reading, tally)
    assert (tally.rows, tally.bad) == (3, 0)
    assert "1 longer than 16 tokens: left out" in what and "1 longer than 16 tokens: prompt truncated" in what
    assert sorted(pair for batch in batches for pair in describe_choice(sentinels, batch)) == sorted(trained)


# ---- whole runs -----------------------------------------------------------------------------------------------------

NAMES = {"bert": {"train": "wordpiece", "vocab_size": 300}, "t5": {"train": "bpe", "vocab_size": 400, "extra_ids": 20}}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}


def config_of(folder: Path, name: str, **sections) -> dict:
    """Write the config of a tiny run of an encoder, on the corpus in FOLDER/text."""
    data = {"dir": str(folder / name), "tokenizer": NAMES[name]} | sections.pop("data", {})
    untied = {"tie_word_embeddings": False} if name == "t5" else {}  # as in its version 1.1
    config = tiny_config(folder, data=data, **sections)
    if name == "t5":
        config["eval"] |= {"sample_prompt": "The model", "sample_tokens": 4}
    return config | {"model": {"name": name, **SMALL, **untied}, "run_dir": f"runs/{name}"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Return a folder with runs/bert and runs/t5, trained through the command line."""
    folder = tmp_path_factory.mktemp("encoders")
    (folder / "text").mkdir()
    for i in range(40):
        (folder / "text" / f"{i:02d}.txt").write_text(sentences(i, 60))
    for name in NAMES:
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config_of(folder, name)))
        llmkit("pretrain", f"{name}.yaml", cwd=folder)
    return folder


def exit_code(*arguments: object, cwd: Path) -> int:
    """Run the command line in this process."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.chdir(cwd)
        cli.main([*map(str, arguments)])
    return caught.value.code


@pytest.fixture
def command(trained, capsys):
    """Run the command line in the folder of the runs. Return its JSON, or its error."""

    def run(*arguments: object, code: int = 0, cwd: Path = trained):
        capsys.readouterr()
        found = exit_code(*arguments, *([] if code else ["--json"]), cwd=cwd)
        printed = capsys.readouterr()
        assert found == code, printed
        return printed.err if code else json.loads(printed.out)

    return run


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls(trained, name):
    found = [record for record in metrics(trained / "runs" / name) if "val_loss" in record]
    assert [record["step"] for record in found] == [0, 10, 20]
    assert found[-1]["val_loss"] < found[0]["val_loss"] - 0.5
    assert all(("sample" in record) == (name == "t5") and "bits_per_byte" not in record for record in found)


@pytest.mark.parametrize("name", NAMES)
def test_a_stopped_run_goes_on_to_the_same_bits(trained, command, name, tmp_path):
    run, again = trained / "runs" / name, tmp_path / "runs" / name
    shutil.copytree(run, again)
    shutil.copy(trained / f"{name}.yaml", tmp_path)
    shutil.rmtree(again / "checkpoints" / "step-000020")
    assert metrics(again)[-1]["step"] == 20
    command("pretrain", f"{name}.yaml", cwd=tmp_path)
    assert metrics(again) == metrics(run) and metrics(run)[-1]["step"] == 20
    for file in ("model/model.safetensors", "trainer/tensors.safetensors"):
        one, other = (load_file(folder / "checkpoints" / "step-000020" / file) for folder in (run, again))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", NAMES)
def test_perplexity_is_a_number_of_its_own_for_every_batch_size(command, name):
    one, other = (
        command("eval", f"runs/{name}", "--perplexity", "--precision", "fp32", "--batch-size", size) for size in (8, 3)
    )
    assert one["loss"] == pytest.approx(other["loss"], abs=1e-5) and one["tokens"] == other["tokens"] > 500
    assert one["perplexity"] == pytest.approx(np.exp(one["loss"]))
    assert "bits_per_byte" not in one and one["perplexity"] < NAMES[name]["vocab_size"] / 2


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_texts_is_corrupted_and_measured(command, trained, name):
    measured = command("eval", f"runs/{name}", "--perplexity", "--data", trained / "text" / "00.txt")
    before = command("eval", f"runs/{name}/checkpoints/step-000010", "--perplexity", "--data", trained / "text/00.txt")
    assert "of which only" in measured["data"] and measured["loss"] < before["loss"]


def test_data_inspect_shows_a_masked_token_and_then_what_stood_there(command, trained):
    run = prepare(load_config(trained / "bert.yaml"), start_world())
    tokenizer, rows = run.data.tokenizer, command("data", "inspect", "bert.yaml", "--rows", 4)["rows"]
    batch = run.batches("train", 4).batch_at(0)
    for row, ids, labels in zip(rows, batch.input_ids, batch.labels, strict=True):
        expected = []
        for read, label in zip(ids.tolist(), labels.tolist(), strict=True):
            expected += [(read, False), *([(label, True)] if label != IGNORE_INDEX else [])]
        assert [(token["id"], token["target"]) for token in row] == expected
    printed = format_rows(inspect_rows(batch, tokenizer, "masked"), tokenizer, colour=False)
    assert printed.count("[[") == (batch.labels != IGNORE_INDEX).sum() + 1  # one in the legend
    assert " [MASK] [[" in printed and "\u00b7" not in printed.rpartition("\n")[0]  # words, with plain spaces between


def test_data_inspect_shows_what_an_encoder_reads_and_what_its_decoder_writes(command, trained):
    run = prepare(load_config(trained / "t5.yaml"), start_world())
    rows = command("data", "inspect", "t5.yaml", "--rows", 4)["rows"]
    batch = run.batches("train", 4).batch_at(0)
    assert batch.input_ids.shape[1] != batch.labels.shape[1]
    for row, ids, labels in zip(rows, batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        assert [token["id"] for token in row if not token["target"]] == ids
        assert [token["id"] for token in row if token["target"]] == labels
        assert [token["target"] for token in row] == [False] * len(ids) + [True] * len(labels)
    printed = format_rows(inspect_rows(batch, run.data.tokenizer, "seq2seq"), run.data.tokenizer, colour=False)
    assert printed.count("<|endoftext|>[[<extra_id_0>") == printed.count("<|endoftext|>]]") == 4


ANSWERS = {"the model ": "river", "the loss ": "small"}


@pytest.fixture(scope="module")
def tuned(trained) -> Path:
    """Return the exported T5 that was fine-tuned to answer."""
    records = [{"prompt": prompt, "completion": answer} for prompt, answer in ANSWERS.items()] * 40
    (trained / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    options = [
        "train.precision=fp32",
        "train.compile=false",
        "train.max_steps=60",
        "optimizer.lr=1e-2",
        "eval.every=20",
    ]
    overrides = [word for option in options for word in ("-o", option)]
    flags = ("--full", "--from", "runs/t5", "--data", "pairs.jsonl", *overrides)
    assert (
        exit_code("finetune", *flags, cwd=trained) == exit_code("export", "runs/t5-full", "exported", cwd=trained) == 0
    )
    return trained / "exported"


def test_a_t5_learns_to_answer(command, tuned):
    options = ("--temperature", 0, "--max-new-tokens", 30, "--precision", "fp32")
    answers = command("generate", "runs/t5-full", *ANSWERS, *options)["texts"]
    assert [(answer["text"], answer["ended"]) for answer in answers] == [("river", "stop"), ("small", "stop")]
    assert command("generate", "exported", "the loss ", *options)["text"] == "small"
    before = command("eval", "runs/t5", "--perplexity", "--data", "pairs.jsonl")
    after = command("eval", "runs/t5-full", "--perplexity", "--data", "pairs.jsonl")
    assert after["loss"] < 0.3 < 2 < before["loss"]
    assert command("eval", "runs/t5-full", "--perplexity")["loss"] < 0.3


def test_data_inspect_shows_questions_and_answers_of_a_t5_without_padding(command, tuned):
    rows = command("data", "inspect", "runs/t5-full/config.yaml", "--rows", 6)["rows"]
    pairs = {f"{prompt}<|endoftext|>": f"{answer}<|endoftext|>" for prompt, answer in ANSWERS.items()}
    for row in rows:
        question, answer = ("".join(token["text"] for token in row if token["target"] is is_target)
                            for is_target in (False, True))  # fmt: skip
        assert pairs[question] == answer


@torch.no_grad()
def test_what_was_exported_opens_in_transformers_with_equal_logits(tuned):
    model, tokenizer = load_located(locate(str(tuned)))
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tuned).eval()
    ids = torch.tensor([tokenizer.encode_source("the model ")])
    written = torch.tensor([[0, *tokenizer.encode("river")]])
    expected = theirs(ids, decoder_input_ids=written).logits
    torch.testing.assert_close(model.eval()(ids, decoder_input_ids=written), expected, rtol=1e-5, atol=1e-5)
    words = transformers.AutoTokenizer.from_pretrained(tuned)
    assert words("the model ", add_special_tokens=False).input_ids == tokenizer.encode("the model ")
    said = theirs.generate(ids, max_new_tokens=30, do_sample=False, eos_token_id=tokenizer.eos_id)[0]
    assert words.decode(said[1:], skip_special_tokens=True) == "river"


@torch.no_grad()
def test_an_exported_bert_opens_in_transformers_with_equal_logits(command, trained):
    command("export", "runs/bert", "exported-bert")
    model, tokenizer = load_located(locate(str(trained / "runs/bert")))
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(trained / "exported-bert").eval()
    ids = torch.tensor([[tokenizer.specials["[CLS]"], *tokenizer.encode("The model reads the river.")]])
    torch.testing.assert_close(model.eval()(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)
    words = transformers.AutoTokenizer.from_pretrained(trained / "exported-bert")
    assert words("The model reads", add_special_tokens=False).input_ids == tokenizer.encode("The model reads")
    assert load_tokenizer(trained / "exported-bert").specials == tokenizer.specials
    fill = transformers.pipeline("fill-mask", model=theirs, tokenizer=words)
    assert fill("The model [MASK] the river.")[0]["score"] > 1 / len(tokenizer)


# ---- what does not go together --------------------------------------------------------------------------------------

REFUSED = {
    "lm_for_t5": ("t5", {"objective": {"name": "lm"}}, "does not fit", "span_corruption"),
    "lm_for_bert": ("bert", {"objective": {"name": "lm"}}, "does not fit", "mlm"),
    "spans_for_bert": ("bert", {"objective": {"name": "span_corruption"}}, "does not fit", "mlm"),
    "mlm_for_t5": ("t5", {"objective": {"name": "mlm"}}, "does not fit", "span_corruption"),
    "unknown": ("bert", {"objective": {"name": "mln"}}, "objective.name", "mlm"),
    "unknown_option": ("bert", {"objective": {"name": "mlm", "mean_span": 3.0}}, "objective.mean_span"),
    "no_fraction": ("bert", {"objective": {"name": "mlm", "mask_fraction": 1.5}}, "objective.mask_fraction"),
    "no_span": ("t5", {"objective": {"name": "span_corruption", "mean_span": 0.5}}, "objective.mean_span"),
    "sample_of_bert": ("bert", {"eval": {"sample_prompt": "The"}}, "writes no text", "delete it"),
    "nothing_to_keep": ("t5", {"data": {"seq_len": 1}}, "seq_len"),
    "documents_of_t5": ("t5", {"data": {"document_mask": True}}, "whole rows"),
    "all_random": ("bert", {"objective": {"name": "mlm", "random_fraction": 0.6, "keep_fraction": 0.6}}, "over 1"),
    "no_mask": ("bert", {"data": {"dir": "t5", "sources": []}}, "no mask token"),
    "no_sentinel": ("t5", {"data": {"dir": "bert", "sources": []}}, "too few sentinels"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "sections", "words"), [(n, s, w) for n, s, *w in REFUSED.values()], ids=REFUSED)
def test_what_does_not_go_together_is_refused_before_anything_is_trained(
    trained, name, sections, words, tmp_path, monkeypatch
):
    monkeypatch.chdir(trained)
    sections = {key: value | ({"name": name} if key == "model" else {}) for key, value in sections.items()}
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config_of(trained, name, **sections)))
    with pytest.raises(UserError) as caught:
        train(load_config(path, [f"run_dir={tmp_path / 'run'}"]), say=lambda line: None)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_rows_of_pairs_are_never_packed(command, tuned):
    flags = ("finetune", "--full", "--from", "runs/t5", "--data", "pairs.jsonl", "-o", "run_dir=runs/packed")
    assert "a row of its own" in command(*flags, "-o", "data.packing=true", code=USAGE)


def test_a_bert_answers_and_writes_nothing(command, tuned):
    flags = ("finetune", "--full", "--from", "runs/bert", "--data", "pairs.jsonl")
    assert "it writes no text" in command(*flags, code=USAGE)
    assert "writes no text" in command("generate", "runs/bert", "the", code=MODEL)
    assert "writes no answers" in command("eval", "runs/bert", "--perplexity", "--data", "pairs.jsonl", code=DATA)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_their_own_have_no_stride(command, name):
    flags = ("eval", f"runs/{name}", "--perplexity", "--window", 32, "--stride", 16)
    assert "stride equal to window" in command(*flags, code=USAGE)
