"""Fine-tuning records of every usual layout, and the answers in what chat templates make of them."""

import copy
import datetime
import json
import re
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import SHARED, llmkit, needs_shared, sentences, tiny_config
from tokenizers import AddedToken
from tokenizers import Tokenizer as Rust
from transformers import PreTrainedTokenizerFast

from llmkit.data.rows import encode_tokens
from llmkit.errors import DataError
from llmkit.readers.records import read_records
from llmkit.readers.tally import Tally
from llmkit.records.encode import Found, encode_records
from llmkit.records.layouts import read_examples
from llmkit.tokenizer.answers import render_examples
from llmkit.tokenizer.chat_template import (
    CHATML_TEMPLATE,
    PLAIN_TEMPLATE,
    Conversation,
    encode_chat,
    encode_rendered,
    to_parts,
)
from llmkit.tokenizer.tokenizer import Tokenizer
from llmkit.tokenizer.train import train_tokenizer

TOOL = {
    "type": "function",
    "function": {
        "name": "weather", "description": "Say <how> it is.", "parameters": {
            "type": "object", "properties": {"city": {"type": "string", "description": "a city"}}, "required": ["city"],
        },
    },
}  # fmt: skip
CALL = {"type": "function", "id": "abcdef123", "function": {"name": "weather", "arguments": {"city": "Z\u00fcrich"}}}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more: object) -> dict:
    return {"role": "assistant", "content": text, **more}


RESULT = {"role": "tool", "name": "weather", "tool_call_id": "abcdef123", "content": '{"sky": "blue"}'}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([sentences(0, 200)], vocab_size=400)


def examples_of(record: dict, columns: dict | None = None) -> list:
    return [one for _, one in read_examples(record, columns or {}, Counter())]


def targets_of(tokenizer: Tokenizer, template: str, one: Conversation) -> list[list[str]]:
    """Return the targets of a conversation's examples, as texts."""
    [found] = render_examples(tokenizer, template, [one])
    if isinstance(found, ValueError):
        raise found
    return [[each.text[start:stop] for start, stop in each.targets] for each in found]


# ---- layouts --------------------------------------------------------------------------------------------------------

PLAIN = [user("q"), assistant("a")]
LAYOUTS = {  # a record -> its messages
    "messages": ({"messages": PLAIN}, PLAIN),
    "messages_in_a_string": ({"messages": json.dumps(PLAIN)}, PLAIN),
    "sharegpt": ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, PLAIN),
    "sharegpt_system": (
        {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        [{"role": "system", "content": "s"}, *PLAIN],
    ),
    "alpaca": ({"instruction": "q", "input": "", "output": "a"}, PLAIN),
    "alpaca_input": ({"instruction": "q", "input": "i", "output": "a"}, [user("q\n\ni"), assistant("a")]),
    "alpaca_history": (
        {"system": "s", "instruction": "q", "output": "a", "history": [["1", "2"]]},
        [{"role": "system", "content": "s"}, user("1"), assistant("2"), *PLAIN],
    ),
    "dolly": ({"instruction": "q", "context": "c", "response": "a"}, [user("q\n\nc"), assistant("a")]),
    "question": ({"question": "q", "answer": "a", "id": 7}, PLAIN),
    "openorca": ({"system_prompt": "", "question": "q", "response": "a"}, PLAIN),
    "query": ({"query": "q", "response": "a"}, PLAIN),
    "prompt_messages": ({"prompt": [user("q")], "completion": [assistant("a")]}, PLAIN),
    "null_columns": ({"messages": PLAIN, "prompt": None, "completion": None, "system": None}, PLAIN),
    "parts": (
        {"messages": [user([{"type": "text", "text": "q"}, {"type": "text", "text": "2"}]), assistant(["a"])]},
        [user("q2"), assistant("a")],
    ),
    "calls_in_strings": (
        {"messages": [user("q"), {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]}]},
        [user("q"), assistant("", tool_calls=[
            {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}, "id": "1"}])],
    ),
    "function_call": (
        {"conversations": [
            {"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
            {"from": "observation", "value": "r"}, {"from": "gpt", "value": "a"}]},
        [user("q"), assistant("", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {}}}]),
         {"role": "tool", "content": "r"}, assistant("a")],
    ),
    "turns_in_strings": ({"prompt": json.dumps([user("q")]), "completion": json.dumps([assistant("a")])}, PLAIN),
    "turns_of_parquet": (
        {"messages": [{"role": None, "from": "human", "content": None, "value": "q"}, assistant("a", name=None)]},
        PLAIN,
    ),
    "call_with_a_thought": (
        {"messages": [user("q"), {"role": "function_call", "content": '{"name": "f"}', "reasoning": "t", "name": "n"},
                      assistant("a")]},
        [user("q"), assistant("", name="n", reasoning_content="t",
                              tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {}}}]),
         assistant("a")],
    ),
    "two_names_of_one_system": ({"system": "s", "system_prompt": "s", "messages": PLAIN},
                                [{"role": "system", "content": "s"}, *PLAIN]),
    "reasoning": (
        {"messages": [user("q"), assistant("a", thinking="t")]}, [user("q"), assistant("a", reasoning_content="t")],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("record", "messages"), LAYOUTS.values(), ids=LAYOUTS)
def test_a_record_of_any_usual_layout_becomes_messages(record, messages):
    [one] = examples_of(record)
    assert one.messages == messages
    assert one.learnt == [message["role"] == "assistant" for message in messages]


