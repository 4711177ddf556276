"""The job store on a real database that several stores share, as several processes would."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable
from multiprocessing.connection import Connection, Pipe

import pytest

from kinema.errors import InvalidRequest, JobNotFound
from kinema.events import Cancelled, Progress
from kinema.job import Job, JobStatus
from kinema.jobs.retention import SqlRetention
from kinema.jobs.sql import SqlJobStore
from kinema.jobs.store import QueueLimits, Submission
from tests.forked import ForkedProcess
from tests.serving import REQUEST, events_of, make_job


async def test_concurrent_claims_give_each_job_once(url: str) -> None:
    """Many claimers on several connections to one database; nobody waits for a lock in vain."""
    stores = [await SqlJobStore.open(url) for _ in range(3)]
    jobs = [make_job() for _ in range(30)]
    await asyncio.gather(*(stores[i % 3].create(job, limits=QueueLimits(max_queued=100)) for i, job in enumerate(jobs)))

    async def claim_all(number: int) -> list[str]:
        claimed = []
        while (job := await stores[number % 3].claim(["fake"], f"owner {number}", 60)) is not None:
            claimed.append(job.id)
        return claimed

    found = await asyncio.gather(*(claim_all(number) for number in range(12)))
    assert Counter(job_id for claimed in found for job_id in claimed) == Counter(job.id for job in jobs)
    await asyncio.gather(*(store.close() for store in stores))


async def test_sweepers_of_several_processes_forget_each_job_once(url: str) -> None:
    """By age and by name, in opposite orders, at once: nobody waits for another, and a running job stays."""
    stores = [await SqlJobStore.open(url) for _ in range(3)]
    jobs = [make_job() for _ in range(120)]
    for job in jobs:
        await stores[0].create(job, limits=QueueLimits())
        if job is not jobs[0]:
            await stores[0].record(job.id, Cancelled())
    one, two, three = (SqlRetention(store.database) for store in stores)
    ids = [job.id for job in jobs]

    async def forget_all() -> int:
        count = 0
        while gone := await one.forget_ended_before(time.time() + 1, 10):
            count += len(gone)
        return count

    counts = await asyncio.gather(forget_all(), two.forget(ids), three.forget(ids[::-1]))
    assert sum(counts) == 119
    assert {job_id: end.finished_at for job_id, end in (await one.ends(ids)).items()} == {ids[0]: None}
    await asyncio.gather(*(store.close() for store in stores))


async def test_a_watcher_hears_that_another_process_deleted_the_job(url: str) -> None:
    """It would wait for ever: no event tells of it."""
    deleter, reader = await SqlJobStore.open(url), await SqlJobStore.open(url)
    job = make_job()
    await deleter.create(job, limits=QueueLimits())
    watcher = reader.watch(job.id)
    await anext(watcher)
    following = asyncio.ensure_future(anext(watcher))
    await deleter.delete(job.id)
    with pytest.raises(JobNotFound):
        await asyncio.wait_for(following, 20)
    await asyncio.gather(deleter.close(), reader.close())


async def test_the_queue_limit_holds_under_concurrent_creates(url: str) -> None:
    """Count and insert are one transaction."""
    stores = [await SqlJobStore.open(url) for _ in range(2)]
    creates = (stores[i % 2].create(make_job(), limits=QueueLimits(max_queued=5)) for i in range(20))
    outcomes = await asyncio.gather(*creates, return_exceptions=True)
    assert sum(isinstance(made, Job) for made in outcomes) == await stores[0].count_waiting() == 5
    await asyncio.gather(*(store.close() for store in stores))


async def test_events_of_another_store_are_seen(url: str) -> None:
    """A watcher hears of what another process records, in order."""
    writer, reader = await SqlJobStore.open(url), await SqlJobStore.open(url)
    job = make_job()
    await writer.create(job, limits=QueueLimits(max_queued=10))
    watching = asyncio.create_task(events_of(reader, job.id))
    await writer.claim(["fake"], "a", 60)
    for step in range(1, 6):
        await writer.record(job.id, Progress(stage="denoise", step=step, total=5), attempt=1)
    await writer.record(job.id, Cancelled(), attempt=1)
    async with asyncio.timeout(10):
        seen = await watching
    assert [event.type for event in seen] == ["queued", *["progress"] * 5, "cancelled"]
    await writer.close()
    await reader.close()


async def test_one_submission_sent_many_times_at_once_is_one_job(url: str) -> None:
    """By its key, or by its client's word that it tries again: whoever comes second gets the first one's job."""
    stores = [await SqlJobStore.open(url) for _ in range(3)]
    for sent in (Submission("same body", idempotency_key="k"), Submission("same body again", is_retry=True)):
        creates = (stores[i % 3].create(make_job(), limits=QueueLimits(), submission=sent) for i in range(12))
        assert len({job.id for job in await asyncio.gather(*creates)}) == 1
    assert await stores[0].count_waiting() == 2
    await asyncio.gather(*(store.close() for store in stores))


async def test_one_key_for_two_models_at_once_is_one_job(url: str) -> None:
    """Models have queues of their own, and the key is one: what comes second gets the first one's job, or, with
    another body, is refused."""
    stores = [await SqlJobStore.open(url) for _ in range(2)]

    def create(number: int, key: str, body: str) -> Awaitable[Job]:
        job = make_job(request=REQUEST.model_copy(update={"model": f"model {number}"}))
        return stores[number].create(job, limits=QueueLimits(), submission=Submission(body, idempotency_key=key))

    for key in map(str, range(20)):
        first, second = await asyncio.gather(create(0, key, "a body"), create(1, key, "a body"))
        assert first == second
        outcomes = await asyncio.gather(
            create(0, f"{key}!", "a body"), create(1, f"{key}!", "another"), return_exceptions=True
        )
        assert {type(outcome) for outcome in outcomes} == {Job, InvalidRequest}
    assert await stores[0].count_waiting() == 40
    await asyncio.gather(*(store.close() for store in stores))


async def test_two_sweepers_forget_each_ended_job_once(url: str) -> None:
    """Those that have ended, with their events, and at most as many as each was asked to."""
    stores = [await SqlJobStore.open(url) for _ in range(2)]
    ended = [make_job() for _ in range(6)]
    for job in ended:
        await stores[0].create(job, limits=QueueLimits())
        await stores[0].request_cancel(job.id)
    waiting = await stores[0].create(make_job(), limits=QueueLimits())
    later = time.time() + 1
    swept = await asyncio.gather(*(SqlRetention(store.database).forget_ended_before(later, 3) for store in stores))
    assert [len(ids) <= 3 for ids in swept] == [True, True]
    rest = await SqlRetention(stores[0].database).forget_ended_before(later, 10)
    assert Counter([*swept[0], *swept[1], *rest]) == Counter(job.id for job in ended)
    assert await stores[1].get(waiting.id) == waiting
    await asyncio.gather(*(store.close() for store in stores))


def _claim_and_hang(url: str, told: Connection) -> None:
    """What another process does."""

    async def claim() -> None:
        store = await SqlJobStore.open(url)
        told.send(await store.claim(["fake"], "doomed", 0.2))
        await asyncio.Event().wait()

    asyncio.run(claim())


async def test_a_job_of_a_killed_process_is_claimed_again(url: str) -> None:
    """After kill -9 the database is whole, the job is there, and it is another owner's once the lease ran out."""
    store = await SqlJobStore.open(url)
    job = make_job()
    await store.create(job, limits=QueueLimits(max_queued=10))
    told, telling = Pipe(duplex=False)
    process = ForkedProcess(_claim_and_hang, url, telling)
    telling.close()
    assert (await asyncio.to_thread(told.recv)).id == job.id
    process.kill()
    process.wait()
    await store.close()

    later = await SqlJobStore.open(url, clock=lambda: time.time() + 1)
    assert (await later.get(job.id)).status is JobStatus.IN_PROGRESS
    taken = await later.claim(["fake"], "heir", 60)
    assert taken is not None
    assert (taken.id, taken.attempt) == (job.id, 2)
    await later.close()


