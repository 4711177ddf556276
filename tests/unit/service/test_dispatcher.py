"""The dispatcher between a store in memory and a cluster that does what the test says."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import pytest
from structlog.testing import capture_logs

from kinema.cluster.base import WorkerInfo
from kinema.engines.fake import FakeEngine
from kinema.errors import Drained, InvalidRequest, KinemaError, NoWorker, OutOfMemory, StoreUnavailable, WorkerLost
from kinema.events import Artifact, Cancelled, Completed, Event, Failed, Progress, Started
from kinema.ids import JobId
from kinema.job import Job, JobStatus, Task
from kinema.jobs.sql import SqlJobStore
from kinema.jobs.store import QueueLimits
from kinema.request.capabilities import LoraInfo
from kinema.request.request import LoraUse
from kinema.service.dispatcher import Dispatcher
from kinema.settings import JobSettings
from tests.serving import REQUEST, events_of, make_job, until

COMPLETED = Completed(artifact=Artifact(key="k", media_type="video/mp4", size_bytes=3, etag="e"))
PROGRESS = Progress(stage="denoise", step=1, total=2)
PATIENCE_S = 20


@dataclass
class ScriptedCluster:
    """Workers with one slot each. A task yields what its script says after Started; an exception there is raised, an
    asyncio.Event is waited for, and the last script is used again and again. A script that begins with NoWorker refuses
    the task."""

    scripts: list[list[object]]
    worker_ids: Sequence[str] = ("w1",)
    slots: int = 1
    work: dict[str, float] = field(default_factory=dict)
    engines: dict[str, FakeEngine] = field(default_factory=dict)
    started: list[tuple[str, Task]] = field(default_factory=list)
    cancelled: list[tuple[JobId, int]] = field(default_factory=list)
    running: dict[JobId, asyncio.Event] = field(default_factory=dict)
    most_running: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    is_local: bool = True

    def workers(self) -> Sequence[WorkerInfo]:
        busy = [worker_id for worker_id, task in self.started if task.job_id in self.running]
        return [
            WorkerInfo(
                name,
                self.engine_of(name).capabilities,
                self.slots - busy.count(name),
                is_ready=True,
                predicted_work=self.work.get(name, 0.0),
                loras_in_memory=self.engine_of(name).loras_in_memory,
            )
            for name in self.worker_ids
        ]

    def engine_of(self, worker_id: str) -> FakeEngine:
        return self.engines.get(worker_id) or FakeEngine()

    def run(self, worker_id: str, task: Task) -> AsyncIterator[Event]:
        script = self.scripts[min(len(self.started), len(self.scripts) - 1)]
        self.started.append((worker_id, task))
        self.running[task.job_id] = asyncio.Event()
        self.most_running = max(self.most_running, len(self.running))
        return self._play(worker_id, task, script)

    async def _play(self, worker_id: str, task: Task, script: list[object]) -> AsyncGenerator[Event, None]:
        try:
            if not isinstance(script[0], NoWorker):
                yield Started(worker_id=worker_id, attempt=task.attempt)
            for item in script:
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, asyncio.Event):
                    await self._hold(task, item)
                    if self.running[task.job_id].is_set():
                        yield Cancelled()
                        return
                    continue
                yield item  # type: ignore[misc]
        finally:
            del self.running[task.job_id]
            self.changed.set()

    async def _hold(self, task: Task, item: asyncio.Event) -> None:
        waits = [asyncio.create_task(event.wait()) for event in (item, self.running[task.job_id])]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def cancel(self, job_id: JobId, attempt: int) -> None:
        self.cancelled.append((job_id, attempt))
        if job_id in self.running:
            self.running[job_id].set()

    async def wait_for_change(self, timeout_s: float) -> None:
        self.changed.clear()
        try:
            await asyncio.wait_for(self.changed.wait(), timeout_s)
        except TimeoutError:
            return


@pytest.fixture
async def store() -> AsyncIterator[SqlJobStore]:
    store = await SqlJobStore.open("sqlite://")
    yield store
    await store.close()


@pytest.fixture
async def start(store: SqlJobStore) -> AsyncIterator[Callable[[ScriptedCluster], Dispatcher]]:
    """Starts dispatchers over the store and stops them at the end."""
    dispatchers = []

    async def start(cluster: ScriptedCluster, **settings: object) -> Dispatcher:
        dispatchers.append(Dispatcher(store, cluster, JobSettings.model_validate(settings)))
        await dispatchers[-1].start()
        return dispatchers[-1]

    yield start
    for dispatcher in dispatchers:
        await dispatcher.stop()


async def submit(store: SqlJobStore, *loras: LoraInfo) -> Job:
    uses = tuple(LoraUse(name=lora.name, digest=lora.digest, scale=1.0) for lora in loras)
    job = make_job(request=REQUEST.model_copy(update={"loras": uses}))
    await store.create(job, limits=QueueLimits(max_queued=100))
    return job


async def ended(store: SqlJobStore, job: Job) -> list[Event]:
    async with asyncio.timeout(PATIENCE_S):
        return list(await events_of(store, job.id))


async def test_a_job_runs_and_every_event_is_recorded(store, start) -> None:
    """Queued, started by the dispatcher, then what the worker says, then one end."""
    cluster = ScriptedCluster([[PROGRESS, PROGRESS, COMPLETED]])
    await start(cluster)
    job = await submit(store)
    events = await ended(store, job)
    assert events[1:] == [Started(worker_id="w1", attempt=1), PROGRESS, PROGRESS, COMPLETED]
    assert cluster.started[0][1] == Task(job_id=job.id, attempt=1, request=job.request)


async def test_jobs_wait_for_a_free_slot(store, start) -> None:
    """No more than the workers admit run at once, spread over them, and all of them run."""
    gate = asyncio.Event()
    cluster = ScriptedCluster([[gate, COMPLETED]], worker_ids=("w1", "w2"))
    await start(cluster)
    jobs = [await submit(store) for _ in range(5)]
    await until(lambda: len(cluster.started) == 2)
    assert {worker_id for worker_id, _ in cluster.started} == {"w1", "w2"}
    gate.set()
    for job in jobs:
        assert (await ended(store, job))[-1] == COMPLETED
    assert cluster.most_running == 2


async def test_a_job_goes_where_the_least_work_is_before_it(store, start) -> None:
    """Whoever sent that work there."""
    gate = asyncio.Event()
    cluster = ScriptedCluster([[gate, COMPLETED]], ("w1", "w2", "w3"), slots=2, work={"w1": 5e6, "w3": 2e6})
    await start(cluster)
    for number in range(2):
        await submit(store)
        await until(lambda: len(cluster.started) == number + 1)  # noqa: B023
    assert [worker_id for worker_id, _ in cluster.started] == ["w2", "w2"]
    gate.set()


async def test_a_job_under_an_alias_is_made(store, start) -> None:
    """As one that waited while its model got another name; but not by the alias of one where another has the name."""
    renamed, other = FakeEngine("new", aliases=["fake"]), FakeEngine("fake")
    for engines, expected in (({"w1": renamed}, "w1"), ({"w1": renamed, "w2": other}, "w2")):
        cluster = ScriptedCluster([[COMPLETED]], worker_ids=list(engines), engines=engines, work={"w2": 9.0})
        dispatcher = await start(cluster)
        job = await submit(store)
        assert job.request.model == "fake"
        await ended(store, job)
        assert [worker_id for worker_id, _ in cluster.started] == [expected]
        await dispatcher.stop()


PAPER, CLAY = LoraInfo(name="paper", digest="a" * 64), LoraInfo(name="clay", digest="b" * 64)


async def test_a_job_goes_only_to_a_worker_that_has_its_loras(store, start) -> None:
    """Whatever work is before it there; while that worker is busy the job waits, and others go on."""
    gate = asyncio.Event()
    engines = {"w1": FakeEngine(loras=[CLAY]), "w2": FakeEngine(loras=[PAPER, CLAY])}
    cluster = ScriptedCluster([[gate, COMPLETED], [COMPLETED]], ["w1", "w2"], engines=engines, work={"w2": 9e6})
    await start(cluster)
    first = await submit(store, PAPER)
    await until(lambda: len(cluster.started) == 1)
    second = await submit(store, PAPER, CLAY)
    others = [await submit(store), await submit(store, CLAY)]
    for job in others:
        assert (await ended(store, job))[-1] == COMPLETED
    assert (await store.get(second.id)).status is JobStatus.QUEUED
    gate.set()
    for job in (first, second):
        assert (await ended(store, job))[-1] == COMPLETED
    assert {task.job_id: name for name, task in cluster.started} == {
        first.id: "w2",
        second.id: "w2",
        others[0].id: "w1",
        others[1].id: "w1",
    }
    assert (await store.get(second.id)).attempt == 1


async def test_a_lora_that_nobody_has_is_for_a_worker_to_refuse(store, start) -> None:
    """It looks at its folder, and says so in a sentence; no job waits for ever."""
    refused = InvalidRequest("there is no LoRA 'paper' in the folder")
    engines = {"w1": FakeEngine(loras=[CLAY]), "w2": FakeEngine()}
    cluster = ScriptedCluster([[refused]], ["w1", "w2"], engines=engines)
    await start(cluster)
    job = await submit(store, PAPER)
    assert (await ended(store, job))[-1] == Failed(code=refused.code, message=refused.message)


async def test_of_equal_workers_the_one_that_has_the_loras_in_memory_gets_the_job(store, start) -> None:
    """Never one that has more to do, or fewer places."""
    engines = {name: FakeEngine(loras=[PAPER, CLAY]) for name in ("w1", "w2", "w3")}
    engines["w2"].loras_in_memory = [CLAY.digest]
    engines["w3"].loras_in_memory = [PAPER.digest, CLAY.digest]
    work: dict[str, float] = {}
    cluster = ScriptedCluster([[COMPLETED]], ["w1", "w2", "w3"], engines=engines, work=work)
    await start(cluster)
    for loras in ((CLAY,), (PAPER, CLAY), ()):
        await ended(store, await submit(store, *loras))
    work["w3"] = 1.0
    await ended(store, await submit(store, PAPER, CLAY))
    assert [name for name, _ in cluster.started] == ["w2", "w3", "w1", "w2"]


async def test_a_worker_with_two_slots_gets_two_jobs_before_their_first_events(store, start) -> None:
    """A slot is not held back until a generation has something to say."""
    gate = asyncio.Event()
    cluster = ScriptedCluster([[gate, COMPLETED]], slots=2)
    await start(cluster)
    for _ in range(3):
        await submit(store)
    await until(lambda: len(cluster.started) == 2)
    gate.set()
    await until(lambda: len(cluster.started) == 3)


async def test_a_job_of_a_lost_worker_runs_again(store, start) -> None:
    """As a new attempt, and it may still complete."""
    cluster = ScriptedCluster([[PROGRESS, WorkerLost()], [PROGRESS], [COMPLETED]])
    await start(cluster, retry_s=0)
    events = await ended(store, await submit(store))
    assert [event.attempt for event in events if isinstance(event, Started)] == [1, 2, 3]
    assert events[-1] == COMPLETED


async def test_a_job_that_loses_every_worker_fails(store, start) -> None:
    """After max_attempts, with the reason."""
    await start(ScriptedCluster([[WorkerLost()]]), max_attempts=2, retry_s=0)
    events = await ended(store, await submit(store))
    assert len([event for event in events if isinstance(event, Started)]) == 2
    assert isinstance(events[-1], Failed)
    assert events[-1].code == "worker_lost"


async def test_a_job_that_many_servers_lost_fails_where_workers_are_elsewhere(store, start) -> None:
    """So many may have died of it; it costs ten times as much patience as a lost worker."""
    job = await submit(store)
    for number in range(21):
        await store.claim(["fake"], f"server {number}", lease_s=-1, owners_have_workers=False)
    cluster = ScriptedCluster([[COMPLETED]], is_local=False)
    await start(cluster, max_attempts=2)
    end = (await ended(store, job))[-1]
    assert (end.code, end.message) == ("worker_lost", "the server stopped before the video was finished, 21 times")
    assert not cluster.started


async def test_a_job_that_some_servers_lost_is_made_where_workers_are_elsewhere(store, start) -> None:
    """It is no suspect either: it need not have a worker for itself."""
    job = await submit(store)
    for number in range(19):
        await store.claim(["fake"], f"server {number}", lease_s=-1, owners_have_workers=False)
    cluster = ScriptedCluster([[COMPLETED]], is_local=False)
    await start(cluster, max_attempts=2)
    assert (await ended(store, job))[-1] == COMPLETED
    assert [task.losses for _, task in cluster.started] == [0]


@pytest.mark.parametrize("refusal", [NoWorker(), Drained()])
async def test_a_worker_that_takes_no_more_costs_a_job_nothing(store, start, refusal: KinemaError) -> None:
    """It goes back to the queue however often: neither the job nor the worker was at fault."""
    cluster = ScriptedCluster([[refusal], [refusal], [refusal], [COMPLETED]])
    await start(cluster, max_attempts=1)
    job = await submit(store)
    assert (await ended(store, job))[-1] == COMPLETED
    assert (await store.get(job.id)).losses == 0
    assert len(cluster.started) == 4


async def test_the_wait_before_another_try_doubles_with_every_loss(store, start, monkeypatch) -> None:
    """What breaks workers does not keep all of them busy."""
    waits, give_back = [], store.give_back

    async def noted(owner: str, job_id: JobId, *, is_lost: bool, wait_s: float = 0.0, attempt: int) -> None:
        waits.append(wait_s)
        await give_back(owner, job_id, is_lost=is_lost, attempt=attempt)

    monkeypatch.setattr(store, "give_back", noted)
    await start(ScriptedCluster([[WorkerLost()]]), max_attempts=4, retry_s=3)
    await ended(store, await submit(store))
    assert waits == [3, 6, 12]


async def test_what_a_lost_worker_said_is_recorded(store, start, monkeypatch) -> None:
    """All of it, also what came while the store was busy with what came before."""
    record, is_open, has_begun = store.record, asyncio.Event(), asyncio.Event()

    async def slow(job_id: JobId, *happened: Event, attempt: int | None = None) -> bool:
        has_begun.set()
        await is_open.wait()
        return await record(job_id, *happened, attempt=attempt)

    monkeypatch.setattr(store, "record", slow)
    cluster = ScriptedCluster([[has_begun, PROGRESS, WorkerLost()], [COMPLETED]])
    await start(cluster, retry_s=0)
    job = await submit(store)
    await until(lambda: len(cluster.cancelled) == 1)
    is_open.set()
    events = await ended(store, job)
    assert events[1:] == [
        Started(worker_id="w1", attempt=1),
        PROGRESS,
        Started(worker_id="w1", attempt=2),
        COMPLETED,
    ]


async def test_a_stop_between_a_run_and_its_end_does_not_lose_the_end(store, start, monkeypatch) -> None:
    """The video is made; an event of it that is still being written must not have it made again."""
    record, is_open = store.record, asyncio.Event()

    async def slow(job_id: JobId, *happened: Event, attempt: int | None = None) -> bool:
        await is_open.wait()
        return await record(job_id, *happened, attempt=attempt)

    monkeypatch.setattr(store, "record", slow)
    cluster = ScriptedCluster([[PROGRESS, COMPLETED]])
    dispatcher = await start(cluster)
    job = await submit(store)
    await until(lambda: cluster.started and not cluster.running)
    stopping = asyncio.create_task(dispatcher.stop())
    await asyncio.sleep(0.05)
    is_open.set()
    await stopping
    assert (await store.get(job.id)).status is JobStatus.COMPLETED


class Mortal:
    """One worker with four slots. A task whose seed is 666 kills it, with all that runs there; it is back at once."""

    is_local = False

    def __init__(self) -> None:
        self.running: dict[JobId, Task] = {}
        self.killed = asyncio.Event()
        self.changed = asyncio.Event()
        self.num_deaths = 0

    def workers(self) -> Sequence[WorkerInfo]:
        tasks = self.running.values()
        suspect = any(task.losses for task in tasks)
        can = FakeEngine().capabilities
        return [WorkerInfo("w1", can, 4 - len(tasks), is_ready=True, has_suspect=suspect)]

    async def run(self, worker_id: str, task: Task) -> AsyncGenerator[Event, None]:
        self.running[task.job_id] = task
        killed = self.killed
        try:
            yield Started(worker_id=worker_id, attempt=task.attempt)
            for _ in range(200):  # long enough for the others to come
                await asyncio.sleep(0)
                if killed.is_set():
                    raise WorkerLost
            if task.request.seed == 666:
                self.num_deaths += 1
                self.killed = asyncio.Event()
                killed.set()
                raise WorkerLost
            yield COMPLETED
        finally:
            del self.running[task.job_id]
            self.changed.set()

    async def cancel(self, job_id: JobId, attempt: int) -> None:
        """Nothing here is cancelled."""

    async def wait_for_change(self, timeout_s: float) -> None:
        self.changed.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.changed.wait(), timeout_s)


async def test_a_job_that_kills_workers_takes_no_other_with_it(store, start) -> None:
    """Those that were lost with it are not made beside it again."""
    cluster = Mortal()
    seeds = [1, 2, 3, 666, 4, 5, 6, 7]
    jobs = []
    for seed in seeds:
        jobs.append(make_job(request=REQUEST.model_copy(update={"seed": seed})))
        await store.create(jobs[-1], limits=QueueLimits())
    await start(cluster, retry_s=0, max_attempts=3)
    ends = [(await ended(store, job))[-1] for job in jobs]
    assert [isinstance(end, Completed) for end in ends] == [seed != 666 for seed in seeds]
    assert isinstance(ends[3], Failed)
    assert ends[3].code == "worker_lost"
    assert cluster.num_deaths == 3


async def test_failures_end_the_job(store, start) -> None:
    """A known one with its own code; an unexpected one as engine_failed, with nothing of it but a log entry."""
    await start(ScriptedCluster([[OutOfMemory()], [RuntimeError("secret")]]))
    known = (await ended(store, await submit(store)))[-1]
    with capture_logs() as logs:
        unknown = (await ended(store, await submit(store)))[-1]
    assert isinstance(known, Failed)
    assert isinstance(unknown, Failed)
    assert (known.code, unknown.code) == ("out_of_memory", "engine_failed")
    assert "secret" not in unknown.message
    assert any(entry.get("exc_info") for entry in logs)


async def test_a_cancel_reaches_the_worker(store, start) -> None:
    """The job ends with what the worker then says, Cancelled."""
    cluster = ScriptedCluster([[PROGRESS, asyncio.Event()]])
    await start(cluster)
    job = await submit(store)
    await until(lambda: cluster.running)
    assert (await store.request_cancel(job.id)).status is JobStatus.IN_PROGRESS
    assert (await ended(store, job))[-1] == Cancelled()


async def test_a_cancel_that_nobody_asked_for_is_a_lost_worker(store, start) -> None:
    """A worker that stops by itself must not end somebody's job as cancelled."""
    await start(ScriptedCluster([[Cancelled()], [COMPLETED]]), retry_s=0)
    assert (await ended(store, await submit(store)))[-1] == COMPLETED


