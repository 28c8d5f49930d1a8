"""`powerquant chat`: real processes, on a pipe and on a terminal of their own."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("transformers")

COMMAND = [sys.executable, "-m", "vllm_powerquant.cli", "chat", "--backend", "transformers", "--greedy"]


def run(lines: str | bytes, *flags: str) -> subprocess.CompletedProcess:
    data = lines.encode() if isinstance(lines, str) else lines
    return subprocess.run([*COMMAND, *flags], input=data, capture_output=True, timeout=120)


def test_every_line_of_a_pipe_is_a_turn_or_a_command():
    lines = (
        "metrics\nWhat is the capital of France?\n/metrics\n/nothing\n\nAnd where is that?\nclear\nmetrics\nexit\nnot read\n"
    )
    done = run(lines, "--max-tokens", "12", "--metrics")
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0, err
    first, answer, *rest = out.splitlines()
    assert first == "no answer was given yet" and "Paris" in answer
    report = [line for line in rest if line.startswith(("model:", "tokens:", "KV cache:", "tokens in it:"))]
    assert len(report) == 4
    assert rest[-2:] == ["the conversation is forgotten", "no answer was given yet"]
    assert "\x1b" not in out + err
    assert "there is no command /nothing; there are /metrics, /clear, /exit" in err
    # one line of figures for each of two answers
    assert len(re.findall(r"tokens in [\d.]+ s \(first after", err)) == 2


def test_the_conversation_is_remembered_until_it_is_cleared():
    told, asked = "My name is Zebulon. Say OK.", "What is my name? Answer with the name."
    done = run(f"{told}\n{asked}\nclear\n{asked}\n", "--max-tokens", "16", "--system", "You are a helpful assistant.")
    before, after = done.stdout.decode().split("the conversation is forgotten")
    assert done.returncode == 0
    assert "Zebulon" in before.partition("\n")[2] and "Zebulon" not in after


def test_input_that_ends_at_once_and_input_that_is_no_text():
    done = run("")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    done = run(b"\xff\xfe\n")
    assert done.returncode == 1 and b"stdin is not UTF-8 text" in done.stderr and b"Traceback" not in done.stderr


def test_a_turn_that_does_not_fit_ends_a_pipe_with_one_line():
    done = run("word " * 9000 + "\nnot reached\n")
    assert done.returncode == 1 and done.stdout == b""
    assert b"the model's context is 8192" in done.stderr and done.stderr.count(b"\n") == 1


def test_interrupt_on_a_pipe():
    process = subprocess.Popen(
        [*COMMAND, "--ignore-eos", "--max-tokens", "5000"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdin.write(b"Hello\n")
    process.stdin.flush()
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and b"Traceback" not in err


class Terminal:
    """A chat on a terminal."""

    def __init__(self, *flags: str, **environment: str) -> None:
        master, slave = pty.openpty()
        self.master, self.seen = master, ""
        environment = os.environ | {"TERM": "xterm", "NO_COLOR": ""} | environment
        self.process = subprocess.Popen(
            [*COMMAND, *flags], stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """What was printed up to the end of what matches; the rest is left for the next call."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.seen!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self.master, 65536).decode(errors="replace")
                except OSError:
                    raise AssertionError(f"it ended before {pattern!r}: {self.seen!r}") from None
        got, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return got

    def end(self) -> int:
        try:
            return self.process.wait(30)
        finally:
            os.close(self.master)


def test_terminal_colours_answers_and_interrupt_ends_one():
    terminal = Terminal("--max-tokens", "3000", "--ignore-eos")
    terminal.wait_for("you> ")
    terminal.type("Tell me a story.\n")
    terminal.wait_for(r"\x1b\[32m[^\x1b]+\x1b\[0m")
    terminal.type("\x03")
    terminal.wait_for("you> ")
    # the conversation goes on
    terminal.type("/metrics\n")
    terminal.wait_for("no answer was given yet")
    terminal.type("exit\n")
    assert terminal.end() == 0


def test_figures_after_an_interrupt_are_not_those_of_another_answer():
    terminal = Terminal("--max-tokens", "2000", "--temperature", "0", "--metrics", NO_COLOR="1")
    terminal.wait_for("you> ")
    terminal.type("Hi\n")
    assert "tokens/s" in terminal.wait_for("you> ")
    terminal.type("Tell me a very long story.\n")
    terminal.wait_for("story[.]\r\n[^\r]+")
    terminal.type("\x03")
    assert "tokens/s" not in terminal.wait_for("you> ")
    terminal.type("exit\n")
    assert terminal.end() == 0


def test_end_of_input_and_interrupt_between_answers_leave_a_terminal():
    terminal = Terminal(NO_COLOR="1")
    terminal.wait_for("you> ")
    terminal.type("\x04")
    assert terminal.end() == 0
    terminal = Terminal(NO_COLOR="1")
    terminal.wait_for("you> ")
    terminal.type("\x03")
    assert terminal.end() == 130
