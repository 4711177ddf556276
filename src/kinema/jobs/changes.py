"""What has changed of a key's jobs, in one order for all servers on a database.

A job's row has the place of its last change: so a reader that was away for long gets each job once, as it is now. A
deleted job has its place among the deleted ones, for a day.

A reader goes on from a ``Mark``. The order is that of commits: on PostgreSQL a place is the number of the transaction,
and a row is shown once no transaction before it can still commit. On SQLite it is the time in microseconds, or one more
than the last place of the key where the clock went back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    RowMapping,
    Select,
    Table,
    TextClause,
    bindparam,
    func,
    literal,
    select,
    text,
    tuple_,
)
from sqlalchemy.engine import Connection

from kinema.ids import JobId, is_job_id
from kinema.job import Job
from kinema.jobs.database import Database
from kinema.jobs.identity import read_identity
from kinema.jobs.schema import deleted_jobs, job_from_row, jobs
from kinema.jobs.watching import Watchers

_HOUR_S = 3600
# So long does the text of a mark hold. A deleted job is remembered for longer: service/sweeper.py.
_HOLDS_H = 12
# The digits of the largest place, and of a time.
_MAX_DIGITS = 19
_NEVER = 2**63 - 1


@dataclass(frozen=True, slots=True, order=True)
class Mark:
    """A place in the order: everything up to the change of this job is before it. ``job_id`` may be empty."""

    place: int
    job_id: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    """A job that has changed, as it is now, and the mark behind it; None for a job that was deleted."""

    mark: Mark
    job_id: JobId
    job: Job | None


class JobChanges:
    """Reads the changes. Every method may raise StoreUnavailable."""

    def __init__(self, database: Database, watchers: Watchers) -> None:
        self._database = database
        self._watchers = watchers
        self._store_id = ""

    def watched(self) -> AbstractContextManager[asyncio.Event]:
        """An event that is set, within the block, when any job may have changed, as far as this process hears of it."""
        return self._watchers.watching_all()

    async def end(self, key_id: str) -> Mark:
        """The mark behind everything of the key that is shown now."""
        oldest = self._database.oldest_transaction
        end = _last_place(literal(key_id)) + 1 if oldest is None else oldest
        return Mark(await self._database.read(lambda connection: connection.execute(select(end)).scalar_one()))

    async def after(self, key_id: str, mark: Mark, limit: int) -> Sequence[Change]:
        """The first changes of the key's jobs behind the mark, ``limit`` at most."""
        changed, gone = (_behind(table, key_id, mark).limit(limit) for table in (jobs, deleted_jobs))
        oldest = self._database.oldest_transaction

        def transaction(connection: Connection) -> Sequence[Change]:
            # Both tables to the same place, whatever ends between the two.
            end = _NEVER if oldest is None else connection.execute(select(oldest)).scalar_one()
            rows = [*connection.execute(changed, {"end": end}).mappings()]
            found = [Change(_mark(row), JobId(row["id"]), job_from_row(row)) for row in rows]
            rows = [*connection.execute(gone, {"end": end}).mappings()]
            found += [Change(_mark(row), JobId(row["id"]), None) for row in rows]
            return sorted(found, key=lambda change: change.mark)[:limit]

        return await self._database.read(transaction)

    async def id_of(self, mark: Mark, at: float) -> str:
        """The mark as a text that clients keep; every server of the database reads it. ``at``: now, in seconds since
        the epoch, in whole hours, so that the text is the same for an hour."""
        return f"{await self._tag()}.{int(at // _HOUR_S)}.{mark.place}.{mark.job_id}"

    async def read_id(self, text: str, key_id: str, now: float) -> Mark | None:
        """The mark of a text that ``id_of`` made for this database; None for another text, or one that is too old."""
        tag, _, rest = text.partition(".")
        hour, _, rest = rest.partition(".")
        place, _, job_id = rest.partition(".")
        if tag != await self._tag() or not (_is_number(hour) and _is_number(place)):
            return None
        if (job_id and not is_job_id(job_id)) or int(hour) < now / _HOUR_S - _HOLDS_H:
            return None
        mark = Mark(int(place), job_id)
        return mark if mark <= await self.end(key_id) else None

    async def _tag(self) -> str:
        """What tells the ids of this database from those of others."""
        if not self._store_id:
            self._store_id = (await read_identity(self._database)).store_id
        return self._store_id[:8]


def _behind(table: Table, key_id: str, mark: Mark) -> Select[Any]:
    """The rows of the key behind the mark and before ``end``, in the order of the table's index of places."""
    columns = (table.c.key_id, table.c.place, table.c.id)
    begin = tuple_(*columns) > tuple_(literal(key_id), literal(mark.place), literal(mark.job_id))
    is_before_end = table.c.place < bindparam("end", type_=BigInteger)
    return select(table).where(begin, table.c.key_id <= key_id, is_before_end).order_by(*columns)


def _mark(row: RowMapping) -> Mark:
    return Mark(row["place"], row["id"])


# A text, since SQLAlchemy takes an expression of this size apart with each statement that has it.
_LAST = "coalesce((SELECT max(place) FROM {} WHERE key_id = :of_key), 0) + 1"
_NEW_PLACE = text(f"max(:now_us, {_LAST.format('jobs')}, {_LAST.format('deleted_jobs')})")


def place_of(database: Database) -> ColumnElement[int] | TextClause:
    """The place of what this transaction changes, in a statement that has the key's id as ``of_key`` and the time in
    microseconds as ``now_us``; PostgreSQL needs neither."""
    number = database.transaction_number
    return _NEW_PLACE if number is None else number


def place_values(database: Database, key_id: str, now: float) -> dict[str, object]:
    """The parameters of ``place_of``."""
    return {} if database.has_messages else {"of_key": key_id, "now_us": int(now * 1e6)}


def _last_place(key_id: ColumnElement[str]) -> ColumnElement[int]:
    """The last place of the key, on SQLite."""
    last, gone = jobs.alias("last"), deleted_jobs.alias("gone")
    of_jobs = select(func.max(last.c.place)).where(last.c.key_id == key_id).scalar_subquery()
    of_gone = select(func.max(gone.c.place)).where(gone.c.key_id == key_id).scalar_subquery()
    return func.max(func.coalesce(of_jobs, 0), func.coalesce(of_gone, 0))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < _MAX_DIGITS