@pytest.mark.parametrize("text", ['[{"role": "user"}, 1]', '[{"from": "A", "to": "B"}]', "[{broken"])
def test_json_that_is_no_conversation_is_a_text(text):
    [one] = examples_of({"instruction": "q", "output": text})
    assert one.messages == [user("q"), assistant(text)]
    assert examples_of({"prompt": text, "completion": "b"}) == [(text, "b")]


def test_values_that_json_does_not_have_make_a_bad_record(tokenizer):
    day = datetime.date(2026, 1, 31)
    template = CHATML_TEMPLATE + "{% if documents %}{{ documents }}{% endif %}"
    records = [
        {"messages": PLAIN, "documents": [{"date": day}]},
        {"messages": [*PLAIN, {"role": "tool", "content": {"d": day}}]},
        {"messages": [user("q"), assistant("", tool_calls=[{"name": "f", "arguments": {"d": day}}])]},
    ]
    bad, rows = [], ((i, record, 9) for i, record in enumerate([{"messages": PLAIN}, *records], 1))
    assert len(list(encode_records(rows, "a", tokenizer, template, Tally(), Found(), bad.append))) == 1
    assert [one.line for one in bad] == [2, 3, 4] and all("no JSON" in one.reason for one in bad)


def test_prompt_and_completion_as_texts_are_continued_text():
    assert examples_of({"prompt": "p ", "completion": "c"}) == [("p ", "c")]
    assert examples_of({"prompt": '[{"a": 1}]', "completion": "c", "input": "", "tools": []}) == [('[{"a": 1}]', "c")]


def test_documents_and_variables_reach_the_template(tokenizer):
    template = (
        "{{ mood }}{% for d in documents %}{{ d.text }}{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    record = {
        "messages": PLAIN,
        "documents": [{"text": "D", "url": "http://x"}],
        "chat_template_kwargs": '{"mood": "glad"}',
    }
    [found] = render_examples(tokenizer, template, examples_of(record))
    assert found[0].text == "gladDqa"
    [found] = render_examples(tokenizer, CHATML_TEMPLATE, examples_of(record))
    assert "no place for documents" in str(found)


def test_what_is_not_read_is_counted_even_beside_columns():
    unread = Counter()
    record = {"q": "q", "a": "a", "system": "s", "tools": [], "z": 1}
    list(read_examples(record, {"question": "q", "answer": "a"}, unread))
    assert set(unread) == {"system", "tools", "z"}
    assert examples_of({"q": "q", "a": "a"}, {"question": "q", "answer": "a", "context": "k"})[0].messages == PLAIN


def test_columns_name_the_fields_and_no_other_is_read():
    record, unread = {"Frage": "q", "Antwort": "a", "output": "other", "id": 3}, Counter()
    [(layout, one)] = read_examples(record, {"question": "Frage", "answer": "Antwort"}, unread)
    assert layout == "question/answer" and one.messages == PLAIN and set(unread) == {"output", "id"}
    with pytest.raises(ValueError, match="there is no field Frage"):
        examples_of({"question": "q"}, {"question": "Frage"})


def test_an_instruction_with_several_instances_is_several_examples():
    instances = [{"input": "i", "output": "a"}, {"input": "", "output": "b"}]
    texts = [[message["content"] for message in one.messages]
             for one in examples_of({"instruction": "q", "instances": instances})]  # fmt: skip
    assert texts == [["q\n\ni", "a"], ["q", "b"]]


@pytest.mark.parametrize(("turn", "learnt"), [
    ({"weight": 0}, False), ({"weight": 1}, True), ({"train": False}, False), ({"train": True}, True), ({}, True),
])  # fmt: skip
def test_a_turn_says_itself_whether_it_is_learnt(turn, learnt):
    [one] = examples_of({"messages": [user("q"), assistant("a", **turn)]})
    assert one.learnt == [False, learnt]


BAD = {  # a part of the reason -> a record
    "weight is 0.5": {"messages": [user("q"), assistant("a", weight=0.5)]},
    "type image_url": {"messages": [user([{"type": "image_url", "image_url": {}}]), assistant("a")]},
    "has images": {"messages": [{**user("q"), "images": ["x.png"]}, assistant("a")]},
    "tool_calls": {"messages": [user("q"), assistant("", tool_calls=[{"id": "1"}])]},
    "arguments is not JSON": {
        "messages": [user("q"), assistant("", tool_calls=[{"function": {"name": "f", "arguments": "{"}}])],
    },
    "tools is not JSON": {"messages": PLAIN, "tools": "[{"},
    "a tool has no name of": {"messages": PLAIN, "tools": [{}]},
    "history is not a list": {"instruction": "q", "output": "a", "history": ["x"]},
    "both response and answer": {"question": "q", "answer": "a", "response": "b"},
    "another one": {"system": "s", "messages": [{"role": "system", "content": "t"}, *PLAIN]},
    "no place for system": {"prompt": "p", "completion": "c", "system": "s"},
    "is not an object, or sets": {"messages": PLAIN, "chat_template_kwargs": [1]},
    "or sets one of": {"messages": PLAIN, "chat_template_kwargs": {"messages": []}},
    "documents is not a list": {"messages": PLAIN, "documents": ["d"]},
    "both messages and conversations": {"messages": PLAIN, "conversations": PLAIN},
    "tools and functions are both there": {"messages": PLAIN, "tools": [TOOL], "functions": [{"name": "f"}]},
    "system and system_prompt are both": {"messages": PLAIN, "system": "s", "system_prompt": "t"},
    "reasoning_content and thinking": {
        "messages": [user("q"), assistant("a", thinking="t", reasoning_content="u")],
    },
    "arguments of a call": {"messages": [user("q"), assistant("", tool_calls=[{"name": "f", "arguments": []}])]},
    "nested too deeply": {"messages": "[" * 100_000},
    "unknown role": {"messages": [{"role": "wizard", "content": "x"}]},
    "no known layout": {"a": 1},
    "answer is null": {"question": "q", "answer": None},
}  # fmt: skip


