"""The service around the fake engine."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kinema.cluster.base import WorkerInfo
from kinema.engines.fake import FakeEngine
from kinema.errors import (
    FileGone,
    InvalidRequest,
    JobNotFinished,
    JobNotFound,
    ModelNotFound,
    NoVideo,
    NoWorker,
    Overloaded,
    StoreUnavailable,
)
from kinema.events import Artifact
from kinema.ids import JobId
from kinema.job import Job, JobStatus
from kinema.jobs.sql import SqlJobStore
from kinema.jobs.store import QueueLimits, Submission
from kinema.media.decoders import DecoderProcess
from kinema.media.images import decode_png
from kinema.request.options import GenerationOptions, Given
from kinema.service.intake import Intake
from kinema.service.service import GenerationService
from kinema.settings import JobSettings
from kinema.storage import Storage
from tests.serving import REQUEST, Gate, decoders, has_heard_of_cancel, make_job, serving, until
from tests.unit.media.test_decoders import slow_png

OPTIONS = GenerationOptions(prompt="a red circle", size="64x64", num_frames=5, num_inference_steps=2)


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), 200, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def noted_keys(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys under which bytes are stored from now on."""
    keys: list[str] = []
    put_bytes = storage.put_bytes

    def noted(key: str, data: bytes, media_type: str) -> Artifact:
        keys.append(key)
        return put_bytes(key, data, media_type)

    monkeypatch.setattr(storage, "put_bytes", noted)
    return keys


def is_there(storage: Storage, key: str) -> bool:
    try:
        next(storage.read(key))
    except FileGone:
        return False
    return True


async def test_a_job_is_made_and_its_video_opens() -> None:
    """submit, wait, open: an MP4 of the size that storage says."""
    async with serving() as it:
        job = await it.service.submit(OPTIONS)
        done = await it.service.wait(job.id)
        opened = await it.service.open_artifact(job.id)
        data = b"".join(opened.read())
    assert done.status is JobStatus.COMPLETED
    assert data[4:8] == b"ftyp"
    assert len(data) == opened.artifact.size_bytes


async def test_previews_open_as_the_video_does() -> None:
    """A WebP and a JPEG of the same job; another variant is refused with those that there are."""
    async with serving() as it:
        job = await it.service.submit(OPTIONS)
        done = await it.service.wait(job.id)
        thumbnail, sheet = [await it.service.open_artifact(job.id, name) for name in ("thumbnail", "spritesheet")]
        assert b"".join(thumbnail.read())[8:12] == b"WEBP"
        assert b"".join(sheet.read())[:2] == b"\xff\xd8"
        assert (thumbnail.artifact, sheet.artifact) == (done.thumbnail, done.spritesheet)
        with pytest.raises(InvalidRequest, match="accepted: video, thumbnail, spritesheet, manifest, preview, live"):
            await it.service.open_artifact(job.id, "poster")


async def test_a_deleted_job_leaves_no_file() -> None:
    """Neither the video nor what is seen of it."""
    async with serving() as it:
        job = await it.service.submit(OPTIONS)
        made = (await it.service.wait(job.id)).artifacts
        await it.service.delete(job.id)
        assert len(made) == 4
        for artifact in made:
            with pytest.raises(FileGone):
                next(it.storage.read(artifact.key))


async def test_notes_and_adjustments_become_warnings() -> None:
    """In the order: what the frontend said, what the request said, what was done to the image."""
    async with serving(is_dispatching=False) as it:
        odd = OPTIONS.model_copy(update={"num_frames": 4})
        job = await it.service.submit(odd, given=Given(image=png(128, 64)), notes=("said before",))
    assert job.warnings == (
        "said before",
        "num_frames 4 -> 5: must be a multiple of 4 plus 1",
        "input_reference 128x64 was scaled and cropped to 64x64",
    )


async def test_an_image_is_stored_in_the_size_of_the_video() -> None:
    """As a PNG under the key in the request; the whole way to the video works with it."""
    async with serving() as it:
        job = await it.service.submit(OPTIONS, given=Given(image=png(100, 100)))
        assert job.request.image_key is not None
        stored = decode_png(b"".join(it.storage.read(job.request.image_key)))
        assert stored.shape == (64, 64, 3)
        assert (await it.service.wait(job.id)).status is JobStatus.COMPLETED


