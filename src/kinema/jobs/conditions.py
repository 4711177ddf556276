"""Conditions that select rows of jobs. ``now`` is an expression for the time, in seconds since the epoch.

``of`` is the table, or an alias of it. The statuses stand in the text of a statement, or the indexes of ``schema.py``
that have only some rows would not be used.
"""

from __future__ import annotations

from sqlalchemy import ColumnElement, FromClause, and_, literal_column, or_

from kinema.job import JobStatus
from kinema.jobs.schema import jobs

_QUEUED: ColumnElement[str] = literal_column(f"'{JobStatus.QUEUED}'")
_IN_PROGRESS: ColumnElement[str] = literal_column(f"'{JobStatus.IN_PROGRESS}'")
_FAILED: ColumnElement[str] = literal_column(f"'{JobStatus.FAILED}'")
_CANCELLED: ColumnElement[str] = literal_column(f"'{JobStatus.CANCELLED}'")
_COMPLETED: ColumnElement[str] = literal_column(f"'{JobStatus.COMPLETED}'")


def is_waiting(now: ColumnElement[float], of: FromClause = jobs) -> ColumnElement[bool]:
    """The job is queued, or in progress without an owner. A job that rests before its next attempt waits too."""
    return or_(is_queued(of), is_waiting_again(now, of))


def is_waiting_again(now: ColumnElement[float], of: FromClause = jobs) -> ColumnElement[bool]:
    """The job is in progress without an owner, or its owner's lease has run out."""
    return and_(is_in_progress(of), or_(of.c.owner.is_(None), of.c.lease_until < now))


def is_let_go(now: ColumnElement[float], of: FromClause = jobs) -> ColumnElement[bool]:
    """The job has begun and waits for its next attempt, and its rest before that is over."""
    return and_(is_in_progress(of), or_(of.c.lease_until.is_(None), of.c.lease_until < now))


def is_running(now: ColumnElement[float], of: FromClause = jobs) -> ColumnElement[bool]:
    """The job is in progress, and its owner's lease has not run out."""
    return and_(is_in_progress(of), of.c.owner.is_not(None), of.c.lease_until >= now)


def is_queued(of: FromClause = jobs) -> ColumnElement[bool]:
    """The job was never claimed. So it has no owner, and no worker was lost with it."""
    return and_(is_active(of), of.c.status == _QUEUED)


def is_in_progress(of: FromClause = jobs) -> ColumnElement[bool]:
    """The job was claimed and has not ended."""
    return and_(is_active(of), of.c.status == _IN_PROGRESS)


def is_completed() -> ColumnElement[bool]:
    """The job has a video."""
    return and_(jobs.c.finished_at.is_not(None), jobs.c.status == _COMPLETED)


def is_without_video() -> ColumnElement[bool]:
    """The job has failed or was cancelled, in the words of the index of these."""
    return jobs.c.status.in_((_FAILED, _CANCELLED))


def is_active(of: FromClause = jobs) -> ColumnElement[bool]:
    """The job has not ended. The indexes of such jobs ask for this, beside a status of its own."""
    return of.c.status.in_((_QUEUED, _IN_PROGRESS))


def is_held(owner: str) -> ColumnElement[bool]:
    """The job is in progress and belongs to this owner."""
    return and_(jobs.c.owner == owner, is_in_progress())
