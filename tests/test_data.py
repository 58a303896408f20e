"""Text to shards to batches: nothing lost, nothing counted twice, the same for any number of workers."""

import itertools
import json
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
import yaml
from conftest import SHARED, encode_chat_example, needs_shared, sentences, tiny_config
from tokenizers import Tokenizer as Rust
from tokenizers import models, pre_tokenizers

from llmkit.commands.app import main
from llmkit.config.data import OnError
from llmkit.config.load import load_config
from llmkit.config.records import SftData
from llmkit.config.schema import Config
from llmkit.corpus.build import build_corpus, read_manifest
from llmkit.data.batches import Batches, corpus_batches, permute
from llmkit.data.inspect import CONTEXT, RESET, TARGET, format_rows, inspect_rows
from llmkit.data.rows import encode_tokens, packed_batches, token_ids
from llmkit.data.splits import open_records
from llmkit.data.tokens import ShardWriter, TokenStream, open_split, token_dtype
from llmkit.errors import UserError
from llmkit.parallel.world import start_world
from llmkit.records import build
from llmkit.records.build import encode_turns
from llmkit.records.encode import Example, Found, encode_pair
from llmkit.records.fit import answer_spans, fit_row
from llmkit.records.layouts import read_examples
from llmkit.records.rows import choose_splits, pack
from llmkit.tokenizer.chat_template import CHATML_TEMPLATE, encode_chat
from llmkit.tokenizer.load import load_tokenizer
from llmkit.tokenizer.spell import LEGEND
from llmkit.tokenizer.tokenizer import Tokenizer
from llmkit.tokenizer.train import train_tokenizer
from llmkit.training.prepare import prepare
from llmkit.types import IGNORE_INDEX, Batch


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([sentences(i, 50) for i in range(5)], vocab_size=320)


# ---- tokenizer ------------------------------------------------------------------------------------------------------

HARD = [
    "",
    " ",
    "\n\n\t  x",
    "caf\u00e9 \u65e5\u672c\u8a9e \U0001f600",
    "<|endoftext|> <|im_start|>",
    "a" * 300,
    "don't  stop\r\n",
]


def test_round_trip_and_fast_encoder_agrees(tokenizer):
    for text, ids in zip(HARD, tokenizer.encode_batch(HARD), strict=True):
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text) == ids.tolist()
    assert tokenizer.fast is not None


def test_text_never_becomes_a_control_token(tokenizer):
    assert not set(tokenizer.encode("<|endoftext|><|im_end|>")) & set(tokenizer.specials.values())


def test_token_bytes_add_up(tokenizer):
    for text in HARD:
        assert tokenizer.token_bytes[tokenizer.encode(text)].sum() == len(text.encode())


