"""The priority of a job, so that the queue can be in its order."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    # Jobs that waited before there were priorities are normal.
    op.add_column("jobs", sa.Column("rank", sa.Integer, nullable=False, server_default="1"))
