"""The service that every frontend has: submit, look at, wait for, follow and cancel jobs, and open what they made.

It knows requests, jobs, the workers' capabilities and storage; nothing of HTTP, and nothing of how a job gets to a
worker.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence, Set
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

import structlog

from kinema.cluster.base import Cluster, WorkerInfo
from kinema.errors import (
    FileGone,
    InvalidRequest,
    JobNotFinished,
    JobNotFound,
    KinemaError,
    ModelNotFound,
    NoVideo,
    NoWorker,
    Overloaded,
    RequestError,
    StorageFull,
    StorageUnavailable,
)
from kinema.events import Artifact, Started
from kinema.ids import JobId, new_job_id
from kinema.inputs import Prepared, prepare, read_back
from kinema.job import Job, JobStatus
from kinema.jobs.input_store import refuse_beyond
from kinema.jobs.listing import JobPage, Wanted
from kinema.jobs.store import DayUsage, JobStore, StoredEvent, Submission
from kinema.request.capabilities import Capabilities, Tier
from kinema.request.formats import MEDIA_TYPES
from kinema.request.loras import merge_loras, split_model, with_loras
from kinema.request.memory import Memory, check_memory
from kinema.request.options import NOTHING_GIVEN, GenerationOptions, Given
from kinema.request.request import GenerationRequest
from kinema.request.resolve import Resolved
from kinema.request.tiers import named_tier
from kinema.service.intake import Intake, StoredInput
from kinema.service.outlook import Outlook
from kinema.service.queue import QueueView, TimeEstimate
from kinema.service.readiness import Readiness
from kinema.service.stored_inputs import StoredInputs
from kinema.service.sweeper import SweepState
from kinema.settings import JobSettings, KeySettings, RetentionSettings, StorageSettings
from kinema.storage import Storage
from kinema.worker.startup import Loading

log = structlog.get_logger(__name__)

# What can be opened of a finished job, and the job's field that has it.
_VARIANTS = {"video": "artifact", "thumbnail": "thumbnail", "spritesheet": "spritesheet", "manifest": "manifest"}

# How long a link of the storage opens a file: a download may begin late, and a link may be passed on.
_LINK_OPENS_S = 15 * 60
# A step of a large model takes longer; then the answer says that the job is still in progress.
_STOP_WAIT_S = 2.0
# Submissions within this time share a measure of the disk: it takes a thread, since a network's folder may hang.
_MEASURED_S = 0.2


# Runs work that its client may no longer want. The default does not ask.
WhileAsked = Callable[[Coroutine[Any, Any, Prepared]], Awaitable[Prepared]]


def always(work: Coroutine[Any, Any, Prepared]) -> Awaitable[Prepared]:
    return work


@dataclass(frozen=True, slots=True)
class OpenArtifact:
    """A finished file of a job, and a way to read a part of it."""

    artifact: Artifact
    storage: Storage
    is_presigned: bool = False

    def link(self, filename: str) -> str | None:
        """A link of the storage that opens the file under this name, for a quarter of an hour; blocks. None where
        files are not opened by links. Raises StorageUnavailable."""
        if not self.is_presigned:
            return None
        named = f'inline; filename="{filename}"'
        return self.storage.link(self.artifact.key, _LINK_OPENS_S, ResponseContentDisposition=named)

    def read(self, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The bytes from ``start`` to ``end`` (exclusive) in chunks; blocks. Raises FileGone, StorageUnavailable."""
        return self.storage.read(self.artifact.key, start, end)


@dataclass(frozen=True, slots=True)
class LiveVideo:
    """A video that is made now, as a fragmented MP4: its head, and what follows, which raises KinemaError when the
    video breaks off."""

    head: bytes
    rest: AsyncGenerator[bytes, None]


