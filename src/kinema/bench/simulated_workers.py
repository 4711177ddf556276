"""Workers without a device, and the network between them and frontends. A step of a video is a sleep.

They speak as ``cluster/host.py`` does, so ``cluster/remote.py`` reaches them like real ones. The network delivers after
a fixed time. A frontend that is cut off hears and says nothing more.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from kinema.cluster.transport import CANCEL, INFO, RUN, Payload, Unreachable
from kinema.engines.fake import FakeEngine
from kinema.errors import NoWorker, WorkerLost
from kinema.events import Artifact, Cancelled, Completed, Event, Progress, Started, Terminal, Timings
from kinema.ids import JobId
from kinema.job import Task
from kinema.request.request import GenerationRequest

# One way, within a data centre and with the runtime's own work.
_LATENCY_S = 0.002
# A worker tells of a change at once, but not more often than this: as ``cluster/host.py``.
_SHORTEST_S = 0.05


@dataclass(frozen=True, slots=True)
class Execution:
    """A time in which a worker made a job's video; ``is_whole`` says that it came to its end."""

    worker_id: str
    began_at: float
    ended_at: float
    is_whole: bool


@dataclass
class Ledger:
    """What the workers have done, in seconds on the loop's clock."""

    executions: defaultdict[JobId, list[Execution]] = field(default_factory=lambda: defaultdict(list))
    begun: set[JobId] = field(default_factory=set)
    made: set[JobId] = field(default_factory=set)
    # When a slot came or became free, when one was lost, and when one was taken; and whether its job had none before.
    freed_at: list[float] = field(default_factory=list)
    lost_at: list[float] = field(default_factory=list)
    taken_at: list[tuple[float, bool]] = field(default_factory=list)
    num_refused: int = 0


class SimulatedWorker:
    """A worker with so many slots, whose videos take turns of equal length on one device."""

    def __init__(
        self, worker_id: str, model: str, slots: int, turns: int, seconds_of: Callable[[GenerationRequest], float],
        ledger: Ledger,
    ) -> None:  # fmt: skip
        self.worker_id = worker_id
        self._capabilities = FakeEngine(model).capabilities.model_dump(mode="json")
        self._slots = slots
        self._turns = turns
        self._seconds_of = seconds_of
        self._ledger = ledger
        self._device = asyncio.Lock()
        self._making: dict[tuple[JobId, int], asyncio.Task[None]] = {}
        self._tasks: dict[tuple[JobId, int], Task] = {}
        self._cancelled: set[tuple[JobId, int]] = set()
        self._changed = asyncio.Event()
        self._figures = self._count()

    def begin(self) -> None:
        """Note the free slots of a worker that has come."""
        self._ledger.freed_at += [asyncio.get_running_loop().time()] * self._slots

    async def lose(self) -> None:
        """End all that runs here, as when the process dies."""
        self._ledger.lost_at += [asyncio.get_running_loop().time()] * self._slots
        making = list(self._making.values())
        for one in making:
            one.cancel()
        await asyncio.gather(*making, return_exceptions=True)

    async def info(self) -> AsyncGenerator[Payload, None]:
        """The figures of the worker, now and when they have changed."""
        while True:
            changed = self._changed
            yield self._figures
            await asyncio.sleep(_SHORTEST_S)
            await changed.wait()

    async def run(self, task: Task) -> AsyncGenerator[Event, None]:
        """Make the video. Closing the iterator ends that. Raises NoWorker when all slots are taken."""
        if len(self._tasks) >= self._slots:
            self._ledger.num_refused += 1
            raise NoWorker(f"worker {self.worker_id} takes no more")
        said: asyncio.Queue[Event | WorkerLost] = asyncio.Queue()
        key = task.job_id, task.attempt
        self._tasks[key] = task
        self._ledger.taken_at.append((asyncio.get_running_loop().time(), task.job_id not in self._ledger.begun))
        self._ledger.begun.add(task.job_id)
        making = self._making[key] = asyncio.create_task(self._make(task, said))
        self._tell()
        try:
            while True:
                event = await said.get()
                if isinstance(event, WorkerLost):
                    raise event
                yield event
                if isinstance(event, Terminal):
                    return
        finally:
            making.cancel()

    async def _make(self, task: Task, said: asyncio.Queue[Event | WorkerLost]) -> None:
        loop, key = asyncio.get_running_loop(), (task.job_id, task.attempt)
        began_at, is_whole = loop.time(), False
        turn_s = self._seconds_of(task.request) / self._turns
        said.put_nowait(Started(worker_id=self.worker_id, attempt=task.attempt))
        try:
            for turn in range(1, self._turns + 1):
                async with self._device:
                    await asyncio.sleep(turn_s)
                said.put_nowait(Progress(stage="denoise", step=turn, total=self._turns))
            is_whole = True
            self._ledger.made.add(task.job_id)
        finally:
            execution = Execution(self.worker_id, began_at, loop.time(), is_whole)
            self._ledger.executions[task.job_id].append(execution)
            self._ledger.freed_at.append(loop.time())
            del self._tasks[key], self._making[key]
            made = _completed(task, self._seconds_of(task.request)) if is_whole else None
            said.put_nowait(made or (Cancelled() if key in self._cancelled else WorkerLost()))
            self._cancelled.discard(key)
            self._tell()

    def cancel(self, job_id: JobId, attempt: int) -> None:
        """Stop this attempt, if it runs here."""
        if (making := self._making.get((job_id, attempt))) is not None:
            self._cancelled.add((job_id, attempt))
            making.cancel()

    def _tell(self) -> None:
        self._figures = self._count()
        self._changed.set()
        self._changed = asyncio.Event()

    def _count(self) -> Payload:
        return {
            "worker_id": self.worker_id,
            "capabilities": self._capabilities,
            "free_slots": self._slots - len(self._tasks),
            "is_ready": True,
            "predicted_work": sum(task.request.work for task in self._tasks.values()),
            "has_suspect": any(task.losses for task in self._tasks.values()),
            "running": list(self._tasks),
            "device": "simulated",
            "version": "",
        }


