"""A worker as the handlers of a transport: what frontends may ask of it, and how it leaves.

Tasks may arrive twice and late: an attempt of a job runs once, and never after a newer attempt. This file does not know
how payloads are sent. ``remote.py`` is the other end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Mapping

import structlog

from kinema import __version__
from kinema.cluster.transport import CANARY, CANCEL, INFO, LIVE, RUN, Handler, Payload
from kinema.errors import Drained, NoWorker, WorkerLost
from kinema.events import Event
from kinema.ids import JobId
from kinema.job import Task
from kinema.worker.worker import Worker

log = structlog.get_logger(__name__)

# A change is reported at once, but not more often than this. Remaining work is reported this often.
_SHORTEST_S = 0.05
_PROGRESS_S = 0.5
# Number of jobs whose newest attempt is remembered, for late calls. Far more than can be on their way.
_REMEMBERED_JOBS = 10_000


class Host:
    """Wraps a worker that other code starts, probes and stops."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        # The oldest is first.
        self._newest: dict[JobId, int] = {}

    @property
    def handlers(self) -> Mapping[str, Handler]:
        """The handlers by the names of their endpoints."""
        return {RUN: self._run, CANCEL: self._cancel, INFO: self._info, LIVE: self._live, CANARY: self._canary}

    async def run(self, task: Task) -> AsyncIterator[Event]:
        """Run a task like ``Worker.run``, once for each attempt. An older attempt that runs here is ended first.

        Raises NoWorker when nothing was started.
        """
        self._remember(task)
        while any(other.job_id == task.job_id for other in self._worker.tasks):
            log.warning("a newer attempt ends an older one", job_id=task.job_id, attempt=task.attempt)
            self._worker.leave(task.job_id)
            await self._worker.wait_for_change()
        if self._newest.get(task.job_id) != task.attempt:
            raise NoWorker(f"a newer attempt of {task.job_id} came to worker {self._worker.worker_id}")
        if not self._worker.is_ready:
            raise NoWorker(f"worker {self._worker.worker_id} takes no more")
        return self._worker.run(task)

    async def drain(self, timeout_s: float) -> None:
        """Admit nothing more, wait for the running tasks, and give back those that are unfinished when the time is up.

        Cancelling this gives them back at once.
        """
        self._worker.retire()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    while self._worker.tasks:
                        await self._worker.wait_for_change()
        finally:
            if self._worker.tasks:
                log.warning("videos are given back", count=len(self._worker.tasks))
            self._worker.give_back(Drained())

    def _remember(self, task: Task) -> None:
        newest = self._newest.pop(task.job_id, 0)
        self._newest[task.job_id] = max(newest, task.attempt)
        if len(self._newest) > _REMEMBERED_JOBS:
            del self._newest[next(iter(self._newest))]
        if task.attempt <= newest:
            raise NoWorker(f"attempt {task.attempt} of {task.job_id} came to worker {self._worker.worker_id} before")

    async def _run(self, payload: Payload) -> AsyncGenerator[Payload, None]:
        events = await self.run(Task.model_validate(payload["task"]))
        async with contextlib.aclosing(events):  # type: ignore[type-var]  # Worker.run gives an async generator
            async for event in events:
                yield {"event": event.model_dump(mode="json")}

    async def _cancel(self, payload: Payload) -> AsyncGenerator[Payload, None]:
        await self._worker.cancel(JobId(payload["job_id"]), payload["attempt"])
        yield {}

    async def _live(self, payload: Payload) -> AsyncGenerator[Payload, None]:
        """Send the video. Its last item says that it is whole: a stream may also end because the worker leaves."""
        video = self._worker.live(JobId(payload["job_id"]), payload["attempt"])
        async with contextlib.aclosing(video):
            async for data in video:
                yield {"data": data}
        yield {"is_whole": True}

    async def _info(self, _payload: Payload) -> AsyncGenerator[Payload, None]:
        told: Payload = {}
        while True:
            told = self._figures()
            yield told
            await asyncio.sleep(_SHORTEST_S)
            while self._figures() == told:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_PROGRESS_S):
                        await self._worker.wait_for_change()

    def _figures(self) -> Payload:
        worker = self._worker
        return {
            "worker_id": worker.worker_id,
            "capabilities": worker.capabilities.model_dump(mode="json"),
            "free_slots": worker.free_slots,
            "max_active": worker.max_active,
            "is_ready": worker.is_ready,
            "predicted_work": worker.predicted_work,
            "has_suspect": worker.has_suspect,
            # The tasks that these figures include, so that a frontend knows whether they include its own.
            "running": [[task.job_id, task.attempt] for task in worker.tasks],
            "device": worker.device,
            "memory": None if worker.memory is None else worker.memory.model_dump(mode="json"),
            "num_parked": worker.num_parked,
            "num_resumed": worker.num_resumed,
            "loras_in_memory": list(worker.loras_in_memory),
            "costs": worker.costs,
            "version": __version__,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }

    async def _canary(self, _payload: Payload) -> AsyncGenerator[Payload, None]:
        """Answer from what is known of the device. A video of its own would wait behind the running ones."""
        if self._worker.is_lost:
            raise WorkerLost("the device of this worker does nothing more")
        yield {}
