"""The queue as clients see it, looked at twice a second however many ask, and when a job came since the last look."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kinema.cluster.base import Cluster
from kinema.ids import JobId
from kinema.job import Job
from kinema.jobs.store import PRIORITIES, ActiveJob, Arrivals, JobStore, QueueLimits
from kinema.request.request import GenerationRequest
from kinema.service.outlook import ARRIVALS_S, Capacity, Outlook, outlooks, remaining
from kinema.settings import JobSettings
from kinema.worker.costs import Curve
from kinema.worker.scheduler import OLDEST_SHARE, WEIGHTS

_FRESH_S = 0.5
# With more, one that came since the last look has to wait for the next: to play a queue through takes its time.
_PLAYED_AT_ONCE = 64
# The SDKs do not try again after a longer wait.
_MAX_RETRY_AFTER_S = 120
_DEFAULT_RETRY_AFTER_S = 5


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds that a device would work for a video, and those to its end if it was asked for now; None as long as no
    video of the model was timed."""

    device_s: float | None
    eta_s: float | None


class Pace:
    """How long the videos of one model take, from those that were made last."""

    def __init__(self, times: Sequence[tuple[float, float]]) -> None:
        self.per_work = sum(seconds for _, seconds in times) / sum(work for work, _ in times)
        # Work tells shapes apart, so a shape that was made before takes as long as it did then.
        self._curve = Curve((0.0, 1.0))
        for work, seconds in times:
            self._curve.observe((1.0, work), seconds)

    @classmethod
    def of(cls, times: Sequence[tuple[float, float]]) -> Pace | None:
        return cls(times) if times else None

    def seconds(self, work: float) -> float:
        return self._curve.seconds((1.0, work))