async def test_a_stop_gives_running_jobs_back(store, start) -> None:
    """Nothing terminal is recorded, the worker is told, and the next dispatcher starts the job at once."""
    first = ScriptedCluster([[PROGRESS, asyncio.Event()]])
    dispatcher = await start(first, lease_s=3600)
    job = await submit(store)
    await until(lambda: first.running)
    await dispatcher.stop()
    assert first.cancelled == [(job.id, 1)]
    assert not first.running
    assert not (await store.get(job.id)).status.is_terminal
    await start(ScriptedCluster([[COMPLETED]]))
    events = await ended(store, job)
    assert events[-2:] == [Started(worker_id="w1", attempt=2), COMPLETED]


async def test_a_stop_waits_for_the_claim_that_is_being_made(store, start, monkeypatch) -> None:
    """The database ends a claim whether or not somebody waits for it; the job must not be left with who has stopped."""
    claim, has_begun, is_open = store.claim, asyncio.Event(), asyncio.Event()

    async def held(*args: object, **options: object) -> Job | None:
        has_begun.set()
        await is_open.wait()
        return await claim(*args, **options)

    async def slow(*args: object, **options: object) -> Job | None:
        return await asyncio.shield(asyncio.ensure_future(held(*args, **options)))

    job = await submit(store)
    with monkeypatch.context() as patched:
        patched.setattr(store, "claim", slow)
        dispatcher = await start(ScriptedCluster([[COMPLETED]]), lease_s=3600)
        await has_begun.wait()
        stopping = asyncio.create_task(dispatcher.stop())
        await until(lambda: all(loop.done() for loop in dispatcher._loops))
        for _ in range(50):  # a release would be on its way by then
            await asyncio.sleep(0)
        is_open.set()
        await stopping
    taken = await store.claim(["fake"], "next", 60)
    assert taken is not None
    assert (taken.id, taken.losses) == (job.id, 0)


