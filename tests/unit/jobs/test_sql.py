"""The job store, on a database in memory; on PostgreSQL by tests/integration/jobs/test_sql_postgres.py."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from datetime import date

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Connection

from kinema.errors import ConfigError, JobNotFound, Overloaded, StoreUnavailable
from kinema.events import Artifact, Cancelled, Completed, Failed, Preview, Progress, Queued, Started, Terminal, Timings
from kinema.ids import JobId
from kinema.job import IllegalTransition, Job, JobStatus, advance
from kinema.jobs.sql import SqlJobStore
from kinema.jobs.store import Arrivals, DayUsage, QueueLimits
from kinema.request.request import LoraUse, Priority
from kinema.service.fair_order import FairOrder
from kinema.service.outlook import Capacity, outlooks
from tests.serving import REQUEST, events_of, make_job

COMPLETED = Completed(
    artifact=Artifact(key="k", media_type="video/mp4", size_bytes=3, etag="e"),
    thumbnail=Artifact(key="t", media_type="image/webp", size_bytes=2, etag="f"),
    spritesheet=Artifact(key="s", media_type="image/jpeg", size_bytes=1, etag="g"),
    timings=Timings(),
)


_NO_LIMITS = QueueLimits()


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def store(store_url: str, clock: Clock) -> AsyncIterator[SqlJobStore]:
    store = await SqlJobStore.open(store_url, clock)
    yield store
    await store.close()


async def create(store: SqlJobStore, **changes: object) -> Job:
    job = make_job(**changes)
    await store.create(job, limits=QueueLimits(max_queued=10))
    return job


async def test_a_job_comes_back_as_it_was_stored(store: SqlJobStore) -> None:
    """Every field survives, and the job begins with its Queued event."""
    job = await create(store, warnings=("num_frames 4 -> 5: must be a multiple of 4 plus 1",), user="ann")
    assert await store.get(job.id) == job
    watcher = store.watch(job.id)
    first = await anext(watcher)
    await watcher.aclose()
    assert (first.seq, first.event) == (1, Queued())


@pytest.mark.parametrize("job_id", [f"video_{'0' * 32}", "video_nobody", "\0", "\ud800", "x" * 9000])
async def test_unknown_jobs_are_not_found(job_id: str, store: SqlJobStore) -> None:
    """By every method that takes an id, also when it is none and the database would not take it."""
    nobody = JobId(job_id)
    with pytest.raises(JobNotFound):
        await store.get(nobody)
    with pytest.raises(JobNotFound):
        await store.request_cancel(nobody)
    with pytest.raises(JobNotFound):
        await store.delete(nobody)
    assert not await store.record(nobody, Cancelled())
    with pytest.raises(JobNotFound):
        await anext(store.watch(nobody))


async def test_warnings_of_the_end_are_stored(store: SqlJobStore) -> None:
    """Behind those that the job came with."""
    job = await create(store, warnings=("adjusted",))
    end = COMPLETED.model_copy(update={"warnings": ("smaller",)})
    assert await store.record(job.id, Started(worker_id="w", attempt=1), end)
    assert (await store.get(job.id)).warnings == ("adjusted", "smaller")


async def test_a_full_queue_refuses_and_stores_nothing(store: SqlJobStore) -> None:
    """max_queued jobs wait; the next is Overloaded until one is claimed."""
    await store.create(make_job(), limits=QueueLimits(max_queued=1))
    refused = make_job()
    with pytest.raises(Overloaded):
        await store.create(refused, limits=QueueLimits(max_queued=1))
    with pytest.raises(JobNotFound):
        await store.get(refused.id)
    await store.claim(["fake"], "a", 10)
    await store.create(refused, limits=QueueLimits(max_queued=1))


async def test_jobs_that_wait_again_count(store: SqlJobStore) -> None:
    """Also when they ran while the queue was counted: it is as full as it is, and not as it was."""
    limits = QueueLimits(max_queued=3)
    for _ in range(3):
        await store.create(make_job(), limits=limits)
    await store.claim(["fake"], "one", 60)
    await store.create(make_job(), limits=limits)
    with pytest.raises(Overloaded):
        await store.create(make_job(), limits=limits)
    await store.claim(["fake"], "two", 60)
    await store.create(make_job(), limits=QueueLimits(max_queued=9))
    await store.release("one")
    with pytest.raises(Overloaded, match="4 videos wait"):
        await store.create(make_job(), limits=QueueLimits(max_queued=4))


async def test_a_higher_priority_is_claimed_first(store: SqlJobStore) -> None:
    """Of equal ones the oldest; and the queue that clients see is in the same order."""
    asked: list[Priority] = ["low", "normal", "high", "normal", "high"]
    jobs = [
        await create(store, request=REQUEST.model_copy(update={"priority": priority}), created_at=float(age))
        for age, priority in enumerate(asked)
    ]
    expected = [jobs[place].id for place in (2, 4, 1, 3, 0)]
    assert [job.id for job in await store.active()] == expected
    assert [job.priority for job in await store.active()] == ["high", "high", "normal", "normal", "low"]
    claimed = [await store.claim(["fake"], "one", 10) for _ in jobs]
    assert [job.id for job in claimed if job is not None] == expected


async def test_jobs_whose_loras_are_not_there_wait_on(store: SqlJobStore) -> None:
    """Those behind them go on, also of the same key, and their turn is kept; what waits is known."""
    a, b = (LoraUse(name=name, digest=name * 64, scale=1.0) for name in "ab")
    needs = [(), (b,), (a, b), (b, a), ()]
    requests = [REQUEST.model_copy(update={"loras": loras}) for loras in needs]
    jobs = [await create(store, request=request, created_at=float(age)) for age, request in enumerate(requests)]
    both = f"{a.digest} {b.digest}"
    assert set(await store.waiting_loras(["fake", "other"])) == {("fake", b.digest), ("fake", both)}
    assert await store.waiting_loras(["other"]) == []

    async def claimed(**only_loras: list[str]) -> int | None:
        job = await store.claim(["fake"], "one", 10, only_loras=only_loras)
        return None if job is None else [one.id for one in jobs].index(job.id)

    assert [await claimed(fake=[], other=[both]) for _ in range(3)] == [0, 4, None]
    assert [await claimed(fake=[both], other=[b.digest]) for _ in range(3)] == [2, 3, None]
    await store.give_back("one", jobs[2].id, is_lost=False, attempt=1)
    assert set(await store.waiting_loras(["fake"])) == {("fake", b.digest), ("fake", both)}
    assert [await claimed(fake=[b.digest]), await claimed(fake=[]), await claimed(other=[])] == [1, None, 2]


async def create_for(store: SqlJobStore, keys: str, **changes: object) -> list[Job]:
    """A job for each letter, which is its key, one after the other."""
    return [await create(store, key_id=key, created_at=float(age), **changes) for age, key in enumerate(keys)]


async def complete(store: SqlJobStore, job: Job) -> None:
    assert await store.record(job.id, Started(worker_id="w", attempt=job.attempt), COMPLETED, attempt=job.attempt)


async def claimed_keys(store: SqlJobStore, count: int, *, one_by_one: bool = False) -> str:
    """The keys of the next jobs in the order of their claims; each ends before the next claim, or none does."""
    keys = ""
    for _ in range(count):
        job = await store.claim(["fake"], "one", 10)
        assert job is not None
        keys += job.key_id
        if one_by_one:
            await complete(store, job)
    return keys


@pytest.mark.parametrize(("one_by_one", "order"), [(False, "abcabaa"), (True, "abcabaa")])
async def test_keys_take_turns(one_by_one: bool, order: str, store: SqlJobStore) -> None:
    """However many jobs one of them sent before, and whether or not the jobs before are done."""
    await create_for(store, "aaaabbc")
    assert await claimed_keys(store, 7, one_by_one=one_by_one) == order
    assert await store.claim(["fake"], "one", 10) is None


async def test_the_key_with_the_fewest_running_jobs_is_first(store: SqlJobStore) -> None:
    """A key that has all places gets none of the next ones, until the others have as many."""
    await create_for(store, "a" * 6)
    assert await claimed_keys(store, 3) == "aaa"
    await create_for(store, "bbbb")
    assert await claimed_keys(store, 6) == "bbbaba"


async def test_a_key_that_deletes_its_jobs_is_not_first_again(store: SqlJobStore) -> None:
    """Its turn does not depend on what is left of its jobs."""
    await create_for(store, "aaabb")
    keys = ""
    for _ in range(5):
        job = await store.claim(["fake"], "one", 10)
        assert job is not None
        keys += job.key_id
        await store.delete(job.id)
    assert keys == "ababa"


async def test_priorities_come_before_keys(store: SqlJobStore) -> None:
    """A key that waits longer for its turn is not before another's higher priority."""
    high, low = (REQUEST.model_copy(update={"priority": priority}) for priority in ("high", "low"))
    await create_for(store, "bb", request=low)
    await create_for(store, "aab", request=high)
    assert await claimed_keys(store, 5) == "ababb"


