"""Decides whether a job may be stored: it is new, and the queue has room. Runs within the caller's transaction."""

from __future__ import annotations

from sqlalchemy import ColumnElement, Select, and_, bindparam, func, select, union_all
from sqlalchemy.engine import Connection

from kinema.errors import InvalidRequest, Overloaded
from kinema.job import Job, JobStatus
from kinema.jobs.conditions import is_queued, is_waiting_again
from kinema.jobs.schema import job_from_row, jobs
from kinema.jobs.store import QueueLimits, Submission

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


class Admission:
    """The limits of the queue. Its statements are built once: building a statement takes longer than running it."""

    def __init__(self, now: ColumnElement[float]) -> None:
        is_of_model, is_of_key = jobs.c.model == bindparam("model"), jobs.c.key_id == bindparam("key_id")
        self._of_model = _waiting(now, is_of_model)
        self._of_key = _waiting(now, and_(is_of_model, is_of_key))

    def refuse_if_full(self, connection: Connection, job: Job, limits: QueueLimits) -> None:
        """Check the limits of the queue. Raises Overloaded beyond them."""
        whose = {"model": job.request.model, "key_id": job.key_id}
        num_waiting, work = connection.execute(self._of_model, whose).one()
        _check(num_waiting, work + job.request.work, limits.max_queued, limits.max_work, "")
        if limits.max_queued_per_key is not None or limits.max_work_per_key is not None:
            num_waiting, work = connection.execute(self._of_key, whose).one()
            # One job may always wait, else a key's share could be less than any job.
            max_work = limits.max_work_per_key if num_waiting else None
            _check(num_waiting, work + job.request.work, limits.max_queued_per_key, max_work, " of this key")


def _waiting(now: ColumnElement[float], which: ColumnElement[bool]) -> Select[int, float]:
    """The number and the work of these jobs that wait: each part by the index that has it."""
    new, again = (select(jobs.c.work).where(state, which) for state in (is_queued(), is_waiting_again(now)))
    work = union_all(new, again).subquery("waiting").c.work
    return select(func.count(), func.coalesce(func.sum(work), 0.0))


def _check(num_waiting: int, work: float, max_queued: int | None, max_work: float | None, whose: str) -> None:
    refused = None
    if max_queued is not None and num_waiting >= max_queued:
        refused = f"{num_waiting} videos{whose} wait already; try again later"
    elif max_work is not None and work > max_work:
        refused = f"the videos{whose} that wait are as much work as may wait; try again later"
    if refused is not None:
        raise Overloaded(refused)
