"""The database's own id and secret, and the ids of deleted jobs, so that files of unknown jobs are told from theirs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "identity",
        sa.Column("store_id", sa.String(32), primary_key=True),
        sa.Column("link_secret", sa.String(64), nullable=False),
    )
    op.create_table(
        "deleted_jobs",
        sa.Column("id", sa.String(64).with_variant(sa.String(64, collation="C"), "postgresql"), primary_key=True),
        sa.Column("at", sa.Float, nullable=False),
    )
    op.create_index("deleted_jobs_by_time", "deleted_jobs", ["at"])
