"""The lean client of the measurements, and its arithmetic."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from kinema.bench.load import Answer, Load, Pace, ServerGone, read_answer
from tests.serving import until

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nx-request-id: r\r\n\r\n{}"


class Answering(asyncio.Protocol):
    """Gives the same answer to every request, in two pieces; an empty one closes the connection."""

    def __init__(self, answer: bytes, open_ones: set[asyncio.Protocol]) -> None:
        self._answer = answer
        self._open_ones = open_ones

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._open_ones.add(self)

    def data_received(self, data: bytes) -> None:
        if not self._answer:
            self._transport.close()
        self._transport.write(self._answer[:20])
        asyncio.get_running_loop().call_soon(self._transport.write, self._answer[20:])

    def connection_lost(self, exc: Exception | None) -> None:
        self._open_ones.discard(self)


@asynccontextmanager
async def serving(answer: bytes) -> AsyncIterator[str]:
    open_ones: set[asyncio.Protocol] = set()
    server = await asyncio.get_running_loop().create_server(lambda: Answering(answer, open_ones), "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    await until(lambda: not open_ones)


def test_an_answer_is_read_once_it_is_whole() -> None:
    """Not before, at whatever byte it is cut."""
    assert [read_answer(bytearray(ANSWER[:end])) for end in range(len(ANSWER))] == [None] * len(ANSWER)
    assert read_answer(bytearray(ANSWER)) == Answer(200, b"{}")


def test_a_pace_is_rate_and_percentiles() -> None:
    """The median of several runs is taken for each figure."""
    pace = Pace.of([number / 1000 for number in range(1, 102)], elapsed_s=2.0)
    assert (pace.per_s, pace.p50_ms, pace.p99_ms) == pytest.approx((50.5, 51.0, 100.0))
    assert Pace.median_of([Pace(1, 9, 3), Pace(3, 7, 2), Pace(2, 8, 1)]) == Pace(2, 8, 2)


async def test_every_request_is_answered_over_connections_that_stay_open() -> None:
    """More requests than connections."""
    async with serving(ANSWER) as url:
        load = Load(url, 3, "key")
        assert b"authorization: Bearer key\r\n" in load.get("/x")
        pace, answers = await load.run([load.get("/x"), load.post("/x", b"{}")] * 10)
    assert answers == [Answer(200, b"{}")] * 20
    assert pace.per_s > 0


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (ANSWER.replace(b"200", b"503"), "the server answered 503: {}"),
        (b"", "the server closed a connection"),
    ],
)
async def test_a_request_that_fails_ends_the_measurement(answer: bytes, sentence: str) -> None:
    """Figures without the failed answers would mean nothing."""
    async with serving(answer) as url:
        load = Load(url, 1)
        with pytest.raises(ServerGone, match=sentence):
            await load.run([load.get("/x")] * 2)


async def test_no_server_is_one_sentence() -> None:
    """The message has the address."""
    async with serving(ANSWER) as url:
        pass
    load = Load(url, 1)
    with pytest.raises(ServerGone, match=r"no server answers at 127\.0\.0\.1:\d+"):
        await load.run([load.get("/x")] * 2)
