"""Config errors name the key, the file and the line, all at once; YAML means what people mean."""

import random
from pathlib import Path

import pytest
import yaml
from conftest import tiny_config

from llmkit.config.load import load_config
from llmkit.config.schema import Config
from llmkit.config.yaml import (
    PLAIN,
    FastLoader,
    Loader,
    compose,
    dump_yaml,
    merge,
    parse_yaml,
    quote,
    set_override,
)
from llmkit.errors import UserError
from llmkit.models import FAMILIES
from llmkit.training.plan import plan_config
from llmkit.training.resolve import check_choices

GOOD = "model: {name: llama}\ndata: {kind: corpus, dir: x}\ntrain: {max_steps: 10}\n"


def load(tmp_path, text: str, *overrides: str) -> Config:
    path = tmp_path / "c.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_config(path, list(overrides))


def problems(tmp_path, text: str, *overrides: str) -> list[UserError]:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *overrides)
    assert caught.value.code == 2
    return [caught.value, *caught.value.others]


def test_numbers_as_people_write_them():
    values, _ = parse_yaml("a: 1e-5\nb: 3.0e-4\nc: 'no'\nd: true\ne: 1_000\nf: .5\ng: 1e6", "x")
    assert values == {"a": 1e-5, "b": 3e-4, "c": "no", "d": True, "e": 1000, "f": 0.5, "g": 1e6}


@pytest.mark.parametrize(
    "trap",
    [
        "010", "-07", "0_7", "0x10", "0XfF", "0b1", "0o17", "1:30", "1:30:00", "190:20:30.15", "yes", "No", "ON", "off",
        "2024-01-01", "2024-1-1", "2001-12-14t21:59:43.10-05:00", "2001-12-14 21:59:43",
    ],
)  # fmt: skip
def test_what_yaml_reads_as_something_else_is_refused_unless_quoted(trap):
    with pytest.raises(UserError) as caught:
        parse_yaml(f"a:\n  - {trap}", "x.yaml")
    assert caught.value.what == "a.0 has two meanings in YAML" and caught.value.at == "x.yaml:2"
    assert "quotes" in caught.value.fix
    assert parse_yaml(f"a: '{trap}'\nb: \"{trap}\"", "x")[0] == {"a": trap, "b": trap}
    with pytest.raises(UserError) as caught:
        set_override({}, {}, f"train.max_steps={trap}")
    assert (caught.value.what, caught.value.at) == (
        "train.max_steps has two meanings in YAML", f"-o train.max_steps={trap}",
    )  # fmt: skip


def test_all_traps_are_told_at_once():
    with pytest.raises(UserError) as caught:
        parse_yaml("a: 010\nb: {c: yes}\nd: 1:30", "x")
    assert len(caught.value.others) == 2


def test_words_that_are_near_to_a_trap_are_read_as_written():
    text = "a: 10.0.0.1\nb: host:80\nc: =\nd: nope\ne: ~\nf: 0\ng: -0.5\nh: 0.10\ni: TRUE\nj: 1-2\nk:\nl: 8000:80"
    assert parse_yaml(text, "x")[0] == {
        "a": "10.0.0.1", "b": "host:80", "c": "=", "d": "nope", "e": None, "f": 0, "g": -0.5, "h": 0.1, "i": True,
        "j": "1-2", "k": None, "l": "8000:80",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('a: "x\\0y"', "a has control characters"), ('a: "\\ud800"', "control characters"),
        ('"a\\eb": 1', "key has control characters"), ("a: &x {b: 1}\nc: {<<: *x}", "merge key"),
        ("a: !!int '010'", "tag"), ("a: !!binary aGk=", "tag"), ("a: !!timestamp 2024-01-01", "tag"),
        ("a: !!set {b, c}", "tag"), ("a: " + "9" * 5000, "too large a number"),
    ],
)  # fmt: skip
def test_yaml_that_no_config_needs_is_refused(text, words):
    with pytest.raises(UserError, match=words) as caught:
        parse_yaml(text, "x")
    assert len(str(caught.value)) < 1000


def read_with(text: str) -> tuple:
    """Return the values and lines of a text, or what is wrong with it."""
    try:
        return parse_yaml(text, "x")
    except UserError as error:
        return error.what, error.at, error.got, error.fix


