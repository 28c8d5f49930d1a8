"""SparseEngine on a real engine with a tiny model: answers, refusals, and what happens when processes die."""

import http.client
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vllm_powerquant.errors import PowerQuantConfigError, PowerQuantEngineError
from vllm_powerquant.sparse.executor import SamplingParams, SparseEngine
from vllm_powerquant.sparse.http import Address, Http
from vllm_powerquant.sparse.process import _Spawner

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=8000, ignore_eos=True)
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def start(engine_server, monkeypatch):
    """Start an engine with one thread; stopped after the test."""
    monkeypatch.setenv("POWERQUANT_ENGINE", str(engine_server))
    engines = []

    def get(model=None, **options) -> SparseEngine:
        own = {} if "url" in options else {"threads": 1}
        engines.append(SparseEngine(model, vllm_types=False, **own, **options))
        return engines[-1]

    yield get
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def engine(engine_server, tiny_model):
    """One engine for the tests that leave it as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POWERQUANT_ENGINE", str(engine_server))
        with SparseEngine(tiny_model, threads=1, slots=4, vllm_types=False) as engine:
            yield engine


def process_of(engine: SparseEngine) -> int:
    return engine._current().process.pid


def is_gone(pid: int, seconds: float = 10) -> bool:
    """Neither running nor a zombie."""
    return wait_for(lambda: not Path(f"/proc/{pid}").exists(), seconds)


def wait_for(check, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not check():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def metric(engine: SparseEngine, name: str) -> float:
    lines = Http(Address.parse(engine.url)).get("/metrics").decode().splitlines()
    (line,) = [line for line in lines if line.startswith(f"powerinfer_{name} ")]
    return float(line.split()[1])


# Answers


def test_batch_gives_each_prompt_the_answer_that_it_gets_alone(engine):
    prompts = ["Hello", "The quick brown fox", "1234", "def main", "naïve café", "x"]
    together = engine.generate(prompts, GREEDY)
    assert [output.prompt for output in together] == prompts
    for prompt, output in zip(prompts, together, strict=True):
        (alone,) = engine.generate(prompt, GREEDY)
        assert output.outputs == alone.outputs and output.finished
        (answer,) = output.outputs
        assert len(answer.token_ids) == 8 and answer.finish_reason == "length" and answer.text


def test_token_ids_are_those_of_the_text(engine):
    (by_text,) = engine.generate("Hello there", GREEDY)
    for prompt in (by_text.prompt_token_ids, {"prompt_token_ids": by_text.prompt_token_ids}, {"prompt": "Hello there"}):
        (again,) = engine.generate(prompt, GREEDY)
        assert again.prompt_token_ids == by_text.prompt_token_ids and again.outputs == by_text.outputs
    (both, _) = engine.generate([by_text.prompt_token_ids, [5]], GREEDY)
    assert both.outputs == by_text.outputs


def test_each_prompt_may_have_its_own_parameters(engine):
    outputs = engine.generate(["a", "b"], [{"max_tokens": 2, "ignore_eos": True}, {"max_tokens": 5, "ignore_eos": True}])
    assert [len(output.outputs[0].token_ids) for output in outputs] == [2, 5]
    with pytest.raises(PowerQuantConfigError, match="1 sampling_params for 2 prompts"):
        engine.generate(["a", "b"], [GREEDY])
    assert engine.generate([], GREEDY) == []


def test_several_answers_stop_strings_and_seed(engine):
    params = {"n": 3, "seed": 7, "max_tokens": 6, "ignore_eos": True}
    (first,), (second,) = engine.generate("Hello", params), engine.generate("Hello", params)
    assert first.outputs == second.outputs and [answer.index for answer in first.outputs] == [0, 1, 2]
    assert len({answer.text for answer in first.outputs}) > 1
    text = engine.generate("Hello", GREEDY)[0].outputs[0].text
    (stopped,) = engine.generate("Hello", {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "stop": text[1:3]})
    assert stopped.outputs[0].finish_reason == "stop" and stopped.outputs[0].text == text[:1]


def test_logprobs_are_by_token(engine):
    (output,) = engine.generate("Hello", {"temperature": 0, "max_tokens": 4, "ignore_eos": True, "logprobs": 2})
    (answer,) = output.outputs
    assert len(answer.logprobs) == 4
    for token, row in zip(answer.token_ids, answer.logprobs, strict=True):
        assert len(row) == 2 and row[token].rank == 1
        assert sorted(row.values(), key=lambda p: p.rank) == sorted(row.values(), key=lambda p: -p.logprob)
    total = sum(row[token].logprob for token, row in zip(answer.token_ids, answer.logprobs, strict=True))
    assert answer.cumulative_logprob == pytest.approx(total)
    (chat,) = engine.chat(HELLO, {"temperature": 0, "max_tokens": 2, "ignore_eos": True, "logprobs": 1})
    assert [set(row) for row in chat.outputs[0].logprobs] == [{token} for token in chat.outputs[0].token_ids]


def test_max_tokens_none_fills_the_context(start, tiny_model):
    engine = start(tiny_model, context=64)
    (output,) = engine.generate("Hello", SamplingParams(max_tokens=None, ignore_eos=True))
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 64


@pytest.mark.parametrize("delta", [False, True])
def test_stream_adds_up_to_the_whole_answer(engine, delta):
    (whole,) = engine.generate("Hello", GREEDY)
    parts = list(engine.stream("Hello", GREEDY, delta=delta))
    assert len(parts) > 2 and [part.finished for part in parts] == [False] * (len(parts) - 1) + [True]
    assert {part.request_id for part in parts} == {parts[0].request_id}
    answers = [part.outputs[0] for part in parts]
    if delta:
        assert "".join(answer.text for answer in answers) == whole.outputs[0].text
        assert sum((answer.token_ids for answer in answers), []) == whole.outputs[0].token_ids
    else:
        assert parts[-1].outputs == whole.outputs
        assert all(later.text.startswith(sooner.text) for sooner, later in zip(answers, answers[1:], strict=False))
    assert parts[-1].prompt_token_ids == whole.prompt_token_ids


def test_leaving_a_stream_cancels_the_request(engine):
    before = metric(engine, "generated_tokens_total")
    for _ in engine.stream("Hello", LONG):
        break
    assert wait_for(lambda: metric(engine, "requests_running") == 0)
    assert metric(engine, "generated_tokens_total") - before < 8000


def test_a_refused_prompt_gives_the_others_up(engine):
    before = metric(engine, "generated_tokens_total")
    with pytest.raises(PowerQuantConfigError, match="outside the vocabulary"):
        engine.generate(["Hello", [10**6]], LONG)
    assert wait_for(lambda: metric(engine, "requests_running") == 0)
    assert metric(engine, "generated_tokens_total") - before < 8000


@pytest.mark.parametrize(
    ("prompt", "params", "text"),
    [
        ("Hello", {"temperature": -1}, "temperature must be"),
        ([1] * 9000, {}, "context"),
        ("Hello", {"min_tokens": 3}, "min_tokens is not supported"),
        ("Hello", {"max_token": 3}, "unknown sampling parameter: max_token"),
        ({"text": "Hello"}, {}, "a prompt must be"),
        ([], {}, "a prompt must be"),
    ],
)
def test_refusals_are_errors_of_the_caller(engine, prompt, params, text):
    with pytest.raises(PowerQuantConfigError, match=text):
        engine.generate([prompt], params)


def test_requests_from_many_threads(engine):
    (expected,) = engine.generate("Hello", GREEDY)
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(engine.generate("Hello", GREEDY)[0])) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.outputs for answer in answers] == [expected.outputs] * 12


# Chat


def test_chat_renders_the_model_s_template(engine, tiny_model):
    (output,) = engine.chat(HELLO, GREEDY)
    assert output.prompt is None
    text = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    (same,) = engine.generate(text, GREEDY)
    assert output.prompt_token_ids == same.prompt_token_ids and output.outputs == same.outputs
    two = engine.chat([HELLO, [*HELLO, {"role": "assistant", "content": "Yes"}, *HELLO]], GREEDY)
    assert two[0].outputs == output.outputs and len(two[1].prompt_token_ids) > len(two[0].prompt_token_ids)
    *_, last = engine.stream(HELLO, GREEDY)
    assert last.outputs == output.outputs


UNUSUAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}"
    "{% else %}{{ '%s' | format(message.content) | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{{ strftime_now('%Y')[:2] }}{% if messages[0].content == 'no' %}{{ raise_exception('not that') }}{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def unusual_model(tmp_path_factory):
    """A model whose template the engine does not render."""
    from sparse.models import SHAPES, write_checkpoint
    from vllm_powerquant.sparse.convert import convert

    folder = write_checkpoint(SHAPES["tiny"], tmp_path_factory.mktemp("unusual") / "tiny")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": UNUSUAL_TEMPLATE}))
    convert(folder, folder / "tiny.gguf", predictor=folder / "predictor", progress=False)
    return folder / "tiny.gguf"


def test_templates_that_the_engine_refuses_are_rendered_here(start, unusual_model):
    transformers = pytest.importorskip("transformers")
    engine = start(unusual_model)
    connection = http.client.HTTPConnection(Address.parse(engine.url).host, Address.parse(engine.url).port)
    connection.request("POST", "/v1/chat/completions", json.dumps({"messages": HELLO}), {"Content-Type": "application/json"})
    assert connection.getresponse().status == 400
    connection.close()
    turns = [{"role": "user", "content": 'é "quoted" 😀'}, {"role": "assistant", "content": "Yes"}, *HELLO]
    tokenizer = transformers.AutoTokenizer.from_pretrained(unusual_model.parent)
    for add in (True, False):
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        (output,) = engine.chat(turns, GREEDY, add_generation_prompt=add)
        assert output.prompt == text and output.prompt_token_ids == ids
        *_, last = engine.stream(turns, GREEDY, add_generation_prompt=add)
        assert last.outputs == output.outputs and last.prompt == text
    with pytest.raises(PowerQuantConfigError, match="not that"):
        engine.chat([{"role": "user", "content": "no"}])


def test_a_template_may_be_given(start, tiny_model):
    engine = start(tiny_model, chat_template="{% for message in messages %}{{ message.content }}!{% endfor %}")
    assert engine.chat(HELLO, GREEDY)[0].prompt == "Hello!"
    (named,) = start(tiny_model, chat_template="llama3").chat(HELLO, GREEDY)
    assert named.prompt is None and named.prompt_token_ids != engine.chat(HELLO, GREEDY)[0].prompt_token_ids
    with pytest.raises(PowerQuantConfigError, match="is neither chatml, .* nor a readable file"):
        start(tiny_model, chat_template="no such name")
    with pytest.raises(PowerQuantConfigError, match="chat template cannot be rendered"):
        start(tiny_model, chat_template="{% for %}").chat(HELLO)


# The process


def test_engine_killed_while_it_works_is_started_again_and_asked_again(start, tiny_model):
    engine = start(tiny_model)
    expected = [output.outputs for output in engine.generate(["Hello", "The", "x"], GREEDY)]
    killed = process_of(engine)
    os.kill(killed, signal.SIGSTOP)  # so that it can't answer before
    timer = threading.Timer(0.3, os.kill, (killed, signal.SIGKILL))
    timer.start()
    assert [output.outputs for output in engine.generate(["Hello", "The", "x"], GREEDY)] == expected
    assert is_gone(killed) and process_of(engine) != killed
    # an answer came in between: one more time
    os.kill(process_of(engine), signal.SIGKILL)
    assert engine.generate("Hello", GREEDY)[0].outputs == expected[0]


def test_engine_that_dies_again_at_once_is_given_up(start, tiny_model, monkeypatch):
    engine = start(tiny_model)
    http_to = SparseEngine._http

    def kill_first(self, address):
        os.kill(self._run.process.pid, signal.SIGKILL)
        return http_to(self, address)

    monkeypatch.setattr(SparseEngine, "_http", kill_first)
    with pytest.raises(PowerQuantEngineError, match="the engine died, killed by SIGKILL"):
        engine.generate("Hello", GREEDY)
    with pytest.raises(PowerQuantEngineError, match="died again after it was restarted, killed by SIGKILL"):
        engine.generate("Hello", GREEDY)
    with pytest.raises(PowerQuantEngineError, match="died again"):
        list(engine.stream("Hello", GREEDY))


def test_engine_killed_during_a_stream_is_one_clear_error(start, tiny_model):
    engine = start(tiny_model)
    killed = process_of(engine)
    stream = engine.stream("Hello", LONG)
    next(stream), next(stream)
    os.kill(killed, signal.SIGKILL)
    with pytest.raises(
        PowerQuantEngineError, match=r"the engine died after \d+ characters of the answer, killed by SIGKILL"
    ):
        for _ in stream:
            pass
    assert is_gone(killed)
    assert engine.generate("Hello", GREEDY)[0].finished


def test_stream_of_which_nothing_came_is_asked_again(start, tiny_model):
    engine = start(tiny_model)
    os.kill(process_of(engine), signal.SIGSTOP)
    threading.Timer(0.3, os.kill, (process_of(engine), signal.SIGKILL)).start()
    *_, last = engine.stream("Hello", GREEDY)
    assert last.finished


def test_close_leaves_no_process_and_refuses_requests(start, tiny_model):
    engine = start(tiny_model)
    pid = process_of(engine)
    engine.close()
    assert is_gone(pid, 0)
    with pytest.raises(PowerQuantEngineError, match="is closed"):
        engine.generate("Hello")
    engine.close()


def test_close_does_not_wait_for_a_restart(start, tiny_model, tmp_path, monkeypatch):
    engine = start(tiny_model)
    pid_file = tmp_path / "pid"
    engine._server = fake_server(tmp_path, monkeypatch, f"echo $$ > {pid_file}; exec sleep 600")  # loads for ever
    os.kill(process_of(engine), signal.SIGKILL)
    assert is_gone(engine._run.process.pid)
    errors = []

    def ask():
        with pytest.raises(PowerQuantEngineError) as caught:
            engine.generate("Hello", GREEDY)
        errors.append(str(caught.value))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert wait_for(lambda: pid_file.exists() and pid_file.read_text())
    begin = time.monotonic()
    engine.close()
    for thread in threads:
        thread.join(5)
    assert time.monotonic() - begin < 5
    assert errors == ["this SparseEngine is closed"] * 3
    assert is_gone(int(pid_file.read_text()))


def test_engine_that_does_not_end_is_killed_after_the_drain_that_was_asked_for(start, tiny_model):
    engine = start(tiny_model, drain_seconds=0)
    pid = process_of(engine)
    os.kill(pid, signal.SIGSTOP)
    begin = time.monotonic()
    engine.close()
    assert time.monotonic() - begin < 8 and is_gone(pid, 0)


@pytest.mark.slow
def test_engine_may_take_the_drain_that_was_asked_for(start, tiny_model):
    engine = start(tiny_model, drain_seconds=12)
    process = engine._current().process
    os.kill(process.pid, signal.SIGSTOP)
    threading.Timer(11, os.kill, (process.pid, signal.SIGCONT)).start()
    engine.close()
    assert process.status == 0


def test_interrupt_while_the_engine_is_spawned_leaves_none(tmp_path, monkeypatch, tiny_model):
    pid_file = tmp_path / "pid"
    fake_server(tmp_path, monkeypatch, f"echo $$ > {pid_file}; exec sleep 600")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        # what it waits for when the signal comes
        _Spawner.get().jobs.put((lambda: time.sleep(0.5), queue.SimpleQueue()))
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            SparseEngine(tiny_model)
    finally:
        signal.signal(signal.SIGINT, before)
    _Spawner.get().run(lambda: None)
    time.sleep(0.5)
    assert not pid_file.exists() or is_gone(int(pid_file.read_text()))


def test_garbage_collection_stops_the_engine(engine_server, tiny_model, monkeypatch):
    monkeypatch.setenv("POWERQUANT_ENGINE", str(engine_server))
    engine = SparseEngine(tiny_model, threads=1)
    pid = process_of(engine)
    del engine
    assert is_gone(pid)


def test_thread_that_made_the_engine_may_end(start, tiny_model):
    made = []

    def make():
        engine = start(tiny_model)
        made.extend([engine, process_of(engine)])

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    time.sleep(0.3)
    engine, pid = made
    assert engine.generate("Hello", GREEDY)[0].finished and process_of(engine) == pid


SCRIPT = """
import os, sys, time
from vllm_powerquant.sparse.executor import SparseEngine
engine = SparseEngine(sys.argv[1], threads=1, vllm_types=False)
print(engine._current().process.pid, flush=True)
"""


@pytest.fixture
def script(engine_server, tiny_model):
    """Run SCRIPT and more in a process of its own; (process, the engine's pid)."""
    started = []

    def run(more: str):
        environment = {**os.environ, "POWERQUANT_ENGINE": str(engine_server)}
        # a shell starts what runs in its background with SIGINT ignored
        interruptible = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        command = [sys.executable, "-c", interruptible + SCRIPT + more, str(tiny_model)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment))
        return started[-1], int(started[-1].stdout.readline())

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_engine_ends_with_its_parent(script, number):
    parent, pid = script("time.sleep(600)")
    assert Path(f"/proc/{pid}").exists()
    parent.send_signal(number)
    assert is_gone(pid)


