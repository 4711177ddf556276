"""The order in which the waiting jobs of a model get places, as ``jobs/claims.py`` claims them. Pure arithmetic."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from kinema.jobs.store import PRIORITIES, ActiveJob

# The priority, the key's running jobs and its turn, and the place of its first job by priority and age.
_Claim = tuple[int, int, int, int]


@dataclass(slots=True)
class _Key:
    """The jobs of a key: those that wait, with their places by priority and age, and the number that run."""

    turn: int = 0
    num_running: int = 0
    waiting: deque[tuple[int, ActiveJob]] = field(default_factory=deque)

    @property
    def claim(self) -> _Claim | None:
        """What decides when its next job comes: the smallest is first."""
        if not self.waiting:
            return None
        place, job = self.waiting[0]
        return PRIORITIES.index(job.priority), self.num_running, self.turn, place


class FairOrder:
    """The jobs that wait. ``take`` says which one gets a place, and ``end`` is told who left one.

    ``jobs`` are all jobs of a model that have not ended, by priority, then the oldest first.
    """

    def __init__(self, jobs: Sequence[ActiveJob]) -> None:
        self._keys: defaultdict[str, _Key] = defaultdict(_Key)
        for place, job in enumerate(jobs):
            key = self._keys[job.key_id]
            key.turn = job.turn
            key.num_running += not job.is_waiting
            if job.is_waiting:
                key.waiting.append((place, job))
        self._num_waiting = sum(job.is_waiting for job in jobs)
        self._last_turn = max((key.turn for key in self._keys.values()), default=0)
        # Every key's claim is here, also claims that were true before; those are passed over.
        self._claims = [(key.claim, key_id) for key_id, key in self._keys.items() if key.claim is not None]
        heapify(self._claims)

    def __len__(self) -> int:
        return self._num_waiting

    def take(self) -> ActiveJob:
        """The next job, which runs from this call on. Raises IndexError when no job waits."""
        while True:
            claim, key_id = heappop(self._claims)
            key = self._keys[key_id]
            if claim == key.claim:
                break
        _, job = key.waiting.popleft()
        self._num_waiting -= 1
        self._last_turn += 1
        key.turn, key.num_running = self._last_turn, key.num_running + 1
        self._note(key_id)
        return job

    def end(self, job: ActiveJob) -> None:
        """Note that a running job has ended."""
        self._keys[job.key_id].num_running -= 1
        self._note(job.key_id)

    def _note(self, key_id: str) -> None:
        claim = self._keys[key_id].claim
        if claim is not None:
            heappush(self._claims, (claim, key_id))
