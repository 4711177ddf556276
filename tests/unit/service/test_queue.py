"""What is foretold from the videos that were made last."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, permutations
from typing import Any

import pytest

from kinema.bench.recorded import recorded_costs, simulated_request
from kinema.cluster.base import WorkerInfo
from kinema.engines.fake import FakeEngine
from kinema.events import Artifact, Completed, Started, Timings
from kinema.job import Job
from kinema.jobs.sql import SqlJobStore
from kinema.jobs.store import ActiveJob, QueueLimits
from kinema.request.request import GenerationRequest
from kinema.service.queue import ModelSpeed, QueueView
from kinema.worker.costs import CostModel, Done
from tests.serving import REQUEST, make_job


def test_a_kind_of_video_that_was_made_takes_as_long_as_it_did() -> None:
    """Short ones have their own cost, which their work does not show; one slow run is not the rule."""
    speed = ModelSpeed([(1.0, 1.1), (1.0, 1.0), (1.0, 9.0), (10.0, 4.0)])
    assert speed.seconds(1.0) == 1.1
    assert speed.seconds(10.0) == 4.0


def test_a_new_kind_of_video_is_read_off_the_line() -> None:
    """Between two that were made, and beyond them."""
    speed = ModelSpeed([(1.0, 1.3), (10.0, 4.0)])
    assert speed.seconds(5.0) == pytest.approx(2.5, rel=0.1)
    assert speed.seconds(100.0) == pytest.approx(31.0, rel=0.1)


def test_one_kind_alone_tells_of_others_by_their_work() -> None:
    """Twice the work, twice the time."""
    assert ModelSpeed([(3.0, 6.0)]).seconds(6.0) == pytest.approx(12.0)
    assert ModelSpeed([(3.0, 6.0), (1.0, 0.0)]).per_work == 1.5


# Sizes, lengths and steps of one model on one device.
_SHAPES = (
    {"size": "832x480", "num_frames": 17, "num_inference_steps": 4},
    {"size": "832x480", "num_frames": 81, "num_inference_steps": 50},
    {"size": "480x832", "num_frames": 33, "num_inference_steps": 20},
    {"size": "1280x720", "num_frames": 17, "num_inference_steps": 8},
    {"size": "640x384", "num_frames": 49, "num_inference_steps": 30},
    {"size": "320x192", "num_frames": 5, "num_inference_steps": 2},
)
_COMPILING_S, _RECORDING_S = 20.0, 3.0


class Device:
    """A worker's device: it compiles at its first turn, records the second step of a shape, and makes its decoder ready
    with the first frame of another size. Turns differ a little."""

    def __init__(self) -> None:
        self.costs = CostModel()
        self._truth = recorded_costs()
        self._steps: Counter[tuple[object, ...]] = Counter()
        self._decodes: object = None
        self._num_turns = 0
        for steps in (1, 3):  # the trial videos of a worker's start
            trial = {"size": "256x256", "num_frames": 9, "num_inference_steps": steps, "guidance_scale": 5.0}
            self.film(simulated_request(trial))

    def film(self, request: GenerationRequest) -> float:
        """Make a film, from whose turns the costs learn. Returns the seconds that it takes when all is ready."""
        steps, chunks = request.num_denoising_steps, request.geometry.num_chunks(request.num_frames)
        states = [Done(step > 0, step) for step in range(steps)]
        states += [Done(True, steps, chunk) for chunk in range(chunks + 1)]
        needed_s = 0.0
        for before, after in pairwise(states):
            self._num_turns += 1
            seconds = self._truth.next_turn_s(request, before) * (0.98 + 0.01 * (self._num_turns % 5))
            self.costs.observe(request, before, after, seconds + self._preparing_s(request, before))
            needed_s += seconds
        return needed_s

    def _preparing_s(self, request: GenerationRequest, before: Done) -> float:
        spent_s = _COMPILING_S if self._num_turns == 1 else 0.0
        if before.steps < request.num_denoising_steps:
            shape = (request.size, request.num_frames, request.num_passes)
            self._steps[shape] += 1
            spent_s += _RECORDING_S if self._steps[shape] == 2 else 0.0
        elif request.size != self._decodes:
            self._decodes = request.size
            spent_s += _RECORDING_S
        return spent_s


@pytest.mark.parametrize("number", range(len(_SHAPES)))
def test_a_shape_that_was_never_made_is_foretold_by_any_three_others(number: int) -> None:
    """Within a quarter, from what one worker says of its turns."""
    requests = [simulated_request({**shape, "guidance_scale": 5.0}) for shape in _SHAPES]
    asked = requests.pop(number)
    takes_s = Device().film(asked)
    for made in permutations(requests, 3):
        device = Device()
        times = [(request.work, device.film(request)) for request in made]
        speed = ModelSpeed(times, [CostModel.from_json(json.loads(json.dumps(device.costs.told())))])
        speed.learn(asked)
        assert speed.seconds(asked.work) == pytest.approx(takes_s, rel=0.25), [str(one.size) for one in made]


class Workers:
    """A cluster of workers with a free slot."""

    def __init__(self, *engines: FakeEngine) -> None:
        self._engines = engines

    def workers(self) -> Sequence[WorkerInfo]:
        return [WorkerInfo(str(number), it.capabilities, 1, is_ready=True) for number, it in enumerate(self._engines)]


async def submit(store: SqlJobStore, model: str) -> Job:
    return await store.create(
        make_job(request=REQUEST.model_copy(update={"model": model})), limits=QueueLimits(max_queued=9)
    )


async def make(store: SqlJobStore, model: str, seconds: float) -> None:
    """A video of the model that was made in this time."""
    job = await submit(store, model)
    assert await store.claim([model], "one", 60) is not None
    times = Timings(denoise_s=seconds, decode_s=0.0, total_s=seconds, device_s=seconds)
    artifact = Artifact(key="k", media_type="video/mp4", size_bytes=3, etag="e")
    assert await store.record(
        job.id, Started(worker_id="w", attempt=1), Completed(artifact=artifact, timings=times), attempt=1
    )


async def test_a_job_that_waits_under_an_alias_is_foretold_as_one_of_the_model() -> None:
    """By the videos of the model; before it has any, by those that were made under the alias."""
    store = await SqlJobStore.open("sqlite://")
    cluster: Any = Workers(FakeEngine("new", aliases=["old", "other"]), FakeEngine("other"))
    await make(store, "old", 4.0)
    first, second = await submit(store, "old"), await submit(store, "new")
    stranger = await submit(store, "other")
    seen = await QueueView(store, cluster).outlooks()
    assert [(seen[job.id].queue_position, seen[job.id].eta_s) for job in (first, second)] == [(1, 4.0), (2, 8.0)]
    assert (seen[stranger.id].queue_position, seen[stranger.id].eta_s) == (1, None)
    view = QueueView(store, cluster)
    assert (await view.estimate(second.request)).eta_s == 12.0
    await store.close()


async def test_a_long_queue_is_foretold_like_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that wait, and a request to come: it is not played for each who asks."""
    store = await SqlJobStore.open("sqlite://")
    cluster: Any = Workers(FakeEngine("fake"))
    await make(store, "fake", 4.0)
    jobs = [await submit(store, "fake") for _ in range(5)]
    short = QueueView(store, cluster)
    expected = await short.outlooks(), await short.estimate(REQUEST), await short.estimate(REQUEST, "new")
    assert expected[1].eta_s == 24.0
    monkeypatch.setattr("kinema.service.queue._PLAYED_AT_ONCE", 3)
    long = QueueView(store, cluster)
    assert await long.outlooks() == expected[0]
    assert (await long.estimate(REQUEST)).eta_s == 24.0
    newcomer = expected[2].eta_s
    assert newcomer is not None
    assert (await long.estimate(REQUEST, "new")).eta_s == pytest.approx(newcomer, abs=4.0)
    assert (await long.outlook(jobs[4])).eta_s == 20.0
    await store.close()