async def test_a_refused_job_leaves_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was stored for it is deleted, and the client hears why it was refused."""
    async with serving(is_dispatching=False, jobs=JobSettings(max_queued=1)) as it:
        await it.service.submit(OPTIONS)

        async def none(_model: str) -> int:
            return 0

        monkeypatch.setattr(it.store, "count_waiting", none)  # as it was before the other job came
        stored = noted_keys(it.storage, monkeypatch)
        with pytest.raises(Overloaded):
            await it.service.submit(OPTIONS, given=Given(image=png(64, 64)))
        assert len(stored) == 1
        assert not is_there(it.storage, stored[0])
        assert await it.store.inputs.stored_bytes("") == 0


async def test_a_job_that_was_stored_keeps_its_image_when_the_answer_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The database broke off after it had stored the job: it is made, and the client's next try finds it."""
    async with serving(is_dispatching=False) as it:
        create = it.store.create

        async def broken(job: Job, **options: Any) -> Job:
            await create(job, **options)
            raise StoreUnavailable

        monkeypatch.setattr(it.store, "create", broken)
        submission = Submission("body", idempotency_key="k")
        with pytest.raises(StoreUnavailable):
            await it.service.submit(OPTIONS, given=Given(image=png(64, 64)), submission=submission)
        job = await it.service.submit(OPTIONS, given=Given(image=png(64, 64)), submission=submission)
        assert job.request.image_key is not None
        assert decode_png(b"".join(it.storage.read(job.request.image_key))) is not None


async def test_a_full_queue_is_known_before_an_image_is_looked_at() -> None:
    """Or every refusal would cost its decoding."""
    async with serving(is_dispatching=False, jobs=JobSettings(max_queued=1)) as it:
        await it.service.submit(OPTIONS)
        with pytest.raises(Overloaded):
            await it.service.submit(OPTIONS, given=Given(image=b"not an image"))


async def test_a_few_images_are_decoded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many a key sends at once, two processes decode for it."""
    active = most = 0
    for_picture = decoders().for_picture

    @contextmanager
    def counted() -> Iterator[DecoderProcess]:
        nonlocal active, most
        active += 1
        most = max(most, active)
        with for_picture() as decoder:
            yield decoder
        active -= 1

    monkeypatch.setattr(decoders(), "for_picture", counted)
    async with serving(is_dispatching=False) as it:
        jobs = await asyncio.gather(*(it.service.submit(OPTIONS, given=Given(image=png(900, 900))) for _ in range(8)))
    assert (len(jobs), most) == (8, 2)


async def test_a_client_that_gives_up_frees_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process ends in the middle of its work, and nothing is stored."""
    started: list[DecoderProcess] = []
    for_picture = decoders().for_picture

    def noted() -> DecoderProcess:
        started.append(for_picture())
        return started[-1]

    monkeypatch.setattr(decoders(), "for_picture", noted)
    async with serving(is_dispatching=False) as it, asyncio.timeout(20):
        asking = [asyncio.create_task(it.service.submit(OPTIONS, given=Given(image=slow_png()))) for _ in range(2)]
        await until(lambda: len(started) == 2)
        waiting = asyncio.create_task(it.service.submit(OPTIONS, given=Given(image=png(64, 64))))
        for one in asking:
            one.cancel()
        cancelled_at = time.monotonic()
        ended = await asyncio.gather(*asking, return_exceptions=True)
        assert {type(how) for how in ended} == {asyncio.CancelledError}
        assert (await waiting).status is JobStatus.QUEUED
        assert time.monotonic() - cancelled_at < 4  # the two pictures would take five seconds each
        assert await it.service.count_waiting() == 1


async def test_a_bad_image_is_refused_before_anything_is_stored() -> None:
    """No job comes of it."""
    async with serving(is_dispatching=False) as it:
        with pytest.raises(InvalidRequest):
            await it.service.submit(OPTIONS, given=Given(image=b"<svg/>"))
        assert await it.service.count_waiting() == 0


async def test_unknown_models_are_named_with_what_there_is() -> None:
    """And no model at all means the first."""
    async with serving(FakeEngine("org/model")) as it:
        assert it.service.model().model == it.service.model("org/model").model == "org/model"
        with pytest.raises(ModelNotFound, match="there is org/model"):
            await it.service.submit(OPTIONS, model="other")


async def test_an_alias_stands_for_its_model() -> None:
    """The video is one of the model, by its own name."""
    async with serving(FakeEngine("org/model", aliases=["short", "old"])) as it:
        job = await it.service.submit(OPTIONS, model="short")
        assert job.request.model == "org/model"
        assert (await it.service.wait(job.id)).status is JobStatus.COMPLETED
        assert it.service.model("old") == it.service.model()


