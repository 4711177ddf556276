"""Pages of a key's jobs that somebody looks for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from itertools import product

import pytest

from kinema.events import Cancelled, Failed, Started
from kinema.ids import JobId, new_job_id
from kinema.job import Job, JobStatus
from kinema.jobs import listing
from kinema.jobs.listing import Wanted
from kinema.jobs.sql import SqlJobStore
from kinema.jobs.store import QueueLimits
from tests.serving import REQUEST, make_job
from tests.unit.jobs.test_sql import COMPLETED

_STARTED = Started(worker_id="w", attempt=1)
_EVENTS = {
    JobStatus.QUEUED: (),
    JobStatus.IN_PROGRESS: (_STARTED,),
    JobStatus.COMPLETED: (_STARTED, COMPLETED),
    JobStatus.FAILED: (Failed(code="c", message="m"),),
    JobStatus.CANCELLED: (Cancelled(),),
}
_PROMPTS = ("A Red Kite", "ein roter ÄPFEL-Baum", 'quoted "100%" _line_')


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[SqlJobStore]:
    store = await SqlJobStore.open(store_url)
    yield store
    await store.close()


async def _fill(store: SqlJobStore) -> list[Job]:
    """A job of each status, model and star, by age, and one of another key between them."""
    jobs = []
    for number, (status, model, is_starred) in enumerate(product(JobStatus, ("fake", "other"), (True, False))):
        request = REQUEST.model_copy(update={"model": model, "prompt": _PROMPTS[number % len(_PROMPTS)]})
        job = make_job(id=new_job_id(1000.0 + number), request=request, key_id="mine")
        await store.create(job, limits=QueueLimits())
        await store.create(
            job.model_copy(update={"id": new_job_id(1000.5 + number), "key_id": "n"}), limits=QueueLimits()
        )
        if _EVENTS[status]:
            await store.record(job.id, *_EVENTS[status])
        if is_starred:
            await store.star(job.id, is_starred=True)
        jobs.append(await store.get(job.id))
    return jobs


async def _all(store: SqlJobStore, wanted: Wanted, limit: int, *, is_ascending: bool) -> list[JobId]:
    """The ids of all pages."""
    found: list[JobId] = []
    after: JobId | None = None
    while True:
        page = await store.find_page("mine", wanted, after=after, limit=limit, is_ascending=is_ascending)
        found += [job.id for job in page.jobs]
        assert len(page.jobs) <= limit
        if not page.has_more:
            return found
        after = page.last_id


@pytest.mark.parametrize("looked_through", [3, 1000])
async def test_pages_have_what_is_wanted_in_order(
    store: SqlJobStore, monkeypatch: pytest.MonkeyPatch, looked_through: int
) -> None:
    """Every combination gives what a look at each of the key's jobs gives."""
    monkeypatch.setattr(listing, "_LOOKED_THROUGH", looked_through)
    jobs = await _fill(store)
    ended = (JobStatus.FAILED, JobStatus.CANCELLED)
    for statuses, model, is_starred, text, limit in (
        (tuple(JobStatus), None, None, "", 7),
        ((JobStatus.QUEUED,), None, None, "", 1),
        (ended, None, None, "", 3),
        (tuple(JobStatus), "other", None, "", 2),
        (ended, "fake", None, "", 100),
        (tuple(JobStatus), None, True, "", 4),
        (tuple(JobStatus), None, False, "", 4),
        (ended, "other", True, "", 1),
        (tuple(JobStatus), None, None, "red k", 2),
        (tuple(JobStatus), None, None, "äpfel", 2),
        (tuple(JobStatus), None, None, '"100%" _', 2),
        (tuple(JobStatus), None, None, "100_", 2),
        ((JobStatus.COMPLETED,), "fake", True, "KITE", 1),
        (tuple(JobStatus), "nobody", None, "", 5),
    ):
        wanted = Wanted(statuses, model, text, is_starred)
        by_hand = [
            job.id
            for job in jobs
            if job.status in statuses
            and model in (None, job.request.model)
            and is_starred in (None, job.starred_at is not None)
            and text.casefold() in job.request.prompt.casefold()
        ]
        assert await _all(store, wanted, limit, is_ascending=True) == by_hand, wanted
        assert await _all(store, wanted, limit, is_ascending=False) == by_hand[::-1], wanted
