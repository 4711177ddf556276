"""Films that are continued: the older film and the new frames in one."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from structlog.testing import capture_logs

from kinema.engines.base import Output, Step
from kinema.engines.fake import FakeEngine
from kinema.events import Cancelled, Completed, Failed, Progress
from kinema.ids import JobId, new_job_id
from kinema.job import Task
from kinema.media.decoders import Decoders
from kinema.media.film import InputFilm, open_film
from kinema.media.images import encode_png
from kinema.media.mp4 import Mp4Writer
from kinema.media.previews import sheet_frames
from kinema.media.sound import Sound
from kinema.request.request import GenerationRequest
from kinema.settings import InputSettings, WorkerSettings
from kinema.storage import Storage, image_key
from kinema.worker.worker import Worker
from tests.hostile.films import slow_film
from tests.serving import decoders, until
from tests.unit.media.test_decoders import decoding
from tests.unit.worker.tasks import collect, film_of, make_request

UInt8Array = npt.NDArray[np.uint8]
OLDER = "videos/older/1.mp4"
# Much less than what the slow film takes, and enough on a loaded machine.
SOON_S = 5.0


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(f"file://{tmp_path}/files")


@pytest.fixture(autouse=True)
def _temporary_files_are_gone_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test did."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    yield
    assert list(temporary.iterdir()) == []


@asynccontextmanager
async def running(
    storage: Storage, engine: FakeEngine | None = None, decoders: Decoders | None = None
) -> AsyncIterator[Worker]:
    worker = Worker(engine or FakeEngine(), storage, WorkerSettings(), worker_id="w1", decoders=decoders)
    if decoders is not None:
        decoders.start()
    await worker.start()
    try:
        yield worker
    finally:
        await worker.stop()


def make_task(storage: Storage, older: bytes, **options: object) -> Task:
    """A task that continues the older film from its last frame."""
    job_id = new_job_id()
    storage.put_bytes(OLDER, older, "video/mp4")
    last = open_film(older).last_frame()
    storage.put_bytes(image_key(job_id), encode_png(last), "image/png")
    keys = {"image_key": image_key(job_id), "continues_key": OLDER}
    return Task(job_id=job_id, attempt=1, request=make_request(**options).model_copy(update=keys))


def read(storage: Storage, key: str) -> bytes:
    return b"".join(storage.read(key))


def shown(film: bytes) -> UInt8Array:
    opened = open_film(film)
    return np.stack(list(opened.frames(opened.shape.size, int(opened.shape.fps))))


def psnr(one: UInt8Array, other: UInt8Array) -> float:
    return 10 * np.log10(255**2 / np.mean((one.astype(np.float64) - other) ** 2))


async def test_the_older_film_is_followed_by_the_new_frames(storage: Storage) -> None:
    """As many frames as both have but one, each old one as it was, and no frame twice where they meet."""
    older = film_of(make_request("an older film", num_frames=13))
    task = make_task(storage, older)
    async with running(storage) as worker:
        done = (await collect(worker.run(task)))[-1]
    assert isinstance(done, Completed)
    film = read(storage, done.artifact.key)
    before, after = shown(older), shown(film)
    assert len(after) == 13 + 9 - 1
    assert min(psnr(frame, old) for frame, old in zip(after[:13], before, strict=True)) > 38
    # The fake engine moves its picture two pixels a frame, from the older film's last one.
    new = [np.roll(before[-1], 2 * number, axis=1) for number in range(1, 9)]
    assert min(psnr(frame, expected) for frame, expected in zip(after[13:], new, strict=True)) > 30
    assert psnr(after[13], after[12]) < 30
    with av.open(io.BytesIO(film)) as container:
        stream = container.streams.video[0]
        times = [frame.pts * frame.time_base for frame in container.decode(stream)]
        assert stream.duration * stream.time_base == Fraction(21, 8)
    assert times == [Fraction(number, 8) for number in range(21)]


async def test_the_same_request_gives_the_same_bytes(storage: Storage) -> None:
    """And so may be continued again and again."""
    older = film_of(make_request("an older film", num_frames=5))
    films = []
    async with running(storage) as worker:
        for _ in range(2):
            done = (await collect(worker.run(make_task(storage, older))))[-1]
            films.append(read(storage, done.artifact.key))
        again = (await collect(worker.run(make_task(storage, films[0], num_frames=5))))[-1]
    assert films[0] == films[1]
    assert open_film(read(storage, again.artifact.key)).shape.num_frames == 5 + 8 + 4


async def test_previews_are_of_the_whole_film(storage: Storage) -> None:
    """The sheet begins with the older film and ends with the new one."""
    older = film_of(make_request("an older film", num_frames=13))
    async with running(storage) as worker:
        done = (await collect(worker.run(make_task(storage, older))))[-1]
    frames = shown(read(storage, done.artifact.key))[sheet_frames(21)]
    sheet = np.asarray(Image.open(io.BytesIO(read(storage, done.spritesheet.key))))
    tiles = sheet.reshape(4, 64, 4, 64, 3).swapaxes(1, 2).reshape(16, 64, 64, 3)
    assert min(psnr(tile, frame) for tile, frame in zip(tiles, frames, strict=True)) > 28
    thumbnail = np.asarray(Image.open(io.BytesIO(read(storage, done.thumbnail.key))).convert("RGB"))
    assert psnr(thumbnail, shown(older)[10]) > 28


async def test_a_film_of_another_size_and_rate_is_brought_to_the_requests(storage: Storage) -> None:
    """What is continued need not come from here."""
    older = film_of(make_request("an older film", size="96x64", num_frames=33, fps=16))
    job_id = new_job_id()
    storage.put_bytes(OLDER, older, "video/mp4")
    storage.put_bytes(image_key(job_id), encode_png(open_film(older).last_frame()[:, 16:80]), "image/png")
    keys = {"image_key": image_key(job_id), "continues_key": OLDER}
    task = Task(job_id=job_id, attempt=1, request=make_request().model_copy(update=keys))
    async with running(storage) as worker:
        done = (await collect(worker.run(task)))[-1]
    opened = open_film(read(storage, done.artifact.key))
    assert (str(opened.shape.size), opened.shape.fps) == ("64x64", 8)
    assert opened.shape.num_frames == open_film(older).shape.num_frames_at(8) + 8


async def test_one_older_frame_is_in_memory_at_a_time(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the older film is: each frame is encoded before the next is decoded."""
    order: list[str] = []
    add, frames = Mp4Writer.add, InputFilm.frames

    def add_and_note(writer: Mp4Writer, chunk: UInt8Array, sound: Sound | None) -> None:
        order.append(f"encoded {len(chunk)}")
        add(writer, chunk, sound)

    def frames_and_note(older: InputFilm, *args: object) -> Iterator[UInt8Array]:
        for pixels in frames(older, *args):
            order.append("decoded")
            yield pixels

    older = film_of(make_request("an older film", num_frames=33))
    task = make_task(storage, older)
    monkeypatch.setattr(Mp4Writer, "add", add_and_note)
    monkeypatch.setattr(InputFilm, "frames", frames_and_note)
    async with running(storage) as worker:
        assert isinstance((await collect(worker.run(task)))[-1], Completed)
    assert order == ["decoded", "encoded 1"] * 33 + ["encoded 0", "encoded 4", "encoded 4"]


