"""The cluster of one worker in this process."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from kinema.cluster.base import Cluster
from kinema.cluster.local import LocalCluster
from kinema.engines.base import Output
from kinema.engines.fake import FakeEngine
from kinema.errors import WorkerLost
from kinema.events import Cancelled, Completed
from kinema.request.request import GenerationRequest
from kinema.settings import WorkerSettings
from kinema.storage import Storage
from kinema.worker.worker import Worker
from tests.unit.worker.tasks import PATIENCE_S, collect, make_task


def make_worker(tmp_path: Path, engine: FakeEngine | None = None) -> Worker:
    storage = Storage(f"file://{tmp_path}")
    return Worker(engine or FakeEngine(), storage, WorkerSettings(max_active=1), worker_id="w1")


async def test_it_shows_its_worker_and_runs_tasks(tmp_path: Path) -> None:
    """Slots and readiness are the worker's own."""
    worker = make_worker(tmp_path)
    cluster: Cluster = LocalCluster(worker)
    (before,) = cluster.workers()
    assert (before.worker_id, before.is_ready, before.free_slots) == ("w1", False, 0)
    await worker.start()
    (ready,) = cluster.workers()
    assert (ready.is_ready, ready.free_slots, ready.capabilities.model) == (True, 1, "fake")
    assert isinstance((await collect(cluster.run("w1", make_task())))[-1], Completed)
    with pytest.raises(WorkerLost, match="w2"):
        cluster.run("w2", make_task())
    await worker.stop()
    with pytest.raises(WorkerLost):
        cluster.run("w1", make_task())


async def test_waiting_wakes_when_readiness_or_slots_change(tmp_path: Path) -> None:
    """Long before the time is up."""
    go_on = threading.Event()

    def on_output(_request: GenerationRequest, _output: Output) -> None:
        go_on.wait(PATIENCE_S)

    worker = make_worker(tmp_path, FakeEngine(on_output=on_output))
    cluster = LocalCluster(worker)
    async with asyncio.timeout(PATIENCE_S):
        waiting = asyncio.create_task(cluster.wait_for_change(1000.0))
        await asyncio.sleep(0)
        await worker.start()
        await waiting
        task = make_task()
        events = asyncio.create_task(collect(cluster.run("w1", task)))
        waiting = asyncio.create_task(cluster.wait_for_change(1000.0))
        await asyncio.sleep(0)
        await cluster.cancel(task.job_id, task.attempt)
        go_on.set()
        await waiting
        assert cluster.workers()[0].free_slots == 1
        assert (await events)[-1] == Cancelled()
        await worker.stop()


async def test_waiting_ends_when_the_time_is_up(tmp_path: Path) -> None:
    """Without an error."""
    await LocalCluster(make_worker(tmp_path)).wait_for_change(0.01)
