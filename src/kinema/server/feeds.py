"""The event streams of this process: one reader for each job, however many clients listen.

A feed reads the events of a job and keeps each once, as the bytes that all clients get. A client keeps only its place
among them, so a slow one costs no memory, and a late one begins with the first event. News wakes a few clients at a
time, and a feed rests as long as that took: a thousand streams of one job leave half of the event loop to everybody
else.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager

from kinema.errors import JobNotFound, Overloaded
from kinema.events import Preview, is_terminal
from kinema.ids import JobId
from kinema.job import Job, JobStatus, advance
from kinema.jobs.store import StoredEvent
from kinema.server.sse import Data, encode, summary
from kinema.service.service import GenerationService

# Common proxies close a connection that is silent for 60 s.
KEEP_ALIVE_S = 15.0
KEEP_ALIVE = b": keep-alive\n\n"
# Clients that are woken before anybody else has a turn: a millisecond.
_WOKEN_TOGETHER = 16
# The longest that news waits for the rest after the news before it.
_MAX_REST_S = 0.25
# What a client is sent at once: a slow one keeps no more than that, or one event.
CHUNK_BYTES = 64 * 1024

Final = Callable[[Job], Awaitable[Data]]


class Feeds:
    """The feeds of the jobs that somebody listens to. A key has at most ``max_per_key`` streams."""

    def __init__(self, service: GenerationService, max_per_key: int) -> None:
        self._service = service
        self._max_per_key = max_per_key
        self._num_streams: Counter[str] = Counter()
        self._feeds: dict[JobId, Feed] = {}

    @contextmanager
    def place(self, key_id: str) -> Iterator[None]:
        """Hold a place for a stream of the key. Raises Overloaded when it has no more."""
        if self._num_streams[key_id] >= self._max_per_key:
            raise Overloaded(
                f"{self._max_per_key} streams of this key are open; close one, or ask for the video itself"
            )
        self._num_streams[key_id] += 1
        try:
            yield
        finally:
            self._num_streams[key_id] -= 1
            if not self._num_streams[key_id]:
                del self._num_streams[key_id]

    async def follow(
        self, job: Job, final: Final, after_seq: int = 0, *, is_following: bool = True, same_for: str | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Yield the encoded events of a job whose number is above ``after_seq``, and comments in long silences.

        ``final`` makes the data of the last event, once for all streams whose data is ``same_for`` the same text. When
        the job is deleted meanwhile, the stream ends early. Without ``is_following`` it ends with the events so far.
        """
        with self._feed(job, is_following=is_following) as feed:
            try:
                async for chunk in feed.chunks(final, after_seq, same_for):
                    yield chunk
            except JobNotFound:
                return

    @contextmanager
    def _feed(self, job: Job, *, is_following: bool) -> Iterator[Feed]:
        """A feed of the job, which ends with its last client."""
        feed = self._feeds.get(job.id) if is_following else None
        if feed is None or feed.failure is not None:
            feed = Feed(job, self._service.events(job.id, is_following=is_following))
            if is_following:
                self._feeds[job.id] = feed
        feed.num_clients += 1
        try:
            yield feed
        finally:
            feed.num_clients -= 1
            if not feed.num_clients:
                feed.close()
                if self._feeds.get(job.id) is feed:
                    del self._feeds[job.id]


class Feed:
    """The events of one job, encoded. Reads until the end, or until it is closed."""

    def __init__(self, job: Job, events: AsyncGenerator[StoredEvent, None]) -> None:
        self.num_clients = 0
        # What ended the reading before the job did.
        self.failure: Exception | None = None
        # A job that has ended has what its last event adds, the engine's warnings too; adding it again would double
        # them.
        self._ended = job if job.status.is_terminal else None
        self._job = _unstarted(job)
        self._events = events
        self._seqs: list[int] = []
        self._encoded: list[bytes] = []
        self._preview_at: int | None = None
        self._last: StoredEvent | None = None
        self._finals: dict[str, asyncio.Future[bytes]] = {}
        self._is_over = False
        self._news = News()
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._news.tell_all())]

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for made in self._finals.values():
            made.cancel()

    async def chunks(self, final: Final, after_seq: int, same_for: str | None) -> AsyncGenerator[bytes, None]:
        """Yield what one client gets. Raises what ended the reading."""
        while True:
            chunk, after_seq = self._after(after_seq)
            if chunk:
                yield chunk
            elif self.failure is not None:
                raise self.failure
            elif self._is_over:
                if self._last is not None and self._last.seq > after_seq:
                    yield await self._finish(self._last, final, same_for)
                return
            elif not await self._news.wait():
                yield KEEP_ALIVE

    def _after(self, seq: int) -> tuple[bytes, int]:
        """The events after that number, as many as are sent at once, and the number of the last one."""
        start = end = bisect_right(self._seqs, seq)
        size = 0
        while end < len(self._seqs) and size < CHUNK_BYTES:
            size += len(self._encoded[end])
            end += 1
        return b"".join(self._encoded[start:end]), self._seqs[end - 1] if end > start else seq

    async def _finish(self, last: StoredEvent, final: Final, same_for: str | None) -> bytes:
        """The encoded last event."""
        if same_for is None:
            return encode(last, await final(self._ended or self._job))
        if same_for not in self._finals:
            self._finals[same_for] = asyncio.ensure_future(self._finish(last, final, None))
        return await asyncio.shield(self._finals[same_for])

    async def _read(self) -> None:
        try:
            async with aclosing(self._events):
                async for stored in self._events:
                    self._add(stored)
                    self._news.tell()
        except Exception as exc:
            self.failure = exc
        finally:
            self._is_over = True
            self._news.tell(is_over=True)

    def _add(self, stored: StoredEvent) -> None:
        self._job = advance(self._job, stored.event, stored.at)
        if is_terminal(stored.event):
            self._last = stored
            return
        if isinstance(stored.event, Preview):  # a hundred times as large as other events; only the newest one is kept
            if self._preview_at is not None:
                self._encoded[self._preview_at] = b""
            self._preview_at = len(self._encoded)
        self._seqs.append(stored.seq)
        self._encoded.append(encode(stored, summary(self._job, stored)))


class News:
    """Wakes those who wait for it, a few at a time, and after a long silence."""

    def __init__(self) -> None:
        self._is_over = False
        self._has_come = asyncio.Event()
        self._waiting: list[asyncio.Future[bool]] = []

    def tell(self, *, is_over: bool = False) -> None:
        """Say that there is news, or the last one."""
        self._is_over = self._is_over or is_over
        self._has_come.set()

    async def wait(self) -> bool:
        """Wait for news; False when there was none for a while."""
        waiter: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        return await waiter

    async def tell_all(self) -> None:
        """Wake the waiters whenever there is news, and after a long silence."""
        while not self._is_over or self._waiting:
            has_news = True
            try:
                async with asyncio.timeout(KEEP_ALIVE_S):
                    await self._has_come.wait()
            except TimeoutError:
                has_news = False
            self._has_come.clear()
            began = time.monotonic()
            waiting, self._waiting = self._waiting, []
            for number, waiter in enumerate(waiting, 1):
                if not waiter.done():
                    waiter.set_result(has_news)
                if number % _WOKEN_TOGETHER == 0:
                    await asyncio.sleep(0)
            if not self._is_over:
                await asyncio.sleep(min(time.monotonic() - began, _MAX_REST_S))


def _unstarted(job: Job) -> Job:
    """Return the job as it was when it was accepted."""
    return job.model_copy(
        update={"status": JobStatus.QUEUED, "progress": 0, "attempt": 0, "started_at": None, "finished_at": None}
    )
