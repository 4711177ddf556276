"""Gives what a key without a name has made to the name that the key has got.

A server does so at its start, before it answers. Most starts find nothing to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import structlog
from sqlalchemy import Table, and_, case, delete, exists, insert, literal, null, select, update
from sqlalchemy.engine import Connection

from kinema.jobs.database import Database
from kinema.jobs.schema import deleted_jobs, inputs, jobs, key_turns, stored_bytes, usage, webhook_endpoints

log = structlog.get_logger(__name__)

# Jobs to a transaction.
_BATCH = 500
# Their rows with a key's id have nothing that could be there for the name already.
_CHANGED = (deleted_jobs, inputs, webhook_endpoints)
_ALL = (jobs, *_CHANGED, key_turns, stored_bytes, usage)


async def name_keys(database: Database, names: Mapping[str, str]) -> None:
    """Give everything with one of these ids to the id that stands beside it. Raises StoreUnavailable."""
    for old, new in names.items():
        if not await database.read(partial(_has, key_id=old)):
            continue
        count = 0
        while changed := await database.write(partial(_rename_jobs, old=old, new=new)):
            count += changed
        await database.write(partial(_rename_rest, old=old, new=new))
        log.info("the videos of a key belong to its name now", name=new, count=count)


def _has(connection: Connection, key_id: str) -> bool:
    return any(connection.execute(select(exists().where(table.c.key_id == key_id))).scalar() for table in _ALL)


def _rename_jobs(connection: Connection, old: str, new: str) -> int:
    """Rename some jobs, and return how many."""
    same = jobs.alias("same")
    some = select(jobs.c.id).where(jobs.c.key_id == old).limit(_BATCH).with_for_update().scalar_subquery()
    # The name may have sent the same idempotency key; then the older job gives it up.
    is_taken = exists().where(same.c.key_id == new, same.c.idempotency_key == jobs.c.idempotency_key)
    kept = case((is_taken, null()), else_=jobs.c.idempotency_key)
    change = update(jobs).where(jobs.c.id.in_(some)).values(key_id=new, idempotency_key=kept)
    return connection.execute(change).rowcount


def _rename_rest(connection: Connection, old: str, new: str) -> None:
    for table in _CHANGED:
        connection.execute(update(table).where(table.c.key_id == old).values(key_id=new))
    known = key_turns.alias("known")
    is_known = exists().where(known.c.model == key_turns.c.model, known.c.key_id == new)
    connection.execute(update(key_turns).where(key_turns.c.key_id == old, ~is_known).values(key_id=new))
    connection.execute(delete(key_turns).where(key_turns.c.key_id == old))
    _add_up(connection, stored_bytes, old, new, "size_bytes")
    _add_up(connection, usage, old, new, "num_videos", "device_s", "size_bytes", by="day")


def _add_up(connection: Connection, table: Table, old: str, new: str, *counted: str, by: str | None = None) -> None:
    """Add the rows of the old id to those of the new one."""
    for row in connection.execute(select(table).where(table.c.key_id == old).with_for_update()).mappings().all():
        same = table.c[by] == row[by] if by else literal(1) == 1
        more = {name: table.c[name] + row[name] for name in counted}
        if not connection.execute(update(table).where(and_(table.c.key_id == new, same)).values(more)).rowcount:
            connection.execute(insert(table).values({**row, "key_id": new}))
    connection.execute(delete(table).where(table.c.key_id == old))
