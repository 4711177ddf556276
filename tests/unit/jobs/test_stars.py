"""Starred jobs, which do not expire."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import pytest

from kinema.errors import JobNotFound
from kinema.events import Cancelled
from kinema.ids import new_job_id
from kinema.job import Job
from kinema.jobs.retention import SqlRetention
from kinema.jobs.sql import SqlJobStore
from kinema.jobs.store import QueueLimits
from tests.serving import make_job


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[SqlJobStore]:
    store = await SqlJobStore.open(store_url)
    yield store
    await store.close()


async def _ended(store: SqlJobStore) -> Job:
    job = await store.create(make_job(), limits=QueueLimits())
    await store.record(job.id, Cancelled())
    return await store.get(job.id)


async def test_a_starred_job_outlives_the_others(store: SqlJobStore) -> None:
    """Whichever way these are removed; without the star it goes as they do."""
    retention, later = SqlRetention(store.database), time.time() + 1
    kept, gone = [await _ended(store) for _ in range(2)]
    starred = await store.star(kept.id, is_starred=True)
    assert starred.starred_at is not None
    assert await store.get(kept.id) == starred == kept.model_copy(update={"starred_at": starred.starred_at})
    assert await store.star(kept.id, is_starred=True) == starred
    assert [one.id for one in await retention.ended_before(later, None, 10)] == [gone.id]
    assert {job_id: end.is_starred for job_id, end in (await retention.ends([kept.id, gone.id])).items()} == {
        kept.id: True,
        gone.id: False,
    }
    assert await retention.forget_ended([kept.id]) == []
    assert await retention.forget_ended_before(later, 10) == [gone.id]
    assert await store.star(kept.id, is_starred=False) == kept
    assert await retention.forget_ended_before(later, 10) == [kept.id]


async def test_a_star_is_a_change_and_lasts_to_the_end_of_a_job(store: SqlJobStore) -> None:
    job = await store.create(make_job(), limits=QueueLimits())
    mark = await store.changes.end("")
    starred = await store.star(job.id, is_starred=True)
    assert [one.job for one in await store.changes.after("", mark, 10)] == [starred]
    await store.record(job.id, Cancelled())
    assert (await store.get(job.id)).starred_at == starred.starred_at
    await store.delete(job.id)
    for missing in (job.id, new_job_id()):
        with pytest.raises(JobNotFound):
            await store.star(missing, is_starred=True)
