"""The inputs of jobs, each once for a key, and how many bytes each key has stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

_FILES = ("artifact", "thumbnail", "spritesheet")


def upgrade() -> None:
    op.create_table(
        "inputs",
        sa.Column("name", sa.String(128), primary_key=True),
        sa.Column("key_id", sa.String(64), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("is_stored", sa.Boolean, nullable=False),
        sa.Column("dropped_at", sa.Float),
    )
    op.create_index("inputs_by_digest", "inputs", ["key_id", "digest"])
    op.create_index("inputs_dropped", "inputs", ["dropped_at"])
    op.create_table(
        "input_uses",
        sa.Column("job_id", sa.String(64), primary_key=True),
        sa.Column("name", sa.String(128), sa.ForeignKey("inputs.name"), primary_key=True),
        sa.Column("held_at", sa.Float),
    )
    op.create_index("input_uses_by_name", "input_uses", ["name"])
    op.create_index("input_uses_held", "input_uses", ["held_at"])
    stored = op.create_table(
        "stored_bytes",
        sa.Column("key_id", sa.String(64), primary_key=True),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
    )
    # The inputs of older jobs are not counted: their sizes are not known, and they go with their jobs.
    if rows := [{"key_id": key_id, "size_bytes": size} for key_id, size in _made_bytes().items()]:
        op.bulk_insert(stored, rows)


def _made_bytes() -> Counter[str]:
    """The bytes of the files that the jobs of each key have made."""
    jobs = sa.table("jobs", sa.column("key_id"), *(sa.column(name, sa.JSON) for name in _FILES))
    made: Counter[str] = Counter()
    query = sa.select(jobs).where(sa.cast(jobs.c.artifact, sa.Text).is_not(None))
    for key_id, *files in op.get_bind().execute(query):
        made[key_id] += sum(map(_size_bytes, files))
    return made


def _size_bytes(file: Mapping[str, Any] | None) -> int:
    """The size of a file, and of the manifest beside it."""
    return 0 if file is None else file["size_bytes"] + _size_bytes(file.get("manifest"))
