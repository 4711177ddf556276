"""What any frontend needs: submit, look at, wait for, follow and cancel jobs, and open what they made.

It knows requests, jobs, the workers' capabilities and storage; nothing of HTTP, and nothing of how a job gets to a
worker.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass

import structlog

from kinema.capabilities import Capabilities
from kinema.cluster.base import Cluster
from kinema.errors import (
    JobNotFinished,
    KinemaError,
    ModelNotFound,
    NoVideo,
    NoWorker,
    Overloaded,
    RequestError,
    StorageUnavailable,
)
from kinema.events import Artifact
from kinema.job import Job, JobId, JobStatus, new_job_id
from kinema.jobs.store import JobStore, QueueLimits, StoredEvent
from kinema.media.images import FittedImage, encode_png, open_image
from kinema.request import GenerationOptions, Resolved, resolve
from kinema.settings import JobSettings
from kinema.storage import Storage, image_key

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class OpenArtifact:
    """A finished file: what it is, and a way to read a part of it."""

    artifact: Artifact
    storage: Storage

    def read(self, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The bytes from ``start`` to ``end`` (exclusive) in chunks; blocks. Raises FileGone, StorageUnavailable."""
        return self.storage.read(self.artifact.key, start, end)


class GenerationService:
    """Jobs as their clients see them. Every method may raise StoreUnavailable."""

    def __init__(self, store: JobStore, cluster: Cluster, storage: Storage, settings: JobSettings) -> None:
        self._store = store
        self._cluster = cluster
        self._storage = storage
        self._settings = settings
        # A decoded image is up to 300 MB.
        self._one_image = asyncio.Semaphore(1)

    async def submit(
        self,
        options: GenerationOptions,
        *,
        model: str | None = None,
        image: bytes | None = None,
        user: str | None = None,
        notes: Sequence[str] = (),
    ) -> Job:
        """Make the request complete and put it into the queue. ``notes`` become warnings of the job.

        Raises RequestError when it cannot be made, ModelNotFound, Overloaded, NoWorker, StorageUnavailable.
        """
        can = self.model(model)
        if image is None:
            resolved, fitted = resolve(options, can), None
        else:
            await self._refuse_if_full(can.model)
            resolved, fitted = await self._fit(image, options, can)
        request, warnings = resolved.request, (*notes, *resolved.warnings)
        job_id = new_job_id()
        if fitted is not None:
            key = await asyncio.to_thread(self._store_image, job_id, fitted)
            request = request.model_copy(update={"image_key": key})
            warnings = (*warnings, fitted.note) if fitted.note else warnings
        job = Job(id=job_id, request=request, warnings=warnings, user=user, created_at=time.time())
        await self._create(job)
        log.info("job accepted", job_id=job.id, model=request.model)
        return job

    async def get(self, job_id: JobId) -> Job:
        """Raises JobNotFound."""
        return await self._store.get(job_id)

    async def wait(self, job_id: JobId) -> Job:
        """The job once it has ended. Raises JobNotFound."""
        async with aclosing(self._store.watch(job_id)) as events:
            async for _ in events:
                pass
        return await self._store.get(job_id)

    def events(self, job_id: JobId, after_seq: int = 0) -> AsyncGenerator[StoredEvent, None]:
        """What happened to the job after that event, and what happens next, to its end. Raises JobNotFound."""
        return self._store.watch(job_id, after_seq)

    async def cancel(self, job_id: JobId) -> Job:
        """Ask for the job to be stopped; one that has ended stays as it is. Raises JobNotFound."""
        return await self._store.request_cancel(job_id)

    def models(self) -> Sequence[Capabilities]:
        """What is served, each model once, in the order in which the workers came."""
        known: dict[str, Capabilities] = {}
        for worker in self._cluster.workers():
            known.setdefault(worker.capabilities.model, worker.capabilities)
        return tuple(known.values())

    def model(self, name: str | None = None) -> Capabilities:
        """The model of that name, or the first one. Raises ModelNotFound, and NoWorker when nothing is served."""
        served = self.models()
        if not served:
            raise NoWorker("no model is served yet; try again later")
        if name is None:
            return served[0]
        for can in served:
            if can.model == name:
                return can
        names = ", ".join(can.model for can in served)
        raise ModelNotFound(f"model {name[:100]!r} is not served here; there is {names}", param="model")

    async def open_artifact(self, job_id: JobId) -> OpenArtifact:
        """The finished video. Raises JobNotFound, JobNotFinished, NoVideo for a job that ended without one."""
        job = await self._store.get(job_id)
        if job.artifact is None:
            raise _why_no_video(job)
        return OpenArtifact(job.artifact, self._storage)

    async def count_waiting(self) -> int:
        """How many jobs wait for a worker."""
        return await self._store.count_waiting()

    def is_ready(self) -> bool:
        """Whether a worker takes jobs now."""
        return any(worker.is_ready for worker in self._cluster.workers())

    async def _create(self, job: Job) -> None:
        try:
            await self._store.create(job, limits=QueueLimits(max_queued=self._settings.max_queued))
        except KinemaError:
            if job.request.image_key is not None:
                with suppress(StorageUnavailable):  # the refusal is what the client should hear of
                    await asyncio.to_thread(self._storage.delete, job.request.image_key)
            raise

    async def _refuse_if_full(self, model: str) -> None:
        """Before work is put into an image; ``create`` has the last word."""
        if await self._store.count_waiting(model) >= self._settings.max_queued:
            raise Overloaded(f"{self._settings.max_queued} videos wait already; try again later")

    async def _fit(self, image: bytes, options: GenerationOptions, can: Capabilities) -> tuple[Resolved, FittedImage]:
        """The request for a video of this image, and the image in the video's size; one image at a time."""
        async with self._one_image:
            opened = await asyncio.to_thread(open_image, image)
            resolved = resolve(options, can, opened.size)
            return resolved, await asyncio.to_thread(opened.fit, resolved.request.size)

    def _store_image(self, job_id: JobId, fitted: FittedImage) -> str:
        """The key of the first frame. Blocks."""
        return self._storage.put_bytes(image_key(job_id), encode_png(fitted.pixels), "image/png").key


def _why_no_video(job: Job) -> RequestError:
    match job.status:
        case JobStatus.FAILED if job.error is not None:
            return NoVideo(f"there is no video: {job.error.message}")
        case JobStatus.CANCELLED:
            return NoVideo("there is no video: it was cancelled")
    return JobNotFinished("the video is not ready yet")
