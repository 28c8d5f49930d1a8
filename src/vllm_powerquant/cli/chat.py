"""The verb chat."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import PowerQuantConfigError, PowerQuantError
from .common import coloured, say, stdin_is_terminal
from .engine_options import EXIT_CODES, add_engine, add_sampling, open_engine, sampling

if TYPE_CHECKING:
    from ..engine import Engine, GenerationResult

_EXAMPLES = """commands (with or without the slash, alone on a line):
  /metrics   figures of the last answer: tokens, seconds, memory
  /clear     forget the conversation
  /exit      leave; so does the end of input (Ctrl-D)
Ctrl-C ends an answer that is being given; between answers it leaves.

examples:
  powerquant chat
  powerquant chat --model Qwen/Qwen3-8B --backend vllm --system "Answer in one sentence."
  printf 'Hello!\\nmetrics\\n' | powerquant chat --greedy
"""
_PROMPT = "you> "
_COMMANDS = ("metrics", "clear", "exit")


def add(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser(
        "chat",
        help="talk to a model, with a compressed KV cache",
        description="A conversation, answers as they come. Where stdin is no terminal every line of it is a turn.",
        epilog=f"{_EXAMPLES}\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    verb.add_argument("--metrics", action="store_true", help="a line of figures on stderr after each answer")
    add_engine(verb)
    add_sampling(verb, max_tokens=512)
    verb.set_defaults(run=_chat)


def _chat(args: argparse.Namespace) -> int:
    from ..engine.sampling import Sampling

    options = sampling(args)
    Sampling.of(options)
    terminal = stdin_is_terminal()
    with open_engine(args) as engine:
        if terminal:
            print(f"{engine.model} on backend {engine.backend}. /metrics, /clear, /exit; Ctrl-C ends an answer.")
        return Conversation(engine, args.system, options, args.metrics).run()


class Conversation:
    """Turns of a user and a model, read and written line by line."""

    def __init__(self, engine: Engine, system: str | None, options: dict[str, Any], metrics: bool) -> None:
        self.engine, self.options, self.metrics = engine, options, metrics
        self.begin = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.begin)
        self.last: GenerationResult | None = None

    def run(self) -> int:
        """Until the input ends, or exit. Returns the exit code."""
        terminal = stdin_is_terminal()
        for line in _lines(terminal):
            text = line.strip()
            name = text.removeprefix("/").lower()
            if not text:
                continue
            if name == "exit":
                break
            if name == "clear":
                self.messages, self.last = list(self.begin), None
                print("the conversation is forgotten", flush=True)
            elif name == "metrics":
                self._report()
            elif text.startswith("/"):
                commands = ", ".join(f"/{command}" for command in _COMMANDS)
                say(f"there is no command {text}; there are {commands}")
            elif not self._turn(text, terminal):
                return 1
        return 0

    def _report(self) -> None:
        if self.last is None:
            print("no answer was given yet", flush=True)
        else:
            self.last.print_report()
            sys.stdout.flush()

    def _turn(self, text: str, terminal: bool) -> bool:
        """Whether the conversation can go on."""
        self.messages.append({"role": "user", "content": text})
        said: list[str] = []
        stream = result = None
        try:
            stream = self.engine.chat_stream(self.messages, **self.options)
            for piece in stream:
                said.append(piece)
                print(coloured(piece, "32", sys.stdout), end="", flush=True)
            self.last = result = stream.result
        except KeyboardInterrupt:
            if not terminal:
                raise
            if stream is not None:
                stream.close()
        except PowerQuantConfigError as error:
            # most likely the conversation is longer than the context; without this turn it goes on
            self.messages.pop()
            say(f"{error}; /clear forgets the conversation")
            return terminal
        except PowerQuantError:
            if said:
                print(flush=True)
            raise
        print(flush=True)
        self.messages.append({"role": "assistant", "content": "".join(said)})
        if self.metrics and result is not None:  # an answer that was interrupted has none
            print(coloured(result.summary(), "2", sys.stderr), file=sys.stderr, flush=True)
        return True


def _lines(terminal: bool) -> Iterator[str]:
    """What the user says. Raises: KeyboardInterrupt for Ctrl-C, PowerQuantConfigError for what is not UTF-8"""
    if not terminal:
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
        try:
            yield from sys.stdin
        except UnicodeDecodeError as error:
            raise PowerQuantConfigError(f"stdin is not UTF-8 text (byte {error.start}); convert it first") from None
        return
    # editing and history for input()
    import readline  # noqa: F401

    while True:
        try:
            yield input(_PROMPT)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            raise
