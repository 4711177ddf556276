"""When each waiting job will be done: its place in the queue, and the seconds to its end.

Pure arithmetic over the jobs that have not ended: jobs get a slot by priority and age, and of those that have one the
shortest goes on, while the oldest keeps its share, as ``worker/scheduler.py`` has it, but for deadlines,
keys and decodes, which nothing overtakes. Those that are still to come are
thought to be like those that came lately: as long as there is a place for them, the shorter ones overtake.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kinema.job import JobId, share_of
from kinema.jobs.store import ActiveJob, Arrivals
from kinema.request import Priority

# The jobs of so many seconds tell what comes. Those of a stream that began later came in less; but what came in less
# than a minute may be a burst, and a few that came in less than some times what a job takes itself may be as well: they
# are spread over all of these seconds.
ARRIVALS_S = 900.0
_SHORTEST_STREAM_S = 60.0
_SHORTEST_STREAM = 4.0
_FEW = 50
# However much comes, a job is thought to have a tenth of the device in the end.
_MOST_OVERTAKEN = 0.9


@dataclass(frozen=True, slots=True)
class Outlook:
    """``queue_position`` counts from 1, None once it runs; ``eta_s`` is None as long as nothing was ever timed."""

    queue_position: int | None
    eta_s: float | None


@dataclass(frozen=True, slots=True)
class Capacity:
    """What makes the videos of a model. ``num_slots`` are those that are taken, too; of each device, the oldest job has
    ``oldest_share``, and the priorities divide what a job needs by ``weights``. ``arrivals`` are the latest, in the
    unit of the jobs' work."""

    num_workers: int = 1
    num_slots: int = 1
    oldest_share: float = 0.0
    weights: Mapping[Priority, float] | None = None
    arrivals: Arrivals | None = None

    def weighted(self, job: ActiveJob, work: float) -> float:
        return work / (self.weights or {}).get(job.priority, 1.0)

    def left_by_newcomers(self, weighted: float) -> float:
        """The part of a device that shorter jobs, which are still to come, leave to one of that much work until another
        ends; that they overtake it less and less as it goes on is a trifle beside what nobody knows."""
        if self.arrivals is None:
            return 1.0
        came, within_s = self.arrivals.work, self.arrivals.within_s
        if within_s < _SHORTEST_STREAM_S or (len(came) < _FEW and within_s < _SHORTEST_STREAM * weighted):
            within_s = ARRIVALS_S
        overtaking = sum(work for work in came if work < weighted) / within_s
        return 1.0 - min(overtaking / max(self.num_workers, 1), _MOST_OVERTAKEN)


@dataclass(slots=True)
class _Left:
    job: ActiveJob
    work: float


def outlooks(
    active: Sequence[ActiveJob], seconds_per_work: Mapping[str, float | None], capacities: Mapping[str, Capacity]
) -> dict[JobId, Outlook]:
    """The outlook of every job; ``active`` is in the order of the queue, the mappings go by model."""
    by_model: dict[str, list[ActiveJob]] = defaultdict(list)
    for job in active:
        by_model[job.model].append(job)
    found: dict[JobId, Outlook] = {}
    for model, jobs in by_model.items():
        rate, ends = seconds_per_work.get(model), work_until_end(jobs, capacities.get(model, Capacity()))
        positions = {job.id: place for place, job in enumerate((job for job in jobs if job.is_waiting), start=1)}
        for job in jobs:
            eta_s = None if rate is None else round(ends[job.id] * rate, 2)
            found[job.id] = Outlook(positions.get(job.id), eta_s)
    return found


def work_until_end(jobs: Sequence[ActiveJob], capacity: Capacity) -> dict[JobId, float]:
    """By job of one model, in the order of the queue: what one device computes until that job is done."""
    running = [_Left(job, remaining(job)) for job in jobs if not job.is_waiting]
    waiting = [_Left(job, job.work) for job in reversed(jobs) if job.is_waiting]
    num_slots, num_workers = max(capacity.num_slots, 1), max(capacity.num_workers, 1)
    ends: dict[JobId, float] = {}
    spent = 0.0
    while running or waiting:
        while waiting and len(running) < num_slots:
            running.append(waiting.pop())
        rates = _rates(running, num_workers, capacity)
        step = min(left.work / rate for left, rate in rates)
        spent += step
        for left, rate in rates:
            left.work -= rate * step
            if left.work <= 1e-9 * left.job.work:
                ends[left.job.id] = spent
        running = [left for left in running if left.job.id not in ends]
    return ends


def remaining(job: ActiveJob) -> float:
    """The work that is left of it."""
    return job.work * (1 - share_of(job.progress))


def _rates(running: Sequence[_Left], num_workers: int, capacity: Capacity) -> list[tuple[_Left, float]]:
    """Who is served now, each with its part of a device."""
    order = sorted(running, key=lambda left: capacity.weighted(left.job, left.work))
    served = order[:num_workers]
    oldest, share = running[0], capacity.oldest_share
    rates = [(left, 1.0) for left in served]
    if len(running) < capacity.num_slots:
        rates = [(left, capacity.left_by_newcomers(capacity.weighted(left.job, left.work))) for left in served]
    if share <= 0:
        return rates
    if oldest in served:
        return [(left, max(rate, share) if left is oldest else rate) for left, rate in rates]
    last, rate = rates[-1]
    return [*rates[:-1], (last, rate * (1.0 - share)), (oldest, share)]
