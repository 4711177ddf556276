"""The streams of all videos of a key: one reader for each key, however many clients listen.

An event has a video as it is now, not what happened to it: a client that was away, or is slow, gets each video that has
changed once. A feed keeps the latest events, encoded; a client keeps its place among them, and one that is behind all
of these reads the database by itself, a page at a time. So neither a slow client nor a long absence takes memory.
"""

from __future__ import annotations

import asyncio
import json
import time
from bisect import bisect_right
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from kinema.errors import StoreUnavailable
from kinema.job import Job
from kinema.jobs.changes import Change, JobChanges, Mark
from kinema.server.feeds import CHUNK_BYTES, KEEP_ALIVE, News
from kinema.server.schemas import DeletedVideo, VideoRow
from kinema.service.service import GenerationService

# What is read of the database at once, and how many events are kept for clients that are a little behind.
_PAGE = 100
_KEPT = 256
# Seconds between two looks where there is news, and the longest without.
_REST_S = 0.25
_POLL_S = 1.0

MakeRow = Callable[[Job], Awaitable[VideoRow]]
Encoded = tuple[Mark, bytes]

_RESET = {
    "no_id": "read the list of videos now; what changes later follows here",
    "unknown_id": "this Last-Event-ID is too old, or of another server: read the list of videos anew; what changes "
    "later follows here",
}


class ListFeeds:
    """The feeds of the keys that somebody listens to."""

    def __init__(self, service: GenerationService) -> None:
        self._service = service
        self._feeds: dict[tuple[str, str], ListFeed] = {}

    @property
    def _changes(self) -> JobChanges:
        return self._service.changes

    async def begin(self, key_id: str, last_id: str) -> tuple[Mark, str | None]:
        """Where a stream begins whose client has seen the event of this id last, and why its client must read the list
        first, or None. Raises StoreUnavailable."""
        mark = await self._changes.read_id(last_id, key_id, time.time()) if last_id else None
        if mark is not None:
            return mark, None
        return await self._changes.end(key_id), "unknown_id" if last_id else "no_id"

    async def follow(
        self,
        key_id: str,
        mark: Mark,
        reset: str | None,
        make_row: MakeRow,
        *,
        same_for: str,
        is_following: bool,
    ) -> AsyncGenerator[bytes, None]:
        """Yield the encoded changes of a key's videos behind the mark, without an end, and comments in long silences.

        With ``reset`` the first event asks the client to read the list. ``make_row`` makes the data of a video, which
        is the same for all streams with the same ``same_for``. Without ``is_following`` it ends with the changes so
        far. Raises StoreUnavailable.
        """
        if reset is not None:
            yield await _encode_reset(self._changes, mark, reset)
        if not is_following:
            while page := await _read_page(self._changes, key_id, mark, make_row):
                mark = page[-1][0]
                for _, event in page:
                    yield event
            return
        with self._feed(key_id, mark, make_row, same_for) as feed:
            async for chunk in feed.chunks(mark):
                yield chunk

    @contextmanager
    def _feed(self, key_id: str, mark: Mark, make_row: MakeRow, same_for: str) -> Iterator[ListFeed]:
        """A feed of the key, which ends with its last client."""
        name = key_id, same_for
        feed = self._feeds.get(name)
        if feed is None or feed.failure is not None:
            feed = self._feeds[name] = ListFeed(self._changes, key_id, mark, make_row)
        feed.num_clients += 1
        try:
            yield feed
        finally:
            feed.num_clients -= 1
            if not feed.num_clients:
                feed.close()
                if self._feeds.get(name) is feed:
                    del self._feeds[name]


class ListFeed:
    """The changes of one key's videos behind a mark. Reads until it is closed."""

    def __init__(self, changes: JobChanges, key_id: str, begin: Mark, make_row: MakeRow) -> None:
        self.num_clients = 0
        # What ended the reading.
        self.failure: Exception | None = None
        self._changes = changes
        self._key_id = key_id
        self._make_row = make_row
        # The marks of the latest events, which are behind ``begin``, and the events.
        self._begin = begin
        self._marks: deque[Mark] = deque()
        self._events: deque[bytes] = deque()
        self._has_looked_again = True
        self._news = News()
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._news.tell_all())]

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def chunks(self, mark: Mark) -> AsyncGenerator[bytes, None]:
        """Yield what one client gets behind the mark. Raises what ended the reading."""
        while True:
            end = self._end
            if mark < self._begin:
                page = await self._page(mark)
                # Behind the last page comes what this feed reads next.
                mark = page[-1][0] if len(page) == _PAGE else max([end, *(one for one, _ in page)])
                for _, event in page:
                    yield event
            elif mark < end:
                mark, chunk = self._after(mark)
                yield chunk
            elif self.failure is not None:
                raise self.failure
            elif not await self._news.wait():
                yield KEEP_ALIVE

    @property
    def _end(self) -> Mark:
        return self._marks[-1] if self._marks else self._begin

    def _after(self, mark: Mark) -> tuple[Mark, bytes]:
        """The kept events behind the mark, as many as are sent at once, and the mark behind these."""
        chunk = b""
        for place in range(bisect_right(self._marks, mark), len(self._marks)):
            mark, chunk = self._marks[place], chunk + self._events[place]
            if len(chunk) >= CHUNK_BYTES:
                break
        return mark, chunk

    async def _read(self) -> None:
        try:
            with self._changes.watched() as has_changed:
                while True:
                    has_changed.clear()
                    with suppress(StoreUnavailable):  # later looks find the same
                        while page := await self._page(self._end):
                            self._keep(page)
                    await self._rest(has_changed)
        except Exception as exc:
            self.failure = exc
            self._news.tell(is_over=True)

    async def _rest(self, has_changed: asyncio.Event) -> None:
        """Wait for news. Behind news there is one more look: what another transaction kept back is there then."""
        await asyncio.sleep(_REST_S)
        if not self._has_looked_again:
            self._has_looked_again = True
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(_POLL_S):
                await has_changed.wait()
                self._has_looked_again = False

    def _keep(self, page: Sequence[Encoded]) -> None:
        for mark, event in page:
            self._marks.append(mark)
            self._events.append(event)
        while len(self._marks) > _KEPT:
            self._begin = self._marks.popleft()
            self._events.popleft()
        self._news.tell()

    async def _page(self, mark: Mark) -> Sequence[Encoded]:
        return await _read_page(self._changes, self._key_id, mark, self._make_row)


async def _read_page(changes: JobChanges, key_id: str, mark: Mark, make_row: MakeRow) -> Sequence[Encoded]:
    """The first changes behind the mark, encoded."""
    found = await changes.after(key_id, mark, _PAGE)
    return [(change.mark, await _encode_change(changes, change, make_row)) for change in found]


async def _encode_change(changes: JobChanges, change: Change, make_row: MakeRow) -> bytes:
    told_as = await changes.id_of(change.mark, time.time())
    if change.job is None:
        return _encode(told_as, "deleted", DeletedVideo(id=change.job_id).model_dump_json())
    return _encode(told_as, "video", (await make_row(change.job)).model_dump_json())


async def _encode_reset(changes: JobChanges, mark: Mark, reason: str) -> bytes:
    data = {"object": "video.list.reset", "reason": reason, "message": _RESET[reason]}
    return _encode(await changes.id_of(mark, time.time()), "reset", json.dumps(data))


def _encode(told_as: str, kind: str, data: str) -> bytes:
    return f"id: {told_as}\nevent: {kind}\ndata: {data}\n\n".encode()
