"""The work of a step and of the decode, so that a job's turns can be predicted."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    # They are not known for older jobs.
    op.add_column("jobs", sa.Column("step_work", sa.Float, nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("decoding_work", sa.Float, nullable=False, server_default="0"))
