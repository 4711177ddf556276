"""Jobs by id, looked up together: who asks while a query is under way shares the next one.

Clients poll, thousands of times a second at worst; a query of its own for each would cost more than all the rest. Every
answer comes from a query that began after it was asked for, so nobody reads what was before his own write.
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

# Far below the number of parameters that any database takes in a statement.
_MAX_TOGETHER = 200


class JobLookup:
    """Reads one database. Belongs to its event loop."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._asked: dict[JobId, asyncio.Future[Job | None]] = {}
        self._running: asyncio.Task[None] | None = None

    async def find(self, job_id: JobId) -> Job | None:
        """The job as it is now, None when there is none. Raises StoreUnavailable."""
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
            except Exception as exc:  # whatever it is, nobody is left waiting
                for answer in together.values():
                    answer.set_exception(exc)
                    answer.exception()  # seen, even if nobody waits any more
            else:
                for job_id, answer in together.items():
                    answer.set_result(found.get(job_id))

    async def _read(self, ids: Sequence[JobId]) -> Mapping[JobId, Job]:
        def transaction(connection: Connection) -> dict[JobId, Job]:
            rows = (connection.execute(select(jobs).where(jobs.c.id.in_(ids)))).mappings()
            return {JobId(row["id"]): job_from_row(row) for row in rows}

        return await self._database.read(transaction)
