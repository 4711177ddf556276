"""The queue as clients see it: read at most twice a second, however many clients ask, and whenever somebody asks for a
job that came since.

A long queue is played on a thread, and takes a thirtieth of a core at most: it is read less often then. A request to
come gets its place from what was predicted for the jobs that are there.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from heapq import nlargest
from statistics import median
from typing import Any

import structlog

from kinema.cluster.base import Cluster, WorkerInfo
from kinema.errors import JobNotFound, StoreUnavailable
from kinema.ids import JobId
from kinema.job import Job
from kinema.jobs.store import PRIORITIES, ActiveJob, Arrivals, JobStore, QueueLimits
from kinema.request.request import GenerationRequest
from kinema.service.outlook import ARRIVALS_S, Capacity, Outlook, outlooks, remaining
from kinema.service.places import Places
from kinema.settings import JobSettings
from kinema.worker.costs import CostModel, Curve
from kinema.worker.scheduler import OLDEST_SHARE, WEIGHTS

log = structlog.get_logger(__name__)

_FRESH_S = 0.5
# A queue is fresh for as many times the seconds that it took to read and play it. Meanwhile polls take longer: it is a
# thirtieth of them, so that 95 in 100 know nothing of it.
_FRESH_FACTOR = 30
# What was read of a longer queue is told for as long beyond that, while it is read again.
_STALE_S = 15.0
# In a longer queue a new job gets its outlook with the next reading only: to play a long queue takes time.
_PLAYED_AT_ONCE = 64
# So many workers of a model are asked for their costs: they are alike.
_ASKED_WORKERS = 3
_KEPT_COSTS = 100
# Requests that are read for their shape at each reading of the queue, and those that are kept.
_SHAPES_AT_ONCE = 20
_KEPT_SHAPES = 1000
# The OpenAI SDKs ignore a longer Retry-After.
_MAX_RETRY_AFTER_S = 120
_DEFAULT_RETRY_AFTER_S = 5


@dataclass(frozen=True, slots=True)
class TimeEstimate:
    """The time that a video would take: ``device_s`` seconds of a device, and ``eta_s`` seconds from now to its end.

    Both are None as long as no video of the model was timed.
    """

    device_s: float | None
    eta_s: float | None


class ModelSpeed:
    """How long the videos of one model take.

    The workers say what their turns take, so the seconds of a request are known when ``learn`` was told of it. Those of
    other videos are read off the latest ones, of which ``times`` has the work and the seconds.
    """

    def __init__(self, times: Sequence[tuple[float, float]], costs: Sequence[CostModel] = ()) -> None:
        self._costs = costs
        # By work: it tells shapes apart.
        self._learned: dict[float, float] = {}
        self.per_work = sum(seconds for _, seconds in times) / sum(work for work, _ in times)
        # A shape that was made before takes as long as it did then.
        self._curve = Curve((0.0, 1.0))
        for work, seconds in times:
            self._curve.observe((1.0, work), seconds)

    def learn(self, request: GenerationRequest) -> None:
        """Predict the request by what the workers say."""
        if self._costs and request.work not in self._learned:
            self._learned[request.work] = median(costs.remaining_s(request) for costs in self._costs)

    def seconds(self, work: float) -> float:
        if (learned := self._learned.get(work)) is not None:
            return learned
        return self._curve.seconds((1.0, work))


class QueueView:
    """Predicts when jobs end. It reads the store, and knows of the cluster only each model's workers and slots."""

    def __init__(self, store: JobStore, cluster: Cluster) -> None:
        self._store = store
        self._cluster = cluster
        self._lock = asyncio.Lock()
        self._read_at = float("-inf")
        self._reading: asyncio.Task[None] | None = None
        self._active: Sequence[ActiveJob] = ()
        self._speeds: dict[str, ModelSpeed | None] = {}
        self._arrivals: dict[str, Arrivals] = {}
        self._fresh_s = _FRESH_S
        # By worker: what it has said of its costs, and the model that was read from that.
        self._costs: dict[str, tuple[Mapping[str, Any], CostModel]] = {}
        # By model and work: a request of that shape.
        self._shapes: dict[tuple[str, float], GenerationRequest] = {}
        self._outlooks: Mapping[JobId, Outlook] = {}
        self._next_slot_s: Mapping[str, int] = {}
        self._places: Mapping[str, Places] = {}

    async def outlook(self, job: Job) -> Outlook:
        """The outlook of a job that has not ended. Raises StoreUnavailable."""
        known = (await self.outlooks()).get(job.id)
        if known is None and len(self._active) < _PLAYED_AT_ONCE:  # it came since the last look
            known = (await self._with(job)).get(job.id)
        return known or Outlook(None, None)

    async def estimate(self, request: GenerationRequest, key_id: str = "") -> TimeEstimate:
        """The time that a video would take if this key requested it now. Raises StoreUnavailable."""
        await self.outlooks()
        speed = await self._speed(request.model)
        if speed is not None:
            speed.learn(request)
        eta_s = (await self._if_it_came(request, key_id, speed)).eta_s
        return TimeEstimate(None if speed is None else round(speed.seconds(request.work), 2), eta_s)

    async def outlooks(self) -> Mapping[JobId, Outlook]:
        """The outlooks of all jobs that have not ended. Raises StoreUnavailable.

        Nobody waits until a long queue is read again: it hardly changes meanwhile.
        """
        age_s = time.monotonic() - self._read_at
        if len(self._active) >= _PLAYED_AT_ONCE and age_s < self._fresh_s + _STALE_S:
            if age_s > self._fresh_s and (self._reading is None or self._reading.done()):
                self._reading = asyncio.create_task(self._read_beside())
            return self._outlooks
        async with self._lock:
            if time.monotonic() - self._read_at > self._fresh_s:
                await self._read()
        return self._outlooks

    async def _read_beside(self) -> None:
        try:
            async with self._lock:
                await self._read()
        except (StoreUnavailable, RuntimeError) as exc:  # the other one: the store was closed
            log.debug("the queue was not read", reason=str(exc))

    async def _with(self, job: Job) -> Mapping[JobId, Outlook]:
        """Read the queue again, unless somebody has done so since this job came. The jobs just before it count, too."""
        async with self._lock:
            if job.id not in self._outlooks:
                self._active = await self._jobs()
                for model in {one.model for one in self._active}:
                    self._speeds[model] = await self._speed(model)
                    self._arrivals[model] = await self._came(model)
                await self._learn_shapes()
                await self._play()
        return self._outlooks

    async def retry_after_s(self, model: str) -> int:
        """Seconds until the next place of the model is free. Raises StoreUnavailable."""
        await self.outlooks()
        return self._next_slot_s.get(model, _DEFAULT_RETRY_AFTER_S)

    async def limits(self, model: str, settings: JobSettings) -> QueueLimits:
        """The limits of the settings, with seconds converted to work. Limits in seconds hold once a video of the model
        was timed; without such limits nothing is read."""
        rate = None
        if (settings.max_queued_s, settings.max_queued_s_per_key) != (None, None):
            await self.outlooks()
            speed = await self._speed(model)
            rate = None if speed is None else speed.per_work
        return QueueLimits(
            max_queued=settings.max_queued,
            max_queued_per_key=settings.max_queued_per_key,
            max_work=_work(settings.max_queued_s, rate),
            max_work_per_key=_work(settings.max_queued_s_per_key, rate),
        )

    async def _speed(self, model: str) -> ModelSpeed | None:
        """The speed of a model; None before its first video was timed."""
        if (speed := self._speeds.get(model)) is not None:
            return speed
        return await self._learn_speed(model)

    async def _learn_speed(self, model: str) -> ModelSpeed | None:
        """The speed by the latest videos of the model; where it has none, by those that were made under an alias."""
        names = [name for name, own in self._aliases().items() if own == model]
        for name in (model, *names):
            if times := await self._store.recent_times(name):
                return ModelSpeed(times, self._costs_of(model))
        return None

    def _costs_of(self, model: str) -> Sequence[CostModel]:
        """What the workers of the model have measured, of some of them."""
        found = []
        for worker in self._cluster.workers():
            if worker.capabilities.model == model and worker.costs is not None:
                costs = self._read_costs(worker, worker.costs)
                found += [costs] if costs.has_measured else []
            if len(found) == _ASKED_WORKERS:
                break
        return found

    def _read_costs(self, worker: WorkerInfo, told: Mapping[str, Any]) -> CostModel:
        if (known := self._costs.get(worker.worker_id)) is not None and known[0] == told:
            return known[1]
        try:
            can = worker.capabilities
            costs = CostModel.from_json(told, can.geometry, encodes_whole_film=can.encodes_whole_film)
        except (ValueError, TypeError, KeyError) as exc:  # a worker of another version
            log.warning("the costs of a worker cannot be read", worker_id=worker.worker_id, reason=str(exc))
            costs = CostModel()
        self._costs[worker.worker_id] = told, costs
        while len(self._costs) > _KEPT_COSTS:
            del self._costs[next(iter(self._costs))]
        return costs

    async def _learn_shapes(self) -> None:
        """Predict the waiting and running jobs by what the workers say: by a request of each shape."""
        shapes = {(job.model, job.work): job.id for job in self._active}
        unknown = [shape for shape in shapes if shape not in self._shapes]
        for shape in unknown[:_SHAPES_AT_ONCE]:
            with suppress(JobNotFound):  # deleted since
                self._shapes[shape] = (await self._store.get(shapes[shape])).request
        while len(self._shapes) > _KEPT_SHAPES:
            del self._shapes[next(iter(self._shapes))]
        for model, work in shapes:
            speed, request = self._speeds.get(model), self._shapes.get((model, work))
            if speed is not None and request is not None:
                speed.learn(request)

    async def _jobs(self) -> Sequence[ActiveJob]:
        """The jobs that have not ended, each under the model that makes it; it may wait under an alias of that."""
        aliases, found = self._aliases(), await self._store.active()
        return [replace(job, model=aliases[job.model]) if job.model in aliases else job for job in found]

    def _aliases(self) -> Mapping[str, str]:
        """The models by their aliases. One that is a model's own name is none."""
        all_can = [worker.capabilities for worker in self._cluster.workers()]
        own = {can.model for can in all_can}
        return {alias: can.model for can in all_can for alias in can.aliases if alias not in own}

    async def _came(self, model: str) -> Arrivals:
        """The latest arrivals of a model. They are remembered only while jobs of the model exist."""
        if (arrivals := self._arrivals.get(model)) is not None:
            return arrivals
        return await self._store.recent_arrivals(model, ARRIVALS_S)

    async def _if_it_came(self, request: GenerationRequest, key_id: str, speed: ModelSpeed | None) -> Outlook:
        """The outlook of a job with this request, if it came now."""
        if (places := self._places.get(request.model)) is not None and speed is not None:
            begin_s = places.begin_s(key_id, request.priority)
            return Outlook(None, round(begin_s + speed.seconds(request.work), 2))
        turns = (one.turn for one in self._active if (one.model, one.key_id) == (request.model, key_id))
        job = ActiveJob(
            id=JobId(""),
            model=request.model,
            key_id=key_id,
            work=request.work,
            progress=0,
            is_waiting=True,
            priority=request.priority,
            step_work=request.step_work,
            decoding_work=request.decoding_work,
            turn=next(turns, 0),
        )
        queue = sorted([*self._active, job], key=lambda one: PRIORITIES.index(one.priority))
        mine = [one for one in queue if one.model == request.model]
        capacities = self._capacities({request.model: speed}, {request.model: await self._came(request.model)})
        return _outlooks(mine, {request.model: speed}, capacities)[job.id]

    async def _read(self) -> None:
        began = time.monotonic()
        self._active = await self._jobs()
        models = {job.model for job in self._active}
        self._speeds = {model: await self._learn_speed(model) for model in models}
        self._arrivals = {model: await self._store.recent_arrivals(model, ARRIVALS_S) for model in models}
        await self._learn_shapes()
        await self._play()
        self._read_at = time.monotonic()
        self._fresh_s = max(_FRESH_S, _FRESH_FACTOR * (self._read_at - began))

    async def _play(self) -> None:
        """Predict for the jobs that were read: a long queue on a thread, since the loop must not wait for it."""
        line = self._active, dict(self._speeds), self._capacities(self._speeds, self._arrivals)
        is_short = len(self._active) < _PLAYED_AT_ONCE
        found = _predict(*line) if is_short else await asyncio.to_thread(_predict, *line)
        self._outlooks, self._next_slot_s, self._places = found.outlooks, found.next_slots_s, found.places

    def _capacities(
        self, speeds: Mapping[str, ModelSpeed | None], arrivals: Mapping[str, Arrivals]
    ) -> dict[str, Capacity]:
        """The capacity for each model. Running jobs count as slots, too."""
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
                _timed(arrivals.get(model), speeds.get(model)),
            )
            for model in slots | workers
        }