def test_other_peoples_truncation_is_dropped(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    loaded = load_tokenizer(tmp_path)
    assert (
        loaded.decode(loaded.encode("one model reads the code of the river")) == "one model reads the code of the river"
    )


@needs_shared
def test_gpt2_ids_equal_transformers():
    from transformers import PreTrainedTokenizerFast

    path = SHARED / "tokenizers" / "gpt2" / "tokenizer.json"
    ours, theirs = load_tokenizer(path), PreTrainedTokenizerFast(tokenizer_file=str(path))
    theirs.backend_tokenizer.no_truncation()
    text = (SHARED / "pretrain" / "tinyshakespeare" / "input.txt").read_text()[:50_000] if (
        SHARED / "pretrain" / "tinyshakespeare" / "input.txt").exists() else sentences(1, 500)  # fmt: skip
    assert ours.encode_batch([text])[0].tolist() == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.fast is not None and ours.eos_id == 50256


@pytest.mark.parametrize("content", ["", "{", '{"model": 3}'])
def test_broken_tokenizer_is_a_user_error(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path)
    assert caught.value.code == 4


# ---- shards and batches ---------------------------------------------------------------------------------------------


def write_shard(path: Path, documents: list[np.ndarray]) -> Path:
    with ShardWriter(path, token_dtype(300)) as shard:
        for ids in documents:
            shard.add(ids)
    return shard.path


def test_streams_read_across_shards(tmp_path):
    write_shard(tmp_path / "a", [np.arange(5), np.arange(5, 7)])
    write_shard(tmp_path / "b", [np.arange(7, 12)])
    stream = TokenStream([tmp_path / "a.bin", tmp_path / "b.bin"], token_dtype(300))
    assert len(stream) == 12
    assert stream.read(4, 6).tolist() == [4, 5, 6, 7, 8, 9]
    assert np.fromfile(tmp_path / "a.idx", dtype="<i8").tolist() == [5, 7]
    assert not write_shard(tmp_path / "none", []).exists() and len(list(tmp_path.iterdir())) == 4
    assert token_dtype(65_536).itemsize == 2 and token_dtype(65_537).itemsize == 4


@pytest.mark.parametrize("size", [1, 2, 7, 64, 1000])
def test_permute_is_a_bijection_that_depends_on_the_key(size):
    one, other = ([permute(i, size, key) for i in range(size)] for key in (1, 2))
    assert sorted(one) == sorted(other) == list(range(size))
    assert size < 64 or one != other


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_together_see_the_global_batch(world):
    def rows(indices):
        return Batch(np.array(indices)[:, None], np.array(indices)[:, None])

    whole = Batches(samples=20, rows=rows, global_batch_size=8, seed=3)
    for step in (0, 2, 3):  # steps 2 and 3 cross an epoch
        parts = [Batches(20, rows, 8, 3, rank, world).batch_at(step).input_ids[:, 0] for rank in range(world)]
        assert sorted(np.concatenate(parts)) == sorted(whole.batch_at(step).input_ids[:, 0])
    epoch = np.concatenate([whole.batch_at(step).input_ids[:, 0] for step in range(5)])[:20]
    assert sorted(epoch) == list(range(20))


def test_every_token_is_a_target_once(tmp_path):
    stream = TokenStream([write_shard(tmp_path / "a", [np.arange(33)])], token_dtype(300))
    batches = corpus_batches([stream], 8, 4, seed=0)
    assert batches.samples == 4
    batch = batches.batch_at(0)
    assert sorted(batch.labels.flatten()) == list(range(1, 33))
    assert (batch.labels == batch.input_ids + 1).all()
    assert [len(micro.input_ids) for micro in batch.split(3)] == [3, 1] and batch.count == 32


# ---- build ----------------------------------------------------------------------------------------------------------


def section(folder, **changes):
    return Config.model_validate(tiny_config(folder) | {"data": tiny_config(folder)["data"] | changes}).data


def source_files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in (folder / "tokens").rglob("*") if p.is_file()}


def test_counts_add_up_and_drops_have_reasons(tmp_path):
    (tmp_path / "text").mkdir()
    good = [sentences(i, 30) for i in range(12)]
    lines = [json.dumps({"text": text}) for text in good]
    lines += [
        json.dumps({"text": good[0].upper()}),
        json.dumps({"text": good[1] + "The end.\n"}),
        "{bad json",
        "[1, 2]",
    ]
    lines += [json.dumps({"text": None}), json.dumps({"text": 3}), json.dumps({"text": "too short"}), '{"text": ""}']
    (tmp_path / "text" / "a.jsonl").write_text("\n".join(lines) + '\n{"text": "cut of')
    source = {"name": "s", "path": str(tmp_path / "text"), "profile": "docs"}
    data = section(tmp_path, sources=[source], dedup={"near": {}}, on_error={"max_bad_fraction": 0.5})
    manifest = build_corpus(data, say=print)
    row = manifest["funnel"]["s"]
    assert row["read"] == 21 and row["kept"] == 12 and row["quarantined"] == 5
    assert row["dropped"] == {"words": 1, "empty": 1, "exact duplicate": 1, "near duplicate": 1}
    bad = [json.loads(line) for line in (tmp_path / "data" / "quarantine.jsonl").read_text().splitlines()]
    assert [b["line"] for b in bad] == [15, 16, 17, 18, 21]
    for record, word in zip(bad, ("bad JSON", "an array", "null", "int, not text", "bad JSON"), strict=True):
        assert word in record["reason"]
    assert bad[0]["offset"] == sum(len(line) + 1 for line in lines[:14])
    with pytest.raises(UserError) as caught:
        build_corpus(section(tmp_path, sources=[source], on_error={"mode": "fail"}), say=print)
    assert caught.value.code == 3


