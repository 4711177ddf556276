"""A worker with the sglang engine, before a stand-in for the library: what its clients are told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kinema.events import Completed, Failed, Progress
from kinema.ids import new_job_id
from kinema.job import Task
from kinema.settings import WorkerSettings
from kinema.storage import Storage
from kinema.worker.worker import Worker
from tests.contract.engine import NUM_STEPS, request_for
from tests.contract.standins import engine_before_standin
from tests.unit.worker.tasks import collect


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[Worker]:
    """Ready, after its probe videos."""
    made = Worker(engine_before_standin(), Storage(f"file://{tmp_path}/files"), WorkerSettings(), "w1")
    await made.start()
    await made.probe()
    yield made
    await made.stop()


def task(worker: Worker, prompt: str) -> Task:
    return Task(job_id=new_job_id(), attempt=1, request=request_for(worker, prompt=prompt))


async def test_videos_end_as_the_library_ends_them_and_the_next_is_made(worker: Worker) -> None:
    """Made; of another size, with a warning; failed with the library's reason, also when its process died."""
    assert worker.free_slots == 1
    whole = await collect(worker.run(task(worker, "waves")))
    steps = [event.step for event in whole if isinstance(event, Progress) and event.stage == "denoise"]
    assert steps == [*range(1, NUM_STEPS + 1)]
    assert isinstance(whole[-1], Completed)
    assert whole[-1].warnings == ()
    smaller = (await collect(worker.run(task(worker, "[size]"))))[-1]
    assert isinstance(smaller, Completed)
    assert smaller.warnings == ("sglang made 9 frames of 96x48, not 9 frames of 96x64",)
    for prompt, reason in (("[error]", "the tensor is sad"), ("[die]", "SIGKILL")):
        failed = (await collect(worker.run(task(worker, prompt))))[-1]
        assert isinstance(failed, Failed)
        assert failed.code == "engine_failed"
        assert reason in failed.message
    assert isinstance((await collect(worker.run(task(worker, "waves"))))[-1], Completed)
