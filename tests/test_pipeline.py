"""The data pipeline through whole builds: what is redone, what is dropped and why, and what training then sees."""

from __future__ import annotations

import json
import os
import random
import re
import time
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import WORDS, llmkit, sentences, tiny_config

from llmkit.commands.app import main
from llmkit.config.data import CorpusData
from llmkit.config.load import load_config
from llmkit.corpus.build import build_corpus, read_manifest
from llmkit.corpus.decide import TRAIN
from llmkit.corpus.dedup import exact_key
from llmkit.corpus.encode import split_text
from llmkit.corpus.filters import PROFILES
from llmkit.corpus.lookup import explain_document, sample_documents
from llmkit.data.batches import SLOTS, Mixture, corpus_batches, samples_in
from llmkit.data.tokens import ShardWriter, TokenStream, open_split, token_dtype
from llmkit.errors import DATA, UserError
from llmkit.evals.perplexity import measure
from llmkit.models import build_model, llama
from llmkit.parallel.world import start_world
from llmkit.readers.sources import cut_by_names
from llmkit.readers.words import split_words
from llmkit.storage.locate import locate
from llmkit.tokenizer.load import load_tokenizer
from llmkit.tokenizer.train import train_tokenizer
from llmkit.training.header import describe
from llmkit.training.loop import train
from llmkit.training.prepare import prepare
from llmkit.types import IGNORE_INDEX

quiet = {"say": lambda line: None}
GERMAN = "Die Katze sitzt auf der Matte und schaut aus dem Fenster in den Garten. "


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> dict:
    """Return one data.tokenizer for all builds, which does not depend on the documents."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([sentences(i, 50) for i in range(5)], vocab_size=300).save(folder)
    return {"path": str(folder)}


def texts(number: int, first: int = 0, lines: int = 15) -> list[str]:
    return [sentences(first + i, lines) for i in range(number)]


def prose(seed: int, words: int) -> str:
    """Return one line of its own words, so that no two lines share an n-gram."""
    return " ".join(f"{random.Random(seed * 1000 + i).choice(WORDS)}{seed}x{i}" for i in range(words))


def source(folder: Path, name: str, written: list[str], **keys) -> dict:
    """Write a source of one .jsonl file; its documents' ids are NAME/NAME.jsonl:LINE."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in written))
    return {"name": name, "path": str(path), **keys}


def corpus_of(folder: Path, tokenizer: dict, sources: list[dict], **changes) -> CorpusData:
    values = tiny_config(folder)["data"] | {"tokenizer": tokenizer, "sources": sources, "dedup": {"near": False}}
    return CorpusData(**values | changes)


def split_texts(folder: Path) -> dict[str, list[str]]:
    """Return the documents in the shards of a build, by split."""
    manifest, tokenizer = read_manifest(folder), load_tokenizer(folder / "tokenizer")
    found = {}
    for split, part in manifest["splits"].items():
        stream = open_split(folder, part["files"], np.dtype(manifest["dtype"]))
        found[split] = tokenizer.decode(stream.read(0, len(stream))).split("<|endoftext|>")[:-1]
    return found


def all_texts(folder: Path) -> list[str]:
    return sorted(chain(*split_texts(folder).values()))


def stamps(folder: Path, *globs: str) -> dict[str, tuple[int, int]]:
    """Return the files, with values that change when a file is written again."""
    found = sorted(path for glob in globs for path in folder.glob(glob))
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_ino) for path in found}


def measured(data: CorpusData) -> dict[str, tuple[int, int]]:
    return stamps(Path(data.dir), "parts/*.scores.npy", "parts/*.jsonl.zst", "parts/*.bands.npy", "parts/*.hits.npy")


def shards(data: CorpusData) -> dict[str, tuple[int, int]]:
    return stamps(Path(data.dir), "tokens/*/*/*.bin")


def story(data: CorpusData, id: str) -> tuple[str, str | None]:
    """Return the fate of a document and the reason."""
    found = explain_document(data, id)
    return found["fate"], found.get("why")


