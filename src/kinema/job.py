"""The durable record of a request, and the one place where its status changes.

``advance`` is the whole state machine: a pure function from a job and an event to the next job.
Stores call it inside their transactions; nothing else sets a status.
"""

from __future__ import annotations

import time
from enum import StrEnum

from pydantic import BaseModel, ConfigDict

from kinema.events import Artifact, Cancelled, Completed, Event, Failed, Preview, Progress, Queued, Started, Timings
from kinema.ids import JobId
from kinema.request.request import GenerationRequest

# The last percent is the stored file.
_MADE = 99


class JobStatus(StrEnum):
    """The words of the OpenAI Videos API, and ``cancelled``."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        return self in (JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED)


class JobError(BaseModel):
    """Why a job failed: a stable code, and one sentence."""

    model_config = ConfigDict(frozen=True)

    code: str
    message: str


class Job(BaseModel):
    """One accepted request. Times are seconds since the epoch.

    ``attempt`` counts how often the job was dispatched; ``losses`` counts the attempts that ended with a dead worker,
    and ``takeovers`` those whose dispatcher was dead or away for too long. ``key_id`` is the owner: the digest of the
    client's API key, or empty without keys.
    """

    model_config = ConfigDict(frozen=True)

    id: JobId
    key_id: str = ""
    request: GenerationRequest
    warnings: tuple[str, ...] = ()
    user: str | None = None
    remixed_from: JobId | None = None
    status: JobStatus = JobStatus.QUEUED
    progress: int = 0
    attempt: int = 0
    losses: int = 0
    takeovers: int = 0
    is_cancel_requested: bool = False
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None
    # Since then somebody keeps it: it does not expire.
    starred_at: float | None = None
    artifact: Artifact | None = None
    thumbnail: Artifact | None = None
    spritesheet: Artifact | None = None
    timings: Timings | None = None
    error: JobError | None = None

    @property
    def manifest(self) -> Artifact | None:
        """The file that says how to make the video again."""
        return None if self.artifact is None else self.artifact.manifest

    @property
    def deadline_at(self) -> float | None:
        """The time until which the client wants the video, in seconds since the epoch."""
        return None if self.request.deadline_s is None else self.created_at + self.request.deadline_s

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        """Every file that the job made."""
        made = (self.artifact, self.thumbnail, self.spritesheet, self.manifest)
        return tuple(artifact for artifact in made if artifact is not None)


class Task(BaseModel):
    """The part of a job that a worker needs. Each attempt of a job is a task of its own.

    ``tenant`` is the owner, for sharing the device; ``deadline_at`` is in seconds since the epoch; ``losses`` is the
    number of workers that the job has lost.
    """

    model_config = ConfigDict(frozen=True)

    job_id: JobId
    attempt: int
    request: GenerationRequest
    tenant: str = ""
    deadline_at: float | None = None
    losses: int = 0


class IllegalTransition(AssertionError):
    """An event reached a job that cannot take it. This is always our own mistake."""


def advance(job: Job, event: Event, now: float | None = None) -> Job:
    """The job after ``event``.

    Raises IllegalTransition when the job's status does not allow it: nothing follows a terminal event, and only a
    job in progress makes progress or completes.
    """
    now = time.time() if now is None else now
    match event:
        case Queued() if job.status is JobStatus.QUEUED:
            return job
        case Started() if job.status in (JobStatus.QUEUED, JobStatus.IN_PROGRESS):
            started = job.started_at if job.started_at is not None else now
            return _with(job, status=JobStatus.IN_PROGRESS, progress=0, attempt=event.attempt, started_at=started)
        case Progress() | Preview() if job.status is JobStatus.IN_PROGRESS:
            return job if isinstance(event, Preview) else _with(job, progress=max(job.progress, _percent(job, event)))
        case Completed() if job.status is JobStatus.IN_PROGRESS:
            done = _with(job, status=JobStatus.COMPLETED, progress=100, finished_at=now)
            files = {"artifact": event.artifact, "thumbnail": event.thumbnail, "spritesheet": event.spritesheet}
            return _with(done, **files, timings=event.timings, warnings=(*job.warnings, *event.warnings))
        case Failed() if not job.status.is_terminal:
            error = JobError(code=event.code, message=event.message)
            return _with(job, status=JobStatus.FAILED, finished_at=now, error=error)
        case Cancelled() if not job.status.is_terminal:
            return _with(job, status=JobStatus.CANCELLED, finished_at=now)
    raise IllegalTransition(f"a {job.status.value} job cannot take the event {event.type!r}")


def _percent(job: Job, event: Progress) -> int:
    return int(share_done(event, job.request) * _MADE)


def _with(job: Job, **changes: object) -> Job:
    return job.model_copy(update=changes)


def share_done(event: Progress, request: GenerationRequest) -> float:
    """The part of the request's work that is done after this event, from 0 to 1."""
    decoding = request.decoding_work / request.work
    share = event.step / max(event.total, 1)
    return share * (1 - decoding) if event.stage == "denoise" else 1 - decoding + share * decoding


def share_of(progress: int) -> float:
    """The part of a job's work that is done, from 0 to 1, as exactly as its rounded percentage allows."""
    return min((progress + 0.5) / _MADE, 1.0) if progress else 0.0
