"""Decides whether a job may be stored: it is new, and the queue has room. Runs within the caller's transaction."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Integer,
    Select,
    and_,
    bindparam,
    case,
    func,
    insert,
    literal_column,
    select,
    union_all,
    update,
)
from sqlalchemy.engine import Connection

from kinema.errors import InvalidRequest, Overloaded
from kinema.job import Job, JobStatus
from kinema.jobs.conditions import is_in_progress, is_queued, is_waiting_again
from kinema.jobs.database import AdvisoryLock, take_lock
from kinema.jobs.schema import arrivals, job_from_row, jobs
from kinema.jobs.store import PRIORITIES, QueueLimits, Submission

# Seconds for which a repeated submission without an idempotency key is recognised: the SDK waits 600 s for an answer,
# and tries twice more.
_REPEATED_WITHIN_S = 1900.0


def find_repeated(connection: Connection, key_id: str, sent: Submission, now: float) -> Job | None:
    """The job that this submission has already made. Raises InvalidRequest when its key came with another body."""
    query = select(jobs).where(jobs.c.key_id == key_id)
    if sent.idempotency_key is not None:
        query = query.where(jobs.c.idempotency_key == sent.idempotency_key)
    else:
        # A job whose client went away was given up. It must not be the answer to the client's next try.
        is_wanted = and_(jobs.c.is_cancel_requested.is_(False), jobs.c.status != JobStatus.FAILED.value)
        is_recent = jobs.c.created_at > now - _REPEATED_WITHIN_S
        query = query.where(jobs.c.fingerprint == sent.fingerprint, is_recent, is_wanted)
    row = connection.execute(query.order_by(jobs.c.id.desc()).limit(1)).mappings().first()
    if row is None:
        return None
    if row["fingerprint"] != sent.fingerprint:
        raise InvalidRequest("this Idempotency-Key came with another body before; send a new key with a new body")
    return job_from_row(row)


_ARRIVE = (
    update(arrivals)
    .where(arrivals.c.model == bindparam("of_model"))
    .values(num_jobs=arrivals.c.num_jobs + 1, work=arrivals.c.work + bindparam("more"))
    .returning(arrivals.c.num_jobs, arrivals.c.work)
)


@dataclass(frozen=True, slots=True)
class _Counted:
    """What a model had waiting and running when it was counted, and what had arrived for it until then."""

    num_jobs: int
    work: float
    num_arrived: int
    work_arrived: float


class Admission:
    """The limits of the queue.

    To count a long queue takes longer than all else of a submission. What had not ended when it was counted last, and
    all that has arrived since, is as much as can wait now. So it is counted again only when that would be too much.
    """

    def __init__(self, now: ColumnElement[float]) -> None:
        self._of_model, self._of_key = _counts(now)
        self._counted: dict[str, _Counted] = {}

    def refuse_if_full(self, connection: Connection, job: Job, limits: QueueLimits) -> None:
        """Check the limits of the queue, and note the job's arrival. Raises Overloaded beyond them.

        No other transaction does so for this model until this one ends.
        """
        num_arrived, work_arrived = _note_arrival(connection, job)
        if not self._has_surely_room(job, limits, num_arrived, work_arrived):
            waiting = connection.execute(self._of_model, {"model": job.request.model}).one()
            counted = _Counted(waiting.num_active, waiting.work_active, num_arrived, work_arrived)
            self._counted[job.request.model] = counted
            _check(waiting.num_jobs, waiting.work + job.request.work, limits.max_queued, limits.max_work, "")
        if limits.max_queued_per_key is not None or limits.max_work_per_key is not None:
            waiting = connection.execute(self._of_key, {"model": job.request.model, "key_id": job.key_id}).one()
            # One job may always wait, else a key's share could be less than any job.
            max_work = limits.max_work_per_key if waiting.num_jobs else None
            work = waiting.work + job.request.work
            _check(waiting.num_jobs, work, limits.max_queued_per_key, max_work, " of this key")

    def _has_surely_room(self, job: Job, limits: QueueLimits, num_arrived: int, work_arrived: float) -> bool:
        counted = self._counted.get(job.request.model)
        if counted is None:
            return False
        num_jobs = counted.num_jobs + num_arrived - counted.num_arrived
        work = counted.work + work_arrived - counted.work_arrived + job.request.work
        has_places = limits.max_queued is None or num_jobs < limits.max_queued
        return has_places and (limits.max_work is None or work <= limits.max_work)


def _note_arrival(connection: Connection, job: Job) -> tuple[int, float]:
    """Count the job, and return the number and the work of those of its model that came before it.

    The row of the model is locked from then on. A lock of its own is for the first job alone, which makes the row.
    """
    model, work = job.request.model, job.request.work
    found = connection.execute(_ARRIVE, {"of_model": model, "more": work}).first()
    if found is None:
        take_lock(connection, AdvisoryLock.QUEUE, model)
        found = connection.execute(_ARRIVE, {"of_model": model, "more": work}).first()
    if found is None:
        connection.execute(insert(arrivals), {"model": model, "num_jobs": 1, "work": work})
        return 0, 0.0
    return found.num_jobs - 1, found.work - work


@lru_cache(maxsize=4)
def _counts(now: ColumnElement[float]) -> tuple[Select[Any], Select[Any]]:
    """Of a model, and of a key. They are built once: building a statement takes longer than running it."""
    is_of_model = jobs.c.model == bindparam("model")
    # The index has the rank before the key.
    is_of_key = and_(jobs.c.key_id == bindparam("key_id"), jobs.c.rank.in_(range(len(PRIORITIES))))
    return _waiting(now, is_of_model), _waiting(now, and_(is_of_model, is_of_key))


def _waiting(now: ColumnElement[float], which: ColumnElement[bool]) -> Select[Any]:
    """The number and the work of these jobs that wait, and of all that have not ended."""
    new = select(jobs.c.work, literal_column("1", Integer).label("waits")).where(is_queued(), which)
    waits = case((is_waiting_again(now), 1), else_=0)
    some = union_all(new, select(jobs.c.work, waits).where(is_in_progress(), which)).subquery("active").c
    return select(
        func.coalesce(func.sum(some.waits), 0).label("num_jobs"),
        func.coalesce(func.sum(some.work * some.waits), 0.0).label("work"),
        func.count().label("num_active"),
        func.coalesce(func.sum(some.work), 0.0).label("work_active"),
    )


def _check(num_waiting: int, work: float, max_queued: int | None, max_work: float | None, whose: str) -> None:
    refused = None
    if max_queued is not None and num_waiting >= max_queued:
        refused = f"{num_waiting} videos{whose} wait already; try again later"
    elif max_work is not None and work > max_work:
        refused = f"the videos{whose} that wait are as much work as may wait; try again later"
    if refused is not None:
        raise Overloaded(refused)
