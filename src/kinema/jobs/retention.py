"""The part of the job database that retention uses: it finds jobs that ended before a time, and deletes them.

Deleting a row deletes its events too. Only jobs that have ended and have no star are deleted here, whatever the
caller asks for. The database remembers the id of a deleted job, so that its files are told from those of a job that it
never had.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, and_, delete, func, insert, literal_column, select, tuple_
from sqlalchemy.engine import Connection

from kinema.ids import JobId
from kinema.job import Job, JobStatus
from kinema.jobs.changes import place_of, place_values
from kinema.jobs.conditions import is_completed
from kinema.jobs.database import Database
from kinema.jobs.input_store import forget_jobs
from kinema.jobs.schema import deleted_jobs, events, job_from_row, jobs

# Jobs for one statement: few enough not to delay other writers, and far below SQLite's limit of variables.
_BATCH = 500


@dataclass(frozen=True, slots=True)
class JobEnd:
    """When a job ended (None if it has not), the attempt that completed it, whose files are kept, whether it has
    failed, and whether it is starred."""

    finished_at: float | None
    kept_attempt: int | None
    has_failed: bool
    is_starred: bool = False


@dataclass(frozen=True, slots=True)
class EndedJob:
    """A job that has ended: when, in seconds since the epoch, and how."""

    id: JobId
    finished_at: float
    status: JobStatus


class SqlRetention:
    """The job database for retention. Every method may raise StoreUnavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def ends(self, job_ids: Sequence[JobId]) -> dict[JobId, JobEnd]:
        """The ends of those of these jobs that exist."""
        known: dict[JobId, JobEnd] = {}
        for some in _batches(job_ids):
            known |= await self._ends(some)
        return known

    async def deleted(self, job_ids: Sequence[JobId]) -> set[JobId]:
        """Those of these jobs that were in this database and were deleted."""
        found = [await self._find_deleted(deleted_jobs.c.id.in_(some)) for some in _batches(job_ids)]
        return {job_id for some in found for job_id in some}

    async def forget_deleted_before(self, time: float, with_files: Collection[JobId]) -> None:
        """Forget the ids of jobs that were deleted before that time, but for those that still have files."""
        old = await self._find_deleted(deleted_jobs.c.at < time)
        for some in _batches([job_id for job_id in old if job_id not in with_files]):
            await self._forget_deleted(some)

    async def ended_before(self, at: float, after: EndedJob | None, limit: int) -> Sequence[EndedJob]:
        """Jobs without a star that ended before that time, the first first: those after this one, ``limit`` at most."""
        query = select(jobs.c.id, jobs.c.finished_at, jobs.c.status).where(jobs.c.finished_at < at, _expires())
        if after is not None:
            query = query.where(tuple_(jobs.c.finished_at, jobs.c.id) > (after.finished_at, after.id))
        query = query.order_by(jobs.c.finished_at, jobs.c.id).limit(limit)
        rows = await self._database.read(lambda connection: connection.execute(query).all())
        return [EndedJob(JobId(row.id), row.finished_at, JobStatus(row.status)) for row in rows]

    async def count_videos(self) -> int:
        """The number of finished videos."""
        query = select(func.count()).where(is_completed())
        return await self._database.read(lambda connection: connection.execute(query).scalar_one())

    async def forget(self, job_ids: Sequence[JobId]) -> int:
        """Delete the jobs if they have ended and have no star, and return how many were deleted."""
        return len(await self.forget_ended(job_ids))

    async def forget_ended(self, job_ids: Sequence[JobId]) -> Sequence[JobId]:
        """Delete those of these jobs that have ended and have no star, and return their ids."""
        gone = [await self._delete(jobs.c.id.in_(some), limit=len(some)) for some in _batches(job_ids)]
        return [job_id for some in gone for job_id in some]

    async def forget_ended_before(self, at: float, limit: int) -> Sequence[JobId]:
        """Delete jobs without a star that ended before that time, ``limit`` at most, and return their ids."""
        return await self._delete(jobs.c.finished_at < at, limit=limit)

    async def compact_ended_before(self, at: float, limit: int) -> int:
        """Of jobs that ended before that time, delete all events that a client which comes late does not need: it needs
        the last one, and the newest preview. Returns the number of jobs, at most ``limit``."""
        is_whole = and_(events.c.seq == literal_column("1"), events.c.at < at)
        found = select(jobs.c.id, jobs.c.last_seq).join(events, events.c.job_id == jobs.c.id)
        found = found.where(is_whole, jobs.c.finished_at < at).order_by(events.c.at).limit(limit)
        locked = found.with_for_update(skip_locked=True, of=jobs)  # as in _delete

        def transaction(connection: Connection) -> int:
            ended = connection.execute(locked).all()
            for job_id, last_seq in ended:
                is_past = events.c.seq < last_seq, events.c.type != "preview"
                connection.execute(delete(events).where(events.c.job_id == job_id, *is_past))
            return len(ended)

        # Read first: a sweep that finds nothing must not take the write lock.
        if not await self._database.read(lambda connection: connection.execute(found.limit(1)).first()):
            return 0
        return await self._database.write(transaction)

    async def _find_deleted(self, which: ColumnElement[bool]) -> Sequence[JobId]:
        query = select(deleted_jobs.c.id).where(which)
        return await self._database.read(lambda connection: [JobId(row.id) for row in connection.execute(query)])

    async def _forget_deleted(self, job_ids: Sequence[JobId]) -> None:
        forget = delete(deleted_jobs).where(deleted_jobs.c.id.in_(job_ids))
        await self._database.write(lambda connection: connection.execute(forget))

    async def _ends(self, job_ids: Sequence[JobId]) -> dict[JobId, JobEnd]:
        def transaction(connection: Connection) -> dict[JobId, JobEnd]:
            columns = (jobs.c.id, jobs.c.status, jobs.c.finished_at, jobs.c.attempt, jobs.c.starred_at)
            rows = connection.execute(select(*columns).where(jobs.c.id.in_(job_ids)))
            return {JobId(row.id): _end(row) for row in rows}

        return await self._database.read(transaction)

    async def _delete(self, *which: ColumnElement[bool], limit: int) -> Sequence[JobId]:
        # Skip rows that another sweeper is deleting: two sweepers that wait for each other would be a deadlock.
        found = select(jobs.c.id).where(_has_ended(), _expires(), *which).limit(limit).with_for_update(skip_locked=True)

        def transaction(connection: Connection) -> Sequence[JobId]:
            rows = connection.execute(delete(jobs).where(jobs.c.id.in_(found.scalar_subquery())).returning(jobs))
            gone = [job_from_row(row) for row in rows.mappings()]
            forget_jobs(connection, gone, time.time())
            remember_deleted(connection, self._database, gone, time.time())
            return [job.id for job in gone]

        return await self._database.write(transaction)


def remember_deleted(connection: Connection, database: Database, gone: Sequence[Job], at: float) -> None:
    """Note the jobs whose rows this transaction deletes, as changes of their keys."""
    rows = [{"id": job.id, "at": at, "key_id": job.key_id, **place_values(database, job.key_id, at)} for job in gone]
    if rows:
        connection.execute(insert(deleted_jobs).values(place=place_of(database)), rows)


def _has_ended() -> ColumnElement[bool]:
    return jobs.c.status.in_([status.value for status in JobStatus if status.is_terminal])


def _expires() -> ColumnElement[bool]:
    """The job has no star. In the words of the index of jobs that have ended."""
    return jobs.c.starred_at.is_(None)


def _end(row: Any) -> JobEnd:  # noqa: ANN401 - SQLAlchemy's row of these columns
    kept_attempt = row.attempt if row.status == JobStatus.COMPLETED.value else None
    has_failed = row.status == JobStatus.FAILED.value
    return JobEnd(row.finished_at, kept_attempt, has_failed, is_starred=row.starred_at is not None)


def _batches(job_ids: Sequence[JobId]) -> list[Sequence[JobId]]:
    return [job_ids[start : start + _BATCH] for start in range(0, len(job_ids), _BATCH)]
