"""powerinfer-server as a process: OpenAI's protocol, bad input, clients that leave, and its end."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import gzip
import json
import os
import queue
import random
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from vllm_powerquant import model

openai = pytest.importorskip("openai")
pytest.importorskip("gguf")

from sparse.models import SHAPES, Shape, write_checkpoint  # noqa: E402
from vllm_powerquant.sparse.convert import convert  # noqa: E402

CONTEXT = 4096
START_SECONDS = 60


class Server:
    """A server process on a free port."""

    def __init__(self, engine_build: Path, model_path: Path, *flags: str, env: dict[str, str] | None = None):
        command = [engine_build / "powerinfer-server", "--model", model_path, "--port", "0", "--threads", "1", *flags]
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | (env or {}),
        )
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=lambda: lines.put(self.process.stdout.readline()), daemon=True).start()
        line = lines.get(timeout=START_SECONDS)
        match = re.fullmatch(r"listening on (http://127\.0\.0\.1:(\d+))\n", line)
        assert match, (line, self.process.stderr.read() if self.process.poll() is not None else "")
        self.url, self.port = match[1], int(match[2])
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def client(self, **options) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120, **options)

    def complete(self, **fields) -> dict:
        response = self.http.post("/v1/completions", json={"prompt": "Hello", "temperature": 0} | fields)
        assert response.status_code == 200, response.text
        return response.json()

    def metric(self, name: str) -> float:
        text = self.http.get("/metrics").text
        return float(re.search(rf"^powerinfer_{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])

    def wait_for(self, name: str, value: float, seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while (found := self.metric(name)) != value:
            assert time.monotonic() < end, f"{name} is {found}, not {value}"
            time.sleep(0.02)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout=60)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A sparse model that is fast, with a long context and no chat template."""
    folder = tmp_path_factory.mktemp("tiny")
    checkpoint = write_checkpoint(dataclasses.replace(Shape(), context_length=CONTEXT), folder / "checkpoint")
    tokenizer_config = checkpoint / "tokenizer_config.json"
    options = json.loads(tokenizer_config.read_text())
    del options["chat_template"]
    tokenizer_config.write_text(json.dumps(options))
    path = folder / "tiny.gguf"
    convert(checkpoint, path, predictor=checkpoint / "predictor")
    return path


@pytest.fixture(scope="module")
def server(engine_build, tiny_model) -> Iterator[Server]:
    flags = ("--slots", "4", "--queue", "16", "--served-model-name", "tiny", "--chat-template", "chatml")
    with Server(engine_build, tiny_model, *flags) as running:
        yield running
        assert running.stop() == 0


@pytest.fixture(scope="module")
def real(engine_build) -> Iterator[Server]:
    """SmolLM2, which has a chat template and gives sensible text."""
    try:
        path = model.find_gguf("smollm2")
    except model.PowerQuantError as error:
        pytest.skip(str(error))
    with Server(engine_build, path, "--context", "1024", "--threads", "2") as running:
        yield running
        assert running.stop() == 0


