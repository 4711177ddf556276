"""What a job database is: its id, which its storage knows too, and the secret that signs links to its videos.

Both are made once, and shared by every server on the database. A copy of the database has the same.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from sqlalchemy import insert, select
from sqlalchemy.engine import Connection

from kinema.jobs.database import AdvisoryLock, Database, take_lock
from kinema.jobs.schema import identity


@dataclass(frozen=True, slots=True)
class Identity:
    """The id, 32 hexadecimal digits, and the secret, 32 bytes."""

    store_id: str
    link_secret: bytes = field(repr=False)


async def read_identity(database: Database) -> Identity:
    """Return the identity of the database, and make it first where there is none. Raises StoreUnavailable."""

    def transaction(connection: Connection) -> Identity:
        take_lock(connection, AdvisoryLock.MIGRATE)
        row = connection.execute(select(identity)).first()
        if row is not None:
            return Identity(row.store_id, bytes.fromhex(row.link_secret))
        new = Identity(secrets.token_hex(16), secrets.token_bytes(32))
        connection.execute(insert(identity), {"store_id": new.store_id, "link_secret": new.link_secret.hex()})
        return new

    return await database.write(transaction)
