"""The places of jobs and deleted jobs among the changes of their keys: jobs/changes.py."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    for table, new in (("jobs", ("place",)), ("deleted_jobs", ("key_id", "place"))):
        known = {column["name"] for column in sa.inspect(op.get_bind()).get_columns(table)}
        for name in new:
            if name not in known:
                op.add_column(table, sa.Column(name, sa.String(64) if name == "key_id" else sa.BigInteger))
        op.create_index(f"{table}_by_place", table, ["key_id", "place"], if_not_exists=True)
