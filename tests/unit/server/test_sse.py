"""The event stream's own manners."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any, cast

import pytest

from kinema.errors import JobNotFound, Overloaded, StoreUnavailable
from kinema.events import Cancelled, Event, Preview, Progress, Queued, Started
from kinema.job import Job
from kinema.jobs.store import StoredEvent
from kinema.server import feeds as feeds_module
from kinema.server.feeds import Feeds
from kinema.server.sse import encode
from tests.serving import make_job, until

JOB = make_job()
STARTED = [Queued(), Started(worker_id="w", attempt=1)]


class Source:
    """A service whose jobs have the events that a test gives it, and that counts who reads them."""

    def __init__(self) -> None:
        self.events_of: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self.num_readers = self.num_reading = 0

    def give(self, *events: Event | Exception) -> None:
        for event in events:
            self.events_of.put_nowait(event)

    async def events(self, _job_id: str, *, is_following: bool = True) -> AsyncGenerator[StoredEvent, None]:
        self.num_readers += 1
        self.num_reading += 1
        seq = 0
        try:
            while is_following or not self.events_of.empty():
                event = await self.events_of.get()
                if isinstance(event, Exception):
                    raise event
                seq += 1
                yield StoredEvent(seq, 0.0, event)
                if isinstance(event, Cancelled):
                    return
        finally:
            self.num_reading -= 1


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def feeds(source: Source) -> Feeds:
    return Feeds(cast("Any", source), 3)


async def final(job: Job) -> dict[str, Any]:
    return {"id": job.id, "status": job.status.value}


async def read(feeds: Feeds, after_seq: int = 0, into: list[bytes] | None = None) -> bytes:
    """All that one client gets."""
    chunks = [] if into is None else into
    async for chunk in feeds.follow(JOB, final, after_seq):
        chunks.append(chunk)
    return b"".join(chunks)


def ids(stream: bytes) -> list[int]:
    return [int(line[4:]) for line in stream.decode().splitlines() if line.startswith("id: ")]


def progress(step: int) -> Progress:
    return Progress(stage="denoise", step=step, total=9)


async def test_many_streams_of_a_job_have_one_reader(source: Source, feeds: Feeds) -> None:
    """Each gets every event, also one that comes late; the reader ends with the last of them."""
    early: list[bytes] = []
    streams = [asyncio.create_task(read(feeds, into=early)), *(asyncio.create_task(read(feeds)) for _ in range(99))]
    source.give(*STARTED, progress(1))
    await until(lambda: ids(b"".join(early)) == [1, 2, 3])
    late = [asyncio.create_task(read(feeds)), asyncio.create_task(read(feeds, after_seq=2))]
    await asyncio.sleep(0)
    source.give(progress(2), Cancelled())
    whole, *others = await asyncio.gather(*streams, *late)
    assert ids(whole) == [1, 2, 3, 4, 5]
    assert others[:-1] == [whole] * 100
    assert ids(others[-1]) == [3, 4, 5]
    assert (source.num_readers, source.num_reading) == (1, 0)
    assert json.loads(whole.decode().rpartition("data: ")[2]) == {"id": JOB.id, "status": "cancelled"}


async def test_a_client_that_leaves_takes_only_itself(source: Source, feeds: Feeds) -> None:
    """The others go on; the last one ends the reader, and the next client begins another."""
    seen: list[bytes] = []
    first, second = asyncio.create_task(read(feeds)), asyncio.create_task(read(feeds, into=seen))
    source.give(*STARTED)
    await until(lambda: seen)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    source.give(progress(1))
    await until(lambda: ids(b"".join(seen)) == [1, 2, 3])
    assert source.num_reading == 1
    second.cancel()
    await until(lambda: source.num_reading == 0)
    source.give(Queued(), Cancelled())
    assert ids(await read(feeds)) == [1, 2]
    assert source.num_readers == 2


async def test_a_slow_client_keeps_nothing_but_its_place(source: Source, feeds: Feeds) -> None:
    """What it has not taken is one chunk; old previews are not kept for it, and what it missed comes in few chunks."""
    slow = feeds.follow(JOB, final)
    source.give(*STARTED)
    first = await anext(slow)
    picture = "a" * 20_000
    for step in range(1, 9):
        source.give(progress(step), Preview(step=step, total=9, b64_jpeg=picture))
    source.give(Cancelled())
    await until(lambda: source.num_reading == 0)
    rest = [chunk async for chunk in slow]
    assert ids(first + b"".join(rest)) == [1, 2, *range(3, 18, 2), 18, 19]
    assert b"".join(rest).count(picture.encode()) == 1
    assert max(map(len, rest)) < 2 * feeds_module.CHUNK_BYTES
    assert len(rest) <= 3


async def test_silence_is_filled_with_comments(source: Source, feeds: Feeds, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a proxy does not close the connection; every event still comes once and in order."""
    monkeypatch.setattr(feeds_module, "KEEP_ALIVE_S", 0.01)
    seen: list[bytes] = []
    reading = asyncio.create_task(read(feeds, into=seen))
    source.give(*STARTED)
    await until(lambda: seen.count(b": keep-alive\n\n") >= 2)
    source.give(Cancelled())
    stream = await reading
    assert ids(stream) == [1, 2, 3]
    assert set(seen) - {b": keep-alive\n\n"} == {chunk for chunk in seen if ids(chunk)}