async def test_keys_are_compared_within_a_model(store: SqlJobStore) -> None:
    """What a key runs on another model's workers takes nothing from this model's."""
    other = REQUEST.model_copy(update={"model": "other"})
    for job in await create_for(store, "aa", request=other):
        await store.claim(["other"], "one", 10)
        assert (await store.get(job.id)).status is JobStatus.IN_PROGRESS
    await create_for(store, "ab")
    assert await claimed_keys(store, 2) == "ab"


async def test_one_key_is_served_in_the_order_of_age(store: SqlJobStore) -> None:
    """As without keys, and when a job comes back that had begun."""
    jobs = await create_for(store, "aaaa")
    first = await store.claim(["fake"], "one", 10)
    assert first is not None
    await store.give_back("one", first.id, is_lost=True)
    claimed = [await store.claim(["fake"], "one", 10) for _ in jobs]
    assert [job and job.id for job in claimed] == [job.id for job in jobs]


@pytest.mark.parametrize("seed", range(6))
async def test_the_order_that_is_predicted_is_that_of_the_claims(seed: int, store: SqlJobStore) -> None:
    """With keys, priorities and places drawn at random, and jobs that come, end, or are given back in between."""
    draw = random.Random(seed)
    running: list[Job] = []
    num_places = draw.randint(1, 4)
    for round_number in range(3):
        for age in range(draw.randint(4, 9)):
            request = REQUEST.model_copy(update={"priority": draw.choice(["high", "normal", "normal", "low"])})
            key_id, created_at = draw.choice("aaaabbc"), 100.0 * round_number + age
            await store.create(make_job(key_id=key_id, request=request, created_at=created_at), limits=QueueLimits())
        active = {job.id: job for job in await store.active()}
        order = FairOrder([*active.values()])
        for _ in range(draw.randint(3, 8)):
            while len(running) < num_places and order:
                job = await store.claim(["fake"], "one", 10)
                assert job is not None
                assert order.take().id == job.id
                running.append(job)
            if running:
                ended = running.pop(draw.randrange(len(running)))
                await complete(store, ended)
                order.end(active[ended.id])


