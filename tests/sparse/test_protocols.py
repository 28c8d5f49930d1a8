"""What is asked of servers and read from them, against doubles.

The doubles stand in for servers that cannot be run here: upstream PowerInfer's /completion and an OpenAI server that returns
no token ids. They hold this project's reading of those protocols, not the servers themselves.
"""

import http.server
import json
import sys
import threading

import pytest

from vllm_powerquant.errors import PowerQuantConfigError, PowerQuantEngineError, PowerQuantUnsupportedError
from vllm_powerquant.sparse import outputs
from vllm_powerquant.sparse.executor import SamplingParams, SparseEngine
from vllm_powerquant.sparse.outputs import Types


class Double(http.server.BaseHTTPRequestHandler):
    """A server that records request bodies and sends what the test says."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.reply(self.server.pages.get(self.path))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, body))
        answer = self.server.pages.get(self.path)
        self.reply(answer(body) if callable(answer) else answer)

    def reply(self, answer):
        status = 404 if answer is None else 200
        if isinstance(answer, tuple):
            status, answer = answer
        if isinstance(answer, list):
            # a stream, which ends with the connection
            data = "".join(
                f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n" for event in answer
            ).encode()
            self.close_connection = True
            headers = {"Content-Type": "text/event-stream"}
        else:
            data = (answer if isinstance(answer, str) else json.dumps(answer or {"error": "no such page"})).encode()
            headers = {"Content-Length": str(len(data))}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def double():
    """Start a double with these pages; has .url and .requests."""
    servers = []

    def start(pages: dict):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Double)
        server.pages, server.requests = pages, []
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


# Upstream PowerInfer


FINAL = {
    "content": " world",
    "stop": True,
    "tokens_predicted": 2,
    "stopped_eos": False,
    "stopped_limit": True,
    "stopped_word": False,
    "stopping_word": "",
}


def powerinfer(double, answer) -> tuple[SparseEngine, list]:
    server = double({"/completion": answer})
    return SparseEngine(url=server.url, protocol="powerinfer", vllm_types=False), server.requests


def test_powerinfer_request_has_every_field_that_its_defaults_would_change(double):
    engine, requests = powerinfer(double, FINAL)
    params = SamplingParams(
        temperature=0.5, top_k=3, top_p=0.9, seed=11, stop="###", max_tokens=7, repetition_penalty=1.2, logit_bias={5: -1}
    )
    (output,) = engine.generate("Hello", params)
    assert output.outputs[0].text == " world" and output.outputs[0].finish_reason == "length"
    assert output.prompt == "Hello" and output.prompt_token_ids is None and output.outputs[0].token_ids == []
    assert requests == [
        (
            "/completion",
            {
                "prompt": "Hello",
                "n_predict": 7,
                "temperature": 0.5,
                "top_k": 3,
                "top_p": 0.9,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "repeat_penalty": 1.2,
                "repeat_last_n": -1,
                "ignore_eos": False,
                "seed": 11,
                "stop": ["###"],
                "logit_bias": [[5, -1]],
                "stream": False,
            },
        )
    ]
    engine.generate([[1, 2, 3]], {"max_tokens": None})
    assert requests[1][1]["prompt"] == [1, 2, 3] and requests[1][1]["n_predict"] == -1 and requests[1][1]["seed"] == -1


@pytest.mark.parametrize(
    ("ending", "reason", "stopped_by"),
    [
        ({"stopped_limit": True}, "length", None),
        ({"stopped_limit": False, "stopped_eos": True}, "stop", None),
        ({"stopped_limit": False, "stopped_word": True, "stopping_word": "###"}, "stop", "###"),
    ],
)
def test_powerinfer_endings(double, ending, reason, stopped_by):
    engine, _ = powerinfer(double, FINAL | ending)
    (answer,) = engine.generate("Hello")[0].outputs
    assert (answer.finish_reason, answer.stop_reason) == (reason, stopped_by)


def test_powerinfer_stream(double):
    engine, requests = powerinfer(double, [{"content": "Hello", "stop": False}, {"content": ",", "stop": False}, FINAL])
    parts = list(engine.stream("x"))
    assert [part.outputs[0].text for part in parts] == ["Hello", "Hello,", "Hello, world"]
    assert [part.finished for part in parts] == [False, False, True] and requests[0][1]["stream"] is True


@pytest.mark.parametrize(
    "params",
    [{"n": 2}, {"logprobs": 1}, {"min_p": 0.1}, {"stop_token_ids": [3]}, {"min_tokens": 1}, {"bad_words": ["x"]}],
    ids=str,
)
def test_powerinfer_refuses_what_its_protocol_lacks(double, params):
    engine, requests = powerinfer(double, FINAL)
    with pytest.raises(PowerQuantUnsupportedError, match=f"no counterpart of {next(iter(params))}"):
        engine.generate("Hello", params)
    assert requests == []


def test_powerinfer_gets_messages_as_text(double):
    engine, requests = powerinfer(double, FINAL)
    messages = [{"role": "user", "content": "Hello"}]
    with pytest.raises(PowerQuantUnsupportedError, match="has no chat endpoint.*chat_template"):
        engine.chat(messages)
    template = "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}\n{% endfor %}ASSISTANT:"
    engine = SparseEngine(url=engine.url, protocol="powerinfer", chat_template=template, vllm_types=False)
    assert engine.chat(messages)[0].outputs[0].text == " world"
    assert requests[0][1]["prompt"] == "USER: Hello\nASSISTANT:"


def test_powerinfer_gets_one_request_at_a_time(double):
    busy, most, lock = 0, 0, threading.Lock()

    def answer(body):
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        threading.Event().wait(0.02)
        with lock:
            busy -= 1
        return FINAL

    engine, requests = powerinfer(double, answer)
    assert len(engine.generate(["a", "b", "c", "d"])) == 4 and most == 1
    assert [body["prompt"] for _, body in requests] == ["a", "b", "c", "d"]


# An OpenAI server that returns no token ids


def openai_double(double, **pages):
    models = {"data": [{"id": "m", "owned_by": "someone"}]}
    return double({"/v1/models": models, **{f"/v1/{name.replace('_', '/')}": page for name, page in pages.items()}})


COMPLETION = {"id": "c-1", "choices": [{"index": 0, "text": "Hi", "finish_reason": "stop", "stop_reason": "x"}]}
CHAT = {"id": "c-2", "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "length"}]}


def test_other_openai_server_gets_only_what_was_asked_for(double):
    server = openai_double(double, completions=COMPLETION, chat_completions=CHAT)
    engine = SparseEngine(url=f"{server.url}/v1", vllm_types=False)
    (output,) = engine.generate("Hello")
    assert output.request_id == "c-1" and output.outputs[0].token_ids == [] and output.outputs[0].stop_reason == "x"
    engine.chat([{"role": "user", "content": "a"}], {"top_p": 0.5, "max_tokens": None, "stop": ["b"]})
    assert server.requests == [
        ("/v1/completions", {"model": "m", "temperature": 1.0, "max_tokens": 16, "prompt": "Hello"}),
        (
            "/v1/chat/completions",
            {
                "model": "m",
                "temperature": 1.0,
                "top_p": 0.5,
                "max_tokens": None,
                "stop": ["b"],
                "messages": [{"role": "user", "content": "a"}],
            },
        ),
    ]
    with pytest.raises(PowerQuantUnsupportedError, match="logprobs are by token id"):
        engine.generate("Hello", {"logprobs": 1})


def test_stream_that_breaks_off_is_an_error(double):
    chunk = {"id": "c", "choices": [{"index": 0, "text": "Hel", "finish_reason": None}]}
    engine = SparseEngine(url=openai_double(double, completions=[chunk]).url, vllm_types=False)
    with pytest.raises(PowerQuantEngineError, match="failed after 3 characters of the answer: .* broke off"):
        list(engine.stream("Hello"))


def test_error_within_a_stream(double):
    pieces = [{"id": "c", "choices": [{"index": 0, "text": "Hel"}]}, {"error": {"message": "out of memory"}}, "[DONE]"]
    engine = SparseEngine(url=openai_double(double, completions=pieces).url, vllm_types=False)
    with pytest.raises(PowerQuantEngineError, match="out of memory"):
        list(engine.stream("Hello"))


@pytest.mark.parametrize(
    ("page", "kind", "text"),
    [
        ((400, {"error": {"message": "temperature is odd"}}), PowerQuantConfigError, r"temperature is odd \(status 400\)"),
        ((429, {"error": {"message": "queue is full"}}), PowerQuantEngineError, "queue is full"),
        ((500, "<html>"), PowerQuantEngineError, r"<html> \(status 500\)"),
        ((404, {"detail": "Not Found"}), PowerQuantConfigError, "Not Found"),
        ("no json", PowerQuantEngineError, "no JSON object"),
        ("[1]", PowerQuantEngineError, "no JSON object"),
    ],
)
def test_answers_that_are_errors(double, page, kind, text):
    engine = SparseEngine(url=openai_double(double, completions=page).url, vllm_types=False)
    with pytest.raises(kind, match=text):
        engine.generate("Hello")


@pytest.mark.parametrize("models", ["<html>", "{}", {"data": [1]}], ids=str)
def test_server_of_another_kind(double, models):
    with pytest.raises(PowerQuantEngineError, match="is this an OpenAI server"):
        SparseEngine(url=double({"/v1/models": models}).url)


# Sampling parameters and classes


class OtherParams:
    """Has the fields of vLLM's SamplingParams that matter here, as vLLM's object has them."""

    __struct_fields__ = ("n", "temperature", "stop", "structured_outputs", "output_kind", "_all_stop_token_ids")

    def __init__(self, **values):
        defaults = {"n": 1, "temperature": 1.0, "stop": [], "structured_outputs": None, "output_kind": 0}
        self.__dict__.update(defaults | values)


def test_parameters_of_vllm_s_kind():
    params = SamplingParams.of(OtherParams(temperature=0.5, stop=["x"], output_kind=2))
    assert params.changed() == {"temperature": 0.5, "stop": ["x"]}
    assert SamplingParams.of(OtherParams()).changed() == {}
    with pytest.raises(PowerQuantUnsupportedError, match="structured_outputs is not supported by the engine"):
        SamplingParams.of(OtherParams(structured_outputs={"json": {}}))
    with pytest.raises(PowerQuantConfigError, match="must be a SamplingParams or a mapping"):
        SamplingParams.of(3)


@pytest.mark.vllm
def test_defaults_and_classes_are_vllm_s():
    vllm = pytest.importorskip("vllm")
    assert (
        SamplingParams.of(vllm.SamplingParams()) == SamplingParams.of(None)
        or not SamplingParams.of(vllm.SamplingParams()).changed()
    )
    params = SamplingParams.of(vllm.SamplingParams(temperature=0.5, seed=3, stop="x", logit_bias={4: 1.0}, max_tokens=None))
    assert params.changed() == {"temperature": 0.5, "seed": 3, "stop": ["x"], "logit_bias": {"4": 1.0}}
    assert params.max_tokens is None
    with pytest.raises(PowerQuantUnsupportedError, match="prompt_logprobs is not supported"):
        SamplingParams.of(vllm.SamplingParams(prompt_logprobs=1))
    from vllm.logprobs import Logprob
    from vllm.outputs import CompletionOutput, RequestOutput

    for vllm_types in (None, True):
        assert Types.choose(vllm_types) == Types(RequestOutput, CompletionOutput, Logprob)
    choice = outputs.Choice("a", [1], [{1: outputs.Logprob(-1.0, 1)}], -1.0, "stop")
    answer = outputs.Answer("id", "prompt", [2], {0: choice})
    theirs, ours = answer.output(Types.choose(True), True), answer.output(Types.choose(False), True)
    for kind, pair in (("request", (theirs, ours)), ("completion", (theirs.outputs[0], ours.outputs[0]))):
        for name in vars(pair[1]):
            if name not in ("outputs", "logprobs"):
                assert getattr(pair[0], name) == getattr(pair[1], name), (kind, name)
    assert theirs.outputs[0].logprobs == [{1: Logprob(-1.0, 1)}] and theirs.outputs[0].finished()


def test_classes_are_this_package_s_where_vllm_is_not_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    assert Types.choose(None) == Types() == Types.choose(False)
    for name in ("vllm", "vllm.logprobs", "vllm.outputs"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(PowerQuantUnsupportedError, match="use vllm_types=False"):
        Types.choose(True)