def run_main(capsys, *arguments: object, code: int = 0) -> tuple[str, str]:
    """Return the output of the command line, run in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert stopped.value.code == code, err
    return out, err


# ---- what is done again ---------------------------------------------------------------------------------------------

LENIENT = {
    "filter": {"language": {"keep": ["en"], "min_score": 0.1}, "rules": {"words": {"low": 1}}},
    "pii": {"kinds": ["email"], "drop_above": 5}, "dedup": {"near": {"keep": "longest"}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({"filter": LENIENT["filter"] | {"rules": {"words": {"low": 20}}}}, 30),
        ({"filter": LENIENT["filter"] | {"rules": {"words": False}}}, 31),
        ({"filter": LENIENT["filter"] | {"language": {"keep": ["en", "de"], "min_score": 0.1}}}, 32),
        ({"filter": LENIENT["filter"] | {"language": {"keep": ["de"], "min_score": 0.5}}}, 1),
        ({"pii": {"kinds": ["email"], "drop_above": 2}}, 30),
        ({"dedup": {"near": {"keep": "all"}}}, 32),
        ({"dedup": {"exact": False, "near": {"keep": "all"}}}, 33),
        ({"split": {"val_fraction": 0.5}}, 31),
        ({"decontaminate": None}, 31),
    ],
)
def test_other_thresholds_read_no_source_again(tmp_path, tokenizer, change, kept):
    written = texts(29)
    written += [written[0] + "The end.\n", written[1], "The model reads.", GERMAN * 5]
    written += [sentences(99, 20) + "a@corp.org b@corp.org c@corp.org"]
    sources = [source(tmp_path, "s", written)]
    first = build_corpus(corpus_of(tmp_path, tokenizer, sources, **LENIENT), **quiet)
    assert first["counts"]["kept"] == 31
    data = corpus_of(tmp_path, tokenizer, sources, **LENIENT | change)
    before = measured(data)
    again = build_corpus(data, **quiet)
    assert again["counts"]["kept"] == kept and measured(data) == before and len(before) == 4  # of one unit


def test_weights_and_epochs_of_sources_change_nothing_that_is_built(tmp_path, tokenizer):
    sources = [source(tmp_path, name, texts(10, i * 100)) for i, name in enumerate("ab")]
    build_corpus(corpus_of(tmp_path, tokenizer, sources), **quiet)
    before = stamps(tmp_path / "data", "**/*")
    for changed in ({"weight": 2.0}, {"max_epochs": 3.0}, {"weight": 0.1, "max_epochs": 0.5}):
        build_corpus(corpus_of(tmp_path, tokenizer, [one | changed for one in sources]), **quiet)
    assert stamps(tmp_path / "data", "**/*") == before


def test_only_units_whose_documents_fare_otherwise_are_encoded_again(tmp_path, tokenizer):
    sources = [source(tmp_path, name, texts(10, i * 100)) for i, name in enumerate("ac")]
    sources.insert(1, source(tmp_path, "b", [*texts(10, 300), "The model reads a token."]))
    build_corpus(corpus_of(tmp_path, tokenizer, sources, filter={"rules": {"words": {"low": 1}}}), **quiet)
    data = corpus_of(tmp_path, tokenizer, sources, filter={"rules": {"words": {"low": 20}}})
    parts, before = measured(data), shards(data)
    assert build_corpus(data, **quiet)["counts"]["dropped"] == 1
    after = shards(data)
    assert measured(data) == parts and len(after) == len(before)
    unchanged = {name.split("/")[2] for name in before.keys() & after.keys() if before[name] == after[name]}
    changed = {name.split("/")[2] for name in after.keys() - before.keys()}
    assert unchanged == {"a", "c"} and changed == {"b"}


def test_a_changed_file_is_measured_again_and_no_other(tmp_path, tokenizer):
    sources = [source(tmp_path, name, texts(10, i * 100)) for i, name in enumerate("ab")]
    data = corpus_of(tmp_path, tokenizer, sources)
    build_corpus(data, **quiet)
    parts, encoded = measured(data), shards(data)
    source(tmp_path, "a", [*texts(10), "A new one of ten words for the first source."])
    assert build_corpus(data, **quiet)["counts"]["read"] == 21
    kept = {name for name in parts if measured(data).get(name) == parts[name]}
    assert {Path(name).name[0] for name in kept} == {"b"} and len(kept) == len(parts) / 2
    assert {Path(name).name[0] for name in shards(data).keys() - encoded.keys()} == {"a"}


def test_a_file_of_the_same_size_with_another_time_is_read_again(tmp_path, tokenizer):
    data = corpus_of(tmp_path, tokenizer, [source(tmp_path, "s", ["the small river " * 40, *texts(20)])])
    build_corpus(data, **quiet)
    file = tmp_path / "s.jsonl"
    file.write_text(file.read_text().replace("small", "large"))
    os.utime(file, ns=(time.time_ns(), file.stat().st_mtime_ns + 1_000_000))
    build_corpus(data, **quiet)
    assert any("the large river" in text for text in all_texts(tmp_path / "data"))


@pytest.mark.parametrize(
    "change",
    [
        {"clean": {"whitespace": False}}, {"pii": {"kinds": ["email"]}}, {"dedup": {"near": {}}},
        {"filter": {"rules": {"characters": {"low": 1}}}}, {"dedup": {"near": False, "paragraphs": 30}},
    ],
)  # fmt: skip
def test_what_measuring_depends_on_is_measured_again(tmp_path, tokenizer, change):
    sources = [source(tmp_path, "s", texts(10))]
    build_corpus(corpus_of(tmp_path, tokenizer, sources), **quiet)
    data = corpus_of(tmp_path, tokenizer, sources, **change)
    before = measured(data)
    build_corpus(data, **quiet)
    assert not before.keys() & measured(data).keys()


@pytest.mark.parametrize("file", ["words", "evals.jsonl"])
def test_a_word_list_or_evaluation_file_that_changes_counts_at_once(tmp_path, tokenizer, file):
    written = texts(20)
    path, lines = tmp_path / file, ["quagga", json.dumps({"question": written[3]})]
    changes = {
        "words": {"filter": {"words": {"path": str(path), "max_per_1k": 0}}},
        "evals.jsonl": {"decontaminate": {"files": [str(path)]}},
    }
    path.write_text("nothing\n" if file == "words" else json.dumps({"question": "nothing " * 20}))
    written[5] += "A quagga."
    data = corpus_of(tmp_path, tokenizer, [source(tmp_path, "s", written)], **changes[file])
    assert build_corpus(data, **quiet)["counts"]["dropped"] == 0
    path.write_text(lines[0] if file == "words" else lines[1])
    os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns + 1_000_000))
    assert build_corpus(data, **quiet)["counts"]["dropped"] == 1


# ---- why documents are dropped --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dropping(tmp_path_factory, tokenizer) -> CorpusData:
    """Return two sources in which one document meets each reason to drop."""
    folder = tmp_path_factory.mktemp("dropping")
    (folder / "words").write_text("# a comment\nquagga\nthe dodo\n")
    leak = sentences(500, 4).replace("\n", " ")
    (folder / "evals.jsonl").write_text(json.dumps({"question": leak, "choices": ["yes", "no"]}))
    good = texts(24)
    one, other = prose(1, 40), prose(2, 40)
    a = [
        *good[:12], " \n\t", GERMAN * 5, "Only the model reads.", sentences(60, 10) + "A quagga and the dodo.",
        sentences(61, 10) + "Mail jo@corp.org now.", f"{one}\n\n{sentences(70, 3)}", f"{other}\n\n{sentences(71, 3)}",
    ]  # fmt: skip
    b = [
        *good[12:], good[0].upper(), good[1] + "The end.\n", f"{sentences(62, 10)}{leak}", f"{one}\n\n{other}",
    ]  # fmt: skip
    sources = [source(folder, "a", a), source(folder, "b", b)]
    with (folder / "b.jsonl").open("a") as file:
        file.write('{"text": 3}\n{"text": "torn')
    data = corpus_of(
        folder, tokenizer, sources, dedup={"near": {}, "paragraphs": 20}, on_error={"max_bad_fraction": 0.5},
        filter={
            "language": {"keep": ["en"], "min_score": 0.3}, "rules": {"words": {"low": 10}},
            "words": {"path": str(folder / "words"), "max_per_1k": 1.0},
        },
        pii={"kinds": ["email"], "action": "drop"}, decontaminate={"files": [str(folder / "evals.jsonl")]},
    )  # fmt: skip
    build_corpus(data, **quiet)
    return data


@pytest.mark.parametrize(
    ("id", "fate", "why"),
    [
        ("a/a.jsonl:13", "empty", "empty"),
        ("a/a.jsonl:14", "language", "language de, not en"),
        ("a/a.jsonl:15", "words", "words 4 < 10"),
        ("a/a.jsonl:16", "listed_words", "listed_words "),
        ("a/a.jsonl:17", "pii", "pii 1 > 0"),
        ("b/b.jsonl:13", "exact duplicate", "exact duplicate"),
        ("b/b.jsonl:14", "kept", None),  # it is the longer one
        ("a/a.jsonl:2", "near duplicate", "near duplicate"),
        ("b/b.jsonl:15", "contaminated", "contaminated"),
        ("b/b.jsonl:16", "repeated paragraphs", "repeated paragraphs"),
        ("a/a.jsonl:18", "kept", None),  # the first with these paragraphs
    ],
)
def test_every_reason_to_drop_happens_and_is_named(dropping, id, fate, why):
    found, reason = story(dropping, id)
    assert found == fate or (fate == "kept" and found.startswith("kept, in the "))
    assert reason == why or (why and reason.startswith(why))


def test_dropped_files_and_the_report_give_the_same_reasons(dropping):
    dropped = {one["id"]: one["why"] for one in sample_documents(dropping, 100, kept=False)}
    assert len(dropped) == 9
    assert all(story(dropping, id)[1] == why for id, why in dropped.items())
    report = (Path(dropping.dir) / "report.md").read_text()
    assert all(f"`{id}`: {why}: " in report for id, why in dropped.items())
    assert "listed_words" in dropped["a/a.jsonl:16"] and " > 1" in dropped["a/a.jsonl:16"]


def test_counts_of_several_sources_add_up(dropping):
    funnel, counts = (read_manifest(Path(dropping.dir))[name] for name in ("funnel", "counts"))
    for row in funnel.values():
        assert row["read"] == row["quarantined"] + sum(row["dropped"].values()) + row["kept"]
    assert (funnel["a"]["read"], funnel["b"]["read"]) == (19, 18) and funnel["b"]["quarantined"] == 2
    assert funnel["a"]["dropped"] == dict.fromkeys(
        ("empty", "language", "words", "listed_words", "pii", "near duplicate"), 1
    )
    assert funnel["b"]["dropped"] == dict.fromkeys(("exact duplicate", "contaminated", "repeated paragraphs"), 1)
    assert counts == {"read": 37, "quarantined": 2, "kept": 26, "dropped": 9}
    assert len(all_texts(Path(dropping.dir))) == 26
    assert funnel["a"]["languages"]["de"] == 1 and funnel["a"]["pii"] == {"email": 1}


@pytest.mark.parametrize(("above", "dropped"), [(2, 1), (3, 0)])
def test_documents_full_of_personal_data_are_dropped_above_a_number(tmp_path, tokenizer, above, dropped):
    written = [*texts(20), sentences(50, 10) + "a@corp.org b@corp.org c@corp.org"]
    pii = {"kinds": ["email"], "action": "tag", "drop_above": above}
    data = corpus_of(tmp_path, tokenizer, [source(tmp_path, "s", written)], pii=pii)
    assert build_corpus(data, **quiet)["counts"]["dropped"] == dropped
    assert story(data, "s/s.jsonl:21")[1] == ("pii 3 > 2" if dropped else None)


def test_a_rule_that_is_turned_off_or_says_nothing_drops_nothing(tmp_path, tokenizer):
    sources = [source(tmp_path, "s", [*texts(20), "# # # # # # # #"], profile="docs")]
    rules = {"words": False, "alphabetic_words": False}
    kept = [
        build_corpus(corpus_of(tmp_path, tokenizer, sources, filter={"rules": chosen}), **quiet)["counts"]["kept"]
        for chosen in ({}, {"words": False}, rules)
    ]
    assert kept == [20, 20, 21]


# ---- duplicates -----------------------------------------------------------------------------------------------------


def families(number: int) -> list[list[str]]:
    """Return clusters of a text, a longer version, a shorter version and a copy."""
    made = []
    for text in texts(number, 200, lines=40):
        lines = text.splitlines()
        made.append(["\n".join(lines), "\n".join([*lines, "The end."]), "\n".join(lines[1:]), "\n".join(lines)])
    return made


def test_the_longest_of_near_duplicates_stays(tmp_path, tokenizer):
    clusters = families(10)
    data = corpus_of(tmp_path, tokenizer, [source(tmp_path, "s", [*chain(*clusters)])], dedup={"near": {}},
                     split={"val_fraction": 0.4})  # fmt: skip
    counts = build_corpus(data, **quiet)["funnel"]["s"]
    assert counts["dropped"] == {"exact duplicate": 10, "near duplicate": 20}
    assert all_texts(tmp_path / "data") == sorted(cluster[1] for cluster in clusters)
    assert explain_document(data, "s/s.jsonl:1")["instead"] == "s/s.jsonl:2"
    assert "10 clusters of near duplicates, the largest of 3 documents" in (tmp_path / "data/report.md").read_text()


def test_what_stands_in_the_place_of_a_duplicate_was_kept(tmp_path, tokenizer):
    data = corpus_of(tmp_path, tokenizer, [source(tmp_path, "s", [*chain(*families(4))])], dedup={"near": {}})
    build_corpus(data, **quiet)
    dropped = [one["id"] for one in sample_documents(data, 100, kept=False)]
    instead = {explain_document(data, id)["instead"] for id in dropped}
    assert dropped and all(story(data, id)[0].startswith("kept") for id in instead)


@pytest.mark.parametrize("exact", [True, False])
def test_keep_all_drops_no_near_duplicate_and_parts_no_cluster(tmp_path, tokenizer, exact):
    clusters = families(16)
    shuffled = random.Random(1).sample([*chain(*clusters)], 64)
    data = corpus_of(tmp_path, tokenizer, [source(tmp_path, "a", shuffled[:30]), source(tmp_path, "b", shuffled[30:])],
                     dedup={"exact": exact, "near": {"keep": "all"}}, split={"val_fraction": 0.4})  # fmt: skip
    kept = build_corpus(data, **quiet)["counts"]["kept"]
    splits = {split: set(found) for split, found in split_texts(tmp_path / "data").items()}
    assert kept == (48 if exact else 64) and splits["val"] and splits["train"]
    for cluster in clusters:
        assert sum(bool(found & set(cluster)) for found in splits.values()) == 1


def test_copies_that_nobody_drops_are_in_one_split(tmp_path, tokenizer):
    written = [text if i % 3 else text.upper() for i, text in enumerate(texts(25) * 3)]
    data = corpus_of(tmp_path, tokenizer, [source(tmp_path, "s", written)], dedup={"exact": False, "near": False},
                     split={"val_fraction": 0.4})  # fmt: skip
    assert build_corpus(data, **quiet)["counts"]["kept"] == 75
    keys = {split: {exact_key(text) for text in found} for split, found in split_texts(tmp_path / "data").items()}
    assert keys["val"] and keys["train"] and not keys["val"] & keys["train"]


def five_grams(text: str) -> set[tuple[bytes, ...]]:
    words = split_words(text)
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


@pytest.mark.parametrize("keep", ["longest", "all"])
def test_nothing_of_val_is_in_train_not_even_nearly(tmp_path, tokenizer, keep):
    written = random.Random(2).sample([*chain(*families(20))], 80)
    data = corpus_of(tmp_path, tokenizer, [source(tmp_path, "s", written)], dedup={"near": {"keep": keep}},
                     split={"val_fraction": 0.4})  # fmt: skip
    build_corpus(data, **quiet)
    splits = split_texts(tmp_path / "data")
    train_grams = [five_grams(text) for text in splits["train"]]
    assert splits["val"] and not set(splits["val"]) & set(splits["train"])
    for text in splits["val"]:
        grams = five_grams(text)
        assert max(len(grams & other) / len(grams | other) for other in train_grams) < 0.5
    listed = (tmp_path / "data/val_documents.txt").read_text().split()
    assert len(listed) == len(splits["val"]) and all("in the val split" in story(data, id)[0] for id in listed)


def test_the_seed_chooses_another_val_split(tmp_path, tokenizer):
    sources, found = [source(tmp_path, "s", texts(40))], []
    for seed in (1, 2, 1):
        build_corpus(corpus_of(tmp_path, tokenizer, sources, seed=seed), **quiet)
        found.append(split_texts(tmp_path / "data")["val"])
    assert found[0] == found[2] != found[1]


# ---- decontamination ------------------------------------------------------------------------------------------------


def decontaminated(folder: Path, tokenizer: dict, written: list[str], question: str, **options) -> dict:
    """Return the counts of a build with an evaluation file that holds this question."""
    (folder / "evals.jsonl").write_text(json.dumps({"question": question, "n": 1, "choices": ["no", {"more": "yes"}]}))
    section = {"files": [str(folder / "evals.jsonl")], **options}
    data = corpus_of(folder, tokenizer, [source(folder, "s", written)], decontaminate=section)
    return build_corpus(data, **quiet)["funnel"]["s"]


@pytest.mark.parametrize(("words", "dropped"), [(13, 1), (12, 0)])
def test_a_shared_ngram_drops_and_a_shorter_one_does_not(tmp_path, tokenizer, words, dropped):
    question = prose(7, 30)
    leaked = " ".join(question.split()[5 : 5 + words]).upper().replace(" ", ", ")  # in other words but for the words
    row = decontaminated(tmp_path, tokenizer, [*texts(20), f"{sentences(50, 5)}So {leaked} it is."], question)
    assert row["dropped"] == ({"contaminated": 1} if dropped else {})


def test_choices_deep_in_a_record_are_looked_for_and_short_texts_are_counted(tmp_path, tokenizer):
    question = {"a": [{"b": prose(7, 13)}]}
    row = decontaminated(tmp_path, tokenizer, [*texts(20), sentences(50, 5) + prose(7, 13)], question)
    assert row["dropped"] == {"contaminated": 1}
    report = (tmp_path / "data/report.md").read_text()
    assert "3 evaluation texts, 2 shorter than 13 words" in report and "1 contaminated documents" in report


def test_a_text_file_of_evaluation_is_one_text(tmp_path, tokenizer):
    (tmp_path / "evals.txt").write_text(prose(7, 20))
    data = corpus_of(tmp_path, tokenizer, [source(tmp_path, "s", texts(20))],
                     decontaminate={"files": [str(tmp_path / "evals.txt")]})  # fmt: skip
    build_corpus(data, **quiet)
    assert "decontamination: 1 evaluation texts, 0 shorter" in (tmp_path / "data/report.md").read_text()


@pytest.mark.parametrize(("documents", "dropped"), [(3, 3), (4, 0)])
def test_a_phrase_in_many_documents_is_ignored(tmp_path, tokenizer, documents, dropped):
    phrase = prose(8, 13)
    written = [*texts(20), *(f"{text}{phrase}\n{phrase}" for text in texts(documents, 300))]
    row = decontaminated(tmp_path, tokenizer, written, phrase, ignore_if_in_docs=3)
    assert row["dropped"] == ({"contaminated": dropped} if dropped else {})
    assert f"{0 if dropped else 1} common n-grams ignored" in (tmp_path / "data/report.md").read_text()


def test_report_alone_keeps_and_counts(tmp_path, tokenizer):
    question = prose(7, 20)
    row = decontaminated(tmp_path, tokenizer, [*texts(20), sentences(50, 5) + question], question, action="report")
    assert row["kept"] == 21 and not row["dropped"]
    assert "1 contaminated documents" in (tmp_path / "data/report.md").read_text()


def test_copies_of_a_leaked_document_do_not_hide_it(tmp_path, tokenizer):
    question = prose(7, 20)
    written = [*texts(20), *[sentences(50, 5) + question] * 12]
    row = decontaminated(tmp_path, tokenizer, written, question)
    assert row["dropped"] == {"exact duplicate": 11, "contaminated": 1}
    assert not any(question in text for text in all_texts(tmp_path / "data"))


# ---- paragraphs and boilerplate -------------------------------------------------------------------------------------


def test_the_second_copy_of_a_long_paragraph_is_cut_and_a_short_one_stays(tmp_path, tokenizer):
    long, short = prose(3, 20), "See also the other page."
    written = [f"{sentences(i, 10)}\n{long if i != 31 else long.upper()}\n\n{short}" for i in (30, 31, 32)]
    data = corpus_of(tmp_path, tokenizer, [source(tmp_path, "a", texts(20)), source(tmp_path, "b", written)],
                     dedup={"near": False, "paragraphs": 20})  # fmt: skip
    assert build_corpus(data, **quiet)["counts"]["dropped"] == 0
    found = all_texts(tmp_path / "data")
    assert sum(long.upper() in text.upper() for text in found) == 1 and sum(short in text for text in found) == 3
    first = next(text for text in found if long in text)
    assert first == written[0].strip("\n")
    assert f"{sentences(32, 10)}\n{short}" in found
    assert "2 paragraphs cut out" in (tmp_path / "data/report.md").read_text()


def test_a_paragraph_of_a_dropped_document_counts_for_nothing(tmp_path, tokenizer):
    long = prose(3, 20)
    written = [f"{GERMAN * 9}\n\n{long}", f"{sentences(40, 20)}\n{long}", *texts(20)]
    data = corpus_of(tmp_path, tokenizer, [source(tmp_path, "s", written)], dedup={"near": False, "paragraphs": 20},
                     filter={"language": {"keep": ["en"]}})  # fmt: skip
    assert build_corpus(data, **quiet)["funnel"]["s"]["dropped"] == {"language": 1}
    assert sum(long in text for text in all_texts(tmp_path / "data")) == 1


def pages(number: int) -> list[str]:
    """Return pages with a line that all share, one that all but one share, and three that look like code or a menu."""
    shared = ["Sign in to read more", "    return the_result of it", "Menu here", "Subscribenowandforever"]
    return [
        "\n".join([sentences(i, 10), *shared, "Only some pages say this" if i else "This page does not"])
        for i in range(number)
    ]


def test_lines_that_stand_on_many_web_pages_go(tmp_path, tokenizer):
    off = {"rules": dict.fromkeys(PROFILES["web"], False)}
    sources = [source(tmp_path, "web", pages(20), profile="web"), source(tmp_path, "rest", pages(20))]
    data = corpus_of(tmp_path, tokenizer, sources, filter=off, dedup={"exact": False, "near": False})
    build_corpus(data, **quiet)
    for i in range(1, 21):
        web, rest = (explain_document(data, f"{name}/{name}.jsonl:{i}")["text"] for name in ("web", "rest"))
        assert rest == pages(20)[i - 1] and "Sign in" not in web
        assert web == rest.replace("Sign in to read more\n", "")
    report = (tmp_path / "data/report.md").read_text()
    assert "20 lines removed that many pages share: 'Sign in to read more' on 20 pages" in report
    assert report.count("that many pages share") == 1
    for least, there in ((21, 20), (None, 20), (19, 0)):
        changed = data.model_copy(update={"clean": data.clean.model_copy(update={"boilerplate_min_docs": least})})
        build_corpus(changed, **quiet)
        web = [explain_document(changed, f"web/web.jsonl:{i}")["text"] for i in range(1, 21)]
        assert sum("Sign in" in text for text in web) == there
        assert sum("Only some pages say this" in text for text in web) == (0 if least == 19 else 19)


# ---- large files in pieces ------------------------------------------------------------------------------------------


def write_large(folder: Path, kind: str, records: list[dict]) -> Path:
    path = folder / f"large.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=5)
    else:
        lines = [json.dumps(record) for record in records]
        path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_large_file_in_pieces_gives_what_it_gives_as_one(tmp_path, tokenizer, monkeypatch, kind):
    records = [{"text": text} for text in texts(40)]
    records[7] = records[33] = {"text": None}
    records[20] = {"text": records[1]["text"].upper()}
    path = write_large(tmp_path, kind, records)
    one, several, workers = (
        corpus_of(tmp_path, tokenizer, [{"name": "s", "path": str(path)}], dir=str(tmp_path / name), workers=number,
                  on_error={"max_bad_fraction": 0.5}, dedup={"near": {}})
        for name, number in (("one", 1), ("several", 1), ("workers", 2))
    )  # fmt: skip
    manifests = [build_corpus(one, **quiet)]
    monkeypatch.setattr("llmkit.corpus.units.UNIT_BYTES", 2500)
    manifests += [build_corpus(several, **quiet), build_corpus(workers, **quiet)]
    assert len(list((tmp_path / "one/parts").glob("*.scores.npy"))) == 1
    assert len(list((tmp_path / "several/parts").glob("*.scores.npy"))) > 4
    assert manifests[0]["counts"] == manifests[1]["counts"] == {"read": 40, "quarantined": 2, "kept": 37, "dropped": 1}
    found = [split_texts(tmp_path / name) for name in ("one", "several")]
    assert found[0]["train"] == found[1]["train"] and found[0]["val"] == found[1]["val"]
    shards = [
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name / "tokens").rglob("*.*")}
        for name in ("several", "workers")
    ]
    assert shards[0] == shards[1] and len(shards[0]) > 4
    assert manifests[1]["fingerprint"] == manifests[2]["fingerprint"] and manifests[2]["workers"] == 2
    bad = [(tmp_path / name / "quarantine.jsonl").read_text() for name in ("one", "several", "workers")]
    assert bad[0] == bad[1] == bad[2] and [json.loads(line)["line"] for line in bad[0].splitlines()] == [8, 34]


def test_bad_lines_of_pieces_have_their_place_in_the_file(tmp_path, tokenizer, monkeypatch):
    lines = [json.dumps({"text": text}) for text in texts(30, lines=4)]
    for i in (0, 9, 10, 22, 29):
        lines[i] = "{bad json" + "!" * i
    lines.insert(15, "")
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    expected = [(i + 1, sum(len(one) + 1 for one in lines[:i])) for i, line in enumerate(lines) if line[:2] == "{b"]
    for size in (100, 777, 2000, 10**9):
        monkeypatch.setattr("llmkit.corpus.units.UNIT_BYTES", size)
        data = corpus_of(tmp_path, tokenizer, [{"name": "s", "path": str(tmp_path / "a.jsonl")}],
                         on_error={"max_bad_fraction": 0.5}, dir=str(tmp_path / f"d{size}"))  # fmt: skip
        assert build_corpus(data, **quiet)["counts"]["read"] == 30
        bad = [json.loads(line) for line in (Path(data.dir) / "quarantine.jsonl").read_text().splitlines()]
        assert [(one["line"], one["offset"]) for one in bad] == expected


def test_a_broken_row_group_of_a_piece_has_its_place_in_the_file(tmp_path, tokenizer, monkeypatch):
    path, written = tmp_path / "a.parquet", [prose(i, 100) for i in range(40)]
    pq.write_table(pa.table({"text": written}), path, row_group_size=10, use_dictionary=False)
    content, start = bytearray(path.read_bytes()), pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    content[start : start + 60] = b"\xff" * 60
    path.write_bytes(content)
    monkeypatch.setattr("llmkit.corpus.units.UNIT_BYTES", 5000)
    data = corpus_of(tmp_path, tokenizer, [{"name": "s", "path": str(path)}], on_error={"max_bad_fraction": 0.5})
    assert build_corpus(data, **quiet)["counts"]["kept"] == 30
    (bad,) = (tmp_path / "data/quarantine.jsonl").read_text().splitlines()
    assert json.loads(bad)["line"] == 21


# ---- changes of few files -------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path) -> Path:
    """Write 400 files in folders; return the one that holds them."""
    for i, text in enumerate(texts(400, lines=3)):
        path = tmp_path / "in" / f"{i // 40:02d}" / f"{i:03d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "in"


CHANGES = {
    "changed": lambda folder: (folder / "02/099.txt").write_text("The river is small and the code is large.\n" * 3),
    "grown": lambda folder: (folder / "07/300.txt").write_text(sentences(7, 30)),
    "emptied": lambda folder: (folder / "03/150.txt").write_text("The.\n"),
    "added early": lambda folder: (folder / "00/000a.txt").write_text(sentences(401, 3)),
    "added first": lambda folder: (folder / "0.txt").write_text(sentences(402, 3)),
    "added last": lambda folder: (folder / "99.txt").write_text(sentences(403, 3)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_one_file_redoes_at_most_two_units(folders, tmp_path, tokenizer, monkeypatch, change):
    monkeypatch.setattr("llmkit.corpus.units.UNIT_BYTES", 4000)
    data = corpus_of(tmp_path, tokenizer, [{"name": "s", "path": str(folders)}])
    build_corpus(data, **quiet)
    before, encoded = measured(data), shards(data)
    assert len(before) > 4 * 15
    change(folders)
    build_corpus(data, **quiet)
    after = measured(data)
    again = {name.partition(".")[0] for name, stamp in after.items() if before.get(name) != stamp}
    assert 1 <= len(again) <= 2 and len(after) > 4 * 15
    assert sum(encoded.get(name) != stamp for name, stamp in shards(data).items()) <= 2 * 2  # of both splits
    elsewhere = corpus_of(tmp_path, tokenizer, [{"name": "s", "path": str(folders)}], dir=str(tmp_path / "new"))
    build_corpus(elsewhere, **quiet)
    assert {path.name for path in (tmp_path / "new/tokens").rglob("*")} == {
        path.name for path in (tmp_path / "data/tokens").rglob("*")
    }


def test_a_changed_file_changes_groups_of_at_most_twice_their_bound(monkeypatch):
    draw, redone = random.Random(5), []

    def groups(files: dict[str, int]) -> set[tuple]:
        names = sorted(files)
        sizes = [files[name] for name in names]
        spans = list(cut_by_names(names, sizes, 1000))
        assert spans[0][0] == 0 and [stop for _, stop in spans] == [*(start for start, _ in spans[1:]), len(names)]
        assert all(sum(sizes[a:b]) <= 1000 or b - a == 1 for a, b in spans)
        return {tuple((name, files[name]) for name in names[a:b]) for a, b in spans}

    for _ in range(300):
        files = {f"{draw.random():.6f}": draw.choice([1, 20, 50, draw.randint(0, 1500)]) for _ in range(200)}
        before, old, size = groups(files), draw.choice(list(files)), draw.randint(0, 1500)
        less, more = files[old] // 2, files[old] + size
        for change in ({f"{draw.random():.6f}": size}, {old: more}, {old: less}):
            new = groups(files | change) - before
            assert sum(size for group in new for _, size in group) <= 2 * 1000 + max(change.values())
            redone.append(len(new))
        assert redone[-1] <= 1  # a group whose file has shrunk is cut no further
    assert np.mean(redone) < 2


def test_a_limit_counts_documents_of_the_whole_source(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("llmkit.corpus.units.UNIT_BYTES", 2000)
    sources = [source(tmp_path, "s", texts(30), limit=17)]
    assert build_corpus(corpus_of(tmp_path, tokenizer, sources), **quiet)["counts"]["read"] == 17


@pytest.mark.parametrize("name", ["web.2024-30", "wiki.jsonl", "a.bin", "x.idx-2"])
def test_a_source_may_have_any_name_that_the_schema_allows(tmp_path, tokenizer, name):
    data = corpus_of(tmp_path, tokenizer, [source(tmp_path, "s", texts(25)) | {"name": name}])
    build_corpus(data, **quiet)
    assert len(all_texts(tmp_path / "data")) == 25


# ---- trials, stories, reports ---------------------------------------------------------------------------------------


@pytest.fixture
def told(tmp_path, tokenizer) -> Path:
    """Write tmp_path/c.yaml, the config of a source with three drops."""
    written = texts(20)
    written += [written[2], written[3] + "The end.\n", "Only the model reads."]
    values = tiny_config(tmp_path)
    values["data"] |= {
        "tokenizer": tokenizer, "sources": [source(tmp_path, "s", written)], "dedup": {"near": {}},
        "filter": {"rules": {"words": {"low": 10}}},
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def test_a_trial_prints_drops_and_writes_nothing(told, capsys):
    out, _ = run_main(capsys, "data", "build", told / "c.yaml", "--dry-run", "100")
    assert "s 23 0 3 20 -" in " ".join(out.split()) and "by `words`" in out and "by `exact duplicate`" in out
    assert not (told / "data").exists()
    out, _ = run_main(capsys, "data", "build", told / "c.yaml", "--dry-run", "21")
    assert "s 21 0 1 20 -" in " ".join(out.split()) and not (told / "data").exists()
    run_main(capsys, "data", "build", told / "c.yaml")
    before = stamps(told / "data", "**/*")
    run_main(capsys, "data", "build", told / "c.yaml", "--dry-run", "5", "-o", "data.split.val_fraction=0.5")
    assert stamps(told / "data", "**/*") == before


def test_a_document_tells_its_story(told, capsys):
    _, err = run_main(capsys, "data", "inspect", told / "c.yaml", "--id", "s/s.jsonl:1", code=DATA)
    assert "this data is not built" in err and "llmkit data build" in err
    run_main(capsys, "data", "build", told / "c.yaml")
    inspect = ("data", "inspect", told / "c.yaml", "--json", "--id")
    kept, dropped, copy, near = (
        json.loads(run_main(capsys, *inspect, f"s/s.jsonl:{line}")[0]) for line in (1, 23, 21, 4)
    )
    assert kept["fate"] in ("kept, in the train split", "kept, in the val split") and "why" not in kept
    assert kept["text"] == sentences(0, 15).strip() and kept["scores"]["words"].endswith("  (low 10)")
    assert (dropped["fate"], dropped["why"], dropped["scores"]["words"]) == ("words", "words 4 < 10", "4  (low 10)")
    assert (copy["fate"], copy["instead"]) == ("exact duplicate", "s/s.jsonl:3") and "instead" not in dropped
    assert (near["fate"], near["instead"]) == ("near duplicate", "s/s.jsonl:22")
    plain, _ = run_main(capsys, "data", "inspect", told / "c.yaml", "--id", "s/s.jsonl:23")
    assert "words 4 < 10" in plain and plain.endswith("Only the model reads.\n")


@pytest.mark.parametrize(
    ("id", "fix"),
    [("s/s.jsonl:99", "ids are printed by"), ("t/s.jsonl:1", "ids are printed by"), ("", None), ("news/a", "ids are")],
)
def test_an_unknown_id_is_an_error(told, capsys, id, fix):
    run_main(capsys, "data", "build", told / "c.yaml")
    if id:
        _, err = run_main(capsys, "data", "inspect", told / "c.yaml", "--id", id, code=DATA)
        assert "no document has this id" in err and fix in err


def test_samples_of_what_was_kept_and_dropped(told, capsys):
    run_main(capsys, "data", "build", told / "c.yaml")

    def shown(*arguments: object) -> list[dict]:
        return json.loads(run_main(capsys, "data", "inspect", told / "c.yaml", "--json", *arguments)[0])["documents"]

    assert sorted(one["why"] for one in shown("--dropped", 10)) == ["exact duplicate", "near duplicate", "words 4 < 10"]
    assert len(shown("--dropped", 2)) == 2
    assert [one["id"] for one in shown("--dropped", 10, "--rule", "words")] == ["s/s.jsonl:23"]
    assert shown("--dropped", 10, "--rule", "language") == []
    kept = shown("--kept", 7)
    assert len(kept) == 7 and {one["why"] for one in kept} <= {"train", "val"} and kept == shown("--kept", 7)
    assert len(shown("--kept", 100)) == 20 and len(shown("--kept", 1, "--dropped", 1)) == 2
    plain, _ = run_main(capsys, "data", "inspect", told / "c.yaml", "--dropped", 10)
    assert "--- s/s.jsonl:23: words 4 < 10\nOnly the model reads." in plain
    _, err = run_main(capsys, "data", "inspect", told / "c.yaml", "--dropped", 5, "--rule", "wrods", code=2)
    assert "no such reason to drop" in err and "did you mean words?" in err
    _, err = run_main(capsys, "data", "inspect", told / "c.yaml", "--dropped", 5, "--rule", "train", code=2)
    assert "no such reason to drop" in err


def test_a_rule_without_a_number_of_documents_is_an_error(told, capsys):
    run_main(capsys, "data", "build", told / "c.yaml")
    run_main(capsys, "data", "inspect", told / "c.yaml", "--rule", "words", code=2)


def test_the_report_is_printed_again(told, capsys):
    built, _ = run_main(capsys, "data", "build", told / "c.yaml")
    again, _ = run_main(capsys, "data", "report", told / "data")
    assert again.startswith("Data report") and built.startswith(again.rstrip("\n"))
    as_json = json.loads(run_main(capsys, "data", "report", told / "data", "--json")[0])
    assert as_json["counts"] == {"read": 23, "quarantined": 0, "kept": 20, "dropped": 3}
    _, err = run_main(capsys, "data", "report", told, code=DATA)
    assert "there is no built data" in err


# ---- mixtures -------------------------------------------------------------------------------------------------------

WEIGHTS = [[1.0, 1.0], [3, 1], [0.7, 0.3], [1e-3, 1], [5, 3, 2], [0.5, 0.001, 0.2], [1, 2, 3, 4, 5]]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_shares_of_a_mixture_are_exact(weights):
    mixture = Mixture([10] * len(weights), weights)
    drawn = [mixture.turn_at(position) for position in range(SLOTS)]
    counts = np.bincount([one for one, _ in drawn], minlength=len(weights))
    assert sum(mixture.shares()) == 1 and counts.tolist() == [round(share * SLOTS) for share in mixture.shares()]
    assert (abs(counts - np.array(weights) / sum(weights) * SLOTS) < 1).all()
    for number, size in enumerate(counts):  # turns count up from 0, and go on in the next round
        assert [turn for one, turn in drawn if one == number] == list(range(size))
    assert mixture.turn_at(SLOTS) == (drawn[0][0], drawn[0][1] + counts[drawn[0][0]])


def most_off(weights: list[float], size: int) -> float:
    """Return the largest difference between a batch's and a source's share, over all beginnings."""
    mixture = Mixture([10] * len(weights), weights)
    order = np.concatenate([mixture.sources, mixture.sources[:size]])
    counts = np.cumsum([np.append(0, order == number) for number in range(len(weights))], axis=1)
    return float(abs(counts[:, size:] - counts[:, :-size] - size * np.array(mixture.shares())[:, None]).max())


def test_every_batch_of_two_sources_has_its_share_of_both():
    draw = random.Random(0)
    pairs = [weights for weights in WEIGHTS if len(weights) == 2] + [[draw.random(), draw.random()] for _ in range(20)]
    assert max(most_off(weights, 64) for weights in pairs) <= 1


def test_every_batch_of_many_sources_has_nearly_its_share_of_all():
    draw = random.Random(0)
    many = [[draw.random() for _ in range(3 + i % 3)] for i in range(30)]
    assert max(most_off(weights, 64) for weights in many) <= 2


def test_no_source_of_a_mixture_is_left_out():
    assert min(Mixture([10, 10, 10], [1, 1e-9, 1e-9]).slots) == 1


def streams_of(folder: Path, lengths: list[int]) -> list[TokenStream]:
    """Return a stream of each length whose tokens are unique: those of source i start at i * 10,000."""
    made = []
    for i, length in enumerate(lengths):
        with ShardWriter(folder / f"s{i}", token_dtype(60_000)) as shard:
            shard.add(np.arange(length) + i * 10_000)
        made.append(TokenStream([shard.path], token_dtype(60_000)))
    return made


@pytest.mark.parametrize("weights", [[3, 1], [5, 3, 2]])
def test_ranks_together_see_the_global_batch_of_a_mixture(tmp_path, weights):
    streams = streams_of(tmp_path, [400, 90, 250][: len(weights)])
    mixture = Mixture([samples_in(stream, 8) for stream in streams], weights)

    def rows(step: int, world: int) -> list[list[int]]:
        parts = [
            corpus_batches(streams, 8, 16, mixture=mixture, seed=5, rank=rank, world=world).batch_at(step)
            for rank in range(world)
        ]
        return sorted(chain(*(part.input_ids.tolist() for part in parts)))

    for step in (0, 7, 40, SLOTS // 16):
        whole = rows(step, 1)
        assert len(whole) == 16 and all(rows(step, world) == whole for world in (2, 4, 8))
    assert rows(0, 1) != rows(1, 1)


@pytest.mark.parametrize("weights", [[3, 1], [1, 6, 2]])
def test_samples_of_a_source_come_once_an_epoch_of_its_own(tmp_path, weights):
    lengths = [400, 90, 250][: len(weights)]
    streams = streams_of(tmp_path, lengths)
    mixture = Mixture([samples_in(stream, 8) for stream in streams], weights)
    batches = corpus_batches(streams, 8, 8, mixture=mixture, seed=5)
    first = np.concatenate([batches.batch_at(step).input_ids[:, 0] for step in range(120)])
    for number, length in enumerate(lengths):
        samples = (length - 1) // 8
        drawn = first[first // 10_000 == number] % 10_000 // 8
        epochs = [drawn[i : i + samples].tolist() for i in range(0, len(drawn) - samples + 1, samples)]
        assert len(epochs) > 1 and all(sorted(epoch) == list(range(samples)) for epoch in epochs)
        assert epochs[0] != epochs[1]


def mixed(folder: Path, tokenizer: dict, weights: list[float | None], documents=(20, 20), **sections) -> Path:
    """Write the config of sources a and b, and return its file."""
    values = tiny_config(folder, run_dir=str(folder / "run"), **sections)
    sources = [
        source(folder, name, texts(number, i * 100), **({"weight": weight} if weight else {}))
        for i, (name, number, weight) in enumerate(zip("ab", documents, weights, strict=True))
    ]
    values["data"] |= {"tokenizer": tokenizer, "sources": sources}
    (folder / "c.yaml").write_text(yaml.safe_dump(values))
    return folder / "c.yaml"


def test_too_many_epochs_of_a_source_name_the_figures(tmp_path, tokenizer):
    path = mixed(tmp_path, tokenizer, [1.0, 3.0], documents=(20, 8))
    config = load_config(path, ["data.sources.1.max_epochs=0.5"])
    with pytest.raises(UserError, match="source b would be read for more epochs than its max_epochs") as caught:
        prepare(config, start_world(), **quiet)
    error = caught.value
    free = prepare(load_config(path), start_world(), **quiet)
    epochs = 0.75 * 20 * 8 / free.data.shares["b"][1]  # its share of 20 steps of 8
    assert error.got == f"{epochs:.2f} epochs" and error.expected == "at most 0.5" and error.code == DATA
    assert error.at == "-o data.sources.1.max_epochs=0.5"
    most = int(20 * 0.5 / epochs)
    assert f"train at most {most} steps" in error.fix and f"at most {0.75 * 0.5 / epochs:.3g} of all" in error.fix
    prepare(load_config(path, ["data.sources.1.max_epochs=0.5", f"train.max_steps={most}"]), start_world(), **quiet)
    with pytest.raises(UserError, match="more epochs"):
        more = ["data.sources.1.max_epochs=0.5", f"train.max_steps={most + 1}"]
        prepare(load_config(path, more), start_world(), **quiet)


def test_epochs_without_weights_are_those_of_everything(tmp_path, tokenizer):
    path = mixed(tmp_path, tokenizer, [None, None])
    run = prepare(load_config(path), start_world(), **quiet)
    epochs = 20 * 8 / run.data.samples["train"]
    assert "mixture" not in describe(run)
    prepare(load_config(path, [f"data.sources.0.max_epochs={epochs + 0.01}"]), start_world(), **quiet)
    with pytest.raises(UserError, match="source a would be read for more epochs"):
        prepare(load_config(path, [f"data.sources.0.max_epochs={epochs - 0.01}"]), start_world(), **quiet)


def test_weights_of_some_sources_only_are_an_error(tmp_path, tokenizer):
    with pytest.raises(UserError, match="some sources have a weight and some have none") as caught:
        load_config(mixed(tmp_path, tokenizer, [1.0, None]))
    assert caught.value.got == "none: b"


@pytest.mark.parametrize("rules", [{}, {"words": {"low": 12}}])
def test_a_source_without_one_sample_is_an_error(tmp_path, tokenizer, rules):
    path = mixed(tmp_path, tokenizer, [1.0, 1.0])
    source(tmp_path, "b", ["The model reads."])
    with pytest.raises(UserError, match="source b has a weight, but no sample") as caught:
        prepare(load_config(path, [f"data.filter.rules={json.dumps(rules)}"]), start_world(), **quiet)
    assert caught.value.code == DATA and (caught.value.got == "0 tokens; dropped 1 by words") == bool(rules)


def test_the_header_shows_the_mixture_and_training_draws_it(tmp_path, tokenizer):
    run = prepare(load_config(mixed(tmp_path, tokenizer, [1.0, 3.0])), start_world(), **quiet)
    (a, b) = (run.data.shares[name][1] for name in "ab")
    sizes = run.data.summary.partition(", vocabulary")[0]
    assert re.fullmatch(r"\S+: [\d.]+k train and [\d.]+k? val tokens, 40 of 40 documents kept", sizes)
    assert describe(run)["mixture"] == f"a 25.0% x {40 / a:.2f}, b 75.0% x {120 / b:.2f}"
    decode, seen = run.data.tokenizer.decode, {"a": 0, "b": 0}
    known = {name: "\n".join(texts(20, i * 100)) for i, name in enumerate("ab")}
    for step in range(5):
        for row in run.batches("train", 8).batch_at(step).input_ids:
            longest = max(decode(row).split("<|endoftext|>"), key=len).strip()
            seen[next(name for name in known if longest in known[name])] += 1
    assert seen == {"a": 10, "b": 30}


def test_a_run_of_a_mixture_with_document_masks_can_be_evaluated(tmp_path, tokenizer):
    config = mixed(tmp_path, tokenizer, [3, 1])
    train(
        load_config(config, ["data.document_mask=true", "train.max_steps=2", "eval.every=2", "checkpoint.every=2"]),
        **quiet,
    )
    figures = measure(
        locate(str(tmp_path / "run")), data=None, window=None, stride=None, batch_size=4, precision="fp32"
    )
    assert figures["loss"] > 0 and "in one stream" in figures["data"]


def test_a_build_that_found_its_parts_claims_no_speed(tmp_path, tokenizer):
    data = corpus_of(tmp_path, tokenizer, [source(tmp_path, "s", texts(12))])
    build_corpus(data, **quiet)
    assert "per CPU-second" in (tmp_path / "data/report.md").read_text()
    (tmp_path / "data/manifest.json").unlink()
    build_corpus(data, **quiet)
    again = (tmp_path / "data/report.md").read_text()
    assert "per CPU-second" not in again and "the rest was reused" in again and "rules" not in again


@pytest.mark.parametrize("keys", [{"streaming": True}, {"revision": "main"}])
def test_options_that_mean_nothing_to_local_files_are_refused(tmp_path, tokenizer, keys):
    (tmp_path / "rows").mkdir()
    source(tmp_path / "rows", "train", texts(3))
    data = corpus_of(tmp_path, tokenizer, [{"name": "rows", "hf": str(tmp_path / "rows"), **keys}])
    with pytest.raises(UserError, match="have no effect on local files"):
        build_corpus(data, **quiet)


def test_other_languages_to_keep_change_the_reasons_that_are_shown(tmp_path, tokenizer):
    for keep in (["en"], ["en", "fr"]):
        rules = {"language": {"keep": keep, "min_score": 0.0}}
        data = corpus_of(tmp_path, tokenizer, [source(tmp_path, "s", [GERMAN * 5, *texts(12)])], filter=rules)
        build_corpus(data, **quiet)
        assert f"not {', '.join(keep)}" in (tmp_path / "data/report.md").read_text()


def test_the_tail_of_a_long_line_is_no_more_than_was_asked_for():
    train_text, val_text = split_text("Title\n" + "word " * 2000, TRAIN, 0.1, by_tail=True)
    assert 0.09 < len(val_text) / len(train_text + val_text) < 0.21


def test_a_paragraph_stays_somewhere_though_the_document_it_first_stood_in_goes(tmp_path, tokenizer):
    one, *others = (prose(i, 30) for i in range(6))
    written = ["\n\n".join([prose(10, 30), *others]), "\n\n".join([*others, one]), f"{one}\n\n{prose(11, 60)}"]
    dedup = {"near": False, "paragraphs": 20}
    data = corpus_of(tmp_path, tokenizer, [source(tmp_path, "s", written)], dedup=dedup, split={"val_fraction": 0.001})
    manifest = build_corpus(data, **quiet)
    assert manifest["funnel"]["s"]["dropped"] == {"repeated paragraphs": 1}
    assert sum(text.count(one) for text in all_texts(tmp_path / "data")) >= 1


def test_a_run_with_other_weights_is_not_resumed(tmp_path, tokenizer):
    path = mixed(tmp_path, tokenizer, [1.0, 3.0], train={"max_steps": 4})
    train(load_config(path), **quiet)
    with pytest.raises(UserError, match="another config"):
        train(load_config(path, ["data.sources.0.weight=2.0", "train.max_steps=6"]), **quiet)
    train(load_config(path, ["train.max_steps=6"]), **quiet)


def test_where_data_was_built_is_nothing_to_a_run(corpus, tmp_path):
    values = tiny_config(corpus, run_dir=str(tmp_path / "run"), train={"max_steps": 2}, checkpoint={"every": 2})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    train(load_config(tmp_path / "c.yaml"), **quiet)
    for change in (["data.workers=2"], ["data.workers=auto", "data.cluster=tcp://127.0.0.1:1"]):
        train(load_config(tmp_path / "c.yaml", [*change, "train.max_steps=3"]), **quiet)


# ---- rows whose documents do not see each other ---------------------------------------------------------------------


def documents_of(folder: Path, lengths: list[int], shards: int) -> tuple[TokenStream, np.ndarray, np.ndarray]:
    """Return a stream over some shards, its tokens, and each token's document number."""
    draw = np.random.default_rng(3)
    documents = [draw.integers(1, 61, length) for length in lengths]
    paths = []
    for number, part in enumerate(np.array_split(np.arange(len(lengths)), shards)):
        with ShardWriter(folder / f"{number}", token_dtype(61)) as shard:
            for i in part:
                shard.add(documents[i])
        paths.append(shard.path)
    return TokenStream(paths, token_dtype(61)), np.concatenate(documents), np.repeat(np.arange(len(lengths)), lengths)