@pytest.mark.parametrize(("reason", "record"), BAD.items(), ids=BAD)
def test_what_can_not_be_honoured_is_refused_by_name(reason, record):
    with pytest.raises(ValueError, match=reason):
        examples_of(record)


@pytest.mark.parametrize(("record", "words"), [
    ({"prompt": "p", "chosen": "c", "rejected": "r"}, "objective dpo"),
    ({"question": "q", "response_j": "c", "response_k": "r"}, "objective dpo"),
    ({"prompt": "p", "completion": "c", "label": True}, "objective kto"),
    ({"text": "a text"}, "llmkit pretrain"),
])  # fmt: skip
def test_a_file_of_another_kind_is_refused_and_a_later_record_of_one_is_bad(tokenizer, record, words):
    first, later = [(1, record, 9)], [(1, {"messages": PLAIN}, 9), (2, record, 9)]
    with pytest.raises(DataError) as error:
        list(encode_records(first, "a.jsonl", tokenizer, CHATML_TEMPLATE, Tally(), Found()))
    assert words in error.value.fix and error.value.at == "a.jsonl:1"
    bad = []
    rows = list(encode_records(later, "a.jsonl", tokenizer, CHATML_TEMPLATE, Tally(), Found(), bad.append))
    assert len(rows) == 1 and bad[0].line == 2 and re.match("a (preference|text), not", bad[0].reason)


# ---- a file ---------------------------------------------------------------------------------------------------------


def test_layouts_may_be_mixed_and_all_is_counted(tokenizer, tmp_path):
    records = [
        {"messages": PLAIN, "source": "x"}, {"prompt": "the ", "completion": "river"},
        {"question": "q", "answer": "a", "id": 1}, {"nothing": 1}, {"messages": [user("q"), assistant(" ")]},
        {"messages": [user("q"), assistant("a", mood="glad")]},
    ]  # fmt: skip
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    tally, found, bad = Tally(), Found(), []
    rows = list(encode_records(read_records(path), str(path), tokenizer, CHATML_TEMPLATE, tally, found, bad.append))
    assert len(rows) == 5 and (tally.rows, tally.bad) == (6, 1) and "no known layout" in bad[0].reason
    assert found.layouts == {"messages": 3, "prompt/completion": 1, "question/answer": 1}
    assert found.unread == {"source": 1, "id": 1, "turn.mood": 1} and found.empty == 1
    assert [bool((tokens >= 0).any()) for tokens, *_ in rows] == [True, True, True, False, True]


def test_the_last_answer_alone_is_learnt(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [*PLAIN, user("r"), assistant("b")]}))
    for train_on, expected in (("all", "a<|im_end|>b<|im_end|>"), ("last", "b<|im_end|>")):
        [(tokens, *_)] = encode_records(
            read_records(path), str(path), tokenizer, CHATML_TEMPLATE, Tally(), Found(), train_on=train_on
        )
        assert tokenizer.decode(tokens[tokens >= 0].tolist()) == expected


