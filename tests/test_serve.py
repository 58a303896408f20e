"""A model that talks: the server through OpenAI's client and a browser, `chat` and `generate` on the command line."""

import contextlib
import http.client
import io
import itertools
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import uvicorn
from conftest import sentences
from starlette.responses import Response
from starlette.routing import Route

from llmkit.commands import app as cli
from llmkit.errors import ENVIRONMENT, MODEL, MachineError
from llmkit.generation.sampling import Sampling
from llmkit.inference.connections import WatchedProtocol
from llmkit.inference.protocol import Limits
from llmkit.inference.server import Server, serve
from llmkit.inference.writer import Writer
from llmkit.models import bert, build_model, folder, llama
from llmkit.tokenizer.load import load_tokenizer
from llmkit.tokenizer.train import train_tokenizer

POSITIONS, LONG = 4096, 2000  # tokens of context, and of an answer that takes seconds

# ---- the model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Return a folder with a model that predicts the next token of some sentences, changed a little by the context.

    Its texts look like the sentences. At temperature 0 they never end; otherwise they end after some lines.
    """
    path, text = tmp_path_factory.mktemp("model") / "tiny", sentences(1, 300)
    words = train_tokenizer([text], vocab_size=300)
    ids, size = torch.tensor(words.encode(text)), len(words)
    follow = torch.full((size, size), 0.002).index_put((ids[:-1], ids[1:]), torch.tensor(1.0), accumulate=True)
    line_end = words.encode(".\n")[-1]
    follow[line_end, words.end_of_turn_id] = follow[line_end, words.eos_id] = 0.08 * follow[line_end].sum()
    config = llama.Config(
        vocab_size=size, hidden_size=size, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, max_position_embeddings=POSITIONS,
    )  # fmt: skip
    made, generator = build_model(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        made.model.embed_tokens.weight.copy_(torch.eye(size))
        made.lm_head.weight.copy_((follow / follow.sum(1, keepdim=True)).log().T / size**0.5)
        for name, weight in made.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.normal_(0, 0.015, generator=generator)
    folder.save_model(made, path, eos_token_ids=[words.eos_id])
    words.save(path)
    return path


@pytest.fixture(scope="module")
def writer(model) -> Writer:
    """Return the same model in this process: the expected answers."""
    return Writer(folder.load_model(model).eval(), load_tokenizer(model), False)


def written(writer: Writer, ids: list[int], seed: int = 0, number: int = 60, *, chat: bool = False, **options):
    """Return the text, its tokens, and how it ended."""
    sampling = Sampling(**{"temperature": 1.0, "top_k": None} | options)
    [text] = writer.write([ids], sampling=sampling, max_new_tokens=number, seed=seed, chat=chat)
    return "".join(text), text.tokens, text.ended


def asking(*contents: str) -> list[dict[str, str]]:
    """Return a conversation: user and assistant in turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


# ---- the server -----------------------------------------------------------------------------------------------------


@dataclass
class Serving:
    """A running `llmkit serve`."""

    process: subprocess.Popen
    port: int
    log: Path

    def wait(self) -> "Serving":
        end = time.monotonic() + 120
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return self
            time.sleep(0.05)
        raise AssertionError(f"the server did not start: {self.log.read_text()}")

    def request(self, body=None, path="/v1/completions", method="POST", **headers: str) -> tuple[int, str]:
        """Send a bare request. Return the status and the body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"content-type": "application/json"} | {key.replace("_", "-"): text for key, text in headers.items()}
        connection.request(method, path, body if isinstance(body, str | bytes) else json.dumps(body), headers)
        answer = connection.getresponse()
        found = answer.status, answer.read().decode()
        connection.close()
        return found

    @contextlib.contextmanager
    def leaving(self, **body) -> Iterator[http.client.HTTPConnection]:
        """Send a request whose client disconnects at the end of the block."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        whole = {"model": "tiny", "prompt": "The", "temperature": 0, "max_tokens": LONG} | body
        connection.request("POST", "/v1/completions", json.dumps(whole), {"content-type": "application/json"})
        yield connection
        connection.sock.close()

    def seconds_to(self, status: int, **body) -> float:
        """Return the time until a short request is answered with this status."""
        begun = time.monotonic()
        while self.request({"model": "tiny", "prompt": "The", "max_tokens": 1} | body)[0] != status:
            assert time.monotonic() - begun < 60
            time.sleep(0.02)
        return time.monotonic() - begun


def serving(model: Path, log: Path, *options: object) -> Serving:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "llmkit", "serve", model, "--port", port, "--name", "tiny", *options]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*map(str, command), "--no-compile", "--precision", "fp32"], stdout=file, stderr=file
        )
    return Serving(process, port, log)


@pytest.fixture(scope="module")
def start(model, tmp_path_factory) -> Iterator[Callable[[], Serving]]:
    """Return a function that starts servers, which end with the tests."""
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    logs, started = tmp_path_factory.mktemp("logs"), []

    def one_more() -> Serving:
        log = logs / f"{len(started)}.txt"
        started.append(serving(model, log, "--max-requests", 3, "--max-body-kb", 50))
        return started[-1]

    yield one_more
    for one in started:
        one.process.kill()
        one.process.wait()


@pytest.fixture(scope="module")
def servers(start) -> list[Serving]:
    """Start one server to talk with and one to interrupt, at the same time."""
    return [start(), start()]


@pytest.fixture
def server(servers, start) -> Serving:
    if servers[0].process.poll() is not None:
        servers[0] = start()
    return servers[0].wait()


@pytest.fixture
def client(server):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)


def complete(client, prompt="The model", **options):
    return client.completions.create(model="tiny", prompt=prompt, **{"max_tokens": 60, "seed": 1} | options)


def talk(client, *contents: str, **options):
    messages = asking(*contents)
    return client.chat.completions.create(model="tiny", messages=messages, **{"max_tokens": 60, "seed": 1} | options)


def gathered(stream) -> tuple[dict[int, str], dict[int, str], object]:
    """Return the texts of a streamed answer, how they ended, and the usage."""
    texts, ended, usage = {}, {}, None
    for event in stream:
        usage = usage or event.usage
        for choice in event.choices:
            assert choice.index not in ended
            said = choice.delta.content if hasattr(choice, "delta") else choice.text
            texts[choice.index] = texts.get(choice.index, "") + (said or "")
            if choice.finish_reason:
                ended[choice.index] = choice.finish_reason
    return texts, ended, usage


def test_the_model_is_listed(client):
    [one] = client.models.list().data
    assert (one.id, one.object, one.owned_by) == ("tiny", "model", "llmkit") and one.created > 1.7e9


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_a_completion_is_the_models_own_text(client, writer, seed):
    text, tokens, ended = written(writer, writer.encode("The model"), seed)
    answer = complete(client, seed=seed)
    assert (answer.object, answer.model) == ("text_completion", "tiny")
    [choice] = answer.choices
    assert (choice.index, choice.text, choice.finish_reason) == (0, text, ended)
    assert answer.usage.prompt_tokens == len(writer.encode("The model"))
    assert answer.usage.completion_tokens == len(tokens) > 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(tokens)


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_a_chat_completion_is_the_models_own_text(client, writer, seed):
    contents = ["What is it?", "A river.", "And the <|im_end|> token?"]
    ids = writer.encode_chat(asking(*contents))
    text, tokens, ended = written(writer, ids, seed, chat=True)
    answer = talk(client, *contents, seed=seed)
    [choice] = answer.choices
    assert answer.object == "chat.completion" and choice.message.role == "assistant"
    assert (choice.message.content, choice.finish_reason) == (text, ended)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), len(tokens))