def _timed(arrivals: Arrivals | None, speed: ModelSpeed | None) -> Arrivals | None:
    """Convert arrivals from work to seconds of a device; None before a video was timed."""
    if arrivals is None or speed is None:
        return None
    return Arrivals([speed.seconds(work) for work in arrivals.work], arrivals.within_s)


@dataclass(frozen=True, slots=True)
class _Prediction:
    """What was predicted for a queue. A short one has no places."""

    outlooks: Mapping[JobId, Outlook]
    next_slots_s: Mapping[str, int]
    places: Mapping[str, Places]


def _predict(
    active: Sequence[ActiveJob], speeds: Mapping[str, ModelSpeed | None], capacities: Mapping[str, Capacity]
) -> _Prediction:
    found, next_slots_s = _outlooks(active, speeds, capacities), _next_slots_s(active, speeds)
    places = {} if len(active) < _PLAYED_AT_ONCE else _places(active, speeds, found, capacities)
    return _Prediction(found, next_slots_s, places)


def _places(
    active: Sequence[ActiveJob],
    speeds: Mapping[str, ModelSpeed | None],
    found: Mapping[JobId, Outlook],
    capacities: Mapping[str, Capacity],
) -> dict[str, Places]:
    """The places of each model that has been timed."""
    jobs: dict[str, list[ActiveJob]] = defaultdict(list)
    begins: dict[JobId, float] = {}
    ends: dict[str, list[float]] = defaultdict(list)
    for job in active:
        speed, eta_s = speeds[job.model], found[job.id].eta_s
        if speed is not None and eta_s is not None:
            jobs[job.model].append(job)
            begins[job.id] = max(eta_s - speed.seconds(job.work), 0.0)
            ends[job.model].append(eta_s)
    num_workers = {model: max(capacity.num_workers, 1) for model, capacity in capacities.items()}
    # A device is free for a job behind all others when as many others as there are devices are left.
    last = {model: nlargest(num_workers.get(model, 1), some)[-1] for model, some in ends.items()}
    return {model: Places(some, begins, last[model]) for model, some in jobs.items()}


def _outlooks(
    active: Sequence[ActiveJob], speeds: Mapping[str, ModelSpeed | None], capacities: Mapping[str, Capacity]
) -> dict[JobId, Outlook]:
    """Predict in seconds, not in work: each video has a fixed cost, so short ones take longer than their work says."""
    timed = [job.taking(speed.seconds(job.work)) if (speed := speeds[job.model]) else job for job in active]
    return outlooks(timed, {model: 1.0 if speed else None for model, speed in speeds.items()}, capacities)


def _next_slots_s(active: Sequence[ActiveJob], speeds: Mapping[str, ModelSpeed | None]) -> dict[str, int]:
    """For each model, the seconds until the first of its running jobs ends and one more job may begin."""
    found: dict[str, int] = {}
    for job in active:
        speed = speeds.get(job.model)
        if not job.is_waiting and speed is not None:
            left_s = speed.seconds(job.work) * remaining(job) / job.work
            seconds = min(max(round(left_s), 1), _MAX_RETRY_AFTER_S)
            found[job.model] = min(found.get(job.model, seconds), seconds)
    return found


def _work(seconds: float | None, rate: float | None) -> float | None:
    return None if seconds is None or not rate else seconds / rate
