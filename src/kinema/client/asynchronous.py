"""``AsyncClient``: the API for asyncio. It has the methods of ``Client``, line by line."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from datetime import date
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self, TypeVar, Unpack, overload

import httpx

from kinema.client import calls
from kinema.client.calls import Call, Looked, Outcome, Patience, Retries
from kinema.client.models import Estimate, ListEvent, Manifest, Usage, Video, VideoEvent, VideoRow
from kinema.client.stream import Cursor, EventCursor, ListCursor
from kinema.client.submission import File, VideoOptions, VideoRef, fields_of, id_of, source_of
from kinema.files import replacing, restart

T = TypeVar("T")
EventT = TypeVar("EventT")


class AsyncClient:
    """Speaks to one server. Every method raises ClientError. Close the client, or use it in an ``async with`` block.

    When no server answers, or the server cannot serve a request now, the client sends it again, up to ``max_retries``
    times. Before each try it waits as long as the server asks for, or else ``backoff_s``, doubled each time.
    ``transport`` replaces the network. Raises ConfigError for an address or a key that is not valid.
    """

    def __init__(
        self,
        base_url: str = calls.DEFAULT_URL,
        *,
        api_key: str | None = None,
        max_retries: int = 3,
        backoff_s: float = 0.5,
        timeout: httpx.Timeout = calls.TIMEOUT,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.base_url = calls.root_of(base_url)
        self._retries = (max_retries, backoff_s)
        self._http = httpx.AsyncClient(
            base_url=self.base_url,
            headers=calls.headers_for(api_key),
            timeout=timeout,
            transport=transport,
            follow_redirects=True,
        )

    async def create(
        self, prompt: str, *, idempotency_key: str | None = None, **options: Unpack[VideoOptions]
    ) -> Video:
        """Put a video into the queue. Calls with the same ``idempotency_key`` give the same video."""
        fields = fields_of(options, prompt=prompt)
        return await self._run(calls.submission("/v1/videos", fields, idempotency_key))

    async def estimate(self, prompt: str, **options: Unpack[VideoOptions]) -> Estimate:
        """Tell what ``create`` would make of this, and how long it would take; no video is made."""
        return await self._run(calls.estimation(fields_of(options, prompt=prompt)))

    async def remix(
        self, video: VideoRef, prompt: str, *, idempotency_key: str | None = None, **options: Unpack[VideoOptions]
    ) -> Video:
        """Make a video again with another prompt. Options that are not given keep their values, the seed too."""
        path = f"/v1/videos/{id_of(video)}/remix"
        return await self._run(calls.submission(path, fields_of(options, prompt=prompt), idempotency_key))

    async def edit(
        self,
        video: VideoRef | File,
        prompt: str,
        *,
        idempotency_key: str | None = None,
        **options: Unpack[VideoOptions],
    ) -> Video:
        """Make a video anew to follow the prompt. ``video`` is a video of the server, or a file."""
        fields = fields_of(options, prompt=prompt, video=source_of(video))
        return await self._run(calls.submission("/v1/videos/edits", fields, idempotency_key))

    async def extend(
        self,
        video: VideoRef | File,
        prompt: str,
        *,
        idempotency_key: str | None = None,
        **options: Unpack[VideoOptions],
    ) -> Video:
        """Continue a video from its last frame. ``video`` is a video of the server or a file; ``seconds`` are added."""
        fields = fields_of(options, prompt=prompt, video=source_of(video))
        return await self._run(calls.submission("/v1/videos/extensions", fields, idempotency_key))

    async def get(self, video: VideoRef) -> Video:
        """Return the video as it is now."""
        return await self._run(calls.retrieval(video))

    async def get_many(self, videos: Iterable[VideoRef]) -> Sequence[Video]:
        """Return those of these videos that exist, in their order, a hundred with each call."""
        pages = [await self._run(calls.retrieval_of(ids)) for ids in calls.pages_of(videos)]
        return [video for page in pages for video in page.data]

    async def list(self, **looked: Unpack[Looked]) -> AsyncGenerator[Video, None]:
        """Yield the videos of this key by age, all or those that are looked for. Pages are fetched when they are
        needed."""
        after: str | None = None
        while True:
            page = await self._run(calls.listing(after, looked))
            for video in page.data:
                yield video
            if not page.has_more or page.last_id is None:
                return
            after = page.last_id

    async def list_rows(self, **looked: Unpack[Looked]) -> AsyncGenerator[VideoRow, None]:
        """Yield them as ``list`` does, each in a few fields."""
        after: str | None = None
        while True:
            page = await self._run(calls.row_listing(after, looked))
            for video in page.data:
                yield video
            if not page.has_more or page.last_id is None:
                return
            after = page.last_id

    async def wait(self, video: VideoRef, *, timeout_s: float | None = None) -> Video:
        """Wait for the end of the video and return it, whether it is completed or failed. Raises WaitedTooLong."""
        patience = Patience(timeout_s)
        while True:
            seen, poll_s = await self._run(calls.poll(video))
            if seen.is_over:
                return seen
            await asyncio.sleep(patience.pause_s(seen, poll_s))

    async def events(self, video: VideoRef, *, is_following: bool = True) -> AsyncGenerator[VideoEvent, None]:
        """Yield each event of the video once, from its first to its EndEvent.

        When the connection breaks, the client connects again and continues after the last event that it has seen.
        Without ``is_following`` only the events so far come.
        """
        cursor = EventCursor(video, self.base_url, Retries(*self._retries), is_following=is_following)
        async with aclosing(self._follow(cursor)) as events:
            async for event in events:
                yield event

    async def list_events(self, last_event_id: str | None = None) -> AsyncGenerator[ListEvent, None]:
        """Yield the videos of this key as they change, without an end, from now on or behind that event.

        A ListReset asks the caller to read ``list``. When the connection breaks, the client connects again; then each
        video that has changed meanwhile comes once.
        """
        async with aclosing(self._follow(ListCursor(last_event_id, self.base_url, Retries(*self._retries)))) as events:
            async for event in events:
                yield event

    async def cancel(self, video: VideoRef) -> Video:
        """Stop a video. A video that has ended stays as it is."""
        return await self._run(calls.cancellation(video))

    async def star(self, video: VideoRef) -> Video:
        """Keep a video: while it has a star it does not expire."""
        return await self._run(calls.starring(video, is_starred=True))

    async def unstar(self, video: VideoRef) -> Video:
        """Take the star of a video."""
        return await self._run(calls.starring(video, is_starred=False))

    async def delete(self, video: VideoRef) -> None:
        """Delete a video and its files. A video in progress is stopped."""
        await self._run(calls.deletion(video))

    async def delete_many(self, videos: Iterable[VideoRef]) -> Mapping[str, bool]:
        """Delete videos and their files, a hundred with each call, and tell of each id whether there was a video."""
        pages = [await self._run(calls.deletion_of(ids)) for ids in calls.pages_of(videos)]
        return {one.id: one.deleted for page in pages for one in page.data}

    async def usage(self, first: date | None = None, last: date | None = None) -> Sequence[Usage]:
        """Return what the key has made on each day (UTC) from the first to the last, by default in the last thirty."""
        return (await self._run(calls.usage(first, last))).data

    @overload
    async def download(self, video: VideoRef, path: None = None, *, variant: str = "video") -> bytes: ...
    @overload
    async def download(self, video: VideoRef, path: Path | str, *, variant: str = "video") -> Path: ...
    async def download(
        self, video: VideoRef, path: Path | str | None = None, *, variant: str = "video"
    ) -> bytes | Path:
        """Return the bytes of a file, or save it to ``path`` and return the path.

        ``variant`` is video, thumbnail, spritesheet, manifest or preview. The file appears at ``path`` when it is
        whole. Raises OSError when it cannot be written.
        """
        call = calls.download(video, variant)
        if path is None:
            return (await self._run(call)).content
        with replacing(Path(path)) as unfinished, unfinished.open("wb") as file:
            await self._run(call, file)
        return Path(path)

    async def live(self, video: VideoRef) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of the video while it is made, from its first frame to its last: a fragmented MP4, or the
        file itself when the video is finished.

        Waits for the first frame. Raises ClientError when the video ends without a frame, or breaks off; asking again
        then begins from the first frame.
        """
        call, retries = calls.live(video), Retries(*self._retries)
        has_begun = False
        while True:
            try:
                async with self._http.stream(**call.arguments()) as response:
                    if response.is_success:
                        async for data in response.aiter_bytes():
                            has_begun = True
                            yield data
                        return
                    await response.aread()
                    outcome: Outcome = response
            except httpx.RequestError as exc:
                outcome = exc
            pause_s = None if has_begun else retries.pause_after(outcome)
            if pause_s is None:
                call.result(outcome, self.base_url)
                raise AssertionError("result() raises for an answer that is not the video")
            await asyncio.sleep(pause_s)

    async def manifest(self, video: VideoRef) -> Manifest:
        """Tell how a finished video was made. Raises NotFound before it is finished, and when it has no manifest."""
        return await self._run(calls.manifest(video))

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _follow(self, cursor: Cursor[EventT]) -> AsyncGenerator[EventT, None]:
        while not cursor.is_over:
            outcome: Outcome | None = None
            try:
                async with self._http.stream(**cursor.arguments()) as response:
                    if response.is_success:
                        cursor.begin(response)
                        async for line in response.aiter_lines():
                            if (event := cursor.feed(line)) is not None:
                                yield event
                    else:
                        await response.aread()
                        outcome = response
            except httpx.RequestError as exc:
                outcome = exc
            if not cursor.ends_with(outcome):
                await asyncio.sleep(cursor.pause_after(outcome))

    async def _run(self, call: Call[T], file: BinaryIO | None = None) -> T:
        """Send a request, again where that may help, and read its answer. The body goes to ``file`` if there is one."""
        retries = Retries(*self._retries)
        while True:
            outcome = await self._send(call, file)
            pause_s = retries.pause_after(outcome, is_repeatable=call.is_repeatable)
            if pause_s is None:
                return call.result(outcome, self.base_url)
            await asyncio.sleep(pause_s)

    async def _send(self, call: Call[T], file: BinaryIO | None) -> Outcome:
        try:
            async with self._http.stream(**call.arguments()) as response:
                if file is None or not response.is_success:
                    await response.aread()
                else:
                    restart(file)
                    async for chunk in response.aiter_bytes():
                        file.write(chunk)
                return response
        except httpx.RequestError as exc:
            return exc
