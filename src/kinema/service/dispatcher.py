"""The way of a job from the queue to a worker, and of the worker's events to the store.

One loop: while a ready worker has a free slot and a job of its model waits, claim the job and run it there. The
dispatcher holds a lease on each job that it runs and renews it; when this process dies, the lease runs out and the job
is claimed again. It knows workers through ``Cluster`` only, and nobody else writes the events of a running job.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence, Set
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import structlog

from kinema.cluster.base import Cluster, WorkerInfo
from kinema.errors import (
    Drained,
    EngineFailed,
    KinemaError,
    NoWorker,
    StoreUnavailable,
    WaitedTooLong,
    WorkerLost,
)
from kinema.events import Cancelled, Failed, Terminal
from kinema.job import Job, Task
from kinema.jobs.recorder import Recorder
from kinema.jobs.store import JobStore
from kinema.request.capabilities import LoraInfo
from kinema.settings import JobSettings

log = structlog.get_logger(__name__)

# A change in this process is noticed at once; a change by another process after this time at the latest.
_POLL_S = 1.0
# The time between two attempts to reach a job database that is unavailable.
_RETRY_S = 1.0
# Between two writes of a run's events, for each run of this dispatcher: so all runs together write 20 times a second.
_RECORD_S = 0.05
# The time before a job is tried again: the longest after a loss of its worker, and the time after a worker refused it.
_MAX_RETRY_S = 60.0
_REFUSED_S = 0.1
# The longest time between two searches for jobs that have waited for too long, and how many end in a transaction.
_EXPIRE_S = 30.0
_EXPIRED_AT_ONCE = 100
# A server that dies, or is cut off from the database, says little of the jobs that it ran, unless it had their workers
# in it. But a job must not end servers for ever: it fails after so many of them for each worker that it may lose.
_MAX_TAKEOVERS = 10
# How long a stop waits for the ends of jobs to be written; after that their leases run out and they run again.
_STOP_S = 5.0


@dataclass(eq=False, slots=True)
class _Run:
    """A job that runs on a worker. It is unwanted when it has to stop, and over when only its end is to be written."""

    job: Job
    worker_id: str
    is_unwanted: bool = False
    is_over: bool = False


@dataclass(frozen=True, slots=True)
class _Place:
    """A free slot for a job of this model. A job that lost a worker gets it only when it ``takes_suspects``."""

    model: str
    takes_suspects: bool


@dataclass(frozen=True, slots=True)
class _BackToQueue:
    """The end of an attempt whose job goes back to the queue; ``is_lost``: because its worker was lost."""

    is_lost: bool


class Dispatcher:
    """Runs jobs from ``start`` to ``stop``. Several dispatchers may share one store; each has its own leases."""

    def __init__(self, store: JobStore, cluster: Cluster, settings: JobSettings) -> None:
        self._store = store
        self._cluster = cluster
        self._settings = settings
        self._owner = f"dispatcher_{secrets.token_hex(8)}"
        self._runs: dict[asyncio.Task[None], _Run] = {}
        # Those that the cluster does not count among its worker's tasks yet.
        self._pending: set[_Run] = set()
        self._endings: set[asyncio.Task[None]] = set()
        self._loops: list[asyncio.Task[None]] = []
        self._wake = asyncio.Event()
        # The store may have a cancel that was not seen yet.
        self._may_have_cancels = True
        self._claiming: asyncio.Task[Job | None] | None = None
        # A claim failed, but it may have been made: its answer alone may be lost.
        self._may_hold_more = False
        # Places for which no job waited at the last attempt to claim one; the store says when that may have changed.
        self._without_work: frozenset[_Place] = frozenset()

    async def start(self) -> None:
        self._loops = [asyncio.create_task(self._dispatch_loop()), asyncio.create_task(self._renew_loop())]
        if (max_wait_s := self._settings.max_wait_s) is not None:
            self._loops.append(asyncio.create_task(self._expire_loop(max_wait_s)))

    async def stop(self) -> None:
        """Stop the running jobs without ending them: they go back to the queue, for the next dispatcher."""
        await _cancel_all(self._loops)
        await _cancel_all(list(self._runs))
        if self._endings:
            await asyncio.wait(self._endings, timeout=_STOP_S)
            await _cancel_all(list(self._endings))
        if (
            self._claiming is not None
        ):  # else it could take a job after the release, which would rest until the lease ends
            await asyncio.gather(self._claiming, return_exceptions=True)
        try:
            await self._store.release(self._owner)
        except StoreUnavailable as exc:
            log.warning("jobs were not released; their leases run out", reason=exc.message)

    async def _dispatch_loop(self) -> None:
        waits: dict[str, asyncio.Task[Any]] = {}
        try:
            while True:
                self._wake.clear()
                self._rearm(waits)
                await self._turn()
                await asyncio.wait(waits.values(), return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _cancel_all(list(waits.values()))

    def _rearm(self, waits: dict[str, asyncio.Task[Any]]) -> None:
        """Wait for news from every source. A wait that is not over is kept, so that no news is missed in between."""
        if "store" not in waits or waits["store"].done():
            self._without_work = frozenset()
            self._may_have_cancels = True
        sources = {
            "store": lambda: self._store.wait_for_work(_POLL_S),
            "cluster": lambda: self._cluster.wait_for_change(_POLL_S),
            "runs": self._wake.wait,
        }
        for name, source in sources.items():
            if name not in waits or waits[name].done():
                waits[name] = asyncio.create_task(source())

    async def _turn(self) -> None:
        """Dispatch once. An error ends this round, never the loop."""
        try:
            await self._pass_on_cancels()
            while await self._dispatch_one():
                pass
        except StoreUnavailable as exc:
            log.warning("cannot reach the job database", reason=exc.message)
            await asyncio.sleep(_RETRY_S)
        except Exception:
            log.exception("dispatching failed")
            await asyncio.sleep(_RETRY_S)

    async def _pass_on_cancels(self) -> None:
        """Send cancels to the workers in every round, since a worker ignores a cancel that comes before its task."""
        runs = [run for run in self._runs.values() if not run.is_over]
        if runs and self._may_have_cancels:
            wanted = await self._store.wanted(self._owner)
            self._may_have_cancels = False
            for run in runs:
                run.is_unwanted = (run.job.id, run.job.attempt) not in wanted
        for run in runs:
            if run.is_unwanted:
                await self._cancel(run.job)

    async def _cancel(self, job: Job) -> None:
        """Cancel this attempt of the job. Another dispatcher may have a later one, which goes on."""
        await self._cluster.cancel(job.id, job.attempt)

    async def _dispatch_one(self) -> bool:
        """Claim a job and start it; False when no worker is free or no job waits."""
        places = self._places() - self._without_work
        if not places:
            return False
        only_loras = await self._placeable({place.model for place in places})
        job = await self._claim(places, only_loras)
        if job is None and only_loras:  # a worker that has other LoRAs may change that
            return False
        if job is None:
            self._without_work |= places | {replace(place, takes_suspects=False) for place in places}
            return False
        worker = self._pick(job)
        if worker is None:  # it left while the job was claimed
            self._may_hold_more = True  # until the database has heard of it
            await self._store.give_back(self._owner, job.id, is_lost=False, wait_s=_REFUSED_S, attempt=job.attempt)
            self._may_hold_more = False
            return False
        run = _Run(job, worker.worker_id)
        task = asyncio.create_task(self._run(run), name=f"run {job.id}")
        self._runs[task] = run
        self._pending.add(run)
        task.add_done_callback(self._forget)
        return True

    async def _claim(self, places: frozenset[_Place], only_loras: Mapping[str, Collection[str]]) -> Job | None:
        """Claim a job for one of these places. A claim is never left in between: a stop waits for its answer."""
        await self._release_unknown()
        for_all = sorted(place.model for place in places if place.takes_suspects)
        for_sound = sorted(place.model for place in places if not place.takes_suspects)
        self._may_hold_more = True
        self._claiming = asyncio.create_task(
            self._store.claim(
                for_all,
                self._owner,
                self._settings.lease_s,
                without_losses=for_sound,
                only_loras=only_loras,
                owners_have_workers=self._cluster.is_local,
            )
        )
        job = await asyncio.shield(self._claiming)
        self._may_hold_more = False
        return job

    async def _release_unknown(self) -> None:
        """Give back what a claim has taken whose answer was lost. Else its lease would be renewed for ever."""
        if self._may_hold_more:
            await self._store.release(self._owner, keeping=[run.job.id for run in self._runs.values()])
            self._may_hold_more = False

    def _forget(self, task: asyncio.Task[None]) -> None:
        run = self._runs.pop(task)
        self._pending.discard(run)
        if not task.cancelled() and (exc := task.exception()) is not None:
            log.error("a run did not end as it should", job_id=run.job.id, exc_info=exc)
            self._write_surely(lambda: self._give_back(run.job, is_lost=True))
        self._wake.set()

    def _places(self) -> frozenset[_Place]:
        """The places of all models that have a free worker."""
        workers = self._cluster.workers()
        # Of a thousand workers most are alike: what the first free ones take is enough to know.
        takes_suspects: dict[int, bool] = {}
        for worker in workers:
            alike = id(worker.capabilities)
            if not takes_suspects.get(alike) and self._is_free(worker):
                takes_suspects[alike] = not self._has_suspect(worker)
        names = _names_by_capabilities(workers)
        for_suspects = {name for alike, takes in takes_suspects.items() if takes for name in names[alike]}
        free = {name for alike in takes_suspects for name in names[alike]}
        return frozenset(_Place(name, name in for_suspects) for name in free)

    async def _placeable(self, models: Collection[str]) -> dict[str, list[str]]:
        """Of each of these models whose workers have different LoRAs: what waiting jobs need, as the store has it, and
        a free worker has. What comes meanwhile waits for the next turn."""
        workers = self._cluster.workers()
        names = _names_by_capabilities(workers)
        listed: dict[str, list[Sequence[LoraInfo]]] = {model: [] for model in models}
        for alike, can in {id(worker.capabilities): worker.capabilities for worker in workers}.items():
            for model in listed.keys() & names[alike]:
                listed[model].append(can.loras)
        found: dict[str, list[str]] = {
            model: [] for model, loras in listed.items() if any(one != loras[0] for one in loras)
        }
        if found:
            free = {worker.worker_id for worker in self._free_workers()}
            for model, needs in await self._store.waiting_loras(list(found)):
                if free & self._able(model, set(needs.split())):
                    found[model].append(needs)
        return found

    def _able(self, model: str, digests: Set[str]) -> Set[str]:
        """The workers of the model, free or not, that have these LoRAs. When none has, all: each looks again for a LoRA
        before it refuses it."""
        workers = self._cluster.workers()
        names = _names_by_capabilities(workers)
        takers = [worker for worker in workers if model in names[id(worker.capabilities)]]
        having = [worker for worker in takers if digests <= {info.digest for info in worker.capabilities.loras}]
        return {worker.worker_id for worker in having or takers}

    def _has_suspect(self, worker: WorkerInfo) -> bool:
        return worker.has_suspect or any(job.losses for job in self._pending_on(worker))

    def _free_workers(self) -> Sequence[WorkerInfo]:
        return [worker for worker in self._cluster.workers() if self._is_free(worker)]

    def _is_free(self, worker: WorkerInfo) -> bool:
        return worker.is_ready and worker.free_slots > 0 and self._slots(worker) > 0

    def _slots(self, worker: WorkerInfo) -> int:
        return worker.free_slots - len(self._pending_on(worker))

    def _work(self, worker: WorkerInfo) -> float:
        return worker.predicted_work + sum(job.request.work for job in self._pending_on(worker))

    def _pending_on(self, worker: WorkerInfo) -> Sequence[Job]:
        """The jobs that were sent to the worker and that the cluster does not count yet."""
        return [run.job for run in self._pending if run.worker_id == worker.worker_id]

    def _pick(self, job: Job) -> WorkerInfo | None:
        """The worker on which the job ends soonest: that with the least work; of equals that with most free slots; of
        these, that which has most of the job's LoRAs in memory. A worker without the LoRAs does not get it.

        A job that lost a worker may have killed it. No two such jobs run on one worker, or an innocent one would be
        lost together with the one that kills workers, again and again.
        """
        workers = self._cluster.workers()
        names = _names_by_capabilities(workers)
        free = [one for one in workers if self._is_free(one) and job.request.model in names[id(one.capabilities)]]
        loras = {use.digest for use in job.request.loras}
        if loras:
            able = self._able(job.request.model, loras)
            free = [worker for worker in free if worker.worker_id in able]
        if job.losses:
            free = [worker for worker in free if not self._has_suspect(worker)]

        def order(worker: WorkerInfo) -> tuple[float, int, int]:
            return self._work(worker), -self._slots(worker), -len(loras.intersection(worker.loras_in_memory))

        return min(free, key=order, default=None)

    async def _run(self, run: _Run) -> None:
        """Bring one attempt to its end: a terminal event, or the job back in the queue."""
        job = run.job
        recorder = Recorder(self._store, job, lambda: self._cancel(job), lambda: _RECORD_S * len(self._runs))
        try:
            ending = await self._attempt(run, recorder)
            run.is_over = True
        except asyncio.CancelledError:  # a stop, which waits for this
            self._write_surely(recorder.finish)
            raise
        await asyncio.shield(self._write_surely(lambda: self._end(job, recorder, ending)))

    async def _attempt(self, run: _Run, recorder: Recorder) -> Terminal | _BackToQueue | None:
        """Run the attempt and return its end; None when another dispatcher has the job now."""
        job = run.job
        try:
            return self._ending_before_start(job) or await self._follow(run, recorder)
        except (NoWorker, Drained) as exc:  # nothing was wrong with the job or its worker
            log.info("a job goes back to the queue", job_id=job.id, attempt=job.attempt, reason=exc.message)
            return _BackToQueue(is_lost=False)
        except KinemaError as exc:
            is_lost = exc.is_retryable
            return self._ending_after_loss(job, exc) if is_lost else Failed(code=exc.code, message=exc.message)
        except Exception:
            log.exception("a generation failed unexpectedly", job_id=job.id, attempt=job.attempt)
            return Failed(code=EngineFailed.code, message=EngineFailed().message)

    def _ending_before_start(self, job: Job) -> Terminal | None:
        """The end of a job that must not start: it was cancelled, or has lost too many workers."""
        if job.is_cancel_requested:
            return Cancelled()
        if job.losses >= self._settings.max_attempts:
            return _lost_too_often(job.losses)
        if job.takeovers >= _MAX_TAKEOVERS * self._settings.max_attempts:
            message = f"the server stopped before the video was finished, {job.takeovers} times"
            return Failed(code=WorkerLost.code, message=message)
        return None

    async def _follow(self, run: _Run, recorder: Recorder) -> Terminal | None:
        """Run the task, record its events, and return the terminal event, which is not recorded yet.

        None when the job has ended in the store, or another dispatcher has it now. Raises what the cluster raises.
        """
        job = run.job
        task = Task(
            job_id=job.id,
            attempt=job.attempt,
            request=job.request,
            tenant=job.key_id,
            deadline_at=job.deadline_at,
            losses=job.losses,
        )
        try:
            stream = self._cluster.run(run.worker_id, task)
            self._pending.discard(run)
            self._wake.set()
            async with aclosing(stream) as events:  # type: ignore[type-var]  # every cluster's is an async generator
                async for event in events:
                    if recorder.is_refused:
                        log.warning("the job was taken over or ended elsewhere", job_id=job.id, attempt=job.attempt)
                        return None
                    if isinstance(event, Terminal):
                        return event
                    recorder.add(event)
        except BaseException:  # nobody reads the events any more, so the task must not go on
            await self._cancel(job)
            raise
        raise WorkerLost("the worker's events ended early")

    def _ending_after_loss(self, job: Job, exc: KinemaError) -> Terminal | _BackToQueue:
        log.warning("an attempt was lost", job_id=job.id, attempt=job.attempt, reason=exc.message)
        losses = job.losses + 1
        if losses >= self._settings.max_attempts:
            return _lost_too_often(losses)
        return _BackToQueue(is_lost=True)

    async def _end(self, job: Job, recorder: Recorder, ending: Terminal | _BackToQueue | None) -> None:
        """Write the end of this attempt, after all its other events. Raises StoreUnavailable."""
        if isinstance(ending, Cancelled) and (job.id, job.attempt) in await self._store.wanted(self._owner):
            ending = self._ending_after_loss(job, WorkerLost("the worker stopped it, though nobody had asked"))
        if isinstance(ending, Terminal):
            is_recorded = await recorder.finish(ending)
            said = "job ended" if is_recorded else "an end came too late, the job had ended"
            log.info(said, job_id=job.id, attempt=job.attempt, ending=ending.type, model=job.request.model)
            return
        await recorder.finish()
        if ending is not None:
            await self._give_back(job, is_lost=ending.is_lost)

    async def _give_back(self, job: Job, *, is_lost: bool) -> None:
        """Put the job back into the queue. It waits longer after every loss: a broken part has time to recover, and a
        job that breaks workers does not keep them busy."""
        wait_s = min(self._settings.retry_s * 2**job.losses, _MAX_RETRY_S) if is_lost else _REFUSED_S
        await self._store.give_back(self._owner, job.id, is_lost=is_lost, wait_s=wait_s, attempt=job.attempt)

    def _write_surely(self, write: Callable[[], Awaitable[object]]) -> asyncio.Task[None]:
        """Write in a task that outlives the caller, and repeat it until the store has taken it."""

        async def until_done() -> None:
            while True:
                try:
                    await write()
                    return
                except StoreUnavailable as exc:
                    log.warning("the end of a job was not written yet", reason=exc.message)
                    await asyncio.sleep(_RETRY_S)

        task = asyncio.create_task(until_done())
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)
        return task

    async def _renew_loop(self) -> None:
        rest_s = self._settings.lease_s / 3
        while True:
            await asyncio.sleep(rest_s)
            try:
                await self._store.renew(self._owner, self._settings.lease_s)
                rest_s = self._settings.lease_s / 3
            except StoreUnavailable as exc:
                log.warning("leases were not renewed", reason=exc.message)
                rest_s = min(self._settings.lease_s / 3, _RETRY_S)

    async def _expire_loop(self, max_wait_s: float) -> None:
        """End jobs that have waited for too long, whichever server got them, and whether their model has workers."""
        failed = Failed(code=WaitedTooLong.code, message=WaitedTooLong.summary())
        while True:
            try:
                while ended := await self._store.fail_waiting(time.time() - max_wait_s, failed, _EXPIRED_AT_ONCE):
                    log.info("jobs have waited for too long", count=len(ended))
            except StoreUnavailable as exc:
                log.warning("jobs that have waited for too long were not ended", reason=exc.message)
            except Exception:
                log.exception("jobs that have waited for too long were not ended")
            await asyncio.sleep(min(_EXPIRE_S, max_wait_s / 10))


def _names_by_capabilities(workers: Sequence[WorkerInfo]) -> dict[int, Sequence[str]]:
    """The models whose jobs workers with these capabilities take, by the identity of the capabilities: their own model,
    and its aliases that no other worker has as its model."""
    kinds = {id(worker.capabilities): worker.capabilities for worker in workers}
    models = {can.model for can in kinds.values()}
    return {
        alike: (can.model, *(alias for alias in can.aliases if alias not in models)) for alike, can in kinds.items()
    }


def _lost_too_often(times: int) -> Failed:
    return Failed(code=WorkerLost.code, message=f"the worker stopped before the video was finished, {times} times")


async def _cancel_all(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
