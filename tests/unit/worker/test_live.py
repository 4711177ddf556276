"""Videos that are watched while they are made."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import av
import pytest

from kinema.engines.base import Frames, Output, UInt8Array
from kinema.engines.fake import FakeEngine
from kinema.errors import WorkerLost
from kinema.events import Cancelled, Completed
from kinema.job import Task
from kinema.media.mp4 import Mp4Writer
from kinema.media.sound import Sound
from kinema.request.request import GenerationRequest
from kinema.settings import WorkerSettings
from kinema.storage import Storage
from kinema.worker.live import LiveFilm
from kinema.worker.worker import Worker
from tests.unit.worker.tasks import PATIENCE_S, collect, film_of, make_task


class Doors:
    """Holds a generation before each of its chunks until one more is let through; ``on_output`` of a FakeEngine."""

    def __init__(self) -> None:
        self._permits = threading.Semaphore(0)

    def __call__(self, _request: GenerationRequest, output: Output) -> None:
        if isinstance(output, Frames):
            assert self._permits.acquire(timeout=PATIENCE_S), "nobody opened the door"

    def let_through(self, count: int) -> None:
        self._permits.release(count)


@pytest.fixture
def doors() -> Doors:
    return Doors()


@pytest.fixture
async def worker(tmp_path: Path, doors: Doors) -> AsyncIterator[Worker]:
    worker = Worker(FakeEngine(on_output=doors), Storage(f"file://{tmp_path}"), WorkerSettings(max_active=1))
    await worker.start()
    yield worker
    doors.let_through(100)
    await worker.stop()


def num_pictures(film: bytes) -> int:
    with av.open(io.BytesIO(film)) as container:
        return len(list(container.decode(video=0)))


async def all_of(video: AsyncGenerator[bytes, None]) -> bytes:
    return b"".join([data async for data in video])


async def begin(video: AsyncGenerator[bytes, None], doors: Doors) -> bytes:
    """The head and the first fragment, of a video that nobody watched before."""
    reading = asyncio.ensure_future(anext(video))
    await asyncio.sleep(0)  # it waits now
    doors.let_through(1)
    return await reading + await anext(video)


async def test_the_first_picture_comes_before_the_second_is_decoded(worker: Worker, doors: Doors) -> None:
    """And the fragments of each chunk before the next one exists."""
    task = make_task()
    running = asyncio.create_task(collect(worker.run(task)))
    video = worker.live(task.job_id, task.attempt)
    film = await begin(video, doors)
    assert num_pictures(film) == 1
    for count in (5, 9):
        doors.let_through(1)
        film += await anext(video)
        assert num_pictures(film) == count
    assert await all_of(video) == b""
    assert isinstance((await running)[-1], Completed)


async def test_late_viewers_get_the_same_bytes(worker: Worker, doors: Doors) -> None:
    """From the first on, also when the last chunk is there."""
    task = make_task()
    running = asyncio.create_task(collect(worker.run(task)))
    early = worker.live(task.job_id, task.attempt)
    film = await begin(early, doors)
    late = asyncio.create_task(all_of(worker.live(task.job_id, task.attempt)))
    doors.let_through(2)
    film += await all_of(early)
    assert await late == film
    await running


async def test_a_viewer_who_comes_first_in_the_middle_gets_all_of_it(
    worker: Worker, doors: Doors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then they are the very pictures of the stored file."""
    encode, encoded = Mp4Writer.add, threading.Semaphore(0)

    def add(writer: Mp4Writer, frames: UInt8Array, sound: Sound | None) -> None:
        encode(writer, frames, sound)
        encoded.release()

    monkeypatch.setattr(Mp4Writer, "add", add)
    task = make_task()
    running = asyncio.create_task(collect(worker.run(task)))
    doors.let_through(2)
    for _ in range(2):
        assert await asyncio.to_thread(encoded.acquire, timeout=PATIENCE_S)
    watching = asyncio.create_task(all_of(worker.live(task.job_id, task.attempt)))
    doors.let_through(1)
    film = await watching
    (*_, completed) = await running
    assert isinstance(completed, Completed)
    stored = (tmp_path / completed.artifact.key).read_bytes()
    assert stored == film_of(task.request)
    with av.open(io.BytesIO(film)) as one, av.open(io.BytesIO(stored)) as other:
        for shown, kept in zip(one.decode(video=0), other.decode(video=0), strict=True):
            assert (shown.to_ndarray() == kept.to_ndarray()).all()


async def test_nobody_holds_the_video_up(worker: Worker, doors: Doors, tmp_path: Path) -> None:
    """Neither a viewer who reads nothing more nor one who leaves, and the file is the same as without them."""
    task = make_task()
    running = asyncio.create_task(collect(worker.run(task)))
    slow, gone = (worker.live(task.job_id, task.attempt) for _ in range(2))
    leaving = asyncio.ensure_future(anext(gone))
    await begin(slow, doors)
    await leaving
    await gone.aclose()
    doors.let_through(2)
    (*_, completed) = await running
    assert isinstance(completed, Completed)
    assert (tmp_path / completed.artifact.key).read_bytes() == film_of(task.request)
    assert await all_of(slow) != b""  # what was made before is still there for who had begun


async def test_a_cancel_breaks_the_video_off(worker: Worker, doors: Doors) -> None:
    """After what was shown before."""
    task = make_task()
    running = asyncio.create_task(collect(worker.run(task)))
    video = worker.live(task.job_id, task.attempt)
    await begin(video, doors)
    await worker.cancel(task.job_id, task.attempt)
    doors.let_through(1)
    with pytest.raises(WorkerLost, match="before its last frame"):
        await all_of(video)
    assert (await running)[-1] == Cancelled()


async def test_a_failure_before_the_first_frame_breaks_it_off_too(worker: Worker) -> None:
    task = make_task("[fail]")
    running = asyncio.create_task(collect(worker.run(task)))
    with pytest.raises(WorkerLost, match="before its last frame"):
        await all_of(worker.live(task.job_id, task.attempt))
    await running


@pytest.mark.parametrize("other", ["job", "attempt"])
async def test_what_does_not_run_here_is_not_shown(worker: Worker, doors: Doors, other: str) -> None:
    """Another attempt of the job may be another video."""
    task = make_task()
    running = asyncio.create_task(collect(worker.run(task)))
    asked: Task = make_task() if other == "job" else task.model_copy(update={"attempt": 2})
    with pytest.raises(WorkerLost, match="does not make attempt"):
        worker.live(asked.job_id, asked.attempt)
    doors.let_through(3)
    await running


async def test_a_viewer_gets_large_fragments_in_pieces() -> None:
    """So that whoever reads slowly has little in memory."""
    film = LiveFilm()
    data = bytes(range(256)) * 3000
    film.show(data)
    film.complete()
    pieces = [piece async for piece in film.read()]
    assert b"".join(pieces) == data
    assert len(pieces) == 3
    assert not film.is_any
