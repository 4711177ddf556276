"""Writes the events of one run to the store, in order, without delaying the run.

Events that come while a write is in progress, and in a pause after it, share the next write. So a quick run needs few
transactions, and a slow run is written step by step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from kinema.errors import StoreUnavailable
from kinema.events import Event
from kinema.job import Job
from kinema.jobs.store import JobStore

log = structlog.get_logger(__name__)

# Seconds between attempts to reach a job database that does not answer.
_RETRY_S = 1.0


class Recorder:
    """Writes the events of one attempt. Belongs to one event loop; ``finish`` ends it.

    When the store has given this attempt up, ``on_refused`` is called and ``is_refused`` is true. ``pause_s`` tells the
    seconds between two writes; the last one never waits for it.
    """

    def __init__(
        self,
        store: JobStore,
        job: Job,
        on_refused: Callable[[], Awaitable[None]],
        pause_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._store = store
        self._job = job
        self._on_refused = on_refused
        self._pause_s = pause_s
        self._pending: list[Event] = []
        self._is_closing = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None
        self.is_refused = False

    def add(self, event: Event) -> None:
        """Write the event soon. Raises the error of an earlier write, if that was our own mistake."""
        self._pending.append(event)
        if self._writer is not None and self._writer.done():
            self._writer.result()
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write(), name=f"events of {self._job.id}")

    async def finish(self, *last: Event) -> bool:
        """Write all remaining events and then ``last`` in one transaction. No event may be added after that.

        Returns False when the store has given this attempt up. Raises StoreUnavailable; then it may be called again.
        """
        self._is_closing.set()
        if self._writer is not None:
            await self._writer
        together = [*self._pending, *last]
        if not together:
            return not self.is_refused
        is_recorded = await self._store.record(self._job.id, *together, attempt=self._job.attempt)
        self._pending.clear()
        return is_recorded

    async def _write(self) -> None:
        while self._pending and not self._is_closing.is_set():
            together, self._pending = self._pending, []
            try:
                is_recorded = await self._store.record(self._job.id, *together, attempt=self._job.attempt)
            except StoreUnavailable as exc:
                log.warning("events were not recorded yet", job_id=self._job.id, reason=exc.message)
                self._pending = together + self._pending
                await self._rest(_RETRY_S)
            else:
                if not is_recorded and not self.is_refused:
                    self.is_refused = True
                    await self._on_refused()
                await self._rest(self._pause_s())

    async def _rest(self, seconds: float) -> None:
        if not seconds:
            return
        try:
            async with asyncio.timeout(seconds):
                await self._is_closing.wait()
        except TimeoutError:
            return
