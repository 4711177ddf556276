"""What one of all servers does: jobs/chores.py."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.create_table(
        "chores",
        sa.Column("name", sa.String(32), primary_key=True),
        sa.Column("owner", sa.String(64)),
        sa.Column("owned_until", sa.Float),
        sa.Column("ended_at", sa.Float),
        sa.Column("found", sa.JSON),
        if_not_exists=True,
    )