def error_of(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def exchange(server: Server, data: bytes) -> bytes:
    """Everything that the server sends until it closes, after `data`."""
    with server.connect() as connection:
        connection.sendall(data)
        received = b""
        while part := connection.recv(65536):
            received += part
        return received


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


# ---- the protocol, through OpenAI's client ----


def test_models(server):
    client = server.client()
    (found,) = client.models.list().data
    assert found.id == "tiny"
    assert server.http.get("/health").json() == {"status": "ok"}


def test_completion(server):
    client = server.client()
    answer = client.completions.create(model="tiny", prompt="Hello", max_tokens=8, temperature=0)
    assert answer.object == "text_completion"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8
    again = client.completions.create(model="tiny", prompt="Hello", max_tokens=8, temperature=0)
    assert again.choices[0].text == answer.choices[0].text
    assert again.id != answer.id


def test_prompts_as_text_and_token_ids(server):
    client = server.client()
    ids = server.http.post("/tokenize", json={"prompt": "Hello there"}).json()
    assert ids["count"] == len(ids["tokens"])
    assert ids["max_model_len"] == CONTEXT
    assert server.http.post("/detokenize", json={"tokens": ids["tokens"]}).json()["prompt"].endswith("Hello there")
    create = client.completions.create
    text = create(model="tiny", prompt="Hello there", max_tokens=5, temperature=0).choices[0].text
    for prompt in (ids["tokens"], ["Hello there"], [ids["tokens"]]):
        assert create(model="tiny", prompt=prompt, max_tokens=5, temperature=0).choices[0].text == text
    two = create(model="tiny", prompt=["Hello there", "Bye"], n=2, max_tokens=5, temperature=0)
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
    assert two.choices[0].text == two.choices[1].text == text
    assert two.choices[2].text == two.choices[3].text
    assert two.usage.completion_tokens == 20


def test_stream_is_the_whole_answer(server):
    client = server.client()
    asked = dict(model="tiny", prompt=["Hello", "Good"], n=2, max_tokens=30, temperature=1, seed=3, ignore_eos=True)
    extra = {"ignore_eos": asked.pop("ignore_eos")}
    whole = client.completions.create(**asked, extra_body=extra)
    texts, finishes, usage = [""] * 4, [None] * 4, None
    for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}, extra_body=extra):
        if not chunk.choices:
            usage = chunk.usage
            continue
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        finishes[choice.index] = choice.finish_reason or finishes[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert finishes == ["length"] * 4
    assert usage == whole.usage
    assert len(set(texts)) == 4  # each choice has its own seed


def test_stream_format(server):
    body = {"prompt": "Hello", "max_tokens": 3, "stream": True, "temperature": 0}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        text = "".join(response.iter_text())
    events = text.split("\n\n")
    assert events.pop() == ""
    assert events.pop() == "data: [DONE]"
    assert all(event.startswith("data: {") for event in events)


def test_chat(server):
    client = server.client()
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    asked = dict(model="tiny", messages=messages, max_completion_tokens=9, temperature=0.7, seed=1)
    answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    (choice,) = answer.choices
    assert answer.object == "chat.completion"
    assert choice.message.role == "assistant"
    assert len(choice.logprobs.content) == answer.usage.completion_tokens
    for token in choice.logprobs.content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 2
        assert token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
    data = b"".join(bytes(token.bytes) for token in choice.logprobs.content)
    if choice.finish_reason == "length":
        assert data.decode(errors="replace") == choice.message.content
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content
    assert chunks[-1].choices[0].finish_reason == choice.finish_reason


def test_logprobs_and_echo(server):
    client = server.client()
    answer = client.completions.create(model="tiny", prompt="Hello you", max_tokens=4, temperature=0, logprobs=3, echo=True)
    (choice,) = answer.choices
    logprobs = choice.logprobs
    assert choice.text.startswith("Hello you")
    count = answer.usage.total_tokens
    lists = (logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, logprobs.text_offset)
    assert [len(values) for values in lists] == [count] * 4
    assert logprobs.token_logprobs[0] is None
    assert logprobs.top_logprobs[0] is None
    for token, value, top in list(zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True))[1:]:
        assert top[token] == value
        assert len(top) in (3, 4)
    # greedy: each generated token is the likeliest
    for value, top in list(zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True))[-4:]:
        assert value == max(top.values())
    # the scores of a prompt are those of the same tokens when they were generated
    ids = server.http.post("/tokenize", json={"prompt": "Hello you"}).json()["tokens"]
    scored = server.complete(prompt=ids, max_tokens=0, logprobs=0, echo=True)["choices"][0]
    assert scored["finish_reason"] == "length"
    assert scored["logprobs"]["token_logprobs"] == logprobs.token_logprobs[: len(ids)]
    assert server.complete(prompt="Hello you", max_tokens=4, echo=True)["choices"][0]["text"] == choice.text


@pytest.fixture(scope="module")
def spm_server(engine_build, tmp_path_factory) -> Iterator[Server]:
    folder = write_checkpoint(Shape(tokenizer="spm", vocab_size=512), tmp_path_factory.mktemp("spm"))
    convert(folder, folder / "spm.gguf", predictor=folder / "predictor", progress=False)
    with Server(engine_build, folder / "spm.gguf") as started:
        yield started


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("prompt", ["Hello you", " Hello  you", "naïve 世界 x", "Hello</s>you", "</s> x", " ", "ids"])
def test_text_offsets_of_sentencepiece_are_where_the_tokens_begin(spm_server, prompt, stream):
    echoed = prompt if prompt != "ids" else "Hello you"
    ids = spm_server.http.post("/tokenize", json={"prompt": echoed}).json()["tokens"]
    asked = {"prompt": ids if prompt == "ids" else prompt, "max_tokens": 1, "logprobs": 0, "echo": True}
    response = spm_server.http.post("/v1/completions", json=asked | {"stream": stream})
    if stream:
        events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        choices = [event["choices"][0] for event in events]
    else:
        choices = response.json()["choices"]
    assert "".join(choice["text"] for choice in choices).startswith(echoed)
    lists = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    tokens, offsets = (sum((part[name] for part in lists), []) for name in ("tokens", "text_offset"))
    assert len(tokens) == len(ids) + 1
    assert offsets[0] == 0 and offsets == sorted(offsets) and offsets[-1] == len(echoed)
    begins = True  # a part of the text, which SentencePiece puts a space in front of
    for token, start, end in zip(tokens[:-1], offsets[:-1], offsets[1:], strict=True):
        part = echoed[start:end]
        special = token in ("<s>", "</s>")
        if special:
            assert part in ("", token)
        elif not token.startswith("bytes:"):
            assert part == token or (begins and f" {part}" == token)
        begins = special