async def test_the_place_in_the_queue_is_that_of_the_claims(store: SqlJobStore) -> None:
    """Where one job runs at a time, each place that is told is the number of the claim."""
    await create_for(store, "aaaaabbc")
    await store.claim(["fake"], "one", 10)
    told = outlooks(await store.active(), {}, {"fake": Capacity(num_slots=1)})
    places = {found.queue_position: job_id for job_id, found in told.items()}
    running = next(job for job in await store.active() if not job.is_waiting)
    await complete(store, await store.get(running.id))
    order: Sequence[JobId] = []
    while (job := await store.claim(["fake"], "one", 10)) is not None:
        order = [*order, job.id]
        await complete(store, job)
    assert order == [places[place] for place in range(1, 8)]


async def test_the_share_of_a_key_bounds_what_it_has_waiting(store: SqlJobStore) -> None:
    """In number and in work; the sentence says whose they are, and one job may wait however much work it is."""
    few = QueueLimits(max_queued=9, max_queued_per_key=2)
    for _ in range(2):
        await store.create(make_job(key_id="a"), limits=few)
    with pytest.raises(Overloaded, match="2 videos of this key wait already"):
        await store.create(make_job(key_id="a"), limits=few)
    little = QueueLimits(max_work_per_key=REQUEST.work / 2)
    await store.create(make_job(key_id="b"), limits=little)
    with pytest.raises(Overloaded, match="the videos of this key that wait are as much work as may wait"):
        await store.create(make_job(key_id="b"), limits=little)


async def create_at_once(
    store: SqlJobStore, jobs: Sequence[Job], limits: QueueLimits = _NO_LIMITS
) -> list[Job | BaseException]:
    return await asyncio.gather(*(store.create(job, limits=limits) for job in jobs), return_exceptions=True)


async def test_jobs_that_come_at_once_share_a_transaction(store: SqlJobStore) -> None:
    """Each is stored as if it had come alone: with its event, and its place behind those before it."""
    jobs = [make_job(key_id="ab"[number % 2], created_at=float(number)) for number in range(20)]
    num_transactions = 0

    def count(_connection: Connection) -> None:
        nonlocal num_transactions
        num_transactions += 1

    event.listen(store.database._engine, "commit", count)
    assert await create_at_once(store, jobs) == jobs
    event.remove(store.database._engine, "commit", count)
    assert num_transactions <= 2  # of the first, and of those that came meanwhile
    assert [await store.get(job.id) for job in jobs] == jobs
    recorded = [[stored.event async for stored in store.watch(job.id, is_following=False)] for job in jobs]
    assert recorded == [[Queued()]] * 20
    assert [job.id for job in await store.active()] == [job.id for job in jobs]
    claimed = [await store.claim(["fake"], "one", 10) for _ in range(4)]
    assert [job.id for job in claimed if job is not None] == [job.id for job in jobs[:4]]


