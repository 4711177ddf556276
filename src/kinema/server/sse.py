"""A job's events as text/event-stream, the WHATWG format.

The number of an event in its job is its id. Only the last event has the whole video. When nothing happens for a
while, a comment is sent, so that proxies keep the connection open. A comment also ends the stream when the server stops
before the job. ``feeds.py`` has what is sent.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import ExitStack, aclosing, suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kinema.errors import KinemaError
from kinema.job import Job
from kinema.jobs.store import StoredEvent
from kinema.server.disconnect import ClientGone, unless_gone
from kinema.server.schemas import wire_status

_MAX_ID_DIGITS = 10
_STOPPING = b": the server is stopping; the video is made after the restart\n\n"
_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}

Data = Mapping[str, Any]


def last_event_id(headers: Mapping[str, str]) -> int:
    """Return the number of the last event that the client has seen; 0 when it names no event of ours."""
    text = headers.get("last-event-id", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < _MAX_ID_DIGITS else 0


def encode(stored: StoredEvent, data: Data) -> bytes:
    # JSON escapes line ends, so the data is one line whatever the prompt.
    return f"id: {stored.seq}\nevent: {stored.event.type}\ndata: {json.dumps(data)}\n\n".encode()


def summary(job: Job, stored: StoredEvent) -> Data:
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
    """Sends the stream while the client listens. Calls ``on_gone`` when the client goes away before the end, and closes
    ``held`` after the stream."""

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        held: ExitStack,
        on_gone: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        super().__init__(None, 200, _HEADERS, "text/event-stream")
        # Starlette counts the length of an empty body; this one has no length.
        del self.headers["content-length"]
        self._chunks = chunks
        self._held = held
        self._on_gone = on_gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - the ASGI signature
        with self._held:
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
                async for chunk in self._chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except asyncio.CancelledError:  # not a broken stream; and a client that is gone reads nothing of this
            await send({"type": "http.response.body", "body": _STOPPING, "more_body": False})
            raise
        await send({"type": "http.response.body", "body": b"", "more_body": False})