def test_build_is_the_same_for_any_workers_and_survives_a_repeat(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("llmkit.corpus.units.UNIT_BYTES", 20_000)
    one = section(corpus, dir=str(tmp_path / "one"))
    build_corpus(one, say=print)
    assert len(list((tmp_path / "one" / "tokens" / "train" / "text").glob("*.bin"))) > 2
    build_corpus(section(corpus, dir=str(tmp_path / "two"), workers=2), say=print)
    assert source_files(tmp_path / "one") == source_files(tmp_path / "two")
    before = (tmp_path / "one" / "manifest.json").stat().st_mtime_ns
    build_corpus(one, say=print)
    assert (tmp_path / "one" / "manifest.json").stat().st_mtime_ns == before


def test_shards_hold_the_kept_text(corpus):
    folder = corpus / "data"
    manifest = read_manifest(folder)
    tokenizer = load_tokenizer(folder / "tokenizer")
    texts = {path.read_text().rstrip("\n") for path in (corpus / "text").glob("*.txt")}
    found = set()
    for split in ("train", "val"):
        stream = open_split(folder, manifest["splits"][split]["files"], np.dtype(manifest["dtype"]))
        assert len(stream) == manifest["splits"][split]["tokens"]
        found |= set(tokenizer.decode(stream.read(0, len(stream))).removesuffix("<|endoftext|>").split("<|endoftext|>"))
    assert found == texts


def test_one_long_document_is_split_by_its_tail(tmp_path):
    (tmp_path / "book.txt").write_text(sentences(1, 500))
    data = section(
        tmp_path, sources=[{"name": "book", "path": str(tmp_path / "book.txt")}], split={"val_fraction": 0.1}
    )
    manifest = build_corpus(data, say=print)
    train, val = (manifest["splits"][split]["bytes"] for split in ("train", "val"))
    assert 0.05 < val / (train + val) < 0.15


def test_a_changed_shard_is_noticed(corpus, tmp_path):
    data = section(corpus, dir=str(tmp_path / "data"))
    manifest = build_corpus(data, say=print)
    entry = manifest["splits"]["train"]["files"][0]
    (tmp_path / "data" / entry["path"]).write_bytes(b"short")
    with pytest.raises(UserError, match="changed after the build"):
        open_split(tmp_path / "data", [entry], np.dtype(manifest["dtype"]))


def test_everything_filtered_out_says_why(corpus, tmp_path):
    source = {"name": "text", "path": str(corpus / "text")}
    data = section(corpus, dir=str(tmp_path / "d"), sources=[source], filter={"rules": {"words": {"low": 10_000_000}}})
    with pytest.raises(UserError, match="no document is left") as caught:
        build_corpus(data, say=print)
    assert "40 words" in caught.value.got


def test_unknown_rule_is_refused(corpus, tmp_path):
    data = section(corpus, dir=str(tmp_path / "d"), filter={"rules": {"wrods": {"low": 1}, "words": {"least": 1}}})
    with pytest.raises(UserError) as caught:
        build_corpus(data, say=print)
    assert len([caught.value, *caught.value.others]) == 2 and not (tmp_path / "d").exists()


# ---- fine-tuning data -----------------------------------------------------------------------------------------------


def test_only_answers_are_targets(tokenizer):
    tokens = encode_pair(tokenizer, ("the river ", "is small"))
    assert tokenizer.decode(tokens[tokens >= 0]) == "is small<|endoftext|>"
    messages = [
        {"role": role, "content": content}
        for role, content in zip(
            ("system", "user", "assistant", "user", "assistant"), ("one", "two", "three", "four", "five"), strict=True
        )
    ]
    ids, targets = encode_chat_example(tokenizer, CHATML_TEMPLATE, messages)
    assert tokenizer.decode([i for i, t in zip(ids, targets, strict=True) if t]) == "three<|im_end|>five<|im_end|>"
    turns = "".join(f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in messages)
    assert tokenizer.decode(ids) == turns
    prompt = encode_chat(tokenizer, [{"role": "user", "content": "two"}])
    assert tokenizer.decode(prompt) == "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_ids_of_a_chat_are_transformers_whatever_is_put_before_a_text(scheme, tmp_path):
    letters = [("\u2581", -2.0), *((letter, -3.0) for letter in "abcduser\n:"), ("\u2581ab", -2.5), ("ab", -2.5)]
    rust = Rust(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("<|u|>", 0.0), *letters], unk_id=0))
    steps = [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme=scheme)]
    rust.pre_tokenizer = pre_tokenizers.Sequence(steps)
    rust.add_special_tokens(["<unk>", "</s>", "<|u|>"])
    template = "{% for message in messages %}<|u|>{{ message.content }}</s>\n{% endfor %}"
    Tokenizer(rust, 1, chat_template=template).save(tmp_path)
    messages = [{"role": "user", "content": "ab cd"}, {"role": "assistant", "content": "ab ab"}] * 2
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids, _ = encode_chat_example(load_tokenizer(tmp_path), template, messages)
    assert ids == theirs.apply_chat_template(messages)["input_ids"]


def test_control_tokens_in_messages_stay_text(tokenizer):
    messages = [{"role": "user", "content": "say <|im_end|>"}, {"role": "assistant", "content": "<|endoftext|>"}]
    ids, _ = encode_chat_example(tokenizer, CHATML_TEMPLATE, messages)
    assert ids.count(tokenizer.specials["<|im_end|>"]) == 2 and tokenizer.eos_id not in ids
    assert "say <|im_end|>" in tokenizer.decode(ids)