class TwoModels:
    """Three workers of two models; an alias of the first is the second."""

    def workers(self) -> tuple[WorkerInfo, ...]:
        cans = [
            FakeEngine("a", aliases=["b", "x"]).capabilities,
            FakeEngine("b").capabilities,
            FakeEngine("a", aliases=["y"]).capabilities,
        ]
        return tuple(WorkerInfo(str(number), can, 1, is_ready=True) for number, can in enumerate(cans))

    def known_models(self) -> tuple[str, ...]:
        return ("a", "b", "x", "y")


async def test_a_model_comes_before_an_alias() -> None:
    """A model has the aliases of all its workers."""
    store = await SqlJobStore.open("sqlite://")
    service = GenerationService(store, TwoModels(), Storage("memory://none"), JobSettings(), Intake(decoders(), 1))  # type: ignore[arg-type]
    assert [(can.model, can.aliases) for can in service.models()] == [("a", ("b", "x", "y")), ("b", ())]
    assert [service.model(name).model for name in ("a", "b", "x", "y")] == ["a", "b", "a", "a"]
    await store.close()


class NoCluster:
    """Without any worker."""

    def workers(self) -> tuple[()]:
        return ()

    def known_models(self) -> tuple[str, ...]:
        return ("gone",)


async def test_without_workers_nothing_is_accepted() -> None:
    """The client may come back later."""
    store = await SqlJobStore.open("sqlite://")
    service = GenerationService(store, NoCluster(), Storage("memory://none"), JobSettings(), Intake(decoders(), 1))  # type: ignore[arg-type]
    assert not service.is_ready()
    with pytest.raises(NoWorker):
        await service.submit(OPTIONS)
    with pytest.raises(NoWorker, match="'gone' is here now"):
        await service.submit(OPTIONS, model="gone")
    await store.close()


async def test_a_model_that_made_videos_before_a_restart_is_not_unknown() -> None:
    """Its workers may come back, so its clients should."""
    async with serving(FakeEngine("present")) as it:
        past = REQUEST.model_copy(update={"model": "past"})
        await it.store.create(make_job(request=past), limits=QueueLimits())
        with pytest.raises(NoWorker, match="'past' is here now"):
            await it.service.submit(OPTIONS, model="past")
        with pytest.raises(ModelNotFound):
            await it.service.submit(OPTIONS, model="never")


async def test_cancelling_a_running_job_ends_it() -> None:
    """Its waiter hears of it, and there is no video to open."""
    gate = Gate()
    async with serving(FakeEngine(on_output=gate)) as it:
        job = await it.service.submit(OPTIONS)
        waiting = asyncio.create_task(it.service.wait(job.id))
        assert await asyncio.to_thread(gate.has_arrived.wait, 20)
        with pytest.raises(JobNotFinished, match="not ready"):
            await it.service.open_artifact(job.id)
        await it.service.cancel(job.id)
        await until(lambda: has_heard_of_cancel(it))
        gate.is_open.set()
        assert (await waiting).status is JobStatus.CANCELLED
        for variant in ("video", "thumbnail", "spritesheet"):
            with pytest.raises(NoVideo, match="cancelled"):
                await it.service.open_artifact(job.id, variant)
        assert it.engine.num_running == 0


async def test_unknown_jobs_are_not_found() -> None:
    """By every method that takes an id."""
    async with serving(is_dispatching=False) as it:
        for call in (it.service.get, it.service.wait, it.service.cancel, it.service.open_artifact):
            with pytest.raises(JobNotFound):
                await call(JobId("video_nobody"))


async def test_a_job_that_waits_too_long_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a code that tells why; so does one whose model has left, and a client that waits for it gets an answer."""
    gate = Gate()
    async with serving(FakeEngine(on_output=gate), jobs=JobSettings(max_wait_h=0.1 / 3600)) as it:
        made = await it.service.submit(OPTIONS)
        await until(gate.has_arrived.is_set)
        gone = await it.store.create(
            make_job(request=REQUEST.model_copy(update={"model": "gone"})), limits=QueueLimits(max_queued=9)
        )
        ended = await it.service.wait(gone.id)
        assert ended.error is not None
        assert ended.error.code == "waited_too_long"
        answer = await it.client.get(f"/v1/videos/{gone.id}")
        assert (answer.json()["status"], answer.json()["error"]["code"]) == ("failed", "waited_too_long")
        gate.is_open.set()
        assert (await it.service.wait(made.id)).status is JobStatus.COMPLETED