def _claim_by_a_wrong_clock(url: str, off_s: float, told: Connection) -> None:
    """What another process does, whose machine has another time."""
    right = time.time
    time.time = lambda: right() + off_s

    async def claim() -> None:
        store = await SqlJobStore.open(url)
        for lease_s in (0.5, 60.0):
            await store.claim(["fake"], "wrong", lease_s)
        told.send(await store.count_waiting())
        await store.close()

    asyncio.run(claim())


@pytest.mark.parametrize("url", ["postgres"], indirect=True)
@pytest.mark.parametrize("off_s", [-600, 600])
async def test_a_clock_that_is_wrong_by_minutes_neither_loses_nor_keeps_a_lease(off_s: int, url: str) -> None:
    """Leases go by the database's clock: another server takes a job when its lease has run out, and not before."""
    store = await SqlJobStore.open(url)
    jobs = [make_job(created_at=float(age)) for age in range(2)]
    for job in jobs:
        await store.create(job, limits=QueueLimits())
    told, telling = Pipe(duplex=False)
    process = ForkedProcess(_claim_by_a_wrong_clock, url, off_s, telling)
    telling.close()
    async with asyncio.timeout(60):
        assert await asyncio.to_thread(told.recv) == 0
        process.wait()
        while (taken := await store.claim(["fake"], "right", 60)) is None:
            pass
    assert (taken.id, taken.attempt) == (jobs[0].id, 2)
    assert await store.claim(["fake"], "right", 60) is None
    await store.close()


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
async def test_the_file_is_set_up_for_many_readers_and_kills(url: str) -> None:
    """WAL, foreign keys and a patient lock, on every connection."""
    store = await SqlJobStore.open(url)
    names = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
    found = await store.database.read(
        lambda connection: [connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in names]
    )
    assert found == ["wal", 1, 1, 10_000]
    await store.close()
