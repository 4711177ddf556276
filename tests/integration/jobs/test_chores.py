"""What one of all servers does, on both kinds of database."""

from __future__ import annotations

import asyncio

from kinema.jobs.chores import Chore, Chores
from kinema.jobs.database import Database


async def test_one_server_has_a_chore_until_it_is_done(url: str) -> None:
    """Of many that ask at once. When it was done nobody does it again too soon; one that failed is tried at once."""
    databases = [await Database.open(url) for _ in range(2)]
    servers = [Chores(databases[number % 2], f"server-{number}") for number in range(6)]

    async def begin(of: list[Chores], every_s: float = 60.0) -> list[bool]:
        return await asyncio.gather(*(one.begin(Chore.LISTING, every_s=every_s, lease_s=60) for one in of))

    assert await servers[0].found(Chore.LISTING) is None
    begun = await begin(servers)
    assert sum(begun) == 1
    has_it = servers[begun.index(True)]
    others = [one for one in servers if one is not has_it]
    await others[0].end(Chore.LISTING, {"files": 1})  # it was not its own
    assert not any(await begin(others))
    await has_it.end(Chore.LISTING)
    assert await others[0].found(Chore.LISTING) is None
    begun = await begin(others)
    assert sum(begun) == 1
    await others[begun.index(True)].end(Chore.LISTING, {"files": 7})
    assert [await one.found(Chore.LISTING) for one in servers] == [{"files": 7}] * 6
    assert not any(await begin(servers))
    assert sum(await begin(servers, every_s=0.0)) == 1
    for database in databases:
        await database.close()


async def test_the_chore_of_a_server_that_died_is_free_after_its_lease(url: str) -> None:
    """And one that asks again has its own."""
    database = await Database.open(url)
    dead, other = Chores(database, "dead"), Chores(database, "other")
    assert await dead.begin(Chore.LISTING, every_s=60, lease_s=-1)
    assert await other.begin(Chore.LISTING, every_s=60, lease_s=60)
    assert await other.begin(Chore.LISTING, every_s=60, lease_s=60)
    assert not await dead.begin(Chore.LISTING, every_s=60, lease_s=60)
    await database.close()