def test_an_answer_does_not_begin_with_the_space_of_its_first_word(client, writer):
    ids = writer.encode("The model")
    text, tokens, ended = written(writer, ids, temperature=0)
    assert text[0] == " " and written(writer, ids, temperature=0, chat=True) == (text[1:], tokens, ended)
    spaced = asking("What is it? The model")
    [pieces] = writer.write([writer.encode_chat(spaced)], sampling=Sampling(temperature=0), max_new_tokens=9, chat=True)
    assert all(pieces)


def test_answers_end_by_the_end_token_or_at_the_length(client, writer):
    ids = writer.encode_chat(asking("Go on"))
    ended = {seed: written(writer, ids, seed, 30, chat=True)[2] for seed in range(20)}
    assert set(ended.values()) == {"stop", "length"}
    for how in ("stop", "length"):
        seed = next(seed for seed in ended if ended[seed] == how)
        whole = talk(client, "Go on", seed=seed, max_tokens=30)
        assert whole.choices[0].finish_reason == how and "<|im_end|>" not in whole.choices[0].message.content
        assert (whole.usage.completion_tokens == 30) == (how == "length")
        streamed = gathered(talk(client, "Go on", seed=seed, max_tokens=30, stream=True))
        assert streamed[:2] == ({0: whole.choices[0].message.content}, {0: how})


STREAMED = {
    "plain": {}, "cold": {"temperature": 0}, "hot": {"temperature": 1.5, "seed": 5}, "two": {"n": 2},
    "end": {"stop": "."},
    "vllm": {"extra_body": {"top_k": 3, "min_p": 0.05, "repetition_penalty": 1.3}, "top_p": 0.9},
}  # fmt: skip


@pytest.mark.parametrize("options", STREAMED.values(), ids=STREAMED)
def test_streamed_and_whole_answers_are_the_same(client, options):
    with_usage = {"stream": True, "stream_options": {"include_usage": True}}
    whole = complete(client, **options)
    texts, ended, usage = gathered(complete(client, **options, **with_usage))
    assert texts == {choice.index: choice.text for choice in whole.choices} and usage == whole.usage
    assert ended == {choice.index: choice.finish_reason for choice in whole.choices}
    whole = talk(client, "What is it?", **options)
    texts, ended, usage = gathered(talk(client, "What is it?", **options, **with_usage))
    assert texts == {choice.index: choice.message.content for choice in whole.choices} and usage == whole.usage
    assert ended == {choice.index: choice.finish_reason for choice in whole.choices}


def test_a_stream_comes_while_it_is_written(client):
    begun, times = time.monotonic(), []
    for _ in complete(client, max_tokens=800, temperature=0, stream=True):
        times.append(time.monotonic() - begun)
    assert len(times) > 500 and times[0] < 0.3 * times[-1]


def test_a_seed_fixes_the_text_and_none_does_not(client):
    same = {complete(client, seed=3).choices[0].text for _ in range(3)}
    assert len(same) == 1
    other = {complete(client, seed=seed).choices[0].text for seed in (4, 5, -6, 2**40)}
    assert len(other - same) == 4
    free = {client.completions.create(model="tiny", prompt="The", max_tokens=40).choices[0].text for _ in range(3)}
    assert len(free) == 3


def test_temperature_zero_needs_no_seed(client, writer):
    text, _, _ = written(writer, writer.encode("The model"), temperature=0)
    assert {complete(client, temperature=0, seed=seed).choices[0].text for seed in (1, 2)} == {text}


def test_several_prompts_have_several_answers(client, writer):
    prompts = ["The model", "A river is"]
    answer = complete(client, prompts, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    rows = [writer.encode(prompt) for prompt in prompts for _ in range(2)]
    texts = [written(writer, ids, 1 + row) for row, ids in enumerate(rows)]
    assert [choice.text for choice in answer.choices] == [text for text, _, _ in texts]
    assert answer.usage.prompt_tokens == sum(len(writer.encode(prompt)) for prompt in prompts)
    assert answer.usage.completion_tokens == sum(len(tokens) for _, tokens, _ in texts)


def test_a_prompt_may_be_token_ids(client, writer):
    ids = writer.encode("The model")
    assert complete(client, ids).choices[0].text == complete(client).choices[0].text
    assert [c.text for c in complete(client, [ids, ids]).choices] == [c.text for c in complete(client, n=2).choices]


def test_echo_puts_the_prompt_first(client, writer):
    plain = complete(client, n=2)
    for prompt in ("The model", writer.encode("The model")):
        echoed = complete(client, prompt, n=2, echo=True)
        assert [c.text for c in echoed.choices] == [f"The model{c.text}" for c in plain.choices]
        assert gathered(complete(client, prompt, n=2, echo=True, stream=True))[0][1] == echoed.choices[1].text


@pytest.mark.parametrize("stop", [".", ["river", "."], ["never there", "e", "a ", "x"], "\n"])
def test_a_stop_string_ends_the_text_and_is_not_in_it(client, stop):
    stops = [stop] if isinstance(stop, str) else stop
    texts = ((seed, complete(client, seed=seed).choices[0]) for seed in range(100))
    seed, whole = next((seed, one) for seed, one in texts if any(word in one.text for word in stops))
    cut = complete(client, seed=seed, stop=stop).choices[0]
    place = min(whole.text.find(word) for word in stops if word in whole.text)
    assert (cut.text, cut.finish_reason) == (whole.text[:place], "stop")


def test_an_empty_stop_string_is_refused(client):
    with pytest.raises(pytest.importorskip("openai").BadRequestError, match="stop"):
        complete(client, stop="")


def test_parts_developers_and_both_names_of_the_length_are_understood(client, writer):
    parts = [{"type": "text", "text": "What "}, {"type": "text", "text": "is it?"}]
    messages = [{"role": "developer", "content": "Be brief"}, {"role": "user", "content": parts}]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=9, seed=1)
    plain = [{"role": "system", "content": "Be brief"}, *asking("What is it?")]
    text, tokens, _ = written(writer, writer.encode_chat(plain), 1, 9, chat=True)
    assert answer.choices[0].message.content == text and answer.usage.completion_tokens == len(tokens)


def test_a_chat_without_a_length_writes_to_its_end(client, writer):
    ids = writer.encode_chat(asking("Go on"))
    seed = next(seed for seed in range(50) if written(writer, ids, seed, 2048, chat=True)[2] == "stop")
    answer = client.chat.completions.create(model="tiny", messages=asking("Go on"), seed=seed)
    assert answer.choices[0].message.content == written(writer, ids, seed, 2048, chat=True)[0]
    assert answer.choices[0].finish_reason == "stop"


def test_a_prompt_may_fill_all_but_one_position(client):
    answer = complete(client, [90] * (POSITIONS - 1), max_tokens=50)
    assert answer.choices[0].finish_reason == "length" and answer.usage.total_tokens - POSITIONS in (0, 1)


def test_a_request_need_not_name_the_model_and_health_is_told(server, client):
    status, said = server.request({"prompt": "a", "max_tokens": 3, "temperature": 0})
    named = complete(client, "a", max_tokens=3, temperature=0)
    assert status == 200 and json.loads(said)["choices"][0]["text"] == named.choices[0].text
    assert json.loads(server.request(None, "/health", "GET")[1]) == {"status": "ok", "running": 0}


def test_a_null_is_no_value(server):
    names = "model temperature top_p n stop seed stream stream_options user logprobs tools presence_penalty".split()
    talk = {"messages": [{"role": "user", "content": "a", "refusal": None, "tool_calls": None}], "max_tokens": 3}
    plain = server.request(talk | {"temperature": 0.0, "seed": 1}, "/v1/chat/completions")
    nulls = server.request(dict.fromkeys(names) | talk | {"temperature": 0.0, "seed": 1}, "/v1/chat/completions")
    assert plain[0] == nulls[0] == 200
    assert json.loads(plain[1])["choices"] == json.loads(nulls[1])["choices"]


