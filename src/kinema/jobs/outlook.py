"""When each waiting job will be done: its place in the queue, and the seconds to its end.

Pure arithmetic over the jobs that have not ended. It takes the queue as first come, first served, and the running jobs
of a model as sharing its devices evenly.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kinema.job import JobId
from kinema.jobs.store import ActiveJob


@dataclass(frozen=True, slots=True)
class Outlook:
    """``queue_position`` counts from 1, None once it runs; ``eta_s`` is None as long as nothing was ever timed."""

    queue_position: int | None
    eta_s: float | None


def outlooks(
    active: Sequence[ActiveJob], seconds_per_work: Mapping[str, float | None], num_workers: Mapping[str, int]
) -> dict[JobId, Outlook]:
    """The outlook of every job; ``active`` is in the order of the queue, the mappings go by model."""
    by_model: dict[str, list[ActiveJob]] = defaultdict(list)
    for job in active:
        by_model[job.model].append(job)
    found: dict[JobId, Outlook] = {}
    for model, jobs in by_model.items():
        rate, workers = seconds_per_work.get(model), max(num_workers.get(model, 1), 1)
        running = [job for job in jobs if not job.is_waiting]
        for job in running:
            share = max(1.0, len(running) / workers)
            found[job.id] = Outlook(None, _seconds(remaining(job) * share, rate))
        ahead = sum(map(remaining, running))
        for position, job in enumerate((job for job in jobs if job.is_waiting), start=1):
            ahead += job.work
            found[job.id] = Outlook(position, _seconds(max(ahead / workers, job.work), rate))
    return found


def remaining(job: ActiveJob) -> float:
    """The work that is left of it."""
    return job.work * (1 - job.progress / 100)


def _seconds(work: float, rate: float | None) -> float | None:
    return None if rate is None else round(work * rate, 1)
