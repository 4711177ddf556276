"""Decides whether a job may be stored: it is new, and the queue has room. Runs within the caller's transaction."""

from __future__ import annotations

from sqlalchemy import and_, bindparam, func, select
from sqlalchemy.engine import Connection

from kinema.errors import InvalidRequest, Overloaded
from kinema.job import Job, JobStatus
from kinema.jobs.conditions import is_waiting
from kinema.jobs.schema import job_from_row, jobs
from kinema.jobs.store import QueueLimits, Submission

# Seconds for which a repeated submission without an idempotency key is recognised: the SDK waits 600 s for an answer,
# and tries twice more.
_REPEATED_WITHIN_S = 1900.0

# Built once: building a statement takes longer than running it.
_OF_MODEL = select(func.count(), func.coalesce(func.sum(jobs.c.work), 0.0)).where(
    is_waiting(bindparam("now")), jobs.c.model == bindparam("model")
)
_OF_KEY = _OF_MODEL.where(jobs.c.key_id == bindparam("key_id"))


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


def refuse_if_full(connection: Connection, job: Job, limits: QueueLimits, now: float) -> None:
    """Check the limits of the queue. Raises Overloaded beyond them."""
    whose = {"now": now, "model": job.request.model}
    bounds = (
        (_OF_MODEL, whose, limits.max_queued, limits.max_work),
        (_OF_KEY, {**whose, "key_id": job.key_id}, limits.max_queued_per_key, limits.max_work_per_key),
    )
    for query, parameters, max_count, max_work in bounds:
        if max_count is None and max_work is None:
            continue
        count, waiting_work = connection.execute(query, parameters).one()
        if max_count is not None and count >= max_count:
            raise Overloaded(f"{max_count} videos wait already; try again later", retry_after_s=limits.retry_after_s)
        if max_work is not None and waiting_work + job.request.work > max_work:
            raise Overloaded(
                "the videos that wait are as much work as may wait; try again later", retry_after_s=limits.retry_after_s
            )
