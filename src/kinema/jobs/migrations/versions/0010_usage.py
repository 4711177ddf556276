"""What each key has made on each day: jobs/usage.py. It begins with this step."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.create_table(
        "usage",
        sa.Column("key_id", sa.String(64), primary_key=True),
        sa.Column("day", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("num_videos", sa.BigInteger, nullable=False),
        sa.Column("device_s", sa.Float, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        if_not_exists=True,
    )
