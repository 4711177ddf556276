"""A handler's items as frames on a wire, and back.

There are four frames: ``item``, ``hb`` (a heartbeat) after each silent second, and one last frame, ``end`` or ``err``.
A stream without its last frame was cut, however it ended. This file does not know what carries the frames.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

import structlog

from kinema.cluster.transport import Payload
from kinema.errors import EngineFailed, KinemaError, WorkerLost, by_code

log = structlog.get_logger(__name__)

Frame = Mapping[str, Any]
HEARTBEAT: Frame = {"hb": 1}
END: Frame = {"end": 1}
HEARTBEAT_S = 1.0
# Enough for a reader that is a little late. A handler that is further ahead waits, so the memory is bounded.
_MAX_WAITING = 16


class Feed:
    """Runs a handler in a task of its own, so that cancelling does not depend on the code that forwards the frames."""

    def __init__(self, items: AsyncGenerator[Payload, None]) -> None:
        self._waiting: asyncio.Queue[Frame] = asyncio.Queue()
        self._room = asyncio.Semaphore(_MAX_WAITING)
        self._delivered = asyncio.Event()
        self._filling = asyncio.create_task(self._fill(items))
        self._filling.add_done_callback(self._put_last)

    async def frames(self) -> AsyncGenerator[Frame, None]:
        """Yield every frame as it comes, up to the last one, which is included."""
        is_last = False
        while not is_last:
            frame = await self._next()
            is_last = "end" in frame or "err" in frame
            if is_last:
                self._delivered.set()
            yield frame

    async def delivered(self) -> None:
        """Return when the last frame was taken."""
        await self._delivered.wait()

    def finish(self) -> None:
        """Close the handler. After the unread frames, a reader gets an ordinary end."""
        self._filling.cancel()

    async def closed(self) -> None:
        """Return when the handler is closed, also when nothing is read."""
        await asyncio.wait({self._filling})

    async def _next(self) -> Frame:
        try:
            async with asyncio.timeout(HEARTBEAT_S):
                frame = await self._waiting.get()
        except TimeoutError:
            return HEARTBEAT
        self._room.release()
        return frame

    async def _fill(self, items: AsyncGenerator[Payload, None]) -> Frame:
        """Run the handler, queue its frames, and return the last one."""
        try:
            async with contextlib.aclosing(items):
                async for item in items:
                    await self._room.acquire()
                    self._waiting.put_nowait({"item": item})
        except KinemaError as exc:
            return _error_frame(exc)
        except Exception:
            log.exception("a handler failed")
            return _error_frame(EngineFailed())
        return END

    def _put_last(self, filling: asyncio.Task[Frame]) -> None:
        """Queue the last frame, also when there is no room, or the handler was closed before it began."""
        self._waiting.put_nowait(END if filling.cancelled() else filling.result())


def _error_frame(error: KinemaError) -> Frame:
    return {"err": {"code": error.code, "message": error.message}}


def error_of(frame: Frame) -> KinemaError | None:
    """The error in a frame, as the class that the handler raised."""
    told = frame.get("err")
    return None if told is None else by_code(told["code"])(told["message"])


async def items(frames: AsyncIterator[Frame], silence_s: float) -> AsyncGenerator[Payload, None]:
    """The items of the frames. Raises what the handler raised, and WorkerLost when the last frame is missing."""
    while True:
        frame = await _receive(frames, silence_s)
        if "item" in frame:
            yield frame["item"]
        elif "hb" not in frame:
            await _read_to_the_end(frames)
            if (error := error_of(frame)) is not None:
                raise error
            return


async def _read_to_the_end(frames: AsyncIterator[Frame]) -> None:
    """Read the rest, so that the carrier sees a complete stream and not a broken one."""
    with contextlib.suppress(Exception):
        async with asyncio.timeout(HEARTBEAT_S):
            async for _ in frames:
                pass


async def _receive(frames: AsyncIterator[Frame], silence_s: float) -> Frame:
    try:
        async with asyncio.timeout(silence_s):
            return await anext(frames)
    except TimeoutError as exc:
        raise WorkerLost(f"The worker gave no sign of life for {silence_s:g} s.") from exc
    except Exception as exc:  # an early end, or the carrier's own exception for a broken stream
        raise WorkerLost from exc