async def test_a_claim_whose_answer_was_lost_is_given_back(store, start, monkeypatch) -> None:
    """The database made it and broke off: the job is made, without a loss, and what runs goes on."""
    monkeypatch.setattr("kinema.service.dispatcher._RETRY_S", 0.01)
    claim, gate, num_claims = store.claim, asyncio.Event(), 0

    async def broken(*args: object, **options: object) -> Job | None:
        nonlocal num_claims
        num_claims += 1
        job = await claim(*args, **options)
        if num_claims == 2:
            raise StoreUnavailable
        return job

    monkeypatch.setattr(store, "claim", broken)
    jobs = [await submit(store) for _ in range(2)]
    await start(ScriptedCluster([[gate, COMPLETED]], slots=2), lease_s=3600)
    await until(lambda: num_claims >= 3)
    gate.set()
    for job in jobs:
        assert (await ended(store, job))[-1] == COMPLETED
    assert [((await store.get(job.id)).losses) for job in jobs] == [0, 0]


async def test_a_run_whose_job_is_elsewhere_is_cancelled_with_its_attempt(store, start) -> None:
    """The attempt of the other dispatcher is not meant, even on the same worker."""
    cluster = ScriptedCluster([[asyncio.Event()]])
    dispatcher = await start(cluster)
    job = await submit(store)
    await until(lambda: cluster.running)
    await store.release(dispatcher._owner)
    assert await store.claim(["fake"], "another", 60) is not None
    await until(lambda: not cluster.running)
    assert set(cluster.cancelled) == {(job.id, 1)}
    assert not (await store.get(job.id)).status.is_terminal