def test_seed_and_sampling(server):
    asked = {"max_tokens": 20, "temperature": 1.5, "ignore_eos": True}
    one = server.complete(**asked, seed=5)["choices"][0]["text"]
    assert server.complete(**asked, seed=5)["choices"][0]["text"] == one
    assert server.complete(**asked, seed=6)["choices"][0]["text"] != one
    greedy = server.complete(max_tokens=20, ignore_eos=True)["choices"][0]["text"]
    for field in ({"top_k": 1}, {"top_p": 0}, {"min_p": 1}):
        assert server.complete(**asked, **field)["choices"][0]["text"] == greedy
    ids = server.http.post("/tokenize", json={"prompt": "e"}).json()["tokens"]
    biased = server.complete(max_tokens=3, logit_bias={str(ids[-1]): 100}, ignore_eos=True)["choices"][0]["text"]
    assert biased == "eee"


def test_stop_strings(server):
    whole = server.complete(max_tokens=40, ignore_eos=True)["choices"][0]["text"]
    # random weights give bytes that are no characters: those are replaced after stop strings are looked for
    for length in (1, 2, 5):
        stop = next(whole[i : i + length] for i in range(3, len(whole)) if "\ufffd" not in whole[i : i + length])
        answer = server.complete(max_tokens=40, ignore_eos=True, stop=[stop, "\x00never"])
        assert answer["choices"][0]["text"] == whole[: whole.find(stop)]
        assert answer["choices"][0]["finish_reason"] == "stop"
        body = {"prompt": "Hello", "temperature": 0, "max_tokens": 40, "ignore_eos": True, "stop": stop, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as response:
            lines = [line[6:] for line in response.iter_lines() if line.startswith("data: {")]
        chunks = [json.loads(line)["choices"][0] for line in lines]
        assert "".join(chunk["text"] for chunk in chunks) == whole[: whole.find(stop)]
        assert chunks[-1]["finish_reason"] == "stop"


def test_stop_token_ids(server):
    ids = server.http.post("/tokenize", json={"prompt": "e", "add_special_tokens": False}).json()["tokens"]
    answer = server.complete(max_tokens=9, logit_bias={str(ids[0]): 100}, stop_token_ids=ids)
    assert answer["choices"][0] | {"index": 0} == {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}
    assert answer["usage"]["completion_tokens"] == 1


def test_real_model_answers(real):
    client = real.client()
    name = client.models.list().data[0].id
    text = client.completions.create(model=name, prompt="The capital of France is", max_tokens=4, temperature=0)
    assert "Paris" in text.choices[0].text
    messages = [{"role": "user", "content": "Answer with one word: what colour is the sky on a clear day?"}]
    answer = client.chat.completions.create(model=name, messages=messages, max_tokens=20, temperature=0)
    streamed = client.chat.completions.create(model=name, messages=messages, max_tokens=20, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == answer.choices[0].message.content
    assert answer.usage.prompt_tokens > 30  # with the template's default system prompt
    messages = [{"role": "user", "content": "Repeat: \U0001f31f\u20ac\u00e9"}]
    emoji = client.chat.completions.create(model=name, messages=messages, max_tokens=12, temperature=0, stream=True)
    for chunk in emoji:
        assert "\ufffd" not in (chunk.choices[0].delta.content or "") or chunk.choices[0].finish_reason


# ---- several requests at once ----


def test_together_as_alone(server):
    chooser = random.Random(0)
    words = "one two three four five six seven eight nine ten".split()
    requests = []
    for i in range(24):
        prompt = " ".join(chooser.choices(words, k=chooser.choice((1, 5, 60, 300))))
        requests.append(
            {"prompt": prompt, "max_tokens": chooser.choice((1, 10, 60)), "temperature": (0, 0.9)[i % 2], "seed": i}
            | ({"logprobs": 2} if i % 3 == 0 else {})
        )
    alone = [server.complete(**request)["choices"] for request in requests]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda request: server.complete(**request)["choices"], requests))
    assert together == alone
    assert server.complete(**requests[0])["choices"] == alone[0]


