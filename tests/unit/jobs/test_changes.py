"""The changes of a key's jobs, in one order for all servers on a database."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from kinema.events import Cancelled, Progress, Started
from kinema.job import JobStatus
from kinema.jobs.changes import Mark
from kinema.jobs.retention import SqlRetention
from kinema.jobs.sql import SqlJobStore
from kinema.jobs.store import QueueLimits
from tests.serving import make_job

_STARTED = Started(worker_id="w", attempt=1)


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[SqlJobStore]:
    store = await SqlJobStore.open(store_url)
    yield store
    await store.close()


async def _told(store: SqlJobStore, mark: Mark, key_id: str = "") -> list[tuple[str, JobStatus | None, int | None]]:
    found = await store.changes.after(key_id, mark, 100)
    assert [one.mark for one in found] == sorted(one.mark for one in found)
    return [(one.job_id, one.job and one.job.status, one.job and one.job.progress) for one in found]


async def test_a_job_that_changes_is_told_of_once_as_it_is_now(store: SqlJobStore) -> None:
    """In the order of the last changes, for its key alone; the mark behind a change leaves out what was before it."""
    begin = await store.changes.end("")
    first, second = [await store.create(make_job(), limits=QueueLimits()) for _ in range(2)]
    other = await store.create(make_job(key_id="other"), limits=QueueLimits())
    assert await _told(store, begin) == [(first.id, "queued", 0), (second.id, "queued", 0)]
    assert await _told(store, begin, "other") == [(other.id, "queued", 0)]
    behind_first = (await store.changes.after("", begin, 1))[0].mark
    await store.claim(["fake"], "d", 60)
    await store.record(first.id, _STARTED, Progress(stage="denoise", step=1, total=2))
    progress = (await store.get(first.id)).progress
    assert 0 < progress < 100
    told = [(second.id, "queued", 0), (first.id, "in_progress", progress)]
    assert await _told(store, begin) == await _told(store, behind_first) == told
    end = await store.changes.end("")
    assert await _told(store, end) == []
    await store.request_cancel(second.id)
    await store.delete(first.id)
    assert await _told(store, end) == [(second.id, "cancelled", 0), (first.id, None, None)]


async def test_jobs_that_expire_are_told_of_and_forgotten_later(store: SqlJobStore) -> None:
    """Later changes are behind theirs all the same."""
    retention = SqlRetention(store.database)
    begin = await store.changes.end("")
    ended = [await store.create(make_job(), limits=QueueLimits()) for _ in range(3)]
    for job in ended:
        await store.record(job.id, Cancelled())
    assert await retention.forget([job.id for job in ended]) == 3
    assert {(job.id, None, None) for job in ended} == set(await _told(store, begin))
    last = (await store.changes.after("", begin, 100))[-1].mark
    await retention.forget_deleted_before(time.time() + 1, ())
    assert await _told(store, begin) == []
    job = await store.create(make_job(), limits=QueueLimits())
    assert await _told(store, last) == [(job.id, "queued", 0)]


async def test_a_mark_is_read_again_by_another_server_of_the_database(store: SqlJobStore) -> None:
    job = await store.create(make_job(), limits=QueueLimits())
    mark = (await store.changes.after("", Mark(0), 1))[0].mark
    text = await store.changes.id_of(mark, 1000.5)
    again = SqlJobStore(store.database)
    assert await again.changes.read_id(text, "", 1001.0) == mark == Mark(mark.place, job.id)
    assert await again.changes.read_id(text, "", 1000.0 + 13 * 3600) is None
    async with asyncio.timeout(20):
        with store.changes.watched() as has_changed:
            await store.record(job.id, Cancelled())
            await has_changed.wait()