@pytest.mark.parametrize(("record", "reason"), [
    ({"messages": [{"role": "wizard", "content": "x"}]}, "unknown role"),
    ({"messages": [{"role": "user", "content": "x"}]}, "no turn of the assistant"),
    ({"messages": "x"}, "not a list"),
    ({"prompt": "x", "completion": 3}, "completion is int, not text"),
    ({"conversations": [{"from": "gpt", "value": None}]}, "content is null"),
])  # fmt: skip
def test_bad_conversations_have_reasons(record, reason):
    with pytest.raises(ValueError, match=reason):
        list(read_examples(record, {}, Counter()))


def scan_for_best_fit(lengths, size: int) -> list[list[int]]:
    """Pack by the definition of best-fit decreasing: an example goes to the latest row with the least room for it."""
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    for i in np.argsort(-lengths, kind="stable").tolist():
        room = next((room for room in range(lengths[i], size + 1) if by_room.get(room)), size)
        if by_room.get(room):
            row = by_room[room].pop()
        else:
            row = len(rows)
            rows.append([])
        rows[row].append(i)
        by_room.setdefault(room - lengths[i], []).append(row)
    return rows


def test_packing_is_best_fit_and_keeps_all():
    lengths = np.random.default_rng(0).integers(1, 100, 300)
    members, ends = pack(lengths, 100)
    rows = [row.tolist() for row in np.split(members, ends[:-1])]
    assert rows == scan_for_best_fit(lengths, 100)
    assert sorted(i for row in rows for i in row) == list(range(300))
    assert all(lengths[row].sum() <= 100 for row in rows)
    assert len(rows) <= 1.05 * lengths.sum() / 100 + 1


def test_sft_rows_hold_whole_examples(tokenizer, tmp_path):
    records = [{"prompt": f"{w} ", "completion": " ".join(WORDS_FOR[w])} for w in WORDS_FOR]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + "{bad\n")
    data = SftData(kind="sft", path=str(tmp_path / "a.jsonl"), seq_len=40, val_fraction=0.2, on_error=HALF)
    report = encode_turns(data, tokenizer, tmp_path / "out", seed=0)
    assert report["records"]["bad"] == 1 and report["records"]["reasons"] == {"bad JSON": 1}
    assert sum(part["examples"] for part in report["splits"].values()) == len(records)
    found = set()
    for split in ("train", "val"):
        for batch in packed_batches(tmp_path / "out" / report["key"], split, 2, seed=0).in_order():
            assert (batch.labels[batch.segments == -1] == IGNORE_INDEX).all()
            for row in range(len(batch.input_ids)):
                for number in range(batch.segments[row].max() + 1):
                    cut = batch.segments[row] == number
                    assert batch.positions[row][cut].tolist() == list(range(cut.sum()))
                    labels = batch.labels[row][cut]
                    found.add(tokenizer.decode(labels[labels != IGNORE_INDEX]).removesuffix("<|endoftext|>"))
    assert found == {r["completion"] for r in records}
    assert encode_turns(data, tokenizer, tmp_path / "out", seed=0) == report


HALF = OnError(max_bad_fraction=0.5)
WORDS_FOR = {"one": ["model", "token"], "river": ["small", "large", "of"], "code": ["reads"], "under": ["over"],
             "loss": ["and", "it", "is"], "the": ["a", "one", "in"]}  # fmt: skip


def encoded(tokenizer, folder, texts: list[tuple[str, str]], **options) -> tuple[dict, list[Batch]]:
    """Return the report of prompts and completions in rows of 17 tokens, and each row of the train split."""
    lines = [json.dumps({"prompt": prompt, "completion": completion}) + "\n" for prompt, completion in texts]
    (folder / "train.jsonl").write_text("".join(lines))
    (folder / "val.jsonl").write_text(json.dumps({"prompt": "loss ", "completion": "loss"}))
    files = {"path": str(folder / "train.jsonl"), "val_path": str(folder / "val.jsonl")}
    report = encode_turns(SftData(kind="sft", seq_len=16, **files, **options), tokenizer, folder / "out", seed=0)
    return report, table_rows(report, "train")


def table_rows(report: dict, split: str) -> list[Batch]:
    return list(packed_batches(Path(report["folder"]), split, 1, seed=0).in_order())


def answers(tokenizer, rows: list[Batch]) -> list[str]:
    """Return the text of each row's targets."""
    return [tokenizer.decode(row.labels[row.labels != IGNORE_INDEX]) for row in rows]


TOO_LONG = [("the ", "river " * 50), ("river " * 50, "is whole"), ("one ", "model")]