async def test_a_job_of_a_dead_dispatcher_is_taken_over(store, start) -> None:
    """When its lease has run out; one that was to be cancelled meanwhile ends so."""
    orphan, unwanted = await submit(store), await submit(store)
    for _ in range(2):
        await store.claim(["fake"], "dead", 0.3)
    assert (await store.request_cancel(unwanted.id)).status is JobStatus.IN_PROGRESS
    cluster = ScriptedCluster([[COMPLETED]])
    await start(cluster)
    assert (await ended(store, orphan))[-1] == COMPLETED
    assert (await ended(store, unwanted))[-1] == Cancelled()
    assert [task.job_id for _, task in cluster.started] == [orphan.id]


async def test_leases_are_renewed_while_a_job_runs(store, start) -> None:
    """A generation longer than the lease is not taken over by another dispatcher."""
    gate = asyncio.Event()
    first, second = ScriptedCluster([[gate, COMPLETED]]), ScriptedCluster([[COMPLETED]])
    await start(first, lease_s=0.3)
    job = await submit(store)
    await until(lambda: first.running)
    await start(second, lease_s=0.3)
    waiter = asyncio.create_task(ended(store, job))
    await asyncio.wait((waiter,), timeout=1.0)
    assert not second.started
    gate.set()
    assert (await waiter)[-1] == COMPLETED


