"""What a lost worker had done is not done again, and nothing of it is left when the job has ended."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from kinema.engines.base import Frames, Output, Step
from kinema.engines.fake import FakeEngine
from kinema.errors import Drained, GenerationError, StorageUnavailable, WorkerLost
from kinema.events import Artifact, Cancelled, Completed, Event, Failed, Progress
from kinema.job import Task
from kinema.request.request import GenerationRequest
from kinema.settings import WorkerSettings
from kinema.storage import Storage, checkpoint_key, manifest_key, spritesheet_key, thumbnail_key, video_key
from kinema.worker import worker as worker_module
from kinema.worker.checkpoints import Checkpoints
from kinema.worker.worker import Worker
from tests.serving import until
from tests.unit.worker.tasks import PATIENCE_S, collect, film_of, make_request, make_task

NUM_STEPS = 12
# On a clock that each output moves on by one: a checkpoint after every third step.
INTERVAL_S = 3


class Device:
    """What a FakeEngine is told to do: hold before one output, die instead of one.

    Each output takes a second, or longer if a checkpoint is still being stored and it ``keeps_pace``, so that a test
    knows which one is there.
    """

    def __init__(self, dies_at: str = "", holds_at: str = "", *, keeps_pace: bool = True) -> None:
        self.engine = FakeEngine(on_output=self)
        self._dies_at, self._holds_at, self._keeps_pace = dies_at, holds_at, keeps_pace
        self.now_s = 0.0
        self.seen: list[str] = []
        self.is_held, self.may_go_on = threading.Event(), threading.Event()

    def __call__(self, _request: GenerationRequest, output: Output) -> None:
        if self._keeps_pace:
            finish_storing()
        name = f"{type(output).__name__} {output.index}"
        self.seen.append(name)
        self.now_s += 1
        if name == self._holds_at:
            self.is_held.set()
            assert self.may_go_on.wait(PATIENCE_S)
        if name == self._dies_at:
            raise SystemExit

    @property
    def steps(self) -> list[int]:
        return [int(name.removeprefix("Step ")) for name in self.seen if name.startswith("Step")]


def finish_storing() -> None:
    """Of checkpoints."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join(PATIENCE_S)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "files"


@pytest.fixture
def storage(folder: Path) -> Storage:
    return Storage(f"file://{folder}")


@pytest.fixture
def task() -> Task:
    return make_task(num_inference_steps=NUM_STEPS)


@pytest.fixture(autouse=True)
def _deaths_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _died: None)


@pytest.fixture(autouse=True)
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Device], Device]:
    """Makes the device's clock that of the checkpoints."""

    def use(device: Device) -> Device:
        monkeypatch.setattr(worker_module, "Checkpoints", partial(Checkpoints, clock=lambda: device.now_s))
        return device

    return use


@asynccontextmanager
async def running(device: Device, storage: Storage, **settings: float) -> AsyncIterator[Worker]:
    worker = Worker(device.engine, storage, WorkerSettings.model_validate({"checkpoint_s": INTERVAL_S, **settings}))
    await worker.start()
    try:
        yield worker
    finally:
        await worker.stop()


async def lose(task: Task, device: Device, storage: Storage) -> None:
    async with running(device, storage) as worker:
        with pytest.raises(WorkerLost):
            await collect(worker.run(task))


def again(task: Task) -> Task:
    return task.model_copy(update={"attempt": task.attempt + 1})