@pytest.mark.parametrize(
    "too_long, learnt, counts",
    [
        ("drop", ["model"], {"left out": 2}),
        ("truncate_prompt", ["is whole", "model"], {"left out": 1, "prompt truncated": 1}),
        ("split", ["river " * 50, "is whole", "model"], {"split": 2}),
    ],
)
def test_of_too_long_examples_no_answer_is_cut(tokenizer, tmp_path, too_long, learnt, counts):
    report, rows = encoded(tokenizer, tmp_path, TOO_LONG, too_long=too_long, packing=False)
    assert report["found"]["too_long"] == counts
    end = tokenizer.eos
    assert "".join(answers(tokenizer, rows)) == "".join(text + end for text in learnt)  # a window goes on with the last
    assert report["splits"]["train"]["targets"] == sum(row.count for row in rows)
    assert report["lengths"]["longest"] == max(len(encode_pair(tokenizer, pair)) for pair in TOO_LONG)
    for row in rows:  # what precedes a target is what precedes it in the text
        text = tokenizer.decode(row.input_ids[row.segments == 0])
        assert any(text in prompt + answer + end for prompt, answer in TOO_LONG)


def random_targets(seed: int) -> tuple[list[bool], int]:
    """Return up to 60 flags in runs, and a length of a row."""
    draw = random.Random(seed)
    runs = [[draw.random() < 0.5] * draw.randint(1, 9) for _ in range(draw.randint(1, 8))]
    return [False, *itertools.chain(*runs)][:60], draw.randint(2, 20)


@pytest.mark.parametrize("seed", range(100))
def test_windows_learn_each_target_once(seed):
    targets, room = random_targets(seed)
    ids = list(range(len(targets)))
    rows = fit_row(Example(encode_tokens(ids, targets), 0), room, "split", None, Found())
    learnt = [int(i) for row, *_ in rows for i in row[1:] if i >= 0]
    assert learnt == [i for i in ids[1:] if targets[i]]
    for row, *_ in rows:  # a target has half a window before it, or all that there is
        assert len(row) <= room and np.array_equal(token_ids(row), np.arange(len(row)) + token_ids(row)[0])
        for at, i in enumerate(row):
            assert i < 0 or at in (0, i) or at >= room // 2


@pytest.mark.parametrize("seed", range(100))
def test_a_shortened_prompt_keeps_whole_answers_and_the_begin_token(seed):
    (targets, room), begins = random_targets(seed), seed % 2
    tokens = encode_tokens(range(100, 100 + len(targets)), targets)
    spans = dict(answer_spans(tokens))
    for row, *_ in fit_row(Example(tokens, 0), room, "truncate_prompt", 100 if begins else None, Found()):
        assert len(row) <= room and (not begins or token_ids(row)[0] == 100)
        assert row[-1] >= 0 or len(row) == len(tokens)
        for start, stop in answer_spans(row):
            assert spans[row[start] - 100] == row[stop - 1] - 100 + 1


def test_no_prompt_is_on_both_sides_of_the_split(tokenizer, tmp_path):
    records = [{"prompt": f"{word} ", "completion": answer} for word in WORDS_FOR for answer in ("a", "one", "the")]
    records += [{"messages": [{"role": "user", "content": f"the {i // 3}"}, {"role": "assistant", "content": f"a {i}"}]}
                for i in range(60)]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    for seed in range(5):
        data = SftData(kind="sft", path=str(tmp_path / "a.jsonl"), seq_len=64, val_fraction=0.1, packing=False)
        report = encode_turns(data, tokenizer, tmp_path / "out", seed=seed)
        asked = {}
        for split in ("train", "val"):
            rows = table_rows(report, split)
            asked[split] = {tokenizer.decode(row.input_ids[0, : np.argmax(row.labels[0] >= 0) + 1]) for row in rows}
        assert asked["val"] and not asked["train"] & asked["val"]
        assert 4 <= report["splits"]["val"]["examples"] <= 8


def test_val_examples_with_a_prompt_of_train_are_left_out_and_counted(tokenizer, tmp_path):
    both = [json.dumps({"prompt": f"{word} ", "completion": "a"}) + "\n" for word in ("loss", "one", "river", "code")]
    (tmp_path / "a.jsonl").write_text("".join(both[:3]))
    for lines, left_out, kept in ((both[2:], 1, 1), (both[:2], 0, 2)):  # all of them: the user wants to see train
        (tmp_path / "b.jsonl").write_text("".join(lines))
        files = {"path": str(tmp_path / "a.jsonl"), "val_path": str(tmp_path / "b.jsonl")}
        report = encode_turns(SftData(kind="sft", seq_len=16, **files), tokenizer, tmp_path / "out", seed=0)
        assert report["val prompts in train"] == left_out and report["prompts in both"] is not bool(left_out)
        assert (report["splits"]["train"]["examples"], report["splits"]["val"]["examples"]) == (3, kept)


