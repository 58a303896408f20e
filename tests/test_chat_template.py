"""Chat templates do all that jinja2 can do, within bounds, and never more than a template may."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import encode_chat_example
from transformers.utils.chat_template_utils import render_jinja_template

from llmkit.errors import ModelError, UserError
from llmkit.tokenizer.chat_template import CHATML_TEMPLATE, encode_chat
from llmkit.tokenizer.load import load_tokenizer, read_template
from llmkit.tokenizer.renderer import Job, TemplateLimit, render_jobs, renderer
from llmkit.tokenizer.train import train_tokenizer

CHAT = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a model reads tokens"] * 3, vocab_size=280)


def text_of(tokenizer, template: str, messages: list[dict] = CHAT) -> str:
    return tokenizer.decode(encode_chat_example(tokenizer, template, messages)[0])


def rendered(template: str, messages: list[dict], renderings: list[tuple[int, bool]], variables: dict) -> list[str]:
    [found] = render_jobs(template, [Job(messages, renderings, variables)])
    if isinstance(found, ValueError):
        raise found
    return found.texts


def peak_memory(pid: int) -> int:
    """Return the most memory that a process has held, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


# ---- bounds ---------------------------------------------------------------------------------------------------------

HEAVY = {  # in time, memory or output
    "doubling": "{% set a = 'xx' %}" + "{% set a = a ~ a %}" * 40 + "{{ a }}",
    "doubling_a_list": "{% set n = namespace(a=[1]) %}{% for i in range(99) %}{% set n.a = n.a + n.a %}{% endfor %}",
    "tojson": "{{ messages|tojson(indent=900000000) }}",
    "slice": "{{ 'abc'|slice(10**9)|list }}",
    "batch": "{{ messages|batch(10**9, 'x')|list }}",
    "round": "{{ (10**400000)|round(-300000) }}",
    "replace": "{{ ('a' * 1000).replace('a', 'b' * 1000).replace('b', 'c' * 1000).replace('c', 'd' * 1000) }}",
    "percent": "{{ '%3000000000d' % 1 }}",
    "product": "{{ 'a' * 10**10 }}",
    "power": "{{ 9 ** 999999999 }}",
    "center": "{{ 'a'|center(10**10) }}",
    "format": "{{ '{:>3000000000}'.format(1) }}",
    "list": "{{ [1] * 10**10 }}",
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "macros": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "lorem_ipsum": "{{ lipsum(n=10**6) }}",
    "output": "{% for i in range(99999) %}" + "x" * 200 + "{% endfor %}",
    "marked_output": "{% generation %}{% for i in range(99999) %}" + "x" * 200 + "{% endfor %}{% endgeneration %}",
    "nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}
HOSTILE = {
    "class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "mutation": "{{ messages.append(1) }}",
    "formatted_attribute": "{{ '{0.__class__}'.format(1) }}",
    "file": "{% include '/etc/passwd' %}",
    "unfinished": "{% for",
    "no_text": "",
    "blank": "{% for message in messages %} \n{% endfor %}",
}


@pytest.mark.parametrize("template", HEAVY.values(), ids=HEAVY)
def test_a_heavy_template_is_one_error_and_the_next_is_rendered(tokenizer, template):
    text_of(tokenizer, CHATML_TEMPLATE)
    process, begin = renderer(os.getpid()).process, time.perf_counter()
    with pytest.raises((UserError, ValueError), match="the chat template"):
        encode_chat_example(tokenizer, template, CHAT)
    assert time.perf_counter() - begin < 10  # of two seconds of computing on an idle machine
    assert process.poll() is not None or peak_memory(process.pid) < 500
    assert "x" in text_of(tokenizer, CHATML_TEMPLATE)


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_or_empty_template_is_one_error(tokenizer, template):
    with pytest.raises((UserError, ValueError), match="the chat template"):
        encode_chat_example(tokenizer, template, CHAT)
    with pytest.raises((UserError, ValueError), match="the chat template"):
        encode_chat(replace(tokenizer, chat_template=template), CHAT[:1])


def test_a_reason_is_short(tokenizer):
    with pytest.raises(ValueError, match="fails: x") as caught:
        encode_chat_example(tokenizer, "{{ raise_exception('x' * 10**6) }}", CHAT)
    assert len(str(caught.value)) < 400


def test_a_process_that_dies_or_stops_is_replaced(tokenizer, monkeypatch):
    text_of(tokenizer, CHATML_TEMPLATE)
    process = renderer(os.getpid()).process
    process.kill()
    process.wait()
    text_of(tokenizer, CHATML_TEMPLATE)
    monkeypatch.setattr("llmkit.tokenizer.renderer.WALL_SECONDS", 0.2)
    renderer(os.getpid()).process.send_signal(signal.SIGSTOP)
    with pytest.raises(TemplateLimit, match="no answer"):
        text_of(tokenizer, CHATML_TEMPLATE)
    monkeypatch.undo()
    text_of(tokenizer, CHATML_TEMPLATE)


def test_threads_get_their_own_texts(tokenizer):
    found = {}

    def work(name: str) -> None:
        found[name] = [text_of(tokenizer, CHATML_TEMPLATE, [{**CHAT[0], "content": name}, CHAT[1]]) for _ in range(50)]

    threads = [threading.Thread(target=work, args=(f"name {i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(name in text for name, texts in found.items() for text in texts) and len(found) == 4


def test_the_process_ends_with_its_parent_and_knows_no_secrets():
    code = (
        "import os, time; from llmkit.tokenizer.renderer import Job, renderer, render_jobs\n"
        "render_jobs('x', [Job([], [(0, True)], {})])\n"
        "print(renderer(os.getpid()).process.pid, flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "HF_TOKEN": "very-secret"}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    child = Path("/proc") / parent.stdout.readline().strip()
    assert b"very-secret" not in (child / "environ").read_bytes()
    parent.kill()
    parent.communicate()
    end = time.monotonic() + 20
    while child.exists() and "Z" not in (child / "stat").read_text().split()[2]:
        assert time.monotonic() < end
        time.sleep(0.05)


# ---- what templates can do ------------------------------------------------------------------------------------------

RENDERED = {  # template -> its text
    "{{ messages|tojson }}": '[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]',
    "{{ {'a': '<\u00e9>'}|tojson(indent=1) }}": '{\n "a": "<\u00e9>"\n}',
    "{{ {'a': '\u00e9'}|tojson(ensure_ascii=true) }}": '{"a": "\\u00e9"}',
    "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role }}{% endfor %}!": "user!",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}": "assistant",
    "{% macro f(m) %}<{{ m.content }}>{% endmacro %}{% for m in messages %}{{ f(m) }}{% endfor %}": "<x><y>",
    "{% set n = namespace(a=0) %}{% for m in messages %}{% set n.a = n.a + 1 %}{% endfor %}{{ n.a }}": "2",
    "a {% generation %}b {{ messages[-1].content }}{% endgeneration %} c": "a b y c",
    "{{ tools is none }} {{ documents is none }} {{ strftime_now('%Y')|length }}": "True True 4",
}


@pytest.mark.parametrize("template", RENDERED)
def test_templates_may_use_what_transformers_gives_them(template):
    [ours] = rendered(template, CHAT, [(2, False)], {"tools": None, "documents": None})
    [theirs] = render_jinja_template([CHAT], chat_template=template)[0]
    assert ours == theirs == RENDERED[template]


def test_each_text_is_whole_whether_or_not_it_extends_the_one_before():
    template = "{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert rendered(template, CHAT, [(1, False), (2, False), (1, True)], {}) == ["1x", "2xy", "1x"]
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ '>' if add_generation_prompt }}"
    assert rendered(template, CHAT, [(1, False), (1, True), (2, False)], {}) == ["x", "x>", "xy"]


SHARED = Path(__file__).parents[2] / "shared" / "templates"
PUBLIC = sorted(SHARED.glob("*.jinja"))  # of public models, where a machine has them


@pytest.mark.skipif(not PUBLIC, reason="the public templates are not here")
@pytest.mark.parametrize("path", PUBLIC, ids=lambda path: path.stem)
def test_public_templates_give_transformers_text(path):
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    template, chat = read_template(path), [*CHAT, {"role": "user", "content": "z"}]
    try:
        [theirs] = render_jinja_template([chat], chat_template=template, add_generation_prompt=True, **special)[0]
    except Exception:
        with pytest.raises(ValueError, match="the chat template fails"):
            rendered(template, chat, [(3, True)], special)
        return
    assert rendered(template, chat, [(3, True)], special) == [theirs]


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b" \n", b"{{ \xff }}"], ids=["empty", "blank", "no_text"])
def test_a_template_file_that_is_empty_or_no_text_is_refused(content, tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(content)
    with pytest.raises(ModelError, match="the chat template") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.at == tmp_path / "chat_template.jinja"


@pytest.mark.parametrize("value, expected", [
    ([{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}], "D"), ("A", "A"), (None, None),
    ([{"name": "tools", "template": "T"}], ModelError), ({"a": "b"}, ModelError), (7, ModelError),
])  # fmt: skip
def test_the_template_of_a_config_is_its_text_or_the_default_of_a_list(value, expected, tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": value}))
    if expected is ModelError:
        with pytest.raises(ModelError, match="the chat template"):
            load_tokenizer(tmp_path)
    else:
        assert load_tokenizer(tmp_path).chat_template == expected


def test_an_empty_template_of_a_config_is_not_chatml(tokenizer, tmp_path):
    replace(tokenizer, chat_template="").save(tmp_path)
    with pytest.raises(ValueError, match="renders nothing"):
        encode_chat(load_tokenizer(tmp_path), CHAT[:1])
