"""One device under the worker's scheduler, in virtual time: a turn's seconds pass at once.

The scheduler, the queue's order and the predictions are the service's own. HTTP is not simulated, nor the encoding and
storing of a film, which run beside the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from kinema.bench.report import Outcome
from kinema.bench.workload import Arrival
from kinema.ids import JobId
from kinema.jobs.store import ActiveJob, Arrivals
from kinema.request.request import GenerationRequest, Priority
from kinema.service.outlook import ARRIVALS_S, Capacity, work_until_end
from kinema.worker.costs import CostModel, Done
from kinema.worker.scheduler import OLDEST_SHARE, WEIGHTS, Candidate, Policy, StepScheduler


@dataclass(frozen=True, slots=True)
class SimulatedVideo:
    """The seconds of the device that each turn of a video takes; the last ``num_chunks`` turns decode."""

    at_s: float
    name: str
    turns_s: Sequence[float]
    num_chunks: int
    priority: Priority = "normal"
    deadline_s: float | None = None

    @classmethod
    def of(cls, arrival: Arrival, request: GenerationRequest, costs: CostModel) -> SimulatedVideo:
        """The video of this request, with turns as long as the costs predict."""
        steps, chunks = request.num_denoising_steps, request.geometry.num_chunks(request.num_frames)
        states = [Done(is_begun=step > 0, steps=step) for step in range(steps)]
        states += [Done(is_begun=True, steps=steps, chunks=chunk) for chunk in range(chunks)]
        turns_s = [costs.next_turn_s(request, done) for done in states]
        return cls(
            arrival.at_s, arrival.name, turns_s, chunks, priority=request.priority, deadline_s=request.deadline_s
        )


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of time in which the device worked for one video."""

    number: int
    start_s: float
    end_s: float


@dataclass(slots=True)
class _Progress:
    """How far a video is."""

    number: int
    video: SimulatedVideo
    # Predicted under ``shortest`` alone, as by the service.
    eta_s: float | None = None
    turn: int = 0
    last_turn: int = 0
    left_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.left_s = sum(self.video.turns_s)

    def candidate(self) -> Candidate:
        video = self.video
        return Candidate(
            key=self.number,
            remaining_s=self.left_s,
            next_turn_s=video.turns_s[self.turn],
            last_turn=self.last_turn,
            is_decoding=self.turn >= len(video.turns_s) - video.num_chunks,
            priority=video.priority,
            deadline_at=None if video.deadline_s is None else video.at_s + video.deadline_s,
        )


class Simulation:
    """One device and its queue. ``run`` plays the videos; ``spans`` then says who had the device."""

    def __init__(self, policy: Policy = "shortest", max_active: int = 8) -> None:
        self._scheduler = StepScheduler(policy)
        self._max_active = max_active
        self._capacity = Capacity(1, max_active, OLDEST_SHARE, WEIGHTS)
        self._waiting: list[_Progress] = []
        self._active: dict[int, _Progress] = {}
        # The active videos as the scheduler sees them: only the one that was served changes.
        self._candidates: dict[int, Candidate] = {}
        # When each video arrived, and the seconds of the device that it takes.
        self._arrivals: list[tuple[float, float]] = []
        self._now = 0.0
        self._turn = 0
        self._turn_s = 0.0
        self.spans: list[Span] = []

    def run(self, videos: Sequence[SimulatedVideo]) -> list[Outcome]:
        """What became of each video, in the same order, which is that of their arrival."""
        coming = list(enumerate(videos))[::-1]
        outcomes: dict[int, Outcome] = {}
        while coming or self._waiting or self._active:
            if not (self._waiting or self._active):
                self._now = max(self._now, coming[-1][1].at_s)
            while coming and coming[-1][1].at_s <= self._now:
                self._arrive(*coming.pop())
            self._admit()
            made = self._step()
            if made is not None:
                video = made.video
                outcomes[made.number] = Outcome(
                    video.name, video.at_s, self._now - video.at_s, sum(video.turns_s), made.eta_s
                )
        return [outcomes[number] for number in range(len(videos))]

    def _arrive(self, number: int, video: SimulatedVideo) -> None:
        progress = _Progress(number, video)
        self._waiting.append(progress)
        self._waiting.sort(key=lambda one: (-WEIGHTS[one.video.priority], one.number))
        if self._scheduler.policy == "shortest":
            # It arrived in the middle of a turn, which ends now. A service only knows that a turn is under way.
            rest_s = self._turn_s / 2 if self._now > video.at_s else 0.0
            progress.eta_s = rest_s + self._until_end(number)
        self._arrivals.append((video.at_s, progress.left_s))

    def _until_end(self, number: int) -> float:
        jobs = [_as_job(one, is_waiting=False) for one in self._active.values()]
        jobs += [_as_job(one, is_waiting=True) for one in self._waiting]
        return work_until_end(jobs, replace(self._capacity, arrivals=self._lately()))[JobId(str(number))]

    def _lately(self) -> Arrivals:
        """The latest arrivals, as ``JobStore.recent_arrivals`` counts them."""
        lately = [one for one in self._arrivals if one[0] > self._now - ARRIVALS_S]
        return Arrivals.of([seconds for _, seconds in lately], self._now - lately[0][0] if lately else 0.0, ARRIVALS_S)

    def _admit(self) -> None:
        while self._waiting and len(self._active) < self._max_active:
            progress = self._waiting.pop(0)
            self._active[progress.number] = progress
            self._candidates[progress.number] = progress.candidate()

    def _step(self) -> _Progress | None:
        """Give one video its turn; the video, if that was its last turn."""
        key = self._scheduler.choose([*self._candidates.values()], self._now)
        assert key is not None, "some video waits for its turn"
        progress = self._active[key]
        self._turn += 1
        progress.last_turn = self._turn
        seconds = progress.video.turns_s[progress.turn]
        self._note(key, seconds)
        self._turn_s = seconds
        self._now += seconds
        self._scheduler.charge(key, seconds)
        progress.turn += 1
        progress.left_s -= seconds
        if progress.turn < len(progress.video.turns_s):
            self._candidates[key] = progress.candidate()
            return None
        del self._candidates[key]
        self._scheduler.end(key)
        return self._active.pop(key)

    def _note(self, number: int, seconds: float) -> None:
        last = self.spans[-1] if self.spans else None
        if last is not None and last.number == number and last.end_s == self._now:
            self.spans[-1] = Span(number, last.start_s, self._now + seconds)
        else:
            self.spans.append(Span(number, self._now, self._now + seconds))


def _as_job(progress: _Progress, *, is_waiting: bool) -> ActiveJob:
    video = progress.video
    num_steps = len(video.turns_s) - video.num_chunks
    return ActiveJob(
        id=JobId(str(progress.number)),
        model="",
        key_id="",
        work=max(progress.left_s, 1e-9),
        progress=0,
        is_waiting=is_waiting,
        priority=video.priority,
        # The last step: the first one also encodes the prompt.
        step_work=video.turns_s[num_steps - 1],
        decoding_work=sum(video.turns_s[num_steps:]),
    )