def test_a_frequent_prompt_stays_in_train_and_a_few_ones_are_split_by_examples():
    none = np.zeros(10, bool)
    train, val, is_shared = choose_splits(np.array([7] * 9 + [8]), none, 0.1, seed=0)
    assert val.tolist() == [False] * 9 + [True] and (train == ~val).all() and not is_shared
    for prompts in ([7] * 10, [7] * 5 + [8] * 5):
        train, val, is_shared = choose_splits(np.array(prompts), none, 0.1, seed=0)
        assert val.sum() == 1 and (train == ~val).all() and is_shared


@pytest.mark.parametrize("name", ["split", "whole"])
def test_sources_are_mixed_by_weight_and_a_folder_gives_its_train_split(tokenizer, tmp_path, name):
    for source, word, number in (("one", "river", 8), ("two", "loss", 30)):
        (tmp_path / source).mkdir()
        lines = [json.dumps({"question": f"{word} {i}", "answer": word}) + "\n" for i in range(number)]
        (tmp_path / source / ("train-00000.jsonl" if name == "split" else "a.jsonl")).write_text("".join(lines))
        if name == "split":
            (tmp_path / source / "test.jsonl").write_text(json.dumps({"question": "no", "answer": "code"}))
    sources = [{"name": "one", "path": str(tmp_path / "one"), "weight": 3},
               {"name": "two", "path": str(tmp_path / "two" / "*a*.jsonl"), "weight": 1}]  # fmt: skip
    data = SftData(kind="sft", sources=sources, seq_len=64, packing=False, val_fraction=0.1)
    report = encode_turns(data, tokenizer, tmp_path / "out", seed=0)
    assert sum(part["examples"] for part in report["splits"].values()) == 38
    splits = open_records(report, "x", tokenizer, weights={"one": 3.0, "two": 1.0})
    batches = splits.batches("train", 20, seed=0)
    words = [
        answer.split("<")[0].strip() for step in range(5) for answer in answers_of(tokenizer, batches.batch_at(step))
    ]
    assert words.count("river") == 75 and words.count("loss") == 25
    assert splits.shares["one"] == (0.75, report["sources"]["one"])


def test_a_limit_holds_over_files_and_after_a_bad_record_of_many_rows(tokenizer, tmp_path):
    table = pa.table({"question": [f"q {i}" for i in range(50)], "answer": ["a"] * 50})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=50, compression="none")
    raw = bytearray((tmp_path / "a.parquet").read_bytes())
    raw[4:40] = bytes(36)
    (tmp_path / "a.parquet").write_bytes(raw)
    lines = [json.dumps({"question": f"p {i}", "answer": "a"}) + "\n" for i in range(50)]
    (tmp_path / "b.jsonl").write_text("".join(lines))
    source = {"name": "s", "path": str(tmp_path / "*"), "limit": 20}
    data = SftData(kind="sft", sources=[source], seq_len=64, on_error=OnError(max_bad_fraction=1.0))
    with pytest.raises(UserError, match="no example is left"):  # the damaged rows are more than the limit
        encode_turns(data, tokenizer, tmp_path / "out", seed=0)
    source["path"] = str(tmp_path / "b.jsonl")
    data = SftData(kind="sft", sources=[source], seq_len=64)
    report = encode_turns(data, tokenizer, tmp_path / "out", seed=0)
    assert report["records"]["rows"] == 20


def test_a_weighted_source_without_an_example_is_named(tokenizer, tmp_path):
    (tmp_path / "one.jsonl").write_text(json.dumps({"question": "a", "answer": "river " * 99}) + "\n")
    lines = [json.dumps({"question": f"{i}", "answer": "a"}) + "\n" for i in range(9)]
    (tmp_path / "two.jsonl").write_text("".join(lines))
    sources = [{"name": name, "path": str(tmp_path / f"{name}.jsonl"), "weight": 1} for name in ("one", "two")]
    with pytest.raises(UserError, match="source one has a weight, but no example"):
        encode_turns(SftData(kind="sft", sources=sources, seq_len=64), tokenizer, tmp_path / "out", seed=0)