class GenerationService:
    """Jobs as their clients see them. Every method may raise StoreUnavailable."""

    def __init__(
        self,
        store: JobStore,
        cluster: Cluster,
        storage: Storage,
        settings: JobSettings,
        intake: Intake,
        retention: RetentionSettings | None = None,
        space: StorageSettings | None = None,
        sweep_state: Callable[[], SweepState] = SweepState,
        keys: Mapping[str, KeySettings] | None = None,
    ) -> None:
        """Its ``inputs`` are started and stopped by whoever starts it, and its ``readiness`` is stopped. ``keys`` have
        limits of their own, by their id in jobs."""
        self.inputs = StoredInputs(store.inputs, storage)
        self.readiness = Readiness(store.count_waiting, storage)
        self.changes = store.changes
        self._store = store
        self._cluster = cluster
        self._storage = storage
        self._settings = settings
        self._keys = keys or {}
        self._retention = retention or RetentionSettings()
        self._space = space or StorageSettings()
        self._free_bytes: int | None = None
        self._measured_at = float("-inf")
        self.sweep_state = sweep_state
        self._queue = QueueView(store, cluster)
        self._intake = intake

    async def submit(
        self,
        options: GenerationOptions,
        *,
        model: str | None = None,
        given: Given | StoredInput | Callable[[], Given | StoredInput] = NOTHING_GIVEN,
        user: str | None = None,
        notes: Sequence[str] = (),
        key_id: str = "",
        client: str = "",
        submission: Submission | None = None,
        remixed_from: JobId | None = None,
        while_asked: WhileAsked = always,
    ) -> Job:
        """Complete the request and put it into the queue. ``notes`` become warnings of the job.

        ``given`` may be a function that finds what was given; it is called when the rest allows it. Inputs are read
        from storage and fitted in turn over the clients; without a ``client``, over the keys. A ``submission`` that was
        made before gives the job that it made then. ``while_asked`` runs the reading and fitting of the inputs, and may
        cancel it; what it raises then is raised here.
        Raises RequestError when it cannot be made, ModelNotFound, Overloaded, QuotaExceeded, NoWorker, StorageFull,
        StorageUnavailable, DecoderUnavailable.
        """
        if submission is not None and (known := await self._store.find_repeated(key_id, submission)):
            return known
        can, options = await self._to_make(model, options)
        await self._refuse_if_disk_is_full()
        if given:  # ``create`` checks again, but reading and fitting it takes time
            refuse_beyond(await self._store.inputs.stored_bytes(key_id), self._max_bytes(key_id))
            await self._refuse_if_full(can.model)
        found = given if isinstance(given, Given | StoredInput) else given()
        prepared = await while_asked(self._prepare(found, options, can, client or key_id))
        created_at = time.time()
        job_id = new_job_id(created_at)
        request = prepared.request
        if found:
            request = await self.inputs.hold(job_id, key_id, prepared, self._max_bytes(key_id))
        job = Job(
            id=job_id,
            key_id=key_id,
            request=request,
            warnings=(*notes, *prepared.warnings),
            user=user,
            remixed_from=remixed_from,
            created_at=created_at,
        )
        return await self._create(job, submission)

    async def estimate(
        self,
        options: GenerationOptions,
        *,
        model: str | None = None,
        given: Given | StoredInput = NOTHING_GIVEN,
        key_id: str = "",
        client: str = "",
        while_asked: WhileAsked = always,
    ) -> tuple[Resolved, TimeEstimate]:
        """The request that ``submit`` would store, and the time that its video would take. Nothing is stored.

        Raises RequestError, ModelNotFound, NoWorker, and with an image or a film Overloaded and DecoderUnavailable.
        """
        can, options = await self._to_make(model, options)
        if given:
            await self._refuse_if_full(can.model)
        prepared = await while_asked(self._prepare(given, options, can, client or key_id))
        resolved = Resolved(request=prepared.request, warnings=prepared.warnings)
        return resolved, await self._queue.estimate(prepared.request, key_id)

    async def get(self, job_id: JobId) -> Job:
        """The job of this id. Raises JobNotFound."""
        return await self._store.get(job_id)

    async def find(self, job_id: JobId, key_id: str) -> Job:
        """The job of this id, if it belongs to the key. Raises JobNotFound."""
        job = await self._store.get(job_id)
        if job.key_id != key_id:
            raise JobNotFound.named(job_id)
        return job

    async def find_many(self, job_ids: Sequence[JobId], key_id: str) -> Sequence[Job]:
        """Those of these jobs that exist and belong to the key, in this order."""
        found = await asyncio.gather(*(self._store.get(job_id) for job_id in job_ids), return_exceptions=True)
        for one in found:
            if isinstance(one, BaseException) and not isinstance(one, JobNotFound):
                raise one
        return [one for one in found if isinstance(one, Job) and one.key_id == key_id]

    async def usage(self, key_id: str | None, first: date, last: date) -> Sequence[DayUsage]:
        """What a key has made on each of these days on which it made something, by day; None: each key."""
        return await self._store.usage(key_id, first, last)

    async def list_page(
        self, key_id: str, wanted: Wanted, *, after: JobId | None, limit: int, is_ascending: bool
    ) -> JobPage:
        """One page of those of a key's jobs that are wanted, by age. The model may be called by an alias."""
        if wanted.model is not None:
            with suppress(ModelNotFound, NoWorker):
                wanted = replace(wanted, model=self.model(wanted.model).model)
        return await self._store.find_page(key_id, wanted, after=after, limit=limit, is_ascending=is_ascending)

    async def outlook(self, job: Job) -> Outlook:
        """The job's place in the queue and the seconds to its end, as they were up to half a second ago."""
        if job.status.is_terminal:
            return Outlook(None, None)
        return await self._queue.outlook(job)

    async def wait(self, job_id: JobId) -> Job:
        """Wait until the job has ended, and return it. Raises JobNotFound."""
        return await self._store.wait_for_end(job_id)

    def events(self, job_id: JobId, *, is_following: bool = True) -> AsyncGenerator[StoredEvent, None]:
        """The events of the job until now and, with ``is_following``, those to come, to its end. Raises JobNotFound."""
        return self._store.watch(job_id, is_following=is_following)

    async def cancel(self, job_id: JobId) -> Job:
        """Request that the job is stopped. A job that has ended stays as it is. Raises JobNotFound."""
        job = await self._store.request_cancel(job_id)
        await self._drop_inputs(job)
        return job

    async def stop(self, job_id: JobId) -> Job:
        """Cancel the job, and wait up to two seconds for its end. Raises JobNotFound."""
        job = await self._store.request_cancel(job_id)
        with suppress(TimeoutError):
            async with asyncio.timeout(_STOP_WAIT_S):
                job = await self.wait(job_id)
        await self._drop_inputs(job)
        return job

    async def star(self, job_id: JobId, *, is_starred: bool) -> Job:
        """Keep the job for as long as it is starred, or not any more. Raises JobNotFound."""
        return await self._store.star(job_id, is_starred=is_starred)

    def models(self) -> Sequence[Capabilities]:
        """The served models, each once, in the order in which their workers came; with the aliases and LoRAs of all of
        its workers."""
        known: dict[str, Capabilities] = {}
        for worker in self._cluster.workers():
            can = worker.capabilities
            before = known.setdefault(can.model, can)
            if can.aliases != before.aliases:
                before = before.named(None, (*before.aliases, *can.aliases))
            known[can.model] = merge_loras(before, can)
        return tuple(known.values())

    def model(self, name: str | None = None) -> Capabilities:
        """The served model of this name, or with this alias; without a name the first one.

        Raises ModelNotFound, and NoWorker when nothing is served, or no worker of that model is left.
        """
        served = self.models()
        for can in served:
            if name in (None, can.model):
                return can
        for can in served:
            if name in can.aliases:
                return can
        if name is not None and name in self._cluster.known_models():
            raise _gone(name)
        if name is None or not served:
            raise NoWorker("no model is served yet; try again later")
        names = ", ".join(can.model for can in served)
        raise ModelNotFound(f"model {name[:100]!r} is not served here; there is {names}", param="model")

    async def delete(self, job_id: JobId) -> None:
        """Delete the job and its files, whatever its status. A running job is stopped. Raises JobNotFound."""
        await self._drop_inputs(await self._store.delete(job_id))
        try:
            await asyncio.to_thread(self._storage.delete_job, job_id)
        except StorageUnavailable as exc:  # the sweeper removes files that have no job
            log.warning("the files of a deleted job are still there", job_id=job_id, reason=exc.message)

    def expires_at(self, job: Job) -> float | None:
        """The time at which the job and its files are removed; None while it has not ended, is starred, or if it is
        kept for ever."""
        return None if job.starred_at is not None else self._retention.expires_at(job.finished_at)

    def given(self, job: Job, new: Given | StoredInput = NOTHING_GIVEN) -> Given | StoredInput:
        """The files that came with the job's request, with those of ``new`` in their places. Raises FileGone."""
        request = job.request
        names = {"control_video"} if isinstance(new, StoredInput) else new.names
        if not request.input_keys or (names and not _keeps_some(request, names)):
            return new
        if job.status is JobStatus.CANCELLED:
            raise FileGone("the picture or film of a cancelled video is not kept; send it again with a new video")
        of_frames = {request.image_key, request.last_frame_key}
        is_picture = new.is_picture and of_frames.issuperset(request.input_keys)

        def read() -> Given:
            given = new.read() if isinstance(new, StoredInput) else new
            return given.over(read_back(self._storage, request))

        return StoredInput(read, is_picture)

    async def with_named(self, given: Given, named: Mapping[int, JobId], key_id: str) -> Given | StoredInput:
        """The same with the videos of these jobs among the films of control, each at its place.

        Raises JobNotFound, JobNotFinished, NoVideo, and InvalidRequest for a GIF.
        """
        if not named:
            return given
        jobs = {place: await self.find(job_id, key_id) for place, job_id in named.items()}
        opened = {place: self._open_film(job, "control_video") for place, job in jobs.items()}

        def read() -> Given:
            sent = iter(given.control_video)
            count = len(opened) + len(given.control_video)
            films = [b"".join(opened[place].read()) if place in opened else next(sent) for place in range(count)]
            return replace(given, control_video=tuple(films))

        return StoredInput(read)

    def film(self, job: Job, giving: Callable[[bytes], Given]) -> StoredInput:
        """The video of the job, as an input that ``giving`` makes of its bytes.

        Raises JobNotFinished, NoVideo, and InvalidRequest for a GIF.
        """
        opened = self._open_film(job)
        return StoredInput(lambda: giving(b"".join(opened.read())))

    def _open_film(self, job: Job, param: str = "video") -> OpenArtifact:
        opened = self._open(job, "video")
        if opened.artifact.media_type == MEDIA_TYPES["gif"]:
            raise InvalidRequest(
                f"{job.id} is a GIF, from which no other video is made; make it as mp4 or webm", param=param
            )
        return opened

    async def open_artifact(self, job_id: JobId, variant: str = "video") -> OpenArtifact:
        """The finished video (``variant`` video), a WebP picture of it (thumbnail), a JPEG sheet of its frames
        (spritesheet), or the JSON that says how to make it again (manifest).

        Raises JobNotFound, InvalidRequest for another variant, JobNotFinished, NoVideo for a job that ended without.
        """
        if variant not in _VARIANTS:
            raise InvalidRequest(
                f"variant {variant[:40]!r} is not made; accepted: {', '.join(_VARIANTS)}, preview, live",
                param="variant",
            )
        return self._open(await self._store.get(job_id), variant)

    def _open(self, job: Job, variant: str) -> OpenArtifact:
        artifact: Artifact | None = getattr(job, _VARIANTS[variant])
        if artifact is None:
            raise _why_no_video(job, variant)
        return OpenArtifact(artifact, self._storage, self._space.presign)

    async def watch(self, job_id: JobId) -> LiveVideo | OpenArtifact:
        """The video while it is made, as soon as its first frame is there; the finished one when that is there before.

        Raises JobNotFound, and NoVideo for a job that ends without a video.
        """
        job = await self._store.get(job_id)
        if not job.status.is_terminal:
            async with aclosing(self.events(job_id)) as events:
                async for stored in events:
                    if isinstance(stored.event, Started) and (live := await self._live(job_id, stored.event)):
                        return live
        return self._open(await self._store.get(job_id), "video")

    async def _live(self, job_id: JobId, started: Started) -> LiveVideo | None:
        """The video of this attempt; None when the attempt ends before its first frame, or its worker is not here."""
        try:
            rest = self._cluster.live(started.worker_id, job_id, started.attempt)
            return LiveVideo(await anext(rest), rest)
        except (KinemaError, StopAsyncIteration) as exc:
            log.debug("a video is not shown while it is made", job_id=job_id, reason=str(exc))
            return None

    async def preview(self, job_id: JobId) -> bytes:
        """The newest preview of the job, a JPEG. Raises JobNotFound, and JobNotFinished when there is none."""
        job = await self._store.get(job_id)
        preview = await self._store.find_preview(job_id)
        if preview is None:
            is_asked_for = job.request.preview_every is not None
            raise JobNotFinished("there is no preview" + ("" if is_asked_for else "; preview_every asks for them"))
        return base64.b64decode(preview.b64_jpeg)

    def memory_of(self, model: str) -> Sequence[Memory | None]:
        """The memory of each worker of the model."""
        return [worker.memory for worker in self._cluster.workers() if worker.capabilities.model == model]

    def workers(self) -> Sequence[WorkerInfo]:
        """Every worker that is known now."""
        return self._cluster.workers()

    async def count_waiting(self) -> int:
        """The number of jobs that wait for a worker."""
        return await self._store.count_waiting()

    def is_ready(self) -> bool:
        """Whether a worker takes jobs now."""
        return any(worker.is_ready for worker in self._cluster.workers())

    def loading(self) -> Loading | None:
        """The state of the start of this process's worker; None when it has started, and without such a worker."""
        return next((worker.loading for worker in self._cluster.workers() if worker.loading is not None), None)

    def tiers_of(self, model: str, asked: str | None) -> tuple[Sequence[Tier], str | None]:
        """The tiers of the model ``model``, and the one that is named in ``asked``, the model of a new request."""
        tiers = next((can.tiers for can in self.models() if can.model == model), ())
        return tiers, None if asked is None else split_model(asked, self._known_names())[1]

    def _known_names(self) -> set[str]:
        return {name for can in self.models() for name in can.names} | set(self._cluster.known_models())

    async def _to_make(self, model: str | None, options: GenerationOptions) -> tuple[Capabilities, GenerationOptions]:
        """The model for a new request, and its options with what the name has behind it: a tier, LoRAs.

        Raises as ``model``, but NoWorker for a model that has jobs in the database: its workers are only away.
        """
        if model is None:
            return self.model(), options
        known = self._known_names()
        base, tier, loras = split_model(model, known)
        try:
            return self.model(base), named_tier(with_loras(options, loras), tier)
        except ModelNotFound:
            for name in (model, model.rpartition(":")[0], model.rpartition("@")[0]):
                if name and name not in known and await self._store.has_jobs_of(name):
                    raise _gone(name) from None
            raise

    async def _create(self, job: Job, submission: Submission | None) -> Job:
        """Store the job. When it is refused, or its submission came before, its inputs are given up.

        When the database breaks off, the job may be stored all the same; if it is not, its inputs are given up later.
        """
        try:
            stored = await self._admit(job, submission)
        except BaseException:  # also when the submission is cut short; a job that was stored all the same keeps them
            await self._give_up_inputs(job)
            raise
        if stored.id != job.id:  # the same submission came twice at once
            await self._give_up_inputs(job)
            return stored
        log.info("job accepted", job_id=job.id, model=job.request.model)
        return stored

    def _limits_of(self, key_id: str) -> JobSettings:
        """The settings of jobs with the limits that the key has of its own."""
        if (key := self._keys.get(key_id)) is None:
            return self._settings
        own = {"max_queued_per_key": key.max_queued, "max_queued_s_per_key": key.max_queued_s}
        return self._settings.model_copy(update={name: limit for name, limit in own.items() if limit is not None})

    def _max_bytes(self, key_id: str) -> int | None:
        """What the key may have stored; None means no bound."""
        key = self._keys.get(key_id)
        return self._space.max_bytes_per_key if key is None or key.max_gb is None else key.max_bytes

    async def _admit(self, job: Job, submission: Submission | None) -> Job:
        """Store the job if the queue has room. When the next place is free is found out for a refusal alone."""
        model = job.request.model
        limits = await self._queue.limits(model, self._limits_of(job.key_id))
        limits = replace(limits, max_stored_bytes=self._max_bytes(job.key_id))
        try:
            return await self._store.create(job, limits=limits, submission=submission)
        except Overloaded as exc:
            exc.retry_after_s = await self._queue.retry_after_s(model)
            raise

    async def _give_up_inputs(self, job: Job) -> None:
        if job.request.input_keys:
            await self.inputs.let_go(job.id, job.key_id)

    async def _drop_inputs(self, job: Job) -> None:
        """Delete the inputs of a job that needs them no more, if nobody else does."""
        if job.request.input_keys:
            # A storage that is slow, or has thousands to delete for others, does not hold this client up.
            with suppress(TimeoutError):
                async with asyncio.timeout(_STOP_WAIT_S):
                    await self.inputs.clean()

    async def _refuse_if_disk_is_full(self) -> None:
        """Raises StorageFull, and StorageUnavailable."""
        if time.monotonic() - self._measured_at > _MEASURED_S:
            self._free_bytes = await asyncio.to_thread(self._storage.free_bytes)
            self._measured_at = time.monotonic()
        free_bytes = self._free_bytes
        if free_bytes is not None and free_bytes < self._space.min_free_bytes:
            raise StorageFull(
                f"{free_bytes / 1e9:.3g} GB of the disk are free, less than storage.min_free_gb "
                f"({self._space.min_free_gb:g}); no new video is taken before some are deleted"
            )

    async def _refuse_if_full(self, model: str) -> None:
        """Refuse before an image is decoded; ``create`` checks again. Raises Overloaded."""
        if await self._store.count_waiting(model) >= self._settings.max_queued:
            raise Overloaded(f"{self._settings.max_queued} videos wait already; try again later")

    async def _prepare(
        self, given: Given | StoredInput, options: GenerationOptions, can: Capabilities, client: str
    ) -> Prepared:
        prepared = await self._intake.prepare(given, options, can, client) if given else prepare(given, options, can)
        check_memory(prepared.request, can.limits, self.memory_of(can.model))
        return prepared


def _keeps_some(request: GenerationRequest, new: Set[str]) -> bool:
    """Whether some input of the request stays beside those that are new; a film to edit or to continue comes alone."""
    if request.continues_key or request.edits_key:
        return False
    has = {
        "image": request.image_key,
        "last_frame": request.last_frame_key,
        "control_video": request.control_video_keys,
        "reference_images": request.reference_image_keys,
        "conditioning": request.conditioning_keys,
    }
    return any(keys and name not in new for name, keys in has.items())


def _gone(model: str) -> NoWorker:
    return NoWorker(f"no worker of the model {model!r} is here now; try again later")


def _why_no_video(job: Job, variant: str) -> RequestError:
    match job.status:
        case JobStatus.FAILED if job.error is not None:
            return NoVideo(f"there is no video: {job.error.message}")
        case JobStatus.CANCELLED:
            return NoVideo("there is no video: it was cancelled")
        case JobStatus.COMPLETED:
            return NoVideo(f"this video was stored without a {variant}")
    return JobNotFinished("the video is not ready yet")
