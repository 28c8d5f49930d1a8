"""`powerquant generate` on the embedded model."""

import io
import json
import os
import subprocess
import sys
import types

import pytest

from vllm_powerquant.cli import main

pytest.importorskip("transformers")

FRANCE = "The capital of France is"
GREEDY = ["--backend", "transformers", "--greedy", "--max-tokens", "6"]


def stdin(monkeypatch, data: bytes, terminal: bool = False) -> None:
    file = types.SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: terminal)
    monkeypatch.setattr(sys, "stdin", file)


def test_prints_the_answer_and_nothing_else(capsys, monkeypatch):
    assert main(["generate", FRANCE, *GREEDY]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(" Paris") and err == ""
    stdin(monkeypatch, f"{FRANCE}\n".encode())
    assert main(["generate", *GREEDY]) == 0
    assert capsys.readouterr().out == out
    assert main(["generate", FRANCE, "--stream", *GREEDY]) == 0
    assert capsys.readouterr().out == out


def test_json_and_metrics(capsys):
    assert main(["generate", FRANCE, "--json", "--metrics", *GREEDY]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["text"].startswith(" Paris") and result["completion_tokens"] == 6
    assert "5 of the prompt, 6 of the answer" in err
    assert main(["generate", FRANCE, "--json", "--stream", *GREEDY]) == 0
    *pieces, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert "".join(piece["piece"] for piece in pieces) == last["text"] == result["text"]


def test_chat_template_and_uncompressed_cache(capsys):
    assert main(["generate", "What is the capital of France?", "--chat", "--uncompressed", "--json", *GREEDY]) == 0
    result = json.loads(capsys.readouterr().out)
    assert "France" in result["text"] and result["attention"] == "exact" and result["prompt_tokens"] > 30


@pytest.mark.parametrize(
    "flags, text",
    [
        (["--max-tokens", "0"], "max_tokens must be an integer, 1 or more, got 0"),
        (["--greedy", "--temperature", "0.5"], "--greedy is temperature 0, got --temperature 0.5; leave one out"),
        (["--key-bits", "5"], "key_bits must be 2, 3, 4 or 8, got 5"),
        (["--uncompressed", "--value-bits", "4"], "compress=False has no compressed cache: leave out value_bits"),
        (["--model", "/nothing"], "there is no file or folder /nothing"),
        (["--load-in-8bit", "--backend", "sparse"], "load_in_8bit is for checkpoints"),
    ],
)
def test_refusals_are_one_line_and_exit_code_1(capsys, flags, text):
    assert main(["generate", "x", *flags]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("powerquant: ") and text in err and err.count("\n") == 1


def test_prompt_is_needed_and_must_be_text(capsys, monkeypatch):
    stdin(monkeypatch, b"", terminal=True)
    assert main(["generate", *GREEDY]) == 1
    assert "give a prompt" in capsys.readouterr().err
    stdin(monkeypatch, b"a\xff")
    assert main(["generate", *GREEDY]) == 1
    assert "stdin is not UTF-8 text (byte 1)" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["generate", "x", "--backend", "nothing"])
    assert end.value.code == 2


@pytest.mark.parametrize(
    ("redirected", "words", "says"),
    [
        ("<&-", ["generate"], "stdin is closed; give it something to read"),
        ("<&-", ["chat"], "stdin is closed; give it something to read"),
        (">/dev/full", ["info"], "cannot write the output: No space left on device"),
        (">/dev/full", ["generate", "x", "--max-tokens", "2", "--backend", "transformers"], "cannot write the output"),
        ("", ["generate", "--chat", "a\udcff"], "messages must be text that UTF-8 can hold"),
    ],
)
def test_what_cannot_be_read_or_written_is_one_line(redirected, words, says):
    command = [os.fsencode(word) for word in (sys.executable, "-m", "vllm_powerquant.cli", *words)]
    shell = [b"sh", b"-c", b'"$@" ' + redirected.encode(), b"sh", *command]
    done = subprocess.run(shell, capture_output=True, timeout=120)
    assert done.returncode == 1 and done.stdout == b""
    assert done.stderr.decode().count("\n") == 1 and f"powerquant: {says}" in done.stderr.decode()


def test_reader_that_leaves_ends_it_without_a_word():
    """`powerquant generate ... | head -1`"""
    command = [sys.executable, "-m", "vllm_powerquant.cli", "generate", "Count: one,", "--stream", "--ignore-eos"]
    command += ["--backend", "transformers", "--max-tokens", "5000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"NO_COLOR": "1"})
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr.read() == b""
    process.stderr.close()
