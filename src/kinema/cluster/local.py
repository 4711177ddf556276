"""The cluster of one worker in this process. It is the default, and most tests use it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

from kinema import __version__
from kinema.cluster.base import WorkerInfo
from kinema.errors import WorkerLost
from kinema.events import Event
from kinema.ids import JobId
from kinema.job import Task
from kinema.worker.worker import Worker


class LocalCluster:
    """A ``Cluster`` with a worker that other code starts and stops."""

    is_local = True

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def workers(self) -> Sequence[WorkerInfo]:
        """The one worker, as it is now."""
        worker = self._worker
        return (
            WorkerInfo(
                worker_id=worker.worker_id,
                capabilities=worker.capabilities,
                free_slots=worker.free_slots,
                is_ready=worker.is_ready,
                predicted_work=worker.predicted_work,
                has_suspect=worker.has_suspect,
                device=worker.device,
                version=__version__,
                loading=worker.loading,
                memory=worker.memory,
                num_parked=worker.num_parked,
                num_resumed=worker.num_resumed,
                loras_in_memory=worker.loras_in_memory,
                costs=worker.costs,
            ),
        )

    def known_models(self) -> Sequence[str]:
        """The model of the one worker, and its aliases."""
        return self._worker.capabilities.names

    def run(self, worker_id: str, task: Task) -> AsyncIterator[Event]:
        """Run the task like ``Worker.run``. Raises WorkerLost for another worker's id."""
        if worker_id != self._worker.worker_id:
            raise WorkerLost(f"worker {worker_id} is not here")
        return self._worker.run(task)

    async def cancel(self, job_id: JobId, attempt: int) -> None:
        """Cancel the attempt like ``Worker.cancel``."""
        await self._worker.cancel(job_id, attempt)

    def live(self, worker_id: str, job_id: JobId, attempt: int) -> AsyncGenerator[bytes, None]:
        """The video while it is made, like ``Worker.live``. Raises WorkerLost also for another worker's id."""
        if worker_id != self._worker.worker_id:
            raise WorkerLost(f"worker {worker_id} is not here")
        return self._worker.live(job_id, attempt)

    async def wait_for_change(self, timeout_s: float) -> None:
        """Return when a slot became free, or the worker's readiness changed, or the time is up."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._worker.wait_for_change()
