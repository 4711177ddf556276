"""The durable list of jobs and their events: the protocol that its users see.

``sql.py`` implements it. The dispatcher writes events and clients read them; both see the same order.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from datetime import date
from typing import TYPE_CHECKING, Protocol

from kinema.events import Event, Failed, Preview
from kinema.ids import JobId
from kinema.job import Job
from kinema.request.request import Priority

if TYPE_CHECKING:
    from kinema.jobs.changes import JobChanges
    from kinema.jobs.input_store import SqlInputStore
    from kinema.jobs.listing import JobPage, Wanted

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
    """How much may wait for a model, in all and for one key; None means no bound. Work as in GenerationRequest."""

    max_queued: int | None = None
    max_work: float | None = None
    max_queued_per_key: int | None = None
    max_work_per_key: float | None = None
    # What the key's inputs and videos may take.
    max_stored_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Submission:
    """Tells a repeated submission from a new one, by the client's own key or by the client's count of its tries."""

    fingerprint: str
    idempotency_key: str | None = None
    is_retry: bool = False

    @property
    def is_first(self) -> bool:
        """Whether nothing says that this submission may be a repeated one."""
        return self.idempotency_key is None and not self.is_retry

    @property
    def told_by(self) -> str:
        """What repeated submissions have in common."""
        return self.fingerprint if self.idempotency_key is None else self.idempotency_key

    def columns(self) -> dict[str, str | None]:
        return {"fingerprint": self.fingerprint, "idempotency_key": self.idempotency_key}


@dataclass(frozen=True, slots=True)
class ActiveJob:
    """A job that has not ended, as the queue sees it.

    ``step_work`` is the work of one step, and ``decoding_work`` the work after the last step; both are zero when they
    are not known. ``turn`` says when a job of its model and key was claimed last: the higher, the later.
    """

    id: JobId
    model: str
    key_id: str
    work: float
    progress: int
    is_waiting: bool
    priority: Priority = "normal"
    step_work: float = 0.0
    decoding_work: float = 0.0
    turn: int = 0

    def taking(self, work: float) -> ActiveJob:
        """The same job with its work in another unit."""
        factor = work / self.work
        step_work, decoding_work = self.step_work * factor, self.decoding_work * factor
        return replace(self, work=work, step_work=step_work, decoding_work=decoding_work)


@dataclass(frozen=True, slots=True)
class Arrivals:
    """The work of each of the latest jobs, in any unit, and the number of seconds in which as many jobs arrive."""

    work: Sequence[float]
    within_s: float

    @classmethod
    def of(cls, work: Sequence[float], oldest_s: float, most_s: float) -> Arrivals:
        """The arrivals of the last ``most_s`` seconds, when the first of these jobs came ``oldest_s`` seconds ago.

        Their time begins one mean pause before the first job.
        """
        within_s = min(oldest_s * (1 + 1 / len(work)), most_s) if work else most_s
        return cls(work, max(within_s, 1e-3))


@dataclass(frozen=True, slots=True)
class DayUsage:
    """What a key has made on a day (UTC): its videos, the seconds of a device that they took, and their files' size."""

    key_id: str
    day: date
    num_videos: int
    device_s: float
    size_bytes: int