def test_what_llmkit_writes_is_read_by_the_fast_parser_as_by_the_other(tmp_path, monkeypatch):
    written = dump_yaml(load(tmp_path, GOOD).model_dump())
    assert PLAIN.fullmatch(written) and len(written.splitlines()) > 80
    draw, texts = random.Random(3), [written]
    lines = [
        *written.splitlines(), "a: yes", "- 010", "  b: 1:30", "c: 'it'", "d: {}", "- - x", "e: - x", "f: 2024-01-01",
        "<<: x", "g: 1e-5", "  -", "- a: 1", "  h: .inf", "i: x y", "j: -x", "k: ~", "null: 1", "1: 2", "z: '1e5'",
    ]  # fmt: skip
    for _ in range(3000):
        few = draw.choices(lines, k=draw.randint(1, 8))
        texts.append("".join(f"{' ' * draw.choice([0, 0, 0, 2, 4])}{line}\n" for line in few))
    texts += [written.replace("  ", " " * draw.randint(1, 3), draw.randint(1, 9)) for _ in range(50)]
    fast = [read_with(text) for text in texts]
    loaders = {type(compose(text)[0]) for text in texts if PLAIN.fullmatch(text) and len(read_with(text)) == 2}
    assert loaders == {FastLoader} and sum(bool(PLAIN.fullmatch(text)) for text in texts) > 1000
    monkeypatch.setattr("llmkit.config.yaml.MAX_PLAIN", 0)
    assert {type(compose(text)[0]) for text in texts if len(read_with(text)) == 2} == {Loader}
    assert [read_with(text) for text in texts] == fast
    assert sum(len(one) == 2 for one in fast) > 300 < sum(len(one) == 4 for one in fast)


@pytest.mark.parametrize(
    "text",
    [
        "a: [1]", "a: {b: 1}", "a: &x 1", "a: *x", "a: !!int 1", "a: x  # c", "a:\tb", "- - a", "a: |\n  b", 'a: "\\0"',
        "? a", "a: b: c", "a: b\n  c", "--- a", "\ufeffa: 1",
    ],
)  # fmt: skip
def test_what_only_people_write_is_left_to_the_strict_parser(text):
    assert not PLAIN.fullmatch(text + "\n")


def test_defaults_live_in_the_schema_and_round_trip(tmp_path):
    config = load(tmp_path, GOOD)
    assert config.train.max_grad_norm == 1.0
    assert config.run_dir == "runs/c"
    (tmp_path / "again.yaml").write_text(config.dump())
    assert load_config(tmp_path / "again.yaml").model_dump() == config.model_dump()


def test_unknown_key_has_line_and_suggestion(tmp_path):
    (error,) = problems(tmp_path, GOOD.replace("max_steps: 10", "\n  max_steps: 10,\n  max_stepz: 3"))
    assert error.what == "train.max_stepz is not a key"
    assert str(error.at).endswith("c.yaml:5")
    assert "max_steps" in error.fix


@pytest.mark.parametrize(("kind", "key", "other"), [("corpus", "packing", "sft"), ("sft", "dedup", "corpus")])
def test_a_key_of_the_other_kind_of_data_says_so(tmp_path, kind, key, other):
    where = "dir" if kind == "corpus" else "path"
    (error,) = problems(tmp_path, f"data: {{kind: {kind}, {where}: d, {key}: 1}}\n")
    assert error.what == f"data.{key} is not a key" and error.fix == f"it is a key of data of kind {other}"


def test_all_errors_at_once(tmp_path):
    text = "modle: 1\ndata: {kind: corpus, dir: 3}\n"
    text += "train: {max_steps: three, global_batch_size: true, max_grad_norm: -1}\n"
    found = {error.what for error in problems(tmp_path, text)}
    assert found == {
        "modle is not a key", "data.dir is not valid", "train.max_steps is not valid",
        "train.global_batch_size is not valid", "train.max_grad_norm is not valid",
    }  # fmt: skip


@pytest.mark.parametrize(
    "value", ["three", "10.5", "true", "-1", "0", ".nan", ".inf", "[1]", "'10'"],
)  # fmt: skip
def test_what_is_no_count(tmp_path, value):
    assert problems(tmp_path, GOOD.replace("10", value))[0].what == "train.max_steps is not valid"


