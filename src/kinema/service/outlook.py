"""The outlook of each job that has not ended: its place in the queue, and the seconds to its end.

This is pure arithmetic over these jobs. Jobs get a slot in the order of ``fair_order.py``. After that it follows
``worker/scheduler.py``, without deadlines and API keys: of the jobs with a slot the one with the least work left is
served; the oldest gets the turns that it earns; and nothing overtakes a decode. Future jobs are expected to be like the
recent ones: while there is a free slot, the shorter of them overtake.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapreplace
from math import ceil

from kinema.ids import JobId
from kinema.job import share_of
from kinema.jobs.store import ActiveJob, Arrivals
from kinema.request.request import Priority
from kinema.service.fair_order import FairOrder

# The jobs of the last 15 minutes tell which jobs will come. When the stream of jobs began later, its own time counts.
# But jobs that came within a minute may be a burst, and so may fewer than 50 jobs that came within four times the time
# of the job in question: such jobs are spread over the whole 15 minutes.
ARRIVALS_S = 900.0
_SHORTEST_STREAM_S = 60.0
_SHORTEST_STREAM = 4.0
_FEW = 50
# However many jobs come, a job is expected to get a tenth of the device at least.
_MOST_OVERTAKEN = 0.9
# So many ends are played turn by turn. Behind them, jobs are expected to be served one after the other: what is further
# away is less certain anyway, and the time of the play grows with the number of the jobs.
_MOST_ENDS = 100
# The number of steps of a job whose steps are not known.
_MOST_TURNS = 1000


@dataclass(frozen=True, slots=True)
class Outlook:
    """``queue_position`` counts from 1 and is None for a running job; ``eta_s`` is None until a video was timed."""

    queue_position: int | None
    eta_s: float | None


@dataclass(frozen=True, slots=True)
class Capacity:
    """The workers of a model.

    ``num_slots`` counts free and taken slots. The oldest job gets ``oldest_share`` of a device. The work of a job is
    divided by the weight of its priority. ``arrivals`` are the recent jobs, in the unit of the jobs' work.
    """

    num_workers: int = 1
    num_slots: int = 1
    oldest_share: float = 0.0
    weights: Mapping[Priority, float] | None = None
    arrivals: Arrivals | None = None

    def weighted(self, job: ActiveJob, work: float) -> float:
        return work / (self.weights or {}).get(job.priority, 1.0)

    def left_by_newcomers(self, weighted: float) -> float:
        """Return the part of a device that is left by future jobs which are shorter than ``weighted``.

        The part is kept until the next job ends, though fewer jobs overtake as the work gets less: the error is small
        beside the uncertainty of the future.
        """
        if self.arrivals is None:
            return 1.0
        came, within_s = self.arrivals.work, self.arrivals.within_s
        if within_s < _SHORTEST_STREAM_S or (len(came) < _FEW and within_s < _SHORTEST_STREAM * weighted):
            within_s = ARRIVALS_S
        overtaking = sum(work for work in came if work < weighted) / within_s
        return 1.0 - min(overtaking / max(self.num_workers, 1), _MOST_OVERTAKEN)


@dataclass(slots=True)
class _Left:
    """The work that is left of a job. ``rate`` is the part of a device that future jobs leave to its steps; its decode,
    the last part of the work, is not overtaken.
    """

    job: ActiveJob
    work: float
    rate: float = 1.0

    @property
    def denoising(self) -> float:
        return max(self.work - self.job.decoding_work, 0.0)

    @property
    def is_decoding(self) -> bool:
        return self.denoising <= 1e-9 * self.job.work < self.job.decoding_work

    @property
    def time(self) -> float:
        """The time to its end, when only future jobs are served instead of it."""
        return self.denoising / self.rate + self.work - self.denoising

    def go_on(self, time: float) -> None:
        denoising = self.denoising
        self.work -= min(time * self.rate, denoising) + max(time - denoising / self.rate, 0.0)


@dataclass(frozen=True, slots=True)
class _Turns:
    """The turns that the oldest has of a device on which another job is served: ``num_turns`` of ``turn`` each.

    A turn is earned by ``share`` of the time, of which ``owed`` is there already. It begins as soon as it is earned and
    the other job is between two steps: those are of ``step`` each, and ``step_rest`` is left of the first. A ``step``
    of 0 is not known, and a turn then begins at any moment.
    """

    turn: float
    num_turns: int
    share: float
    owed: float
    step: float
    step_rest: float

    def after(self, number: int) -> float:
        """The work of the other job before a turn begins; turns are counted from 0."""
        earned = max((self.turn * (number + 1) - self.owed) / self.share - self.turn * number, 0.0)
        if self.step <= 0:
            return earned
        return self.step_rest + self.step * max(ceil((earned - self.step_rest) / self.step - 1e-9), 0)

    def begin(self, number: int) -> float:
        """When a turn begins; turns are counted from 0."""
        return self.turn * number + self.after(number)

    def during(self, other: float) -> int:
        """The number of turns that begin before so much work of the other job is done."""
        return bisect_left(range(self.num_turns), other - 1e-9 * other, key=self.after)

    def until(self, time: float) -> float:
        """The work of all turns up to a time."""
        last = bisect_right(range(self.num_turns), time, key=self.begin) - 1
        return 0.0 if last < 0 else self.turn * last + min(time - self.begin(last), self.turn)

    def time(self, work: float) -> float:
        """When the turns have done so much work."""
        whole = max(ceil(work / self.turn - 1e-9) - 1, 0)
        return self.begin(whole) + work - whole * self.turn


def outlooks(
    active: Sequence[ActiveJob], seconds_per_work: Mapping[str, float | None], capacities: Mapping[str, Capacity]
) -> dict[JobId, Outlook]:
    """Return the outlook of every job. ``active`` is by priority and age; the mappings have models as keys."""
    by_model: dict[str, list[ActiveJob]] = defaultdict(list)
    for job in active:
        by_model[job.model].append(job)
    found: dict[JobId, Outlook] = {}
    for model, jobs in by_model.items():
        rate = seconds_per_work.get(model)
        begun, ends = _play(jobs, capacities.get(model, Capacity()))
        positions = {job_id: place for place, job_id in enumerate(begun, start=1)}
        for job in jobs:
            eta_s = None if rate is None else round(ends[job.id] * rate, 2)
            found[job.id] = Outlook(positions.get(job.id), eta_s)
    return found


def work_until_end(jobs: Sequence[ActiveJob], capacity: Capacity) -> dict[JobId, float]:
    """Return, for each job of one model, the work that one device does until that job is done.

    ``jobs`` is by priority and age.
    """
    return _play(jobs, capacity)[1]


def _play(jobs: Sequence[ActiveJob], capacity: Capacity) -> tuple[list[JobId], dict[JobId, float]]:
    """Play the jobs of one model. Returns the waiting ones in the order in which they get a slot, and the work that one
    device does until each job is done."""
    running = [_Left(job, remaining(job)) for job in jobs if not job.is_waiting]
    waiting = FairOrder(jobs)
    num_slots = max(capacity.num_slots, 1)
    begun: list[JobId] = []
    ends: dict[JobId, float] = {}
    spent, owed = _finish_turns(running, capacity)
    while running or waiting:
        if len(ends) >= _MOST_ENDS:
            _follow(running, waiting, spent, capacity, begun, ends)
            break
        while waiting and len(running) < num_slots:
            job = waiting.take()
            begun.append(job.id)
            running.append(_Left(job, job.work))
        time, owed = _go_on(running, owed, capacity)
        spent += time
        for left in running:
            if left.work <= 1e-9 * left.job.work:
                ends[left.job.id] = spent
                waiting.end(left.job)
        running = [left for left in running if left.job.id not in ends]
    return begun, ends


def _follow(
    running: Sequence[_Left],
    waiting: FairOrder,
    spent: float,
    capacity: Capacity,
    begun: list[JobId],
    ends: dict[JobId, float],
) -> None:
    """Add the waiting jobs to ``begun``, and all to ``ends``: a device that is free takes the next one to its end."""
    order = iter(_in_order(running, capacity))
    busy: list[tuple[float, int, ActiveJob | None]] = [(spent, number, None) for number in range(capacity.num_workers)]
    busy = busy or [(spent, 0, None)]
    while True:
        free_at, number, ended = busy[0]
        if ended is not None:
            waiting.end(ended)
        left = next(order, None)
        if left is not None:
            job, work = left.job, left.work
        elif waiting:
            job = waiting.take()
            begun.append(job.id)
            work = job.work
        else:
            return
        ends[job.id] = free_at + work
        heapreplace(busy, (free_at + work, number, job))


def remaining(job: ActiveJob) -> float:
    """Return the work that is left of the job."""
    return job.work * (1 - share_of(job.progress))


def _finish_turns(running: Sequence[_Left], capacity: Capacity) -> tuple[float, float]:
    """Finish the turns that are under way, which count as half done.

    Returns the time until a device is free, and what the oldest is owed by then.
    """
    begun = [left for left in running if 0 < left.work < left.job.work]
    served = _in_order(begun, capacity)[: max(capacity.num_workers, 1)]
    if len(served) < max(capacity.num_workers, 1):
        return 0.0, 0.0
    # A decode goes on in any case.
    turns = [0.0 if left.is_decoding else left.job.step_work for left in served]
    wait = min(turns) / 2
    for left, turn in zip(served, turns, strict=True):
        left.work = max(left.work - turn / 2 - wait, min(left.work, left.job.decoding_work))
    return wait, 0.0 if running[0] in served else _owed_in_the_mean(running[0].job, served[-1].job, capacity)


def _owed_in_the_mean(oldest: ActiveJob, served: ActiveJob, capacity: Capacity) -> float:
    """Return the mean of what the oldest is owed at the end of another job's step.

    It is owed at least its share of its own last turn and of that step, and at most a whole turn and that share.
    """
    return (1 + capacity.oldest_share) / 2 * oldest.step_work + capacity.oldest_share * served.step_work


def _in_order(running: Sequence[_Left], capacity: Capacity) -> list[_Left]:
    """The running jobs in the order in which devices serve them."""
    return sorted(running, key=lambda left: (not left.is_decoding, capacity.weighted(left.job, left.work)))


def _go_on(running: Sequence[_Left], owed: float, capacity: Capacity) -> tuple[float, float]:
    """Go on to the end of the next job. Returns the time until then, and what the oldest is owed then."""
    oldest, share = running[0], capacity.oldest_share
    served = _in_order(running, capacity)[: max(capacity.num_workers, 1)]
    for left in served:
        has_room = len(running) < capacity.num_slots
        left.rate = capacity.left_by_newcomers(capacity.weighted(left.job, left.work)) if has_room else 1.0
    last = served[-1]
    if oldest in served or share <= 0 or last.is_decoding:
        oldest.rate = max(oldest.rate, share)
        time = min(left.time for left in served)
        for left in served:
            left.go_on(time)
        return time, 0.0 if oldest in served else owed + share * time
    turns = _turns_beside(last, oldest, owed, share)
    most = min(turns.turn * turns.during(last.denoising / last.rate), oldest.denoising)
    time = min(last.time + most, turns.time(oldest.denoising), *(left.time for left in served[:-1]))
    had = min(turns.until(time), most)
    for left in served[:-1]:
        left.go_on(time)
    last.go_on(time - had)
    oldest.work -= had
    return time, max(owed + share * time - had, 0.0)


def _turns_beside(served: _Left, oldest: _Left, owed: float, share: float) -> _Turns:
    """The turns of the oldest until its decode, which nobody overtakes, while another job is served."""
    turn = max(oldest.job.step_work, oldest.job.work / _MOST_TURNS)
    # Future jobs are expected to have steps of the same length.
    step = served.job.step_work
    rest = served.denoising / served.rate % step if step > 0 else 0.0
    at_boundary = min(rest, step - rest) <= 1e-9 * served.job.work
    num_turns = ceil(oldest.denoising / turn - 1e-9)
    return _Turns(turn, num_turns, share, owed, step, 0.0 if at_boundary else rest)