DEFAULTS = {  # what OpenAI's clients and others send without being asked
    "logprobs": False, "top_logprobs": 0, "logit_bias": {}, "store": False, "service_tier": "auto", "metadata": {},
    "tool_choice": "auto", "parallel_tool_calls": True, "tools": [], "modalities": ["text"], "presence_penalty": 0,
    "response_format": {"type": "text"}, "n": 1.0, "stream": False, "top_p": 1.0, "seed": None,
}  # fmt: skip


def test_defaults_that_clients_send_change_nothing(server):
    talk = {"messages": [{"role": "user", "content": "a", "name": "Ada"}], "max_tokens": 3, "temperature": 0}
    plain, full = (server.request(body, "/v1/chat/completions") for body in (talk, talk | DEFAULTS))
    assert plain[0] == full[0] == 200 and json.loads(plain[1])["choices"] == json.loads(full[1])["choices"]


def test_tools_and_earlier_calls_reach_the_template(writer):
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [*asking("How is it?"), {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "1", "content": "fine"}]  # fmt: skip
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    seen = []
    spy = replace(writer)
    spy.encode_chat = lambda *given: seen.append(given) or writer.encode_chat(*given)
    with watched(spy) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        body = json.dumps({"messages": messages, "tools": [tool], "max_tokens": 2})
        connection.request(
            "POST", "/v1/chat/completions", body, {"content-type": "application/json", "host": "localhost"}
        )
        assert connection.getresponse().status == 200
    [(said, tools, _)] = seen
    assert said[1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Oslo"}} and tools == [
        tool
    ]


def test_variables_reach_a_template_that_names_them(writer):
    template = "{{ reasoning_effort }}|{{ enable_thinking }}|{{ documents[0].text }}|{{ messages[0].content }}"
    spy, seen = replace(writer, tokenizer=replace(writer.tokenizer, chat_template=template)), []
    encode = spy.encode_chat
    spy.encode_chat = lambda *given: seen.append(encode(*given)) or seen[-1]
    body = {"messages": asking("a"), "max_tokens": 2, "reasoning_effort": "low", "documents": [{"text": "d"}]}
    with watched(spy) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        for kwargs, status in (({"enable_thinking": False}, 200), ({"thinking_budget": 5}, 400), ({"tools": []}, 400)):
            whole = json.dumps(body | {"chat_template_kwargs": kwargs})
            headers = {"content-type": "application/json", "host": "localhost"}
            connection.request("POST", "/v1/chat/completions", whole, headers)
            answer = connection.getresponse()
            assert answer.status == status, answer.read()
            assert status == 200 or next(iter(kwargs)) in answer.read().decode()
            answer.read()
    assert [spy.tokenizer.decode(ids) for ids in seen] == ["low|False|d|a"]