def test_habits_from_elsewhere_are_led_home(tmp_path):
    (error,) = problems(tmp_path, GOOD, "train.learning_rate=1e-4")
    assert "optimizer.lr" in error.fix
    assert error.at == "-o train.learning_rate=1e-4"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "empty"), ("- a\n- b", "mapping"), ("a:\n\t- b", "parsed"), ("a: 'b", "parsed"), ("a: 1\na: 2", "twice"),
        ("a: !!python/object:os.system {}", "tag"), ("a: &x [1]\nb: *x\n? [c]\n: 1", "word"),
        (b"\xff\xfe\x00a", "UTF-8"),
    ],
)  # fmt: skip
def test_broken_yaml(tmp_path, text, word):
    assert word in problems(tmp_path, text)[0].what


def test_alias_bomb_is_refused(tmp_path):
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
    assert "too many" in problems(tmp_path, bomb)[0].what


def test_duplicate_key_names_both_lines(tmp_path):
    (error,) = problems(tmp_path, GOOD + "train: {max_steps: 3}\n")
    assert "c.yaml:3 and" in error.at and "c.yaml:4" in error.at


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UserError):
            load_config(path)


def test_conflicts(tmp_path):
    (two,) = problems(tmp_path, GOOD.replace("max_steps: 10", "max_steps: 10, epochs: 1"))
    assert "exactly one length" in two.what
    (none,) = problems(tmp_path, GOOD.replace("max_steps: 10", ""))
    assert "exactly one length" in none.what
    (micro,) = problems(tmp_path, GOOD, "train.micro_batch_size=3")
    assert "multiple" in micro.what
    (model,) = problems(tmp_path, GOOD.replace("model: {name: llama}", ""))
    assert model.what == "there is no model"
    (method,) = problems(tmp_path, GOOD, "peft.name=lora")
    assert method.what == "peft needs a model to start from"
    (patience,) = problems(tmp_path, GOOD, "train.early_stopping_patience=2", "eval.every=null")
    assert patience.what == "train.early_stopping_patience needs evaluations, but eval.every is null"
    (fraction,) = problems(tmp_path, GOOD, "checkpoint.average_fraction=0.3")
    assert fraction.what == "checkpoint.average_fraction has no effect with average: none"
    (kind,) = problems(tmp_path, GOOD.replace("corpus", "korpus"))
    assert kind.what == "data.kind is unknown"


def test_overrides_reach_lists_and_new_sections(tmp_path):
    text = GOOD.replace("dir: x", "dir: x, sources: [{name: a, path: p}]")
    text = text.replace("model: {name: llama}", "init_from: base")
    config = load(tmp_path, text, "data.sources.0.limit=5", "peft={name: lora}", "train.epochs=2")
    assert config.data.sources[0].limit == 5
    assert config.peft.name == "lora"
    assert (config.train.max_steps, config.train.epochs) == (None, 2)
    assert load(tmp_path, text, "train.max_steps=7", "train.epochs=null").train.max_steps == 7
    for wrong in ("nonsense", "data.sources.7.limit=5", "run_dir.a=1"):
        assert problems(tmp_path, text, wrong)


