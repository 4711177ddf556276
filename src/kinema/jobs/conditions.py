"""Conditions that select rows of jobs. ``now`` is in seconds since the epoch, or a parameter for it."""

from __future__ import annotations

from sqlalchemy import BindParameter, ColumnElement, and_, or_

from kinema.job import JobStatus
from kinema.jobs.schema import jobs

Now = float | BindParameter[float]


def is_waiting(now: Now) -> ColumnElement[bool]:
    """The job is queued, or in progress without an owner. A job that rests before its next attempt waits too."""
    return _is_queued_or(or_(jobs.c.owner.is_(None), jobs.c.lease_until < now))


def is_claimable(now: Now) -> ColumnElement[bool]:
    """The job waits, and its rest before the next attempt is over."""
    return _is_queued_or(or_(jobs.c.lease_until.is_(None), jobs.c.lease_until < now))


def is_active() -> ColumnElement[bool]:
    """The job has not ended."""
    return jobs.c.status.in_((JobStatus.QUEUED.value, JobStatus.IN_PROGRESS.value))


def is_held(owner: str) -> ColumnElement[bool]:
    """The job is in progress and belongs to this owner."""
    return and_(jobs.c.owner == owner, jobs.c.status == JobStatus.IN_PROGRESS.value)


def _is_queued_or(is_let_go: ColumnElement[bool]) -> ColumnElement[bool]:
    return or_(jobs.c.status == JobStatus.QUEUED.value, and_(jobs.c.status == JobStatus.IN_PROGRESS.value, is_let_go))