def stored(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


async def check_made(events: list[Event], task: Task, storage: Storage, folder: Path) -> None:
    """The right film is there, with what belongs to it, and nothing else is or soon will be."""
    assert isinstance(events[-1], Completed)
    assert b"".join(storage.read(video_key(task.job_id, task.attempt))) == film_of(task.request)
    make_keys = (video_key, manifest_key, thumbnail_key, spritesheet_key)
    keys = sorted(make_key(task.job_id, task.attempt) for make_key in make_keys)
    await until(lambda: stored(folder) == keys)


@pytest.mark.parametrize("dies_at", [1, 2, 3, 4, 6, 7, 11, 12])
async def test_a_lost_job_goes_on_at_its_checkpoint(
    dies_at: int, task: Task, storage: Storage, folder: Path, use: Callable[[Device], Device]
) -> None:
    """Another worker takes the steps since the newest checkpoint again, an interval of them at most."""
    await lose(task, use(Device(dies_at=f"Step {dies_at}")), storage)
    heir = use(Device())
    async with running(heir, storage) as worker:
        events = await collect(worker.run(again(task)))
    kept = (dies_at - 1) // INTERVAL_S * INTERVAL_S
    assert heir.steps == list(range(kept + 1, NUM_STEPS + 1))
    assert events[0] == Progress(stage="denoise", step=kept + 1, total=NUM_STEPS)
    await check_made(events, again(task), storage, folder)


@pytest.mark.parametrize("num_steps", [1, 2, NUM_STEPS, NUM_STEPS + 1])
async def test_what_is_lost_while_decoding_is_not_denoised_again(
    num_steps: int, storage: Storage, folder: Path, use: Callable[[Device], Device]
) -> None:
    """The last step has a checkpoint too, before an interval is over."""
    task = make_task(num_inference_steps=num_steps)
    await lose(task, use(Device(dies_at="Frames 2")), storage)
    heir = use(Device())
    async with running(heir, storage) as worker:
        events = await collect(worker.run(again(task)))
    assert heir.steps == []
    await check_made(events, again(task), storage, folder)


async def test_a_job_can_be_lost_again(
    task: Task, storage: Storage, folder: Path, use: Callable[[Device], Device]
) -> None:
    """And goes on each time; the steps of all attempts are those of one, and two checkpoints' worth."""
    steps = []
    for dies_at in (5, 9):
        device = use(Device(dies_at=f"Step {dies_at}"))
        await lose(task, device, storage)
        steps += device.steps
        task = again(task)
    heir = use(Device())
    async with running(heir, storage) as worker:
        events = await collect(worker.run(task))
    assert steps + heir.steps == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8, 9, 7, 8, 9, 10, 11, 12]
    await check_made(events, task, storage, folder)


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty", "of another request"])
async def test_a_checkpoint_that_does_not_fit_begins_again(
    damage: str, task: Task, storage: Storage, folder: Path, use: Callable[[Device], Device]
) -> None:
    """With a line in the log, and the right film."""
    await lose(task, use(Device(dies_at="Step 7")), storage)
    path = folder / checkpoint_key(task.job_id)
    data = path.read_bytes()
    other = next(FakeEngine().generate(make_request("another", num_inference_steps=NUM_STEPS)))
    assert isinstance(other, Step)
    assert other.checkpoint is not None
    flipped = data[:-2] + bytes([data[-2] ^ 4]) + data[-1:]
    path.write_bytes(
        {"torn": data[:-5], "flipped": flipped, "empty": b"", "of another request": other.checkpoint()}[damage]
    )
    heir = use(Device())
    async with running(heir, storage) as worker:
        with capture_logs() as logs:
            events = await collect(worker.run(again(task)))
    assert [entry["event"] for entry in logs] == ["a checkpoint is not used, the video is begun again"]
    assert heir.steps == list(range(1, NUM_STEPS + 1))
    await check_made(events, again(task), storage, folder)


async def leave_by_drain(worker: Worker, stream: asyncio.Task[list[Event]], device: Device) -> type[BaseException]:
    worker.give_back(Drained())
    device.may_go_on.set()
    return Drained


async def leave_by_stop(worker: Worker, stream: asyncio.Task[list[Event]], device: Device) -> type[BaseException]:
    stopping = asyncio.create_task(worker.stop())
    await until(lambda: not worker.is_ready)
    device.may_go_on.set()
    await stopping
    return WorkerLost


async def leave_by_silence(worker: Worker, stream: asyncio.Task[list[Event]], device: Device) -> type[BaseException]:
    stream.cancel()
    await asyncio.sleep(0)  # one turn of the loop: it has asked, and waits for the device
    device.may_go_on.set()
    return asyncio.CancelledError