async def test_a_deleted_job_ends_its_streams(source: Source, feeds: Feeds) -> None:
    """Without an error, as early as that is."""
    streams = [asyncio.create_task(read(feeds)) for _ in range(2)]
    source.give(*STARTED, JobNotFound())
    assert [ids(stream) for stream in await asyncio.gather(*streams)] == [[1, 2]] * 2


async def test_a_failure_cuts_the_streams_that_are_open(source: Source, feeds: Feeds) -> None:
    """A client that asks again gets a new reader, even while others have not noticed."""
    seen: list[bytes] = []
    broken = asyncio.create_task(read(feeds, into=seen))
    idle = feeds.follow(JOB, final)
    source.give(*STARTED, StoreUnavailable())
    await anext(idle)
    with pytest.raises(StoreUnavailable):
        await broken
    source.give(Queued(), Cancelled())
    assert ids(await read(feeds)) == [1, 2]
    with pytest.raises(StoreUnavailable):
        await anext(idle)


async def test_the_last_event_is_made_once_for_clients_that_get_the_same(source: Source, feeds: Feeds) -> None:
    """It has the whole video, whose links are of the host that a client asked."""
    made: list[str] = []

    async def read_from(host: str) -> bytes:
        async def final(_job: Job) -> dict[str, Any]:
            made.append(host)
            await asyncio.sleep(0)
            return {"url": host}

        return b"".join([chunk async for chunk in feeds.follow(JOB, final, same_for=host)])

    streams = [asyncio.create_task(read_from(host)) for host in ("a", "b") * 20]
    source.give(*STARTED, Cancelled())
    ends = [json.loads(stream.decode().rpartition("data: ")[2])["url"] for stream in await asyncio.gather(*streams)]
    assert ends == ["a", "b"] * 20
    assert sorted(made) == ["a", "b"]


async def test_a_key_has_a_number_of_streams(feeds: Feeds) -> None:
    """One more is refused in a sentence; another key has its own, and a stream that ends makes room."""
    places = [feeds.place("one") for _ in range(4)]
    for place in places[:3]:
        place.__enter__()
    with pytest.raises(Overloaded, match="3 streams of this key are open; close one"):
        places[3].__enter__()
    with feeds.place("other"):
        pass
    places[0].__exit__(None, None, None)
    with feeds.place("one"):
        pass


def test_an_event_is_one_line_of_data() -> None:
    """Whatever the prompt has in it."""
    encoded = encode(StoredEvent(3, 0.0, Queued()), {"prompt": "a\n\nevent: x\r\u2028"})
    assert encoded == b'id: 3\nevent: queued\ndata: {"prompt": "a\\n\\nevent: x\\r\\u2028"}\n\n'
