"""Videos for NVIDIA Dynamo's own frontend: its request in, its answer out, made by a worker without a job store.

That frontend keeps the HTTP request open and has no queue, so a few requests wait here for a place. Its answer has no
field for warnings, so these go to the log. Of all errors only a RequestError keeps its message. Nothing is fetched from
an address that a client sent. This file does not know what carries the messages.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import structlog

from kinema.cluster.transport import Payload
from kinema.errors import (
    InvalidRequest,
    KinemaError,
    ModelNotFound,
    NoWorker,
    Overloaded,
    StorageUnavailable,
    UnsupportedRequest,
    by_code,
)
from kinema.events import Completed, Event
from kinema.ids import new_job_id
from kinema.inputs import Prepared, prepare
from kinema.job import Job, JobStatus, Task, advance
from kinema.media.decoders import Decoders
from kinema.request.bodies import GenerationBody
from kinema.request.capabilities import Capabilities
from kinema.request.fields import PICTURE_KINDS
from kinema.request.memory import check_memory
from kinema.request.options import GenerationOptions, Given
from kinema.request.request import GenerationRequest
from kinema.storage import Storage, temporary_key
from kinema.worker.worker import Worker

log = structlog.get_logger(__name__)

# Our own frontends keep these files for this time, too, if one of them sweeps the same storage.
_LINK_OPENS_S = 15 * 60
# The runtime has no limit, and each process on the way holds several copies of the text.
MAX_INLINE_BYTES = 128 * 1024 * 1024
_PICTURES = ("input_reference", "last_frame")
_IMAGE_FORMS = (
    f"must be an image ({PICTURE_KINDS}) as base64 or as a data: URL, 'data:image/png;base64,...'; "
    "nothing is fetched from other servers"
)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A complete request, and the form that its answer should have."""

    job: Job
    prepared: Prepared
    is_stream: bool
    is_inline: bool