# ---- log-probabilities -----------------------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_forward_pass(client, writer):
    """Of the prompt and of what is written, as OpenAI's completions have them."""
    done = complete(client, "the model", max_tokens=4, temperature=0, logprobs=2, echo=True)
    found = done.choices[0].logprobs
    prompt = writer.encode("the model")
    with torch.no_grad():
        log_probs = writer.model(torch.tensor([prompt]))[0].float().log_softmax(-1)
    expected = log_probs[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    assert found.token_logprobs[1 : len(prompt)] == pytest.approx(expected, abs=1e-2)
    assert len(found.tokens) == len(prompt) + done.usage.completion_tokens == len(found.token_logprobs)
    for own, top in zip(found.token_logprobs[len(prompt) :], found.top_logprobs[len(prompt) :], strict=True):
        assert own == pytest.approx(max(top.values()))  # greedy: each token is the likeliest
    assert "".join(found.tokens) == done.choices[0].text


def test_logprobs_of_a_chat(client):
    options = {"model": "tiny", "messages": asking("Hello"), "max_tokens": 3, "temperature": 0}
    answer = client.chat.completions.create(**options, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for one in content:
        assert len(one.top_logprobs) == 3 and one.logprob == pytest.approx(one.top_logprobs[0].logprob)
        assert bytes(one.bytes).decode() == one.token
    assert client.chat.completions.create(**options).choices[0].logprobs is None


@pytest.mark.slow
def test_the_harness_asks_the_server(server, writer, tmp_path):
    """lm-evaluation-harness's local-completions gets the scores that the model has here."""
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity")
    from lm_eval.tasks import TaskManager

    from llmkit.tasks.run import prepare, run_task

    records = [{"q": f"The {word}", "a": ["model", "token"], "right": i % 2} for i, word in enumerate("abcd")]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    (tmp_path / "asked.yaml").write_text(
        f"task: asked\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'q.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: a\ndoc_to_target: right\n"
        "metric_list: [{metric: acc}, {metric: brier_score}]\nmetadata: {version: 1}\n"
    )
    writer.tokenizer.save(tmp_path / "tokenizer")
    address = f"http://127.0.0.1:{server.port}/v1/completions"
    found = lm_eval.simple_evaluate(
        "local-completions",
        model_args={"base_url": address, "model": "tiny", "tokenizer": str(tmp_path / "tokenizer"), "max_length": 60},
        tasks=["asked"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )["results"]["asked"]
    ours = run_task(prepare(tmp_path / "asked.yaml"), writer.model, writer.tokenizer).figures
    assert found["acc,none"] == ours["acc"] and found["brier_score,none"] == pytest.approx(
        ours["brier_score"], rel=1e-2
    )


# ---- what is refused ------------------------------------------------------------------------------------------------

COMPLETIONS = {  # changes to a good request -> status, and what the message names
    "another_model": ({"model": "gpt-4"}, 404, "gpt-4"),
    "too_many_logprobs": ({"logprobs": 21}, 400, "logprobs"),
    "logprobs_of_a_stream": ({"logprobs": 1, "stream": True}, 400, "logprobs"),
    "best_of": ({"best_of": 2}, 400, "best_of"),
    "penalty": ({"presence_penalty": 0.5}, 400, "presence_penalty: only 0 is supported"),
    "too_many_tokens": ({"max_tokens": 2049}, 400, "max_tokens"),
    "a_flood": ({"prompt": ["a"] * 9000}, 400, "over 8 answers"),
    "usage_of_no_stream": ({"stream": False, "stream_options": {"include_usage": True}}, 400, "stream_options"),
    "no_tokens": ({"max_tokens": 0}, 400, "max_tokens"),
    "text_for_a_number": ({"max_tokens": "5"}, 400, "max_tokens"),
    "too_many_answers": ({"n": 9}, 400, "n"),
    "too_many_prompts": ({"prompt": ["a"] * 5, "n": 2}, 400, "n"),
    "too_hot": ({"temperature": 2.5}, 400, "temperature"),
    "negative_temperature": ({"temperature": -1}, 400, "temperature"),
    "no_probability": ({"top_p": 0}, 400, "top_p"),
    "five_stops": ({"stop": list("abcde")}, 400, "stop"),
    "too_long": ({"prompt": [90] * POSITIONS}, 400, "4096"),
    "no_prompts": ({"prompt": []}, 400, "prompt"),
    "empty_prompt": ({"prompt": [[]]}, 400, "a prompt is empty prompt"),
    "empty_text": ({"prompt": ""}, 400, "a prompt is empty prompt"),
    "one_text_is_empty": ({"prompt": ["a", ""]}, 400, "a prompt is empty prompt"),
    "one_is_empty": ({"prompt": [[90], []]}, 400, "prompt"),
    "no_prompt": ({"prompt": None}, 400, "prompt"),
    "object": ({"prompt": {"a": 1}}, 400, "prompt"),
    "no_such_token": ({"prompt": [300]}, 400, "prompt"),
    "negative_token": ({"prompt": [90, -1]}, 400, "prompt"),
    "huge_token": ({"prompt": [2**40]}, 400, "prompt"),
    "huge_tokens": ({"prompt": [[90], [2**70]]}, 400, "prompt"),
}
CHATS = {
    "another_model": ({"model": "gpt-4"}, 404, "gpt-4"),
    "no_messages": ({"messages": []}, 400, "messages"),
    "voice": ({"messages": [{"role": "user", "content": "a", "voice": "Ada"}]}, 400, "voice"),
    "calls_of_a_user": (
        {"messages": [{"role": "user", "content": "a", "tool_calls": [{"function": {"name": "f"}}]}]},
        400,
        "tool_calls",
    ),
    "unknown_role": ({"messages": [{"role": "boss", "content": "a"}]}, 400, "role"),
    "list_for_a_role": ({"messages": [{"role": ["user"], "content": "a"}]}, 400, "role"),
    "object_for_a_role": ({"messages": [{"role": {"a": 1}, "content": "a"}]}, 400, "role"),
    "picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        400,
        "messages.0",
    ),
    "no_content": ({"messages": [{"role": "user", "content": None}]}, 400, "content"),
    "tools": ({"tools": [{"type": "function", "function": {}}]}, 400, "tools.0.function.name"),
    "another_choice": ({"tool_choice": "required"}, 400, "tool_choice"),
    "a_call_that_is_not_json": (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        400,
        "messages",
    ),
    "reserved_variable": ({"chat_template_kwargs": {"messages": []}}, 400, "chat_template_kwargs"),
    "two_efforts": (
        {"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}},
        400,
        "another",
    ),
    "no_place_for_an_effort": ({"reasoning_effort": "low"}, 400, "reasoning_effort"),
    "json": ({"response_format": {"type": "json_object"}}, 400, "response_format"),
    "both_lengths": ({"max_tokens": 5, "max_completion_tokens": 5}, 400, "max_tokens"),
    "too_many_tokens": ({"max_completion_tokens": 5000}, 400, "max_tokens"),
    "too_long": ({"messages": [{"role": "user", "content": "qz" * 5000}]}, 400, "4096"),
}


def is_an_error(found: tuple[int, str], status: int, *words: str) -> dict:
    """Assert that the answer is an error in OpenAI's format that contains all `words`."""
    assert found[0] == status, found
    error = json.loads(found[1])["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert all(word in f"{error['message']} {error['param']}" for word in words), error
    return error


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("case", COMPLETIONS)
def test_a_bad_completion_is_refused(server, case, stream):
    changes, status, word = COMPLETIONS[case]
    body = {"model": "tiny", "prompt": "The", "max_tokens": 2, "stream": stream} | changes
    is_an_error(server.request(body), status, word)


@pytest.mark.parametrize("case", CHATS)
def test_a_bad_chat_is_refused(server, case):
    changes, status, word = CHATS[case]
    found = server.request({"model": "tiny", "messages": asking("Hello")} | changes, "/v1/chat/completions")
    is_an_error(found, status, word)


def test_openais_client_raises_its_own_errors(client):
    import openai

    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="gpt-4", prompt="a")
    assert unknown.value.code == "model_not_found" and unknown.value.param == "model"
    with pytest.raises(openai.BadRequestError) as unsupported:
        complete(client, presence_penalty=1)
    assert unsupported.value.param == "presence_penalty" and "only 0 is supported" in str(unsupported.value)
    with pytest.raises(openai.BadRequestError) as long:
        complete(client, [90] * POSITIONS)
    assert long.value.code == "context_length_exceeded"


@pytest.mark.parametrize("temperature", [1e-3, 1e-40, 1e-300])
def test_hardly_any_temperature_is_the_likeliest_text(server, writer, temperature):
    body = {"model": "tiny", "prompt": "The model", "max_tokens": 20, "seed": 1, "temperature": temperature}
    status, answer = server.request(body)
    assert status == 200, answer
    assert (
        json.loads(answer)["choices"][0]["text"] == written(writer, writer.encode("The model"), 1, 20, temperature=0)[0]
    )


@pytest.mark.parametrize("body", ["", "{", "[]", "null", "7", "{" * 10_000, b"\xff\xfe", '{"model": "tiny"} {}'])
def test_what_is_no_json_object_is_refused(server, body):
    is_an_error(server.request(body), 400)


def test_a_body_that_is_too_large_is_refused(server):
    is_an_error(server.request({"model": "tiny", "prompt": "a" * 60_000}), 413, "50000 bytes")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data"])
def test_another_content_type_is_refused(server, kind):
    is_an_error(server.request({"model": "tiny", "prompt": "a"}, content_type=kind), 415, "application/json")


def test_a_content_type_may_name_its_letters(server):
    body = {"model": "tiny", "prompt": "a", "max_tokens": 1}
    assert server.request(body, content_type="Application/JSON; charset=utf-8")[0] == 200


@pytest.mark.parametrize("path", ["/", "/v1/models", "/v1/completions"])
@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "", "[::2]", "[::1"]
)
def test_a_foreign_host_is_refused(server, path, host):
    body = {"model": "tiny", "prompt": "a", "max_tokens": 1}
    is_an_error(server.request(body, path, "POST" if "completions" in path else "GET", host=host), 400, "Host header")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1234", "127.0.0.1:80", "[::1]", "[::1]:80"])
def test_its_own_names_are_let_in(server, host):
    assert server.request(None, "/v1/models", "GET", host=host)[0] == 200


@pytest.mark.parametrize("method, path, status", [
    ("GET", "/v1/completions", 405), ("POST", "/v1/models", 405), ("GET", "/v1/files", 404),
    ("OPTIONS", "/v1/completions", 405),
])  # fmt: skip
def test_other_paths_and_methods_are_errors(server, method, path, status):
    is_an_error(server.request(None, path, method), status)


def test_the_page_may_only_talk_to_this_server(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", "/")
    answer = connection.getresponse()
    policy = answer.getheader("content-security-policy")
    assert all(rule in policy for rule in ("default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'"))
    assert answer.getheader("x-content-type-options") == "nosniff"
    assert b"<title>llmkit</title>" in answer.read()
    connection.close()


def test_lone_surrogates_are_no_error_of_the_server(server):
    for path, body in (("/v1/completions", '{"prompt": "\\ud800", "max_tokens": 1}'),
                       ("/v1/chat/completions", '{"messages": [{"role": "user", "content": "\\ud83d"}]}')):  # fmt: skip
        is_an_error(server.request(body, path), 400)


# ---- connections ----------------------------------------------------------------------------------------------------

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n"
STUCK = {  # what a client sends, and goes on sending now and then
    "nothing": (b"", b""),
    "half_a_head": (HEAD, b"X-A: b\r\n"),
    "half_a_body": (HEAD + b"\r\n{", b" "),
    "a_body_that_no_one_wants": (HEAD.replace(b"/v1/completions", b"/nowhere") + b"\r\n", b" "),
    "silence_after_an_answer": (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b""),
}


@contextlib.contextmanager
def watched(writer: Writer | None = None) -> Iterator[int]:
    """Run uvicorn with the application of a server in this process, and return its port."""
    server = Server({"": writer}, "none", Limits(body_bytes=1000, new_tokens=9, concurrent_requests=3))
    huge = Route("/huge", lambda request: Response(b"x" * 50_000_000))
    app = server.build_app({"localhost"})
    app.router.routes.append(huge)
    http_server = uvicorn.Server(uvicorn.Config(app, http=WatchedProtocol, log_level="error"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=http_server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield listening.getsockname()[1]
        http_server.should_exit = http_server.force_exit = True
        thread.join()


def seconds_until_closed(connection: socket.socket, more: bytes) -> float:
    """Send `more` now and then until the server closes the connection."""
    begin = time.monotonic()
    connection.settimeout(0.1)
    while time.monotonic() < begin + 20:
        try:
            connection.send(more)
            if connection.recv(1000) == b"":
                break
        except TimeoutError:
            continue
        except OSError:
            break
    return time.monotonic() - begin


@pytest.mark.parametrize("first, more", STUCK.values(), ids=STUCK)
def test_a_connection_that_is_stuck_is_closed(first, more, monkeypatch):
    monkeypatch.setattr("llmkit.inference.connections.CHECK_SECONDS", 0.5)
    with watched() as port, socket.create_connection(("127.0.0.1", port)) as connection:
        connection.send(first)
        assert seconds_until_closed(connection, more) < 10


@pytest.mark.parametrize("host", ["bad host!", "a\0b", "x" * 300, "256.0.0.1"])
def test_an_address_that_can_not_be_listened_on_is_one_error(writer, host):
    with pytest.raises(MachineError, match="the server can't listen") as error:
        serve(writer, "none", host, 0, Limits(body_bytes=1, new_tokens=1, concurrent_requests=1), say=pytest.fail)
    assert error.value.at == f"{host}:0"


def test_a_slow_upload_is_not_closed(monkeypatch):
    monkeypatch.setattr("llmkit.inference.connections.CHECK_SECONDS", 0.4)
    monkeypatch.setattr("llmkit.inference.connections.LEAST_BYTES", 30)
    with watched() as port, socket.create_connection(("127.0.0.1", port)) as connection:
        connection.send(HEAD.replace(b"99", b"400") + b"\r\n{")
        for _ in range(39):  # 100 bytes a second
            time.sleep(0.1)
            connection.send(b" " * 10)
        connection.send(b" " * 8 + b"}")
        connection.settimeout(5)
        assert connection.recv(1000).startswith(b"HTTP/1.1 4")  # an answer: this server has no model


def test_a_client_that_does_not_read_is_closed_and_one_that_reads_slowly_is_not(monkeypatch):
    monkeypatch.setattr("llmkit.inference.connections.CHECK_SECONDS", 0.4)
    with watched() as port:
        ask = b"GET /huge HTTP/1.1\r\nHost: localhost\r\n\r\n"
        with (
            socket.create_connection(("127.0.0.1", port)) as idle,
            socket.create_connection(("127.0.0.1", port)) as slow,
        ):
            idle.send(ask)
            slow.send(ask)
            for _ in range(20):
                time.sleep(0.1)
                assert slow.recv(1_000_000)
            with contextlib.suppress(ConnectionResetError):
                assert sum(len(part) for part in iter(lambda: idle.recv(1_000_000), b"")) < 50_000_000


def test_idle_connections_do_not_lock_out_others(monkeypatch):
    monkeypatch.setattr("llmkit.inference.connections.MOST_CONNECTIONS", 5)
    with watched() as port, contextlib.ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(9)]
        for _ in range(3):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", "/health", headers={"host": "localhost"})
            assert connection.getresponse().status == 200
            connection.close()
        idle[0].settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            assert idle[0].recv(1) == b""  # the oldest ones were closed


def test_a_heavy_chat_template_is_an_error_of_its_request(writer):
    template = "{% set a = 'xx' %}" + "{% set a = a ~ a %}" * 40 + "{{ a }}"
    heavy = replace(writer, tokenizer=replace(writer.tokenizer, chat_template=template))
    with watched(heavy) as port:
        for path, body, status in (("chat/completions", {"messages": asking("Hello")}, 400),
                                   ("completions", {"prompt": "The", "max_tokens": 2}, 200)):  # fmt: skip
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            headers = {"host": "localhost", "content-type": "application/json"}
            connection.request("POST", f"/v1/{path}", json.dumps(body), headers)
            answer = connection.getresponse()
            said = answer.read().decode()
            assert answer.status == status and ("the chat template takes over" in said) == (status == 400)


# ---- several at once ------------------------------------------------------------------------------------------------


def test_two_streams_at_once_are_the_same_texts_as_alone(client):
    prompts = {"The model": 1, "A river is": 2}
    alone = {prompt: complete(client, prompt, seed=seed, max_tokens=300).choices[0].text
             for prompt, seed in prompts.items()}  # fmt: skip
    together, overlapping = {}, []

    def read(prompt: str, seed: int) -> None:
        pieces = []
        for event in complete(client, prompt, seed=seed, max_tokens=300, stream=True):
            pieces.append(event.choices[0].text)
            overlapping.append(prompt)
        together[prompt] = "".join(pieces)

    threads = [threading.Thread(target=read, args=item) for item in prompts.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    assert sum(a != b for a, b in itertools.pairwise(overlapping)) > 5  # they took turns


def test_requests_over_the_limit_are_told_to_come_back_and_clients_that_leave_free_their_places(server):
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stream = stack.enter_context(server.leaving(stream=True)).getresponse()
            assert stream.status == 200 and stream.readline().startswith(b"data: ")
        found = server.request({"model": "tiny", "prompt": "The"})
        assert is_an_error(found, 429)["code"] == "rate_limit_exceeded"
        assert server.request(None, "/v1/models", "GET")[0] == 200
    assert server.seconds_to(200) < 2  # what is left of three answers takes longer


LEFT = {"whole": {}, "several": {"n": 2}, "several_streamed": {"n": 2, "stream": True}}


@pytest.mark.parametrize("body", LEFT.values(), ids=LEFT)
def test_a_client_that_does_not_wait_for_its_answer_frees_its_place(server, body):
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(server.leaving(**{"max_tokens": 1200} | body))
        server.seconds_to(429)
    assert server.seconds_to(200) < 2


def test_clients_that_leave_are_no_errors(server):
    before = len(server.log.read_text())
    with server.leaving():
        time.sleep(0.2)
    with socket.create_connection(("127.0.0.1", server.port)) as half:
        half.send(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                  b"Content-Length: 500\r\n\r\n{")  # fmt: skip
    time.sleep(0.3)
    assert server.seconds_to(200) < 60
    assert "Traceback" not in server.log.read_text()[before:]


# ---- the page -------------------------------------------------------------------------------------------------------


class Page:
    """The page in a headless Chromium."""

    def __init__(self, driver, url: str):
        self.driver, self.url = driver, url

    def open(self) -> "Page":
        self.driver.get(self.url)
        self.until(lambda: self.find("#model").text == "tiny")
        # What the page asks for, for tests to see.
        self.driver.execute_script(
            "const ask = window.fetch; window.asked = [];"
            "window.fetch = (url, options) => { window.asked.push(options.body); return ask(url, options) }"
        )
        return self

    def find(self, selector: str):
        return self.driver.find_element("css selector", selector)

    def set(self, name: str, value: object) -> None:
        self.driver.execute_script("document.getElementById(arguments[0]).value = arguments[1]", name, str(value))

    def press(self, name: str) -> None:
        self.driver.execute_script("document.getElementById(arguments[0]).click()", name)

    def type(self, *keys: str) -> None:
        from selenium.webdriver.common.keys import Keys

        self.find("#text").send_keys(*keys, Keys.ENTER)

    def messages(self) -> list[tuple[str, str]]:
        found = self.driver.execute_script(
            "return [...document.querySelectorAll('.message')].map(one => [one.className, one.textContent])"
        )
        return [(kind.removeprefix("message "), text) for kind, text in found]

    def asked(self) -> list[dict]:
        """Return the messages of the last request."""
        return json.loads(self.driver.execute_script("return window.asked.at(-1)"))["messages"]

    def writes(self) -> bool:
        return self.find("#send").text == "Stop"

    def begins(self) -> None:
        """Wait until an answer begins to appear."""
        self.until(lambda: self.writes() and len(self.messages()[-1][1]) > 5)

    def until(self, true) -> None:
        end = time.monotonic() + 30
        while not true():
            assert time.monotonic() < end
            time.sleep(0.02)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    binary = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    if binary is None or shutil.which("chromedriver") is None:
        pytest.skip("there is no Chromium")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    quiet = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
             "disable-component-update", "disable-sync"]  # fmt: skip
    for option in [*quiet, f"user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(f"--{option}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, server) -> Page:
    page = Page(browser, f"http://localhost:{server.port}/").open()
    page.set("temperature", 0)
    page.set("tokens", LONG)
    return page


def test_a_message_is_answered_on_the_page_as_it_is_written(page, writer):
    page.set("tokens", 400)
    page.type("What is <b>it</b>?")
    page.begins()
    early = page.messages()[-1][1]
    page.until(lambda: not page.writes())
    text, _, _ = written(writer, writer.encode_chat(asking("What is <b>it</b>?")), 0, 400, chat=True, temperature=0)
    assert page.messages() == [("user", "What is <b>it</b>?"), ("assistant", text.strip())]
    assert len(early) < len(text) and text.startswith(early) and page.find("#text").get_attribute("value") == ""
    page.set("tokens", 3)
    page.type("And now?")
    page.until(lambda: len(page.messages()) == 4 and not page.writes())
    assert page.asked() == asking("What is <b>it</b>?", text, "And now?")
    assert page.driver.get_log("browser") == []


def test_stop_ends_an_answer_and_the_talk_goes_on(page):
    page.type("Go on")
    page.begins()
    page.press("send")
    page.until(lambda: not page.writes())
    stopped = page.messages()
    time.sleep(0.3)
    assert page.messages() == stopped and [kind for kind, _ in stopped] == ["user", "assistant"]
    page.set("tokens", 3)
    page.type("More")
    page.until(lambda: len(page.messages()) == 4 and not page.writes())
    first, answer, last = page.asked()
    assert [first, last] == asking("Go on", "", "More")[::2]
    assert answer["role"] == "assistant" and answer["content"].strip() == stopped[1][1]


def test_enter_while_an_answer_is_written_keeps_the_text(page):
    page.type("Go on")
    page.begins()
    page.type("not yet")
    assert page.find("#text").get_attribute("value") == "not yet" and len(page.messages()) == 2
    page.press("send")


def test_shift_and_enter_break_the_line(page):
    from selenium.webdriver.common.keys import Keys

    page.set("tokens", 3)
    page.type("one", Keys.SHIFT + Keys.ENTER + Keys.NULL, "two")
    page.until(lambda: len(page.messages()) == 2 and not page.writes())
    assert page.messages()[0] == ("user", "one\ntwo") and page.asked() == asking("one\ntwo")


@pytest.mark.parametrize("tokens", [3, LONG], ids=["after_an_answer", "during_an_answer"])
def test_new_begins_a_new_conversation(page, tokens):
    page.set("tokens", tokens)
    page.type("Go on")
    page.until(lambda: bool(page.messages()[-1][1]) and page.writes() == (tokens == LONG))
    page.press("new")
    assert page.messages() == []
    page.until(lambda: not page.writes())
    page.set("tokens", 3)
    page.type("Hello")
    page.until(lambda: len(page.messages()) == 2 and not page.writes())
    assert page.asked() == asking("Hello")


def test_an_error_is_shown_and_not_told_to_the_model(page):
    page.set("tokens", 5000)
    page.type("Go on")
    page.until(lambda: not page.writes())
    assert page.messages()[-1] == ("assistant error", "max_tokens is over this server's 2048")
    page.set("tokens", 3)
    page.type("Hello")
    page.until(lambda: len(page.messages()) == 4 and not page.writes())
    assert not any("max_tokens" in message["content"] for message in page.asked())


def test_an_answer_without_a_text_is_said_and_its_question_not_asked_again(page):
    page.driver.execute_script(
        "const real = window.fetch; window.fetch = async () => {"
        " window.fetch = real; return new Response('data: [DONE]\\n\\n') }"
    )
    page.type("Hello")
    page.until(lambda: len(page.messages()) == 2 and not page.writes())
    assert page.messages()[1] == ("assistant error", "The model ended its answer without a text.")
    page.set("tokens", 3)
    page.type("And now?")
    page.until(lambda: len(page.messages()) == 4 and not page.writes())
    assert page.asked() == asking("And now?")


def test_a_system_prompt_comes_first_if_there_is_one(page):
    page.set("tokens", 3)
    page.press("open")
    page.find("#system").send_keys(" Be brief ")
    page.type("Go on")
    page.until(lambda: len(page.messages()) == 2 and not page.writes())
    assert page.asked() == [{"role": "system", "content": "Be brief"}, *asking("Go on")]
    page.set("system", " ")
    page.press("new")
    page.type("Go on")
    page.until(lambda: len(page.messages()) == 2 and not page.writes())
    assert page.asked() == asking("Go on")


@contextlib.contextmanager
def screen(page: Page, width: int, height: int, scheme: str = "light") -> Iterator[None]:
    """Give the page a size and a colour scheme."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    yield
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


SHOWN = {
    "nothing": [],
    "a long word": [("user", "x" * 500), ("assistant", "y" * 500 + " `" + "z" * 500 + "` **" + "w" * 500 + "**")],
    "wide blocks": [("assistant", "```\n" + "code " * 200 + "\n```\n\n| a | b |\n|--|--|\n| " + "c " * 300 + "| d |")],
    "many": [(("user", "assistant")[i % 2], f"line {i}\n\n- item\n  - item\n") for i in range(60)],
    "an error": [("user", "x"), ("assistant error", "https://" + "x" * 300)],
}


@pytest.mark.parametrize("width", [360, 1440])
@pytest.mark.parametrize("settings", [False, True], ids=["settings_closed", "settings_open"])
@pytest.mark.parametrize("messages", SHOWN.values(), ids=SHOWN)
def test_nothing_collides_and_only_messages_scroll(page, width, settings, messages):
    with screen(page, width, 740):
        if settings:
            page.press("open")
        for role, text in messages:
            page.driver.execute_script(
                "const one = show(arguments[0], ''); follow(() => render(one, arguments[1]))", role, text
            )
        boxes = page.driver.execute_script(
            "return Object.fromEntries(['h1', '#open', '#new', '#settings', 'main', '#text', '#send'].map(name => "
            "[name, document.querySelector(name).getBoundingClientRect().toJSON()]))"
        )
        overflow = page.driver.execute_script(
            "return [document.documentElement, document.querySelector('main')].map(x => x.scrollWidth - x.clientWidth)"
        )
        last = page.driver.execute_script(
            "return document.querySelector('.message:last-child')?.getBoundingClientRect().toJSON()"
        )
    assert overflow == [0, 0]
    visible = {name: box for name, box in boxes.items() if box["width"]}
    assert ("#settings" in visible) == settings
    for one, other in itertools.combinations(visible.values(), 2):
        apart = (one["right"] <= other["left"], other["right"] <= one["left"],
                 one["bottom"] <= other["top"], other["bottom"] <= one["top"])  # fmt: skip
        assert any(apart)
    assert all(box["left"] >= 0 and box["right"] <= width and box["top"] >= 0 and box["bottom"] <= 740
               for box in visible.values())  # fmt: skip
    assert boxes["main"]["bottom"] <= boxes["#text"]["top"] and boxes["main"]["height"] > 300
    assert last is None or boxes["main"]["top"] < last["bottom"] <= boxes["main"]["bottom"]
    assert last is None or (last["left"] >= 0 and last["right"] <= width)


def test_the_page_is_dark_where_the_system_is(page):
    colours = {}
    for scheme in ("light", "dark"):
        with screen(page, 800, 600, scheme):
            colours[scheme] = page.driver.execute_script(
                "const style = getComputedStyle(document.body); return [style.color, style.backgroundColor].map("
                "colour => colour.match(/\\d+/g).slice(0, 3).map(Number).reduce((sum, part) => sum + part))"
            )
    assert colours["light"][0] < 150 < 600 < colours["light"][1]
    assert colours["dark"][1] < 150 < 600 < colours["dark"][0]


def test_every_control_has_a_name(page):
    page.press("open")
    names = [one.accessible_name for one in page.driver.find_elements("css selector", "button, input, textarea")]
    assert len(names) == len(set(names)) == 7 and all(names)


def markdown(page: Page, *texts: str) -> str:
    """Return the HTML of an answer that grows from text to text."""
    script = "const one = make('div'); for (const text of arguments) render(one, text); return one.innerHTML"
    return page.driver.execute_script(script, *texts)


WEB = 'target="_blank" rel="noopener noreferrer"'
MARKDOWN = {
    "text": ("  Hello\nyou", "<p>Hello\nyou</p>"),
    "paragraphs": ("a\n\n\nb", "<p>a</p><p>b</p>"),
    "headings": ("# a\n###### b #c\n#d", "<h2>a</h2><h6>b #c</h6><p>#d</p>"),
    "emphasis": ("**a** *b* __c__ _d_ ~~e~~",
                 "<p><strong>a</strong> <em>b</em> <strong>c</strong> <em>d</em> <del>e</del></p>"),
    "both": ("***a*** **b *c***", "<p><strong><em>a</em></strong> <strong>b <em>c</em></strong></p>"),
    "no emphasis": ("2 * 3 * 4, snake_case_name, **open, \\*a\\*", "<p>2 * 3 * 4, snake_case_name, **open, *a*</p>"),
    "code": ("`a <b>` and `` c`d ``", "<p><code>a &lt;b&gt;</code> and <code>c`d</code></p>"),
    "code is not read": ("`**a**` **`b*`**", "<p><code>**a**</code> <strong><code>b*</code></strong></p>"),
    "block": ("```python\na\n\n  **b**\n```\nc", "<pre><code>a\n\n  **b**</code></pre><p>c</p>"),
    "open block": ("~~~\na\n```\n", "<pre><code>a\n```\n</code></pre>"),
    "a fence of tildes may name its language with backticks": ("~~~ a`b\nx\n~~~", "<pre><code>x</code></pre>"),
    "list": ("- a\n- b\n  c\n\n- d", "<ul><li>a</li><li>b\nc</li><li>d</li></ul>"),
    "numbers": ("3. a\n4. b\n- c", '<ol start="3"><li>a</li><li>b</li></ol><ul><li>c</li></ul>'),
    "lists in lists": ("1. a\n   - b\n     - c\n2. d",
                       '<ol start="1"><li>a<ul><li>b<ul><li>c</li></ul></li></ul></li><li>d</li></ol>'),
    "code in a list": ("- a\n  ```\n  b\n    c\n  ```", "<ul><li>a<pre><code>b\n  c</code></pre></li></ul>"),
    "quote": ("> a\n> - b\n\nc", "<blockquote><p>a</p><ul><li>b</li></ul></blockquote><p>c</p>"),
    "rule": ("a\n\n---\n* * *", "<p>a</p><hr><hr>"),
    "table": ("| a | **b** |\n|---|:-:|\n| c | d |\ne",
              '<div class="table"><table><tr><th>a</th><th><strong>b</strong></th></tr><tr><td>c</td><td>d</td></tr>'
              "</table></div><p>e</p>"),
    "no table": ("a | b\nc", "<p>a | b\nc</p>"),
    "link": ("[a *b*](https://c.d/e?f=g)", f'<p><a href="https://c.d/e?f=g" {WEB}>a *b*</a></p>'),
    "address": ("see https://a.b/c_d_e.", f'<p>see <a href="https://a.b/c_d_e" {WEB}>https://a.b/c_d_e</a>.</p>'),
    "image": ("![a](http://b.c/d.png)", f'<p><a href="http://b.c/d.png" {WEB}>a</a></p>'),
    "other links": ("[a](ftp://b) [c](/d)", "<p><span>a (ftp://b)</span> <span>c (/d)</span></p>"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "html"), MARKDOWN.values(), ids=MARKDOWN)
def test_markdown_is_shown(page, text, html):
    assert markdown(page, text) == html
    assert markdown(page, *(text[:end] for end in range(len(text) + 1))) == html  # as it is written


def test_a_block_that_is_complete_is_not_made_again(page):
    same = page.driver.execute_script(
        "const one = make('div'); render(one, '# a\\n\\nb\\n\\nc'); const before = [...one.children];"
        "render(one, '# a\\n\\nb\\n\\nc d'); return before.map((child, i) => child === one.children[i])"
    )
    assert same == [True, True, False]


HOSTILE = [
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "<svg onload='window.hacked = 1'><iframe srcdoc='<script>parent.hacked = 1</script>'>",
    "[x](javascript:window.hacked=1) [y](JaVaScRiPt:window.hacked=1) [z](data:text/html,<script>1</script>)",
    "[x](\x01javascript:window.hacked=1) [y](java\tscript:window.hacked=1) [z](https:javascript:alert`1`)",
    "![x](javascript:window.hacked=1) [<img src=x onerror=window.hacked=1>](https://a.b)",
    '[x](https://a.b/"onmouseover="window.hacked=1) https://a.b/"onclick="window.hacked=1',
    "```html\n<script>window.hacked = 1</script>\n```\n# <b onclick=1>\n- <i>\n> <u>\n\n|<a>|<b>|\n|-|-|\n|<c>|<d>|",
    "`<script>window.hacked = 1</script>` **<img src=x onerror='window.hacked = 1'>**",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_that_a_model_writes_runs(page, text):
    allowed = {"P", "A", "SPAN", "CODE", "PRE", "STRONG", "H2", "UL", "LI", "BLOCKQUOTE", "DIV", "TABLE", "TBODY", "TR",
               "TH", "TD"}  # fmt: skip
    elements = page.driver.execute_script(
        "const one = show('assistant', ''); render(one, arguments[0]); for (const a of one.querySelectorAll('a')) "
        "a.dispatchEvent(new MouseEvent('mouseover')); return [...one.querySelectorAll('*')].map("
        "x => [x.tagName, x.getAttributeNames(), x.getAttribute('href')])",
        text,
    )
    for tag, attributes, address in elements:
        assert tag in allowed and set(attributes) <= {"href", "target", "rel", "class"}
        assert address is None or address.startswith(("http://", "https://"))
    time.sleep(0.05)
    assert page.driver.execute_script("return window.hacked") is None


LONG_LINES = ["*", "_", "`", "~~", "[", "[a](", "!", "> ", "- ", "1. ", "|", "*a ", "_a ", "**a *b ", "`a``", "<", "http://a",
              "https://a.b/)", "\\", "# ", " ", "a|b\n", "-|", "- a\n\n", "> a\n", "```\n", "x"]  # fmt: skip


@pytest.mark.parametrize("part", [*LONG_LINES, "nested"])
def test_100_kb_are_rendered_at_once(page, part):
    nested = "\n".join("  " * i + "- > " * i + "x" for i in range(150))
    text = nested if part == "nested" else part * (100_000 // len(part))
    for whole in (text, f"a|b\n{text}x", f"{text} end*_`~"):
        seconds = page.driver.execute_script(
            "const one = make('div'), begun = performance.now(); render(one, arguments[0]); "
            "return (performance.now() - begun) / 1000",
            whole,
        )
        assert seconds < 2


# ---- its end --------------------------------------------------------------------------------------------------------


def test_ctrl_c_ends_the_server_without_a_traceback(servers):
    one = servers[1].wait()
    assert one.request({"model": "tiny", "prompt": "The"})[0] == 200
    one.process.send_signal(signal.SIGINT)
    assert one.process.wait(timeout=20) in (0, 130)
    assert one.log.read_text().count("\n") <= 2 and "Traceback" not in one.log.read_text()


def test_ctrl_c_does_not_wait_for_answers_that_are_being_written(server):
    with server.leaving(stream=True) as connection:
        stream = connection.getresponse()
        stream.readline()
        server.process.send_signal(signal.SIGINT)
        with contextlib.suppress(http.client.HTTPException, OSError):
            assert b"[DONE]" not in stream.read()
        server.process.wait(timeout=20)
    assert "Traceback" not in server.log.read_text()


# ---- the command line -----------------------------------------------------------------------------------------------

EXACT = ["--no-compile", "--precision", "fp32"]


def run_here(capsys, *arguments: object, code: int = 0) -> str:
    """Return the output of a command, run in this process. With a code, return its error: one block, no traceback."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    assert ended.value.code == code, said.err
    if code:
        assert said.err.startswith("error: ") and said.err.count("error: ") == 1 and "bug" not in said.err
    return said.err if code else said.out


def test_chat_through_a_pipe(model, writer):
    typed = "What is it?\n\nAnd the river?\n   \n/new\nWhat is it?\nBye"
    options = ["--system", "Be brief", "--max-new-tokens", "20", "--seed", "12", "--temperature", "1", "--top-k", "0"]
    command = [sys.executable, "-m", "llmkit", "chat", str(model), *options, *EXACT]
    done = subprocess.run(command, input=typed, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    system = {"role": "system", "content": "Be brief"}
    reply = lambda *contents: written(  # noqa: E731
        writer, writer.encode_chat([system, *asking(*contents)]), 12, 20, chat=True
    )[0]
    first = reply("What is it?")
    second = reply("What is it?", first, "And the river?")
    last = reply("What is it?", first, "Bye")
    assert done.stdout == f"> {first}\n> > {second}\n> > > {first}\n> {last}\n> \n"
    assert "no chat template: messages are formatted by ChatML" in done.stderr and done.stderr.count("\n") == 1
    assert len({first, second, last}) == 3


def test_chat_forgets_the_oldest_messages_when_all_do_not_fit(model, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(f"{i} " + "the river " * 500 for i in range(4))))
    with pytest.raises(SystemExit) as ended:
        cli.main(["chat", str(model), "--max-new-tokens", "9", "--temperature", "0", *EXACT])
    said = capsys.readouterr()
    assert ended.value.code == 0 and "old messages no longer fit the model's 4096 positions" in said.err
    assert said.out.count("> ") >= 5 and said.out.endswith("> \n")


def test_generate_goes_on_with_a_prompt(model, writer, capsys):
    printed = run_here(capsys, "generate", model, "The model", "--max-new-tokens", 40, "--seed", 4, *EXACT)
    text, _, _ = written(writer, writer.encode("The model"), 4, 40, temperature=0.8, top_k=50)
    assert printed == f"The model{text}\n"
    other = run_here(capsys, "generate", model, "The model", "--max-new-tokens", 40, "--seed", 5, *EXACT)
    assert other != printed and other.startswith("The model")


def test_generate_says_as_json_how_a_text_ended(model, writer, capsys):
    options = ["--max-new-tokens", 40, "--temperature", 0, "--json", *EXACT]
    said = json.loads(run_here(capsys, "generate", model, "The model", *options))
    text, tokens, _ = written(writer, writer.encode("The model"), 0, 40, temperature=0)
    assert said == {"prompt": "The model", "text": text, "tokens": len(tokens), "ended": "length"}
    cut = json.loads(run_here(capsys, "generate", model, "The model", *options, "--stop", "zzz", "--stop", text[9:12]))
    assert (cut["text"], cut["ended"]) == (text[: text.find(text[9:12])], "stop") and cut["tokens"] < len(tokens)


def test_generate_writes_several_texts_side_by_side(model, writer, capsys):
    prompts, options = ["The model", "A river is small and", "x"], ["--max-new-tokens", 30, "--seed", 2, *EXACT]
    rows = json.loads(run_here(capsys, "generate", model, *prompts, *options, "--json"))["texts"]
    for row, (said, prompt) in enumerate(zip(rows, prompts, strict=True)):
        text, tokens, ended = written(writer, writer.encode(prompt), 2 + row, 30, temperature=0.8, top_k=50)
        assert said == {"prompt": prompt, "text": text, "tokens": len(tokens), "ended": ended}
    printed = run_here(capsys, "generate", model, *prompts, *options)
    assert printed == "\n---\n".join(row["prompt"] + row["text"] for row in rows) + "\n"


def test_generate_chat_answers_and_does_not_repeat_the_question(model, writer, capsys):
    options = ["--chat", "--max-new-tokens", 60, "--seed", 1, "--temperature", 1, "--top-k", 0, *EXACT]
    text, _, _ = written(writer, writer.encode_chat(asking("What is it?")), 1, 60, chat=True)
    assert run_here(capsys, "generate", model, "What is it?", *options) == f"{text}\n"


def test_generate_reads_a_prompt_from_standard_input(model, writer, capsys, monkeypatch):
    prompt = "The model\nis a"
    monkeypatch.setattr(sys, "stdin", io.StringIO(prompt))
    printed = run_here(capsys, "generate", model, "-", "--temperature", 0, "--max-new-tokens", 9, *EXACT)
    assert printed == prompt + written(writer, writer.encode(prompt), 0, 9, temperature=0)[0] + "\n"


def test_an_empty_stop_option_is_refused(model, capsys):
    assert "empty" in run_here(capsys, "generate", model, "The", *EXACT, "--stop", "", code=2)


def test_hardly_any_temperature_is_the_likeliest_text_on_the_command_line(model, capsys):
    texts = [run_here(capsys, "generate", model, "The", "--temperature", temperature, "--max-new-tokens", 9, *EXACT)
             for temperature in (0, 1e-40)]  # fmt: skip
    assert texts[0] == texts[1]


@pytest.fixture(scope="module")
def encoder(model, tmp_path_factory) -> Path:
    """Return a BERT's folder."""
    path = tmp_path_factory.mktemp("bert")
    sizes = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder.save_model(build_model(bert.Config(**sizes, max_position_embeddings=32)), path)
    load_tokenizer(model).save(path)
    return path


@pytest.mark.parametrize("arguments", [["generate", "a"], ["generate", "a", "b"], ["chat"], ["serve"]], ids=" ".join)
def test_an_encoder_writes_no_text(encoder, arguments, capsys):
    command, *prompts = arguments
    for package in ("starlette", "uvicorn") if command == "serve" else ():
        pytest.importorskip(package)
    said = run_here(capsys, command, encoder, *prompts, *EXACT, code=MODEL)
    assert "bert" in said and "writes no text" in said


def test_a_prompt_that_leaves_no_room_is_one_error(model, capsys):
    said = run_here(capsys, "generate", model, "the river " * 3000, *EXACT, code=3)
    assert "positions" in said


def test_a_port_that_is_taken_is_one_error(model, capsys):
    pytest.importorskip("uvicorn")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = run_here(capsys, "serve", model, "--port", port, *EXACT, code=ENVIRONMENT)
    assert str(port) in said


def test_without_the_packages_serving_is_one_error_that_names_them(model, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "llmkit.inference.server", None)
    monkeypatch.delattr("llmkit.inference.server", raising=False)
    said = run_here(capsys, "serve", model, code=ENVIRONMENT)
    assert "llmkit[serve]" in said