def test_engine_ends_when_the_parent_s_program_does(script):
    parent, pid = script("")
    assert parent.wait(20) == 0 and is_gone(pid)


def test_forked_process_leaves_the_engine_alone(script):
    more = """
if os.fork() == 0:
    engine.close()
    os._exit(0)
os.wait()
print(engine.generate("Hello")[0].finished)
"""
    parent, _ = script(more)
    assert parent.stdout.readline() == "True\n", parent.stderr.read()


def test_interrupted_batch_ends_at_once(script):
    more = """
try:
    print("asking", flush=True)
    engine.generate(["Hello"] * 4, dict(max_tokens=8000, ignore_eos=True))
except KeyboardInterrupt:
    print("interrupted", flush=True)
engine.close()
"""
    parent, pid = script(more)
    assert parent.stdout.readline() == "asking\n"
    time.sleep(0.3)
    parent.send_signal(signal.SIGINT)
    assert parent.stdout.readline() == "interrupted\n", parent.stderr.read()
    assert parent.wait(10) == 0 and is_gone(pid)


# What cannot be started


def test_damaged_model_is_refused_in_the_engine_s_words(start, tiny_model, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_model.read_bytes()[:-5000])
    with pytest.raises(PowerQuantConfigError, match=r"did not start, exit status 3: the model file .*\n.*cut\.gguf"):
        start(cut)
    for data in (b"", b"GGUF", b"PWRI\x03\0\0\0" + b"\xff" * 64, b"GGUF\x63\0\0\0" + bytes(16)):
        cut.write_bytes(data)
        with pytest.raises(PowerQuantConfigError, match="is damaged|is no model file"):
            start(cut)
    with pytest.raises(PowerQuantConfigError, match="cannot read .*nothing.gguf: No such file"):
        start(tmp_path / "nothing.gguf")