async def test_cancelling_leaves_nothing_but_the_older_film(storage: Storage, tmp_path: Path) -> None:
    """Whatever of it was encoded already."""
    task = make_task(storage, film_of(make_request("an older film")))
    workers: list[Worker] = []
    stopped: list[JobId] = []

    def on_output(_request: GenerationRequest, output: Output) -> None:
        if output == Step(2, 3):
            stopped.append(task.job_id)
            for generation in workers[0]._generations.values():
                generation.is_cancelled = True

    async with running(storage, FakeEngine(on_output=on_output)) as worker:
        workers.append(worker)
        assert (await collect(worker.run(task)))[-1] == Cancelled()
    assert stopped == [task.job_id]
    left = {path.name for path in (tmp_path / "files").rglob("*") if path.is_file()}
    assert left == {"1.mp4", "input.png"}


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        (None, "file_gone", "no longer there"),
        (b"a text", "invalid_value", "not a film of a known kind"),
        ("half", "invalid_value", "damaged or cannot be read"),
    ],
)
async def test_an_older_film_that_is_gone_or_damaged_fails_the_job(
    storage: Storage, content: bytes | str | None, code: str, said: str, tmp_path: Path
) -> None:
    """With its reason, and no video is stored."""
    older = film_of(make_request("an older film", num_frames=33))
    task = make_task(storage, older)
    storage.delete(OLDER)
    if content == "half":  # whole at its beginning, so that it opens
        content = older[: len(older) * 3 // 4] + bytes(len(older) // 4)
    if content is not None:
        storage.put_bytes(OLDER, content, "video/mp4")
    async with running(storage) as worker:
        with capture_logs():
            failed = (await collect(worker.run(task)))[-1]
    assert isinstance(failed, Failed)
    assert failed.code == code
    assert said in failed.message
    assert not list((tmp_path / "files" / "videos" / task.job_id).glob("1.*"))


@pytest.mark.parametrize("field", ["continues_key", "edits_key"])
async def test_a_film_is_decoded_by_a_process_of_its_own(storage: Storage, field: str) -> None:
    """The video has the bytes that it has without one."""
    task = make_task(storage, film_of(make_request("an older film", num_frames=13)))
    if field == "edits_key":
        changed = make_request(strength=0.5).model_copy(update={field: OLDER})
        task = Task(job_id=task.job_id, attempt=1, request=changed)
    made = []
    for reading in (None, decoders()):
        async with running(storage, decoders=reading) as worker:
            done = (await collect(worker.run(task)))[-1]
        made.append(read(storage, done.artifact.key))
    assert made[0] == made[1]


async def test_a_film_to_edit_that_takes_long_fails_its_job(storage: Storage) -> None:
    """Nobody has decoded all of its frames before: it gets the time of a film, and not a worker for minutes."""
    storage.put_bytes(OLDER, slow_film(), "video/mp4")
    request = make_request(num_frames=33, strength=0.5).model_copy(update={"edits_key": OLDER})
    impatient = Decoders(InputSettings(film_s=1))
    try:
        async with running(storage, decoders=impatient) as worker:
            failed = (await collect(worker.run(Task(job_id=new_job_id(), attempt=1, request=request))))[-1]
    finally:
        impatient.stop()
    assert isinstance(failed, Failed)
    assert "cannot be decoded within 1024 MB of memory and 1 s" in failed.message


async def test_a_cancel_ends_the_decoding_of_a_film_to_edit(storage: Storage) -> None:
    """Its process is killed, however long the film is, and its slot is free."""
    storage.put_bytes(OLDER, slow_film(), "video/mp4")
    request = make_request(num_frames=81, strength=0.5).model_copy(update={"edits_key": OLDER})
    task = Task(job_id=new_job_id(), attempt=1, request=request)
    async with running(storage, decoders=decoders()) as worker:
        ending = asyncio.create_task(collect(worker.run(task)))
        await until(lambda: decoding(decoders()))
        async with asyncio.timeout(SOON_S):
            await worker.cancel(task.job_id, task.attempt)
            assert await ending == [Cancelled()]
        assert worker.free_slots == worker.max_active
        await until(lambda: not decoding(decoders()))


async def test_a_cancel_ends_the_decoding_of_a_film_to_continue(storage: Storage, tmp_path: Path) -> None:
    """Though the new frames are there already and wait for those of the older film, whose decoder hangs."""
    task = make_task(storage, film_of(make_request("an older film")))
    storage.put_bytes(OLDER, slow_film(), "video/mp4")
    async with running(storage, decoders=decoders()) as worker:
        events = worker.run(task)
        while await anext(events) != Progress(stage="decode", step=3, total=3):
            pass
        await until(lambda: len(decoding(decoders())) == 1)
        os.kill(decoding(decoders())[0], signal.SIGSTOP)
        async with asyncio.timeout(SOON_S):
            await worker.cancel(task.job_id, task.attempt)
            assert [event async for event in events] == [Cancelled()]
        assert worker.free_slots == worker.max_active
        await until(lambda: not decoding(decoders()))
    assert not list((tmp_path / "files" / "videos" / task.job_id).glob("1.*"))


async def test_films_leave_the_threads_of_the_event_loop_to_others(storage: Storage) -> None:
    """However many of them are read at once."""
    storage.put_bytes(OLDER, slow_film(), "video/mp4")
    request = make_request(num_frames=81, strength=0.5).model_copy(update={"edits_key": OLDER})
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    async with running(storage, decoders=decoders()) as worker:
        tasks = [Task(job_id=new_job_id(), attempt=1, request=request) for _ in range(2)]
        ending = [asyncio.create_task(collect(worker.run(task))) for task in tasks]
        await until(lambda: len(decoding(decoders())) == 2)
        async with asyncio.timeout(SOON_S):
            await asyncio.to_thread(lambda: None)
        for task in tasks:
            await worker.cancel(task.job_id, task.attempt)
        assert await asyncio.gather(*ending) == [[Cancelled()]] * 2


async def test_a_film_that_cannot_be_decoded_fails_its_own_job(storage: Storage) -> None:
    """The worker goes on."""
    task = make_task(storage, film_of(make_request("an older film", num_frames=13)))
    storage.put_bytes(OLDER, b"not a film", "video/mp4")
    async with running(storage, decoders=decoders()) as worker:
        failed = (await collect(worker.run(task)))[-1]
        assert isinstance(failed, Failed)
        assert (failed.code, "is not a film of a known kind" in failed.message) == ("invalid_value", True)
        assert worker.is_ready
