"""Who uses an input and what a key has stored; on PostgreSQL by tests/integration/jobs/test_input_store_postgres.py."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence

import pytest
from sqlalchemy import delete

from kinema.errors import QuotaExceeded, StorageUnavailable
from kinema.events import Artifact, Cancelled, Completed, Failed
from kinema.ids import JobId, new_job_id
from kinema.job import Job
from kinema.jobs.retention import SqlRetention
from kinema.jobs.schema import jobs
from kinema.jobs.sql import SqlJobStore
from kinema.jobs.store import QueueLimits
from kinema.storage import input_key
from tests.serving import REQUEST, make_job
from tests.unit.jobs.test_sql import COMPLETED, Clock

A, B = "a" * 64, "b" * 64


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def store(store_url: str, clock: Clock) -> AsyncIterator[SqlJobStore]:
    store = await SqlJobStore.open(store_url, clock)
    yield store
    await store.close()


async def submit(store: SqlJobStore, sizes: Mapping[str, int], key_id: str = "", max_bytes: int | None = None) -> Job:
    """A job that uses the inputs of these digests."""
    job_id = new_job_id()
    held = await store.inputs.hold(job_id, key_id, sizes, max_bytes)
    keys = dict(zip(("image_key", "continues_key"), (input_key(one.name) for one in held.values()), strict=False))
    job = make_job(id=job_id, key_id=key_id, request=REQUEST.model_copy(update=keys))
    return await store.create(job, limits=QueueLimits(max_stored_bytes=max_bytes))


async def end(store: SqlJobStore, job: Job, *last: Completed | Cancelled | Failed) -> None:
    assert await store.claim(["fake"], "a", 60) is not None
    assert await store.record(job.id, *last, attempt=1)


async def stored(store: SqlJobStore, key_id: str = "") -> int:
    return await store.inputs.stored_bytes(key_id)


async def dropped(store: SqlJobStore) -> Sequence[str]:
    return await store.inputs.dropped(100)


async def test_a_job_may_use_one_file_in_two_places(store: SqlJobStore) -> None:
    """The same picture as first and last frame: it is counted once, and goes with the job."""
    job_id = new_job_id()
    held = (await store.inputs.hold(job_id, "", {A: 5}))[A]
    keys = dict.fromkeys(("image_key", "last_frame_key"), input_key(held.name))
    await store.create(make_job(id=job_id, request=REQUEST.model_copy(update=keys)), limits=QueueLimits())
    assert await stored(store) == 5
    await store.delete(job_id)
    assert (await stored(store), await dropped(store)) == (0, [held.name])


async def test_the_same_input_is_one_file_for_a_key(store: SqlJobStore) -> None:
    """It is counted once, and dropped with its last job; a new job after that gets another file."""
    first, second = await submit(store, {A: 5}), await submit(store, {A: 5})
    assert first.request.image_key == second.request.image_key
    assert await stored(store) == 5
    await store.delete(first.id)
    assert (await stored(store), await dropped(store)) == (5, [])
    await store.request_cancel(second.id)
    assert await stored(store) == 0
    names = await dropped(store)
    assert [input_key(name) for name in names] == [first.request.image_key]
    third = await submit(store, {A: 5})
    assert third.request.image_key != first.request.image_key
    await store.inputs.forget([*names, str(third.request.image_key).rpartition("/")[2]])
    assert await dropped(store) == []
    assert await stored(store) == 5


async def test_an_input_is_stored_once_its_first_job_exists(store: SqlJobStore) -> None:
    """Until then a second submission stores it too: the first one may have died before it did."""
    one, other, third = new_job_id(), new_job_id(), new_job_id()
    assert [held.is_stored for held in (await store.inputs.hold(one, "", {A: 5})).values()] == [False]
    held = (await store.inputs.hold(other, "", {A: 5}))[A]
    assert not held.is_stored
    request = REQUEST.model_copy(update={"edits_key": input_key(held.name)})
    await store.create(make_job(id=other, request=request), limits=QueueLimits())
    assert (await store.inputs.hold(third, "", {A: 5}))[A].is_stored


async def test_keys_do_not_share_inputs(store: SqlJobStore) -> None:
    """One key's file, bytes and deletions are not the other's."""
    mine, yours = await submit(store, {A: 5}, "mine"), await submit(store, {A: 5}, "yours")
    assert mine.request.image_key != yours.request.image_key
    await store.delete(mine.id)
    assert [await stored(store, key_id) for key_id in ("mine", "yours")] == [0, 5]
    assert [input_key(name) for name in await dropped(store)] == [mine.request.image_key]


@pytest.mark.parametrize("last", [COMPLETED, Failed(code="x", message="x")])
async def test_a_job_that_ended_keeps_its_inputs(store: SqlJobStore, last: Completed | Failed) -> None:
    """A remix uses them. They go with the job, and its video with them, also when it expires."""
    for leave in (lambda job: store.delete(job.id), lambda job: SqlRetention(store.database).forget([job.id])):
        job = await submit(store, {A: 5, B: 7})
        await end(store, job, last)
        made = 6 if last is COMPLETED else 0
        assert (await stored(store), await dropped(store)) == (12 + made, [])
        await leave(job)
        names = await dropped(store)
        assert (await stored(store), len(names)) == (0, 2)
        await store.inputs.forget(names)


async def test_the_inputs_of_a_cancelled_job_go_at_once(store: SqlJobStore) -> None:
    """From the queue, from a worker, and from a worker that gives it back."""
    waiting = await submit(store, {A: 5})
    await store.request_cancel(waiting.id)
    running = await submit(store, {A: 5})
    await store.claim(["fake"], "a", 60)
    await store.request_cancel(running.id)
    assert await stored(store) == 5
    await store.record(running.id, Cancelled(), attempt=1)
    assert await stored(store) == 0
    given_back = await submit(store, {A: 5})
    await store.claim(["fake"], "a", 60)
    await store.request_cancel(given_back.id)
    await store.give_back("a", given_back.id, is_lost=False)
    assert (await stored(store), len(await dropped(store))) == (0, 3)


async def test_a_manifest_and_all_other_files_of_a_video_count(store: SqlJobStore) -> None:
    """And are given back with it."""
    manifest = Artifact(key="m", media_type="application/json", size_bytes=100, etag="h")
    artifact = COMPLETED.artifact.model_copy(update={"manifest": manifest})
    job = await submit(store, {})
    await end(store, job, COMPLETED.model_copy(update={"artifact": artifact}))
    assert await stored(store) == 106
    await store.delete(job.id)
    assert await stored(store) == 0


async def test_a_key_beyond_its_quota_is_refused_before_anything_is_held(store: SqlJobStore) -> None:
    """An input that is there costs nothing; another key has its own quota; videos count."""
    first = await submit(store, {A: 60}, "k", max_bytes=100)
    await submit(store, {A: 60}, "k", max_bytes=100)
    with pytest.raises(QuotaExceeded, match="delete videos"):
        await submit(store, {B: 41}, "k", max_bytes=100)
    assert (await stored(store, "k"), await dropped(store)) == (60, [])
    await submit(store, {B: 40}, "k", max_bytes=100)
    await submit(store, {B: 41}, "other", max_bytes=100)
    await end(store, first, COMPLETED)
    with pytest.raises(QuotaExceeded):  # without inputs, too
        await submit(store, {}, "k", max_bytes=100)


async def test_a_refused_job_takes_nothing_over(store: SqlJobStore) -> None:
    """What was held for it can be given up, and then no job can come of it any more."""
    job_id = new_job_id()
    held = (await store.inputs.hold(job_id, "", {A: 5}))[A]
    await store.inputs.let_go(job_id, "")
    assert (await stored(store), await dropped(store)) == (0, [held.name])
    job = make_job(id=job_id, request=REQUEST.model_copy(update={"image_key": input_key(held.name)}))
    with pytest.raises(StorageUnavailable, match="send the request again"):
        await store.create(job, limits=QueueLimits())
    assert await store.count_waiting() == 0


async def test_a_job_keeps_what_it_has_taken_over(store: SqlJobStore) -> None:
    """Whoever gives up its submission, cut short in the moment of its end, takes nothing from it."""
    job = await submit(store, {A: 5})
    await store.inputs.let_go(job.id, "")
    assert (await stored(store), await dropped(store)) == (5, [])


async def test_the_uses_of_jobs_that_do_not_exist_end(store: SqlJobStore) -> None:
    """Not those of other jobs, and not what a submission holds for a job that is to come."""
    gone, there = await submit(store, {A: 5, B: 7}), await submit(store, {A: 5})
    coming = new_job_id()
    held = await store.inputs.hold(coming, "", {"c" * 64: 11})
    await store.database.write(lambda connection: connection.execute(delete(jobs).where(jobs.c.id == gone.id)))
    assert [await store.inputs.let_go_of_gone_jobs() for _ in range(2)] == [1, 0]
    names = {key: str(key).rpartition("/")[2] for key in gone.request.input_keys}
    (only_gone,) = await dropped(store)
    assert names[gone.request.continues_key] == only_gone
    assert await stored(store) == 16
    assert await store.inputs.users() == {
        names[gone.request.image_key]: {there.id},
        only_gone: set(),
        held["c" * 64].name: {coming},
    }


async def test_what_a_dead_server_held_is_given_up_later(store: SqlJobStore, clock: Clock) -> None:
    """Not what a living one holds, and never what a job uses."""
    old = (await store.inputs.hold(JobId("gone"), "", {A: 5}))[A]
    job = await submit(store, {B: 7})
    clock.now += 100
    await store.inputs.hold(JobId("here"), "", {"c" * 64: 11})
    assert await store.inputs.let_go_held_before(clock.now) == 1
    assert (await stored(store), await dropped(store)) == (18, [old.name])
    assert await store.get(job.id) == job
