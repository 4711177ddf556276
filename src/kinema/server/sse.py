"""A job's events as text/event-stream, the WHATWG format.

The number of an event in its job is its id. Only the last event has the whole video. When nothing happens for a
while, a comment is sent, so that proxies keep the connection open. A comment also ends the stream when the server stops
before the job.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kinema.errors import JobNotFound, KinemaError
from kinema.events import is_terminal
from kinema.job import Job, JobStatus, advance
from kinema.jobs.store import StoredEvent
from kinema.server.disconnect import ClientGone, unless_gone
from kinema.server.schemas import wire_status

# Common proxies close a connection that is silent for 60 s.
KEEP_ALIVE_S = 15.0
_MAX_ID_DIGITS = 10
_STOPPING = b": the server is stopping; the video is made after the restart\n\n"
_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}

Data = Mapping[str, Any]


async def event_stream(
    job: Job, events: AsyncGenerator[StoredEvent, None], final: Callable[[Job], Awaitable[Data]], after_seq: int = 0
) -> AsyncGenerator[bytes, None]:
    """Yield the encoded events of a job whose number is above ``after_seq``. ``events`` are all events of the job.

    ``final`` makes the data of the last one. When the job is deleted meanwhile, the stream ends early.
    """
    # A job that has ended has what its last event adds, the engine's warnings too; adding it again would double them.
    ended = job if job.status.is_terminal else None
    job = _unstarted(job)
    with suppress(JobNotFound):
        async with aclosing(events):
            async for stored in events:
                job = advance(job, stored.event, stored.at)
                if stored.seq > after_seq:
                    is_last = is_terminal(stored.event)
                    yield encode(stored, await final(ended or job) if is_last else _summary(job, stored))


def last_event_id(headers: Mapping[str, str]) -> int:
    """Return the number of the last event that the client has seen; 0 when it names no event of ours."""
    text = headers.get("last-event-id", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < _MAX_ID_DIGITS else 0


def _unstarted(job: Job) -> Job:
    """Return the job as it was when it was accepted."""
    return job.model_copy(
        update={"status": JobStatus.QUEUED, "progress": 0, "attempt": 0, "started_at": None, "finished_at": None}
    )


def encode(stored: StoredEvent, data: Data) -> bytes:
    # JSON escapes line ends, so the data is one line whatever the prompt.
    return f"id: {stored.seq}\nevent: {stored.event.type}\ndata: {json.dumps(data)}\n\n".encode()


def _summary(job: Job, stored: StoredEvent) -> Data:
    """Return the fields of the event with the job's id, status and progress in percent."""
    said = stored.event.model_dump(mode="json", exclude={"type", "worker_id"})
    return {
        "id": job.id,
        "object": "video.event",
        "status": wire_status(job.status).value,
        "progress": job.progress,
        **said,
    }


class EventSourceResponse(Response):
    """Sends the stream while the client listens. Calls ``on_gone`` when the client goes away before the end."""

    def __init__(
        self, chunks: AsyncGenerator[bytes, None], on_gone: Callable[[], Awaitable[object]] | None = None
    ) -> None:
        super().__init__(None, 200, _HEADERS, "text/event-stream")
        # Starlette counts the length of an empty body; this one has no length.
        del self.headers["content-length"]
        self._chunks = chunks
        self._on_gone = on_gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - the ASGI signature
        try:
            await unless_gone(receive, self._send(send))
        except ClientGone:
            await self._let_go()
        except Exception:
            with suppress(KinemaError):
                await self._let_go()
            raise

    async def _let_go(self) -> None:
        if self._on_gone is not None:
            await self._on_gone()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with aclosing(self._chunks):
                async for chunk in kept_alive(self._chunks, KEEP_ALIVE_S):
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except asyncio.CancelledError:  # not a broken stream; and a client that is gone reads nothing of this
            await send({"type": "http.response.body", "body": _STOPPING, "more_body": False})
            raise
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def kept_alive(chunks: AsyncIterator[bytes], after_s: float) -> AsyncIterator[bytes]:
    """Yield the chunks, and a comment after every ``after_s`` seconds of silence."""
    following = asyncio.ensure_future(anext(chunks, None))
    try:
        while True:
            await asyncio.wait((following,), timeout=after_s)
            if not following.done():
                yield b": keep-alive\n\n"
                continue
            if (chunk := following.result()) is None:
                return
            yield chunk
            following = asyncio.ensure_future(anext(chunks, None))
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
