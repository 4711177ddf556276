"""A video while it is made, for those who watch it then.

The encoder gives the bytes of a fragmented MP4 as it makes them. Each viewer reads them from the first one on, at its
own pace; all viewers share them, and they are gone with the generation and its last viewer. They are as large as the
encoded video, some megabytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress

from kinema.errors import WorkerLost

# What a viewer gets at once. A slow one keeps no more than that in memory for itself.
_PIECE_BYTES = 256 * 1024


class LiveFilm:
    """The bytes so far. ``show`` and ``complete`` are for the encoder's thread, the rest is for the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._num_viewers = 0
        self._shown: list[bytes] = []
        self._is_complete = self._is_over = False
        self._has_news = asyncio.Event()

    @property
    def is_any(self) -> bool:
        """Whether there is a viewer. May be asked on any thread."""
        return self._num_viewers > 0

    def show(self, data: bytes) -> None:
        """Add the head or a fragment."""
        self._post(lambda: self._shown.append(data))

    def complete(self) -> None:
        """Say that no more frames follow."""
        self._post(self._complete)

    def end(self) -> None:
        """The generation has ended. A video that is not complete stays so."""
        self._is_over = True
        self._tell()

    async def read(self) -> AsyncGenerator[bytes, None]:
        """Yield the bytes from the first to the last, as they come, in pieces. Raises WorkerLost when the generation
        ends before the video is complete."""
        self._num_viewers += 1
        try:
            seen = 0
            while True:
                for data in self._shown[seen:]:
                    seen += 1
                    for start in range(0, len(data), _PIECE_BYTES):
                        yield data[start : start + _PIECE_BYTES]
                if seen < len(self._shown):
                    continue
                if self._is_complete:
                    return
                if self._is_over:
                    raise WorkerLost("The video ended before its last frame.")
                await self._has_news.wait()
        finally:
            self._num_viewers -= 1

    def _complete(self) -> None:
        self._is_complete = True

    def _post(self, change: Callable[[], object]) -> None:
        def apply() -> None:
            change()
            self._tell()

        with suppress(RuntimeError):  # the loop is closed, and nobody listens
            self._loop.call_soon_threadsafe(apply)

    def _tell(self) -> None:
        self._has_news.set()
        self._has_news = asyncio.Event()
