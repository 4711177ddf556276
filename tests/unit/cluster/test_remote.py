"""A frontend's cluster: which workers there are, what it counts on top of their word, and what becomes of its tasks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from kinema import __version__
from kinema.cluster.remote import RemoteCluster
from kinema.cluster.transport import Connection, Payload
from kinema.engines.fake import FakeEngine
from kinema.errors import Drained, NoWorker, WorkerLost
from kinema.events import Cancelled, Completed, Started
from kinema.request.capabilities import LoraInfo
from kinema.request.memory import Memory, Need
from tests.serving import Gate, until
from tests.unit.cluster.members import Cluster, all_of, attempt, running_cluster, shown, until_ready
from tests.unit.cluster.memory import scripted
from tests.unit.worker.tasks import make_task

BUSY = {
    "worker_id": "w1",
    "free_slots": 2,
    "max_active": 2,
    "is_ready": True,
    "predicted_work": 0.0,
    "has_suspect": False,
    "running": [],
}


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with running_cluster(tmp_path) as cluster:
        yield cluster


class Speaker:
    """A worker that says what the test says, and holds every task until it is let go."""

    def __init__(self) -> None:
        self.words: asyncio.Queue[Payload] = asyncio.Queue()
        self.let_go = asyncio.Event()
        self.num_running = 0
        self.cancelled: list[str] = []
        self.say()
        self.handlers = scripted(info=self._info, run=self._run, cancel=self._cancel)

    def say(self, **changes: object) -> None:
        self.words.put_nowait({**BUSY, **described(), **changes})

    async def _info(self, _payload: Payload) -> AsyncGenerator[Payload, None]:
        while True:
            yield await self.words.get()

    async def _run(self, payload: Payload) -> AsyncGenerator[Payload, None]:
        self.num_running += 1
        yield {"event": Started(worker_id="w1", attempt=payload["task"]["attempt"]).model_dump(mode="json")}
        await self.let_go.wait()
        yield {"event": Cancelled().model_dump(mode="json")}

    async def _cancel(self, payload: Payload) -> AsyncGenerator[Payload, None]:
        self.cancelled.append(payload["job_id"])
        await self.let_go.wait()
        yield {}


def described() -> dict[str, object]:
    return {
        "capabilities": FakeEngine().capabilities.model_dump(mode="json"),
        "device": "cpu",
        "version": __version__,
        "host": "here",
        "pid": 1,
    }


async def test_workers_come_and_go(cluster: Cluster) -> None:
    """With what they are; the models of those that have left are still known."""
    frontend = await cluster.frontend()
    assert (list(frontend.workers()), list(frontend.known_models())) == ([], [])
    first = await cluster.worker("w1", FakeEngine("one"), max_active=2)
    await cluster.worker("w2", FakeEngine("two"))
    await until_ready(frontend, "w1", "w2")
    info = shown(frontend, "w1")
    assert info is not None
    assert info.capabilities == FakeEngine("one").capabilities
    assert (info.free_slots, info.predicted_work, info.device, info.version) == (2, 0, "cpu", __version__)
    await first.served.close()
    await until(lambda: shown(frontend, "w1") is None)
    assert shown(frontend, "w2") is not None
    assert frontend.known_models() == ["one", "two"]


async def test_loras_come_and_go_without_a_restart(cluster: Cluster) -> None:
    """A frontend knows those of now, whatever the worker does."""
    engine = FakeEngine()
    await cluster.worker("w1", engine)
    frontend = await cluster.frontend()
    await until_ready(frontend, "w1")

    def loras() -> tuple[LoraInfo, ...]:
        info = shown(frontend, "w1")
        return () if info is None else info.capabilities.loras

    assert loras() == ()
    for now in (LoraInfo(name="paper", digest="a" * 64), LoraInfo(name="paper", digest="b" * 64)):
        engine.loras = (now,)
        await until(lambda now=now: loras() == (now,))  # type: ignore[misc]
    engine.loras = ()
    await until(lambda: loras() == ())


async def test_a_worker_says_what_is_in_its_memory(cluster: Cluster) -> None:
    """And how often a video left it; an older one says nothing of that, and is known all the same."""
    frontend = await cluster.frontend()
    engine = FakeEngine()
    need = Need(base_bytes=1.5, bytes_per_unit=2.5)
    engine.memory = Memory(limit_bytes=10, residents={"vae": 3}, room_bytes=7, step=need, decode=need)
    await cluster.worker("w2", engine)
    speaker = Speaker()
    cluster.network.serve(speaker.handlers)
    await until_ready(frontend, "w1", "w2")
    older, other = shown(frontend, "w1"), shown(frontend, "w2")
    assert older is not None
    assert other is not None
    assert (older.memory, older.num_parked, older.num_resumed, older.loras_in_memory) == (None, 0, 0, ())
    assert other.memory == engine.memory
    speaker.say(memory=engine.memory.model_dump(mode="json"), num_parked=4, num_resumed=3, loras_in_memory=["a"])
    await until(lambda: (seen := shown(frontend, "w1")) and seen.memory == engine.memory)
    newer = shown(frontend, "w1")
    assert newer is not None
    assert (newer.num_parked, newer.num_resumed, newer.loras_in_memory) == (4, 3, ["a"])


async def test_a_task_runs_on_the_worker_that_was_chosen(cluster: Cluster) -> None:
    """Its events are the worker's own."""
    frontend = await cluster.frontend()
    await cluster.worker("w1")
    await cluster.worker("w2")
    await until_ready(frontend, "w1", "w2")
    events = await all_of(frontend.run("w2", make_task()))
    assert events[0] == Started(worker_id="w2", attempt=1)
    assert isinstance(events[-1], Completed)