def test_a_first_record_without_a_layout_says_what_is_read(tokenizer, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,Frage,Antwort\n1,q,a\n")
    with pytest.raises(DataError, match="this is not a fine-tuning record") as error:
        list(encode_records(read_records(path), str(path), tokenizer, CHATML_TEMPLATE, Tally(), Found()))
    assert "data.columns" in error.value.fix and "Frage" in error.value.got
    columns = {"question": "Frge", "answer": "Antwort"}
    with pytest.raises(DataError, match="there is no field Frge") as error:
        list(encode_records(read_records(path), "a", tokenizer, CHATML_TEMPLATE, Tally(), Found(), columns=columns))
    assert "did you mean Frage" in error.value.fix


def test_columns_and_what_is_not_read_from_the_command_line(corpus, tmp_path):
    config = tiny_config(corpus, train={"max_steps": 2}, checkpoint={"every": 2}, eval={"every": 2})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    llmkit("pretrain", "c.yaml", "-o", "run_dir=runs/base", cwd=tmp_path)
    rows = "".join(f"{i},wer ist {i}?,der {i}te,x\n" for i in range(20))
    (tmp_path / "faq.csv").write_text("id,Frage,Antwort,source\n" + rows)
    options = ["--columns", "question=Frage, answer=Antwort", "-o", "train.max_steps=2"]
    command = ["finetune", "--lora", "--from", "runs/base", "--data", "faq.csv", *options]
    said = llmkit(*command, cwd=tmp_path).stdout
    assert "20 records of question/answer through ChatML" in said and "not read: id, source" in said
    assert "wer" in llmkit("data", "inspect", "runs/base-lora", cwd=tmp_path).stdout  # a run stands for its config


def test_a_damaged_field_is_never_passed_over(tokenizer):
    """Take away each known field of a record: the ids change, or an error names it."""
    chat = {"messages": [
        {"role": "system", "content": "s"}, user("q"), assistant("c", tool_calls=[CALL]),
        {"role": "tool", "content": "x"}, assistant("a", reasoning_content="t"), user("r"), assistant("b", weight=0),
    ], "tools": [TOOL]}  # fmt: skip
    alpaca = {"system": "s", "instruction": "q", "input": "i", "output": "a", "history": [["1", "2"]]}

    def ids_of(record: dict) -> list:
        [one] = examples_of(record)
        [found] = render_examples(tokenizer, CHATML_TEMPLATE, [one])
        if isinstance(found, ValueError):
            raise found
        return [encode_tokens(*encode_rendered(tokenizer, each)).tolist() for each in found]

    def paths(value: object, path: tuple = ()):
        yield from [path] if path else []
        for key, inner in (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
        ):
            yield from paths(inner, (*path, key))

    unshown = {"id", "tool_call_id", "type"}  # ChatML shows none of them
    for record in (chat, alpaca):
        whole = ids_of(record)
        for path in paths(record):
            changed = copy.deepcopy(record)
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            del inner[path[-1]]
            try:
                assert ids_of(changed) != whole or path[-1] in unshown, path
            except ValueError as error:
                assert str(error), path


@needs_shared
def test_every_public_file_of_records_is_read_or_refused_by_name():
    expected = {"hh_rlhf_tiny.json": "it has chosen", "stack_exchange_paired_tiny.json": "it has response_j",
                "dpo_en_demo.json": "it has chosen", "instruction-data-with-preference.json": "it has chosen",
                "vicuna_bench_question.jsonl": "no known layout",
                "vicuna_bench_reference_answer_gpt-4.jsonl": "no known layout"}  # fmt: skip
    seen, tools = set(), 0
    files = [path for name in ("sft", "chat", "preference") for path in sorted((SHARED / name).rglob("*.json*"))]
    for path in files:
        try:
            for _, record, _ in read_records(path):
                [*examples] = examples_of(record)
                tools += bool(examples[0].tools) if path.name.startswith("glaive") else 0
        except (DataError, ValueError) as error:
            assert expected[path.name] in str(error)
            seen.add(path.name)
    assert seen == set(expected) and len(files) > 10 and tools == 93  # of 150 records; the others name none


# ---- answers --------------------------------------------------------------------------------------------------------

REWRITES = (  # thoughts are shown in the last answer alone, as Qwen3 does
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
THREE = [user(" q "), assistant("a "), user("r"), assistant("\nb"), user("s"), assistant("c")]


@pytest.mark.parametrize(("template", "messages", "expected"), [
    (CHATML_TEMPLATE, THREE, [["a <|im_end|>", "\nb<|im_end|>", "c<|im_end|>"]]),
    (CHATML_TEMPLATE, [assistant("hello"), *PLAIN], [["hello<|im_end|>", "a<|im_end|>"]]),
    (CHATML_TEMPLATE, [*PLAIN, user("r")], [["a<|im_end|>"]]),
    (CHATML_TEMPLATE, [user("q"), assistant("a", reasoning_content="t")], [["<think>\nt\n</think>\n\na<|im_end|>"]]),
    (PLAIN_TEMPLATE, THREE, [["a <|endoftext|>", "\nb<|endoftext|>", "c<|endoftext|>"]]),
    (LLAMA2, THREE, [[" a <|endoftext|>", " b <|endoftext|>", " c <|endoftext|>"]]),
    (GENERATION, THREE, [["a <|im_end|>", "\nb<|im_end|>", "c<|im_end|>"]]),
    (REWRITES, [user("q"), assistant("a", reasoning_content="t"), user("r"), assistant("b", reasoning_content="u")],
     [["a<|im_end|>", "<think>u</think>b<|im_end|>"]]),
], ids=["chatml", "first", "last_is_a_question", "thoughts", "plain", "llama2", "generation", "rewrites"])  # fmt: skip
def test_targets_are_the_answers_and_their_end_marks(tokenizer, template, messages, expected):
    one = Conversation(messages, [message["role"] == "assistant" for message in messages])
    assert targets_of(tokenizer, template, one) == expected


def test_where_answers_can_not_be_aligned_each_is_an_example(tokenizer):
    calls = [user("q"), assistant("", tool_calls=[CALL]), RESULT, assistant("a")]
    call = "{{ 'now' if last else 'then' }} {{ c.function.name }} city={{ c.function.arguments.city }}"
    call = "{% set last = loop.last %}{% for c in m.tool_calls or [] %}" + call + "{% endfor %}"
    shows = REWRITES.replace("{{ m.content }}", "{{ m.content }}" + call)
    one = Conversation(calls, [False, True, False, True])
    assert targets_of(tokenizer, shows, one) == [["now weather city=Z\u00fcrich<|im_end|>"], ["a<|im_end|>"]]


MOVES_SYSTEM = (  # into the last turn of the user, as Mistral's do
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{% if loop.index0 >= messages|length - 2 %}"
    "{{ messages[0].content }} {% endif %}{{ m.content }}[/INST]{% elif m.role == 'assistant' %} {{ m.content }}</s>"
    "{% endif %}{% endfor %}"
)
TOOLS_BEFORE_THE_LAST = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if loop.index0 == ns.last %}[TOOLS]{{ tools | tojson }}{% endif %}[INST]{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
NO_START_AFTER_AN_ANSWER = CHATML_TEMPLATE + (
    "{% if add_generation_prompt and messages[-1].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}"
)
TWO = [user("first"), assistant("ans one"), user("second"), assistant("ans two")]


@pytest.mark.parametrize(("template", "one", "expected"), [
    (MOVES_SYSTEM, Conversation([{"role": "system", "content": "BRIEF"}, *TWO], [False, False, True, False, True]),
     [[" ans one</s>"], [" ans two</s>"]]),
    (TOOLS_BEFORE_THE_LAST, Conversation(TWO, [False, True, False, True], [TOOL]),
     [[" ans one</s>"], [" ans two</s>"]]),
    (NO_START_AFTER_AN_ANSWER, Conversation([user("q"), assistant("a1"), assistant("a2"), user("r"), assistant("b")],
                                            [False, True, True, False, True]),
     [["a1<|im_end|>", "a2<|im_end|>", "b<|im_end|>"]]),
])  # fmt: skip
def test_no_prompt_is_a_target_where_a_template_moves_texts(tokenizer, template, one, expected):
    assert targets_of(tokenizer, template, one) == expected


def test_templates_that_write_arguments_as_they_are_get_json(tokenizer):
    one = [Conversation([user("q"), assistant("", tool_calls=[CALL])], [False, True])]
    start, end = "{% for m in messages %}{{ m.content }}{% for t in m.tool_calls or [] %}", "{% endfor %}{% endfor %}"
    for written in ("{{ 'CALL ' + t['function']['arguments'] }}", "{{ t.function.arguments }}",
                    "{{ t.function.arguments | tojson }}"):  # fmt: skip
        [[found]] = render_examples(tokenizer, start + "{{ t.function.name }} " + written + end, one)
        assert '{"city": "Z\u00fcrich"}' in found.text


def test_the_plain_template_separates_all_that_is_said(tokenizer):
    one = Conversation([{"role": "system", "content": "s"}, *TWO], [False, False, True, False, True])
    [[found]] = render_examples(tokenizer, PLAIN_TEMPLATE, [one])
    assert found.text == "s\nfirst\nans one<|endoftext|>second\nans two<|endoftext|>"
    calls = Conversation([user("q"), assistant("look", tool_calls=[CALL, CALL])], [False, True])
    for template in (CHATML_TEMPLATE, PLAIN_TEMPLATE):
        [[found]] = render_examples(tokenizer, template, [calls])
        assert "look\n<tool_call>" in found.text and "</tool_call>\n<tool_call>" in found.text


def test_a_developer_is_the_system_where_the_template_knows_none(tokenizer):
    messages = [{"role": "developer", "content": "s"}, user("q")]
    system = [{"role": "system", "content": "s"}, user("q")]
    assert encode_chat(tokenizer, messages) == encode_chat(tokenizer, system)
    [[found]] = render_examples(tokenizer, "{% if 'developer' %}{{ messages[0].role }}{% endif %}s q",
                                [Conversation(messages, [False, False])])  # fmt: skip
    assert found.text == "developers q"


def test_large_records_are_not_refused_because_they_stand_together(tokenizer):
    chat = Conversation([user("\u65e5" * 200_000), assistant("a")], [False, True])
    for found in render_examples(tokenizer, CHATML_TEMPLATE, [chat] * 64):
        assert isinstance(found, list)
    small = Conversation(PLAIN, [False, True])
    assert isinstance(render_examples(tokenizer, CHATML_TEMPLATE, [small])[0], list)


def test_a_record_that_is_nested_too_deeply_is_a_bad_one(tokenizer):
    deep: dict = {}
    for _ in range(900):
        deep = {"a": deep}
    records = [
        {"messages": [user("q"), assistant("", tool_calls=[{"name": "f", "arguments": deep}])]},
        {"messages": [user("q"), assistant("", tool_calls=[{"name": "f", "arguments": '{"a":' * 100_000}])]},
    ]
    bad, found = [], Found()
    rows = ((i, record, 9) for i, record in enumerate([{"messages": PLAIN}, *records], 1))
    assert len(list(encode_records(rows, "a.jsonl", tokenizer, CHATML_TEMPLATE, Tally(), found, bad.append))) == 1
    assert [one.line for one in bad] == [2, 3] and all("nested" in one.reason for one in bad)
    assert found.layouts == {"messages": 1}  # bad records are not counted


def test_a_long_conversation_is_rendered_a_few_times_only(tokenizer):
    turns = [turn for i in range(1500) for turn in (user(f"question {i}"), assistant(f"answer {i}"))]
    [spans] = targets_of(tokenizer, CHATML_TEMPLATE, Conversation(turns, [i % 2 == 1 for i in range(3000)]))
    assert len(spans) == 1500 and spans[7] == "answer 7<|im_end|>"


@pytest.mark.parametrize(("template", "one", "name"), [
    ("{% for m in messages %}{{ m.content }}{% endfor %}", Conversation(PLAIN, [False, True], [TOOL]), "tools"),
    ("{% for m in messages %}{{ m.content }}{% endfor %}",
     Conversation([user("q"), assistant("", tool_calls=[CALL])], [False, True]), "tool_calls"),
    ("{% for m in messages %}{{ m.content }}{% endfor %}",
     Conversation([user("q"), assistant("a", reasoning_content="t")], [False, True]), "reasoning_content"),
    ("{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}"
     "{% endfor %}", Conversation([user("q"), assistant("look", tool_calls=[CALL])], [False, True]), "assistant says"),
    ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
     Conversation([{"role": "system", "content": "be brief"}, *PLAIN], [False, False, True]), "system"),
])  # fmt: skip
def test_what_a_template_does_not_show_is_refused_by_name(tokenizer, template, one, name):
    [found] = render_examples(tokenizer, template, [one])
    assert isinstance(found, ValueError) and name in str(found)


# ---- public templates -----------------------------------------------------------------------------------------------

TEMPLATES = sorted((Path(__file__).parents[2] / "shared" / "templates").glob("*.jinja"))
CHATS = {  # no answer ends in an emoji, whose last token transformers' masks leave out
    "one": ([user("Hi there"), assistant("Hello you")], None),
    "many": ([user("Hi"), assistant("Hello"), user("And?"), assistant("Then."), user("So"), assistant("Bye")], None),
    "system": (
        [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hello"), user("x"), assistant("y")], None,
    ),
    "tools": (
        [user("Weather?"), assistant("", tool_calls=[CALL]), RESULT, assistant("Blue."), user("o"), assistant("u")],
        [TOOL],
    ),
    "call": ([user("Weather?"), assistant("", tool_calls=[CALL])], [TOOL]),
    "thoughts": (
        [user("2+2?"), assistant("4", reasoning_content="two"), user("3+3?"), assistant("6", reasoning_content="so")],
        None,
    ),
    "signs": ([user('Say "\u00e9" <b>\'x\'</b> & \u65e5'), assistant('\u00e9 "quoted" <b> & \u732b\U0001f642.')], None),
    "spaces": ([user("  a\n\nb  "), assistant("\n  c  d \n"), user("e"), assistant("f\n\n")], None),
    "first": ([assistant("Welcome!"), user("how?"), assistant("Fine")], None),
}  # fmt: skip
CONTROL = r"<\|[\w/ ]+\|>|<\uff5c[^\uff5c]+\uff5c>|\[/?[A-Z_]+\]|<(?:start|end)_of_\w+>|<turn\|>|<\|turn>"


@pytest.mark.skipif(not TEMPLATES, reason="the public templates are not here")
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_public_templates_give_transformers_text_and_ids_and_the_answers_as_targets(path):
    template = path.read_text()
    rust = Rust.from_file(str(SHARED / "tokenizers/gpt2/tokenizer.json"))
    names = sorted({*re.findall(CONTROL, template), "<s>", "</s>"})
    rust.add_special_tokens([AddedToken(name, special=True) for name in names])
    ours = Tokenizer(rust, rust.token_to_id("</s>"), "<s>", template)
    theirs = PreTrainedTokenizerFast(tokenizer_object=Rust.from_str(rust.to_str()), bos_token="<s>", eos_token="</s>")
    compared = 0
    for messages, tools in CHATS.values():
        answers = [message for message in messages if message["role"] == "assistant"]
        one = Conversation(messages, [message["role"] == "assistant" for message in messages], tools)
        [found] = render_examples(ours, template, [one])
        options = {"chat_template": template, "tools": tools}
        messages = to_parts(template, messages)
        if isinstance(found, ValueError):
            if "the chat template fails" in str(found):
                with pytest.raises(Exception):  # noqa: B017  theirs are of many kinds
                    theirs.apply_chat_template(messages, **options)
            continue
        compared += 1
        assert found[-1].text == theirs.apply_chat_template(messages, tokenize=False, **options)
        ids, targets = encode_rendered(ours, found[-1])
        encoded = theirs.apply_chat_template(messages, return_dict=True, **options)
        assert ids.tolist() == encoded["input_ids"]
        texts = [each.text[start:stop] for each in found for start, stop in each.targets]
        marks_itself = re.search(r"\{%-? generation", template) is not None
        assert len(texts) == len(answers) or marks_itself
        assert all(answer["content"].strip() in "".join(texts) for answer in answers)
        others = [m["content"] if isinstance(m["content"], str) else m["content"][0]["text"]
                  for m in messages if m["role"] != "assistant"]  # fmt: skip
        assert marks_itself or not any(other.strip() in text for other in others for text in texts if len(other) > 2)
        if marks_itself:
            masks = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **options)
            assert targets.tolist() == [bool(mask) for mask in masks["assistant_masks"]]
        prompt = encode_chat(ours, one.messages[:-1], tools) if messages[:-1] and not tools else None
        if prompt is not None:
            begun = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True, **options)
            assert prompt == begun["input_ids"]
    assert compared >= 3


