"""What each key has made, by day. It is counted with the end of a video, and stays when the video is deleted."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta

from sqlalchemy import insert, select, update
from sqlalchemy.engine import Connection

from kinema.job import Job
from kinema.jobs.database import Database
from kinema.jobs.schema import usage
from kinema.jobs.store import DayUsage

_EPOCH = date(1970, 1, 1)


def count_video(connection: Connection, job: Job, now: float) -> None:
    """Count a job that was completed, within the caller's transaction, which keeps others of its key out."""
    made = {
        "num_videos": 1,
        "device_s": 0.0 if job.timings is None else job.timings.device_s,
        "size_bytes": sum(artifact.size_bytes for artifact in job.artifacts),
    }
    day = _number(datetime.fromtimestamp(now, UTC).date())
    is_it = usage.c.key_id == job.key_id, usage.c.day == day
    more = {name: usage.c[name] + number for name, number in made.items()}
    if not connection.execute(update(usage).where(*is_it).values(more)).rowcount:
        connection.execute(insert(usage).values(key_id=job.key_id, day=day, **made))


async def read_usage(database: Database, key_id: str | None, first: date, last: date) -> Sequence[DayUsage]:
    """What a key has made on each of these days on which it made something; None: each key. By day, then by key.

    Raises StoreUnavailable.
    """
    query = select(usage).where(usage.c.day.between(_number(first), _number(last)))
    if key_id is not None:
        query = query.where(usage.c.key_id == key_id)
    query = query.order_by(usage.c.day, usage.c.key_id)
    rows = await database.read(lambda connection: connection.execute(query).all())
    return [
        DayUsage(row.key_id, _EPOCH + timedelta(days=row.day), row.num_videos, row.device_s, row.size_bytes)
        for row in rows
    ]


def _number(day: date) -> int:
    return (day - _EPOCH).days