async def test_a_run_that_was_taken_over_is_stopped(store, start) -> None:
    """Its events are refused, so its worker is told to stop."""
    gate = asyncio.Event()
    cluster = ScriptedCluster([[gate, PROGRESS, asyncio.Event()]])
    dispatcher = await start(cluster)
    job = await submit(store)
    await until(lambda: cluster.running)
    await store.release(dispatcher._owner)
    assert await store.claim(["fake"], "another", 60) is not None
    gate.set()
    await until(lambda: not cluster.running)
    assert (job.id, 1) in cluster.cancelled
    assert not (await store.get(job.id)).status.is_terminal


async def test_the_end_is_written_when_the_store_is_back(store, start, monkeypatch) -> None:
    """A database that is away for a moment costs neither the video nor the dispatcher."""
    monkeypatch.setattr("kinema.service.dispatcher._RETRY_S", 0.01)
    monkeypatch.setattr("kinema.jobs.recorder._RETRY_S", 0.01)
    record, failures = store.record, [StoreUnavailable(), StoreUnavailable(), StoreUnavailable()]

    async def flaky(job_id: JobId, *happened: Event, attempt: int | None = None) -> bool:
        if failures:
            raise failures.pop()
        return await record(job_id, *happened, attempt=attempt)

    monkeypatch.setattr(store, "record", flaky)
    await start(ScriptedCluster([[PROGRESS, COMPLETED]]))
    events = await ended(store, await submit(store))
    assert [event.type for event in events] == ["queued", "started", "progress", "completed"]
    assert not failures


async def test_a_run_that_breaks_is_given_back(store, start, monkeypatch) -> None:
    """Our own mistake in one attempt leaves no job behind that nobody runs."""
    record, mistakes = store.record, [AssertionError("a mistake")]

    async def broken(job_id: JobId, *happened: Event, attempt: int | None = None) -> bool:
        if isinstance(happened[-1], Completed) and mistakes:
            raise mistakes.pop()
        return await record(job_id, *happened, attempt=attempt)

    monkeypatch.setattr(store, "record", broken)
    await start(ScriptedCluster([[COMPLETED]]), retry_s=0)
    with capture_logs() as logs:
        job = await submit(store)
        events = await ended(store, job)
    assert events[-1] == COMPLETED
    assert (await store.get(job.id)).attempt == 2
    assert any(entry.get("exc_info") for entry in logs)
