"""The turns of the keys, and an index for claims that are fair among keys."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "key_turns",
        sa.Column("model", sa.String(255), primary_key=True),
        sa.Column("key_id", sa.String(64), primary_key=True),
        sa.Column("turn", sa.BigInteger, nullable=False),
    )
    # Keys whose jobs wait already have not had a turn.
    op.execute("INSERT INTO key_turns SELECT DISTINCT model, key_id, 0 FROM jobs WHERE status = 'queued'")
    op.create_index("jobs_in_line", "jobs", ["status", "model", "rank", "key_id", "created_at", "id"])
