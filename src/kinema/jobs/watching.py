"""The waiters for news of jobs, and how they get it.

What this process records wakes its waiters at once. One slow query for all waiters sees what other processes record.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from sqlalchemy import select
from sqlalchemy.engine import Connection

from kinema.errors import StoreUnavailable
from kinema.ids import JobId
from kinema.job import Job
from kinema.jobs.database import Database
from kinema.jobs.schema import jobs

# Seconds until an event of another process is seen.
_POLL_S = 1.0


@dataclass(eq=False, slots=True)
class Watcher:
    """``news`` is set when anything about its job is recorded, or, ``is_for_end``, only when the job may have ended."""

    is_for_end: bool
    news: asyncio.Event = field(default_factory=asyncio.Event)
    # The job as this process recorded its end.
    ended: Job | None = None


class Watchers:
    """The waiters for the jobs of one database. Belongs to the database's event loop."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._watchers: dict[JobId, set[Watcher]] = defaultdict(set)
        self._poller: asyncio.Task[None] | None = None
        self._of_all: set[asyncio.Event] = set()

    async def close(self) -> None:
        if self._poller is not None:
            self._poller.cancel()
            await asyncio.gather(self._poller, return_exceptions=True)

    @contextmanager
    def notified(self, job_id: JobId, *, is_for_end: bool = False) -> Iterator[Watcher]:
        """Watch the job until the end of this."""
        watcher = Watcher(is_for_end)
        self._watchers[job_id].add(watcher)
        if self._poller is None or self._poller.done():
            self._poller = asyncio.create_task(self._poll())
        try:
            yield watcher
        finally:
            self._watchers[job_id].discard(watcher)
            if not self._watchers[job_id]:
                del self._watchers[job_id]

    @contextmanager
    def watching_all(self) -> Iterator[asyncio.Event]:
        """An event that is set, until the end of this, with ``wake_all_watching``."""
        news = asyncio.Event()
        self._of_all.add(news)
        try:
            yield news
        finally:
            self._of_all.discard(news)

    def wake_all_watching(self) -> None:
        """Wake those who wait for news of any job."""
        for news in self._of_all:
            news.set()

    def wake(self, job_id: JobId, *, may_be_over: bool = True) -> None:
        """Wake the waiters of this job: something was recorded."""
        for watcher in self._watchers.get(job_id, ()):
            if may_be_over or not watcher.is_for_end:
                watcher.news.set()

    def tell_end(self, job: Job) -> None:
        """Let its waiters know the job as it ended, so that they need not read it. It does not wake them."""
        for watcher in self._watchers.get(job.id, ()):
            watcher.ended = job

    async def _poll(self) -> None:
        """See what other processes record: one query for all watched jobs, however many clients wait."""
        known: Mapping[JobId, int] = {}
        while self._watchers:
            await asyncio.sleep(_POLL_S)
            try:
                found = await self._database.read(self._last_numbers)
            except StoreUnavailable:
                continue  # calls get the error; waiters continue to wait
            for job_id in list(self._watchers):
                if job_id not in found or known.get(job_id) != found[job_id]:  # deleted, or something was recorded
                    self.wake(job_id)
            known = found

    def _last_numbers(self, connection: Connection) -> dict[JobId, int]:
        query = select(jobs.c.id, jobs.c.last_seq).where(jobs.c.id.in_(list(self._watchers)))
        return {JobId(job_id): last_seq for job_id, last_seq in connection.execute(query)}
