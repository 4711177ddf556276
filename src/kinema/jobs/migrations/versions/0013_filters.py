"""An index for the list of a key's jobs that ended without a video."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    is_meant = sa.text("status IN ('failed', 'cancelled')")
    columns = ["key_id", "status", "id"]
    op.create_index(
        "jobs_without_video", "jobs", columns, sqlite_where=is_meant, postgresql_where=is_meant, if_not_exists=True
    )