async def test_the_limits_hold_among_jobs_that_come_at_once(store: SqlJobStore) -> None:
    """Those that have room are stored, in the order in which they came, and the rest is refused; also behind a count
    of the queue that was made for others."""
    few = QueueLimits(max_queued=5, max_queued_per_key=3, max_work=REQUEST.work * 20)
    for _ in range(2):
        jobs = [make_job(key_id=key_id) for key_id in "aaaabbb"]
        answers = await create_at_once(store, jobs, few)
        assert [answer for answer in answers if isinstance(answer, Job)] == [*jobs[:3], *jobs[4:6]]
        assert "3 videos of this key wait already" in str(answers[3])
        assert "5 videos wait already" in str(answers[6])
        assert await store.count_waiting() == 5
        for _ in range(5):
            await store.claim(["fake"], "one", 10)
    much = QueueLimits(max_work=REQUEST.work * 2.5)
    answers = await create_at_once(store, [make_job() for _ in range(4)], much)
    assert [type(answer) for answer in answers] == [Job, Job, Overloaded, Overloaded]


async def test_a_job_that_cannot_be_stored_fails_no_other(store: SqlJobStore) -> None:
    """Of those that come at once; here one has the id of another."""
    first, last = make_job(), make_job()
    answers = await create_at_once(store, [make_job(), first, first, last])
    assert [type(answer) for answer in answers] == [Job, Job, StoreUnavailable, Job]
    assert await store.get(last.id) == last
    assert await store.count_waiting() == 3


async def test_the_queue_knows_the_parts_of_the_work(store: SqlJobStore) -> None:
    """As the request has them: all, a step, and the decode."""
    await create(store)
    (job,) = await store.active()
    assert (job.work, job.step_work, job.decoding_work) == (REQUEST.work, REQUEST.step_work, REQUEST.decoding_work)
    assert 0 < job.decoding_work != job.step_work > 0


async def test_the_time_of_a_video_is_that_of_its_device(store: SqlJobStore) -> None:
    """What it waited while others ran tells nothing about the next; videos of older versions say no more than all."""
    for timings in (Timings(device_s=3.0, delivery_s=1.0, total_s=50.0), Timings(total_s=8.0)):
        job = await create(store)
        await store.claim(["fake"], "one", 10)
        await store.record(job.id, Started(worker_id="w", attempt=1), COMPLETED.model_copy(update={"timings": timings}))
    assert await store.recent_times("other") == []
    assert await store.recent_times("fake") == [(REQUEST.work, 4.0), (REQUEST.work, 8.0)]


async def test_the_latest_arrivals(store: SqlJobStore, clock: Clock) -> None:
    """Those of a span of time; of many the latest, in the time in which they came."""
    await create(store, created_at=clock.now - 60)
    await create(store, created_at=clock.now - 10)
    assert await store.recent_arrivals("other", 50) == Arrivals([], 50)
    assert await store.recent_arrivals("fake", 50) == Arrivals([REQUEST.work], 20)
    assert await store.recent_arrivals("fake", 100) == Arrivals([REQUEST.work, REQUEST.work], 90)
    for number in range(200):
        await store.create(make_job(created_at=clock.now - 2 + number / 100), limits=QueueLimits())
    latest = await store.recent_arrivals("fake", 50)
    assert latest.work == [REQUEST.work] * 100
    assert latest.within_s == pytest.approx(1.0, abs=0.1)  # ids of one millisecond have no order


async def test_the_oldest_job_of_a_served_model_is_claimed(store: SqlJobStore) -> None:
    """In the order of creation, each job once, and only for the models that are named."""
    second = await create(store, created_at=2.0)
    first = await create(store, created_at=1.0)
    assert await store.claim(["other"], "a", 10) is None
    assert await store.claim([], "a", 10) is None
    claimed = [await store.claim(["other", "fake"], "a", 10) for _ in range(3)]
    assert [job and job.id for job in claimed] == [first.id, second.id, None]
    assert claimed[0] is not None
    assert (claimed[0].status, claimed[0].attempt) == (JobStatus.IN_PROGRESS, 1)


