"""Where tasks run, as the dispatcher sees it.

The dispatcher knows workers by their ids and uses only this protocol. The cluster knows whether a worker is a thread of
this process or a process on another machine.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kinema.events import Event
from kinema.ids import JobId
from kinema.job import Task
from kinema.request.capabilities import Capabilities
from kinema.request.memory import Memory
from kinema.worker.startup import Loading


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker as it is now. ``free_slots`` is the number of further tasks that it would admit.

    ``predicted_work`` is the work that is left for it, in the units of ``GenerationRequest.work``, from all frontends.
    ``has_suspect`` is whether a task runs there whose worker was lost before: that task may have caused the loss.
    ``memory`` is that of its device, None where nobody knows, and ``num_parked`` and ``num_resumed`` say how often a
    video left it for others and came back. ``loras_in_memory`` are the digests of LoRAs that it need not read again.
    ``costs`` are what its turns take, for ``CostModel.from_json``; an older worker says nothing of them.
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
    memory: Memory | None = None
    num_parked: int = 0
    num_resumed: int = 0
    loras_in_memory: Sequence[str] = ()
    costs: Mapping[str, Any] | None = None


class Cluster(Protocol):
    """Workers, and a way to run a task on one of them. ``is_local`` when they die with this process."""

    is_local: bool

    def workers(self) -> Sequence[WorkerInfo]:
        """Every worker that is known now, ready or not."""

    def known_models(self) -> Sequence[str]:
        """The models of all present workers, and of workers that have left, because these may come back; their aliases
        too."""

    def run(self, worker_id: str, task: Task) -> AsyncIterator[Event]:
        """Run the task on that worker. The events begin with Started and end with exactly one terminal event.

        The task takes a slot of the worker from this call on. The iterator is an async generator, and closing it
        cancels the task. Raises WorkerLost when the worker went away before the terminal event, NoWorker when it has no
        free slot.
        """

    async def cancel(self, job_id: JobId, attempt: int) -> None:
        """Request that this attempt of the job is stopped; its event stream then ends with Cancelled.

        Others are not touched: a dispatcher that has lost the job may cancel its attempt late.
        """

    def live(self, worker_id: str, job_id: JobId, attempt: int) -> AsyncGenerator[bytes, None]:
        """The video that this worker makes, as ``Worker.live`` gives it; closing the iterator ends nothing else.

        Raises WorkerLost, at once or by the iterator, when the worker cannot be reached or does not make it, and when
        the video breaks off.
        """

    async def wait_for_change(self, timeout_s: float) -> None:
        """Return when a worker came, left or gained a free slot, or when the time is up."""
