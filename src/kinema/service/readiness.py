"""Whether the job database and the storage can be used, for probes that ask every few seconds.

They are asked when somebody wants to know, and at most once in a while: a write to an object store costs money.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from kinema.errors import KinemaError, StorageFull, StorageUnavailable, StoreUnavailable
from kinema.storage import Storage

# An answer is kept for the first time when all is well, and for the second when it is not.
_KEPT_S, _KEPT_BAD_S = 10.0, 1.0
# Less than the timeouts of most probes, more than a database that is busy takes.
_WAIT_S = 2.0


class Readiness:
    """The newest answers of the database and the storage. Belongs to one event loop."""

    def __init__(self, ask_store: Callable[[], Awaitable[object]], storage: Storage) -> None:
        """``ask_store`` reads something from the database, or raises StoreUnavailable."""
        self._parts = (
            _Part(ask_store, StoreUnavailable("the job database does not answer")),
            _Part(lambda: _write_to(storage), StorageUnavailable("the storage does not answer")),
        )

    async def check(self) -> None:
        """Raises StoreUnavailable or StorageUnavailable while the one or the other cannot be used."""
        for error in await asyncio.gather(*(part.error() for part in self._parts)):
            if error is not None:
                raise error

    async def stop(self) -> None:
        """Wait for nothing more. A thread that hangs in a storage stays behind."""
        for part in self._parts:
            part.stop()


class _Part:
    """One of the two. ``silence`` is the error while it does not answer."""

    def __init__(self, ask: Callable[[], Awaitable[object]], silence: KinemaError) -> None:
        self._ask = ask
        self._silence = silence
        self._asking: asyncio.Task[KinemaError | None] | None = None
        self._error: KinemaError | None = None
        self._kept_until = float("-inf")

    async def error(self) -> KinemaError | None:
        if self._asking is None and time.monotonic() >= self._kept_until:
            self._asking = asyncio.create_task(self._answer())
        if self._asking is not None:
            asking = self._asking
            await asyncio.wait({asking}, timeout=_WAIT_S)
            if not asking.done():
                return self._silence
            if self._asking is asking:
                self._error, self._asking = asking.result(), None
                self._kept_until = time.monotonic() + (_KEPT_S if self._error is None else _KEPT_BAD_S)
        return self._error

    async def _answer(self) -> KinemaError | None:
        try:
            await self._ask()
        except KinemaError as exc:
            return exc
        return None

    def stop(self) -> None:
        if self._asking is not None:
            self._asking.cancel()


async def _write_to(storage: Storage) -> None:
    """A full storage can still be read, and emptied over HTTP: new videos are refused with 507 meanwhile."""
    try:
        await asyncio.to_thread(storage.check)
    except StorageFull:
        return
