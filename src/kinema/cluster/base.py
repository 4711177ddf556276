"""Where tasks run, as the dispatcher sees it.

The dispatcher knows workers by id and talks to them through this protocol alone; whether a worker is a thread of this
process or a process on another machine is the cluster's business.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from kinema.events import Event
from kinema.ids import JobId
from kinema.job import Task
from kinema.request.capabilities import Capabilities
from kinema.worker.startup import Loading


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker as it is now. ``free_slots`` is how many more tasks it would admit.

    ``predicted_work`` is what it still has to compute, in the units of ``GenerationRequest.work``, whoever sent it.
    ``has_suspect`` is whether a task runs there whose worker was lost before: it may have been that task's doing.
    ``loading`` says how far its start is; None for one that has started, and for one of another process.
    """

    worker_id: str
    capabilities: Capabilities
    free_slots: int
    is_ready: bool
    predicted_work: float = 0.0
    has_suspect: bool = False
    device: str = ""
    version: str = ""
    loading: Loading | None = None


class Cluster(Protocol):
    """Workers, and a way to run a task on one of them."""

    def workers(self) -> Sequence[WorkerInfo]:
        """Every worker that is known now, ready or not."""

    def known_models(self) -> Sequence[str]:
        """The models of these workers, and of those that have left: they may come back."""

    def run(self, worker_id: str, task: Task) -> AsyncIterator[Event]:
        """Run the task there; the events begin with Started and end with exactly one terminal event.

        The task counts against the worker's free slots from this call on. The iterator is an async generator, and
        closing it cancels the task. Raises WorkerLost when the worker went away before the terminal event, NoWorker
        when it has no free slot.
        """

    async def cancel(self, job_id: JobId) -> None:
        """Ask for the job to be stopped; its event stream then ends with Cancelled. Unknown jobs are ignored."""

    async def wait_for_change(self, timeout_s: float) -> None:
        """Return when a worker came, left, or gained a free slot, or when the time is up."""
