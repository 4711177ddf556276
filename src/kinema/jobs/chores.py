"""What one of all servers on a database does, and not each of them. The row of a chore says whose it is, by a lease.

A server that is killed keeps a chore until its lease ends. A chore that takes longer than that may be done twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from sqlalchemy import insert, select, update
from sqlalchemy.engine import Connection

from kinema.jobs.database import AdvisoryLock, Database, take_lock
from kinema.jobs.schema import chores


class Chore(StrEnum):
    """The chores that there are."""

    LISTING = "listing"  # of all stored files


class Chores:
    """The chores of one database, for one server, the ``owner``. Every method may raise StoreUnavailable."""

    def __init__(self, database: Database, owner: str) -> None:
        self._database = database
        self._owner = owner

    async def begin(self, chore: Chore, *, every_s: float, lease_s: float) -> bool:
        """Take the chore for ``lease_s`` seconds. False when another server has it, or it was done in the last
        ``every_s`` seconds."""
        is_it = chores.c.name == chore.value
        now = self._database.now
        is_taken = (chores.c.owned_until > now) & (chores.c.owner != self._owner)
        is_free = select(~(is_taken.is_(True) | (chores.c.ended_at > now - every_s).is_(True))).where(is_it)
        mine = {"owner": self._owner, "owned_until": now + lease_s}

        def transaction(connection: Connection) -> bool:
            take_lock(connection, AdvisoryLock.CHORE, chore.value)
            found = connection.execute(is_free).scalar()
            if found is None:
                connection.execute(insert(chores).values(name=chore.value, **mine))
            elif found:
                connection.execute(update(chores).where(is_it).values(**mine))
            return found is None or bool(found)

        # Read first: most calls find it done, and must not take the write lock.
        if await self._database.read(lambda connection: connection.execute(is_free).scalar()) in (None, True):
            return await self._database.write(transaction)
        return False

    async def end(self, chore: Chore, found: Mapping[str, Any] | None = None) -> None:
        """Give the chore back: done, with what was found; or not done, and the next server may begin at once."""
        done: dict[str, Any] = {"owner": None, "owned_until": None}
        if found is not None:
            done |= {"ended_at": self._database.now, "found": dict(found)}
        change = update(chores).where(chores.c.name == chore.value, chores.c.owner == self._owner).values(**done)
        await self._database.write(lambda connection: connection.execute(change))

    async def found(self, chore: Chore) -> Mapping[str, Any] | None:
        """What was found when the chore was done last."""
        query = select(chores.c.found).where(chores.c.name == chore.value)
        return await self._database.read(lambda connection: connection.execute(query).scalar())
