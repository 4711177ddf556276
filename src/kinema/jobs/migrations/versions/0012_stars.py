"""Starred jobs, which do not expire."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    if "starred_at" not in {column["name"] for column in sa.inspect(op.get_bind()).get_columns("jobs")}:
        op.add_column("jobs", sa.Column("starred_at", sa.Float))
    op.drop_index("jobs_ended", "jobs", if_exists=True)
    expires, is_kept = sa.text("starred_at IS NULL"), sa.text("starred_at IS NOT NULL")
    op.create_index("jobs_ended", "jobs", ["finished_at"], sqlite_where=expires, postgresql_where=expires)
    op.create_index(
        "jobs_starred", "jobs", ["key_id", "id"], sqlite_where=is_kept, postgresql_where=is_kept, if_not_exists=True
    )