def test_wrong_flag_is_refused_in_the_engine_s_words(start, tiny_model):
    with pytest.raises(PowerQuantConfigError, match='exit status 2: a flag .*\n.*unknown argument "--no-such-flag"'):
        start(tiny_model, no_such_flag=3)
    with pytest.raises(PowerQuantConfigError, match="--kv must be f16 or packed"):
        start(tiny_model, kv="f8")


def fake_server(tmp_path, monkeypatch, lines: str) -> Path:
    server = tmp_path / "fake-server"
    server.write_text(f"#!/bin/sh\n{lines}\n")
    server.chmod(0o755)
    monkeypatch.setenv("POWERQUANT_ENGINE", str(server))
    return server


def test_exit_status_is_explained_with_the_last_lines(tmp_path, monkeypatch, tiny_model):
    fake_server(tmp_path, monkeypatch, "seq 100; echo the reason >&2; exit 5")
    with pytest.raises(PowerQuantEngineError, match="exit status 5: there is not enough memory") as caught:
        SparseEngine(tiny_model)
    lines = str(caught.value).splitlines()
    assert lines[-1] == "the reason" and lines[-2] == "100" and "50" not in lines


def test_start_timeout_ends_the_engine(tmp_path, monkeypatch, tiny_model):
    pid_file = tmp_path / "pid"
    fake_server(tmp_path, monkeypatch, f"echo $$ > {pid_file}; echo loading; exec sleep 600")
    with pytest.raises(PowerQuantEngineError, match="did not listen within 0.5 s; its last lines:\nloading"):
        SparseEngine(tiny_model, start_timeout=0.5)
    assert is_gone(int(pid_file.read_text()))


