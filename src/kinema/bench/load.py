"""A load of HTTP requests on one server, and how fast it answers.

The load shares the machine with the server that it measures, so a request takes little of the processor: its bytes are
made beforehand, connections stay open, and of an answer only status and length are read.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from statistics import median, quantiles
from typing import cast
from urllib.parse import urlsplit

from kinema.errors import ServiceError

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
# "HTTP/1.1 200"
_STATUS = slice(9, 12)
_HEAD_END = b"\r\n\r\n"
_PATIENCE_S = 60.0


class ServerGone(ServiceError):
    """The server did not answer a request of the measurement."""

    code = "server_gone"


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes


@dataclass(frozen=True)
class Pace:
    """Requests a second, and the median and the 99th percentile of their milliseconds."""

    per_s: float
    p50_ms: float
    p99_ms: float

    @classmethod
    def of(cls, latencies_s: Sequence[float], elapsed_s: float) -> Pace:
        percentiles = quantiles(latencies_s, n=100, method="inclusive")
        return cls(len(latencies_s) / elapsed_s, percentiles[49] * 1000, percentiles[98] * 1000)

    @classmethod
    def median_of(cls, paces: Sequence[Pace]) -> Pace:
        """Each figure's own median over several runs."""
        return cls(*(median(figures) for figures in zip(*map(Pace.figures, paces), strict=True)))

    def figures(self) -> tuple[float, float, float]:
        return self.per_s, self.p50_ms, self.p99_ms


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection that stays open: a request, its answer, the next request."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Answer] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own does not inherit from it

    def data_received(self, data: bytes) -> None:
        self._received += data
        answer = read_answer(self._received)
        if answer is not None and self._answer is not None and not self._answer.done():
            self._received.clear()
            self._answer.set_result(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ServerGone(f"the server closed a connection: {exc or 'no reason was given'}"))

    async def ask(self, request: bytes) -> Answer:
        """Raises ServerGone."""
        assert self._transport is not None
        if self._transport.is_closing():
            raise ServerGone("the server closed a connection between two requests")
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


class Load:
    """Requests to one server, over ``concurrency`` connections at once."""

    def __init__(self, url: str, concurrency: int, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._head = f"host: {parts.netloc}\r\n" + (f"authorization: Bearer {api_key}\r\n" if api_key else "")
        self._concurrency = concurrency

    def get(self, path: str) -> bytes:
        """The bytes of a request."""
        return f"GET {path} HTTP/1.1\r\n{self._head}\r\n".encode()

    def post(self, path: str, body: bytes) -> bytes:
        """The bytes of a request with a JSON body."""
        head = f"POST {path} HTTP/1.1\r\n{self._head}content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        return f"{head}\r\n".encode() + body

    async def run(self, requests: Sequence[bytes]) -> tuple[Pace, list[Answer]]:
        """Send all requests over new connections. Raises ServerGone for one that fails."""
        waiting = iter(requests)
        latencies_s: list[float] = []
        answers: list[Answer] = []
        async with self._connected() as connections:
            started = time.perf_counter()
            await asyncio.gather(*(_send(c.ask, waiting, latencies_s, answers) for c in connections))
            return Pace.of(latencies_s, time.perf_counter() - started), answers

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[list[Connection]]:
        loop = asyncio.get_running_loop()
        connections: list[Connection] = []
        try:
            while len(connections) < self._concurrency:
                _, connection = await loop.create_connection(Connection, self._host, self._port)
                connections.append(connection)
            yield connections
        except OSError as exc:
            raise ServerGone(f"no server answers at {self._host}:{self._port}") from exc
        finally:
            for connection in connections:
                connection.close()


async def _send(
    ask: Callable[[bytes], Awaitable[Answer]],
    waiting: Iterator[bytes],
    latencies_s: list[float],
    answers: list[Answer],
) -> None:
    for request in waiting:
        started = time.perf_counter()
        answer = await _asked(ask, request)
        latencies_s.append(time.perf_counter() - started)
        if answer.status != 200:
            raise ServerGone(f"the server answered {answer.status}: {answer.body[:300].decode(errors='replace')}")
        answers.append(answer)


async def _asked(ask: Callable[[bytes], Awaitable[Answer]], request: bytes) -> Answer:
    try:
        async with asyncio.timeout(_PATIENCE_S):
            return await ask(request)
    except TimeoutError as exc:
        raise ServerGone(f"the server gave no answer that says its length within {_PATIENCE_S:g} s") from exc


def read_answer(received: bytearray) -> Answer | None:
    """The answer, once all its bytes are there; it must have a Content-Length, as every measured answer has."""
    end = received.find(_HEAD_END)
    if end < 0:
        return None
    length = _LENGTH.search(received, 0, end)
    start = end + len(_HEAD_END)
    size = int(length[1]) if length else 0
    if len(received) < start + size:
        return None
    return Answer(int(received[_STATUS]), bytes(received[start : start + size]))
