"""When each waiting job will be done: its place in the queue, and the seconds to its end.

Pure arithmetic over the jobs that have not ended: jobs get a slot by priority and age, and of those that have one the
shortest goes on, while the oldest has the turns that it earns and a decode is not overtaken, as
``worker/scheduler.py`` has it, but for deadlines and keys. Those that are still to come are thought to be like those
that came lately: as long as there is a place for them, the shorter ones overtake.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from kinema.ids import JobId
from kinema.job import share_of
from kinema.jobs.store import ActiveJob, Arrivals
from kinema.request.request import Priority

# The jobs of so many seconds tell what comes. Those of a stream that began later came in less; but what came in less
# than a minute may be a burst, and a few that came in less than some times what a job takes itself may be as well: they
# are spread over all of these seconds.
ARRIVALS_S = 900.0
_SHORTEST_STREAM_S = 60.0
_SHORTEST_STREAM = 4.0
_FEW = 50
# However much comes, a job is thought to have a tenth of the device in the end.
_MOST_OVERTAKEN = 0.9
# A job whose steps are not known is thought to have so many.
_MOST_TURNS = 1000


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
    """What is left of a job. ``rate`` is the part of a device that those to come leave to its steps; its decode, the
    last part, is not overtaken."""

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
        """To its end, while nothing but those to come is served instead."""
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
    num_slots = max(capacity.num_slots, 1)
    ends: dict[JobId, float] = {}
    spent, owed = _finish_turns(running, capacity)
    while running or waiting:
        while waiting and len(running) < num_slots:
            running.append(waiting.pop())
        time, owed = _go_on(running, owed, capacity)
        spent += time
        ends |= {left.job.id: spent for left in running if left.work <= 1e-9 * left.job.work}
        running = [left for left in running if left.job.id not in ends]
    return ends


def remaining(job: ActiveJob) -> float:
    """The work that is left of it."""
    return job.work * (1 - share_of(job.progress))


def _finish_turns(running: Sequence[_Left], capacity: Capacity) -> tuple[float, float]:
    """The turns that are under way, which count as half done: the time that those take that no device is free for, and
    what the oldest is owed by then."""
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
    """What the oldest is owed at the end of another job's step: at least its share of its own last turn and of that
    step, and as much as a whole turn and that share of a step."""
    return (1 + capacity.oldest_share) / 2 * oldest.step_work + capacity.oldest_share * served.step_work


def _in_order(running: Sequence[_Left], capacity: Capacity) -> list[_Left]:
    """As they are served."""
    return sorted(running, key=lambda left: (not left.is_decoding, capacity.weighted(left.job, left.work)))


def _go_on(running: Sequence[_Left], owed: float, capacity: Capacity) -> tuple[float, float]:
    """To the end of the next job; the time that takes, and what the oldest is owed then."""
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
    # Those to come are thought to have steps of the same length.
    step = served.job.step_work
    rest = served.denoising / served.rate % step if step > 0 else 0.0
    at_boundary = min(rest, step - rest) <= 1e-9 * served.job.work
    num_turns = ceil(oldest.denoising / turn - 1e-9)
    return _Turns(turn, num_turns, share, owed, step, 0.0 if at_boundary else rest)
