"""Fills a job database with as many jobs as a service has after years: copies of a real one, made by SQL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Float,
    Select,
    String,
    Table,
    case,
    cast,
    func,
    insert,
    literal,
    null,
    select,
)
from sqlalchemy.sql.selectable import CTE

from kinema.ids import JobId
from kinema.jobs.database import Database
from kinema.jobs.schema import events, jobs

# Rows of a transaction: PostgreSQL ends one that takes longer than eight seconds.
_BATCH = 10_000


async def fill(
    database: Database, like: JobId, *, first: int, count: int, key_ids: list[str], newest_at: float
) -> None:
    """Add ``count`` copies of this job with its last event. They are numbered from ``first``, a second lies between
    two, and the last is of ``newest_at``, in seconds since the epoch. The keys have equal parts."""
    for start in range(first, first + count, _BATCH):
        numbers = _numbers(start, min(start + _BATCH, first + count))

        def transaction(connection: Connection, numbers: CTE = numbers) -> None:
            _copy(connection, like, numbers, key_ids, newest_at - first - count)

        await database.write(transaction)


def _numbers(start: int, end: int) -> CTE:
    numbers = select(literal(start).label("n")).cte("numbers", recursive=True)
    return numbers.union_all(select(numbers.c.n + 1).where(numbers.c.n < end - 1))


def _copy(connection: Connection, like: JobId, numbers: CTE, key_ids: list[str], from_s: float) -> None:
    n = numbers.c.n
    at = n + literal(from_s, Float)
    millis = cast(at * 1000, BigInteger)
    key_id = case(*((n % len(key_ids) == number, name) for number, name in enumerate(key_ids)))
    is_postgres = connection.dialect.name == "postgresql"
    job_id = literal("video_").concat(_hex(millis, 12, is_postgres)).concat(_hex(n, 20, is_postgres))
    changed = {
        "id": job_id,
        "key_id": key_id,
        "created_at": at,
        "started_at": jobs.c.started_at - jobs.c.created_at + at,
        "finished_at": jobs.c.finished_at - jobs.c.created_at + at,
        "place": jobs.c.place - n,
        "fingerprint": _hex(n, 64, is_postgres),
        "idempotency_key": null(),
    }
    _insert(connection, jobs, changed, select().select_from(jobs.join(numbers, jobs.c.id == like)))
    of_job = select().select_from(events.join(numbers, events.c.job_id == like).join(jobs, jobs.c.id == like))
    _insert(connection, events, {"job_id": job_id}, of_job.where(events.c.seq == jobs.c.last_seq))


def _hex(number: ColumnElement[int], digits: int, is_postgres: bool) -> ColumnElement[str]:
    if is_postgres:
        return func.lpad(func.to_hex(number), digits, "0", type_=String)
    return func.printf(f"%0{digits}x", number, type_=String)


def _insert(connection: Connection, table: Table, changed: Mapping[str, Any], source: Select[Any]) -> None:
    columns = [changed.get(column.name, column) for column in table.c]
    connection.execute(insert(table).from_select(list(table.c), source.with_only_columns(*columns)))