class Network:
    """The workers by their instances, which discovery shows to all frontends."""

    def __init__(self) -> None:
        self.workers: dict[int, SimulatedWorker] = {}
        self._numbers = itertools.count(1)
        self.has_changed = asyncio.Event()

    def join(self, worker: SimulatedWorker) -> int:
        """Show the worker, and return its instance."""
        instance = next(self._numbers)
        self.workers[instance] = worker
        worker.begin()
        self._tell()
        return instance

    async def lose(self, instance: int) -> SimulatedWorker:
        """Let this worker die."""
        worker = self.workers.pop(instance)
        await worker.lose()
        self._tell()
        return worker

    def _tell(self) -> None:
        self.has_changed.set()
        self.has_changed = asyncio.Event()


class NetworkConnection:
    """A ``Connection`` of one frontend."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._running: dict[tuple[JobId, int], SimulatedWorker] = {}
        self._is_cut_off = False

    def cut_off(self) -> None:
        """The frontend has died: workers end what they do for it, and it hears nothing more."""
        self._is_cut_off = True
        for (job_id, attempt), worker in self._running.items():
            worker.cancel(job_id, attempt)

    def instances(self) -> frozenset[int]:
        return frozenset(self._network.workers)

    async def wait_for_change(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._network.has_changed.wait()

    async def call(
        self, instance: int, endpoint: str, payload: Payload, *, silence_s: float | None = None  # noqa: ARG002
    ) -> AsyncGenerator[Payload, None]:  # fmt: skip
        worker = self._network.workers.get(instance)
        if worker is None:
            raise Unreachable
        await self._travel()
        if endpoint == INFO:
            async with contextlib.aclosing(worker.info()) as told:
                async for figures in told:
                    await self._travel()
                    if instance not in self._network.workers:
                        raise WorkerLost
                    yield figures
        elif endpoint == RUN:
            async for event in self._run(worker, Task.model_validate(payload["task"])):
                yield {"event": event.model_dump(mode="json")}
        elif endpoint == CANCEL:
            worker.cancel(JobId(payload["job_id"]), payload["attempt"])

    async def _run(self, worker: SimulatedWorker, task: Task) -> AsyncGenerator[Event, None]:
        key = task.job_id, task.attempt
        self._running[key] = worker
        try:
            async with contextlib.aclosing(worker.run(task)) as events:
                async for event in events:
                    await self._travel()
                    yield event
        except WorkerLost:
            await self._travel()
            raise
        finally:
            del self._running[key]

    async def _travel(self) -> None:
        if self._is_cut_off:
            await asyncio.Event().wait()
        await asyncio.sleep(_LATENCY_S)

    async def close(self) -> None:
        """There is nothing to close."""


def _completed(task: Task, seconds: float) -> Completed:
    video = Artifact(key=f"{task.job_id}/{task.attempt}/video.mp4", media_type="video/mp4", size_bytes=1, etag="0")
    timings = Timings(
        denoise_s=seconds, first_step_s=0.0, decode_s=0.0, delivery_s=0.0, total_s=seconds, device_s=seconds
    )
    return Completed(artifact=video, timings=timings)