def test_a_folder_for_validation_gives_its_validation_split_and_counts_the_rest(tokenizer, tmp_path):
    for name, word in (("train", "a"), ("validation", "b"), ("test", "c")):
        line = json.dumps({"question": f"q {word}", "answer": word}) + "\n"
        (tmp_path / f"{name}.jsonl").write_text(line)
    data = SftData(kind="sft", path=str(tmp_path), val_path=str(tmp_path), seq_len=64)
    report = encode_turns(data, tokenizer, tmp_path / "out", seed=0)
    assert [report["splits"][split]["examples"] for split in ("train", "val")] == [1, 1]
    assert report["skipped"] == {"of another split, by their names": 4}


def test_records_are_the_same_with_any_number_of_workers_and_after_a_kill(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "UNIT_BYTES", 2000)
    lines = [json.dumps({"prompt": f"the {i} ", "completion": "river " * (i % 7)}) + "\n" for i in range(300)]
    lines[150] = "{bad\n"
    (tmp_path / "a.jsonl").write_text("".join(lines))
    found = []
    for workers in (1, 2):
        data = SftData(kind="sft", path=str(tmp_path / "a.jsonl"), seq_len=32, workers=workers, on_error=HALF)
        if workers == 1:
            join = build.join_tokens
            monkeypatch.setattr(build, "join_tokens", lambda *_: 1 / 0)  # it ends after the units
            with pytest.raises(ZeroDivisionError):
                encode_turns(data, tokenizer, tmp_path / "1", seed=0)
            monkeypatch.setattr(build, "join_tokens", join)
            monkeypatch.setattr(build, "encode_records", lambda *_, **__: 1 / 0)  # nothing is encoded again
        report = encode_turns(data, tokenizer, tmp_path / str(workers), seed=0)
        folder = Path(report["folder"])
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".bin", ".npy", ".jsonl")}
        found.append((files, report["records"], report["found"]))
        assert not (folder / "parts").exists()
    assert found[0] == found[1]
    lines = [json.loads(line)["line"] for line in found[0][0]["quarantine.jsonl"].splitlines()]
    assert 151 in lines  # in the file, not in its span


def answers_of(tokenizer, batch: Batch) -> list[str]:
    return [tokenizer.decode(labels[labels != IGNORE_INDEX]) for labels in batch.labels]


def test_without_packing_an_example_has_its_row_alone(tokenizer, tmp_path):
    texts = [("the ", "river"), ("one ", "model"), ("code ", "loss")]
    together = encoded(tokenizer, tmp_path, texts)[1]
    assert len(together) == 1 and set(together[0].segments[0]) >= {0, 1, 2}
    alone = encoded(tokenizer, tmp_path, texts, packing=False)[1]
    assert answers(tokenizer, alone) == [f"{answer}<|endoftext|>" for _, answer in texts]
    for row, (prompt, answer) in zip(alone, texts, strict=True):
        assert set(row.segments[0]) == {0, -1}
        assert tokenizer.decode(row.input_ids[row.segments == 0]) == f"{prompt}{answer}<|endoftext|>"


def test_val_path_is_the_val_split_and_nothing_is_held_out(tokenizer, tmp_path):
    texts = [("the ", word) for word in WORDS_FOR]
    report, rows = encoded(tokenizer, tmp_path, texts, packing=False)
    assert answers(tokenizer, rows) == [f"{word}<|endoftext|>" for word in WORDS_FOR]
    assert answers(tokenizer, table_rows(report, "val")) == ["loss<|endoftext|>"]


@pytest.mark.parametrize("name", ["examples.bin", "examples.idx", "train-pieces.npy", "val-rows.npy"])
def test_changed_encoded_records_are_noticed(tokenizer, tmp_path, name):
    report, _ = encoded(tokenizer, tmp_path, [("the ", "river"), ("one ", "model")])
    path = Path(report["folder"]) / name
    data = bytearray(path.read_bytes())
    for damaged, got in ((data[:-1], "bytes"), (data[:-2] + bytes([data[-2] ^ 64]) + data[-1:], "another checksum")):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="the encoded records changed") as error:
            table_rows(report, "train")
        assert error.value.at == path and got in error.value.got and str(path.parent) in error.value.fix
        assert error.value.code == 3
    path.unlink()
    with pytest.raises(UserError, match="the encoded records changed"):
        table_rows(report, "train")


