"""The tables, and the conversion between a row and a Job.

A value that is searched or claimed by has a column of its own; other values are JSON. Times are seconds since the
epoch. A change here is a new step in ``migrations/versions``; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
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
    UniqueConstraint,
    text,
)

from kinema.events import Event, event_adapter
from kinema.ids import JobId
from kinema.job import Job
from kinema.jobs.store import PRIORITIES

metadata = MetaData()

# Ids are sorted by their bytes, whatever the language of the database: Danish sorts "aa" after "z".
_ORDERED_ID = String(64).with_variant(String(64, collation="C"), "postgresql")

_HAS_NOT_ENDED = "status IN ('queued', 'in_progress')"
_IN_LINE = ("status", "model", "rank", "key_id", "created_at", "id")


def _index_where(name: str, *columns: str, where: str) -> Index:
    """An index of some rows. It is used where a statement has the condition in these words: ``conditions.py``.

    The status is its first column, so that it answers more of a statement's condition than other indexes: SQLite takes
    such a one for the better. Where the rows are many the condition is a wider one: PostgreSQL passes over a column for
    which the index's condition speaks already, and would go through the whole index.
    """
    return Index(name, *columns, sqlite_where=text(where), postgresql_where=text(where))


jobs = Table(
    "jobs",
    metadata,
    Column("id", _ORDERED_ID, primary_key=True),
    Column("key_id", String(64), nullable=False),
    Column("model", String(255), nullable=False),
    Column("request", JSON, nullable=False),
    Column("work", Float, nullable=False),
    Column("step_work", Float, nullable=False, server_default="0"),
    Column("decoding_work", Float, nullable=False, server_default="0"),
    # The digests of the request's LoRAs, sorted, with a space in between.
    Column("loras", Text, nullable=False, server_default=text("''")),
    # The place of the job's priority in the queue: 0 is first.
    Column("rank", Integer, nullable=False, server_default="1"),
    Column("warnings", JSON, nullable=False),
    Column("user", Text),
    Column("remixed_from", String(64)),
    Column("status", String(16), nullable=False),
    Column("progress", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("losses", Integer, nullable=False),
    Column("takeovers", Integer, nullable=False, server_default="0"),
    Column("is_cancel_requested", Boolean, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("started_at", Float),
    Column("finished_at", Float),
    Column("starred_at", Float),
    Column("artifact", JSON(none_as_null=True)),
    Column("thumbnail", JSON(none_as_null=True)),
    Column("spritesheet", JSON(none_as_null=True)),
    Column("timings", JSON(none_as_null=True)),
    Column("error", JSON(none_as_null=True)),
    # The rest is the store's own. The owner is a dispatcher; a job in progress without one waits to be claimed, at
    # ``lease_until`` at the earliest.
    Column("owner", String(64)),
    Column("lease_until", Float),
    Column("last_seq", Integer, nullable=False),
    # Where the last change of the job stands among those of its key: jobs/changes.py. Null before that was kept.
    Column("place", BigInteger),
    # These tell a repeated submission from a new one: the client's own key, and a digest of the body.
    Column("idempotency_key", String(255)),
    Column("fingerprint", String(64)),
    # Lists.
    Index("jobs_by_key", "key_id", "id"),
    _index_where("jobs_without_video", "key_id", "status", "id", where="status IN ('failed', 'cancelled')"),
    Index("jobs_by_place", "key_id", "place"),
    # The latest jobs of a model, and its latest videos.
    Index("jobs_by_model", "model", "created_at"),
    _index_where("jobs_made", "status", "model", "created_at", where="finished_at IS NOT NULL"),
    # What has expired, and what does not.
    _index_where("jobs_ended", "finished_at", where="starred_at IS NULL"),
    _index_where("jobs_starred", "key_id", "id", where="starred_at IS NOT NULL"),
    # The same body again.
    Index("jobs_by_fingerprint", "key_id", "fingerprint", "id"),
    UniqueConstraint("key_id", "idempotency_key", name="jobs_idempotency"),
    # These have jobs that have not ended alone, so they stay small. The first waiting job of each key, and the work
    # that waits, are found in the first without reading the rows.
    _index_where("jobs_queued", *_IN_LINE, "work", where=_HAS_NOT_ENDED),
    _index_where("jobs_with_loras", "status", "model", "loras", where=f"{_HAS_NOT_ENDED} AND loras != ''"),
    _index_where("jobs_begun", "status", "model", "key_id", "owner", "lease_until", where="status = 'in_progress'"),
    _index_where("jobs_active", "rank", "created_at", "id", where=_HAS_NOT_ENDED),
)

# When the jobs of a key were claimed last: the higher its turn, the later. It outlives the jobs, or a key that deletes
# them would be the first again. So it also has the models that there were ever jobs of.
key_turns = Table(
    "key_turns",
    metadata,
    Column("model", String(255), primary_key=True),
    Column("key_id", String(64), primary_key=True),
    Column("turn", BigInteger, nullable=False),
)

# How many jobs of a model were ever created, and their work. It only grows, so who has counted the queue knows how much
# longer it can be by now: jobs/admission.py.
arrivals = Table(
    "arrivals",
    metadata,
    Column("model", String(255), primary_key=True),
    Column("num_jobs", BigInteger, nullable=False),
    Column("work", Float, nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("at", Float, nullable=False),
    Column("type", String(32), nullable=False),
    Column("data", JSON, nullable=False),
    # The jobs that have all their events; of those that ended long ago only a part is kept.
    Index("events_whole", "seq", "at", sqlite_where=text("seq = 1"), postgresql_where=text("seq = 1")),
)

# What one of all servers does: who does it now, when it was done last, and what was found then.
chores = Table(
    "chores",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("owner", String(64)),
    Column("owned_until", Float),
    Column("ended_at", Float),
    Column("found", JSON(none_as_null=True)),
)

# What tells this database from others, in one row: jobs/identity.py.
identity = Table(
    "identity",
    metadata,
    Column("store_id", String(32), primary_key=True),
    Column("link_secret", String(64), nullable=False),
)

# The jobs whose rows were deleted, until their files are gone. Files of a job that is in neither table are not ours to
# remove.
deleted_jobs = Table(
    "deleted_jobs",
    metadata,
    Column("id", _ORDERED_ID, primary_key=True),
    Column("at", Float, nullable=False),
    # The deletion is a change of its key, too.
    Column("key_id", String(64)),
    Column("place", BigInteger),
    Index("deleted_jobs_by_time", "at"),
    Index("deleted_jobs_by_place", "key_id", "place"),
)

# The inputs of jobs, each once for a key; ``name`` is that of its file.
inputs = Table(
    "inputs",
    metadata,
    Column("name", String(128), primary_key=True),
    Column("key_id", String(64), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("is_stored", Boolean, nullable=False),
    # Since then nobody uses it, and nobody begins to: the file and then the row are to be deleted.
    Column("dropped_at", Float),
    Index("inputs_by_digest", "key_id", "digest"),
    Index("inputs_dropped", "dropped_at"),
)

# Which jobs use an input. A submission holds it from ``held_at`` until its job exists.
input_uses = Table(
    "input_uses",
    metadata,
    Column("job_id", String(64), primary_key=True),
    Column("name", ForeignKey("inputs.name"), primary_key=True),
    Column("held_at", Float),
    Index("input_uses_by_name", "name"),
    Index("input_uses_held", "held_at"),
)

# The size of what a key has stored: its inputs, and the files of its finished jobs.
stored_bytes = Table(
    "stored_bytes",
    metadata,
    Column("key_id", String(64), primary_key=True),
    Column("size_bytes", BigInteger, nullable=False),
)

# What each key has made on each day, in days since the epoch (UTC). It outlives the jobs.
usage = Table(
    "usage",
    metadata,
    Column("key_id", String(64), primary_key=True),
    Column("day", Integer, primary_key=True, autoincrement=False),
    Column("num_videos", BigInteger, nullable=False),
    Column("device_s", Float, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
)

# Where clients get messages about ended jobs. The endpoint of the settings is for all keys: its key_id is null.
webhook_endpoints = Table(
    "webhook_endpoints",
    metadata,
    Column("id", _ORDERED_ID, primary_key=True),
    Column("key_id", String(64)),
    Column("name", String(255), nullable=False),
    Column("url", Text, nullable=False),
    Column("secret", String(255), nullable=False),
    # The secret before a rotation, while messages are signed with both.
    Column("old_secret", String(255)),
    Column("old_secret_until", Float),
    Column("event_types", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("updated_at", Float, nullable=False),
    Index("webhook_endpoints_by_key", "key_id", "id"),
)

# One message to one endpoint, written together with its event, and deleted when it was delivered or given up.
webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("endpoint_id", ForeignKey("webhook_endpoints.id", ondelete="CASCADE"), nullable=False),
    Column("payload", Text, nullable=False),  # the exact bytes that are signed and sent
    Column("attempts", Integer, nullable=False),
    Column("next_at", Float, nullable=False),
    Column("created_at", Float, nullable=False),
    Index("webhook_deliveries_due", "next_at", "id"),
    Index("webhook_deliveries_by_endpoint", "endpoint_id"),
)

# Columns that no event of a job changes. A request may be large, so it is not written with every event.
FIXED_COLUMNS = frozenset(
    {"id", "key_id", "model", "request", "work", "step_work", "decoding_work", "rank", "user", "remixed_from"}
    | {"created_at", "loras", "starred_at"}
)


def job_to_row(job: Job) -> dict[str, Any]:
    """The columns of the job, without those that only the store uses."""
    request = job.request
    rank = PRIORITIES.index(request.priority)
    work = {"work": request.work, "step_work": request.step_work, "decoding_work": request.decoding_work}
    loras = " ".join(sorted(use.digest for use in request.loras))
    return {**job.model_dump(mode="json"), "model": request.model, "rank": rank, "loras": loras, **work}


def job_from_row(row: RowMapping) -> Job:
    return Job.model_validate({name: row[name] for name in Job.model_fields})


def event_to_row(event: Event) -> dict[str, Any]:
    data = event.model_dump(mode="json")
    return {"type": data.pop("type"), "data": data}


def event_row(job_id: JobId, seq: int, at: float, event: Event) -> dict[str, Any]:
    """The whole row of an event."""
    return {"job_id": job_id, "seq": seq, "at": at, **event_to_row(event)}


def event_from_row(row: RowMapping) -> Event:
    data: Mapping[str, Any] = row["data"]
    return event_adapter.validate_python({**data, "type": row["type"]})