def test_the_next_turn_reuses_the_prompt_only(server):
    prompt = "one two three four five six seven eight nine ten " * 20
    before = server.metric("cached_prompt_tokens_total")
    first = server.complete(prompt=prompt, max_tokens=30, ignore_eos=True)
    turn = prompt + first["choices"][0]["text"] + " and then"
    second = server.complete(prompt=turn, max_tokens=30, ignore_eos=True)
    assert server.metric("cached_prompt_tokens_total") > before
    # as on a server that never saw the first: a prompt with nothing in common takes the slots in between
    for i in range(4):
        server.complete(prompt=f"{i} filler", max_tokens=1)
    assert server.complete(prompt=turn, max_tokens=30, ignore_eos=True)["choices"] == second["choices"]


def test_slow_reader_does_not_hold_up_others(server):
    body = json.dumps({"prompt": "Hello", "max_tokens": 3000, "ignore_eos": True, "stream": True, "logprobs": 20}).encode()
    with server.connect() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.sendall(post("/v1/completions", body, "Content-Type: application/json"))
        slow.recv(100)
        start = time.monotonic()
        server.complete(max_tokens=20)
        assert time.monotonic() - start < 5


# ---- clients that leave ----


@pytest.mark.parametrize("stream", [False, True])
def test_hanging_up_cancels(server, stream):
    body = json.dumps({"prompt": "Hello", "max_tokens": 4000, "ignore_eos": True, "stream": stream}).encode()
    server.wait_for("requests_running", 0)
    generated = server.metric("generated_tokens_total")
    with server.connect() as connection:
        connection.sendall(post("/v1/completions", body, "Content-Type: application/json"))
        server.wait_for("requests_running", 1)
    server.wait_for("requests_running", 0, seconds=2)
    assert server.metric("generated_tokens_total") - generated < 3900


def test_hanging_up_while_waiting_leaves_the_queue(server):
    body = json.dumps({"prompt": "Hello", "max_tokens": 4000, "ignore_eos": True, "n": 4}).encode()
    with server.connect() as first, server.connect() as second:
        first.sendall(post("/v1/completions", body, "Content-Type: application/json"))
        server.wait_for("requests_running", 4)
        second.sendall(post("/v1/completions", body, "Content-Type: application/json"))
        server.wait_for("requests_waiting", 4)
        second.close()
        server.wait_for("requests_waiting", 0, seconds=2)
        assert server.metric("requests_running") == 4
    server.wait_for("requests_running", 0)


def test_full_queue(server):
    body = json.dumps({"prompt": "Hello", "max_tokens": 4000, "ignore_eos": True, "n": 10}).encode()
    server.wait_for("requests_running", 0)
    with server.connect() as first, server.connect() as second:
        for connection in (first, second):
            connection.sendall(post("/v1/completions", body, "Content-Type: application/json"))
        server.wait_for("requests_waiting", 16)
        response = server.http.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 1})
        error = error_of(response, 429)
        assert error["code"] == "queue_full"
        assert "16" in error["message"]
        assert response.headers["retry-after"]
        with pytest.raises(openai.RateLimitError):
            server.client().completions.create(model="tiny", prompt="Hello")
        assert server.http.get("/health").status_code == 200
    server.wait_for("requests_running", 0)
    assert server.metric("requests_waiting") == 0


# ---- bad requests ----


def test_errors_reach_the_client_as_openais(server):
    client = server.client()
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="other", prompt="x")
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="tiny", prompt="x", temperature=-1)
    assert error.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}], tools=[tool])
    with pytest.raises(openai.BadRequestError, match="response_format"):
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x"}], response_format={"type": "json_object"}
        )


