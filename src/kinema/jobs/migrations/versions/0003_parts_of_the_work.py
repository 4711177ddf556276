"""A step and the decode, as parts of a job's work, so that its turns can be foretold."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    # Of what was stored before they are not known.
    op.add_column("jobs", sa.Column("step_work", sa.Float, nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("decoding_work", sa.Float, nullable=False, server_default="0"))