@pytest.mark.parametrize("part", ["\u0663", "\xb2", "9" * 20, "-1", "1e0"])
def test_odd_numbers_in_an_override_are_no_items(tmp_path, part):
    text = GOOD.replace("dir: x", "dir: x, sources: [{name: a, path: p}]")
    assert "has no" in problems(tmp_path, text, f"data.sources.{part}.path=q")[0].what


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", "4294967296"), ("data.seed", "9" * 100), ("train.max_steps", "1000000001"), ("data.seq_len", "1"),
        ("train.global_batch_size", "1000000000"), ("train.max_tokens", "9" * 100), ("train.max_grad_norm", "9" * 400),
        ("data.decontaminate", "{files: [a], ngram: 100000}"), ("data.tokenizer.vocab_size", "9" * 30),
        ("run_dir", "''"), ("data.dir", "' '"), ("init_from", "''"), ("data.tokenizer.path", "''"),
    ],
)  # fmt: skip
def test_numbers_without_sense_and_empty_paths_are_refused(tmp_path, key, value):
    found = problems(tmp_path, GOOD, f"{key}={value}")
    assert found[0].what.startswith(key) and found[0].what.endswith("is not valid") and len(str(found[0])) < 1000


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path):
    text = """
run_dir: ~/r
init_from: ~/m
data:
  kind: corpus
  dir: ~/d
  sources: [{name: a, path: ~/a/*.txt}, {name: b, hf: ~/b}]
  filter: {words: {path: ~/w}, classifier: {path: ~/c, label: x}}
  decontaminate: {files: [~/e, /f/~g]}
  tokenizer: {extend: ~/t}
train: {max_steps: 10}
"""
    config, home = load(tmp_path, text), Path.home()
    data = config.data
    assert [config.run_dir, config.init_from, data.dir] == [f"{home}/r", f"{home}/m", f"{home}/d"]
    assert [data.sources[0].path, data.sources[1].hf] == [f"{home}/a/*.txt", f"{home}/b"]
    assert [data.filter.words.path, data.filter.classifier.path] == [f"{home}/w", f"{home}/c"]
    assert data.decontaminate.files == [f"{home}/e", "/f/~g"] and data.tokenizer.extend == f"{home}/t"
    other = "{kind: sft, path: ~/p, val_path: ~/v, chat_template: ~/j}"
    sft = load(tmp_path, "init_from: m\ntrain: {max_steps: 1}\ndata: " + other).data
    assert [sft.path, sft.val_path, sft.chat_template] == [f"{home}/p", f"{home}/v", f"{home}/j"]
    assert load(tmp_path, GOOD, "run_dir='~'").run_dir == str(home)


def test_sources_have_a_short_form_and_a_corpus_is_the_default_kind(tmp_path):
    text = "data: {dir: d, sources: %s}\nmodel: {name: llama}\ntrain: {max_steps: 1}"
    sources = lambda value: [(one.name, one.path) for one in load(tmp_path, text % value).data.sources]  # noqa: E731
    assert sources("corpora/my docs.d/**/*.md") == [("my-docs", "corpora/my docs.d/**/*.md")]
    mixed = "[{name: text, path: p}, a/text.txt, b/text.jsonl.gz, '*.txt']"
    assert sources(mixed) == [
        ("text", "p"), ("text-2", "a/text.txt"), ("text-3", "b/text.jsonl.gz"), ("text-4", "*.txt"),
    ]  # fmt: skip
    assert problems(tmp_path, text % "[3]")[0].what == "data.sources.0 is not valid"


def test_data_alone_can_be_loaded_but_not_trained_on(tmp_path):
    text = "data: {dir: d, sources: text}"
    (tmp_path / "c.yaml").write_text(text)
    assert load_config(tmp_path / "c.yaml", for_training=False).data.kind == "corpus"
    assert {error.what for error in problems(tmp_path, text)} == {"train needs exactly one length", "there is no model"}


def test_a_corpus_for_a_model_takes_its_tokenizer(tmp_path):
    text = "init_from: runs/base\ndata: {dir: d, sources: text}\ntrain: {max_steps: 1}"
    tokenizer = load(tmp_path, text).data.tokenizer
    assert (tokenizer.path, tokenizer.train) == ("runs/base", None)
    assert load(tmp_path, text, "data.tokenizer={train: char}").data.tokenizer.train == "char"
    assert load(tmp_path, text, "data.sources=[]").data.tokenizer.train == "bpe"  # it is built, with its own


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        (
            "oft",
            "oft is not there yet; there is lora, dora, adalora, ia3, adapter, prefix, prompt,",
        ),
        ("lorra", "did you mean lora?"),
        ("x", "one of: lora"),
    ],
)
def test_an_unknown_method_says_what_exists(tmp_path, name, fix):
    config = load(tmp_path, GOOD.replace("model: {name: llama}", "init_from: m"), f"peft.name={name}")
    with pytest.raises(UserError) as caught:
        check_choices(config)
    assert caught.value.fix.startswith(fix)