def test_program_that_cannot_be_run(tmp_path, monkeypatch, tiny_model):
    server = fake_server(tmp_path, monkeypatch, "")
    server.write_text("no program")
    with pytest.raises(PowerQuantEngineError, match="fake-server: Exec format error"):
        SparseEngine(tiny_model)


def test_request_timeout(start, tiny_model):
    engine = start(tiny_model, request_timeout=0.4)
    pid = process_of(engine)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(PowerQuantEngineError, match="sent nothing for 0.4 s"):
        engine.generate("Hello")
    os.kill(pid, signal.SIGCONT)
    assert engine.generate("Hello", GREEDY)[0].finished


# Other servers


def test_url_names_a_server_that_runs_already(start, tiny_model):
    own = start(tiny_model, api_key="secret", served_model_name="tiny")
    assert b"secret" not in Path(f"/proc/{process_of(own)}/cmdline").read_bytes()
    (expected,) = own.generate("Hello", GREEDY)
    for url in (own.url, f"{own.url}/v1/"):
        other = start(url=url, api_key="secret")
        assert other.model_name == "tiny"
        assert other.generate("Hello", GREEDY)[0].outputs == expected.outputs
    with pytest.raises(PowerQuantEngineError, match=r"API key .*status 401"):
        start(url=own.url)
    with pytest.raises(PowerQuantConfigError, match="model must be one of the server's: tiny; got 'large'"):
        start("large", url=own.url, api_key="secret")
    other = start(url=own.url, api_key="secret")
    own.close()
    with pytest.raises(PowerQuantEngineError, match="the connection failed"):
        other.generate("Hello")
    with pytest.raises(PowerQuantEngineError, match="no server can be reached"):
        start(url=other.url, api_key="secret")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "name a model file, or a server by url"),
        ({"url": "localhost:80"}, "url must be like http://HOST:PORT"),
        ({"url": "http://localhost:99999"}, "url must be like http://HOST:PORT"),
        ({"url": "http://localhost:80", "kv": "packed"}, "of no use with url: slots, kv"),
        ({"url": "http://localhost:80", "drain_seconds": 0}, "of no use with url: slots, kv, drain_seconds"),
        ({"drain_seconds": 0.5}, "drain_seconds must be an integer of 0 or more, got 0.5"),
        ({"url": "http://localhost:80", "batch": 3}, "of no use with url: batch"),
        ({"url": "http://localhost:80", "chat_template": "chatml"}, "of no use with url: chat_template"),
        ({"url": "http://localhost:80", "protocol": "grpc"}, "protocol must be openai or powerinfer"),
        ({"protocol": "powerinfer"}, "protocol is for a server that url names"),
    ],
)
def test_options_that_do_not_go_together(options, text):
    with pytest.raises(PowerQuantConfigError, match=text):
        SparseEngine(**options)