async def test_a_job_that_lost_a_worker_may_be_left_to_others(store: SqlJobStore, clock: Clock) -> None:
    """So may one whose owner is gone, since that is a loss; what was never lost is claimed all the same."""
    lost, orphan, sound = await create(store), await create(store), await create(store)
    for _ in range(2):
        await store.claim(["fake"], "a", 10)
    await store.give_back("a", lost.id, is_lost=True)
    clock.now += 11
    claimed = await store.claim([], "b", 10, without_losses=["fake"])
    assert claimed is not None
    assert claimed.id == sound.id
    assert await store.claim([], "b", 10, without_losses=["fake"]) is None
    rest = [await store.claim(["fake"], "b", 10) for _ in range(2)]
    assert [(job.id, job.losses) for job in rest if job is not None] == [(lost.id, 1), (orphan.id, 1)]


async def test_a_job_keeps_its_good_name_when_its_owner_alone_was_lost(store: SqlJobStore, clock: Clock) -> None:
    """Where workers are other processes: it has been taken over, and has lost none of them."""
    job = await create(store)
    await store.claim(["fake"], "a", 10)
    clock.now += 11
    taken = await store.claim([], "b", 10, without_losses=["fake"], owners_have_workers=False)
    assert taken is not None
    assert (taken.id, taken.losses, taken.takeovers) == (job.id, 0, 1)


async def test_a_lease_that_ran_out_lets_another_take_over(store: SqlJobStore, clock: Clock) -> None:
    """Not before, not while it is renewed, and never the owner itself, which still runs the job."""
    job = await create(store)
    await store.claim(["fake"], "a", 10)
    clock.now += 9
    await store.renew("a", 10)
    clock.now += 9
    assert await store.claim(["fake"], "b", 10) is None
    clock.now += 2
    assert await store.claim(["fake"], "a", 10) is None
    taken = await store.claim(["fake"], "b", 10)
    assert taken is not None
    assert (taken.id, taken.attempt) == (job.id, 2)


async def test_events_of_a_run_that_was_given_up_are_refused(store: SqlJobStore, clock: Clock) -> None:
    """Nothing is written for an old attempt or after the end."""
    job = await create(store)
    await store.claim(["fake"], "a", 1)
    clock.now += 2
    await store.claim(["fake"], "b", 1)
    assert not await store.record(job.id, COMPLETED, attempt=1)
    assert await store.record(job.id, COMPLETED, attempt=2)
    assert not await store.record(job.id, Failed(code="late", message="Late."), attempt=2)
    assert await events_of(store, job.id) == [Queued(), COMPLETED]


async def test_recording_advances_the_job(store: SqlJobStore) -> None:
    """Status, progress, times, artifact and timings are those that job.advance decides."""
    job = await create(store)
    await store.claim(["fake"], "a", 10)
    await store.record(job.id, Started(worker_id="w", attempt=1), attempt=1)
    started, step = await store.get(job.id), Progress(stage="denoise", step=1, total=2)
    await store.record(job.id, step, attempt=1)
    assert (await store.get(job.id)).progress == advance(started, step).progress > 0
    await store.record(job.id, COMPLETED, attempt=1)
    done = await store.get(job.id)
    assert (done.status, done.progress) == (JobStatus.COMPLETED, 100)
    assert done.artifacts == (COMPLETED.artifact, COMPLETED.thumbnail, COMPLETED.spritesheet)
    assert (done.started_at, done.finished_at) == (1000.0, 1000.0)


async def test_the_newest_preview_is_kept(store: SqlJobStore) -> None:
    """One at a time, also of those that are written together; numbers go on, and nobody sees one twice."""
    job = await create(store)
    await store.claim(["fake"], "a", 10)
    first, second, third = (Preview(step=step, total=3, b64_jpeg="AAAA" * step) for step in (1, 2, 3))
    assert await store.find_preview(job.id) is None
    await store.record(job.id, Started(worker_id="w", attempt=1), first, attempt=1)
    assert await store.find_preview(job.id) == first
    watcher = store.watch(job.id)
    seen = [(stored.seq, stored.event.type) for stored in [await anext(watcher) for _ in range(3)]]
    assert seen == [(1, "queued"), (2, "started"), (3, "preview")]
    await store.record(job.id, second, Progress(stage="denoise", step=2, total=3), third, attempt=1)
    assert await store.find_preview(job.id) == third
    await store.record(job.id, COMPLETED, attempt=1)
    assert [stored.seq async for stored in watcher] == [5, 6, 7]
    assert [event.type for event in await events_of(store, job.id)] == [
        "queued", "started", "progress", "preview", "completed"
    ]  # fmt: skip
    assert await store.find_preview(job.id) == third
    await store.delete(job.id)
    assert await store.find_preview(job.id) is None


async def test_an_illegal_event_is_our_mistake_and_writes_nothing(store: SqlJobStore) -> None:
    """A queued job cannot complete."""
    job = await create(store)
    with pytest.raises(IllegalTransition):
        await store.record(job.id, COMPLETED)
    assert (await store.get(job.id)).status is JobStatus.QUEUED