class JobStore(Protocol):
    """Jobs and their events, and the inputs that they use. Every method may raise StoreUnavailable."""

    inputs: SqlInputStore
    changes: JobChanges

    async def create(self, job: Job, *, limits: QueueLimits, submission: Submission | None = None) -> Job:
        """Store a new job with its Queued event, and return it; or the job that this submission made before.

        The job takes over the inputs that were held for it. Raises Overloaded and QuotaExceeded beyond the limits,
        InvalidRequest for an idempotency key that came with another body, and StorageUnavailable when its inputs are
        not held any more.
        """

    async def find_repeated(self, key_id: str, submission: Submission) -> Job | None:
        """The job that this submission of that key has already made. Raises InvalidRequest as ``create`` does."""

    async def get(self, job_id: JobId) -> Job:
        """Raises JobNotFound."""

    async def list_page(
        self, key_id: str, *, after: JobId | None, limit: int, is_ascending: bool
    ) -> tuple[Sequence[Job], bool]:
        """A page of the key's jobs by age, after the given id (before it, if descending), and whether there are more.

        The id may be that of a deleted job, because ids sort by age.
        """

    async def find_page(
        self, key_id: str, wanted: Wanted, *, after: JobId | None, limit: int, is_ascending: bool
    ) -> JobPage:
        """A page of those of the key's jobs that are wanted, as ``list_page``. It may be short, or empty, and have more
        behind its ``last_id``."""

    async def delete(self, job_id: JobId) -> Job:
        """Remove the job and its events, whatever its status, and return it. Raises JobNotFound."""

    async def active(self) -> Sequence[ActiveJob]:
        """All jobs that have not ended: by priority, then the oldest first."""

    async def has_jobs_of(self, model: str) -> bool:
        """Whether there is any job of this model."""

    async def recent_times(self, model: str) -> Sequence[tuple[float, float]]:
        """Work of the model's latest videos, with the seconds that the device and storing took; the newest is last."""

    async def recent_arrivals(self, model: str, within_s: float) -> Arrivals:
        """The model's jobs of the last so many seconds; when there are many, only the latest of them."""

    async def waiting_loras(self, models: Sequence[str]) -> Sequence[tuple[str, str]]:
        """What the waiting jobs of these models need beside the model: its name, and the digests of a job's LoRAs,
        sorted, with a space in between. Each pair comes once; jobs without LoRAs are left out."""

    async def claim(
        self,
        models: Sequence[str],
        owner: str,
        lease_s: float,
        *,
        without_losses: Sequence[str] = (),
        only_loras: Mapping[str, Collection[str]] | None = None,
        owners_have_workers: bool = True,
    ) -> Job | None:
        """Take the first job of these models that waits, or whose owner did not renew its lease. One atomic statement.

        Of the jobs of the highest priority, the first is the oldest one of the key with the fewest running jobs; of
        such keys, of the one whose jobs were claimed longest ago. For models in ``without_losses`` only jobs count that
        have never lost a worker. Of the models in ``only_loras`` only jobs count that need no LoRAs, or
        such as stand there, as ``waiting_loras`` gives them; the others wait on, whatever their place.

        A job that lost its owner has been taken over, and where ``owners_have_workers``, it has lost its worker too.

        The claimed job is in progress, its attempt is one higher, and it belongs to the owner for ``lease_s`` seconds.
        A job that the owner already holds is not claimed again, even if the owner renewed its lease late.
        """

    async def wanted(self, owner: str) -> Set[tuple[JobId, int]]:
        """The jobs that the owner holds and whose cancel nobody has requested, with their attempts."""

    async def renew(self, owner: str, lease_s: float) -> None:
        """Extend the leases of all jobs that the owner holds."""

    async def release(self, owner: str, *, keeping: Collection[JobId] = ()) -> None:
        """Give every job of this owner back to the queue, except for those in ``keeping``.

        Their status stays. They have no lease any more, so the next claim takes them.
        """

    async def give_back(
        self, owner: str, job_id: JobId, *, is_lost: bool, wait_s: float = 0.0, attempt: int | None = None
    ) -> None:
        """Give one job back to the queue; it can be claimed again after ``wait_s`` seconds.

        During that time it counts as waiting. ``is_lost`` says that its worker was lost, which is counted. A job with a
        cancel request ends as cancelled instead. Nothing happens when ``attempt`` is not the job's attempt any more.
        """

    async def record(self, job_id: JobId, *happened: Event, attempt: int | None = None) -> bool:
        """Append the events and advance the job, in one transaction. Only the last event may be terminal.

        A preview replaces the preview before it, whose number is not used again.
        Returns False and writes nothing when ``attempt`` is not the job's attempt any more, or the job has ended or was
        deleted: then the events come from a run that was given up.
        """

    async def find_preview(self, job_id: JobId) -> Preview | None:
        """The newest preview of the job, or None when there is none or no such job."""

    async def request_cancel(self, job_id: JobId) -> Job:
        """Mark the job; a waiting job is cancelled at once. Returns the job as it is then. Raises JobNotFound."""

    async def star(self, job_id: JobId, *, is_starred: bool) -> Job:
        """Give the job a star, or take it: a starred job does not expire. Returns the job. Raises JobNotFound."""

    async def fail_waiting(self, created_before: float, failed: Failed, limit: int) -> Sequence[JobId]:
        """End jobs that wait and were created before that time (seconds since the epoch), ``limit`` at most."""

    async def count_waiting(self, model: str | None = None) -> int:
        """How many jobs of a model, or of all models, wait: queued jobs, and jobs in progress without an owner."""

    def watch(
        self, job_id: JobId, after_seq: int = 0, *, is_following: bool = True
    ) -> AsyncGenerator[StoredEvent, None]:
        """The job's events after that number, up to the terminal one: the recorded ones, then new ones as they come.

        Without ``is_following`` only the recorded ones. Raises JobNotFound.
        """

    async def wait_for_end(self, job_id: JobId) -> Job:
        """Wait until the job has ended, and return it. Raises JobNotFound, also when it is deleted while waiting."""

    async def wait_for_work(self, timeout_s: float) -> None:
        """Return when a job may wait or a cancel was requested, or when the time is up. Only one caller may wait."""

    async def usage(self, key_id: str | None, first: date, last: date) -> Sequence[DayUsage]:
        """What a key has made on each of these days on which it made something, by day; None: each key."""

    async def close(self) -> None:
        """Close the database."""
