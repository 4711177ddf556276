"""Requests that no HTTP library would send: cut short, without an end, byte by byte."""

from __future__ import annotations

import http.client
import resource
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from pydantic_core import from_json

from tests.server_process import Server

# Longer than any limit of the server that a test waits for.
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Answer:
    """What came back. Header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, str]:
        """The error object of an OpenAI-shaped body."""
        error: dict[str, str] = from_json(self.body)["error"]
        return error


def head(method: str, path: str, *headers: str, host: str | None = "localhost") -> bytes:
    """A request's first line and headers, each ``name: value``, with the empty line after them."""
    lines = [f"{method} {path} HTTP/1.1", *([f"host: {host}"] if host is not None else []), *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1")


def unfinished_head(method: str, path: str, *headers: str) -> bytes:
    """``head`` without the empty line, so that more headers may follow."""
    return head(method, path, *headers).removesuffix(b"\r\n")


@contextmanager
def connected(server: Server) -> Iterator[socket.socket]:
    at = urlsplit(server.url)
    with socket.create_connection((at.hostname, at.port), timeout=PATIENCE_S) as connection:
        yield connection


@contextmanager
def half_sent(server: Server, count: int, data: bytes) -> Iterator[list[socket.socket]]:
    """As many connections, each of which has sent the data and nothing more. Some may be refused by the server."""
    with ExitStack() as stack:
        connections = [stack.enter_context(connected(server)) for _ in range(count)]
        for connection in connections:
            with suppress(OSError):
                connection.sendall(data)
        yield connections


def send(connection: socket.socket, pieces: bytes | Iterable[bytes]) -> int:
    """Send all, or until the server does not take it; the number of bytes that it took."""
    taken = 0
    with suppress(OSError):
        for piece in [pieces] if isinstance(pieces, bytes) else pieces:
            connection.sendall(piece)
            taken += len(piece)
    return taken


def read_answer(connection: socket.socket, method: str | None = None, quiet_s: float | None = None) -> Answer | None:
    """The next answer of a connection; None when it was closed without one. The answer to a HEAD has no body.

    With ``quiet_s`` a stream of events is left when nothing has come for so long: some have no end.
    """
    response = http.client.HTTPResponse(connection, method=method)
    try:
        response.begin()
        is_stream = response.getheader("content-type", "").startswith("text/event-stream")
        body = response.read() if quiet_s is None or not is_stream else _read_events(connection, response, quiet_s)
    except (http.client.BadStatusLine, ConnectionError):
        return None
    return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, body)


def _read_events(connection: socket.socket, response: http.client.HTTPResponse, quiet_s: float) -> bytes:
    """The whole events that came before the silence."""
    connection.settimeout(quiet_s)
    body = b""
    with suppress(TimeoutError):
        while chunk := response.read1():
            body += chunk
    return body[: body.rfind(b"\n\n") + 2]


def ask(server: Server, pieces: bytes | Iterable[bytes]) -> Answer | None:
    """Send this over a new connection, and what came back: also from a server that answers before it has all."""
    with connected(server) as connection:
        send(connection, pieces)
        return read_answer(connection)


def closed_after_s(connection: socket.socket, patience_s: float = PATIENCE_S) -> float:
    """The seconds until the server closes; what it sends before is thrown away. TimeoutError when it does not."""
    began = time.monotonic()
    with suppress(ConnectionError):
        while True:
            connection.settimeout(max(patience_s - (time.monotonic() - began), 0.001))
            if not connection.recv(65536):
                break
    return time.monotonic() - began


def limit_files(server: Server, count: int) -> None:
    """Let the running server open no more files than that, as ``ulimit -n`` does."""
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (count, count))