def test_a_prompt_longer_than_the_context_names_both_numbers(server):
    ids = server.http.post("/tokenize", json={"prompt": "e"}).json()["tokens"][-1:]
    error = error_of(server.http.post("/v1/completions", json={"prompt": ids * 5000}), 400)
    assert "5000" in error["message"]
    assert str(CONTEXT) in error["message"]
    error_of(server.http.post("/v1/completions", json={"prompt": ids * CONTEXT, "max_tokens": 1}), 400)
    answer = server.complete(prompt=ids * (CONTEXT - 3), max_tokens=100, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "length"


def test_a_prompt_longer_than_the_context_is_refused_before_its_choices_are_built(server, plain_memory):
    def peak() -> int:  # bytes
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024

    prompt = "a " * 1_500_000
    error_of(server.http.post("/v1/completions", json={"prompt": prompt}, timeout=60), 400)
    before = peak()
    for _ in range(2):
        fields = {"prompt": prompt, "echo": True, "n": 20}
        error_of(server.http.post("/v1/completions", json=fields, timeout=60), 400)
    assert peak() - before < 8 * len(prompt)


def test_paths_methods_and_types(server):
    assert "nowhere" in error_of(server.http.get("/nowhere"), 404)["message"]
    response = server.http.get("/v1/completions")
    error_of(response, 405)
    assert response.headers["allow"] == "POST"
    error_of(server.http.post("/v1/models", json={}), 405)
    error_of(server.http.request("DELETE", "/v1/models"), 405)
    error_of(server.http.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"}), 415)
    assert server.http.head("/v1/models").status_code == 200
    assert server.http.get("/v1/models", headers={"range": "bytes=0-3"}).json()["object"] == "list"
    packed = gzip.compress(json.dumps({"prompt": "Hello", "max_tokens": 1}).encode())
    headers = {"content-encoding": "gzip", "content-type": "application/json"}
    assert server.http.post("/v1/completions", content=packed, headers=headers).status_code in (200, 400, 415)


def test_chat_without_a_template_says_what_to_do(engine_build, tiny_model):
    with Server(engine_build, tiny_model) as plain:
        body = {"messages": [{"role": "user", "content": "x"}]}
        assert "--chat-template" in error_of(plain.http.post("/v1/chat/completions", json=body), 400)["message"]
        assert plain.stop() == 0


def test_template_that_is_not_known(engine_build, tiny_model, tmp_path):
    template = tmp_path / "strange.jinja"
    template.write_text("{% macro m() %}{% endmacro %}{{ m() }}")
    with Server(engine_build, tiny_model, "--chat-template", template) as strange:
        body = {"messages": [{"role": "user", "content": "x"}]}
        error = error_of(strange.http.post("/v1/chat/completions", json=body), 400)
        assert "chat template is not rendered here" in error["message"]


def test_api_key(engine_build, tiny_model):
    with Server(engine_build, tiny_model, env={"POWERINFER_API_KEY": "secret"}) as guarded:
        wrong = ("Bearer wrong", "secret", "Bearer secrets", "bearer")
        for headers in ({}, *({"authorization": value} for value in wrong)):
            for path in ("/v1/models", "/metrics"):
                assert error_of(guarded.http.get(path, headers=headers), 401)["code"] == "invalid_api_key"
            error_of(guarded.http.post("/v1/completions", json={"prompt": "x"}, headers=headers), 401)
        assert guarded.http.get("/health").status_code == 200
        assert guarded.http.get("/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200
        client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="secret")
        assert client.models.list().data


def test_size_limits(engine_build, tiny_model):
    with Server(engine_build, tiny_model, "--max-request-bytes", "1000") as small:
        error = error_of(small.http.post("/v1/completions", json={"prompt": "x" * 2000}), 413)
        assert "1000" in error["message"]
        # a declared length is refused before it is sent; a chunked or packed body as it comes
        declared = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n"
        assert b" 413 " in exchange(small, declared)
        chunks = b"".join(b"3e8\r\n" + b"x" * 1000 + b"\r\n" for _ in range(20))
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
        assert b" 413 " in exchange(small, head + b"\r\n" + chunks + b"0\r\n\r\n")
        bomb = gzip.compress(b" " * 50_000_000)[:900]
        bomb_headers = ("Content-Encoding: gzip", "Content-Type: application/json")
        assert b" 413 " in exchange(small, post("/v1/completions", bomb, *bomb_headers))
        assert small.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200


def test_http_that_is_none(server):
    cases = [
        b"\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
        b"BREW /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nno colon\r\n\r\n",
        b"\x00\xff" * 100 + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n\r\n",
        b"GET /" + b"a" * 10000 + b" HTTP/1.1\r\n\r\n",
        b"GET /" + b"a" * 200000,
        b"GET /health HTTP/1.1\r\nX: " + b"a" * 100000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 20000 + b"\r\n",
        b"GET /%zz%00%ff HTTP/1.1\r\nConnection: close\r\n\r\n",
        b"GET /health?" + b"a=b&" * 1000 + b" HTTP/1.1\r\nConnection: close\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 1e3\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nx",
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\nx",
        post("/v1/completions", b"not gzip", "Content-Encoding: gzip"),
        post("/v1/completions", b"x", "Content-Type: multipart/form-data; boundary=x"),
    ]
    for case in cases:
        with server.connect() as connection:
            connection.sendall(case)
            connection.shutdown(socket.SHUT_WR)
            received = b""
            try:
                while part := connection.recv(65536):
                    received += part
            except ConnectionResetError:
                pass
        assert not received or re.match(rb"HTTP/1\.1 (4\d\d|200) ", received), (case[:60], received[:200])
    assert server.http.get("/health").status_code == 200
    assert server.process.poll() is None


@pytest.mark.parametrize(
    "head",
    [
        b"nonsense\r\n\r\n",
        b"POST /v1/completions HTTP/9.9\r\n\r\n",
        b"POST /" + b"a" * 10000 + b" HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nRange: bytes=x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nX: " + b"a" * 10000 + b"\r\n\r\n",
    ],
    ids=["line", "version", "long path", "range", "long header"],
)
def test_what_follows_malformed_http_is_no_request(server, head):
    received = exchange(server, head + b"GET /health HTTP/1.1\r\n\r\n" * 2)
    assert received.count(b"HTTP/1.1 ") == 1
    assert re.match(rb"HTTP/1\.1 4\d\d ", received)
    assert b"Connection: close" in received


def test_slow_sender_is_cut_off_and_others_are_served(engine_build, tiny_model):
    with Server(engine_build, tiny_model, "--receive-seconds", "2") as server:
        body = post("/v1/completions", b'{"prompt": "Hello"}', "Content-Type: application/json")
        with server.connect() as head, server.connect() as lines, server.connect() as half:
            head.sendall(b"POST /v1/comple")
            lines.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX: ")
            half.sendall(body[:-5])
            start = time.monotonic()
            server.complete(max_tokens=1)
            assert b" 408 " in half.recv(65536)
            assert b" 408 " in lines.recv(65536)
            assert head.recv(65536) == b""
            assert time.monotonic() - start < 10


def test_keep_alive_and_pipelining(server):
    one = post("/v1/completions", b'{"prompt": "Hello", "max_tokens": 1}', "Content-Type: application/json")
    last = one.replace(b"Host: x", b"Host: x\r\nConnection: close")
    received = exchange(server, one * 3 + last)
    assert received.count(b"HTTP/1.1 200 OK") == 4


def test_more_connections_than_the_server_keeps(engine_build, tiny_model):
    with Server(engine_build, tiny_model, "--slots", "2", "--queue", "2") as server:
        idle = [server.connect() for _ in range(150)]  # 2 + 2 + 64 are kept
        try:
            for _ in range(5):
                assert server.http.get("/health").status_code in (200, 503)
        finally:
            for connection in idle:
                connection.close()
        end = time.monotonic() + 20
        while True:
            try:
                if httpx.get(f"{server.url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert time.monotonic() < end
            time.sleep(0.1)
        server.complete(max_tokens=1)


def test_connections_that_send_nothing_make_room(engine_build, tiny_model):
    with Server(engine_build, tiny_model, "--slots", "2", "--queue", "2") as server, contextlib.ExitStack() as stack:
        for _ in range(60):  # 2 + 2 + 64 are kept
            stack.enter_context(server.connect())
        time.sleep(0.5)
        for _ in range(20):
            silent = stack.enter_context(server.connect())
            assert httpx.get(f"{server.url}/health").status_code == 200
        silent.sendall(b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n")
        assert b" 200 " in silent.recv(65536)


def malformed(chooser: random.Random) -> tuple[str, bytes]:
    path = chooser.choice(("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"))
    good = {
        "/v1/completions": {"prompt": "x", "max_tokens": 1, "temperature": 0.5, "stop": ["a"], "logit_bias": {"5": 1}},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "top_p": 0.5},
        "/tokenize": {"prompt": "x"},
        "/detokenize": {"tokens": [1, 2]},
    }[path]
    numbers = [-1, 1e308, 2**63, 2**64, -(2**63), 0.5]
    odd = chooser.choice([None, "", [], {}, [[]], {"a": 1}, "x" * 50, [None], [1.5], [-1], *numbers])
    kind = chooser.randrange(4)
    if kind == 0:  # a broken text
        text = json.dumps(good).encode()
        at = chooser.randrange(1, len(text))
        before, after = text[:at], text[at:]
        return path, chooser.choice((before, before + b"\xff" + after, before + b'"' + after, after, text + b"}"))
    if kind == 1:  # a required field of another type
        field = next(iter(good))
        return path, json.dumps(good | {field: {"wrong": odd}}).encode()
    if kind == 2:  # an unknown field
        return path, json.dumps(good | {f"field{chooser.randrange(1000)}": odd}).encode()
    depth = chooser.randrange(40, 5000)
    return path, json.dumps(good)[:-1].encode() + b', "user": ' + b"[" * depth + b"]" * depth + b"}"


@pytest.mark.slow
def test_ten_thousand_malformed_requests(server):
    chooser = random.Random(7)
    requests = [malformed(chooser) for _ in range(10_000)]
    start = time.monotonic()

    def send(part: list[tuple[str, bytes]]) -> list[tuple[int, bytes]]:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            headers = {"content-type": "application/json"}
            answers = [client.post(path, content=body, headers=headers) for path, body in part]
            return [(answer.status_code, answer.content) for answer in answers]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = [answer for part in pool.map(send, (requests[i::4] for i in range(4))) for answer in part]
    order = [request for i in range(4) for request in requests[i::4]]
    for (path, body), (status, content) in zip(order, answers, strict=True):
        assert 400 <= status < 500, (path, body[:200], status, content)
        assert json.loads(content)["error"]["message"]
    assert time.monotonic() - start < 60
    assert server.process.poll() is None
    server.complete(max_tokens=1)


# ---- beginning and end ----


def run(engine_build: Path, *flags: str, **options) -> subprocess.CompletedProcess:
    command = [str(engine_build / "powerinfer-server"), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def one_line(result: subprocess.CompletedProcess, status: int) -> str:
    assert result.returncode == status, result.stderr
    assert result.stdout == ""
    assert re.fullmatch(r"powerinfer-server: error: [^\n]+\n", result.stderr)
    return result.stderr


def test_flags(engine_build, tiny_model):
    assert run(engine_build, "--help").returncode == 0
    assert "--model" in run(engine_build, "--help").stdout
    assert re.fullmatch(r"powerinfer-server \d+\.\d+\.\d+\n", run(engine_build, "--version").stdout)
    assert "--model" in one_line(run(engine_build), 2)
    for flags in (
        ("--nonsense",),
        ("--port", "70000"),
        ("--port", "x"),
        ("--slots", "0"),
        ("--batch", "8", "--slots", "8"),
        ("--kv", "f8"),
        ("--dense=yes",),
        ("--queue",),
        ("--activation", "gelu"),
        ("--isa", "avx1024"),
        ("--context", "-1"),
        ("--chat-template", "/no/such/file"),
    ):
        assert flags[0].split("=")[0] in one_line(run(engine_build, "--model", tiny_model, *flags), 2)


def test_activation_is_what_the_model_allows(engine_build, tiny_model, tmp_path):
    text = "--activation: the activation of sparse llama models must be relu, got"
    assert f'{text} "gelu"' in one_line(run(engine_build, "--model", tiny_model, "--activation", "gelu"), 2)
    folder = write_checkpoint(dataclasses.replace(SHAPES["tiny-opt"], activation="gelu"), tmp_path / "opt")
    convert(folder, folder / "opt.gguf", progress=False)
    text = '--activation: the activation of opt models must be relu or gelu, got "silu"'
    assert text in one_line(run(engine_build, "--model", folder / "opt.gguf", "--activation", "silu"), 2)
    with Server(engine_build, folder / "opt.gguf", "--activation", "gelu") as server:
        chosen = server.complete(max_tokens=8)["choices"][0]["text"]
    with Server(engine_build, folder / "opt.gguf") as server:
        assert server.complete(max_tokens=8)["choices"][0]["text"] == chosen


def test_bad_model_files(engine_build, tiny_model, tmp_path):
    assert "no-such-file" in one_line(run(engine_build, "--model", "/no-such-file"), 3)
    data = tiny_model.read_bytes()
    contents = {"empty": b"", "text": b"hello world", "cut": data[: len(data) // 2], "magic": b"GGUX" + data[4:]}
    for name, content in contents.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        one_line(run(engine_build, "--model", path), 3)
    one_line(run(engine_build, "--model", tmp_path), 3)


def test_port_taken_and_address_that_is_none(engine_build, tiny_model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert str(port) in one_line(run(engine_build, "--model", tiny_model, "--port", port), 4)
    with Server(engine_build, tiny_model) as first:
        one_line(run(engine_build, "--model", tiny_model, "--port", first.port), 4)
    one_line(run(engine_build, "--model", tiny_model, "--port", 0, "--host", "203.0.113.1"), 4)


def test_too_little_memory(engine_build, tiny_model, plain_memory):
    result = subprocess.run(
        ["bash", "-c", 'ulimit -v 500000; exec "$0" "$@"', engine_build / "powerinfer-server", "--model", tiny_model]
        + ["--port", "0", "--slots", "1000", "--batch", "2000"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 5, (result.returncode, result.stdout, result.stderr)


def test_model_file_truncated_while_it_is_read(engine_build, tiny_model, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_model.read_bytes())
    with Server(engine_build, path) as server:
        os.truncate(path, 0)
        try:
            for i in range(20):
                response = httpx.post(f"{server.url}/v1/completions", json={"prompt": f"Hello {i}"}, timeout=30)
                assert response.status_code == 200  # what it needs is in memory
        except httpx.TransportError:
            assert server.process.wait(timeout=10) == 3
            assert re.fullmatch(r"powerinfer-server: error: [^\n]*truncated[^\n]*\n", server.process.stderr.read())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it(engine_build, tiny_model, number):
    with Server(engine_build, tiny_model) as idle:
        idle.complete(max_tokens=1)
        with idle.connect():
            start = time.monotonic()
            assert idle.stop(number) == 0
            assert time.monotonic() - start < 5


def test_drain_lets_requests_finish(engine_build, tiny_model):
    with Server(engine_build, tiny_model, "--slots", "2") as server:
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            asked = {"prompt": "Hello", "max_tokens": 2000, "ignore_eos": True, "temperature": 0, "n": 4}
            whole = pool.submit(httpx.post, f"{server.url}/v1/completions", json=asked, timeout=60)
            streamed = pool.submit(httpx.post, f"{server.url}/v1/completions", json=asked | {"stream": True}, timeout=60)
            server.wait_for("sequences_total", 8)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
            if server.process.poll() is None:
                try:
                    assert httpx.get(f"{server.url}/health").status_code == 503
                    refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"})
                    assert error_of(refused, 503)["type"] == "service_unavailable_error"
                except httpx.TransportError:
                    pass  # drained in the meantime
            assert whole.result().json()["usage"]["completion_tokens"] == 8000
            assert streamed.result().text.endswith("data: [DONE]\n\n")
        assert server.process.wait(timeout=30) == 0


def test_drain_ends_after_its_time(engine_build, tiny_model):
    with Server(engine_build, tiny_model, "--drain-seconds", "0", "--queue", "64") as server:
        asked = {"prompt": "Hello", "max_tokens": 4000, "ignore_eos": True, "n": 60}
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            whole = pool.submit(httpx.post, f"{server.url}/v1/completions", json=asked, timeout=60)
            server.wait_for("requests_running", 8)
            start = time.monotonic()
            assert server.stop() == 0
            assert time.monotonic() - start < 10
            error_of(whole.result(), 503)


def test_second_signal_ends_at_once(engine_build, tiny_model):
    with Server(engine_build, tiny_model, "--queue", "64") as server, server.connect() as connection:
        body = json.dumps({"prompt": "Hello", "max_tokens": 4000, "ignore_eos": True, "n": 60}).encode()
        connection.sendall(post("/v1/completions", body, "Content-Type: application/json"))
        server.wait_for("requests_running", 8)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert server.stop() == 128 + signal.SIGTERM


def test_metrics_are_prometheus_text(server):
    server.complete(max_tokens=5)
    response = server.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    seen = set()
    for line in response.text.splitlines():
        if line.startswith("# TYPE "):
            seen.add(line.split()[2])
        elif not line.startswith("#"):
            assert re.fullmatch(r'[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? [-+0-9.eInf]+', line), line
    assert {
        "powerinfer_http_requests_total",
        "powerinfer_prompt_tokens_total",
        "powerinfer_generated_tokens_total",
        "powerinfer_time_to_first_token_seconds",
        "powerinfer_time_per_token_seconds",
        "powerinfer_requests_running",
        "powerinfer_requests_waiting",
        "powerinfer_active_neuron_share",
        "powerinfer_kv_bytes",
    } <= seen
    assert 0 < server.metric("active_neuron_share") < 0.5
    assert server.metric("kv_bytes") > 0
    assert server.metric("time_to_first_token_seconds_count") > 0
