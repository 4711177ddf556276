"""The durable list of jobs and of what happened to them, as its users see it.

One implementation lives in ``sql.py``. The dispatcher writes events, clients read them; both see the same order.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from kinema.events import Event, Preview
from kinema.ids import JobId
from kinema.job import Job
from kinema.request.request import Priority

# In the order of the queue.
PRIORITIES: tuple[Priority, ...] = ("high", "normal", "low")


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """An event of a job with its number, counted from 1, and when it was recorded (seconds since the epoch)."""

    seq: int
    at: float
    event: Event


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How much may wait, of a model and of one key's jobs of it; None: no bound. Work as in GenerationRequest."""

    max_queued: int | None = None
    max_work: float | None = None
    max_queued_per_key: int | None = None
    max_work_per_key: float | None = None
    # What a refused client is told.
    retry_after_s: int = 5


@dataclass(frozen=True, slots=True)
class Submission:
    """What tells a repeated submission from a new one: the client's own key, or its word that it tries again."""

    fingerprint: str
    idempotency_key: str | None = None
    is_retry: bool = False

    @property
    def is_first(self) -> bool:
        """Whether nothing says that it may have come before."""
        return self.idempotency_key is None and not self.is_retry

    def columns(self) -> dict[str, str | None]:
        return {"fingerprint": self.fingerprint, "idempotency_key": self.idempotency_key}


@dataclass(frozen=True, slots=True)
class ActiveJob:
    """A job that has not ended, as the queue sees it. Of its work, ``step_work`` is a step, and ``decoding_work`` what
    comes after the last one; zero when not known."""

    id: JobId
    model: str
    key_id: str
    work: float
    progress: int
    is_waiting: bool
    priority: Priority = "normal"
    step_work: float = 0.0
    decoding_work: float = 0.0

    def taking(self, work: float) -> ActiveJob:
        """With its work counted in another unit."""
        factor = work / self.work
        step_work, decoding_work = self.step_work * factor, self.decoding_work * factor
        return replace(self, work=work, step_work=step_work, decoding_work=decoding_work)


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What each of the latest jobs needs, in whatever unit, and the seconds in which so many come."""

    work: Sequence[float]
    within_s: float

    @classmethod
    def of(cls, work: Sequence[float], oldest_s: float, most_s: float) -> Arrivals:
        """Of jobs of the last ``most_s`` seconds, the first of which came ``oldest_s`` ago: their time begins one pause
        before it, as long as theirs are on average."""
        within_s = min(oldest_s * (1 + 1 / len(work)), most_s) if work else most_s
        return cls(work, max(within_s, 1e-3))


class JobStore(Protocol):
    """Jobs and their events. Every method may raise StoreUnavailable."""

    async def create(self, job: Job, *, limits: QueueLimits, submission: Submission | None = None) -> Job:
        """Store a new job with its Queued event, and return it; or the job that this submission made before.

        Raises Overloaded beyond the limits, InvalidRequest for an idempotency key that came with another body.
        """

    async def find_repeated(self, key_id: str, submission: Submission) -> Job | None:
        """The job that this submission of that key has made already. Raises InvalidRequest as ``create`` does."""

    async def get(self, job_id: JobId) -> Job:
        """Raises JobNotFound."""

    async def list_page(
        self, key_id: str, *, after: JobId | None, limit: int, is_ascending: bool
    ) -> tuple[Sequence[Job], bool]:
        """A key's jobs by age, those after (or before, descending) the given id, and whether there are more.

        The id of a deleted job is as good as any: ids are in the order of their making.
        """

    async def delete(self, job_id: JobId) -> Job:
        """Forget the job and its events, whatever its status, and return what it was. Raises JobNotFound."""

    async def active(self) -> Sequence[ActiveJob]:
        """All jobs that have not ended, in the order of the queue: by priority, and the oldest first."""

    async def has_jobs_of(self, model: str) -> bool:
        """Whether there is any job of that model."""

    async def recent_times(self, model: str) -> Sequence[tuple[float, float]]:
        """The work of the model's latest videos, and the seconds that a device and storing took for it; newest last."""

    async def recent_arrivals(self, model: str, within_s: float) -> Arrivals:
        """The model's jobs of the last so many seconds, or the latest of them when there were many."""

    async def claim(
        self, models: Sequence[str], owner: str, lease_s: float, *, without_losses: Sequence[str] = ()
    ) -> Job | None:
        """Take the first job of these models that waits, or whose owner let its lease run out; one atomic statement.

        The first is the oldest of the highest priority. Of the models in ``without_losses`` it is one that never lost a
        worker or dispatcher.

        The claimed job is in progress, its attempt is one higher, and it is the owner's for ``lease_s`` seconds.
        A job that the owner holds already is not taken again, even when it was late to renew.
        """

    async def renew(self, owner: str, lease_s: float) -> None:
        """Lengthen the leases of all jobs that the owner holds."""

    async def release(self, owner: str) -> None:
        """Give every job of this owner back to the queue, for a clean shutdown.

        Their status stays as it is; they have no lease any more, so the next claim takes them.
        """

    async def give_back(self, owner: str, job_id: JobId, *, is_lost: bool, wait_s: float = 0.0) -> None:
        """Give one job back to the queue, to be claimed again in ``wait_s`` seconds at the earliest.

        Until then it counts as waiting, too. ``is_lost`` when its worker was lost, which is counted. A job whose
        cancel was asked for ends as cancelled instead.
        """

    async def record(self, job_id: JobId, *happened: Event, attempt: int | None = None) -> bool:
        """Append what happened and advance the job, in one transaction; only the last may be terminal.

        A preview takes the place of the one before it, whose number stays free.
        False, and nothing written, when ``attempt`` is no longer the job's attempt, or the job has ended or was
        deleted: the events came from a run that was given up.
        """

    async def find_preview(self, job_id: JobId) -> Preview | None:
        """The newest preview of the job; None when there is none, or no such job."""

    async def request_cancel(self, job_id: JobId) -> Job:
        """Mark the job; a waiting one is cancelled at once. Returns the job as it is then. Raises JobNotFound."""

    async def count_waiting(self, model: str | None = None) -> int:
        """How many jobs of a model, or of all, wait: the queued ones, and those in progress that nobody holds."""

    def watch(
        self, job_id: JobId, after_seq: int = 0, *, is_following: bool = True
    ) -> AsyncGenerator[StoredEvent, None]:
        """The job's events after that number, the recorded ones first and the others as they come, to the terminal one.

        Without ``is_following`` the recorded ones alone. Raises JobNotFound.
        """

    async def wait_for_end(self, job_id: JobId) -> Job:
        """The job once it has ended. Raises JobNotFound, also when it is deleted meanwhile."""

    async def wait_for_work(self, timeout_s: float) -> None:
        """Return when a job may be waiting or a cancel was asked for, or when the time is up. For one waiter only."""

    async def close(self) -> None:
        """Let go of the database."""