# ---- as people have them --------------------------------------------------------------------------------------------


def with_arguments(arguments):
    return {"type": "function", "function": {"name": "w", "arguments": arguments}}


LANGCHAIN = {"name": "w", "args": {"c": "x"}}
FOUND = [  # record -> its examples, the messages by role and content
    ({"conversations": ["q", "a", "r", "b"]}, "user:q assistant:a user:r assistant:b"),  # LIMA
    ({"conversation": [{"input": "q", "output": "a"}, {"input": "r", "output": "b"}]},
     "user:q assistant:a user:r assistant:b"),  # Capybara
    ({"conversation": [{"human": "q", "assistant": "a"}]}, "user:q assistant:a"),  # Firefly
    ({"messages": [{"role": "User", "text": "q"}, {"role": "Assistant", "text": "a"}]}, "user:q assistant:a"),
    ({"messages": [{"role": "prompter", "content": "q"}, assistant("a")]}, "user:q assistant:a"),
    ({"messages": [user("q")], "answer": "a", "source": "s"}, "user:q assistant:a"),
    ({"messages": [user("q"), assistant("a")], "answer": "42"}, "user:q assistant:a"),  # OpenR1's result
    ({"problem": "q", "solution": "a", "level": 3}, "user:q assistant:a"),
    ({"inputs": "q", "targets": "a"}, "user:q assistant:a"),
    ({"prompt": [user("q")], "completion": [assistant("a")], "loss": 1.3}, "user:q assistant:a"),
    ({"instruction": "q", "output": "a", "file": "src/a.py", "label": 1, "train": "x"}, "user:q assistant:a"),
    ({"messages": [user("q"), {"role": "tool", "content": [{"type": "file", "name": "a.py"}]}, assistant("a")]},
     'user:q tool:[{"type": "file", "name": "a.py"}] assistant:a'),
    ({"instruction": "q", "input": "  \n", "output": "a", "system_message": "s"}, "system:s user:q assistant:a"),
    ({"question": "q", "answer": "a", "system": " "}, "user:q assistant:a"),
    ({"instruction": "", "input": "i", "output": "a"}, "user:i assistant:a"),
    ({"question": [{"role": "system", "content": "s"}, user("q")], "answer": "a", "history": [["h", "i"]]},
     "system:s user:h assistant:i user:q assistant:a"),
    ({"instruction": "Write messages", "output": '[{"role": "user", "content": "Hi"}]'},
     'user:Write messages assistant:[{"role": "user", "content": "Hi"}]'),
    ({"messages": [user("q"), assistant("", tool_calls=[CALL]),
                   {"role": "tool", "content": [{"title": "T", "text": "body"}]}, assistant("a")]},
     'user:q assistant: tool:[{"title": "T", "text": "body"}] assistant:a'),
    *(({"messages": [user("q"), {"role": "tool", "content": result}, assistant("a")]},
       f"user:q tool:{said} assistant:a")
      for result, said in [([], "[]"), (["x", "y"], '["x", "y"]'), ([{"text": "t"}], '[{"text": "t"}]'),
                           ([{"type": "A"}], '[{"type": "A"}]'), ([{"type": "text", "text": "t"}], "t")]),
    ({"prompt": [{"role": "User", "content": "q"}], "completion": [{"from": "GPT", "value": "a"}]},
     "user:q assistant:a"),
    ({"prompt": json.dumps([user("q")], indent=2), "completion": json.dumps([assistant("a")], indent=2)},
     "user:q assistant:a"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "expected"), FOUND, ids=lambda value: str(value)[:40])