LENGTHS = [5, 1, 30, 8, 8, 2, 1, 1, 16, 3, 17, 40, 9, 7, 12, 1]


@pytest.mark.parametrize("shards", [1, 3, len(LENGTHS)])
@pytest.mark.parametrize("seq_len", [1, 8, 15, 160])
def test_segments_and_positions_begin_anew_with_each_document(tmp_path, shards, seq_len):
    stream, tokens, owner = documents_of(tmp_path, LENGTHS, shards)
    batches = corpus_batches([stream], seq_len, 4, document_mask=True, seed=0)
    row = 0
    for batch in batches.in_order():
        for ids, labels, positions, segments in zip(
            batch.input_ids, batch.labels, batch.positions, batch.segments, strict=True
        ):
            at = row * seq_len + np.arange(seq_len)
            assert (ids == tokens[at]).all()
            same = owner[at] == owner[at + 1]
            assert (labels == np.where(same, tokens[at + 1], IGNORE_INDEX)).all()
            assert (segments == owner[at] - owner[at[0]]).all()
            begins = [at[owner[at] == one].min() for one in owner[at]]
            assert (positions == at - begins).all()
            row += 1
    assert row == (len(tokens) - 1) // seq_len


def test_without_the_mask_every_token_but_the_first_is_a_label(tmp_path):
    stream, *_ = documents_of(tmp_path, LENGTHS, 3)
    batch = corpus_batches([stream], 20, 100, seed=0).batch_at(0)
    assert batch.positions is None and batch.segments is None and not (batch.labels == IGNORE_INDEX).any()


