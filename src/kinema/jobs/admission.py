"""Decides whether jobs may be stored: they are new, and the queue has room. Runs within the caller's transaction."""

from __future__ import annotations

from collections.abc import Sequence
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
    .values(num_jobs=arrivals.c.num_jobs + bindparam("more_jobs"), work=arrivals.c.work + bindparam("more_work"))
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
        self.of_model, self.of_key = _counts(now)
        self.counted: dict[str, _Counted] = {}

    def admit(self, connection: Connection, wanted: Sequence[tuple[Job, QueueLimits]]) -> Sequence[Overloaded | None]:
        """Check the limits of the queue for jobs of one model, in their order, and note the arrival of those that have
        room. Returns for each why it has none, or None.

        No other transaction does so for this model until this one ends.
        """
        line = _Line(self, connection, [job for job, _ in wanted])
        refused = [line.refusal_of(job, limits) for job, limits in wanted]
        line.note_refused([job for (job, _), why in zip(wanted, refused, strict=True) if why is not None])
        return refused


class _Line:
    """The queue of a model in a transaction that puts jobs into it: what was there before, and those that had room."""

    def __init__(self, admission: Admission, connection: Connection, coming: Sequence[Job]) -> None:
        self._admission = admission
        self._connection = connection
        self._model = coming[0].request.model
        self._num_arrived, self._work_arrived = _note_arrivals(connection, self._model, coming)
        self._admitted: list[Job] = []
        # What waited before, of the model and of keys, where it was counted.
        self._before: dict[str | None, Any] = {}

    def refusal_of(self, job: Job, limits: QueueLimits) -> Overloaded | None:
        try:
            if not self._has_surely_room(job, limits):
                num_jobs, work = self._waiting(None)
                _check(num_jobs, work + job.request.work, limits.max_queued, limits.max_work, "")
            if limits.max_queued_per_key is not None or limits.max_work_per_key is not None:
                num_jobs, work = self._waiting(job.key_id)
                # One job may always wait, else a key's share could be less than any job.
                max_work = limits.max_work_per_key if num_jobs else None
                _check(num_jobs, work + job.request.work, limits.max_queued_per_key, max_work, " of this key")
        except Overloaded as exc:
            return exc
        self._admitted.append(job)
        return None

    def note_refused(self, refused: Sequence[Job]) -> None:
        if refused:
            change = {"more_jobs": -len(refused), "more_work": -sum(job.request.work for job in refused)}
            self._connection.execute(_ARRIVE, {"of_model": self._model, **change})

    def _has_surely_room(self, job: Job, limits: QueueLimits) -> bool:
        counted = self._admission.counted.get(self._model)
        if counted is None:
            return False
        num_new, work_new = _sum_of(self._admitted)
        num_jobs = counted.num_jobs + self._num_arrived - counted.num_arrived + num_new
        work = counted.work + self._work_arrived - counted.work_arrived + work_new + job.request.work
        has_places = limits.max_queued is None or num_jobs < limits.max_queued
        return has_places and (limits.max_work is None or work <= limits.max_work)

    def _waiting(self, key_id: str | None) -> tuple[int, float]:
        """The number and the work of the waiting jobs of a key; None: of all keys."""
        if (before := self._before.get(key_id)) is None:
            before = self._before[key_id] = self._count(key_id)
        num_new, work_new = _sum_of([job for job in self._admitted if key_id in (None, job.key_id)])
        return before.num_jobs + num_new, before.work + work_new

    def _count(self, key_id: str | None) -> Any:  # noqa: ANN401 - a row
        if key_id is not None:
            return self._connection.execute(self._admission.of_key, {"model": self._model, "key_id": key_id}).one()
        found = self._connection.execute(self._admission.of_model, {"model": self._model}).one()
        counted = _Counted(found.num_active, found.work_active, self._num_arrived, self._work_arrived)
        self._admission.counted[self._model] = counted
        return found


def _sum_of(some: Sequence[Job]) -> tuple[int, float]:
    return len(some), sum(job.request.work for job in some)


def _note_arrivals(connection: Connection, model: str, coming: Sequence[Job]) -> tuple[int, float]:
    """Count the jobs, and return the number and the work of those of their model that came before them.

    The row of the model is locked from then on. A lock of its own is for the first jobs alone, which make the row.
    """
    num_jobs, work = _sum_of(coming)
    change = {"of_model": model, "more_jobs": num_jobs, "more_work": work}
    found = connection.execute(_ARRIVE, change).first()
    if found is None:
        take_lock(connection, AdvisoryLock.QUEUE, model)
        found = connection.execute(_ARRIVE, change).first()
    if found is None:
        connection.execute(insert(arrivals), {"model": model, "num_jobs": num_jobs, "work": work})
        return 0, 0.0
    return found.num_jobs - num_jobs, found.work - work


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