class StockVideos:
    """The ``videos`` endpoint of a worker. All methods belong to the worker's event loop."""

    def __init__(self, worker: Worker, storage: Storage, max_waiting: int, decoders: Decoders) -> None:
        self._worker = worker
        self._storage = storage
        self._max_waiting = max_waiting
        self._decoders = decoders
        self._num_waiting = 0
        self._line = asyncio.Lock()  # who came first is admitted first, however long storage takes
        self._reading = asyncio.Lock()  # a decoded image may be large

    async def videos(self, payload: Payload) -> AsyncGenerator[Payload, None]:
        """Yield the finished video. A request with ``stream`` also gets an item for each change of progress before.

        Raises RequestError for what the client must change, Overloaded when too many requests wait, NoWorker or
        WorkerLost when no worker makes it, and otherwise the error of the generation. A stream that has begun ends with
        a failed video instead of that error, because this keeps the message.
        """
        async with self._reading:
            asked = await asyncio.to_thread(self._read, payload)
        job, is_shown = asked.job, False
        try:
            async with aclosing(self._run(asked)) as states:
                async for job in states:
                    if asked.is_stream and not job.status.is_terminal:
                        yield as_answer(job)
            if asked.is_stream and job.status is JobStatus.FAILED:
                yield as_answer(job)
                return
            answer = await asyncio.to_thread(self._answer, job, is_inline=asked.is_inline)
            is_shown = True
            yield answer
        finally:
            await asyncio.to_thread(self._tidy_up, job, asked, keeps_video=is_shown and not asked.is_inline)

    def _read(self, payload: Payload) -> _Asked:
        """Read the request. Blocks. Raises RequestError."""
        can = self._worker.capabilities
        body = read_request(payload, can)
        is_inline = body.is_base64 or not (body.response_format or self._storage.has_links)
        if not (is_inline or self._storage.has_links):
            raise UnsupportedRequest(
                "response_format 'url' is not possible here: this worker's files open by no URL; send 'b64_json', or "
                "start it with storage.url on s3, gs or az, or with storage.public_url",
                param="response_format",
            )
        if body.named_films:
            raise UnsupportedRequest(
                "control_video names videos, of which this worker knows none", param="control_video"
            )
        prepared = self._prepare(body.given(), body.options(), can)
        check_memory(prepared.request, can.limits, [self._worker.memory])
        job = Job(id=new_job_id(), request=prepared.request, warnings=prepared.warnings, created_at=time.time())
        warnings = [*prepared.warnings, *body.notes()]
        log.info("a video for Dynamo's frontend", job_id=job.id, user=body.user, warnings=warnings)
        return _Asked(job, prepared, is_stream=bool(body.stream), is_inline=is_inline)

    def _prepare(self, given: Given, options: GenerationOptions, can: Capabilities) -> Prepared:
        if not given:
            return prepare(given, options, can)
        with self._decoders.for_picture() if given.is_picture else self._decoders.for_film() as decoder:
            return prepare(given, options, can, decoder)

    async def _run(self, asked: _Asked) -> AsyncGenerator[Job, None]:
        """Yield the job whenever its status or progress has changed."""
        job = asked.job
        with self._waiting():
            yield job
            async with self._line:
                request = await asyncio.to_thread(self._store_inputs, asked)
                events = await self._admit(Task(job_id=job.id, attempt=1, request=request, deadline_at=job.deadline_at))
        async with aclosing(events):  # type: ignore[type-var]  # a worker's is an async generator
            async for event in events:
                before, job = job, advance(job, event)
                if isinstance(event, Completed) and event.warnings:
                    log.info("a video is not as it was asked for", job_id=job.id, warnings=event.warnings)
                if (before.status, before.progress) != (job.status, job.progress):
                    yield job

    def _store_inputs(self, asked: _Asked) -> GenerationRequest:
        """Store the inputs, and say in storage that the video may be removed. Blocks. Raises StorageUnavailable."""
        with suppress(StorageUnavailable):  # the video itself waits for storage
            self._storage.put_bytes(temporary_key(asked.job.id), b"no job database has this video\n", "text/plain")
        return asked.prepared.store(self._storage, asked.job.id)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Hold a place among the waiting requests. Raises Overloaded when there is none."""
        if self._num_waiting >= self._max_waiting + self._worker.free_slots:
            raise Overloaded(f"{self._num_waiting} videos wait for this worker already; try again later")
        self._num_waiting += 1
        try:
            yield
        finally:
            self._num_waiting -= 1

    async def _admit(self, task: Task) -> AsyncIterator[Event]:
        while self._worker.free_slots < 1:
            if not self._worker.is_ready:
                raise NoWorker("The worker is stopping.")
            await self._worker.wait_for_change()
        return self._worker.run(task)

    def _answer(self, job: Job, *, is_inline: bool) -> dict[str, Any]:
        """The answer about a job that has ended. Blocks. Raises the error of the job, and StorageUnavailable."""
        if job.artifact is None:
            raise _how_it_ended(job)
        if not is_inline:
            return as_answer(job, url=self._storage.link(job.artifact.key, _LINK_OPENS_S))
        if job.artifact.size_bytes > MAX_INLINE_BYTES:
            raise UnsupportedRequest(
                f"the video has {job.artifact.size_bytes} bytes and b64_json takes {MAX_INLINE_BYTES}; ask for "
                "response_format 'url', a smaller size or fewer frames",
                param="response_format",
            )
        data = b"".join(self._storage.read(job.artifact.key))
        return as_answer(job, b64_json=base64.b64encode(data).decode("ascii"))

    def _tidy_up(self, job: Job, asked: _Asked, *, keeps_video: bool) -> None:
        """Delete the files of the job, which no job store knows. Blocks."""
        try:
            if not keeps_video:
                self._storage.delete_job(job.id)
                return
            for _, key in asked.prepared.keys(job.id):
                self._storage.delete(key)
            for artifact in job.artifacts:
                if artifact != job.artifact:
                    self._storage.delete(artifact.key)
        except StorageUnavailable as exc:
            log.warning("files were left in storage", job_id=job.id, reason=exc.message)


def read_request(payload: Payload, can: Capabilities) -> GenerationBody:
    """Read Dynamo's NvCreateVideoRequest. Fields that Dynamo's frontend does not know are ordinary fields here.

    Raises InvalidRequest, which names the field, UnsupportedRequest, and ModelNotFound for a model of another worker.
    """
    fields = {name: value for name, value in payload.items() if name != "extra_args"}
    unknown = payload.get("extra_args", {}).get("media_passthrough", {})
    try:
        body = GenerationBody.parse({**unknown, **fields})
    except InvalidRequest as exc:
        if exc.param in _PICTURES:
            raise InvalidRequest(f"{exc.param} {_IMAGE_FORMS}", param=exc.param) from exc
        raise
    if body.model is not None and body.model not in can.names:
        raise ModelNotFound(f"model {body.model[:40]!r} is not served here; {can.model!r} is", param="model")
    return body


def as_answer(job: Job, *, url: str | None = None, b64_json: str | None = None) -> dict[str, Any]:
    """Dynamo's NvVideosResponse, without the fields that the job does not have."""
    video = {"output_format": job.request.output_format, "fps": job.request.fps, "url": url, "b64_json": b64_json}
    answer = {
        "id": job.id,
        "object": "video",
        "model": job.request.model,
        "status": job.status.value,
        "progress": job.progress,
        "created": int(job.created_at),
        "data": [_present(video)] if url or b64_json else [],
        "error": job.error.message if job.error else None,
        "inference_time_s": round(job.timings.total_s, 3) if job.timings else None,
    }
    return _present(answer)


def _present(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _how_it_ended(job: Job) -> KinemaError:
    """The error of a job without a video."""
    if job.error is None:
        return KinemaError("The video was cancelled.")
    return by_code(job.error.code)(job.error.message)
