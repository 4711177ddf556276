"""Looks up jobs by id, many with one query: calls that come while a query runs share the next query.

Clients poll, up to thousands of times a second. A query for each poll would take more time than all other work. Every
answer comes from a query that began after the call, so every client sees what was written before.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.engine import Connection

from kinema.ids import JobId
from kinema.job import Job
from kinema.jobs.database import Database
from kinema.jobs.gathering import Gathering
from kinema.jobs.schema import job_from_row, jobs

# Far below the number of parameters that a database accepts in a statement.
_MAX_TOGETHER = 200


class JobLookup:
    """Reads one database. Belongs to its event loop."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._calls: Gathering[JobId, Job | None] = Gathering(self._read, _MAX_TOGETHER)

    async def find(self, job_id: JobId) -> Job | None:
        """The job as it is now, or None when there is no such job. Raises StoreUnavailable."""
        return await self._calls.ask(job_id)

    async def _read(self, ids: Sequence[JobId]) -> Sequence[Job | None]:
        def transaction(connection: Connection) -> dict[str, Job]:
            rows = connection.execute(select(jobs).where(jobs.c.id.in_(set(ids)))).mappings()
            return {row["id"]: job_from_row(row) for row in rows}

        found = await self._database.read(transaction)
        return [found.get(job_id) for job_id in ids]
