"""The suite of the changes again, on PostgreSQL, and what holds there alone."""

import asyncio

from sqlalchemy import update
from sqlalchemy.engine import Connection

from kinema.events import Cancelled
from kinema.jobs.changes import place_of
from kinema.jobs.database import Writer
from kinema.jobs.schema import jobs
from kinema.jobs.sql import SqlJobStore
from kinema.jobs.store import QueueLimits
from tests.serving import make_job
from tests.unit.jobs.test_changes import *  # noqa: F403 - every test, with the `store_url` of this folder


async def test_what_commits_late_is_behind_no_mark(store_url: str) -> None:
    """A change is not shown while one before it may still come; then both are, each once."""
    stores = [await SqlJobStore.open(store_url) for _ in range(2)]
    begin = await stores[0].changes.end("")
    early, late = [await stores[0].create(make_job(), limits=QueueLimits()) for _ in range(2)]
    loop = asyncio.get_running_loop()
    has_written, may_commit = asyncio.Event(), asyncio.Event()

    def slow(connection: Connection) -> None:
        connection.execute(update(jobs).where(jobs.c.id == early.id).values(place=place_of(stores[1].database)))
        loop.call_soon_threadsafe(has_written.set)
        asyncio.run_coroutine_threadsafe(may_commit.wait(), loop).result(20)

    writing = asyncio.create_task(stores[1].database.write(slow, Writer.JOBS))
    async with asyncio.timeout(20):
        await has_written.wait()
        mark = (await stores[0].changes.after("", begin, 100))[-1].mark
        await stores[0].record(late.id, Cancelled())
        assert await stores[0].changes.after("", mark, 100) == []
        may_commit.set()
        await writing
    told = await stores[0].changes.after("", mark, 100)
    assert [one.job_id for one in told] == [early.id, late.id]
    await asyncio.gather(*(store.close() for store in stores))