def test_merge_replaces_choices_and_lengths():
    base = {"optimizer": {"name": "adamw", "lr": 1, "eps": 2}, "train": {"epochs": 3, "compile": False}}
    assert merge(base, {"optimizer": {"lr": 5}})["optimizer"] == {"name": "adamw", "lr": 5, "eps": 2}
    assert merge(base, {"optimizer": {"name": "muon"}})["optimizer"] == {"name": "muon"}
    assert merge(base, {"train": {"max_steps": 7}})["train"] == {"compile": False, "max_steps": 7}
    assert set_override({}, {}, "a.b=1") == {"a": {"b": 1}}


def test_a_warm_up_that_overlaps_with_the_decay_is_refused(tmp_path):
    schedule = ["schedule={name: wsd, decay_fraction: 0.5, warmup_steps: 6}", "data.seq_len=64"]
    with pytest.raises(UserError, match=r"warmup_steps overlaps with the decay") as caught:
        plan_config(load(tmp_path, GOOD, *schedule))
    assert "begins at step 5 of 10" in caught.value.got
    assert plan_config(load(tmp_path, GOOD, *schedule, "schedule.warmup_steps=5"))


# ---- the shipped ones -----------------------------------------------------------------------------------------------

PUBLISHED = {  # a config -> the parameters of the model that it is named after
    "gpt2-124m": 124_439_808, "llama-1b": 1_235_814_400, "mistral-7b": 7_241_732_096, "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920, "gemma-2b": 2_506_172_416, "falcon-7b": 6_921_720_704, "mixtral-8x7b": 46_702_792_704,
    "bert-base": 109_514_298, "t5-base": 222_903_552,
}  # fmt: skip
CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_size_is_priced(name):
    figures = plan_config(load_config(CONFIGS / f"{name}.yaml"))
    assert figures["parameters"] == PUBLISHED[name] and figures["peak_memory"] > 0 and figures["seconds"] > 0


def test_every_family_has_a_tiny_config_and_a_published_one():
    configs = [load_config(path) for path in CONFIGS.glob("*.yaml") if "lora" not in path.stem]
    families = {name: [c for c in configs if c.model and c.model.name == name] for name in FAMILIES}
    for name, found in families.items():
        assert any(c.run_dir == f"runs/tiny-{name}" for c in found), name
        assert any(c.run_dir.removeprefix("runs/") in PUBLISHED for c in found), name


AMBIGUOUS = "1e5 010 0o17 0x1F 1:30 yes OFF 2024-01-01 ~ null .inf 1_000 << = true # - ' -.5 10.0 1E+5".split()


@pytest.mark.parametrize("text", [*AMBIGUOUS, "", "a: b", "# x", "- x", " x ", "x\ny", "\u2028"])
def test_what_a_run_writes_is_read_as_the_same(text):
    values = {"name": text, "list": [text, 1, 2.5, 1e-7, 1e22, None, True], "section": {"inner": text}}
    assert parse_yaml(dump_yaml(values), "x")[0] == values


def test_every_letter_can_be_in_a_quoted_value():
    text = "runs/\U0001f600 'x' \\ 1:30"
    assert set_override({}, {}, f"init_from={quote(text)}") == {"init_from": text}


@pytest.mark.parametrize("given, fix", [("question=Frage", "{question: Frage}"), ("question=F, answer=A", "A}"),
                                        ("Frage", None)])  # fmt: skip
def test_pairs_in_place_of_a_section_are_shown_as_one(tmp_path, given, fix):
    (tmp_path / "c.yaml").write_text("data: {kind: sft, path: a.csv}\nmodel: {name: gpt2}\ntrain: {epochs: 1}\n")
    with pytest.raises(UserError, match=r"data\.columns is not valid") as error:
        load_config(tmp_path / "c.yaml", [f"data.columns={given}"])
    assert error.value.fix is None if fix is None else fix in error.value.fix


@pytest.mark.parametrize("key", ["train.epochs", "data.sources.0.weight", "data.tokenizer.sample_mb"])
def test_huge_lengths_and_shares_are_refused(corpus, tmp_path, key):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tiny_config(corpus)))
    with pytest.raises(UserError, match=f"{key} is not valid"):
        load_config(tmp_path / "c.yaml", ["train.max_steps=null", "train.epochs=1", f"{key}=1.7e308"])
