"""Which jobs are meant, as conditions on their rows; ``now`` is in seconds since the epoch, or a parameter for it."""

from __future__ import annotations

from sqlalchemy import BindParameter, ColumnElement, and_, or_

from kinema.job import JobStatus
from kinema.jobs.schema import jobs

Now = float | BindParameter[float]


def is_waiting(now: Now) -> ColumnElement[bool]:
    """Queued, or in progress without anybody who holds it: one that rests waits too."""
    return _is_queued_or(or_(jobs.c.owner.is_(None), jobs.c.lease_until < now))


def is_claimable(now: Now) -> ColumnElement[bool]:
    """Waiting, and rested."""
    return _is_queued_or(or_(jobs.c.lease_until.is_(None), jobs.c.lease_until < now))


def is_active() -> ColumnElement[bool]:
    """Not ended."""
    return jobs.c.status.in_((JobStatus.QUEUED.value, JobStatus.IN_PROGRESS.value))


def is_held(owner: str) -> ColumnElement[bool]:
    """In progress, and that owner's."""
    return and_(jobs.c.owner == owner, jobs.c.status == JobStatus.IN_PROGRESS.value)


def _is_queued_or(is_let_go: ColumnElement[bool]) -> ColumnElement[bool]:
    return or_(jobs.c.status == JobStatus.QUEUED.value, and_(jobs.c.status == JobStatus.IN_PROGRESS.value, is_let_go))
