"""The LoRAs that a job needs, so that it is claimed for a worker that has them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    # Older jobs with LoRAs go to any worker of their model, as they did.
    op.add_column("jobs", sa.Column("loras", sa.Text, nullable=False, server_default=sa.text("''")))
