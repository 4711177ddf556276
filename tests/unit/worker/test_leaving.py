"""A worker that ends: as it was told to, with what it runs finished or given back, or because its device is gone."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from kinema.engines.base import Output, Step
from kinema.engines.fake import FakeEngine
from kinema.errors import Drained, WorkerLost
from kinema.events import Completed
from kinema.request.request import GenerationRequest
from kinema.settings import WorkerSettings
from kinema.storage import Storage
from kinema.worker.worker import Worker
from tests.serving import Gate, until
from tests.unit.worker.tasks import collect, make_task


async def started(folder: Path, engine: FakeEngine, **settings: float) -> Worker:
    worker = Worker(engine, Storage(f"file://{folder}"), WorkerSettings.model_validate(settings), worker_id="w1")
    await worker.start()
    return worker


async def test_what_is_left_to_do_shrinks_with_every_step(tmp_path: Path) -> None:
    """From the whole work of a task to none, over all that run."""
    seen: list[float] = []
    worker = await started(tmp_path, FakeEngine(on_output=lambda _request, _output: seen.append(worker.predicted_work)))
    task = make_task()
    stream = worker.run(task)
    assert worker.tasks == [task]
    assert worker.predicted_work == task.request.work
    await collect(stream)
    assert (list(worker.tasks), worker.predicted_work) == ([], 0)
    assert seen == sorted(seen, reverse=True)
    assert seen[0] == task.request.work
    denoising = task.request.work - task.request.decoding_work
    assert seen[1] == pytest.approx(task.request.work - denoising / 3)
    await worker.stop()


async def test_a_retired_worker_finishes_what_runs(tmp_path: Path) -> None:
    """And admits nothing."""
    gate = Gate()
    worker = await started(tmp_path, FakeEngine(on_output=gate))
    stream = worker.run(make_task())
    worker.retire()
    assert (worker.is_ready, worker.free_slots) == (False, 0)
    with pytest.raises(WorkerLost):
        worker.run(make_task())
    gate.is_open.set()
    assert isinstance((await collect(stream))[-1], Completed)
    await worker.stop()
    assert not worker.is_lost


@pytest.mark.parametrize(("reason", "waits_s"), [(Drained, 0.05), (WorkerLost, 1000)])
async def test_what_is_given_back_is_told_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: type[Drained | WorkerLost], waits_s: float
) -> None:
    """While the device is still in a step: after a moment, or at once when that is why.

    Later its checkpoint is in storage, of one that had no step nothing, and the worker can be stopped.
    """
    monkeypatch.setattr("kinema.worker.worker.GIVE_BACK_S", waits_s)
    gate = Gate()
    worker = await started(tmp_path, FakeEngine(on_output=gate))
    streams = [asyncio.create_task(collect(worker.run(make_task()))) for _ in range(2)]
    await until(gate.has_arrived.is_set)
    worker.give_back(reason())
    for stream in streams:
        with pytest.raises(reason):
            await stream
    assert worker.tasks  # at least that of the step
    gate.is_open.set()
    await until(lambda: not worker.tasks)
    found = await asyncio.to_thread(lambda: [path.name for path in tmp_path.rglob("*") if path.is_file()])
    assert found == ["checkpoint"]
    await worker.stop()


async def test_a_device_thread_that_dies_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ran is lost, and so is the worker."""
    monkeypatch.setattr(threading, "excepthook", lambda _died: None)

    def die(_request: GenerationRequest, _output: Output) -> None:
        raise SystemExit

    worker = await started(tmp_path, FakeEngine(on_output=die))
    with pytest.raises(WorkerLost):
        await collect(worker.run(make_task()))
    await until(lambda: worker.is_lost)
    assert not worker.is_ready
    await worker.stop()


async def test_a_step_that_never_ends_is_noticed(tmp_path: Path) -> None:
    """When it has taken longer than any step may; a long time between steps is nothing."""
    gate = Gate()

    def hold_second(request: GenerationRequest, output: Output) -> None:
        if output == Step(2, 3):
            gate(request, output)

    worker = await started(tmp_path, FakeEngine(on_output=hold_second), max_step_s=0.05)
    assert not worker.is_lost
    stream = asyncio.create_task(collect(worker.run(make_task())))
    await until(gate.has_arrived.is_set)
    await until(lambda: worker.is_lost)
    gate.is_open.set()
    await stream
    assert not worker.is_lost
    await worker.stop()
