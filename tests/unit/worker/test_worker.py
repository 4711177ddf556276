"""Tasks in, events out: fairness, equality, cancelling in every state, and exactly one end."""

from __future__ import annotations

import asyncio
import gc
import io
import tempfile
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from structlog.testing import capture_logs

from kinema.engines.base import NO_INPUTS, Frames, Inputs, Output, StageReport, Step, report_nothing
from kinema.engines.fake import FakeEngine
from kinema.errors import ConfigError, FileGone, NoWorker, OutOfMemory, StorageUnavailable, WorkerLost
from kinema.events import Artifact, Cancelled, Completed, Event, Failed, Progress, Started, is_terminal
from kinema.ids import new_job_id
from kinema.job import Task
from kinema.media.film import open_film
from kinema.media.images import encode_png
from kinema.media.mp4 import Mp4Writer
from kinema.media.sound import Sound
from kinema.request.capabilities import Capabilities
from kinema.request.request import GenerationRequest
from kinema.request.shapes import Size
from kinema.settings import WorkerSettings
from kinema.storage import (
    Storage,
    checkpoint_key,
    image_key,
    last_frame_key,
    manifest_key,
    spritesheet_key,
    thumbnail_key,
    video_key,
)
from kinema.worker.active import Admit
from kinema.worker.gpu import DeviceThread
from kinema.worker.scheduler import Policy
from kinema.worker.worker import Worker
from tests.serving import until
from tests.unit.worker.tasks import PATIENCE_S, collect, film_of, make_request, make_task

# The film, its manifest, its thumbnail and its sheet of frames.
FILES_PER_JOB = 4


@asynccontextmanager
async def running(
    engine: FakeEngine, storage: Storage, max_active: int = 3, patience_s: float = 60, policy: Policy = "shortest"
) -> AsyncIterator[Worker]:
    settings = WorkerSettings(max_active=max_active, storage_patience_s=patience_s, policy=policy)
    worker = Worker(engine, storage, settings, worker_id="w1")
    await worker.start()
    try:
        yield worker
    finally:
        await worker.stop()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "files"


@pytest.fixture
def storage(folder: Path) -> Storage:
    return Storage(f"file://{folder}")


@pytest.fixture(autouse=True)
def _temporary_files_are_gone_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test did."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    yield
    assert list(temporary.iterdir()) == []