async def test_a_task_counts_from_the_call_on(cluster: Cluster) -> None:
    """Also in the work that is left; at the frontend that sent it before the worker says so, then at all."""
    gate = Gate()
    member = await cluster.worker("w1", FakeEngine(on_output=gate))
    frontend, other = await cluster.frontend(), await cluster.frontend()
    await until_ready(frontend, "w1")
    await until_ready(other, "w1")
    task = make_task()
    stream = frontend.run("w1", task)
    info = shown(frontend, "w1")
    assert info is not None
    assert (info.free_slots, info.predicted_work) == (0, task.request.work)
    with pytest.raises(NoWorker, match="takes no more"):
        frontend.run("w1", make_task())
    running = asyncio.create_task(all_of(stream))
    await until(lambda: (seen := shown(other, "w1")) and seen.free_slots == 0)
    assert [one.predicted_work for one in (*other.workers(), *frontend.workers())] == [task.request.work] * 2
    gate.is_open.set()
    await running
    await until(lambda: (seen := shown(frontend, "w1")) and seen.free_slots == 1)
    assert not member.worker.tasks


async def test_a_task_is_counted_once(cluster: Cluster) -> None:
    """By the worker when its word is about the task, by the frontend until then and no longer."""
    speaker = Speaker()
    cluster.network.serve(speaker.handlers)
    frontend = await cluster.frontend()
    await until_ready(frontend, "w1")
    tasks = [make_task(), make_task()]
    work = tasks[0].request.work
    runs = [asyncio.create_task(all_of(frontend.run("w1", task))) for task in tasks]
    await until(lambda: speaker.num_running == 2)

    def counts() -> tuple[int, float]:
        (info,) = frontend.workers()
        return info.free_slots, info.predicted_work

    assert counts() == (0, 2 * work)
    speaker.say(free_slots=1, predicted_work=work / 2, running=[[tasks[0].job_id, 1], ["video_x", 1]])
    await until(lambda: counts() == (0, work / 2 + work))
    speaker.say(free_slots=0, predicted_work=work, running=[[task.job_id, 1] for task in tasks])
    await until(lambda: counts() == (0, work))
    speaker.let_go.set()
    for run in runs:
        await run
    speaker.say()
    await until(lambda: counts() == (2, 0))