@pytest.mark.parametrize("damage", [
    lambda text: "", lambda text: text[: len(text) // 2], lambda text: "[]", lambda text: "null", lambda text: '"x"',
    lambda text: text.replace('"rows": 1', '"rows": 9'), lambda text: "\udcff", lambda text: '{"checksum": 1}',
    lambda text: "[" * 100_000,
])  # fmt: skip
def test_records_with_a_damaged_report_are_encoded_again(tokenizer, tmp_path, damage):
    report, rows = encoded(tokenizer, tmp_path, [("the ", "river"), ("one ", "model")])
    path = Path(report["folder"]) / "report.json"
    text = path.read_text()
    path.write_bytes(damage(text).encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match="the report of the encoded records is damaged") as error:
        table_rows(report, "train")
    assert error.value.at == path and error.value.code == 3
    again, others = encoded(tokenizer, tmp_path, [("the ", "river"), ("one ", "model")])
    assert again["splits"] == report["splits"] and (others[0].input_ids == rows[0].input_ids).all()


def test_inspect_paints_answers_and_dims_prompts(tokenizer, tmp_path):
    _, rows = encoded(tokenizer, tmp_path, [("the river ", "is small")])
    shown = inspect_rows(rows[0], tokenizer, "causal")
    _, coloured, _ = format_rows(shown, tokenizer, colour=True).split("\n")
    assert coloured == f"{RESET}{CONTEXT}the\u00b7river\u00b7{RESET}{TARGET}is\u00b7small<|endoftext|>{RESET}"
    _, plain, _ = format_rows(shown, tokenizer, colour=False).split("\n")
    assert plain == "the\u00b7river\u00b7[[is\u00b7small<|endoftext|>]]"


def test_inspect_shows_all_examples_of_a_packed_row_and_no_padding(tokenizer, tmp_path):
    _, [row] = encoded(tokenizer, tmp_path, [("the ", "river"), ("code ", "loss")])
    shown = inspect_rows(row, tokenizer, "causal")
    _, first, mark, second, _ = format_rows(shown, tokenizer, colour=False).split("\n")
    assert sorted([first, second]) == ["code\u00b7[[loss<|endoftext|>]]", "the\u00b7[[river<|endoftext|>]]"]
    assert mark == "-" and {token["example"] for token in shown[0]} == {0, 1}
    assert len(shown[0]) == (row.segments[0] >= 0).sum() < row.segments.shape[1]


def test_inspect_numbers_the_examples_of_masked_rows(tokenizer):
    ids, labels = np.arange(1, 7)[None], np.array([[11, 12, -100, -100, -100, -100]])
    segments = np.array([[0, 0, 0, 1, 1, 1]])
    [row] = inspect_rows(Batch(ids, labels, segments * 0, segments), tokenizer, "masked")
    assert [(token["id"], token["example"]) for token in row] == [
        (1, 0), (11, 0), (2, 0), (12, 0), (3, 0), (4, 1), (5, 1), (6, 1)
    ]  # fmt: skip


def test_inspect_shows_the_last_token_of_a_full_row(tokenizer, tmp_path):
    _, rows = encoded(tokenizer, tmp_path, [("the ", "river " * 50)], too_long="split", packing=False)
    [shown] = inspect_rows(rows[0], tokenizer, "causal")
    assert [token["id"] for token in shown] == [*rows[0].input_ids[0], rows[0].labels[0, -1]]
    assert [token["target"] for token in shown] == [False, *(rows[0].labels[0] != IGNORE_INDEX)]


def test_inspect_shows_the_rows_of_any_step(corpus, monkeypatch, capsys):
    config = tiny_config(corpus)
    (corpus / "inspect.yaml").write_text(yaml.safe_dump(config))

    def shown(*options: str) -> list[list[int]]:
        with pytest.raises(SystemExit, match="0"):
            main(["data", "inspect", str(corpus / "inspect.yaml"), "--json", *options])
        rows = json.loads(capsys.readouterr().out)["rows"]
        return [[token["id"] for token in row] for row in rows]

    loaded = load_config(corpus / "inspect.yaml")
    batches = prepare(loaded, start_world(), say=lambda line: None).batches("train", 8)
    for step in (0, 3):
        batch = batches.batch_at(step)
        expected = [[*ids, labels[-1]] for ids, labels in zip(batch.input_ids.tolist(), batch.labels, strict=True)]
        assert shown("--step", str(step), "--rows", "8") == expected
        assert shown("--step", str(step)) == expected[:2]
    assert shown() == shown("--step", "0") and shown("--rows", "9")[8:] == shown("--step", "1", "--rows", "1")


def test_inspect_shows_targets_in_colour_on_a_terminal_only(corpus, monkeypatch, capsys):
    (corpus / "inspect.yaml").write_text(yaml.safe_dump(tiny_config(corpus)))
    for terminal in (False, True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        with pytest.raises(SystemExit, match="0"):
            main(["data", "inspect", str(corpus / "inspect.yaml"), "--rows", "1"])
        shown = capsys.readouterr().out
        assert "row 0: 33 tokens, 32 targets" in shown and (TARGET in shown) == terminal == ("\x1b" in shown)
        assert LEGEND in shown
