"""What a dispatcher may rely on, whichever cluster it has: the same tests over each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kinema.cluster.base import Cluster
from kinema.cluster.local import LocalCluster
from kinema.engines.fake import FakeEngine
from kinema.errors import NoWorker, WorkerLost
from kinema.events import Cancelled, Completed, Started
from kinema.worker.worker import Worker
from tests.serving import Gate, until
from tests.unit.cluster.members import all_of, running_cluster, until_ready
from tests.unit.worker.tasks import make_task
from tests.unit.worker.test_live import Doors, num_pictures

Start = Callable[..., Coroutine[None, None, tuple[Cluster, Worker]]]


@asynccontextmanager
async def starter(kind: str, folder: Path) -> AsyncIterator[Start]:
    async with running_cluster(folder) as cluster:

        async def start(engine: FakeEngine | None = None, *, max_active: int = 1) -> tuple[Cluster, Worker]:
            member = await cluster.worker("w1", engine, max_active=max_active)
            if kind == "local":
                return LocalCluster(member.worker), member.worker
            frontend = await cluster.frontend()
            await until_ready(frontend, "w1")
            return frontend, member.worker

        yield start


@pytest.fixture(params=["local", "remote"])
async def start(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Start]:
    async with starter(request.param, tmp_path) as start:
        yield start


async def test_it_shows_its_worker(start: Start) -> None:
    """All that is known of it."""
    cluster, worker = await start(max_active=3)
    (info,) = cluster.workers()
    assert (info.worker_id, info.capabilities) == ("w1", worker.capabilities)
    assert (info.free_slots, info.is_ready, info.predicted_work, info.device) == (3, True, 0, "cpu")
    assert cluster.known_models() in (("fake",), ["fake"])


async def test_aliases_are_known(start: Start) -> None:
    """As what the worker offers, and as what it may offer again."""
    cluster, _ = await start(FakeEngine("model", aliases=["old"]))
    (info,) = cluster.workers()
    assert info.capabilities.names == ("model", "old")
    assert sorted(cluster.known_models()) == ["model", "old"]


async def test_events_begin_with_started_and_end_once(start: Start) -> None:
    """With the attempt that was sent."""
    cluster, _ = await start()
    task = make_task().model_copy(update={"attempt": 7})
    events = await all_of(cluster.run("w1", task))
    assert events[0] == Started(worker_id="w1", attempt=7)
    assert [isinstance(event, Completed) for event in events] == [False] * (len(events) - 1) + [True]


async def test_a_full_worker_has_no_slot_and_takes_no_task(start: Start) -> None:
    """From the call on that took the last one."""
    gate = Gate()
    cluster, _ = await start(FakeEngine(on_output=gate))
    task = make_task()
    stream = cluster.run("w1", task)
    (info,) = cluster.workers()
    assert (info.free_slots, info.predicted_work) == (0, task.request.work)
    with pytest.raises(NoWorker):
        cluster.run("w1", make_task())
    gate.is_open.set()
    await all_of(stream)
    await until(lambda: cluster.workers()[0].free_slots == 1)


async def test_a_cancel_ends_the_events(start: Start) -> None:
    """With Cancelled, and the slot is free for the next."""
    gate = Gate()
    cluster, worker = await start(FakeEngine(on_output=gate))
    task = make_task()
    running = asyncio.create_task(all_of(cluster.run("w1", task)))
    await until(gate.has_arrived.is_set)
    for attempt in (task.attempt - 1, task.attempt + 1):  # of a frontend that has lost the job, or has it now
        await cluster.cancel(task.job_id, attempt)
    assert not any(one.is_cancelled for one in worker._generations.values())
    await cluster.cancel(task.job_id, task.attempt)
    await until(lambda: worker._generations and all(one.is_cancelled for one in worker._generations.values()))
    gate.is_open.set()
    assert (await running)[-1] == Cancelled()
    await until(lambda: cluster.workers()[0].free_slots == 1)
    assert isinstance((await all_of(cluster.run("w1", make_task())))[-1], Completed)


async def test_a_worker_that_stops_is_lost(start: Start) -> None:
    """So is what it ran."""
    gate = Gate()
    cluster, worker = await start(FakeEngine(on_output=gate))
    running = asyncio.create_task(all_of(cluster.run("w1", make_task())))
    await until(gate.has_arrived.is_set)
    stopping = asyncio.create_task(worker.stop())
    await until(lambda: not worker.is_ready)
    gate.is_open.set()
    with pytest.raises(WorkerLost):
        await running
    await stopping
    await until(lambda: not cluster.workers()[0].is_ready)


async def test_a_video_is_watched_while_it_is_made(start: Start) -> None:
    """From the first frame, by two; one who leaves ends nothing, and the other gets all of it."""
    doors = Doors()
    cluster, worker = await start(FakeEngine(on_output=doors))
    task = make_task()
    running = asyncio.create_task(all_of(cluster.run("w1", task)))
    await until(lambda: worker.tasks)
    first, second = (cluster.live("w1", task.job_id, task.attempt) for _ in range(2))
    heads = [asyncio.ensure_future(anext(video)) for video in (first, second)]
    await until(lambda: all(one.live._num_viewers == 2 for one in worker._generations.values()))
    doors.let_through(1)
    head, other = await asyncio.gather(*heads)
    assert head == other
    await second.aclose()
    await until(lambda: all(one.live._num_viewers == 1 for one in worker._generations.values()))
    doors.let_through(2)
    film = head + await watched(first)
    assert num_pictures(film) == 9
    assert isinstance((await running)[-1], Completed)


async def test_a_video_that_breaks_off_is_not_whole(start: Start) -> None:
    """Whoever watches it hears that, and so does who asks for one that is not made there."""
    doors = Doors()
    cluster, worker = await start(FakeEngine(on_output=doors))
    task = make_task()
    running = asyncio.create_task(all_of(cluster.run("w1", task)))
    await until(lambda: worker.tasks)
    video = cluster.live("w1", task.job_id, task.attempt)
    head = asyncio.ensure_future(anext(video))
    await until(lambda: all(one.live._num_viewers == 1 for one in worker._generations.values()))
    doors.let_through(1)
    assert await head
    await worker.cancel(task.job_id, task.attempt)
    doors.let_through(1)
    with pytest.raises(WorkerLost):
        await watched(video)
    await running
    for worker_id in ("w1", "another"):
        with pytest.raises(WorkerLost):
            await watched(cluster.live(worker_id, task.job_id, task.attempt))


async def watched(video: AsyncGenerator[bytes, None]) -> bytes:
    return b"".join([data async for data in video])