async def test_another_attempt_is_another_task(cluster: Cluster) -> None:
    """The worker's word about an older one does not count the newer one."""
    speaker = Speaker()
    cluster.network.serve(speaker.handlers)
    frontend = await cluster.frontend()
    await until_ready(frontend, "w1")
    task = make_task()
    run = asyncio.create_task(all_of(frontend.run("w1", attempt(task, 2))))
    speaker.say(free_slots=1, predicted_work=1.0, running=[[task.job_id, 1]])
    await until(lambda: frontend.workers()[0].predicted_work == 1.0 + task.request.work)
    assert frontend.workers()[0].free_slots == 0
    speaker.let_go.set()
    await run


async def test_a_worker_that_refuses_says_so(cluster: Cluster) -> None:
    """Its slot was taken from another frontend a moment ago."""
    gate = Gate()
    await cluster.worker("w1", FakeEngine(on_output=gate))
    frontend, other = await cluster.frontend(), await cluster.frontend()
    await until_ready(frontend, "w1")
    await until_ready(other, "w1")
    late = other.run("w1", make_task())
    first = asyncio.create_task(all_of(frontend.run("w1", make_task())))
    await until(gate.has_arrived.is_set)
    with pytest.raises(NoWorker, match="takes no more"):
        await all_of(late)
    gate.is_open.set()
    assert isinstance((await first)[-1], Completed)


async def test_a_worker_that_is_not_here_takes_nothing(cluster: Cluster) -> None:
    """Nothing was started, so it costs the job nothing."""
    frontend = await cluster.frontend()
    with pytest.raises(NoWorker, match="w9 is not here"):
        frontend.run("w9", make_task())


async def test_a_worker_that_dies_is_lost(cluster: Cluster) -> None:
    """So is what it ran; what is sent there before its end is known was never started."""
    gate = Gate()
    member = await cluster.worker("w1", FakeEngine(on_output=gate), max_active=2)
    frontend = await cluster.frontend()
    await until_ready(frontend, "w1")
    running = asyncio.create_task(all_of(frontend.run("w1", make_task())))
    await until(gate.has_arrived.is_set)
    late = frontend.run("w1", make_task())
    member.served.kill()
    gate.is_open.set()
    with pytest.raises(NoWorker, match="cannot be reached"):
        await all_of(late)
    with pytest.raises(WorkerLost):
        await running
    await until(lambda: not frontend.workers())


async def test_a_worker_without_a_sign_of_life_is_gone(cluster: Cluster) -> None:
    """It is listed, and says nothing."""
    member = await cluster.worker("w1")
    frontend = await cluster.frontend()
    await until_ready(frontend, "w1")
    member.served.freeze()
    await until(lambda: not frontend.workers())
    assert frontend.known_models() == ["fake"]


async def test_a_worker_that_broke_off_is_left_out_until_it_speaks(cluster: Cluster) -> None:
    """Its next word says that it lives."""
    speaker = Speaker()

    async def break_off(_payload: Payload) -> AsyncGenerator[Payload, None]:
        raise WorkerLost
        yield {}

    cluster.network.serve({**speaker.handlers, "run": break_off})
    frontend = await cluster.frontend()
    await until_ready(frontend, "w1")
    with pytest.raises(WorkerLost):
        await all_of(frontend.run("w1", make_task()))
    (info,) = frontend.workers()
    assert (info.is_ready, info.free_slots) == (False, 2)
    speaker.say()
    await until_ready(frontend, "w1")