async def test_cancelling_a_waiting_job_ends_it_at_once(store: SqlJobStore) -> None:
    """It is never claimed, and a second cancel changes nothing."""
    job = await create(store)
    assert (await store.request_cancel(job.id)).status is JobStatus.CANCELLED
    assert (await store.request_cancel(job.id)).status is JobStatus.CANCELLED
    assert await store.claim(["fake"], "a", 10) is None
    assert await events_of(store, job.id) == [Queued(), Cancelled()]


async def test_cancelling_a_running_job_marks_it_and_wakes_the_dispatcher(store: SqlJobStore) -> None:
    """Its worker ends it; the mark stays on the job through later events."""
    job = await create(store)
    await store.claim(["fake"], "a", 10)
    await store.wait_for_work(10)
    marked = await store.request_cancel(job.id)
    assert (marked.status, marked.is_cancel_requested) == (JobStatus.IN_PROGRESS, True)
    async with asyncio.timeout(5):
        await store.wait_for_work(60)
    await store.record(job.id, Started(worker_id="w", attempt=1))
    assert (await store.get(job.id)).is_cancel_requested


async def test_a_released_job_waits_again(store: SqlJobStore) -> None:
    """One of the owner's, or all; it counts as waiting, can be cancelled at once, and its next run is a new attempt."""
    jobs = [await create(store, created_at=float(i)) for i in range(3)]
    for _ in jobs:
        await store.claim(["fake"], "a", 10)
    await store.release("b")
    assert await store.count_waiting() == 0
    await store.give_back("a", jobs[0].id, is_lost=True)
    assert await store.count_waiting() == 1
    await store.release("a")
    assert await store.count_waiting() == 3
    assert (await store.request_cancel(jobs[1].id)).status is JobStatus.CANCELLED
    again = await store.claim(["fake"], "a", 10)
    assert again is not None
    assert (again.id, again.attempt) == (jobs[0].id, 2)


async def test_a_job_that_was_given_back_rests(store: SqlJobStore, clock: Clock) -> None:
    """Nobody claims it before its time, the one who gave it back included; younger ones are claimed meanwhile."""
    first, second = await create(store, created_at=1.0), await create(store, created_at=2.0)
    await store.claim(["fake"], "a", 10)
    await store.give_back("a", first.id, is_lost=True, wait_s=5)
    claimed = [await store.claim(["fake"], owner, 100) for owner in ("a", "b")]
    assert [job and job.id for job in claimed] == [second.id, None]
    clock.now += 5.1
    again = await store.claim(["fake"], "b", 10)
    assert again is not None
    assert (again.id, again.attempt, again.losses) == (first.id, 2, 1)


async def test_the_end_of_a_rest_wakes_the_dispatcher(store: SqlJobStore) -> None:
    """Within the process that gave it back; nothing else has to happen."""
    job = await create(store)
    await store.claim(["fake"], "a", 10)
    await store.wait_for_work(10)
    await store.give_back("a", job.id, is_lost=False, wait_s=0.05)
    async with asyncio.timeout(5):
        await store.wait_for_work(60)


async def test_a_job_that_rests_counts_as_waiting(store: SqlJobStore) -> None:
    """For the count, the limits and the outlook: it is work that no worker does yet."""
    job = await create(store)
    await store.claim(["fake"], "a", 10)
    assert [active.is_waiting for active in await store.active()] == [False]
    await store.give_back("a", job.id, is_lost=True, wait_s=60)
    assert await store.count_waiting() == 1
    assert [active.is_waiting for active in await store.active()] == [True]
    with pytest.raises(Overloaded):
        await store.create(make_job(), limits=QueueLimits(max_queued=1))


async def test_a_job_that_rests_is_cancelled_at_once(store: SqlJobStore) -> None:
    """It does not wait for its next run to end it."""
    job = await create(store)
    await store.claim(["fake"], "a", 10)
    await store.give_back("a", job.id, is_lost=True, wait_s=60)
    assert (await store.request_cancel(job.id)).status is JobStatus.CANCELLED
    assert await events_of(store, job.id) == [Queued(), Cancelled()]


async def test_a_job_is_not_given_back_after_its_cancel(store: SqlJobStore) -> None:
    """Its worker was lost before it could stop: the job has ended, and whoever waits hears of it."""
    job = await create(store)
    await store.claim(["fake"], "a", 10)
    await store.request_cancel(job.id)
    waiting = asyncio.create_task(store.wait_for_end(job.id))
    await store.give_back("b", job.id, is_lost=True, wait_s=60)
    assert (await store.get(job.id)).status is JobStatus.IN_PROGRESS
    await store.give_back("a", job.id, is_lost=True, wait_s=60)
    async with asyncio.timeout(5):
        assert (await waiting).status is JobStatus.CANCELLED
    assert await store.claim(["fake"], "b", 10) is None


