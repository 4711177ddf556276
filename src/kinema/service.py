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

from kinema.capabilities import Capabilities, Size
from kinema.cluster.base import Cluster
from kinema.errors import JobNotFinished, KinemaError, ModelNotFound, NoWorker, StorageUnavailable
from kinema.events import Artifact
from kinema.job import Job, JobId, JobStatus, new_job_id
from kinema.jobs.store import JobStore, StoredEvent
from kinema.media.images import encode_png, fit, read_size
from kinema.request import GenerationOptions, resolve
from kinema.settings import JobSettings
from kinema.storage import Storage, image_key


@dataclass(frozen=True, slots=True)
class OpenArtifact:
    """A finished file: what it is, and a way to read a part of it."""

    artifact: Artifact
    storage: Storage

    def read(self, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The bytes from ``start`` to ``end`` (exclusive) in chunks; blocks. Raises StorageUnavailable."""
        return self.storage.read(self.artifact.key, start, end)


class GenerationService:
    """Jobs as their clients see them. Every method may raise StoreUnavailable."""

    def __init__(self, store: JobStore, cluster: Cluster, storage: Storage, settings: JobSettings) -> None:
        self._store = store
        self._cluster = cluster
        self._storage = storage
        self._settings = settings

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
        image_size = await _size_of(image)
        resolved = resolve(options, can, image_size)
        request, warnings = resolved.request, (*notes, *resolved.warnings)
        job_id = new_job_id()
        if image is not None:
            key, note = await asyncio.to_thread(self._store_image, job_id, image, request.size)
            request = request.model_copy(update={"image_key": key})
            warnings = (*warnings, *note)
        job = Job(id=job_id, request=request, warnings=warnings, user=user, created_at=time.time())
        await self._create(job)
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
        """The finished video. Raises JobNotFound, JobNotFinished."""
        job = await self._store.get(job_id)
        if job.artifact is None:
            raise JobNotFinished(_why_no_video(job))
        return OpenArtifact(job.artifact, self._storage)

    async def count_waiting(self) -> int:
        """How many jobs wait for a worker."""
        return await self._store.count_waiting()

    def is_ready(self) -> bool:
        """Whether a worker takes jobs now."""
        return any(worker.is_ready for worker in self._cluster.workers())

    async def _create(self, job: Job) -> None:
        try:
            await self._store.create(job, max_queued=self._settings.max_queued)
        except KinemaError:
            if job.request.image_key is not None:
                with suppress(StorageUnavailable):  # the refusal is what the client should hear of
                    await asyncio.to_thread(self._storage.delete, job.request.image_key)
            raise

    def _store_image(self, job_id: JobId, image: bytes, size: Size) -> tuple[str, tuple[str, ...]]:
        """The key of the first frame, brought to the video's size, and what was done to it. Blocks."""
        fitted = fit(image, size)
        artifact = self._storage.put_bytes(image_key(job_id), encode_png(fitted.pixels), "image/png")
        return artifact.key, (fitted.note,) if fitted.note else ()


async def _size_of(image: bytes | None) -> Size | None:
    return None if image is None else await asyncio.to_thread(read_size, image)


def _why_no_video(job: Job) -> str:
    match job.status:
        case JobStatus.FAILED if job.error is not None:
            return f"there is no video: {job.error.message}"
        case JobStatus.CANCELLED:
            return "there is no video: it was cancelled"
    return "the video is not ready yet"
