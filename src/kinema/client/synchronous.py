"""``Client``: the API as blocking calls."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
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


class Client:
    """Speaks to one server. Every method raises ClientError. Close the client, or use it in a ``with`` block.

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
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.base_url = calls.root_of(base_url)
        self._retries = (max_retries, backoff_s)
        self._http = httpx.Client(
            base_url=self.base_url,
            headers=calls.headers_for(api_key),
            timeout=timeout,
            transport=transport,
            follow_redirects=True,
        )

    def create(self, prompt: str, *, idempotency_key: str | None = None, **options: Unpack[VideoOptions]) -> Video:
        """Put a video into the queue. Calls with the same ``idempotency_key`` give the same video."""
        fields = fields_of(options, prompt=prompt)
        return self._run(calls.submission("/v1/videos", fields, idempotency_key))

    def estimate(self, prompt: str, **options: Unpack[VideoOptions]) -> Estimate:
        """Tell what ``create`` would make of this, and how long it would take; no video is made."""
        return self._run(calls.estimation(fields_of(options, prompt=prompt)))

    def remix(
        self, video: VideoRef, prompt: str, *, idempotency_key: str | None = None, **options: Unpack[VideoOptions]
    ) -> Video:
        """Make a video again with another prompt. Options that are not given keep their values, the seed too."""
        path = f"/v1/videos/{id_of(video)}/remix"
        return self._run(calls.submission(path, fields_of(options, prompt=prompt), idempotency_key))

    def edit(
        self,
        video: VideoRef | File,
        prompt: str,
        *,
        idempotency_key: str | None = None,
        **options: Unpack[VideoOptions],
    ) -> Video:
        """Make a video anew to follow the prompt. ``video`` is a video of the server, or a file."""
        fields = fields_of(options, prompt=prompt, video=source_of(video))
        return self._run(calls.submission("/v1/videos/edits", fields, idempotency_key))

    def extend(
        self,
        video: VideoRef | File,
        prompt: str,
        *,
        idempotency_key: str | None = None,
        **options: Unpack[VideoOptions],
    ) -> Video:
        """Continue a video from its last frame. ``video`` is a video of the server or a file; ``seconds`` are added."""
        fields = fields_of(options, prompt=prompt, video=source_of(video))
        return self._run(calls.submission("/v1/videos/extensions", fields, idempotency_key))

    def get(self, video: VideoRef) -> Video:
        """Return the video as it is now."""
        return self._run(calls.retrieval(video))

    def get_many(self, videos: Iterable[VideoRef]) -> Sequence[Video]:
        """Return those of these videos that exist, in their order, a hundred with each call."""
        pages = [self._run(calls.retrieval_of(ids)) for ids in calls.pages_of(videos)]
        return [video for page in pages for video in page.data]

    def list(self, **looked: Unpack[Looked]) -> Iterator[Video]:
        """Yield the videos of this key by age, all or those that are looked for. Pages are fetched when they are
        needed."""
        after: str | None = None
        while True:
            page = self._run(calls.listing(after, looked))
            yield from page.data
            if not page.has_more or page.last_id is None:
                return
            after = page.last_id

    def list_rows(self, **looked: Unpack[Looked]) -> Iterator[VideoRow]:
        """Yield them as ``list`` does, each in a few fields."""
        after: str | None = None
        while True:
            page = self._run(calls.row_listing(after, looked))
            yield from page.data
            if not page.has_more or page.last_id is None:
                return
            after = page.last_id

    def wait(self, video: VideoRef, *, timeout_s: float | None = None) -> Video:
        """Wait for the end of the video and return it, whether it is completed or failed. Raises WaitedTooLong."""
        patience = Patience(timeout_s)
        while True:
            seen, poll_s = self._run(calls.poll(video))
            if seen.is_over:
                return seen
            time.sleep(patience.pause_s(seen, poll_s))

    def events(self, video: VideoRef, *, is_following: bool = True) -> Iterator[VideoEvent]:
        """Yield each event of the video once, from its first to its EndEvent.

        When the connection breaks, the client connects again and continues after the last event that it has seen.
        Without ``is_following`` only the events so far come.
        """
        yield from self._follow(EventCursor(video, self.base_url, Retries(*self._retries), is_following=is_following))

    def list_events(self, last_event_id: str | None = None) -> Iterator[ListEvent]:
        """Yield the videos of this key as they change, without an end, from now on or behind that event.

        A ListReset asks the caller to read ``list``. When the connection breaks, the client connects again; then each
        video that has changed meanwhile comes once.
        """
        yield from self._follow(ListCursor(last_event_id, self.base_url, Retries(*self._retries)))

    def cancel(self, video: VideoRef) -> Video:
        """Stop a video. A video that has ended stays as it is."""
        return self._run(calls.cancellation(video))

    def star(self, video: VideoRef) -> Video:
        """Keep a video: while it has a star it does not expire."""
        return self._run(calls.starring(video, is_starred=True))

    def unstar(self, video: VideoRef) -> Video:
        """Take the star of a video."""
        return self._run(calls.starring(video, is_starred=False))

    def delete(self, video: VideoRef) -> None:
        """Delete a video and its files. A video in progress is stopped."""
        self._run(calls.deletion(video))

    def delete_many(self, videos: Iterable[VideoRef]) -> Mapping[str, bool]:
        """Delete videos and their files, a hundred with each call, and tell of each id whether there was a video."""
        pages = [self._run(calls.deletion_of(ids)) for ids in calls.pages_of(videos)]
        return {one.id: one.deleted for page in pages for one in page.data}

    def usage(self, first: date | None = None, last: date | None = None) -> Sequence[Usage]:
        """Return what the key has made on each day (UTC) from the first to the last, by default in the last thirty."""
        return (self._run(calls.usage(first, last))).data

    @overload
    def download(self, video: VideoRef, path: None = None, *, variant: str = "video") -> bytes: ...
    @overload
    def download(self, video: VideoRef, path: Path | str, *, variant: str = "video") -> Path: ...
    def download(self, video: VideoRef, path: Path | str | None = None, *, variant: str = "video") -> bytes | Path:
        """Return the bytes of a file, or save it to ``path`` and return the path.

        ``variant`` is video, thumbnail, spritesheet, manifest or preview. The file appears at ``path`` when it is
        whole. Raises OSError when it cannot be written.
        """
        call = calls.download(video, variant)
        if path is None:
            return self._run(call).content
        with replacing(Path(path)) as unfinished, unfinished.open("wb") as file:
            self._run(call, file)
        return Path(path)

    def live(self, video: VideoRef) -> Iterator[bytes]:
        """Yield the bytes of the video while it is made, from its first frame to its last: a fragmented MP4, or the
        file itself when the video is finished.

        Waits for the first frame. Raises ClientError when the video ends without a frame, or breaks off; asking again
        then begins from the first frame.
        """
        call, retries = calls.live(video), Retries(*self._retries)
        has_begun = False
        while True:
            try:
                with self._http.stream(**call.arguments()) as response:
                    if response.is_success:
                        for data in response.iter_bytes():
                            has_begun = True
                            yield data
                        return
                    response.read()
                    outcome: Outcome = response
            except httpx.RequestError as exc:
                outcome = exc
            pause_s = None if has_begun else retries.pause_after(outcome)
            if pause_s is None:
                call.result(outcome, self.base_url)
                raise AssertionError("result() raises for an answer that is not the video")
            time.sleep(pause_s)

    def manifest(self, video: VideoRef) -> Manifest:
        """Tell how a finished video was made. Raises NotFound before it is finished, and when it has no manifest."""
        return self._run(calls.manifest(video))

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _follow(self, cursor: Cursor[EventT]) -> Iterator[EventT]:
        while not cursor.is_over:
            outcome: Outcome | None = None
            try:
                with self._http.stream(**cursor.arguments()) as response:
                    if response.is_success:
                        cursor.begin(response)
                        for line in response.iter_lines():
                            if (event := cursor.feed(line)) is not None:
                                yield event
                    else:
                        response.read()
                        outcome = response
            except httpx.RequestError as exc:
                outcome = exc
            if not cursor.ends_with(outcome):
                time.sleep(cursor.pause_after(outcome))

    def _run(self, call: Call[T], file: BinaryIO | None = None) -> T:
        """Send a request, again where that may help, and read its answer. The body goes to ``file`` if there is one."""
        retries = Retries(*self._retries)
        while True:
            outcome = self._send(call, file)
            pause_s = retries.pause_after(outcome, is_repeatable=call.is_repeatable)
            if pause_s is None:
                return call.result(outcome, self.base_url)
            time.sleep(pause_s)

    def _send(self, call: Call[T], file: BinaryIO | None) -> Outcome:
        try:
            with self._http.stream(**call.arguments()) as response:
                if file is None or not response.is_success:
                    response.read()
                else:
                    restart(file).writelines(response.iter_bytes())
                return response
        except httpx.RequestError as exc:
            return exc