def test_layouts_of_public_data_sets(record, expected):
    [one] = examples_of(record)
    assert " ".join(f"{message['role']}:{message['content']}" for message in one.messages) == expected


@pytest.mark.parametrize("call", [
    LANGCHAIN, LANGCHAIN | {"type": "tool_call", "id": "1"}, {"type": "tool_use", "name": "w", "input": {"c": "x"}},
    {"function": LANGCHAIN, "id": "1"}, {"function": LANGCHAIN | {"index": 0, "id": "1"}, "strict": False},
])  # fmt: skip
def test_arguments_of_a_call_have_several_names(call):
    [one] = examples_of({"messages": [user("q"), assistant("", tool_calls=[call])]})
    assert one.messages[1]["tool_calls"][0]["function"] == {"name": "w", "arguments": {"c": "x"}}


QUESTION = {"question": "q", "answer": "a"}
LOST = [  # record, what its error names
    ({"messages": [user("q"), assistant("", tool_calls=[{"function": {"name": "w"}, "arguments": {"c": "x"}}])]},
     "arguments"),
    ({"messages": [user("q"), assistant("", tool_calls=[LANGCHAIN | {"arguments": {"c": "y"}}])]}, "args"),
    ({"messages": [user("q"), assistant("", tool_calls=[{"name": "w", "argument": {"c": "x"}}])]}, "argument"),
    ({"messages": [user("q"), assistant("a")], "images": ["x.png"]}, "images"),
    (QUESTION | {"image": "x.png"}, "image"),
    ({"messages": [user([{"type": "text", "text": "q", "image_url": "u"}]), assistant("a")]}, "image_url"),
    ({"messages": [user("q") | {"attachments": ["f"]}, assistant("a")]}, "attachments"),
    ({"messages": [user("q"), assistant("a") | {"train_detail": [{"begin": 0}]}]}, "train_detail"),
    ({"messages": [{"role": "system", "content": "s", "tools": [{"name": "w"}]}, user("q"), assistant("a")]}, "tools"),
    ({"messages": [user("q"), assistant("a")], "history": [["h", "i"]]}, "history"),
    ({"messages": [user("q"), assistant("a")], "tools": [TOOL | {"cache": 1}]}, "cache"),
    (QUESTION | {"tool_calls": [LANGCHAIN]}, "tool_calls"),
    (QUESTION | {"history": 3}, "history"),
    (QUESTION | {"weight": 0.5}, "weight"),
    ({"prompt": "p", "completion": "c", "documents": [{"text": "d"}]}, "documents"),
    ({"prompt": "p", "completion": "c", "thinking": "t"}, "thinking"),
    ({"prompt": [user("q"), assistant("a")], "response": "b", "context": "c"}, "context"),
    ({"question": "q", "answer": ["a", "b"]}, "answer is list"),  # answers of nq_open
    ({"question": "q", "answer": [{"input": "a", "output": "b"}]}, "answer is list"),
    ({"problem": "q", "solution": "a", "answer": "42"}, "both answer and solution"),
    ({"question": "q", "solution": "a", "answer": "42"}, "both answer and solution"),
    ({"problem": "q", "input": "i", "output": "a"}, "both input and problem"),
    *(({"prompt": "p", "completion": "c", "label": label}, "label") for label in (False, 0, 1, "False", "true")),
    ({"messages": [user("q"), {"role": "tool", "content": [{"type": "file", "file": {}}]}, assistant("a")]}, "file"),
    ({"problem": "q", "solution": "a", "target": "42"}, "both solution and target"),
    ({"prompt": "p", "completion": "c", "weight": 0}, "leave out"),
    ({"messages": PLAIN, "tools": [{"type": "custom", "name": "w"}]}, "custom"),
    ({"messages": [user("q"), assistant("", tool_calls=[{"type": "custom", "function": {"name": "w"}}])]}, "custom"),
    ({"messages": [user("q"), {"role": "tool", "content": [{"type": "input_image"}]}, assistant("a")]}, "input_image"),
    ({"instruction": "i", "instances": [{"input": "x", "output": None}]}, "output .* is null"),
    ({"instruction": "i", "instances": [{"input": "x", "output": "a"}], "context": "c"}, "context"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "name"), LOST, ids=lambda value: str(value)[:40])