class QueueView:
    """Reads the store, and knows of the cluster only how many workers and slots each model has."""

    def __init__(self, store: JobStore, cluster: Cluster) -> None:
        self._store = store
        self._cluster = cluster
        self._lock = asyncio.Lock()
        self._read_at = float("-inf")
        self._active: Sequence[ActiveJob] = ()
        self._paces: dict[str, Pace | None] = {}
        self._arrivals: dict[str, Arrivals] = {}
        self._outlooks: dict[JobId, Outlook] = {}
        self._next_slot_s: dict[str, int] = {}

    async def outlook(self, job: Job) -> Outlook:
        """Of a job that has not ended. Raises StoreUnavailable."""
        known = (await self.outlooks()).get(job.id)
        if known is None and len(self._active) < _PLAYED_AT_ONCE:  # it came since the last look
            known = (await self._with(job)).get(job.id)
        return known or Outlook(None, None)

    async def estimate(self, request: GenerationRequest) -> Estimate:
        """Of a video that might be asked for now. Raises StoreUnavailable."""
        await self.outlooks()
        eta_s = (await self._if_it_came(request)).eta_s
        pace = await self._pace(request.model)
        return Estimate(None if pace is None else round(pace.seconds(request.work), 2), eta_s)

    async def outlooks(self) -> Mapping[JobId, Outlook]:
        """Of every job that has not ended. Raises StoreUnavailable."""
        async with self._lock:
            if time.monotonic() - self._read_at > _FRESH_S:
                await self._read()
        return self._outlooks

    async def _with(self, job: Job) -> Mapping[JobId, Outlook]:
        """Looked at again, unless somebody did so since the job came: what came just before it is counted as well."""
        async with self._lock:
            if job.id not in self._outlooks:
                self._active = await self._store.active()
                for model in {one.model for one in self._active}:
                    self._paces[model] = await self._pace(model)
                    self._arrivals[model] = await self._came(model)
                self._play()
        return self._outlooks

    async def limits(self, model: str, settings: JobSettings) -> QueueLimits:
        """The settings' limits, seconds turned into work; those in seconds hold once a video of the model was timed."""
        await self.outlooks()
        rate = None
        if (settings.max_queued_s, settings.max_queued_s_per_key) != (None, None):
            pace = await self._pace(model)
            rate = None if pace is None else pace.per_work
        return QueueLimits(
            max_queued=settings.max_queued,
            max_queued_per_key=settings.max_queued_per_key,
            max_work=_work(settings.max_queued_s, rate),
            max_work_per_key=_work(settings.max_queued_s_per_key, rate),
            retry_after_s=self._next_slot_s.get(model, _DEFAULT_RETRY_AFTER_S),
        )

    async def _pace(self, model: str) -> Pace | None:
        """None before the first video of the model was timed."""
        if (pace := self._paces.get(model)) is not None:
            return pace
        return Pace.of(await self._store.recent_times(model))

    async def _came(self, model: str) -> Arrivals:
        """Lately; nothing is remembered of a model while nothing of it is made."""
        if (arrivals := self._arrivals.get(model)) is not None:
            return arrivals
        return await self._store.recent_arrivals(model, ARRIVALS_S)

    async def _if_it_came(self, request: GenerationRequest) -> Outlook:
        """The outlook of one that might come now."""
        job = ActiveJob(
            id=JobId(""),
            model=request.model,
            key_id="",
            work=request.work,
            progress=0,
            is_waiting=True,
            priority=request.priority,
            step_work=request.step_work,
            decoding_work=request.decoding_work,
        )
        queue = sorted([*self._active, job], key=lambda one: PRIORITIES.index(one.priority))
        mine = [one for one in queue if one.model == request.model]
        pace = await self._pace(request.model)
        capacities = self._capacities({request.model: pace}, {request.model: await self._came(request.model)})
        return _outlooks(mine, {request.model: pace}, capacities)[job.id]

    async def _read(self) -> None:
        self._active = await self._store.active()
        models = {job.model for job in self._active}
        self._paces = {model: Pace.of(await self._store.recent_times(model)) for model in models}
        self._arrivals = {model: await self._store.recent_arrivals(model, ARRIVALS_S) for model in models}
        self._play()
        self._read_at = time.monotonic()

    def _play(self) -> None:
        self._outlooks = _outlooks(self._active, self._paces, self._capacities(self._paces, self._arrivals))
        self._next_slot_s = _next_slots_s(self._active, self._paces)

    def _capacities(self, paces: Mapping[str, Pace | None], arrivals: Mapping[str, Arrivals]) -> dict[str, Capacity]:
        """By model. Slots that are taken are those of the jobs that run."""
        workers = Counter(worker.capabilities.model for worker in self._cluster.workers())
        slots = Counter(job.model for job in self._active if not job.is_waiting)
        for worker in self._cluster.workers():
            slots[worker.capabilities.model] += worker.free_slots
        return {
            model: Capacity(
                workers[model],
                slots[model],
                OLDEST_SHARE,
                WEIGHTS,
                _timed(arrivals.get(model), paces.get(model)),
            )
            for model in slots | workers
        }


def _timed(arrivals: Arrivals | None, pace: Pace | None) -> Arrivals | None:
    """In seconds of a device; None before a video was timed."""
    if arrivals is None or pace is None:
        return None
    return Arrivals([pace.seconds(work) for work in arrivals.work], arrivals.within_s)


def _outlooks(
    active: Sequence[ActiveJob], paces: Mapping[str, Pace | None], capacities: Mapping[str, Capacity]
) -> dict[JobId, Outlook]:
    """In seconds, since a fixed cost of each video makes short ones dearer than their work."""
    timed = [job.taking(pace.seconds(job.work)) if (pace := paces[job.model]) else job for job in active]
    return outlooks(timed, {model: 1.0 if pace else None for model, pace in paces.items()}, capacities)


def _next_slots_s(active: Sequence[ActiveJob], paces: Mapping[str, Pace | None]) -> dict[str, int]:
    """By model, the seconds to the end of the running job that is nearest to it: that lets one in from the queue."""
    found: dict[str, int] = {}
    for job in active:
        pace = paces.get(job.model)
        if not job.is_waiting and pace is not None:
            left_s = pace.seconds(job.work) * remaining(job) / job.work
            seconds = min(max(round(left_s), 1), _MAX_RETRY_AFTER_S)
            found[job.model] = min(found.get(job.model, seconds), seconds)
    return found


def _work(seconds: float | None, rate: float | None) -> float | None:
    return None if seconds is None or not rate else seconds / rate