def stored(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def files_of(task: Task) -> list[str]:
    """What a completed task leaves in storage."""
    make_keys = (video_key, manifest_key, thumbnail_key, spritesheet_key)
    return sorted(make_key(task.job_id, task.attempt) for make_key in make_keys)


class Gate:
    """Holds one generation on the device thread just before one output, until it is opened."""

    def __init__(self, prompt: str, output: str) -> None:
        self._prompt, self._output = prompt, output
        self._reached, self._open = threading.Event(), threading.Event()
        self.seen: list[str] = []

    def __call__(self, request: GenerationRequest, output: Output) -> None:
        name = f"{type(output).__name__} {output.index}"
        self.seen.append(f"{request.prompt}: {name}")
        if (request.prompt, name) == (self._prompt, self._output):
            self._reached.set()
            assert self._open.wait(PATIENCE_S), "the test never opened the gate"

    async def reached(self) -> None:
        assert await asyncio.to_thread(self._reached.wait, PATIENCE_S), "the generation never came to the gate"

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def admissions(monkeypatch: pytest.MonkeyPatch) -> asyncio.Semaphore:
    """Released once for each generation that has been handed to the device."""
    count = asyncio.Semaphore(0)
    admit = DeviceThread.admit

    def admit_and_tell(device: DeviceThread, message: Admit) -> None:
        admit(device, message)
        count.release()

    monkeypatch.setattr(DeviceThread, "admit", admit_and_tell)
    return count


class SlowStorage(Storage):
    """Holds every upload until it is let go."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.has_begun, self.may_end = threading.Event(), threading.Event()
        self.is_delete_failing = False

    def put_file(self, path: Path, key: str, media_type: str, sha256: Callable[[], str]) -> Artifact:
        self.has_begun.set()
        assert self.may_end.wait(PATIENCE_S)
        return super().put_file(path, key, media_type, sha256)

    def delete(self, key: str) -> None:
        if self.is_delete_failing:
            raise StorageUnavailable("cannot delete")
        super().delete(key)


async def test_a_task_ends_in_a_film(storage: Storage) -> None:
    """Progress through both stages, then Completed with the artifact and where the time went."""
    task = make_task()
    async with running(FakeEngine(), storage) as worker:
        events = await collect(worker.run(task))
    assert events[:-1] == [
        *(Progress(stage="denoise", step=step, total=3) for step in (1, 2, 3)),
        *(Progress(stage="decode", step=step, total=3) for step in (1, 2, 3)),
    ]
    done = events[-1]
    assert isinstance(done, Completed)
    assert done.artifact.key == video_key(task.job_id, task.attempt)
    assert b"".join(storage.read(done.artifact.key)) == film_of(task.request)
    assert [made.key for made in (done.artifact, done.thumbnail, done.spritesheet) if made] == [
        make_key(task.job_id, 1) for make_key in (video_key, thumbnail_key, spritesheet_key)
    ]
    timings = done.timings
    parts = (timings.denoise_s, timings.decode_s, timings.delivery_s)
    assert min(parts) > 0
    assert 0 < timings.first_step_s < timings.denoise_s
    assert timings.total_s >= sum(parts) - 1e-3


async def test_a_video_that_is_not_as_it_was_asked_for_is_delivered_with_a_warning(storage: Storage) -> None:
    """The film and its previews have the size that the frames have, and the engine's sentence goes with them."""
    task = make_task("waves [narrow]")
    async with running(FakeEngine(), storage) as worker:
        done = (await collect(worker.run(task)))[-1]
    assert isinstance(done, Completed)
    assert done.warnings == ("the video is 48 pixels wide, not 64",)
    path = Path(tempfile.gettempdir()) / "film.mp4"
    path.write_bytes(b"".join(storage.read(done.artifact.key)))
    film = open_film(path)
    path.unlink()
    assert (film.shape.size, film.shape.num_frames_at(task.request.fps)) == (Size(width=48, height=64), 9)
    assert done.thumbnail is not None
    with Image.open(io.BytesIO(b"".join(storage.read(done.thumbnail.key)))) as picture:
        assert picture.size == (48, 64)


async def test_interleaved_equals_alone(storage: Storage) -> None:
    """Three generations at once store the same bytes as each by itself."""
    tasks = [make_task(prompt, num_inference_steps=steps) for prompt, steps in (("a", 2), ("b", 5), ("c", 9))]
    async with running(FakeEngine(), storage) as worker:
        ends = [events[-1] for events in await asyncio.gather(*(collect(worker.run(task)) for task in tasks))]
    films = [b"".join(storage.read(end.artifact.key)) for end in ends if isinstance(end, Completed)]
    assert films == [film_of(task.request) for task in tasks]
    assert len(set(films)) == 3


async def test_two_generations_take_turns_if_the_settings_say_so(
    storage: Storage, admissions: asyncio.Semaphore
) -> None:
    """They alternate: while both run, neither is ever two outputs ahead."""
    gate = Gate("a", "Step 1")
    async with running(FakeEngine(on_output=gate), storage, policy="round-robin") as worker:
        a = asyncio.create_task(collect(worker.run(make_task("a", num_inference_steps=10))))
        await gate.reached()
        b = asyncio.create_task(collect(worker.run(make_task("b", num_inference_steps=10))))
        for _ in range(2):
            await admissions.acquire()
        gate.open()
        await asyncio.gather(a, b)
    order = [seen[0] for seen in gate.seen]
    assert order == ["a", "b"] * 13


class ImagesInTurn(FakeEngine):
    """Begins with a picture, and makes one video after the other."""

    @property
    def capabilities(self) -> Capabilities:
        return super().capabilities.model_copy(update={"is_text_to_video": False, "is_interleaved": False})


async def test_an_engine_without_turns_gets_one_video_at_a_time(storage: Storage) -> None:
    """Whatever the settings would allow."""
    async with running(ImagesInTurn(), storage, max_active=8) as worker:
        assert worker.free_slots == 1


async def test_a_model_that_begins_with_a_picture_is_probed_with_one(storage: Storage) -> None:
    """Its size is the probe's."""
    sizes = []

    class Looks(ImagesInTurn):
        def generate(self, request, inputs=NO_INPUTS, resume=None):
            sizes.append((inputs.first_frame.shape, (request.height, request.width, 3)))
            return super().generate(request, inputs, resume)

    async with running(Looks(), storage) as worker:
        await worker.probe()
    assert [given for given, _ in sizes] == [asked for _, asked in sizes]
    assert len(sizes) == 2


async def test_a_short_task_does_not_wait_for_a_long_one(storage: Storage, admissions: asyncio.Semaphore) -> None:
    """It overtakes one that began before it."""
    gate = Gate("long", "Step 1")
    async with running(FakeEngine(on_output=gate), storage) as worker:
        long = asyncio.create_task(collect(worker.run(make_task("long", num_inference_steps=50))))
        await gate.reached()
        short = asyncio.create_task(collect(worker.run(make_task("short", num_inference_steps=1, num_frames=1))))
        for _ in range(2):
            await admissions.acquire()
        gate.open()
        await asyncio.gather(long, short)
    assert gate.seen.index("short: Frames 1") < gate.seen.index("long: Step 4")


async def test_frames_are_encoded_while_later_ones_are_decoded(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second chunk leaves the engine only after the first went through the encoder, and so on."""
    encoded = threading.Semaphore(0)
    add = Mp4Writer.add

    def add_and_tell(writer: Mp4Writer, frames: np.ndarray, sound: Sound | None) -> None:
        add(writer, frames, sound)
        encoded.release()

    monkeypatch.setattr(Mp4Writer, "add", add_and_tell)

    def wait_for_the_encoder(_request: GenerationRequest, output: Output) -> None:
        if isinstance(output, Frames) and output.index > 1:
            assert encoded.acquire(timeout=PATIENCE_S), "the encoder did not run beside the decoder"

    async with running(FakeEngine(on_output=wait_for_the_encoder), storage) as worker:
        events = await collect(worker.run(make_task()))
    assert isinstance(events[-1], Completed)


@pytest.mark.parametrize("state", ["Step 1", "Step 2", "Frames 1", "Frames 3"])
async def test_cancel_on_the_device(storage: Storage, folder: Path, state: str) -> None:
    """While denoising and while decoding: the output at hand is the last, and no file is left."""
    gate = Gate("a", state)
    engine = FakeEngine(on_output=gate)
    task = make_task("a")
    async with running(engine, storage) as worker:
        events = asyncio.create_task(collect(worker.run(task)))
        await gate.reached()
        await worker.cancel(task.job_id, task.attempt)
        gate.open()
        ended = await events
        assert ended[-1] == Cancelled()
        assert gate.seen[-1] == f"a: {state}"
        assert engine.num_running == 0
        assert worker.free_slots == 3
    assert stored(folder) == []


async def test_cancel_while_queued_for_the_device(
    storage: Storage, folder: Path, admissions: asyncio.Semaphore
) -> None:
    """The generation never takes a step; the one that holds the device goes on."""
    gate = Gate("first", "Step 1")
    queued = make_task("queued")
    async with running(FakeEngine(on_output=gate), storage) as worker:
        first = asyncio.create_task(collect(worker.run(make_task("first"))))
        await gate.reached()
        events = asyncio.create_task(collect(worker.run(queued)))
        for _ in range(2):
            await admissions.acquire()
        await worker.cancel(queued.job_id, queued.attempt)
        gate.open()
        assert await events == [Cancelled()]
        assert isinstance((await first)[-1], Completed)
    assert not [seen for seen in gate.seen if seen.startswith("queued")]
    assert len(stored(folder)) == FILES_PER_JOB


async def test_cancel_before_anything_began(storage: Storage, folder: Path) -> None:
    """In the very moment of its admission."""
    task = make_task()
    async with running(FakeEngine(), storage) as worker:
        stream = worker.run(task)
        await worker.cancel(task.job_id, task.attempt)
        assert await collect(stream) == [Cancelled()]
    assert stored(folder) == []


async def test_cancel_while_uploading(folder: Path) -> None:
    """The upload ends and is deleted."""
    storage = SlowStorage(f"file://{folder}")
    task = make_task()
    async with running(FakeEngine(), storage) as worker:
        events = asyncio.create_task(collect(worker.run(task)))
        assert await asyncio.to_thread(storage.has_begun.wait, PATIENCE_S)
        await worker.cancel(task.job_id, task.attempt)
        storage.may_end.set()
        assert (await events)[-1] == Cancelled()
    assert stored(folder) == []


async def test_an_upload_that_cannot_be_taken_back_is_completed(folder: Path) -> None:
    """Cancelled never leaves an artifact: when deleting fails, the film is there and the job says so."""
    storage = SlowStorage(f"file://{folder}")
    storage.is_delete_failing = True
    task = make_task()
    async with running(FakeEngine(), storage) as worker:
        events = asyncio.create_task(collect(worker.run(task)))
        assert await asyncio.to_thread(storage.has_begun.wait, PATIENCE_S)
        await worker.cancel(task.job_id, task.attempt)
        storage.may_end.set()
        with capture_logs() as logs:
            assert isinstance((await events)[-1], Completed)
    assert [entry["event"] for entry in logs] == ["a cancel came too late"]
    assert stored(folder) == files_of(task)


async def test_cancelling_after_the_end_or_an_unknown_job_is_nothing(storage: Storage) -> None:
    """The artifact stays."""
    task = make_task()
    async with running(FakeEngine(), storage) as worker:
        events = await collect(worker.run(task))
        await worker.cancel(task.job_id, task.attempt)
        await worker.cancel(new_job_id(), 1)
    assert isinstance(events[-1], Completed)
    assert b"".join(storage.read(video_key(task.job_id, task.attempt)))


async def test_closing_the_stream_cancels(storage: Storage, folder: Path) -> None:
    """After aclose the device is free, the slot too, and no file is left but for whoever takes the job over."""
    gate = Gate("a", "Step 2")
    engine = FakeEngine(on_output=gate)
    task = make_task("a")
    async with running(engine, storage) as worker:
        stream = worker.run(task)
        assert await anext(stream) == Started(worker_id="w1", attempt=1)
        assert await anext(stream) == Progress(stage="denoise", step=1, total=3)
        await gate.reached()
        closing = asyncio.create_task(stream.aclose())  # type: ignore[attr-defined]
        await asyncio.sleep(0)  # one turn of the loop: it has asked, and waits for the device
        gate.open()
        await closing
        assert gate.seen[-1] == "a: Step 2"
        assert engine.num_running == 0
        assert worker.free_slots == 3
    assert stored(folder) == [checkpoint_key(task.job_id)]


async def test_a_listener_that_is_cancelled_cancels(storage: Storage, folder: Path) -> None:
    """As when the task of whoever listens is cancelled."""
    gate = Gate("a", "Step 2")
    engine = FakeEngine(on_output=gate)
    task = make_task("a")
    async with running(engine, storage) as worker:
        listener = asyncio.create_task(collect(worker.run(task)))
        await gate.reached()
        listener.cancel()
        gate.open()
        with pytest.raises(asyncio.CancelledError):
            await listener
        assert engine.num_running == 0
    assert stored(folder) == [checkpoint_key(task.job_id)]


async def test_a_stream_that_nobody_reads_still_ends(storage: Storage) -> None:
    """And gives its slot back."""
    async with running(FakeEngine(), storage, max_active=1) as worker:
        unread = worker.run(make_task())
        assert worker.free_slots == 0
        while not worker.free_slots:
            await worker.wait_for_change()
        assert isinstance((await collect(unread))[-1], Completed)


async def test_an_engine_exception_is_one_sentence(storage: Storage, folder: Path) -> None:
    """The class name for the client, the traceback for the log; the worker goes on."""

    def on_output(request: GenerationRequest, output: Output) -> None:
        if request.prompt == "bad" and output == Step(3, 3):
            raise RuntimeError("secret detail in /home/model")

    async with running(FakeEngine(on_output=on_output), storage) as worker:
        with capture_logs() as logs:
            bad, good = await asyncio.gather(*(collect(worker.run(make_task(prompt))) for prompt in ("bad", "good")))
        assert isinstance((await collect(worker.run(make_task())))[-1], Completed)
    assert bad[-1] == Failed(code="engine_failed", message="The engine failed while it made the video (RuntimeError).")
    assert bad[:-1] == [Progress(stage="denoise", step=step, total=3) for step in (1, 2)]
    assert isinstance(good[-1], Completed)
    assert [str(entry["exc_info"]) for entry in logs] == ["secret detail in /home/model"]
    assert len(stored(folder)) == 2 * FILES_PER_JOB


async def test_a_device_that_failed_gets_nothing_more(storage: Storage, folder: Path) -> None:
    """Its jobs are lost, to go on elsewhere from what was stored of them; the worker is not ready from then on."""
    are_both_there = threading.Event()

    def fail(request: GenerationRequest, output: Output) -> None:
        assert are_both_there.wait(PATIENCE_S)
        if request.prompt == "bad" and output == Step(2, 3):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    async with running(FakeEngine(on_output=fail), storage) as worker:
        streams = [worker.run(make_task(prompt)) for prompt in ("bad", "good", "late")]
        are_both_there.set()
        with capture_logs() as logs:
            outcomes = await asyncio.gather(*map(collect, streams), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [WorkerLost] * 3
        assert (worker.is_ready, worker.free_slots, worker.has_lost_device) == (False, 0, True)
        await asyncio.wait_for(worker.wait_for_loss(), PATIENCE_S)
        with pytest.raises(WorkerLost, match="not ready"):
            worker.run(make_task())
    assert [str(entry["exc_info"]) for entry in logs if entry["log_level"] == "critical"] == [
        "CUDA error: an illegal memory access was encountered"
    ]
    assert {Path(name).name for name in stored(folder)} <= {"checkpoint"}


async def test_a_device_that_fails_in_the_load_is_no_wrong_setting(storage: Storage) -> None:
    """The same start may work again; the exit code is not that of a configuration."""

    def fail(_report: StageReport) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    worker = Worker(FakeEngine(on_load=fail), storage, WorkerSettings())
    with pytest.raises(WorkerLost):
        await worker.start()


async def test_a_failed_job_leaves_no_memory_behind(storage: Storage) -> None:
    """With the collector off: neither where it failed on the device, nor where the worker told of it."""
    held: list[weakref.ref[np.ndarray]] = []

    def fail(_request: GenerationRequest, output: Output) -> None:
        latents = np.zeros(1000)
        held.append(weakref.ref(latents))
        if output == Step(3, 3):
            raise RuntimeError("boom")

    async with running(FakeEngine(on_output=fail), storage) as worker:
        gc.collect()
        gc.disable()
        try:
            tasks = [make_task() for _ in range(3)]
            streams = [worker.run(task) for task in tasks]
            generations = [weakref.ref(one.checkpoints) for one in worker._generations.values()]
            failed = [(await collect(stream))[-1] for stream in streams]
            del streams
            assert [type(event) for event in failed] == [Failed] * 3
            assert len(held) == 9
            await until(lambda: not any(ref() is not None for ref in [*held, *generations]))
        finally:
            gc.enable()


async def test_an_engines_own_error_keeps_its_code(storage: Storage) -> None:
    """OutOfMemory says what to do."""

    def on_output(_request: GenerationRequest, _output: Output) -> None:
        raise OutOfMemory

    async with running(FakeEngine(on_output=on_output), storage) as worker:
        with capture_logs():
            (failed,) = await collect(worker.run(make_task()))
    assert isinstance(failed, Failed)
    assert failed.code == "out_of_memory"
    assert "smaller size" in failed.message


async def test_storage_that_comes_back_gets_the_video(tmp_path: Path) -> None:
    """What was made is kept until it can be stored."""
    blocker = tmp_path / "files" / "videos"
    blocker.parent.mkdir()
    blocker.write_bytes(b"a file where a folder must be")
    async with running(FakeEngine(), Storage(f"file://{tmp_path}/files")) as worker:
        with capture_logs() as logs:
            events = asyncio.create_task(collect(worker.run(make_task())))
            await until(lambda: any(entry["event"] == "storage is waited for" for entry in logs))
            blocker.unlink()
            assert isinstance((await events)[-1], Completed)


async def test_storage_that_cannot_be_written_fails_the_job_only(tmp_path: Path) -> None:
    """With the reason; when it can be written again, the next job completes."""
    blocker = tmp_path / "files" / "videos"
    blocker.parent.mkdir()
    blocker.write_bytes(b"a file where a folder must be")
    async with running(FakeEngine(), Storage(f"file://{tmp_path}/files"), patience_s=0) as worker:
        with capture_logs():
            failed = (await collect(worker.run(make_task())))[-1]
        assert isinstance(failed, Failed)
        assert failed.code == "storage_unavailable"
        assert failed.message.startswith("cannot write videos/")
        blocker.unlink()
        assert isinstance((await collect(worker.run(make_task())))[-1], Completed)


async def test_the_input_images_are_the_first_and_the_last_frame(storage: Storage) -> None:
    """They are read from storage before the device sees the task."""
    seen: list[Inputs] = []

    class Watching(FakeEngine):
        def generate(self, request: GenerationRequest, inputs: Inputs = NO_INPUTS, resume: bytes | None = None):
            seen.append(inputs)
            return super().generate(request, inputs, resume)

    first, last = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    job_id = new_job_id()
    keys = {"image_key": image_key(job_id), "last_frame_key": last_frame_key(job_id)}
    for key, picture in zip(keys.values(), (first, last), strict=True):
        storage.put_bytes(key, encode_png(picture), "image/png")
    request = make_request().model_copy(update=keys)
    async with running(Watching(), storage) as worker:
        events = await collect(worker.run(Task(job_id=job_id, attempt=1, request=request)))
    assert isinstance(events[-1], Completed)
    assert seen[0].given().keys() == {"first_frame", "last_frame"}
    assert np.array_equal(seen[0].given()["first_frame"], first)
    assert np.array_equal(seen[0].given()["last_frame"], last)


async def test_an_edit_gets_its_film(storage: Storage) -> None:
    """In the request's size and length, and progress counts the steps that are left."""
    older = make_request("an older film", size="96x64", num_frames=13)
    storage.put_bytes("videos/older/1.mp4", film_of(older), "video/mp4")
    edit = make_request("an edit", num_inference_steps=5)
    request = edit.model_copy(update={"edits_key": "videos/older/1.mp4", "strength": 0.4})
    async with running(FakeEngine(), storage) as worker:
        events = await collect(worker.run(Task(job_id=new_job_id(), attempt=1, request=request)))
        again = await collect(worker.run(Task(job_id=new_job_id(), attempt=1, request=request)))
    assert events[:2] == [Progress(stage="denoise", step=step, total=2) for step in (1, 2)]
    done, repeated = events[-1], again[-1]
    assert isinstance(done, Completed)
    assert isinstance(repeated, Completed)
    film = b"".join(storage.read(done.artifact.key))
    assert film == b"".join(storage.read(repeated.artifact.key))
    frames, given, waves = (
        open_film(data).fit(edit.size, edit.fps, 9).frames for data in (film, film_of(older), film_of(edit))
    )
    assert np.abs(frames - (0.6 * given + 0.4 * waves)).mean() < 3


async def test_a_film_to_edit_that_is_damaged_fails_the_job(storage: Storage) -> None:
    """Before it costs a step."""
    storage.put_bytes("videos/older/1.mp4", b"text", "video/mp4")
    request = make_request().model_copy(update={"edits_key": "videos/older/1.mp4", "strength": 0.4})
    async with running(FakeEngine(), storage) as worker:
        with capture_logs():
            (failed,) = await collect(worker.run(Task(job_id=new_job_id(), attempt=1, request=request)))
    assert isinstance(failed, Failed)
    assert failed.code == "invalid_value"


@pytest.mark.parametrize(("content", "code"), [(None, "file_gone"), (b"text", "invalid_value")])
async def test_an_input_image_that_is_gone_or_damaged_fails_the_job(
    storage: Storage, content: bytes | None, code: str
) -> None:
    """Before it costs a step."""
    job_id = new_job_id()
    if content is not None:
        storage.put_bytes(image_key(job_id), content, "image/png")
    request = make_request().model_copy(update={"image_key": image_key(job_id)})
    async with running(FakeEngine(), storage) as worker:
        with capture_logs():
            (failed,) = await collect(worker.run(Task(job_id=job_id, attempt=1, request=request)))
    assert isinstance(failed, Failed)
    assert failed.code == code


async def test_admission_is_bounded(storage: Storage) -> None:
    """One task more than there are slots is refused at once, and a freed slot takes it."""
    gate = Gate("a", "Step 1")
    async with running(FakeEngine(on_output=gate), storage, max_active=1) as worker:
        assert worker.free_slots == 1
        first = worker.run(make_task("a"))
        assert worker.free_slots == 0
        with pytest.raises(NoWorker, match="takes no more"):
            worker.run(make_task("b"))
        gate.open()
        await collect(first)
        assert worker.free_slots == 1
        assert isinstance((await collect(worker.run(make_task("b"))))[-1], Completed)


async def test_stop_hands_running_jobs_back(storage: Storage, folder: Path) -> None:
    """Their streams raise WorkerLost, whether they were on the device or waiting for it. No film is left."""
    gate = Gate("a", "Step 2")
    worker = Worker(FakeEngine(on_output=gate), storage, WorkerSettings(max_active=3))
    await worker.start()
    streams = [asyncio.create_task(collect(worker.run(make_task(prompt)))) for prompt in ("a", "b", "c")]
    await gate.reached()
    stopping = asyncio.create_task(worker.stop())
    while worker.is_ready:
        await worker.wait_for_change()
    gate.open()
    await stopping
    for outcome in await asyncio.gather(*streams, return_exceptions=True):
        assert isinstance(outcome, WorkerLost)
    with pytest.raises(WorkerLost, match="not ready"):
        worker.run(make_task())
    assert worker.free_slots == 0
    assert {Path(name).name for name in stored(folder)} == {"checkpoint"}


async def test_stop_lets_an_upload_end(folder: Path) -> None:
    """A film that is whole is not made again."""
    storage = SlowStorage(f"file://{folder}")
    worker = Worker(FakeEngine(), storage, WorkerSettings())
    await worker.start()
    events = asyncio.create_task(collect(worker.run(make_task())))
    assert await asyncio.to_thread(storage.has_begun.wait, PATIENCE_S)
    stopping = asyncio.create_task(worker.stop())
    while worker.is_ready:
        await worker.wait_for_change()
    storage.may_end.set()
    await stopping
    assert isinstance((await events)[-1], Completed)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConfigError("model folder: vae/config.json is missing"), "^model folder: vae/config.json is missing$"),
        (RuntimeError("bad magic"), r"engine\.model = 'fake' cannot be used \(RuntimeError: bad magic\)"),
    ],
)
async def test_a_model_that_cannot_be_loaded_stops_the_start(storage: Storage, error: Exception, expected: str) -> None:
    """With the reason; stopping such a worker is fine."""

    class Broken(FakeEngine):
        def load(self, report: StageReport = report_nothing) -> None:
            raise error

    worker = Worker(Broken(), storage, WorkerSettings())
    with capture_logs(), pytest.raises(ConfigError, match=expected):
        await worker.start()
    assert not worker.is_ready
    await worker.stop()