@torch.no_grad()
def test_a_document_in_a_masked_row_has_the_logits_that_it_has_alone(tmp_path):
    model = build_model(llama.Config(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                     max_position_embeddings=64), seed=1).eval()  # fmt: skip
    for parameter in model.parameters():
        parameter.mul_(4)
    stream, *_ = documents_of(tmp_path, LENGTHS, 2)
    batch = next(corpus_batches([stream], 48, 3, document_mask=True, seed=0).in_order())
    inputs = {name: torch.from_numpy(array) for name, array in batch.arrays().items() if name != "labels"}
    together, blended = model(**inputs), model(inputs["input_ids"])
    for row, (ids, segments) in enumerate(zip(inputs["input_ids"], inputs["segments"], strict=True)):
        for number in segments.unique():
            here = segments == number
            alone = model(ids[here][None])[0]
            torch.testing.assert_close(together[row, here], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together, blended, atol=1e-2)


def test_a_run_with_a_document_mask_trains(corpus, tmp_path):
    values = tiny_config(corpus, run_dir=str(tmp_path / "masked"), train={"max_steps": 10})
    values["data"] |= {"document_mask": True}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    masked = json.loads(llmkit("pretrain", "c.yaml", "--json", cwd=tmp_path).stdout.splitlines()[-1])
    plain = ["data.document_mask=false", f"run_dir={tmp_path / 'plain'}"]
    other = train(load_config(tmp_path / "c.yaml", plain), **quiet)
    assert masked["steps"] == other["steps"] == 10 and masked["best_val_loss"] != other["best_val_loss"]
    with pytest.raises(UserError, match="another config"):
        train(load_config(tmp_path / "c.yaml", plain[:1]), **quiet)