@pytest.mark.parametrize("ending", [COMPLETED, Failed(code="engine_failed", message="no"), Cancelled()])
async def test_who_waits_for_the_end_gets_the_job_as_it_is_stored(store: SqlJobStore, ending: Terminal) -> None:
    """Who records it here tells it; nobody reads it again."""
    job = await create(store)
    await store.claim(["fake"], "a", 10)
    waiting = asyncio.create_task(store.wait_for_end(job.id))
    await store.record(job.id, Started(worker_id="w", attempt=1), attempt=1)
    await store.record(job.id, ending, attempt=1)
    async with asyncio.timeout(5):
        assert await waiting == await store.get(job.id)


async def test_an_old_attempt_does_not_give_back_a_new_one(store: SqlJobStore) -> None:
    """The same owner may have the job again."""
    job = await create(store)
    for _ in range(2):
        await store.release("a")
        claimed = await store.claim(["fake"], "a", 10)
    assert claimed is not None
    await store.give_back("a", job.id, is_lost=True, attempt=1)
    assert await store.count_waiting() == 0
    await store.give_back("a", job.id, is_lost=True, attempt=2)
    assert await store.count_waiting() == 1


async def test_a_release_may_keep_some(store: SqlJobStore) -> None:
    """Those that the owner knows of."""
    jobs = [await create(store) for _ in range(3)]
    for _ in jobs:
        await store.claim(["fake"], "a", 10)
    await store.release("a", keeping=[jobs[0].id])
    assert [job.id for job in await store.active() if not job.is_waiting] == [jobs[0].id]


async def test_several_events_are_recorded_together(store: SqlJobStore) -> None:
    """Each with its number, in one transaction: with one that is illegal none is written."""
    job = await create(store)
    await store.claim(["fake"], "a", 10)
    started, progress = Started(worker_id="w", attempt=1), Progress(stage="denoise", step=1, total=2)
    with pytest.raises(IllegalTransition):
        await store.record(job.id, started, COMPLETED, progress, attempt=1)
    assert await store.record(job.id, started, progress, COMPLETED, attempt=1)
    stored = [stored async for stored in store.watch(job.id)]
    assert [(each.seq, each.event) for each in stored] == [(1, Queued()), (2, started), (3, progress), (4, COMPLETED)]


async def test_a_queue_of_another_model_does_not_fill_this_one(store: SqlJobStore) -> None:
    """Jobs that wait for a model which is not served must not shut out those of one that is."""
    gone = REQUEST.model_copy(update={"model": "gone"})
    await store.create(make_job(request=gone), limits=QueueLimits(max_queued=1))
    await store.create(make_job(), limits=QueueLimits(max_queued=1))
    with pytest.raises(Overloaded):
        await store.create(make_job(), limits=QueueLimits(max_queued=1))


async def test_only_lost_runs_are_counted_as_losses(store: SqlJobStore, clock: Clock) -> None:
    """A dead worker and a lease that ran out are losses; a clean shutdown is none, however often it happens."""
    job = await create(store)
    for _ in range(5):
        await store.claim(["fake"], "a", 10)
        await store.release("a")
    assert (await store.get(job.id)).losses == 0
    await store.claim(["fake"], "a", 10)
    await store.give_back("a", job.id, is_lost=True)
    assert (await store.get(job.id)).losses == 1
    await store.claim(["fake"], "a", 10)
    clock.now += 11
    claimed = await store.claim(["fake"], "b", 10)
    assert claimed is not None
    assert (claimed.losses, claimed.takeovers, claimed.attempt) == (2, 1, 8)


async def test_watch_follows_a_job_to_its_end(store: SqlJobStore) -> None:
    """Recorded events first, later ones as they come, every number once; it ends after the terminal event."""
    job = await create(store)
    watcher = store.watch(job.id)
    seen = [await anext(watcher)]
    following = asyncio.create_task(anext(watcher))
    await store.claim(["fake"], "a", 10)
    await store.record(job.id, Started(worker_id="w", attempt=1))
    seen.append(await following)
    await store.record(job.id, COMPLETED)
    seen += [stored async for stored in watcher]
    assert [(stored.seq, stored.event.type) for stored in seen] == [(1, "queued"), (2, "started"), (3, "completed")]