def test_what_would_be_lost_is_refused_by_name(record, name):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        examples_of(record)


@pytest.mark.parametrize("mark", [{"loss": False}, {"training": False}, {"train": False}, {"weight": 0}])
def test_marks_of_other_trainers_keep_an_answer_from_being_learnt(mark):
    turns = [user("q"), assistant("a"), user("r"), assistant("b")]
    [one] = examples_of({"messages": [turns[0], turns[1] | mark, *turns[2:]]})
    assert one.learnt == [False, False, False, True]
    assert not any(examples_of({"messages": turns} | mark)[0].learnt)


def test_the_type_of_a_flat_tool_is_not_a_field_of_its_function():
    [one] = examples_of({"messages": PLAIN, "tools": [{"type": "function", "name": "w", "description": "d"}]})
    assert one.tools == [{"type": "function", "function": {"name": "w", "description": "d"}}]


def test_other_names_of_a_question_do_not_make_it_a_text():
    assert examples_of({"text": "t", "problem": "q", "solution": "a"})[0].messages == PLAIN


def test_thoughts_beside_an_answer_are_its_own():
    [one] = examples_of(QUESTION | {"reasoning_content": "t"})
    assert one.messages[1] == {"role": "assistant", "content": "a", "reasoning_content": "t"}


@pytest.mark.parametrize("template, call, problem", [
    ("{% for m in messages %}{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0] | tojson }}{% endif %}{% endfor %}",
     {"function": {"name": "other", "arguments": {"city": "Bern"}}, "type": "function"}, "leaves out a call"),
    ("{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}", None, "leaves out the thoughts"),
])  # fmt: skip
def test_a_template_that_shows_a_part_only_refuses_the_record(tokenizer, template, call, problem):
    turn = assistant("", tool_calls=[CALL, call]) if call else assistant("<think>why</think>a")
    [found] = render_examples(tokenizer, template, [Conversation([user("q"), turn], [False, True])])
    assert problem in str(found)


