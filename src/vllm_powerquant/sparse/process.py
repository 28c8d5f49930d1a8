"""The engine as a child process: started on a free port, its last lines kept, gone when its parent is gone."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import PowerQuantConfigError, PowerQuantEngineError

LOG_LINES_KEPT = 40
# what the engine's exit status says
EXIT_MEANINGS = {
    0: "it was stopped",
    1: "it failed",
    2: "a flag or its value is wrong",
    3: "the model file is missing, malformed or of a kind that it does not run",
    4: "it cannot listen on the address or port",
    5: "there is not enough memory for the model or its keys and values",
}

# Asks the kernel to end this process with its parent, then becomes the engine. A process of its own does that because
# running Python between fork and exec of a process with threads can hang; os.getppid is compared for a parent that ended
# before.
_LAUNCHER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit(0)
try:
    os.execv(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"{sys.argv[2]}: {error.strerror}")
"""


def exit_meaning(status: int) -> str:
    """ "exit status 3: the model file ..." or "killed by SIGKILL"."""
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        hint = " (by someone, or by the kernel for want of memory)" if -status == signal.SIGKILL else ""
        return f"killed by {name}{hint}"
    meaning = EXIT_MEANINGS.get(status)
    return f"exit status {status}" + (f": {meaning}" if meaning else "")


class EngineProcess:
    """One run of a server that prints `listening on http://HOST:PORT`.

    A thread reads its output and collects its exit status, so it never stays a zombie. It is killed when this process ends,
    however that happens. Nothing runs before `start`, so that whoever is to stop it can be told of it before.
    """

    def __init__(self, server: Path, arguments: list[str], environment: dict[str, str]):
        self.lines: deque[str] = deque(maxlen=LOG_LINES_KEPT)
        self.port: int | None = None
        self.status: int | None = None
        self.owner = os.getpid()
        self._changed = threading.Condition()
        self._stopped = False
        self._process: subprocess.Popen | None = None
        self._command = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), str(server), *arguments]
        self._environment = environment

    def start(self, timeout: float) -> None:
        """Returns when it listens; `stop`, from any thread, ends the wait.

        Raises: PowerQuantEngineError if it can't be started, does not listen in time or was stopped; PowerQuantConfigError
                where it refuses its flags or the model file. It runs no more then, nor after Ctrl-C.
        """
        try:
            _Spawner.get().run(self._spawn)
            if self._process is None:
                raise PowerQuantEngineError("the engine was stopped before it was started")
            self._wait_until_listening(timeout)
        except BaseException:
            self.stop(0)
            raise

    def _spawn(self) -> None:
        """On the spawner's thread, which no signal interrupts between the start of a process and its assignment here."""
        with self._changed:
            if self._stopped:
                return
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                # Ctrl-C is for this process, which then stops the engine
                process_group=0,
            )
            threading.Thread(target=self._watch, name="powerinfer-server output", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self.status is None

    def _watch(self) -> None:
        for line in self._process.stdout:
            listening = re.match(r"listening on http://\S+:(\d+)\s*$", line)
            with self._changed:
                if listening and self.port is None:
                    self.port = int(listening[1])
                else:
                    self.lines.append(line.rstrip())
                self._changed.notify_all()
        status = self._process.wait()
        self._process.stdout.close()
        with self._changed:
            self.status = status
            self._changed.notify_all()

    def _wait_until_listening(self, timeout: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.port is not None or self.status is not None, timeout)
        if self.status is not None:
            refused = self.status in (2, 3)
            raise (PowerQuantConfigError if refused else PowerQuantEngineError)(self.death_text("did not start"))
        if self.port is None:
            raise PowerQuantEngineError(f"the engine did not listen within {timeout:g} s{self._log_text()}")

    def wait(self, timeout: float) -> bool:
        """Whether it has ended, waiting so long for that."""
        with self._changed:
            return self._changed.wait_for(lambda: self.status is not None, timeout)

    def death_text(self, what: str = "died") -> str:
        """Why it ended, with its last lines."""
        return f"the engine {what}, {exit_meaning(self.status)}{self._log_text()}"

    def _log_text(self) -> str:
        lines = [line for line in self.lines if line]
        return "; its last lines:\n" + "\n".join(lines) if lines else "; it printed nothing"

    def stop(self, patience: float) -> None:
        """Ask it to end, kill it after `patience` seconds, wait until it is gone. In a forked process: do nothing."""
        if os.getpid() != self.owner or not self.alive:
            return
        with self._changed:
            self._stopped = True
            if self._process is None:
                return
        if patience > 0:
            self._send(signal.SIGTERM)
            if self.wait(patience):
                return
        self._send(signal.SIGKILL)
        self.wait(10)

    def _send(self, number: int) -> None:
        # send_signal looks first whether the process was collected, so never another one gets it
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)


class _Spawner:
    """A thread that lives as long as this process and starts its children.

    The kernel ends a child with the *thread* that started it, and a caller's thread may end long before the process.
    """

    _lock = threading.Lock()
    _instance: _Spawner | None = None

    def __init__(self) -> None:
        self.process = os.getpid()
        self.jobs: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="powerinfer-server starter", daemon=True).start()

    @classmethod
    def get(cls) -> _Spawner:
        with cls._lock:
            # after a fork the thread is the other process's
            if cls._instance is None or cls._instance.process != os.getpid():
                cls._instance = cls()
            return cls._instance

    def _serve(self) -> None:
        while True:
            job, answer = self.jobs.get()
            try:
                answer.put((job(), None))
            except Exception as error:
                answer.put((None, error))

    def run(self, job: Callable[[], Any]) -> Any:
        answer: queue.SimpleQueue = queue.SimpleQueue()
        self.jobs.put((job, answer))
        value, error = answer.get()
        if error is not None:
            raise PowerQuantEngineError(f"the engine could not be started: {error}") from error
        return value
