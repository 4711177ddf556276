"""A video that is made now, as an HTTP answer that goes on to its last frame, or is cut short where it breaks off."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack, aclosing

import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kinema.errors import KinemaError
from kinema.media.fragments import codecs_of
from kinema.server.disconnect import ClientGone, cut_short, unless_gone
from kinema.service.service import LiveVideo

log = structlog.get_logger(__name__)

HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no", "x-content-type-options": "nosniff"}


class LiveResponse(Response):
    """Sends the video while the client listens, and closes ``held`` after it."""

    def __init__(self, video: LiveVideo, held: ExitStack) -> None:
        super().__init__(None, 200, HEADERS, f'video/mp4; codecs="{codecs_of(video.head)}"')
        # Starlette counts the length of an empty body; this one has no length.
        del self.headers["content-length"]
        self._video = video
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            async with aclosing(self._video.rest):
                try:
                    await unless_gone(receive, self._send(send))
                except ClientGone:
                    return
                except (KinemaError, asyncio.CancelledError) as exc:
                    is_cut = cut_short(scope)
                    log.info("a video broke off before its viewer had all of it", reason=str(exc))
                    if isinstance(exc, asyncio.CancelledError) or not is_cut:
                        raise

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._video.head, "more_body": True})
        async for data in self._video.rest:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