async def test_the_times_of_the_model_itself_come_first() -> None:
    store = await SqlJobStore.open("sqlite://")
    for model, seconds in (("old", 4.0), ("new", 2.0)):
        await make(store, model, seconds)
    job = await submit(store, "old")
    cluster: Any = Workers(FakeEngine("new", aliases=["old"]))
    assert (await QueueView(store, cluster).outlook(job)).eta_s == 2.0
    await store.close()


async def test_what_the_workers_say_comes_before_what_took_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A video of the same shape took longer, because it was the first; also for jobs that wait, and by one worker's
    words that make no sense the queue is not stopped."""
    store = await SqlJobStore.open("sqlite://")
    await make(store, "fake", 9.0)
    costs = CostModel()
    begun = Done(is_begun=True, steps=1)
    for before, after, seconds in (
        (Done(), begun, 8.0),
        (begun, Done(is_begun=True, steps=2), 0.5),
        (Done(is_begun=True, steps=2), Done(is_begun=True, steps=2, chunks=1), 0.25),
        (Done(is_begun=True, steps=2, chunks=1), Done(is_begun=True, steps=2, chunks=2), 0.25),
        (Done(), begun, 0.5),
    ):
        costs.observe(REQUEST, before, after, seconds)
    workers: Any = Workers(FakeEngine("fake"), FakeEngine("fake"))
    told = iter([{"step": "soon"}, costs.told()])
    infos = [replace(info, costs=next(told)) for info in workers.workers()]
    monkeypatch.setattr(workers, "workers", lambda: infos)
    job = await submit(store, "fake")
    view = QueueView(store, workers)
    assert (await view.estimate(REQUEST)).device_s == 1.5
    assert (await view.outlook(job)).eta_s == 1.5
    await store.close()


async def test_nobody_waits_until_a_long_queue_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The outlook is the one of a moment ago, until it was read; a short queue is waited for."""
    for name, value in (("_PLAYED_AT_ONCE", 3), ("_FRESH_S", 0.0), ("_FRESH_FACTOR", 0)):
        monkeypatch.setattr(f"kinema.service.queue.{name}", value)
    store = await SqlJobStore.open("sqlite://")
    jobs = [await submit(store, "fake") for _ in range(4)]
    view = QueueView(store, Workers(FakeEngine("fake")))  # type: ignore[arg-type] - as much as it asks for
    assert (await view.outlook(jobs[3])).queue_position == 4
    active, may_read, num_reads = store.active, asyncio.Event(), 0

    async def read() -> Sequence[ActiveJob]:
        nonlocal num_reads
        num_reads += 1
        await may_read.wait()
        return await active()

    monkeypatch.setattr(store, "active", read)
    await store.request_cancel(jobs[0].id)
    async with asyncio.timeout(20):
        for _ in range(5):
            assert (await view.outlook(jobs[3])).queue_position == 4
            await asyncio.sleep(0)
        assert num_reads == 1
        may_read.set()
        while (await view.outlook(jobs[3])).queue_position != 3:  # noqa: ASYNC110 - it is read by a task of its own
            await asyncio.sleep(0)
    await store.close()
