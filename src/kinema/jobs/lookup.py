"""Looks up jobs by id, many with one query: calls that come while a query runs share the next query.

Clients poll, up to thousands of times a second. A query for each poll would take more time than all other work. Every
answer comes from a query that began after the call, so every client sees what was written before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from sqlalchemy import select
from sqlalchemy.engine import Connection

from kinema.ids import JobId
from kinema.job import Job
from kinema.jobs.database import Database
from kinema.jobs.schema import job_from_row, jobs

# Far below the number of parameters that a database accepts in a statement.
_MAX_TOGETHER = 200


class JobLookup:
    """Reads one database. Belongs to its event loop."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._asked: dict[JobId, asyncio.Future[Job | None]] = {}
        self._running: asyncio.Task[None] | None = None

    async def find(self, job_id: JobId) -> Job | None:
        """The job as it is now, or None when there is no such job. Raises StoreUnavailable."""
        if job_id not in self._asked:
            self._asked[job_id] = asyncio.get_running_loop().create_future()
        answer = self._asked[job_id]
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._answer())
        return await asyncio.shield(answer)

    async def _answer(self) -> None:
        while self._asked:
            together = dict(list(self._asked.items())[:_MAX_TOGETHER])
            for job_id in together:
                del self._asked[job_id]
            try:
                found = await self._read(list(together))
            except Exception as exc:  # after any error, no caller may wait for ever
                for answer in together.values():
                    answer.set_exception(exc)
                    answer.exception()  # so that asyncio does not warn when no caller waits any more
            else:
                for job_id, answer in together.items():
                    answer.set_result(found.get(job_id))

    async def _read(self, ids: Sequence[JobId]) -> Mapping[JobId, Job]:
        def transaction(connection: Connection) -> dict[JobId, Job]:
            rows = (connection.execute(select(jobs).where(jobs.c.id.in_(ids)))).mappings()
            return {JobId(row["id"]): job_from_row(row) for row in rows}

        return await self._database.read(transaction)