async def test_watch_resumes_after_a_number(store: SqlJobStore) -> None:
    """Also after the last one, and after one that never was: an ended job has nothing more to say."""
    job = await create(store)
    await store.request_cancel(job.id)
    assert [stored.seq async for stored in store.watch(job.id, 1)] == [2]
    assert [stored.seq async for stored in store.watch(job.id, 2)] == []
    assert [stored.seq async for stored in store.watch(job.id, 99)] == []


async def test_watch_may_end_with_what_is_recorded(store: SqlJobStore) -> None:
    """Though more is to come."""
    job = await create(store)
    await store.claim(["fake"], "a", 10)
    await store.record(job.id, Started(worker_id="w", attempt=1))
    assert [stored.seq async for stored in store.watch(job.id, is_following=False)] == [1, 2]
    assert [stored.seq async for stored in store.watch(job.id, 2, is_following=False)] == []


async def test_a_cancelled_caller_breaks_nothing(store: SqlJobStore) -> None:
    """A client may go away in the middle of any statement; the next one finds the database whole."""
    job = await create(store)
    for _ in range(20):
        call = asyncio.create_task(store.get(job.id))
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    assert await store.get(job.id) == job


async def test_a_database_that_fails_is_unavailable(store: SqlJobStore) -> None:
    """In one sentence, without the statement that failed."""
    job = await create(store)
    await store.database.write(lambda connection: connection.exec_driver_sql("DROP TABLE events"))
    with pytest.raises(StoreUnavailable, match=r"no such table: events|\"events\" does not exist") as caught:
        await store.record(job.id, Cancelled())
    assert "INSERT" not in caught.value.message


@pytest.mark.parametrize(
    "url", ["nonsense", "mysql://localhost/x", "postgresql://localhost:x/y", "sqlite:////proc/nowhere/kinema.db"]
)
async def test_a_database_that_cannot_be_opened_stops_the_start(url: str) -> None:
    """The message names the setting."""
    with pytest.raises(ConfigError, match=r"jobs\.database_url"):
        await SqlJobStore.open(url)


async def test_jobs_that_have_waited_too_long_end(store: SqlJobStore, clock: Clock) -> None:
    """Queued ones and those that wait for another attempt, the oldest priority or none; not one that is being made."""
    failed = Failed(code="waited_too_long", message="m")
    running = await create(store, created_at=clock.now)
    assert await store.claim(["fake"], "d", 10_000) is not None
    lost = await create(store, created_at=clock.now)
    assert await store.claim(["fake"], "d", 60) is not None
    await store.give_back("d", lost.id, is_lost=True, wait_s=5)
    low = REQUEST.model_copy(update={"priority": "low", "model": "gone"})
    old = [await create(store, created_at=clock.now), await create(store, created_at=clock.now, request=low)]
    new = await create(store, created_at=clock.now + 50)
    clock.now += 100
    assert not await store.fail_waiting(clock.now - 101, failed, 10)
    first = await store.fail_waiting(clock.now - 60, failed, 2)
    second = await store.fail_waiting(clock.now - 60, failed, 2)
    assert (len(first), len(second)) == (2, 1)
    assert {*first, *second} == {lost.id, *(job.id for job in old)}
    assert not await store.fail_waiting(clock.now - 60, failed, 2)
    for job_id in (*first, *second):
        assert (await events_of(store, job_id))[-1] == failed
    assert [(await store.get(job.id)).status for job in (running, new)] == [JobStatus.IN_PROGRESS, JobStatus.QUEUED]
    assert await store.claim(["fake", "gone"], "e", 60) == (await store.get(new.id))


async def test_what_a_key_has_made_is_counted_by_day(store: SqlJobStore, clock: Clock) -> None:
    """At its end, in the day of UTC; videos that are deleted stay counted."""
    timings = Timings(device_s=2.5)
    for key_id, day in (("a", 1), ("b", 1), ("a", 1), ("a", 2)):
        clock.now = day * 86400.0 + 86399
        job = await create(store, key_id=key_id)
        end = COMPLETED.model_copy(update={"timings": timings})
        assert await store.record(job.id, Started(worker_id="w", attempt=1), end)
        await store.delete(job.id)
    failed = await create(store, key_id="a")
    assert await store.record(failed.id, Failed(code="c", message="m"))
    first, second = date(1970, 1, 2), date(1970, 1, 3)
    own = [DayUsage("a", first, 2, 5.0, 12), DayUsage("a", second, 1, 2.5, 6)]
    assert await store.usage("a", first, second) == own
    assert await store.usage("a", second, date(2026, 1, 1)) == own[1:]
    assert await store.usage(None, first, first) == [own[0], DayUsage("b", first, 1, 2.5, 6)]
    assert await store.usage("c", first, second) == []
