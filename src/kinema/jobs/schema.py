"""The two tables, and the way between a row and a Job.

What is searched or claimed by has a column of its own; values that only travel are JSON. Times are seconds since the
epoch. Nothing here is particular to one database.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    RowMapping,
    String,
    Table,
    Text,
)

from kinema.events import Event, event_adapter
from kinema.job import Job

metadata = MetaData()

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("model", String(255), nullable=False),
    Column("request", JSON, nullable=False),
    Column("warnings", JSON, nullable=False),
    Column("user", Text),
    Column("status", String(16), nullable=False),
    Column("progress", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("losses", Integer, nullable=False),
    Column("is_cancel_requested", Boolean, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("started_at", Float),
    Column("finished_at", Float),
    Column("artifact", JSON(none_as_null=True)),
    Column("timings", JSON(none_as_null=True)),
    Column("error", JSON(none_as_null=True)),
    # The rest is the store's own. The owner is a dispatcher; a job in progress without a lease waits to be claimed.
    Column("owner", String(64)),
    Column("lease_until", Float),
    Column("last_seq", Integer, nullable=False),
    Index("jobs_by_status", "status", "created_at"),
)

events = Table(
    "events",
    metadata,
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("at", Float, nullable=False),
    Column("type", String(32), nullable=False),
    Column("data", JSON, nullable=False),
)

# What a job keeps from its creation on; a request may be large, and is not written again with every event.
FIXED_COLUMNS = frozenset({"id", "model", "request", "warnings", "user", "created_at"})


def job_to_row(job: Job) -> dict[str, Any]:
    """Columns of the job; the store's own ones are not among them."""
    return {**job.model_dump(mode="json"), "model": job.request.model}


def job_from_row(row: RowMapping) -> Job:
    return Job.model_validate({name: row[name] for name in Job.model_fields})


def event_to_row(event: Event) -> dict[str, Any]:
    data = event.model_dump(mode="json")
    return {"type": data.pop("type"), "data": data}


def event_from_row(row: RowMapping) -> Event:
    data: Mapping[str, Any] = row["data"]
    return event_adapter.validate_python({**data, "type": row["type"]})