PARTS = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
PARTS += "{% if m.reasoning_content and m.content == 'x' %}{{ m.reasoning_content }}{% endif %}{% endfor %}"
SHOWS = {  # what a template leaves out -> a conversation
    "a call": Conversation([user("q"), assistant("", tool_calls=[with_arguments({"n": 41})])], [False, True]),
    "a call ": Conversation(
        [user("q"), assistant("", tool_calls=[with_arguments({"a": [{"b": "c"}]})])], [False, True]
    ),
    "the thoughts of an answer": Conversation([user("q"), assistant("a", reasoning_content="t")], [False, True]),
    "a tool": Conversation(PLAIN, [False, True], [TOOL]),
    "the thoughts of an answer ": Conversation([user("q"), assistant("why\n</think>\n\na")], [False, True]),
    "what a document says": Conversation(PLAIN, [False, True], variables={"documents": [{"text": "d"}]}),
}


@pytest.mark.parametrize("lost", SHOWS)
def test_each_part_of_a_conversation_must_be_shown(tokenizer, lost):
    template = PARTS.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}", 1)
    template += "{% if tools or documents %} {% endif %}"
    [found] = render_examples(tokenizer, template, [SHOWS[lost]])
    assert f"leaves out {lost.strip()}" in str(found)


def test_thoughts_of_earlier_answers_that_a_template_leaves_out_are_counted(tokenizer):
    template = (
        "{% for m in messages %}{% if loop.last %}{{ m.reasoning_content }}{% endif %}{{ m.content }}{% endfor %}"
    )
    turns = [user("q"), assistant("a", reasoning_content="why <|im_end|>"), user("r"), assistant("b", thinking="how")]
    found = Found()
    rows = [(1, {"messages": turns}, 9), (2, {"messages": turns[:2]}, 9), (3, {"messages": PLAIN}, 9)]
    assert len(list(encode_records(rows, "a", tokenizer, template, Tally(), found))) == 3
    assert found.thoughts == 1


def test_a_variable_may_have_any_name(tokenizer):
    record = {"messages": [user("q"), assistant("a")], "chat_template_kwargs": {"a(b": 1}}
    [found] = render_examples(tokenizer, CHATML_TEMPLATE, examples_of(record))
    assert "no place for a(b" in str(found)


def test_structs_of_parquet_add_no_arguments(tmp_path):
    calls = [{"name": "w", "arguments": {"c": "x"}}, {"name": "v", "arguments": {"d": 1}}]
    table = pa.Table.from_pylist([{"messages": [user("q"), assistant("", tool_calls=[call])]} for call in calls])
    pq.write_table(table, tmp_path / "a.parquet")
    found = [examples_of(record)[0] for _, record, _ in read_records(tmp_path / "a.parquet")]
    assert [one.messages[1]["tool_calls"][0]["function"] for one in found] == calls
