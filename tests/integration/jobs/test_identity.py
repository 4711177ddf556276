"""What a database is known by, on both kinds of database."""

from __future__ import annotations

import asyncio

from kinema.jobs.identity import read_identity
from kinema.jobs.sql import SqlJobStore


async def test_all_servers_of_a_database_have_its_identity(url: str) -> None:
    """Those that make it at once, and those that come later; nothing prints the secret."""
    stores = await asyncio.gather(*(SqlJobStore.open(url) for _ in range(4)))
    found = await asyncio.gather(*(read_identity(store.database) for store in stores))
    await asyncio.gather(*(store.close() for store in stores))
    later = await SqlJobStore.open(url)
    identity = await read_identity(later.database)
    await later.close()
    assert found == [identity] * 4
    assert (len(identity.store_id), len(identity.link_secret)) == (32, 32)
    assert repr(identity.link_secret) not in repr(identity)


async def test_two_databases_are_two(url: str) -> None:
    """By their ids, and by their secrets."""
    stores = await asyncio.gather(SqlJobStore.open(url), SqlJobStore.open("sqlite://"))
    one, other = [await read_identity(store.database) for store in stores]
    await asyncio.gather(*(store.close() for store in stores))
    assert one.store_id != other.store_id
    assert one.link_secret != other.link_secret