async def test_a_worker_that_broke_off_is_tried_again_later(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a word from it."""
    monkeypatch.setattr("kinema.cluster.remote._AVOIDED_S", 0.05)
    member = await cluster.worker("w1")
    frontend = await cluster.frontend()
    await until_ready(frontend, "w1")
    await member.served.drain()
    with pytest.raises(NoWorker):
        await all_of(frontend.run("w1", make_task()))
    assert frontend.workers()[0].is_ready is False
    await until_ready(frontend, "w1")


async def test_events_that_end_early_are_a_loss(cluster: Cluster) -> None:
    """A stream without a terminal event is not an end."""

    async def nothing(_payload: Payload) -> AsyncGenerator[Payload, None]:
        yield {"event": Started(worker_id="w1", attempt=1).model_dump(mode="json")}

    cluster.network.serve({**Speaker().handlers, "run": nothing})
    frontend = await cluster.frontend()
    await until_ready(frontend, "w1")
    with pytest.raises(WorkerLost, match="ended early"):
        await all_of(frontend.run("w1", make_task()))


async def test_what_a_leaving_worker_gives_back_is_said(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not a loss, and the worker is shown as one that takes no more."""
    monkeypatch.setattr("kinema.worker.worker.GIVE_BACK_S", 0.05)
    gate = Gate()
    member = await cluster.worker("w1", FakeEngine(on_output=gate))
    frontend = await cluster.frontend()
    await until_ready(frontend, "w1")
    running = asyncio.create_task(all_of(frontend.run("w1", make_task())))
    await until(gate.has_arrived.is_set)
    await member.host.drain(0)
    with pytest.raises(Drained):
        await running
    gate.is_open.set()
    await until(lambda: not frontend.workers()[0].is_ready)


async def test_a_cancel_reaches_the_worker_that_runs_the_job(cluster: Cluster) -> None:
    """The events then end with Cancelled; a job that does not run is nothing."""
    gate = Gate()
    await cluster.worker("w1", FakeEngine(on_output=gate))
    frontend = await cluster.frontend()
    await until_ready(frontend, "w1")
    task = make_task()
    running = asyncio.create_task(all_of(frontend.run("w1", task)))
    await until(gate.has_arrived.is_set)
    await frontend.cancel(make_task().job_id, 1)
    await frontend.cancel(task.job_id, task.attempt)
    await until(lambda: cluster.network.served[1].num_answered["cancel"] == 1)
    gate.is_open.set()
    assert (await running)[-1] == Cancelled()


async def test_a_cancel_does_not_wait_for_a_worker_that_hangs(cluster: Cluster) -> None:
    """It is asked for once, however often the caller says it, until the worker has answered."""
    speaker = Speaker()
    cluster.network.serve(speaker.handlers)
    frontend = await cluster.frontend()
    await until_ready(frontend, "w1")
    task = make_task()
    running = asyncio.create_task(all_of(frontend.run("w1", task)))
    await until(lambda: speaker.num_running)
    for _ in range(3):
        await frontend.cancel(task.job_id, task.attempt)
        await until(lambda: speaker.cancelled)
    assert speaker.cancelled == [task.job_id]
    speaker.let_go.set()
    await running


async def test_closing_the_events_ends_the_generation(cluster: Cluster) -> None:
    """And gives the slot back."""
    gate = Gate()
    member = await cluster.worker("w1", FakeEngine(on_output=gate))
    frontend = await cluster.frontend()
    await until_ready(frontend, "w1")
    stream = frontend.run("w1", make_task())
    await anext(stream)
    gate.is_open.set()
    await stream.aclose()
    await until(lambda: not member.worker.tasks and frontend.workers()[0].free_slots == 1)


async def test_a_worker_that_discovery_forgot_is_here_while_it_speaks(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Discovery may be away; the worker and what it runs are not. When it is silent nobody calls it again."""
    monkeypatch.setattr("kinema.cluster.remote._RETRY_S", 0)
    member = await cluster.worker("w1")
    frontend = await cluster.frontend()
    await until_ready(frontend, "w1")
    member.served.list_again(False)
    assert isinstance((await all_of(frontend.run("w1", make_task())))[-1], Completed)
    assert shown(frontend, "w1") is not None
    member.served.kill()
    await until(lambda: not frontend.workers())
    await cluster.worker("w2")
    await until_ready(frontend, "w2")
    assert member.served.num_refused == 0


async def test_a_worker_that_registers_again_is_one_worker(cluster: Cluster) -> None:
    """By its new instance, also while the old one still speaks; what runs there goes on and is counted."""
    gate = Gate()
    member = await cluster.worker("w1", FakeEngine(on_output=gate), max_active=2)
    frontend = await cluster.frontend()
    await until_ready(frontend, "w1")
    running = asyncio.create_task(all_of(frontend.run("w1", make_task())))
    await until(gate.has_arrived.is_set)
    again = cluster.network.serve(member.host.handlers)
    await until(lambda: again.calls)
    await until(lambda: [info.free_slots for info in frontend.workers()] == [1])
    second = asyncio.create_task(all_of(frontend.run("w1", make_task())))
    await until(lambda: [call.endpoint for call in again.calls] == ["info", "run"])
    gate.is_open.set()
    assert [isinstance((await task)[-1], Completed) for task in (running, second)] == [True, True]


async def test_waiting_ends_when_a_job_may_begin(cluster: Cluster) -> None:
    """A worker came, its slot is free again, it left; long before the time is up."""
    gate = Gate()
    frontend = await cluster.frontend()
    async with asyncio.timeout(20):
        waiting = asyncio.create_task(frontend.wait_for_change(1000))
        member = await cluster.worker("w1", FakeEngine(on_output=gate))
        await waiting
        running = asyncio.create_task(all_of(frontend.run("w1", make_task())))
        await until(lambda: frontend.workers()[0].free_slots == 0 and gate.has_arrived.is_set())
        gate.is_open.set()
        while frontend.workers()[0].free_slots == 0:
            await frontend.wait_for_change(1000)
        await running
        waiting = asyncio.create_task(frontend.wait_for_change(1000))
        await asyncio.sleep(0)
        member.served.kill()
        await waiting
    await frontend.wait_for_change(0.01)


async def test_a_worker_that_is_not_understood_is_left_alone(cluster: Cluster) -> None:
    """It is said once in the log, and the others are not harmed."""
    speaker = Speaker()
    speaker.words = asyncio.Queue()
    speaker.words.put_nowait({"worker_id": "w0"})
    cluster.network.serve(speaker.handlers)
    with capture_logs() as logs:
        frontend = await cluster.frontend()
        await cluster.worker("w1")
        await until_ready(frontend, "w1")
        await until(lambda: any("not understood" in entry["event"] for entry in logs))
    assert shown(frontend, "w0") is None


async def test_a_frontend_is_there_before_discovery_answers(cluster: Cluster) -> None:
    """It knows no worker until then, and can be stopped."""
    may_connect = asyncio.Event()

    async def connect() -> Connection:
        await may_connect.wait()
        return await cluster.network.connect()

    for is_answered in (False, True):
        frontend = RemoteCluster(connect)
        await frontend.start()
        await cluster.worker(f"w{is_answered}")
        assert list(frontend.workers()) == []
        if is_answered:
            may_connect.set()
            await until_ready(frontend, "wTrue")
        await frontend.stop()


async def test_a_stopped_frontend_has_left(cluster: Cluster) -> None:
    """No call of its stays open, and the connection is closed."""
    member = await cluster.worker("w1")
    frontend = await cluster.frontend()
    await until_ready(frontend, "w1")
    await frontend.stop()
    assert member.served.calls == []
    assert [connection.is_closed for connection in cluster.network.connections] == [True]


async def test_a_slot_is_left_to_the_frontend_whose_video_freed_it(cluster: Cluster, monkeypatch) -> None:
    """For a moment: all frontends hear of it at once, and only one of them can have it."""
    monkeypatch.setattr("kinema.cluster.remote._COURTESY_S", (1.0, 1.0))
    speaker = Speaker()
    cluster.network.serve(speaker.handlers)
    frontend = await cluster.frontend(info_silence_s=20)
    await until_ready(frontend, "w1")
    own, others = make_task(), make_task()
    run = asyncio.create_task(all_of(frontend.run("w1", own)))
    await until(lambda: speaker.num_running == 1)

    def free() -> int:
        (info,) = frontend.workers()
        return info.free_slots

    both = [[task.job_id, task.attempt] for task in (own, others)]
    speaker.say(free_slots=0, running=both)
    await until(lambda: free() == 0)
    # The other's slot is seen late, its own at once.
    speaker.say(free_slots=1, running=both[:1], predicted_work=1.0)
    await until(lambda: frontend.workers()[0].predicted_work == 1.0)
    assert free() == 0
    await asyncio.wait_for(frontend.wait_for_change(20), 10)
    assert free() == 1
    speaker.let_go.set()
    await run
    speaker.say(free_slots=2, running=[], predicted_work=2.0)
    await until(lambda: frontend.workers()[0].predicted_work == 2.0)
    assert free() == 2