@pytest.mark.parametrize("leave", [leave_by_drain, leave_by_stop, leave_by_silence])
async def test_a_worker_that_leaves_has_no_step_taken_twice(
    leave: Callable[[Worker, asyncio.Task[list[Event]], Device], Awaitable[type[BaseException]]],
    task: Task,
    storage: Storage,
    folder: Path,
    use: Callable[[Device], Device],
) -> None:
    """Told to go, stopped, or not listened to, it stores the step that it stands at before it says so."""
    device = use(Device(holds_at="Step 5"))
    async with running(device, storage) as worker:
        stream = asyncio.create_task(collect(worker.run(task)))
        await until(device.is_held.is_set)
        reason = await leave(worker, stream, device)
        with pytest.raises(reason):
            await stream
        assert stored(folder) == [checkpoint_key(task.job_id)]
    heir = use(Device())
    async with running(heir, storage) as worker:
        events = await collect(worker.run(again(task)))
    assert device.steps + heir.steps == list(range(1, NUM_STEPS + 1))
    await check_made(events, again(task), storage, folder)


@pytest.mark.parametrize("holds_at", ["Step 5", "Step 12", "Frames 2"])
async def test_a_cancelled_job_leaves_no_checkpoint(
    holds_at: str, task: Task, storage: Storage, folder: Path, use: Callable[[Device], Device]
) -> None:
    """Whatever was stored of it before."""
    device = use(Device(holds_at=holds_at))
    async with running(device, storage) as worker:
        stream = asyncio.create_task(collect(worker.run(task)))
        await until(device.is_held.is_set)
        assert stored(folder) == [checkpoint_key(task.job_id)]
        await worker.cancel(task.job_id, task.attempt)
        device.may_go_on.set()
        assert (await stream)[-1] == Cancelled()
        await until(lambda: stored(folder) == [])


async def test_a_failed_job_leaves_no_checkpoint(
    storage: Storage, folder: Path, use: Callable[[Device], Device]
) -> None:
    """It would fail again."""
    async with running(use(Device()), storage) as worker:
        with capture_logs():
            events = await collect(worker.run(make_task("waves [fail]", num_inference_steps=NUM_STEPS)))
    assert isinstance(events[-1], Failed)
    assert stored(folder) == []


class BadStorage(Storage):
    """Checkpoints are not taken, at once or after a long time; films are."""

    def __init__(self, url: str, *, is_slow: bool) -> None:
        super().__init__(url)
        self.may_end = threading.Event()
        self._is_slow = is_slow
        self.num_checkpoints = 0

    def put_bytes(self, key: str, data: bytes, media_type: str) -> Artifact:
        if key.endswith("checkpoint"):
            self.num_checkpoints += 1
            if not self._is_slow:
                raise StorageUnavailable("no room")
            assert self.may_end.wait(PATIENCE_S)
        return super().put_bytes(key, data, media_type)


async def test_storage_that_takes_no_checkpoint_costs_no_video(
    task: Task, folder: Path, use: Callable[[Device], Device]
) -> None:
    """A warning for each."""
    storage = BadStorage(f"file://{folder}", is_slow=False)
    async with running(use(Device()), storage) as worker:
        with capture_logs() as logs:
            events = await collect(worker.run(task))
            finish_storing()
    warnings = [entry["reason"] for entry in logs if entry["event"] == "a checkpoint was not stored"]
    assert warnings == ["no room"] * storage.num_checkpoints
    assert storage.num_checkpoints > 1
    await check_made(events, task, storage, folder)


async def test_nothing_waits_for_a_checkpoint_to_be_stored(
    task: Task, folder: Path, use: Callable[[Device], Device]
) -> None:
    """The film is finished meanwhile; the next checkpoint is not begun before, and none is left."""
    storage = BadStorage(f"file://{folder}", is_slow=True)
    async with running(use(Device(keeps_pace=False)), storage) as worker:
        events = await collect(worker.run(task))
        assert storage.num_checkpoints == 1
        storage.may_end.set()
        await check_made(events, task, storage, folder)


