"""JSON and server-sent events over the standard library's HTTP client."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ..errors import PowerQuantConfigError, PowerQuantEngineError


class ServerError(PowerQuantEngineError):
    """The server answered with an error of its own."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class AnswerTimeout(PowerQuantEngineError):
    """The server sent nothing for too long."""


class ConnectionLost(PowerQuantEngineError):
    """There was no connection, or it ended before the answer did."""


@dataclass(frozen=True)
class Address:
    """Where a server is."""

    host: str
    port: int
    secure: bool = False
    path: str = ""  # in front of every endpoint

    @classmethod
    def parse(cls, url: str) -> Address:
        """http://HOST:PORT, with or without the /v1 that OpenAI's clients ask for."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise PowerQuantConfigError(f"url must be like http://HOST:PORT, got {url!r}: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise PowerQuantConfigError(f"url must be like http://HOST:PORT, got {url!r}")
        secure = parts.scheme == "https"
        path = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port or (443 if secure else 80), secure, path)

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.secure else 'http'}://{host}:{self.port}{self.path}"


class Http:
    """Requests to one server, each on a connection of its own, from any number of threads.

    Raises (all methods): ServerError, AnswerTimeout, ConnectionLost
    """

    def __init__(self, address: Address, api_key: str | None = None, timeout: float | None = None):
        self.address = address
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.timeout = timeout
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._aborted = False

    def abort(self) -> None:
        """End all requests that are under way, in whichever thread; the server notices and stops working on them."""
        with self._lock:
            self._aborted = True
            for open_socket in self._open:
                with contextlib.suppress(OSError):
                    open_socket.shutdown(socket.SHUT_RDWR)

    def get(self, path: str) -> bytes:
        with self._response("GET", path, None) as response:
            return response.read()

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        with self._response("POST", path, body) as response:
            return _object(response.read())

    def events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The JSON of each `data:` line; the connection is closed where the caller stops early."""
        with self._response("POST", path, body) as response:
            while line := response.readline():
                name, _, data = line.partition(b":")
                if name.strip() != b"data":
                    continue
                data = data.strip()
                if data == b"[DONE]":
                    return
                event = _object(data)
                if event.get("error"):
                    raise ServerError(500, _error_text(event, ""))
                yield event
            raise ConnectionLost(f"{self.address.url}: the answer broke off")

    @contextlib.contextmanager
    def _response(self, method: str, path: str, body: dict[str, Any] | None) -> Iterator[http.client.HTTPResponse]:
        kind = http.client.HTTPSConnection if self.address.secure else http.client.HTTPConnection
        connection = kind(self.address.host, self.address.port, timeout=self.timeout)
        response = own_socket = None
        try:
            connection.connect()
            own_socket = connection.sock
            with self._lock:
                if self._aborted:
                    raise ConnectionAbortedError("the request was aborted")
                self._open.add(own_socket)
            data = None if body is None else json.dumps(body).encode()
            headers = {"Content-Type": "application/json", **self.headers} if data else self.headers
            try:
                connection.request(method, self.address.path + path, data, headers)
            except (BrokenPipeError, ConnectionResetError):
                # a server that refuses a request by its head may have answered already
                pass
            response = connection.getresponse()
            if response.status >= 400:
                text = response.read(1 << 20)
                raise ServerError(response.status, _refusal(response.status, response.reason, text))
            yield response
        except TimeoutError as error:
            # without a limit of ours it is the system's, for connecting
            limit = f" for {self.timeout:g} s" if self.timeout else ""
            raise AnswerTimeout(f"{self.address.url} sent nothing{limit}") from error
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionLost(f"{self.address.url}: {error or type(error).__name__}") from error
        finally:
            with self._lock:
                self._open.discard(own_socket)
            if response is not None:
                response.close()
            connection.close()


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ServerError(502, f"the server's answer is no JSON object: {data[:200]!r}")
    return value


def _refusal(status: int, reason: str, body: bytes) -> str:
    try:
        value = json.loads(body)
    except ValueError:
        value = body.decode(errors="replace")[:500].strip()
    return f"{_error_text(value, reason)} (status {status})"


def _error_text(value: Any, fallback: str) -> str:
    """The message of OpenAI's error object, or of what other servers send."""
    error = value.get("error", value) if isinstance(value, dict) else value
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or json.dumps(error)
    return str(error or fallback or "the server failed")
