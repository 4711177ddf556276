"""Items as frames and back, without anything that carries them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

import pytest

from kinema.cluster.frames import END, HEARTBEAT, Feed, Frame, items
from kinema.cluster.transport import Payload
from kinema.errors import Drained, EngineFailed, WorkerLost


async def numbers(n: int) -> AsyncGenerator[Payload, None]:
    for i in range(n):
        yield {"i": i}


async def carried(*frames: Frame) -> AsyncIterator[Frame]:
    for frame in frames:
        yield frame


async def test_items_are_framed_with_an_end() -> None:
    """The wire's shape: changing it breaks older workers."""
    frames = [frame async for frame in Feed(numbers(2)).frames()]
    assert frames == [{"item": {"i": 0}}, {"item": {"i": 1}}, {"end": 1}]


async def test_an_error_is_the_last_frame() -> None:
    """Code and message, no more."""

    async def handler() -> AsyncGenerator[Payload, None]:
        yield {"i": 0}
        raise Drained("goes away")

    frames = [frame async for frame in Feed(handler()).frames()]
    assert frames == [{"item": {"i": 0}}, {"err": {"code": "drained", "message": "goes away"}}]


async def test_silence_is_filled_with_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """One after each interval, while the handler says nothing."""
    monkeypatch.setattr("kinema.cluster.frames.HEARTBEAT_S", 0.01)

    async def handler() -> AsyncGenerator[Payload, None]:
        await asyncio.Event().wait()
        yield {}

    feed = Feed(handler())
    frames = feed.frames()
    assert [await anext(frames), await anext(frames)] == [HEARTBEAT, HEARTBEAT]
    feed.finish()
    await feed.closed()


async def test_finishing_closes_a_handler_that_nobody_reads() -> None:
    """Also one that waits because its reader is too slow."""
    closed = asyncio.Event()

    async def handler() -> AsyncGenerator[Payload, None]:
        try:
            while True:
                yield {}
        finally:
            closed.set()

    feed = Feed(handler())
    assert await anext(feed.frames()) == {"item": {}}
    feed.finish()
    await feed.closed()
    assert closed.is_set()


async def test_finishing_ends_a_stream_as_if_the_handler_had() -> None:
    """After what it had said already."""

    async def handler() -> AsyncGenerator[Payload, None]:
        yield {"i": 0}
        await asyncio.Event().wait()

    feed = Feed(handler())
    frames = feed.frames()
    assert await anext(frames) == {"item": {"i": 0}}
    feed.finish()
    assert [frame async for frame in frames] == [END]


async def test_finishing_before_the_handler_began_is_an_end_too() -> None:
    """A reader that waits is told."""
    feed = Feed(numbers(3))
    feed.finish()
    assert [frame async for frame in feed.frames()] == [END]


async def test_a_stream_without_its_last_frame_was_cut() -> None:
    """However regularly it seemed to end."""
    read = items(carried({"item": {"i": 0}}), 1)
    assert await anext(read) == {"i": 0}
    with pytest.raises(WorkerLost):
        await anext(read)


async def test_an_unknown_error_is_a_failure_of_the_engine() -> None:
    """With the words of whoever knew it."""
    with pytest.raises(EngineFailed, match="from the future"):
        await anext(items(carried({"err": {"code": "unheard_of", "message": "from the future"}}), 1))
