"""Indexes that keep queries flat, the models that there were ever jobs of, and how many jobs have arrived."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

_OLD = {
    "jobs_by_status": "jobs",
    "jobs_in_line": "jobs",
    "jobs_by_key": "jobs",
    "jobs_by_fingerprint": "jobs",
    "webhook_deliveries_due": "webhook_deliveries",
}
_WHOLE = {
    "jobs_by_key": ("jobs", ["key_id", "id"]),
    "jobs_by_model": ("jobs", ["model", "created_at"]),
    "jobs_ended": ("jobs", ["finished_at"]),
    "jobs_by_fingerprint": ("jobs", ["key_id", "fingerprint", "id"]),
    "webhook_deliveries_due": ("webhook_deliveries", ["next_at", "id"]),
    "webhook_deliveries_by_endpoint": ("webhook_deliveries", ["endpoint_id"]),
    "webhook_endpoints_by_key": ("webhook_endpoints", ["key_id", "id"]),
}
_HAS_NOT_ENDED = "status IN ('queued', 'in_progress')"
_PARTIAL = {
    "jobs_made": (["status", "model", "created_at"], "finished_at IS NOT NULL"),
    "jobs_queued": (["status", "model", "rank", "key_id", "created_at", "id", "work"], _HAS_NOT_ENDED),
    "jobs_with_loras": (["status", "model", "loras"], f"{_HAS_NOT_ENDED} AND loras != ''"),
    "jobs_begun": (["status", "model", "key_id", "owner", "lease_until"], "status = 'in_progress'"),
    "jobs_active": (["rank", "created_at", "id"], _HAS_NOT_ENDED),
}


def upgrade() -> None:
    for name, table in _OLD.items():
        op.drop_index(name, table, if_exists=True)
    for name, (table, columns) in _WHOLE.items():
        op.create_index(name, table, columns, if_not_exists=True)
    for name, (columns, where) in _PARTIAL.items():
        is_meant = sa.text(where)
        op.create_index(name, "jobs", columns, sqlite_where=is_meant, postgresql_where=is_meant, if_not_exists=True)
    is_first = sa.text("seq = 1")
    op.create_index(
        "events_whole", "events", ["seq", "at"], sqlite_where=is_first, postgresql_where=is_first, if_not_exists=True
    )
    op.create_table(
        "arrivals",
        sa.Column("model", sa.String(255), primary_key=True),
        sa.Column("num_jobs", sa.BigInteger, nullable=False),
        sa.Column("work", sa.Float, nullable=False),
    )
    op.execute(
        "INSERT INTO key_turns SELECT DISTINCT model, key_id, 0 FROM jobs WHERE NOT EXISTS ("
        "SELECT 1 FROM key_turns WHERE key_turns.model = jobs.model AND key_turns.key_id = jobs.key_id)"
    )