@pytest.mark.parametrize(("device", "size"), [("cuda:0", "256x256"), ("cpu", "128x128")])
async def test_the_probe_makes_a_real_video_and_leaves_nothing(
    device: str, size: str, folder: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt "test" and 8 frames in one step, and then in three, to time them; small on a CPU; no file, no slot
    taken."""
    seen: list[GenerationRequest] = []
    monkeypatch.setattr(FakeEngine, "device", device)
    async with running(FakeEngine(on_output=lambda request, _output: seen.append(request)), storage) as worker:
        await worker.probe()
        assert worker.free_slots == 3
    request = seen[0]
    assert seen[-1].num_inference_steps == 3
    assert (request.prompt, str(request.size), request.num_inference_steps) == ("test", size, 1)
    assert request.num_frames == 9  # 8 is not a multiple of 4 plus 1
    assert not await asyncio.to_thread(lambda: list(folder.rglob("*.mp4")))


async def test_a_probe_that_fails_stops_the_start(storage: Storage) -> None:
    """A model that loads but cannot make a video is not put behind a server."""
    async with running(FakeEngine(on_output=fail_at("Frames 1")), storage) as worker:
        with capture_logs(), pytest.raises(ConfigError, match=r"cannot be used \(RuntimeError: boom\)"):
            await worker.probe()


async def test_a_worker_that_never_started_can_be_stopped(storage: Storage) -> None:
    """As on a start that failed elsewhere."""
    worker = Worker(FakeEngine(), storage, WorkerSettings())
    assert (worker.is_ready, worker.free_slots) == (False, 0)
    await worker.stop()


def fail_at(name: str) -> Callable[[GenerationRequest, Output], None]:
    def on_output(_request: GenerationRequest, output: Output) -> None:
        if f"{type(output).__name__} {output.index}" == name:
            raise RuntimeError("boom")

    return on_output


@pytest.mark.parametrize("cancel_after", [None, 0, 1, 4, 6])
@pytest.mark.parametrize("fails_at", ["never", "Step 1", "Step 3", "Frames 2"])
async def test_there_is_exactly_one_end(storage: Storage, fails_at: str, cancel_after: int | None) -> None:
    """Whatever is combined, and it agrees with what is stored."""
    task = make_task()
    events: list[Event] = []
    async with running(FakeEngine(on_output=fail_at(fails_at)), storage) as worker:
        with capture_logs():
            if cancel_after == 0:
                await worker.cancel(task.job_id, task.attempt)
            async for event in worker.run(task):
                events.append(event)
                if len(events) == cancel_after:
                    await worker.cancel(task.job_id, task.attempt)
    assert [is_terminal(event) for event in events] == [False] * (len(events) - 1) + [True]
    if isinstance(events[-1], Completed):
        assert b"".join(storage.read(video_key(task.job_id, task.attempt))) == film_of(task.request)
    else:
        with pytest.raises(FileGone):
            next(iter(storage.read(video_key(task.job_id, task.attempt))))
