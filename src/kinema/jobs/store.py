"""The durable list of jobs and of what happened to them, as its users see it.

One implementation lives in ``sql.py``. The dispatcher writes events, clients read them; both see the same order.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from kinema.events import Event
from kinema.job import Job, JobId


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """An event of a job with its number, counted from 1, and when it was recorded (seconds since the epoch)."""

    seq: int
    at: float
    event: Event


class JobStore(Protocol):
    """Jobs and their events. Every method may raise StoreUnavailable."""

    async def create(self, job: Job, *, max_queued: int) -> None:
        """Store a new job with its Queued event. Raises Overloaded when ``max_queued`` of its model wait already."""

    async def get(self, job_id: JobId) -> Job:
        """Raises JobNotFound."""

    async def claim(self, models: Sequence[str], owner: str, lease_s: float) -> Job | None:
        """Take the oldest job of these models that waits, or whose owner let its lease run out; one atomic statement.

        The claimed job is in progress, its attempt is one higher, and it is the owner's for ``lease_s`` seconds.
        A job that the owner holds already is not taken again, even when it was late to renew.
        """

    async def renew(self, owner: str, lease_s: float) -> None:
        """Lengthen the leases of all jobs that the owner holds."""

    async def release(self, owner: str) -> None:
        """Give every job of this owner back to the queue, for a clean shutdown.

        Their status stays as it is; they have no lease any more, so the next claim takes them.
        """

    async def give_back(self, owner: str, job_id: JobId) -> None:
        """Give one job back to the queue because its worker was lost, and count the loss."""

    async def record(self, job_id: JobId, event: Event, *, attempt: int | None = None) -> bool:
        """Append the event and advance the job, in one transaction.

        False, and nothing written, when ``attempt`` is no longer the job's attempt or the job has ended: the event
        came from a run that was given up.
        """

    async def request_cancel(self, job_id: JobId) -> Job:
        """Mark the job; a waiting one is cancelled at once. Returns the job as it is then. Raises JobNotFound."""

    async def count_waiting(self, model: str | None = None) -> int:
        """How many jobs of a model, or of all, wait: the queued ones, and those in progress that nobody holds."""

    def watch(self, job_id: JobId, after_seq: int = 0) -> AsyncGenerator[StoredEvent, None]:
        """The job's events after that number, the recorded ones first and the others as they come, to the terminal one.

        Raises JobNotFound.
        """

    async def wait_for_work(self, timeout_s: float) -> None:
        """Return when a job may be waiting or a cancel was asked for, or when the time is up. For one waiter only."""

    async def close(self) -> None:
        """Let go of the database."""