async def test_a_drain_does_not_wait_long_for_storage(
    task: Task, folder: Path, use: Callable[[Device], Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else makes the video from what there is."""
    monkeypatch.setattr(worker_module, "GIVE_BACK_S", 0.05)
    storage = BadStorage(f"file://{folder}", is_slow=True)
    device = use(Device(holds_at="Step 5", keeps_pace=False))
    async with running(device, storage) as worker:
        stream = asyncio.create_task(collect(worker.run(task)))
        await until(device.is_held.is_set)
        worker.give_back(Drained())
        device.may_go_on.set()
        with pytest.raises(Drained):
            await stream
        assert not storage.may_end.is_set()
        storage.may_end.set()


async def test_an_engine_that_cannot_make_a_checkpoint_goes_on(
    task: Task, storage: Storage, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory for the copy, for instance."""

    class Poor(FakeEngine):
        def generate(self, *arguments: object, **named: object):  # type: ignore[override, no-untyped-def]
            for output in super().generate(*arguments, **named):  # type: ignore[arg-type]
                yield replace(output, checkpoint=self.fail) if isinstance(output, Step) else output

        def fail(self) -> bytes:
            raise MemoryError

    worker = Worker(Poor(), storage, WorkerSettings(checkpoint_s=0))
    await worker.start()
    with capture_logs() as logs:
        events = await collect(worker.run(task))
    await worker.stop()
    assert [entry["event"] for entry in logs] == ["a checkpoint was not made"] * NUM_STEPS
    await check_made(events, task, storage, folder)


async def test_without_an_interval_there_are_none(
    task: Task, storage: Storage, folder: Path, use: Callable[[Device], Device]
) -> None:
    """Not even when the worker leaves, and what is there is not looked at."""
    await lose(task, use(Device(dies_at="Step 7")), storage)
    task = again(task)
    (folder / checkpoint_key(task.job_id)).rename(folder / "elsewhere")
    device = use(Device(holds_at="Step 5"))
    async with running(device, storage, checkpoint_s=float("inf")) as worker:
        stream = asyncio.create_task(collect(worker.run(task)))
        await until(device.is_held.is_set)
        worker.give_back(Drained())
        device.may_go_on.set()
        with pytest.raises(GenerationError):
            await stream
    assert device.steps[0] == 1
    assert stored(folder) == ["elsewhere"]


async def test_a_first_attempt_asks_for_no_checkpoint(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """There cannot be one; later ones ask once."""
    read: list[str] = []
    monkeypatch.setattr(Storage, "read", lambda _self, key: read.append(key) or iter([b""]))
    task = make_task()
    with capture_logs():
        for attempt in (task, again(task)):
            async with running(Device(), storage) as worker, aclosing(worker.run(attempt)) as events:  # type: ignore[type-var]
                assert isinstance([event async for event in events][-1], Completed)
    assert read == [checkpoint_key(task.job_id)]


async def test_a_checkpoint_that_is_too_large_is_not_read(
    task: Task, storage: Storage, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more memory is taken for it than the request can need; the video begins again, and the file goes."""
    request, read = task.request, [0]
    file = folder / checkpoint_key(task.job_id)
    file.parent.mkdir(parents=True)
    with file.open("wb") as sparse:
        sparse.truncate(2**40)
    read_chunks = Storage.read

    def count(self: Storage, key: str) -> Iterator[bytes]:
        for chunk in read_chunks(self, key):
            read[0] += len(chunk)
            yield chunk

    monkeypatch.setattr(Storage, "read", count)
    device = Device()
    async with running(device, storage) as worker:
        events = await collect(worker.run(again(task)))
    assert device.steps[0] == 1
    assert read[0] < request.width * request.height * request.num_frames * 16 + 2**21
    await check_made(events, again(task), storage, folder)


async def test_frames_have_no_checkpoint(task: Task, storage: Storage, use: Callable[[Device], Device]) -> None:
    """A worker that leaves while it decodes leaves the one of the last step."""
    device = use(Device(holds_at="Frames 2"))
    async with running(device, storage) as worker:
        stream = asyncio.create_task(collect(worker.run(task)))
        await until(device.is_held.is_set)
        worker.give_back(Drained())
        device.may_go_on.set()
        with pytest.raises(Drained):
            await stream
    outputs = list(FakeEngine().generate(task.request, resume=b"".join(storage.read(checkpoint_key(task.job_id)))))
    assert all(isinstance(output, Frames) for output in outputs)
