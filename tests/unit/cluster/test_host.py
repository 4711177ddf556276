"""A worker as handlers: what it takes and what it refuses, what it says of itself, and how it leaves."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from kinema import __version__
from kinema.cluster.transport import CANARY, CANCEL, INFO, RUN, Payload
from kinema.engines.base import Output
from kinema.engines.fake import FakeEngine
from kinema.errors import Drained, WorkerLost
from kinema.events import Cancelled, Completed, Progress, Started, event_adapter
from kinema.job import Task
from kinema.request.request import GenerationRequest
from kinema.worker.costs import CostModel
from tests.serving import Gate, until
from tests.unit.cluster.members import Cluster, Member, attempt, refused, running_cluster
from tests.unit.worker.tasks import make_task


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with running_cluster(tmp_path) as cluster:
        yield cluster


async def run(cluster: Cluster, member: Member, task: Task) -> list[object]:
    """Its events, as they came over the wire."""
    items = sent(cluster, member, task)
    return [event_adapter.validate_python(item["event"]) async for item in items]


async def call(cluster: Cluster, member: Member, endpoint: str, payload: Payload) -> AsyncIterator[Payload]:
    connection = await cluster.connection()
    async with aclosing(connection.call(member.served.instance, endpoint, payload)) as items:
        async for item in items:
            yield item


def sent(cluster: Cluster, member: Member, task: Task) -> AsyncIterator[Payload]:
    return call(cluster, member, RUN, {"task": task.model_dump(mode="json")})


async def test_a_task_becomes_its_events(cluster: Cluster) -> None:
    """From Started to the one that ends it."""
    member = await cluster.worker("w1")
    events = await run(cluster, member, make_task())
    assert events[0] == Started(worker_id="w1", attempt=1)
    assert {type(event) for event in events[1:-1]} == {Progress}
    assert isinstance(events[-1], Completed)


async def test_a_full_worker_refuses(cluster: Cluster) -> None:
    """At once, and takes the next when a slot is free."""
    gate = Gate()
    member = await cluster.worker("w1", FakeEngine(on_output=gate))
    first = asyncio.create_task(run(cluster, member, make_task()))
    await until(lambda: member.worker.tasks)
    assert "takes no more" in await refused(sent(cluster, member, make_task()))
    gate.is_open.set()
    await first
    assert isinstance((await run(cluster, member, make_task()))[-1], Completed)


async def test_an_attempt_is_taken_once(cluster: Cluster) -> None:
    """A call that comes twice starts nothing, neither while the first runs nor after it; nor does an older one."""
    gate = Gate()
    member = await cluster.worker("w1", FakeEngine(on_output=gate), max_active=3)
    second = attempt(make_task(), 2)
    first = asyncio.create_task(run(cluster, member, second))
    await until(lambda: member.worker.tasks)
    for _ in range(2):
        for number in (2, 1):
            assert f"attempt {number} of" in await refused(sent(cluster, member, attempt(second, number)))
        assert len(member.worker.tasks) <= 1
        gate.is_open.set()
        assert isinstance((await first)[-1], Completed)


async def test_a_newer_attempt_ends_the_older_one(cluster: Cluster) -> None:
    """It begins when the older one has ended, also with a single slot, and goes on where that one stood."""
    gate = Gate()
    member = await cluster.worker("w1", FakeEngine(on_output=gate))
    task = make_task()
    older = asyncio.create_task(run(cluster, member, task))
    await until(gate.has_arrived.is_set)
    newer = asyncio.create_task(run(cluster, member, attempt(task, 2)))
    newest = asyncio.create_task(run(cluster, member, attempt(task, 3)))
    await until(lambda: len(member.served.calls) == 3)
    assert member.worker.tasks == [task]
    gate.is_open.set()
    assert (await older)[-1] == Cancelled()
    events = await newest
    assert isinstance(events[-1], Completed)
    assert next(event.step for event in events if isinstance(event, Progress)) == 2
    with pytest.raises(Exception, match="a newer attempt"):
        await newer


async def test_a_cancel_ends_the_events_after_the_step_that_runs(cluster: Cluster) -> None:
    """With Cancelled; a job that does not run here is nothing, and another attempt of the job is not this one."""
    steps: list[Output] = []
    is_asked = threading.Event()

    def on_output(_request: GenerationRequest, output: Output) -> None:
        steps.append(output)
        is_asked.wait(20)

    member = await cluster.worker("w1", FakeEngine(on_output=on_output))
    task = attempt(make_task(), 2)
    running = asyncio.create_task(run(cluster, member, task))
    await until(lambda: steps)
    for job_id, number in (("video_of_somebody_else", 2), (task.job_id, 1), (task.job_id, 3)):
        payload = {"job_id": job_id, "attempt": number}
        assert [item async for item in call(cluster, member, CANCEL, payload)] == [{}]
        assert not any(one.is_cancelled for one in member.worker._generations.values())
    payload = {"job_id": task.job_id, "attempt": 2}
    assert [item async for item in call(cluster, member, CANCEL, payload)] == [{}]
    is_asked.set()
    assert (await running)[-1] == Cancelled()
    assert len(steps) == 1


async def test_a_caller_that_goes_away_ends_its_generation(cluster: Cluster) -> None:
    """Nobody would take the video."""
    gate = Gate()
    member = await cluster.worker("w1", FakeEngine(on_output=gate))
    running = asyncio.create_task(run(cluster, member, make_task()))
    await until(gate.has_arrived.is_set)
    running.cancel()
    gate.is_open.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    await until(lambda: not member.worker.tasks)


async def test_it_says_what_it_is_and_every_change(cluster: Cluster) -> None:
    """Slots, readiness, what runs and what is left of it."""
    gate = Gate()
    member = await cluster.worker("w1", FakeEngine(on_output=gate))
    said = call(cluster, member, INFO, {})
    first = await anext(said)
    assert first == {
        "worker_id": "w1",
        "capabilities": FakeEngine().capabilities.model_dump(mode="json"),
        "free_slots": 1,
        "max_active": 1,
        "is_ready": True,
        "predicted_work": 0,
        "has_suspect": False,
        "running": [],
        "device": "cpu",
        "memory": None,
        "num_parked": 0,
        "num_resumed": 0,
        "loras_in_memory": [],
        "costs": CostModel(FakeEngine().capabilities.geometry).told(),
        "version": __version__,
        "host": first["host"],
        "pid": os.getpid(),
    }
    task = make_task()
    running = asyncio.create_task(run(cluster, member, task))
    busy = await anext(said)
    assert (busy["free_slots"], busy["predicted_work"]) == (0, task.request.work)
    assert busy["running"] == [[task.job_id, 1]]
    gate.is_open.set()
    await running
    after = [item async for item in until_idle(said)]
    assert all(item["predicted_work"] < task.request.work for item in after)
    member.worker.retire()
    assert (await anext(said))["is_ready"] is False
    await said.aclose()  # type: ignore[attr-defined]


async def until_idle(said: AsyncIterator[Payload]) -> AsyncIterator[Payload]:
    async for item in said:
        yield item
        if item["free_slots"] == 1:
            return


async def test_it_does_not_speak_more_often_than_anybody_needs(cluster: Cluster) -> None:
    """Twenty times a second at most, and the last word is the true one."""
    member = await cluster.worker("w1")
    heard: list[Payload] = []

    async def listen() -> None:
        async for item in call(cluster, member, INFO, {}):
            heard.append(item)  # noqa: PERF401 - it is looked at meanwhile

    began = asyncio.get_running_loop().time()
    listening = asyncio.create_task(listen())
    for _ in range(30):
        await run(cluster, member, make_task(num_inference_steps=1, num_frames=1))
    await until(lambda: heard[-1]["free_slots"] == 1)
    assert len(heard) <= 2 + (asyncio.get_running_loop().time() - began) / 0.05
    listening.cancel()


async def test_a_drain_finishes_what_runs_and_takes_no_more(cluster: Cluster) -> None:
    """It returns when the last one is done, long before its time."""
    gate = Gate()
    member = await cluster.worker("w1", FakeEngine(on_output=gate), max_active=2)
    running = asyncio.create_task(run(cluster, member, make_task()))
    await until(gate.has_arrived.is_set)
    draining = asyncio.create_task(member.host.drain(1000))
    await until(lambda: not member.worker.is_ready)
    assert "takes no more" in await refused(sent(cluster, member, make_task()))
    gate.is_open.set()
    assert isinstance((await running)[-1], Completed)
    await draining


@pytest.mark.parametrize("is_hurried", [False, True])
async def test_what_is_not_finished_is_given_back(
    cluster: Cluster, is_hurried: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the time of the drain is up, or nobody wants to wait for it; at once, whatever the device is at."""
    monkeypatch.setattr("kinema.worker.worker.GIVE_BACK_S", 0.05)
    gate = Gate()
    member = await cluster.worker("w1", FakeEngine(on_output=gate))
    running = asyncio.create_task(run(cluster, member, make_task()))
    await until(gate.has_arrived.is_set)
    draining = asyncio.create_task(member.host.drain(1000 if is_hurried else 0.01))
    await until(lambda: not member.worker.is_ready)
    if is_hurried:
        draining.cancel()
    with pytest.raises(Drained):
        await running
    await asyncio.wait({draining})
    gate.is_open.set()


async def test_a_device_that_dies_is_said(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ran is lost, the canary fails, and nothing more is taken."""
    monkeypatch.setattr(threading, "excepthook", lambda _died: None)

    def die(_request: GenerationRequest, _output: Output) -> None:
        raise SystemExit

    member = await cluster.worker("w1", FakeEngine(on_output=die))
    assert [item async for item in call(cluster, member, CANARY, {})] == [{}]
    with pytest.raises(WorkerLost):
        await run(cluster, member, make_task())
    await until(lambda: member.worker.is_lost)
    with pytest.raises(WorkerLost, match="device"):
        await anext(call(cluster, member, CANARY, {}))
    assert "takes no more" in await refused(sent(cluster, member, make_task()))


async def test_the_canary_does_not_wait_for_the_device(cluster: Cluster) -> None:
    """A device that is busy with a long step is well."""
    gate = Gate()
    member = await cluster.worker("w1", FakeEngine(on_output=gate))
    running = asyncio.create_task(run(cluster, member, make_task()))
    await until(gate.has_arrived.is_set)
    assert [item async for item in call(cluster, member, CANARY, {})] == [{}]
    gate.is_open.set()
    await running
