"""When a new job would begin in a long line, read off what was predicted for the jobs in it. Pure arithmetic.

To play the whole line again for each client that asks would take too long. The new job takes the place of the first of
those that are claimed after it: jobs of a lower priority, and jobs of the same priority that are further behind in the
line of their own key. It is a little wrong where the keys send jobs of very different lengths.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate

from kinema.ids import JobId
from kinema.jobs.store import PRIORITIES, ActiveJob
from kinema.request.request import Priority


class Places:
    """The waiting jobs of one model.

    ``jobs`` are all its jobs that have not ended, by priority and age; ``begins`` says in how many seconds each begins,
    and ``end_s`` in how many a job at the end of the line would.
    """

    def __init__(self, jobs: Sequence[ActiveJob], begins: Mapping[JobId, float], end_s: float) -> None:
        # The jobs of each key that run, or wait with the same or a higher priority: jobs come by priority.
        self._before: Counter[tuple[str, int]] = Counter()
        self._running = Counter(job.key_id for job in jobs if not job.is_waiting)
        waiting: Counter[str] = Counter()
        places: list[tuple[tuple[int, int], float]] = []
        for job in jobs:
            if job.is_waiting:
                rank = PRIORITIES.index(job.priority)
                places.append(((rank, self._running[job.key_id] + waiting[job.key_id]), begins[job.id]))
                waiting[job.key_id] += 1
                self._before[job.key_id, rank] += 1
        places.sort()
        self._places = [place for place, _ in places]
        # Of each place and those behind it, the first that begins.
        backwards = accumulate((begin for _, begin in reversed(places)), min, initial=end_s)
        self._begins = list(backwards)[::-1]

    def begin_s(self, key_id: str, priority: Priority) -> float:
        """The seconds until a job of this key and priority would begin, if it came now."""
        rank = PRIORITIES.index(priority)
        level = self._running[key_id] + sum(self._before[key_id, one] for one in range(rank + 1))
        return self._begins[bisect_right(self._places, (rank, level))]
